"""What all results share: whose tokens they speak of, a sentence, and a picture where a notebook shows them."""

from __future__ import annotations

import html
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from jaxtyping import Int
from torch import Tensor

from .lens import LensModel

# Characters of a result's repr, and of its HTML.
MOST, MOST_HTML = 199, 200_000


@dataclass(frozen=True, eq=False)
class Prompts:
    """What a model read.

    Attributes:
        model: its name.
        tokens: Int[Tensor, "batch pos"], as it read them, BOS included; on the CPU.
        tokenizer: what tells the tokens' texts; None: their numbers are shown.
    """

    model: str
    tokens: Int[Tensor, "batch pos"]
    tokenizer: Any = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, model: LensModel, tokens: Int[Tensor, "batch pos"]) -> Prompts:
        """These tokens, read by this model."""
        return cls(name_of(model), tokens.detach().to("cpu", copy=True), model.tokenizer)

    @cached_property
    def strings(self) -> tuple[tuple[str, ...], ...]:
        """Each token as text, prompt by prompt; its number where there is no tokenizer."""
        return self.words(self.tokens)

    def words(self, ids: Int[Tensor, "batch pos"]) -> tuple[tuple[str, ...], ...]:
        """The texts of other tokens, targets for example."""
        different, where = ids.cpu().unique(return_inverse=True)
        texts = [str(i) for i in different.tolist()]
        if self.tokenizer is not None:
            texts = [self.tokenizer.decode([i]) for i in different.tolist()]
        return tuple(tuple(texts[i] for i in row) for row in where.tolist())

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice | Tensor) -> Prompts:
        """Some of the prompts."""
        return Prompts(self.model, self.tokens[rows], self.tokenizer)

    def __repr__(self) -> str:
        return f"Prompts({self.model}: {len(self.tokens)} of {self.tokens.shape[1]} tokens)"


class Result(ABC):
    """A result: a frozen dataclass of tensors with labels, made with repr=False.

    Each says in `summary` what it holds, in one line with its shape and unit, and draws itself: `picture` as HTML that
    needs no script, for notebooks, and `plot` as a figure of plotly. `table` has its numbers as a DataFrame.
    """

    @abstractmethod
    def summary(self) -> str: ...

    @abstractmethod
    def picture(self) -> str: ...

    def plot(self, *args: Any, **options: Any) -> Any:
        raise NotImplementedError(
            f"{type(self).__name__} has no figure; its table() and its picture in a notebook have all"
        )

    @abstractmethod
    def table(self, *args: Any, **options: Any) -> Any: ...

    def __repr__(self) -> str:
        text = " ".join(f"<{type(self).__name__} {self.summary()}>".split())
        return text if len(text) <= MOST else text[: MOST - 4] + " ...>"

    def _repr_html_(self) -> str:
        from .figures.html import card, note

        kind, sentence = type(self).__name__, self.summary()
        shown = card(kind, sentence, self.picture())
        if len(shown.encode()) > MOST_HTML:  # a notebook keeps what it shows
            return card(
                kind, sentence, note("The picture is too large for a notebook: plot() and table() have it all.")
            )
        return shown


class Picture(str):
    """HTML that a notebook shows as such."""

    def _repr_html_(self) -> str:
        return str(self)


class Page(str):
    """The HTML of a whole page, which a notebook shows in a frame."""

    def _repr_html_(self) -> str:
        frame = "width:100%;height:640px;border:1px solid #ccc"
        return f"<iframe style='{frame}' sandbox='allow-scripts' srcdoc='{html.escape(self)}'></iframe>"


@contextmanager
def drawing() -> Iterator[None]:
    """Around imports of figures that plotly draws.

    Raises:
        ImportError: there is no plotly.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "plotly":
            raise
        raise ImportError("plot() draws with plotly: pip install 'lnfree_interp[plot]'") from None


# ---------------------------------------------------------------------------------------------------------
# Words that summaries share


def name_of(model: LensModel) -> str:
    """The model's name, for people."""
    return str(getattr(model.cfg, "model_name", None) or "model")


def counted(n: int, what: str) -> str:
    """ "1 prompt", "1,000 prompts"."""
    return f"{n:,} {what}" + "s" * (n != 1)


def by(*numbers: tuple[int, str]) -> str:
    """ "17 components x 1 prompt x 8 positions"."""
    return " x ".join(counted(n, what) for n, what in numbers)
