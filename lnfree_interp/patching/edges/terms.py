"""From the two runs and the gradients at receivers to one number per edge: sums over positions of change x gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..cells import Request, itemsize, on_device
from ..sides import Sides
from .streams import (
    Writes,
    attention_hook,
    brought_back,
    embed_hook,
    heads_write,
    hooks_read,
    mlp_hook,
    output_weights,
    stream_hook,
)
from .wiring import Wiring

Grads = Mapping[str, Tensor]
"""Hook -> the metric's gradient there."""


@dataclass(frozen=True)
class EdgeCase:
    """The two runs of some prompts, as far as edges need them."""

    sides: Sides
    wiring: Wiring
    delta: Writes  # source - base of what was written, exactly 0 before the first different token
    entering: dict[str, Tensor]  # the stream that enters the first block of the "base" and of the "source" run
    nodes: dict[
        str, Tensor
    ]  # what receivers' hooks saw of the base run, in the graph of the metric, the final stream too
    streams: dict[str, Tensor]  # what they read, of the base run
    budget: int

    @property
    def request(self) -> Request:
        return self.sides.window.request

    @property
    def n_pos(self) -> int:
        """Positions in the window."""
        return self.request.n_read - self.sides.window.first

    def late(self, layer: int, kind: str) -> bool:
        """Whether receivers matter at the positions that the metric reads alone."""
        return kind == "logits" or (layer == self.wiring.n_layers - 1 and kind in ("q", "mlp"))

    def room(self, per_position: int) -> int:
        """How many positions of prompts with so many numbers there is room for."""
        size = itemsize(self.sides.window.model, self.sides.window.weights)
        return max(1, self.budget // (per_position * size))


def changed(sides: Sides, wiring: Wiring, base: Writes, source: Writes) -> Writes:
    """source - base, exactly 0 before the first different token, of what was written in the window."""
    window = sides.window
    request, start = window.request, window.first
    different = sides.differ[:, : request.n_read]
    mask = different.cumsum(1) > 0 if request.causal else torch.ones_like(different)
    mask = on_device(mask[:, start:], sides.value.device)
    last = (attention_hook(wiring, wiring.n_layers - 1), mlp_hook(wiring.n_layers - 1))
    delta = {}
    for name, x in base.items():
        late = name in last
        here = mask[:, window.reads] if late else mask
        y = source[name] if late else source[name][:, start:]
        delta[name] = torch.where(here.view(*here.shape, *[1] * (x.ndim - 2)), y - x, 0.0)
    return delta


def blocks(n_prompts: int, n_pos: int, room: int) -> Iterator[tuple[slice, slice]]:
    """(prompts, positions) of at most `room` positions of prompts together: whole prompts, where one has room."""
    prompts, positions = max(1, room // n_pos), min(n_pos, room)
    for i in range(0, n_prompts, prompts):
        for j in range(0, n_pos, positions):
            yield slice(i, min(n_prompts, i + prompts)), slice(j, min(n_pos, j + positions))


def pieces(
    case: EdgeCase, rows: slice, at: slice, late: bool, stop: int
) -> Iterator[tuple[slice, Float[Tensor, "sender prompt pos d_model"]]]:
    """(senders, how what they write changes) of the first `stop` senders, a part of a layer at a time.

    Args:
        rows, at: prompts, and positions of the window or, if `late`, of those that the metric reads.
    """
    window, wiring = case.sides.window, case.wiring

    def here(name: str, last: bool) -> Tensor:
        x = case.delta[name][rows]
        return (x if last or not late else x[:, window.reads])[:, at]

    yield slice(0, 1), here(embed_hook(), False)[None]
    for i in range(wiring.n_layers):
        last, which = i == wiring.n_layers - 1, wiring.attention(i)
        if which.start >= stop:
            return
        x = here(attention_hook(wiring, i), last)
        yield which, heads_write(x, output_weights(window.model, window.weights, i)) if wiring.by_head else x[None]
        if wiring.has_mlp and which.stop < stop:
            yield slice(which.stop, which.stop + 1), here(mlp_hook(i), last)[None]


def gradients_at(
    case: EdgeCase, grads: Grads, layer: int, kind: str, rows: slice, at: slice
) -> tuple[Tensor | None, list]:
    """The stream that a kind of receiver of a layer reads, and the gradients at its hooks, of some prompts and
    positions."""
    window, late = case.sides.window, case.late(layer, kind)

    def here(x: Tensor, narrow: bool) -> Tensor:
        return (x[:, window.reads] if narrow else x)[rows, at]

    # What is at the positions read alone is so in the last layer, but for its entrance and TransformerLens' copies.
    found = [
        here(grads[name], late and kind != "logits" and window.weights is None) for name in names(case, layer, kind)
    ]
    if window.weights is None or kind == "logits":
        return None, found
    stream = stream_hook(case.wiring, layer, kind)
    return here(case.streams[stream], late and stream.endswith("resid_pre")), found


def names(case: EdgeCase, layer: int, kind: str) -> tuple[str, ...]:
    return hooks_read(case.sides.window.weights, layer, kind)


Receive = Callable[[int, str, slice, slice], Sequence[Tensor]]
"""Of a layer, a kind of receiver, prompts and positions: gradients [receiver, prompt, pos, d_model] at their copies."""


def contracted(
    case: EdgeCase, receive: Receive, skip: Sequence[str] = ()
) -> list[Float[Tensor, "prompt sender receiver"]]:
    """Sums over positions of a sender's change times each of the gradients that `receive` gives at a receiver's copy.

    Args:
        skip: kinds of receivers that are left at 0.
    """
    wiring, d_model = case.wiring, case.sides.window.model.cfg.d_model
    shape = (len(case.sides.pairs), len(wiring.senders), len(wiring.receivers))
    values: list[Tensor] = []
    # Of changes, and of gradients on their way to one group of receivers.
    per_position = (len(wiring.senders) + 6 * max(w.stop - w.start for _, _, w, _ in wiring.groups)) * d_model
    for late in (False, True):
        groups = [g for g in wiring.groups if case.late(*g[:2]) == late and g[1] not in skip]
        if not groups:
            continue
        stop = max(before for *_, before in groups)
        n_pos = len(case.request.reads) if late else case.n_pos
        for rows, at in blocks(len(case.sides.pairs), n_pos, case.room(per_position)):
            changes = torch.cat([x for _, x in pieces(case, rows, at, late, stop)]).flatten(2)
            for layer, kind, which, before in groups:
                left = changes[:before].transpose(0, 1)
                for j, gradient in enumerate(receive(layer, kind, rows, at)):
                    if len(values) == j:
                        values.append(changes.new_zeros(shape))
                    right = gradient.flatten(2).permute(1, 2, 0)
                    values[j][rows, :before, which] += torch.bmm(left, right)
    return values


def first_order(case: EdgeCase, grads: Grads, skip: Sequence[str] = ()) -> Float[Tensor, "prompt sender receiver"]:
    """Each sender's change times the metric's gradient at each receiver's copy of the stream."""
    weights = case.sides.window.weights

    def receive(layer: int, kind: str, rows: slice, at: slice) -> list[Tensor]:
        x, here = gradients_at(case, grads, layer, kind, rows, at)
        return [brought_back(weights, layer, kind, x, here)]

    return contracted(case, receive, skip)[0]
