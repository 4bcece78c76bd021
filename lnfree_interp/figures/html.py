"""Pictures in plain HTML, without a script or anything fetched: what results show of themselves in a notebook.

Widths follow the page; what would not fit is left out, and said to be.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

# The ends of the diverging scale; its middle is white, so that nothing is drawn where nothing is.
NEGATIVE, POSITIVE = (33, 102, 172), (178, 24, 43)
# Rows, columns, and tokens of running text that a picture has at most.
ROWS, COLUMNS, TEXT = 30, 60, 400
# Columns up to which there is room for numbers, or words, in the cells.
NUMBERS = 12
_CARD = (
    "font:14px/1.45 system-ui,sans-serif;color:#222;background:#fff;padding:.4em .6em;max-width:100%;overflow-x:auto"
)
_CELL = "padding:1px 5px;white-space:pre"
_SMALL = "font-size:12px;color:#555;margin-top:.3em"


def card(kind: str, sentence: str, *parts: str) -> str:
    """A result's kind, what it says, and its pictures."""
    head = f"<p style='margin:0 0 .5em'><b>{html.escape(kind)}</b> {html.escape(sentence)}</p>"
    return f"<div style='{_CARD}'>{head}{''.join(parts)}</div>"


def heading(text: str) -> str:
    """What the picture below it shows."""
    return f"<div style='margin:.6em 0 .2em;font-weight:600'>{html.escape(text)}</div>"


def note(*texts: str) -> str:
    """A line below a picture: what it leaves out, say. Nothing where there is nothing to say."""
    said = "; ".join(text for text in texts if text)
    return f"<div style='{_SMALL}'>{html.escape(said)}</div>" if said else ""


def shade(value: float | int, most: float | int) -> str:
    """CSS of a background on the diverging scale, whose ends are at +-most, with text that can be read on it."""
    if value != value:
        return "background:#eee"
    share = min(1.0, abs(value) / most) if most > 0 else 0.0
    end = POSITIVE if value > 0 else NEGATIVE
    red, green, blue = (round(255 + (channel - 255) * share) for channel in end)
    return f"background:#{red:02x}{green:02x}{blue:02x}" + ";color:#fff" * (share > 0.6)


def visible(token: str, most: int = 24) -> str:
    """A token's text with what cannot be seen made visible, and cut where it is long."""
    token = token.replace("\n", "⏎").replace("\t", "⇥")
    token = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in token)
    return (token if len(token) <= most else token[: most - 1] + "…") or "∅"


def coloured_tokens(
    strings: Sequence[str], values: Sequence[float | int], unit: str, most: float | int | None = None
) -> str:
    """Running text, each token on a background by its value; the value stands in the hover."""
    most = most_of(values) if most is None else most
    spans = "".join(
        f"<span style='{shade(value, most)};white-space:pre-wrap' title='{_hover(repr(token), value, unit)}'>"
        f"{html.escape(visible(token))}</span>"
        for token, value in list(zip(strings, values))[:TEXT]
    )
    rest = len(values) - TEXT
    left = note(f"... and {rest:,} more tokens") if rest > 0 else ""
    return f"<div style='line-height:1.9'>{spans}</div>{left}{legend(values, most, unit)}"


def bars(
    labels: Sequence[str],
    values: Sequence[float | int],
    unit: str,
    notes: Sequence[str] | None = None,
    *,
    totals: int = 0,
) -> str:
    """A row per label: its value as a number and as a bar from the middle, to the left if negative.

    Where no value is negative bars begin on the left.

    Args:
        notes: what stands after each bar.
        totals: so many rows, the last ones, are sums of others and grey.
    """
    most, signed = most_of(values), any(value < 0 for value in values)
    rows = []
    for i, (label, value, said) in enumerate(zip(labels, values, notes or [""] * len(labels))):
        width = (50 if signed else 100) * min(1.0, abs(value) / most) if value == value else 0.0
        left = 50 - width if value < 0 else 50 if signed else 0
        colour = "#777" if i >= len(labels) - totals else f"rgb{POSITIVE if value > 0 else NEGATIVE}"
        bar = (
            f"<div style='position:absolute;left:{left:.2f}%;width:{width:.2f}%;height:100%;background:{colour}'></div>"
        )
        rows.append(
            f"<tr title='{_hover(label, value, unit)}'><td style='{_CELL};text-align:left'>{html.escape(label)}</td>"
            f"<td style='{_CELL};text-align:right'>{_number(value, signed)}</td>"
            f"<td style='width:16em'><div style='position:relative;height:.9em;background:#f4f4f4'>{bar}</div></td>"
            + (f"<td style='{_CELL};color:#555;text-align:left'>{html.escape(said)}</td>" if notes else "")
            + "</tr>"
        )
    head = f"<tr><th></th><th style='{_CELL};text-align:right'>{html.escape(unit)}</th><th></th></tr>"
    return f"<table style='border-collapse:collapse'>{head}{''.join(rows)}</table>"


def grid(
    values: Sequence[Sequence[float | int]],
    rows: Sequence[str],
    columns: Sequence[str],
    unit: str,
    most: float | None = None,
    *,
    words: Sequence[Sequence[str]] | None = None,
    corner: str = "",
) -> str:
    """A table of cells coloured by value, which stands in the hover; in the cells too, where there is room.

    Args:
        most: where the colours end.
        words: what stands in the cells in place of numbers.
        corner: what rows and columns are: "layer \\ head".
    """
    most = max(map(most_of, values), default=1.0) if most is None else most
    roomy = len(columns) <= NUMBERS or words is not None
    longest = max((len(visible(c)) for c in columns), default=0)
    lying = longest * len(columns) <= 90
    upright = "" if lying else "writing-mode:vertical-rl;transform:rotate(180deg);"
    signed = any(value < 0 for line in values for value in line)

    def cell(i: int, j: int) -> str:
        value, inside = values[i][j], ""
        if words is not None:
            inside = html.escape(visible(words[i][j], 12))
        elif roomy and value == value:
            inside = _decimal(value, signed, most)
        said = f"{visible(words[i][j])}: " if words is not None else ""
        where = html.escape(f"{rows[i]}, {visible(columns[j], 12)}: {said}{value:.4g} {unit}")
        # Short: what the cells share is said of their row, but for what notebooks say of cells themselves.
        own = ";text-align:center" * bool(inside) + ";overflow:hidden" * (words is not None)
        return f"<td style='{shade(value, most)};padding:0{own}' title='{where}'>{inside}</td>"

    head = "".join(
        f"<th style='padding:1px;font-weight:normal;font-size:11px;text-align:center;"
        f"vertical-align:bottom'><span style='{upright}white-space:pre'>{html.escape(visible(c))}</span></th>"
        for c in columns
    )
    body = "".join(
        f"<tr style='height:1.4em;font-size:11px;white-space:pre;color:#222'>"
        f"<th style='{_CELL};text-align:right;font-weight:normal;overflow:hidden;font-size:13px'>"
        f"{html.escape(visible(row))}</th>{''.join(cell(i, j) for j in range(len(columns)))}</tr>"
        for i, row in enumerate(rows)
    )
    first = min(18, max([len(visible(row)) for row in rows] + [len(corner), 3]))
    each = max(4.2 if roomy else 1.8, 0.5 * longest + 0.5 if lying else 0)
    left, wide = first * 0.62 + 1, first * 0.62 + 1 + each * len(columns)
    style = f"border-collapse:collapse;table-layout:fixed;width:100%;max-width:{wide:.1f}em"
    sizes = f"<colgroup><col style='width:{left:.1f}em'>{'<col>' * len(columns)}</colgroup>"
    start = (
        f"<th style='{_CELL};text-align:right;font-weight:normal;font-size:11px;color:#888'>{html.escape(corner)}</th>"
    )
    flat = [value for line in values for value in line]
    return f"<table style='{style}'>{sizes}<tr>{start}{head}</tr>{body}</table>{legend(flat, most, unit)}"


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], most: int = ROWS) -> str:
    """Words and numbers in rows."""
    head = "".join(
        f"<th style='{_CELL};text-align:left;border-bottom:1px solid #999'>{html.escape(c)}</th>" for c in columns
    )

    def cell(x: object) -> str:
        number = isinstance(x, (int, float)) and not isinstance(x, bool)
        text = f"{x:,}" if isinstance(x, int) and number else f"{x:.4g}" if number else str(x)
        return f"<td style='padding:1px 8px;text-align:{'right' if number else 'left'}'>{html.escape(text)}</td>"

    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows[:most])
    left = note(f"... and {len(rows) - most:,} more rows: table() has all") if len(rows) > most else ""
    return f"<table style='border-collapse:collapse;max-width:100%'><tr>{head}</tr>{body}</table>{left}"


def legend(values: Sequence[float | int], most: float | int, unit: str) -> str:
    """The scale in words and colours: both of its ends, or one where no value is negative."""
    ends = (-most, 0.0, most) if any(value < 0 for value in values) else (0.0, most)
    shown = " ".join(
        f"<span style='{shade(v, most)};padding:0 .4em'>{_number(v, len(ends) == 3, 3)}</span>" for v in ends
    )
    return f"<div style='{_SMALL}'>{shown} {html.escape(unit)}</div>"


def most_of(values: Sequence[float | int]) -> float:
    """The largest size; 1 where there is none."""
    return max((abs(value) for value in values if abs(value) < float("inf")), default=0.0) or 1.0


def _number(value: float | int, signed: bool, digits: int = 4) -> str:
    return "0" if value == 0 else f"{value:+.{digits}g}" if signed else f"{value:.{digits}g}"


def _decimal(value: float | int, signed: bool, most: float | int) -> str:
    """With the decimals that the largest needs for two digits, above 1 for three; what rounds to 0 has no sign."""
    decimals = max(0, (3 if most > 1 else 2) - math.ceil(math.log10(most)))
    if value == 0 or decimals > 4 or abs(value) >= 1e5:
        return _number(value, signed, 2)
    said = f"{value:+.{decimals}f}" if signed else f"{value:.{decimals}f}"
    return said.lstrip("+-") if float(said) == 0 else said


def _hover(label: str, value: float | int, unit: str) -> str:
    return html.escape(f"{label}: {value:.4g} {unit}")
