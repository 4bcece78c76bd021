"""Figures of edges: heatmaps of senders by receivers, a row for each method, a column for each model."""

from __future__ import annotations

from collections.abc import Mapping

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ..patching.edges import EdgeEffect
from .style import DIVERGING, styled


def edge_heatmaps(panels: Mapping[tuple[str, str], EdgeEffect], *, unit: str, title: str) -> go.Figure:
    """Heatmaps of the mean effects of edges on one colour scale centred on zero; blank where there is no edge.

    The scale is that of the first method's effects.

    Args:
        panels: (method, model) -> effects.
        unit: of the effects, for the colour bar.
        title: of the figure.

    Example:
        >>> from lnfree_interp import edge_attribution, induction_pairs, load_model
        >>> model = load_model("tiny-noLN")
        >>> effect = edge_attribution(model, induction_pairs(model, 2, length=8))
        >>> len(edge_heatmaps({("gradient", "tiny-noLN"): effect}, unit="logits", title="").data)
        1
    """
    methods = list(dict.fromkeys(method for method, _ in panels))
    models = list(dict.fromkeys(model for _, model in panels))
    means = {
        key: effect.values.detach().double().mean(0).cpu().masked_fill(~effect.edges.cpu(), float("nan"))
        for key, effect in panels.items()
    }
    most = max(m.nan_to_num().abs().max().item() for (method, _), m in means.items() if method == methods[0]) or 1.0
    beyond = any(mean.nan_to_num().abs().max().item() > most for mean in means.values())
    rows = max(len(effect.receivers) for effect in panels.values())
    each = min(900, max(320, 9 * rows))
    height = 130 + len(methods) * (each + 50)
    figure = make_subplots(
        rows=len(methods),
        cols=len(models),
        subplot_titles=[f"{model}: {method}" if model else method for method in methods for model in models],
        horizontal_spacing=0.09 / len(models),
        vertical_spacing=0.9 * 50 / height,
    )
    for (method, model), effect in panels.items():
        row, col = methods.index(method) + 1, models.index(model) + 1
        figure.add_trace(
            go.Heatmap(
                z=means[method, model].T.float().numpy(),
                x=list(effect.senders),
                y=list(effect.receivers),
                coloraxis="coloraxis",
                hoverongaps=False,
                hovertemplate=f"%{{x}} → %{{y}}: %{{z:.4f}} {unit}<extra>{model}: {method}</extra>",
            ),
            row=row,
            col=col,
        )
        last = row == len(methods)
        title_text = "sender" if last else None
        figure.update_xaxes(title_text=title_text, tickangle=-90, showticklabels=last, row=row, col=col)
        same = effect.receivers == panels[method, models[0]].receivers
        title_text = "receiver" if col == 1 else None
        figure.update_yaxes(title_text=title_text, showticklabels=col == 1 or not same, row=row, col=col)
    bar = {"title": f"{unit}<br>(beyond: darkest)" if beyond else unit}
    figure.update_layout(
        coloraxis={"colorscale": DIVERGING, "cmid": 0, "cmin": -most, "cmax": most, "colorbar": bar},
        plot_bgcolor="#e8e8e8",
    )
    return styled(figure, title=title, height=height)
