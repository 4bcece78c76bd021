"""Pictures of panels and of the largest of many values, for notebooks: HTML of the primitives in `html`."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..patching.shown import Panel
from .html import bars, coloured_tokens, grid, note

if TYPE_CHECKING:
    from ..graph import AttributionGraph
    from ..patching import PatchingError

ROWS, COLUMNS, BARS, TOKENS = 30, 40, 15, 400


def panel_picture(panel: Panel, unit: str) -> str:
    """A panel as cells coloured by value, the first row (layer 0) at the top; with too many heads or neurons in a
    row, the largest cells as bars."""
    if panel.column != "position" and len(panel.columns) > COLUMNS:
        letter = "H" if panel.column == "head" else "N"
        labels = [f"{row}{letter}{column}" for row in panel.rows for column in panel.columns]
        return largest_bars(labels, panel.values.flatten().tolist(), unit, f"{panel.column}s")
    shown = panel.largest(ROWS, COLUMNS)
    cells = grid(shown.values.tolist(), shown.rows, shown.columns, unit)
    return cells + note(f"across: {panel.column}; down: {panel.row}", shown.left_out)


def largest_bars(labels: Sequence[str], values: Sequence[float | int], unit: str, what: str, k: int = BARS) -> str:
    """The k largest of some values as bars, the largest first."""
    order = sorted(range(len(values)), key=lambda i: -abs(values[i]) if values[i] == values[i] else 0.0)[:k]
    more = f"the {k} largest of {len(values)} {what}" if len(values) > k else ""
    return bars([labels[i] for i in order], [values[i] for i in order], unit) + note(more)


def error_picture(error: PatchingError) -> str:
    """Each layer's error as bars, and the measures over all of them as a line each."""
    unit = "of the total effect" if error.normalized else "summed over cells"
    by_layer = bars([f"L{layer}" for layer in error.layers], error.per_layer.tolist(), f"error, {unit}")
    lines = []
    for name in ("total", "relative", "pearson", "spearman", "sign_agreement"):
        low, high = getattr(error, f"{name}_interval")
        lines.append(f"{name.replace('_', ' ')} {getattr(error, name):.3g} [{low:.3g}, {high:.3g}]")
    return by_layer + note(*lines)


def graph_picture(graph: AttributionGraph) -> str:
    """The prompt coloured by what each token does to the logit, over all paths, and the largest nodes as bars."""
    effects = graph.effects.tolist()
    of_tokens = [0.0] * len(graph.strings)
    for node, effect in zip(graph.nodes, effects):
        if node.kind == "token":
            of_tokens[node.pos] = effect
    inner = [i for i, node in enumerate(graph.nodes) if node.kind in ("head", "neuron", "mlp")]
    nodes = largest_bars([graph.nodes[i].label for i in inner], [effects[i] for i in inner], "logits", "nodes")
    edges = "".join(f"<li>{html.escape(text)}</li>" for text in _strongest(graph, 8))
    return (
        note("what each token does to the logit, over all paths")
        + coloured_tokens(graph.strings[-TOKENS:], of_tokens[-TOKENS:], "logits")
        + note("by how many logits it falls without a node, over all paths")
        + nodes
        + note("the edges that carry the most")
        + f"<ul style='margin:.2em 0;font-size:13px'>{edges}</ul>"
    )


def _strongest(graph: AttributionGraph, k: int) -> list[str]:
    rows = graph.table(k)
    return [f"{a} → {b}: {entry:+.3g}" for a, b, entry in zip(rows["sender"], rows["receiver"], rows["entry"])]


def side_by_side(results: Mapping[str, Any], most: int) -> str:
    """The pictures of several results, each below its name and summary, as long as they have room."""
    parts: list[str] = []
    left = []
    for name, result in results.items():
        if not hasattr(result, "picture"):
            parts.append(f"<div><b>{html.escape(name)}</b> {result.head(10).to_html(index=False, border=0)}</div>")
            continue
        said = f"<p style='margin:.6em 0 .3em'><b>{html.escape(name)}</b> {html.escape(result.summary())}</p>"
        picture = result.picture()
        if sum(map(len, parts)) + len(picture) > most:
            left.append(name)
            picture = ""
        parts.append(f"<div>{said}{picture}</div>")
    return "".join(parts) + note(f"no room for the pictures of {', '.join(left)}" if left else "")
