"""The laws of direct logit attribution, on every kind of normalisation and every decomposition."""

from functools import partial

import numpy as np
import pytest
import torch
from conftest import NORMALIZATIONS, copy_weights, make_model, random_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from lnfree_interp import dla
from lnfree_interp.batching import check_tokens
from lnfree_interp.dla import (
    attribution_error,
    direct_effect,
    direct_logit_attribution,
    logit_attributions,
    record,
    request,
)
from lnfree_interp.forward import run

TOLERANCE = 1e-9
BY = record.DECOMPOSITIONS


def close(a, b, tolerance=TOLERANCE):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def component_outputs(model, tokens, by, cache=None):
    """Every component's output [component, batch, pos, d_model], the slow way, in the order of the labels."""
    cache = cache or model.run_with_cache(tokens)[1]
    cfg = model.cfg
    outputs = [cache["hook_embed"]]
    if cfg.positional_embedding_type == "standard":
        outputs.append(cache["hook_pos_embed"].expand_as(outputs[0]))
    for i, block in enumerate(model.blocks):
        if by == "head":
            outputs += [cache[f"blocks.{i}.attn.hook_z"][:, :, h] @ block.attn.W_O[h] for h in range(cfg.n_heads)]
            outputs.append(block.attn.b_O.expand_as(outputs[0]))
        else:
            outputs.append(cache[f"blocks.{i}.hook_attn_out"])
        if cfg.attn_only:
            continue
        if by == "neuron":
            post = cache[f"blocks.{i}.mlp.hook_post"]
            outputs += [post[..., n, None] * block.mlp.W_out[n] for n in range(cfg.d_mlp)]
            outputs.append(block.mlp.b_out.expand_as(outputs[0]))
        else:
            outputs.append(cache[f"blocks.{i}.hook_mlp_out"])
    return torch.stack(outputs), cache[f"blocks.{cfg.n_layers - 1}.hook_resid_post"]


def target_logits(model, resid, targets, versus=None):
    """logit of the targets, or the difference of two, through the model's own final norm and unembedding."""
    x = model.ln_final(resid) if hasattr(model, "ln_final") else resid
    logits = model.unembed(x)
    targets = targets.expand(logits.shape[:-1])
    picked = logits.gather(-1, targets[..., None])[..., 0]
    return picked if versus is None else picked - logits.gather(-1, versus.expand_as(targets)[..., None])[..., 0]


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("difference", [False, True])
def test_attributions_sum_to_the_models_logit(any_model, by, difference):
    tokens = random_tokens(any_model)
    targets, versus = (random_tokens(any_model, seed=1), random_tokens(any_model, seed=2) if difference else None)
    result = direct_logit_attribution(any_model, tokens, targets, versus=versus, by=by)
    logits = any_model(tokens)
    expected = logits.gather(-1, targets[..., None])[..., 0]
    if difference:
        expected = expected - logits.gather(-1, versus[..., None])[..., 0]
    close(result.values.sum(0) + result.bias, expected)
    assert result.values.shape == (len(result.labels), *tokens.shape)


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("difference", [False, True])
def test_direct_effect_is_removal_and_renormalisation(any_model, by, difference):
    tokens = random_tokens(any_model)
    targets, versus = (random_tokens(any_model, seed=1), random_tokens(any_model, seed=2) if difference else None)
    outputs, resid = component_outputs(any_model, tokens, by)
    whole = target_logits(any_model, resid, targets, versus)
    brute = torch.stack([whole - target_logits(any_model, resid - c, targets, versus) for c in outputs])
    close(direct_effect(any_model, tokens, targets, versus=versus, by=by).values, brute)


@pytest.mark.parametrize("by", BY)
def test_without_layernorm_attribution_is_the_direct_effect(random_model, by):
    model = random_model(None)
    tokens = random_tokens(model)
    linear, exact = logit_attributions(model, tokens, by=by)
    close(linear.values, exact.values)
    error = attribution_error(linear, exact)
    assert error.pooled < 1e-10 and max(error.interval) < 1e-10


@pytest.mark.parametrize("normalization", ["LNPre", "LN", "RMSPre", "RMS"])
def test_with_a_norm_they_differ(random_model, normalization):
    model = random_model(normalization)
    linear, exact = logit_attributions(model, random_tokens(model), by="head")
    assert attribution_error(linear, exact).pooled > 0.01


@settings(max_examples=15, deadline=None)
@given(
    normalization=st.sampled_from(NORMALIZATIONS),
    by=st.sampled_from(["component", "head"]),
    n_layers=st.integers(1, 3),
    n_heads=st.integers(1, 3),
    attn_only=st.booleans(),
    batch=st.integers(1, 3),
    pos=st.integers(2, 8),
    seed=st.integers(0, 99),
    per_pass=st.integers(1, 30),
)
def test_laws_hold_on_random_configurations(
    normalization, by, n_layers, n_heads, attn_only, batch, pos, seed, per_pass
):
    model = make_model(normalization, n_layers=n_layers, n_heads=n_heads, attn_only=attn_only, seed=seed)
    tokens = random_tokens(model, batch, pos, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(request, "TOKENS_PER_PASS", per_pass)
        linear, exact = logit_attributions(model, tokens, by=by)
    outputs, resid = component_outputs(model, tokens, by)
    whole = target_logits(model, resid[:, :-1], tokens[:, 1:])
    close(linear.values.sum(0) + linear.bias, whole)
    brute = [whole - target_logits(model, (resid - c)[:, :-1], tokens[:, 1:]) for c in outputs]
    close(exact.values, torch.stack(brute))


WHERE = (
    0,
    -1,
    [1, 4],
    [4, 1],
    slice(2, 5),
    slice(None, None, 3),
    slice(None, None, -1),
    [6, 5, 4, 3, 2, 1, 0],
    [0, 0, 1, 2, 3, 4, 5],
    [3, 3],
    [-1, 0],
    [6, 1, 2, 3, 4, 5, 0],
)


@pytest.mark.slow
@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("positions", WHERE, ids=str)
def test_some_positions_are_those_of_all(any_model, by, positions):
    tokens, targets = random_tokens(any_model), random_tokens(any_model, seed=1)
    every = logit_attributions(any_model, tokens, targets, by=by)
    some = logit_attributions(any_model, tokens, targets, by=by, positions=positions)
    index = np.atleast_1d(np.arange(7)[positions]).tolist()
    for all_, few in zip(every, some):
        close(few.values, all_.values[:, :, index])
        close(few.bias, all_.bias[:, index])
        assert few.positions == tuple(index)


def test_default_targets_are_the_next_tokens_and_a_vector_is_for_the_last_position(any_model):
    tokens, targets = random_tokens(any_model), random_tokens(any_model, seed=1)
    default = direct_logit_attribution(any_model, tokens)
    shifted = torch.cat([tokens[:, 1:], targets[:, :1]], dim=1)
    close(default.values, direct_logit_attribution(any_model, tokens, shifted).values[..., :-1])
    last = direct_logit_attribution(any_model, tokens, targets[:, -1])
    close(last.values, direct_logit_attribution(any_model, tokens, targets, positions=-1).values)


@pytest.mark.parametrize("normalization", ["LNPre", None])
@pytest.mark.parametrize("difference", [False, True])
def test_transformer_lens_own_attribution(random_model, normalization, difference):
    """TransformerLens defines it for folded weights; with W_U centred its remainder row is ours too."""
    from transformer_lens.tools.analysis import direct_logit_attribution as theirs

    model = random_model(normalization)
    tokens, targets = random_tokens(model), random_tokens(model, seed=1)[:, -1]
    versus = random_tokens(model, seed=2)[:, -1] if difference else None
    by_component = theirs(model, tokens, targets, versus, unit="component")
    ours = direct_logit_attribution(model, tokens, targets, versus=versus)
    translated = {"embed": "embed", "pos_embed": "pos_embed"}
    translated |= {f"{i}_{part}_out": f"L{i}.{part}" for i in range(model.cfg.n_layers) for part in ("attn", "mlp")}
    assert [translated[label] for label in by_component.labels] == list(ours.labels)
    close(ours.values[..., 0], by_component.attribution, 1e-6)

    by_head = theirs(model, tokens, targets, versus, unit="head")
    ours = direct_logit_attribution(model, tokens, targets, versus=versus, by="head")
    values = dict(zip(ours.labels, ours.values[..., 0]))
    heads = [label for label in by_head.labels if label in values]
    assert len(heads) == model.cfg.n_layers * model.cfg.n_heads
    remainder = sum(value for label, value in values.items() if label not in heads)
    for label, theirs_ in zip(by_head.labels, by_head.attribution):
        close(values.get(label, remainder), theirs_, 1e-6)


@pytest.mark.parametrize(
    "fields",
    [{"positional_embedding_type": "alibi"}, {"n_key_value_heads": 1, "ungroup_grouped_query_attention": True}],
    ids=lambda f: next(iter(f)),
)
@pytest.mark.parametrize("by", BY)
def test_models_that_are_not_read_go_through_their_own_forward(fields, by):
    model = make_model("RMSPre", **fields)
    tokens = random_tokens(model)
    linear, exact = logit_attributions(model, tokens, by=by)
    outputs, resid = component_outputs(model, tokens, by)
    whole = target_logits(model, resid[:, :-1], tokens[:, 1:])
    close(linear.values.sum(0) + linear.bias, whole)
    brute = [whole - target_logits(model, (resid - c)[:, :-1], tokens[:, 1:]) for c in outputs]
    close(exact.values, torch.stack(brute))


HOOKS = (
    "hook_embed",
    "blocks.1.hook_resid_pre",
    "blocks.0.attn.hook_z",
    "blocks.1.hook_attn_out",
    "blocks.0.hook_resid_mid",
    "blocks.1.mlp.hook_post",
    "blocks.1.hook_mlp_out",
    "blocks.1.hook_resid_post",
)


@pytest.mark.parametrize("name", HOOKS)
@pytest.mark.parametrize("kind", [None, "LNPre"])
@pytest.mark.parametrize("by", BY)
def test_what_a_models_own_hooks_write_is_a_component(name, kind, by):
    model = make_model(kind)
    model.add_hook(name, lambda x, hook: 1.5 * x + 1, is_permanent=True)
    tokens = random_tokens(model)
    linear, exact = logit_attributions(model, tokens, by=by)
    outputs, resid = component_outputs(model, tokens, by)
    outputs = torch.cat([outputs, (resid - outputs.sum(0))[None]])
    assert linear.labels[-1] == "hooks"
    whole = target_logits(model, resid[:, :-1], tokens[:, 1:])
    close(linear.values.sum(0) + linear.bias, whole)
    close(whole, model(tokens)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0])
    brute = [whole - target_logits(model, (resid - c)[:, :-1], tokens[:, 1:]) for c in outputs]
    close(exact.values, torch.stack(brute))


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", [None, "LNPre", "RMS"])
def test_low_precision_is_exact_on_the_activations_it_has(kind, dtype, by):
    """Norms of 4,000, as GPT-2's position 0 has them, nearly all of it one component's: squares are beyond fp16."""
    wide = make_model(kind)
    with torch.no_grad():
        wide.embed.W_E[:10] *= 30 if kind is None else 3000  # without a norm, scores would be beyond fp16 themselves
        wide.blocks[-1].mlp.W_out[5] *= 1 if kind is None else 2000
    model = make_model(kind, dtype=dtype)
    copy_weights(wide, model)
    copy_weights(model, wide)
    tokens = random_tokens(model)
    tokens[:, 0] = torch.arange(3)
    cache = {}
    names = [
        name
        for name in model.hook_dict
        if name.endswith(("hook_embed", "pos_embed", "attn_out", "mlp_out", "hook_z", "post"))
    ]
    run(model, tokens, hooks={name: partial(cache.__setitem__, name) for name in names})
    assert cache["blocks.1.hook_resid_post"].float().norm(dim=-1).max() > (40 if kind is None else 4000)
    outputs, resid = component_outputs(wide, tokens, by, {name: x.double() for name, x in cache.items()})
    whole = target_logits(wide, resid[:, :-1], tokens[:, 1:])
    brute = torch.stack([whole - target_logits(wide, (resid - c)[:, :-1], tokens[:, 1:]) for c in outputs])
    exact = direct_effect(model, tokens, by=by).values
    torch.testing.assert_close(exact.double(), brute, atol=1e-5 * brute.abs().max().item(), rtol=1e-3)


def test_heads_and_neurons_add_up_to_their_component(any_model):
    tokens = random_tokens(any_model)
    parts = {by: direct_logit_attribution(any_model, tokens, by=by) for by in BY}

    def total(by, prefix):
        chosen = [v for label, v in zip(parts[by].labels, parts[by].values) if label.startswith(prefix)]
        return torch.stack(chosen).sum(0)

    heads = total("head", "L1H") + total("head", "L1.b_O")
    neurons = total("neuron", "L1N") + total("neuron", "L1.b_out")
    close(heads, total("component", "L1.attn"))
    close(neurons, total("component", "L1.mlp"))


def test_nothing_of_head_batch_pos_d_model_is_made(random_model):
    """The largest tensor any operation returns is far below [head, batch, pos, d_model]."""
    from torch.utils._python_dispatch import TorchDispatchMode

    model = make_model("LNPre", n_layers=1, n_heads=8, d_head=8, d_model=64, d_mlp=16, d_vocab=40)
    tokens, sizes = random_tokens(model, batch=8, pos=24), []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made = [t for t in (out if isinstance(out, (tuple, list)) else [out]) if torch.is_tensor(t)]
            sizes.extend(t.untyped_storage().nbytes() // t.itemsize for t in made)
            return out

    with Sizes():
        logit_attributions(model, tokens, by="head")
    assert max(sizes) < model.cfg.n_heads * tokens.numel() * model.cfg.d_model / 2


def test_error_is_the_ratio_of_means_and_its_interval_contains_it(random_model):
    model = random_model("LNPre")
    linear, exact = logit_attributions(model, random_tokens(model, batch=12), by="head")
    error = attribution_error(linear, exact, components=dla.HEADS)
    heads = [i for i, label in enumerate(linear.labels) if "H" in label]
    a, e = linear.values[heads], exact.values[heads]
    assert error.labels == tuple(linear.labels[i] for i in heads)
    close(torch.tensor(error.pooled, dtype=torch.float64), (a - e).abs().mean() / e.abs().mean(), 1e-6)
    close(error.per_component, (a - e).abs().mean((1, 2)) / e.abs().mean((1, 2)))
    assert error.interval[0] < error.pooled < error.interval[1]
    assert (error.low <= error.per_component).all() and (error.per_component <= error.high).all()
    again = attribution_error(linear, exact, components=dla.HEADS)
    assert again.interval == error.interval


def test_tables(random_model):
    linear, exact = logit_attributions(random_model("LNPre"), random_tokens(random_model("LNPre")))
    table = linear.table()
    assert set(table.component) == set(linear.labels) and table.mean_abs.is_monotonic_decreasing
    embed = table[table.component == "embed"].iloc[0]
    assert embed["mean"] == pytest.approx(linear.values[0].mean().item())
    assert list(attribution_error(linear, exact).table().component) == ["pooled", *linear.labels]


BAD = [
    ({"tokens": torch.zeros(2, 0, dtype=torch.long)}, "neither of them empty"),
    ({"tokens": torch.full((2, 7), 61)}, "token id 61 is outside the model's vocabulary of 61"),
    ({"tokens": torch.full((2, 7), -1)}, "token id -1 is outside"),
    ({"tokens": torch.zeros(1, 33, dtype=torch.long)}, "33 tokens, the model's context holds 32"),
    ({"tokens": torch.zeros(1, 1, dtype=torch.long)}, "no next token"),
    ({"targets": torch.zeros(4, dtype=torch.long)}, r"shape \[4\]; allowed are \[3\]"),
    ({"targets": torch.zeros(3, 6, dtype=torch.long)}, r"allowed are \[3\] \(last position\) and \[3, 7\]"),
    ({"targets": torch.full((3,), 61)}, "targets: token id 61"),
    ({"versus": torch.zeros(3, dtype=torch.long)}, "versus has shape"),
    ({"versus": torch.full((3, 6), 99)}, "versus: token id 99"),
    ({"positions": 7}, "position 7 is out of range"),
    ({"positions": [0, -8]}, "position -8 is out of range"),
    ({"positions": -1}, "position -1 is out of range: targets reach from 0 to 5"),
    ({"positions": []}, "name none"),
    ({"by": "layer"}, "unknown by 'layer'; allowed are component, head, neuron"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
@pytest.mark.parametrize("function", [direct_logit_attribution, direct_effect])
def test_bad_input_is_one_line_that_names_it(random_model, function, arguments, message):
    model = random_model("LNPre")
    arguments = {"tokens": random_tokens(model)} | arguments
    with pytest.raises(ValueError, match=message) as raised:
        function(model, arguments.pop("tokens"), arguments.pop("targets", None), **arguments)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("tokens", [torch.zeros(2, 3), torch.zeros(5, dtype=torch.long)])
def test_tokens_of_another_type_or_rank(random_model, tokens):
    # Under test beartype refuses these before the public functions do, so their check is called by itself.
    with pytest.raises(ValueError, match=r"tokens (must be a tensor of token ids|have shape \[5\])"):
        check_tokens(random_model("LNPre"), tokens)


def test_errors_of_what_does_not_align(random_model):
    model = random_model("LNPre")
    a, b = (direct_logit_attribution(model, random_tokens(model), by=by) for by in ("component", "head"))
    with pytest.raises(ValueError, match="do not align"):
        attribution_error(a, b)
    with pytest.raises(ValueError, match="no component matches 'X'"):
        attribution_error(a, a, components="X")
    with pytest.raises(ValueError, match="draws is 0"):
        attribution_error(a, a, draws=0)


def test_a_capped_or_attention_only_model_says_so(random_model):
    capped = make_model("LNPre", output_logits_soft_cap=30.0)
    with pytest.raises(ValueError, match="tanh"):
        direct_logit_attribution(capped, random_tokens(capped))
    attention = make_model("LNPre", attn_only=True)
    with pytest.raises(ValueError, match="by='neuron'"):
        direct_logit_attribution(attention, random_tokens(attention), by="neuron")
