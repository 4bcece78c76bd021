"""Figures of evaluation: distributions of losses, reliability."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ..evaluate import LossEvaluation, ModelComparison
from .style import colour, line, styled


def loss_figure(results: Mapping[str, LossEvaluation]) -> go.Figure:
    """Mean loss by position in the sequence (in bins that widen with it), and quantiles of tokens' losses.

    Example:
        >>> from lnfree_interp import evaluate_loss, load_model
        >>> model = load_model("tiny")
        >>> result = evaluate_loss(model, model.to_tokens("It was a dark and stormy night."))
        >>> loss_figure({"tiny": result}).layout.title.text
        'Loss'
    """
    figure = make_subplots(cols=2, subplot_titles=("by position", "quantiles over tokens"))
    levels = np.concatenate([np.linspace(0, 0.99, 100), 1 - np.logspace(-2, -4, 21)[1:]])
    for i, (name, result) in enumerate(results.items()):
        by_position = result.losses.double().mean(0).numpy()
        edges = np.unique(np.geomspace(1, len(by_position) + 1, 25).round().astype(int)) - 1
        bins = [slice(a, b) for a, b in pairwise(edges)]
        quantiles = np.quantile(result.losses.flatten().numpy(), levels)
        common = {"name": name, "legendgroup": name, "line": line(i), "mode": "lines"}
        trace = go.Scatter(
            x=[(part.start + part.stop + 1) / 2 for part in bins],
            y=[by_position[part].mean() for part in bins],
            customdata=[f"{p.start + 1} to {p.stop}" for p in bins],
            hovertemplate="position %{customdata}: %{y:.3f} nats",
            **common,
        )
        figure.add_trace(trace, row=1, col=1)
        hover = "%{customdata:.2%} of tokens lose less than %{y:.3f}"
        trace = go.Scatter(x=levels, y=quantiles, customdata=levels, hovertemplate=hover, showlegend=False, **common)
        figure.add_trace(trace, row=1, col=2)
    figure.update_xaxes(title_text="position (the first is 1)", type="log", dtick="D2", row=1, col=1)
    figure.update_xaxes(title_text="share of tokens", row=1, col=2)
    figure.update_yaxes(title_text="loss (nats per token)", row=1, col=1)
    return styled(figure, title="Loss")


def reliability_figure(result: ModelComparison) -> go.Figure:
    """Accuracy of the top token against its probability, and how many predictions each bin holds.

    Example:
        >>> from lnfree_interp import compare_models, load_model
        >>> models = {name: load_model(name) for name in ("tiny", "tiny-noLN")}
        >>> result = compare_models(models, models["tiny"].to_tokens("It was a dark and stormy night."))
        >>> reliability_figure(result).layout.title.text
        'Reliability'
    """
    figure = make_subplots(rows=2, shared_xaxes=True, row_heights=[0.75, 0.25], vertical_spacing=0.05)
    diagonal = {"dash": "dot", "color": "#999999"}
    figure.add_trace(go.Scatter(x=[0, 1], y=[0, 1], mode="lines", line=diagonal, showlegend=False), row=1, col=1)
    n_bins = result.bin_count.shape[1]
    centres = [(i + 0.5) / n_bins for i in range(n_bins)]
    for i, name in enumerate(result.names):
        label = f"{name} (ECE {result.calibration_error[i].item():.4f})"
        there = (result.bin_count[i] > 0).tolist()
        points = zip(result.bin_confidence[i].tolist(), result.bin_accuracy[i].tolist(), there)
        x, y = zip(*[(c, a) for c, a, occupied in points if occupied])
        figure.add_trace(
            go.Scatter(x=x, y=y, name=label, mode="lines+markers", line=line(i), legendgroup=name), row=1, col=1
        )
        share = (result.bin_count[i] / result.bin_count[i].sum()).tolist()
        bars = go.Bar(x=centres, y=share, marker={"color": colour(i)}, showlegend=False, legendgroup=name)
        figure.add_trace(bars, row=2, col=1)
    figure.update_yaxes(title_text="accuracy", range=[0, 1], row=1, col=1)
    figure.update_yaxes(title_text="share", type="log", row=2, col=1)
    figure.update_xaxes(title_text="probability of the top token", range=[0, 1], row=2, col=1)
    return styled(figure, title="Reliability", height=560, width=640)
