"""Prompt pairs: clean and corrupted prompts that align token by token, with a right and a wrong answer."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True)
class PromptPairs:
    """Clean and corrupted prompts of one token length.

    Attributes:
        clean, corrupted: token ids, Int[Tensor, "prompt pos"].
        answers: (right, wrong) token ids for each prompt: what the clean and the corrupted prompt call for.

    Raises:
        ValueError: pairs that do not align, clean equal to corrupted, right equal to wrong, no pairs.

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
        n, n_pos = self.clean.shape
        if n == 0 or n_pos == 0:
            raise ValueError(f"pairs are empty: clean has shape {[n, n_pos]}")
        if self.corrupted.shape[0] != n:
            raise ValueError(f"clean has {n} prompts, corrupted has {self.corrupted.shape[0]}: pairs must align")
        if self.corrupted.shape[1] != n_pos:
            raise ValueError(f"clean has {n_pos} tokens, corrupted has {self.corrupted.shape[1]}: pairs must align")
        if tuple(self.answers.shape) != (n, 2):
            raise ValueError(f"answers have shape {list(self.answers.shape)}, {n} prompts want {[n, 2]} (right, wrong)")
        same = (~self.differ.any(1)).nonzero().flatten().tolist()
        if same:
            raise ValueError(f"clean equals corrupted in pair {same[0]}: there is nothing to patch")
        undecided = (self.answers[:, 0] == self.answers[:, 1]).nonzero().flatten().tolist()
        if undecided:
            raise ValueError(
                f"pair {undecided[0]} has token {int(self.answers[undecided[0], 0])} as right and as wrong"
            )

    def __len__(self) -> int:
        return len(self.clean)

    def __getitem__(self, rows: slice | Tensor) -> PromptPairs:
        """Some of the pairs."""
        return PromptPairs(self.clean[rows], self.corrupted[rows], self.answers[rows])

    @property
    def differ(self) -> Bool[Tensor, "prompt pos"]:
        """Where clean and corrupted have different tokens."""
        return self.clean != self.corrupted

    @property
    def first_difference(self) -> Int[Tensor, " prompt"]:
        """The first position at which they differ; causal models agree on everything before it."""
        return self.differ.int().argmax(1)

    def to(self, device) -> PromptPairs:
        return PromptPairs(self.clean.to(device), self.corrupted.to(device), self.answers.to(device))

    def reversed(self) -> PromptPairs:
        """Clean and corrupted exchanged; the answers stay, so metrics keep their sign."""
        return PromptPairs(self.corrupted, self.clean, self.answers)

    @classmethod
    def from_file(cls, path: str | Path, model, *, length: int | None = None, prepend_bos: bool = True) -> PromptPairs:
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
        length = next(iter(groups)) if length is None else length
        if length not in groups:
            raise ValueError(f"{path} has no pairs of {length} tokens; it has {counts}")
        return groups[length]


# ---------------------------------------------------------------------------------------------------------
# Text -> tokens


def _encoder(model) -> Callable[[str], list[int]]:
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ValueError(f"{model.cfg.model_name} has no tokenizer, so text cannot be read for it")
    return lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _bos(model) -> list[int]:
    bos = getattr(model.tokenizer, "bos_token_id", None)
    return [] if bos is None else [bos]


def _answer(model, encode: Callable[[str], list[int]], text: str) -> int:
    ids = encode(text)
    if len(ids) != 1:
        shown = [model.tokenizer.decode([i]) for i in ids]
        raise ValueError(f"answer {text!r} is {len(ids)} tokens {shown}, it must be one")
    if ids[0] >= model.cfg.d_vocab:
        raise ValueError(f"answer {text!r} is token {ids[0]}, outside the model's vocabulary of {model.cfg.d_vocab}")
    return ids[0]


def pairs_from_text(
    model, rows: Sequence[tuple[str, str, str, str]], *, prepend_bos: bool = True, places: Sequence[str] = ()
) -> dict[int, PromptPairs]:
    """Pairs of texts (clean, corrupted, right, wrong) by token length, shortest first; never padded.

    Args:
        places: what to call each row in errors (default "pair 0", ...).

    Raises:
        ValueError: no tokenizer, prompts that do not align or do not differ, longer than the model's context, an
            answer that is not one token (its tokens are shown).

    Example:
        >>> from lnfree_interp import load_model
        >>> rows = [("the girl said that", "the man said that", " she", " he")]
        >>> groups = pairs_from_text(load_model("tiny"), rows)
        >>> {n: pairs.clean.shape for n, pairs in groups.items()}
        {5: torch.Size([1, 5])}
    """
    encode, bos = _encoder(model), _bos(model) if prepend_bos else []
    groups: dict[int, list[tuple[list[int], list[int], list[int]]]] = {}
    for i, (clean, corrupted, right, wrong) in enumerate(rows):
        try:
            a, b = bos + encode(clean), bos + encode(corrupted)
            if len(a) != len(b):
                raise ValueError(f"clean has {len(a)} tokens, corrupted has {len(b)}: pairs must align")
            if a == b:
                raise ValueError("clean equals corrupted: there is nothing to patch")
            if len(a) > model.cfg.n_ctx:
                raise ValueError(f"prompt has {len(a)} tokens, the model's context is {model.cfg.n_ctx}")
            answers = [_answer(model, encode, right), _answer(model, encode, wrong)]
            if answers[0] == answers[1]:
                raise ValueError(f"{right!r} is the right and the wrong answer")
        except ValueError as error:
            raise ValueError(f"{places[i] if places else f'pair {i}'}: {error}") from None
        groups.setdefault(len(a), []).append((a, b, answers))
    return {n: PromptPairs(*(torch.tensor(column) for column in zip(*groups[n]))) for n in sorted(groups)}


_COLUMNS = ("clean", "corrupted", "right", "wrong")


def groups_from_file(path: str | Path, model, *, prepend_bos: bool = True) -> dict[int, PromptPairs]:
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
    path = Path(path)
    if path.suffix not in (".jsonl", ".csv"):
        raise ValueError(f"pairs file {path} is neither .jsonl nor .csv")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read pairs file {path}: {getattr(error, 'strerror', None) or error}") from None
    records: list[tuple[int, object]] = []
    if path.suffix == ".csv":
        reader = csv.DictReader(text.splitlines())
        records = [(reader.line_num, record) for record in reader]
    else:
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                try:
                    records.append((number, json.loads(line)))
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path} line {number} is not JSON: {error.msg}") from None
    if not records:
        raise ValueError(f"pairs file {path} holds no pairs")
    rows, places = [], []
    for number, record in records:
        place = f"{path} line {number}"
        row = tuple(record.get(c) for c in _COLUMNS) if isinstance(record, dict) else (None,) * 4
        missing = [c for c, value in zip(_COLUMNS, row) if not isinstance(value, str) or not value]
        if missing:
            raise ValueError(f"{place} lacks {', '.join(missing)}; wanted are {', '.join(_COLUMNS)}")
        rows.append(row)
        places.append(place)
    return pairs_from_text(model, rows, prepend_bos=prepend_bos, places=places)


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


def ioi_pairs(model, n: int, *, seed: int = 0, template: int | str = 0, prepend_bos: bool = True) -> PromptPairs:
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
    if n < 1:
        raise ValueError(f"n is {n}, it must be positive")
    if isinstance(template, int):
        if not 0 <= template < len(TEMPLATES):
            raise ValueError(f"template {template} is unknown; known are 0 to {len(TEMPLATES) - 1}, or a text")
        template = TEMPLATES[template]
    lacking = [slot for slot in ("A", "B", "S") if f"{{{slot}}}" not in template]
    if lacking:
        raise ValueError(f"template {template!r} lacks {', '.join(f'{{{slot}}}' for slot in lacking)}")
    encode = _encoder(model)
    names, places, objects = (
        [word for word in words if len(encode(" " + word)) == 1] for words in (NAMES, PLACES, OBJECTS)
    )
    if len(names) < 2 or not places or not objects:
        raise ValueError(
            f"the tokenizer has {len(names)} names, {len(places)} places and {len(objects)} objects that are one "
            "token each; at least 2, 1 and 1 are needed"
        )
    draw, rows = random.Random(seed), []
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


# ---------------------------------------------------------------------------------------------------------
# Induction


def induction_pairs(model, n: int, *, length: int = 16, seed: int = 0) -> PromptPairs:
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
    if n < 1:
        raise ValueError(f"n is {n}, it must be positive")
    if not 4 <= length <= model.cfg.n_ctx:
        raise ValueError(f"length is {length}, it must be from 4 to the model's context of {model.cfg.n_ctx}")
    bos, special = [], set()
    if model.tokenizer is not None:
        bos, special = _bos(model), set(model.tokenizer.all_special_ids)
    period = (length - len(bos)) // 2 + 1
    allowed = [i for i in range(model.cfg.d_vocab) if i not in special]
    # The first period is repeated up to the token before the one asked for, which stands at offset `asked`.
    asked = length - len(bos) - period
    draw, clean, corrupted, answers = random.Random(seed), [], [], []
    for _ in range(n):
        *first, other = _whole_tokens(model, allowed, period + 1, draw, length)
        changed = [*first[:asked], other, *first[asked + 1 :]]
        clean.append(bos + first + first[:asked])
        corrupted.append(bos + changed + changed[:asked])
        answers.append([first[asked], other])
    return PromptPairs(torch.tensor(clean), torch.tensor(corrupted), torch.tensor(answers))


def _whole_tokens(model, allowed: list[int], n: int, draw: random.Random, length: int) -> list[int]:
    """n different tokens that are text by themselves."""
    found: list[int] = []
    for size in (4 * n, len(allowed)):  # nearly always, a few are enough to look at
        found = draw.sample(allowed, min(size, len(allowed)))
        if model.tokenizer is not None:
            found = [i for i in found if "\ufffd" not in model.tokenizer.decode([i])]
        if len(found) >= n:
            return found[:n]
    raise ValueError(f"length {length} needs {n} different tokens, the vocabulary has {len(found)}")
