"""One look for all figures: a colour and a dash per model, scales centred on zero, as wide as the page."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import plotly.graph_objects as go

# Okabe and Ito's palette: told apart with any colour vision.
COLOURS = ("#555555", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
DIVERGING = "RdBu_r"
# Figures follow the page; this is the width at which they must be readable.
WIDTH = 800


def colour(i: int) -> str:
    """The i-th model's colour: grey (the original), blue (the control), vermilion (LN-free), ..."""
    return COLOURS[i % len(COLOURS)]


def line(i: int) -> dict:
    """The i-th model's line: the first one (the original) dashed, the rest solid."""
    return {"color": colour(i), "dash": "dash" if i == 0 else "solid", "width": 2}


def band(i: int) -> str:
    """The i-th model's colour for what lies between two lines: an interval."""
    red, green, blue = (int(colour(i)[j : j + 2], 16) for j in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.15)"


def styled(figure: go.Figure, *, title: str, height: int = 420, width: int | None = None) -> go.Figure:
    """The figure with the house layout.

    Args:
        title: of any length.
        width: None: the page's.
    """
    lines = textwrap.wrap(title, 88) or [""]
    figure.update_layout(
        template="plotly_white",
        title={"text": "<br>".join(lines), "font": {"size": 16}},
        autosize=True,
        height=height + 20 * (len(lines) - 1),
        margin={"l": 70, "r": 30, "t": 50 + 20 * len(lines), "b": 60},
        font={"size": 12},
    )
    return figure if width is None else figure.update_layout(width=width)


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


def shown(token: str) -> str:
    """A token's text in a figure, where < and & would be read as markup."""
    from .html import visible

    text = visible(token, 16).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return text.replace(" ", "\u00a0")  # blanks at the ends would be dropped


def layer_axis(n: int) -> dict[str, Any]:
    """An axis of layers, the first at the top, where TransformerLens' demos have it."""
    return {"autorange": "reversed", "tickvals": list(range(0, n, max(1, math.ceil(n / 16)))), "title_text": "layer"}


def log_axis(values: Iterable[float | int]) -> dict[str, Any]:
    """A logarithmic axis over these values, its ticks whole numbers such as 0.2, 1, 50 written out."""
    sizes = [value for value in values if 0 < value < math.inf]
    if not sizes:
        return {"type": "log"}
    low, high = math.floor(math.log10(min(sizes))), math.ceil(math.log10(max(sizes)))
    decades = range(low, high + 1)
    step = max(1, math.ceil(len(decades) / 8))
    ticks = [10.0**d for d in decades[::step]]
    if len(decades) <= 3:
        ticks = [digit * 10.0**d for d in decades for digit in (1, 2, 5)]
    texts = [f"{tick:,.0f}" if 1 <= tick < 1e6 else f"{tick:g}" for tick in ticks]
    axis = {"type": "log", "tickvals": ticks, "ticktext": texts, "minor": {"ticks": "", "showgrid": False}}
    if (
        sum(min(sizes) <= tick <= max(sizes) for tick in ticks) < 2
    ):  # as far as the ticks around them, lest there be none
        ends = max(t for t in ticks if t <= min(sizes) * 1.001), min(t for t in ticks if t >= max(sizes) * 0.999)
        axis["range"] = [math.log10(end) + sign * 0.03 for end, sign in zip(ends, (-1, 1))]
    return axis
