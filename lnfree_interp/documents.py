"""Users' text files, and documents of files, directories and hub datasets. Imports nothing heavy."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, TextIO, cast

from .arguments import as_path, as_text

# A text, or the token ids of one.
Document = str | list[int]
KINDS = (".txt", ".jsonl", ".parquet")
TEXT_COLUMNS = ("text", "content", "document")
COLUMNS = (*TEXT_COLUMNS, "input_ids")
# Hugging Face's names of splits, as the beginning of a file's or a folder's name.
SPLIT = re.compile(r"(?:^|/)(train|validation|valid|val|dev|test)(?=[-_.\d/])")


def read_text(path: str | Path, what: str = "text file") -> str:
    """A plain or gzipped (.gz) UTF-8 file's text, without a byte order mark, every line end as "\\n".

    The one reader of users' texts. Lines are what stands between line ends: never `splitlines`, which also cuts at
    characters that belong into a text (U+2028, U+0085).

    Args:
        what: what to call the file in errors.

    Raises:
        ValueError: the file cannot be read, or is not UTF-8 text.
    """
    return "\n".join(read_lines(path, what))


def read_lines(path: str | Path, what: str = "text file") -> Iterator[str]:
    """`read_text`'s lines one at a time, without their ends: never more than a line of the file in memory.

    Raises:
        ValueError: as read_text, once the place is reached.
    """
    path = Path(path)
    try:
        opened = gzip.open if path.suffix == ".gz" else open
        # Line ends of any kind come as "\n", and lines end nowhere else.
        with cast(TextIO, opened(path, "rt", encoding="utf-8-sig")) as file:
            line = "\n"
            for line in file:
                yield line.removesuffix("\n")
            if line.endswith("\n"):
                yield ""
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"cannot read {what} {path}: {getattr(error, 'strerror', None) or error}") from None


def read_json_lines(path: str | Path, what: str) -> Iterator[tuple[int, Any]]:
    """(line number, value) of each line of a .jsonl file (plain or .gz) that is not blank.

    Raises:
        ValueError: as read_text; a line that is not JSON.
    """
    for number, line in enumerate(read_lines(path, what), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
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
    documents = list(_texts(Path(as_path(path, "path"))))
    if not any(document.strip() for document in documents):
        raise ValueError(f"text file {path} is empty")
    return documents


def _texts(path: Path) -> Iterator[str]:
    """What stands between blank lines of a text file."""
    lines: list[str] = []
    for line in chain(read_lines(path), [""]):
        if line:
            lines.append(line)
        elif lines:
            yield "\n".join(lines)
            lines = []


def documents_of(source: str | Path, *, split: str = "train") -> Iterator[Document]:
    """The documents of a file, a directory or a hub dataset, one after the other; none is held longer than it is read.

    Files: .txt (documents are what stands between blank lines), .jsonl (a document a line), each also .gz, and .parquet
    (a document a row). Lines and rows have a column text, content or document with a text, or else input_ids with the
    token ids of one, taken as they are. Empty texts are left out.

    Args:
        source: a path, or the name of a hub dataset, which is streamed. A directory stands for all such files in it and
            below, sorted by path; other files and hidden ones are passed over.
        split: which split of a hub dataset, or of a directory whose files all bear names of splits
            (train-00000.parquet, test/a.jsonl); any other directory is read whole.

    Raises:
        ValueError: (at once) no such file, one of another kind, a directory without any; (when it is reached) what
            cannot be read, with its line or row; no documents at all.

    Example:
        >>> from lnfree_interp import documents_of
        >>> from lnfree_interp.names import VALIDATION_TEXT
        >>> sum(len(document) for document in documents_of(VALIDATION_TEXT)) > 10_000
        True
    """
    as_text(split, "split")
    files = files_of(source, split=split)
    if files is None:
        return documents_of_rows(hub_rows(str(source), split), str(source))
    return _some(chain.from_iterable(map(_documents_of_file, files)), source)


def files_of(source: str | Path, *, split: str = "train") -> list[Path] | None:
    """The files that `documents_of` reads, in its order; None: it is the name of a hub dataset.

    Raises:
        ValueError: no such file, one of another kind, a directory without any.
    """
    path, wanted = Path(as_path(source, "source")), "a .txt, .jsonl (both also .gz) or .parquet file"
    if path.is_dir():
        return _of_split(path, split, wanted)
    if path.exists() or kind_of(path) or len(path.parts) > 2:
        if not path.exists():
            raise ValueError(f"cannot read {path}: no such file")
        if kind_of(path) is None:
            raise ValueError(f"{path} is not {wanted}, a directory of such or the name of a hub dataset")
        return [path]
    return None


def kind_of(path: Path) -> str | None:
    """.txt, .jsonl or .parquet, if the file is named so."""
    name = path.name.lower()
    kind = Path(name.removesuffix(".gz")).suffix
    return kind if kind in KINDS and not name.endswith(".parquet.gz") else None


def _of_split(folder: Path, split: str, wanted: str) -> list[Path]:
    """A directory's files; those of the split alone where every file says of which it is."""
    below = {path: path.relative_to(folder) for path in folder.rglob("*") if kind_of(path) and path.is_file()}
    files = sorted(path for path, inside in below.items() if not any(part.startswith(".") for part in inside.parts))
    if not files:
        raise ValueError(f"directory {folder} holds not one {wanted[2:]}")
    named = {path: SPLIT.findall(below[path].as_posix()) for path in files}
    if not all(named.values()):
        return files
    found = [path for path in files if split in named[path]]
    if not found:
        splits = sorted({name for names in named.values() for name in names})
        raise ValueError(f"directory {folder} has no split {split!r}; it has {', '.join(splits)}")
    return found


def _some(documents: Iterator[Document | None], source: str | Path) -> Iterator[Document]:
    """The documents that are not empty, of which there must be one."""
    blank = True
    for document in documents:
        if document:
            blank = blank and isinstance(document, str) and not document.strip()
            yield document
    if blank:
        raise ValueError(f"{source} is empty: it holds no document")


def _documents_of_file(path: Path) -> Iterator[Document | None]:
    kind = kind_of(path)
    if kind == ".parquet":
        return _rows(_parquet_rows(path), str(path))
    if kind == ".jsonl":
        return (_document(row, f"{path}, line {number}") for number, row in read_json_lines(path, "file"))
    return _texts(path)


def documents_of_rows(rows: Iterable[object], name: str) -> Iterator[Document]:
    """The documents of a dataset's rows, as `documents_of`."""
    return _some(_rows(rows, f"dataset {name!r}"), name)


def _rows(rows: Iterable[object], what: str) -> Iterator[Document | None]:
    return (_document(row, f"{what}, row {number}") for number, row in enumerate(rows))


def _document(row: object, where: str) -> Document | None:
    """The text of a row or, where it has none, its token ids; None: it is empty."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: not an object with a field {', '.join(COLUMNS[:-1])} or {COLUMNS[-1]}")
    column = _column(row, where)
    value = row[column]
    if value is None:
        return None
    if column == "input_ids":
        if not isinstance(value, list) or not all(type(i) is int for i in value):
            raise ValueError(f"{where}: input_ids must be a list of whole numbers, not {str(value)[:40]!r}")
        return value
    if not isinstance(value, str):
        raise ValueError(f"{where}: {column} must be a text, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a pair of surrogates, which JSON can spell
        raise ValueError(f"{where}: {column} is not Unicode text") from None
    return value


def _column(names: Iterable[str], where: str) -> str:
    """The column that documents stand in: a text if there is one, since ids may be another tokenizer's."""
    column = next((column for column in COLUMNS if column in names), None)
    if column is None:
        wanted = f"has no text column ({', '.join(TEXT_COLUMNS)}) and no input_ids"
        raise ValueError(f"{where} {wanted}; it has {', '.join(names) or 'none'}")
    return column


def _parquet_rows(path: Path) -> Iterator[dict]:
    """A parquet file's rows, of the column that documents stand in alone, a few hundred in memory at a time."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path, buffer_size=2**20) as file:
            column = _column(file.schema_arrow.names, str(path))
            for batch in file.iter_batches(batch_size=256, columns=[column]):
                yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"cannot read parquet file {path}: {first}") from None


def hub_documents(name: str, *, split: str = "train") -> Iterator[str]:
    """The documents of a hub dataset's text column, streamed. Datasets of token ids: see `documents_of`.

    Raises:
        ValueError: no such dataset or split, not reachable, or no column named text, content or document.
    """
    for document in _rows(hub_rows(name, split), f"dataset {name!r}"):
        if isinstance(document, list):
            raise ValueError(f"dataset {name!r} has no text column; it has token ids")
        if document:
            yield document


def hub_rows(name: str, split: str) -> Iterator[dict]:
    """The rows of a hub dataset, streamed.

    Raises:
        ValueError: no such dataset or split, or not reachable.
    """
    dataset = hub_dataset(name, split, streaming=True)
    try:
        yield from dataset
    except GeneratorExit:
        raise
    except Exception as error:
        raise _unreadable(name, split, error) from None


def hub_dataset(name: str, split: str, *, streaming: bool) -> Any:
    """A hub dataset, streamed or (downloaded once, then from the cache) memory-mapped.

    Raises:
        ValueError: no such dataset or split, or not reachable.
    """
    from datasets import load_dataset

    try:
        return load_dataset(name, split=split, streaming=streaming)
    except Exception as error:
        raise _unreadable(name, split, error) from None


def _unreadable(name: str, split: str, error: Exception) -> ValueError:
    first = (str(error) or type(error).__name__).splitlines()[0]
    return ValueError(f"cannot read dataset {name!r} (split {split!r}): {first}")
