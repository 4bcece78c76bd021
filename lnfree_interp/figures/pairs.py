"""Pictures of pairs of prompts: their texts, with what differs marked."""

from __future__ import annotations

import html

from ..pairs import PairedPrompts
from .html import note, shade, visible

SHOWN = 12
_CELL = "padding:2px 6px;text-align:left;vertical-align:top"


def pairs_picture(pairs: PairedPrompts) -> str:
    """A row per pair: the text, clean tokens red and corrupted ones blue where they differ, and the answers."""
    rows = []
    for i, answers in enumerate(pairs[:SHOWN].answer_strings):
        between = "" if pairs.tokenizer is not None else " "
        text = between.join(_piece(*piece) for piece in pairs.written(i))
        cells = "".join(f"<td style='{_CELL};white-space:pre'>{html.escape(visible(a))}</td>" for a in answers)
        rows.append(f"<tr><td style='{_CELL};white-space:pre-wrap'>{text}</td>{cells}</tr>")
    head = "".join(f"<th style='{_CELL};font-weight:normal;color:#555'>{t}</th>" for t in (_LEGEND, "right", "wrong"))
    left = len(pairs.tokens) - len(rows)
    more = note(f"and {left:,} more" if left > 0 else "")
    return f"<table style='border-collapse:collapse'><tr>{head}</tr>{''.join(rows)}</table>{more}"


def _marked(text: str, value: float | int) -> str:
    return f"<span style='{shade(value, 2.0)}'>{html.escape(visible(text))}</span>"


def _piece(clean: str, corrupted: str | None) -> str:
    if corrupted is None:
        return html.escape(visible(clean))
    return _marked(clean, 1.0) + _marked(corrupted, -1.0)


_LEGEND = f"prompt, {_marked('clean', 1.0)} {_marked('corrupted', -1.0)}"
