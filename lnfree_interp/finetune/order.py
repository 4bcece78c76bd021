"""Which sequences a step consists of: the same whatever the micro-batch and the number of processes.

Step i reads sequences i * n to (i + 1) * n of one endless order; each process takes its part of them, in micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset


@dataclass(frozen=True)
class Share:
    """What one process reads: of each step's `sequences` its part, in micro-batches; from step `begin` on."""

    sequences: int
    micro_batch: int
    rank: int = 0
    world: int = 1
    begin: int = 0

    def mine(self, position: int) -> bool:
        """Whether the sequence at a position of a step is this process's."""
        return position * self.world // self.sequences == self.rank


class ShuffledSteps:
    """Micro-batches of indices of a map-style dataset: pass after pass, each shuffled by seed and its number."""

    def __init__(self, n: int, share: Share, seed: int):
        self.n, self.share, self.seed = n, share, seed

    def __iter__(self) -> Iterator[list[int]]:
        share = self.share
        batch: list[int] = []
        pass_, order = -1, np.empty(0, dtype=np.int64)
        # Steps have no gap between them, so that a pass that is no whole number of steps goes over into the next.
        at = share.begin * share.sequences
        while True:
            if at // self.n != pass_:
                pass_ = at // self.n
                order = np.random.default_rng([self.seed, pass_]).permutation(self.n)
            if share.mine(at % share.sequences):
                batch.append(int(order[at % self.n]))
                if len(batch) == share.micro_batch:
                    yield batch
                    batch = []
            at += 1


class StreamedSteps(IterableDataset):
    """Micro-batches of an iterable dataset, in its order and over again; every process reads all and keeps its own.

    Args:
        moved: the dataset from where step `share.begin` begins; None: what comes before is read again, and passed over.
    """

    def __init__(self, dataset, share: Share, collate, moved=None):
        self.dataset, self.share, self.collate, self.moved = dataset, share, collate, moved

    def __iter__(self) -> Iterator[Any]:
        share, batch = self.share, []
        for at, item in enumerate(self._items()):
            if share.mine(at % share.sequences):
                batch.append(item)
                if len(batch) == share.micro_batch:
                    yield self.collate(batch)
                    batch = []

    def _items(self) -> Iterator[Any]:
        if self.moved is not None:
            yield from self.moved
            yield from self._endlessly()
        else:
            yield from islice(self._endlessly(), self.share.begin * self.share.sequences, None)

    def _endlessly(self) -> Iterator[Any]:
        while True:
            empty = True
            for item in self.dataset:
                empty = False
                yield item
            if empty:
                raise ValueError("dataset has no blocks")


def loader(dataset, share: Share, seed: int, collate, args, moved=None) -> DataLoader:
    """What a Trainer reads: no length, so that it asks for no end of a pass."""
    common: dict[str, Any] = {
        "num_workers": args.dataloader_num_workers,
        "pin_memory": args.dataloader_pin_memory,
        "prefetch_factor": args.dataloader_prefetch_factor,
        "persistent_workers": args.dataloader_persistent_workers,
        "generator": torch.Generator().manual_seed(seed),  # the global one is the model's
    }
    if hasattr(dataset, "__len__"):
        return DataLoader(
            dataset, batch_sampler=_Unsized(ShuffledSteps(len(dataset), share, seed)), collate_fn=collate, **common
        )
    # Two workers would both read everything; what says where it is has to be read here.
    common["num_workers"] = 0 if hasattr(dataset, "place") else min(1, common["num_workers"])
    if not common["num_workers"]:
        common |= {"prefetch_factor": None, "persistent_workers": False}
    return DataLoader(StreamedSteps(dataset, share, collate, moved), batch_size=None, **common)


class _Unsized(torch.utils.data.Sampler):
    """A sampler of batches without a length."""

    def __init__(self, batches: ShuffledSteps):
        self.batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


def place_after(dataset, sequences: int) -> dict | None:
    """Where a stream goes on after so many sequences; None: it cannot say, or has begun again."""
    if not hasattr(dataset, "place") or hasattr(dataset, "__len__"):
        return None
    try:
        return dataset.place(sequences)
    except ValueError:
        return None


def collate(examples: list[dict]) -> dict[str, Tensor]:
    tokens = torch.stack([torch.as_tensor(example["input_ids"]) for example in examples])
    labels = tokens.clone()
    labels[:, 0] = -100  # no position predicts it; unmasked, Trainer would count it and shrink the mean
    return {"input_ids": tokens, "labels": labels}
