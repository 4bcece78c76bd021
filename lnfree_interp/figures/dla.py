"""Figures of direct logit attribution."""

from __future__ import annotations

from collections.abc import Mapping

import plotly.graph_objects as go
import torch
from jaxtyping import Float
from plotly.subplots import make_subplots
from torch import Tensor

from .style import DIVERGING, styled


def head_heatmaps(
    panels: Mapping[str, Float[Tensor, "layer head"]], *, title: str, unit: str = "logits", columns: int = 3
) -> go.Figure:
    """Layer x head heatmaps side by side on one colour scale centred on zero.

    Args:
        panels: subtitle -> Float[Tensor, "layer head"].
        title: of the figure.
        unit: of the values, for the colour bar.
        columns: panels per row.

    Example:
        >>> import torch
        >>> panels = {"direct effect": torch.randn(4, 4), "attribution": torch.randn(4, 4)}
        >>> len(head_heatmaps(panels, title="Heads", unit="logits").data)
        2
    """
    names = list(panels)
    n_rows = -(-len(names) // columns)
    most = max(panel.abs().max().item() for panel in panels.values()) or 1.0
    figure = make_subplots(
        rows=n_rows,
        cols=min(columns, len(names)),
        subplot_titles=names,
        horizontal_spacing=0.07,
        vertical_spacing=0.3 / max(1, n_rows),
    )
    for i, name in enumerate(names):
        values = panels[name].float().cpu().numpy()
        heatmap = go.Heatmap(
            z=values,
            coloraxis="coloraxis",
            xgap=1,
            ygap=1,
            hovertemplate="layer %{y}, head %{x}: %{z:.4f} " + unit + "<extra>" + name + "</extra>",
        )
        row, col = i // columns + 1, i % columns + 1
        figure.add_trace(heatmap, row=row, col=col)
        figure.update_xaxes(title_text="head", row=row, col=col, dtick=max(1, values.shape[1] // 8))
        figure.update_yaxes(
            title_text="layer" if col == 1 else None, row=row, col=col, dtick=max(1, values.shape[0] // 8)
        )
    n_layers = next(iter(panels.values())).shape[0]
    height = 130 + n_rows * max(230, 18 * n_layers + 90)
    figure.update_layout(
        coloraxis={"colorscale": DIVERGING, "cmid": 0, "cmin": -most, "cmax": most, "colorbar": {"title": unit}}
    )
    return styled(figure, title=title, height=height)


def heads_of(values: Float[Tensor, "component ..."], labels: tuple[str, ...]) -> Float[Tensor, "layer head"]:
    """The head components' mean over everything else, as [layer, head].

    Example:
        >>> from lnfree_interp import direct_effect, load_model
        >>> model = load_model("tiny")
        >>> effect = direct_effect(model, model.to_tokens("It was a dark and stormy night."), by="head")
        >>> heads_of(effect.values, effect.labels).shape
        torch.Size([4, 4])
    """
    cells = {}
    for value, label in zip(values.flatten(1).double().mean(1), labels):
        layer, _, head = label.removeprefix("L").partition("H")
        if layer.isdigit() and head.isdigit():
            cells[int(layer), int(head)] = value
    n_layers, n_heads = (max(index) + 1 for index in zip(*cells))
    grid = torch.stack([cells[i, j] for i in range(n_layers) for j in range(n_heads)])
    return grid.view(n_layers, n_heads).float()
