"""The figures of real_model.py, each of its tables alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import common
from real_model_page import TITLES

from lnfree_interp.figures.style import COLOURS, MARK, log_axis, styled

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

SHARES = {"less than 10%": "#bbbbbb", "10% to 50%": "#E69F00", "more than 50%": "#D55E00"}
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x")


def attribution(table: pd.DataFrame) -> go.Figure:
    """Each head's mean attribution against its direct effect; pooled errors; each head's error, by layer."""
    from plotly.subplots import make_subplots

    titles = ("each head, mean over tokens", "pooled error", "error of each head, by layer")
    fig = make_subplots(cols=3, column_widths=[0.34, 0.26, 0.4], horizontal_spacing=0.1, subplot_titles=titles)
    heads, pooled = table[table.component != "pooled"], table[table.component == "pooled"]
    most = 1.08 * heads[["attribution", "direct_effect"]].abs().max().max()
    fig.add_scatter(x=[-most, most], y=[-most, most], line=MARK, mode="lines", showlegend=False, row=1, col=1)
    for i, (target, part) in enumerate(heads.groupby("target", sort=False), 1):
        marker = {"color": COLOURS[i], "size": 6, "symbol": f"{SYMBOLS[i]}-open"}
        hover = "%{text}: attribution %{y:.3f} logits, direct effect %{x:.3f}<extra>" + str(target) + "</extra>"
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
        hover = "logit of the %{x}: error %{y:.1%}<extra></extra>"
        fig.add_bar(**bar, **text, hovertemplate=hover, marker_color=COLOURS[i], showlegend=False, row=1, col=2)
        layer = part.component.str.extract(r"L(\d+)H", expand=False).astype(int)
        hover = "%{text}: error %{y:.1%}<extra>" + str(target) + "</extra>"
        dots = {"x": layer + 0.25 * (i - 2), "y": part.nmae, "text": part.component, "hovertemplate": hover}
        fig.add_scatter(**dots, mode="markers", marker=marker, showlegend=False, row=1, col=3)
    fig.update_xaxes(title_text="direct effect (logits)", row=1, col=1)
    fig.update_yaxes(title_text="attribution (logits)", title_standoff=2, row=1, col=1)
    fig.update_xaxes(showticklabels=False, row=1, col=2)  # the legend says which is which
    fig.update_yaxes(title_text="mean |difference| / mean |effect|", title_standoff=2, row=1, col=2)
    fig.update_yaxes(tickformat=".0%", rangemode="tozero", row=1, col=2)
    fig.update_xaxes(title_text="layer", row=1, col=3)
    fig.update_yaxes(**log_axis(heads.nmae, percent=True), row=1, col=3)
    return styled(fig, title="Direct logit attribution against direct effect, attention heads, by target", height=400)


def patching(table: pd.DataFrame) -> go.Figure:
    """Relative error and correlation of every method at every site, all layers together; two rows per task."""
    from plotly.subplots import make_subplots

    table = table[table.layer.astype(str) == "all"]
    tasks, sites, methods = (list(table[c].unique()) for c in ("pairs", "site", "method"))
    measures = {"relative": "relative error", "pearson": "correlation with activation patching"}
    panels = [(task, measure) for task in tasks for measure in measures]
    titles = [f"{TITLES[task]}: {measures[measure]}" for task, measure in panels]
    height = 120 + 225 * len(panels)
    fig = make_subplots(rows=len(panels), shared_xaxes=True, subplot_titles=titles, vertical_spacing=50 / height)
    for row, (task, measure) in enumerate(panels, 1):
        for i, method in enumerate(methods):
            part = table[(table.method == method) & (table.pairs == task)]
            values, low, high = part[measure], part[f"{measure}_low"], part[f"{measure}_high"]
            fig.add_scatter(
                x=[sites.index(s) + 0.13 * (i - (len(methods) - 1) / 2) for s in part.site],
                y=values,
                error_y=common.bars(values, low, high) | {"width": 0, "thickness": 1},
                text=part.site,
                hovertemplate=f"%{{text}}: {measures[measure]} %{{y:.3f}}<extra>{method}, {TITLES[task]}</extra>",
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
            fig.update_yaxes(title_text="sum |error| / sum |effect|", row=row)
        else:
            fig.update_yaxes(title_text="correlation", row=row)
            fig.update_yaxes(range=[max(-1.0, min(0.0, table.pearson_low.min())) - 0.05, 1.05], row=row)
        for edge in range(1, len(sites)):
            fig.add_vline(x=edge - 0.5, line={"color": "#dddddd", "width": 1}, row=row, col=1)
    fig.update_xaxes(tickvals=list(range(len(sites))), ticktext=sites, showgrid=False, zeroline=False)
    fig.update_xaxes(range=[-0.5, len(sites) - 0.5], showticklabels=True)
    title = "Estimates against activation patching, all layers together [95% over prompts]"
    return styled(fig, title=title, height=height)


def patching_layers(table: pd.DataFrame, task: str) -> go.Figure:
    """Relative error of every method in every layer, a panel per site."""
    import numpy as np
    from plotly.subplots import make_subplots

    table = table[(table.pairs == task) & (table.layer.astype(str) != "all")]
    sites, methods, cols = list(table.site.unique()), list(table.method.unique()), 4
    rows = -(-len(sites) // cols)
    height = 110 + 190 * rows
    fig = make_subplots(
        rows=rows,
        cols=cols,
        subplot_titles=sites,
        shared_xaxes=True,
        shared_yaxes=True,
        horizontal_spacing=0.025,
        vertical_spacing=40 / height if rows > 1 else 0,
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
                hovertemplate="layer %{x}: relative error %{customdata:.3f}<extra>" + f"{method}, {site}" + "</extra>",
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
    return styled(fig, title=title, height=height)


def _log(low: float, high: float) -> dict:
    from math import log10

    return {"type": "log", "range": [log10(low), log10(high)]}


def neurons(table: pd.DataFrame) -> go.Figure:
    """Every neuron's effect against its score; of the top ones what acts through the scale, and with it frozen."""
    from plotly.subplots import make_subplots

    titles = ("every neuron of the layer, alone", "those of the highest scores, each alone")
    fig = make_subplots(cols=2, column_widths=[0.48, 0.52], horizontal_spacing=0.13, subplot_titles=titles)
    scan, single = table[table.kind == "scan"], table[table.kind == "single"]
    share = (scan.loss_abs_through_scale / scan.loss_abs.where(scan.loss_abs > 0)).fillna(0)
    parts = {"less than 10%": share < 0.1, "10% to 50%": share.between(0.1, 0.5), "more than 50%": share > 0.5}
    for name, there in parts.items():
        part, kind = scan[there], f"{name} through the scale"
        hover = "neuron %{text}: %{y:.2g} nats, score %{x:.3g}, %{customdata:.0%} through the scale<extra></extra>"
        dots = {"x": part.score, "y": part.loss_abs, "text": part.neuron, "customdata": share[there]}
        marker = {"color": SHARES[name], "size": 5 if "more" not in name else 8, "opacity": 0.7}
        fig.add_scatter(**dots, mode="markers", marker=marker, name=kind, hovertemplate=hover, row=1, col=1)
    shown = {"loss_abs": "in all", "loss_abs_through_scale": "through the scale", "loss_abs_frozen": "scale frozen"}
    for i, (column, name) in enumerate(shown.items()):
        hover = "neuron %{x}: %{y:.2g} nats<extra>" + name + "</extra>"
        bars = {"x": single.neuron.astype(str), "y": single[column], "name": name, "hovertemplate": hover}
        fig.add_bar(**bars, marker_color=("#555555", "#D55E00", "#56B4E9")[i], row=1, col=2)
    nats = "mean |change of loss| (nats)"
    fig.update_xaxes(title_text="score: |w_out| / LogitVar", **log_axis(scan.score), row=1, col=1)
    fig.update_yaxes(title_text=nats, **log_axis(scan.loss_abs), row=1, col=1)
    fig.update_xaxes(title_text="neuron, by falling score", type="category", tickangle=-90, row=1, col=2)
    fig.update_yaxes(title_text=nats, rangemode="tozero", title_standoff=4, row=1, col=2)
    fig.update_layout(barmode="group")
    return styled(fig, title="Neurons of the last MLP, set to their mean", height=430)


def norms(table: pd.DataFrame, sinks: pd.DataFrame, massive: float) -> go.Figure:
    """Root mean square of the residual stream by group, and how many tokens are massive; attention on position 0."""
    from plotly.subplots import make_subplots

    titles = ("residual stream (RMS)", "massive tokens", "attention on position 0, each head")
    fig = make_subplots(cols=3, column_widths=[0.36, 0.24, 0.4], horizontal_spacing=0.11, subplot_titles=titles)
    n = table.groupby("layer").tokens.sum() - table[table.group == "position 0"].set_index("layer").tokens
    for i, (group, part) in enumerate(table.groupby("group", sort=False)):
        name = f"massive (over {massive:g} times the median)" if group == "massive" else group
        curve = {"x": part.layer, "y": part.rms, "mode": "lines+markers", "marker": {"size": 4}}
        hover = "after layer %{x}: RMS %{y:.4g}<extra>" + name + "</extra>"
        look = {"line": {"color": COLOURS[i], "width": 2}, "hovertemplate": hover}
        fig.add_scatter(**curve, **look, name=name, row=1, col=1)
        if group == "massive":
            share = part.tokens.to_numpy() / n[part.layer].to_numpy()
            hover = "after layer %{x}: %{y:.2%} of the tokens<extra></extra>"
            bars = {"x": part.layer, "y": share, "hovertemplate": hover, "marker_color": COLOURS[i]}
            fig.add_bar(**bars, showlegend=False, row=1, col=2)
    layer = sinks["head"].str.extract(r"L(\d+)H", expand=False).astype(int)
    hover = "%{text}: %{y:.3f} of its attention on position 0<extra></extra>"
    marker = {"color": COLOURS[3], "size": 5, "opacity": 0.7}
    dots = {"x": layer, "y": sinks.attention, "text": sinks["head"], "hovertemplate": hover, "mode": "markers"}
    fig.add_scatter(**dots, marker=marker, showlegend=False, row=1, col=3)
    fig.add_hline(y=0.3, line=MARK, row=1, col=3, annotation_text="a sink", annotation_font_size=11)
    last = int(table.layer.max())
    fig.update_xaxes(title_text="after layer", range=[-1.8, last + 0.8])
    fig.update_xaxes(title_text="layer", row=1, col=3)
    fig.update_yaxes(title_text="root mean square", **log_axis(table.rms), row=1, col=1)
    fig.update_yaxes(title_text="share of tokens", tickformat=".1~%", rangemode="tozero", row=1, col=2)
    fig.update_yaxes(title_text="attention", range=[0, 1.02], row=1, col=3)
    fig.update_yaxes(title_standoff=4)
    return styled(fig, title="Massive tokens and attention sinks", height=400)
