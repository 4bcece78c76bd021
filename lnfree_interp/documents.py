"""Users' text files, and the documents of a hub dataset. Imports nothing heavy."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_text(path: str | Path, what: str = "text file") -> str:
    """A plain or gzipped (.gz) UTF-8 file's text, without a byte order mark, every line end as "\\n".

    The one reader of users' texts. Lines are what stands between line ends: never `splitlines`, which also cuts at
    characters that belong into a text (U+2028, U+0085).

    Args:
        what: what to call the file in errors.

    Raises:
        ValueError: the file cannot be read, or is not UTF-8 text.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"cannot read {what} {path}: {getattr(error, 'strerror', None) or error}") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json_lines(path: str | Path, what: str) -> Iterator[tuple[int, Any]]:
    """(line number, value) of each line of a .jsonl file (plain or .gz) that is not blank.

    Raises:
        ValueError: as read_text; a line that is not JSON.
    """
    for number, line in enumerate(read_text(path, what).split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: no JSON ({getattr(error, 'msg', error)})") from None
        yield number, value


def read_documents(path: str | Path) -> list[str]:
    """The documents of a plain or gzipped UTF-8 text file: what stands between blank lines.

    Paragraphs are lines; a blank line ends a document (a chapter, say).

    Raises:
        ValueError: the file is missing, is not UTF-8 text, or has no words in it.

    Example:
        >>> from lnfree_interp import read_documents
        >>> from lnfree_interp.names import VALIDATION_TEXT
        >>> documents = read_documents(VALIDATION_TEXT)
        >>> len(documents) > 5, all(documents)
        (True, True)
    """
    text = read_text(path)
    documents = [document for block in text.split("\n\n") if (document := block.strip("\n"))]
    if not any(document.strip() for document in documents):
        raise ValueError(f"text file {path} is empty")
    return documents


def hub_documents(name: str, *, split: str = "train") -> Iterator[str]:
    """The documents of a hub dataset's text column, streamed. Datasets of token ids: see `data.StreamedBlocks`.

    Raises:
        ValueError: no such dataset or split, not reachable, or no column named text, content or document.
    """
    for row in hub_rows(name, split):
        column = next((c for c in ("text", "content", "document") if c in row), None)
        if column is None:
            raise ValueError(f"dataset {name!r} has no text column; it has {', '.join(row)}")
        if row[column]:
            yield row[column]


def hub_rows(name: str, split: str) -> Iterator[dict]:
    """The rows of a hub dataset, streamed.

    Raises:
        ValueError: no such dataset or split, or not reachable.
    """
    from datasets import load_dataset

    try:
        yield from load_dataset(name, split=split, streaming=True)
    except GeneratorExit:
        raise
    except Exception as error:
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"cannot read dataset {name!r} (split {split!r}): {first}") from None
