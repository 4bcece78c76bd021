"""Patching on every kind of block: the fast results are those of plain hooks, estimates those of plain derivatives."""

import pytest
import torch
from conftest import HOOKED, KINDS, NEW_KINDS, copy_weights, make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from test_patching import assert_matches_plain_hooks, make_pairs
from test_patching_gradients import both, quadratic
from test_patching_models import ESTIMATES, assert_estimates_match, steered

from lnfree_interp import lens, read_weights
from lnfree_interp.metrics import Metric, logit_diff
from lnfree_interp.patching import SITES, activation_patching, attribution_patching

CHANGED = ((2, 4), (5,), (6,))


def every_site(model):
    return [site for site in SITES if f"blocks.0.{SITES[site].hook}" in model.hook_dict]


def units_of(site):
    return {"neuron": [3, 0, 17], "head": [1, 0]}.get(SITES[site].unit)


# Values are of the size of the largest activations, which without norms are large.
def tolerance(model):
    return 1e-9 if model.cfg.normalization_type else 1e-8


# ---------------------------------------------------------------------------------------------------------
# Exactness


@pytest.mark.parametrize("direction", ["denoising", pytest.param("noising", marks=pytest.mark.slow)])
def test_patched_cell_is_plain_hook(any_kind, direction):
    pairs = make_pairs(any_kind, changed=CHANGED)
    for site in every_site(any_kind):
        effect = activation_patching(
            any_kind, pairs, site=site, direction=direction, layers=[0, 1], units=units_of(site)
        )
        assert effect.flops is not None
        assert_matches_plain_hooks(any_kind, pairs, effect, site, tol=tolerance(any_kind))


@pytest.mark.slow
@pytest.mark.parametrize("fast", [True, False])
def test_heads_and_neurons_by_position(any_kind, fast):
    pairs = make_pairs(any_kind, pos=5, changed=((1, 2), (3,)))
    for site in ("z", "q", "k", "v", "pattern", "neurons"):
        options = {"site": site, "layers": [0, 1], "units": units_of(site), "by_position": True}
        effect = activation_patching(any_kind, pairs, fast=fast, **options)
        assert_matches_plain_hooks(any_kind, pairs, effect, site, tol=tolerance(any_kind))


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(NEW_KINDS),
    norm=st.booleans(),
    n_layers=st.integers(1, 3),
    heads=st.sampled_from([{}, {"n_heads": 3, "n_key_value_heads": 1}, {"n_heads": 2, "n_key_value_heads": None}]),
    attn_only=st.booleans(),
    n_pos=st.integers(2, 6),
    site=st.sampled_from(sorted(SITES)),
    by_position=st.booleans(),
    reads=st.sampled_from([None, (1, 0), (-1,), (-1, 0)]),
    data=st.data(),
)
def test_patched_cell_is_plain_hook_on_random_models(
    model_of, kind, norm, n_layers, heads, attn_only, n_pos, site, by_position, reads, data
):
    only = {"attn_only": True} if attn_only and kind != "Pythia" else {}
    cap = {} if norm else {"output_logits_soft_cap": -1.0}  # logits of several layers without norms are beyond it
    model = model_of(kind, norm, n_layers=n_layers, **(heads | only | cap))
    if site not in every_site(model) or (only and site == "mlp_out"):
        return
    changed = tuple(tuple(data.draw(st.sets(st.integers(0, n_pos - 1), min_size=1))) for _ in range(2))
    pairs = make_pairs(model, n=2, pos=n_pos, changed=changed)
    metric = logit_diff if reads is None else Metric("some", lambda x: x[..., 0].sum(1), positions=reads)
    by_position = by_position and SITES[site].unit != "pos"
    units = [0] if SITES[site].unit != "pos" else None
    options = {"site": site, "metric": metric, "layers": range(n_layers), "units": units, "by_position": by_position}
    fast, slow = (activation_patching(model, pairs, fast=f, **options) for f in (True, False))
    scale = max(1.0, fast.clean.abs().max().item())
    torch.testing.assert_close(fast.values, slow.values, atol=1e-9 * scale, rtol=1e-8)


def test_a_group_of_heads_is_patched_through_its_key(model_of):
    """Values of one key head patched are z of all the heads that read it patched, where the pattern is the same."""
    model = model_of("Llama", n_layers=1)
    pairs = make_pairs(model, changed=CHANGED)
    keys = activation_patching(model, pairs, site="k")
    assert keys.units == (0, 1) and keys.values.shape == (3, 1, 2)
    with pytest.raises(ValueError, match="head 2 is out of range: a layer's heads reach from 0 to 1"):
        activation_patching(model, pairs, site="v", units=[2])
    ungrouped = make_model("RMSPre", **KINDS["Llama"][1], ungroup_grouped_query_attention=True)
    assert activation_patching(ungrouped, make_pairs(ungrouped), site="k").units == (0, 1, 2, 3)


# ---------------------------------------------------------------------------------------------------------
# Estimates


@pytest.mark.slow
@pytest.mark.parametrize("options", ESTIMATES, ids=lambda o: "-".join(map(str, o.values())))
def test_estimates_are_those_of_plain_derivatives(any_kind, options):
    pairs = make_pairs(any_kind, n=2, pos=4, changed=((1,), (2,)))
    for site in every_site(any_kind):
        # A Bridge's own resid_mid is what ln2 reads, beside the skip path.
        if site != "neurons" and not (site == "resid_mid" and lens.is_bridge(any_kind)):
            assert_estimates_match(any_kind, pairs, site, 0, options, tol=10 * tolerance(any_kind))


def test_second_order_is_exact_for_a_quadratic(model_of):
    for kind in NEW_KINDS:
        model = model_of(kind, normalised=False, output_logits_soft_cap=-1.0)
        pairs = make_pairs(model, changed=((2, 4), (5,)))
        for site in ("mlp_out", "resid_post", "neurons", *(["attn_out", "z"] if kind == "Pythia" else [])):
            approximate, exact = both(model, pairs, site=site, layers=[-1], metric=quadratic, method="second_order")
            torch.testing.assert_close(approximate, exact, atol=1e-6, rtol=1e-9)


@pytest.mark.parametrize("by_position", [False, True])
@pytest.mark.parametrize("kind", ["Llama", "Qwen", "Gemma"])
def test_exact_softmax_is_exact_without_norm_and_mlp(model_of, kind, by_position):
    model = model_of(kind, normalised=False, attn_only=True, output_logits_soft_cap=-1.0)
    pairs = make_pairs(model, changed=((2, 4), (5,)))
    for site in "qk":
        options = {"site": site, "layers": [-1], "by_position": by_position}
        approximate, exact = both(model, pairs, method="atp_star", **options)
        torch.testing.assert_close(approximate, exact, atol=1e-9, rtol=1e-9)
        assert (attribution_patching(model, pairs, **options).values - exact).abs().max() > 1e-3


def test_in_parallel_blocks_the_softmax_alone_bends_the_last_layer(model_of):
    model = model_of("Pythia", normalised=False)
    pairs = make_pairs(model, changed=((2, 4), (5,)))
    for site in "qk":
        approximate, exact = both(model, pairs, method="atp_star", site=site, layers=[-1])
        torch.testing.assert_close(approximate, exact, atol=1e-9, rtol=1e-9)


RULES = ("detach_norm", "linear_gelu", "half_gate")


def test_relp_without_its_rules_is_the_gradient(any_kind):
    pairs = make_pairs(any_kind, changed=CHANGED)
    for site in ("resid_pre", "z"):
        plain = attribution_patching(any_kind, pairs, site=site)
        without = dict.fromkeys(RULES, False)
        got = attribution_patching(any_kind, pairs, site=site, method="relp", **without)
        tol = tolerance(any_kind) * plain.values.abs().max().item()
        torch.testing.assert_close(got.values, plain.values, atol=tol, rtol=1e-9)
        for rule in RULES:
            one = attribution_patching(any_kind, pairs, site=site, method="relp", **(without | {rule: True}))
            there = {"detach_norm": "hook_scale", "half_gate": "hook_pre_linear"}.get(rule)
            acts = there is None or any(name.endswith(there) for name in any_kind.hook_dict)
            assert torch.allclose(one.values, plain.values) != acts


def test_with_all_rules_a_gated_mlp_conserves_relevance(model_of):
    """Without biases and attention, each part of an LN-free model's relevance is the logit difference itself."""
    model = make_model(None, **KINDS["Llama"][1], n_layers=2)
    with torch.no_grad():
        for name, p in lens.parameters(model).items():
            if ".b_" in name:
                p.zero_()
        for block in model.blocks:
            block.attn.W_O.zero_()
        model.W_E[7] = 0  # nothing at all goes in
    pairs = make_pairs(model, changed=(6,))
    pairs.clean[:, 6] = 7
    got = attribution_patching(model, pairs, site="resid_pre", method="relp")
    total = got.clean - got.corrupted
    torch.testing.assert_close(got.values.sum(-1), total[:, None].expand(-1, 2), atol=1e-8, rtol=1e-8)
    bent = attribution_patching(model, pairs, site="resid_pre", method="relp", half_gate=False)
    assert (bent.values.sum(-1)[:, 0] - total).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("kind", NEW_KINDS)
@pytest.mark.skipif(not HOOKED, reason="a Bridge makes its rotary tables anew: its precise copy's are not rounded")
def test_half_precision_is_that_of_the_weights_alone(kind):
    normalization, fields = KINDS[kind]
    model, exact = make_model(normalization, dtype=torch.bfloat16, **fields), make_model(normalization, **fields)
    copy_weights(model, exact)
    pairs = make_pairs(exact, n=2, pos=6, changed=((2, 4), (5,)))
    for site in every_site(model):
        for function in (activation_patching, attribution_patching):
            got, wanted = (function(m, pairs, site=site, layers=[0, 1]).values for m in (model, exact))
            assert got.dtype == torch.float32
            assert (got - wanted).abs().max() < 1e-4 * wanted.abs().max(), (site, function)


@pytest.mark.slow
@pytest.mark.parametrize("kind", NEW_KINDS)
def test_with_hooks_of_its_own_a_model_is_slow_and_right(kind):
    normalization, fields = KINDS[kind]
    model = make_model(normalization, **fields)
    pairs = make_pairs(model, n=2, pos=4, changed=((1,), (2,)))
    model.add_hook("blocks.1.hook_attn_out", steered, is_permanent=True)
    assert read_weights(model) is None
    for site in every_site(model):
        effect = activation_patching(model, pairs, site=site, layers=[0, 1], units=units_of(site))
        assert_matches_plain_hooks(model, pairs, effect, site)
    for site, options in zip(("k", "z", "resid_pre", "v"), ESTIMATES):
        assert_estimates_match(model, pairs, site, 0, options)
