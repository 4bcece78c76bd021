"""What views of a prompt show of themselves, logit lens, attention, losses: pictures in plain HTML."""

from __future__ import annotations

import base64
import struct
import zlib
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from ..batching import indices
from . import html

if TYPE_CHECKING:
    from ..dla import LogitLens
    from ..evaluate import TokenLosses
    from ..norms import AttentionPatterns

# Columns with words in them; small pictures of heads, their width in pixels of the screen, dots in a row at most.
WORDS, HEADS, SMALL, DOTS = 12, 64, 84, 48
SHADES = 32


def of_lens(result: LogitLens) -> str:
    words, (n, batch, pos) = result.words(), result.logit.shape
    points = range(n) if n <= html.ROWS else torch.linspace(0, n - 1, html.ROWS).round().long().tolist()
    top = [words["top"][i * batch] for i in range(n)]
    if pos == 1:
        target = " - ".join(f"'{html.visible(words[name][0][0])}'" for name in ("target", "versus") if words[name])
        logits = result.logit[:, 0, 0].tolist()
        said = [
            f"rank {int(result.rank[i, 0, 0])}, likeliest '{html.visible(top[i][0])}' ({result.top_prob[i, 0, 0]:.0%})"
            + f"; frozen scale {result.frozen[i, 0, 0]:+.4g}" * bool(result.frozen[i, 0, 0] != result.logit[i, 0, 0])
            for i in points
        ]
        title = html.heading(f"Logit of {target}")
        picture = title + html.bars([result.points[i] for i in points], [logits[i] for i in points], "logits", said)
    else:
        columns = range(max(0, pos - WORDS), pos)
        picture = html.heading("Likeliest next token, coloured by its probability") + html.grid(
            [[result.top_prob[i, 0, j].item() for j in columns] for i in points],
            [result.points[i] for i in points],
            [words["token"][0][j] if words["token"] else str(result.positions[j]) for j in columns],
            "probability",
            1.0,
            words=[[top[i][j] for j in columns] for i in points],
            corner="after \\ at",
        )
    left = [f"{batch - 1} more prompts"] * (batch > 1) + [f"{pos - WORDS} earlier positions"] * (1 < WORDS < pos)
    left += [f"{n - len(points)} layers between"] * (n > len(points))
    return picture + html.note("not shown: " + ", ".join(left) if left else "")


def of_patterns(result: AttentionPatterns) -> str:
    n, batch, pos = result.values.shape[:3]
    more = [f"{batch - 1} more prompts"] * (batch > 1)
    if n == 1:
        most = html.ROWS
        strings = [str(i) for i in range(pos)] if result.prompts is None else list(result.prompts.strings[0])
        more += [f"{pos - most} later tokens"] * (pos > most)
        values = result.values[0, 0, :most, :most].tolist()
        words = strings[:most]
        picture = html.heading(f"{result.labels[0]}: query (rows) on key (columns)")
        picture += html.grid(values, words, words, "of attention", 1.0, corner="query \\ key")
        return picture + html.note("not shown: " + ", ".join(more) if more else "")
    shown = range(min(n, HEADS))
    more += [f"{n - HEADS} later heads"] * (n > HEADS)
    layers: dict[str, list[str]] = {}
    for i in shown:
        layer = result.labels[i].partition("H")[0]
        layers.setdefault(layer, []).append(_small(result.values[i, 0], result.labels[i]))
    rows = "".join(f"<div style='white-space:normal'>{''.join(cells)}</div>" for cells in layers.values())
    first = f"on {html.visible(result.prompts.strings[0][0])}" if result.prompts else "on the first token"
    said = f"queries down, keys across; white 0, red 1; under each its mean attention {first}"
    return rows + html.note(said + "".join(f"; not shown: {x}" for x in more))


def _small(pattern: Float[Tensor, "query key"], label: str) -> str:
    on_first = pattern[1:, 0].mean().item() if len(pattern) > 1 else 1.0
    side = (len(pattern) + DOTS - 1) // DOTS  # of what is long, blocks of so many tokens are one dot: their largest
    if side > 1:
        pattern = torch.nn.functional.max_pool2d(pattern[None, None].float(), side, ceil_mode=True)[0, 0]
    look = f"width:{SMALL}px;height:{SMALL}px;image-rendering:pixelated;border:1px solid #ddd;display:block"
    return (
        f"<div style='display:inline-block;margin:2px;font-size:11px;text-align:center' title='{label}'>"
        f"<img alt='{label}' style='{look}' src='{png(pattern)}'>{label} {on_first:.0%}</div>"
    )


def png(values: Float[Tensor, "row column"]) -> str:
    """Numbers from 0 to 1 as the address of a picture that holds itself: white to red."""
    shares = torch.arange(SHADES, dtype=torch.float64)[:, None] / (SHADES - 1)
    palette = (255 + (torch.tensor(html.POSITIVE, dtype=torch.float64) - 255) * shares).round().to(torch.uint8)
    which = (values.double().nan_to_num().clamp(0, 1) * (SHADES - 1)).round().to(torch.uint8)
    lines = b"".join(b"\0" + bytes(row) for row in which.tolist())

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 8, 3, 0, 0, 0)
    colours = bytes(palette.flatten().tolist())
    parts = (
        chunk(b"IHDR", size) + chunk(b"PLTE", colours) + chunk(b"IDAT", zlib.compress(lines, 9)) + chunk(b"IEND", b"")
    )
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + parts).decode()


def of_token_losses(result: TokenLosses) -> str:
    if result.prompts is None:
        return ""
    n = len(result.losses)
    shown = min(n, max(1, html.TEXT // (result.losses.shape[1] + 1)))
    texts = [losses_as_text(result, i) for i in range(shown)]
    return "".join(texts) + html.note(f"not shown: {n - shown} more prompts" if shown < n else "")


def losses_as_text(result: TokenLosses, prompt: int) -> str:
    if result.prompts is None:
        raise ValueError("the result does not know what the model read, so it has no text")
    n = len(result.losses)
    at = indices(prompt, n, "prompt", range(n), "the prompts")[0]
    values = [torch.nan, *result.losses[at].tolist()]
    return html.coloured_tokens(
        result.prompts.strings[at], values, "nats", html.most_of(result.losses.flatten().tolist())
    )
