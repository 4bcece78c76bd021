"""Figures on pages of any width: where panels side by side would be too small to read, they go below one another."""

from __future__ import annotations

import copy
import json
import re
import textwrap
from collections import Counter
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from .style import PANEL_LINE, TITLE_LINE, WIDTH, legend_height, panel_titles, title_pad

# Pixels of a page that is narrow, and up to which a page is one.
NARROW, UP_TO = 400, 600
# Characters of a title on a page that is narrow.
TITLE = 46
# Pixels up to which a panel keeps its height where many follow each other.
LOW = 220
_MARGIN = {"l": 60, "r": 15}

_SCRIPT = """
const plot = document.getElementById('{plot_id}'), layouts = LAYOUTS;
let shown = 0;
function fit() {
  const now = plot.parentElement.clientWidth < UP_TO ? 1 : 0;
  if (now === shown) return;
  shown = now;
  plot.style.height = plot.parentElement.style.minHeight = layouts[now].height + 'px';
  Plotly.relayout(plot, structuredClone(layouts[now]));
}
new ResizeObserver(fit).observe(plot.parentElement);
fit();
"""


def page_script(figure: go.Figure) -> str:
    """What `to_html` and `write_html` take as `post_script`, for the figure to follow the page's width.

    Example:
        >>> import plotly.graph_objects as go
        >>> "Plotly.relayout" in page_script(go.Figure(go.Scatter(y=[1, 2])))
        True
    """
    narrow = narrow_layout(figure)
    layout = figure.to_plotly_json()["layout"]
    wide = {name: _at(layout, name) for name in narrow}
    layouts = json.dumps([wide, narrow], separators=(",", ":")).replace("<", "\\u003c")
    return _SCRIPT.replace("LAYOUTS", layouts).replace("UP_TO", str(UP_TO))


def narrow_figure(figure: go.Figure) -> go.Figure:
    """The figure as a page of 400 pixels shows it.

    Example:
        >>> from plotly.subplots import make_subplots
        >>> figure = make_subplots(cols=2).add_scatter(y=[1], row=1, col=1).add_scatter(y=[1], row=1, col=2)
        >>> narrow_figure(figure).layout.xaxis2.domain
        (0, 1)
    """
    made = go.Figure(figure)
    for name, value in narrow_layout(figure).items():
        made.layout[name] = value
    return made.update_layout(width=NARROW)


def narrow_layout(figure: go.Figure) -> dict[str, Any]:
    """What is different on a page that is narrow: name of a part of the layout -> its value.

    Panels keep their heights; those of a row follow each other, and have the ticks and titles that they shared.

    Example:
        >>> import plotly.graph_objects as go
        >>> sorted(narrow_layout(go.Figure(go.Scatter(y=[1, 2]), {"height": 300})))[:2]
        ['height', 'margin']
    """
    layout = figure.to_plotly_json()["layout"]
    title = " ".join(str(figure.layout.title.text or "").split("<br>"))
    lines = textwrap.wrap(title, TITLE) or [""]
    height, margin = figure.layout.height or 450, layout.get("margin", {})
    top, bottom = margin.get("t", 80), margin.get("b", 80)
    found: dict[str, Any] = {
        "title.text": "<br>".join(lines),
        "title.font.size": 15,
        "title.pad.t": title_pad(len(lines)),
    }
    before = max(1, title_lines(figure))
    panels = _panels(layout)
    found |= {f"{x}.tickangle": -90 for x, _ in panels if _crowded(figure, layout, x)}
    if len(panels) < 2:
        more = TITLE_LINE * (len(lines) - before)
        below = max([bottom, *(_below(figure, layout, x) for x, _ in panels)])
        found["margin"] = {**margin, **_MARGIN, "b": below, "t": top + more}
        legend = legend_height(figure, NARROW) - legend_height(figure, WIDTH)
        found["height"] = round(height + more + legend + below - bottom)
        return found
    inside = height - top - bottom - legend_height(figure, WIDTH)
    titles = panel_titles(figure)
    annotations = copy.deepcopy(layout["annotations"]) if titles else []
    order = _order(panels, layout)
    chars = int((NARROW - 20 - _left(figure)) / 6.6)  # above a panel
    boxes = []  # (pixels above, of, below) each panel
    for x, y in order:
        texts = [textwrap.wrap(_plain(t.text), chars) for t in titles if _above(t, layout, x, y)]
        above = PANEL_LINE * sum(map(len, texts)) + (6 if texts else 4)
        own = _span(layout, y) * inside
        boxes.append((above, max(min(own, LOW), 0.8 * own), _below(figure, layout, x)))
    whole = sum(map(sum, boxes)) - boxes[-1][2]
    at = whole
    for (x, y), (above, own, below) in zip(order, boxes):
        at -= above
        found[f"{x}.domain"] = [0, 1]
        found[f"{y}.domain"] = [max(0.0, (at - own) / whole), at / whole]
        for index, annotation in enumerate(annotations):
            title_of = next((t for t in titles if t.to_plotly_json() == layout["annotations"][index]), None)
            if title_of is not None and _above(title_of, layout, x, y):
                text = "<br>".join(textwrap.wrap(_plain(title_of.text), chars))
                annotation |= {"x": 0.5, "y": at / whole, "text": text}
        at -= own + below
        found |= _own_ticks(layout, panels, x, y)
    if annotations:
        found["annotations"] = annotations
    head, bottom = 24 + TITLE_LINE * len(lines), max(bottom, boxes[-1][2])
    found["margin"] = {**_MARGIN, "t": head, "b": bottom}
    found["height"] = round(whole + head + bottom + legend_height(figure, NARROW))
    return found


def title_lines(figure: go.Figure) -> int:
    return 1 + str(figure.layout.title.text or "").count("<br>")


def _plain(text: str | None) -> str:
    return str(text or "").replace("<br>", " ")


def _at(layout: dict, name: str) -> Any:
    """The value at "title.text"; None where there is none."""
    value: Any = layout
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _panels(layout: dict) -> list[tuple[str, str]]:
    """The axes of each panel, by name."""
    found = []
    for name in layout:
        if re.fullmatch(r"xaxis\d*", name):
            anchor = layout[name].get("anchor") or "y"
            found.append((name, anchor.replace("y", "yaxis")))
    return [(x, y) for x, y in found if y in layout] or found[:1]


def _ends(layout: dict, axis: str) -> tuple[float | int, float | int]:
    low, high = layout.get(axis, {}).get("domain") or (0.0, 1.0)
    return low, high


def _span(layout: dict, axis: str) -> float | int:
    low, high = _ends(layout, axis)
    return high - low


def _order(panels: list[tuple[str, str]], layout: dict) -> list[tuple[str, str]]:
    """Row by row, as make_subplots counts; column by column where columns have panels of their own."""
    columns = Counter(_ends(layout, x) for x, _ in panels)
    if len(set(columns.values())) == 1:
        return sorted(panels, key=lambda pair: int(pair[0].removeprefix("xaxis") or 1))
    return sorted(panels, key=lambda pair: (_ends(layout, pair[0]), -_ends(layout, pair[1])[1]))


def _above(title: Any, layout: dict, x: str, y: str) -> bool:
    left, right = _ends(layout, x)
    return abs(title.x - (left + right) / 2) < 0.01 and abs(title.y - _ends(layout, y)[1]) < 0.01


def _below(figure: go.Figure, layout: dict, x: str) -> int:
    """Pixels that ticks and title take below a panel."""
    labels = _labels(figure, layout, x)
    if layout.get(x, {}).get("tickangle") in (-90, 90) or _crowded(figure, layout, x):
        return min(150, 7 * _longest(labels)) + 34
    return 18 * (1 + max((label.count("<br>") for label in labels), default=0)) + 34


def _labels(figure: go.Figure, layout: dict, x: str) -> list[str]:
    """The texts along an axis, if they are texts."""
    if texts := layout.get(x, {}).get("ticktext"):
        return [str(text) for text in texts]
    of, found = x.replace("xaxis", "x"), dict[str, None]()
    for trace in figure.data:
        own = getattr(trace, "x", None)
        if (getattr(trace, "xaxis", None) or "x") == of and own is not None:
            found |= dict.fromkeys(value for value in own if isinstance(value, str))
    return list(found)


def _longest(labels: Sequence[str]) -> int:
    return max((len(part) for label in labels for part in label.split("<br>")), default=1)


def _crowded(figure: go.Figure, layout: dict, x: str) -> bool:
    """Whether the labels of an axis do not lie beside each other on a narrow page, so that they must stand."""
    labels = _labels(figure, layout, x)
    return len(labels) * (7 * _longest(labels) + 8) > NARROW - 20 - _left(figure)


def _left(figure: go.Figure) -> int:
    """About how many pixels labels take to the left of the panels."""
    texts = [str(text) for axis in figure.select_yaxes() for text in axis.ticktext or ()]
    for trace in figure.data:
        y = trace.y if getattr(trace, "y", None) is not None else ()
        texts += [value for value in y if isinstance(value, str)]
    return max(60, 7 * max((len(part) for text in texts for part in text.split("<br>")), default=0))


def _own_ticks(layout: dict, panels: list[tuple[str, str]], x: str, y: str) -> dict[str, Any]:
    """Tick labels and titles that a panel shares with one beside or below it."""
    found: dict[str, Any] = {}
    for axis, other in ((x, 0), (y, 1)):
        own = layout.get(axis, {})
        if own.get("matches") and own.get("showticklabels") is False:
            found[f"{axis}.showticklabels"] = True
        if own.get("matches") and not _at(own, "title.text"):
            line = [p for p in panels if _ends(layout, p[other]) == _ends(layout, (x, y)[other])]
            if said := [text for p in line if (text := _at(layout.get(p[other], {}), "title.text"))]:
                found[f"{axis}.title.text"] = said[0]
    return found
