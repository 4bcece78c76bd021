"""Figures of views of a prompt: logit lens, attention patterns, losses of tokens."""

from __future__ import annotations

import plotly.graph_objects as go

from ..batching import indices
from ..dla import LogitLens
from ..evaluate import TokenLosses
from ..norms import AttentionPatterns
from .style import WIDTH, colour, layer_axis, line, shown, styled, token_axis


def lens_figure(result: LogitLens, prompt: int = 0) -> go.Figure:
    """`LogitLens.plot`.

    Example:
        >>> from lnfree_interp import logit_lens
        >>> result = logit_lens("tiny-noLN", "It was the best of times")
        >>> lens_figure(result).data[0].type
        'heatmap'
    """
    n, batch, pos = result.logit.shape
    at = indices(prompt, batch, "prompt", range(batch), "the prompts")[0]
    words = result.words()
    model = f" in {result.prompts.model}" if result.prompts else ""
    top = [words["top"][i * batch + at] for i in range(n)]
    if pos == 1:
        what = repr(words["target"][at][0]) + (f" - {words['versus'][at][0]!r}" if words["versus"] else "")
        figure, ways = go.Figure(), {"final norm there": result.logit, "scale of the final stream": result.frozen}
        for i, (name, values) in enumerate(reversed(ways.items())):
            hover = "%{x}: %{y:.4f} logits, likeliest %{text}<extra>" + name + "</extra>"
            y = values[:, at, 0].tolist()
            text = [shown(row[0]) for row in top]
            look = {"mode": "lines+markers", "line": line(i), "name": name, "text": text, "hovertemplate": hover}
            figure.add_trace(go.Scatter(x=list(result.points), y=y, **look))
        figure.update_yaxes(title_text="logits")
        figure.update_xaxes(title_text="after")
        return styled(figure, title=f"Logit lens{model}: {what}")
    tokens = list(words["token"][at]) if words["token"] else [str(p) for p in result.positions]
    room = int((WIDTH - 190) / pos / 6.5)  # characters in a cell
    texts = [[shown(word) for word in row] for row in top]
    inside = [[shown(word if len(word) <= room else word[: room - 1] + "…") for word in row] for row in top]
    logits = result.logit[:, at].tolist()
    figure = go.Figure(
        go.Heatmap(
            z=result.top_prob[:, at].float().numpy(),
            text=inside,
            texttemplate="%{text}" if room >= 4 else None,
            textfont={"size": 11},
            customdata=[
                [(shown(token), x, text) for token, x, text in zip(tokens, row, said)]
                for row, said in zip(logits, texts)
            ],
            zmin=0,
            zmax=1,
            colorscale="Blues",
            colorbar={"title": "probability"},
            xgap=1,
            ygap=1,
            hovertemplate="after %{y} at %{customdata[0]}: %{customdata[2]} (%{z:.1%}); "
            "target %{customdata[1]:.3f} logits<extra></extra>",
        )
    )
    step = layer_axis(n)["tickvals"]
    figure.update_yaxes(
        autorange="reversed", tickvals=step, ticktext=[result.points[i] for i in step], title_text="after"
    )
    figure.update_xaxes(**token_axis(tokens, result.positions if pos <= 12 else None), automargin=True)
    return styled(figure, title=f"Logit lens{model}: likeliest next token", height=200 + 24 * n)


def patterns_figure(result: AttentionPatterns, head: str | None = None, prompt: int = 0) -> go.Figure:
    """`AttentionPatterns.plot`: a head's pattern; where none is named, a menu of all.

    Example:
        >>> from lnfree_interp import attention_patterns
        >>> found = attention_patterns("tiny-noLN", "It was the best of times", layers=0)
        >>> len(patterns_figure(found).layout.updatemenus[0].buttons)
        4
    """
    if head is not None and head not in result.labels:
        raise ValueError(f"head {head!r} is none of {result.labels[0]} to {result.labels[-1]}")
    batch, pos = result.values.shape[1:3]
    at = indices(prompt, batch, "prompt", range(batch), "the prompts")[0]
    strings = [str(i) for i in range(pos)] if result.prompts is None else list(result.prompts.strings[at])
    names = [f"{i} ({shown(s)})" for i, s in enumerate(strings)]
    labels = result.labels if head is None else (head,)
    values = {label: result.values[result.labels.index(label), at].float().numpy().round(4) for label in labels}
    figure = go.Figure(
        go.Heatmap(
            z=values[labels[0]],
            customdata=[[(query, key) for key in names] for query in names],
            zmin=0,
            # The first query can look nowhere else: its 1 would wash the others out.
            zmax=max((float(x[1:].max()) for x in values.values() if len(x) > 1), default=1.0),
            colorscale="Blues",
            colorbar={"title": "attention"},
            hovertemplate="%{customdata[0]} on %{customdata[1]}: %{z:.3f} of attention<extra></extra>",
        )
    )
    axis = token_axis(strings)
    figure.update_xaxes(**axis, title_text="key", automargin=True, constrain="domain")
    down = {"autorange": "reversed", "tickangle": 0, "automargin": True, "constrain": "domain"}
    figure.update_yaxes(**axis | down, title_text="query", scaleanchor="x")
    model = f" in {result.prompts.model}" if result.prompts else ""
    title = f"Attention of {labels[0]}{model}"
    figure = styled(figure, title=title, height=640)
    if len(labels) > 1:
        buttons = [
            {"label": x, "method": "update", "args": [{"z": [values[x]]}, {"title.text": f"Attention of {x}{model}"}]}
            for x in labels
        ]
        menu = {"buttons": buttons, "x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom"}
        figure.update_layout(updatemenus=[menu])
    return figure


def token_losses_figure(result: TokenLosses, prompt: int = 0) -> go.Figure:
    """`TokenLosses.plot`: bars of the losses, a line of the entropies: where it is lower, the model was too sure.

    Example:
        >>> from lnfree_interp import token_losses
        >>> [trace.type for trace in token_losses_figure(token_losses("tiny-noLN", "It was the best of times")).data]
        ['bar', 'scatter']
    """
    batch, pos = result.losses.shape
    at = indices(prompt, batch, "prompt", range(batch), "the prompts")[0]
    strings = [str(i + 1) for i in range(pos)] if result.prompts is None else list(result.prompts.strings[at][1:])
    texts, x = [shown(s) for s in strings], list(range(pos))
    common = {"x": x, "text": texts, "textposition": "none"}
    figure = go.Figure(
        go.Bar(
            y=result.losses[at].tolist(),
            name="loss",
            marker={"color": colour(1)},
            hovertemplate="%{text}: loss %{y:.3f} nats<extra></extra>",
            **common,
        )
    )
    figure.add_trace(
        go.Scatter(
            x=x,
            y=result.entropies[at].tolist(),
            text=texts,
            name="entropy of the prediction",
            mode="lines",
            line={"color": colour(2), "width": 2, "shape": "hvh"},
            hovertemplate="%{text}: entropy %{y:.3f} nats<extra></extra>",
        )
    )
    figure.update_xaxes(**token_axis(strings), automargin=True)
    figure.update_yaxes(title_text="nats")
    model = f" in {result.prompts.model}" if result.prompts else ""
    return styled(figure, title=f"Loss of each token{model}")
