"""What watches a removal run: applies the schedule, suspects a loss, stops at a signal, prints a line per log."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformers import TrainerCallback

from ..schedule import RemovalSchedule
from .guard import Suspicion, resumed_progress
from .progress import Guard, Progress, advance, length, observe, state_of
from .removable import collect_std, final_norm, freeze, update_averages
from .saving import state_in, steps_of
from .settings import losses_in


@dataclass
class Record:
    """What changes while a run lasts, besides weights and optimiser: all of it is in a checkpoint's `removal.json`.

    Attributes:
        losses: the training cross-entropy of each step (nats), as far as it was logged.
        baseline: the untouched model's loss on the held-out blocks; without any, the first step's loss.
        held_out: those blocks.
        control: the control's losses, step by step.
        seen: how many of the losses the progress knows of.
        asked, stopping: whether this process was asked to stop; whether the run does.
    """

    schedule: RemovalSchedule
    n_layer: int
    progress: Progress = field(default_factory=Progress)
    losses: list[float] = field(default_factory=list)
    baseline: float | None = None
    held_out: Int[Tensor, "batch pos"] | None = None
    control: Sequence[float] = ()
    seen: int = 0
    asked: bool = False
    stopping: bool = False

    def length(self) -> int:
        return length(self.schedule, self.progress, self.n_layer)

    def restore(self, checkpoint: Path | None, out: Path) -> None:
        """As it was when a checkpoint was saved; None: as at the start."""
        self.progress, self.losses, self.seen = Progress(), [], 0
        if checkpoint is None:
            return
        stored = state_in(checkpoint)
        self.losses = losses_in(checkpoint)
        if stored:
            self.progress, self.baseline = Progress.from_json(stored["progress"]), stored["baseline"]
        else:  # of a version whose removals followed from the step alone
            self.progress = advance(self.schedule, Progress(), steps_of(checkpoint), self.n_layer)
            self.baseline = self.losses[0] if self.losses else None
        self.progress, self.seen = resumed_progress(out, self.progress), len(self.losses)

    def to_json(self) -> dict[str, Any]:
        return {"version": 1, "progress": self.progress.to_json(), "baseline": self.baseline, "ce": self.losses}


class RemovalCallback(TrainerCallback):
    """Applies a schedule: each event at its step, or, at the run's own pace, when the loss is back."""

    def __init__(self, record: Record):
        self.record = record

    def apply(self, model: Any, step: int) -> None:
        """Freeze what is to be frozen in step `step`."""
        record = self.record
        if not record.schedule.order:
            return
        state = state_of(record.schedule, record.progress, step, record.n_layer)
        try:
            freeze(model, state.frozen, position0=state.position0, eot=state.eot, massive=state.massive)
        except ValueError as error:  # an average that is not finite: what it averages was not
            raise Suspicion(f"{error} (step {step})") from None
        final_norm(model).keep_std = state.auxiliary

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        state.max_steps = self.record.length()
        self.apply(model, state.global_step)

    def on_substep_end(self, args, state, control, model=None, **kwargs):
        collect_std(model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        record, step = self.record, state.global_step
        state.epoch = step / state.max_steps  # not from where the run was resumed
        collect_std(model)
        update_averages(model, record.schedule.momentum)
        if record.schedule.pace == "fixed":
            record.progress = advance(record.schedule, record.progress, step, record.n_layer)
        self.apply(model, step)
        if record.schedule.order and step == record.schedule.start - 1 and args.save_strategy != "no":
            control.should_save = True  # there is something to go back to before anything is removed

    def on_log(self, args, state, control, logs=None, model=None, **kwargs):
        """At the run's own pace: whether the loss is back is looked at where it is read anyway."""
        record, step = self.record, state.global_step
        if record.schedule.pace != "adaptive" or "ce" not in logs:
            return
        usual = sum(record.control[-10:]) / len(record.control[-10:])  # of steps that the control did not take
        for i in range(record.seen, len(record.losses)):
            beside = record.control[i] if i < len(record.control) else usual
            record.progress = observe(record.schedule, record.progress, record.losses[i] - beside)
        record.seen = len(record.losses)
        before, record.progress = record.progress, advance(record.schedule, record.progress, step, record.n_layer)
        if record.progress != before:
            self.apply(model, step)
            state.max_steps = record.length()


class LossGuard(TrainerCallback):
    """Suspects a loss that is not finite, or stays far above the untouched model's; no such model is saved."""

    def __init__(self, guard: Guard, record: Record):
        self.guard, self.record = guard, record
        self.suspect_since: int | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.suspect_since = None

    def on_step_end(self, args, state, control, **kwargs):
        control.should_log |= control.should_save  # nothing is saved unseen

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "ce" not in logs:
            return
        step, ce = state.global_step, logs["ce"]
        for name in ("loss", "ce", "grad_norm"):
            if not math.isfinite(logs.get(name, 0.0)):
                raise Suspicion(f"{name} is {logs[name]} at step {step}")
        if self.record.baseline is None:
            self.record.baseline = self.record.losses[0]
        if self.guard.is_good(ce, self.record.baseline):
            self.suspect_since = None
            return
        control.should_save = False
        if self.suspect_since is None:
            self.suspect_since = step
        if step >= state.max_steps or step - self.suspect_since >= self.guard.patience:
            raise Suspicion(f"loss is {ce:.2f} at step {step}, the untouched model's was {self.record.baseline:.2f}")


class StopWhenAsked(TrainerCallback):
    """Saves and stops at the next step after SIGTERM; with several processes at the next log, where they agree."""

    def __init__(self, record: Record):
        self.record = record

    def _stop(self, control) -> None:
        if self.record.stopping:
            control.should_save = control.should_training_stop = True

    def on_step_end(self, args, state, control, **kwargs):
        if args.world_size == 1:
            self.record.stopping = self.record.asked
            self._stop(control)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if args.world_size > 1:
            self._stop(control)


@contextmanager
def on_sigterm(act: Callable[[], object]) -> Iterator[None]:
    """What SIGTERM does meanwhile. Signals are the main thread's: in another nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: act())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def asked_by_sigterm(record: Record) -> AbstractContextManager[None]:
    """SIGTERM asks a run to stop; a second one is as Ctrl-C."""

    def ask() -> None:
        if record.asked:
            raise KeyboardInterrupt
        record.asked = True

    return on_sigterm(ask)


class StatusLine(TrainerCallback):
    """Prints a line per log: losses, what is frozen, the time left."""

    def __init__(self, schedule: RemovalSchedule):
        self.schedule = schedule
        self.record: Record | None = None  # of the run that it watches

    def on_train_begin(self, args, state, control, **kwargs):
        self.began, self.first = time.monotonic(), state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "ce" not in logs or not state.is_world_process_zero:
            return
        step = state.global_step
        left = (time.monotonic() - self.began) / max(1, step - self.first) * (state.max_steps - step)
        words = [f"step {step}/{state.max_steps}", f"loss {logs['loss']:.4f}"]
        if "aux" in logs:
            words += [f"ce {logs['ce']:.4f}", f"aux {logs['aux']:.4f}"]
        if self.schedule.order and self.record is not None:
            n_layer, progress = self.record.n_layer, self.record.progress
            words.append(state_of(self.schedule, progress, step, n_layer).summary(n_layer))
            if progress.excess is not None:
                words.append(f"over control {progress.excess:+.4f}")
        words.append(f"{int(left) // 3600}:{int(left) // 60 % 60:02}:{int(left) % 60:02} left")
        print("  ".join(words), flush=True)
