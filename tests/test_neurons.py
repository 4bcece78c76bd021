import math

import pytest
import torch
from conftest import NORMALIZATIONS, make_model, random_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from lnfree_interp.neurons import ablate_cumulatively, ablate_neurons, rank_confidence_neurons
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


@pytest.mark.parametrize("layer", [0, -1])
def test_cumulative_ablation_is_all_of_them_set(any_model, layer):
    tokens = random_tokens(any_model)
    result = ablate_cumulatively(any_model, tokens, [7, 2, 30], layer=layer)
    assert_is_by_hook(result, any_model, tokens, layer, [[7], [7, 2], [7, 2, 30]], atol=1e-9)


@pytest.mark.parametrize("kind", [None, "LNPre"])
def test_fp32_is_exact_to_rounding(kind):
    model = make_model(kind, dtype=torch.float32)
    reference = make_model(kind)
    reference.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
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
    from lnfree_interp.neurons import ablate, scan

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
        model.blocks[-1].mlp.W_out *= strength
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
    for change in exact.changes(unembedding, rows, neurons.w, da):
        log_a, changed = by_moments.series(central, change, powers)
        bound = by_moments.error_bound(central, change, powers, log_a - changed)
        grown, entropy = stream(unembedding, rows, neurons, change, wanted)
        shift = change.t * raw[0, 0, 1] + (0 if change.alpha is None else change.alpha * rows.mean_m[:, None])
        certified = bound < 1.0  # larger ones certify nothing anybody uses
        error = torch.maximum((log_a + shift - grown).abs(), (changed - entropy + rows.entropy[:, None]).abs())
        assert (error <= bound + 1e-11)[certified].all()
        if strength <= 0.05:
            assert certified.double().mean() > 0.9  # and it does certify


def pieces(model, seed=0):
    tokens = random_tokens(model, seed=seed)
    unembedding = exact.folded_unembedding(model)
    layer = model.cfg.n_layers - 1
    post, final = f"blocks.{layer}.mlp.hook_post", f"blocks.{layer}.hook_resid_post"
    _, cache = model.run_with_cache(tokens, names_filter=[post, final])
    a, resid = cache[post].flatten(0, 1), cache[final].flatten(0, 1)
    rows = exact.make_rows(unembedding, resid, tokens.roll(-1, 1).flatten())
    return rows, unembedding, exact.make_neurons(unembedding, model.blocks[-1].mlp.W_out), a.mean(0) - a


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
        model.unembed.W_U *= 30
    tokens = random_tokens(model)
    assert (ablate_neurons(model, tokens).loss.abs() > 60).any()  # past what one shift for all could bear
    if dtype == torch.float32:
        single = make_model(kind, dtype=dtype, n_layers=1)
        single.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
        result = ablate_neurons(single, tokens)
        assert all(x.isfinite().all() for x in (result.loss, result.entropy, result.loss_frozen))
        return
    result = ablate_neurons(model, tokens, tolerance=1e-7)
    assert_is_by_hook(result, model, tokens, -1, [[i] for i in range(40)], atol=1e-6)


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
# Bad input


def test_bad_input_is_named(random_model):
    model = random_model(None)
    tokens = random_tokens(model)
    for fields, message in (
        ({"layer": 2}, r"layer 2 is outside -2\.\.1"),
        ({"neurons": [40]}, r"neuron 40 is outside 0\.\.39"),
        ({"neurons": [1, 1]}, "name one twice"),
        ({"neurons": []}, "must be a list of neuron numbers"),
        ({"ablation": "resample"}, "unknown ablation 'resample'; allowed are mean, zero"),
        ({"method": "guess"}, "unknown method 'guess'"),
        ({"method": "moments", "layer": 0}, "layer 0 is not the last of 2"),
        ({"tolerance": -1.0}, "tolerance -1.0"),
        ({"tolerance": math.nan}, "tolerance nan"),
    ):
        with pytest.raises(ValueError, match=message):
            ablate_neurons(model, tokens, **fields)
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
