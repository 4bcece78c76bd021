"""Pictures of panels and of the largest of many values, for notebooks: HTML of the primitives in `html`."""

from __future__ import annotations

from collections.abc import Sequence

from ..patching.shown import Panel
from .html import bars, grid

ROWS, COLUMNS, BARS = 30, 40, 15


def panel_picture(panel: Panel, unit: str) -> str:
    """A panel as cells coloured by value, the first row (layer 0) at the bottom; with too many heads or neurons in a
    row, the largest cells as bars."""
    if panel.column != "position" and len(panel.columns) > COLUMNS:
        letter = "H" if panel.column == "head" else "N"
        labels = [f"{row}{letter}{column}" for row in panel.rows for column in panel.columns]
        return largest_bars(labels, panel.values.flatten().tolist(), unit, f"{panel.column}s")
    shown = panel.largest(ROWS, COLUMNS)
    cells = grid(shown.values.flip(0).tolist(), shown.rows[::-1], shown.columns, unit)
    return cells + note(f"across: {panel.column}; up: {panel.row}", shown.left_out)


def largest_bars(labels: Sequence[str], values: Sequence[float], unit: str, what: str, k: int = BARS) -> str:
    """The k largest of some values as bars, the largest first."""
    order = sorted(range(len(values)), key=lambda i: -abs(values[i]) if values[i] == values[i] else 0.0)[:k]
    more = f"the {k} largest of {len(values)} {what}" if len(values) > k else ""
    return bars([labels[i] for i in order], [values[i] for i in order], unit) + note(more)


def note(*texts: str) -> str:
    """What a picture does not show by itself, in small."""
    said = "; ".join(text for text in texts if text)
    return f"<div style='font-size:12px;color:#555'>{said}</div>" if said else ""
