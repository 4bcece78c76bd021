"""Text files, and tokens from them or from hub datasets."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, SupportsIndex

import torch
from jaxtyping import Int
from torch import Tensor

from .batching import whole

EOT = "<|endoftext|>"


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
        >>> from lnfree_interp import cli, read_documents
        >>> documents = read_documents(cli.VALIDATION_TEXT)
        >>> len(documents) > 5, all(documents)
        (True, True)
    """
    text = read_text(path)
    documents = [document for block in text.split("\n\n") if (document := block.strip("\n"))]
    if not any(document.strip() for document in documents):
        raise ValueError(f"text file {path} is empty")
    return documents


def token_stream(tokenizer, documents: Iterable[str], *, batch: int = 256) -> Iterator[list[int]]:
    """Token ids of each document (a text by itself is one), each followed by the end-of-text token."""
    eot = tokenizer.eos_token_id
    chunk: list[str] = []

    def encode() -> Iterator[list[int]]:
        ids = tokenizer(chunk, add_special_tokens=False, verbose=False)["input_ids"]
        return ([*document, eot] for document in ids)

    for document in [documents] if isinstance(documents, str) else documents:
        chunk.append(document)
        if len(chunk) == batch:
            yield from encode()
            chunk = []
    if chunk:
        yield from encode()


def token_blocks(
    tokenizer, documents: Iterable[str], block_size: SupportsIndex, *, max_blocks: SupportsIndex | None = None
) -> Int[Tensor, "batch pos"]:
    """Documents packed end to end (an end-of-text token after each) and cut into equal blocks.

    Args:
        block_size: positions per block; what is left over at the end is dropped.
        max_blocks: stop after that many blocks, reading no further.

    Returns:
        Int[Tensor, "batch pos"] token ids.

    Raises:
        ValueError: there are fewer tokens than one block; block_size or max_blocks below 1.

    Example:
        >>> from lnfree_interp import load_model, token_blocks
        >>> tokenizer = load_model("tiny").tokenizer
        >>> token_blocks(tokenizer, ["It was the best of times,", "it was the worst of times."], block_size=5).shape
        torch.Size([3, 5])
    """
    block_size = whole(block_size, "block_size", least=1)
    max_blocks = None if max_blocks is None else whole(max_blocks, "max_blocks", least=1)
    ids: list[int] = []
    for document in token_stream(tokenizer, documents):
        ids.extend(document)
        if max_blocks is not None and len(ids) >= max_blocks * block_size:
            break
    n_blocks = len(ids) // block_size
    if max_blocks is not None:
        n_blocks = min(n_blocks, max_blocks)
    if n_blocks == 0:
        raise ValueError(f"text has {len(ids)} tokens, too few for one block of {block_size}")
    return torch.tensor(ids[: n_blocks * block_size]).view(n_blocks, block_size)


def hub_documents(name: str, *, split: str = "train") -> Iterator[str]:
    """The documents of a hub dataset's text column, streamed. Datasets of token ids: see `hub_token_blocks`.

    Raises:
        ValueError: no such dataset or split, not reachable, or no column named text, content or document.
    """
    for row in _stream(name, split):
        column = next((c for c in ("text", "content", "document") if c in row), None)
        if column is None:
            raise ValueError(f"dataset {name!r} has no text column; it has {', '.join(row)}")
        if row[column]:
            yield row[column]


def _stream(name: str, split: str) -> Iterator[dict]:
    from datasets import load_dataset

    try:
        yield from load_dataset(name, split=split, streaming=True)
    except GeneratorExit:
        raise
    except Exception as error:
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"cannot read dataset {name!r} (split {split!r}): {first}") from None


class Blocks(torch.utils.data.Dataset):
    """Token blocks as the items a Trainer reads."""

    def __init__(self, blocks: Int[Tensor, "batch pos"]):
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, i: int) -> dict[str, Int[Tensor, " pos"]]:
        return {"input_ids": self.blocks[i]}


class StreamedBlocks(torch.utils.data.IterableDataset):
    """Token blocks of a hub dataset of texts, or of the same tokenizer's ids ("input_ids"), as they come.

    Raises, when iterated:
        ValueError: as hub_documents; token ids beyond the tokenizer's.
    """

    def __init__(self, name: str, tokenizer, block_size: int, *, split: str = "train"):
        self.name, self.tokenizer, self.block_size, self.split = name, tokenizer, block_size, split

    def __iter__(self) -> Iterator[dict[str, Int[Tensor, " pos"]]]:
        buffer: list[int] = []
        for ids in self._ids():
            buffer.extend(ids)
            start = 0
            while len(buffer) - start >= self.block_size:
                yield {"input_ids": torch.tensor(buffer[start : start + self.block_size])}
                start += self.block_size
            del buffer[:start]

    def _ids(self) -> Iterator[list[int]]:
        first = next(_stream(self.name, self.split), {})
        if "input_ids" not in first:
            yield from token_stream(self.tokenizer, hub_documents(self.name, split=self.split))
            return
        for row in _stream(self.name, self.split):
            if max(row["input_ids"], default=0) >= len(self.tokenizer):
                raise ValueError(f"dataset {self.name!r} holds token ids of another tokenizer")
            yield row["input_ids"]
