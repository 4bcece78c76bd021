"""Several processes on one set of sequences, as torchrun starts them: who does what, and what all of them know.

Each process works on its own shard; what it found goes to the first (rank 0), which alone prints, draws and writes.
Only small results in the CPU's memory are moved, so the group is gloo's, whatever the models run on: two processes may
share a device. Nothing heavy is imported before a group is started. Without torchrun all of this is one process.

Processes meet at the same places in the same order. At each they first tell whether something went wrong; one in which
it did goes to the next meeting with that, and all of them end there: none is left waiting.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

T = TypeVar("T")

# How long a process waits for the others; torchrun ends all if one of them dies.
PATIENCE = timedelta(days=1)


class Ended(Exception):
    """What was wrong in another process ends this one, which has nothing to say about it."""


def rank() -> int:
    """Which process this is; 0 without torchrun."""
    return int(os.environ.get("RANK", 0)) if world_size() > 1 else 0


def world_size() -> int:
    """How many processes there are; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    """Which process of this machine this is."""
    return int(os.environ.get("LOCAL_RANK", rank())) if world_size() > 1 else 0


def shard(n: int) -> slice:
    """This process' part of n things: consecutive, of nearly equal sizes; empty for some if there are fewer of them."""
    return slice(n * rank() // world_size(), n * (rank() + 1) // world_size())


def own_device(device: str | None) -> str | None:
    """The device asked for, but of several GPUs the one that is this process' own."""
    if world_size() > 1:
        import torch

        if device in (None, "cuda") and torch.cuda.is_available():
            return f"cuda:{local_rank()}"
    return device


@contextmanager
def processes() -> Iterator[None]:
    """A group of the processes, within which they may meet. A ValueError in one of them ends all.

    Raises:
        ValueError: that which was raised inside, of several processes in one only.
        Ended: in the others.
    """
    if world_size() == 1:
        yield
        return
    from torch import distributed

    distributed.init_process_group("gloo", timeout=PATIENCE)
    try:
        try:
            yield
        except ValueError as error:
            try:
                _agree(error)
            except RuntimeError:  # the others are gone
                raise error from None
        _agree(None)
    finally:
        distributed.destroy_process_group()


def _agree(wrong: ValueError | None) -> None:
    """Tell the others what is wrong here, and hear what is there. Raises in all processes if anything is."""
    from torch import distributed

    told: list[bool] = [False] * world_size()
    distributed.all_gather_object(told, wrong is not None)
    if wrong is not None and told.index(True) == rank():
        raise wrong
    if any(told):
        raise Ended


def gather(value: T | None) -> list[T]:
    """In the first process the values of all that have one (not None), in their order; in the others nothing.

    Raises:
        Ended: something was wrong in another process.
    """
    values: list[T | None] = [value]
    if world_size() > 1:
        from torch import distributed

        _agree(None)
        values = [None] * world_size()
        distributed.gather_object(value, values if rank() == 0 else None)
    return [found for found in values if found is not None]


def exchange(value: T) -> list[T]:
    """The values of all processes, in each of them; a place to wait for each other too.

    Raises:
        Ended: something was wrong in another process.
    """
    if world_size() == 1:
        return [value]
    from torch import distributed

    _agree(None)
    values = [value] * world_size()
    distributed.all_gather_object(values, value)
    return values


def leave(status: int) -> int:
    """The exit status; of several processes each ends here with it.

    Threads of the group may still be letting go of Python's objects while the interpreter is taken down, which aborts
    a process that has done all of its work.
    """
    if world_size() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status
