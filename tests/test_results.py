"""Results: what they say and show of themselves is what they hold."""

import copy
import html
import math
import pickle
import re
import sys
from html.parser import HTMLParser

import pytest
import torch
from conftest import make_model, random_tokens

import lnfree_interp
from lnfree_interp import (
    Reader,
    ablate_cumulatively,
    ablate_neurons,
    attention_patterns,
    attention_score_attribution,
    attention_sinks,
    attribution_error,
    attribution_to,
    check_model,
    compare_models,
    direct_logit_attribution,
    effect_on,
    evaluate_loss,
    generate_samples,
    hellaswag,
    load_model,
    logit_attributions,
    logit_lens,
    loss_table,
    residual_norms,
    token_losses,
)
from lnfree_interp.figures import html as pictures
from lnfree_interp.figures.style import log_axis, styled
from lnfree_interp.metrics import cross_entropy, entropy
from lnfree_interp.results import MOST_HTML, Prompts, Result

TEXT = "It was the best of times, it was the worst of times"
ITEM = {"ctx": "He opened the", "endings": ["door.", "sky.", "cat.", "sea."], "label": 0}

# Public classes that are no results, and why.
NO_RESULTS = {
    "AtPStar": "an estimate",
    "Gradient": "an estimate",
    "Integrated": "an estimate",
    "RelP": "an estimate",
    "SecondOrder": "an estimate",
    "Metric": "what is measured, not what was found",
    "Reader": "what reads, not what was read",
    "RemovalSchedule": "what is to be done",
    "Law": "a row of ModelCheck",
    "GraphNode": "a node of AttributionGraph",
    "PromptPairs": "what experiments are made on",
    "Codebook": "what a probe reads, not what was read",
    "HyperProbe": "what reads, not what was read",
    "ProbeData": "what a probe is fitted on",
    "ProbePrompt": "a row of ProbeData",
}
# Drawn elsewhere: tests/test_results_patching.py, tests/test_probe_results.py.
OTHERS = ("AttributionGraph", "EdgeEffect", "PatchingEffect", "PatchingError", "Screening", "Explanation", "Comparison")
OTHERS += ("ConceptEvidence", "ConceptSwap", "ProbeEvaluation", "ProbeReading")


class Hostile:
    """A tokenizer whose texts would break out of a page that does not escape them."""

    def decode(self, ids):
        return ["<script>alert('x')</script>", "\"&'>", "\n\x00\x1b", "", "‮ab", "</div></td>" * 9][ids[0] % 6]


class Balanced(HTMLParser):
    """Counts what is opened and closed, and collects tags and titles."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.titles = [], set(), []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.titles += [value for name, value in attrs if name == "title"]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in ("br", "img", "col"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def values_of(page):
    """Hover -> the number in it: "L0.mlp: 0.695 logits"."""
    found = (re.fullmatch(r"(.*): (\S+) [^:]*", title, re.S) for title in Balanced(page).titles)
    return [(match[1], float(match[2])) for match in found if match]


@pytest.fixture(scope="module")
def model():
    return load_model("tiny-noLN", device="cpu")


@pytest.fixture(scope="module")
def normed():
    return load_model("tiny", device="cpu")


def all_results(model, normed):
    tokens = torch.stack([model.to_tokens(TEXT)[0]] * 3)
    tokens[1:, 4] += torch.tensor([1, 2])
    linear, exact = logit_attributions(normed, tokens, by="head")
    losses = {"a": evaluate_loss(model, tokens), "b": evaluate_loss(normed, tokens)}
    both = {"a": model, "b": normed}
    return [
        linear,
        exact,
        direct_logit_attribution(model, TEXT, " the", versus=" a"),
        direct_logit_attribution(model, TEXT, by="neuron", positions=-2),
        attribution_to(model, TEXT, Reader.logits(" the"), by="source"),
        attribution_to(model, tokens, Reader.neuron(1)),
        effect_on(normed, TEXT, Reader.neuron(1, 3), by="head", top=2),
        attention_score_attribution(model, TEXT, 1, 0),
        attention_score_attribution(model, TEXT, 1, 0, by="head", top=2, queries=-1),
        attribution_error(linear, exact),
        ablate_neurons(normed, TEXT, neurons=[3, 5]),
        ablate_neurons(model, tokens),
        ablate_cumulatively(model, tokens, [3, 5]),
        residual_norms(model, tokens),
        residual_norms(model, tokens, per_position=True),
        attention_sinks(model, tokens),
        losses["a"],
        loss_table(losses, {"a": "b"}),
        compare_models(both, tokens),
        hellaswag(model, [ITEM]),
        generate_samples(both, "It was <b>", max_new_tokens=3),
        check_model(model),
        logit_lens(normed, tokens),
        logit_lens(model, TEXT, " the", versus=" a"),
        attention_patterns(model, tokens),
        attention_patterns(model, TEXT, layers=-1, heads=0),
        token_losses(model, tokens),
    ]


@pytest.fixture(scope="module")
def results(model, normed):
    return all_results(model, normed)


def test_every_public_result_is_a_result():
    classes = {name: getattr(lnfree_interp, name) for name in lnfree_interp.__all__}
    classes = {name: x for name, x in classes.items() if isinstance(x, type)}
    wrong = [name for name, x in classes.items() if not issubclass(x, Result) and name not in (*NO_RESULTS, *OTHERS)]
    assert wrong == []
    own = {name for name, x in classes.items() if issubclass(x, Result)} - set(OTHERS)
    assert len(own) >= 15


def test_the_results_here_are_of_every_class(results):
    tried = {type(x).__name__ for x in results}
    public = {name for name in lnfree_interp.__all__ if isinstance(getattr(lnfree_interp, name), type)}
    own = {name for name in public if issubclass(getattr(lnfree_interp, name), Result)}
    assert own - set(OTHERS) <= tried


def test_each_says_what_it_is_in_a_line_and_draws_itself(results):
    for result in results:
        line = repr(result)
        assert len(line) < 200 and "\n" not in line and type(result).__name__ in line
        page = result._repr_html_()
        assert len(page.encode()) < MOST_HTML and page == result._repr_html_()
        assert not {"script", "link", "iframe"} & Balanced(page).tags and "nan" not in result.summary()
        table = result.table()
        assert (len(table) and not table.isna().all().any()) or type(result).__name__ == "ResidualNorms"
        if type(result).__name__ != "Samples":
            figure = result.plot()
            assert len(figure.data) and figure.layout.width is None and figure.layout.title.text


def test_each_can_be_copied_and_pickled(results):
    for result in results:
        for other in (copy.copy(result), copy.deepcopy(result), pickle.loads(pickle.dumps(result))):
            assert repr(other) == repr(result) and other._repr_html_() == result._repr_html_()


def test_each_knows_its_prompts(results, model):
    for result in results:
        if prompts := getattr(result, "prompts", None):
            if not isinstance(prompts, Prompts):
                continue
            assert prompts.model in ("tiny-noLN", "tiny")
            for row, strings in zip(prompts.tokens.tolist(), prompts.strings):
                assert list(strings) == [model.tokenizer.decode([i]) for i in row]
            assert prompts[1:].strings == prompts.strings[1:]


def test_later_changes_of_the_tokens_are_not_the_results(model):
    tokens = model.to_tokens(TEXT)
    before = tokens.clone()
    result = token_losses(model, tokens)
    tokens += 1
    assert torch.equal(result.prompts.tokens, before)


def test_a_picture_holds_the_values(model):
    result = direct_logit_attribution(model, TEXT, " the", by="component")
    shown = dict(values_of(result._repr_html_()))
    wanted = dict(zip(result.labels, result.values.flatten().tolist()))
    wanted |= {"bias": result.bias.item(), "logit": (result.values.sum() + result.bias.sum()).item()}
    assert shown.keys() == wanted.keys()
    assert all(wanted[name] == pytest.approx(value, rel=1e-3, abs=1e-4) for name, value in shown.items())


def test_a_grid_holds_the_values(model):
    result = attention_patterns(model, TEXT, layers=-1, heads=0)
    shown = [value for _, value in values_of(result._repr_html_())]
    assert shown == pytest.approx(result.values.flatten().tolist(), abs=1e-4)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([0.753, -0.0001, 0.0], ["+0.75", "0.00", "0"]),
        ([12.34, -1.0, 0.04], ["+12.3", "-1.0", "0.0"]),
        ([456.7, 1.2], ["457", "1"]),
        ([0.0042, 0.00123], ["0.0042", "0.0012"]),
        ([1e-5, -3e-6], ["+1e-05", "-3e-06"]),
        ([2e6, -3.0, math.inf, math.nan], ["+2e+06", "-3", "+inf", ""]),
    ],
)
def test_numbers_in_cells_have_the_same_decimals(values, said):
    names = [str(i) for i in range(len(values))]
    grid = pictures.grid([values], ["row"], names, "logits")
    assert re.findall(r">([^<>]*)</td>", grid) == said
    assert grid.count("title='row, ") == len(values)  # the hover has all digits
    assert all(f": {value:.4g} logits'" in grid for value in values)


def test_a_text_holds_what_was_read_from_each_token(model):
    result = attribution_to(model, TEXT, Reader.logits(" the"), by="source")
    shown = [value for _, value in values_of(result.text())]
    assert shown == pytest.approx(result.values[0, :, 0, 0].sum(0).tolist(), rel=1e-3, abs=1e-3)
    assert len(shown) == len(result.prompts.strings[0])
    one = [value for _, value in values_of(result.text("logit", component=result.labels[-1]))]
    assert one == pytest.approx(result.values[0, -1, 0, 0].tolist(), rel=1e-3, abs=1e-3)


def test_a_text_colours_the_next_tokens_by_their_own_logits(model):
    result = direct_logit_attribution(model, TEXT)
    label = result.labels[-1]
    shown = [value for _, value in values_of(result.text(label))]
    assert shown[0] != shown[0]  # nothing predicts the first token
    assert shown[1:] == pytest.approx(result.values[-1, 0].tolist(), rel=1e-3, abs=1e-3)


def test_cells_sum_to_the_logits(model):
    tokens = torch.stack([model.to_tokens(TEXT)[0]] * 2)
    result = direct_logit_attribution(model, tokens, by="head", positions=[3, 1])
    cells = result.cells()
    sums = cells.groupby(["prompt", "position"]).value.sum()
    logits = model(tokens)
    for prompt, position in ((0, 3), (1, 1)):
        target = tokens[prompt, position + 1]
        wanted = logits[prompt, position, target].item()
        assert sums[prompt, position] == pytest.approx(wanted, abs=1e-3)
        row = cells[(cells.prompt == prompt) & (cells.position == position)].iloc[0]
        assert row.token == model.tokenizer.decode([tokens[prompt, position]])
        assert row.target == model.tokenizer.decode([target])


def test_a_waterfall_ends_at_the_logit(model):
    result = direct_logit_attribution(model, TEXT, " the", versus=" a", by="head")
    for top in (1, 5, 100):
        bars = result.plot(top=top).data[0]
        logits = model(result.prompts.tokens)[0, -1]
        wanted = logits[result.targets.item()] - logits[result.versus.item()]
        assert sum(bars.x) == pytest.approx(wanted.item(), abs=1e-3)
        assert bars.measure[-1] == "total" and "logits" in bars.hovertemplate
    assert result.what == "' the' - ' a'"


@pytest.mark.parametrize("arguments", [{"kind": "pie"}, {"prompt": 3}, {"position": 9}, {"kind": "heads"}])
def test_plots_of_what_is_not_there_are_refused(model, arguments):
    result = direct_logit_attribution(model, TEXT, " the")
    with pytest.raises(ValueError) as raised:
        result.plot(**arguments)
    assert "\n" not in str(raised.value)


def test_hostile_texts_stay_texts():
    tokens = torch.arange(48).view(2, 24)
    prompts = Prompts("<b>model</b>", tokens, Hostile())
    values = torch.randn(40, 1, 24)
    labels = tuple(f"L{i}.mlp" for i in range(40))
    result = lnfree_interp.LogitAttribution(
        values, labels, torch.zeros(1, 24), tuple(range(24)), tokens[:1], prompts=prompts[:1]
    )
    losses = lnfree_interp.TokenLosses(torch.rand(2, 23), torch.rand(2, 23), tokens[:, 1:], prompts)
    for page in (result._repr_html_(), result.text(), losses._repr_html_(), losses.text(prompt=-1)):
        parsed = Balanced(page)
        assert not {"script", "b"} & parsed.tags - {"b"} and "<script" not in page and "\x00" not in page
        assert len(parsed.titles) >= 24
    for figure in (result.plot(), losses.plot()):
        assert "<script" not in str(figure.layout.xaxis.ticktext)


def test_large_results_stay_small_on_a_page():
    labels = tuple(f"L{i}H{j}" for i in range(48) for j in range(25))
    for n, pos in ((1, 64), (1000, 2)):
        tokens = torch.arange(n * pos).view(n, pos)
        prompts = Prompts("m", tokens, Hostile())
        values, where = torch.randn(len(labels), n, pos), tuple(range(pos))
        found = lnfree_interp.LogitAttribution(values, labels, torch.zeros(n, pos), where, tokens, prompts=prompts)
        assert len(repr(found)) < 200 and len(found._repr_html_().encode()) < MOST_HTML
    readers = tuple(f"L3N{i}" for i in range(300))
    found = lnfree_interp.ReaderAttribution(
        torch.randn(300, 300, 1, 2), labels[:300], readers, torch.zeros(300, 1, 2), (0, 1), prompts=prompts[:1]
    )
    assert len(found._repr_html_().encode()) < MOST_HTML
    found = lnfree_interp.AttentionPatterns(labels[:70], torch.rand(70, 1, 300, 300), None)
    assert len(found._repr_html_().encode()) < MOST_HTML and "later heads" in found.picture()


def test_numbers_stand_where_there_is_no_tokenizer():
    model = make_model(None)
    tokens = random_tokens(model, batch=1)
    result = direct_logit_attribution(model, tokens)
    assert result.prompts.strings[0] == tuple(map(str, tokens[0].tolist()))
    assert result.what == "the next token" and str(tokens[0, 1].item()) in result._repr_html_()
    assert list(token_losses(model, tokens).table().token) == [str(i) for i in tokens[0, 1:].tolist()]


def test_plot_without_plotly_names_what_to_install(model, monkeypatch):
    result = direct_logit_attribution(model, TEXT, " the")
    for name in [name for name in sys.modules if re.match(r"plotly\b|lnfree_interp\.figures\.(dla|style)$", name)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.delattr(sys.modules["lnfree_interp.figures"], "dla", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'lnfree_interp\[plot\]'") as raised:
        result.plot()
    assert "\n" not in str(raised.value)
    assert "L0.mlp" in result._repr_html_()  # needs none


# ---------------------------------------------------------------------------------------------------------
# Pictures


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 0.3, -7.0, float("nan"), float("inf")])
def test_shades_end_where_the_scale_does(value):
    css = pictures.shade(value, 1.0)
    ends = {"background:#b2182b;color:#fff": value >= 1, "background:#2166ac;color:#fff": value <= -1}
    assert all((css == end) == there for end, there in ends.items())
    assert (css == "background:#ffffff") == (value == 0)


def test_bars_go_left_where_negative_and_fill_what_is_largest():
    page = pictures.bars(["a", "b"], [2.0, -1.0], "nats")
    assert "left:50.00%;width:50.00%" in page and "left:25.00%;width:25.00%" in page
    assert "left:0.00%;width:100.00%" in pictures.bars(["a"], [2.0], "nats")


@pytest.mark.parametrize(
    ("values", "first", "last"),
    [
        ((0.02, 70.0), "0.01", "100"),
        ((3.0, 512.0), "1", "1,000"),
        ((3.0, 40.0), "1", "500"),
        ((30.0, 46.0), "10", "500"),
    ],
)
def test_log_axes_have_ticks_that_can_be_read(values, first, last):
    axis = log_axis(values)
    assert axis["ticktext"][0] == first and axis["ticktext"][-1] == last
    for tick, text in zip(axis["tickvals"], axis["ticktext"]):
        assert float(text.replace(",", "")) == pytest.approx(tick)
    assert axis["tickvals"][0] <= min(values) and max(values) <= axis["tickvals"][-1]
    low, high = (10**end for end in axis.get("range", [math.log10(value) for value in values]))
    assert (
        low <= 1.001 * min(values)
        and 0.999 * max(values) <= high
        and sum(low <= tick <= high for tick in axis["tickvals"]) >= 2
    )


def test_long_titles_are_broken_not_cut():
    import plotly.graph_objects as go

    figure = styled(go.Figure(), title="word " * 60)
    lines = figure.layout.title.text.split("<br>")
    assert max(map(len, lines)) <= 88 and " ".join(lines).split() == ["word"] * 60


# ---------------------------------------------------------------------------------------------------------
# Views


def test_the_lens_is_the_models_own_readout_of_each_layer(any_block):
    model, tokens = any_block, random_tokens(any_block)
    if (getattr(model.cfg, "output_logits_soft_cap", -1) or -1) > 0:
        with pytest.raises(ValueError, match="caps its logits"):
            logit_lens(model, tokens)
        return
    lens = logit_lens(model, tokens, positions=[4, 0])
    names = ["blocks.0.hook_resid_pre", *(f"blocks.{i}.hook_resid_post" for i in range(model.cfg.n_layers))]
    logits, cache = model.run_with_cache(tokens, names_filter=names)
    targets = tokens[:, [5, 1]]
    for i, name in enumerate(names):
        norm = getattr(model, "ln_final", None)
        x = cache[name][:, [4, 0]]
        own = model.unembed(x if norm is None else norm(x))
        right = own.gather(-1, targets[..., None])
        torch.testing.assert_close(lens.logit[i], right[..., 0])
        assert torch.equal(lens.top[i], own.argmax(-1))
        torch.testing.assert_close(lens.top_prob[i], own.softmax(-1).amax(-1))
        assert torch.equal(lens.rank[i], (own > right).sum(-1))
    torch.testing.assert_close(lens.logit[-1], logits[:, [4, 0]].gather(-1, targets[..., None])[..., 0])
    torch.testing.assert_close(lens.frozen[-1], lens.logit[-1])
    linear = direct_logit_attribution(model, tokens, positions=[4, 0])
    for i in range(model.cfg.n_layers):
        of_layer = [linear.labels.index(f"L{i}.{part}") for part in ("attn", "mlp")]
        torch.testing.assert_close(lens.frozen[i + 1] - lens.frozen[i], linear.values[of_layer].sum(0))
    assert torch.equal(lens.logit, lens.frozen) == (model.cfg.normalization_type is None)


def test_patterns_are_the_caches(any_block):
    model, tokens = any_block, random_tokens(any_block)
    found = attention_patterns(model, tokens, layers=[-1, 0], heads=[2, 0])
    assert found.labels == ("L1H2", "L1H0", "L0H2", "L0H0")
    _, cache = model.run_with_cache(tokens)
    for i, (layer, head) in enumerate(((1, 2), (1, 0), (0, 2), (0, 0))):
        torch.testing.assert_close(found.values[i], cache[f"blocks.{layer}.attn.hook_pattern"][:, head])
    sums = found.table().groupby(["head", "prompt", "query"]).attention.sum()
    assert len(sums) == 4 * 3 * 7 and all(abs(sums - 1) < 1e-6)


def test_token_losses_are_the_metrics(any_block):
    model, tokens = any_block, random_tokens(any_block)
    found, logits = token_losses(model, tokens), model(tokens)
    torch.testing.assert_close(found.losses, cross_entropy(logits, tokens))
    torch.testing.assert_close(found.entropies, entropy(logits)[:, :-1])
    assert torch.equal(found.top, logits[:, :-1].argmax(-1))
    shown = [value for _, value in values_of(found.text(prompt=1))]
    assert shown[1:] == pytest.approx(found.losses[1].tolist(), rel=1e-3)


def test_a_small_picture_is_a_picture():
    import base64
    import zlib

    from lnfree_interp.figures.view_pictures import png

    values = torch.tensor([[0.0, 1.0], [0.5, float("nan")]])
    data = base64.b64decode(png(values).removeprefix("data:image/png;base64,"))
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    palette = data[data.index(b"PLTE") + 4 :][: 3 * 32]
    lines = zlib.decompress(data[data.index(b"IDAT") + 4 : data.index(b"IEND") - 8])
    colours = [palette[3 * i :][:3] for i in (lines[1], lines[2], lines[5])]
    assert colours == [bytes([255] * 3), bytes(pictures.POSITIVE), bytes([255] * 3)]
    assert len(lines) == 6 and lines[0] == lines[3] == 0 and 14 <= lines[4] <= 17


def test_a_text_cannot_be_drawn_without_prompts():
    losses = lnfree_interp.TokenLosses(torch.ones(1, 2), torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="no text"):
        losses.text()
    assert "1" in html.unescape(losses._repr_html_()) and list(losses.table().top) == ["0", "0"]
