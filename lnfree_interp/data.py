"""Token blocks of documents: of all there are (for those kept on disk see `corpus`), or streamed."""

from __future__ import annotations

import copy
import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from .arguments import kind, switch, whole
from .documents import Document, documents_of, files_of

EOT = "<|endoftext|>"
# Documents and characters that are tokenised at a time: a tokenizer needs some hundred bytes per token meanwhile.
BATCH_DOCUMENTS, BATCH_CHARACTERS = 1024, 2**20


DOCUMENTS = "documents must be texts, or lists of token ids"


def token_stream(tokenizer, documents: Iterable[Document]) -> Iterator[list[int]]:
    """Token ids of each document (a text by itself is one): a text's, then the end-of-text token, or those given.

    Raises:
        ValueError: ids that are not the tokenizer's; a text, and the tokenizer has no end-of-text token.
    """
    if not isinstance(documents, Iterable) or isinstance(documents, (Mapping, Tensor)):
        raise ValueError(f"{DOCUMENTS}, not {kind(documents)}")
    check_tokenizer(tokenizer)
    eot, n_vocab = tokenizer.eos_token_id, len(tokenizer)
    chunk: list[str] = []
    characters = 0

    def encode() -> Iterator[list[int]]:
        ids = tokenizer(
            chunk, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )["input_ids"]
        return ([*document, eot] for document in ids)

    for document in [documents] if isinstance(documents, str) else documents:
        if not isinstance(document, (str, list)):
            raise ValueError(f"{DOCUMENTS}, not {kind(document)}")
        ready = chunk and (isinstance(document, list) or characters + len(document) > BATCH_CHARACTERS)
        if ready or len(chunk) == BATCH_DOCUMENTS:
            yield from encode()
            chunk, characters = [], 0
        if isinstance(document, list):
            if document and not 0 <= min(document) <= max(document) < n_vocab:
                raise ValueError(f"the data hold token ids of another tokenizer: this one's are below {n_vocab}")
            yield document
        elif eot is None:
            raise ValueError("the tokenizer has no end-of-text token to put between documents")
        else:
            chunk.append(document)
            characters += len(document)
    if chunk:
        yield from encode()


def begins_with(tokenizer, prepend_bos: bool | None = None) -> list[int]:
    """What a tokenizer puts before a text, in front of each block too: the BOS token, or nothing.

    Args:
        prepend_bos: whether it does; None: as the tokenizer does by itself (Llama's, Gemma's, the embedded models', and
            a HookedTransformer's as TransformerLens sets it up; not GPT-2's).

    Raises:
        ValueError: there is no BOS token to prepend.
    """
    check_tokenizer(tokenizer)
    bos = tokenizer.bos_token_id
    if prepend_bos is None:
        return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []
    if switch(prepend_bos, "prepend_bos") and bos is None:
        raise ValueError("prepend_bos: the tokenizer has no BOS token")
    return [bos] if prepend_bos else []


def content(block_size: int, begin: Sequence[int]) -> int:
    """How many tokens of text a block holds after what it begins with; ValueError if none."""
    if block_size <= len(begin):
        raise ValueError(f"block_size is {block_size}: a block begins with BOS, and at least one token more is needed")
    return block_size - len(begin)


def begun(begin: Sequence[int], blocks: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch begun_pos"]:
    """Each block after what it begins with."""
    return torch.cat([torch.tensor(begin, dtype=blocks.dtype).expand(len(blocks), -1), blocks], dim=1)


def token_blocks(
    tokenizer,
    documents: Iterable[Document],
    block_size: SupportsIndex,
    *,
    max_blocks: SupportsIndex | None = None,
    prepend_bos: bool | None = None,
) -> Int[Tensor, "batch pos"]:
    """Documents packed end to end (an end-of-text token after each text) and cut into equal blocks.

    Args:
        documents: texts, or lists of token ids, which are taken as they are.
        block_size: positions per block; what is left over at the end is dropped.
        max_blocks: stop after that many blocks, reading no further.
        prepend_bos: whether each block begins with the BOS token; None: where the tokenizer's texts do.

    Returns:
        Int[Tensor, "batch pos"] token ids.

    Raises:
        ValueError: there are fewer tokens than one block; block_size or max_blocks below 1; see `token_stream`.

    Example:
        >>> from lnfree_interp import load_model, token_blocks
        >>> tokenizer = load_model("tiny").tokenizer
        >>> token_blocks(tokenizer, ["It was the best of times,", "it was the worst of times."], block_size=5).shape
        torch.Size([4, 5])
    """
    block_size = whole(block_size, "block_size", least=1)
    max_blocks = None if max_blocks is None else whole(max_blocks, "max_blocks", least=1)
    begin = begins_with(tokenizer, prepend_bos)
    length = content(block_size, begin)
    ids: list[int] = []
    for document in token_stream(tokenizer, documents):
        ids.extend(document)
        if max_blocks is not None and len(ids) >= max_blocks * length:
            break
    n_blocks = len(ids) // length
    if max_blocks is not None:
        n_blocks = min(n_blocks, max_blocks)
    if n_blocks == 0:
        raise too_few(len(ids), block_size)
    return begun(begin, torch.tensor(ids[: n_blocks * length]).view(n_blocks, length))


def check_tokenizer(tokenizer: Any) -> None:
    """Raise ValueError unless this is a tokenizer of Hugging Face's."""
    if not callable(tokenizer) or not hasattr(tokenizer, "eos_token_id"):
        raise ValueError(f"tokenizer must be one of Hugging Face's transformers, not {kind(tokenizer)}")


def too_few(n_tokens: int, block_size: int) -> ValueError:
    return ValueError(f"text has {n_tokens} tokens, too few for one block of {block_size}")


def hash_of(*parts: object) -> str:
    """The same for the same parts, in every process and on every machine."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def blocks_hash(parts: Iterable[Int[Tensor, "n pos"]]) -> str:
    """A hash of token blocks in their order: the same for the same tokens, however they are kept and parted."""
    found, n_blocks, block_size = hashlib.blake2b(digest_size=16), 0, 0
    for part in parts:
        found.update(part.cpu().numpy().astype("<i4").tobytes())
        n_blocks, block_size = n_blocks + part.shape[0], part.shape[1]
    return hash_of(found.hexdigest(), n_blocks, block_size)


def tokenizer_hash(tokenizer) -> str:
    """A hash of all that a tokenizer's ids depend on, wherever it was loaded from."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content: Any = json.loads(backend.to_str())
        content |= {"padding": None, "truncation": None}  # of the latest call, not of the tokenizer
    else:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_vocabulary(folder)
            content = [path.read_bytes() for path in sorted(Path(folder).iterdir())]
        content.append(sorted(tokenizer.get_added_vocab().items()))
    return hash_of(type(tokenizer).__name__, content, tokenizer.eos_token_id)


class Blocks(torch.utils.data.Dataset):
    """Token blocks as the items a Trainer reads: {"input_ids": Int[Tensor, "pos"]}.

    Args:
        blocks: Int[Tensor, "batch pos"], or (see `read_corpus`) what gives such for a slice.
        without: the sorted places of blocks that are left out.
    """

    def __init__(self, blocks: Any, without: Iterable[int] = ()):
        if isinstance(blocks, Tensor) and (blocks.ndim != 2 or blocks.is_floating_point()):
            raise ValueError(f"blocks must be token ids [batch, pos], not {blocks.dtype} {list(blocks.shape)}")
        self.blocks, self.without = blocks, np.array([*without], dtype=np.int64)
        # The block left out at `without[j]` is passed over by the items from this one on.
        self._over = self.without - np.arange(len(self.without))

    def __len__(self) -> int:
        return len(self.blocks) - len(self.without)

    def __getitem__(self, i: SupportsIndex) -> dict[str, Int[Tensor, " pos"]]:
        return {"input_ids": self.blocks[self._place(i)]}

    def _place(self, i: SupportsIndex) -> int:
        """Where the i-th block that is not left out stands."""
        at = i.__index__()
        at += len(self) if at < 0 else 0
        if not 0 <= at < len(self):
            raise IndexError(f"block {i} is out of range: there are {len(self)}")
        return at + int(np.searchsorted(self._over, at, side="right"))

    @cached_property
    def fingerprint(self) -> str:
        """The blocks' hash: the same for the same tokens, however they are kept."""
        edges = pairwise([-1, *self.without.tolist(), len(self.blocks)])
        starts = ((start, after) for before, after in edges for start in range(before + 1, after, 512))
        return blocks_hash(self.blocks[start : min(start + 512, after)] for start, after in starts)

    def set_aside(self, n: SupportsIndex) -> tuple[Int[Tensor, "n pos"], Blocks]:
        """n blocks to hold out, and the blocks without them.

        They are spread evenly, so that they are like the rest: the last blocks would be one book's, or one file's.

        Raises:
            ValueError: n is below 1, or no block would be left.
        """
        n = whole(n, "held-out blocks", least=1)
        if n >= len(self):
            raise ValueError(f"{n} blocks cannot be held out of {len(self)}: none would be left")
        places = [self._place((2 * j + 1) * len(self) // (2 * n)) for j in range(n)]
        held = torch.stack([self.blocks[place] for place in places])
        return held, Blocks(self.blocks, sorted({*self.without.tolist(), *places}))


class StreamedBlocks(torch.utils.data.IterableDataset):
    """Token blocks of a hub dataset or of large local files as they come, shuffled in windows.

    `buffer` blocks are read, handed out in an order drawn from `seed` and the window's number, and so on; so every
    place of the stream can be found again. The next window is read by a thread meanwhile: a DataLoader needs no
    workers (and must have none: each would give all blocks).

    Args:
        name: as `documents_of`'s source; held in memory is what `buffer` blocks need, twice.
        buffer: blocks of a window; 1 keeps the order.
        passes: how often the data are read; what one pass leaves over begins the next. None: without end.
        prepend_bos: as for `token_blocks`.

    Raises:
        ValueError: at once, as documents_of, or a number out of range; when iterated, as documents_of and token_stream.
    """

    def __init__(
        self,
        name: str | Path,
        tokenizer,
        block_size: SupportsIndex,
        *,
        split: str = "train",
        seed: SupportsIndex = 0,
        buffer: SupportsIndex = 1024,
        passes: SupportsIndex | None = 1,
        prepend_bos: bool | None = None,
    ):
        self.name, self.tokenizer, self.split = name, tokenizer, split
        self.block_size, self._begin = whole(block_size, "block_size", least=1), begins_with(tokenizer, prepend_bos)
        self._content = content(self.block_size, self._begin)
        self.seed, self.buffer = whole(seed, "seed", least=0), whole(buffer, "buffer", least=1)
        self.passes = None if passes is None else whole(passes, "passes", least=1)
        self._local = files_of(name, split=split) is not None
        # Where windows begin: pass, document, token in it. Grows as they are read.
        self._starts = {0: (0, 0, 0)}
        self._from = (0, 0)  # the window that iterating begins in, and how many of its blocks to skip

    def __iter__(self) -> Iterator[dict[str, Int[Tensor, " pos"]]]:
        worker = torch.utils.data.get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise ValueError(f"a stream of blocks is read by one process, not by {worker.num_workers} workers")
        window, skip = self._from
        reader = ThreadPoolExecutor(1, thread_name_prefix="blocks")
        try:
            windows = self._windows(window)
            coming = reader.submit(next, windows, None)
            while (blocks := coming.result()) is not None:
                coming = reader.submit(next, windows, None)
                order = np.random.default_rng([self.seed, window]).permutation(len(blocks))
                for i in order[skip:]:
                    yield {"input_ids": torch.from_numpy(blocks[i].astype(np.int64))}
                window, skip = window + 1, 0
        finally:
            reader.shutdown(wait=False, cancel_futures=True)

    def _windows(self, window: int) -> Iterator[Int[np.ndarray, "n pos"]]:
        """The blocks of each window from this one on, in the data's order."""
        size = self.buffer * self._content
        parts: list[np.ndarray] = []
        missing = size
        for n_pass, row, at, ids in self._documents(self._starts[window]):
            while len(ids) - at >= missing:
                parts.append(ids[at : at + missing])
                at += missing
                window += 1
                self._starts[window] = (n_pass, row, at)
                yield self._blocks(np.concatenate(parts))
                parts, missing = [], size
            parts.append(ids[at:])
            missing -= len(ids) - at
        n_blocks = (size - missing) // self._content
        if window == 0 and n_blocks == 0:
            raise too_few(size - missing, self.block_size)
        if n_blocks:
            yield self._blocks(np.concatenate(parts)[: n_blocks * self._content])

    def _blocks(self, ids: Int[np.ndarray, " token"]) -> Int[np.ndarray, "n pos"]:
        return begun(self._begin, torch.from_numpy(ids).view(-1, self._content)).numpy()

    def _documents(self, start: tuple[int, int, int]) -> Iterator[tuple[int, int, int, Int[np.ndarray, " pos"]]]:
        """(pass, document, its first token that counts, token ids) from there on."""
        n_pass, first, at = start
        while self.passes is None or n_pass < self.passes:
            # Documents before the first one are read and thrown away, but not tokenised.
            documents = islice(documents_of(self.name, split=self.split), first, None)
            for row, ids in enumerate(token_stream(self.tokenizer, documents), first):
                yield n_pass, row, at, np.array(ids, dtype=np.int32)
                at = 0
            n_pass, (_, first, at) = n_pass + 1, self._starts[0]

    def place(self, n: SupportsIndex) -> dict[str, int]:
        """Where to go on after the first n blocks, counted from the stream's beginning: for `go_on`, and for JSON.

        Known at once of what has been read; otherwise the stream is read up to there.

        Raises:
            ValueError: there are fewer blocks than n.
        """
        window, skip = divmod(whole(n, "n", least=0), self.buffer)
        if window not in self._starts:
            last = max(known for known in [*self._starts] if known < window)
            for _ in islice(self._windows(last), window - last):
                pass  # each notes where the next one begins
        if window not in self._starts:
            raise ValueError(f"the stream of {self.name} ends before {n} blocks")
        n_pass, document, token = self._starts[window]
        return {"window": window, "skip": skip, "pass": n_pass, "document": document, "token": token}

    def go_on(self, place: dict[str, int]) -> StreamedBlocks:
        """The same stream, iterated from a place on; places are counted from its beginning still.

        Raises:
            ValueError: it is no place of a stream.
        """
        try:
            window, skip, *start = (int(place[key]) for key in ("window", "skip", "pass", "document", "token"))
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{place!r} is no place of a stream of blocks") from None
        later = copy.copy(self)
        n_pass, document, token = start
        later._starts = {0: self._starts[0], window: (n_pass, document, token)}
        later._from = (window, skip)
        return later

    @cached_property
    def fingerprint(self) -> str:
        """A hash of what decides which blocks come in which order; of the data themselves, the first window."""
        first = next(self._windows(0))
        identity = None if self._local else self.name, self.split, self.seed, self.buffer, self._starts[0]
        return hash_of(*identity, tokenizer_hash(self.tokenizer), Blocks(torch.from_numpy(first)).fingerprint)

    def set_aside(self, n: SupportsIndex) -> tuple[Int[Tensor, "n pos"], StreamedBlocks]:
        """The stream's first n blocks, to hold out, and the stream after them (in every pass).

        Raises:
            ValueError: n is below 1, the data hold fewer, or iterating begins later (set aside first, then go on).
        """
        n = whole(n, "held-out blocks", least=1)
        if self._from != (0, 0):
            raise ValueError("blocks are set aside at a stream's beginning: before go_on")
        first, rest = copy.copy(self), copy.copy(self)
        first.buffer, first.passes, first._starts = n, 1, {0: self._starts[0]}
        held = next(first._windows(0))
        if len(held) < n:
            raise ValueError(f"{n} blocks cannot be held out of {self.name}: it has {len(held)}")
        rest.__dict__.pop("fingerprint", None)
        rest._starts = {0: first._starts[1]}
        return torch.from_numpy(held.astype(np.int64)), rest
