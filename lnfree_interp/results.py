"""What all results share: whose tokens they speak of, a sentence, and a picture where a notebook shows them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from jaxtyping import Int
from torch import Tensor

from .lens import LensModel


@dataclass(frozen=True, eq=False)
class Prompts:
    """What a model read.

    Attributes:
        model: its name.
        tokens: Int[Tensor, "batch pos"], as it read them, BOS included; on the CPU.
    """

    model: str
    tokens: Int[Tensor, "batch pos"]
    tokenizer: Any = field(default=None, repr=False)

    @classmethod
    def of(cls, model: LensModel, tokens: Int[Tensor, "batch pos"]) -> Prompts:
        """These tokens, read by this model."""
        return cls(str(model.cfg.model_name), tokens.detach().cpu(), model.tokenizer)

    @cached_property
    def strings(self) -> tuple[tuple[str, ...], ...]:
        """Each token as text, prompt by prompt; its number where there is no tokenizer."""
        ids, where = self.tokens.unique(return_inverse=True)
        texts = [str(i) for i in ids.tolist()]
        if self.tokenizer is not None:
            texts = [self.tokenizer.decode([i]) for i in ids.tolist()]
        return tuple(tuple(texts[i] for i in row) for row in where.tolist())

    def __getitem__(self, rows: slice | Tensor) -> Prompts:
        """Some of the prompts."""
        return Prompts(self.model, self.tokens[rows], self.tokenizer)

    def __repr__(self) -> str:
        return f"Prompts({self.model}: {len(self.tokens)} of {self.tokens.shape[1]} tokens)"


class Result:
    """A result: a frozen dataclass of tensors with labels, made with repr=False.

    Each says in `summary` what it holds, in one line with its shape and unit, and draws itself: `picture` as HTML that
    needs no script, for notebooks, and `plot` as a figure of plotly.
    """

    def summary(self) -> str:
        raise NotImplementedError

    def picture(self) -> str:
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.summary()}>"

    def _repr_html_(self) -> str:
        from .figures.html import card

        return card(type(self).__name__, self.summary(), self.picture())
