"""The picture of an explanation, in plain HTML."""

from __future__ import annotations

import html
from collections.abc import Sequence

from ..explaining.result import Explanation
from .html import NEGATIVE, POSITIVE, coloured_tokens, note, visible

ROWS, TOKENS = 10, 400


def explanation_picture(found: Explanation) -> str:
    """Next tokens; the prompt, coloured; the largest components and heads, attribution beside exact effect."""
    parts = [_predictions(found)]
    if found.by_token is not None:
        parts.append(note("what came from each token, directly or moved by heads"))
        parts.append(coloured_tokens(found.strings[-TOKENS:], found.by_token.tolist()[-TOKENS:], "logits"))
    for kind in ("component", "head"):
        rows = sorted(found.parts(kind), key=lambda row: -abs(row[1]))
        if rows:
            more = f", the {ROWS} largest of {len(rows)}" if len(rows) > ROWS else ""
            parts.append(note(f"by {kind}{more}"))
            parts.append(double_bars(rows[:ROWS], "attribution", "exact effect"))
    return "".join(parts)


def _predictions(found: Explanation) -> str:
    shown = (
        f"<b style='white-space:pre'>{html.escape(visible(found.word(token)))}</b> {p:.1%}"
        for token, p in found.predictions
    )
    return f"<div style='margin-bottom:.4em'>next: {', '.join(shown)}</div>"


def double_bars(rows: Sequence[tuple[str, float, float]], first: str, second: str) -> str:
    """A row per name: two numbers, and of the first a bar, in which a line marks the second."""
    most = max((abs(x) for row in rows for x in row[1:] if x == x), default=0.0) or 1.0
    cell = "padding:1px 6px;white-space:pre"
    lines = []
    for name, a, b in rows:
        width, at = 50 * abs(a) / most, 50 + 50 * b / most
        left = 50 - width if a < 0 else 50
        colour = f"rgb{POSITIVE if a > 0 else NEGATIVE}"
        bar = (
            f"<div style='position:absolute;left:{left:.2f}%;width:{width:.2f}%;height:100%;background:{colour}'></div>"
        )
        mark = f"<div style='position:absolute;left:calc({at:.2f}% - 1px);width:3px;height:100%;background:#000'></div>"
        lines.append(
            f"<tr><td style='{cell}'>{html.escape(name)}</td><td style='{cell};text-align:right'>{a:+.4g}</td>"
            f"<td style='{cell};text-align:right'>{b:+.4g}</td><td style='width:16em'>"
            f"<div style='position:relative;height:.9em;background:#f4f4f4'>{bar}{mark}</div></td></tr>"
        )
    head = "".join(f"<th style='{cell};font-weight:normal;color:#555'>{t}</th>" for t in ("", first, f"▎{second}", ""))
    return f"<table style='border-collapse:collapse'><tr>{head}</tr>{''.join(lines)}</table>"
