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
from jaxtyping import Bool, Int
from torch import Tensor

from ..forward import KeysAndValues, Past, Stream, block, mlp
from ..weights import Layer, Weights
from .cells import Cells, Request, Tally, on_device
from .runs import Kept, both_runs


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


@dataclass(frozen=True)
class Sweep:
    """What a sweep reads: weights, the two runs, the site, the positions that the metric reads (sorted)."""

    weights: Weights
    base: Kept
    source: Kept
    keep: KeysAndValues  # the base's
    request: Request
    tally: Tally
    reads: tuple[int, ...]
    on_device: Int[Tensor, " read"]  # the reads, on the device

    def needed(self, i: int, start: int) -> slice | Tensor:
        """The positions from `start` on at which layer i's output is needed, as an index of positions."""
        if i < len(self.weights.layers) - 1:
            return slice(start, self.request.n_read)
        at = bisect_left(self.reads, start)
        first, last = self.reads[at], self.reads[-1]
        return slice(first, last + 1) if last - first == len(self.reads) - 1 - at else self.on_device[at:]

    def rows(self, start: int, cell: Tensor, prompt: Tensor, resid: Tensor, qkv=None) -> Rows:
        """Cells as they enter a block."""
        needed = self.needed(len(self.weights.layers) - 1, start)
        positions = slice(needed.start - start, None) if isinstance(needed, slice) else needed - start
        return Rows(resid, positions=positions, past=Past(start, self.keep, prompt), qkv=qkv, cell=cell)

    def at(self, name: str, i: int, cells: Joining, run: Kept | None = None) -> Tensor:
        """Rows [cell, ...] of an activation of layer i, where each cell starts: of the source run, or of another."""
        return (run or self.source)[name][i][cells.prompt, cells.start]


def sweep_of(
    weights: Weights,
    base: Int[Tensor, "prompt pos"],
    source: Int[Tensor, "prompt pos"],
    differ: Bool[Tensor, "prompt pos"],
    request: Request,
    tally: Tally,
) -> Sweep:
    """The two runs, ready to be swept.

    Args:
        weights: with norms in fp32 at least (`widened_norms`).
        base, source: the tokens.
        differ: where they do, on the CPU.
    """
    kept = both_runs(weights, base, source, differ, needs(weights, request.site), tally)
    reads = sorted(set(request.reads))
    return Sweep(weights, *kept, request, tally, tuple(reads), on_device(torch.tensor(reads), base.device))


def _at(x: Tensor, prompt: Tensor, positions: slice | Tensor) -> Tensor:
    """Rows [cell, position, ...] of x [prompt, pos, ...]."""
    return x[prompt, positions] if isinstance(positions, slice) else x[prompt[:, None], positions]


def _each(x: Tensor, prompt: Tensor, position: Tensor) -> Tensor:
    """Rows [cell, ...] of x [prompt, pos, ...], one position each."""
    return x[prompt, position]


# ---------------------------------------------------------------------------------------------------------
# What cells have changed after the layer they patch


def _row_of_source(name: str) -> Callable[[Sweep, int, Joining], Tensor]:
    return lambda sweep, i, cells: sweep.at(name, i, cells)


def _row_by_mid(sweep: Sweep, i: int, cells: Joining) -> Tensor:
    return _through_mlp(sweep, i, sweep.at("resid_mid", i, cells))


def _row_by_attn_out(sweep: Sweep, i: int, cells: Joining) -> Tensor:
    return _after_attention(sweep, i, cells.prompt, cells.start, sweep.at("attn_out", i, cells), _each)


def _row_by_mlp_out(sweep: Sweep, i: int, cells: Joining) -> Tensor:
    return sweep.at("resid_mid", i, cells, sweep.base) + sweep.at("mlp_out", i, cells)


def _z_of_source(sweep: Sweep, i: int) -> Tensor:
    return sweep.source["z"][i]


def _z_of_part(sweep: Sweep, i: int) -> Tensor:
    """z if the queries, keys or values were the source's."""
    layer, patched = sweep.weights.layers[i], {sweep.request.site: sweep.source}
    q, k, v = (patched.get(name, sweep.base)[name][i] for name in "qkv")
    sweep.tally.attention(layer, q.shape[:2].numel(), k.shape[1])
    return layer.attend(q, k, v)


def _z_of_pattern(sweep: Sweep, i: int) -> Tensor:
    return sweep.weights.layers[i].mix(_pattern(sweep, sweep.source, i), sweep.base["v"][i])


def _pattern(sweep: Sweep, run: Kept, i: int) -> Tensor:
    q, k = run["q"][i], run["k"][i]
    sweep.tally.flops += 2.0 * q.numel() * k.shape[1]
    return sweep.weights.layers[i].pattern(q, k)


def _by_heads(sweep: Sweep, i: int, prompt, positions, change: Tensor, unit, units: Tensor, at) -> Tensor:
    """Rows after block i where the z of heads is changed: `change` is [cell, *position, d_heads]."""
    layer = sweep.weights.layers[i]
    written = _through_W_O(layer, change, units, sweep.tally)
    attn_sum = at(sweep.base["attn_sum"][i], prompt, positions) + written
    return _after_attention(sweep, i, prompt, positions, layer.ln1_post(attn_sum), at)


def _by_neurons(sweep: Sweep, i: int, prompt, positions, change: Tensor, unit: Tensor, units, at) -> Tensor:
    """Rows after block i where neurons' activations are changed: `change` is [cell, *position]."""
    base, layer = sweep.base, sweep.weights.layers[i]
    assert layer.W_out is not None
    direction = layer.W_out[unit].view(len(unit), *[1] * (change.ndim - 1), -1)
    mlp_sum = at(base["mlp_sum"][i], prompt, positions) + change[..., None] * direction
    return at(base["resid_mid"][i], prompt, positions) + layer.ln2_post(mlp_sum)


def _after_attention(sweep: Sweep, i: int, prompt: Tensor, positions, attn_out: Tensor, at) -> Tensor:
    """Rows after block i where attn_out is that given and the rest the base run's."""
    base = sweep.base
    mid = at(base["resid_pre"][i], prompt, positions) + attn_out
    if sweep.weights.layers[i].parallel:
        return mid + at(base["mlp_out"][i], prompt, positions)
    return _through_mlp(sweep, i, mid)


def _through_mlp(sweep: Sweep, i: int, mid: Tensor) -> Tensor:
    layer = sweep.weights.layers[i]
    sweep.tally.mlp(layer, mid.shape[:-1].numel())
    return mid if layer.W_in is None else mid + mlp(layer, mid)


def _through_W_O(layer: Layer, change: Tensor, heads: Int[Tensor, " cell"], tally: Tally) -> Tensor:
    """What changes of one head's z [cell, *row, d_head] write, [cell, *row, d_model]; the heads are on the CPU."""
    d_head = change.shape[-1]
    tally.linear(change.shape[:-1].numel(), d_head, layer.W_O.shape[1])
    W_O = layer.W_O.unflatten(0, (-1, d_head))
    order = heads.argsort(stable=True)
    runs = _runs(heads[order])
    order = on_device(order, change.device)
    change = change[order]
    out = torch.cat([change[mine] @ W_O[head].to(change.dtype) for head, mine in runs])
    return torch.empty_like(out).index_copy_(0, order, out)


# ---------------------------------------------------------------------------------------------------------
# The sites


@dataclass(frozen=True)
class Joins:
    """How the cells of a site join.

    Attributes:
        needs: what must be known of the two runs besides what is for every site.
        row: of sites of positions: the one row of the residual stream that cells have changed after their layer.
        before: that row is changed before the layer already, and is the source's.
        patched: of sites of units: the activation that cells change, if all units were patched at all positions, and
            `changes`, its name in the base run.
        write: the rows after the layer, of changes of that activation.
        whole: the site's own activation, where it is not kept.
    """

    needs: tuple[str, ...] = ()
    row: Callable[[Sweep, int, Joining], Tensor] | None = None
    before: bool = False
    patched: Callable[[Sweep, int], Tensor] = _z_of_source
    changes: str = "z"
    write: Callable[..., Tensor] = _by_heads
    whole: Callable[[Sweep, Kept, int], Tensor] | None = None


_OF_Z = ("z", "attn_sum")
JOINS = {
    "resid_pre": Joins(row=_row_of_source("resid_pre"), before=True),
    "resid_mid": Joins(("resid_mid",), row=_row_by_mid),
    "resid_post": Joins(row=_row_of_source("resid_post")),
    "attn_out": Joins(("attn_out",), row=_row_by_attn_out),
    "mlp_out": Joins(("resid_mid", "mlp_out"), row=_row_by_mlp_out),
    "z": Joins(_OF_Z),
    "q": Joins(_OF_Z, patched=_z_of_part),
    "k": Joins(_OF_Z, patched=_z_of_part),
    "v": Joins(_OF_Z, patched=_z_of_part),
    "pattern": Joins(_OF_Z, patched=_z_of_pattern, whole=_pattern),
    "neurons": Joins(
        ("neurons", "resid_mid", "mlp_sum"),
        patched=lambda sweep, i: sweep.source["neurons"][i],
        changes="neurons",
        write=_by_neurons,
    ),
}


def needs(weights: Weights, site: str) -> set[str]:
    """What the two runs must keep."""
    needs = {"resid_pre", "q", "k", "v", *JOINS[site].needs}
    # Where attention does not reach a block's MLP, what that writes stays the base run's.
    unreached = weights.layers[0].parallel and needs & {"attn_sum", "attn_out"}
    return needs | {"mlp_out"} if unreached else needs


def differs(sweep: Sweep, layer: int) -> Tensor:
    """Where the site differs between the runs: Bool[Tensor, "prompt pos"], or "prompt pos unit"."""
    site, whole = sweep.request.site, JOINS[sweep.request.site].whole
    base, source = (whole(sweep, x, layer) if whole else x[site][layer] for x in (sweep.base, sweep.source))
    return sweep.request.by_place(source != base, torch.any)


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
    for layer, here in _runs(cells.layer):
        runs = tuple(_runs(cells.start[here]))
        cell, prompt, start, unit = sent[:, here]
        joining[layer] = Joining(cell, prompt, start, unit, cells.unit[here], runs)
    return joining


def _runs(x: Int[Tensor, " n"]) -> list[tuple[int, slice]]:
    """The values of a sorted vector of the CPU, and where each is."""
    values, counts = x.unique_consecutive(return_counts=True)
    ends = counts.cumsum(0).tolist()
    return [(value, slice(first, end)) for value, first, end in zip(values.tolist(), [0, *ends], ends)]


def _before(sweep: Sweep, i: int, cells: Joining) -> Single:
    """Cells whose row is changed at the entrance of block i: all that its attention makes of it is the source's."""
    q, k, v = (sweep.at(name, i, cells) for name in "qkv")
    return Single(cells, sweep.at("resid_pre", i, cells), (q, k, v))


def _after(sweep: Sweep, i: int, cells: Joining) -> Single | list[Rows]:
    """Cells that patch block i, as they leave it."""
    request, joins = sweep.request, JOINS[sweep.request.site]
    if joins.row is not None:
        return Single(cells, joins.row(sweep, i, cells))
    # A key or value at one position changes z at all that follow, differently for each cell.
    by_key = request.by_position and request.row.of_keys
    change = None if by_key else _by_unit(sweep, joins.patched(sweep, i) - sweep.base[joins.changes][i])
    if request.by_position and change is not None:
        here = change[cells.prompt, cells.start, cells.unit]
        return Single(cells, joins.write(sweep, i, cells.prompt, cells.start, here, cells.unit, cells.units, _each))
    groups = []
    for start, mine in cells.runs:
        prompt, unit, positions = cells.prompt[mine], cells.unit[mine], sweep.needed(i, start)
        if change is None:
            here = _change_by_key(sweep, i, start, positions, prompt, unit)
        else:
            here = _of_units(change, prompt, positions, unit)
        rows = joins.write(sweep, i, prompt, positions, here, unit, cells.units[mine], _at)
        groups.append(sweep.rows(start, cells.cell[mine], prompt, rows))
    return groups


def _of_units(x: Tensor, prompt: Tensor, positions: slice | Tensor, unit: Tensor) -> Tensor:
    """Rows [cell, position, ...] of x [prompt, pos, unit, ...]."""
    if isinstance(positions, slice):
        return x[prompt, positions, unit]
    return x[prompt[:, None], positions, unit[:, None]]


def _by_unit(sweep: Sweep, x: Tensor) -> Tensor:
    """z [prompt, pos, head, d_head] by the units of the site: of a key or value that several heads read, all theirs."""
    if not sweep.request.row.of_keys:
        return x
    return x.unflatten(2, (len(sweep.weights.layers[0].b_K), -1)).flatten(3)


def _change_by_key(sweep: Sweep, i: int, start: int, positions, prompt: Tensor, head: Tensor) -> Tensor:
    """Change of z [cell, row, d_heads] at `positions` if one head's k or v is the source's at `start` alone; of all the
    heads that read it."""
    site, layer, base = sweep.request.site, sweep.weights.layers[i], sweep.base

    def rows(x: Tensor) -> Tensor:  # [cell, row, head, d_head] of the heads that read the cells' heads
        return _of_units(x.unflatten(2, (len(layer.b_K), -1)), prompt, positions, head)

    keys = {name: base[name][i][prompt, :, head].unsqueeze(2) for name in "kv"}  # [cell, key, 1, d_head]
    keys[site][:, start, 0] = sweep.source[site][i][prompt, start, head]
    q = rows(base["q"][i])
    sweep.tally.flops += 4.0 * q.numel() * keys["k"].shape[1]
    return (layer.attend(q, keys["k"], keys["v"], positions) - rows(base["z"][i])).flatten(2)


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
        q, resid = (_at(base[name][i], prompt, positions) for name in ("q", "resid_pre"))
        if i < len(sweep.weights.layers) - 1 or start in sweep.reads:
            q[:, 0], resid[:, 0] = q_row[mine], single.row[mine]
        groups.append(sweep.rows(start, cells.cell[mine], prompt, resid, (q, k, v)))
    return groups


# ---------------------------------------------------------------------------------------------------------
# The sweep


def sweep_cells(sweep: Sweep, cells: Cells) -> Tensor:
    """Final residual streams of the patched runs at the positions read, [cell, read position, d_model]."""
    groups: list[Rows] = []
    single: Single | None = None
    n_layers, before = len(sweep.weights.layers), JOINS[sweep.request.site].before
    base = sweep.base["resid_pre"][n_layers]
    joining = by_layer(cells, base.device)
    for i in range(min(joining), n_layers):
        new = joining.get(i)
        if before and new is not None:
            single = _before(sweep, i, new)
        if single is not None:
            groups += _entering(sweep, i, single)
            single = None
        groups = _merged(_through_block(sweep, i, groups))
        if not before and new is not None:
            more = _after(sweep, i, new)
            if isinstance(more, Single):
                single = more
            else:
                groups = _merged([*groups, *more])
    final = _at(base, on_device(cells.prompt, base.device), sweep.needed(n_layers - 1, 0))
    for g in groups:
        final[g.cell, bisect_left(sweep.reads, g.past.length) :] = g.resid
    if single is not None:
        final[single.cells.cell, torch.searchsorted(sweep.on_device, single.cells.start)] = single.row
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
