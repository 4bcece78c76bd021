"""Exact sums over the vocabulary for pairs of a token and a neuron, in chunks that stay in cache.

Each pair needs A = sum over the vocabulary of e^z and B = sum of z e^z, z = logits' - lse - alpha mean_m: one
multiply-add for t v, one for alpha m, one exp and two sums per entry. The token's own sums, of the logits unchanged,
are taken in the same pass: rounded alike, large logits' rounding errors go out in the difference. No pass is spent on
finding a maximum: as long as |z - (logits - lse)| <= EASY, which the extremes of v and m tell, nothing overflows, and
entries below e^FLOOR cannot count. The rare pairs beyond carry a running maximum along.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .last_layer import Change, Neurons, Rows, Unembedding

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
    share: Callable[[float], object] | None = None,
) -> tuple[Float[Tensor, "row neuron"], Float[Tensor, "row neuron"]]:
    """logsumexp of the changed logits less that of the old ones and alpha mean_m, and the entropy's change (nats).

    For the pairs wanted; where a pair is not wanted the numbers mean nothing.

    Args:
        share: told the share of the work that is done.
    """
    most = change.t.abs() * neurons.most_v
    if change.alpha is not None:
        most = most + change.alpha.abs() * rows.most_m[:, None]
    grown, entropy = torch.zeros(2, *wanted.shape, dtype=change.t.dtype, device=wanted.device)
    # Which pairs there are is asked once, and sorted out on the CPU: a GPU does not wait for each tile.
    wanted, easy = torch.stack([wanted, most <= EASY]).cpu()
    kinds = [(which.nonzero(as_tuple=True), hard) for which, hard in ((wanted & easy, False), (wanted & ~easy, True))]
    n_pairs, before = sum(len(row) for (row, _), _ in kinds), 0
    for (row, neuron), with_maximum in kinds:
        if len(row):
            told = None if share is None else partial(_told, share, before / n_pairs, len(row) / n_pairs)
            _stream(unembedding, rows, neurons, change, row, neuron, with_maximum, grown, entropy, told)
            before += len(row)
    return grown, entropy


def _told(share: Callable[[float], object], before: float, here: float, done: float) -> None:
    share(before + here * done)


def _stream(unembedding, rows, neurons, change, row, neuron, with_maximum, grown, entropy, share) -> None:
    """Fills grown and entropy at the pairs given."""
    device, dtype = grown.device, grown.dtype
    n_vocab, n_pairs = (CPU_CHUNK, CPU_PAIRS) if device.type == "cpu" else (GPU_CHUNK, GPU_PAIRS)
    if len(row) == grown.numel():
        w, tiles = neurons.w, list(_rectangles(grown.shape[0], grown.shape[1], n_pairs))
    else:
        active, column = neuron.unique(return_inverse=True)
        w, tiles = (
            neurons.w[active.to(device)],
            list(_lists(row.to(device), neuron.to(device), column.to(device), n_pairs)),
        )
    parts = [change[pairs] for pairs, *_ in tiles]
    sums = [torch.zeros(2, *part.t.shape, dtype=dtype, device=device) for part in parts]
    tops = [torch.full_like(part.t, -torch.inf if with_maximum else 0.0) for part in parts]
    own = torch.zeros(2, len(grown), dtype=dtype, device=device)
    buffers = torch.empty(2, n_pairs * n_vocab, dtype=dtype, device=device)
    for done, chunk in enumerate(chunks := unembedding.chunks(n_vocab)):
        W = unembedding.W[:, chunk]
        v, m = w @ W, rows.hidden @ W
        base = (m + unembedding.b[chunk] - rows.top[:, None]).sub_(rows.log_total[:, None])
        if not with_maximum:
            base.clamp_min_(FLOOR)
        m -= rows.mean_m[:, None]
        p = base.exp()
        own += torch.stack([p.sum(1), p.mul_(base).sum(1)])
        for (_, of_row, of_neuron), part, total, top in zip(tiles, parts, sums, tops):
            shape = (*part.t.shape, W.shape[1])
            z, weight = (buffer[: math.prod(shape)].view(shape) for buffer in buffers)
            _changed(z, weight, base, m, v, of_row, of_neuron, part)
            if with_maximum:
                new = torch.maximum(top, z.amax(-1))
                total *= (top - new).exp()
                top.copy_(new)
                torch.sub(z, new[..., None], out=weight).exp_()
            else:
                torch.exp(z, out=weight)
            total[0] += weight.sum(-1)
            total[1] += weight.mul_(z).sum(-1)
        if share is not None:
            share((done + 1) / len(chunks))
    log_own = own[0].log()
    own_entropy = log_own - own[1] / own[0]
    for (pairs, of_row, _), total, top in zip(tiles, sums, tops):
        log = top + total[0].log()
        grown[pairs] = log - log_own[of_row]
        entropy[pairs] = log - total[1] / total[0] - own_entropy[of_row]


def _changed(z, spare, base, m, v, row, neuron, part: Change) -> None:
    """z = base + t v + alpha m for a tile's pairs."""

    def of_pairs(table: Tensor, which, out: Tensor) -> Tensor:
        # index_select copies whole rows; indexing would go number by number.
        return torch.index_select(table, 0, which, out=out) if isinstance(which, Tensor) else table[which]

    start = of_pairs(base, row, z)
    torch.addcmul(start, of_pairs(v, neuron, spare), part.t[..., None], out=z)
    if part.alpha is not None:
        z.addcmul_(of_pairs(m, row, spare), part.alpha[..., None])


def _rectangles(n_rows: int, n_neurons: int, most: int) -> Iterator[tuple]:
    """All pairs, up to `most` at a time: where they are in a table of pairs, in one of rows, in one of neurons.

    Read without copying.
    """
    width = min(n_neurons, most)
    height = max(1, most // width)
    for first in range(0, n_rows, height):
        row = slice(first, first + height)
        for left in range(0, n_neurons, width):
            neuron = slice(left, left + width)
            yield (row, neuron), (row, None), neuron


def _lists(
    row: Int[Tensor, " pair"], neuron: Int[Tensor, " pair"], column: Int[Tensor, " pair"], most: int
) -> Iterator[tuple]:
    """The same of a list of pairs; `column` is where a pair's neuron is in the table of neurons."""
    for of_row, number, of_neuron in zip(*(index.split(most) for index in (row, neuron, column))):
        yield (of_row, number), of_row, of_neuron
