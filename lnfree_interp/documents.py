"""Text: the documents of a file or of a hub dataset. Imports nothing heavy."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path


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
    path = Path(path)
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None
    except (OSError, EOFError) as error:
        raise ValueError(f"cannot read text file {path}: {getattr(error, 'strerror', None) or error}") from None
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
