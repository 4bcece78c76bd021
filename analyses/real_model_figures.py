"""The figures of real_model.py, each of its tables alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import common
from real_model_page import TITLES

from lnfree_interp.figures.style import COLOURS, styled

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

WIDTH = 800
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x")
LEGEND = {"orientation": "h", "yref": "container", "y": 0.01, "yanchor": "bottom", "x": 0}


def _finished(figure: go.Figure, title: str, height: int, bottom: int = 110) -> go.Figure:
    styled(figure, title=title, height=height, width=WIDTH)
    figure.update_annotations(font_size=13)
    return figure.update_layout(legend=LEGEND, margin={"l": 65, "r": 20, "t": 75, "b": bottom})


def attribution(table: pd.DataFrame) -> go.Figure:
    """Each head's mean attribution against its direct effect; pooled errors; each head's error, by layer."""
    from plotly.subplots import make_subplots

    titles = ("each head, mean (logits)", "pooled error", "error of each head, by layer")
    fig = make_subplots(cols=3, column_widths=[0.34, 0.26, 0.4], horizontal_spacing=0.1, subplot_titles=titles)
    heads, pooled = table[table.component != "pooled"], table[table.component == "pooled"]
    most = 1.08 * heads[["attribution", "direct_effect"]].abs().max().max()
    diagonal = {"x": [-most, most], "y": [-most, most], "line": {"color": "#bbbbbb", "dash": "dot"}}
    fig.add_scatter(**diagonal, mode="lines", showlegend=False, row=1, col=1)
    for i, (target, part) in enumerate(heads.groupby("target", sort=False), 1):
        marker = {"color": COLOURS[i], "size": 6, "symbol": f"{SYMBOLS[i]}-open"}
        hover = "%{text}: attribution %{y:.3f}, direct effect %{x:.3f}<extra>" + str(target) + "</extra>"
        dots = {"x": part.direct_effect, "y": part.attribution, "text": part.component, "hovertemplate": hover}
        fig.add_scatter(**dots, mode="markers", marker=marker, name=str(target), row=1, col=1)
        row = pooled[pooled.target == target]
        bar = {"x": [str(target)], "y": row.nmae, "error_y": common.bars(row.nmae, row.low, row.high)}
        text = {
            "text": [f"{v:.1%}" for v in row.nmae],
            "textposition": "inside",
            "insidetextanchor": "start",
            "textangle": 0,
        }
        fig.add_bar(**bar, **text, marker_color=COLOURS[i], showlegend=False, row=1, col=2)
        layer = part.component.str.extract(r"L(\d+)H", expand=False).astype(int)
        hover = "%{text}: %{y:.1%}<extra>" + str(target) + "</extra>"
        dots = {"x": layer + 0.25 * (i - 2), "y": part.nmae, "text": part.component, "hovertemplate": hover}
        fig.add_scatter(**dots, mode="markers", marker=marker, showlegend=False, row=1, col=3)
    fig.update_xaxes(title_text="direct effect", row=1, col=1)
    fig.update_yaxes(title_text="attribution", title_standoff=2, row=1, col=1)
    fig.update_xaxes(showticklabels=False, row=1, col=2)  # the legend says which is which
    fig.update_yaxes(tickformat=".0%", rangemode="tozero", row=1, col=2)
    fig.update_xaxes(title_text="layer", row=1, col=3)
    fig.update_yaxes(type="log", dtick="D2", tickformat="~%", row=1, col=3)
    return _finished(fig, "Direct logit attribution against direct effect, attention heads", 430)


def patching(table: pd.DataFrame) -> go.Figure:
    """Relative error and correlation of every method at every site, all layers together; two rows per task."""
    from plotly.subplots import make_subplots

    table = table[table.layer.astype(str) == "all"]
    tasks, sites, methods = (list(table[c].unique()) for c in ("pairs", "site", "method"))
    measures = {"relative": "relative error", "pearson": "correlation with activation patching"}
    panels = [(task, measure) for task in tasks for measure in measures]
    titles = [f"{TITLES[task]}: {measures[measure]}" for task, measure in panels]
    fig = make_subplots(rows=len(panels), shared_xaxes=True, subplot_titles=titles, vertical_spacing=0.05)
    for row, (task, measure) in enumerate(panels, 1):
        for i, method in enumerate(methods):
            part = table[(table.method == method) & (table.pairs == task)]
            values, low, high = part[measure], part[f"{measure}_low"], part[f"{measure}_high"]
            fig.add_scatter(
                x=[sites.index(s) + 0.13 * (i - (len(methods) - 1) / 2) for s in part.site],
                y=values,
                error_y=common.bars(values, low, high) | {"width": 0, "thickness": 1},
                text=part.site,
                hovertemplate="%{text}: %{y:.3f}<extra>" + f"{method}, {TITLES[task]}" + "</extra>",
                mode="markers",
                marker={"color": COLOURS[i], "symbol": SYMBOLS[i], "size": 7},
                name=method,
                legendgroup=method,
                showlegend=row == 1,
                row=row,
                col=1,
            )
        if measure == "relative":
            low, high = max(0.003, table.relative.min() * 0.7), min(max(1.5, table.relative.max() * 1.4), 30)
            ticks = [t for t in (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30) if low <= t <= high]
            fig.update_yaxes(**_log(low, high), tickvals=ticks, ticktext=[f"{t:g}" for t in ticks], row=row)
        else:
            fig.update_yaxes(range=[min(0.0, table.pearson.min()) - 0.05, 1.05], row=row)
        for edge in range(1, len(sites)):
            fig.add_vline(x=edge - 0.5, line={"color": "#dddddd", "width": 1}, row=row, col=1)
    fig.update_xaxes(tickvals=list(range(len(sites))), ticktext=sites, showgrid=False, zeroline=False)
    fig.update_xaxes(range=[-0.5, len(sites) - 0.5], showticklabels=True)
    return _finished(fig, "Estimates against activation patching, all layers together", 160 + 220 * len(panels), 80)


def patching_layers(table: pd.DataFrame, task: str) -> go.Figure:
    """Relative error of every method in every layer, a panel per site."""
    import numpy as np
    from plotly.subplots import make_subplots

    table = table[(table.pairs == task) & (table.layer.astype(str) != "all")]
    sites, methods, cols = list(table.site.unique()), list(table.method.unique()), 4
    rows = -(-len(sites) // cols)
    fig = make_subplots(
        rows=rows,
        cols=cols,
        subplot_titles=sites,
        shared_xaxes=True,
        shared_yaxes=True,
        horizontal_spacing=0.025,
        vertical_spacing=0.13 / max(1, rows - 1) if rows > 1 else 0,
    )
    low, high = 0.003, 10
    seen = set()
    for n, site in enumerate(sites):
        for i, method in enumerate(methods):
            part = table[(table.site == site) & (table.method == method)]
            if len(part) == 0:
                continue
            fig.add_scatter(
                x=part.layer.astype(int),
                # What no cell of a layer does has no error; what is beyond the panel is drawn at its edge.
                y=part.relative.replace([np.inf, 0], np.nan).clip(low, high),
                customdata=part.relative,
                hovertemplate="layer %{x}: %{customdata:.3f}<extra>" + f"{method}, {site}" + "</extra>",
                mode="lines",
                line={"color": COLOURS[i], "width": 1.6},
                name=method,
                legendgroup=method,
                showlegend=method not in seen,
                row=n // cols + 1,
                col=n % cols + 1,
            )
            seen.add(method)
        fig.update_xaxes(showticklabels=n + cols >= len(sites), row=n // cols + 1, col=n % cols + 1)
    ticks = (0.01, 0.1, 1, 10)
    fig.update_yaxes(**_log(low, high), tickvals=ticks, ticktext=[f"{t:g}" for t in ticks])
    fig.update_yaxes(title_text="relative error", col=1)
    for n in range(max(0, len(sites) - cols), len(sites)):
        fig.update_xaxes(title_text="layer", title_standoff=4, row=n // cols + 1, col=n % cols + 1)
    title = f"Estimates against activation patching, layer by layer, {TITLES[task]}"
    return _finished(fig, title, 150 + 190 * rows, bottom=95)


def _log(low: float, high: float) -> dict:
    from math import log10

    return {"type": "log", "range": [log10(low), log10(high)]}


def neurons(table: pd.DataFrame) -> go.Figure:
    """Every neuron's effect against its score; of the top ones what acts through the scale, and with it frozen."""
    from plotly.subplots import make_subplots

    titles = ("every neuron of the last layer", "the highest scores, each alone")
    fig = make_subplots(cols=2, column_widths=[0.45, 0.55], horizontal_spacing=0.22, subplot_titles=titles)
    scan, single = table[table.kind == "scan"], table[table.kind == "single"]
    share = (scan.loss_abs_through_scale / scan.loss_abs.where(scan.loss_abs > 0)).fillna(0)
    bar = {"title": {"text": "through<br>the scale"}, "tickformat": ".0%", "x": 0.36, "thickness": 10}
    marker = {"color": share, "colorscale": "Viridis", "cmin": 0, "cmax": 1, "size": 4, "colorbar": bar}
    hover = "neuron %{text}: %{y:.2g} nats, score %{x:.3g}, %{marker.color:.0%} through the scale<extra></extra>"
    dots = {"x": scan.score, "y": scan.loss_abs, "text": scan.neuron, "hovertemplate": hover}
    fig.add_scatter(**dots, mode="markers", marker=marker, showlegend=False, row=1, col=1)
    shown = {"loss_abs": "in all", "loss_abs_through_scale": "through the scale", "loss_abs_frozen": "scale frozen"}
    for i, (column, name) in enumerate(shown.items()):
        hover = "neuron %{x}: %{y:.2g} nats<extra>" + name + "</extra>"
        bars = {"x": single.neuron.astype(str), "y": single[column], "name": name, "hovertemplate": hover}
        fig.add_bar(**bars, marker_color=COLOURS[i], row=1, col=2)
    nats = "mean |change of loss| (nats)"
    fig.update_xaxes(title_text="score: |w_out| / LogitVar", type="log", dtick="D2", tickformat="~s", row=1, col=1)
    fig.update_yaxes(title_text=nats, type="log", dtick="D2", tickformat="~g", row=1, col=1)
    fig.update_xaxes(title_text="neuron, by falling score", type="category", row=1, col=2)
    fig.update_yaxes(title_text=nats, rangemode="tozero", title_standoff=4, row=1, col=2)
    fig.update_layout(barmode="group")
    return _finished(fig, "Neurons of the last MLP set to their mean", 430)


def norms(table: pd.DataFrame, sinks: pd.DataFrame, massive: float) -> go.Figure:
    """Root mean square of the residual stream by group, and how many tokens are massive; attention on position 0."""
    from plotly.subplots import make_subplots

    titles = ("residual stream (RMS)", "massive tokens", "attention on position 0, each head")
    fig = make_subplots(cols=3, column_widths=[0.38, 0.22, 0.4], horizontal_spacing=0.08, subplot_titles=titles)
    n = table.groupby("layer").tokens.sum() - table[table.group == "position 0"].set_index("layer").tokens
    for i, (group, part) in enumerate(table.groupby("group", sort=False)):
        name = f"massive (over {massive:g} times the median)" if group == "massive" else group
        curve = {"x": part.layer, "y": part.rms, "mode": "lines+markers", "marker": {"size": 4}}
        fig.add_scatter(**curve, name=name, line={"color": COLOURS[i], "width": 2}, row=1, col=1)
        if group == "massive":
            share = part.tokens.to_numpy() / n[part.layer].to_numpy()
            fig.add_bar(x=part.layer, y=share, marker_color=COLOURS[i], showlegend=False, row=1, col=2)
    layer = sinks["head"].str.extract(r"L(\d+)H", expand=False).astype(int)
    hover = "%{text}: %{y:.3f}<extra></extra>"
    marker = {"color": COLOURS[3], "size": 5, "opacity": 0.7}
    dots = {"x": layer, "y": sinks.attention, "text": sinks["head"], "hovertemplate": hover, "mode": "markers"}
    fig.add_scatter(**dots, marker=marker, showlegend=False, row=1, col=3)
    fig.add_hline(y=0.3, line={"dash": "dot", "color": "#999999"}, row=1, col=3)
    last = int(table.layer.max())
    fig.update_xaxes(title_text="after layer", range=[-1.8, last + 0.8])
    fig.update_xaxes(title_text="layer", row=1, col=3)
    ticks = [t for t in (0.01, 0.1, 1, 10, 100, 1000, 10000) if table.rms.min() / 3 < t < table.rms.max() * 3]
    fig.update_yaxes(type="log", tickvals=ticks, ticktext=[f"{t:g}" for t in ticks], row=1, col=1)
    fig.update_yaxes(tickformat=".1%", rangemode="tozero", row=1, col=2)
    fig.update_yaxes(range=[0, 1.02], row=1, col=3)
    return _finished(fig, "Massive tokens and attention sinks", 430)
