"""Activation patching on a model's weights, computing only what a patch changes.

A cell's patch changes the residual stream from one position on. Each cell is therefore carried as the rows
[from its start to the end] of its prompt's residual stream; the rows before it, their keys and values, and
everything below the patched layer come from the unpatched ("base") run. One sweep goes up the layers: a cell
joins at the layer it patches, and all cells that have joined share each product with a weight matrix. A cell that
has changed a single row joins more cheaply: in its first layer only that row's query, key and value are new. In
the last layer only the positions that the metric reads are computed.

Every step is exact: the results are those of overwriting the activation and running the whole model again. A cell
changes little, and in half precision that would be lost in rounding: rows are fp32 at least, with the weights as they
are stored.

Which rows go where is planned on the CPU and sent to the device, which is never waited for.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor

from ..forward import Past, Stream, block
from .cells import Cells, on_device
from .changes import CHANGES, Sweep, at_positions, by_unit, change_by_key, each, of_units, runs_of


@dataclass(frozen=True, kw_only=True)
class Rows(Stream):
    """Cells that start at the same position, each with the rows of its residual stream from there on."""

    past: Past  # the base's keys and values before the start, of each cell's prompt
    cell: Int[Tensor, " cell"]


@dataclass(frozen=True)
class Joining:
    """The cells that patch one layer, in order of start and unit: vectors on the device, and what is planned by."""

    cell: Int[Tensor, " cell"]
    prompt: Int[Tensor, " cell"]
    start: Int[Tensor, " cell"]
    unit: Int[Tensor, " cell"]
    units: Int[Tensor, " cell"]  # the same, on the CPU
    runs: tuple[tuple[int, slice], ...]  # each start, and the cells that have it


@dataclass(frozen=True)
class Single:
    """Cells that have changed one row of a residual stream and nothing else, at the entrance of a layer."""

    cells: Joining
    row: Tensor  # [cell, d_model]
    qkv: tuple[Tensor, Tensor, Tensor] | None = None  # [cell, head, d_head] each, if known


# ---------------------------------------------------------------------------------------------------------
# How cells join


def by_layer(cells: Cells, device) -> dict[int, Joining]:
    """The cells of each layer."""
    order = cells.unit.argsort(stable=True)
    for vector in (cells.start, cells.layer):
        order = order[vector[order].argsort(stable=True)]
    cells = cells[order]
    sent = on_device(torch.stack([order, cells.prompt, cells.start, cells.unit]), device)
    joining = {}
    for layer, here in runs_of(cells.layer):
        runs = tuple(runs_of(cells.start[here]))
        cell, prompt, start, unit = sent[:, here]
        joining[layer] = Joining(cell, prompt, start, unit, cells.unit[here], runs)
    return joining


def rows_from(sweep: Sweep, start: int, cell: Tensor, prompt: Tensor, resid: Tensor, qkv=None) -> Rows:
    """Cells as they enter a block."""
    needed = sweep.needed(len(sweep.weights.layers) - 1, start)
    positions = slice(needed.start - start, None) if isinstance(needed, slice) else needed - start
    return Rows(resid, positions=positions, past=Past(start, sweep.keep, prompt), qkv=qkv, cell=cell)


def _before(sweep: Sweep, i: int, cells: Joining) -> Single:
    """Cells whose row is changed at the entrance of block i: all that its attention makes of it is the source's."""
    row, q, k, v = (sweep.source[name][i][cells.prompt, cells.start] for name in ("resid_pre", "q", "k", "v"))
    return Single(cells, row, (q, k, v))


def _after(sweep: Sweep, i: int, cells: Joining) -> Single | list[Rows]:
    """Cells that patch block i, as they leave it."""
    request, changes = sweep.request, CHANGES[sweep.request.site]
    if changes.row is not None:
        return Single(cells, changes.row(sweep, i, cells.prompt, cells.start))
    # A key or value at one position changes z at all that follow, differently for each cell.
    by_key = request.by_position and request.row.of_keys
    change = None if by_key else by_unit(sweep, changes.patched(sweep, i) - sweep.base[changes.activation][i])
    if request.by_position and change is not None:
        here = change[cells.prompt, cells.start, cells.unit]
        return Single(cells, changes.write(sweep, i, cells.prompt, cells.start, here, cells.unit, cells.units, each))
    groups = []
    for start, mine in cells.runs:
        prompt, unit, positions = cells.prompt[mine], cells.unit[mine], sweep.needed(i, start)
        if change is None:
            here = change_by_key(sweep, i, start, positions, prompt, unit)
        else:
            here = of_units(change, prompt, positions, unit)
        rows = changes.write(sweep, i, prompt, positions, here, unit, cells.units[mine], at_positions)
        groups.append(rows_from(sweep, start, cells.cell[mine], prompt, rows))
    return groups


def _entering(sweep: Sweep, i: int, single: Single) -> list[Rows]:
    """Cells with one changed row, at the entrance of block i: only its query, key and value are not the base run's."""
    layer, base, cells = sweep.weights.layers[i], sweep.base, single.cells
    if single.qkv is None:
        sweep.tally.products(len(single.row), layer.of_qkv)
    q_row, k_row, v_row = single.qkv or layer.qkv(single.row, cells.start)
    groups = []
    for start, mine in cells.runs:
        prompt, positions = cells.prompt[mine], sweep.needed(i, start)
        k, v = base["k"][i][prompt], base["v"][i][prompt]
        k[:, start], v[:, start] = k_row[mine], v_row[mine]
        q, resid = (at_positions(base[name][i], prompt, positions) for name in ("q", "resid_pre"))
        if i < len(sweep.weights.layers) - 1 or start in sweep.reads:
            q[:, 0], resid[:, 0] = q_row[mine], single.row[mine]
        groups.append(rows_from(sweep, start, cells.cell[mine], prompt, resid, (q, k, v)))
    return groups


# ---------------------------------------------------------------------------------------------------------
# The sweep


def sweep_cells(sweep: Sweep, cells: Cells) -> Tensor:
    """Final residual streams of the patched runs at the positions read, [cell, read position, d_model]."""
    single: Single | None = None
    before = CHANGES[sweep.request.site].before
    joining = by_layer(cells, sweep.on_device.device)

    def entering(i: int) -> list[Rows]:
        nonlocal single
        if before and i in joining:
            single = _before(sweep, i, joining[i])
        found = [] if single is None else _entering(sweep, i, single)
        single = None
        return found

    def leaving(i: int) -> list[Rows]:
        nonlocal single
        if before or i not in joining:
            return []
        more = _after(sweep, i, joining[i])
        single = more if isinstance(more, Single) else None
        return [] if isinstance(more, Single) else more

    final = finals(sweep, cells.prompt, carried(sweep, min(joining), entering, leaving))
    if single is not None:
        final[single.cells.cell, torch.searchsorted(sweep.on_device, single.cells.start)] = single.row
    return final


Joins = Callable[[int], list[Rows]]
"""Cells that join at a layer."""


def carried(sweep: Sweep, first: int, entering: Joins, leaving: Joins) -> list[Rows]:
    """Cells carried from the first layer to the top, all that have joined together.

    Args:
        entering, leaving: those that join before and after a block.
    """
    groups: list[Rows] = []
    for i in range(first, len(sweep.weights.layers)):
        groups += entering(i)
        groups = _merged(_through_block(sweep, i, groups))
        more = leaving(i)
        groups = _merged([*groups, *more]) if more else groups
    return groups


def finals(sweep: Sweep, prompt: Int[Tensor, " cell"], groups: Sequence[Rows]) -> Tensor:
    """Final residual streams at the positions read, [cell, read position, d_model]: the base run's, but for the rows
    given. The prompts are on the CPU."""
    n_layers = len(sweep.weights.layers)
    base = sweep.base["resid_pre"][n_layers]
    final = at_positions(base, on_device(prompt, base.device), sweep.needed(n_layers - 1, 0))
    for g in groups:
        final[g.cell, bisect_left(sweep.reads, g.past.length) :] = g.resid
    return final


def _through_block(sweep: Sweep, i: int, groups: Sequence[Rows]) -> list[Rows]:
    done = block(sweep.weights, i, groups)
    for before, after in zip(groups, done):
        rows, new = (g.resid.shape[:2].numel() for g in (after, before))
        known = {"of_q": 0, "of_kv": 0} if before.qkv else {"of_kv": new}
        sweep.tally.block(sweep.weights.layers[i], rows, sweep.request.n_read, **known)
    return done


def _merged(groups: Sequence[Rows]) -> list[Rows]:
    """One group for each start."""
    by_start: dict[int, list[Rows]] = {}
    for g in groups:
        by_start.setdefault(g.past.length, []).append(g)
    return [same[0] if len(same) == 1 else _joined(same) for _, same in sorted(by_start.items())]


def _joined(groups: Sequence[Rows]) -> Rows:
    resid, cell, prompt = map(torch.cat, zip(*((g.resid, g.cell, g.past.rows) for g in groups)))
    return replace(groups[0], resid=resid, cell=cell, past=replace(groups[0].past, rows=prompt))
