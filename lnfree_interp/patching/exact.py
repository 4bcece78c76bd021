"""Activation patching on the packed forward, computing only what a patch changes.

A cell's patch changes the residual stream from one position on. Each cell is therefore carried as the rows
[from its start to the end] of its prompt's residual stream; the rows before it, their keys and values, and
everything below the patched layer come from the unpatched ("base") run. One sweep goes up the layers: a cell
joins at the layer it patches, and all cells that have joined share each product with a weight matrix. A cell that
has changed a single row joins more cheaply: in its first layer only that row's query, key and value are new. In
the last layer only the positions that the metric reads are computed.

Every step is exact: the results are those of overwriting the activation and running the whole model again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..forward import Layer, PackedWeights, attend, attention_pattern, causal_mask, layer_attn_out, layer_qkv, products
from .cells import Cells, Request, Tally

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
    "neurons": {"neurons"},
} | {site: {"z", "resid_mid"} for site in ("z", "q", "k", "v", "pattern")}
"""What each site needs of the two runs besides what every one needs."""


def numbers_kept(packed: PackedWeights, site: str, n_pos: int) -> int:
    """How many numbers the base and the source run together keep for one prompt."""
    d, d_mlp = packed.W_E.shape[1], 0 if packed.layers[0].W_in is None else packed.layers[0].W_in.shape[1]
    width = sum(d_mlp if name == "neurons" else d for name in _ALWAYS | _NEEDS[site])
    return 2 * width * n_pos * len(packed.layers)


@dataclass(frozen=True)
class Rows:
    """Cells that start at the same position, each with the rows of its residual stream from there on."""

    start: int
    cell: Tensor
    prompt: Tensor
    resid: Tensor  # [cell, row, d_model]


@dataclass(frozen=True)
class Single:
    """Cells that have changed one row of a residual stream and nothing else, at the entrance of a layer."""

    cell: Tensor
    prompt: Tensor
    start: Tensor
    row: Tensor  # [cell, d_model]
    qkv: tuple[Tensor, Tensor, Tensor] | None = None  # [cell, head, d_head] each, if known


@dataclass(frozen=True)
class Sweep:
    """What a sweep reads: weights, the two runs, the site, the positions that the metric reads (sorted)."""

    packed: PackedWeights
    base: Kept
    source: Kept
    request: Request
    reads: tuple[int, ...]
    n_pos: int
    tally: Tally

    def positions(self, layer: int, start: int) -> list[int] | None:
        """The positions from `start` on at which a layer's output is needed; None: all of them."""
        if layer < len(self.packed.layers) - 1:
            return None
        return [p for p in self.reads if p >= start]


# ---------------------------------------------------------------------------------------------------------
# Pieces of a block that count what they do


def _qkv(layer: Layer, rows: Tensor, tally: Tally) -> tuple[Tensor, Tensor, Tensor]:
    tally.linear(len(rows), layer.W_Q.shape[1], 3 * layer.W_O.shape[0])
    return layer_qkv(layer, rows)


def _attend(layer: Layer, q: Tensor, k: Tensor, v: Tensor, tally: Tally, positions: list[int] | None = None) -> Tensor:
    """z of queries that are the keys' last positions, or stand at the positions given."""
    n_cells, n_query, n_heads, d_head = q.shape
    n_key = k.shape[1]
    tally.flops += 4.0 * n_cells * n_heads * d_head * n_query * n_key
    mask = None
    if positions is not None and positions != list(range(n_key - n_query, n_key)):
        mask = causal_mask(n_key, n_key, q.device)[positions]
    return attend(layer, q, k, v, mask)


def _attn_out(layer: Layer, z: Tensor, tally: Tally) -> Tensor:
    tally.linear(z.shape[:-2].numel(), *layer.W_O.shape)
    return layer_attn_out(layer, z)


def _mlp(packed: PackedWeights, layer: Layer, mid: Tensor, tally: Tally, record=None) -> Tensor:
    """The residual stream after the MLP of rows [row, d_model], hidden activations made some rows at a time."""
    if layer.W_in is None:
        return mid
    tally.linear(2 * len(mid), *layer.W_in.shape)
    out = torch.empty_like(mid)
    step = max(1, HIDDEN.get(mid.device.type, 2**24) // layer.W_in.shape[1])
    for i in range(0, len(mid), step):
        rows = mid[i : i + step]
        post = packed.act(F.linear(layer.ln2(rows), layer.W_in.T, layer.b_in))
        mlp_out = F.linear(post, layer.W_out.T, layer.b_out)
        if record is not None:
            record("neurons", post, i)
            record("mlp_out", mlp_out, i)
        torch.add(rows, mlp_out, out=out[i : i + step])
    return out


# ---------------------------------------------------------------------------------------------------------
# The two runs


def both_runs(packed: PackedWeights, base: Tensor, source: Tensor, site: str, tally: Tally) -> tuple[Kept, Kept]:
    """Activations of the base and the source prompts, tokens [prompt, pos] each.

    The source run is computed from each prompt's first different token on; before it the two agree.
    """
    needs = _ALWAYS | _NEEDS[site]
    different = base != source
    first = torch.where(different.any(1), different.int().argmax(1), base.shape[1])
    kept = _record(packed, base, torch.zeros_like(first), None, needs, tally)
    if not different.any():
        return kept, kept
    return kept, _record(packed, source, first, kept, needs, tally)


def _record(packed, tokens, first, base: Kept | None, needs: set[str], tally: Tally) -> Kept:
    n, n_pos = tokens.shape
    starts = [s for s in first.unique().tolist() if s < n_pos]
    groups = [(s, (first == s).nonzero().flatten()) for s in starts]
    spans = [len(prompts) * (n_pos - s) for s, prompts in groups]
    device = tokens.device
    # The prompt and position of every row, group by group.
    row_prompt = torch.cat([p.repeat_interleave(n_pos - s) for s, p in groups])
    row_pos = torch.cat([torch.arange(s, n_pos, device=device).repeat(len(p)) for s, p in groups])
    kept: Kept = {name: [] for name in needs}

    def keep(name: str, rows: Tensor, i: int, offset: int = 0) -> None:
        if name not in needs:
            return
        if len(kept[name]) == i:
            like = rows.new_empty(n, n_pos, *rows.shape[1:]) if base is None else base[name][i].clone()
            kept[name].append(like)
        here = slice(offset, offset + len(rows))
        kept[name][i][row_prompt[here], row_pos[here]] = rows

    resid = packed.W_E[tokens[row_prompt, row_pos]] + packed.W_pos[row_pos]
    for i, layer in enumerate(packed.layers):
        keep("resid_pre", resid, i)
        q, k, v = _qkv(layer, resid, tally)
        for name, rows in (("q", q), ("k", k), ("v", v)):
            keep(name, rows, i)
        z = []
        for (start, prompts), *qkv in zip(groups, *(x.split(spans) for x in (q, k, v))):
            q_g, k_g, v_g = (x.unflatten(0, (len(prompts), -1)) for x in qkv)
            if start:
                k_g = torch.cat([base["k"][i][prompts, :start], k_g], 1)
                v_g = torch.cat([base["v"][i][prompts, :start], v_g], 1)
            z.append(_attend(layer, q_g, k_g, v_g, tally).flatten(0, 1))
        z = torch.cat(z)
        attn_out = _attn_out(layer, z, tally)
        mid = resid + attn_out
        for name, rows in (("z", z), ("attn_out", attn_out), ("resid_mid", mid)):
            keep(name, rows, i)
        resid = _mlp(packed, layer, mid, tally, lambda name, rows, offset, i=i: keep(name, rows, i, offset))
    keep("resid_pre", resid, len(packed.layers))
    return kept | {"resid_post": kept["resid_pre"][1:]}


def differs(sweep: Sweep, layer: int) -> Tensor:
    """Where the site differs between the runs: Bool[Tensor, "prompt pos"], or "prompt pos unit"."""
    site, units = sweep.request.site, list(sweep.request.units)
    if site == "pattern":
        source, base = _pattern(sweep, sweep.source, layer), _pattern(sweep, sweep.base, layer)
        return (source[:, units] != base[:, units]).any(-1).transpose(1, 2)
    different = sweep.source[site][layer] != sweep.base[site][layer]
    if sweep.request.positional:
        return different.any(-1)
    return different[:, :, units] if site == "neurons" else different[:, :, units].any(-1)


def _pattern(sweep: Sweep, run: Kept, layer: int) -> Tensor:
    n, n_pos, n_heads, d_head = run["q"][layer].shape
    sweep.tally.flops += 2.0 * n * n_heads * d_head * n_pos**2
    return attention_pattern(sweep.packed.layers[layer], run["q"][layer], run["k"][layer])


# ---------------------------------------------------------------------------------------------------------
# How cells join


def _at_layer(cells: Cells, layer: int) -> tuple[Tensor, Cells]:
    index = (cells.layer == layer).nonzero().flatten()
    return index, cells[index]


def _single_before(sweep: Sweep, i: int, cells: Cells) -> Single | None:
    """Cells of resid_pre that join at the entrance of block i."""
    if sweep.request.site != "resid_pre":
        return None
    index, c = _at_layer(cells, i)
    if not len(index):
        return None
    row, q, k, v = (sweep.source[name][i][c.prompt, c.start] for name in ("resid_pre", "q", "k", "v"))
    return Single(index, c.prompt, c.start, row, (q, k, v))


def _joining_after(sweep: Sweep, i: int, cells: Cells) -> tuple[list[Rows], Single | None]:
    """Cells of all other sites that patch block i, as they leave it."""
    request, site = sweep.request, sweep.request.site
    index, c = _at_layer(cells, i)
    if site == "resid_pre" or not len(index):
        return [], None
    base, source, layer = sweep.base, sweep.source, sweep.packed.layers[i]

    def at(run: Kept, name: str) -> Tensor:
        return run[name][i][c.prompt, c.start]

    def mlp(mid: Tensor) -> Tensor:
        return _mlp(sweep.packed, layer, mid, sweep.tally)

    unit = torch.tensor(request.units, device=c.unit.device)[c.unit]
    if site == "attn_out":
        return [], Single(index, c.prompt, c.start, mlp(at(base, "resid_pre") + at(source, "attn_out")))
    if site == "resid_post":
        return [], Single(index, c.prompt, c.start, at(source, "resid_post"))
    if site == "resid_mid":
        return [], Single(index, c.prompt, c.start, mlp(at(source, "resid_mid")))
    if site == "mlp_out":
        return [], Single(index, c.prompt, c.start, at(base, "resid_mid") + at(source, "mlp_out"))
    change: Tensor | None
    if site == "neurons":
        change = source["neurons"][i] - base["neurons"][i]
    elif request.by_position and site in "kv":
        change = None
    else:
        change = _patched_z(sweep, i) - base["z"][i]
    if request.by_position and change is not None:
        change = change[c.prompt, c.start, unit]
        if site == "neurons":
            row = base["resid_pre"][i + 1][c.prompt, c.start] + change[:, None] * layer.W_out[unit]
        else:
            row = mlp(at(base, "resid_mid") + _through_W_O(layer, change, unit, sweep.tally))
        return [], Single(index, c.prompt, c.start, row)
    joining = []
    for start in c.start.unique().tolist():
        mine = (c.start == start).nonzero().flatten()
        p, u = c.prompt[mine], unit[mine]
        positions = sweep.positions(i, start)
        pos = torch.tensor(positions or range(start, sweep.n_pos), device=p.device)
        grid = p[:, None], pos
        if site == "neurons":
            here = change[p[:, None], pos, u[:, None]]
            rows = base["resid_pre"][i + 1][grid] + here[..., None] * layer.W_out[u][:, None]
        else:
            at_pos = p[:, None], pos, u[:, None]
            here = _change_by_key(sweep, i, start, pos, p, u) if change is None else change[at_pos]
            mid = base["resid_mid"][i][grid] + _through_W_O(layer, here, u, sweep.tally)
            rows = mlp(mid.flatten(0, 1)).view_as(mid)
        joining.append(Rows(start, index[mine], p, rows))
    return joining, None


def _patched_z(sweep: Sweep, i: int) -> Tensor:
    """z of block i if a head's q, k, v or pattern were the source's at all positions (for each head alone)."""
    site, layer = sweep.request.site, sweep.packed.layers[i]
    if site == "z":
        return sweep.source["z"][i]
    if site == "pattern":
        return torch.einsum("bhqk,bkhd->bqhd", _pattern(sweep, sweep.source, i), sweep.base["v"][i])
    q, k, v = (sweep.source[name][i] if name == site else sweep.base[name][i] for name in "qkv")
    return _attend(layer, q, k, v, sweep.tally)


def _change_by_key(sweep: Sweep, i: int, start: int, pos: Tensor, prompt: Tensor, head: Tensor) -> Tensor:
    """Change of z [cell, row, d_head] at positions `pos` if one head's k or v is the source's at `start` alone."""
    site, layer, base = sweep.request.site, sweep.packed.layers[i], sweep.base
    q = base["q"][i][prompt[:, None], pos, head[:, None]].unsqueeze(2)
    k, v = (base[name][i][prompt, :, head].unsqueeze(2) for name in "kv")  # [cell, key, 1, d_head]
    (k if site == "k" else v)[:, start, 0] = sweep.source[site][i][prompt, start, head]
    z = _attend(layer, q, k, v, sweep.tally, pos.tolist()).squeeze(2)
    return z - base["z"][i][prompt[:, None], pos, head[:, None]]


def _through_W_O(layer: Layer, change: Tensor, head: Tensor, tally: Tally) -> Tensor:
    """attn_out [cell, *row, d_model] of changes of one head's z [cell, *row, d_head], head by head."""
    d_head = change.shape[-1]
    tally.linear(change.shape[:-1].numel(), d_head, layer.W_O.shape[1])
    out = change.new_empty(*change.shape[:-1], layer.W_O.shape[1])
    W_O = layer.W_O.unflatten(0, (-1, d_head))
    for h in head.unique().tolist():
        mine = head == h
        out[mine] = change[mine] @ W_O[h]
    return out


# ---------------------------------------------------------------------------------------------------------
# The sweep


def sweep_cells(sweep: Sweep, cells: Cells) -> Tensor:
    """Final residual streams of the patched runs at the positions read, [cell, read position, d_model]."""
    groups: list[Rows] = []
    single: Single | None = None
    n_layers = len(sweep.packed.layers)
    for i in range(int(cells.layer.min()), n_layers):
        single = single or _single_before(sweep, i, cells)
        groups = _block(sweep, i, groups, single)
        joining, single = _joining_after(sweep, i, cells)
        groups = _merged([*groups, *joining])
    reads = torch.tensor(sweep.reads, device=cells.prompt.device)
    final = sweep.base["resid_pre"][n_layers][cells.prompt[:, None], reads]
    for g in groups:
        columns = (reads >= g.start).nonzero().flatten()
        final[g.cell[:, None], columns] = g.resid
    if single is not None:
        final[single.cell, torch.searchsorted(reads, single.start)] = single.row
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
    packed, layer, tally = sweep.packed, sweep.packed.layers[i], sweep.tally
    parts: list[tuple[Rows, Tensor]] = []  # rows of the residual stream that are needed on, and their z
    if groups:
        rows = layer.ln1(torch.cat([g.resid.flatten(0, 1) for g in groups]))
        sizes = [g.resid.shape[:2].numel() for g in groups]
        n_in, n_out = layer.W_Q.shape[1], layer.W_O.shape[0]
        last = i == len(packed.layers) - 1
        # Keys and values of all rows; queries, in the last layer, only where the metric reads.
        tally.linear(len(rows), n_in, 2 * n_out if last else 3 * n_out)
        *queries, keys, values = products(rows, *layer.qkv[1 if last else 0 :])
        queries = queries[0].split(sizes) if queries else [None] * len(groups)
        for g, x, q, k, v in zip(groups, rows.split(sizes), queries, keys.split(sizes), values.split(sizes)):
            positions, resid = sweep.positions(i, g.start), g.resid
            rows_of_cells = (*resid.shape[:2], -1)
            if q is None:
                local = [p - g.start for p in positions]
                resid = resid[:, local]
                tally.linear(len(g.cell) * len(local), n_in, n_out)
                (q,) = products(x.view(rows_of_cells)[:, local], *layer.qkv[:1])
            else:
                q = q.unflatten(0, rows_of_cells[:2])
            k, v = (t.unflatten(0, rows_of_cells[:2]) for t in (k, v))
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
    out = _mlp(packed, layer, resid + _attn_out(layer, z, tally), tally)
    done = out.split([g.resid.shape[:2].numel() for g, _ in parts])
    return [Rows(g.start, g.cell, g.prompt, rows.view_as(g.resid)) for (g, _), rows in zip(parts, done)]


def _enter(sweep: Sweep, i: int, single: Single) -> list[tuple[Rows, Tensor]]:
    """z in block i of cells with one changed row: only its query, key and value are not the base run's."""
    layer, base = sweep.packed.layers[i], sweep.base
    q_row, k_row, v_row = single.qkv or _qkv(layer, single.row, sweep.tally)
    parts = []
    for start in single.start.unique().tolist():
        mine = (single.start == start).nonzero().flatten()
        prompt, positions = single.prompt[mine], sweep.positions(i, start)
        pos = torch.tensor(positions or range(start, sweep.n_pos), device=prompt.device)
        k, v = base["k"][i][prompt], base["v"][i][prompt]
        k[:, start], v[:, start] = k_row[mine], v_row[mine]
        q, resid = base["q"][i][prompt[:, None], pos], base["resid_pre"][i][prompt[:, None], pos]
        if int(pos[0]) == start:
            q[:, 0], resid[:, 0] = q_row[mine], single.row[mine]
        z = _attend(layer, q, k, v, sweep.tally, positions)
        parts.append((Rows(start, single.cell[mine], prompt, resid), z))
    return parts
