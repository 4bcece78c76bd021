"""What results of attribution show of themselves: pictures in plain HTML."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from ..batching import indices
from ..results import Prompts, counted
from . import html

if TYPE_CHECKING:
    from ..dla import AttributionError, LogitAttribution, ReaderAttribution, ScoreAttribution

HEAD = re.compile(r"L(\d+)H(\d+)")
# Cells of all grids of a picture together.
CELLS = 1500


def of_logits(result: LogitAttribution) -> str:
    unit = "logits"
    if result.values.numel() == 0:
        return ""
    means, n_tokens = result.values.detach().mean((1, 2)).cpu().double(), result.bias.numel()
    heads = of_heads(means, result.labels, unit)
    if n_tokens == 1 or len(result.bias) > 1:
        said = "" if n_tokens == 1 else f"means over {counted(n_tokens, 'token')}"
        bias = result.bias.detach().cpu().double().mean()
        total = "logit" if result.kind == "attribution" else "sum and bias"
        return heads + html.note(said) + added_up(means, bias, result.labels, unit, total)
    values, cells = result.values[:, 0].detach().cpu().double(), CELLS - heads.count("<td")
    return heads + over_tokens(values, result.labels, result.positions, result.prompts, 0, unit, cells)


def of_heads(
    values: Float[Tensor, " component"], labels: Sequence[str], unit: str, most: float | int | None = None
) -> str:
    """A grid of layers by heads, layer 0 at the top; nothing where components are no heads."""
    cells = {tuple(map(int, found.groups())): i for i, x in enumerate(labels) if (found := HEAD.fullmatch(x))}
    if not cells:
        return ""
    layers, heads = (sorted({cell[axis] for cell in cells}) for axis in (0, 1))
    numbers = values.tolist()
    shown, columns = layers[: 2 * html.ROWS], heads[: html.COLUMNS]
    grid = [[numbers[cells[i, j]] if (i, j) in cells else torch.nan for j in columns] for i in shown]
    left = "" if (shown, columns) == (layers, heads) else f"{len(shown)} of {len(layers)} layers, {len(columns)} heads"
    names = [f"L{i}" for i in shown], [f"H{j}" for j in columns]
    return html.heading("Heads") + html.grid(grid, *names, unit, most, corner="layer \\ head") + html.note(left)


def added_up(
    values: Float[Tensor, " component"], bias: Float[Tensor, ""], labels: Sequence[str], unit: str, total: str
) -> str:
    """Bars of the largest components in the model's order, of all others together, of the bias and of the sum."""
    shown, others = largest(values, html.ROWS - 3)
    names, numbers = [labels[i] for i in shown], [values[i].item() for i in shown]
    if others:
        names.append(counted(len(others), "other"))
        numbers.append(values[others].sum().item())
    names += ["bias", total]
    numbers += [bias.item(), (values.sum() + bias).item()]
    return html.bars(names, numbers, unit, totals=1)


def over_tokens(
    values: Float[Tensor, "component pos"],
    labels: Sequence[str],
    positions: Sequence[int],
    prompts: Prompts | None,
    prompt: int,
    unit: str,
    cells: int = CELLS,
) -> str:
    """A grid of the largest components by the tokens at the positions."""
    rows = max(3, min(html.ROWS, cells // min(values.shape[1], html.COLUMNS)))
    shown, others = largest(values.abs().amax(1), rows)
    columns = tokens_at(positions, prompts, prompt)
    n = len(columns)
    grid = values[shown][:, : html.COLUMNS].tolist()
    left = [f"{len(others):,} smaller components"] * bool(others)
    left += [f"{n - html.COLUMNS:,} later tokens"] * (n > html.COLUMNS)
    picture = html.grid(grid, [labels[i] for i in shown], columns[: html.COLUMNS], unit)
    return picture + html.note("not shown: " + ", ".join(left) if left else "")


def tokens_at(positions: Sequence[int], prompts: Prompts | None, prompt: int) -> list[str]:
    """The tokens there; the positions' numbers where nobody knows."""
    return [str(p) if prompts is None else prompts.strings[prompt][p] for p in positions]


def largest(values: Float[Tensor, " component"], n: int) -> tuple[list[int], list[int]]:
    """The n of largest size, in their own order, and all others."""
    if len(values) <= n:
        return list(range(len(values))), []
    found = values.abs().nan_to_num(nan=torch.inf).topk(n).indices.sort().values.tolist()
    chosen = set(found)
    return found, [i for i in range(len(values)) if i not in chosen]


def logits_as_text(result: LogitAttribution, component: str | None, prompt: int) -> str:
    prompt = _prompt(result, prompt)
    assert result.prompts is not None
    values = _of_component(result.values[:, prompt], result.labels, component)
    strings, positions = result.prompts.strings[prompt], result.positions
    ahead = int(result.what == "the next token" or result.what.startswith("the next token - "))
    cells = dict(zip((p + ahead for p in positions), values.tolist()))
    said = component or "all components"
    return html.heading(f"{said}: {result.kind} of {result.what}") + html.coloured_tokens(
        strings, [cells.get(p, torch.nan) for p in range(len(strings))], "logits"
    )


def sources_as_text(result: ReaderAttribution, reader: int, component: str | None, prompt: int, position: int) -> str:
    if not result.by_source:
        raise ValueError("text() wants values by the position that was read from: by='source'")
    prompt = _prompt(result, prompt)
    assert result.prompts is not None
    n = len(result.positions)
    at = indices(position, n, "position", range(n), "entries")[0]
    values = result.values[reader, :, prompt, at]
    if result.senders is not None:
        raise ValueError("text() wants all components, not the largest alone (top)")
    values = _of_component(values, result.labels, component)
    strings, where = result.prompts.strings[prompt], result.positions[at]
    title = f"What {result.readers[reader]} at {strings[where]!r} (position {where}) reads from each token"
    return html.heading(title) + html.coloured_tokens(strings[: where + 1], values.tolist(), "units read")


def _of_component(
    values: Float[Tensor, "component ..."], labels: Sequence[str], component: str | None
) -> Float[Tensor, ...]:
    """One component's values, or the sum of all."""
    if component is None:
        return values.sum(0)
    if component not in labels:
        raise ValueError(f"component {component!r} is none of {', '.join(labels[:3])}, ..., {labels[-1]}")
    return values[labels.index(component)]


def _prompt(result: LogitAttribution | ReaderAttribution, prompt: int) -> int:
    if result.prompts is None:
        raise ValueError("the result does not know what the model read, so it has no text")
    n = len(result.prompts)
    return indices(prompt, n, "prompt", range(n), "the prompts")[0]


def of_readers(result: ReaderAttribution) -> str:
    unit = "units read"
    if result.values.numel() == 0:
        return ""
    if result.senders is not None:
        rows = result.table().head(html.ROWS)
        names = [f"{reader} ← {component}" for reader, component in zip(rows.reader, rows.component)]
        often = [f"{share:.3g} per token" for share in rows.per_token]
        return html.bars(names, rows["mean"].tolist(), f"{unit}, mean where largest", often)
    values = (result.values.sum(-1) if result.by_source else result.values).detach()
    if len(values) > 1:
        return _grid_of_readers(values.mean((2, 3)).cpu().double(), result, unit)
    values = values[0].cpu().double()
    text = sources_as_text(result, 0, None, 0, -1) if result.by_source and result.prompts is not None else ""
    heads = of_heads(values.mean((1, 2)), result.labels, unit)
    if values[0].numel() > 1 and len(values[0]) == 1:
        where, cells = (result.labels, result.positions, result.prompts), CELLS - heads.count("<td")
        return text + heads + over_tokens(values[:, 0], *where, 0, unit, cells)
    said = "" if values[0].numel() == 1 else f"means over {counted(values[0].numel(), 'token')}"
    bias, total = result.bias[0].detach().cpu().double().mean(), "sum and bias"
    return text + heads + html.note(said) + added_up(values.mean((1, 2)), bias, result.labels, unit, total)


def _grid_of_readers(means: Float[Tensor, "reader component"], result: ReaderAttribution, unit: str) -> str:
    readers, other_readers = largest(means.abs().amax(1), html.ROWS)
    components, others = largest(means.abs().amax(0), html.COLUMNS // 2)
    grid = html.grid(
        means[readers][:, components].tolist(),
        [result.readers[i] for i in readers],
        [result.labels[i] for i in components],
        f"{unit}, mean over tokens",
        corner="reader \\ component",
    )
    left = [f"{len(other_readers):,} readers"] * bool(other_readers) + [f"{len(others):,} components"] * bool(others)
    return grid + html.note("not shown, being smaller: " + ", ".join(left) if left else "")


def of_scores(result: ScoreAttribution) -> str:
    seen = int(result.visible.sum()) * len(result.scores)
    if result.values.numel() == 0 or seen == 0:
        return ""
    unit = "scores" if seen == 1 else f"scores, mean over {counted(seen, 'pair')} of query and key"
    if result.pairs is not None:
        rows = result.table().head(html.ROWS)
        names = [f"{q} → {k}" for q, k in zip(rows.query_component, rows.key_component)]
        often = [f"at {counted(int(n), 'score')}" for n in rows.scores]
        return html.bars(names, rows["mean"].tolist(), "scores, mean where largest", often)
    means = mean_of_pairs(result)
    rows_of, other_rows = largest(means.abs().amax(1), html.ROWS)
    columns, other_columns = largest(means.abs().amax(0), html.ROWS)
    grid = html.grid(
        means[rows_of][:, columns].tolist(),
        [result.query_labels[i] for i in rows_of],
        [result.key_labels[i] for i in columns],
        unit,
        corner="query \\ key",
    )
    left = [f"{len(other_rows):,} on the query's side"] * bool(other_rows)
    left += [f"{len(other_columns):,} on the key's"] * bool(other_columns)
    return grid + html.note("not shown, being smaller: " + ", ".join(left) if left else "")


def mean_of_pairs(result: ScoreAttribution) -> Float[Tensor, "query_component key_component"]:
    """Over what the queries see."""
    seen = result.visible.to(result.values)
    sums = torch.einsum("...qk,qk->...", result.values.detach(), seen)
    return (sums.mean(-1) / seen.sum()).cpu().double()


def of_errors(result: AttributionError) -> str:
    unit = "NMAE"
    values = result.per_component.cpu().double()
    heads = of_heads(values, result.labels, unit)
    shown, others = largest(values, html.ROWS - 11 if heads else html.ROWS - 1)
    shown.sort(key=lambda i: -values[i].item())
    bounds = [result.interval, *((result.low[i].item(), result.high[i].item()) for i in shown)]
    said = ["" if low != low else f"95% [{low:.3g}, {high:.3g}]" for low, high in bounds]
    numbers = [result.pooled, *values[shown].tolist()]
    left = f"not shown: {counted(len(others), 'component')} with smaller errors" if others else ""
    return heads + html.bars(["pooled", *(result.labels[i] for i in shown)], numbers, unit, said) + html.note(left)
