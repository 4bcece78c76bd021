"""Patching of models that are not plain: hooks of the user's own, half precision, noise, other attention."""

import warnings

import pytest
import torch
from conftest import copy_weights, make_model, random_tokens
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_patching import POSITIONAL, assert_matches_plain_hooks, by_plain_hooks, cells_of, make_pairs

from lnfree_interp.lens import is_bridge
from lnfree_interp.metrics import logit_diff
from lnfree_interp.pairs import PromptPairs
from lnfree_interp.patching import SITES, activation_patching, attribution_patching

POINTS = (
    "hook_resid_pre",
    "attn.hook_q",
    "attn.hook_z",
    "hook_attn_out",
    "hook_resid_mid",
    "mlp.hook_post",
    "hook_mlp_out",
    "hook_resid_post",
)
ESTIMATES = (
    {"method": "gradient"},
    {"method": "integrated", "path": "input", "steps": 2},
    {"method": "integrated", "path": "layer", "steps": 2},
    {"method": "second_order"},
)
KINDS = st.sampled_from([None, "LNPre"])


def steered(x, hook):
    """Adds something, and mixes positions, later ones into earlier ones too."""
    return x + 0.2 + 0.3 * x.mean(1, keepdim=True)


def by_autograd(model, pairs, site, layer, unit, method, path="input", steps=5):
    """An estimate for one cell, from derivatives along it with TransformerLens' hooks alone."""
    name = f"blocks.{layer}.{SITES[site].hook}"
    # A Bridge's own resid_mid is what ln2 reads, beside the skip path: what attention writes is moved in its place.
    moved_at = name.replace("resid_mid", "attn_out") if is_bridge(model) else name
    names = (name, "blocks.0.hook_resid_pre")
    (_, clean), (_, base) = (
        model.run_with_cache(t, names_filter=lambda n: n in names) for t in (pairs.clean, pairs.corrupted)
    )
    delta = clean[name] - base[name]
    cell = torch.zeros_like(delta)
    at = (slice(None), unit) if site in POSITIONAL or site == "pattern" else (slice(None), slice(None), unit)
    cell[at] = delta[at]

    def derivatives(moved):
        """Of the metric along the cell, at the activation that `moved` makes of the run's own."""
        t = torch.zeros(len(pairs), dtype=delta.dtype, requires_grad=True)
        hooks = [*moved, (moved_at, lambda x, hook: x + t.view(-1, *[1] * (x.ndim - 1)) * cell)]
        value = logit_diff(model.run_with_hooks(pairs.corrupted, fwd_hooks=hooks), pairs).sum()
        (first,) = torch.autograd.grad(value, t, create_graph=True)
        if not first.requires_grad:
            return first, torch.zeros_like(first)
        return first.detach(), torch.autograd.grad(first.sum(), t, materialize_grads=True)[0]

    if method != "integrated":
        first, second = derivatives([])
        return first + second / 2 if method == "second_order" else first
    total = torch.zeros(len(pairs), dtype=delta.dtype)
    for step in range(steps):
        share = (step + 0.5) / steps
        if path == "input":
            between = torch.lerp(base[names[1]], clean[names[1]], share)
            moved = (names[1], lambda x, hook, between=between: between)
        else:
            moved = (moved_at, lambda x, hook, share=share: x + share * delta)
        total += derivatives([moved])[0] / steps
    return total


def assert_estimates_match(model, pairs, site, layer, options, tol=1e-9):
    effect = attribution_patching(model, pairs, site=site, layers=layer, **options)
    for j, unit in enumerate(effect.units):
        wanted = by_autograd(model, pairs, site, layer, unit, **options)
        torch.testing.assert_close(effect.values[:, 0, j], wanted, atol=tol, rtol=tol)
    assert effect.values.abs().max() > 1e-6 or layer == model.cfg.n_layers - 1


# ---------------------------------------------------------------------------------------------------------
# Hooks of the user's own


@pytest.fixture(scope="module")
def deep(random_model):
    return lambda kind, **fields: random_model(kind, n_layers=3, d_model=12, d_head=4, d_mlp=9, **fields)


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@example(kind=None, point="hook_resid_mid", at=1, site="resid_mid")
@given(kind=KINDS, point=st.sampled_from(POINTS), at=st.integers(0, 2), site=st.sampled_from(sorted(SITES)))
def test_own_hooks_run_once_in_every_patched_run(deep, kind, point, at, site):
    model = deep(kind)
    if is_bridge(model) and site == "resid_mid":
        site = "attn_out"  # a Bridge's own resid_mid is what ln2 reads, beside the skip path
    pairs = make_pairs(model, n=2, pos=4, changed=((1,), (2,)))
    model.add_hook(f"blocks.{at}.{point}", steered, is_permanent=True)
    try:
        effect = activation_patching(model, pairs, site=site, layers=range(3), units=[0, -1] if len(site) < 3 else None)
        cells = list(cells_of(effect))
        plain = by_plain_hooks(model, pairs, site, layer_unit_pos=[cell for _, cell in cells])
        for index, cell in cells:
            torch.testing.assert_close(effect.values[(slice(None), *index)], plain[cell], atol=1e-9, rtol=1e-9)
    finally:
        model.reset_hooks(including_permanent=True)


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(
    kind=KINDS,
    point=st.sampled_from(POINTS),
    at=st.integers(0, 2),
    site=st.sampled_from(["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "k", "pattern"]),
    layer=st.integers(0, 2),
    options=st.sampled_from(ESTIMATES),
)
def test_own_hooks_run_once_in_every_estimate(deep, kind, point, at, site, layer, options):
    model = deep(kind)
    pairs = make_pairs(model, n=2, pos=4, changed=((1,), (2,)))
    model.add_hook(f"blocks.{at}.{point}", steered, is_permanent=True)
    try:
        assert_estimates_match(model, pairs, site, layer, options)
    finally:
        model.reset_hooks(including_permanent=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [None, "LNPre"])
@pytest.mark.parametrize("name", ["hook_embed", "blocks.1.hook_resid_pre"])
def test_a_steering_vector_is_part_of_the_model(deep, kind, name):
    model = deep(kind)
    pairs = make_pairs(model, changed=((2, 4), (5,), (6,)))
    model.add_hook(name, steered, is_permanent=True)
    try:
        for site in ("resid_pre", "resid_mid", "v"):
            assert_matches_plain_hooks(model, pairs, activation_patching(model, pairs, site=site), site)
        for options in ESTIMATES:
            assert_estimates_match(model, pairs, "resid_pre", 1, options)
        with pytest.raises(ValueError, match="needs a model that read_weights reads"):
            attribution_patching(model, pairs, method="relp")
    finally:
        model.reset_hooks(including_permanent=True)


# ---------------------------------------------------------------------------------------------------------
# Other attention and positions


@pytest.mark.slow
@pytest.mark.parametrize("kind", [None, "LNPre"])
@pytest.mark.parametrize(
    "fields", [{"attention_dir": "bidirectional"}, {"positional_embedding_type": "shortformer"}], ids=str
)
def test_other_attention_and_positions(deep, kind, fields):
    model = deep(kind, **fields)
    pairs = make_pairs(model, n=2, pos=5, changed=((1, 3), (3,)))
    for site in SITES:
        effect = activation_patching(model, pairs, site=site, layers=range(3))
        assert_matches_plain_hooks(model, pairs, effect, site)
    for site, options in zip(("resid_pre", "q", "z", "k"), ESTIMATES):
        assert_estimates_match(model, pairs, site, 1, options)


# ---------------------------------------------------------------------------------------------------------
# Half precision


@pytest.mark.slow
@pytest.mark.parametrize("kind, dtype", [(None, torch.bfloat16), ("LNPre", torch.float16)], ids=str)
def test_half_precision_is_that_of_the_weights_alone(kind, dtype):
    model, exact = make_model(kind, dtype=dtype), make_model(kind)
    copy_weights(model, exact)
    pairs = make_pairs(exact, n=2, pos=6, changed=((2, 4), (5,)))

    def assert_close(function, **options):
        got, wanted = (function(m, pairs, **options).values for m in (model, exact))
        assert got.dtype == torch.float32
        assert (got - wanted).abs().max() < 3e-5 * wanted.abs().max(), options

    for site in SITES:
        assert_close(activation_patching, site=site, layers=[0, 1])
        assert_close(attribution_patching, site=site, layers=[0, 1])
    assert_close(activation_patching, site="k", by_position=True)
    assert_close(activation_patching, metric=lambda logits: logits[:, -1].logsumexp(-1))
    assert_close(attribution_patching, site="q", method="atp_star")
    for options in (*ESTIMATES[1:], {"method": "relp"}, {"method": "second_order", "joint": True}):
        assert_close(attribution_patching, site="z", **options)


def test_half_precision_through_hooks_says_what_to_expect():
    model = make_model("LNPre", dtype=torch.bfloat16)
    pairs = make_pairs(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        activation_patching(model, pairs)
    model.add_hook("blocks.1.hook_resid_pre", steered, is_permanent=True)
    for function in (activation_patching, attribution_patching):
        with pytest.warns(UserWarning, match="in torch.bfloat16.*use torch.float32"):
            function(model, pairs)


# ---------------------------------------------------------------------------------------------------------
# What is equal has no effect


@pytest.mark.slow
@pytest.mark.parametrize("kind, dtype", [(None, torch.float32), ("LNPre", torch.float64)], ids=str)
def test_equal_activations_have_no_effect_at_all(kind, dtype):
    # Wide enough for products to round differently in passes of different shapes.
    model = make_model(kind, dtype=dtype, d_model=64, d_mlp=256, d_head=16).train()
    model.W_E[7] = model.W_E[3]
    clean = random_tokens(model, 5, 9) % 3
    corrupted = clean.clone()
    clean[:, 2], corrupted[:, 2] = 7, 3  # the same to the model
    corrupted[1:, 4] = (clean[1:, 4] + 1) % 3
    pairs = PromptPairs(clean, corrupted, torch.tensor([[1, 2]] * 5))
    for site in SITES:
        options = {"site": site, "layers": range(2), "by_position": True}
        effects = [activation_patching(model, pairs, **options)]
        some = ESTIMATES if site in ("resid_pre", "q", "pattern") else ESTIMATES[:1]
        for estimate in (*some, {"method": "second_order", "joint": True}, {"method": "relp"}):
            effects.append(attribution_patching(model, pairs, **options, **estimate))
        if site in "qk":
            effects.append(attribution_patching(model, pairs, method="atp_star", **options))
        for effect in effects:
            by_pos = effect.values if site in POSITIONAL else effect.values.transpose(-1, -2)
            assert (by_pos[0] == 0).all() and (by_pos[1:] != 0).any(), (site, effect.method)
            assert (by_pos[1:, :, :4] == 0).all(), (site, effect.method)
            if site in ("resid_pre", "q", "k", "v"):
                assert (by_pos[:, 0, 5:] == 0).all(), (site, effect.method)
            if effect.reliability is not None:
                assert (effect.reliability[0] == 0).all()


def noisy(x, hook):
    return x + 0.1 * torch.randn_like(x)


def test_noise_is_refused():
    model = make_model("LNPre")
    pairs = make_pairs(model)
    model.add_hook("blocks.0.hook_attn_out", noisy, is_permanent=True)
    for function in (activation_patching, attribution_patching):
        with pytest.raises(ValueError, match="draws random numbers as it runs") as caught:
            function(model, pairs)
        assert "\n" not in str(caught.value)
    model.reset_hooks(including_permanent=True)
    model.blocks[1].mlp = torch.nn.Sequential(model.blocks[1].mlp, torch.nn.Dropout(0.5)).eval()
    effect = activation_patching(model, pairs)
    with pytest.raises(ValueError, match="draws random numbers as it runs"):
        activation_patching(model.train(), pairs)
    torch.testing.assert_close(activation_patching(model.eval(), pairs).values, effect.values)


# ---------------------------------------------------------------------------------------------------------
# Which layers and units


@pytest.mark.parametrize(
    "one, same",
    [
        (-1, [1]),
        (torch.tensor(1), [1]),
        (torch.tensor([1]), [1]),
        (range(1, 2), [1]),
        ([torch.tensor(-1)], [1]),
        (torch.tensor([1, 0], dtype=torch.int32).numpy(), [1, 0]),
        (torch.tensor([0, 1]).numpy()[1], [1]),
        ([False, True], [1]),
        (slice(1, None), [1]),
        (torch.tensor([True, True]), [0, 1]),
    ],
    ids=str,
)
def test_layers_and_units_are_named_in_any_plain_way(random_model, one, same):
    model = random_model("LNPre", n_heads=2)
    pairs = make_pairs(model)
    for function in (activation_patching, attribution_patching):
        wanted = function(model, pairs, site="z", layers=same, units=same)
        got = function(model, pairs, site="z", layers=one, units=one)
        assert got.layers == wanted.layers == tuple(same) and got.units == wanted.units == tuple(same)
        assert torch.equal(got.values, wanted.values)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ([0.5], "must be an integer, a slice, a list of integers or a mask of .2., not list of float64"),
        ("all", "must be an integer, .*not str of"),
        (True, "must be an integer, .* not bool of bool"),
        ([True, False, True], r"a mask of .2., not list of bool \[3\]"),
        ([False, False], "given name none of 0 to 1"),
        (torch.tensor([[0]]), r"not Tensor of int64 \[1, 1\]"),
        (2, "2 is out of range: .* reach from 0 to 1"),
        (-3, "-3 is out of range"),
        ([0, -2], "twice"),
    ],
)
def test_other_layers_and_units_are_refused(random_model, wrong, message):
    model = random_model("LNPre", n_heads=2)
    for name in ("layers", "units"):
        with pytest.raises(ValueError, match=message) as caught:
            activation_patching(model, make_pairs(model), site="z", **{name: wrong})
        assert "\n" not in str(caught.value)


def test_answers_are_of_the_vocabulary_that_comes_out():
    model = make_model("LNPre", d_vocab_out=5)
    pairs = make_pairs(model)
    within = PromptPairs(pairs.clean, pairs.corrupted, pairs.answers.sort().values % 2 + torch.tensor([0, 2]))
    assert_matches_plain_hooks(model, within, activation_patching(model, within), "resid_pre")
    with pytest.raises(ValueError, match="answer 5 is outside the model's vocabulary of 5"):
        activation_patching(model, PromptPairs(pairs.clean, pairs.corrupted, torch.tensor([[4, 5]] * 3)))


def test_pairs_are_their_three_tensors_too(random_model):
    model = random_model("LNPre")
    pairs = make_pairs(model)
    for function in (activation_patching, attribution_patching):
        got = function(model, (pairs.clean, pairs.corrupted, pairs.answers))
        assert torch.equal(got.values, function(model, pairs).values)
        with pytest.raises(ValueError, match="pairs must be PromptPairs"):
            function(model, [pairs.clean, pairs.corrupted])
