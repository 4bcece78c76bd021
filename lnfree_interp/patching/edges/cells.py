"""The edges to run, prompt by prompt, and what their senders change: what both ways of edge patching plan by."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..cells import Cells, Request, on_device
from ..changes import at_positions, runs_of
from ..runs import Kept
from .wiring import Wiring

ALL = -1


@dataclass(frozen=True)
class Group:
    """Edges of several prompts to one kind of receiver of a layer, with one start, those of a sender together.

    All vectors are on the CPU.
    """

    layer: int
    kind: str
    start: int
    index: Int[Tensor, " cell"]  # where they are in the batch
    prompt: Int[Tensor, " cell"]
    sender: Int[Tensor, " cell"]
    head: Int[Tensor, " cell"]  # the receiver's number among those of its kind

    def pairs(self) -> tuple[Int[Tensor, " pair"], Int[Tensor, " pair"], Int[Tensor, " cell"]]:
        """Sender and prompt of each pair of them that there is, and which each cell has."""
        both, place = torch.stack([self.sender, self.prompt]).unique_consecutive(dim=1, return_inverse=True)
        return both[0], both[1], place


def find_edges(
    wiring: Wiring, mask: Bool[Tensor, "sender receiver"], differs: Bool[Tensor, "sender prompt pos"], request: Request
) -> Cells:
    """Edges whose sender differs between the runs where the receiver is read, as cells: `unit` is sender * receivers +
    receiver, `layer` the receiver's (n_layers for the logits), all positions together. Those with one kind of receiver,
    sender and prompt follow on each other.

    Args:
        differs: where what senders write does, up to the last position read; on the CPU.
    """
    n_pos, last = request.n_read, wiring.n_layers - 1
    start = torch.where(differs.any(2), differs.int().argmax(2), n_pos)  # [sender, prompt]
    read = differs[:, :, sorted(set(request.reads))].any(2) if request.causal else start < n_pos
    found = []
    for layer, kind, which, before in wiring.groups:
        late = kind == "logits" or (layer == last and kind in ("q", "mlp"))
        live = (read if late else start < n_pos)[:before]
        sender, prompt, head = (live[:, :, None] & mask[:before, None, which]).nonzero(as_tuple=True)
        unit = sender * len(wiring.receivers) + which.start + head
        one = torch.ones_like(prompt)
        found.append(torch.stack([prompt, one * layer, unit, one * ALL, start[sender, prompt]]))
    return Cells(*torch.cat(found, 1))


def grouped(wiring: Wiring, cells: Cells) -> Iterator[Group]:
    """Cells by layer, kind of receiver and start."""
    sender, receiver = cells.unit // len(wiring.receivers), cells.unit % len(wiring.receivers)
    group_of = torch.empty(len(wiring.receivers), dtype=torch.long)
    for number, (_, _, which, _) in enumerate(wiring.groups):
        group_of[which] = number
    order = cells.start.argsort(stable=True)
    order = order[group_of[receiver][order].argsort(stable=True)]
    for number, here in runs_of(group_of[receiver][order]):
        layer, kind, which, _ = wiring.groups[number]
        for start, mine in runs_of(cells.start[order[here]]):
            index = order[here][mine]
            yield Group(layer, kind, start, index, cells.prompt[index], sender[index], receiver[index] - which.start)


def differing(wiring: Wiring, base: Kept, source: Kept) -> Bool[Tensor, "sender prompt pos"]:
    """Where what senders write differs between the runs, on the CPU."""
    found = []
    for name, layer, head in wiring.sent:
        if head in (None, 0):
            where = (base[name][layer] != source[name][layer]).any(-1)
        found.append(where if head is None else where[..., head])
    return torch.stack(found).cpu()


def sent(
    wiring: Wiring,
    base: Kept,
    source: Kept,
    output_weights: Callable[[int], Tensor],
    sender: Int[Tensor, " pair"],
    prompt: Int[Tensor, " pair"],
    positions: slice | Tensor,
) -> Float[Tensor, "pair pos d_model"]:
    """How what senders write changes, those of one sender together.

    Args:
        output_weights: layer -> what its heads write with, [head, d_head, d_model].
        sender, prompt: on the CPU.
    """
    parts = []
    rows = on_device(prompt, base["resid_pre"][0].device)
    for number, mine in runs_of(sender):
        name, layer, head = wiring.sent[number]
        of_base, of_source = (
            run[name][layer] if head is None else run[name][layer][:, :, head] for run in (base, source)
        )
        change = at_positions(of_source, rows[mine], positions) - at_positions(of_base, rows[mine], positions)
        parts.append(change if head is None else change @ output_weights(layer)[head].to(change.dtype))
    return torch.cat(parts)
