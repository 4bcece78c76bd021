"""Pictures in plain HTML, without a script or anything fetched: what results show of themselves in a notebook."""

from __future__ import annotations

import html
from collections.abc import Sequence

# The ends of the diverging scale; its middle is white, so that nothing is drawn where nothing is.
NEGATIVE, POSITIVE = (33, 102, 172), (178, 24, 43)
_CARD = "font:14px/1.45 system-ui,sans-serif;color:#222;background:#fff;padding:.4em .6em;max-width:100%;overflow-x:auto"
_CELL = "padding:1px 5px;white-space:pre"


def card(kind: str, sentence: str, *parts: str) -> str:
    """A result's kind, what it says, and its pictures."""
    head = f"<p style='margin:0 0 .5em'><b>{html.escape(kind)}</b> {html.escape(sentence)}</p>"
    return f"<div style='{_CARD}'>{head}{''.join(parts)}</div>"


def shade(value: float, most: float) -> str:
    """CSS of a background on the diverging scale, whose ends are at +-most, with text that can be read on it."""
    if value != value:
        return "background:#eee;color:#888"
    share = min(1.0, abs(value) / most) if most > 0 else 0.0
    end = POSITIVE if value > 0 else NEGATIVE
    red, green, blue = (round(255 + (channel - 255) * share) for channel in end)
    return f"background:rgb({red},{green},{blue});color:{'#fff' if share > 0.6 else '#222'}"


def visible(token: str) -> str:
    """A token's text with what cannot be seen made visible."""
    return token.replace("\n", "⏎").replace("\t", "⇥") or "∅"


def coloured_tokens(strings: Sequence[str], values: Sequence[float], unit: str, most: float | None = None) -> str:
    """Running text, each token on a background by its value; the value stands in the hover."""
    most = _most(values) if most is None else most
    spans = "".join(
        f"<span style='{shade(value, most)};white-space:pre-wrap' title='{html.escape(f'{token!r} {value:.4g} {unit}')}'>"
        f"{html.escape(visible(token))}</span>"
        for token, value in zip(strings, values)
    )
    return f"<div style='line-height:1.9'>{spans}</div>{legend(most, unit)}"


def bars(labels: Sequence[str], values: Sequence[float], unit: str) -> str:
    """A row per label: its value as a number and as a bar from the middle, to the left if negative."""
    most = _most(values)
    rows = []
    for label, value in zip(labels, values):
        width = 50 * abs(value) / most if value == value else 0.0
        left = 50 - width if value < 0 else 50
        colour = f"rgb{POSITIVE if value > 0 else NEGATIVE}"
        bar = f"<div style='position:absolute;left:{left:.2f}%;width:{width:.2f}%;height:100%;background:{colour}'></div>"
        rows.append(
            f"<tr><td style='{_CELL};text-align:left'>{html.escape(label)}</td>"
            f"<td style='{_CELL};text-align:right'>{value:+.4g}</td>"
            f"<td style='width:16em'><div style='position:relative;height:.9em;background:#f4f4f4'>{bar}</div></td></tr>"
        )
    head = f"<tr><th></th><th style='{_CELL};text-align:right'>{html.escape(unit)}</th><th></th></tr>"
    return f"<table style='border-collapse:collapse'>{head}{''.join(rows)}</table>"


def grid(
    values: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    unit: str,
    most: float | None = None,
) -> str:
    """A table of cells coloured by value, which stands in the hover."""
    most = max(map(_most, values), default=1.0) if most is None else most
    head = "".join(f"<th style='{_CELL};font-weight:normal'>{html.escape(visible(column))}</th>" for column in columns)
    body = "".join(
        f"<tr><th style='{_CELL};text-align:right;font-weight:normal'>{html.escape(row)}</th>"
        + "".join(
            f"<td style='{shade(value, most)};min-width:1.6em;height:1.4em' "
            f"title='{html.escape(f'{row}, {visible(column)}: {value:.4g} {unit}')}'></td>"
            for column, value in zip(columns, line)
        )
        + "</tr>"
        for row, line in zip(rows, values)
    )
    return f"<table style='border-collapse:collapse'><tr><th></th>{head}</tr>{body}</table>{legend(most, unit)}"


def legend(most: float, unit: str) -> str:
    """The scale in words and colours."""
    ends = (f"<span style='{shade(v, most)};padding:0 .4em'>{v:+.3g}</span>" for v in (-most, most))
    return f"<div style='font-size:12px;color:#555;margin-top:.3em'>{'  0  '.join(ends)} {html.escape(unit)}</div>"


def _most(values: Sequence[float]) -> float:
    return max((abs(value) for value in values if value == value), default=0.0) or 1.0
