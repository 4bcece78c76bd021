"""Token blocks of documents, whole or streamed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import SupportsIndex

import torch
from jaxtyping import Int
from torch import Tensor

from .batching import whole
from .documents import hub_documents, hub_rows

EOT = "<|endoftext|>"


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
        first = next(hub_rows(self.name, self.split), {})
        if "input_ids" not in first:
            yield from token_stream(self.tokenizer, hub_documents(self.name, split=self.split))
            return
        for row in hub_rows(self.name, self.split):
            if max(row["input_ids"], default=0) >= len(self.tokenizer):
                raise ValueError(f"dataset {self.name!r} holds token ids of another tokenizer")
            yield row["input_ids"]
