"""Figures of neuron ablations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots

from ..neurons import NeuronAblation
from .style import colour, in_one, line, log_axis, styled

QUANTITIES = {"loss": "cross-entropy", "entropy": "entropy"}


def effects_figure(results: Mapping[str, NeuronAblation]) -> go.Figure:
    """Box plots of |change of cross-entropy| and |change of entropy| over tokens, per neuron and model.

    Boxes are drawn from the quartiles and the 5% and 95% quantiles: the file does not grow with the tokens.

    Example:
        >>> from lnfree_interp import ablate_neurons, load_model
        >>> model = load_model("tiny")
        >>> result = ablate_neurons(model, model.to_tokens("It was a dark and stormy night."), neurons=[5, 8])
        >>> len(effects_figure({"tiny": result}).data)  # a box trace for cross-entropy, one for entropy
        2
    """
    titles = [f"|change of {word}|" for word in QUANTITIES.values()]
    figure = make_subplots(cols=2, subplot_titles=titles, horizontal_spacing=0.12)
    levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)
    for i, (name, result) in enumerate(results.items()):
        for col, quantity in enumerate(QUANTITIES, 1):
            sizes = getattr(result, quantity).flatten(1).double().abs()
            # quantile takes no more than 2^24 numbers: a row at a time
            low, q1, median, q3, high = torch.stack([_quantiles(row, levels) for row in sizes]).T.tolist()
            box = go.Box(
                x=list(result.labels),
                lowerfence=low,
                q1=q1,
                median=median,
                q3=q3,
                upperfence=high,
                name=name,
                legendgroup=name,
                offsetgroup=name,  # a model's boxes stand at the same place in both panels
                showlegend=col == 1,
                marker={"color": colour(i)},
            )
            figure.add_trace(box, row=1, col=col)
    figure.update_yaxes(title_text="nats", title_standoff=4, rangemode="tozero")
    figure.update_xaxes(title_text="neuron")
    figure.update_layout(boxmode="group")
    title = f"Neurons ablated alone{in_one(results)} (boxes: quartiles; whiskers: 5% to 95% of tokens)"
    return styled(figure, title=title)


def _quantiles(row: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    ordered = row.sort().values
    return ordered[(levels * (len(ordered) - 1)).round().long()]


def cumulative_figure(results: Mapping[str, NeuronAblation]) -> go.Figure:
    """Change of the mean cross-entropy and entropy, in percent, as neurons are ablated one after the other.

    Example:
        >>> from lnfree_interp import ablate_cumulatively, load_model
        >>> model = load_model("tiny")
        >>> result = ablate_cumulatively(model, model.to_tokens("It was a dark and stormy night."), [5, 8])
        >>> cumulative_figure({"tiny": result}).data[0].x == ("none", *result.labels)
        True
    """
    figure = make_subplots(cols=2, subplot_titles=list(QUANTITIES.values()), horizontal_spacing=0.12)
    for i, (name, result) in enumerate(results.items()):
        for col, quantity in enumerate(QUANTITIES, 1):
            baseline = getattr(result, f"baseline_{quantity}").double().mean()
            percent = 100 * getattr(result, quantity).flatten(1).double().mean(1) / baseline
            trace = go.Scatter(
                x=["none", *result.labels],
                y=[0.0, *percent.tolist()],
                name=name,
                legendgroup=name,
                showlegend=col == 1,
                line=line(i),
                mode="lines+markers",
                hovertemplate="%{x}: %{y:+.3~g}%<extra>" + name + "</extra>",
            )
            figure.add_trace(trace, row=1, col=col)
    figure.update_yaxes(title_text="change of the mean (%)", title_standoff=4)
    figure.update_xaxes(title_text="neuron ablated last")
    for col in (1, 2):  # where nothing changes but by rounding, a scale of rounding errors would be drawn
        if max(abs(y) for trace in figure.data[col - 1 :: 2] for y in trace.y) < 1e-3:
            figure.update_yaxes(range=[-0.1, 0.1], row=1, col=col)
    return styled(figure, title=f"Neurons ablated one on top of the other{in_one(results)}")


def scan_figure(results: Mapping[str, NeuronAblation], rankings: Mapping[str, Any]) -> go.Figure:
    """Mean |change of cross-entropy| of every neuron against its score, and the part through the scale.

    A row per model, on the same axes, so that no model's neurons lie under another's.

    Example:
        >>> from lnfree_interp import ablate_neurons, load_model, rank_confidence_neurons
        >>> model = load_model("tiny")
        >>> result = ablate_neurons(model, model.to_tokens("It was a dark and stormy night."))
        >>> len(scan_figure({"tiny": result}, {"tiny": rank_confidence_neurons(model)}).data[0].x) == model.cfg.d_mlp
        True
    """
    height = 110 + 230 * len(results)
    figure = make_subplots(
        rows=len(results),
        cols=2,
        subplot_titles=[f"{name}: {what}" for name in results for what in ("in all", "through the final norm's scale")],
        shared_xaxes="all",
        shared_yaxes="all",
        vertical_spacing=min(0.5, 40 / height) if len(results) > 1 else 0,
        horizontal_spacing=0.04,
    )
    all_scores: list[float] = []
    all_sizes: list[float] = []
    for i, (name, result) in enumerate(results.items()):
        table = result.table()
        score = rankings[name].set_index("neuron").score
        scores = [score[int(label.rsplit("N")[-1])] for label in result.labels]
        for col, column in enumerate(("loss_abs", "loss_abs_through_scale"), 1):
            trace = go.Scattergl(
                x=scores,
                y=table[column].tolist(),
                text=list(result.labels),
                mode="markers",
                name=name,
                showlegend=False,
                marker={"color": colour(i), "size": 4, "opacity": 0.45},
                hovertemplate="%{text}: %{y:.3g} nats, score %{x:.3g}<extra>" + name + "</extra>",
            )
            figure.add_trace(trace, row=i + 1, col=col)
            all_sizes += trace.y
            if not any(trace.y):  # a log axis shows no zeros
                middle = {"x": 0.5, "y": 0.5, "xref": "x domain", "yref": "y domain", "showarrow": False}
                figure.add_annotation(text="0 for every neuron", **middle, row=i + 1, col=col)
        all_scores += scores
    figure.update_xaxes(**log_axis(all_scores))
    figure.update_yaxes(**log_axis(all_sizes))
    figure.update_xaxes(title_text="|w_out| / LogitVar", row=len(results))
    figure.update_yaxes(title_text="mean |change| (nats)", col=1)
    title = "Every neuron of the layer, ablated alone: mean |change of cross-entropy|"
    return styled(figure, title=title, height=height)


def ablation_figure(result: NeuronAblation, top: int = 30) -> go.Figure:
    """`NeuronAblation.plot`.

    Example:
        >>> from lnfree_interp import ablate_neurons
        >>> result = ablate_neurons("tiny", "It was a dark and stormy night.")
        >>> ablation_figure(result, top=5).data[0].type
        'bar'
    """
    name = result.prompts.model if result.prompts else "model"
    if result.cumulative:
        return cumulative_figure({name: result})
    if len(result.labels) <= 12:
        return effects_figure({name: result})
    total, frozen = (x.abs().double().mean((1, 2)) for x in (result.loss, result.loss - result.loss_frozen))
    order = total.argsort(descending=True, stable=True)[: max(1, top)].tolist()
    labels, figure = [result.labels[i] for i in order], go.Figure()
    for i, (what, sizes) in enumerate((("total", total), ("through the final norm's scale", frozen))):
        hover = "%{x}: %{y:.3g} nats " + what + "<extra></extra>"
        bar = go.Bar(x=labels, y=sizes[order].tolist(), name=what, marker={"color": colour(i + 1)}, hovertemplate=hover)
        figure.add_trace(bar)
    figure.update_yaxes(title_text="mean |change| (nats)")
    figure.update_xaxes(tickangle=-90, title_text="neuron")
    title = (
        f"Ablated alone in {name}: mean |change of cross-entropy|, the largest {len(order)} of {len(total):,} neurons"
    )
    return styled(figure, title=title)
