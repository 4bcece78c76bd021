"""A loss that does not come back: the run goes back to its last good checkpoint and waits longer, three times."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from ..schedule import RemovalSchedule
from .progress import Progress, removed, rolled_back
from .saving import ROLLBACKS, fault, good_checkpoints, last_checkpoint, read_json, state_in, superseded, write_json


class Diverged(RuntimeError):
    """The loss did not come back however long the removal waited. Says what was removed, and what there still is."""


class Suspicion(Exception):
    """The run as it is should not go on; the reason in words."""


@dataclass(frozen=True)
class Guard:
    """When a run goes back to its last good checkpoint, and when it is given up.

    A removal may cost 1 to 2 nats for some steps and be made up for; from a loss of 5, of GPT-2's 3, hardly a run
    came back (P1).

    Attributes:
        multiple: of the untouched model's loss, above which a loss is suspect and a checkpoint not good.
        patience: steps that a loss may be suspect.
        wait: steps that the next removal comes later after the first rollback; twice as many after each further one.
        rollbacks: after so many the run stops.
    """

    multiple: float | int = 1.6
    patience: int = 20
    wait: int = 20
    rollbacks: int = 3

    def __post_init__(self):
        if not self.multiple > 1:
            raise ValueError(f"multiple is {self.multiple}, not above 1")
        for name, least in (("patience", 0), ("wait", 1), ("rollbacks", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, not at least {least}")

    def is_good(self, loss: float, baseline: float) -> bool:
        """Whether a loss (nats) is finite and not suspect."""
        return math.isfinite(loss) and loss <= self.multiple * baseline


@torch.no_grad()
def held_out_loss(model: Callable[..., Any], blocks: Int[Tensor, "batch pos"], *, batch_size: int, device) -> float:
    """Mean cross-entropy per token (nats) of held-out blocks; the mode of the model is left as it was."""
    module: Any = model
    training = module.training
    module.eval()
    total = torch.zeros((), dtype=torch.float64)
    try:
        for batch in blocks.split(batch_size):
            tokens = batch.to(device)
            logits = model(input_ids=tokens).logits[:, :-1].float()
            loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
            total += loss.cpu().double()
    finally:
        module.train(training)
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
