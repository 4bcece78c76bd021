"""Figures on pages of any width: where panels side by side would be too small to read, they go below one another."""

from __future__ import annotations

import copy
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from .style import PANEL_LINE, TITLE_LINE, WIDTH, legend_height, longest, names_along, panel_titles, title_pad, wrapped

# Pixels of a page that is narrow, and up to which a page is one.
NARROW, UP_TO = 400, 600
# Characters of a title on a page that is narrow.
TITLE = 46
# Pixels up to which a panel keeps its height where many follow each other.
LOW = 220
# Characters of a row's name that stand in a line, and pixels of a line of a note below the panels.
NAME, NOTE_LINE = 32, 16
_MARGIN = {"l": 60, "r": 15}

_SCRIPT = """
const plot = document.getElementById('{plot_id}'), layouts = LAYOUTS, texts = TEXTS;
let shown = 0;
function fit() {
  const now = plot.parentElement.clientWidth < UP_TO ? 1 : 0;
  if (now === shown) return;
  shown = now;
  plot.style.height = plot.parentElement.style.height = layouts[now].height + 'px';
  const templates = Object.values(texts).map(text => now ? '' : text);
  if (templates.length) Plotly.restyle(plot, {texttemplate: templates}, Object.keys(texts).map(Number));
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
    texts = json.dumps({i: figure.data[i].texttemplate for i in _texts_in_cells(figure)}).replace("<", "\\u003c")
    return _SCRIPT.replace("TEXTS", texts).replace("UP_TO", str(UP_TO)).replace("LAYOUTS", layouts)


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
    for i in _texts_in_cells(figure):
        made.data[i].texttemplate = ""
    return made.update_layout(width=NARROW)


def _texts_in_cells(figure: go.Figure) -> list[int]:
    """Which traces are heatmaps whose cells are too narrow for their texts on a page that is."""
    written = [i for i, t in enumerate(figure.data) if t.type == "heatmap" and getattr(t, "texttemplate", None)]
    return [i for i in written if len(figure.data[i].z[0]) > 5]


def narrow_layout(figure: go.Figure) -> dict[str, Any]:
    """What is different on a page that is narrow: name of a part of the layout -> its value.

    Panels keep their heights; those of a row follow each other, and have the ticks and titles that they shared.

    Example:
        >>> import plotly.graph_objects as go
        >>> sorted(narrow_layout(go.Figure(go.Scatter(y=[1, 2]), {"height": 300})))[:2]
        ['height', 'margin']
    """
    layout = figure.to_plotly_json()["layout"]
    lines = wrapped(_plain(figure.layout.title.text), TITLE)
    height, margin = figure.layout.height or 450, layout.get("margin", {})
    top, bottom = margin.get("t", 80), margin.get("b", 80)
    found: dict[str, Any] = {"title.text": "<br>".join(lines)}
    found |= {"title.font.size": 15, "title.pad.t": title_pad(len(lines))}
    drawn = {(getattr(trace, "xaxis", None) or "x").replace("x", "xaxis") for trace in figure.data}
    panels = [panel for panel in _panels(layout) if panel[0] in drawn or not figure.data]
    across = NARROW - 20 - _left(figure) - _colour_bar(figure)
    for x, y in panels:
        found |= _ticks(figure, layout, x, across) | _rows(figure, y)
        if layout.get(y, {}).get("scaleanchor"):  # cells are square: as many labels down as across
            found |= {name.replace(x, y): value for name, value in found.items() if name.startswith(f"{x}.tick")}
            found[f"{y}.tickangle"] = 0
    notes = [_wrapped_note(note) for note in _notes(figure)]
    notes_height = sum(10 + NOTE_LINE * len(note) for note in notes)
    annotations = copy.deepcopy(layout.get("annotations", []))
    if len(panels) < 2:
        more = TITLE_LINE * (len(lines) - max(1, title_lines(figure)))
        below = notes_height + max([_below(figure, layout, x, across) for x, _ in panels], default=bottom)
        below = max(below, 0 if notes else bottom)
        inside = height - top - bottom - legend_height(figure, WIDTH)
        own = max([inside, *(_rows_height(figure, y) for _, y in panels)])
        if panels and layout.get(panels[0][1], {}).get("scaleanchor"):
            own = across
        found["margin"] = {**margin, **_MARGIN, "b": below, "t": top + more}
        found["height"] = round(top + more + own + below + legend_height(figure, NARROW))
    else:
        inside = height - top - bottom - legend_height(figure, WIDTH)
        found |= _below_one_another(figure, layout, panels, inside, across, annotations)
        head, below = 24 + TITLE_LINE * len(lines), notes_height + max(50, found.pop("below"))
        found["margin"] = {**_MARGIN, "t": head, "b": below}
        found["height"] = round(found.pop("whole") + head + below + legend_height(figure, NARROW))
    for note, text in zip(_notes(figure), notes):
        at = next(i for i, a in enumerate(layout["annotations"]) if a == note.to_plotly_json())
        left = {"x": 0, "xanchor": "left", "xshift": -50, "align": "left"}
        annotations[at] |= {"text": "<br>".join(text), "yshift": notes_height - below, **left}
    if annotations:
        found["annotations"] = annotations
    return found


def _below_one_another(
    figure: go.Figure, layout: dict, panels: list[tuple[str, str]], inside: float | int, across: int, annotations: list
) -> dict[str, Any]:
    """Where panels are and what is above them, and pixels: of the whole, and below the last one."""
    found: dict[str, Any] = {}
    titles = panel_titles(figure)
    order = [panel for panel in _order(_panels(layout), layout) if panel in panels]
    chars = int((NARROW - 20 - _left(figure)) / 6.6)  # above a panel
    boxes = []  # (pixels above, of, below) each panel
    for x, y in order:
        texts = [wrapped(_plain(t.text), chars) for t in titles if _above(t, layout, x, y)]
        above = PANEL_LINE * sum(map(len, texts)) + (10 if texts else 4)
        own = _span(layout, y) * inside
        own = max(min(own, LOW), 0.8 * own, _rows_height(figure, y))
        title = _own_ticks(layout, panels, x, y).get(f"{x}.title.text")
        boxes.append((above, own, _below(figure, layout, x, across, title)))
    whole = sum(map(sum, boxes)) - boxes[-1][2]
    at = whole
    for (x, y), (above, own, below) in zip(order, boxes):
        at -= above
        found[f"{x}.domain"] = [0, 1]
        found[f"{y}.domain"] = [max(0.0, (at - own) / whole), at / whole]
        for index, annotation in enumerate(annotations):
            title_of = next((t for t in titles if t.to_plotly_json() == layout["annotations"][index]), None)
            if title_of is not None and _above(title_of, layout, x, y):
                text = "<br>".join(wrapped(_plain(title_of.text), chars))
                annotation |= {"x": 0.5, "y": at / whole, "text": text}
        at -= own + below
        found |= _own_ticks(layout, panels, x, y)
    return found | {"whole": whole, "below": boxes[-1][2]}


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


def _below(figure: go.Figure, layout: dict, x: str, across: int, shared: str | None = None) -> int:
    """Pixels that ticks and title, its own or the one it shares, take below a panel."""
    labels = _labels(figure, layout, x)
    title = _at(layout, f"{x}.title.text") or shared
    under = 4 if title is None else 30 + 16 * (len(_axis_title(title, across)) - 1)
    if _stands(layout, x, labels, across):
        return min(240, 6 * longest(labels)) + 12 + under
    return 18 * (1 + max((label.count("<br>") for label in labels), default=0)) + 12 + under


def _labels(figure: go.Figure, layout: dict, x: str) -> list[str]:
    """The texts along an axis, if they are texts."""
    if texts := layout.get(x, {}).get("ticktext"):
        return [str(text) for text in texts]
    return names_along(figure, x)


def _stands(layout: dict, x: str, labels: Sequence[str], across: int) -> bool:
    """Whether the labels of an axis stand on end: where they do on a wide page, or do not lie beside each other."""
    if layout.get(x, {}).get("tickangle") in (-90, 90):
        return True
    size = longest(labels)
    return size > 3 and layout.get(x, {}).get("type") != "log" and len(labels) * (7 * size + 8) > across


def _ticks(figure: go.Figure, layout: dict, x: str, across: int) -> dict[str, Any]:
    """The labels along an axis: standing where there is no room for them to lie, no more than can be read."""
    found: dict[str, Any] = {}
    own, labels = layout.get(x, {}), _labels(figure, layout, x)
    stands = _stands(layout, x, labels, across)
    if own.get("type") == "log" and labels:
        found[f"{x}.tickangle"] = 0
        if len(labels) * 34 > across and all(map(_is_power, own["tickvals"])):
            step = math.ceil(len(labels) * 34 / across)
            found |= {f"{x}.{name}": list(own[name])[::step] for name in ("tickvals", "ticktext")}
    if stands:
        found[f"{x}.tickangle"] = -90
    step = math.ceil((14 if stands else 7 * longest(labels) + 8) * len(labels) / across)
    if step > 1 and own.get("ticktext") and own.get("tickvals") is not None and own.get("type") != "log":
        found |= {f"{x}.{name}": list(own[name])[::step] for name in ("tickvals", "ticktext")}
    if title := _at(own, "title.text"):
        found[f"{x}.title.text"] = "<br>".join(_axis_title(title, across))
    return found


def _is_power(tick: float) -> bool:
    """Whether a tick is a power of ten."""
    exponent = math.log10(tick)
    return abs(exponent - round(exponent)) < 1e-9


def _axis_title(title: str, across: int) -> list[str]:
    return wrapped(_plain(title), max(20, across // 7))


def _names(figure: go.Figure, y: str) -> list[str]:
    """The names of an axis of rows, where some are long."""
    names = names_along(figure, y)
    return names if longest(names) > NAME else []


def _rows(figure: go.Figure, y: str) -> dict[str, Any]:
    """Names of rows in lines."""
    if not (names := _names(figure, y)):
        return {}
    return {f"{y}.tickvals": names, f"{y}.ticktext": ["<br>".join(wrapped(_plain(name), NAME)) for name in names]}


def _rows_height(figure: go.Figure, y: str) -> int:
    """Pixels that names of rows take where they are in lines."""
    names = _names(figure, y)
    return len(names) * (6 + 13 * max((len(wrapped(_plain(name), NAME)) for name in names), default=0))


def _left(figure: go.Figure) -> int:
    """About how many pixels labels take to the left of the panels."""
    texts = [str(text) for axis in figure.select_yaxes() for text in axis.ticktext or ()]
    for trace in figure.data:
        y = trace.y if getattr(trace, "y", None) is not None else ()
        texts += [value for value in y if isinstance(value, str)]
    return max(60, 7 * min(NAME, longest(texts)) if texts else 0)


def _colour_bar(figure: go.Figure) -> int:
    """Pixels that the bar of colours takes."""
    return 85 if any(trace.type == "heatmap" and trace.showscale is not False for trace in figure.data) else 0


def _notes(figure: go.Figure) -> list:
    """What is said below the panels."""
    return [a for a in figure.layout.annotations if a.xref == a.yref == "paper" and a.y == 0 and a.yanchor == "top"]


def _wrapped_note(note: Any) -> list[str]:
    return wrapped(_plain(note.text), 58)


def _own_ticks(layout: dict, panels: list[tuple[str, str]], x: str, y: str) -> dict[str, Any]:
    """Tick labels and titles that a panel shares with one beside or below it."""
    found: dict[str, Any] = {}
    for axis, other in ((x, 0), (y, 1)):
        own = layout.get(axis, {})
        if own.get("showticklabels") is False:
            found[f"{axis}.showticklabels"] = True
        if (own.get("matches") or (axis == y and own.get("showticklabels") is False)) and not _at(own, "title.text"):
            line = [p for p in panels if _ends(layout, p[other]) == _ends(layout, (x, y)[other])]
            if said := [text for p in line if (text := _at(layout.get(p[other], {}), "title.text"))]:
                found[f"{axis}.title.text"] = said[0]
    return found
