"""Figures of patching: heatmaps of effects, exact above and estimated below, models side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots
from torch import Tensor

from .style import DIVERGING, WIDTH, styled


def effect_heatmaps(
    panels: Mapping[tuple[str, str], Float[Tensor, "layer unit"]],
    *,
    layers: Sequence[int],
    labels: Sequence[str],
    axis: str,
    unit: str,
    title: str,
) -> go.Figure:
    """Heatmaps of effects on one colour scale centred on zero: a row for each method, a column for each model.

    The scale is that of the first method's effects.

    Args:
        panels: (method, model) -> mean effect, Float[Tensor, "layer unit"].
        layers: of the rows of each panel.
        labels: of the columns: tokens for positions, numbers for heads and neurons.
        axis: what the columns are: pos, head or neuron.
        unit: of the effects, for the colour bar.
        title: of the figure.

    Example:
        >>> from lnfree_interp import activation_patching, attribution_patching, induction_pairs, load_model
        >>> model = load_model("tiny")
        >>> pairs = induction_pairs(model, 2, length=8)
        >>> panels = {
        ...     ("activation", "tiny"): activation_patching(model, pairs).values.mean(0),
        ...     ("gradient", "tiny"): attribution_patching(model, pairs).values.mean(0),
        ... }
        >>> labels = [str(i) for i in range(8)]
        >>> figure = effect_heatmaps(panels, layers=range(4), labels=labels, axis="pos", unit="logits", title="")
        >>> len(figure.data)
        2
    """
    methods = list(dict.fromkeys(method for method, _ in panels))
    models = list(dict.fromkeys(model for _, model in panels))
    # Colours end at the largest effect of the first method, the exact one: a wild estimate must not wash it out.
    most = max(panel.abs().max().item() for (method, _), panel in panels.items() if method == methods[0]) or 1.0
    beyond = any(panel.abs().max().item() > most for panel in panels.values())
    # Space for titles and for tokens that stand on end, in pixels of the whole.
    each = max(130, 16 * len(layers))
    height = 150 + len(methods) * (each + 60)
    width = max(WIDTH, 150 + 250 * len(models))
    step = max(1, math.ceil(13 * len(labels) * len(models) / (width - 150)))
    ticks = list(range(0, len(labels), step))
    figure = make_subplots(
        rows=len(methods),
        cols=len(models),
        shared_xaxes=True,
        shared_yaxes=True,
        subplot_titles=[f"{model}: {method}" for method in methods for model in models],
        horizontal_spacing=0.02,
        vertical_spacing=min(45 / height, 0.9 / max(1, len(methods) - 1)),
    )
    for (method, model), panel in panels.items():
        row, col = methods.index(method) + 1, models.index(model) + 1
        heatmap = go.Heatmap(
            z=panel.float().cpu().numpy(),
            y=list(layers),
            coloraxis="coloraxis",
            xgap=1,
            ygap=1,
            customdata=[list(labels)] * len(layers),
            hovertemplate=f"layer %{{y}}, {axis} %{{customdata}}: %{{z:.4f}} {unit}<extra>{model}: {method}</extra>",
        )
        figure.add_trace(heatmap, row=row, col=col)
        figure.update_xaxes(
            row=row,
            col=col,
            tickmode="array",
            tickvals=ticks,
            ticktext=[labels[i] for i in ticks],
            tickangle=-90 if axis == "pos" else 0,
            title_text=axis if row == len(methods) else None,
        )
        figure.update_yaxes(row=row, col=col, title_text="layer" if col == 1 else None, dtick=max(1, len(layers) // 8))
    bar = {"title": f"{unit}<br>(beyond: darkest)" if beyond else unit}
    scale = {"colorscale": DIVERGING, "cmid": 0, "cmin": -most, "cmax": most, "colorbar": bar}
    figure.update_layout(coloraxis=scale)
    figure.update_annotations(font_size=12)
    figure = styled(figure, title=title, height=height, width=width)
    return figure.update_layout(margin={"b": 110, "t": 80, "l": 70, "r": 30})
