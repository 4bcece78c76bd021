"""The figure of explanations: what logits come from, models below each other."""

from __future__ import annotations

import math
from collections.abc import Mapping

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ..explaining.result import Explanation
from .style import COLOURS, WIDTH, plain, styled

# Components that are drawn.
TOP = 12


def explanation_figure(found: Mapping[str, Explanation], *, title: str | None = None) -> go.Figure:
    """A column for each model: attribution beside exact effect of the largest heads and MLPs, and below what came from
    each token.

    Example:
        >>> from lnfree_interp import explain
        >>> figure = explanation_figure({"tiny-noLN": explain("tiny-noLN", "She put on", " her", versus=" his")})
        >>> len(figure.data)
        3
    """
    names, first = list(found), next(iter(found.values()))
    tokens = any(one.by_token is not None for one in found.values())
    shown, several = ("components", "from each token")[: 1 + tokens], len(names) > 1
    figure = make_subplots(
        rows=1 + tokens,
        cols=len(names),
        subplot_titles=[f"{name}: {what}" if several else what for what in shown for name in names],
        row_heights=[0.68, 0.32][: 1 + tokens],
        vertical_spacing=0.16,
        horizontal_spacing=0.14 / len(names) + 0.03 * (len(names) > 1),
    )
    for col, (name, one) in enumerate(found.items(), 1):
        rows = _largest(one)
        for i, (kind, column) in enumerate((("attribution", 1), ("exact effect", 2))):
            bars = go.Bar(
                y=[row[0] for row in rows],
                x=[row[column] for row in rows],
                name=kind,
                legendgroup=kind,
                showlegend=col == 1,
                orientation="h",
                marker_color=COLOURS[(1, 2)[i]],
                hovertemplate=f"%{{y}}: %{{x:.4f}} logits<extra>{name}: {kind}</extra>",
            )
            figure.add_trace(bars, row=1, col=col)
        figure.update_xaxes(title_text="logits", row=1, col=col)
        figure.update_yaxes(dtick=1, row=1, col=col)
        if one.by_token is None:
            continue
        labels = [f"{i} {plain(text).strip() or '␣'}" for i, text in enumerate(one.strings)]
        bars = go.Bar(
            x=list(range(len(labels))),
            y=one.by_token.tolist(),
            customdata=labels,
            marker_color=COLOURS[0],
            showlegend=False,
            hovertemplate=f"%{{customdata}}: %{{y:.4f}} logits<extra>{name}: from this token</extra>",
        )
        figure.add_trace(bars, row=2, col=col)
        step = max(1, math.ceil(14 * len(labels) * len(names) / (WIDTH - 150)))
        ticks = list(range(0, len(labels), step))
        figure.update_xaxes(
            tickvals=ticks, ticktext=[labels[i] for i in ticks], tickangle=-90, title_text=None, row=2, col=col
        )
        figure.update_yaxes(title_text="logits", row=2, col=col)
    of = f" in {names[0]}" if len(names) == 1 else ""
    told = plain(f"{first.what}{of}: where it comes from") if title is None else title
    figure = styled(figure, title=told, height=220 + 20 * TOP + 190 * tokens)
    return figure.update_layout(margin={"b": 90}) if tokens else figure


def _largest(found: Explanation) -> list[tuple[str, float, float]]:
    """The largest heads and other components, the largest last: bars are drawn upwards."""
    heads = found.parts("head")
    others = [row for row in found.parts("component") if not (heads and row[0].endswith(".attn"))]
    return sorted([*heads, *others], key=lambda row: abs(row[1]))[-TOP:]
