"""One look for all figures: a colour and a dash per model, scales centred on zero, as wide as the page."""

from __future__ import annotations

import html
import math
import re
import textwrap
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import plotly.graph_objects as go

from .html import visible

# Okabe and Ito's palette: told apart with any colour vision.
COLOURS = ("#555555", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
SYMBOLS = ("circle-open", "square-open", "diamond", "triangle-up", "cross", "x", "star", "hexagon")
DIVERGING = "RdBu_r"
# What marks a value without being one: a threshold, a diagonal, where two would be the same.
MARK = {"color": "#777777", "dash": "dot", "width": 1}
# Figures follow the page; this is the width at which they must be readable.
WIDTH = 800
# Pixels of a line of the title, and of one above a panel.
TITLE_LINE, PANEL_LINE = 20, 17
# Below the panels: one row, or as many as the page's width makes of it.
LEGEND = {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "xref": "container", "x": 0}
LEGEND |= {"tracegroupgap": 0}


def colour(i: int) -> str:
    """The i-th model's colour: grey (the original), blue (the control), vermilion (LN-free), ..."""
    return COLOURS[i % len(COLOURS)]


def symbol(i: int) -> str:
    """The i-th model's marker: two can lie on one another and be seen both."""
    return SYMBOLS[i % len(SYMBOLS)]


def line(i: int) -> dict:
    """The i-th model's line: the first one (the original) dashed, the rest solid."""
    return {"color": colour(i), "dash": "dash" if i == 0 else "solid", "width": 2}


def band(i: int) -> str:
    """The i-th model's colour for what lies between two lines: an interval."""
    red, green, blue = (int(colour(i)[j : j + 2], 16) for j in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.15)"


def styled(figure: go.Figure, *, title: str, height: int = 420) -> go.Figure:
    """The figure with the house layout: as wide as the page, the legend below the panels.

    Args:
        title: what is seen, of any length.
        height: in pixels, without what a long title and the legend take.
    """
    lines = wrapped(title, 88)
    panels = panel_titles(figure)
    above = max((1 + str(a.text).count("<br>") for a in panels), default=0)
    figure.update_layout(
        template="plotly_white",
        title={"text": "<br>".join(lines), "font": {"size": 16}, "x": 0.01, "xanchor": "left"},
        autosize=True,
        height=height + TITLE_LINE * (len(lines) - 1) + PANEL_LINE * max(0, above - 1) + legend_height(figure, WIDTH),
        margin={"l": 65, "r": 25, "t": 24 + TITLE_LINE * len(lines) + PANEL_LINE * above, "b": 50},
        font={"size": 12, "color": "#222222"},
        legend={**LEGEND, "font": {"size": 12}},
    )
    figure.update_layout(title={"yref": "container", "yanchor": "top", "y": 1, "pad": {"t": title_pad(len(lines))}})
    for annotation in panels:
        annotation.font.size = 13
    figure.update_yaxes(ticks="outside", ticklen=4, tickcolor="rgba(0,0,0,0)")  # labels keep clear of what is drawn
    _stand(figure)
    _colour_bars(figure)
    if len(_entries(figure)) == 1:  # alone: no legend, and no dash that tells it from others
        figure.update_layout(showlegend=False)
        figure.update_traces(line={"dash": "solid"}, selector=lambda t: t.type == "scatter" and t.line.dash == "dash")
    return figure


def in_one(names: Iterable[str]) -> str:
    """What a title says of the only model that is drawn; of several, the legend does.

    Example:
        >>> in_one(["tiny"]), in_one(["tiny", "tiny-noLN"])
        (' in tiny', '')
    """
    every = list(names)
    return f" in {every[0]}" if len(every) == 1 and every[0] not in ("", "model") else ""


def wrapped(text: str, width: int) -> list[str]:
    """Lines of a text, broken at blanks.

    Example:
        >>> wrapped("Loss of tiny-noLN", 12)
        ['Loss of', 'tiny-noLN']
    """
    return textwrap.wrap(text, width, break_on_hyphens=False) or [""]


def _colour_bars(figure: go.Figure) -> None:
    """Beside the panels' top, no longer than is needed to read them."""
    margin = figure.layout.margin
    inside = figure.layout.height - margin.t - margin.b - legend_height(figure, WIDTH)
    look = {"lenmode": "pixels", "len": max(100, min(inside, 280)), "y": 1, "yanchor": "top", "thickness": 18}
    if figure.layout.coloraxis.colorbar.title.text is not None:
        figure.update_layout(coloraxis={"colorbar": look})
    figure.update_traces(colorbar=look, selector=lambda t: t.type == "heatmap" and t.colorbar.title.text is not None)


def _stand(figure: go.Figure) -> None:
    """Names below panels stand on end where they do not fit beside each other, no more of them than can be read."""
    for axis in figure.select_xaxes():
        names, (low, high) = names_along(figure, axis.plotly_name), axis.domain or (0, 1)
        across, sizes = (WIDTH - 90) * (high - low), [longest([name]) for name in names]
        widest = max((2.65 * (a + b) + 4 for a, b in pairwise(sizes)), default=0)  # halves of two neighbours
        if axis.ticktext is None and axis.tickangle is None and widest * len(names) > across:
            axis.update(tickangle=-90, tickvals=names[:: max(1, math.ceil(14 * len(names) / across))])


def names_along(figure: go.Figure, axis: str) -> list[str]:
    """The names that traces have along an axis such as "yaxis2".

    Example:
        >>> names_along(go.Figure(go.Bar(x=["a", "b", "a"], y=[1, 2, 3])), "xaxis")
        ['a', 'b']
    """
    letter, found = axis[0], []
    for trace in figure.data:
        own = getattr(trace, letter, None)
        if (getattr(trace, f"{letter}axis", None) or letter) == axis.replace("axis", "") and own is not None:
            found += [value for value in own if isinstance(value, str)]
    return list(dict.fromkeys(found))


def longest(texts: Iterable[str]) -> int:
    """Characters of the longest line of some texts of plotly."""
    lines = (re.sub("<[^>]*>", "", line) for text in texts for line in text.split("<br>"))
    return max((len(html.unescape(line)) for line in lines), default=1)


def title_pad(lines: int) -> int:
    """Pixels above a title of so many lines, which is moved up by half of them."""
    return 4 + TITLE_LINE // 2 * lines


def legend_height(figure: go.Figure, width: int) -> int:
    """Pixels that the legend takes below the panels."""
    entries = _entries(figure)
    if figure.layout.showlegend is False or len(entries) < 2:
        return 0
    longest = max(len(str(trace.name or "")) for trace in entries)
    beside = max(1, width // (50 + 7 * longest))  # its columns are of one width
    return 10 + 20 * math.ceil(len(entries) / beside)


def _entries(figure: go.Figure) -> list:
    """The traces that a legend names."""
    return [t for t in figure.data if t.showlegend is not False and t.type not in ("heatmap", "waterfall")]


def panel_titles(figure: go.Figure) -> list:
    """The annotations that stand above panels, as make_subplots puts them there."""
    on_page = (a for a in figure.layout.annotations if a.xref == a.yref == "paper")
    return [a for a in on_page if a.yanchor == "bottom" and a.xanchor == "center" and not a.showarrow]


# ---------------------------------------------------------------------------------------------------------
# Axes


def token_axis(strings: Sequence[str], positions: Sequence[int] | None = None, panels: int = 1) -> dict[str, Any]:
    """An axis of tokens, to be drawn at 0, 1, 2, ...: as many of their texts as can be read.

    Args:
        positions: in the prompt, shown before the texts where there are not many.
        panels: that stand side by side.
    """
    step = max(1, math.ceil(14 * len(strings) * panels / (WIDTH - 150)))
    where = range(0, len(strings), step)
    texts = [shown(strings[i]) if positions is None else f"{positions[i]}: {shown(strings[i])}" for i in where]
    return {"tickvals": list(where), "ticktext": texts, "tickangle": -90 if len(strings) > 8 else 0, "showgrid": False}


def plain(text: str, most: int | None = None) -> str:
    """A text in a figure of plotly, which would read < and & as markup; cut to so many characters."""
    return html.escape(visible(text, len(text) if most is None else most), quote=False)


def shown(token: str) -> str:
    """A token's text in a figure, with the blanks at its ends, which would be dropped."""
    return plain(token, 16).replace(" ", "\u00a0")


def layer_axis(n: int) -> dict[str, Any]:
    """An axis of layers, the first at the top, where TransformerLens' demos have it."""
    return {"autorange": "reversed", "tickvals": list(range(0, n, max(1, math.ceil(n / 16)))), "title_text": "layer"}


def log_axis(values: Iterable[float | int], *, percent: bool = False) -> dict[str, Any]:
    """A logarithmic axis over these values, its ticks whole numbers such as 0.2, 1, 50 written out."""
    sizes = [value for value in values if 0 < value < math.inf]
    if not sizes:
        return {"type": "log"}
    low, high = math.floor(math.log10(min(sizes))), math.ceil(math.log10(max(sizes)))
    decades = range(low, high + 1)
    step = max(1, math.ceil(len(decades) / 8))
    ticks = [10.0**d for d in decades[::step]]
    if len(decades) <= 3 or max(sizes) <= 100 * min(sizes):
        ticks = [digit * 10.0**d for d in decades for digit in (1, 2, 5)]
    texts = [f"{100 * tick:,.4g}%" if percent else _written(tick) for tick in ticks]
    axis = {"type": "log", "tickvals": ticks, "ticktext": texts, "minor": {"ticks": "", "showgrid": False}}
    if (
        sum(min(sizes) <= tick <= max(sizes) for tick in ticks) < 2
    ):  # as far as the ticks around them, lest there be none
        ends = max(t for t in ticks if t <= min(sizes) * 1.001), min(t for t in ticks if t >= max(sizes) * 0.999)
        axis["range"] = [math.log10(end) + sign * 0.03 for end, sign in zip(ends, (-1, 1))]
    return axis


def _written(tick: float) -> str:
    """0.02, 1,000, 5M; a power of ten where that would be long."""
    for size, letter in ((1e9, "B"), (1e6, "M")):
        if size <= tick < 1000 * size:
            return f"{tick / size:g}{letter}"
    if 1 <= tick < 1e6:
        return f"{tick:,.0f}"
    if 1e-4 <= tick < 1:
        return f"{tick:g}"
    exponent = math.floor(math.log10(tick) + 1e-9)
    digit = round(tick / 10.0**exponent)
    return ("" if digit == 1 else f"{digit}·") + f"10<sup>{exponent}</sup>".replace("-", "\u2212")
