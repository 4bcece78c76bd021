"""Results of several models side by side: the figure of their kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import plotly.graph_objects as go

from ..dla import AttributionError, LogitAttribution
from ..evaluate import LossEvaluation
from ..explaining import Explanation
from ..graph import AttributionGraph
from ..neurons import NeuronAblation
from ..norms import AttentionSinks, ResidualNorms
from ..patching import EdgeEffect, PatchingEffect, PatchingError, Screening
from ..patching.shown import unit_of
from ..results import Page
from .edges import edge_heatmaps
from .evaluate import loss_figure
from .explanations import explanation_figure
from .graph import graph_page
from .neurons import effects_figure
from .norms import norms_figure, sinks_figure
from .patching import error_lines, patching_heatmaps
from .style import colour, styled

# Components that are drawn.
TOP = 20


def comparison_figure(results: Mapping[str, Any], **options: Any) -> Any:
    """The figure of some results, or of graphs the page.

    Raises:
        ValueError: results that have no figure of several.

    Example:
        >>> from lnfree_interp import compare
        >>> found = compare(["tiny", "tiny-noLN"], "direct_logit_attribution", "She put on", " her")
        >>> len(comparison_figure(found.results).data)
        2
    """
    first = next(iter(results.values()))
    for kind, draw in _FIGURES.items():
        if isinstance(first, kind):
            return draw(results, **options)
    raise ValueError(
        f"{type(first).__name__} has no figure of several models: draw them one by one, found[name].plot()"
    )


def component_bars(results: Mapping[str, tuple[tuple[str, ...], list[float]]], *, unit: str, title: str) -> go.Figure:
    """The components of the largest values in any model, a bar for each model."""
    largest: dict[str, float] = {}
    for labels, values in results.values():
        for label, value in zip(labels, values):
            largest[label] = max(largest.get(label, 0.0), abs(value) if value == value else 0.0)
    chosen = sorted(largest, key=lambda label: largest[label])[-TOP:]
    figure = go.Figure()
    for i, (name, (labels, values)) in enumerate(results.items()):
        of = dict(zip(labels, values))
        figure.add_trace(
            go.Bar(
                y=chosen,
                x=[of.get(label) for label in chosen],
                orientation="h",
                name=name,
                marker_color=colour(i),
                hovertemplate=f"%{{y}}: %{{x:.4f}} {unit}<extra>{name}</extra>",
            )
        )
    figure.update_xaxes(title_text=unit)
    figure.update_yaxes(dtick=1)
    figure.update_layout(legend_traceorder="reversed")
    return styled(figure, title=title, height=160 + len(chosen) * (10 + 9 * len(results)))


def _attributions(results: Mapping[str, LogitAttribution], title: str | None = None) -> go.Figure:
    means = {n: (r.labels, r.values.double().mean((1, 2)).tolist()) for n, r in results.items()}
    told = "Contribution to the logit by component, mean over positions" if title is None else title
    return component_bars(means, unit="logits", title=told)


def _attribution_errors(results: Mapping[str, AttributionError], title: str | None = None) -> go.Figure:
    values = {n: (("pooled", *r.labels), [r.pooled, *r.per_component.tolist()]) for n, r in results.items()}
    return component_bars(
        values, unit="NMAE", title="Error of attribution against direct effect" if title is None else title
    )


def _patching(results: Mapping[str, PatchingEffect], title: str | None = None) -> go.Figure:
    return patching_heatmaps({(effect.method, name): effect for name, effect in results.items()}, title=title)


def _edges(results: Mapping[str, EdgeEffect], title: str | None = None) -> go.Figure:
    first = next(iter(results.values()))
    told = f"{first.metric} with an edge patched, {first.direction}" if title is None else title
    cells = {(effect.method, name): effect for name, effect in results.items()}
    return edge_heatmaps(cells, unit=unit_of(first.metric), title=told)


def _screenings(results: Mapping[str, Screening], title: str | None = None) -> go.Figure:
    effects: Any = {name: found.effect for name, found in results.items()}
    first = next(iter(effects.values()))
    return (_edges if isinstance(first, EdgeEffect) else _patching)(effects, title=title)


def _graphs(results: Mapping[str, AttributionGraph]) -> Any:
    return Page(graph_page(list(results.values())))


_FIGURES: dict[type, Callable[..., Any]] = {
    LogitAttribution: _attributions,
    AttributionError: _attribution_errors,
    Explanation: explanation_figure,
    PatchingEffect: _patching,
    PatchingError: error_lines,
    EdgeEffect: _edges,
    Screening: _screenings,
    AttributionGraph: _graphs,
    ResidualNorms: norms_figure,
    AttentionSinks: sinks_figure,
    NeuronAblation: effects_figure,
    LossEvaluation: loss_figure,
}
