"""Text -> pairs: rows of texts, and files of them."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..arguments import as_path, as_text, one_of, switch
from ..batching import check_next_token, encode, one_token
from ..documents import read_json_lines, read_text
from ..lens import LensModel, ModelOrName
from ..models import as_model
from .prompt_pairs import PromptPairs


def bos_of(model: LensModel) -> list[int]:
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
    bos = bos_of(model) if switch(prepend_bos, "prepend_bos") else []
    if isinstance(rows, str) or not isinstance(rows, Iterable):
        raise ValueError(f"rows must be pairs of four texts each, not {type(rows).__name__}")
    for place in one_of(places, "places", (list, tuple), "a list of texts"):
        as_text(place, "each of places")
    groups: dict[int, list[tuple[list[int], list[int], list[int]]]] = {}
    for i, row in enumerate(rows):
        try:
            if not isinstance(row, (list, tuple)) or len(row) != 4 or not all(isinstance(text, str) for text in row):
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
    found = {}
    for n in sorted(groups):
        clean, corrupted, right_wrong = (torch.tensor(column) for column in zip(*groups[n]))
        found[n] = PromptPairs(clean, corrupted, right_wrong, tokenizer=model.tokenizer)
    return found


def one_length(model: ModelOrName, clean, corrupted, answers, prepend_bos: bool) -> PromptPairs:
    """The work of `PromptPairs.from_texts`."""
    of_clean, of_corrupted = _texts(clean, "clean"), _texts(corrupted, "corrupted")
    if len(of_clean) != len(of_corrupted):
        raise ValueError(f"clean has {len(of_clean)} prompts, corrupted has {len(of_corrupted)}: pairs must align")
    of_answers: list[Any] = list(answers) if isinstance(answers, (list, tuple)) else [None]
    if len(of_answers) == 2 and all(isinstance(text, str) for text in of_answers):
        of_answers = [of_answers] * len(of_clean)
    if not all(isinstance(a, (list, tuple)) and len(a) == 2 and all(isinstance(t, str) for t in a) for a in of_answers):
        raise ValueError("answers must be (right, wrong), two texts, or a list of such, one for each prompt")
    if len(of_answers) != len(of_clean):
        raise ValueError(f"there are {len(of_clean)} pairs of prompts and {len(of_answers)} of answers")
    rows = [(a, b, *pair) for a, b, pair in zip(of_clean, of_corrupted, of_answers)]
    groups = pairs_from_text(model, rows, prepend_bos=prepend_bos)
    if len(groups) > 1:
        counts = ", ".join(f"{n} tokens ({len(group)} pairs)" for n, group in groups.items())
        raise ValueError(f"the prompts are of several lengths, {counts}: pairs_from_text gives those of each length")
    return next(iter(groups.values()))


def _texts(given: object, what: str) -> list[str]:
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{what} must be a text or a list of texts, not {type(given).__name__}")
    return list(texts)


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
    kind = Path(str(as_path(path, "path")).removesuffix(".gz")).suffix
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
