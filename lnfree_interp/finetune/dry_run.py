"""What a run would take, and whether what it needs is there. Nothing is written."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from ..data import token_blocks
from ..distributed import world_size
from ..documents import documents_of, files_of
from ..files import as_value_error
from ..models import resolve_device
from ..schedule import RemovalSchedule
from .distillation import distilled_losses, make_teacher
from .guard import precision
from .order import collate
from .removable import make_removable, n_layers
from .saving import checkpoints, finished, steps_of
from .settings import DEFAULTS
from .trainable import ready

GIB = 2**30
# Micro-batches whose time is taken after a first one; if that took longer than so many seconds, it is what counts.
TIMED, LONG = 3, 20.0
# Bytes of text that are tokenised to count them: some ten seconds.
CHEAP = 8 * 2**20


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, besides what Python and PyTorch take for themselves."""

    weights: int
    gradients: int
    moments: int  # AdamW's two
    activations: int  # of a micro-batch
    teacher: int = 0  # the untouched model's weights, where it is distilled

    @property
    def total(self) -> int:
        return sum(asdict(self).values())

    def __str__(self) -> str:
        parts = [f"{name} {_gib(size)}" for name, size in asdict(self).items() if name != "teacher" or size]
        return f"{_gib(self.total)} per device: {', '.join(parts)}"


@dataclass(frozen=True)
class Teacher:
    """The untouched model, and how much of the loss is the divergence from it."""

    model: PreTrainedModel
    weight: float | int


def estimate_memory(
    model: PreTrainedModel,
    blocks: Int[Tensor, "batch pos"],
    batch_size: int,
    *,
    dtype: str,
    checkpointing: bool,
    teacher: Teacher | None = None,
) -> Memory:
    """What training takes: float32 weights, gradients and moments; and what a micro-batch leaves for its backward.

    Activations are what autograd keeps of the forward of one sequence and of two, measured, and from there in a line;
    and the logits' gradient twice, which is when most is needed (with a teacher the logits; their gradient is kept).

    Args:
        blocks: at least one sequence, on the model's device.
        batch_size: sequences of a micro-batch.
    """
    weights = sum(p.numel() for p in model.parameters()) * 4
    one = _kept(model, blocks[:1], dtype, teacher)
    more = _kept(model, blocks[:1].repeat(2, 1), dtype, teacher) - one
    activations = one + more * (batch_size - 1)
    positions = blocks.shape[1] * batch_size
    logits = positions * model.config.vocab_size * 4
    if checkpointing:  # a layer at a time is there, and the stream before each; the loss keeps what it kept
        layers, stream = n_layers(model), positions * model.config.hidden_size * 4
        activations = (activations - logits) // layers + layers * stream + logits
    if teacher is not None:
        return Memory(weights, weights, 2 * weights, activations + logits, weights)
    return Memory(weights, weights, 2 * weights, activations + 2 * logits)


def _loss(model: PreTrainedModel, blocks: Int[Tensor, "batch pos"], dtype: str, teacher: Teacher | None) -> Tensor:
    """As a run computes it; the auxiliary loss is left out."""
    batch = collate([{"input_ids": block} for block in blocks])
    with precision(model, dtype):
        if teacher is None:
            return model(**batch).loss
        logits, tokens = model(input_ids=batch["input_ids"]).logits.float(), batch["input_ids"]
    return distilled_losses(logits, batch["labels"], tokens, teacher.model, teacher.weight, dtype=dtype).mixed


def _kept(model: PreTrainedModel, blocks: Int[Tensor, "batch pos"], dtype: str, teacher: Teacher | None = None) -> int:
    """Bytes that autograd keeps of a forward, weights apart."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = _loss(model, blocks, dtype, teacher)  # holds what is counted, so that no address is counted for two
    del loss
    return sum(kept.values())


def measure_seconds(
    model: PreTrainedModel,
    blocks: Int[Tensor, "batch pos"],
    n_batches: int,
    *,
    dtype: str,
    checkpointing: bool,
    teacher: Teacher | None = None,
) -> tuple[float, int | None]:
    """Seconds of a step of n_batches micro-batches such as `blocks`, and the most bytes in use where a device counts.

    Forward and backward of a few micro-batches and one step of AdamW, whose update changes the model.
    """
    device = model.device
    if checkpointing:  # transformers is about to rename it
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused="fused" in DEFAULTS["optim"])

    def clock() -> float:
        if device.type != "cpu":
            getattr(torch, device.type).synchronize()
        return time.perf_counter()

    def micro_batch() -> float:
        began = clock()
        _loss(model, blocks, dtype, teacher).backward()
        return clock() - began

    first = micro_batch()
    seconds = first if first > LONG else sum(micro_batch() for _ in range(TIMED)) / TIMED
    optimizer.step()  # makes its moments
    began = clock()
    optimizer.step()
    update = clock() - began
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return seconds * n_batches + update, peak


def free_memory(device: torch.device) -> int | None:
    """Bytes; None: nobody knows."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError, IndexError):
        return None


def disk_line(model: PreTrainedModel, out: Path, save_total_limit: int) -> str:
    """What a run's files take, and what there is.

    Raises:
        ValueError: nothing can be written there.
    """
    nearest = next(path for path in (out, *out.absolute().parents) if path.exists())
    with as_value_error(f"use {out}"), tempfile.TemporaryFile(dir=nearest):
        pass  # in earnest: permissions say yes to root, and of /proc
    weights = sum(p.numel() for p in model.parameters()) * 4
    # The newest, the newest good one, and the one that is being written.
    at_once, each = max(2, save_total_limit) + 2, 3 * weights
    needed, free = at_once * each + weights, shutil.disk_usage(nearest).free
    verdict = "" if needed <= free else ": IT DOES NOT FIT"
    return (
        f"{_gib(needed)}: at most {at_once} checkpoints of {_gib(each)} (weights and moments), then DIR/final of "
        f"{_gib(weights)}; {_gib(free)} free{verdict}"
    )


def holds(out: Path) -> str:
    """What is in a run's directory already, in words."""
    if not out.exists():
        return "not there yet, can be written"
    if finished(out):
        return "holds a finished run"
    found = checkpoints(out)
    if found:
        return f"holds a run of {steps_of(found[0])} steps, with {len(found)} checkpoints"
    n = sum(1 for _ in out.iterdir())
    return f"holds {n} other files, can be written" if n else "empty, can be written"


def report(
    model: PreTrainedModel,
    tokenizer,
    schedule: RemovalSchedule,
    arguments: dict[str, Any],
    blocks: Int[Tensor, "batch pos"],
    data: str,
    out: Path,
    *,
    dtype: str,
    device: str | None,
    checkpointing: bool,
    timing: bool,
) -> Iterator[tuple[str, str]]:
    """(label, what there is to say of it), as it becomes known.

    Args:
        model: made removable here, and no longer what it was.
        arguments: `settings.training_arguments`.
        blocks: a micro-batch, or a part of one.
        data: what is known of the data.

    Raises:
        ValueError: the device is not there, nothing can be written in `out`.
    """
    where, world = resolve_device(device), world_size()
    size, n_batches = arguments["per_device_train_batch_size"], arguments["gradient_accumulation_steps"]
    steps, most = schedule.steps, "at most " if schedule.pace == "adaptive" else ""
    yield "schedule", schedule.describe(n_layers(model))
    processes = f" on each of {world} processes" if world > 1 else ""
    yield (
        "tokens",
        f"{most}{steps * schedule.tokens_per_step:,} in all, {schedule.tokens_per_step:,} per step: "
        f"{n_batches} micro-batches of {size} sequences of {schedule.block_size}{processes}",
    )
    yield "parameters", f"{sum(p.numel() for p in model.parameters()):,}"
    n_tokens, n_vocab = len(tokenizer), model.config.vocab_size
    yield "tokenizer", f"fits: {n_tokens:,} tokens, vocabulary {n_vocab:,}, end of text {tokenizer.eos_token!r}"
    yield "data", data
    name = f", {torch.cuda.get_device_name(where)}" if where.type == "cuda" else ""
    yield "device", f"{where}{name}, {dtype}"
    yield "disk", disk_line(model, out, DEFAULTS["save_total_limit"])
    yield "output", f"{out}: {holds(out)}"

    ready(model)
    untouched: Any = make_teacher(model) if schedule.distillation else None
    teacher = None if untouched is None else Teacher(untouched.to(where), schedule.distillation)
    if schedule.order:
        make_removable(model, eot=tokenizer.eos_token_id, massive=schedule.massive)
    model.train().to(where)
    blocks = blocks.to(where)
    how: dict[str, Any] = {"dtype": dtype, "checkpointing": checkpointing, "teacher": teacher}
    memory = estimate_memory(model, blocks, size, **how)
    free = free_memory(where)
    there_already = memory.weights + memory.teacher if where.type == "cuda" else 0
    fits = free is None or memory.total - there_already <= free
    there = "" if free is None else f"; {_gib(free)} free{'' if fits else ': IT DOES NOT FIT'}"
    yield "memory", f"about {memory}{there}"
    if not timing or not fits:
        yield "time", "not measured"
        return
    repeats = -(-size // len(blocks))
    micro_batch = blocks.repeat(repeats, 1)[:size]
    try:
        seconds, peak = measure_seconds(model, micro_batch, n_batches, **how)
    except torch.OutOfMemoryError:
        yield "time", "not measured: a micro-batch DOES NOT FIT into the device's memory"
        return
    if peak is not None:
        yield "memory", f"{_gib(peak)} per device, measured"
    yield (
        "time",
        f"{most}{_duration(seconds * steps)}, {seconds:.3g} s per step: forward and backward of micro-batches and an "
        "update, measured; reading data, losses on held-out blocks and saving not counted",
    )


# -- data -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """What is known of files without reading them all.

    Attributes:
        blocks: the first ones.
        n_blocks: in all; None: it would take long to say.
        about: an estimate of it, where there is one.
    """

    names: str
    n_files: int
    n_bytes: int
    blocks: Int[Tensor, "batch pos"]
    n_blocks: int | None
    about: int | None

    def __str__(self) -> str:
        files = f"{self.names}: {self.n_files} file{'s' * (self.n_files > 1)} of {_gib(self.n_bytes)}"
        number = "" if self.about is None else f", about {self.about:,} (all at the first ones' bytes per token)"
        counted = number if self.n_blocks is None else f", {self.n_blocks:,}"
        return f"{files}{counted or ', not counted'} blocks of {self.blocks.shape[1]} tokens"


def look_at(sources: Sequence[str], tokenizer, block_size: int, n: int) -> Text:
    """The first n blocks of files and directories; how many there are, counted where that takes seconds.

    Raises:
        ValueError: as `documents_of` and `token_blocks`.
    """
    files = [path for source in sources for path in files_of(source) or ()]
    n_bytes = sum(path.stat().st_size for path in files)
    documents = chain.from_iterable(documents_of(path) for path in files)
    names = ", ".join(Path(source).resolve().name for source in sources)
    if n_bytes <= CHEAP and not any(path.suffix == ".parquet" for path in files):
        blocks = token_blocks(tokenizer, documents, block_size)
        return Text(names, len(files), n_bytes, blocks[:n], len(blocks), None)
    blocks = token_blocks(tokenizer, documents, block_size, max_blocks=n)
    about = None
    if all(path.suffix == ".txt" for path in files):
        read = len(tokenizer.decode(blocks.flatten().tolist()).encode())
        about = round(n_bytes / read * len(blocks))
    return Text(names, len(files), n_bytes, blocks, None, about)


def first_blocks(stream, n: int) -> Int[Tensor, "batch pos"]:
    """The first n blocks of a stream."""
    return torch.stack([item["input_ids"] for item in islice(stream, n)])


def _gib(n: int) -> str:
    return f"{n / GIB:.2f} GiB" if n >= GIB / 10 else f"{n / 2**20:.1f} MiB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
