"""Figures of patching: heatmaps of effects, exact above and estimated below, models side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots
from torch import Tensor

from ..patching import PatchingEffect, PatchingError
from ..patching.shown import panel, unit_of
from .dla import ranked
from .style import DIVERGING, in_one, line, plain, styled

# Pixels across for cells, on a page of 800.
DRAWN_ON = 650
# Heads or neurons that are drawn position by position.
MOST_ROWS = 40
# Columns that can be seen one by one; of more, the largest cells are drawn as bars.
MOST_COLUMNS, MOST_BARS = 100, 30


def patching_heatmaps(effects: Mapping[tuple[str, str], PatchingEffect], *, title: str | None = None) -> go.Figure:
    """Mean effects of patching one site, a row for each method, a column for each model, with tokens along positions.

    Args:
        effects: (method, model) -> effects.

    Raises:
        ValueError: effects of several sites, layers or units, or of several metrics.

    Example:
        >>> from lnfree_interp import activation_patching, ioi_pairs
        >>> effect = activation_patching("tiny-noLN", ioi_pairs("tiny-noLN", 2))
        >>> len(patching_heatmaps({("activation", "tiny-noLN"): effect}).data)
        1
    """
    first = next(iter(effects.values()))
    for (_, model), effect in effects.items():
        for name in ("site", "metric", "axes", "layers", "units"):
            a, b = getattr(first, name), getattr(effect, name)
            if a != b:
                raise ValueError(f"effects in {model} have {name} {b}, others {a}: draw them one by one")
    panels = {key: panel(effect) for key, effect in effects.items()}
    shown = panels[next(iter(panels))]
    told = f"{first.metric} with {first.site} patched, {first.direction}" if title is None else title
    unit = unit_of(first.metric)
    if len(effects) == 1 and shown.column != "position" and len(shown.columns) > MOST_COLUMNS:
        cells, letter = shown.values.flatten(), "H" if shown.column == "head" else "N"
        names = [f"{row}{letter}{column}" for row in shown.rows for column in shown.columns]
        largest = cells.abs().nan_to_num().argsort(descending=True, stable=True)[:MOST_BARS].tolist()
        of = f"{told}{in_one(model for _, model in effects)}: the {len(largest)} largest of {len(cells):,}"
        of = of if title is None else title
        return ranked([names[i] for i in largest], cells[largest].tolist(), of, unit)
    if shown.row != "layer":  # too many heads or neurons to draw all of them, position by position
        most = max(panels.values(), key=lambda p: float(p.values.abs().nan_to_num().amax())).largest(MOST_ROWS, 10**6)
        rows = [shown.rows.index(row) for row in most.rows]
        panels = {key: replace(p, values=p.values[rows], rows=most.rows) for key, p in panels.items()}
        shown = panels[next(iter(panels))]
    return effect_heatmaps(
        {key: p.values for key, p in panels.items()},
        layers=first.layers if shown.row == "layer" else shown.rows,
        row=shown.row,
        labels=shown.columns,
        axis=axis_of(shown.columns) if shown.column == "position" else shown.column,
        unit=unit,
        title=told,
    )


def axis_of(labels: Sequence[str]) -> str:
    """What is along positions whose labels are `PairedPrompts.position_labels`.

    Example:
        >>> axis_of(["0 the", "1 girl/man", "2 said"])
        'position: its token, or clean/corrupted'
    """
    if all(label.isdigit() for label in labels):
        return "position"
    told = ", of the first pair where others differ (in brackets)" if any("(" in label for label in labels) else ""
    return f"position: its token, or clean/corrupted{told}"


def error_lines(errors: Mapping[str, PatchingError], *, title: str | None = None) -> go.Figure:
    """Each layer's error with its 95% interval, a line for each name.

    Example:
        >>> from lnfree_interp import activation_patching, attribution_patching, induction_pairs, patching_error
        >>> pairs = induction_pairs("tiny", 6, length=8)
        >>> exact = activation_patching("tiny", pairs)
        >>> error = patching_error(attribution_patching("tiny", pairs), exact, draws=20, normalize=False)
        >>> len(error_lines({"tiny": error}).data)
        1
    """
    first = next(iter(errors.values()))
    unit = "share of total effect" if first.normalized else "summed over cells"
    figure = go.Figure()
    for i, (name, error) in enumerate(errors.items()):
        means, (low, high) = error.per_layer, error.per_layer_interval.unbind(1)
        figure.add_trace(
            go.Scatter(
                x=list(error.layers),
                y=means.tolist(),
                error_y={"array": (high - means).tolist(), "arrayminus": (means - low).tolist(), "width": 3},
                name=name,
                line=line(i),
                mode="lines+markers",
                hovertemplate=f"layer %{{x}}: %{{y:.4f}} {unit}<extra>{name}</extra>",
            )
        )
    figure.update_xaxes(title_text="layer", dtick=max(1, len(first.layers) // 12))
    figure.update_yaxes(title_text=f"error, {unit}", rangemode="tozero")
    told = f"Error of {first.method} against patching{in_one(errors)}, {first.site}, by layer [95% over prompts]"
    return styled(figure, title=told if title is None else title, height=360)


def effect_heatmaps(
    panels: Mapping[tuple[str, str], Float[Tensor, "layer unit"]],
    *,
    layers: Sequence[int] | Sequence[str],
    labels: Sequence[str],
    axis: str,
    unit: str,
    title: str,
    row: str = "layer",
) -> go.Figure:
    """Heatmaps of effects on one colour scale centred on zero: a row for each method, a column for each model.

    The scale is that of the first method's effects.

    Args:
        panels: (method, model) -> mean effect, Float[Tensor, "layer unit"].
        layers: of the rows of each panel.
        labels: of the columns: tokens for positions, numbers for heads and neurons.
        axis: what the columns are: pos, head or neuron; of what is at positions, what their labels say.
        unit: of the effects, for the colour bar.
        title: of the figure.
        row: what the rows are.

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
    sizes = {key: values.abs().nan_to_num().max().item() for key, values in panels.items()}
    most = max(size for (method, _), size in sizes.items() if method == methods[0]) or 1.0
    beyond = max(sizes.values()) > most
    # Space for titles and for tokens that stand on end, in pixels of the whole.
    each = max(130, 16 * len(layers))
    longest = max(len(plain(label, 20)) for label in labels)
    bottom = (40 + min(6 * longest, 130)) if longest > 3 else 50
    height = 90 + bottom + len(methods) * each + (len(methods) - 1) * 45
    step = max(1, math.ceil((7 * longest + 8 if longest <= 3 else 14) * len(labels) * len(models) / DRAWN_ON))
    ticks = list(range(0, len(labels), step))
    axis, _, told = axis.partition(":")
    figure = make_subplots(
        rows=len(methods),
        cols=len(models),
        shared_xaxes=True,
        shared_yaxes=True,
        subplot_titles=[f"{model}: {method}" if model else method for method in methods for model in models],
        horizontal_spacing=0.02,
        vertical_spacing=min(45 / (height - 80 - bottom), 0.9 / max(1, len(methods) - 1)),
    )
    for (method, model), values in panels.items():
        at = {"row": methods.index(method) + 1, "col": models.index(model) + 1}
        named = f"<extra>{model}: {method}</extra>" if model else f"<extra>{method}</extra>"
        where = f"{row} %{{y}}, {axis} %{{customdata}}"
        heatmap = go.Heatmap(
            z=values.float().cpu().numpy(),
            y=list(layers),
            coloraxis="coloraxis",
            xgap=1 if len(labels) * len(models) <= MOST_COLUMNS else 0,
            ygap=1,
            hoverongaps=False,
            customdata=[[plain(label) for label in labels]] * len(layers),
            hovertemplate=f"{where}: %{{z:.4f}} {unit}{named}",
        )
        figure.add_trace(heatmap, **at)
        figure.update_xaxes(
            tickmode="array",
            tickvals=ticks,
            ticktext=[plain(labels[i], 20) for i in ticks],
            tickangle=-90 if longest > 3 else 0,
            title_text=None if told or at["row"] < len(methods) else axis,
            **at,
        )
        # The first layer at the top, where TransformerLens' demos have it.
        figure.update_yaxes(
            title_text=row if at["col"] == 1 else None, dtick=max(1, len(layers) // 8), autorange="reversed", **at
        )
    bar = {"title": f"{unit}<br>(beyond: darkest)" if beyond else unit}
    scale = {"colorscale": DIVERGING, "cmid": 0, "cmin": -most, "cmax": most, "colorbar": bar}
    figure.update_layout(coloraxis=scale)
    if told:  # once, below all of them
        below = {"x": 0.5, "y": 0, "xanchor": "center", "yanchor": "top", "yshift": 26 - bottom}
        on_page = {"xref": "paper", "yref": "paper", "showarrow": False}
        figure.add_annotation(text=f"{axis}:{told}", font_size=12, **below, **on_page)
    figure = styled(figure, title=title, height=height)
    return figure.update_layout(margin={"b": bottom})
