"""One look for all figures: a colour and a dash per model, scales centred on zero, fit for a notebook's width."""

from __future__ import annotations

import plotly.graph_objects as go

# Okabe and Ito's palette: told apart with any colour vision.
COLOURS = ("#555555", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
DIVERGING = "RdBu_r"
WIDTH = 900


def colour(i: int) -> str:
    """The i-th model's colour: grey (the original), blue (the control), vermilion (LN-free), ..."""
    return COLOURS[i % len(COLOURS)]


def line(i: int) -> dict:
    """The i-th model's line: the first one (the original) dashed, the rest solid."""
    return {"color": colour(i), "dash": "dash" if i == 0 else "solid", "width": 2}


def styled(figure: go.Figure, *, title: str, height: int = 420, width: int = WIDTH) -> go.Figure:
    """The figure with the house layout."""
    figure.update_layout(
        template="plotly_white",
        title={"text": title, "font": {"size": 16}},
        width=width,
        height=height,
        margin={"l": 70, "r": 30, "t": 70, "b": 60},
        font={"size": 12},
    )
    return figure
