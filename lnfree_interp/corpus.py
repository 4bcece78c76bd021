"""Token blocks of whole corpora: tokenised once into a file, which is memory-mapped from then on."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import SupportsIndex

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from .arguments import as_path, as_text, listener, whole
from .batching import Progress
from .data import Blocks, begins_with, begun, content, hash_of, token_stream, tokenizer_hash, too_few
from .documents import Document, documents_of, documents_of_rows, files_of, hub_dataset, kind_of

# Part of every key: to be raised when what is written changes.
FORMAT = 1
TOKENS, ABOUT = "tokens.arrow", "about.json"
# Tokens in memory before they are written.
BATCH = 2**20


class MappedBlocks:
    """Equal blocks of the token ids in an Arrow file. Nothing is read before it is asked for, and nothing kept.

    Args:
        begin: what each block begins with; the file's tokens follow.
    """

    def __init__(self, path: Path, block_size: int, begin: Sequence[int] = ()):
        from datasets import Dataset

        self.begin, self.content = begin, content(block_size, begin)
        self.tokens = Dataset.from_file(str(path)).with_format("arrow")

    def __len__(self) -> int:
        return len(self.tokens) // self.content

    def __getitem__(self, at: int | slice) -> Int[Tensor, "*batch pos"]:
        start, stop, _ = at.indices(len(self)) if isinstance(at, slice) else (at, at + 1, 1)
        ids = self.tokens[start * self.content : stop * self.content]["input_ids"].to_numpy()
        blocks = begun(self.begin, torch.from_numpy(ids.astype(np.int64)).view(-1, self.content))
        return blocks if isinstance(at, slice) else blocks[0]


def read_corpus(
    sources: str | Path | Iterable[str | Path],
    tokenizer,
    block_size: SupportsIndex,
    *,
    cache: str | Path | None = None,
    split: str = "train",
    progress: Progress | None = None,
    prepend_bos: bool | None = None,
) -> Blocks:
    """All token blocks of files, directories and hub datasets, in their order, for any amount of text.

    Documents are packed end to end as by `token_blocks`, and tokenised once: the ids are kept on disk (two bytes each,
    or four where the vocabulary is above 65,536) and memory-mapped; blocks of any size are cut from the same file.
    What is kept is found again by the content of the files, their order and the tokenizer, not by names and times: a
    changed text is never taken for the old one, a copy elsewhere is recognised, and reading a file costs a hundredth
    of tokenising it. A hub dataset, downloaded by `datasets`, is known by its revision. Several processes may ask at
    once: one writes, the others wait.

    Args:
        sources: one or several of what `documents_of` takes, hub datasets too.
        block_size: positions per block; what is left over at the very end is dropped.
        cache: directory for the token ids; None: lnfree_interp in the one of `datasets` (HF_DATASETS_CACHE).
        split: of hub datasets, and see `documents_of`.
        progress: told of the tokens so far, of how many is not known.
        prepend_bos: as for `token_blocks`.

    Raises:
        ValueError: as documents_of; fewer tokens than one block; token ids of another tokenizer; the cache cannot be
            written.

    Warns:
        UserWarning: what was kept is damaged, and made anew.

    Example:
        >>> import tempfile
        >>> from lnfree_interp import load_model, read_corpus
        >>> from lnfree_interp.names import VALIDATION_TEXT
        >>> tokenizer = load_model("tiny").tokenizer
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     blocks = read_corpus(VALIDATION_TEXT, tokenizer, 64, cache=folder)
        ...     blocks[0]["input_ids"].shape
        torch.Size([64])
        >>> held_out, rest = blocks.set_aside(8)
        >>> len(held_out) + len(rest) == len(blocks)
        True
    """
    from datasets import config

    block_size, begin = whole(block_size, "block_size", least=1), begins_with(tokenizer, prepend_bos)
    several = [sources] if isinstance(sources, (str, Mapping)) or not isinstance(sources, Iterable) else sources
    given = [as_path(source, "sources") for source in several]
    as_text(split, "split")
    listener(progress)
    if not given:
        raise ValueError("there is no source to read a corpus from")
    parts = [_Source(source, split) for source in given]
    folder = Path(config.HF_DATASETS_CACHE) / "lnfree_interp" if cache is None else Path(as_path(cache, "cache"))
    entry = folder / hash_of(FORMAT, tokenizer_hash(tokenizer), [part.content for part in parts])
    if not entry.exists() or _damage(entry):
        documents = (document for part in parts for document in part.documents())
        _make(entry, tokenizer, documents, progress)
    blocks = MappedBlocks(entry / TOKENS, block_size, begin)
    if len(blocks) == 0:
        raise too_few(len(blocks.tokens), block_size)
    return Blocks(blocks)


class _Source:
    """What is read, and what it is known by."""

    def __init__(self, source: str | Path, split: str):
        self.source, self.split = source, split
        files = files_of(source, split=split)
        if files is None:
            self.rows = hub_dataset(str(source), split, streaming=False)
            self.content: object = self.rows._fingerprint
        else:
            self.rows = None
            self.content = [(kind_of(path), path.suffix.lower() == ".gz", _file_hash(path)) for path in files]

    def documents(self) -> Iterator[Document]:
        if self.rows is None:
            return documents_of(self.source, split=self.split)
        return documents_of_rows(self.rows, str(self.source))


def _file_hash(path: Path) -> str:
    found = hashlib.blake2b(digest_size=16)
    try:
        with path.open("rb") as file:
            while part := file.read(2**20):
                found.update(part)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from None
    return found.hexdigest()


def _damage(entry: Path) -> str | None:
    """What is wrong with what is kept; None: it is as it was written."""
    try:
        about = json.loads((entry / ABOUT).read_text(encoding="utf-8"))
        return None if _file_hash(entry / TOKENS) == about["hash"] else f"{TOKENS} is not what was written"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return " ".join(str(error).split()) or type(error).__name__


def _make(entry: Path, tokenizer, documents: Iterator[Document], progress: Progress | None) -> None:
    """Tokenise into a directory: beside it first, then renamed; by one process, while others wait for it."""
    from filelock import FileLock

    beside = entry.with_name(f".{entry.name}.writing")
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(entry.with_name(f".{entry.name}.lock")):
            if entry.exists():  # another process may have made it meanwhile
                damage = _damage(entry)
                if damage is None:
                    return
                warnings.warn(f"token cache {entry} is damaged ({damage}) and made anew", stacklevel=3)
                shutil.rmtree(entry)
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir()
            try:
                n_tokens = _write(beside / TOKENS, tokenizer, documents, progress)
                about = {"tokens": n_tokens, "hash": _file_hash(beside / TOKENS)}
                (beside / ABOUT).write_text(json.dumps(about), encoding="utf-8")
                os.replace(beside, entry)
            finally:
                shutil.rmtree(beside, ignore_errors=True)
    except OSError as error:  # reading has raised ValueErrors: this was writing
        raise ValueError(f"cannot write the token cache {entry}: {error.strerror or error}") from None


def _write(path: Path, tokenizer, documents: Iterator[Document], progress: Progress | None) -> int:
    """The ids of all documents as one column of an Arrow file; how many there are."""
    import pyarrow
    from datasets import Features, Value
    from datasets.arrow_writer import ArrowWriter

    dtype = "uint16" if len(tokenizer) <= 2**16 else "int32"
    n_tokens = 0
    with ArrowWriter(path=str(path), features=Features({"input_ids": Value(dtype)})) as writer:
        for ids in _batches(token_stream(tokenizer, documents), dtype):
            writer.write_table(pyarrow.table({"input_ids": ids}), writer_batch_size=len(ids))
            n_tokens += len(ids)
            if progress is not None:
                progress(n_tokens, None)
        writer.finalize()
    return n_tokens


def _batches(documents: Iterable[list[int]], dtype: str) -> Iterator[Int[np.ndarray, " pos"]]:
    """The documents' ids end to end, some `BATCH` at a time."""
    parts: list[np.ndarray] = []
    size = 0
    for ids in documents:
        parts.append(np.array(ids, dtype=dtype))
        size += len(ids)
        if size >= BATCH:
            yield np.concatenate(parts)
            parts, size = [], 0
    if size:
        yield np.concatenate(parts)
