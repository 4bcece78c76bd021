"""Figures of probes: what is read beside the yardsticks, by layer, from which components, and after edits."""

from __future__ import annotations

from collections.abc import Mapping

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ..arguments import whole
from ..batching import indices
from ..probe import ConceptEvidence, ConceptSwap, ProbeEvaluation, ProbeReading
from .style import DIVERGING, MARK, colour, line, shown, styled


def evaluation_figure(results: Mapping[str, ProbeEvaluation]) -> go.Figure:
    """Probing@1 of each yardstick with its 95% interval, a panel for each split, a colour for each model.

    Example:
        >>> from lnfree_interp import evaluate_probe, fit_probe, load_model, recall_data
        >>> from lnfree_interp.probe import Training
        >>> model = load_model("tiny-noLN")
        >>> data = recall_data(model, 80, keys=4, values=4)
        >>> probe = fit_probe(model, data, dim=64, mastered=False, training=Training(hidden=16, epochs=2))
        >>> figure = evaluation_figure({"tiny-noLN": evaluate_probe(model, probe, data)})
        >>> figure.data[0].y[0]
        'probe'
    """
    first = next(iter(results.values()))
    splits = list(dict.fromkeys(split for result in results.values() for split in result.splits))
    figure = make_subplots(
        rows=1,
        cols=len(splits),
        shared_yaxes=True,
        column_titles=[f"new {split}" for split in splits],
        horizontal_spacing=0.05,
    )
    for i, (name, result) in enumerate(results.items()):
        for split in result.splits:
            j = result.splits.index(split)
            at_1, low, high = (x[:, j, 0] for x in (result.at_1, result.low, result.high))
            bars = {"array": (high - at_1).clamp(min=0).tolist(), "arrayminus": (at_1 - low).clamp(min=0).tolist()}
            figure.add_trace(
                go.Bar(
                    x=at_1.tolist(),
                    y=list(result.yardsticks),
                    orientation="h",
                    name=name,
                    legendgroup=name,
                    showlegend=j == 0,
                    marker={"color": colour(i)},
                    error_x={"type": "data", "symmetric": False, "thickness": 1, "width": 2, **bars},
                    hovertemplate="%{y}: %{x:.1%}<extra>" + f"{name}, new {split}" + "</extra>",
                ),
                row=1,
                col=splits.index(split) + 1,
            )
    figure.add_vline(x=first.chance, line=MARK)
    figure.update_xaxes(range=[0, 1.01], tickvals=[0, 0.5, 1], tickformat=".0%")
    figure.update_yaxes(autorange="reversed")
    figure.update_layout(barmode="group")
    height = 140 + 22 * len(first.yardsticks) * max(2, len(results))
    return styled(figure, title="Answers found among all answers (dotted: chance)", height=height)


def reading_figure(result: ProbeReading, *, key: int = -1, top: int = 12) -> go.Figure:
    """Cosines of the concepts nearest to what a key is bound with, by layer.

    Raises:
        ValueError: a key that is not there.

    Example:
        >>> from lnfree_interp import fit_probe, load_model, recall_data
        >>> from lnfree_interp.probe import Training
        >>> model = load_model("tiny-noLN")
        >>> data = recall_data(model, 80, keys=4, values=4)
        >>> probe = fit_probe(model, data, dim=64, mastered=False, training=Training(hidden=16, epochs=2))
        >>> len(reading_figure(probe.read(model, data.prompts[0].prompt)).data)
        1
    """
    at = indices(key, len(result.keys), "key", range(len(result.keys)), "the keys")[0]
    names = [name for name, _ in result.top(at, whole(top, "top", least=1))]
    values = result.similarity[at][:, [result.concepts.index(name) for name in names]]
    most = float(values.abs().max())
    trace = go.Heatmap(
        z=values.tolist(),
        x=[shown(name) for name in names],
        y=list(result.points),
        colorscale=DIVERGING,
        zmid=0,
        zmin=-most,
        zmax=most,
        colorbar={"title": "cosine"},
        hovertemplate="%{x} at %{y}: %{z:.3f}<extra></extra>",
    )
    figure = go.Figure(trace)
    figure.update_yaxes(autorange="reversed", type="category")
    title = f"What {shown(result.keys[at])} is bound with at the end of the prompt, in {result.prompts.model}"
    return styled(figure, title=title, height=150 + 32 * len(result.points))


def evidence_figure(results: Mapping[str, ConceptEvidence], *, top: int = 20) -> go.Figure:
    """What the largest components add to a readout, and by how much it falls without them, a panel for each model.

    Example:
        >>> from lnfree_interp import concept_evidence, fit_probe, load_model, recall_data
        >>> from lnfree_interp.probe import Training
        >>> model = load_model("tiny-noLN")
        >>> data = recall_data(model, 80, keys=4, values=4)
        >>> probe = fit_probe(model, data, dim=64, mastered=False, training=Training(hidden=16, epochs=2))
        >>> found = concept_evidence(model, probe, data.prompts[0].prompt)
        >>> [trace.name for trace in evidence_figure({"tiny-noLN": found}).data]
        ['attribution', 'exact effect']
    """
    titles = [f"{name}: {shown(result.concept)!r}, error {result.error:.1%}" for name, result in results.items()]
    figure = make_subplots(rows=1, cols=len(results), subplot_titles=titles, horizontal_spacing=0.12)
    n = 0
    for col, result in enumerate(results.values(), 1):
        table = result.table().head(whole(top, "top", least=1))
        n = max(n, len(table))
        for i, (column, name) in enumerate((("effect", "exact effect"), ("attribution", "attribution"))[::-1]):
            figure.add_trace(
                go.Bar(
                    x=table[column].tolist(),
                    y=table.component.tolist(),
                    orientation="h",
                    name=name,
                    legendgroup=name,
                    showlegend=col == 1,
                    marker={"color": colour(i)},
                    hovertemplate="%{y}: %{x:.4g}<extra>" + name + "</extra>",
                ),
                row=1,
                col=col,
            )
    figure.update_yaxes(autorange="reversed", type="category")
    figure.update_layout(barmode="group")
    readout = next(iter(results.values())).readout
    return styled(figure, title=f"Where the evidence comes from ({readout} readout)", height=170 + 20 * n)


def swap_figure(results: Mapping[str, ConceptSwap]) -> go.Figure:
    """How often model and probes answer with the other concept after an edit, by edited layer.

    Example:
        >>> from lnfree_interp import fit_probe, load_model, recall_data, swap_concepts
        >>> from lnfree_interp.probe import Training
        >>> model = load_model("tiny-noLN")
        >>> data = recall_data(model, 80, keys=4, values=4)
        >>> probe = fit_probe(model, data, dim=64, mastered=False, training=Training(hidden=16, epochs=2))
        >>> figure = swap_figure({"tiny-noLN": swap_concepts(model, probe, data, layers=-1, n=8)})
        >>> len(figure.data)
        9
    """
    edits = next(iter(results.values())).edits
    figure = make_subplots(
        rows=len(results),
        cols=len(edits),
        shared_yaxes=True,
        subplot_titles=[f"{name}: {edit}" for name in results for edit in edits],
        horizontal_spacing=0.03,
        vertical_spacing=0.2 / len(results),
    )
    for row, (model, result) in enumerate(results.items(), 1):
        rates = result.to_other.mean(-1)
        for j, edit in enumerate(edits):
            for i, who in enumerate(result.who):
                figure.add_trace(
                    go.Scatter(
                        x=list(result.points),
                        y=rates[:, j, i].tolist(),
                        name=who,
                        legendgroup=who,
                        showlegend=row == 1 and j == 0,
                        mode="lines+markers",
                        line=line(i),
                        hovertemplate="%{x}: %{y:.1%}<extra>" + f"{model}, {edit}: {who}" + "</extra>",
                    ),
                    row=row,
                    col=j + 1,
                )
    figure.update_yaxes(range=[-0.03, 1.03], tickformat=".0%")
    figure.update_xaxes(type="category")
    return styled(
        figure, title="Answers that an edit of the stream makes the other concept", height=60 + 230 * len(results)
    )
