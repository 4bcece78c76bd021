"""What writes to the residual stream at some tokens, unit by unit, without a vector per unit.

A piece holds units of one component: the component itself, its heads, its neurons, or its heads by where they read. Of
each unit's output c at each token (and source) everything here is products of activations and weights, small beside c.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

Centre = Callable[[Tensor], Tensor]
"""Takes the mean over d_model away, where a norm does."""


def dot(a: Float[Tensor, "#n d_model"], b: Float[Tensor, "n d_model"]) -> Float[Tensor, " n"]:
    return torch.einsum("nd,nd->n", a.expand_as(b), b)


@dataclass(frozen=True)
class Whole:
    """One unit, given by what it writes: to every token its own, or to all the same."""

    labels: tuple[str, ...]
    out: Float[Tensor, "#n d_model"]

    moves = False

    def of_units(self, units: Sequence[int]) -> Whole:
        """The piece with these units alone."""
        return self

    def along(self, r: Float[Tensor, "n d_model"]) -> Float[Tensor, "unit n"]:
        """<c, r>, with a vector for each token."""
        return dot(self.out, r)[None]

    def onto(self, u: Float[Tensor, "reader d_model"], scale: Float[Tensor, " n"], into: Tensor) -> None:
        """<c, u> / scale for every reader, written into Float[Tensor, "unit n reader"]."""
        torch.div(self.out @ u.T, scale[:, None], out=into[0])

    def square(self, centre: Centre) -> Float[Tensor, "unit n_or_1"]:
        """|c|^2."""
        return centre(self.out).pow(2).sum(-1)[None]

    def output(self, unit: int, rows: Tensor) -> Float[Tensor, "row d_model"]:
        """c of one unit at some tokens."""
        return self.out.expand(len(rows), -1) if len(self.out) == 1 else self.out[rows]

    def total(self) -> Float[Tensor, "#n d_model"]:
        """The sum over units."""
        return self.out


@dataclass(frozen=True)
class Heads:
    """Attention heads, c = z W_O."""

    labels: tuple[str, ...]
    z: Float[Tensor, "n head d_head"]
    W_O: Float[Tensor, "head d_head d_model"]

    moves = False

    def of_units(self, units: Sequence[int]) -> Heads:
        index = list(units)
        return replace(self, labels=_some(self.labels, index), z=self.z[:, index], W_O=self.W_O[index])

    def along(self, r: Float[Tensor, "n d_model"]) -> Float[Tensor, "unit n"]:
        return torch.einsum("nhe,nhe->hn", self.z, _into_heads(r, self.W_O))

    def onto(self, u: Float[Tensor, "reader d_model"], scale: Float[Tensor, " n"], into: Tensor) -> None:
        z = (self.z / scale[:, None, None]).transpose(0, 1)
        (n, d_head), (n_readers, d_model) = z.shape[1:], u.shape
        if n * d_model * (d_head + n_readers) < d_head * n_readers * (d_model + n):  # few tokens: their outputs
            torch.bmm(torch.bmm(z, self.W_O), u.T.expand(len(z), -1, -1), out=into)
        else:
            torch.bmm(z, (self.W_O.flatten(0, 1) @ u.T).unflatten(0, (len(z), -1)), out=into)

    def square(self, centre: Centre) -> Float[Tensor, "unit n"]:
        W = centre(self.W_O)
        turned = torch.einsum("nhe,hef->nhf", self.z, W @ W.transpose(1, 2))
        return torch.einsum("nhf,nhf->hn", turned, self.z)

    def output(self, unit: int, rows: Tensor) -> Float[Tensor, "row d_model"]:
        return self.z[rows, unit] @ self.W_O[unit]

    def total(self) -> Float[Tensor, "n d_model"]:
        return self.z.flatten(1) @ self.W_O.flatten(0, 1)


@dataclass(frozen=True)
class Neurons:
    """An MLP's neurons, c = post W_out."""

    labels: tuple[str, ...]
    post: Float[Tensor, "n d_mlp"]
    W_out: Float[Tensor, "d_mlp d_model"]

    moves = False

    def of_units(self, units: Sequence[int]) -> Neurons:
        index = list(units)
        return replace(self, labels=_some(self.labels, index), post=self.post[:, index], W_out=self.W_out[index])

    def along(self, r: Float[Tensor, "n d_model"]) -> Float[Tensor, "unit n"]:
        return (self.post * (r @ self.W_out.T)).T

    def onto(self, u: Float[Tensor, "reader d_model"], scale: Float[Tensor, " n"], into: Tensor) -> None:
        post = (self.post / scale[:, None]).T
        torch.mul(post[..., None], (self.W_out @ u.T)[:, None], out=into)

    def square(self, centre: Centre) -> Float[Tensor, "unit n"]:
        return (self.post.pow(2) * centre(self.W_out).pow(2).sum(-1)).T

    def output(self, unit: int, rows: Tensor) -> Float[Tensor, "row d_model"]:
        return self.post[rows, unit, None] * self.W_out[unit]

    def total(self) -> Float[Tensor, "n d_model"]:
        return self.post @ self.W_out


@dataclass(frozen=True)
class Moves:
    """Attention heads by where they read: c = pattern[query, source] v[source] W_O.

    What the other pieces have for each token it has for each token (a query) and source.
    """

    labels: tuple[str, ...]
    pattern: Float[Tensor, "batch head query source"]
    v: Float[Tensor, "batch source head d_head"]
    W_O: Float[Tensor, "head d_head d_model"]

    moves = True

    def of_units(self, units: Sequence[int]) -> Moves:
        i = list(units)
        labels = _some(self.labels, i)
        return Moves(labels, self.pattern[:, i], self.v[:, :, i], self.W_O[i])

    @property
    def _weights(self) -> Float[Tensor, "head n source"]:
        return self.pattern.transpose(0, 1).flatten(1, 2)

    def along(self, r: Float[Tensor, "n d_model"]) -> Float[Tensor, "unit n source"]:
        r = _into_heads(r, self.W_O).unflatten(0, (len(self.v), -1))
        return torch.einsum("bqhe,bshe->hbqs", r, self.v).flatten(1, 2) * self._weights

    def onto(self, u: Float[Tensor, "reader d_model"], scale: Float[Tensor, " n"], into: Tensor) -> None:
        into = into.unflatten(1, (len(self.v), -1))  # head batch query source reader
        M = (self.W_O.flatten(0, 1) @ u.T).unflatten(0, (len(self.W_O), -1))
        read = torch.bmm(self.v.flatten(0, 1).transpose(0, 1), M).unflatten(1, self.v.shape[:2])
        weights = (self._weights / scale[:, None]).unflatten(1, (len(self.v), -1))
        torch.mul(weights[..., None], read[:, :, None], out=into)

    def square(self, centre: Centre) -> Float[Tensor, "unit n source"]:
        W = centre(self.W_O)
        turned = torch.einsum("bshe,hef->bshf", self.v, W @ W.transpose(1, 2))
        square = torch.einsum("bshf,bshf->hbs", turned, self.v)
        return (self.pattern.transpose(0, 1).pow(2) * square[:, :, None]).flatten(1, 2)

    def output(self, unit: int, rows: Tensor, sources: Tensor) -> Float[Tensor, "row d_model"]:
        batch = rows // self.pattern.shape[2]
        weights = self._weights[unit, rows, sources]
        return weights[:, None] * self.v[batch, sources, unit] @ self.W_O[unit]

    def total(self) -> Float[Tensor, "n d_model"]:
        z = torch.einsum("bhqs,bshe->bqhe", self.pattern, self.v)
        return z.flatten(0, 1).flatten(1) @ self.W_O.flatten(0, 1)


Piece = Whole | Heads | Neurons | Moves


def _some(labels: tuple[str, ...], index: Sequence[int]) -> tuple[str, ...]:
    return tuple(labels[i] for i in index)


def _into_heads(
    r: Float[Tensor, "n d_model"], W_O: Float[Tensor, "head d_head d_model"]
) -> Float[Tensor, "n head d_head"]:
    """W_O r of each head: what of z is along r."""
    return (r @ W_O.flatten(0, 1).T).unflatten(1, (len(W_O), -1))
