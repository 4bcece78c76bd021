"""Figures of residual norms and attention sinks."""

from __future__ import annotations

from collections.abc import Mapping

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ..norms import AttentionSinks, ResidualNorms
from .style import colour, line, log_axis, styled


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
    figure = make_subplots(
        rows=len(groups),
        cols=3,
        shared_xaxes=True,
        row_titles=groups,
        column_titles=list(quantities.values()),
        vertical_spacing=0.05,
    )
    for i, (name, result) in enumerate(results.items()):
        k = result.statistics.index(statistic)
        for row, group in enumerate(groups, 1):
            for col, quantity in enumerate(quantities, 1):
                values = getattr(result, quantity)[:, result.groups.index(group), k]
                figure.add_trace(
                    go.Scatter(
                        x=list(result.points),
                        y=values.tolist(),
                        name=name,
                        legendgroup=name,
                        mode="lines+markers",
                        showlegend=row == col == 1,
                        line=line(i),
                        marker={"size": 4},
                        hovertemplate="%{x}: %{y:.4g}<extra>" + f"{name}, {group}" + "</extra>",
                    ),
                    row=row,
                    col=col,
                )
    figure.update_yaxes(**log_axis(y for trace in figure.data[::3] for y in trace.y), col=1)
    figure.update_xaxes(tickangle=-90)
    figure.update_layout(legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1.05, "yanchor": "bottom"})
    figure = styled(figure, title=f"Residual stream ({statistic} over sequences)", height=190 + 230 * len(groups))
    return figure.update_layout(margin={"t": 100})


def _over_positions(results: Mapping[str, ResidualNorms], statistic: str) -> go.Figure:
    figure = go.Figure()
    for i, (name, result) in enumerate(results.items()):
        values = result.norm[-1, :, result.statistics.index(statistic)]
        hover = "position %{x}: %{y:.4g}<extra>" + name + "</extra>"
        figure.add_trace(go.Scatter(y=values.tolist(), name=name, line=line(i), hovertemplate=hover))
    figure.update_yaxes(**log_axis(y for trace in figure.data for y in trace.y), title_text="L2 norm")
    figure.update_xaxes(title_text="position")
    last = next(iter(results.values())).points[-1]
    return styled(figure, title=f"Norm of the residual stream at {last} ({statistic} over sequences)")


def sinks_figure(results: Mapping[str, AttentionSinks]) -> go.Figure:
    """Mean attention on position 0 of every head, layer by layer, with each model's sink rate in the legend.

    The axis ends a little above the largest, or the threshold: where nothing is a sink, heads are still told apart.

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
    figure.add_hline(y=threshold, line={"dash": "dot", "color": "#999999"})
    most = max(threshold, *(result.attention.max().item() for result in results.values()))
    figure.update_yaxes(title_text="attention on position 0", range=[0, min(1.02, 1.12 * most)])
    figure.update_xaxes(title_text="layer")
    figure.update_layout(boxmode="group", legend={"orientation": "h", "y": 1.12, "x": 0})
    return styled(figure, title=f"Attention sinks (at least {threshold:g} on position 0)")
