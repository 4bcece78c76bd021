"""What a patch changes: for each site what must be known of the two runs, and the rows of the residual stream that its
cells have changed after the layer they patch.

What differs between sites is a row of the table `CHANGES`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ..forward import KeysAndValues, mlp
from ..weights import Layer, Weights
from .cells import Request, on_device
from .runs import Kept, both_runs
from .tally import Tally


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


def sweep_of(
    weights: Weights,
    base: Int[Tensor, "prompt pos"],
    source: Int[Tensor, "prompt pos"],
    differ: Bool[Tensor, "prompt pos"],
    request: Request,
    tally: Tally,
    kept: set[str] | None = None,
) -> Sweep:
    """The two runs, ready to be swept.

    Args:
        weights: with norms in fp32 at least (`widened_norms`).
        base, source: the tokens.
        differ: where they do, on the CPU.
        kept: what is kept of them (default: what the site needs).
    """
    runs = both_runs(weights, base, source, differ, kept or needs(weights, request.site), tally)
    reads = sorted(set(request.reads))
    return Sweep(weights, *runs, request, tally, tuple(reads), on_device(torch.tensor(reads), base.device))


def at_positions(x: Tensor, prompt: Tensor, positions: slice | Tensor) -> Tensor:
    """Rows [cell, position, ...] of x [prompt, pos, ...]."""
    return x[prompt, positions] if isinstance(positions, slice) else x[prompt[:, None], positions]


def each(x: Tensor, prompt: Tensor, position: Tensor) -> Tensor:
    """Rows [cell, ...] of x [prompt, pos, ...], one position each."""
    return x[prompt, position]


def runs_of(x: Int[Tensor, " n"]) -> list[tuple[int, slice]]:
    """The values of a sorted vector of the CPU, and where each is."""
    values, counts = x.unique_consecutive(return_counts=True)
    ends = counts.cumsum(0).tolist()
    return [(value, slice(first, end)) for value, first, end in zip(values.tolist(), [0, *ends], ends)]


# ---------------------------------------------------------------------------------------------------------
# What cells have changed after the layer they patch

Change = Callable[["Sweep", int, Tensor, Tensor], Tensor]
"""Of a layer and each cell's prompt and position: the one row [cell, d_model] that the cell has changed."""


def _by_source(name: str) -> Change:
    return lambda sweep, i, prompt, position: sweep.source[name][i][prompt, position]


def _by_mid(sweep: Sweep, i: int, prompt: Tensor, position: Tensor) -> Tensor:
    return _through_mlp(sweep, i, sweep.source["resid_mid"][i][prompt, position])


def _by_attn_out(sweep: Sweep, i: int, prompt: Tensor, position: Tensor) -> Tensor:
    return _after_attention(sweep, i, prompt, position, sweep.source["attn_out"][i][prompt, position], each)


def _by_mlp_out(sweep: Sweep, i: int, prompt: Tensor, position: Tensor) -> Tensor:
    return sweep.base["resid_mid"][i][prompt, position] + sweep.source["mlp_out"][i][prompt, position]


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


def by_heads(sweep: Sweep, i: int, prompt, positions, change: Tensor, unit, units: Tensor, at) -> Tensor:
    """Rows after block i where the z of heads is changed: `change` is [cell, *position, d_heads]."""
    layer = sweep.weights.layers[i]
    written = through_W_O(layer, change, units, sweep.tally)
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


def through_W_O(layer: Layer, change: Tensor, heads: Int[Tensor, " cell"], tally: Tally) -> Tensor:
    """What changes of one head's z [cell, *row, d_head] write, [cell, *row, d_model]; the heads are on the CPU."""
    d_head = change.shape[-1]
    tally.linear(change.shape[:-1].numel(), d_head, layer.W_O.shape[1])
    W_O = layer.W_O.unflatten(0, (-1, d_head))
    order = heads.argsort(stable=True)
    runs = runs_of(heads[order])
    order = on_device(order, change.device)
    change = change[order]
    out = torch.cat([change[mine] @ W_O[head].to(change.dtype) for head, mine in runs])
    return torch.empty_like(out).index_copy_(0, order, out)


def of_units(x: Tensor, prompt: Tensor, positions: slice | Tensor, unit: Tensor) -> Tensor:
    """Rows [cell, position, ...] of x [prompt, pos, unit, ...]."""
    if isinstance(positions, slice):
        return x[prompt, positions, unit]
    return x[prompt[:, None], positions, unit[:, None]]


def by_unit(sweep: Sweep, x: Tensor) -> Tensor:
    """z [prompt, pos, head, d_head] by the units of the site: of a key or value that several heads read, all theirs."""
    if not sweep.request.row.of_keys:
        return x
    return x.unflatten(2, (len(sweep.weights.layers[0].b_K), -1)).flatten(3)


def change_by_key(sweep: Sweep, i: int, start: int, positions, prompt: Tensor, head: Tensor) -> Tensor:
    """Change of z [cell, row, d_heads] at `positions` if one head's k or v is the source's at `start` alone; of all the
    heads that read it."""
    site, keys = sweep.request.site, keys_of(sweep, i, prompt, head)
    keys[site][:, start, 0] = sweep.source[site][i][prompt, start, head]
    return change_of_keys(sweep, i, positions, prompt, head, keys)


def keys_of(sweep: Sweep, i: int, prompt: Tensor, head: Tensor) -> dict[str, Tensor]:
    """ "k" and "v" of one head of each cell's prompt, copies, [cell, key, 1, d_head]."""
    return {name: sweep.base[name][i][prompt, :, head].unsqueeze(2) for name in "kv"}


def change_of_keys(sweep: Sweep, i: int, positions, prompt: Tensor, head: Tensor, keys: Mapping[str, Tensor]) -> Tensor:
    """Change of z [cell, row, d_heads] at `positions` if one head's keys and values are those given; of all the heads
    that read them."""
    layer, base = sweep.weights.layers[i], sweep.base

    def rows(x: Tensor) -> Tensor:  # [cell, row, head, d_head] of the heads that read the cells' heads
        return of_units(x.unflatten(2, (len(layer.b_K), -1)), prompt, positions, head)

    q = rows(base["q"][i])
    sweep.tally.flops += 4.0 * q.numel() * keys["k"].shape[1]
    return (layer.attend(q, keys["k"], keys["v"], positions) - rows(base["z"][i])).flatten(2)


# ---------------------------------------------------------------------------------------------------------
# The sites


@dataclass(frozen=True)
class Changes:
    """What the cells of a site change.

    Attributes:
        needs: what must be known of the two runs besides what is for every site.
        row: of sites of positions: the one row of the residual stream that cells have changed after their layer.
        before: that row is changed before the layer already, and is the source's.
        activation: of sites of units: what cells change in their layer.
        patched: that, if all units were patched at all positions.
        write: the rows after the layer, of changes of it.
        whole: the site's own activation, where it is not kept.
    """

    needs: tuple[str, ...] = ()
    row: Change | None = None
    before: bool = False
    activation: str = "z"
    patched: Callable[[Sweep, int], Tensor] = _z_of_source
    write: Callable[..., Tensor] = by_heads
    whole: Callable[[Sweep, Kept, int], Tensor] | None = None


_OF_Z = ("z", "attn_sum")
CHANGES = {
    "resid_pre": Changes(before=True),
    "resid_mid": Changes(("resid_mid",), row=_by_mid),
    "resid_post": Changes(row=_by_source("resid_post")),
    "attn_out": Changes(("attn_out",), row=_by_attn_out),
    "mlp_out": Changes(("resid_mid", "mlp_out"), row=_by_mlp_out),
    "z": Changes(_OF_Z),
    "q": Changes(_OF_Z, patched=_z_of_part),
    "k": Changes(_OF_Z, patched=_z_of_part),
    "v": Changes(_OF_Z, patched=_z_of_part),
    "pattern": Changes(_OF_Z, patched=_z_of_pattern, whole=_pattern),
    "neurons": Changes(
        ("neurons", "resid_mid", "mlp_sum"),
        activation="neurons",
        patched=lambda sweep, i: sweep.source["neurons"][i],
        write=_by_neurons,
    ),
}


def needs(weights: Weights, site: str) -> set[str]:
    """What the two runs must keep."""
    needs = {"resid_pre", "q", "k", "v", *CHANGES[site].needs}
    # Where attention does not reach a block's MLP, what that writes stays the base run's.
    unreached = weights.layers[0].parallel and needs & {"attn_sum", "attn_out"}
    return needs | {"mlp_out"} if unreached else needs


def differs_in(sweep: Sweep, layer: int) -> Tensor:
    """Where the site differs between the runs: Bool[Tensor, "prompt pos"], or "prompt pos unit"."""
    site, whole = sweep.request.site, CHANGES[sweep.request.site].whole
    base, source = (whole(sweep, x, layer) if whole else x[site][layer] for x in (sweep.base, sweep.source))
    return sweep.request.by_place(source != base, torch.any)
