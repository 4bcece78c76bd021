"""Tokens: batches from text files or hub datasets."""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

EOT = "<|endoftext|>"


def read_documents(path: str | Path) -> list[str]:
    """The documents of a plain or gzipped UTF-8 text file: what stands between blank lines.

    Paragraphs are lines; a blank line ends a document (a chapter, say).

    Raises:
        ValueError: the file is missing, is not UTF-8 text, or has no words in it.
    """
    path = Path(path)
    try:
        raw = gzip.open(path).read() if path.suffix == ".gz" else path.read_bytes()
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None
    except OSError as error:
        raise ValueError(f"cannot read text file {path}: {error.strerror or error}") from None
    documents = [document for block in text.split("\n\n") if (document := block.strip("\n"))]
    if not any(document.strip() for document in documents):
        raise ValueError(f"text file {path} is empty")
    return documents


def token_stream(tokenizer, documents: Iterable[str], *, batch: int = 256) -> Iterator[list[int]]:
    """Token ids of each document, each followed by the end-of-text token."""
    eot = tokenizer.eos_token_id
    chunk: list[str] = []

    def encode() -> Iterator[list[int]]:
        ids = tokenizer(chunk, add_special_tokens=False, verbose=False)["input_ids"]
        return (document + [eot] for document in ids)

    for document in documents:
        chunk.append(document)
        if len(chunk) == batch:
            yield from encode()
            chunk = []
    if chunk:
        yield from encode()


def token_blocks(
    tokenizer, documents: Iterable[str], block_size: int, *, max_blocks: int | None = None
) -> Int[Tensor, "batch pos"]:
    """Documents packed end to end (an end-of-text token after each) and cut into equal blocks.

    Args:
        block_size: positions per block; what is left over at the end is dropped.
        max_blocks: stop after that many blocks, reading no further.

    Returns:
        Int[Tensor, "batch pos"] token ids.

    Raises:
        ValueError: there are fewer tokens than one block.
    """
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
