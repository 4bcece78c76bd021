import math
from functools import partial

import numpy as np
import pytest
import torch
from conftest import NORMALIZATIONS, copy_weights, make_model, random_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from lnfree_interp.forward import final_norm
from lnfree_interp.models import load_model
from lnfree_interp.neurons import ablate, ablate_cumulatively, ablate_neurons, rank_confidence_neurons, scan, streaming
from lnfree_interp.neurons import last_layer as exact
from lnfree_interp.neurons import moments as by_moments
from lnfree_interp.neurons.__main__ import main
from lnfree_interp.neurons.streaming import stream


def loss_and_entropy(logits, tokens):
    log_p = logits[:, :-1].double().log_softmax(-1)
    loss = -log_p.gather(-1, tokens[:, 1:, None])[..., 0]
    return loss, -(log_p.exp() * log_p).sum(-1)


def by_hook(model, tokens, layer, sets, ablation="mean", *, freeze=False):
    """Change of loss and entropy with each set of neurons set by a TransformerLens hook, the final scale frozen
    or not: [set, batch, pos]. Sets are rows of one large batch.
    """
    layer %= model.cfg.n_layers
    name, scale = f"blocks.{layer}.mlp.hook_post", "ln_final.hook_scale"
    kept = [name] + [scale] * (model.cfg.normalization_type is not None)
    logits, cache = model.run_with_cache(tokens, names_filter=kept)
    n = len(tokens)

    def set_neurons(x, hook):
        for i, neurons in enumerate(sets):
            value = cache[name][..., neurons].mean((0, 1)) if ablation == "mean" else 0.0
            x[i * n : (i + 1) * n, :, neurons] = value
        return x

    hooks = [(name, set_neurons)]
    if freeze and scale in kept:
        hooks.append((scale, lambda x, hook: cache[scale].repeat(len(sets), 1, 1)))
    many = tokens.repeat(len(sets), 1)
    changed = loss_and_entropy(model.run_with_hooks(many, fwd_hooks=hooks), many)
    return [a.unflatten(0, (len(sets), n)) - b for a, b in zip(changed, loss_and_entropy(logits, tokens))]


def assert_is_by_hook(result, model, tokens, layer, sets, ablation="mean", *, atol):
    loss, entropy = by_hook(model, tokens, layer, sets, ablation)
    frozen_loss, frozen_entropy = by_hook(model, tokens, layer, sets, ablation, freeze=True)
    for found, expected in (
        (result.loss, loss),
        (result.entropy, entropy),
        (result.loss_frozen, frozen_loss),
        (result.entropy_frozen, frozen_entropy),
    ):
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=atol)


# ---------------------------------------------------------------------------------------------------------
# Ablation = a hook that sets the neuron


@pytest.mark.parametrize("method, ablation", [("stream", "mean"), ("moments", "zero"), ("rerun", "mean")])
def test_a_scan_of_the_last_layer_is_a_hook_for_every_neuron(any_model, method, ablation):
    tokens = random_tokens(any_model)
    result = ablate_neurons(any_model, tokens, ablation=ablation, method=method, tolerance=1e-7)
    assert result.labels[3] == "L1N3" and len(result.labels) == 40
    atol = 2e-7 if method == "moments" else 1e-9
    assert_is_by_hook(result, any_model, tokens, -1, [[i] for i in range(40)], ablation, atol=atol)


def test_earlier_layers_are_run_again(any_model):
    tokens = random_tokens(any_model)
    result = ablate_neurons(any_model, tokens, layer=0, neurons=[3, 11])
    assert_is_by_hook(result, any_model, tokens, 0, [[3], [11]], atol=1e-9)
    assert result.labels == ("L0N3", "L0N11")


OTHER_BLOCKS = {
    "rotary": {"positional_embedding_type": "rotary", "rotary_dim": 8},
    "gated": {"gated_mlp": True, "act_fn": "silu"},
    "grouped": {"n_key_value_heads": 1},
    "norms after": {"use_normalization_before_and_after": True},
    "capped": {"output_logits_soft_cap": 2.0},
}


@pytest.mark.slow
@pytest.mark.parametrize("blocks", OTHER_BLOCKS)
@pytest.mark.parametrize("kind", [None, "LN"])
def test_blocks_of_another_kind_are_hooks_too(kind, blocks, random_model):
    if kind is not None and blocks == "norms after":
        kind = "RMS"  # such blocks come with no other
    model = random_model(kind, **OTHER_BLOCKS[blocks])
    tokens = random_tokens(model)
    closed = blocks not in ("norms after", "capped")
    for method in ("auto", "rerun", *["moments", "stream"] * closed):
        result = ablate_neurons(model, tokens, neurons=[7, 2], method=method, tolerance=1e-8)
        assert_is_by_hook(result, model, tokens, -1, [[7], [2]], atol=1e-7)
    for layer in (0, 1):
        result = ablate_cumulatively(model, tokens, [7, 2, 30], layer=layer)
        assert_is_by_hook(result, model, tokens, layer, [[7], [7, 2], [7, 2, 30]], atol=1e-9)
    if not closed:
        with pytest.raises(
            ValueError, match=r"method 'moments' does not serve: (the model normalises|logits are capped)"
        ):
            ablate_neurons(model, tokens, method="moments")


# ---------------------------------------------------------------------------------------------------------
# Models that carry hooks of a user's own

OWN_HOOKS = {  # and the layers whose neurons they come after
    "blocks.1.hook_mlp_out": (lambda x, hook: x * 0.5, (0, 1)),
    "blocks.1.hook_resid_post": (lambda x, hook: x * torch.linspace(0.5, 1.5, x.shape[-1], dtype=x.dtype), (0, 1)),
    "blocks.1.mlp.hook_post": (lambda x, hook: x.clamp_max(0.1), (0, 1)),
    "blocks.1.hook_resid_pre": (lambda x, hook: x + torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype), (0,)),
    "blocks.0.hook_resid_post": (lambda x, hook: 2 * x, (0,)),
    "blocks.0.attn.hook_z": (lambda x, hook: 3 * x, ()),
}


@pytest.mark.slow
@pytest.mark.parametrize("point", OWN_HOOKS)
@pytest.mark.parametrize("kind", [None, "LN"])
def test_hooks_of_the_models_own_are_run(kind, point):
    model = make_model(kind)
    hook, after = OWN_HOOKS[point]
    model.add_hook(point, hook, is_permanent=True)
    tokens = random_tokens(model)
    for layer in (0, 1):
        for method in ("auto", "rerun"):
            result = ablate_neurons(model, tokens, layer=layer, neurons=[7, 2], method=method)
            assert_is_by_hook(result, model, tokens, layer, [[7], [2]], atol=1e-9)
        result = ablate_cumulatively(model, tokens, [7, 2], layer=layer)
        assert_is_by_hook(result, model, tokens, layer, [[7], [7, 2]], atol=1e-9)
    for method in ("moments", "stream"):
        if 1 in after:
            with pytest.raises(ValueError, match=rf"the model carries a hook at {point}; use 'rerun' or 'auto'"):
                ablate_neurons(model, tokens, method=method)
        else:
            result = ablate_neurons(model, tokens, neurons=[7, 2], method=method, tolerance=1e-8)
            assert_is_by_hook(result, model, tokens, 1, [[7], [2]], atol=1e-7)


@pytest.mark.parametrize("layer", [0, -1])
def test_cumulative_ablation_is_all_of_them_set(any_model, layer):
    tokens = random_tokens(any_model)
    result = ablate_cumulatively(any_model, tokens, [7, 2, 30], layer=layer)
    assert_is_by_hook(result, any_model, tokens, layer, [[7], [7, 2], [7, 2, 30]], atol=1e-9)


@pytest.mark.parametrize("kind", [None, "LNPre"])
def test_fp32_is_exact_to_rounding(kind):
    model = make_model(kind, dtype=torch.float32)
    reference = make_model(kind)
    copy_weights(model, reference)
    tokens = random_tokens(model)
    sets = [[i] for i in range(40)]
    exact_loss, exact_entropy = by_hook(reference, tokens, -1, sets)
    hook_loss, hook_entropy = by_hook(model, tokens, -1, sets)
    rounding = max((hook_loss - exact_loss).abs().max(), (hook_entropy - exact_entropy).abs().max()).item()
    result = ablate_neurons(model, tokens, method="stream")
    assert_is_by_hook(result, reference, tokens, -1, sets, atol=3 * rounding)
    assert rounding < 1e-4


@pytest.mark.parametrize("method", ["stream", "moments"])
def test_nothing_acts_through_a_scale_that_is_not_there(method, random_model):
    model = random_model(None)
    tokens = random_tokens(model)
    result = ablate_neurons(model, tokens, method=method)
    assert torch.equal(result.loss, result.loss_frozen) and torch.equal(result.entropy, result.entropy_frozen)
    table = result.table()
    assert table.loss_abs.max() > 0.01
    assert (table.loss_abs_through_scale == 0).all() and (table.entropy_through_scale == 0).all()
    with_norm = ablate_neurons(random_model("LNPre"), tokens, method=method).table()
    assert with_norm.loss_abs_through_scale.max() > 0.01


def test_baseline_is_the_model_itself(any_model):
    tokens = random_tokens(any_model)
    loss, entropy = loss_and_entropy(any_model(tokens), tokens)
    for method in ("stream", "rerun"):
        result = ablate_neurons(any_model, tokens, neurons=[0], method=method)
        torch.testing.assert_close(result.baseline_loss, loss)
        torch.testing.assert_close(result.baseline_entropy, entropy)


@pytest.mark.parametrize("kind", [None, "LN"])
def test_blocks_of_tokens_and_neurons_change_nothing(kind, random_model, monkeypatch):
    model = random_model(kind)
    tokens = random_tokens(model, batch=9, pos=9)
    whole = ablate_neurons(model, tokens, tolerance=1e-6)
    monkeypatch.setattr(ablate, "ROWS_PER_BLOCK", 5)
    monkeypatch.setattr(scan, "PAIRS_AT_ONCE", 70)
    parts = ablate_neurons(model, tokens, tolerance=1e-6)
    torch.testing.assert_close(parts.loss, whole.loss, rtol=0, atol=2e-6)
    torch.testing.assert_close(parts.entropy_frozen, whole.entropy_frozen, rtol=0, atol=2e-6)


# ---------------------------------------------------------------------------------------------------------
# The certificate


def strengthened(kind, strength, **fields):
    """A model whose last layer's neurons push `strength` times as hard."""
    model = make_model(kind, **fields)
    with torch.no_grad():
        model.blocks[-1].mlp.W_out.mul_(strength)
    return model


@settings(max_examples=15, deadline=None)
@given(
    kind=st.sampled_from(NORMALIZATIONS),
    strength=st.sampled_from([0.01, 0.05, 0.2, 0.7, 2.0]),
    level=st.integers(0, len(by_moments.LEVELS) - 1),
    seed=st.integers(0, 4),
)
def test_no_series_is_further_off_than_certified(kind, strength, level, seed):
    model = strengthened(kind, strength, seed=seed, n_layers=1)
    rows, unembedding, neurons, da = pieces(model, seed)
    powers, has_scale = by_moments.LEVELS[level], kind is not None
    raw = by_moments.matrix_moments(unembedding, rows, neurons.w, by_moments.keys(powers, has_scale))
    own = by_moments.row_moments(unembedding, rows, has_scale)
    central = by_moments.central(raw, own, neurons)
    wanted = torch.ones_like(da, dtype=torch.bool)
    for change in exact.changes(unembedding, rows, neurons, da):
        log_a, changed = by_moments.series(central, change, powers)
        bound = by_moments.error_bound(central, change, powers, log_a - changed)
        grown, entropy = stream(unembedding, rows, neurons, change, wanted)
        shift = change.t * raw[0, 0, 1]
        certified = bound < 1.0  # larger ones certify nothing anybody uses
        error = torch.maximum((log_a + shift - grown).abs(), (changed - entropy).abs())
        assert (error <= bound + 1e-11)[certified].all()
        if strength <= 0.05:
            assert certified.double().mean() > 0.9  # and it does certify


def activations(model, tokens):
    """The final residual stream, the last layer's neurons and the next tokens, a row for each token."""
    layer = model.cfg.n_layers - 1
    post, final = f"blocks.{layer}.mlp.hook_post", f"blocks.{layer}.hook_resid_post"
    _, cache = model.run_with_cache(tokens, names_filter=[post, final])
    return cache[final].flatten(0, 1), cache[post].flatten(0, 1), tokens.roll(-1, 1).flatten()


def pieces(model, seed=0):
    unembedding = exact.folded_unembedding(model)
    resid, a, targets = activations(model, random_tokens(model, seed=seed))
    rows = exact.make_rows(unembedding, resid, targets)
    return rows, unembedding, exact.make_neurons(unembedding, model.blocks[-1].mlp.W_out), a.mean(0) - a


def in_fp64(model, resid, post, targets):
    """Change of loss and entropy, in total and with the scale frozen, by each neuron set to its mean: the logits of
    every pair, written out. What is known of an fp32 model in fp32 is the residual stream and the neurons.
    """
    fields = {name: getattr(model.cfg, name) for name in ("n_layers", "d_model", "d_mlp", "d_vocab")}
    exact_model = make_model(model.cfg.normalization_type, **fields)
    copy_weights(model, exact_model)
    norm, resid, post = final_norm(exact_model), resid.double(), post.double()

    def logits(x, scale):
        hidden = (x - x.mean(-1, keepdim=True) if norm.centres else x) / scale
        hidden = hidden * (1 if norm.w is None else norm.w) + (0 if norm.b is None else norm.b)
        return hidden @ exact_model.unembed.W_U + exact_model.unembed.b_U

    def quantities(logits):
        log_p = logits.log_softmax(-1)
        loss = -log_p.take_along_dim(targets.view(-1, *[1] * (logits.ndim - 1)), -1)[..., 0]
        return torch.stack([loss, -(log_p.exp() * log_p).sum(-1)])

    after = resid[:, None] + (post.mean(0) - post)[..., None] * exact_model.blocks[-1].mlp.W_out
    before = logits(resid, norm.scale(resid))
    found = [logits(after, scale) for scale in (norm.scale(after), norm.scale(resid)[:, None])]
    changes = torch.cat([quantities(x) - quantities(before)[..., None] for x in found])
    sizes = [(x - x.mean(-1, keepdim=True)).abs().amax(-1) for x in (before, *found)]
    return changes, 1 + sizes[0][:, None] + torch.maximum(sizes[1], sizes[2])


# Of numbers of the logits' size written in fp32, each the sum of some tens of products.
FP32_NOISE = 6 * torch.finfo(torch.float32).eps


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(NORMALIZATIONS),
    deviation=st.sampled_from([1.0, 3.0, 10.0, 30.0, 100.0]),
    shift=st.sampled_from([0.0, 10.0]),
    strength=st.sampled_from([0.01, 0.05, 0.2, 1.0]),
    method=st.sampled_from(["moments", "moments", "stream"]),
    wide=st.booleans(),
    seed=st.integers(0, 4),
)
def test_fp32_keeps_what_is_certified(kind, deviation, shift, strength, method, wide, seed):
    shape = {"d_vocab": 1500, "d_model": 96} if wide else {}
    model = strengthened(kind, strength, seed=seed, n_layers=1, dtype=torch.float32, **shape)
    with torch.no_grad():
        model.unembed.W_U.mul_(deviation / model(random_tokens(model)).std(-1).mean())
        model.unembed.W_U.add_(shift * torch.randn(model.cfg.d_model, 1, generator=torch.Generator().manual_seed(seed)))
        model.unembed.b_U.add_(shift)
    tokens = random_tokens(model, seed=seed)
    resid, post, targets = activations(model, tokens)
    unembedding = exact.folded_unembedding(model)
    rows = exact.make_rows(unembedding, resid, targets)
    neurons = exact.make_neurons(unembedding, model.blocks[-1].mlp.W_out)
    da = (post.double().mean(0) - post.double()).float()
    tolerance = 1e-5 if deviation < 10 else 1e-3  # large logits let less be certified more closely
    found = scan.scan_block(unembedding, rows, neurons, da, tolerance=tolerance, method=method)
    expected, size = in_fp64(model, resid, post, targets)
    fields = (found.loss, found.entropy, found.loss_frozen, found.entropy_frozen)
    off = (torch.stack(fields) - expected).abs().amax(0)
    limit = float(found.bound) + FP32_NOISE * size * found.streamed  # streamed: of total and frozen at least one
    assert (off - limit).max().item() <= 0 and found.bound <= tolerance
    if method == "moments" and strength <= 0.05 and deviation <= 3:
        assert found.streamed.double().mean() < 0.2


@pytest.mark.parametrize("name", ["tiny", "tiny-noLN"])
def test_what_all_logits_have_in_common_changes_nothing(name):
    model = load_model(name, device="cpu")
    tokens = model.to_tokens("It was a dark and stormy night; the rain fell in torrents.")
    plain = ablate_neurons(model, tokens)
    with torch.no_grad():
        model.unembed.W_U.add_(10 * torch.randn(model.cfg.d_model, 1, generator=torch.Generator().manual_seed(0)))
    shifted = ablate_neurons(model, tokens)
    for field in ("loss", "entropy", "loss_frozen", "entropy_frozen"):
        torch.testing.assert_close(getattr(shifted, field), getattr(plain, field), rtol=0, atol=2e-5)
    assert shifted.bound <= 1e-5 and shifted.streamed < plain.streamed + 0.01 < 0.1


@pytest.mark.parametrize("kind", [None, "LNPre"])
def test_the_tolerance_decides_what_is_summed_exactly(kind):
    model = strengthened(kind, 0.1)
    tokens = random_tokens(model)
    shares = [ablate_neurons(model, tokens, method="moments", tolerance=t).streamed for t in (0.0, 1e-9, 1e-4, 1e6)]
    # A neuron that is dead on all tokens needs no sums: its series is exactly 0.
    assert shares[0] > 0.9 and shares[0] >= shares[1] > shares[2] >= shares[3]
    result = ablate_neurons(model, tokens, method="moments", tolerance=1e-6)
    assert 0 < result.bound <= 1e-6
    assert_is_by_hook(result, model, tokens, -1, [[i] for i in range(40)], atol=1.1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [None, "LNPre"])
def test_violent_neurons_neither_overflow_nor_vanish(kind, dtype):
    model = make_model(kind, n_layers=1)
    with torch.no_grad():
        model.blocks[-1].mlp.W_out[5] *= 300
        model.unembed.W_U.mul_(30)
    tokens = random_tokens(model)
    assert (ablate_neurons(model, tokens).loss.abs() > 60).any()  # past what one shift for all could bear
    if dtype == torch.float32:
        single = make_model(kind, dtype=dtype, n_layers=1)
        copy_weights(model, single)
        result = ablate_neurons(single, tokens)
        assert all(x.isfinite().all() for x in (result.loss, result.entropy, result.loss_frozen))
        return
    result = ablate_neurons(model, tokens, tolerance=1e-7)
    assert_is_by_hook(result, model, tokens, -1, [[i] for i in range(40)], atol=1e-6)


@pytest.mark.slow
def test_a_device_is_asked_once_a_block_not_once_a_tile(monkeypatch):
    model = strengthened("LN", 0.3)
    rows, unembedding, neurons, da = pieces(model)

    class Reads(TorchDispatchMode):
        waits = (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten._unique2.default,
        )

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function in self.waits
            return function(*args, **(kwargs or {}))

    counts = []
    for pairs_at_once, pairs_per_tile in ((2**16, 128), (70, 7)):
        monkeypatch.setattr(scan, "PAIRS_AT_ONCE", pairs_at_once)
        monkeypatch.setattr(streaming, "CPU_PAIRS", pairs_per_tile)
        for method in ("moments", "stream"):
            reads = Reads()
            reads.count = 0
            with reads:
                scan.scan_block(unembedding, rows, neurons, da, tolerance=1e-6, method=method)
            counts.append(reads.count)
    assert counts[:2] == counts[2:] and max(counts) < 16


@pytest.mark.parametrize("kind", [None, "LN"])
def test_progress_is_done_of_all(kind, monkeypatch):
    monkeypatch.setattr(ablate, "ROWS_PER_BLOCK", 8)
    model = strengthened(kind, 1.0)
    with torch.no_grad():
        model.blocks[-1].mlp.W_out[5] *= 300  # some pairs need a running maximum
    tokens = random_tokens(model, batch=4)
    told = []
    ablate_neurons(model, tokens, tolerance=math.inf, progress=lambda *x: told.append(x))
    assert told.pop() == (40 * 4 * 6, 40 * 4 * 6)  # with nothing to sum
    told.clear()
    for method in ("moments", "stream", "rerun"):
        ablate_neurons(model, tokens, method=method, progress=lambda *x: told.append(x))
        assert told[-1] == (40 * 4 * 6, 40 * 4 * 6) and len(told) > 2
        assert all(isinstance(x, int) for pair in told for x in pair) and told == sorted(told)
        told.clear()
    ablate_cumulatively(model, tokens, [3, 4], layer=0, progress=lambda *x: told.append(x))
    assert told == [(24, 48), (48, 48)]


# ---------------------------------------------------------------------------------------------------------
# Ranking


@pytest.mark.parametrize("layer", [0, 1, -1])
def test_ranking_is_the_papers_score(any_model, layer):
    ranking = rank_confidence_neurons(any_model, layer, null_directions=3).set_index("neuron")
    W_U, w_out = any_model.unembed.W_U, any_model.blocks[layer].mlp.W_out
    if getattr(getattr(any_model, "ln_final", None), "w", None) is not None:
        W_U = any_model.ln_final.w[:, None] * W_U
    if (any_model.cfg.normalization_type or "").startswith("LN"):
        W_U, w_out = W_U - W_U.mean(0), w_out - w_out.mean(1, keepdim=True)
    U = torch.linalg.svd(W_U).U
    U = U[:, -4:-1] if (any_model.cfg.normalization_type or "").startswith("LN") else U[:, -3:]
    for i in (0, 17, 39):
        w = w_out[i]
        cosines = (w @ W_U) / (w.norm() * W_U.norm(dim=0))
        assert ranking.score[i] == pytest.approx((w.norm() / cosines.var(unbiased=False)).item())
        assert ranking.null_share[i] == pytest.approx(((w @ U).square().sum() / w.norm() ** 2).item(), abs=1e-9)
    assert ranking.score.is_monotonic_decreasing and len(ranking) == 40


@pytest.mark.parametrize("kind", [None, "LN"])
def test_a_dead_neuron_scores_nothing(kind):
    model = make_model(kind)
    with torch.no_grad():
        model.blocks[-1].mlp.W_out[5] = 0
    ranking = rank_confidence_neurons(model)
    assert not ranking.isna().any(axis=None)
    assert ranking.neuron.iloc[-1] == 5 and (ranking.iloc[-1][["score", "norm", "null_share"]] == 0).all()


def test_a_planted_confidence_neuron_is_found_and_acts_through_the_scale():
    model = make_model("LNPre", d_vocab=12)  # fewer tokens than dimensions: W_U has a null space
    with torch.no_grad():
        W_U = model.unembed.W_U - model.unembed.W_U.mean(0)
        null = torch.linalg.svd(W_U).U[:, 13]
        model.blocks[-1].mlp.W_out[5] = 8 * (null - null.mean())
    ranking = rank_confidence_neurons(model, null_directions=12)
    assert ranking.neuron[0] == 5 and ranking.null_share[0] > 0.99
    result = ablate_neurons(model, random_tokens(model, batch=8), neurons=[5])
    assert result.loss.abs().mean() > 0.01
    assert result.loss_frozen.abs().max() < 1e-9


# ---------------------------------------------------------------------------------------------------------
# Naming neurons, and bad input


def test_neurons_are_named_as_arrays_are_indexed(random_model):
    model = random_model("LN")
    tokens = random_tokens(model)
    expected = ablate_neurons(model, tokens, neurons=[2, 39])
    mask = torch.zeros(40, dtype=torch.bool)
    mask[[2, 39]] = True
    for same in (
        mask,
        mask.numpy(),
        mask.tolist(),
        [2, -1],
        np.array([2, 39], np.uint16),
        torch.tensor([2, -1]),
        (2, 39),
    ):
        result = ablate_neurons(model, tokens, neurons=same, layer=np.int64(-1))
        assert result.labels == ("L1N2", "L1N39") and torch.equal(result.loss, expected.loss)
        assert ablate_cumulatively(model, tokens, same).labels == ("L1N2", "+L1N39")
    for one in (-1, 39, np.int64(39), torch.tensor(39), np.array(39)):
        assert ablate_neurons(model, tokens, neurons=one, layer=torch.tensor(1)).labels == ("L1N39",)
        assert ablate_cumulatively(model, tokens, one).labels == ("L1N39",)


WANTED = r"neurons must be an integer, a slice, a list of integers or a mask of \[40\]"


def test_bad_input_is_named(random_model):
    model = random_model(None)
    tokens = random_tokens(model)
    for fields, message in (
        ({"layer": 2}, r"layer 2 is outside -2\.\.1"),
        ({"neurons": [40]}, r"neuron 40 is out of range: the layer's neurons reach from 0 to 39"),
        ({"neurons": [1, 1]}, "name one twice"),
        ({"neurons": []}, "the neurons given name none of 0 to 39"),
        ({"neurons": [-41]}, r"neuron -41 is out of range: the layer's neurons reach from 0 to 39"),
        ({"neurons": [1, -39]}, "name one twice"),
        ({"neurons": [[1, 2]]}, WANTED),
        ({"neurons": [[1, 2], [3]]}, WANTED),
        ({"neurons": [1.5]}, WANTED),
        ({"neurons": ["L1N2"]}, WANTED),
        ({"neurons": [True, False]}, WANTED),
        ({"neurons": torch.tensor(True)}, WANTED),
        ({"neurons": [False] * 40}, "the neurons given name none of 0 to 39"),
        ({"layer": torch.tensor(0.5)}, "layer must be a whole number"),
        ({"ablation": "resample"}, "unknown ablation 'resample'; allowed are mean, zero"),
        ({"method": "guess"}, "unknown method 'guess'"),
        ({"method": "moments", "layer": 0}, "layer 0 is not the last of 2"),
        ({"tolerance": -1.0}, "tolerance is -1.0"),
        ({"tolerance": math.nan}, "tolerance is nan"),
    ):
        with pytest.raises(ValueError, match=message):
            ablate_neurons(model, tokens, **fields)
    other_tokens = random_model(None, d_vocab_out=7)
    for way in (ablate_neurons, partial(ablate_cumulatively, neurons=[1])):
        with pytest.raises(ValueError, match="over 7 outputs, not over its 61 tokens"):
            way(other_tokens, tokens)
    assert len(rank_confidence_neurons(other_tokens)) == 40
    with pytest.raises(ValueError, match="has no MLP"):
        rank_confidence_neurons(random_model(None, attn_only=True))
    with pytest.raises(ValueError, match=r"null_directions is 25, outside 1\.\.24"):
        rank_confidence_neurons(model, null_directions=25)


def test_command_refuses_bad_input_and_writes_nothing(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["--model", "no-such-model", "--out", str(out)]) == 2
    assert main(["--text", str(tmp_path / "none.txt"), "--out", str(out)]) == 2
    with pytest.raises(SystemExit) as stop:
        main(["--ablation", "resample", "--out", str(out)])
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 3
    assert not out.exists()
