"""Activation patching on a model's weights, computing only what a patch changes.

A cell's patch changes the residual stream from one position on. Each cell is therefore carried as the rows
[from its start to the end] of its prompt's residual stream; the rows before it, their keys and values, and
everything below the patched layer come from the unpatched ("base") run. One sweep goes up the layers: a cell
joins at the layer it patches, and all cells that have joined share each product with a weight matrix. A cell that
has changed a single row joins more cheaply: in its first layer only that row's query, key and value are new. In
the last layer only the positions that the metric reads are computed.

Keys and queries are kept as attention compares them: turned by their positions, where a model does that. Every step is
exact: the results are those of overwriting the activation and running the whole model again. A cell
changes little, and in half precision that would be lost in rounding: rows are fp32 at least, with the weights as they
are stored, made wide one layer at a time.

Which rows go where is planned on the CPU and sent to the device, which is never waited for.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ..products import products
from ..weights import Layer, Positions, Weights, widened
from .cells import Cells, Request, Tally, on_device

HIDDEN = {"cpu": 2**22, "cuda": 2**27}  # hidden activations of an MLP at a time: on a CPU, what its caches hold

Kept = dict[str, list[Tensor]]
"""Activations of one run by name and layer; "resid_pre" has one more, the final residual stream."""

_ALWAYS = {"resid_pre", "q", "k", "v"}
_NEEDS = {
    "resid_pre": set(),
    "resid_post": set(),
    "resid_mid": {"resid_mid"},
    "attn_out": {"attn_out"},
    "mlp_out": {"resid_mid", "mlp_out"},
    "neurons": {"neurons", "resid_mid", "mlp_sum"},
} | {site: {"z", "attn_sum"} for site in ("z", "q", "k", "v", "pattern")}
"""What each site needs of the two runs besides what every one needs."""


def _needs(weights: Weights, site: str) -> set[str]:
    needs = _ALWAYS | _NEEDS[site]
    # Where attention does not reach a block's MLP, what that writes stays the base run's.
    unreached = weights.layers[0].parallel and needs & {"attn_sum", "attn_out"}
    return needs | {"mlp_out"} if unreached else needs


def numbers_kept(weights: Weights, site: str, n_pos: int) -> int:
    """How many numbers the base and the source run together keep for one prompt."""
    layer = weights.layers[0]
    of_heads = dict(zip("qkv", (W.shape[0] * W.shape[2] for W, _ in layer.of_qkv))) | {"z": len(layer.W_O)}
    widths = of_heads | {"neurons": 0 if layer.W_in is None else layer.W_in.shape[1]}
    width = sum(widths.get(name, weights.W_E.shape[1]) for name in _needs(weights, site))
    return 2 * width * n_pos * len(weights.layers)


@dataclass(frozen=True)
class Rows:
    """Cells that start at the same position, each with the rows of its residual stream from there on."""

    start: int
    cell: Int[Tensor, " cell"]
    prompt: Int[Tensor, " cell"]
    resid: Tensor  # [cell, row, d_model]


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
    request: Request
    tally: Tally
    reads: tuple[int, ...]
    on_device: Int[Tensor, " read"]  # the reads, on the device
    held: dict[int, Layer] = field(default_factory=dict)  # the one layer made wide last

    def layer(self, i: int) -> Layer:
        if i not in self.held:
            self.held.clear()
            self.held[i] = widened(self.weights.layers[i])
        return self.held[i]

    def needed(self, i: int, start: int) -> slice | Tensor:
        """The positions from `start` on at which layer i's output is needed, as an index of positions."""
        if i < len(self.weights.layers) - 1:
            return slice(start, self.request.n_read)
        at = bisect_left(self.reads, start)
        first, last = self.reads[at], self.reads[-1]
        return slice(first, last + 1) if last - first == len(self.reads) - 1 - at else self.on_device[at:]


def sweep_of(weights: Weights, base: Kept, source: Kept, request: Request, tally: Tally) -> Sweep:
    reads = sorted(set(request.reads))
    sent = on_device(torch.tensor(reads), base["resid_pre"][0].device)
    return Sweep(weights, base, source, request, tally, tuple(reads), sent)


def _at(x: Tensor, prompt: Tensor, positions: slice | Tensor) -> Tensor:
    """Rows [cell, position, ...] of x [prompt, pos, ...]."""
    return x[prompt, positions] if isinstance(positions, slice) else x[prompt[:, None], positions]


def _each(x: Tensor, prompt: Tensor, position: Tensor) -> Tensor:
    """Rows [cell, ...] of x [prompt, pos, ...], one position each."""
    return x[prompt, position]


def _shifted(positions: slice | Tensor, start: int) -> slice | Tensor:
    """Positions counted from `start`."""
    if isinstance(positions, slice):
        return slice(positions.start - start, None)
    return positions - start


# ---------------------------------------------------------------------------------------------------------
# Pieces of a block that count what they do


def _count(tally: Tally, n_rows: int, linears) -> None:
    for W, _ in linears:
        tally.linear(n_rows, W.shape[-2], W.numel() // W.shape[-2])


def _qkv(layer: Layer, rows: Tensor, positions: Positions, tally: Tally) -> tuple[Tensor, Tensor, Tensor]:
    _count(tally, len(rows), layer.of_qkv)
    return layer.qkv(rows, positions)


def _attend(layer: Layer, q: Tensor, k: Tensor, v: Tensor, tally: Tally, positions: Positions = slice(None)) -> Tensor:
    """z of queries that are the keys' last positions (any slice), or stand at the positions given."""
    tally.flops += 4.0 * q.numel() * k.shape[1]
    return layer.attend(q, k, v, positions)


def _mlp(layer: Layer, mid: Tensor, reads: Tensor, tally: Tally, record=None) -> Tensor:
    """mid [row, d_model] and what the MLP adds to it, hidden activations made some rows at a time.

    Args:
        reads: the residual stream that the MLP reads.
        record: told the name, rows and offset of the activations.
    """
    if layer.W_in is None:
        return mid
    _count(tally, len(mid), (*layer.of_hidden, *layer.of_mlp_out))
    out = torch.empty_like(mid)
    step = max(1, HIDDEN.get(mid.device.type, 2**24) // layer.W_in.shape[1])
    for i in range(0, len(mid), step):
        here = slice(i, i + step)
        post = layer.mlp_post(reads[here])
        mlp_sum = layer.mlp_sum(post)
        mlp_out = layer.ln2_post(mlp_sum)
        if record is not None:
            for name, rows in (("neurons", post), ("mlp_sum", mlp_sum), ("mlp_out", mlp_out)):
                record(name, rows, i)
        torch.add(mid[here], mlp_out, out=out[here])
    return out


# ---------------------------------------------------------------------------------------------------------
# The two runs


def both_runs(
    weights: Weights,
    base: Int[Tensor, "prompt pos"],
    source: Int[Tensor, "prompt pos"],
    differ: Bool[Tensor, "prompt pos"],
    site: str,
    tally: Tally,
) -> tuple[Kept, Kept]:
    """Activations of the base and the source prompts.

    The source run is computed from each prompt's first different token on (`differ`, on the CPU); before it the two
    agree.
    """
    needs = _needs(weights, site)
    weights.reach(base.shape[1])
    first = torch.where(differ.any(1), differ.int().argmax(1), base.shape[1])
    kept = _record(weights, base, torch.zeros_like(first), None, needs, tally)
    if not differ.any():
        return kept, kept
    return kept, _record(weights, source, first, kept, needs, tally)


def _record(weights, tokens, first, base: Kept | None, needs: set[str], tally: Tally) -> Kept:
    n, n_pos = tokens.shape
    starts = [s for s in first.unique().tolist() if s < n_pos]
    prompts = [(first == s).nonzero().flatten() for s in starts]
    sizes = [len(p) for p in prompts]
    spans = [size * (n_pos - s) for size, s in zip(sizes, starts)]
    # The prompt and position of every row, group by group.
    row_prompt = torch.cat([p.repeat_interleave(n_pos - s) for s, p in zip(starts, prompts)])
    row_pos = torch.cat([torch.arange(s, n_pos).repeat(size) for s, size in zip(starts, sizes)])
    row_prompt, row_pos = on_device(torch.stack([row_prompt, row_pos]), tokens.device)
    prompts = on_device(torch.cat(prompts), tokens.device).split(sizes)
    kept: Kept = {name: [] for name in needs}

    def keep(name: str, rows: Tensor, i: int, offset: int = 0) -> None:
        if name not in needs:
            return
        if len(kept[name]) == i:
            like = rows.new_empty(n, n_pos, *rows.shape[1:]) if base is None else base[name][i].clone()
            kept[name].append(like)
        here = slice(offset, offset + len(rows))
        kept[name][i][row_prompt[here], row_pos[here]] = rows

    resid = weights.enter(tokens[row_prompt, row_pos], row_pos)
    for i, layer in enumerate(map(widened, weights.layers)):
        keep("resid_pre", resid, i)
        q, k, v = _qkv(layer, resid, row_pos, tally)
        for name, rows in (("q", q), ("k", k), ("v", v)):
            keep(name, rows, i)
        parts = []
        for start, mine, *qkv in zip(starts, prompts, *(x.split(spans) for x in (q, k, v))):
            q_g, k_g, v_g = (x.unflatten(0, (len(mine), -1)) for x in qkv)
            if start and base is not None:
                k_g = torch.cat([base["k"][i][mine, :start], k_g], 1)
                v_g = torch.cat([base["v"][i][mine, :start], v_g], 1)
            parts.append(_attend(layer, q_g, k_g, v_g, tally).flatten(0, 1))
        z = torch.cat(parts)
        _count(tally, len(z), layer.of_attn_out)
        attn_sum = layer.attn_sum(z)
        attn_out = layer.ln1_post(attn_sum)
        mid = resid + attn_out
        for name, rows in (("z", z), ("attn_sum", attn_sum), ("attn_out", attn_out), ("resid_mid", mid)):
            keep(name, rows, i)
        reads = resid if layer.parallel else mid
        resid = _mlp(layer, mid, reads, tally, lambda name, rows, offset, i=i: keep(name, rows, i, offset))
    keep("resid_pre", resid, len(weights.layers))
    return kept | {"resid_post": kept["resid_pre"][1:]}


def differs(sweep: Sweep, layer: int) -> Tensor:
    """Where the site differs between the runs: Bool[Tensor, "prompt pos"], or "prompt pos unit"."""
    site = sweep.request.site
    if site == "pattern":
        source, base = _pattern(sweep, sweep.source, layer), _pattern(sweep, sweep.base, layer)
        different = (source != base).any(-1).transpose(1, 2)
    else:
        different = sweep.source[site][layer] != sweep.base[site][layer]
        different = different if site == "neurons" else different.any(-1)
    return different if sweep.request.positional else sweep.request.of_units(different, -1)


def _pattern(sweep: Sweep, run: Kept, i: int) -> Tensor:
    n, n_pos, n_heads, d_head = run["q"][i].shape
    sweep.tally.flops += 2.0 * n * n_heads * d_head * n_pos**2
    return sweep.weights.layers[i].pattern(run["q"][i], run["k"][i])


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


def _single_before(sweep: Sweep, i: int, cells: Joining | None) -> Single | None:
    """Cells of resid_pre that join at the entrance of block i."""
    if sweep.request.site != "resid_pre" or cells is None:
        return None
    row, q, k, v = (sweep.source[name][i][cells.prompt, cells.start] for name in ("resid_pre", "q", "k", "v"))
    return Single(cells, row, (q, k, v))


def _joining_after(sweep: Sweep, i: int, cells: Joining | None) -> tuple[list[Rows], Single | None]:
    """Cells of all other sites that patch block i, as they leave it."""
    request, site = sweep.request, sweep.request.site
    if site == "resid_pre" or cells is None:
        return [], None
    base, source, layer = sweep.base, sweep.source, sweep.layer(i)

    def at(run: Kept, name: str) -> Tensor:
        return run[name][i][cells.prompt, cells.start]

    if site == "attn_out":
        return [], Single(cells, _after_attention(sweep, i, cells.prompt, cells.start, at(source, "attn_out")))
    if site == "resid_post":
        return [], Single(cells, at(source, "resid_post"))
    if site == "resid_mid":
        mid = at(source, "resid_mid")
        return [], Single(cells, _mlp(layer, mid, mid, sweep.tally))
    if site == "mlp_out":
        return [], Single(cells, at(base, "resid_mid") + at(source, "mlp_out"))
    change: Tensor | None
    if site == "neurons":
        change = source["neurons"][i] - base["neurons"][i]
    elif request.by_position and site in "kv":
        change = None
    else:
        change = _by_unit(sweep, _patched_z(sweep, i) - base["z"][i])
    if request.by_position and change is not None:
        here = change[cells.prompt, cells.start, cells.unit]
        row = _written(sweep, i, cells.prompt, cells.start, here, cells.unit, cells.units)
        return [], Single(cells, row)
    joining = []
    for start, mine in cells.runs:
        prompt, unit, positions = cells.prompt[mine], cells.unit[mine], sweep.needed(i, start)
        if change is None:
            here = _change_by_key(sweep, i, start, positions, prompt, unit)
        elif isinstance(positions, slice):
            here = change[prompt, positions, unit]
        else:
            here = change[prompt[:, None], positions, unit[:, None]]
        rows = _written(sweep, i, prompt, positions, here, unit, cells.units[mine])
        joining.append(Rows(start, cells.cell[mine], prompt, rows))
    return joining, None


def _by_unit(sweep: Sweep, z: Tensor) -> Tensor:
    """z [prompt, pos, head, d_head] by the units of the site: of a key or value that several heads read, all theirs."""
    return z.unflatten(2, (len(sweep.weights.layers[0].b_K), -1)).flatten(3) if sweep.request.site in "kv" else z


def _written(sweep: Sweep, i: int, prompt: Tensor, positions, change: Tensor, unit: Tensor, units: Tensor) -> Tensor:
    """Rows after block i [cell, *position, d_model] where a unit's z, or a neuron's activation, is changed.

    Args:
        positions: a slice, or [position], the same for all cells; or [cell], one for each.
        change: [cell, *position, d_head], or [cell, *position] of neurons.
        unit, units: the heads or neurons, on the device and on the CPU.
    """
    base, layer = sweep.base, sweep.layer(i)
    at = _each if change.ndim == (1 if sweep.request.site == "neurons" else 2) else _at
    if sweep.request.site == "neurons":
        assert layer.W_out is not None
        direction = layer.W_out[unit].view(len(unit), *[1] * (change.ndim - 1), -1)
        mlp_sum = at(base["mlp_sum"][i], prompt, positions) + change[..., None] * direction
        return at(base["resid_mid"][i], prompt, positions) + layer.ln2_post(mlp_sum)
    attn_sum = at(base["attn_sum"][i], prompt, positions) + _through_W_O(layer, change, units, sweep.tally)
    return _after_attention(sweep, i, prompt, positions, layer.ln1_post(attn_sum), at)


def _after_attention(sweep: Sweep, i: int, prompt: Tensor, positions, attn_out: Tensor, at=None) -> Tensor:
    """Rows after block i where attn_out is that given and the rest the base run's."""
    base, layer, at = sweep.base, sweep.layer(i), at or _each
    mid = at(base["resid_pre"][i], prompt, positions) + attn_out
    if layer.parallel:
        return mid + at(base["mlp_out"][i], prompt, positions)
    rows = mid.flatten(0, -2)
    return _mlp(layer, rows, rows, sweep.tally).view_as(mid)


def _patched_z(sweep: Sweep, i: int) -> Tensor:
    """z of block i if a head's q, k, v or pattern were the source's at all positions (for each head alone)."""
    site, layer = sweep.request.site, sweep.weights.layers[i]
    if site == "z":
        return sweep.source["z"][i]
    if site == "pattern":
        return layer.mix(_pattern(sweep, sweep.source, i), sweep.base["v"][i])
    q, k, v = (sweep.source[name][i] if name == site else sweep.base[name][i] for name in "qkv")
    return _attend(layer, q, k, v, sweep.tally)


def _change_by_key(sweep: Sweep, i: int, start: int, positions, prompt: Tensor, head: Tensor) -> Tensor:
    """Change of z [cell, row, d_heads] at `positions` if one head's k or v is the source's at `start` alone; of all the
    heads that read it."""
    site, layer, base = sweep.request.site, sweep.weights.layers[i], sweep.base
    n_heads = len(layer.b_K)

    def rows(x: Tensor) -> Tensor:  # [cell, row, head, d_head] of the heads that read the cells' heads
        x = x.unflatten(2, (n_heads, -1))
        if isinstance(positions, slice):
            return x[prompt, positions, head]
        return x[prompt[:, None], positions, head[:, None]]

    k, v = (base[name][i][prompt, :, head].unsqueeze(2) for name in "kv")  # [cell, key, 1, d_head]
    (k if site == "k" else v)[:, start, 0] = sweep.source[site][i][prompt, start, head]
    z = _attend(layer, rows(base["q"][i]), k, v, sweep.tally, positions)
    return (z - rows(base["z"][i])).flatten(2)


def _through_W_O(layer: Layer, change: Tensor, heads: Int[Tensor, " cell"], tally: Tally) -> Tensor:
    """What changes of one head's z [cell, *row, d_head] write, [cell, *row, d_model]; the heads are on the CPU."""
    d_head = change.shape[-1]
    tally.linear(change.shape[:-1].numel(), d_head, layer.W_O.shape[1])
    W_O = layer.W_O.unflatten(0, (-1, d_head))
    order = heads.argsort(stable=True)
    runs = _runs(heads[order])
    order = on_device(order, change.device)
    change = change[order]
    out = torch.cat([change[mine] @ W_O[head] for head, mine in runs])
    return torch.empty_like(out).index_copy_(0, order, out)


# ---------------------------------------------------------------------------------------------------------
# The sweep


def sweep_cells(sweep: Sweep, cells: Cells) -> Tensor:
    """Final residual streams of the patched runs at the positions read, [cell, read position, d_model]."""
    groups: list[Rows] = []
    single: Single | None = None
    n_layers = len(sweep.weights.layers)
    base = sweep.base["resid_pre"][n_layers]
    joining = by_layer(cells, base.device)
    for i in range(min(joining), n_layers):
        single = single or _single_before(sweep, i, joining.get(i))
        groups = _block(sweep, i, groups, single)
        more, single = _joining_after(sweep, i, joining.get(i))
        groups = _merged([*groups, *more])
    final = _at(base, on_device(cells.prompt, base.device), sweep.needed(n_layers - 1, 0))
    for g in groups:
        final[g.cell, bisect_left(sweep.reads, g.start) :] = g.resid
    if single is not None:
        final[single.cells.cell, torch.searchsorted(sweep.on_device, single.cells.start)] = single.row
    return final


def _merged(groups: Sequence[Rows]) -> list[Rows]:
    """One group for each start."""
    by_start: dict[int, list[Rows]] = {}
    for g in groups:
        by_start.setdefault(g.start, []).append(g)
    return [
        same[0]
        if len(same) == 1
        else Rows(start, *(torch.cat([getattr(g, name) for g in same]) for name in ("cell", "prompt", "resid")))
        for start, same in sorted(by_start.items())
    ]


def _block(sweep: Sweep, i: int, groups: Sequence[Rows], single: Single | None) -> list[Rows]:
    """Rows after block i: those of the cells on their way, and of those that enter with a single changed row."""
    layer, tally = sweep.layer(i), sweep.tally
    parts: list[tuple[Rows, Tensor]] = []  # rows of the residual stream that are needed on, and their z
    if groups:
        rows = layer.ln1(torch.cat([g.resid.flatten(0, 1) for g in groups]))
        sizes = [g.resid.shape[:2].numel() for g in groups]
        last = i == len(sweep.weights.layers) - 1
        # Keys and values of all rows; queries, in the last layer, only where the metric reads.
        linears = layer.of_qkv[1 if last else 0 :]
        _count(tally, len(rows), linears)
        queries: Any
        *queries, keys, values = products(rows, *linears)
        queries = queries[0].split(sizes) if queries else [None] * len(groups)
        for g, x, q, k, v in zip(groups, rows.split(sizes), queries, keys.split(sizes), values.split(sizes)):
            positions, resid = sweep.needed(i, g.start), g.resid
            shape = resid.shape[:2]
            if q is None:
                local = _shifted(positions, g.start)
                resid, x = resid[:, local], x.unflatten(0, shape)[:, local]
                _count(tally, x.shape[:2].numel(), layer.of_qkv[:1])
                (q,) = products(x, *layer.of_qkv[:1])
            else:
                q = q.unflatten(0, shape)
            k, v = (t.unflatten(0, shape) for t in (k, v))
            q, k = layer.place_q(q, positions), layer.place_k(k, slice(g.start, sweep.request.n_read))
            if g.start:
                k = torch.cat([sweep.base["k"][i][g.prompt, : g.start], k], 1)
                v = torch.cat([sweep.base["v"][i][g.prompt, : g.start], v], 1)
            z = _attend(layer, q, k, v, tally, positions)
            parts.append((Rows(g.start, g.cell, g.prompt, resid), z))
    if single is not None:
        parts += _enter(sweep, i, single)
    if not parts:
        return []
    # Rows that start at the same position stand together, so that they are one group from here on.
    parts.sort(key=lambda part: part[0].start)
    resid = torch.cat([g.resid.flatten(0, 1) for g, _ in parts])
    z = torch.cat([z.flatten(0, 1) for _, z in parts])
    _count(tally, len(z), layer.of_attn_out)
    mid = resid + layer.attn_out(z)
    out = _mlp(layer, mid, resid if layer.parallel else mid, tally)
    done = out.split([g.resid.shape[:2].numel() for g, _ in parts])
    return [Rows(g.start, g.cell, g.prompt, rows.view_as(g.resid)) for (g, _), rows in zip(parts, done)]


def _enter(sweep: Sweep, i: int, single: Single) -> list[tuple[Rows, Tensor]]:
    """z in block i of cells with one changed row: only its query, key and value are not the base run's."""
    layer, base, cells = sweep.layer(i), sweep.base, single.cells
    q_row, k_row, v_row = single.qkv or _qkv(layer, single.row, cells.start, sweep.tally)
    parts = []
    for start, mine in cells.runs:
        prompt, positions = cells.prompt[mine], sweep.needed(i, start)
        k, v = base["k"][i][prompt], base["v"][i][prompt]
        k[:, start], v[:, start] = k_row[mine], v_row[mine]
        q, resid = (_at(base[name][i], prompt, positions) for name in ("q", "resid_pre"))
        if i < len(sweep.weights.layers) - 1 or start in sweep.reads:
            q[:, 0], resid[:, 0] = q_row[mine], single.row[mine]
        z = _attend(layer, q, k, v, sweep.tally, positions)
        parts.append((Rows(start, cells.cell[mine], prompt, resid), z))
    return parts
