"""Screening: what is fixed is activation patching's, what is spent is within the budget, what is left is known."""

import math

import pytest
import torch
from conftest import HOOKED, KINDS, NEW_KINDS, make_model, random_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from test_patching import make_pairs

from lnfree_interp.metrics import Metric, kl_from_clean, logit_diff
from lnfree_interp.models import load_model
from lnfree_interp.pairs import induction_pairs
from lnfree_interp.patching import (
    SITES,
    Gradient,
    Integrated,
    SecondOrder,
    activation_patching,
    attribution_patching,
    edge_attribution,
    edge_patching,
    patching_error,
    screen,
    screen_edges,
)
from lnfree_interp.patching.cells import checked
from lnfree_interp.patching.edges.screen import edge_prices, edge_runs_flops
from lnfree_interp.patching.plans import Plan, error_left, planned
from lnfree_interp.patching.prices import cell_prices, counted, forward_flops, runs_flops
from lnfree_interp.weights import read_weights

CHANGED = ((2, 4), (5,), (3,))
slow = pytest.mark.slow


def some(shape, seed=0, share=0.4):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def where_of(site):
    return {"site": site, "layers": [1, 0], "units": [3, 0, 17] if site == "neurons" else None}


# ---------------------------------------------------------------------------------------------------------
# Some cells alone


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("kind, fast", [(None, True), ("LNPre", True), ("LNPre", False)])
def test_cells_asked_for_are_those_of_all(random_model, site, kind, fast):
    model = random_model(kind)
    pairs = make_pairs(model, changed=CHANGED)
    for by_position in (False,) if SITES[site].positional else (False, True):
        options = where_of(site) | {"by_position": by_position, "direction": "noising", "fast": fast}
        every = activation_patching(model, pairs, **options)
        only = some(every.values.shape)
        found = activation_patching(model, pairs, only=only, max_memory=100_000, **options)
        torch.testing.assert_close(found.values[only], every.values[only], atol=1e-10, rtol=1e-10)
        assert found.values[~only].isnan().all() and (every.values[only] != 0).any()
        assert 0 < found.cells_run < every.cells_run


def test_no_cell_asked_for(random_model):
    model = random_model(None)
    pairs = make_pairs(model)
    found = activation_patching(model, pairs, only=torch.zeros(3, 2, 7, dtype=torch.bool))
    assert found.cells_run == 0 and found.values.isnan().all()
    assert found.flops[1] == 0
    torch.testing.assert_close(found.clean, logit_diff(model(pairs.clean), pairs))


def test_masks_that_are_none(random_model, monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    model = random_model(None)
    pairs = make_pairs(model)
    for only, message in (
        (torch.ones(3, 2, 6, dtype=torch.bool), r"only has shape \[3, 2, 6\], the values have \[3, 2, 7\]"),
        (torch.ones(3, 2, 7), "only must be a mask, a bool tensor shaped as the values, not torch.float32"),
        ([True], "only must be a mask, a bool tensor shaped as the values, not list"),
    ):
        with pytest.raises(ValueError, match=message):
            activation_patching(model, pairs, only=only)


# ---------------------------------------------------------------------------------------------------------
# What is paid


def test_a_forward_is_the_models(any_block):
    """Of TransformerLens' own forward, counted."""
    tokens = random_tokens(any_block, 3, 7)
    _, flops = counted(any_block, tokens)
    # TransformerLens 4 computes some of rotary positions as a product.
    assert flops == pytest.approx(3 * forward_flops(any_block, 7), rel=0 if HOOKED else 0.02)


def test_fused_attention_is_counted():
    q, k = (torch.randn(2, n, 5, 4, requires_grad=True) for n in (6, 3))
    attend = torch.nn.functional.scaled_dot_product_attention
    _, flops = counted(attend, q, k, k, is_causal=True, enable_gqa=True)
    assert flops == 2 * 6 * 4 * 5 * 5 * 4
    _, both = counted(lambda: attend(q[:, :3], k, k).sum().backward())
    assert both >= 3 * flops / 2


def prices_of(model, pairs, site, metric=logit_diff, by_position=False, fast=True, every=False):
    layers, units = (None, None) if every else (where_of(site)[k] for k in ("layers", "units"))
    request = checked(model, pairs, site, metric, "denoising", layers, units, by_position)
    weights = read_weights(model) if fast else None
    return cell_prices(model, request, pairs, weights), runs_flops(model, request, pairs, weights)


def last_two(logits):
    return logits[:, -1, 0] - logits[:, -2, 1]


QUICK = ("resid_pre", "q", "neurons", "pattern")  # sites of a kind cost the same
FORWARDS = [("GPT-2", True), pytest.param("GPT-2", False, marks=slow), pytest.param("Llama", True, marks=slow)]


@pytest.mark.parametrize("site", [site if site in QUICK else pytest.param(site, marks=slow) for site in SITES])
@pytest.mark.parametrize("kind, fast", FORWARDS)
def test_no_cell_costs_more_than_its_price(model_of, site, kind, fast):
    model = model_of(kind, n_layers=3)
    pairs = make_pairs(model, pos=9, changed=((2, 4), (5,), (7,)))
    early = Metric("early", lambda x: x[:, 0, 0] - x[:, 0, 1], positions=(6,))
    for metric in (last_two, early):
        for by_position in (False,) if SITES[site].positional else (False, True):
            price, of_runs = prices_of(model, pairs, site, metric, by_position, fast)
            options = where_of(site) | {"by_position": by_position, "metric": metric}
            for only in (torch.ones_like(price, dtype=torch.bool), some(price.shape)):
                effect, flops = counted(activation_patching, model, pairs, only=only, fast=fast, **options)
                paid = of_runs + float(price[only].sum())
                assert flops <= paid < 4 * flops + of_runs
                assert (effect.values[only & (price == 0)] == 0).all()
            assert of_runs < 3 * len(pairs) * forward_flops(model, 9)


# ---------------------------------------------------------------------------------------------------------
# Screening


METHODS = (
    {"method": "gradient"},
    {"method": Gradient(), "against": Integrated(steps=2)},
    {"method": "second_order", "joint": True, "flag": "reliability"},
    {"method": "second_order"},
    {"method": "relp", "against": "gradient"},
)


def budget_for(model, pairs, share, site="resid_pre", by_position=False, metric=logit_diff, fast=True):
    """Forwards that pay for a share of all cells."""
    price, of_runs = prices_of(model, pairs, site, metric, by_position, fast, every=True)
    return (of_runs + share * float(price.sum())) / (len(pairs) * forward_flops(model, pairs.clean.shape[1]))


def check(model, pairs, budget, **options):
    """What must be true of every screening."""
    where = {k: v for k, v in options.items() if k in ("site", "layers", "units", "metric", "direction", "by_position")}
    exact = activation_patching(model, pairs, **where)
    found = screen(model, pairs, budget=budget, **options)
    fixed = found.fixed
    assert 0 <= found.spent <= budget and found.cost > 0
    torch.testing.assert_close(found.effect.values[fixed], exact.values[fixed], atol=1e-9, rtol=1e-9)
    assert torch.equal(found.effect.values[~fixed], found.estimate.values[~fixed])
    assert not (found.drawn & ~fixed).any()
    assert found.error_left.drawn <= int(found.drawn.sum())
    return found, exact


@pytest.mark.parametrize("options", METHODS[:3], ids=str)
@pytest.mark.parametrize("kind", [None, "LNPre"])
def test_nothing_and_everything(random_model, kind, options):
    model = random_model(kind)
    pairs = make_pairs(model, changed=CHANGED)
    for site in ("resid_pre", "z"):
        found, _ = check(model, pairs, 0, site=site, **options)
        method = {k: v for k, v in options.items() if k not in ("against", "flag")}
        wanted = attribution_patching(model, pairs, site=site, **method)
        assert torch.equal(found.effect.values, wanted.values) and found.spent == 0
        assert math.isnan(found.error_left.relative) and found.error_left.left > 0
        found, exact = check(model, pairs, math.inf, site=site, **options)
        assert found.fixed.all() and found.spent > 0 and found.error_left.left == 0
        assert found.error_left.relative == 0 and found.error_left.interval == (0, 0)
        assert patching_error(found.effect, exact, normalize=False, draws=5).relative < 1e-12
        assert found.effect.method == f"{found.estimate.method}, screened"


@settings(max_examples=12, deadline=None)
@given(
    kind=st.sampled_from(list(KINDS)),
    normalised=st.booleans(),
    site=st.sampled_from(["resid_pre", "attn_out", "z", "k", "pattern"]),
    options=st.sampled_from(METHODS),
    each_prompt=st.booleans(),
    by_position=st.booleans(),
    part=st.floats(-0.2, 1.1),
    seed=st.integers(0, 5),
)
def test_within_the_budget_on_any_model(
    model_of, kind, normalised, site, options, each_prompt, by_position, part, seed
):
    model = model_of(kind, normalised)
    pairs = make_pairs(model, n=4, changed=((2, 4), (5,), (1,), (6,)), seed=seed)
    options = options | {"by_position": by_position and not SITES[site].positional, "normalize": False}
    budget = max(0, budget_for(model, pairs, part, site, options["by_position"]))
    found, _ = check(model, pairs, budget, site=site, each_prompt=each_prompt, seed=seed, share=0.2, **options)
    if part > 1:
        assert found.fixed.all()
    if not each_prompt:
        price, _ = prices_of(model, pairs, site, by_position=options["by_position"], every=True)
        flagged = found.fixed & ~found.drawn
        run = (flagged | (price == 0)).all(0)
        assert (flagged & (price > 0))[:, ~run].sum() == 0  # on all prompts or on none


def test_more_budget_fixes_more(random_model):
    model = random_model("LNPre", n_layers=3)
    pairs = make_pairs(model, n=6, changed=CHANGED)
    exact = activation_patching(model, pairs)
    errors, fixed = [], []
    for part in (-0.2, 0.1, 0.3, 0.5, 0.8, 1.001):
        budget = budget_for(model, pairs, part)
        found = screen(model, pairs, method="gradient", budget=budget, share=0, normalize=False)
        errors.append(patching_error(found.effect, exact, normalize=False, draws=5).relative)
        fixed.append(int(found.fixed.sum()))
        assert not found.drawn.any() and (math.isnan(found.error_left.relative) or found.error_left.left == 0)
    assert fixed == sorted(fixed) and fixed[0] < fixed[-1]
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.01 > errors[-1]


def test_prompts_in_another_order(random_model):
    model = random_model("LN")
    pairs = make_pairs(model, n=4, changed=((2, 4), (5,), (1,), (6,)))
    order = torch.tensor([2, 0, 3, 1])
    for each_prompt in (False, True):
        budget = budget_for(model, pairs, 0.5)
        options = {"method": "second_order", "budget": budget, "share": 0, "each_prompt": each_prompt}
        one, other = (screen(model, p, **options) for p in (pairs, pairs[order]))
        assert torch.equal(one.fixed[order], other.fixed) and not one.fixed.all()
        torch.testing.assert_close(one.effect.values[order], other.effect.values)


def test_models_that_go_through_their_own_forward():
    model = make_model("LNPre", positional_embedding_type="alibi")
    pairs = make_pairs(model, n=3, pos=5, changed=((1,), (3,), (2,)))
    for site in ("resid_mid", "z"):
        budget = budget_for(model, pairs, 0.5, site, fast=False)
        found, _ = check(model, pairs, budget, site=site, method="second_order", normalize=False)
        assert (found.fixed & (found.estimate.values != 0)).any() and not found.fixed.all()


def test_other_metrics_and_directions(random_model):
    model = random_model("RMSPre")
    pairs = make_pairs(model, changed=CHANGED)
    for metric in (kl_from_clean(model, pairs), last_two):
        for direction in ("denoising", "noising"):
            options = {"metric": metric, "direction": direction, "site": "v", "method": "gradient", "normalize": False}
            found, _ = check(model, pairs, budget_for(model, pairs, 0.5, "v", metric=metric), **options)
            assert not found.fixed.all()


def test_where_the_estimate_is_exact_no_error_is_left():
    model = load_model("tiny-noLN", device="cpu", dtype=torch.float64)
    pairs = induction_pairs(model, 12, length=8)
    request, weights = checked(model, pairs, "mlp_out", logit_diff, "denoising", [-1], None, False), read_weights(model)
    price, of_runs = cell_prices(model, request, pairs, weights), runs_flops(model, request, pairs, weights)
    budget = (of_runs + 0.6 * float(price.sum())) / (12 * forward_flops(model, 8))
    options = {"site": "mlp_out", "layers": [-1], "method": "gradient", "normalize": False, "each_prompt": True}
    found = screen(model, pairs, budget=budget, **options)
    assert found.error_left.left > 0 and found.error_left.drawn > 1 and found.error_left.interval[1] < 1e-9


def test_table(random_model):
    model = random_model(None)
    pairs = make_pairs(model, changed=CHANGED)
    budget = budget_for(model, pairs, 0.6, "z")
    found = screen(model, pairs, site="z", budget=budget, each_prompt=True, method="second_order", normalize=False)
    table = found.table()
    columns = ["prompt", "layer", "head", "effect", "reliability", "estimate", "fixed"]
    assert list(table.columns) == columns and len(table) == 3 * 2 * 3
    assert table.fixed.sum() == int(found.fixed.sum()) and 0 < table.fixed.sum() < len(table)
    assert (table.effect[~table.fixed] == table.estimate[~table.fixed]).all()
    assert (table.effect[table.fixed] != table.estimate[table.fixed]).any()


# ---------------------------------------------------------------------------------------------------------
# Edges


def edge_prices_of(model, pairs, metric=logit_diff):
    request, weights = checked(model, pairs, "resid_pre", metric, "denoising", None, None, False), read_weights(model)
    return edge_prices(model, request, pairs, weights), edge_runs_flops(model, request, pairs, weights)


@pytest.mark.parametrize(
    "kind, metric",
    [("GPT-2", last_two), ("Gemma", logit_diff)]
    + [pytest.param(kind, logit_diff, marks=slow) for kind in NEW_KINDS if kind != "Gemma"],
)
def test_no_edge_costs_more_than_its_price(model_of, kind, metric):
    model = model_of(kind, n_layers=3)
    pairs = make_pairs(model, pos=9, changed=((2, 4), (5,), (7,)))
    price, of_runs = edge_prices_of(model, pairs, metric)
    there = (price > 0).all(0)
    assert torch.equal(there, edge_attribution(model, pairs, metric=metric).edges)
    receivers = edge_attribution(model, pairs, metric=metric).receivers
    of_kind = {kind: torch.tensor([r.endswith(kind) for r in receivers]) for kind in (".q", ".v", ".mlp", "logits")}
    for only in (there, *(there & some(there.shape, share=0.2) & mine for mine in of_kind.values())):
        if only.any():
            _, flops = counted(edge_patching, model, pairs, edges=only, metric=metric)
            assert flops <= of_runs + float(price[:, only].sum()) < 4 * flops + of_runs


@pytest.mark.parametrize(
    "kind, normalised, options",
    [
        ("GPT-2", False, METHODS[1]),
        pytest.param("GPT-2", True, {"method": "second_order"}, marks=slow),
        pytest.param("Llama", True, METHODS[0], marks=slow),
    ],
    ids=str,
)
def test_edges_within_the_budget(model_of, kind, normalised, options):
    model = model_of(kind, normalised)
    pairs = make_pairs(model, n=4, changed=CHANGED)
    exact = edge_patching(model, pairs)
    price, of_runs = edge_prices_of(model, pairs)
    forward = len(pairs) * forward_flops(model, 7)
    for part in (-0.1, 0.4, 1.001):
        budget = max(0, (of_runs + part * float(price.sum())) / forward)
        found = screen_edges(model, pairs, budget=budget, normalize=False, **options)
        assert 0 <= found.spent <= budget and found.cost > 0
        run = found.fixed
        torch.testing.assert_close(found.effect.values[run], exact.values[run], atol=1e-9, rtol=1e-9)
        assert torch.equal(found.effect.values[~run], found.estimate.values[~run])
        assert torch.equal(run.any(0), run.all(0))
        if part > 1:
            assert run.all() and found.error_left.left == 0
        elif part < 0:
            assert math.isnan(found.error_left.relative) and found.spent == 0
        else:
            assert found.drawn.any() and not run.all() and found.error_left.left > 0
    table = screen_edges(model, pairs, budget=budget / 2, normalize=False, **options).table()
    assert {"sender", "receiver", "effect", "estimate", "fixed"} <= set(table.columns)
    assert len(table) == int(exact.edges.sum()) and 0 < table.fixed.sum() < len(table)
    left = table[~table.fixed]
    assert (left.effect - left.estimate).abs().max() < 1e-12


def test_edges_of_a_model_that_goes_through_its_own_forward():
    model = make_model("LNPre", positional_embedding_type="alibi", act_fn="gelu_new")
    if read_weights(model) is not None or not HOOKED:
        pytest.skip("TransformerLens 4 builds it otherwise")
    pairs = make_pairs(model, n=2, pos=5, changed=((1,), (3,)))
    price, of_runs = edge_prices_of(model, pairs)
    budget = (of_runs + 0.5 * float(price.sum())) / (2 * forward_flops(model, 5))
    found = screen_edges(model, pairs, budget=budget, normalize=False)
    exact = edge_patching(model, pairs)
    assert 0 < found.spent <= budget and found.drawn.any() and not found.fixed.all()
    torch.testing.assert_close(found.effect.values[found.fixed], exact.values[found.fixed])


def test_bad_edges(random_model):
    model = random_model("LNPre")
    with pytest.raises(ValueError, match="budget is -1; budget must be a number of at least 0"):
        screen_edges(model, make_pairs(model), budget=-1)
    with pytest.raises(ValueError, match="flag 'correction' needs a method with a reliability"):
        screen_edges(model, make_pairs(model), budget=1, flag="correction", normalize=False)
    with pytest.raises(ValueError, match="unknown method 'exact'"):
        screen_edges(model, make_pairs(model), budget=1, method="exact")


# ---------------------------------------------------------------------------------------------------------
# Plans


@slow
def test_flags_are_what_they_say(random_model):
    model = random_model("LNPre", n_layers=3)
    pairs = make_pairs(model, n=3, pos=6, changed=CHANGED)
    first, second = (attribution_patching(model, pairs, method=m).values for m in ("gradient", "second_order"))
    reliability = attribution_patching(model, pairs, method="second_order").reliability
    scores = {
        "largest": second.abs(),
        "reliability": reliability,
        "correction": second.abs() * reliability,
        "difference": (second - first).abs(),
    }
    budget, chosen = budget_for(model, pairs, 0.4), set()
    for flag, score in scores.items():
        against = "gradient" if flag == "difference" else None
        for each_prompt in (False, True) if flag == "correction" else (True,):
            options = {"flag": flag, "against": against, "each_prompt": each_prompt, "share": 0}
            found = screen(model, pairs, method="second_order", budget=budget, normalize=False, **options)
            price, _ = prices_of(model, pairs, "resid_pre", every=True)
            run = found.fixed & (price > 0)
            group = score.mean(0, keepdim=True).expand(score.shape) if not each_prompt else score
            # What is too dear is passed over: of what costs no more, none that is left scores higher.
            for layer in range(3):
                here = run[:, layer] & (price[:, layer] > 0)
                if here.any():
                    cheaper = (price[:, layer] > 0) & ~here
                    cheaper &= price[:, layer] <= price[:, layer][here].min()
                    assert not (group[:, layer][cheaper] > group[:, layer][here].max()).any()
            assert 0 < run.sum() < (price > 0).sum()
            chosen.add(tuple(run.flatten().tolist()))
    assert len(chosen) > 3


def test_a_plan_takes_what_the_budget_pays():
    score = torch.tensor([[[5.0, 4, 3, 2, 1, 9]]])
    price = torch.tensor([[[2.0, 5, 1, 2, 1, 0]]])
    for budget, wanted in (
        (0, ""),
        (1, "2"),
        (2, "0"),
        (4, "024"),
        (6, "0234"),
        (8, "012"),
        (9, "0124"),
        (11, "01234"),
        (99, "01234"),
    ):
        plan = planned(score, score, price, float(budget), together=False, share=0)
        assert "".join(str(int(i)) for i in plan.run[0, 0].nonzero()) == wanted, budget
    both = planned(score.expand(2, 1, 6), score.expand(2, 1, 6), price.expand(2, 1, 6), 4.0, together=True, share=0)
    assert torch.equal(both.run[0], both.run[1]) and both.run[0].nonzero()[:, 1].tolist() == [0]


@slow
@pytest.mark.parametrize("whole_draws", [False, True])
def test_errors_left_are_estimated_without_bias(whole_draws):
    """And their intervals hold, where errors are skewed but go with the effects."""
    random = torch.Generator().manual_seed(1)
    exact = torch.randn(8, 5, 30, generator=random, dtype=torch.float64).exp()
    noise = torch.randn(8, 5, 30, generator=random, dtype=torch.float64)
    values = exact * (1 + 0.4 * noise)
    price = torch.rand(8, 5, 30, generator=random, dtype=torch.float64) / 100
    weight = torch.tensor([1.0, 0, 2, 1, 1, 0.5, 1, 1], dtype=torch.float64)
    size = values.abs() * weight.view(-1, 1, 1)
    found, truth, covered = [], [], []
    budget = 3.0
    for seed in range(80):
        options = {"counts": weight > 0, "whole_draws": whole_draws, "share": 0.4, "seed": seed}
        plan = planned(values.abs(), size, price, budget, together=True, **options)
        assert float(price[plan.run].sum()) <= budget and not (plan.drawn & plan.flagged).any()
        left = error_left(values, exact, plan, weight, seed=seed)
        error, everything = ((x * weight.view(-1, 1, 1)) for x in ((values - exact).abs(), exact.abs()))
        found.append(left.relative)
        truth.append(float(error[~plan.run].sum() / everything.sum()))
        covered.append(left.interval[0] <= truth[-1] <= left.interval[1])
    assert sum(found) == pytest.approx(sum(truth), rel=0.1) and min(truth) > 0.05
    assert sum(covered) > 0.85 * len(covered)


@slow
def test_intervals_hold_on_models(random_model):
    covered = []
    for norm in (None, "LNPre"):
        for model_seed in range(3):
            model = random_model(norm, seed=model_seed, n_layers=3)
            pairs = make_pairs(model, n=8, changed=((2, 4), (5,), (3,)), seed=model_seed)
            exact = activation_patching(model, pairs)
            for seed in range(4):
                budget = budget_for(model, pairs, 0.5)
                found = screen(model, pairs, method="gradient", budget=budget, share=0.5, normalize=False, seed=seed)
                truth = patching_error(found.effect, exact, normalize=False, draws=2).relative
                left = found.error_left
                assert left.drawn > 5 and left.left > 5 and truth > 0
                covered.append(left.interval[0] <= truth <= left.interval[1])
    assert sum(covered) > 0.75 * len(covered)


def test_cells_of_which_an_estimate_says_nothing_are_drawn_too():
    exact = torch.ones(4, 2, 10, dtype=torch.float64)
    values = torch.zeros_like(exact)
    for whole_draws in (False, True):
        plan = planned(values, values, exact, 40.0, together=True, whole_draws=whole_draws, share=0.5)
        left = error_left(values, exact, plan, torch.ones(4))
        assert left.relative == pytest.approx(float((~plan.run).double().mean())) and left.drawn > 1


def test_what_is_left_when_all_is_drawn_but_one():
    exact = torch.tensor([[[1.0, 2, 4]]], dtype=torch.float64)
    values = exact + torch.tensor([[[0.5, 0.5, 1]]])
    nothing = torch.zeros_like(exact, dtype=torch.bool)
    chance = torch.tensor([[[0.25, 0.25, 0.5]]], dtype=torch.float64)
    # Every draw says 2 for the error in all, and 4, 8 or 8 for the size.
    plan = Plan(nothing, torch.tensor([0, 0, 2]), chance)
    left = error_left(values, exact, plan, torch.ones(1))
    assert (left.drawn, left.left) == (2, 1)
    assert left.relative == pytest.approx(3 * (2 - 1.5) / (4 + 4 + 8))
    # Of a prompt twice as heavy, as much.
    assert error_left(values, exact, plan, torch.full((1,), 2.0)).relative == pytest.approx(left.relative)


# ---------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    "options, message",
    [
        ({"budget": -1}, "budget is -1; budget must be a number of at least 0"),
        ({"budget": math.nan}, "budget is nan; budget must be a number of at least 0"),
        ({"budget": "3"}, "budget must be a number of at least 0, not '3'"),
        ({"budget": None}, "budget must be a number of at least 0, not None"),
        ({"share": 1}, "share is 1; share must be a number of at least 0 and below 1"),
        ({"share": -0.1}, "share is -0.1; share must be a number of at least 0"),
        ({"flag": "smallest"}, "unknown flag 'smallest'; allowed are largest, reliability, correction, difference"),
        ({"flag": "difference"}, "flag 'difference' needs another estimate"),
        ({"flag": "largest", "against": "relp"}, "flag 'largest' does not look at another estimate"),
        ({"method": "gradient", "flag": "reliability"}, "flag 'reliability' needs a method with a reliability"),
        ({"method": "exact"}, "unknown method 'exact'; allowed are"),
        ({"against": "exact"}, "unknown against 'exact'; allowed are"),
        ({"site": "resid"}, "unknown site 'resid'; allowed are"),
        ({"method": "atp_star"}, "method 'atp_star' is for sites q and k"),
        ({"least": 1e9}, "the metric moves by 1000000000.0 or more on none of 3 prompts"),
        ({"seed": 0.5}, "seed must be a whole number"),
    ],
)
def test_bad_input(random_model, options, message, monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    model = random_model("LNPre")
    with pytest.raises(ValueError, match=message) as caught:
        screen(model, make_pairs(model), **({"budget": 2, "normalize": "least" in options} | options))
    assert "\n" not in str(caught.value)


def test_names_and_tuples_will_do():
    pairs = induction_pairs("tiny-noLN", 3, length=6)
    found = screen("tiny-noLN", (pairs.clean, pairs.corrupted, pairs.answers), method=SecondOrder(joint=True), budget=1)
    assert found.effect.values.shape == (3, 8, 6) and found.flag == "correction"
