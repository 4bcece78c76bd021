"""From pieces of the stream to what a reader reads of each: with the norm's scale as it is, and with the piece removed.

With r = <x, u> / s what a reader reads of the whole stream, l = <c, u> / s what it reads of a component, s the norm's
scale and s' the scale of x - c, removing the component changes the reading by

    <x, u> / s - <x - c, u> / s' = r + (s / s') (l - r),

and s' follows from |x - c|^2 = |x|^2 - 2 <x, c> + |c|^2, which depends on component and token alone: once for all
readers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..weights import Norm
from .pieces import Piece, Whole, dot
from .reading import Directions
from .record import Recorded

# Shares of |x|^2 below which |x - c|^2 is not taken from the closed form.
CANCELLED = 0.01


@dataclass(frozen=True)
class Removal:
    """What removing a piece's units does to the norm's scale.

    Attributes:
        ratio: s / s', Float[Tensor, "unit n"] or, by source, [unit, n, source].
        cancelled: where nearly all of x is c, so that the difference of the two would be rounding; None: nowhere.
    """

    ratio: Float[Tensor, "unit n *source"]
    cancelled: Bool[Tensor, "unit n *source"] | None


def removals(recorded: Recorded, norm: Norm) -> tuple[Removal, ...]:
    """Of each piece. The norm must not be linear: without one nothing but the reading changes."""
    x = norm.centred(recorded.x)
    return tuple(_removal(piece, x, norm) for piece in recorded.pieces)


def _removal(piece: Piece, x: Tensor, norm: Norm) -> Removal:
    size = dot(x, x)
    if isinstance(piece, Whole):
        left = (x - norm.centred(piece.out)).pow(2).sum(-1)[None]
    else:
        size_at = size[:, None] if piece.moves else size
        left = size_at - 2 * piece.along(x) + piece.square(norm.centred)
    cancelled = left < CANCELLED * (size[:, None] if piece.moves else size)
    for unit in cancelled.flatten(1).any(1).nonzero()[:, 0].tolist():
        cells = cancelled[unit].nonzero().unbind(1)
        left[unit][cells] = _rest(piece, unit, cells, x, norm).pow(2).sum(-1)
    scale, without = ((square / x.shape[-1] + norm.eps).sqrt() for square in (size, left))
    return Removal((scale[:, None] if piece.moves else scale) / without, cancelled if bool(cancelled.any()) else None)


def _rest(piece: Piece, unit: int, cells: tuple[Tensor, ...], x: Tensor, norm: Norm) -> Float[Tensor, "cell d_model"]:
    """x - c, of one unit at some tokens (and sources)."""
    return x[cells[0]] - norm.centred(piece.output(unit, *cells))


def project(
    recorded: Recorded,
    directions: Directions,
    norm: Norm,
    out: Float[Tensor, "component n *source reader"],
    removed: Sequence[Removal] | None = None,
    linear: Float[Tensor, "component n *source reader"] | None = None,
) -> None:
    """What readers read of each component, written into `out`.

    Args:
        out: by source it must be zero, since nothing is written where nothing is read.
        removed: `removals`: then the effects are written, and
        linear: what is read as well, into this one, if it is given.
    """
    scale, u = norm.scale(recorded.x)[:, 0], directions.u
    x = norm.centred(recorded.x) / scale[:, None]
    r = u / scale[:, None] if directions.per_token else None
    whole = None if removed is None else dot(x, u)[:, None] if directions.per_token else x @ u.T
    first, tokens = 0, torch.arange(len(x), device=x.device)
    for i, piece in enumerate(recorded.pieces):
        units = slice(first, first + len(piece.labels))
        first = units.stop
        into = out[units]
        if placed := out.ndim == 4 and not piece.moves:
            into = into.new_empty(into.shape[0], into.shape[1], into.shape[3])
        read = into if linear is None else linear[units]
        if r is None:
            piece.onto(u, scale, read)
        else:
            read[..., 0] = piece.along(r)
        if removed is not None and whole is not None:
            _lose(recorded, piece, directions, norm, removed[i], whole, read, into)
        if placed:
            out[units, tokens, recorded.at] = into


def _lose(
    recorded: Recorded,
    piece: Piece,
    directions: Directions,
    norm: Norm,
    removal: Removal,
    whole: Float[Tensor, "n reader"],
    read: Float[Tensor, "unit n *source reader"],
    into: Float[Tensor, "unit n *source reader"],
) -> None:
    """What readers lose without each unit, of what they read of it."""
    torch.lerp(whole[:, None] if piece.moves else whole, read, removal.ratio[..., None], out=into)
    if removal.cancelled is None:
        return
    x, scale = norm.centred(recorded.x), norm.scale(recorded.x)[:, 0]
    for unit in removal.cancelled.flatten(1).any(1).nonzero()[:, 0].tolist():
        cells = removal.cancelled[unit].nonzero().unbind(1)
        rest = _rest(piece, unit, cells, x, norm) * (removal.ratio[unit][cells] / scale[cells[0]])[:, None]
        left = dot(rest, directions.u[cells[0]])[:, None] if directions.per_token else rest @ directions.u.T
        into[unit][cells] = whole[cells[0]] - left
