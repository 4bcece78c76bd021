"""Results of patching, edges, graphs, explanations, comparisons: whose prompts they are of, what they say and draw."""

import copy
import pickle
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model
from test_patching import make_pairs

import lnfree_interp
from lnfree_interp import (
    Metric,
    PromptPairs,
    activation_patching,
    attribution_graph,
    attribution_patching,
    compare,
    direct_effect,
    direct_logit_attribution,
    edge_attribution,
    edge_patching,
    explain,
    induction_pairs,
    load_model,
    logit_diff,
    patching_error,
    screen,
    screen_edges,
)
from lnfree_interp.metrics import kl_from_clean
from lnfree_interp.pairs import PairedPrompts, as_pairs
from lnfree_interp.patching.shown import panel, unit_of
from lnfree_interp.results import Result

CLEAN = ["the girl said that", "the man said that", "the boy said that"]
CORRUPTED = ["the man said that", "the girl said that", "the girl said that"]
ANSWERS = [(" she", " he"), (" he", " she"), (" he", " she")]
TEXT, RIGHT, WRONG = "She put on her hat and he put on", " his", " her"


@pytest.fixture(scope="module")
def model():
    return load_model("tiny-noLN", device="cpu")


@pytest.fixture(scope="module")
def pairs(model):
    return PromptPairs.from_texts(model, CLEAN, CORRUPTED, ANSWERS)


@pytest.fixture(scope="module")
def results(model, pairs):
    """One of each kind."""
    exact = activation_patching(model, pairs)
    return {
        "resid_pre": exact,
        "heads": activation_patching(model, pairs, site="z"),
        "one by one": activation_patching(model, pairs, site="z", by_position=True),
        "neurons": attribution_patching(model, pairs, site="neurons", layers=[0, -1]),
        "second order": attribution_patching(model, pairs, method="second_order"),
        "error": patching_error(attribution_patching(model, pairs), exact, normalize=False, draws=20),
        "edges": edge_attribution(model, pairs),
        "some edges": edge_patching(model, pairs, edges=[("embed", "logits"), ("L0H1", "L1H0.k")]),
        "screening": screen(model, pairs, budget=1.0, normalize=False),
        "edges screened": screen_edges(model, pairs, budget=2.5, normalize=False),
        "graph": attribution_graph(model, TEXT, RIGHT, versus=WRONG, nodes="mlp"),
        "explanation": explain(model, TEXT, RIGHT, WRONG),
        "comparison": compare({"a": model, "b": model}, explain, TEXT, RIGHT, WRONG),
    }


class Tags(HTMLParser):
    """Every element that is opened, those that need no end aside, is closed in its turn."""

    def __init__(self, page):
        super().__init__()
        self.open, self.seen, self.titles = [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.titles += [value for name, value in attrs if name == "title"]
        if tag not in ("br", "col"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


KINDS = (
    *("resid_pre", "heads", "one by one", "neurons", "second order", "error", "edges", "some edges"),
    *("screening", "edges screened", "graph", "explanation", "comparison"),
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_result_says_what_it_is_and_draws_itself(results, kind):
    result = results[kind]
    assert isinstance(result, Result)
    said, page = repr(result), result._repr_html_()
    assert len(said) < 200 and "\n" not in said and said.startswith(f"<{type(result).__name__}")
    assert "tiny-noLN" in said or kind == "comparison"
    assert page == result._repr_html_() and len(page) < 200_000
    assert "script" not in (seen := Tags(page)).seen and "table" in seen.seen
    assert len(result.table()) > 0 and not result.table().isna().all().any()
    for other in (copy.deepcopy(result), pickle.loads(pickle.dumps(result))):
        assert repr(other) == said and other._repr_html_() == page


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "graph"])
def test_a_figure_follows_the_page(results, kind):
    figure = results[kind].plot()
    assert len(figure.data) > 0 and figure.layout.title.text
    named = results[kind].plot(title="Mine")
    assert named.layout.title.text == "Mine"
    for trace in figure.data:
        assert trace.hovertemplate and "<extra>" in trace.hovertemplate


def test_layers_begin_at_the_top(results):
    figure = results["heads"].plot()
    assert figure.layout.yaxis.autorange == "reversed" and figure.data[0].y[0] == 0
    rows = re.findall(r">(L\d+)</th>", results["heads"].picture())
    assert rows == sorted(rows) and rows[0] == "L0"


def test_values_in_the_picture_are_the_values(results):
    effect = results["heads"]
    titles = [title for title in Tags(effect.picture()).titles if ": " in title]
    means = effect.values.double().mean(0)
    assert len(titles) == means.numel()
    for (layer, head), title in zip(((i, j) for i in range(len(means)) for j in range(means.shape[1])), titles):
        assert title == f"L{layer}, {head}: {means[layer, head].item():.4g} logits"
    figure = effect.plot()
    torch.testing.assert_close(torch.tensor(figure.data[0].z), means.float())
    shown = panel(results["one by one"])
    assert shown.rows[:2] == ("L0H0", "L0H1") and shown.columns[2] == "2 (girl/man)"
    torch.testing.assert_close(shown.values, results["one by one"].values.double().mean(0).flatten(0, 1))


def test_prompts_are_the_pairs(model, pairs, results):
    for kind in ("resid_pre", "neurons", "edges", "some edges", "screening", "edges screened"):
        prompts = results[kind].prompts
        assert isinstance(prompts, PairedPrompts) and prompts.model == "tiny-noLN"
        assert torch.equal(prompts.tokens, pairs.clean) and torch.equal(prompts.corrupted.tokens, pairs.corrupted)
        assert prompts.answer_strings == tuple(ANSWERS)
    wanted = tuple(tuple(model.tokenizer.decode([i]) for i in row) for row in pairs.clean.tolist())
    assert results["resid_pre"].prompts.strings == wanted
    assert results["graph"].prompts.strings[0] == results["graph"].strings


def test_slices_keep_prompts_aligned(pairs, results):
    mask = torch.tensor([True, False, True])
    for kind in ("resid_pre", "second order", "edges"):
        for rows in (slice(1, None), mask, torch.tensor([2, 0])):
            some = results[kind][rows]
            assert torch.equal(some.prompts.tokens, pairs.clean[rows])
            assert torch.equal(some.prompts.corrupted.tokens, pairs.corrupted[rows])
            assert torch.equal(some.prompts.answers, pairs.answers[rows])
            assert len(some.values) == len(some.prompts.tokens)
        none = results[kind][:0]
        assert "0 prompts" in repr(none)


def test_a_thousand_prompts(model):
    pairs = induction_pairs(model, 1000, length=8)
    effect = attribution_patching(model, pairs)
    assert len(repr(effect)) < 200 and len(effect._repr_html_()) < 200_000
    assert len(repr(pairs)) < 200 and len(pairs._repr_html_()) < 200_000
    assert "strings" not in vars(effect.prompts)  # nothing is decoded for that


def test_texts_are_escaped(model):
    angry = PromptPairs.from_texts(model, "<b>&'\" the girl", "<b>&'\" the man", ("<", ">"))
    for shown in (angry, activation_patching(model, angry), explain(model, "<b>&'\" <script>the", "<")):
        page = shown._repr_html_()
        assert "<b>&" not in page and "<script" not in page
        Tags(page)


def test_results_made_by_hand_need_no_prompts(results):
    for kind in ("resid_pre", "one by one", "edges"):
        alone = replace(results[kind], prompts=None)
        assert "tiny" not in repr(alone)
        assert alone.plot() is not None and Tags(alone._repr_html_())
    assert panel(replace(results["resid_pre"], prompts=None)).columns == ("0", "1", "2", "3", "4")


def test_without_a_tokenizer_numbers_are_shown(random_model):
    model = random_model("LNPre")
    effect = activation_patching(model, make_pairs(model))
    assert effect.prompts.strings[0][0] == str(int(effect.prompts.tokens[0, 0]))
    Tags(effect._repr_html_())
    found = explain(model, make_pairs(model).clean[:1])
    assert found.what == repr(str(found.target)) and Tags(found._repr_html_())


def test_cells_that_were_not_asked_for(model, pairs):
    only = torch.zeros(activation_patching(model, pairs).values.shape, dtype=torch.bool)
    assert "none" not in repr(activation_patching(model, pairs, only=only | True))
    only[:, 1, 2] = True
    effect = activation_patching(model, pairs, only=only)
    assert "L1, position 2" in repr(effect) and Tags(effect._repr_html_()) and effect.plot()


def test_units():
    assert (unit_of("logit_diff"), unit_of("kl_from_clean"), unit_of("mine")) == ("logits", "nats", "mine")


def test_what_is_left_out_is_said(results):
    shown = panel(results["neurons"])
    page = results["neurons"].picture()
    assert f"the 15 largest of {shown.values.numel()} neurons" in page
    small = panel(results["one by one"]).largest(3, 2)
    assert small.values.shape == (3, 2) and "of smaller effects are left out" in small.left_out
    assert panel(results["heads"]).largest(99, 99).left_out == ""


def test_without_plotly(results, monkeypatch):
    for name in [name for name in sys.modules if name.startswith(("plotly", "lnfree_interp.figures"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "plotly", None)
    for kind in KINDS:
        assert results[kind]._repr_html_()
        if kind != "graph":
            with pytest.raises(ImportError, match=r"pip install 'lnfree_interp\[plot\]'"):
                results[kind].plot()
    assert "<!DOCTYPE html>" in results["graph"].plot()


def test_a_graph_shows_its_page(results, tmp_path):
    page = results["graph"].plot(tmp_path / "graph.html")
    assert isinstance(page, str) and (tmp_path / "graph.html").read_text(encoding="utf-8") == page
    frame = Tags(page._repr_html_())
    assert frame.seen == ["iframe"]


# ---------------------------------------------------------------------------------------------------------
# Pairs of texts


def test_pairs_of_texts(model, pairs):
    assert pairs.table().values.tolist() == [[a, b, *c] for a, b, c in zip(CLEAN, CORRUPTED, ANSWERS)]
    one = PromptPairs.from_texts("tiny-noLN", CLEAN[0], CORRUPTED[0], ANSWERS[0])
    assert len(one) == 1 and torch.equal(one.clean, pairs.clean[:1]) and torch.equal(one.answers, pairs.answers[:1])
    shared = PromptPairs.from_texts(model, CLEAN[1:], CORRUPTED[1:], ANSWERS[1])
    assert torch.equal(shared.answers, pairs.answers[1:])
    assert "the[ girl/ man] said that\", right ' she', wrong ' he'" in repr(pairs)
    assert "the[ man/ girl]" in repr(pairs.reversed()) and "the[ man/ girl]" in repr(pairs[1])
    page = pairs._repr_html_()
    assert Tags(page) and page.count("<tr>") == 4
    assert "and 8 more" in induction_pairs(model, 20)._repr_html_()
    plain = PromptPairs(pairs.clean, pairs.corrupted, pairs.answers)
    assert str(int(pairs.clean[0, 2])) in repr(plain) and Tags(plain._repr_html_())


def test_functions_read_pairs_of_texts(model, pairs):
    given = (CLEAN, CORRUPTED, ANSWERS)
    for function in (activation_patching, attribution_patching, edge_attribution):
        assert torch.equal(function("tiny-noLN", given).values, function(model, pairs).values)
    assert torch.equal(
        screen(model, given, budget=2, normalize=False).effect.clean,
        screen(model, pairs, budget=2, normalize=False).effect.clean,
    )


@pytest.mark.parametrize(
    "clean, corrupted, answers, message",
    [
        (CLEAN, CORRUPTED[:2], ANSWERS, "clean has 3 prompts, corrupted has 2"),
        (CLEAN, CORRUPTED, ANSWERS[:2], "there are 3 pairs of prompts and 2 of answers"),
        (CLEAN, CORRUPTED, " she", r"answers must be \(right, wrong\)"),
        (CLEAN, CORRUPTED, None, r"answers must be \(right, wrong\)"),
        (CLEAN, CORRUPTED, [(" she",)] * 3, r"answers must be \(right, wrong\)"),
        (5, CORRUPTED, ANSWERS, "clean must be a text or a list of texts, not int"),
        (CLEAN, [1, 2, 3], ANSWERS, "corrupted must be a text or a list of texts, not list"),
        ([], [], [], "there are no pairs"),
        ("the girl", "the girl", (" she", " he"), "pair 0: clean equals corrupted"),
        ("the girl", "the man", (" she and", " he"), r"pair 0: answer ' she and' is 2 tokens \[' she', ' and'\]"),
        (["the girl", "the girl said"], ["the man", "the man said"], ANSWERS[0], "of several lengths, 3 tokens"),
    ],
)
def test_bad_texts(model, clean, corrupted, answers, message, monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message) as caught:
        PromptPairs.from_texts(model, clean, corrupted, answers)
    assert "\n" not in str(caught.value)


def test_metrics_by_name(model, pairs):
    for name, metric in (("logit_diff", logit_diff), ("kl_from_clean", kl_from_clean(model, pairs))):
        by_name = activation_patching(model, pairs, metric=name)
        assert by_name.metric == name and torch.equal(
            by_name.values, activation_patching(model, pairs, metric=metric).values
        )
        assert f"in {unit_of(name)}" in repr(by_name)
    with pytest.raises(ValueError, match="unknown metric 'loss'; allowed are logit_diff, right_log_prob"):
        activation_patching(model, pairs, metric="loss")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("mine", 3), "metric mine: its function must be one of logits, not 3"),
        (("mine", len, (-1,), "answer"), "metric mine: tokens must be 'answers', token ids or None, not 'answer'"),
        (("mine", len, (-1,), 1.5), "tokens must be a tensor of token ids"),
        (("mine", len, (1.5,)), "a position must be a whole number, not float"),
    ],
)
def test_what_is_no_metric(arguments, message, monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message):
        Metric(*arguments)


def test_pairs_of_another_tokenizer(model, pairs):
    other = SimpleNamespace(cfg=None, hook_dict={}, tokenizer=copy.deepcopy(model.tokenizer))
    assert as_pairs(pairs, other) is pairs  # another, which says the same
    other.tokenizer = SimpleNamespace(decode=lambda ids: "something else")
    with pytest.raises(ValueError, match=r"the pairs were read with another tokenizer: .* is 'something else'"):
        as_pairs(pairs, other)


# ---------------------------------------------------------------------------------------------------------
# explain


@pytest.mark.parametrize("name", ["tiny", "tiny-noLN"])
def test_an_explanation_is_attribution_and_effect(name):
    model = load_model(name, device="cpu")
    found = explain(name, TEXT, RIGHT, WRONG)
    for by, attribution, effect in (
        ("component", found.attribution, found.effect),
        ("head", found.head_attribution, found.head_effect),
    ):
        asked = {"targets": RIGHT, "versus": WRONG, "by": by}
        torch.testing.assert_close(attribution.values, direct_logit_attribution(model, TEXT, **asked).values)
        torch.testing.assert_close(effect.values, direct_effect(model, TEXT, **asked).values)
    logits = model(model.to_tokens(TEXT))[0, -1]
    right, wrong = (model.to_single_token(text) for text in (RIGHT, WRONG))
    assert abs(found.logit - float(logits[right] - logits[wrong])) < 1e-3
    bias = float(found.attribution.bias)
    assert abs(float(found.attribution.values.sum()) + bias - found.logit) < 1e-3
    assert abs(float(found.by_token.sum()) + bias - found.logit) < 1e-3
    assert (found.error < 1e-4) == (name == "tiny-noLN")
    p = logits.softmax(-1)
    assert abs(found.probabilities[0] - float(p[right])) < 1e-5
    assert [token for token, _ in found.predictions] == p.topk(5).indices.tolist()


def test_the_most_likely_token_is_explained(model):
    found = explain(model, TEXT)
    assert found.target == int(model(model.to_tokens(TEXT))[0, -1].argmax()) and found.versus is None
    ids = model.to_tokens(TEXT)
    for prompt in (ids, ids[0], ids.tolist(), ids[0].tolist(), [TEXT]):
        assert explain(model, prompt).logit == pytest.approx(found.logit)


@pytest.mark.parametrize("kind", ["GPT-2", "Pythia", "Llama", "Qwen", "Gemma"])
@pytest.mark.parametrize("normalised", [True, False])
def test_any_kind_of_model_is_explained(model_of, kind, normalised):
    model = model_of(kind, normalised, output_logits_soft_cap=-1.0)
    tokens = torch.randint(61, (1, 6), generator=torch.Generator().manual_seed(1))
    found = explain(model, tokens, 3, 7)
    logits = model(tokens)[0, -1]
    assert abs(found.logit - float(logits[3] - logits[7])) < 1e-5
    total = found.attribution.values.sum() + found.attribution.bias.sum()
    assert abs(float(total) - found.logit) < 1e-5
    assert (found.by_token is None) == (found.head_effect is None)
    assert len(repr(found)) < 200 and Tags(found._repr_html_()) and found.plot().data
    if found.by_token is not None:
        assert abs(float(found.by_token.sum()) - float(found.attribution.values.sum())) < 1e-6


def test_capped_logits_are_no_sum(model_of):
    with pytest.raises(ValueError, match="this model caps its logits with tanh"):
        explain(model_of("Gemma"), torch.tensor([[1, 2, 3]]), 3)


@pytest.mark.parametrize(
    "prompt, target, versus, message",
    [
        ([TEXT, TEXT], None, None, "an explanation is of one prompt, not of 2"),
        (TEXT, " her hat", None, r"target ' her hat' is 2 tokens \[' her', ' hat'\]"),
        (TEXT, RIGHT, RIGHT, "there is no difference to explain"),
        (TEXT, [RIGHT, WRONG], None, r"target has shape \[2\]"),
        (TEXT, 10**6, None, "outside the model's vocabulary"),
        (TEXT, 1.5, None, "target must be a tensor of token ids"),
        (5, None, None, "tokens have shape"),
        (None, None, None, "tokens must be a tensor of token ids"),
    ],
)
def test_bad_explanations(model, prompt, target, versus, message, monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message) as caught:
        explain(model, prompt, target, versus)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------
# compare


def test_a_comparison_is_each_models_own(model, pairs):
    other = load_model("tiny", device="cpu")
    found = compare([model, other], activation_patching, (CLEAN, CORRUPTED, ANSWERS), site="z")
    assert list(found) == ["tiny-noLN", "tiny"] and len(found) == 2
    assert torch.equal(found["tiny"].values, activation_patching(other, pairs, site="z").values)
    table = found.table()
    assert table.columns[0] == "model" and len(table) == 2 * found["tiny"].values.numel()
    figure = found.plot()
    assert [trace.hovertemplate.split("<extra>")[1] for trace in figure.data] == [
        "tiny-noLN: activation</extra>",
        "tiny: activation</extra>",
    ]
    with pytest.raises(KeyError, match="there is no model 'big'; there are tiny-noLN, tiny"):
        found["big"]


MEASURES = {
    "direct_logit_attribution": ((TEXT, RIGHT), {"by": "head"}),
    "edge_attribution": (((CLEAN, CORRUPTED, ANSWERS),), {}),
    "screen": (((CLEAN, CORRUPTED, ANSWERS),), {"budget": 2, "normalize": False}),
    "attribution_graph": ((TEXT, RIGHT), {"nodes": "mlp"}),
    "residual_norms": ((TEXT,), {}),
    "attention_sinks": ((TEXT,), {}),
    "evaluate_loss": ((TEXT,), {}),
    "ablate_neurons": ((TEXT,), {"neurons": [1, 2]}),
    "explain": ((TEXT, RIGHT), {}),
}


@pytest.mark.parametrize("measure", MEASURES)
def test_measures_that_are_compared(model, measure):
    arguments, options = MEASURES[measure]
    found = compare({"a": model, "b": model}, measure, *arguments, **options)
    assert found.measure == measure and set(found.table()["model"]) == {"a", "b"}
    drawn = found.plot()
    assert isinstance(drawn, str) or len(drawn.data) > 0


def test_a_comparison_of_tables(model):
    found = compare({"a": model, "b": model}, "rank_confidence_neurons")
    assert found.table().columns[0] == "model" and Tags(found._repr_html_())
    with pytest.raises(ValueError, match="DataFrame has no figure of several models"):
        found.plot()


def test_models_that_are_not_alike_are_drawn_one_by_one():
    models = {str(n): make_model(None, n_layers=n) for n in (1, 2)}
    found = compare(models, activation_patching, make_pairs(models["1"]))
    with pytest.raises(ValueError, match="effects in 2 have layers"):
        found.plot()
    assert Tags(found._repr_html_()) and len(found.table()) > 0


@pytest.mark.parametrize(
    "models, measure, message",
    [
        ([], explain, "there are no models to compare"),
        (5, explain, "models must be a list of names or models, or a mapping, not int"),
        (["tiny-noLN", "tiny-noLN"], explain, "two models are called 'tiny-noLN'"),
        (["tiny-noLN"], "no such", "measure must be a function of a model, or the name of a public one, not 'no such'"),
        (["tiny-noLN"], 3, "measure must be a function of a model"),
        (["tiny-noLN"], lambda model, *rest: 3, "returned a int, a comparison is of results that have a table"),
        (["no such model"], explain, "no such model"),
    ],
)
def test_bad_comparisons(models, measure, message, monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message) as caught:
        compare(models, measure, TEXT)
    assert "\n" not in str(caught.value)


def test_public_names_are_functions():
    assert callable(lnfree_interp.explain) and callable(lnfree_interp.compare)


def test_a_title_is_told_whole():
    figure = explain("tiny-noLN", "She put on", " her", versus=" his").plot()
    assert figure.layout.title.text == "' her' - ' his' in tiny-noLN: where it comes from"
