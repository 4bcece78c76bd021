"""The hyperdimensional probe: the algebra's laws, what is read and held out, and where evidence comes from."""

import math
import random
import re

import numpy as np
import pytest
import torch
from conftest import make_model
from hypothesis import given, settings
from hypothesis import strategies as st

from lnfree_interp import (
    Codebook,
    HyperProbe,
    ProbeData,
    ProbePrompt,
    analogy_data,
    concept_evidence,
    direct_logit_attribution,
    evaluate_probe,
    fit_probe,
    load_model,
    logit_lens,
    recall_data,
    swap_concepts,
)
from lnfree_interp.probe import Training, hyperprobe
from lnfree_interp.probe.data import SPLITS, Splits, answer_tokens
from lnfree_interp.probe.evaluation import YARDSTICKS
from lnfree_interp.probe.evidence import evidence_of_data, pooled_error
from lnfree_interp.probe.fitting import targets
from lnfree_interp.probe.reading import named
from lnfree_interp.probe.streams import norm_at, observe, pool_weights
from lnfree_interp.probe.symbols import bind, bundle, expected_similarity, signs, similarity, unbind
from lnfree_interp.shares import share_interval
from lnfree_interp.weights import read_weights

KEYS = [f"key {i}" for i in range(3)]
VALUES = [f"value {i}" for i in range(10)]
SMALL = Training(hidden=24, epochs=3, batch=16)


def token_data(n=120, seed=0):
    """Prompts of token ids of a vocabulary of 61: filler, key, and last the value that is to be read."""
    rng, prompts = random.Random(seed), []
    for i in range(n):
        key, other = rng.sample(range(3), 2)
        value, before = rng.sample(range(10), 2)
        filler = [20 + i % 4] * (1 + i % 4) + [rng.randrange(30, 61) for _ in range(2)]
        pairs = ((KEYS[other], VALUES[before]), (KEYS[key], VALUES[value]))
        ids = (*filler, other, 3 + before, key, 3 + value)
        prompts.append(ProbePrompt(ids, pairs, 3 + value, f"filler {i % 4}"))
    return ProbeData(tuple(prompts))


DATA = token_data()


def probe_of(model, data=DATA, **more):
    return fit_probe(model, data, **{"dim": 64, "mastered": False, "training": SMALL} | more)


@pytest.fixture(scope="module")
def probes(random_model):
    """A probe of each model that is asked for, fitted once."""
    made = {}

    def factory(model, **more):
        key = id(model), str(sorted(more.items()))
        if key not in made:
            made[key] = model, probe_of(model, **more)
        return made[key][1]

    return factory


# ---------------------------------------------------------------------------------------------------------
# Symbols


@given(st.integers(2, 30), st.sampled_from([1, 7, 64, 1000]), st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_binding_is_its_own_inverse_and_like_neither(n, dim, seed):
    vectors = Codebook(tuple(f"c{i}" for i in range(n)), dim, seed).vectors
    assert vectors.shape == (n, dim) and set(vectors.unique().tolist()) <= {-1.0, 1.0}
    a, b = vectors[0], vectors[1]
    assert torch.equal(unbind(bind(a, b), a), b) and torch.equal(bind(a, b), bind(b, a))
    assert torch.equal(bind(a, a), torch.ones(dim))
    assert abs(float(similarity(bind(a, b), a)) - float(b.mean())) < 1e-5


def test_cosines_of_concepts_are_as_spread_as_theory_has_it():
    dim = 512
    cosines = similarity(*[Codebook(tuple(f"c{i}" for i in range(120)), dim).vectors] * 2)
    off = cosines[~torch.eye(120, dtype=torch.bool)]
    assert abs(off.mean()) < 0.004 and off.std() == pytest.approx(dim**-0.5, rel=0.05)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8])
def test_capacity_is_as_theory_has_it(n):
    dim, times = 1024, 120
    vectors = Codebook(tuple(f"c{i}" for i in range(n * times)), dim).vectors.view(times, n, dim)
    found = torch.stack([similarity(bundle(rows, seed), rows[0]) for seed, rows in enumerate(vectors)])
    mean = expected_similarity(n)
    spread = math.sqrt((1 - mean**2) / dim)
    assert found.mean().item() == pytest.approx(mean, abs=4 * spread / math.sqrt(times) + 1e-9)
    assert found.std().item() == pytest.approx(spread, rel=0.3, abs=1e-6)


def test_a_constant_output_is_like_nothing():
    """Were ties -1, it would have a cosine of 0.5 with bundles of two."""
    dim, times = 1024, 100
    vectors = Codebook(tuple(f"c{i}" for i in range(2 * times)), dim).vectors.view(times, 2, dim)
    constant = -torch.ones(dim)
    drawn = torch.stack([similarity(bundle(rows, seed), constant) for seed, rows in enumerate(vectors)])
    tied = torch.stack([similarity(torch.where(rows.sum(0) > 0, 1.0, -1.0), constant) for rows in vectors])
    assert abs(drawn.mean()) < 4 / math.sqrt(dim * times) and tied.mean() > 0.45


def test_unbinding_a_bundle_of_pairs_finds_the_other():
    book = Codebook(tuple(f"c{i}" for i in range(40)), 4096)
    pairs = bind(book.vectors[:5], book.vectors[5:10])
    near = similarity(unbind(bundle(pairs), book.vectors[2]), book.vectors)
    assert int(near.argmax()) == 7 and float(near[7]) == pytest.approx(expected_similarity(5), abs=0.07)


def test_vectors_follow_from_names_alone():
    names = ("a", "b", "c")
    book, other = Codebook(names, 65, 3), Codebook(("c", "x", "A "), 65, 3)
    assert torch.equal(book.vectors[2], other.vectors[0]) and torch.equal(book.vectors[0], other.vectors[2])
    assert not torch.equal(book.vectors, Codebook(names, 65, 4).vectors)
    assert book.number(" B ") == 1 and torch.equal(book.of(["b"]), book.vectors[1:2])


def test_signs_keep_all_but_zeros():
    x = torch.tensor([[0.5, -2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]] * 50)
    drawn = signs(x, 1)
    assert torch.equal(drawn, signs(x, 1)) and not torch.equal(drawn, signs(x, 2))
    assert (drawn[:, 0] == 1).all() and (drawn[:, 1] == -1).all() and abs(drawn[:, 2:].mean()) < 0.3


# ---------------------------------------------------------------------------------------------------------
# Data


def test_a_file_gives_the_same_prompts(tmp_path):
    data = ProbeData(
        (*DATA.prompts[:3], ProbePrompt("Denmark : krone = Mexico :", (("Mexico", "Peso"),), " peso", "x"))
    )
    data.save(tmp_path / "data.jsonl")
    assert ProbeData.from_file(tmp_path / "data.jsonl").prompts == data.prompts
    assert data.prompts[3].pairs == (("mexico", "peso"),) and [f.name for f in tmp_path.iterdir()] == ["data.jsonl"]


def test_what_is_held_out_was_never_trained_on():
    data = token_data(400)
    splits = Splits.of(data, 5)
    of = {name: [data.prompts[i] for i in splits.rows(data, name)] for name in ("train", "stop", *SPLITS)}
    assert all(of.values())
    answers, templates = ({getattr(p, what) for p in of["train"]} for what in ("value", "template"))
    assert not answers & {p.value for p in of["concepts"]} and not templates & {p.template for p in of["templates"]}
    assert {p.template for p in of["concepts"]} <= templates and {p.value for p in of["templates"]} <= answers
    assert not {p.prompt for p in of["train"]} & {p.prompt for name in ("stop", *SPLITS) for p in of[name]}
    stopped = {p.value for p in of["stop"]} - answers, {p.template for p in of["stop"]} - templates
    assert not stopped[0] & {p.value for p in of["concepts"]} and not stopped[1] & {p.template for p in of["templates"]}
    shuffled = ProbeData(tuple(random.Random(0).sample(data.prompts, len(data))))
    assert Splits.of(shuffled, 5) == splits and Splits.of(data, 6) != splits


def test_recall_is_what_the_prompt_says():
    data = recall_data(load_model("tiny-noLN", device="cpu"), 24, pairs=3, reads=3, seed=2)
    for prompt in data:
        (_, before), (key, value) = prompt.pairs
        words = re.findall(r"\w+", prompt.prompt)
        assert words[-1 - (prompt.template == "and")] == key and words.count(key) == 3 and words.count(value) == 2
        assert before in words and prompt.answer == f" {value}"
    assert len(data.templates) == 8


def test_analogies_are_told_apart_by_their_first_tokens():
    model = load_model("tiny-noLN", device="cpu")
    data = analogy_data(model, 500)
    tokens = answer_tokens(model, data)
    assert len(set(tokens.values())) == len(tokens) and len(data) == 500 and "begin with the token" in data.left_out
    for prompt in data:
        words = [name for pair in prompt.pairs for name in pair]
        assert all(word in prompt.prompt.lower() for word in words[:3])


# ---------------------------------------------------------------------------------------------------------
# What is read


def test_streams_are_the_caches_at_the_last_token(any_block):
    model = any_block
    prompts = [prompt.prompt for prompt in DATA.prompts[:6]]
    seen = observe(model, prompts, [0, 1, 2], [3, 5], normalised=False)
    names = ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre", "blocks.1.hook_resid_post"]
    for i, prompt in enumerate(prompts):
        logits, cache = model.run_with_cache(torch.tensor([prompt]), names_filter=names)
        for layer, name in enumerate(names):
            torch.testing.assert_close(seen.raw[layer, i], cache[name][0, -1])
        torch.testing.assert_close(seen.logits[i], logits[0, -1, [3, 5]])
    torch.testing.assert_close(seen.lens[2], seen.logits)
    read = observe(model, prompts, [1, 2], [3], normalised=True).streams
    for i, layer in enumerate((1, 2)):
        torch.testing.assert_close(read[i], norm_at(model, layer, True)(seen.raw[layer]))


def test_an_edit_is_a_hook(any_block):
    model, prompts = any_block, [prompt.prompt for prompt in DATA.prompts[:5]]
    changes = torch.randn(5, model.cfg.d_model, dtype=torch.float64)
    names = ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre", "blocks.1.hook_resid_post"]
    for layer, name in enumerate(names):
        seen = observe(model, prompts, [0, 1, 2], [3, 5], edit=(layer, lambda x, rows: x + changes[rows]))
        for i, prompt in enumerate(prompts):

            def hook(x, hook, i=i):
                x = x.clone()
                x[:, -1] += changes[i]
                return x

            logits = model.run_with_hooks(torch.tensor([prompt]), fwd_hooks=[(name, hook)])
            torch.testing.assert_close(seen.logits[i], logits[0, -1, [3, 5]])


@pytest.mark.parametrize("pooling", ["mean", "kmeans", "last"])
def test_pooling_weights_are_a_mean(pooling):
    x = torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = pool_weights(x, pooling, 3)
    torch.testing.assert_close(weights.sum(0), torch.ones(4, dtype=torch.float64))
    assert (weights >= 0).all() and weights.shape == (6, 4)


def test_clusters_count_the_same_however_many_layers_they_have():
    x = torch.tensor([0.0, 0.1, 0.2, 9.0]).view(4, 1, 1).double()
    weights = pool_weights(x, "kmeans", 2)
    assert weights[:, 0].tolist() == pytest.approx([1 / 6, 1 / 6, 1 / 6, 1 / 2])
    torch.testing.assert_close(pool_weights(x, "kmeans", 4), pool_weights(x, "mean", 4))


def test_targets_are_the_bundles_with_ties_open():
    book = Codebook(DATA.concepts, 500)
    goal = targets(book, DATA.prompts[:20])
    for row, prompt in zip(goal, DATA.prompts):
        pairs = torch.stack([bind(*book.of(pair)) for pair in prompt.pairs])
        tied = row == 0
        assert torch.equal(row[~tied], bundle(pairs)[~tied]) and 0.3 < tied.double().mean() < 0.7


def test_a_planted_answer_is_read_and_the_yardsticks_know_theirs():
    """The last token is the answer: it is in the stream."""
    model, data = make_model(None, n_layers=1, seed=3), token_data(500)
    probe = probe_of(model, data, dim=256, training=Training(hidden=96, epochs=40, batch=32, learning_rate=3e-3))
    found = evaluate_probe(model, probe, data)
    rate = {name: found.at_1[i, 0, 0].item() for i, name in enumerate(found.yardsticks)}
    assert found.splits[0] == "prompts" and found.chance == 0.1
    assert rate["linear probe"] > 0.9 and rate["nearest mean"] > 0.9 and rate["probe"] > 0.5
    assert rate["constant"] < 0.35 and rate["shuffled codebook"] < 0.35
    of_constant = found.yardsticks.index("constant")
    n = int(found.n[0, 0])
    assert abs(found.similarity[of_constant, 0, 0]) < 4 / math.sqrt(256)
    assert abs(found.bits[of_constant, 0, 0] - 0.5) < 4 / math.sqrt(256) and found.similarity[0, 0, 0] > 0.1
    assert n == len(probe.splits.rows(data, "prompts"))


def test_yardsticks_are_what_they_are_called(random_model, probes):
    for normalization in (None, "LN"):
        model = random_model(normalization)
        probe = probes(model, layers=[1, 2])
        found = evaluate_probe(model, probe, DATA)
        rows = probe.splits.rows(DATA, "prompts")
        answers = torch.tensor([3 + VALUES.index(name) for name in DATA.answers])
        truth = torch.tensor([DATA.answers.index(DATA.prompts[i].value) for i in rows])
        scores = {"model": [], "DLA": [], "logit lens": []}
        for i in rows:
            tokens = torch.tensor([DATA.prompts[i].prompt])
            many = tokens.expand(len(answers), -1)
            linear = direct_logit_attribution(model, many, answers)
            late = [j for j, label in enumerate(linear.labels) if label.startswith("L1")]
            scores["DLA"].append(linear.values[late, :, 0].sum(0))
            scores["logit lens"].append(logit_lens(model, many, answers).logit[1:, :, 0].mean(0))
            scores["model"].append(model(tokens)[0, -1, answers])
        for name, values in scores.items():
            hits = torch.stack(values).argmax(-1) == truth
            assert found.at_1[list(YARDSTICKS).index(name), 0, 0] == pytest.approx(hits.double().mean().item())
        of_model = found.at_1[list(YARDSTICKS).index("model")]
        assert set(of_model[:, 1][found.n[:, 1] > 0].tolist()) <= {1.0} and (of_model[:, 2].nan_to_num() == 0).all()
        assert (found.n[:, 0] == found.n[:, 1] + found.n[:, 2]).all()
        inside = ~found.at_1.isnan()
        assert (found.low <= found.at_1 + 1e-9)[inside].all() and (found.at_1 <= found.high + 1e-9)[inside].all()


def test_intervals_of_shares_cover():
    rng, covered = np.random.default_rng(0), 0
    for _ in range(400):
        p = np.clip(rng.normal(0.3, 0.15, size=12), 0, 1)  # answers differ
        counts = rng.integers(5, 20, size=12).astype(float)
        low, high = share_interval(rng.binomial(counts.astype(int), p).astype(float), counts)
        covered += low <= 0.3 <= high
    assert 0.88 < covered / 400 <= 0.99


# ---------------------------------------------------------------------------------------------------------
# Evidence


def linear_norms(model):
    return norm_at(model, 1, True).linear


@pytest.mark.parametrize("readout", ["linear", "encoder"])
@pytest.mark.parametrize("pooling", ["mean", "kmeans"])
def test_parts_add_up_to_the_readout(any_block, probes, readout, pooling):
    model = any_block
    probe = probes(model, layers=[0, 1, 2], pooling=pooling, clusters=2)
    for prompt in DATA.prompts[:2]:
        found = concept_evidence(model, probe, prompt.prompt, readout=readout, key=prompt.key, by="component")
        assert float(found.values.sum()) + found.bias == pytest.approx(found.total, abs=1e-10)
        same = torch.allclose(found.values, found.effect, atol=1e-10)
        assert same == linear_norms(model) and (found.error < 1e-10) == same
        pooled, _ = hyperprobe.pool(probe, hyperprobe.observed(probe, model, [prompt.prompt], [0]).streams)
        if readout == "linear":
            scores = hyperprobe.linear_logits(probe, pooled)[0]
        else:
            read = probe.codebook.of(probe.answers) * probe.codebook.of([prompt.key])
            scores = read.double() @ probe.encoder(pooled)[0] / 64
        assert found.total == pytest.approx(float((scores - scores.mean()).max()), abs=1e-10)


def test_the_effect_is_what_removal_does_by_hand(any_block, probes):
    """The MLP of layer 0 taken out of the streams, which are then read through the model's own norms."""
    model = any_block
    probe = probes(model, layers=[0, 1, 2])
    prompt = DATA.prompts[0]
    found = concept_evidence(model, probe, prompt.prompt, prompt.value, by="component")
    _, cache = model.run_with_cache(torch.tensor([prompt.prompt]), names_filter="blocks.0.hook_mlp_out")
    written = cache["blocks.0.hook_mlp_out"][:, -1]
    raw = hyperprobe.observed(probe, model, [prompt.prompt], [0]).raw
    without = raw - torch.stack([torch.zeros_like(written), written, written])

    def readout(raw):
        norms = [norm_at(model, layer, True) for layer in (0, 1, 2)]
        pooled, _ = hyperprobe.pool(probe, torch.stack([norm(x) for norm, x in zip(norms, raw)]))
        scores = hyperprobe.linear_logits(probe, pooled)[0]
        return (scores - scores.mean())[probe.answers.index(prompt.value)]

    row = found.labels.index("L0.mlp")
    assert float(found.effect[row].sum()) == pytest.approx(float(readout(raw) - readout(without)), abs=1e-9)


def test_heads_and_neurons_add_up_to_components(random_model, probes):
    model = random_model("LNPre")
    probe = probes(model, layers=[1, 2])
    prompt = DATA.prompts[3]
    whole, heads, neurons = (
        concept_evidence(model, probe, prompt.prompt, prompt.value, by=by) for by in ("component", "head", "neuron")
    )
    for layer in (0, 1):
        for name, found, pattern in ((f"L{layer}.attn", heads, "H"), (f"L{layer}.mlp", neurons, "N")):
            bias = f"L{layer}.b_O" if pattern == "H" else f"L{layer}.b_out"
            rows = [i for i, x in enumerate(found.labels) if x.startswith(f"L{layer}{pattern}") or x == bias]
            wanted = whole.values[whole.labels.index(name)]
            torch.testing.assert_close(found.values[rows].sum(0), wanted, atol=1e-10, rtol=1e-9)


# ---------------------------------------------------------------------------------------------------------
# Edits


def test_a_swap_at_the_end_is_the_unembedding_of_the_swapped_stream(random_model, probes):
    model = random_model("LN")
    probe = probes(model, layers=[1, 2])
    found = swap_concepts(model, probe, DATA, n=6)
    assert found.points == ("L1", "final") and (found.original != found.other).all()
    held = [i for i in probe.splits.rows(DATA, *SPLITS) if DATA.prompts[i].value in probe.answers]
    tokens = [3 + VALUES.index(name) for name in probe.answers]
    seen = hyperprobe.observed(probe, model, [DATA.prompts[i].prompt for i in held], tokens)
    truth = torch.tensor([probe.answers.index(DATA.prompts[i].value) for i in held])
    right = (seen.logits.argmax(-1) == truth).nonzero()[:, 0]
    used = (right if len(right) else torch.arange(len(held)))[:6]
    means = probe.tensors["raw_means"][-1]
    swapped = seen.final[used] + means[found.other] - means[found.original]
    logits = model.unembed(model.ln_final(swapped[:, None]))[:, 0, tokens]
    assert torch.equal(found.after[-1, 0, 0], logits.argmax(-1))
    assert torch.equal(found.original, truth[used])
    assert (found.together[:, :, 0] == 1).all() and ((found.moved + found.together) >= 0).all()


# ---------------------------------------------------------------------------------------------------------
# The same again


def test_a_seed_decides_everything(random_model):
    model = random_model(None)
    one, same, other = (probe_of(model, seed=seed) for seed in (1, 1, 2))
    for name, x in one.tensors.items():
        assert torch.equal(x, same.tensors[name])
    states = [probe.encoder.state_dict() for probe in (one, same, other)]
    assert all(torch.equal(x, states[1][name]) for name, x in states[0].items())
    assert any(not torch.equal(x, states[2][name]) for name, x in states[0].items())
    assert one.history == same.history and one.facts == same.facts


def test_the_order_of_prompts_decides_no_split_and_no_symbol(random_model):
    model, other = random_model(None), ProbeData(DATA.prompts[::-1])
    one, two = (probe_of(model, data) for data in (DATA, other))
    assert one.splits == two.splits and one.answers == two.answers and one.facts == two.facts
    torch.testing.assert_close(one.tensors["means"], two.tensors["means"])
    torch.testing.assert_close(one.tensors["tuned.weight"], two.tensors["tuned.weight"])


def test_what_is_saved_is_the_same_to_the_bit(random_model, probes, tmp_path):
    model = random_model("LNPre")
    probe = probes(model, pooling="kmeans", clusters=2)
    probe.save(tmp_path / "probe.safetensors")
    again = HyperProbe.load(tmp_path / "probe.safetensors")
    for name in ("codebook", "layers", "answers", "splits", "training", "facts", "history", "model", "pooling"):
        assert getattr(again, name) == getattr(probe, name)
    prompt = DATA.prompts[0]
    one, two = (x.read(model, prompt.prompt, keys=[prompt.key]) for x in (probe, again))
    assert torch.equal(one.similarity.nan_to_num(), two.similarity.nan_to_num())
    assert all(torch.equal(x, again.tensors[name]) for name, x in probe.tensors.items())
    assert [f.name for f in tmp_path.iterdir()] == ["probe.safetensors"]


def test_a_reading_is_the_output_unbound(random_model, probes):
    model = random_model(None)
    probe, prompt = probes(model), DATA.prompts[0]
    reading = probe.read(model, prompt.prompt, keys=[KEYS[1], prompt.key])
    pooled, _ = hyperprobe.pool(probe, hyperprobe.observed(probe, model, [prompt.prompt], [0]).streams)
    out = hyperprobe.output(probe, pooled)[0]
    vectors = probe.codebook.vectors
    wanted = similarity(out * vectors[probe.codebook.number(prompt.key)], vectors)
    own = probe.codebook.number(prompt.key)
    assert reading.similarity[1, 0, own].isnan() and reading.points == ("all", "L1", "final")
    torch.testing.assert_close(reading.similarity[1, 0].nan_to_num(), wanted.index_fill(0, torch.tensor(own), 0.0))
    assert reading.top(k=3)[0][0] == probe.codebook.concepts[int(wanted.index_fill(0, torch.tensor(own), -9).argmax())]


def test_keys_are_what_the_prompt_names():
    concepts = ("new york", "york", "denmark", "den")
    assert named("York, then Denmark: New York", concepts) == ["york", "denmark", "new york"]
    assert named("denmarks", concepts) == []


def test_a_model_reads_through_its_own_forward_the_same(random_model, probes):
    model = random_model("LNPre")
    probe, prompt = probes(model), DATA.prompts[0]
    fast = probe.read(model, prompt.prompt, keys=[prompt.key])
    model.add_hook("blocks.0.hook_mlp_out", lambda x, hook: x, is_permanent=False)
    try:
        assert read_weights(model) is None
        slow = probe.read(model, prompt.prompt, keys=[prompt.key])
        linear = concept_evidence(model, probe, prompt.prompt, by="component")
    finally:
        model.reset_hooks()
    assert torch.equal(fast.similarity.nan_to_num(), slow.similarity.nan_to_num())
    assert float(linear.values.sum()) + linear.bias == pytest.approx(linear.total, abs=1e-10)


# ---------------------------------------------------------------------------------------------------------
# What is wrong is one line


def prompt_of(value, answer=5, key="key 0"):
    return ProbePrompt((1, 2, 3), ((key, value),), answer)


MODEL = make_model(None)
TOO_FEW = ProbeData(tuple(prompt_of(f"v{i}", 10 + i) for i in range(2)))
TWICE = ProbeData((prompt_of("a", 4), prompt_of("a", 5), prompt_of("b", 6)))
HELD_OUT = next(seed for seed in range(99) if not Splits.of(TOO_FEW, seed).rows(TOO_FEW, "train"))
BAD = [
    (lambda probe: Codebook(("a",)), "two at least"),
    (lambda probe: Codebook(("a", "A", "b")), "given twice"),
    (lambda probe: Codebook(("a", "b")).number("c"), "none of the codebook's 2"),
    (lambda probe: ProbeData(()), "no prompts"),
    (lambda probe: probe_of(MODEL, ProbeData((prompt_of("a"), prompt_of("b")))), "does not tell them apart"),
    (lambda probe: probe_of(MODEL, TWICE), "different tokens"),
    (lambda probe: probe_of(MODEL, ProbeData((prompt_of("a"),))), "two answers at least"),
    (lambda probe: probe_of(MODEL, ProbeData((prompt_of("a", 99), prompt_of("b")))), "outside the model's vocabulary"),
    (lambda probe: probe_of(MODEL, pooling="kmeans"), "5 clusters of 2 layers"),
    (lambda probe: probe_of(MODEL, pooling="median"), "unknown pooling 'median'"),
    (lambda probe: probe_of(MODEL, layers=[7]), "layer 7 is out of range"),
    (lambda probe: probe_of(MODEL, codebook=Codebook(("a", "b"))), "none of the codebook's 2"),
    (lambda probe: probe_of(MODEL, TOO_FEW, seed=HELD_OUT), "to train on"),
    (lambda probe: probe.read(make_model(None, d_model=12, n_heads=1), (1, 2), keys=["key 0"]), "d_model 24"),
    (lambda probe: probe.read(MODEL, (1, 2)), "give keys"),
    (lambda probe: probe.read(MODEL, (1, 2), keys=["Mexico"]), "concept 'Mexico' is none"),
    (lambda probe: probe.read(MODEL, (1, 200), keys=["key 0"]), "token id 200 is outside"),
    (lambda probe: evaluate_probe(make_model(None, n_layers=3), probe, DATA), "this one has 3"),
    (lambda probe: evaluate_probe(MODEL, probe, TOO_FEW), "concept 'v0' is none"),
    (lambda probe: concept_evidence(MODEL, probe, (1, 2), "key 0"), "no answer that the probe was trained on"),
    (lambda probe: concept_evidence(MODEL, probe, (1, 2), readout="both"), "unknown readout 'both'"),
    (lambda probe: swap_concepts(MODEL, probe, DATA, layers=0), "layer 0 is none that the probe reads"),
    (lambda probe: swap_concepts(MODEL, probe, TOO_FEW), "no prompt with the answer 'value"),
    (lambda probe: swap_concepts(MODEL, probe, DATA, n=0), "n"),
    (lambda probe: concept_evidence(MODEL, probe, (1, 2), readout="encoder"), "give the key"),
    (lambda probe: concept_evidence(MODEL, probe, (1, 2), "value 0", by="layer"), "unknown by 'layer'"),
    (lambda probe: probe_of(MODEL, pooling="kmeans", clusters=0), "clusters"),
    (lambda probe: probe_of(MODEL, dim=0), "dim"),
    (lambda probe: probe.read(MODEL, (1, 2), keys="key 0"), "a list of concepts"),
    (lambda probe: HyperProbe.load("nothing.safetensors"), "cannot read probe nothing.safetensors"),
    (lambda probe: ProbeData.from_file("nothing.jsonl"), "nothing.jsonl"),
    (lambda probe: Training(dropout=1.0), "dropout"),
    (lambda probe: recall_data("tiny-noLN", 3, pairs=9), "lists of 9 pairs"),
    (lambda probe: analogy_data("tiny-noLN", 3, kinds=["colours"]), "unknown kind 'colours'"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[message for _, message in BAD])
def test_what_is_wrong_is_one_line(call, message, probes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    probe = probes(MODEL)
    with pytest.raises(ValueError) as raised:
        call(probe)
    assert message in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "line", ["{", "[1]", '{"prompt": "a"}', '{"prompt": "", "pairs": [["a", "b"]], "answer": "c"}']
)
def test_a_line_that_is_no_prompt_is_named(line, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "a", "pairs": [["a", "b"]], "answer": " b"}\n' + line)
    with pytest.raises(ValueError, match=r"line 2") as raised:
        ProbeData.from_file(path)
    assert "\n" not in str(raised.value)


def test_errors_of_several_prompts_are_pooled(random_model, probes):
    model = random_model("LN")
    probe = probes(model)
    rows = hyperprobe.held_out(probe, DATA)[:3]
    parts = evidence_of_data(model, probe, DATA, 3)
    assert [part.concept for part in parts] == [DATA.prompts[i].value for i in rows]
    error, low, high = pooled_error(parts)
    sums = [[x.sum(1) for x in (part.values, part.effect)] for part in parts]
    expected = sum((a - b).abs().sum() for a, b in sums) / sum(b.abs().sum() for _, b in sums)
    assert error == pytest.approx(float(expected)) and low <= error <= high
    assert math.isnan(pooled_error(parts[:1])[1]) and pooled_error(parts[:1])[0] == pytest.approx(parts[0].error)


def test_a_file_of_another_kind_is_no_probe(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="holds no probe"):
        HyperProbe.load(tmp_path / "x.safetensors")
