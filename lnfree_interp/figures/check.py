"""The figure of a checked model."""

from __future__ import annotations

import plotly.graph_objects as go

from ..check import ModelCheck
from .style import colour, log_axis, styled


def laws_figure(result: ModelCheck) -> go.Figure:
    """Each measured law's error, and up to which it holds.

    Example:
        >>> from lnfree_interp import check_model
        >>> len(laws_figure(check_model("tiny-noLN")).data)
        2
    """
    laws = [law for law in result.laws if law.error is not None]
    least = 1e-18  # what an error of exactly 0 is drawn at
    errors = [max(law.error or 0.0, least) for law in laws]
    allowed = [law.tolerance for law in laws]
    names = [law.name for law in laws]
    colours = [colour(2 if law.verdict == "FAILS" else 3) for law in laws]
    figure = go.Figure()
    hover = "%{y}: error %{x:.1e}, %{text}<extra></extra>"
    verdicts = [law.verdict for law in laws]
    marks = {"color": colours, "size": 8}
    figure.add_trace(go.Scatter(x=errors, y=names, text=verdicts, mode="markers", marker=marks, hovertemplate=hover))
    figure.add_trace(
        go.Scatter(
            x=allowed,
            y=names,
            mode="markers",
            marker={"symbol": "line-ns-open", "size": 12, "color": "#555555"},
            hovertemplate="%{y}: holds up to %{x:.1e}<extra></extra>",
        )
    )
    figure.update_xaxes(**log_axis([*errors, *allowed]), title_text="error, and up to which the law holds (bars)")
    figure.update_yaxes(autorange="reversed", automargin=True)
    figure.update_layout(showlegend=False)
    return styled(figure, title=f"Laws {result.summary()}", height=150 + 17 * len(laws))
