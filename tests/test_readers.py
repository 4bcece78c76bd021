"""The laws of what reads the residual stream: sums, removals by hand, and that nothing else is run or held."""

from functools import partial

import numpy as np
import pytest
import torch
from conftest import NORMALIZATIONS, copy_weights, make_model, random_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from test_bridge import NAMES, bridge_of, own
from test_bridge import close as close_on_bridge
from test_dla import component_outputs, target_logits
from torch.utils._python_dispatch import TorchDispatchMode

from lnfree_interp import (
    Reader,
    attribution_to,
    attributions_to,
    direct_effect,
    direct_logit_attribution,
    effect_on,
    forward,
    read_weights,
    through_hooks,
)
from lnfree_interp.dla import request
from lnfree_interp.dla.record import component_labels
from lnfree_interp.lens import is_bridge

slow = pytest.mark.slow
BY = ("component", "head", "neuron", "source")
DIRECTION = torch.linspace(-1, 1, 24, dtype=torch.float64) ** 3
# Name -> the reader of a layer, the hook of what it reads, and the hook of the stream it reads.
READERS = {
    "neuron": (Reader.neuron, "mlp.hook_pre", "hook_resid_mid"),
    "query": (Reader.query, "attn.hook_q", "hook_resid_pre"),
    "key": (Reader.key, "attn.hook_k", "hook_resid_pre"),
    "value": (Reader.value, "attn.hook_v", "hook_resid_pre"),
}


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def total(result):
    """What is read, [batch, pos, reader]."""
    values = result.values.sum(-1) if result.values.ndim == 5 else result.values
    return (values.sum(1) + result.bias).permute(1, 2, 0)


def outputs_before(model, tokens, labels, by, cache):
    """What each of some components wrote, [component, batch, pos, d_model], by source [..., pos, source, d_model]."""
    outputs, _ = component_outputs(model, tokens, "head" if by == "source" else by, cache)
    every = dict(zip(component_labels(model.cfg, by), outputs))
    if by != "source":
        return torch.stack([every[label] for label in labels])
    n_pos, found = tokens.shape[1], []
    for label in labels:
        if "H" in label:
            layer, head = map(int, label[1:].split("H"))
            v = cache[f"blocks.{layer}.attn.hook_v"]
            v = v[:, :, head // (model.cfg.n_heads // v.shape[2])] @ model.blocks[layer].attn.W_O[head]
            pattern = cache[f"blocks.{layer}.attn.hook_pattern"][:, head]
            found.append(pattern[..., None] * v[:, None])
        else:
            found.append(every[label][:, :, None] * torch.eye(n_pos, dtype=every[label].dtype)[:, :, None])
    return torch.stack(found)


def removed_by_hand(model, tokens, reads, stream, outputs):
    """reading(x) - reading(x - c) by the model's own forward and a hook that takes c out: [component, ..., reader]."""
    found = []
    outputs = torch.cat([torch.zeros_like(outputs[:1]), outputs])
    n = len(outputs)
    hooks = [
        (stream, lambda x, hook: x - outputs.flatten(0, 1)),
        (reads, lambda x, hook: found.append(x.flatten(2).unflatten(0, (n, -1)))),
    ]
    model.run_with_hooks(tokens.repeat(n, 1), return_type=None, fwd_hooks=hooks)
    return found[0][0] - found[0][1:]


def check_laws(model, tokens, reader, by, reads, stream, cache):
    """Sums are the readings, effects are removals by hand, without a norm the two agree."""
    linear, exact = (f(model, tokens, reader, by=by) for f in (attribution_to, effect_on))
    close(total(linear), cache[reads].flatten(2))
    chosen = list(range(len(linear.labels)))[:: 7 if by == "neuron" else 1]
    outputs = outputs_before(model, tokens, [linear.labels[i] for i in chosen], by, cache)
    outputs = outputs[:, :, :, None] if by != "source" else outputs
    for source in range(outputs.shape[3]):
        brute = removed_by_hand(model, tokens, reads, stream, outputs[:, :, :, source])
        values = exact.values[..., source] if by == "source" else exact.values
        close(values[:, chosen].permute(1, 2, 3, 0), brute)
    if model.cfg.normalization_type is None:
        close(exact.values, linear.values)
    else:
        assert (exact.values - linear.values).abs().max() > 1e-3
    if by == "source":
        close(linear.values.sum(-1), attribution_to(model, tokens, reader, by="head").values)


@pytest.mark.parametrize("by", ["component", "head", pytest.param("neuron", marks=slow), "source"])
def test_sums_are_the_readings_and_effects_are_removals_on_gpt2(any_model, by):
    check_all_readers(any_model, by)


@pytest.mark.parametrize("by", ["component", *(pytest.param(by, marks=slow) for by in BY[1:])])
def test_sums_are_the_readings_and_effects_are_removals_on_other_blocks(any_kind, by):
    check_all_readers(any_kind, by)


def check_all_readers(any_block, by):
    model, tokens = any_block, random_tokens(any_block, 2, 5)
    _, cache = model.run_with_cache(tokens)
    for make, reads, stream in READERS.values():
        if by != "component" and getattr(model.cfg, "use_normalization_before_and_after", False):
            with pytest.raises(ValueError, match="normalises what its blocks write"):
                attribution_to(model, tokens, make(1), by=by)
            continue
        stream = "hook_resid_pre" if getattr(model.cfg, "parallel_attn_mlp", False) else stream
        check_laws(model, tokens, make(1), by, f"blocks.1.{reads}", f"blocks.1.{stream}", cache)


@pytest.mark.parametrize("kind", ["Llama", "Qwen", "Gemma"])
def test_the_linear_part_of_a_gated_mlp(model_of, kind):
    model = model_of(kind)
    tokens, reads = random_tokens(model), "blocks.1.mlp.hook_pre_linear"
    _, cache = model.run_with_cache(tokens)
    check_laws(model, tokens, Reader.neuron(-1, linear=True), "component", reads, "blocks.1.hook_resid_mid", cache)


@pytest.mark.parametrize("site", ["resid_pre", "resid_mid", "final"])
@pytest.mark.parametrize("kind", ["GPT-2", pytest.param("Llama", marks=slow), pytest.param("Gemma", marks=slow)])
@pytest.mark.parametrize("normalised", [False, True])
def test_directions_of_the_stream(model_of, kind, site, normalised):
    """What is read is the stream at the site along the directions, or what the norm there makes of it."""
    model = model_of(kind)
    tokens, layer = random_tokens(model), None if site == "final" else 1
    reader = Reader.direction(layer, torch.stack([DIRECTION, DIRECTION.flip(0) + 1]), site, normalised=normalised)
    linear, exact = (f(model, tokens, reader) for f in (attribution_to, effect_on))
    _, cache = model.run_with_cache(tokens)
    last = model.cfg.n_layers - 1
    x = cache[f"blocks.{last}.hook_resid_post" if site == "final" else f"blocks.1.hook_{site}"]
    if is_bridge(model) and site == "resid_mid":
        x = cache["blocks.1.hook_resid_pre"] + cache["blocks.1.hook_attn_out"]
    weights = read_weights(model)
    norms = {"resid_pre": weights.layers[1].ln1, "resid_mid": weights.layers[1].ln2, "final": weights.ln_final}
    norm = norms[site] if normalised else lambda x: x
    close(total(linear), norm(x) @ reader.vector.T)
    outputs = outputs_before(model, tokens, linear.labels, "component", cache)
    close(exact.values.permute(1, 2, 3, 0), (norm(x) - norm(x - outputs)) @ reader.vector.T)
    assert normalised or torch.equal(exact.values, linear.values)
    one = attribution_to(model, tokens, Reader.direction(layer, reader.vector[1].tolist(), site, normalised=normalised))
    close(one.values, linear.values[1:])
    name = "final" if site == "final" else f"L1.{site}"
    assert (one.readers, linear.readers) == ((name,), (f"{name}[0]", f"{name}[1]"))


def test_directions_of_a_head_are_sums_over_coordinates(model_of):
    model = model_of("Llama")
    tokens, v = random_tokens(model), torch.stack([DIRECTION[:6], DIRECTION[6:12]])
    for make in (Reader.query, Reader.key, Reader.value):
        every = attribution_to(model, tokens, make(1))
        of_heads = every.values.unflatten(0, (-1, 6))
        along = attribution_to(model, tokens, make(1, direction=v))
        close(along.values, torch.einsum("hecbp,ke->hkcbp", of_heads, v).flatten(0, 1))
        close(along.bias, torch.einsum("hebp,ke->hkbp", every.bias.unflatten(0, (-1, 6)), v).flatten(0, 1))
        one = attribution_to(model, tokens, make(1, [-1, 0], v[0]))
        close(one.values, along.values[[-2, 0]])
        letter = make(0).kind[0]
        assert every.readers[7] == f"L1H1.{letter}[1]" and along.readers[3] == f"L1H1.{letter}[1]"
        assert one.readers == (f"L1H{len(of_heads) - 1}.{letter}", f"L1H0.{letter}")
    assert len(attribution_to(model, tokens, Reader.key(0)).readers) == 2 * 6  # the heads of keys
    assert len(attribution_to(model, tokens, Reader.query(0)).readers) == 4 * 6


@pytest.mark.parametrize("by", BY[:3])
def test_the_reader_of_logits_is_direct_logit_attribution(any_model, by):
    tokens, targets, versus = (random_tokens(any_model, seed=seed) for seed in range(3))
    for asked, positions in (((None, None), [1, 0]), ((targets, versus), None), ((targets[:, 0], None), None)):
        arguments = {"positions": positions, "by": by}
        theirs = {
            f: f(any_model, tokens, asked[0], versus=asked[1], **arguments)
            for f in (direct_logit_attribution, direct_effect)
        }
        for f, ours in ((direct_logit_attribution, attribution_to), (direct_effect, effect_on)):
            result = ours(any_model, tokens, Reader.logits(*asked), **arguments)
            close(result.values[0], theirs[f].values)
            close(result.bias[0], theirs[f].bias)
            assert (result.labels, result.positions) == (theirs[f].labels, theirs[f].positions)
    assert result.readers == ("logit",)


def test_logits_by_source(random_model):
    """A reader whose direction differs from token to token, and heads by what they read."""
    for kind in (None, "LNPre"):
        model, tokens = random_model(kind), random_tokens(random_model(kind))
        linear, exact = (f(model, tokens, Reader.logits(), by="source") for f in (attribution_to, effect_on))
        close(linear.values.sum(-1)[0], direct_logit_attribution(model, tokens, by="head").values)
        _, cache = model.run_with_cache(tokens)
        x = cache["blocks.1.hook_resid_post"]
        outputs = outputs_before(model, tokens, linear.labels, "source", cache)
        whole = target_logits(model, x[:, :-1], tokens[:, 1:])
        for source in range(tokens.shape[1]):
            left = target_logits(model, (x - outputs[:, :, :, source])[:, :, :-1], tokens[:, 1:])
            close(exact.values[0, ..., source], whole - left)


@settings(max_examples=10, deadline=None)
@given(data=st.data(), normalization=st.sampled_from(NORMALIZATIONS), by=st.sampled_from(BY))
def test_laws_hold_on_random_configurations(data, normalization, by):
    draw = data.draw
    n_layers, n_heads, parallel = (draw(s) for s in (st.integers(1, 3), st.integers(1, 3), st.booleans()))
    model = make_model(
        normalization, n_layers=n_layers, n_heads=n_heads, parallel_attn_mlp=parallel, seed=draw(st.integers(0, 9))
    )
    tokens = random_tokens(model, draw(st.integers(1, 3)), draw(st.integers(1, 7)))
    make, reads, stream = READERS[draw(st.sampled_from(sorted(READERS)))]
    layer = draw(st.integers(0, n_layers - 1))
    stream = "hook_resid_pre" if parallel else stream
    _, cache = model.run_with_cache(tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(request, "TOKENS_PER_PASS", draw(st.integers(1, 30)))
        linear, exact = (f(model, tokens, make(layer - n_layers), by=by) for f in (attribution_to, effect_on))
    close(total(linear), cache[f"blocks.{layer}.{reads}"].flatten(2))
    component = draw(st.integers(0, len(linear.labels) - 1))
    outputs = outputs_before(model, tokens, [linear.labels[component]], by, cache)
    source = draw(st.integers(0, tokens.shape[1] - 1))
    outputs = outputs[:, :, :, source] if by == "source" else outputs
    brute = removed_by_hand(model, tokens, f"blocks.{layer}.{reads}", f"blocks.{layer}.{stream}", outputs)
    values = exact.values[..., source] if by == "source" else exact.values
    close(values[:, component].permute(1, 2, 0), brute[0])


QUICK_WHERE = ([4, 1], [3, 3])
WHERE = (
    0,
    -1,
    [1, 4],
    [4, 1],
    slice(2, 5),
    slice(None, None, -1),
    [3, 3],
    [6, 1, 2, 3, 4, 5, 0],
    [True] * 3 + [False] * 4,
)


@pytest.mark.parametrize("positions", [p if p in QUICK_WHERE else pytest.param(p, marks=slow) for p in WHERE], ids=str)
def test_some_positions_are_those_of_all(random_model, positions):
    index = np.atleast_1d(np.arange(7)[positions]).tolist()
    for kind, parallel in (("LNPre", False), (None, False), ("LN", True)):
        model = random_model(kind, parallel_attn_mlp=parallel)
        tokens = random_tokens(model)
        for by in BY[1::2]:
            for reader in (Reader.neuron(1, [3, 5]), Reader.key(0, 1)):
                every, some = (effect_on(model, tokens, reader, by=by, positions=p) for p in (None, positions))
                close(some.values, every.values[:, :, :, index])
                close(some.bias, every.bias[:, :, index])
                assert some.positions == tuple(index)


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("kind", [None, "LNPre"])
def test_the_largest_senders_some_readers_at_a_time_and_chosen_senders(random_model, kind, by, monkeypatch):
    monkeypatch.setattr(request, "GROUP", 5)
    model = random_model(kind)
    tokens, reader = random_tokens(model), Reader.neuron(1, [3, 5, 2])
    for f in (attribution_to, effect_on):
        every, top = f(model, tokens, reader, by=by), f(model, tokens, reader, by=by, top=4)
        cells = every.values.movedim(-1, 2).flatten(1, 2) if by == "source" else every.values
        n_sources = tokens.shape[1] if by == "source" else 1
        largest = cells.abs().topk(4, dim=1)
        assert top.values.shape == top.senders.shape == (3, 4, *tokens.shape)
        close(top.values.abs(), largest.values)
        where = top.senders * n_sources + (0 if top.sources is None else top.sources)
        close(cells.gather(1, where), top.values)
        assert (top.sources is None) == (by != "source")
        close(top.bias, every.bias)
        assert top.table().per_token.sum() == pytest.approx(3 * 4)
        for options in ({}, {"top": 4}):
            wanted = f(model, tokens, reader, by=by, **options)
            exact = f is effect_on
            for memory, n_parts in ((1, 3), (10**9, 1)):
                found = list(attributions_to(model, tokens, reader, by=by, exact=exact, max_memory=memory, **options))
                assert len(found) == n_parts
                close(torch.cat([part.values for part in found]), wanted.values)
                close(torch.cat([part.bias for part in found]), wanted.bias)
                assert sum((part.readers for part in found), ()) == wanted.readers
        chosen = [every.labels[-1], "embed", every.labels[3]]
        some = f(model, tokens, reader, by=by, senders=chosen)
        assert some.labels == ("embed", every.labels[3], every.labels[-1])
        close(some.values, every.values[:, [0, 3, -1]])
    assert f(model, tokens, reader, by="component", top=99).values.shape[1] == 5
    one = attribution_to(model, tokens, reader, senders="embed")
    assert one.labels == ("embed",)


def test_tables(random_model):
    model = random_model("LNPre")
    result = attribution_to(model, random_tokens(model), Reader.neuron(1, [3, 5]), by="source")
    table = result.table()
    assert len(table) == 2 * len(result.labels) and table.mean_abs.is_monotonic_decreasing
    row = table[(table.reader == "L1N5") & (table.component == "L0H1")].iloc[0]
    values = result.values[1, result.labels.index("L0H1")].sum(-1)
    assert row["mean"] == pytest.approx(values.mean().item())
    assert row["std"] == pytest.approx(values.std(unbiased=False).item())


# ---------------------------------------------------------------------------------------------------------
# What is run and held


def test_stopping_at_a_layer_is_the_stream_that_enters_it(any_block):
    model, tokens = any_block, random_tokens(any_block)
    _, cache = model.run_with_cache(tokens)
    seen = []
    for stop in range(3):
        wanted = cache[f"blocks.{stop}.hook_resid_pre" if stop < 2 else "blocks.1.hook_resid_post"]
        hooks = {f"blocks.{i}.attn.hook_q": lambda q, i=i: seen.append((i, q.shape[1])) for i in range(2)}
        for positions in (None, [4, 1]):
            kept = wanted if positions is None else wanted[:, positions]
            close(forward.run(model, tokens, stop_at_layer=stop, hooks=hooks, positions=positions), kept)
            close(through_hooks.run(model, tokens, None, 0, hooks, positions, stop), kept)
            at = 7 if positions is None else 2
            assert seen == [(i, at if i == stop - 1 else 7) for i in range(stop)] * 2
            seen.clear()
    resid = torch.randn(2, 5, model.cfg.d_model, dtype=torch.float64)
    close(forward.run(model, resid=resid, start_layer=1, stop_at_layer=1), resid)
    ours = forward.run(model, resid=resid, start_layer=0, stop_at_layer=1)
    close(through_hooks.run(model, None, resid, 0, {}, None, 1), ours)
    with pytest.raises(ValueError, match=r"stop_at_layer 0 is outside 1\.\.2"):
        forward.run(model, resid=resid, start_layer=1, stop_at_layer=0)


def test_nothing_after_the_reader_is_run(random_model, monkeypatch):
    model, ran = random_model("LNPre", n_layers=3), []
    block, mlps = forward.block, forward._mlps
    monkeypatch.setattr(forward, "block", lambda weights, i, streams: ran.append(i) or block(weights, i, streams))
    monkeypatch.setattr(forward, "_mlps", lambda layer, name, *rest: ran.append(name) or mlps(layer, name, *rest))
    attribution_to(model, random_tokens(model), Reader.neuron(1))
    assert ran == [0, "blocks.0.", 1]
    ran.clear()
    attribution_to(model, random_tokens(model), Reader.query(1))
    assert ran == [0, "blocks.0."]
    hooked = make_model("LNPre", n_layers=3)
    for i in range(3):
        hooked.add_hook(f"blocks.{i}.hook_attn_out", lambda x, hook: ran.append(hook.name), is_permanent=True)
    ran.clear()
    attribution_to(hooked, random_tokens(hooked), Reader.neuron(1))
    assert len(ran) == 2


class Sizes(TorchDispatchMode):
    """Where the tensors that operations make are stored, and how many numbers are there."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if torch.is_tensor(t):
                storage = t.untyped_storage()
                self.seen.add((storage.data_ptr(), storage.nbytes() // t.itemsize))
        return out


def test_the_result_is_held_once_and_the_largest_are_found_without_the_others(monkeypatch):
    monkeypatch.setattr(request, "GROUP", 1)
    model = make_model("LNPre", n_layers=4, n_heads=8, d_head=8, d_model=64, d_mlp=256, d_vocab=40)
    tokens = random_tokens(model, 4, 24)
    for f in (attribution_to, effect_on):
        with Sizes() as sizes:
            result = f(model, tokens, Reader.neuron(-1), by="head")
        n = result.values.numel()
        assert {place for place, size in sizes.seen if size > n / 8} == {result.values.untyped_storage().data_ptr()}
        with Sizes() as sizes:
            f(model, tokens, Reader.neuron(-1), by="head", top=2)
        assert max(size for _, size in sizes.seen) < n / 3


# ---------------------------------------------------------------------------------------------------------
# Models that are not read, hooks, Bridges, low precision


NOT_READ = (
    {"positional_embedding_type": "alibi"},
    {"n_key_value_heads": 1, "ungroup_grouped_query_attention": True},
    {"use_attn_result": True, "n_key_value_heads": 1},
    {"use_split_qkv_input": True},
)
QUICK = ("GPT2 LN-free",)


@pytest.mark.parametrize("fields", [NOT_READ[0], *(pytest.param(fields, marks=slow) for fields in NOT_READ[1:])])
def test_models_that_are_not_read_go_through_their_own_forward(fields):
    model = make_model("RMSPre", **fields)
    tokens = random_tokens(model, 2, 5)
    _, cache = model.run_with_cache(tokens)
    for by in BY:
        for make, reads, stream in READERS.values():
            check_laws(model, tokens, make(1), by, f"blocks.1.{reads}", f"blocks.1.{stream}", cache)


HOOKS = (
    "hook_embed",
    "blocks.1.hook_resid_pre",
    "blocks.0.attn.hook_z",
    "blocks.0.attn.hook_v",
    "blocks.0.hook_mlp_out",
)


@pytest.mark.parametrize("hook", [HOOKS[1], *(pytest.param(hook, marks=slow) for hook in HOOKS if hook != HOOKS[1])])
def test_what_a_models_own_hooks_write_is_a_component(hook):
    for kind in (None, "LNPre"):
        model = make_model(kind)
        model.add_hook(hook, lambda x, hook: 1.5 * x + 1, is_permanent=True)
        tokens = random_tokens(model)
        _, cache = model.run_with_cache(tokens)
        for by in BY:
            for make, reads, _ in (READERS["neuron"], READERS["key"]):
                linear, exact = (f(model, tokens, make(1), by=by) for f in (attribution_to, effect_on))
                assert linear.labels[-1] == "hooks"
                close(total(linear), cache[f"blocks.1.{reads}"].flatten(2))
                assert kind is not None or torch.equal(linear.values, exact.values)


def test_a_hook_between_the_stream_and_its_reader_is_refused():
    model = make_model("LNPre")
    tokens = random_tokens(model)
    model.add_hook("blocks.1.ln1.hook_normalized", lambda x, hook: 2 * x, is_permanent=True)
    with pytest.raises(ValueError, match=r"a hook at blocks\.1\.ln1\..*, between the stream and its reader"):
        attribution_to(model, tokens, Reader.query(1))
    for reader in (Reader.neuron(1), Reader.query(0)):
        attribution_to(model, tokens, reader)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[slow] * (n not in QUICK)) for n in NAMES])
def test_bridges_as_a_user_holds_them(name):
    model = bridge_of(name)
    tokens = random_tokens(model, 2, 5)
    wanted_of = own(model, tokens, *(f"blocks.1.{reads}" for _, reads, _ in READERS.values()))[1:]
    for (make, _, _), wanted in zip(READERS.values(), wanted_of):
        for by in ("component", "source"):
            linear, exact = (f(model, tokens, make(1), by=by) for f in (attribution_to, effect_on))
            close_on_bridge(name, total(linear), wanted.flatten(2))
            if name == "GPT2 LN-free" or name.endswith("None"):
                assert torch.equal(linear.values, exact.values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("by", BY)
def test_low_precision_is_exact_on_the_activations_it_has(dtype, by):
    """A massive component, nearly all of the stream at one token: what is left of the stream without it is small."""
    model, wide = make_model("LNPre", dtype=dtype), make_model("LNPre")
    with torch.no_grad():
        wide.embed.W_E[:3] *= 1000
        wide.blocks[0].attn.W_O[1] *= 500 if by == "head" else 1
    copy_weights(wide, model)
    copy_weights(model, wide)
    tokens = random_tokens(model)
    tokens[:, 0] = torch.arange(3)
    recorded = [
        "hook_embed",
        "pos_embed",
        "attn_out",
        "mlp_out",
        "hook_z",
        "hook_post",
        "hook_resid_pre",
        "1.hook_resid_post",
    ]
    recorded += ["hook_v", "hook_pattern"] if by == "source" else []  # attention is computed in another way for them
    names = [name for name in model.hook_dict if name.endswith(tuple(recorded))]
    cache = {}
    forward.run(model, tokens, hooks={name: partial(cache.__setitem__, name) for name in names})
    cache = {name: x.double() for name, x in cache.items()}
    reader = Reader.query(1)
    exact = effect_on(model, tokens, reader, by=by)
    outputs = outputs_before(wide, tokens, exact.labels, by, cache)
    weights = read_weights(wide)
    x, layer = cache["blocks.1.hook_resid_pre"], weights.layers[1]

    def read(x):
        return torch.einsum("...d,hde->...he", layer.ln1(x), layer.W_Q).flatten(-2)

    x = x[:, :, None] if by == "source" else x
    brute = (read(x) - read(x - outputs)).movedim(-1, 0)
    torch.testing.assert_close(exact.values.double(), brute, atol=1e-5 * brute.abs().max().item(), rtol=1e-3)


# ---------------------------------------------------------------------------------------------------------
# Bad input

BAD = [
    ((Reader.neuron, 2), {}, r"layer 2 is out of range: the model's layers reach from 0 to 1"),
    ((Reader.query, -3), {}, "layer -3 is out of range"),
    ((Reader.neuron, 0, 40), {}, "neuron 40 is out of range: layer 0's neurons reach from 0 to 39"),
    ((Reader.neuron, 0, []), {}, "the neurons given name none of 0 to 39"),
    ((Reader.query, 1, 3), {}, "head 3 is out of range: layer 1's heads reach from 0 to 2"),
    ((Reader.key, 1, [0, 3]), {}, "key head 3 is out of range"),
    ((Reader.query, 1, 0, [1.0, 2.0]), {}, "the direction has 2 numbers, d_head is 8"),
    ((Reader.direction, 1, torch.ones(3, 23)), {}, "the direction has 23 numbers, d_model is 24"),
    ((Reader.neuron, 0), {"positions": 7}, "position 7 is out of range: the tokens reach from 0 to 6"),
    ((Reader.neuron, 0), {"by": "layer"}, "unknown by 'layer'; allowed are component, head, neuron, source"),
    ((Reader.neuron, 0), {"top": 0}, "top is 0"),
    ((Reader.neuron, 0), {"senders": []}, "senders name no component"),
    ((Reader.neuron, 0, 17), {"senders": ["L0.mlp"]}, "sender L0.mlp comes after its reader L0N17; .* L0.attn"),
    ((Reader.query, 1, 2), {"senders": "L1H1", "by": "head"}, r"sender L1H1 comes after its reader L1H2.q\[0\]"),
    ((Reader.neuron, 0), {"senders": ["L0H9"], "by": "head"}, "sender 'L0H9' is unknown; by='head' there are embed, "),
    ((Reader.neuron, 0), {"senders": ["L0H1"]}, "sender 'L0H1' is unknown; by='component' there are embed, pos_embed"),
    ((Reader.neuron, 0, None, True), {}, "linear=True is for gated MLPs"),
    ((Reader.logits, torch.zeros(4, dtype=torch.long)), {}, r"targets have shape \[4\]"),
]


@pytest.mark.parametrize(("reader", "arguments", "message"), BAD)
@pytest.mark.parametrize("function", [attribution_to, attributions_to])
def test_bad_input_is_one_line_that_names_it(random_model, function, reader, arguments, message):
    model, (make, *given) = random_model("LNPre"), reader
    options = {"linear": given.pop()} if len(given) == 3 and given[-1] is True else {}
    with pytest.raises(ValueError, match=message) as raised:
        function(model, random_tokens(model), make(*given, **options), **arguments)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Reader.direction(1, DIRECTION, "resid_post"),
            "unknown site 'resid_post'; allowed are resid_pre, resid_mid",
        ),
        (lambda: Reader.direction(None, DIRECTION), "site='resid_pre' wants a layer"),
        (lambda: Reader.direction(1, DIRECTION, "final"), "site='final' has no layer: give None"),
        (lambda: Reader.direction(1, None), "a direction wants a vector"),
        (lambda: Reader.direction(1, "up"), "a direction must be a vector of numbers"),
        (lambda: Reader.direction(1, [[1.0], [1.0, 2.0]]), "a direction must be a vector of numbers"),
        (lambda: Reader.direction(1, torch.ones(2, 2, 2)), r"vector, has shape \[2, 2, 2\]; allowed are"),
        (lambda: Reader.direction(1, []), r"a direction, a vector, has shape \[0\]"),
    ],
)
def test_readers_that_nothing_could_be(make, message):
    with pytest.raises(ValueError, match=message) as raised:
        make()
    assert "\n" not in str(raised.value)


def test_what_a_model_does_not_have(model_of):
    attention, pythia = make_model("LNPre", attn_only=True), model_of("Pythia")
    tokens = random_tokens(attention)
    for reader, message in (
        (Reader.neuron(1), "layer 1 has no neurons: no MLP"),
        (Reader.direction(0, DIRECTION, "resid_mid"), "no resid_mid"),
    ):
        with pytest.raises(ValueError, match=message):
            attribution_to(attention, tokens, reader)
    _, cache = attention.run_with_cache(tokens)
    close(total(attribution_to(attention, tokens, Reader.key(1), by="head")), cache["blocks.1.attn.hook_k"].flatten(2))
    with pytest.raises(ValueError, match="no resid_mid"):
        attribution_to(pythia, tokens, Reader.direction(0, DIRECTION, "resid_mid"))
    with pytest.raises(ValueError, match="caps its logits"):
        attribution_to(make_model("LNPre", output_logits_soft_cap=30.0), tokens, Reader.logits())


@pytest.mark.parametrize("more", [{}, {"by": "source"}, {"top": 3}, {"by": "source", "top": 3}], ids=str)
def test_cells_hold_every_number_with_its_names(random_model, more):
    model = random_model("LNPre")
    tokens = random_tokens(model, batch=2, pos=5)
    result = attribution_to(model, tokens, Reader.query(1, 0), positions=[4, 1], **more)
    cells = result.cells()
    assert len(cells) == result.values.numel() + result.bias.numel() and not cells.isna().any().any()
    of_one = cells[(cells.reader == result.readers[2]) & (cells.prompt == 1) & (cells.position == 1)]
    values = result.values[2, :, 1, 1].double()
    assert of_one.value.sum() == pytest.approx(float(values.sum() + result.bias[2, 1, 1]))
    assert set(of_one.token) == {str(int(tokens[1, 1]))} and of_one.component.iloc[-1] == "bias"
    if "top" in more:
        names = [result.labels[i] for i in result.senders[2, :, 1, 1].tolist()]
        assert of_one.component.tolist() == [*names, "bias"]
        where = [] if result.sources is None else [*result.sources[2, :, 1, 1].tolist(), 1]
    else:
        where = [*range(5)] * len(result.labels) + [1] if "by" in more else []
    assert (of_one.source.tolist() if where else []) == where
