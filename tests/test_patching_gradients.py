"""Approximations of patching are exact where the path to the metric is what they take it for."""

from functools import partial

import pytest
import torch
from conftest import make_model
from test_patching import make_pairs

from lnfree_interp.lens import is_bridge
from lnfree_interp.metrics import Metric, logit_diff
from lnfree_interp.patching import (
    METHODS,
    SITES,
    AtPStar,
    Gradient,
    Integrated,
    RelP,
    SecondOrder,
    activation_patching,
    attribution_patching,
    total_effect,
)
from lnfree_interp.patching.attribution import ESTIMATES

quadratic = Metric("quadratic", lambda x: x[..., 0].pow(2).sum(1) - x[:, 0, 1] * x[:, 1, 1], positions=(-1, -2))


def every_site(model):
    return [s for s in SITES if f"blocks.0.{SITES[s].hook}" in model.hook_dict]


def both(model, pairs, **options):
    approximate = {k: options.pop(k) for k in ("method", "joint", "steps", "path") if k in options}
    return (
        attribution_patching(model, pairs, **approximate, **options).values,
        activation_patching(model, pairs, **options).values,
    )


# ---------------------------------------------------------------------------------------------------------
# The gradient


@pytest.mark.parametrize("method", [m for m in METHODS if m != "atp_star"])
@pytest.mark.parametrize(
    "site, attn_only", [("resid_post", False), ("mlp_out", False), ("attn_out", True), ("z", True)]
)
def test_exact_where_the_path_to_the_metric_is_linear(random_model, site, attn_only, method):
    model = random_model(None, attn_only=attn_only)
    for changed in ((2, 4), (6,)):
        pairs = make_pairs(model, changed=changed)
        approximate, exact = both(model, pairs, site=site, layers=[-1], method=method)
        torch.testing.assert_close(approximate, exact, atol=1e-10, rtol=1e-10)
        assert exact.abs().max() > 1e-3


def test_with_a_norm_the_same_path_is_not_linear(random_model):
    model = random_model("LNPre")
    approximate, exact = both(model, make_pairs(model), site="mlp_out", layers=[-1])
    assert (approximate - exact).abs().max() > 1e-2 * exact.abs().max()


@pytest.mark.parametrize("kind", [None, "LNPre"])
@pytest.mark.parametrize("fast", [True, False])
def test_gradient_is_transformer_lens_own(random_model, kind, fast):
    model = random_model(kind, act_fn="gelu_new" if fast else "gelu_fast", use_attn_result=not fast)
    pairs = make_pairs(model, changed=((2, 4), (5,), (6,)))
    for site in every_site(model):
        if site == "pattern" or (site == "resid_mid" and is_bridge(model)):  # a Bridge's own is what ln2 reads
            continue
        name = [f"blocks.{i}.{SITES[site].hook}" for i in range(2)]
        _, clean = model.run_with_cache(pairs.clean)
        nodes = {}

        def grab(x, hook, n, nodes=nodes):
            x = x if x.requires_grad else x.detach().requires_grad_()
            x.retain_grad()
            nodes[n] = x
            return x

        logits = model.run_with_hooks(pairs.corrupted, fwd_hooks=[(n, partial(grab, n=n)) for n in name])
        logit_diff(logits, pairs).sum().backward()
        terms = torch.stack([(clean[n] - nodes[n]).detach() * nodes[n].grad for n in name], 1)
        if SITES[site].unit == "pos":
            wanted = terms.sum(-1)
        else:
            wanted = terms.sum(2) if site == "neurons" else terms.sum((2, 4))
        got = attribution_patching(model, pairs, site=site, layers=[0, 1])
        torch.testing.assert_close(got.values, wanted, atol=1e-9, rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [None, "LNPre"])
@pytest.mark.parametrize("method", METHODS)
def test_prompts_do_not_mix_and_memory_changes_nothing(random_model, kind, method):
    model = random_model(kind)
    pairs = make_pairs(model, changed=((2, 4), (5,), (6,)))
    for site in ("q", "k") if method == "atp_star" else ("resid_mid", "z", "pattern"):
        whole = attribution_patching(model, pairs, site=site, method=method, by_position=True)
        parts = attribution_patching(model, pairs, site=site, method=method, by_position=True, max_memory=1)
        alone = [
            attribution_patching(model, pairs[i : i + 1], site=site, method=method, by_position=True)
            for i in range(len(pairs))
        ]
        torch.testing.assert_close(parts.values, whole.values, atol=1e-11, rtol=1e-9)
        torch.testing.assert_close(torch.cat([a.values for a in alone]), whole.values, atol=1e-11, rtol=1e-9)
        summed = attribution_patching(model, pairs, site=site, method=method)
        if SITES[site].unit == "head" and method in ("gradient", "relp", "integrated"):
            torch.testing.assert_close(whole.values.sum(-1), summed.values, atol=1e-11, rtol=1e-9)


def test_weights_get_no_gradients_and_stay_as_they_were():
    model = make_model("LNPre", seed=3)
    model.requires_grad_(True)
    attribution_patching(model, make_pairs(model))
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_noising_swaps_the_sides(random_model):
    model = random_model("LNPre")
    pairs = make_pairs(model)
    noising = attribution_patching(model, pairs, direction="noising")
    swapped = attribution_patching(model, pairs.reversed())
    torch.testing.assert_close(noising.values, swapped.values)
    torch.testing.assert_close(total_effect(noising), total_effect(swapped))


# ---------------------------------------------------------------------------------------------------------
# Integrated gradients


@pytest.mark.slow
@pytest.mark.parametrize("kind", [None, "LNPre"])
def test_integrated_effects_sum_to_the_total_effect(random_model, kind):
    model = random_model(kind)
    pairs = make_pairs(model, changed=((2, 4), (5,)))
    on_its_own = attribution_patching(model, pairs, method="integrated", path="layer", steps=60)
    total = total_effect(on_its_own)
    torch.testing.assert_close(on_its_own.values.sum(-1), total[:, None].expand(-1, 2), atol=5e-3, rtol=5e-3)
    of_input = attribution_patching(model, pairs, method="integrated", steps=60)
    torch.testing.assert_close(of_input.values[:, 0], on_its_own.values[:, 0])
    one_step = attribution_patching(model, pairs, method="integrated", path="layer", steps=1)
    assert (one_step.values.sum(-1) - total[:, None]).abs().max() > 1e-2


# ---------------------------------------------------------------------------------------------------------
# Second order


def test_second_order_is_exact_for_a_quadratic(random_model):
    model = random_model(None)
    pairs = make_pairs(model, changed=((2, 4), (5,)))
    for site in ("mlp_out", "resid_post", "neurons"):
        approximate, exact = both(model, pairs, site=site, layers=[-1], metric=quadratic, method="second_order")
        torch.testing.assert_close(approximate, exact, atol=1e-9, rtol=1e-9)
        first = attribution_patching(model, pairs, site=site, layers=[-1], metric=quadratic)
        assert (first.values - exact).abs().max() > 1e-2
        reliability = attribution_patching(
            model, pairs, site=site, layers=[-1], metric=quadratic, method="second_order"
        ).reliability
        where = first.values.abs() > 1e-6
        wanted = (exact - first.values).abs()[where] / first.values.abs()[where]
        torch.testing.assert_close(reliability[where], wanted, atol=1e-7, rtol=1e-7)


def test_joint_second_order_sums_to_the_quadratics_total(random_model):
    model = random_model(None)
    pairs = make_pairs(model, changed=((2, 4), (5,)))
    effect = attribution_patching(
        model, pairs, site="resid_post", layers=[-1], metric=quadratic, method="second_order", joint=True
    )
    torch.testing.assert_close(effect.values.sum((1, 2)), total_effect(effect), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("kind", [None, "LNPre"])
@pytest.mark.parametrize("site, metric", [("resid_pre", logit_diff), ("k", logit_diff), ("pattern", quadratic)])
def test_second_order_is_the_second_derivative_along_each_cell(random_model, kind, site, metric):
    model = random_model(kind)
    pairs = make_pairs(model, n=2, changed=((2, 4), (5,)))
    effect = attribution_patching(model, pairs, site=site, metric=metric, method="second_order")
    first = attribution_patching(model, pairs, site=site, metric=metric)
    _, clean = model.run_with_cache(pairs.clean)
    _, corrupted = model.run_with_cache(pairs.corrupted)

    def value(layer, unit, t):
        name = f"blocks.{layer}.{SITES[site].hook}"
        delta = torch.zeros_like(clean[name])
        at = (slice(None), unit) if site in ("resid_pre", "pattern") else (slice(None), slice(None), unit)
        delta[at] = (clean[name] - corrupted[name])[at]
        return metric(model.run_with_hooks(pairs.corrupted, fwd_hooks=[(name, lambda x, hook: x + t * delta)]), pairs)

    eps = 1e-3
    for layer in (0, 1):
        for unit in effect.units:
            low, middle, high = (value(layer, unit, t) for t in (-eps, 0, eps))
            second = (high - 2 * middle + low) / eps**2
            got = 2 * (effect.values - first.values)[:, layer, effect.units.index(unit)]
            torch.testing.assert_close(got, second, atol=1e-3 + 1e-3 * second.abs().max().item(), rtol=1e-2)
    assert (effect.values - first.values).abs().max() > 1e-2


# ---------------------------------------------------------------------------------------------------------
# AtP* and RelP


@pytest.mark.parametrize("by_position", [False, True])
@pytest.mark.parametrize("site", ["q", "k"])
def test_exact_softmax_is_exact_without_norm_and_mlp(random_model, site, by_position):
    model = random_model(None, attn_only=True)
    pairs = make_pairs(model, changed=((2, 4), (5,)))
    options = {"site": site, "layers": [-1], "by_position": by_position}
    approximate, exact = both(model, pairs, method="atp_star", **options)
    torch.testing.assert_close(approximate, exact, atol=1e-10, rtol=1e-10)
    assert (attribution_patching(model, pairs, **options).values - exact).abs().max() > 1e-3


@pytest.mark.parametrize("site", ["resid_pre", "mlp_out", "z"])
def test_relp_parts(random_model, site):
    for kind, act_fn in ((None, "gelu_new"), ("LNPre", "gelu_new"), ("RMS", "gelu"), ("LN", "relu")):
        model = random_model(kind, act_fn=act_fn)
        pairs = make_pairs(model)

        def effect(norm, gelu, model=model, pairs=pairs):
            return attribution_patching(
                model, pairs, site=site, method="relp", detach_norm=norm, linear_gelu=gelu
            ).values

        plain = attribution_patching(model, pairs, site=site).values
        torch.testing.assert_close(effect(False, False), plain, atol=1e-10, rtol=1e-10)
        # Without a norm its part does nothing; nor does the activation's part where it is linear piece by piece.
        same_norm = torch.allclose(effect(True, False), plain, atol=1e-10)
        same_act = torch.allclose(effect(False, True), plain, atol=1e-10)
        assert (same_norm, same_act) == (kind is None, act_fn == "relu")


def test_relp_is_the_gradient_of_the_model_with_frozen_norms(random_model):
    """Last layer's mlp_out: with the final norm's scale a constant, the path is the linear one of DLA."""
    model = random_model("LNPre")
    pairs = make_pairs(model, changed=(6,))
    got = attribution_patching(model, pairs, site="mlp_out", layers=[-1], method="relp", linear_gelu=False).values
    _, clean = model.run_with_cache(pairs.clean)
    _, base = model.run_with_cache(pairs.corrupted)
    name = "blocks.1.hook_mlp_out"
    d = (clean[name] - base[name])[:, -1]
    d = (d - d.mean(-1, keepdim=True)) / base["ln_final.hook_scale"][:, -1]
    columns = model.W_U.T[pairs.answers]
    wanted = ((columns[:, 0] - columns[:, 1]) * d).sum(-1)
    torch.testing.assert_close(got[:, 0, -1], wanted, atol=1e-9, rtol=1e-9)


# ---------------------------------------------------------------------------------------------------------
# Estimates by name and as themselves


NAMED = [
    (Gradient(), {"method": "gradient"}),
    (Integrated(), {"method": "integrated"}),
    (Integrated(steps=3, path="layer"), {"method": "integrated", "steps": 3, "path": "layer"}),
    (SecondOrder(), {"method": "second_order"}),
    (SecondOrder(joint=True), {"method": "second_order", "joint": True}),
    (AtPStar(), {"method": "atp_star"}),
    (RelP(), {"method": "relp"}),
    (RelP(linear_gelu=False), {"method": "relp", "linear_gelu": False}),
]


@pytest.mark.parametrize("estimate, options", NAMED, ids=lambda x: str(x))
@pytest.mark.parametrize("kind", [None, "LNPre"])
def test_an_estimate_is_its_name(random_model, kind, estimate, options):
    model = random_model(kind)
    pairs = make_pairs(model)
    itself = attribution_patching(model, pairs, site="k", method=estimate)
    named = attribution_patching(model, pairs, site="k", **options)
    assert torch.equal(itself.values, named.values) and itself.method == named.method == options["method"]
    if len(options) > 1:
        default = attribution_patching(model, pairs, site="k", method=options["method"])
        assert not torch.equal(named.values, default.values)


def test_every_estimate_has_a_name_and_a_reference():
    assert tuple(ESTIMATES) == METHODS and set(ESTIMATES) == {options["method"] for _, options in NAMED}
    for name, estimate in ESTIMATES.items():
        assert estimate.name == name and "arXiv" in estimate.__doc__
