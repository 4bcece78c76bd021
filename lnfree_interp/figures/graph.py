"""Attribution graphs as a page in the browser, which needs no network: layers up, positions across."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path

from ..graph.result import AttributionGraph

_FOLDER = Path(__file__).parent / "graph_page"


def graph_page(graphs: AttributionGraph | Sequence[AttributionGraph]) -> str:
    """The HTML of a page that shows one graph, or several in a tab each; nothing in it is fetched from elsewhere.

    Tokens stand at the bottom, layers go up to the logit; pointing at a node shows what it reads and who reads it, and
    clicking goes along a path.

    Raises:
        ValueError: no graphs, or one that holds numbers that are not finite.

    Example:
        >>> from lnfree_interp import attribution_graph, load_model
        >>> graph = attribution_graph(load_model("tiny-noLN"), "It was the best of", nodes="mlp")
        >>> page = graph_page(graph)
        >>> page.startswith("<!DOCTYPE html>"), "tiny-noLN" in page
        (True, True)
    """
    shown = [graphs] if isinstance(graphs, AttributionGraph) else list(graphs)
    if not shown:
        raise ValueError("there are no graphs to draw")
    data = "[" + ",\n".join(_json(graph) for graph in shown) + "]"
    title = f"Where {shown[0].nodes[-1].label} comes from: {', '.join(graph.model for graph in shown)}"
    parts = {name: (_FOLDER / name).read_text(encoding="utf-8") for name in ("page.html", "draw.js", "follow.js")}
    page = parts.pop("page.html")
    # What comes from the graphs is put in last, and without "<": nothing is put into it.
    for name, text in {**parts, "title": html.escape(title), "graphs": data}.items():
        before, _, after = page.partition(f"<!-- {name} -->")
        page = before + text + after
    return page


def _json(graph: AttributionGraph) -> str:
    """What the page's script reads, as JSON that is safe within a <script>: no text in it can end that."""
    numbers = zip(*(x.tolist() for x in (graph.inputs, graph.activations, graph.influence, graph.effects)))
    nodes = [
        {
            **{name: getattr(node, name) for name in ("kind", "layer", "pos", "unit", "label")},
            **dict(zip(("input", "activation", "influence", "effect"), map(_short, values))),
        }
        for node, values in zip(graph.nodes, numbers)
    ]
    receivers, senders = graph.adjacency.nonzero(as_tuple=True)
    entries = graph.adjacency[receivers, senders].tolist()
    data = {
        "model": graph.model,
        "prompt": graph.prompt,
        "tokens": [_token(text, pos) for pos, text in enumerate(graph.strings)],
        "n_layers": graph.n_layers,
        "kept": _short(graph.kept),
        "discrepancy": _short(graph.discrepancy),
        "probability": _short(float(graph.activations[-1])),
        "nodes": nodes,
        "edges": [[s, r, _short(x)] for s, r, x in zip(senders.tolist(), receivers.tolist(), entries)],
    }
    try:
        text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    except ValueError:
        raise ValueError(f"the graph of {graph.model} holds numbers that are not finite") from None
    for mark in "<>&":
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    return text


def _short(value: float) -> float:
    """To six digits: a page holds ten thousands of edges."""
    return float(f"{value:.6g}")


def _token(text: str, pos: int) -> str:
    """The text of a token; a special one that begins the prompt in words."""
    return "BOS" if pos == 0 and text.startswith("<") and text.endswith(">") else text
