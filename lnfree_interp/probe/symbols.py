"""Symbols as vectors of signs (MAP: multiply, add, permute; Gayler 1998), and the algebra on them.

Two random vectors of D signs have a cosine of 0 with a standard deviation of 1/sqrt(D). `bind` multiplies and is its
own inverse; `bundle` adds and keeps the sign, drawn at random where the sum is 0: a sum of two ties in half of its
numbers, and were all ties -1, a vector of nothing but -1 would score a cosine of 0.5 with every bundle.
"""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..arguments import as_text, whole


def concept_of(text: str) -> str:
    """The name of a concept: in lower case, without blanks around it."""
    return text.strip().lower()


@dataclass(frozen=True)
class Codebook:
    """A vector of random signs for each concept.

    A concept's vector follows from its name, dim and seed alone: codebooks agree on what they share, whatever the
    order.

    Attributes:
        concepts: their names, in lower case.
        dim: how many signs.
        seed: whole number.

    Raises:
        ValueError: fewer than two concepts, the same one twice, a name that is empty; a dim below 1.

    Example:
        >>> from lnfree_interp.probe.symbols import bind, bundle, unbind, similarity
        >>> book = Codebook(("denmark", "krone", "mexico", "peso"))
        >>> denmark, krone, mexico, peso = book.vectors
        >>> pairs = bundle(torch.stack([bind(denmark, krone), bind(mexico, peso)]))
        >>> book.concepts[int(similarity(unbind(pairs, mexico), book.vectors).argmax())]
        'peso'
    """

    concepts: tuple[str, ...]
    dim: int = 4096
    seed: int = 0

    def __post_init__(self):
        if not isinstance(self.concepts, (tuple, list)) or not all(isinstance(name, str) for name in self.concepts):
            raise ValueError("concepts must be a list of names")
        names = tuple(concept_of(name) for name in self.concepts)
        if len(set(names)) < 2:
            raise ValueError(f"concepts must be two at least, not {len(set(names))}: {', '.join(names)}")
        if "" in names:
            raise ValueError("a concept has an empty name")
        if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
            raise ValueError(f"concept {twice[0]!r} is given twice (names count in lower case)")
        object.__setattr__(self, "concepts", names)
        object.__setattr__(self, "dim", whole(self.dim, "dim", least=1))
        object.__setattr__(self, "seed", whole(self.seed, "seed", least=0))

    @cached_property
    def vectors(self) -> Float[Tensor, "concept dim"]:
        """The vectors, in fp32."""
        rows = []
        for name in self.concepts:
            drawn = hashlib.shake_256(f"{self.seed}:{name}".encode()).digest(math.ceil(self.dim / 8))
            rows.append(np.unpackbits(np.frombuffer(drawn, np.uint8))[: self.dim])
        return torch.from_numpy(np.stack(rows).astype(np.float32) * 2 - 1)

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.concepts)}

    def number(self, concept: str) -> int:
        """Which of the concepts it is.

        Raises:
            ValueError: none of them.
        """
        name = concept_of(as_text(concept, "concept"))
        if name not in self._numbers:
            near = difflib.get_close_matches(name, self.concepts, n=1)
            hint = f"; nearest: {near[0]}" if near else ""
            raise ValueError(f"concept {concept!r} is none of the codebook's {len(self.concepts)}{hint}")
        return self._numbers[name]

    def of(self, concepts: Sequence[str]) -> Float[Tensor, "n dim"]:
        """The vectors of some concepts.

        Raises:
            ValueError: one of them is none of the codebook's.
        """
        if isinstance(concepts, str) or not isinstance(concepts, Sequence):
            raise ValueError("concepts must be a list of names")
        return self.vectors[[self.number(concept) for concept in concepts]]


def signs(x: Float[Tensor, "*rows dim"], seed: int = 0) -> Float[Tensor, "*rows dim"]:
    """The sign of each number; of a 0 one drawn at random."""
    coins = torch.randint(2, x.shape, generator=torch.Generator().manual_seed(seed)).to(x) * 2 - 1
    return torch.where(x == 0, coins, x.sign())


def bind(a: Float[Tensor, "*rows dim"], b: Float[Tensor, "*others dim"]) -> Float[Tensor, ...]:
    """The pair of two symbols: like neither of them, and bound with one of them again the other."""
    return a * b


unbind = bind
"""What a pair holds beside a symbol: binding is its own inverse."""


def bundle(vectors: Float[Tensor, "*rows n dim"], seed: int = 0) -> Float[Tensor, "*rows dim"]:
    """Several symbols as one that is like each of them; ties are drawn at random."""
    return signs(vectors.sum(-2), seed)


def similarity(a: Float[Tensor, "*rows dim"], b: Float[Tensor, "*others dim"]) -> Float[Tensor, ...]:
    """Cosines of all of a with all of b, [*rows, *others]; 0 for vectors of length 0."""
    dtype = torch.promote_types(a.dtype, b.dtype)
    a, b = (torch.nn.functional.normalize(x.to(dtype), dim=-1, eps=1e-12) for x in (a, b))
    return torch.tensordot(a, b, dims=([-1], [-1]))


def expected_similarity(n: int) -> float:
    """Mean cosine of a bundle of n random symbols with one of them: C(n - 1, (n - 1) // 2) / 2^(n - 1).

    The standard deviation around it is sqrt((1 - mean^2) / D).

    Example:
        >>> [expected_similarity(n) for n in (1, 2, 3, 4)]
        [1.0, 0.5, 0.5, 0.375]
    """
    return math.comb(n - 1, (n - 1) // 2) / 2 ** (n - 1)
