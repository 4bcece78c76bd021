"""Figures of residual norms and attention sinks."""

from __future__ import annotations

import math
from collections.abc import Mapping

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ..norms import AttentionSinks, ResidualNorms
from .style import MARK, colour, in_one, line, log_axis, styled

# What titles call a group.
_GROUPS = {"rest": "other positions"}


def norms_figure(results: Mapping[str, ResidualNorms], *, statistic: str = "mean") -> go.Figure:
    """Norm, growth and cosine similarity over the points of the stream, a row per group, a line per model.

    The first model is dashed, the others solid. Results per position are drawn over positions instead, one line
    per model at the last point.

    Example:
        >>> from lnfree_interp import load_model, residual_norms
        >>> models = {name: load_model(name) for name in ("tiny", "tiny-noLN")}
        >>> tokens = models["tiny"].to_tokens("It was a dark and stormy night.")
        >>> figure = norms_figure({name: residual_norms(model, tokens) for name, model in models.items()})
        >>> figure.data[0].line.dash
        'dash'
    """
    first = next(iter(results.values()))
    if first.groups[:2] == ("position 0", "position 1"):
        return _over_positions(results, statistic)
    groups = [g for i, g in enumerate(first.groups) if any(r.tokens[i] > 0 for r in results.values())]
    quantities = {"norm": "L2 norm", "growth": "norm / norm before", "cosine": "cosine with point before"}
    height = 110 + 215 * len(groups)
    figure = make_subplots(
        rows=len(groups),
        cols=3,
        shared_xaxes=True,
        subplot_titles=[f"{_GROUPS.get(group, group)}: {word}" for group in groups for word in quantities.values()],
        vertical_spacing=min(0.5, 40 / height) if len(groups) > 1 else 0,
        horizontal_spacing=0.07,
    )
    for i, (name, result) in enumerate(results.items()):
        k = result.statistics.index(statistic)
        for row, group in enumerate(groups, 1):
            for col, quantity in enumerate(quantities, 1):
                values = getattr(result, quantity)[:, result.groups.index(group), k]
                figure.add_trace(
                    go.Scatter(
                        x=list(range(len(result.points))),
                        y=values.tolist(),
                        text=list(result.points),
                        name=name,
                        legendgroup=name,
                        mode="lines+markers",
                        showlegend=row == col == 1,
                        line=line(i),
                        marker={"size": 4},
                        hovertemplate=f"%{{text}}: {quantities[quantity]} %{{y:.4g}}<extra>{name}, {group}</extra>",
                    ),
                    row=row,
                    col=col,
                )
    figure.update_yaxes(**log_axis(y for trace in figure.data[::3] for y in trace.y), col=1)
    step = max(1, math.ceil(len(first.points) / 13))
    ticks = {"tickvals": list(range(0, len(first.points), step)), "ticktext": list(first.points)[::step]}
    figure.update_xaxes(**ticks, tickangle=-90)
    return styled(figure, title=f"Residual stream{in_one(results)} ({statistic} over sequences)", height=height + 60)


def _over_positions(results: Mapping[str, ResidualNorms], statistic: str) -> go.Figure:
    figure = go.Figure()
    for i, (name, result) in enumerate(results.items()):
        values = result.norm[-1, :, result.statistics.index(statistic)]
        hover = "position %{x}: %{y:.4g}<extra>" + name + "</extra>"
        figure.add_trace(go.Scatter(y=values.tolist(), name=name, line=line(i), hovertemplate=hover))
    figure.update_yaxes(**log_axis(y for trace in figure.data for y in trace.y), title_text="L2 norm")
    figure.update_xaxes(title_text="position")
    last = next(iter(results.values())).points[-1]
    told = f"Norm of the residual stream at {last}{in_one(results)} ({statistic} over sequences)"
    return styled(figure, title=told)


def sinks_figure(results: Mapping[str, AttentionSinks]) -> go.Figure:
    """Mean attention on position 0 of every head, layer by layer, with each model's sink rate in the legend.

    The axis ends a little above the largest: where nothing is a sink, which is said, heads are still told apart.

    Example:
        >>> from lnfree_interp import attention_sinks, load_model
        >>> model = load_model("tiny")
        >>> sinks = attention_sinks(model, model.to_tokens("It was a dark and stormy night."))
        >>> len(sinks_figure({"tiny": sinks}).data)
        1
    """
    figure = go.Figure()
    for i, (name, result) in enumerate(results.items()):
        layers = [label.split("H")[0] for label in result.labels]
        figure.add_trace(
            go.Box(
                x=layers,
                y=result.attention.tolist(),
                text=list(result.labels),
                boxpoints="all",
                pointpos=0,
                jitter=0.4,
                name=f"{name} ({result.head_rate:.0%} of heads, {result.query_rate:.0%} of queries)",
                marker={"color": colour(i), "size": 4},
                line={"width": 1},
                hovertemplate="%{text}: %{y:.3f} of attention on position 0<extra>" + name + "</extra>",
            )
        )
    threshold = next(iter(results.values())).threshold
    most = max(result.attention.max().item() for result in results.values())
    if most >= threshold:
        figure.add_hline(y=threshold, line=MARK)
    figure.update_yaxes(title_text="attention on position 0", range=[0, min(1.02, 1.12 * most) or 1.0])
    figure.update_xaxes(title_text="layer")
    figure.update_layout(boxmode="group")
    told = "dotted" if most >= threshold else "no head is one"
    title = f"Attention of each head on position 0{in_one(results)}; a sink has at least {threshold:g} there ({told})"
    if len(results) == 1:
        title += f": {result.head_rate:.0%} of heads, {result.query_rate:.0%} of queries"
    return styled(figure, title=title)
