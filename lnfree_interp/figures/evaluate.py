"""Figures of evaluation: distributions of losses, reliability."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ..evaluate import HellaSwag, LossEvaluation, LossTable, ModelComparison
from ..shares import share_interval
from ..statistics import mean_interval
from .style import MARK, band, colour, in_one, line, log_axis, styled, symbol


def loss_figure(results: Mapping[str, LossEvaluation]) -> go.Figure:
    """Mean loss by position in the sequence, with its 95% interval over sequences, and quantiles of tokens' losses.

    Positions are taken together in bins that widen with them; the interval is the bootstrap's over sequences.

    Example:
        >>> from lnfree_interp import evaluate_loss, load_model
        >>> model = load_model("tiny")
        >>> result = evaluate_loss(model, model.to_tokens("It was a dark and stormy night."))
        >>> loss_figure({"tiny": result}).layout.title.text
        'Loss in tiny'
    """
    titles = ("mean by position, with 95% interval", "quantiles over tokens")
    figure = make_subplots(cols=2, subplot_titles=titles, horizontal_spacing=0.12)
    levels = np.concatenate([np.linspace(0, 0.99, 100), 1 - np.logspace(-2, -4, 21)[1:]])
    for i, (name, result) in enumerate(results.items()):
        losses = result.losses.double().numpy()
        edges = np.unique(np.geomspace(1, losses.shape[1] + 1, 12).round().astype(int)) - 1
        bins = [slice(a, b) for a, b in pairwise(edges)]
        in_bins = np.stack([losses[:, part].mean(1) for part in bins], 1)
        low, high = mean_interval(in_bins)
        x = [(part.start + part.stop + 1) / 2 for part in bins]
        if len(losses) > 1:
            common = {"x": x, "mode": "lines", "line": {"width": 0}, "legendgroup": name, "hoverinfo": "skip"}
            figure.add_trace(go.Scatter(y=low, showlegend=False, **common), row=1, col=1)
            filled = go.Scatter(y=high, showlegend=False, fill="tonexty", fillcolor=band(i), **common)
            figure.add_trace(filled, row=1, col=1)
        quantiles = np.quantile(result.losses.flatten().numpy(), levels)
        common = {"name": name, "legendgroup": name, "line": line(i), "mode": "lines"}
        trace = go.Scatter(
            x=x,
            y=in_bins.mean(0),
            customdata=[f"{p.start + 1} to {p.stop}" for p in bins],
            hovertemplate="positions %{customdata}: %{y:.3f} nats per token",
            **common,
        )
        figure.add_trace(trace, row=1, col=1)
        hover = "%{customdata:.2%} of tokens lose less than %{y:.3f} nats"
        trace = go.Scatter(x=levels, y=quantiles, customdata=levels, hovertemplate=hover, showlegend=False, **common)
        figure.add_trace(trace, row=1, col=2)
    n_pos = max(result.losses.shape[1] for result in results.values())
    figure.update_xaxes(title_text="position (the first is 1)", **log_axis((1, n_pos)), row=1, col=1)
    figure.update_xaxes(title_text="share of tokens that lose less", tickformat=".0%", row=1, col=2)
    figure.update_yaxes(title_text="loss (nats per token)", title_standoff=4)
    return styled(figure, title=f"Loss{in_one(results)}")


def loss_table_figure(result: LossTable) -> go.Figure:
    """Each model's mean loss, on a scale that shows differences and does not begin at 0, and gaps to the baselines.

    Example:
        >>> import torch
        >>> from lnfree_interp import evaluate_loss, load_model, loss_table
        >>> tokens = torch.arange(64).view(4, 16)
        >>> results = {name: evaluate_loss(load_model(name), tokens) for name in ("tiny-vanilla", "tiny-noLN")}
        >>> len(loss_table_figure(loss_table(results, {"tiny-noLN": "tiny-vanilla"})).data)
        2
    """
    compared = [i for i, baseline in enumerate(result.baselines) if baseline is not None]
    titles = ("mean loss", "gap to the baseline [95%, paired]") if compared else ("mean loss",)
    figure = make_subplots(cols=len(titles), subplot_titles=titles, horizontal_spacing=0.25)
    colours = [colour(i) for i in range(len(result.names))]
    look = {"mode": "markers", "showlegend": False}
    figure.add_trace(
        go.Scatter(
            x=result.mean.tolist(),
            y=list(result.names),
            marker={"color": colours, "size": 11},
            hovertemplate="%{y}: %{x:.4f} nats per token<extra></extra>",
            **look,
        ),
        row=1,
        col=1,
    )
    if compared:
        gap, low, high = (x[compared] for x in (result.gap, result.low, result.high))
        figure.add_trace(
            go.Scatter(
                x=gap.tolist(),
                y=[f"{result.names[i]}<br>- {result.baselines[i]}" for i in compared],
                marker={"color": [colours[i] for i in compared], "size": 11},
                error_x={"symmetric": False, "array": (high - gap).tolist(), "arrayminus": (gap - low).tolist()},
                hovertemplate="%{y}: %{x:+.4f} nats per token<extra></extra>",
                **look,
            ),
            row=1,
            col=2,
        )
        figure.add_vline(x=0, line=MARK, row=1, col=2)
    figure.update_xaxes(title_text="nats per token", nticks=5)
    figure.update_yaxes(autorange="reversed", automargin=True, type="category")
    for col, n in enumerate((len(result.names), len(compared)), 1):
        if n:  # half a row above the first and below the last
            figure.update_yaxes(autorange=False, range=[n - 0.5, -0.5], row=1, col=min(col, len(titles)))
    return styled(figure, title="Loss, and gaps to the baselines", height=180 + 40 * len(result.names))


def hellaswag_figure(results: Mapping[str, HellaSwag]) -> go.Figure:
    """Accuracies with two standard errors, by summed and by length-normalised log-probability, and chance.

    Example:
        >>> from lnfree_interp import hellaswag
        >>> item = {"ctx": "He opened the", "endings": ["door.", "sky.", "cat.", "sea."], "label": 0}
        >>> len(hellaswag_figure({"tiny": hellaswag("tiny", [item])}).data)
        2
    """
    figure = go.Figure()
    for i, (what, kind) in enumerate((("sum", ""), ("sum per token", "_normalised"))):
        y = [getattr(result, f"accuracy{kind}") for result in results.values()]
        errors = [2 * getattr(result, f"stderr{kind}") for result in results.values()]
        figure.add_trace(
            go.Scatter(
                x=list(results),
                y=y,
                name=what,
                mode="markers",
                marker={"color": colour(i + 1), "size": 10, "symbol": symbol(i + 1)},
                error_y={"array": errors},
                hovertemplate="%{x}: %{y:.1%} right<extra>" + what + "</extra>",
            )
        )
    chance = 1 / next(iter(results.values())).lengths.shape[1]
    figure.add_hline(y=chance, line=MARK, annotation_text="chance")
    figure.update_layout(scattermode="group")
    figure.update_yaxes(title_text="items right", tickformat=".0%", rangemode="tozero")
    return styled(figure, title=f"HellaSwag{in_one(results)}, with two standard errors")


def reliability_figure(result: ModelComparison) -> go.Figure:
    """Accuracy of the top token against its probability, and how many predictions each bin holds.

    Bars are Wilson's 95% intervals, of as many predictions as there are: as if tokens were independent.

    Example:
        >>> from lnfree_interp import compare_models, load_model
        >>> models = {name: load_model(name) for name in ("tiny", "tiny-noLN")}
        >>> result = compare_models(models, models["tiny"].to_tokens("It was a dark and stormy night."))
        >>> reliability_figure(result).layout.title.text.partition(":")[0]
        'Reliability'
    """
    figure = make_subplots(rows=2, shared_xaxes=True, row_heights=[0.75, 0.25], vertical_spacing=0.05)
    diagonal = {"x": [0, 1], "y": [0, 1], "mode": "lines", "line": MARK, "showlegend": False, "hoverinfo": "skip"}
    figure.add_trace(go.Scatter(**diagonal), row=1, col=1)
    n_bins = result.bin_count.shape[1]
    centres = [(i + 0.5) / n_bins for i in range(n_bins)]
    for i, name in enumerate(result.names):
        label = f"{name} (calibration error {result.calibration_error[i].item():.4f})"
        count, confidence, right = (
            x[i, result.bin_count[i] > 0].double().numpy()
            for x in (result.bin_count, result.bin_confidence, result.bin_accuracy)
        )
        look = {"name": label, "mode": "lines+markers", "line": line(i), "legendgroup": name}
        bars = share_bars(right.tolist(), count.tolist())
        figure.add_trace(go.Scatter(x=confidence, y=right, error_y=bars, **look), row=1, col=1)
        share = (result.bin_count[i] / result.bin_count[i].sum()).tolist()
        bars = go.Bar(x=centres, y=share, marker={"color": colour(i)}, showlegend=False, legendgroup=name)
        figure.add_trace(bars, row=2, col=1)
    figure.update_yaxes(title_text="share right", range=[0, 1], row=1, col=1)
    figure.update_yaxes(title_text="predictions", tickformat=".0%", rangemode="tozero", nticks=4, row=2, col=1)
    figure.update_traces(hovertemplate="probability %{x:.3f}: right %{y:.1%}", selector={"type": "scatter"})
    figure.update_traces(hovertemplate="probability %{x:.2f}: %{y:.2%} of predictions", selector={"type": "bar"})
    figure.update_xaxes(title_text="probability of the top token", range=[0, 1], row=2, col=1)
    title = "Reliability: how often the likeliest token is right, by its probability [95%, of independent tokens]"
    return styled(figure, title=title, height=520)


def share_bars(shares: Sequence[float], counts: Sequence[float | int]) -> dict:
    """plotly error bars of shares: Wilson's 95% intervals, as if all that was counted were independent.

    Example:
        >>> {name: [round(float(x), 2) for x in share_bars([0.5], [10])[name]] for name in ("array", "arrayminus")}
        {'array': [0.26], 'arrayminus': [0.26]}
    """
    ends = [share_interval(np.array([share * n]), np.array([float(n)])) for share, n in zip(shares, counts)]
    low, high = np.array(ends).reshape(-1, 2).T
    size = {"array": high - shares, "arrayminus": shares - low}
    return {"type": "data", "symmetric": False, "thickness": 1, "width": 0, **size}
