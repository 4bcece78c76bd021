"""A loss that does not come back: the run goes back to its last good checkpoint and waits longer, three times."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from ..schedule import RemovalSchedule
from .progress import Guard, Progress, removed, rolled_back
from .saving import ROLLBACKS, fault, good_checkpoints, last_checkpoint, read_json, state_in, superseded, write_json


class Diverged(RuntimeError):
    """The loss did not come back however long the removal waited. Says what was removed, and what there still is."""


class Suspicion(Exception):
    """The run as it is should not go on; the reason in words."""


def precision(model: Any, dtype: str) -> AbstractContextManager:
    """What a model of float32 weights computes within: autocast for "bfloat16", nothing for "float32"."""
    return torch.autocast(model.device.type, torch.bfloat16) if dtype == "bfloat16" else nullcontext()


@torch.no_grad()
def held_out_loss(model: Any, blocks: Int[Tensor, "batch pos"], *, batch_size: int, dtype: str = "float32") -> float:
    """Mean cross-entropy per token (nats) of held-out blocks; the mode of the model is left as it was."""
    training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64)
    try:
        for batch in blocks.split(batch_size):
            tokens = batch.to(model.device)
            with precision(model, dtype):
                logits = model(input_ids=tokens).logits[:, :-1].float()
            loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
            total += loss.cpu().double()
    finally:
        model.train(training)
    return total.item() / blocks[:, 1:].numel()


def resumed_progress(out: Path, progress: Progress) -> Progress:
    """A checkpoint's progress, with what rollbacks since then ask for."""
    records = read_json(out / ROLLBACKS) or []
    if progress.rollbacks >= len(records):
        return progress
    return replace(progress, hold=max(progress.hold, records[-1]["hold"]), rollbacks=len(records), excess=None)


def roll_back(
    out: Path,
    guard: Guard,
    schedule: RemovalSchedule,
    n_layer: int,
    progress: Progress,
    step: int,
    losses: Sequence[float],
    why: str,
) -> tuple[Path, str]:
    """Choose the checkpoint to go back to and write it down, for whoever resumes; the line that says so.

    The newest good one that was not gone back to before, else the newest good one.

    Raises:
        Diverged: there is none, or there were as many rollbacks as the guard allows.
    """
    records = read_json(out / ROLLBACKS) or []
    tried = {record["to"] for record in records}
    found = [path for path in good_checkpoints(out) if not superseded(out, path) and fault(path) is None]
    steps = {path: state_in(path)["step"] for path in found}
    target = next((path for path in found if steps[path] not in tried), found[0] if found else None)
    if target is None or len(records) >= guard.rollbacks:
        raise Diverged(report(out, why, progress, records, losses))
    good = Progress.from_json(state_in(target)["progress"])
    back = rolled_back(schedule, good, progress, guard.wait * 2 ** len(records), n_layer)
    record = {"why": why, "step": step, "to": steps[target], "hold": back.hold, "events": progress.happened}
    write_json(out / ROLLBACKS, [*records, record])
    waits = f"the next removal waits until step {back.hold}" if back.hold > good.hold else "nothing is left to wait"
    number = f"rollback {len(records) + 1} of {guard.rollbacks}"
    return target, f"{why}: back to {target.name} ({number}), {waits}"


def report(out: Path, why: str, progress: Progress, records: Sequence[dict], losses: Sequence[float]) -> str:
    """What there is to say of a run that is given up: first line why and what is left, then what happened."""
    kept = next(iter(good_checkpoints(out)), None) or last_checkpoint(out)
    end = f"the last good checkpoint is {kept}" if kept else "there is no checkpoint yet"
    after = f" after {len(records)} rollbacks" if records else ""
    lines = [f"{why}: stopped{after}; {end}"]
    lines += [f"  {r['why']}: back to step {r['to']}, next removal not before step {r['hold']}" for r in records]
    lines.append(f"  removed: {removed(progress)}")
    lines.append(f"  last losses: {', '.join(f'{loss:.3f}' for loss in losses[-10:]) or 'none'}")
    return "\n".join(lines)
