"""Which nodes and edges are kept: those that hold a stated share of the influence on the logit."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def influence(adjacency: Float[Tensor, "receiver sender"]) -> Float[Tensor, " node"]:
    """Each node's share in the last one, the logit: over all paths, the product of entries' sizes as shares.

    An entry's share is of the sizes of all that its receiver reads. 1 at the logit; what every path comes from in the
    end (tokens, biases, what is left out) sums to 1.
    """
    return _influence(adjacency.abs())


def _influence(sizes: Float[Tensor, "receiver sender"]) -> Float[Tensor, " node"]:
    per_read = _per_read(sizes)
    step = torch.zeros_like(per_read)
    step[-1] = 1
    total = step
    while step.any():  # a graph without loops: paths end
        step = (step * per_read) @ sizes
        total = total + step
    return total


def of_edges(
    adjacency: Float[Tensor, "receiver sender"], nodes: Float[Tensor, " node"]
) -> Float[Tensor, "receiver sender"]:
    """Each edge's influence on the logit, of that of the nodes: a receiver's own, by entries' sizes as shares."""
    sizes = adjacency.abs()
    return sizes * (_per_read(sizes) * nodes)[:, None]


def _per_read(sizes: Float[Tensor, "receiver sender"]) -> Float[Tensor, " receiver"]:
    """1 / the sizes of all that is read; 0 of what reads nothing."""
    total = sizes.sum(1)
    return torch.where(total > 0, 1 / total, 0.0)


def prune(
    adjacency: Float[Tensor, "receiver sender"], n_tokens: int, share: float, edge_share: float
) -> tuple[Int[Tensor, " kept"], Float[Tensor, "kept kept"], float]:
    """The nodes that are kept, in order, the entries between them, and the share of the influence that they hold.

    The first nodes are tokens, the last three the biases, what is left out and the logit: these are kept always. Of the
    others the fewest that hold `share` of their influence, and of the edges between nodes the fewest that hold
    `edge_share` of theirs, but of each node its largest one, so that a path to the logit is left. All else goes to the
    column of what is left out: rows sum to what they did.
    """
    kept, held = _nodes(adjacency, n_tokens, share)
    index, reads = kept.nonzero()[:, 0], adjacency[kept]
    inside = reads[:, index]
    inside[:, -2] += reads @ (~kept).to(reads.dtype)
    if edge_share < 1:
        edges = _edges(inside, edge_share)
        inside[:, -2] += (inside[:, :-3] * ~edges[:, :-3]).sum(1)
        inside[:, :-3] *= edges[:, :-3]
    return index, inside, held


def _nodes(adjacency: Tensor, n_tokens: int, share: float) -> tuple[Bool[Tensor, " node"], float]:
    fixed = torch.zeros(len(adjacency), dtype=torch.bool)
    fixed[:n_tokens], fixed[-3:] = True, True
    sizes = influence(adjacency).cpu().double().masked_fill(fixed, 0)  # sums of many small shares
    total = float(sizes.sum())
    order = sizes.argsort(descending=True, stable=True)
    order = order[sizes[order] > 0]
    count = _fewest(sizes[order], share)
    while True:
        kept = fixed.clone()
        kept[order[:count]] = True
        live = _reaching(adjacency, kept.to(adjacency.device)).cpu()
        held = float(sizes[live].sum())
        if held >= share * total * (1 - 1e-9) or count >= len(order):
            return (live | fixed).to(adjacency.device), held / total if total else 1.0
        count += max(1, int((kept & ~live & ~fixed).sum()))  # as many more as lead nowhere


def _fewest(sizes: Float[Tensor, " n"], share: float) -> int:
    """How many of some sizes, largest first, hold a share of their sum."""
    if share == 1:
        return len(sizes)
    return int((sizes.cumsum(0) < share * sizes.sum()).sum()) + 1


def _reaching(adjacency: Tensor, kept: Bool[Tensor, " node"]) -> Bool[Tensor, " node"]:
    """The nodes from which a path among those kept leads to the logit."""
    inside = (adjacency != 0) & kept
    live = torch.zeros_like(kept)
    live[-1] = True
    while True:
        more = live | inside[live].any(0)
        if bool((more == live).all()):
            return live
        live = more


def _edges(adjacency: Tensor, edge_share: float) -> Bool[Tensor, "receiver sender"]:
    sizes = of_edges(adjacency, influence(adjacency))
    sizes[:, -3:] = 0
    found = sizes[sizes > 0].sort(descending=True).values.cpu().double()
    if not len(found):
        return torch.zeros_like(sizes, dtype=torch.bool)
    kept = sizes >= float(found[min(_fewest(found, edge_share), len(found)) - 1])
    largest, senders = sizes.argmax(0), torch.arange(len(sizes), device=sizes.device)
    kept[largest, senders] |= sizes[largest, senders] > 0
    return kept
