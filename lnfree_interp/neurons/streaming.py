"""Exact sums over the vocabulary for pairs of a token and a neuron, in chunks that stay in cache.

Each pair needs A = sum over the vocabulary of e^z and B = sum of z e^z, z = logits' - lse - alpha mean_m: one
multiply-add for t v, one for alpha m, one exp and two sums per entry. No pass is spent on finding a maximum: as long
as |z - (logits - lse)| <= EASY, which the extremes of v and m tell, nothing overflows, and entries below e^FLOOR
cannot count. The rare pairs beyond carry a running maximum along.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .last_layer import Change, Neurons, Progress, Rows, Unembedding

EASY, FLOOR = 20.0, -75.0  # nats
# Entries of the vocabulary and pairs worked on at a time. On the CPU two such tables stay in the second-level cache.
CPU_CHUNK, CPU_PAIRS = 2048, 128
GPU_CHUNK, GPU_PAIRS = 8192, 4096


def stream(
    unembedding: Unembedding,
    rows: Rows,
    neurons: Neurons,
    change: Change,
    wanted: Bool[Tensor, "row neuron"],
    progress: Progress | None = None,
) -> tuple[Float[Tensor, "row neuron"], Float[Tensor, "row neuron"]]:
    """logsumexp of the changed logits less that of the old ones, and their entropy (nats), for the pairs wanted.

    Where a pair is not wanted the numbers mean nothing.
    """
    most = change.t.abs() * neurons.most_v
    if change.alpha is not None:
        most = most + change.alpha.abs() * rows.most_m[:, None]
    easy = most <= EASY
    grown, entropy = torch.zeros(2, *wanted.shape, dtype=change.t.dtype, device=wanted.device)
    for which, with_maximum in ((wanted & easy, False), (wanted & ~easy, True)):
        if which.any():
            _stream(unembedding, rows, neurons, change, which, with_maximum, grown, entropy, progress)
    if change.alpha is not None:
        grown += change.alpha * rows.mean_m[:, None]
    return grown, entropy


def _stream(unembedding, rows, neurons, change, wanted, with_maximum, grown, entropy, progress) -> None:
    """Fills grown and entropy where wanted."""
    cpu = wanted.device.type == "cpu"
    n_vocab, n_pairs = (CPU_CHUNK, CPU_PAIRS) if cpu else (GPU_CHUNK, GPU_PAIRS)
    active = wanted.any(0).nonzero()[:, 0]
    w, wanted_of_active, change = neurons.w[active], wanted[:, active], change[:, active]
    tiles = list(_tiles(wanted_of_active, n_pairs))
    parts = [change[pairs] for pairs, *_ in tiles]
    sums = [torch.zeros(2, *part.t.shape, dtype=w.dtype, device=w.device) for part in parts]
    tops = [torch.full_like(part.t, -torch.inf if with_maximum else 0.0) for part in parts]
    buffers = torch.empty(2, n_pairs * n_vocab, dtype=w.dtype, device=w.device)
    for done, chunk in enumerate(chunks := unembedding.chunks(n_vocab)):
        W = unembedding.W[:, chunk]
        v, m = w @ W, rows.hidden @ W
        base = m + (unembedding.b[chunk] - rows.lse[:, None])
        m -= rows.mean_m[:, None]
        if not with_maximum:
            base.clamp_min_(FLOOR)
        for (_, row, neuron), part, total, top in zip(tiles, parts, sums, tops):
            shape = (*part.t.shape, W.shape[1])
            z, weight = (buffer[: math.prod(shape)].view(shape) for buffer in buffers)
            _changed(z, weight, base, m, v, row, neuron, part)
            if with_maximum:
                new = torch.maximum(top, z.amax(-1))
                total *= (top - new).exp()
                top.copy_(new)
                torch.sub(z, new[..., None], out=weight).exp_()
            else:
                torch.exp(z, out=weight)
            total[0] += weight.sum(-1)
            total[1] += weight.mul_(z).sum(-1)
        if progress is not None:
            progress((done + 1) / len(chunks))
    found = torch.zeros(2, *wanted_of_active.shape, dtype=w.dtype, device=w.device)
    for (pairs, *_), total, top in zip(tiles, sums, tops):
        log = top + total[0].log()
        found[0][pairs], found[1][pairs] = log, log - total[1] / total[0]
    for table, new in zip((grown, entropy), found):
        table[:, active] = torch.where(wanted_of_active, new, table[:, active])


def _changed(z, spare, base, m, v, row, neuron, part: Change) -> None:
    """z = base + t v + alpha m for a tile's pairs."""

    def of_pairs(table: Tensor, which, out: Tensor) -> Tensor:
        # index_select copies whole rows; indexing would go number by number.
        return torch.index_select(table, 0, which, out=out) if isinstance(which, Tensor) else table[which]

    start = of_pairs(base, row, z)
    torch.addcmul(start, of_pairs(v, neuron, spare), part.t[..., None], out=z)
    if part.alpha is not None:
        z.addcmul_(of_pairs(m, row, spare), part.alpha[..., None])


def _tiles(wanted: Bool[Tensor, "row neuron"], most: int) -> Iterator[tuple]:
    """Up to `most` pairs at a time: where they are in a table of pairs, in one of rows, in one of neurons.

    If all are wanted a tile is a rectangle, read without copying; else a list of pairs.
    """
    n_rows, n_neurons = wanted.shape
    if wanted.all():
        width = min(n_neurons, most)
        height = max(1, most // width)
        for first in range(0, n_rows, height):
            row = slice(first, first + height)
            for left in range(0, n_neurons, width):
                neuron = slice(left, left + width)
                yield (row, neuron), (row, None), neuron
    else:
        for row, neuron in zip(*(index.split(most) for index in wanted.nonzero(as_tuple=True))):
            yield (row, neuron), row, neuron
