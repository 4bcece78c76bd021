import json
import math

import numpy as np
import pytest
import torch
from conftest import NORMALIZATIONS, make_model, random_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from lnfree_interp import forward
from lnfree_interp.evaluate import (
    compare_models,
    evaluate_loss,
    generate_samples,
    hellaswag,
    hellaswag_items,
    loss_table,
)
from lnfree_interp.evaluate.__main__ import main
from lnfree_interp.evaluate.command import baselines
from lnfree_interp.statistics import mean_interval
from lnfree_interp.weights import read_weights


class Letters:
    """A tokenizer of one token per character."""

    eos_token_id = bos_token_id = pad_token_id = 0
    padding_side = "right"

    def __call__(self, text, **_):
        return {"input_ids": [1 + ord(c) % 60 for c in text]}

    def decode(self, ids):
        return "".join(chr(65 + i) for i in ids)

    def batch_decode(self, rows):
        return [self.decode(row) for row in rows]


def with_letters(kind, **fields):
    model = make_model(kind, **fields)
    model.tokenizer = Letters()
    return model


def uncovered(model):
    """The same model, but on TransformerLens' own forward: the fast one does not serve models with hooks."""
    model.hook_embed.add_hook(lambda x, hook: x, is_permanent=True)
    assert read_weights(model) is None
    return model


# ---------------------------------------------------------------------------------------------------------
# Loss


def test_loss_is_transformer_lens_own(any_model):
    tokens = random_tokens(any_model, batch=5, pos=8)
    result = evaluate_loss(any_model, tokens, per_pass=16)
    expected = any_model(tokens, return_type="loss", loss_per_token=True)
    torch.testing.assert_close(result.losses, expected.float())
    assert result.mean == pytest.approx(expected.mean().item(), abs=1e-6)
    flat = expected.flatten().numpy()
    for value, level in ((result.median, 0.5), (result.range95[1], 0.975), (result.range999[0], 0.0005)):
        assert value == pytest.approx(np.quantile(flat, level), abs=1e-5)
    order = expected.mean(1).argsort(descending=True)[:3]
    assert [w.index for w in result.worst] == order.tolist()
    assert result.table().worst_sequence[0] == order[0]


@settings(max_examples=6, deadline=None)
@given(kind=st.sampled_from(NORMALIZATIONS), per_pass=st.integers(1, 60), seed=st.integers(0, 3))
def test_streaming_changes_nothing(kind, per_pass, seed):
    model = make_model(kind, n_layers=1, seed=seed)
    tokens = random_tokens(model, batch=5, pos=6, seed=seed)
    whole = evaluate_loss(model, tokens)
    parts = evaluate_loss(model, iter([tokens[:1], tokens[1:]]), per_pass=per_pass)
    torch.testing.assert_close(parts.losses, whole.losses)
    assert [w.index for w in parts.worst] == [w.index for w in whole.worst]


def test_bootstrap_draws_sequences_not_tokens(random_model):
    # Tokens of a sequence that are all alike: the interval must not shrink with their number.
    model = random_model(None)
    tokens = random_tokens(model, batch=40, pos=2)
    few = evaluate_loss(model, tokens)
    spread = few.losses.mean(1).std().item() / math.sqrt(40)
    width = few.interval[1] - few.interval[0]
    assert width == pytest.approx(2 * 1.96 * spread, rel=0.15)

    repeated = few.losses.expand(-1, 500).double().mean(1)
    assert mean_interval(repeated.numpy()) == pytest.approx(few.interval, abs=1e-6)
    assert all(math.isnan(x) for x in evaluate_loss(model, tokens[:1]).interval)


@pytest.mark.parametrize("kind", [None, "LNPre"])
def test_the_place_where_the_residual_explodes_is_named(kind):
    model = with_letters(kind)
    tokens = random_tokens(model, batch=4, pos=12) % 50
    with torch.no_grad():
        model.embed.W_E[55] *= 500  # a token the model cannot bear
    tokens[2, 7] = 55
    worst = evaluate_loss(model, tokens, worst=4).worst
    found = {w.index: w for w in worst}
    assert (found[2].position, found[2].token, found[2].layer) == (7, chr(65 + 55), 0)
    assert found[2].ratio > 10
    assert found[2].text == model.tokenizer.decode(tokens[2].tolist())
    assert all(found[i].position is None for i in (0, 1, 3))


def test_losses_that_are_not_finite_are_the_worst():
    model = make_model(None)
    with torch.no_grad():
        model.embed.W_E[55] = torch.inf
    tokens = random_tokens(model, batch=3, pos=6) % 50
    tokens[1, 3] = 55
    result = evaluate_loss(model, tokens)
    assert result.worst[0].index == 1 and math.isinf(result.worst[0].loss)
    assert not math.isfinite(result.mean)


def test_loss_table_reads_like_the_papers(random_model):
    tokens = random_tokens(random_model(None), batch=30, pos=6)
    results = {
        name: evaluate_loss(random_model(kind, seed=i), tokens)
        for i, (name, kind) in enumerate([("original", "LNPre"), ("vanilla", "LNPre"), ("noLN", None)])
    }
    table = loss_table(results, baselines({"original": False, "vanilla": False, "noLN": True}))
    gap = results["noLN"].mean - results["vanilla"].mean
    assert table.baselines == (None, None, "vanilla")
    assert table.gap[2].item() == pytest.approx(gap)
    assert table.low[2] < gap < table.high[2]
    assert table.table().loss.tolist()[2] == f"{results['noLN'].mean:.4f} ({gap:+.4f})"
    with pytest.raises(ValueError, match="baseline 'x' of noLN"):
        loss_table(results, {"noLN": "x"})


# ---------------------------------------------------------------------------------------------------------
# Between models


def test_comparison_is_the_plain_one(random_model):
    models = {str(kind): random_model(kind, seed=i) for i, kind in enumerate((None, "LNPre", "RMS"))}
    tokens = random_tokens(models["None"], batch=4, pos=9)
    result = compare_models(models, tokens, n_bins=7, per_pass=18)
    p = torch.stack([m(tokens)[:, :-1].softmax(-1) for m in models.values()])
    for i in range(3):
        for j in range(3):
            mean = (p[i] + p[j]) / 2
            jsd = ((p[i] * (p[i] / mean).log()).sum(-1) + (p[j] * (p[j] / mean).log()).sum(-1)) / 2
            assert result.divergence[i, j].item() == pytest.approx(jsd.mean().item(), abs=1e-9)
            same = (p[i].argmax(-1) == p[j].argmax(-1)).double().mean()
            assert result.agreement[i, j] == same
            assert result.low[i, j] <= result.divergence[i, j] + 1e-12 <= result.high[i, j] + 2e-12
        assert result.entropy[i].item() == pytest.approx(-(p[i] * p[i].log()).sum(-1).mean().item())
        loss = -p[i].gather(-1, tokens[:, 1:, None]).log().mean()
        assert result.loss[i].item() == pytest.approx(loss.item())
        confidence, top = p[i].max(-1)
        right = (top == tokens[:, 1:]).double()
        error = 0.0
        for b in range(7):
            inside = (confidence >= b / 7) & (confidence < (b + 1) / 7)
            assert result.bin_count[i, b] == inside.sum()
            if inside.any():
                difference = (right[inside].mean() - confidence[inside].mean()).abs().item()
                error += inside.double().mean().item() * difference
        assert result.calibration_error[i].item() == pytest.approx(error)


@pytest.mark.parametrize("kind", [None, "LNPre"])
def test_a_model_that_predicts_its_own_draws_is_calibrated(kind):
    model = make_model(kind, n_layers=1, d_vocab=5, n_ctx=2)
    contexts = random_tokens(model, batch=5000, pos=1)
    drawn = torch.multinomial(model(contexts)[:, 0].softmax(-1), 1, generator=torch.Generator().manual_seed(0))
    result = compare_models({"model": model}, torch.cat([contexts, drawn], 1), draws=10)
    assert result.calibration_error[0] < 0.04
    shifted = compare_models({"model": model}, torch.cat([contexts, (drawn + 1) % 5], 1), draws=10)
    assert shifted.calibration_error[0] > 0.08


def test_comparison_refuses_models_that_do_not_compare(random_model):
    tokens = random_tokens(random_model(None))
    with pytest.raises(ValueError, match="different vocabularies"):
        compare_models({"a": random_model(None), "b": random_model(None, d_vocab=70)}, tokens)
    with pytest.raises(ValueError, match="no models"):
        compare_models({}, tokens)
    with pytest.raises(ValueError, match="n_bins is 0"):
        compare_models({"a": random_model(None)}, tokens, n_bins=0)


@pytest.mark.parametrize("kind", [None, "LNPre"])
def test_progress_is_told_in_sequences_and_items(kind):
    model = with_letters(kind, n_layers=1)
    tokens = random_tokens(model, batch=5, pos=6)
    told = []

    def progress(done, total):
        told.append((done, total))

    evaluate_loss(model, tokens, per_pass=12, draws=2, progress=progress)
    compare_models({"m": model}, tokens, per_pass=12, draws=2, progress=progress)
    assert told == 2 * [(2, 5), (4, 5), (5, 5)]
    told.clear()
    hellaswag(model, ITEMS, per_pass=1, progress=progress)
    assert told == [(1, 3), (2, 3), (3, 3)]


# ---------------------------------------------------------------------------------------------------------
# HellaSwag and samples


ITEMS = [
    {"ctx": "Water boils", "endings": ["in a pot.", "no", "quite so", "up"], "label": "0"},
    {"ctx": "Water falls", "endings": ["down there", "x", "away and away", "z."], "label": "2"},
    {"ctx": "A cat", "endings": ["sat", "on a mat.", "is", "was"], "label": 3},
]


def plain_scores(model, items):
    sums = []
    for item in items:
        row = []
        for ending in item["endings"]:
            context = model.tokenizer(item["ctx"])["input_ids"]
            ids = model.tokenizer(" " + ending)["input_ids"]
            context = context[-(model.cfg.n_ctx - max(len(e) + 1 for e in item["endings"])) :]
            log_p = model(torch.tensor([context + ids])).log_softmax(-1)[0]
            row.append(sum(log_p[len(context) - 1 + i, token].item() for i, token in enumerate(ids)))
        sums.append(row)
    return torch.tensor(sums, dtype=torch.float64)


@pytest.mark.parametrize("kind", NORMALIZATIONS)
@pytest.mark.parametrize("n_ctx", [32, 20])
def test_hellaswag_scores_are_those_of_whole_sequences(kind, n_ctx):
    model = with_letters(kind, n_ctx=n_ctx)
    expected = plain_scores(model, ITEMS)
    lengths = torch.tensor([[len(e) + 1 for e in item["endings"]] for item in ITEMS])
    labels = torch.tensor([0, 2, 3])
    for result in (hellaswag(model, ITEMS), hellaswag(uncovered(model), ITEMS, per_pass=1)):
        torch.testing.assert_close(result.log_probs, expected)
        assert result.lengths.tolist() == lengths.tolist()
        assert result.accuracy == (expected.argmax(1) == labels).double().mean()
        assert result.accuracy_normalised == ((expected / lengths).argmax(1) == labels).double().mean()


def test_hellaswag_names_what_is_wrong(tmp_path):
    model = with_letters(None)
    file = tmp_path / "items.jsonl"
    file.write_text("\n".join(json.dumps({**item, "ind": 3}) for item in ITEMS) + "\n")
    assert [item["label"] for item in hellaswag_items(file)] == [0, 2, 3]
    assert len(hellaswag_items(str(file), limit=2)) == 2
    for line, message in (
        ("{", "line 4: no JSON"),
        ('{"ctx": "a"}', "line 4: a HellaSwag item has ctx, endings and label; this one has ctx"),
        ('{"ctx": "a", "endings": ["b", "c"], "label": 2}', "line 4: label 2 is not one of 0..1"),
        ('{"ctx": "a", "endings": "bc", "label": 0}', "endings are 'bc'"),
    ):
        bad = tmp_path / "bad.jsonl"
        bad.write_text(file.read_text() + line + "\n")
        with pytest.raises(ValueError, match=message):
            hellaswag_items(bad)
    with pytest.raises(ValueError, match="cannot read"):
        hellaswag_items(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="41 tokens, the model's context holds 32"):
        hellaswag(model, [{"ctx": "a", "endings": ["b" * 40, "c"], "label": 0}])
    with pytest.raises(ValueError, match="has no tokenizer"):
        hellaswag(make_model(None), ITEMS)


def going_on(model, tokens, cut):
    """The end of prompts that begin by twos alike, from keys and values of two of the beginnings; and all of them."""
    keep, kept = {}, {}
    forward.run(model, tokens[[0, 2], :cut], keep=keep)
    past = forward.Past(cut, keep, torch.tensor([0, 0, 1, 1]))
    return forward.run(model, tokens[:, cut:], past=past, keep=kept), kept


@settings(max_examples=8, deadline=None)
@given(kind=st.sampled_from(NORMALIZATIONS), cut=st.integers(1, 8), attn_only=st.booleans(), seed=st.integers(0, 2))
def test_going_on_from_kept_keys_is_the_whole_pass(kind, cut, attn_only, seed):
    model = make_model(kind, attn_only=attn_only, seed=seed)
    tokens = random_tokens(model, batch=4, pos=9, seed=seed)
    tokens[:, :cut] = tokens[[0, 0, 2, 2], :cut]
    whole, rest, kept = forward.run(model, tokens), *going_on(model, tokens, cut)
    torch.testing.assert_close(rest, whole[:, cut:])
    assert kept[0][0].shape[:2] == (4, 9)
    expected = model.run_with_cache(tokens, names_filter=f"blocks.{model.cfg.n_layers - 1}.hook_resid_post")[1]
    torch.testing.assert_close(whole, next(iter(expected.values())))


@pytest.mark.parametrize("kind", [None, "LNPre"])
def test_greedy_samples_are_the_likeliest_tokens(kind):
    model = with_letters(kind)
    ids = torch.tensor([model.tokenizer("abc")["input_ids"]])
    for _ in range(6):
        ids = torch.cat([ids, model(ids)[:, -1].argmax(-1, keepdim=True)], 1)
    expected = model.tokenizer.decode(ids[0, 3:].tolist())
    for temperature, top_k in ((0.0, None), (1.0, 1)):
        samples = generate_samples({"m": model}, "abc", max_new_tokens=6, temperature=temperature, top_k=top_k)
        assert samples.texts == ((expected,),)
    slow = generate_samples({"m": uncovered(model)}, "abc", max_new_tokens=6, temperature=0.0)
    assert slow.texts == ((expected,),)


def test_samples_follow_the_models_distribution_and_the_seed():
    model = with_letters("LNPre", d_vocab=61, n_layers=1)
    drawn = generate_samples({"a": model, "b": model}, "abc", n_samples=4000, max_new_tokens=1, top_k=None)
    assert drawn.texts[0] == drawn.texts[1]  # the same noise for the same model
    other = generate_samples({"a": model}, "abc", n_samples=4000, max_new_tokens=1, top_k=None, seed=1)
    assert other.texts[0] != drawn.texts[0]
    p = model(torch.tensor([model.tokenizer("abc")["input_ids"]]))[0, -1].softmax(-1)
    counts = torch.zeros(61).double()
    for text in drawn.texts[0]:
        counts[ord(text) - 65] += 1
    sd = (p * (1 - p) * 4000).sqrt()
    assert ((counts - 4000 * p).abs() < 5 * sd + 1).all()


def test_samples_name_what_is_wrong():
    model = with_letters(None)
    for fields, message in (
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": "a" * 30}, "a prompt of 30 tokens and 5 new ones do not fit"),
        ({"prompt": "a", "temperature": -1.0}, "temperature is -1.0; temperature must be a number of at least 0"),
        ({"prompt": "a", "top_k": 0}, "top_k is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            generate_samples({"m": model}, **{"max_new_tokens": 5, **fields})


def test_command_refuses_bad_input_and_writes_nothing(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["--model", "no-such-model", "--out", str(out)]) == 2
    missing = tmp_path / "none.jsonl"
    assert main(["--hellaswag", str(missing), "--out", str(out)]) == 2
    assert main(["--text", str(tmp_path / "none.txt"), "--out", str(out)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 3 and not out.exists()
