"""Prompt pairs: clean and corrupted prompts that align token by token, with a right and a wrong answer."""

from __future__ import annotations

import csv
import io
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import SupportsIndex

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from .batching import Places, check_next_token, encode, indices, one_token, whole
from .documents import read_json_lines, read_text
from .lens import LensModel, ModelOrName
from .models import as_model


@dataclass(frozen=True)
class PromptPairs:
    """Clean and corrupted prompts of one token length.

    Some of the pairs are `pairs[2]`, `pairs[-1:]`, `pairs[mask]`, ..., always PromptPairs.

    Attributes:
        clean, corrupted: token ids, Int[Tensor, "prompt pos"].
        answers: (right, wrong) token ids for each prompt: what the clean and the corrupted prompt call for.

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
        return _valid_pairs(self.clean[rows], self.corrupted[rows], self.answers[rows])

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
        return _valid_pairs(self.clean.to(device), self.corrupted.to(device), self.answers.to(device))

    def reversed(self) -> PromptPairs:
        """Clean and corrupted exchanged; the answers stay, so metrics keep their sign."""
        return _valid_pairs(self.corrupted, self.clean, self.answers)

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
        groups = groups_from_file(path, model, prepend_bos=prepend_bos)
        counts = ", ".join(f"{n} tokens ({len(group)} pairs)" for n, group in groups.items())
        if length is None and len(groups) > 1:
            raise ValueError(f"{path} has pairs of {counts}: choose one with length=, or take groups_from_file")
        length = next(iter(groups)) if length is None else whole(length, "length")
        if length not in groups:
            raise ValueError(f"{path} has no pairs of {length} tokens; it has {counts}")
        return groups[length]


def _valid_pairs(clean: Tensor, corrupted: Tensor, answers: Tensor) -> PromptPairs:
    """Pairs made of valid ones: not checked again, which would read from the device each time."""
    pairs = object.__new__(PromptPairs)
    for name, ids in (("clean", clean), ("corrupted", corrupted), ("answers", answers)):
        object.__setattr__(pairs, name, ids)
    return pairs


def as_pairs(pairs: object) -> PromptPairs:
    """Pairs as they are, or made of (clean, corrupted, answers).

    Raises:
        ValueError: something else, or as PromptPairs.
    """
    if isinstance(pairs, PromptPairs):
        return pairs
    if isinstance(pairs, (tuple, list)) and len(pairs) == 3:
        return PromptPairs(*pairs)
    raise ValueError(f"pairs must be PromptPairs, or (clean, corrupted, answers) for it, not {type(pairs).__name__}")


# ---------------------------------------------------------------------------------------------------------
# Text -> tokens


def _bos(model: LensModel) -> list[int]:
    bos = getattr(model.tokenizer, "bos_token_id", None)
    return [] if bos is None else [bos]


def pairs_from_text(
    model: ModelOrName, rows: Sequence[Sequence[str]], *, prepend_bos: bool = True, places: Sequence[str] = ()
) -> dict[int, PromptPairs]:
    """Pairs of texts (clean, corrupted, right, wrong) by token length, shortest first; never padded.

    Args:
        places: what to call each row in errors (default "pair 0", ...).

    Raises:
        ValueError: no tokenizer, no rows, rows that are no four texts, prompts that do not align or do not differ,
            longer than the model's context, an answer that is not one token (its tokens are shown).

    Example:
        >>> from lnfree_interp import load_model
        >>> rows = [("the girl said that", "the man said that", " she", " he")]
        >>> groups = pairs_from_text(load_model("tiny"), rows)
        >>> {n: pairs.clean.shape for n, pairs in groups.items()}
        {5: torch.Size([1, 5])}
    """
    model = as_model(model)
    check_next_token(model)
    bos = _bos(model) if prepend_bos else []
    groups: dict[int, list[tuple[list[int], list[int], list[int]]]] = {}
    for i, row in enumerate(rows):
        try:
            if isinstance(row, str) or len(row) != 4 or not all(isinstance(text, str) for text in row):
                raise ValueError("a pair is four texts: clean, corrupted, right, wrong")
            clean, corrupted, right, wrong = row
            a, b = bos + encode(model, clean), bos + encode(model, corrupted)
            if len(a) != len(b):
                raise ValueError(f"clean has {len(a)} tokens, corrupted has {len(b)}: pairs must align")
            if a == b:
                raise ValueError("clean equals corrupted: there is nothing to patch")
            if len(a) > model.cfg.n_ctx:
                raise ValueError(f"prompt has {len(a)} tokens, the model's context is {model.cfg.n_ctx}")
            answers = [one_token(model, right, "answer"), one_token(model, wrong, "answer")]
            if answers[0] == answers[1]:
                raise ValueError(f"{right!r} is the right and the wrong answer")
        except ValueError as error:
            raise ValueError(f"{places[i] if places else f'pair {i}'}: {error}") from None
        groups.setdefault(len(a), []).append((a, b, answers))
    if not groups:
        raise ValueError("there are no pairs")
    return {n: PromptPairs(*(torch.tensor(column) for column in zip(*groups[n]))) for n in sorted(groups)}


_COLUMNS = ("clean", "corrupted", "right", "wrong")


def groups_from_file(path: str | Path, model: ModelOrName, *, prepend_bos: bool = True) -> dict[int, PromptPairs]:
    """The pairs of a .jsonl or .csv file with clean, corrupted, right, wrong, by token length.

    Texts are taken as they stand: a GPT-2 answer usually begins with a space.

    Raises:
        ValueError: a file that is missing, empty, of another kind or lacks a column; a pair that does not align,
            does not differ or has an answer of several tokens. The line is named.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from lnfree_interp import load_model
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "pairs.csv"
        ...     _ = file.write_text("clean,corrupted,right,wrong\\nthe girl said that,the man said that, she, he\\n")
        ...     groups = groups_from_file(file, load_model("tiny"))
        >>> list(groups), groups[5].answers.shape
        ([5], torch.Size([1, 2]))
    """
    model = as_model(model)
    kind = Path(str(path).removesuffix(".gz")).suffix
    if kind not in (".jsonl", ".csv"):
        raise ValueError(f"pairs file {path} is neither .jsonl nor .csv (nor one of them as .gz)")
    records = list(_csv_records(path) if kind == ".csv" else read_json_lines(path, "pairs file"))
    if not records:
        raise ValueError(f"pairs file {path} holds no pairs")
    rows: list[tuple] = []
    places = []
    for number, record in records:
        place = f"{path}, line {number}"
        row = tuple(record.get(c) for c in _COLUMNS) if isinstance(record, dict) else (None,) * 4
        missing = [c for c, value in zip(_COLUMNS, row) if not isinstance(value, str) or not value]
        if missing:
            raise ValueError(f"{place} lacks {', '.join(missing)}; wanted are {', '.join(_COLUMNS)}")
        rows.append(row)
        places.append(place)
    return pairs_from_text(model, rows, prepend_bos=prepend_bos, places=places)


def _csv_records(path: str | Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(number of its first line, record) of each row that is not blank; the first row names the columns.

    Raises:
        ValueError: the file cannot be read, quotes that do not close, a row of more fields than there are columns.
    """
    # strict: a quote that does not close would else swallow the rest of the file.
    reader = csv.reader(io.StringIO(read_text(path, "pairs file"), newline=""), strict=True)
    columns, first = None, 1
    try:
        for row in reader:
            if row and columns is None:
                columns = row
            elif row and columns is not None:
                if len(row) > len(columns):
                    raise ValueError(
                        f"{path}, line {first} has {len(row)} fields for {len(columns)} columns: "
                        "texts with a comma must stand in quotes"
                    )
                yield first, dict(zip(columns, row))
            first = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {first} is no CSV: {error}") from None


# ---------------------------------------------------------------------------------------------------------
# Indirect object identification

NAMES = tuple(
    """
    Mary John Tom James Dan Martin Amy David Peter Sarah Anna Paul Mark Kate Laura Simon Alice Jack Emma George
    Henry William Charles Robert Richard Edward Arthur Frank Lucy Jane Elizabeth Margaret Ruth Helen Alex Michael
    Thomas Philip Joseph Joe Sam Ben Will Harry Kelly Rachel Lisa Jessica
    """.split()
)
PLACES = tuple(
    """
    store garden restaurant school hospital office house station church library market park village town city castle
    hotel theatre river sea
    """.split()
)
OBJECTS = tuple(
    """
    ring kiss bone basketball computer necklace drink snack book letter key box cup glass flower hat coat knife
    picture pen stick watch purse cat dog
    """.split()
)
TEMPLATES = (
    "Then, {A} and {B} went to the {PLACE}. {S} gave a {OBJECT} to",
    "When {A} and {B} went to the {PLACE}, {S} gave a {OBJECT} to",
    "After {A} and {B} came to the {PLACE}, {S} handed the {OBJECT} to",
    "While {A} and {B} were at the {PLACE}, {S} decided to give the {OBJECT} to",
)
"""{S} is the giver. In the clean prompt it is one of the two names, in the corrupted prompt the other one."""


_SLOTS = ("A", "B", "PLACE", "S", "OBJECT")


def ioi_pairs(
    model: ModelOrName,
    n: SupportsIndex,
    *,
    seed: SupportsIndex = 0,
    template: SupportsIndex | str = 0,
    prepend_bos: bool = True,
) -> PromptPairs:
    """Pairs for indirect object identification: clean and corrupted differ in who gives, so in who receives.

    Names, places and objects are drawn from those that are one token each (after a space) in the model's
    tokenizer, so that all pairs have one length; half of the pairs name the receiver first (ABBA), half the giver
    (BABA). Answers: the clean prompt's receiver is right, the corrupted prompt's is wrong. Template 0 is P2's
    (arXiv 2507.02559).

    Args:
        template: index into TEMPLATES, or your own text with {A}, {B}, {PLACE}, {S}, {OBJECT}, in each case
            after a space.
        prepend_bos: put the tokenizer's BOS token first.

    Raises:
        ValueError: no tokenizer, fewer than two single-token names or no place or object, an unknown template,
            n not positive.

    Example:
        >>> from lnfree_interp import load_model
        >>> pairs = ioi_pairs(load_model("tiny-noLN"), 4)
        >>> len(pairs), pairs.differ.sum(1).tolist()
        (4, [1, 1, 1, 1])
    """
    model = as_model(model)
    n, draw, template = whole(n, "n", least=1), random.Random(whole(seed, "seed")), _template(template)
    names, places, objects = (
        [word for word in words if len(encode(model, " " + word)) == 1] for words in (NAMES, PLACES, OBJECTS)
    )
    if len(names) < 2 or not places or not objects:
        raise ValueError(
            f"the tokenizer has {len(names)} names, {len(places)} places and {len(objects)} objects that are one "
            "token each; at least 2, 1 and 1 are needed"
        )
    rows = []
    for i in range(n):
        receiver, giver = draw.sample(names, 2)
        a, b = (receiver, giver) if i % 2 == 0 else (giver, receiver)
        fill = {"A": a, "B": b, "PLACE": draw.choice(places), "OBJECT": draw.choice(objects)}
        clean, corrupted = (template.format(S=s, **fill) for s in (giver, receiver))
        rows.append((clean, corrupted, f" {receiver}", f" {giver}"))
    groups = pairs_from_text(model, rows, prepend_bos=prepend_bos)
    if len(groups) > 1:
        raise ValueError(
            f"template {template!r} gives pairs of {', '.join(map(str, groups))} tokens, not of one length"
        )
    return next(iter(groups.values()))


def _template(template: SupportsIndex | str) -> str:
    """The text of a template that is named by its number or given, with no slots but the known ones."""
    if not isinstance(template, str):
        number = whole(template, "template")
        if not 0 <= number < len(TEMPLATES):
            raise ValueError(f"template {number} is unknown; known are 0 to {len(TEMPLATES) - 1}, or a text")
        return TEMPLATES[number]
    known = ", ".join(f"{{{slot}}}" for slot in _SLOTS)
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError(
            f"template {template!r} has a brace too many or too few ({error}); slots are {known}"
        ) from None
    slots = []
    for _, name, spec, conversion in parts:
        if name is None:  # the text after the last slot
            continue
        slots.append(name)
        if name not in _SLOTS or spec or conversion:
            raise ValueError(f"template {template!r} has an unknown slot {{{name}}}; known are {known}")
    lacking = [slot for slot in ("A", "B", "S") if slot not in slots]
    if lacking:
        raise ValueError(f"template {template!r} lacks {', '.join(f'{{{slot}}}' for slot in lacking)}")
    return template


# ---------------------------------------------------------------------------------------------------------
# Induction


def induction_pairs(
    model: ModelOrName, n: SupportsIndex, *, length: SupportsIndex = 16, seed: SupportsIndex = 0
) -> PromptPairs:
    """Random tokens repeated up to the one before the last: the model must copy what came next the first time.

    The pairs differ in that token's first occurrence alone; what stands there is the answer, right in the clean
    and wrong in the corrupted prompt. Tokens are all different within a prompt, and drawn from the whole
    vocabulary; where there is a tokenizer, without special tokens and parts of characters, and with a BOS token
    first if it has one.

    Args:
        length: positions per prompt, BOS included; at least 4.

    Raises:
        ValueError: n not positive, a length below 4 or beyond the context, a vocabulary too small for it.

    Example:
        >>> from lnfree_interp import load_model
        >>> pairs = induction_pairs(load_model("tiny-noLN"), 8, length=12)
        >>> pairs.clean.shape, pairs.differ.sum().item()
        (torch.Size([8, 12]), 8)
    """
    model = as_model(model)
    check_next_token(model)
    n, length, draw = whole(n, "n", least=1), whole(length, "length"), random.Random(whole(seed, "seed"))
    if not 4 <= length <= model.cfg.n_ctx:
        raise ValueError(f"length is {length}, it must be from 4 to the model's context of {model.cfg.n_ctx}")
    bos, special = [], set()
    if model.tokenizer is not None:
        bos, special = _bos(model), set(model.tokenizer.all_special_ids)
    period = (length - len(bos)) // 2 + 1
    allowed = [i for i in range(model.cfg.d_vocab) if i not in special]
    # The first period is repeated up to the token before the one asked for, which stands at offset `asked`.
    asked = length - len(bos) - period
    clean, corrupted, answers = [], [], []
    for _ in range(n):
        *first, other = _whole_tokens(model, allowed, period + 1, draw, length)
        changed = [*first[:asked], other, *first[asked + 1 :]]
        clean.append(bos + first + first[:asked])
        corrupted.append(bos + changed + changed[:asked])
        answers.append([first[asked], other])
    return PromptPairs(torch.tensor(clean), torch.tensor(corrupted), torch.tensor(answers))


def _whole_tokens(model: LensModel, allowed: list[int], n: int, draw: random.Random, length: int) -> list[int]:
    """n different tokens that are text by themselves."""
    found: list[int] = []
    for size in (4 * n, len(allowed)):  # nearly always, a few are enough to look at
        found = draw.sample(allowed, min(size, len(allowed)))
        if model.tokenizer is not None:
            found = [i for i in found if "\ufffd" not in model.tokenizer.decode([i])]
        if len(found) >= n:
            return found[:n]
    raise ValueError(f"length {length} needs {n} different tokens, the vocabulary has {len(found)}")
