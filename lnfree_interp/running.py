"""Statistics of what streams by, in memory that does not grow with it; those of parts merge into the whole's."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, UInt64

Array = np.ndarray


@dataclass(frozen=True)
class Moments:
    """Sums over rows, column by column; entries that are nan are left out.

    Attributes:
        n: how many entries.
        origin: what is subtracted from each: some row, which keeps variances accurate.
        total, squares: sums of the differences and of their squares.
    """

    n: Float[Array, " column"]
    origin: Float[Array, " column"]
    total: Float[Array, " column"]
    squares: Float[Array, " column"]

    def mean(self) -> Float[Array, " column"]:
        with np.errstate(invalid="ignore"):
            return self.origin + self.total / self.n

    def stderr(self) -> Float[Array, " column"]:
        """Of the mean."""
        with np.errstate(invalid="ignore", divide="ignore"):
            variance = (self.squares / self.n - (self.total / self.n) ** 2).clip(0)
            return np.sqrt(variance / (self.n - 1))


def moments(rows: Float[Array, "row column"], origin: Float[Array, " column"] | None = None) -> Moments:
    """Of these rows; about the first of them unless an origin is given."""
    origin = np.nan_to_num(rows[0]) if origin is None else origin
    there = ~np.isnan(rows)
    with np.errstate(invalid="ignore", over="ignore"):
        offset = np.where(there, rows - origin, 0.0)
        return Moments(there.sum(0).astype(float), origin, offset.sum(0), np.square(offset).sum(0))


def joined(a: Moments, b: Moments) -> Moments:
    """Of the rows of both, about the origin of the first."""
    with np.errstate(invalid="ignore", over="ignore"):
        shift = np.where(b.n > 0, b.origin - a.origin, 0.0)
        total = b.total + b.n * shift
        squares = b.squares + shift * (b.total + total)
    return Moments(a.n + b.n, a.origin, a.total + total, a.squares + squares)


class Sample:
    """A uniform sample of rows: all, or of more than `most` those whose index scrambles to least.

    Chance decides nothing: it depends neither on the order in which rows come nor on how they are split, so that
    samples of parts, added to one of the same size, are the sample of the whole.
    """

    def __init__(self, columns: int, most: int | None = None, dtype: str = "float64"):
        self.most, self.n = most, 0
        # One array that grows by doubling: many small ones would lie scattered between the passes' large ones.
        self._index = np.empty(0, np.int64)
        self._rows = np.empty((0, columns), dtype)

    def add(self, index: Int[Array, " row"], rows: Float[Array, "row column"]) -> None:
        """Rows, and which of all they are."""
        room = len(rows) if self.most is None else min(len(rows), self.most - self.n)
        after = self.n + room
        if after > len(self._rows):
            size = max(after, 64, 2 * self.n)
            size = size if self.most is None else min(size, self.most)
            self._index = _grown(self._index, self.n, size)
            self._rows = _grown(self._rows, self.n, size)
        self._index[self.n : after], self._rows[self.n : after] = index[:room], rows[:room]
        self.n = after
        if room < len(rows):
            self._compete(index[room:], rows[room:])

    def _compete(self, index: Int[Array, " row"], rows: Float[Array, "row column"]) -> None:
        """More rows than there is room for take the places of those that scramble to more."""
        keys = np.concatenate([scrambled(self._index[: self.n]), scrambled(index)])
        least = np.argpartition(keys, self.n - 1)[: self.n]
        stays = np.zeros(len(keys), bool)
        stays[least] = True
        free, new = np.flatnonzero(~stays[: self.n]), np.flatnonzero(stays[self.n :])
        self._index[free], self._rows[free] = index[new], rows[new]

    def kept(self) -> tuple[Int[Array, " row"], Float[Array, "row column"]]:
        """Which rows, in their order, and the rows."""
        index, rows = self._index[: self.n], self._rows[: self.n]
        if (index[1:] > index[:-1]).all():
            return index, rows
        order = np.argsort(index)
        return index[order], rows[order]


def _grown(array: Array, n: int, size: int) -> Array:
    larger = np.empty((size, *array.shape[1:]), array.dtype)
    larger[:n] = array[:n]
    return larger


def scrambled(index: Int[Array, " row"]) -> UInt64[Array, " row"]:
    """Numbers that look random and of which no two are the same (splitmix64: Steele, Lea and Flood 2014)."""
    z = index.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
    return z ^ (z >> np.uint64(31))
