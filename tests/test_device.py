"""Every public function on a second device: CI has no accelerator, so a virtual one stands in for it.

See `virtual_device` for what it refuses and counts: tensors of two places mixed, float64 on the device, host syncs.
"""

import dataclasses
from functools import cache

import pandas as pd
import pytest
import torch
from conftest import make_model, random_tokens
from minute import probe_data
from test_evaluate import ITEMS, Letters, uncovered
from transformers import GPT2Config, GPT2LMHeadModel
from virtual_device import DEVICE, MISSING, host_syncs, on_device, register

import lnfree_interp
from lnfree_interp import (
    ProbeData,
    PromptPairs,
    Reader,
    ablate_cumulatively,
    ablate_neurons,
    activation_patching,
    attention_patterns,
    attention_score_attribution,
    attention_sinks,
    attribution_error,
    attribution_graph,
    attribution_patching,
    attribution_to,
    attributions_to,
    check_model,
    compare,
    compare_models,
    composition_scores,
    concept_evidence,
    cross_entropy,
    direct_effect,
    direct_logit_attribution,
    edge_attribution,
    edge_patching,
    effect_on,
    entropy,
    evaluate_loss,
    evaluate_probe,
    explain,
    fit_probe,
    generate_samples,
    hellaswag,
    induction_pairs,
    ioi_pairs,
    js_divergence,
    kl_divergence,
    load_model,
    logit_attributions,
    logit_lens,
    loss_table,
    patching_error,
    rank_confidence_neurons,
    residual_norms,
    screen,
    screen_edges,
    swap_concepts,
    token_losses,
    virtual_weights,
)
from lnfree_interp.finetune.export import export_ln_free
from lnfree_interp.finetune.removable import collect_std, freeze, make_removable, removal_sites, update_averages
from lnfree_interp.metrics import kl_from_clean, right_log_prob
from lnfree_interp.probe import Training

pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


# ---------------------------------------------------------------------------------------------------------
# The device itself


@pytest.fixture(autouse=True)
def device():
    register()


def test_the_device_computes_and_differentiates_as_the_cpu_does():
    x, w = torch.randn(3, 4), torch.randn(4, 5)
    results = []
    for device in ("cpu", DEVICE):
        a, b = (t.detach().to(device).requires_grad_() for t in (x, w))
        first = torch.autograd.grad(torch.nn.functional.gelu(a @ b).square().sum(), b, create_graph=True)[0]
        first.square().sum().backward()
        assert a.grad.device.type == first.device.type == torch.device(device).type
        results.append([t.cpu() for t in (first, a.grad, b.grad)])
    torch.testing.assert_close(*results)
    y = torch.zeros(3, 4, dtype=torch.bfloat16, device=DEVICE)
    y[:, [0, 2]] += 1
    y[1] = torch.arange(4, device=DEVICE)
    assert y.tolist() == [[1, 0, 1, 0], [0, 1, 2, 3], [1, 0, 1, 0]]


def test_the_device_refuses_what_accelerators_refuse():
    there = torch.ones(3, device=DEVICE)
    for mix in (
        lambda: there + torch.ones(3),
        lambda: torch.cat([there, torch.ones(1)]),
        lambda: torch.ones(3) @ there,
    ):
        with pytest.raises(RuntimeError, match="of tensors on the virtual device and of CPU tensors"):
            mix()
    assert (there + torch.tensor(2.0)).tolist() == [3, 3, 3]
    for double in (
        lambda: there.double(),
        lambda: torch.zeros(2, dtype=torch.float64, device=DEVICE),
        lambda: torch.ones(2, dtype=torch.float64).to(DEVICE),
        lambda: there.to("cpu", torch.float64),
    ):
        with pytest.raises(TypeError, match="float64"):
            double()
    with pytest.raises(RuntimeError, match="generator of the CPU"):
        torch.rand(3, device=DEVICE, generator=torch.Generator())


def test_the_device_counts_what_the_host_waits_for():
    x = torch.arange(4, device=DEVICE)
    reads = {
        "value read": lambda: x[0].item(),
        "copy to the CPU": lambda: x.cpu(),
        "copy to the device": lambda: torch.ones(2).to(DEVICE),
        "nonzero": lambda: (x > 1).nonzero(),
        "index by a mask": lambda: x[x > 1],
        "index on the CPU": lambda: x[torch.tensor([1, 2])],
        "equal": lambda: torch.equal(x, x),
        "unique": lambda: x.unique(),
        "bincount": lambda: x.bincount(),
        "repeat_interleave": lambda: x.repeat_interleave(x),
    }
    for what, read in reads.items():
        with host_syncs() as syncs:
            read()
        assert syncs == {f"outside the package: {what}": 1}
    with host_syncs() as syncs:
        x[x > 1] = 0
        torch.where(x > 1, x + 1, x).sum().repeat_interleave(3)
    assert not syncs


# ---------------------------------------------------------------------------------------------------------
# What is run: name of the public function, and which of its ways, to a function of a model and a size (1 or 2)


def tokens(model, n, pos=None):
    return random_tokens(model, 4 * n, pos or 6 + 2 * n).to(model.cfg.device)


def pairs(model, n):
    clean = random_tokens(model, 2 + n, 8)
    corrupted = clean.clone()
    corrupted[:, 2 : 3 + n] = (corrupted[:, 2 : 3 + n] + 1) % model.cfg.d_vocab
    answers = torch.stack([clean[:, 0], (clean[:, 0] + 1) % model.cfg.d_vocab], 1)
    return PromptPairs(clean, corrupted, answers)


def logits(model, n, seed=0):
    return torch.randn(4 * n, 6, 61, generator=torch.Generator().manual_seed(seed)).to(model.cfg.device)


def attributions(model, n):
    return logit_attributions(model, tokens(model, n), by="head")


def removed(model, n):
    """A training step of a model whose LayerNorms are being removed, and what is exported."""
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_positions=16, n_embd=24, n_layer=2, n_head=3)).eval()
    gpt2 = make_removable(gpt2.to(model.cfg.device), eot=0).train()
    gpt2.transformer.drop.p = 0.0
    for module in gpt2.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for frozen in ((), removal_sites(gpt2)):
        freeze(gpt2, frozen)
        ids = random_tokens(model, 2 * n, 8).to(model.cfg.device)
        gpt2(ids, labels=ids).loss.backward()
        collect_std(gpt2)
        update_averages(gpt2)
    return dict(export_ln_free(gpt2).state_dict())


def last_logit(logits):
    return logits[:, -1, 0]


def probe_prompts(n):
    return ProbeData(probe_data().prompts * n)


def probed(model, n):
    training = Training(hidden=4, epochs=1)
    return fit_probe(model, probe_prompts(n), dim=16, mastered=False, training=training)


def patching(function, **how):
    def run(model, n):
        chosen, metric = pairs(model, n), how.get("metric")
        if metric in (kl_from_clean, right_log_prob):
            metric = metric(model, chosen) if metric is kl_from_clean else metric(chosen)
        return function(model, chosen, **{**how, **({"metric": metric} if metric else {})})

    return run


CASES = {
    "cross_entropy": lambda m, n: cross_entropy(logits(m, n), tokens(m, n, 6)),
    "entropy": lambda m, n: entropy(logits(m, n)),
    "kl_divergence": lambda m, n: kl_divergence(logits(m, n), logits(m, n, 1)),
    "js_divergence": lambda m, n: js_divergence(logits(m, n), logits(m, n, 1)),
    "direct_logit_attribution": lambda m, n: direct_logit_attribution(m, tokens(m, n)),
    "direct_logit_attribution:neurons": lambda m, n: direct_logit_attribution(m, tokens(m, n), by="neuron"),
    "direct_effect": lambda m, n: direct_effect(m, tokens(m, n)),
    "direct_effect:targets": lambda m, n: direct_effect(
        m, tokens(m, n), random_tokens(m, 4 * n, 1)[:, 0], versus=random_tokens(m, 4 * n, 1, 1)[:, 0], by="head"
    ),
    "logit_attributions": attributions,
    "logit_attributions:positions": lambda m, n: logit_attributions(m, tokens(m, n), positions=[0, 3, -2]),
    "attribution_error": lambda m, n: attribution_error(*attributions(m, n), draws=20),
    "ablate_neurons:moments": lambda m, n: ablate_neurons(m, tokens(m, n), method="moments"),
    "ablate_neurons:stream": lambda m, n: ablate_neurons(m, tokens(m, n), neurons=range(10 * n), method="stream"),
    "ablate_neurons:rerun": lambda m, n: ablate_neurons(m, tokens(m, 1), neurons=range(4 * n), layer=0),
    "ablate_neurons:zero": lambda m, n: ablate_neurons(m, tokens(m, n), neurons=[3, 1, 5], ablation="zero"),
    "ablate_cumulatively": lambda m, n: ablate_cumulatively(m, tokens(m, 1), range(4 * n)),
    "rank_confidence_neurons": lambda m, n: rank_confidence_neurons(m),
    "residual_norms": lambda m, n: residual_norms(m, tokens(m, n), eot_token=7),
    "residual_norms:per_position": lambda m, n: residual_norms(m, tokens(m, n), per_position=True),
    "attention_sinks": lambda m, n: attention_sinks(m, tokens(m, n)),
    "evaluate_loss": lambda m, n: evaluate_loss(m, tokens(m, n), draws=20),
    "loss_table": lambda m, n: loss_table(
        {name: evaluate_loss(m, tokens(m, n), draws=20) for name in "ab"}, {"b": "a"}, draws=20
    ),
    "compare_models": lambda m, n: compare_models({"a": m, "b": m}, tokens(m, n), draws=20),
    "hellaswag": lambda m, n: hellaswag(m, ITEMS[:1] * 2 * n),
    "hellaswag:lengths": lambda m, n: hellaswag(m, ITEMS),
    "generate_samples": lambda m, n: generate_samples({"m": m}, "abc", n_samples=2 * n, max_new_tokens=4),
    "generate_samples:greedy": lambda m, n: generate_samples({"m": m}, "abc", temperature=0.0, max_new_tokens=4),
    "remove_layernorm": removed,
    "patching_error": lambda m, n: patching_error(
        attribution_patching(m, pairs(m, n)), activation_patching(m, pairs(m, n)), draws=20
    ),
    "activation_patching:plain": patching(activation_patching, metric=last_logit),
    "activation_patching:right_log_prob": patching(activation_patching, metric=right_log_prob),
    "activation_patching:kl_from_clean": patching(activation_patching, metric=kl_from_clean, direction="noising"),
    "activation_patching:by_position": patching(activation_patching, site="z", by_position=True),
    "activation_patching:neurons": patching(activation_patching, site="neurons", layers=[1]),
    "attribution_patching:gradient": patching(attribution_patching),
    "attribution_patching:plain": patching(attribution_patching, metric=last_logit, direction="noising"),
    "attribution_patching:neurons": patching(attribution_patching, site="neurons", layers=[0]),
    "attribution_patching:pattern": patching(attribution_patching, site="pattern"),
    "attribution_patching:integrated": patching(attribution_patching, method="integrated", steps=2),
    "attribution_patching:layers": patching(attribution_patching, method="integrated", steps=2, path="layer"),
    "attribution_patching:joint": patching(attribution_patching, method="second_order", joint=True),
    "attribution_patching:second_order": patching(attribution_patching, method="second_order"),
    "attribution_patching:second_order_plain": patching(
        attribution_patching, method="second_order", metric=last_logit, site="z", layers=[1]
    ),
    "attribution_patching:atp_star": patching(attribution_patching, method="atp_star", site="q"),
    "attribution_patching:relp": patching(attribution_patching, method="relp"),
    "edge_patching": patching(edge_patching),
    "edge_patching:some": patching(edge_patching, edges=[("L0H1", "L1H0.k"), ("embed", "logits")], metric=last_logit),
    "edge_attribution:gradient": patching(edge_attribution),
    "edge_attribution:plain": patching(edge_attribution, metric=last_logit, direction="noising"),
    "edge_attribution:integrated": patching(edge_attribution, method="integrated", steps=2),
    "edge_attribution:second_order": patching(edge_attribution, method="second_order"),
    "edge_attribution:atp_star": patching(edge_attribution, method="atp_star"),
    "edge_attribution:relp": patching(edge_attribution, method="relp"),
    "attribution_to": lambda m, n: attribution_to(m, tokens(m, n), Reader.neuron(1), by="head"),
    "attribution_to:source": lambda m, n: attribution_to(m, tokens(m, n), Reader.query(1, 0), by="source", top=3),
    "effect_on": lambda m, n: effect_on(m, tokens(m, n), Reader.value(1), by="neuron", positions=[0, -1]),
    "attributions_to": lambda m, n: tuple(attributions_to(m, tokens(m, n), Reader.key(1), max_memory=10**4)),
    "attention_score_attribution": lambda m, n: attention_score_attribution(m, tokens(m, n), 1, 0),
    "attention_score_attribution:top": lambda m, n: attention_score_attribution(m, tokens(m, 1), 1, 0, top=3),
    "composition_scores": lambda m, n: composition_scores(m, "Q"),
    "virtual_weights": lambda m, n: virtual_weights(m, "L0.mlp", "L1H0.q").AB,
    "explain": lambda m, n: explain(m, tokens(m, 1)[0], 3, 5),
    "compare": lambda m, n: compare({"m": m}, residual_norms, tokens(m, n)).table(),
    "logit_lens": lambda m, n: logit_lens(m, tokens(m, n)),
    "attention_patterns": lambda m, n: attention_patterns(m, tokens(m, n)),
    "token_losses": lambda m, n: token_losses(m, tokens(m, n)),
    "attribution_graph": lambda m, n: attribution_graph(m, tokens(m, 1)[0], 3, bos=False),
    "fit_probe": lambda m, n: probed(m, n).tensors,
    "evaluate_probe": lambda m, n: evaluate_probe(m, probed(m, 1), probe_prompts(n)),
    "concept_evidence": lambda m, n: concept_evidence(m, probed(m, 1), (1, 2, 3), "v1", key="k0"),
    "concept_evidence:encoder": lambda m, n: concept_evidence(m, probed(m, 1), (1, 2, 3), readout="encoder", key="k0"),
    "swap_concepts": lambda m, n: swap_concepts(m, probed(m, 1), probe_prompts(1), layers=-1, n=4 * n),
    # What it cost is the device's own matter: it takes attention apart in other operations.
    "screen": lambda m, n: patching(screen, budget=3)(m, n).effect,
    "screen_edges": lambda m, n: patching(screen_edges, budget=4)(m, n).effect,
} | {
    f"activation_patching:{site}": patching(activation_patching, site=site)
    for site in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "q", "k", "v", "pattern")
}
# These have no other path, or (the sites that differ only by name) share one.
ONLY_FAST = {"attribution_patching:atp_star", "attribution_patching:relp", "remove_layernorm"}
ONLY_FAST |= {"edge_attribution:atp_star", "edge_attribution:relp"}
ONLY_FAST |= {"attribution_graph"}  # wants weights that are read
ONLY_FAST |= {f"activation_patching:{site}" for site in ("resid_mid", "resid_post", "attn_out", "q", "k", "v")}

# These choose a device or know of none; the first is `test_models`'.
NO_DEVICE = {
    "load_model": "chooses the device",
    "read_weights": "views of the model's own",
    "why_not_read": "words",
    "check_model": "waits for every number; its law is below",
    "available_models": "a table of names",
    "read_documents": "text",
    "documents_of": "text",
    "read_corpus": "token ids, on the CPU",
    "token_blocks": "text to token ids, on the CPU",
    "hellaswag_items": "text",
    "induction_pairs": "token ids, on the CPU",
    "ioi_pairs": "token ids, on the CPU",
    "logit_diff": "the metric of every patching case that names none",
    "recall_data": "texts",
    "analogy_data": "texts",
}


def ways(name):
    """LN-free and LN, on our own forward and by hooks on TransformerLens' own."""
    return [(None, False), ("LN", False)] + [("LN", True)] * (name not in ONLY_FAST)


@cache
def models(kind, hooked):
    """The same model here and there."""
    here = make_model(kind, dtype=torch.float32)
    there = on_device(here)
    for model in (here, there):
        model.tokenizer = Letters()
        if hooked:
            uncovered(model)
    return here, there


def numbers(result, name="result"):
    """All that a result holds, by name, its table included; tensors on the CPU."""
    if isinstance(result, torch.Tensor):
        return {name: result.detach().cpu()}
    if isinstance(result, pd.DataFrame):
        return {f"{name}.{column}": result[column].tolist() for column in result}
    if dataclasses.is_dataclass(result):
        table = {"table": result.table()} if hasattr(result, "table") else {}
        fields = [field.name for field in dataclasses.fields(result) if field.compare]  # not a tokenizer
        return numbers({key: getattr(result, key) for key in fields} | table, name)
    if isinstance(result, dict):
        found = [numbers(value, f"{name}.{key}") for key, value in result.items()]
        return {key: value for part in found for key, value in part.items()}
    if isinstance(result, tuple) and any(dataclasses.is_dataclass(x) for x in result):
        return numbers(dict(enumerate(result)), name)
    return {name: result}


@cache
def on_the_device(name, kind, hooked):
    """What the smaller case gives there, and the host syncs it takes."""
    with host_syncs() as syncs:
        result = CASES[name](models(kind, hooked)[1], 1)
    return result, syncs


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_device_gives_the_cpus_numbers(name):
    for way in ways(name):
        expected, found = numbers(CASES[name](models(*way)[0], 1)), numbers(on_the_device(name, *way)[0])
        assert found.keys() == expected.keys()
        for key, value in found.items():
            assert type(value) is type(expected[key])
            if is_numbers(value):
                torch.testing.assert_close(
                    value, expected[key], rtol=1e-3, atol=1e-4, equal_nan=True, msg=lambda m, key=key: f"{key}: {m}"
                )
            else:
                assert value == expected[key], key


def is_numbers(value) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(is_numbers, value))
    return isinstance(value, (torch.Tensor, int, float))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_syncs_do_not_grow_with_what_is_asked_for(name):
    for kind, hooked in ways(name):
        if kind is None:
            continue  # LN does all of it and more
        few = on_the_device(name, kind, hooked)[1]
        with host_syncs() as more:
            CASES[name](models(kind, hooked)[1], 2)
        assert more.total() <= few.total(), dict(more - few)


# Of what is streamed: a function of a model and a number of batches, and the syncs that one more batch may cost.
STREAMED = {
    "evaluate_loss": (lambda m, n: evaluate_loss(m, tokens(m, n, 6), draws=2, per_pass=24), 1),
    "compare_models": (lambda m, n: compare_models({"a": m, "b": m}, tokens(m, n, 6), draws=2, per_pass=24), 1),
    "residual_norms": (lambda m, n: residual_norms(m, tokens(m, n, 6), per_pass=24), 2),
    "attention_sinks": (lambda m, n: attention_sinks(m, tokens(m, n, 6), per_pass=24), 1),
    "hellaswag": (lambda m, n: hellaswag(m, ITEMS[:1] * n, per_pass=1), 4),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STREAMED)
def test_a_batch_costs_few_syncs(name):
    function, most = STREAMED[name]
    for way in ways(name):
        totals = []
        for n in (2, 6):
            with host_syncs() as syncs:
                function(models(*way)[1], n)
            totals.append(syncs.total())
        assert totals[1] - totals[0] <= 4 * most, syncs


def test_every_public_function_is_here():
    named = {name.split(":")[0] for name in CASES} | NO_DEVICE.keys()
    assert named == {name for name in lnfree_interp.__all__ if not isinstance(getattr(lnfree_interp, name), type)}


@pytest.mark.parametrize("make", [induction_pairs, ioi_pairs])
def test_pairs_are_made_where_they_are_read_from(make):
    model = load_model("tiny-noLN", device="cpu")
    here, there = (make(m, 3) for m in (model, on_device(model)))
    for name in ("clean", "corrupted", "answers"):
        torch.testing.assert_close(getattr(here, name), getattr(there, name).cpu())


@pytest.mark.slow
def test_a_model_is_checked_where_it_is():
    check = check_model(on_device(load_model("tiny-noLN", device="cpu")), [[1, 2, 3, 4]])
    assert check.holds, check.failed
