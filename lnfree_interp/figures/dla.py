"""Figures of direct logit attribution."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import plotly.graph_objects as go
import torch
from jaxtyping import Float
from plotly.subplots import make_subplots
from torch import Tensor

from ..batching import indices
from ..dla import HEADS, AttributionError, LogitAttribution, ReaderAttribution, ScoreAttribution
from ..results import Prompts
from .html import NEGATIVE, POSITIVE, most_of
from .pictures import HEAD, largest, mean_of_pairs, tokens_at
from .style import DIVERGING, layer_axis, shown, styled, token_axis

KINDS = ("waterfall", "tokens", "heads")


def head_heatmaps(
    panels: Mapping[str, Float[Tensor, "layer head"]], *, title: str, unit: str = "logits", columns: int = 3
) -> go.Figure:
    """Layer x head heatmaps side by side on one colour scale centred on zero, layer 0 at the top.

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
            hovertemplate="L%{y}H%{x}: %{z:.4f} " + unit + "<extra>" + name + "</extra>",
        )
        row, col = i // columns + 1, i % columns + 1
        figure.add_trace(heatmap, row=row, col=col)
        figure.update_xaxes(title_text="head", row=row, col=col, dtick=max(1, values.shape[1] // 8))
        figure.update_yaxes(**layer_axis(len(values)) | {"title_text": "layer" if col == 1 else None}, row=row, col=col)
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
        >>> heads_of(effect.values, effect.labels).shape == (model.cfg.n_layers, model.cfg.n_heads)
        True
    """
    cells = {}
    for value, label in zip(values.flatten(1).double().mean(1), labels):
        if head := re.fullmatch(HEADS, label):
            cells[int(head[1]), int(head[2])] = value
    n_layers, n_heads = (max(index) + 1 for index in zip(*cells))
    grid = torch.stack([cells[i, j] for i in range(n_layers) for j in range(n_heads)])
    return grid.view(n_layers, n_heads).float()


# ---------------------------------------------------------------------------------------------------------
# One result


def attribution_figure(
    result: LogitAttribution,
    kind: str | None = None,
    prompt: int | None = None,
    position: int | None = None,
    top: int = 20,
) -> go.Figure:
    """`LogitAttribution.plot`.

    Example:
        >>> from lnfree_interp import direct_logit_attribution
        >>> result = direct_logit_attribution("tiny-noLN", "It was the best of times")
        >>> attribution_figure(result).data[0].type, attribution_figure(result, position=-1).data[0].type
        ('heatmap', 'waterfall')
    """
    several = result.bias.numel() > 1 and prompt is position is None
    heads = [label for label in result.labels if HEAD.fullmatch(label)]
    if kind is None:
        kind = "waterfall" if not several else "tokens" if len(result.bias) == 1 else "heads" if heads else "waterfall"
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is unknown; allowed are {', '.join(KINDS)}")
    model = f" in {result.prompts.model}" if result.prompts else ""
    title = f"{result.what}{model}: "
    if kind == "tokens":
        at = _entry(prompt or 0, len(result.bias), "prompt")
        values = result.values[:, at].detach().cpu()
        return token_heatmap(values, result.labels, result.positions, result.prompts, at, title + result.kind, top=top)
    values, bias = _at(result.values, prompt, position), _at(result.bias[None], prompt, position)[0]
    if kind == "heads":
        if not heads:
            raise ValueError("there are no heads among the components: by='head' makes some")
        grid = heads_of(values[:, None], result.labels)
        return head_heatmaps({result.kind: grid}, title=title + "heads", unit="logits")
    total = "logit" if result.kind == "attribution" else "sum and bias"
    return waterfall(values, bias, result.labels, title + "what adds up to it", total=total, unit="logits", top=top)


def readers_figure(
    result: ReaderAttribution, reader: int = 0, prompt: int | None = None, position: int | None = None, top: int = 20
) -> go.Figure:
    """`ReaderAttribution.plot`.

    Example:
        >>> from lnfree_interp import Reader, attribution_to
        >>> result = attribution_to("tiny-noLN", "It was the best of times", Reader.neuron(2))
        >>> readers_figure(result).data[0].type, readers_figure(result, 5, position=-1).data[0].type
        ('heatmap', 'waterfall')
    """
    model = f" in {result.prompts.model}" if result.prompts else ""
    if result.senders is not None:
        rows = result.table().head(top)
        names = [f"{name} ← {component}" for name, component in zip(rows.reader, rows.component)]
        return ranked(
            names, rows["mean"].tolist(), f"What readers read{model}: the largest, mean where they are", "units"
        )
    values = result.values.sum(-1) if result.by_source else result.values
    if len(values) > 1 and prompt is position is None and reader == 0:
        means = values.mean((2, 3)).detach().cpu().double()
        rows, _ = largest(means.abs().amax(1), 2 * top)
        columns, _ = largest(means.abs().amax(0), 2 * top)
        title = f"What readers read of components{model}: mean {result.kind} over tokens"
        labels = [result.readers[i] for i in rows], [result.labels[i] for i in columns]
        return labelled_heatmap(means[rows][:, columns], *labels, title=title, unit="units read")
    one = values[reader]
    if prompt is position is None and len(one[0]) == 1 and one[0].numel() > 1:
        title = f"What {result.readers[reader]} reads{model}"
        cells = one[:, 0].detach().cpu()
        return token_heatmap(cells, result.labels, result.positions, result.prompts, 0, title, unit="units", top=top)
    bias = _at(result.bias[reader][None], prompt, position)[0]
    title = f"{result.readers[reader]}{model}: what adds up to what it reads"
    total = "reading" if result.kind == "attribution" else "sum and bias"
    return waterfall(_at(one, prompt, position), bias, result.labels, title, total=total, unit="units", top=top)


def scores_figure(result: ScoreAttribution, top: int = 40) -> go.Figure:
    """`ScoreAttribution.plot`: the largest components on the query's side by those on the key's.

    Example:
        >>> from lnfree_interp import attention_score_attribution
        >>> scores_figure(attention_score_attribution("tiny-noLN", "It was the best of", 1, 0)).data[0].type
        'heatmap'
    """
    if result.pairs is not None:
        rows = result.table().head(top)
        names = [f"{query} → {key}" for query, key in zip(rows.query_component, rows.key_component)]
        title = f"What pairs of components add to {result.head or 'a head'}'s scores: the largest, mean where they are"
        return ranked(names, rows["mean"].tolist(), title, "scores")
    means = mean_of_pairs(result)
    rows, _ = largest(means.abs().amax(1), top)
    columns, _ = largest(means.abs().amax(0), top)
    labels = [result.query_labels[i] for i in rows], [result.key_labels[i] for i in columns]
    title = f"What pairs of components add to {result.head or 'a head'}'s scores, mean over what it sees"
    axes = {"row_axis": "on the query's side", "column_axis": "on the key's side"}
    return labelled_heatmap(means[rows][:, columns], *labels, title=title, unit="scores", **axes)


def errors_figure(result: AttributionError, top: int = 30) -> go.Figure:
    """`AttributionError.plot`: the components' errors with their intervals, largest last; the pooled one as a line.

    Example:
        >>> from lnfree_interp import attribution_error, logit_attributions
        >>> error = attribution_error(*logit_attributions("tiny", "It was the best of times"))
        >>> errors_figure(error).data[0].type
        'scatter'
    """
    values = result.per_component.cpu().double()
    chosen, _ = largest(values, top)
    chosen.sort(key=lambda i: values[i].item())
    x = values[chosen]
    bars = {
        "array": (result.high[chosen] - x).tolist(),
        "arrayminus": (x - result.low[chosen]).tolist(),
        "thickness": 1,
    }
    figure = go.Figure(
        go.Scatter(
            x=x.tolist(),
            y=[result.labels[i] for i in chosen],
            mode="markers",
            error_x={"type": "data", "symmetric": False} | bars,
            hovertemplate="%{y}: NMAE %{x:.2%}<extra></extra>",
        )
    )
    figure.add_vline(
        x=result.pooled, line={"dash": "dot", "color": "#555"}, annotation_text=f"pooled {result.pooled:.2%}"
    )
    figure.update_xaxes(title_text="normalised mean absolute error", tickformat=".3~%", rangemode="tozero")
    if float(x.abs().max()) < 1e-4:
        figure.update_xaxes(range=[-0.0003, 0.01])  # nothing but rounding
    model = f" in {result.model}" if result.model else ""
    return styled(figure, title=f"How far attributions are from effects{model}", height=130 + 18 * len(chosen))


def ranked(names: Sequence[str], values: Sequence[float | int], title: str, unit: str) -> go.Figure:
    """A bar for each name, the first at the top.

    Example:
        >>> ranked(["embed", "L0.mlp"], [1.0, -2.0], "", "logits").data[0].x
        (1.0, -2.0)
    """
    x = [float(value) for value in values]
    colours = [f"rgb{POSITIVE if value > 0 else NEGATIVE}" for value in x]
    hover = "%{y}: %{x:.4f} " + unit + "<extra></extra>"
    figure = go.Figure(go.Bar(x=x, y=list(names), orientation="h", marker={"color": colours}, hovertemplate=hover))
    figure.update_xaxes(title_text=unit)
    figure.update_yaxes(autorange="reversed", automargin=True, type="category")
    return styled(figure, title=title, height=140 + 20 * len(x))


def waterfall(
    values: Float[Tensor, " component"],
    bias: Float[Tensor, ""],
    labels: Sequence[str],
    title: str,
    *,
    total: str = "logit",
    unit: str = "logits",
    top: int = 20,
) -> go.Figure:
    """How components add up, in the model's order from above: the largest, all others together, the bias.

    Example:
        >>> import torch
        >>> figure = waterfall(torch.tensor([1.0, -3.0]), torch.tensor(0.5), ["embed", "L0.mlp"], "")
        >>> figure.data[0].y
        ('embed', 'L0.mlp', 'bias', 'logit')
    """
    chosen, others = largest(values, max(1, top))
    names, numbers = [labels[i] for i in chosen], [values[i].item() for i in chosen]
    if others:
        names.append(f"{len(others):,} other" + "s" * (len(others) > 1))
        numbers.append(values[others].sum().item())
    names.append("bias")
    numbers.append(bias.item())
    after = torch.tensor(numbers).cumsum(0).tolist()
    trace = go.Waterfall(
        orientation="h",
        y=[*names, total],
        x=[*numbers, 0],
        measure=["relative"] * len(names) + ["total"],
        customdata=[*zip(numbers, after), (sum(numbers), after[-1])],
        hovertemplate="%{y}: %{customdata[0]:+.4f} " + unit + ", then %{customdata[1]:.4f}<extra></extra>",
        text=[f"{x:+.2f}" for x in numbers] + [f"{after[-1]:.2f}"],
        textposition="outside",
        cliponaxis=False,
        increasing={"marker": {"color": f"rgb{POSITIVE}"}},
        decreasing={"marker": {"color": f"rgb{NEGATIVE}"}},
        totals={"marker": {"color": "#555555"}},
        connector={"line": {"color": "#bbbbbb", "width": 1}},
    )
    figure = go.Figure(trace)
    low, high = min(0.0, *after), max(0.0, *after)
    room = 0.17 * ((high - low) or 1.0)  # for the numbers beside the bars, on a page of 400 pixels too
    figure.update_xaxes(title_text=unit, range=[low - room, high + room])
    figure.update_yaxes(autorange="reversed", automargin=True)
    return styled(figure, title=title, height=140 + 20 * (len(names) + 1)).update_layout(showlegend=False)


def token_heatmap(
    values: Float[Tensor, "component pos"],
    labels: Sequence[str],
    positions: Sequence[int],
    prompts: Prompts | None,
    prompt: int,
    title: str,
    *,
    unit: str = "logits",
    top: int = 20,
) -> go.Figure:
    """The largest components by the tokens at the positions, in the model's order from above.

    Example:
        >>> import torch
        >>> token_heatmap(torch.randn(3, 2), ["embed", "L0.attn", "L0.mlp"], [4, 5], None, 0, "").data[0].z.shape
        (3, 2)
    """
    chosen, _ = largest(values.abs().amax(1), max(1, top))
    strings = tokens_at(positions, prompts, prompt)
    rows = [labels[i] for i in chosen]
    figure = labelled_heatmap(
        values[chosen], rows, [""] * len(strings), title=title, unit=unit, row_axis="", column_axis=""
    )
    hover = "%{y} at %{customdata}: %{z:.4f} " + unit + "<extra></extra>"
    where = [f"{p} ({shown(s)})" for p, s in zip(positions, strings)]
    figure.update_traces(customdata=[where] * len(rows), hovertemplate=hover)
    return figure.update_xaxes(**token_axis(strings, positions if len(strings) <= 12 else None), automargin=True)


def labelled_heatmap(
    values: Float[Tensor, "row column"],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    title: str,
    unit: str,
    row_axis: str = "reader",
    column_axis: str = "component",
) -> go.Figure:
    """Cells on a scale centred on zero, the first row at the top.

    Example:
        >>> import torch
        >>> labelled_heatmap(torch.randn(1, 2), ["L2N5"], ["embed", "L0.mlp"], title="", unit="units").data[0].y
        ('L2N5',)
    """
    most = most_of(values.flatten().tolist())
    figure = go.Figure(
        go.Heatmap(
            z=values.float().numpy(),
            y=list(rows),
            customdata=[list(columns)] * len(rows),
            zmin=-most,
            zmax=most,
            colorscale=DIVERGING,
            colorbar={"title": unit},
            xgap=1,
            ygap=1,
            hovertemplate="%{y}, %{customdata}: %{z:.4f} " + unit + "<extra></extra>",
        )
    )
    figure.update_yaxes(autorange="reversed", title_text=row_axis, automargin=True, type="category")
    axis = {
        "tickvals": list(range(len(columns))),
        "ticktext": list(columns),
        "tickangle": -90 if len(columns) > 8 else 0,
    }
    figure.update_xaxes(**axis, title_text=column_axis, automargin=True)
    return styled(figure, title=title, height=190 + 18 * max(4, len(rows)))


def _entry(which: int, n: int, what: str) -> int:
    return indices(which, n, what, range(n), f"{what}s")[0]


def _at(values: Float[Tensor, "row batch pos"], prompt: int | None, position: int | None) -> Float[Tensor, " row"]:
    """At entries along batch and pos, or their mean."""
    if prompt is not None:
        values = values[:, [_entry(prompt, values.shape[1], "prompt")]]
    if position is not None:
        values = values[:, :, [_entry(position, values.shape[2], "position")]]
    return values.mean((1, 2)).detach().cpu().double()
