"""The page of an attribution graph: what it holds, that no text breaks it, that it needs no network, that it works."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lnfree_interp import AttributionGraph, GraphNode
from lnfree_interp.figures import graph as figures

ANGRY = '</script><script>document.title = "broken"</script><!-- graphs --><img src=x> & "\u2028'
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def made(model="tiny-noLN", prompt="the girl said", strings=("<|endoftext|>", " girl", " said"), discrepancy=0.0):
    """A graph by hand: two heads, a neuron, the rest, the difference of two logits."""
    nodes = [GraphNode("token", -1, pos, 7 + pos, f"{text!r} @{pos}") for pos, text in enumerate(strings)]
    nodes += [
        GraphNode("head", 0, 2, 1, "L0H1 @2"),
        GraphNode("neuron", 0, 2, 33, "L0N33 @2"),
        GraphNode("head", 1, 2, 0, "L1H0 @2"),
        GraphNode("bias", -1, -1, None, "bias"),
        GraphNode("error", -1, -1, None, "left out"),
        GraphNode("logit", 2, 2, 5, "logit ' she' - ' he'"),
    ]
    at = {node.label: i for i, node in enumerate(nodes)}
    first, girl, said = (node.label for node in nodes[:3])
    entries = {
        ("L0H1 @2", girl): 2.0,
        ("L0H1 @2", first): -0.5,
        ("L0N33 @2", "L0H1 @2"): 1.0,
        ("L0N33 @2", said): -3.0,
        ("L1H0 @2", girl): 1e-7,
        ("L1H0 @2", "left out"): 0.25,
        ("logit ' she' - ' he'", "L0N33 @2"): -2.0,
        ("logit ' she' - ' he'", "L0H1 @2"): 1.0 / 3.0,
        ("logit ' she' - ' he'", "L1H0 @2"): 0.1,
        ("logit ' she' - ' he'", "bias"): 0.2,
    }
    adjacency = torch.zeros(len(nodes), len(nodes))
    for (receiver, sender), entry in entries.items():
        adjacency[at[receiver], at[sender]] = entry
    shares = adjacency.abs() / adjacency.abs().sum(1, keepdim=True).clamp_min(1e-9)
    influence = torch.linalg.inv(torch.eye(len(nodes)) - shares)[-1]
    return AttributionGraph(
        prompt=prompt,
        tokens=tuple(range(len(strings))),
        strings=tuple(strings),
        nodes=tuple(nodes),
        adjacency=adjacency,
        inputs=adjacency.sum(1),
        activations=torch.arange(len(nodes)) / 4,
        influence=influence,
        effects=influence * torch.tensor([1.0, -1.0]).repeat(len(nodes))[: len(nodes)],
        discrepancy=discrepancy,
        kept=0.83,
        model=model,
        n_layers=2,
        target=5,
        versus=6,
    )


class Elements(HTMLParser):
    """The elements of a page, and the text of those that hold data or script."""

    def __init__(self, page):
        super().__init__()
        self.found, self.texts, self.open = [], [], None
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        self.open = tag
        if tag in ("script", "title"):
            self.texts.append((tag, dict(attributes).get("type"), ""))

    def handle_data(self, text):
        if self.open in ("script", "title") and self.texts:
            tag, kind, before = self.texts[-1]
            self.texts[-1] = tag, kind, before + text

    def handle_endtag(self, tag):
        self.open = None


def data_of(page):
    (text,) = (text for _, kind, text in Elements(page).texts if kind == "application/json")
    return json.loads(text)


def test_every_node_and_edge_is_there_once():
    graph = made()
    (data,) = data_of(figures.graph_page(graph))
    assert [(n["kind"], n["layer"], n["pos"], n["unit"], n["label"]) for n in data["nodes"]] == [
        (n.kind, n.layer, n.pos, n.unit, n.label) for n in graph.nodes
    ]
    for name, values in (
        ("input", graph.inputs),
        ("activation", graph.activations),
        ("influence", graph.influence),
        ("effect", graph.effects),
    ):
        torch.testing.assert_close(torch.tensor([n[name] for n in data["nodes"]]), values, rtol=1e-5, atol=0)
    assert len({(s, r) for s, r, _ in data["edges"]}) == len(data["edges"]) == 10
    again = torch.zeros_like(graph.adjacency)
    for sender, receiver, entry in data["edges"]:
        again[receiver, sender] = entry
    torch.testing.assert_close(again, graph.adjacency, rtol=1e-5, atol=0)
    assert data["tokens"] == ["BOS", " girl", " said"]
    assert (data["model"], data["prompt"], data["kept"]) == ("tiny-noLN", "the girl said", 0.83)


def test_several_graphs_in_one_page():
    data = data_of(figures.graph_page([made("tiny", discrepancy=0.125), made(prompt=None)]))
    assert [(g["model"], g["prompt"], g["discrepancy"]) for g in data] == [
        ("tiny", "the girl said", 0.125),
        ("tiny-noLN", None, 0.0),
    ]


def test_no_text_breaks_the_page():
    graph = made(f"model {ANGRY}", ANGRY, ("<b>", ANGRY, "\n"))
    page, plain = figures.graph_page([graph, made()]), Elements(figures.graph_page([made(), made()]))
    elements = Elements(page)
    assert [tag for tag, _ in elements.found] == [tag for tag, _ in plain.found]
    assert data_of(page)[0]["prompt"] == ANGRY and data_of(page)[0]["tokens"][1] == ANGRY
    title = next(text for tag, _, text in elements.texts if tag == "title")
    assert title.endswith(f"model {ANGRY}, tiny-noLN")
    # What runs is the same, whatever the text.
    assert elements.texts[-1] == plain.texts[-1] and "addEventListener" in elements.texts[-1][2]


@settings(max_examples=30, deadline=None)
@given(st.text(max_size=40), st.lists(st.text(max_size=8), min_size=3, max_size=3))
def test_any_text_is_read_back(prompt, strings):
    page = figures.graph_page(made(prompt=prompt, strings=strings))
    (data,) = data_of(page)
    assert data["prompt"] == prompt and data["tokens"][1:] == strings[1:]
    assert page.encode()  # no half characters in what is written


def test_it_asks_for_nothing_from_elsewhere():
    page = figures.graph_page(made())
    assert not re.search(r"https?:|//\w|\bsrc=|\bhref=|url\(|@import|fetch\(|XMLHttp|import\(", page)
    (policy,) = (a["content"] for tag, a in Elements(page).found if "http-equiv" in a)
    assert policy.startswith("default-src 'none'")
    assert "<!-- " not in page


def test_the_script_asks_for_elements_that_are_there():
    page = figures.graph_page(made())
    ids = [attributes["id"] for _, attributes in Elements(page).found if "id" in attributes]
    asked = set(re.findall(r'\$\("(\w+)"\)', page))
    assert len(ids) == len(set(ids)) and asked <= set(ids) and len(asked) > 10


def test_plot_writes_the_page_that_it_gives(tmp_path):
    graph = made(prompt="é 雪")
    page = graph.plot(tmp_path / "graph.html")
    assert page == graph.plot() == figures.graph_page(graph)
    assert (tmp_path / "graph.html").read_text(encoding="utf-8") == page
    assert [path.name for path in tmp_path.iterdir()] == ["graph.html"]


def test_what_cannot_be_drawn():
    with pytest.raises(ValueError, match="there are no graphs to draw"):
        figures.graph_page([])
    graph = made()
    graph.adjacency[3, 0] = float("nan")
    with pytest.raises(ValueError, match="the graph of tiny-noLN holds numbers that are not finite"):
        figures.graph_page([made("tiny"), graph])


# ---------------------------------------------------------------------------------------------------------
# In a browser, where there is one

SCRIPT = """
const said = {};
const node = (label) => state.graph.nodes.find((other) => other.label === label);
const fire = (label, type) => node(label).element.dispatchEvent(new PointerEvent(type, { bubbles: true }));
const press = (label, key) => node(label).element.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
const text = (id) => $(id).textContent;
said.title = document.title;
said.drawn = [document.querySelectorAll("#nodes .node").length, document.querySelectorAll("#all .edge").length];
fire("L0N33 @2", "pointerover");
said.card = [$("card").style.display, text("card")];
said.hot = document.querySelectorAll("#hot .edge").length;
said.near = document.querySelectorAll("#nodes .near").length;
fire("logit ' she' - ' he'", "click");
said.pinned = text("panel");
document.querySelector("#panel .others button").click();
said.path = text("path");
press("L0N33 @2", "ArrowDown");
said.followed = state.path.map((other) => other.label);
press("' said' @2", "Backspace");
said.back = state.path.map((other) => other.label);
fire("L0H1 @2", "click");
said.on = state.path.map((other) => other.label);
fire("L0N33 @2", "click");
$("tabs").children[1].click();
said.model = [state.graph.model, ...state.path.map((other) => other.label)];
$("least").value = 0;
$("least").dispatchEvent(new Event("input"));
said.all = document.querySelectorAll("#all .edge").length;
$("rest").click();
said.withRest = document.querySelectorAll("#all .edge").length;
$("least").value = 100;
$("least").dispatchEvent(new Event("input"));
said.largest = document.querySelectorAll("#all .edge").length;
press("L0N33 @2", "Enter");
document.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape" }));
said.atLast = state.path.length;
said.wide = [document.documentElement.scrollWidth, innerWidth];
document.body.replaceChildren(JSON.stringify(said));
"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")
def test_a_path_is_followed_in_a_browser(tmp_path):
    page = figures.graph_page([made(), made("tiny", ANGRY, ("<b>", " girl", " said"), discrepancy=0.125)])
    path = tmp_path / "page.html"
    path.write_text(page.replace("</body>", f"<script>{SCRIPT}</script></body>"), encoding="utf-8")
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    command = [BROWSER, *quiet, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=800,600", "--dump-dom"]
    dumped = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=120).stdout
    (body,) = re.findall(r"<body>(.*?)</body>", dumped, re.DOTALL)
    said = json.loads(re.sub("&(lt|gt|amp);", lambda m: {"lt": "<", "gt": ">", "amp": "&"}[m[1]], body))
    assert said["title"] == "Where logit ' she' - ' he' comes from: tiny-noLN, tiny"
    assert said["drawn"] == [9, 8]
    shown, card = said["card"]
    assert shown == "block" and card.startswith("L0N33 @2position2 “·said”reads (pre-activation)−2activation1")
    assert "' said' @2−375%" in card and "L0H1 @2+125%" in card and "logit ' she' - ' he'−276%" in card
    assert (said["hot"], said["near"]) == (3, 4)
    assert said["pinned"].startswith("logit ' she' - ' he'") and "L0N33 @2−276%" in said["pinned"]
    assert said["path"].startswith("logit ' she' - ' he'← −2L0N33 @276% of what logit")
    assert said["followed"] == ["logit ' she' - ' he'", "L0N33 @2", "' said' @2"]
    assert said["on"] == [*said["followed"][:2], "L0H1 @2"]
    assert said["back"] == said["followed"][:2] == said["model"][1:] and said["model"][0] == "tiny"
    assert (said["all"], said["withRest"], said["largest"], said["atLast"]) == (8, 10, 1, 0)
    assert said["wide"][0] <= said["wide"][1]


def test_the_page_comes_with_the_package():
    folder = Path(figures.__file__).parent / "graph_page"
    assert {path.name for path in folder.iterdir()} == {"page.html", "draw.js", "follow.js"}
    assert '"figures/graph_page/*"' in (Path(__file__).parents[1] / "pyproject.toml").read_text()
