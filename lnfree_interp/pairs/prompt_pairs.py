"""Clean and corrupted prompts that align, with their answers; and what results keep of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, SupportsIndex

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ..arguments import one_of, whole
from ..batching import Places, indices
from ..lens import LensModel, ModelOrName
from ..results import Prompts


@dataclass(frozen=True, repr=False)
class PromptPairs:
    """Clean and corrupted prompts of one token length.

    Some of the pairs are `pairs[2]`, `pairs[-1:]`, `pairs[mask]`, ..., always PromptPairs. Of texts they are made by
    `PromptPairs.from_texts`; they show the texts, where clean and corrupted differ as [clean/corrupted].

    Attributes:
        clean, corrupted: token ids, Int[Tensor, "prompt pos"].
        answers: (right, wrong) token ids for each prompt: what the clean and the corrupted prompt call for.
        tokenizer: by which they show their texts; None: they show numbers.

    Raises:
        ValueError: no token ids, pairs that do not align, clean equal to corrupted, right equal to wrong, no pairs.

    Example:
        >>> import torch
        >>> pairs = PromptPairs(torch.tensor([[0, 5, 6]]), torch.tensor([[0, 7, 6]]), torch.tensor([[5, 7]]))
        >>> len(pairs), pairs.differ.tolist()
        (1, [[False, True, False]])
    """

    clean: Int[Tensor, "prompt pos"]
    corrupted: Int[Tensor, "corrupted_prompt corrupted_pos"]
    answers: Int[Tensor, "answered_prompt two"]
    tokenizer: Any = field(default=None, compare=False)

    def __post_init__(self):
        for name in ("clean", "corrupted", "answers"):
            ids = getattr(self, name)
            if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
                kind = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
                raise ValueError(
                    f"{name} must be a tensor of token ids, not {kind}; "
                    "PromptPairs.from_file and pairs_from_text read texts"
                )
            if ids.ndim != 2 and name != "answers":
                raise ValueError(f"{name} has shape {list(ids.shape)}, wanted is [prompt, pos]")
            object.__setattr__(self, name, ids.to(self.clean.device, torch.long))
        n, n_pos = self.clean.shape
        if n == 0 or n_pos == 0:
            raise ValueError(f"pairs are empty: clean has shape {[n, n_pos]}")
        if self.corrupted.shape[0] != n:
            raise ValueError(f"clean has {n} prompts, corrupted has {self.corrupted.shape[0]}: pairs must align")
        if self.corrupted.shape[1] != n_pos:
            raise ValueError(f"clean has {n_pos} tokens, corrupted has {self.corrupted.shape[1]}: pairs must align")
        if tuple(self.answers.shape) != (n, 2):
            raise ValueError(f"answers have shape {list(self.answers.shape)}, {n} prompts want {[n, 2]} (right, wrong)")
        # What is wrong with the values, in one transfer from the device.
        same, undecided = torch.stack([~self.differ.any(1), self.answers[:, 0] == self.answers[:, 1]]).tolist()
        if True in same:
            raise ValueError(f"clean equals corrupted in pair {same.index(True)}: there is nothing to patch")
        if True in undecided:
            i = undecided.index(True)
            raise ValueError(f"pair {i} has token {int(self.answers[i, 0])} as right and as wrong")

    def __len__(self) -> int:
        return len(self.clean)

    def __getitem__(self, rows: Places) -> PromptPairs:
        """Some of the pairs, by number, slice, list, index tensor or mask; a single one is PromptPairs too.

        Raises:
            ValueError: a pair that is not there, or none at all.
        """
        chosen = indices(rows, len(self), "pair", range(len(self)), "pairs")
        if not isinstance(rows, slice) or rows.indices(len(self))[2] < 0:  # a slice is a view, where torch has it
            rows = torch.tensor(chosen, device=self.clean.device)
        return _valid_pairs(self.clean[rows], self.corrupted[rows], self.answers[rows], self.tokenizer)

    def __iter__(self) -> Iterator[PromptPairs]:
        """The pairs one by one."""
        return (self[i] for i in range(len(self)))

    @property
    def differ(self) -> Bool[Tensor, "prompt pos"]:
        """Where clean and corrupted have different tokens."""
        return self.clean != self.corrupted

    @property
    def first_difference(self) -> Int[Tensor, " prompt"]:
        """The first position at which they differ; causal models agree on everything before it."""
        return self.differ.int().argmax(1)

    def to(self, device) -> PromptPairs:
        one_of(device, "device", (str, torch.device), "the name of a device or a torch.device")
        clean, corrupted, answers = (ids.to(device) for ids in (self.clean, self.corrupted, self.answers))
        return _valid_pairs(clean, corrupted, answers, self.tokenizer)

    def reversed(self) -> PromptPairs:
        """Clean and corrupted exchanged; the answers stay, so metrics keep their sign."""
        return _valid_pairs(self.corrupted, self.clean, self.answers, self.tokenizer)

    @classmethod
    def from_file(
        cls, path: str | Path, model: ModelOrName, *, length: SupportsIndex | None = None, prepend_bos: bool = True
    ) -> PromptPairs:
        """The pairs of a .jsonl or .csv file with clean, corrupted, right, wrong.

        Args:
            length: the token length to take from a file that has several (`groups_from_file` gives all).
            prepend_bos: put the tokenizer's BOS token before each prompt.

        Raises:
            ValueError: see `groups_from_file`; also pairs of several lengths and none chosen.
        """
        from .texts import groups_from_file

        groups = groups_from_file(path, model, prepend_bos=prepend_bos)
        counts = ", ".join(f"{n} tokens ({len(group)} pairs)" for n, group in groups.items())
        if length is None and len(groups) > 1:
            raise ValueError(f"{path} has pairs of {counts}: choose one with length=, or take groups_from_file")
        length = next(iter(groups)) if length is None else whole(length, "length")
        if length not in groups:
            raise ValueError(f"{path} has no pairs of {length} tokens; it has {counts}")
        return groups[length]

    @classmethod
    def from_texts(
        cls,
        model: ModelOrName,
        clean: str | Sequence[str],
        corrupted: str | Sequence[str],
        answers: Sequence[str] | Sequence[Sequence[str]],
        *,
        prepend_bos: bool = True,
    ) -> PromptPairs:
        """Pairs of texts, all of one token length.

        Args:
            clean, corrupted: a text each, or as many of both.
            answers: (right, wrong), of all prompts or a pair for each: texts of a single token, which usually begin
                with a space.
            prepend_bos: put the tokenizer's BOS token before each prompt.

        Raises:
            ValueError: as `pairs_from_text`, which takes pairs of several lengths; not as many of each.

        Example:
            >>> from lnfree_interp import PromptPairs
            >>> PromptPairs.from_texts("tiny-noLN", "the girl said that", "the man said that", (" she", " he"))
            <PromptPairs 1 pair of 5 tokens: "the[ girl/ man] said that", right ' she', wrong ' he'>
        """
        from .texts import one_length

        return one_length(model, clean, corrupted, answers, prepend_bos)

    def summary(self) -> str:
        """How many they are, and the first of them."""
        return PairedPrompts.of_pairs(self).summary()

    def table(self):
        """One row per pair: clean, corrupted, right, wrong, as texts; BOS tokens are left out."""
        return PairedPrompts.of_pairs(self).table()

    def __repr__(self) -> str:
        return f"<PromptPairs {self.summary()}>"

    def _repr_html_(self) -> str:
        from ..figures.html import card
        from ..figures.pairs import pairs_picture

        return card("PromptPairs", self.summary(), pairs_picture(PairedPrompts.of_pairs(self)))


@dataclass(frozen=True, eq=False, repr=False)
class PairedPrompts(Prompts):
    """What results of pairs keep of them: clean prompts, as `Prompts` are, and what goes with each.

    Attributes:
        corrupted: the other prompts.
        answers: (right, wrong) token ids of each.
    """

    corrupted: Prompts = field(kw_only=True)
    answers: Int[Tensor, "prompt two"] = field(kw_only=True)

    @classmethod
    def of_pairs(cls, pairs: PromptPairs, model: LensModel | None = None) -> PairedPrompts:
        """These pairs, read by a model."""
        name = "" if model is None else str(model.cfg.model_name)
        tokenizer = pairs.tokenizer if model is None else model.tokenizer
        clean, corrupted, answers = (ids.detach().cpu() for ids in (pairs.clean, pairs.corrupted, pairs.answers))
        return cls(name, clean, tokenizer, corrupted=Prompts(name, corrupted, tokenizer), answers=answers)

    def __getitem__(self, rows: slice | Tensor) -> PairedPrompts:
        """Some of the pairs."""
        rows = rows.cpu() if isinstance(rows, Tensor) else rows
        corrupted = Prompts(self.model, self.corrupted.tokens[rows], self.tokenizer)
        return PairedPrompts(
            self.model, self.tokens[rows], self.tokenizer, corrupted=corrupted, answers=self.answers[rows]
        )

    @property
    def differ(self) -> Bool[Tensor, "prompt pos"]:
        """Where clean and corrupted have different tokens."""
        return self.tokens != self.corrupted.tokens

    @property
    def answer_strings(self) -> tuple[tuple[str, ...], ...]:
        """(right, wrong) as text, pair by pair."""
        return Prompts(self.model, self.answers, self.tokenizer).strings

    def position_labels(self, positions: Sequence[int]) -> list[str]:
        """Position and token, as "5  Mary", clean and corrupted where they differ, as "5  Mary/ John"; in brackets
        the first pair's, where those of others are not the same."""
        if not len(self.tokens):
            return [str(i) for i in positions]
        clean, corrupted = self[:1].strings[0], self[:1].corrupted.strings[0]
        same = ((self.tokens == self.tokens[0]) & (self.corrupted.tokens == self.corrupted.tokens[0])).all(0).tolist()
        differ, labels = self.differ.any(0).tolist(), []
        for i in positions:
            token = (f"{clean[i]}/{corrupted[i].strip()}" if differ[i] else clean[i]).strip()
            labels.append(f"{i} {token}" if same[i] else f"{i} ({token})")
        return labels

    def written(self, i: int) -> list[tuple[str, str | None]]:
        """(clean, corrupted or None) texts of one pair, piece by piece: None where both are the same; without BOS."""
        pair, differ = self[i : i + 1], self.differ[i].tolist()
        clean, corrupted = pair.strings[0], pair.corrupted.strings[0]
        bos = self.tokenizer is not None and self.tokens[i, 0] == getattr(self.tokenizer, "bos_token_id", None)
        pieces = [(a, b if d else None) for a, b, d in zip(clean, corrupted, differ)]
        return pieces[1:] if bos and not differ[0] else pieces

    def summary(self) -> str:
        """How many they are, and the first of them."""
        n, n_pos = self.tokens.shape
        sizes = f"{n} pair{'s' * (n != 1)} of {n_pos} tokens"
        if not n:
            return sizes
        between = "" if self.tokenizer is not None else " "
        text = between.join(a if b is None else f"[{a}/{b}]" for a, b in self.written(0))
        if len(text) > 70:  # around the first difference
            at = max(0, min(text.index("["), len(text) - 60) - 20)
            text = ("…" if at else "") + text[at : at + 68] + "…"
        right, wrong = self[:1].answer_strings[0]
        first = "" if n == 1 else " the first"
        return f'{sizes}:{first} "{text.strip()}", right {right!r}, wrong {wrong!r}'.replace("\n", "⏎")

    def table(self):
        """One row per pair: clean, corrupted, right, wrong, as texts; BOS tokens are left out."""
        import pandas as pd

        between = "" if self.tokenizer is not None else " "
        rows = []
        for i, answers in enumerate(self.answer_strings):
            pieces = self.written(i)
            clean, corrupted = (
                between.join(a for a, _ in pieces),
                between.join(a if b is None else b for a, b in pieces),
            )
            rows.append((clean, corrupted, *answers))
        return pd.DataFrame(rows, columns=["clean", "corrupted", "right", "wrong"])


def _valid_pairs(clean: Tensor, corrupted: Tensor, answers: Tensor, tokenizer: Any) -> PromptPairs:
    """Pairs made of valid ones: not checked again, which would read from the device each time."""
    pairs = object.__new__(PromptPairs)
    fields = {"clean": clean, "corrupted": corrupted, "answers": answers, "tokenizer": tokenizer}
    for name, value in fields.items():
        object.__setattr__(pairs, name, value)
    return pairs


def as_pairs(pairs: object, model: ModelOrName | None = None) -> PromptPairs:
    """Pairs as they are, or made of (clean, corrupted, answers), which are texts if there is a model to read them.

    Raises:
        ValueError: something else, or as PromptPairs; pairs that were read with a tokenizer to which they say something
            else.
    """
    if isinstance(pairs, PromptPairs):
        _check_tokenizer(pairs, getattr(model, "tokenizer", None))
        return pairs
    if isinstance(pairs, (tuple, list)) and len(pairs) == 3:
        clean, corrupted, answers = pairs
        first = clean[0] if isinstance(clean, (tuple, list)) and clean else clean
        if model is not None and isinstance(first, str):
            return PromptPairs.from_texts(model, clean, corrupted, answers)
        return PromptPairs(clean, corrupted, answers)
    raise ValueError(f"pairs must be PromptPairs, or (clean, corrupted, answers) for it, not {type(pairs).__name__}")


def _check_tokenizer(pairs: PromptPairs, tokenizer: Any) -> None:
    if tokenizer is None or pairs.tokenizer is None or tokenizer is pairs.tokenizer:
        return
    ids = pairs.clean[0].tolist()
    there, here = (t.decode(ids) for t in (pairs.tokenizer, tokenizer))
    if there != here:
        raise ValueError(
            f"the pairs were read with another tokenizer: {there[:40]!r} is {here[:40]!r} to this model; give it texts"
        )
