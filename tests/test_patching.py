"""Patching: the fast results are those of plain hooks, cell by cell; approximations are exact where they must be."""

import pytest
import torch
from conftest import make_model, random_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from lnfree_interp.forward import run_streams
from lnfree_interp.lens import is_bridge
from lnfree_interp.metrics import Metric, kl_from_clean, logit_diff, right_log_prob
from lnfree_interp.pairs import PromptPairs
from lnfree_interp.patching import SITES, activation_patching, runs

POSITIONAL = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
HEADS = ("z", "q", "k", "v", "pattern")


def make_pairs(model, n=3, pos=7, changed=(2, 4), seed=0):
    corrupted = random_tokens(model, n, pos, seed)
    clean = corrupted.clone()
    for i in range(n):
        where = changed[i % len(changed)] if isinstance(changed[0], tuple) else changed
        for p in [where] if isinstance(where, int) else where:
            clean[i, p] = (clean[i, p] + 1 + i) % model.cfg.d_vocab
    right = random_tokens(model, n, 1, seed + 1)[:, 0]
    return PromptPairs(clean, corrupted, torch.stack([right, (right + 5) % model.cfg.d_vocab], 1))


def by_plain_hooks(model, pairs, site, metric=logit_diff, direction="denoising", layer_unit_pos=()):
    """The effect of each (layer, unit, pos) with TransformerLens alone, the whole model run for each."""
    base, source = pairs.corrupted, pairs.clean
    if direction == "noising":
        base, source = source, base
    _, cache = model.run_with_cache(source)
    # A Bridge's own resid_mid is what ln2 reads, beside the skip path: what attention writes is changed in its place.
    moved = site == "resid_mid" and is_bridge(model)
    of_base = model.run_with_cache(base)[1] if moved else {}

    def value(logits):
        return metric(logits, pairs) if isinstance(metric, Metric) else metric(logits)

    def patched(layer, unit, pos):
        name = f"blocks.{layer}.{SITES[site].hook}"

        def hook(x, hook):
            x = x.clone()
            if moved:
                x[:, unit] += (cache[name] - of_base[name])[:, unit]
            elif site in POSITIONAL:
                x[:, unit] = cache[name][:, unit]
            elif site == "pattern":
                at = (slice(None), unit) if pos is None else (slice(None), unit, pos)
                x[at] = cache[name][at]
            else:
                at = (slice(None), slice(None) if pos is None else pos, unit)
                x[at] = cache[name][at]
            return x

        place = name.replace("resid_mid", "attn_out") if moved else name
        return value(model.run_with_hooks(base, fwd_hooks=[(place, hook)]))

    unpatched = value(model(base))
    return {cell: patched(*cell) - unpatched for cell in layer_unit_pos}


def cells_of(effect):
    """(index into values, (layer, unit, pos)) of all cells."""
    shape = effect.values.shape[1:]
    for i, layer in enumerate(effect.layers):
        for j, unit in enumerate(effect.units):
            if len(shape) == 2:
                yield (i, j), (layer, unit, None)
            else:
                yield from (((i, j, p), (layer, unit, p)) for p in range(shape[2]))


def assert_matches_plain_hooks(model, pairs, effect, site, metric=logit_diff, tol=1e-9):
    cells = list(cells_of(effect))
    plain = by_plain_hooks(model, pairs, site, metric, effect.direction, [cell for _, cell in cells])
    for index, cell in cells:
        got, wanted = effect.values[(slice(None), *index)], plain[cell]
        assert torch.allclose(got, wanted.to(got.dtype), atol=tol, rtol=tol), (site, cell, got, wanted)
    assert any(v.abs().max() > 1e-4 for v in plain.values()), "nothing has an effect: the test could not fail"


# ---------------------------------------------------------------------------------------------------------
# Exactness


@pytest.mark.parametrize("site", [*POSITIONAL, *HEADS])
@pytest.mark.parametrize("kind", [None, "LNPre"])
def test_patched_cell_is_plain_hook(random_model, kind, site):
    model = random_model(kind)
    pairs = make_pairs(model, changed=((2, 4), (5,), (6,)))
    assert_matches_plain_hooks(model, pairs, activation_patching(model, pairs, site=site), site)


@pytest.mark.parametrize("site", ["resid_pre", "z"])
@pytest.mark.parametrize("kind", [None, "LNPre"])
def test_prompts_that_differ_from_many_places_on_share_streams(random_model, kind, site, monkeypatch):
    model, n_streams = random_model(kind), []
    monkeypatch.setattr(runs, "run_streams", lambda w, s: [n_streams.append(len(s)), run_streams(w, s)][1])
    pairs = make_pairs(model, n=13, pos=15, changed=tuple((p,) for p in range(13)))
    effect = activation_patching(model, pairs, site=site)
    assert n_streams[0] <= 1 + runs.STREAMS < 13
    plain = activation_patching(model, pairs, site=site, fast=False)
    assert torch.allclose(effect.values, plain.values, atol=1e-9) and effect.values.abs().max() > 1e-3
    if site == "resid_pre":  # up to its own first difference a prompt's is the base's, and so its effect nothing
        before = torch.arange(15) < torch.arange(13)[:, None]
        assert (effect.values.transpose(0, 1)[:, before] == 0).all()


@pytest.mark.parametrize("site", ["attn_out", "v"])
@pytest.mark.parametrize("kind", [None, "LNPre"])
def test_noising_is_a_plain_hook_too(random_model, kind, site):
    model = random_model(kind)
    pairs = make_pairs(model, changed=((2, 4), (5,), (6,)))
    effect = activation_patching(model, pairs, site=site, direction="noising")
    assert_matches_plain_hooks(model, pairs, effect, site)


@pytest.mark.slow
@pytest.mark.parametrize("site", [*POSITIONAL, *HEADS])
@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_patched_cell_is_plain_hook_whatever_the_norm(any_model, site, direction):
    pairs = make_pairs(any_model, changed=((2, 4), (5,), (6,)))
    effect = activation_patching(any_model, pairs, site=site, direction=direction)
    assert_matches_plain_hooks(any_model, pairs, effect, site)


@pytest.mark.parametrize("site", HEADS)
@pytest.mark.parametrize("kind, fast", [(None, True), ("LNPre", True), ("LNPre", False)])
def test_heads_by_position(random_model, site, kind, fast):
    model = random_model(kind)
    pairs = make_pairs(model, pos=5, changed=((1, 2), (3,)))
    effect = activation_patching(model, pairs, site=site, by_position=True, fast=fast)
    assert effect.axes == ("prompt", "layer", "head", "pos")
    assert_matches_plain_hooks(model, pairs, effect, site)


@pytest.mark.parametrize("by_position", [False, True])
@pytest.mark.parametrize("kind", [None, "LNPre"])
@pytest.mark.parametrize("fast", [True, False])
def test_neurons_of_a_layer(random_model, kind, by_position, fast):
    model = random_model(kind)
    pairs = make_pairs(model, changed=((2, 4), (5,)))
    for layer in (0, -1):
        effect = activation_patching(
            model, pairs, site="neurons", layers=[layer], units=[3, 0, 17], by_position=by_position, fast=fast
        )
        assert effect.layers == (layer % model.cfg.n_layers,) and effect.units == (3, 0, 17)
        assert_matches_plain_hooks(model, pairs, effect, "neurons")


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("kind", [None, "LN"])
def test_hooked_path_is_the_fast_path(random_model, kind, site):
    model = random_model(kind)
    pairs = make_pairs(model, changed=((2, 4), (5,), (6,)))
    layers = [1] if site == "neurons" else None
    fast, slow = (activation_patching(model, pairs, site=site, layers=layers, fast=f) for f in (True, False))
    torch.testing.assert_close(fast.values, slow.values, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(fast.clean, slow.clean)


def first_and_third(logits):
    p = logits.softmax(-1)
    return p[:, 2, 5] - p[:, -2, 7] * p[:, 4].amax(-1)


METRICS = {
    "middle": Metric("middle", lambda x: x[:, 0, 0] * x[:, 1, 1], positions=(4, -5)),
    "own tokens": Metric("own", lambda x: x[:, 0].sum(-1), tokens=torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]])),
    "plain function": first_and_third,
}


@pytest.mark.parametrize("name", [*METRICS, "right_log_prob", "kl_from_clean"])
@pytest.mark.parametrize("kind, site", [(None, "resid_pre"), ("LNPre", "k")])
def test_any_metric(random_model, name, site, kind):
    model = random_model(kind)
    pairs = make_pairs(model, pos=6, changed=((1, 4), (3,), (2, 5)))
    special = {"right_log_prob": lambda: right_log_prob(pairs), "kl_from_clean": lambda: kl_from_clean(model, pairs)}
    metric = special[name]() if name in special else METRICS[name]
    effect = activation_patching(model, pairs, site=site, metric=metric)
    assert_matches_plain_hooks(model, pairs, effect, site, metric)
    for fast in (True, False):  # little memory: many batches
        again = activation_patching(model, pairs, site=site, metric=metric, max_memory=60_000, fast=fast)
        torch.testing.assert_close(again.values, effect.values, atol=1e-9, rtol=1e-9)


@settings(max_examples=8, deadline=None)
@given(
    kind=st.sampled_from([None, "LNPre", "LN", "RMSPre"]),
    n_layers=st.integers(1, 3),
    n_heads=st.integers(1, 3),
    attn_only=st.booleans(),
    act_fn=st.sampled_from(["gelu_new", "gelu", "relu"]),
    n_pos=st.integers(2, 6),
    site=st.sampled_from(sorted(SITES)),
    direction=st.sampled_from(["denoising", "noising"]),
    data=st.data(),
)
def test_patched_cell_is_plain_hook_on_random_models(
    kind, n_layers, n_heads, attn_only, act_fn, n_pos, site, direction, data
):
    model = make_model(
        kind, n_layers=n_layers, n_heads=n_heads, d_head=4, d_model=12, d_mlp=9, attn_only=attn_only, act_fn=act_fn
    )
    if attn_only and site in ("resid_mid", "mlp_out", "neurons"):
        with pytest.raises(ValueError, match="is not in this model"):
            activation_patching(model, make_pairs(model, changed=(0,)), site=site, layers=[0])
        return
    changed = tuple(tuple(data.draw(st.sets(st.integers(0, n_pos - 1), min_size=1))) for _ in range(2))
    pairs = make_pairs(model, n=2, pos=n_pos, changed=changed)
    layers = [n_layers - 1] if site == "neurons" else None
    effect = activation_patching(model, pairs, site=site, direction=direction, layers=layers)
    cells = list(cells_of(effect))
    plain = by_plain_hooks(model, pairs, site, logit_diff, direction, [cell for _, cell in cells])
    for index, cell in cells:
        assert torch.allclose(effect.values[(slice(None), *index)], plain[cell], atol=1e-9), cell


@pytest.mark.parametrize("site", ["resid_mid", "mlp_out", "neurons"])
@pytest.mark.parametrize("kind", [None, "LNPre"])
def test_attention_only_models_have_no_mlp_to_patch(kind, site):
    model = make_model(kind, attn_only=True)
    with pytest.raises(ValueError, match="is not in this model"):
        activation_patching(model, make_pairs(model, changed=(0,)), site=site, layers=[0])
