"""What watches a removal run: applies the schedule, stops an exploding loss, prints a line per log."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..schedule import RemovalSchedule
from .removable import collect_std, final_norm, freeze, n_layers, update_averages


class Diverged(RuntimeError):
    """Training stopped because the loss is not finite or exploded; says where the last good checkpoint is."""


class RemovalCallback(TrainerCallback):
    """Applies a schedule: which sites are frozen follows from the step alone, so a resumed run is exact."""

    def __init__(self, schedule: RemovalSchedule):
        self.schedule = schedule

    def apply(self, model: Any, step: int, out: str | Path) -> None:
        if not self.schedule.order:
            return
        state = self.schedule.state(step, n_layers(model))
        try:
            freeze(model, state.frozen, position0=state.position0, eot=state.eot)
        except ValueError as error:  # an average that is not finite: what it averages was not
            raise Diverged(f"{error} (step {step}): stopped; {_kept(out)}") from None
        final_norm(model).keep_std = state.auxiliary

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.apply(model, state.global_step, args.output_dir)

    def on_substep_end(self, args, state, control, model=None, **kwargs):
        collect_std(model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        collect_std(model)
        update_averages(model, self.schedule.momentum)
        self.apply(model, state.global_step, args.output_dir)


class LossGuard(TrainerCallback):
    """Stops a run whose loss is not finite, or stays far above its best; no such model becomes a checkpoint.

    A removal may cost 1 to 2 nats for some steps and be made up for; from 5 hardly a run came back (P1).

    Args:
        margin: nats above the best logged cross-entropy from which a loss is suspect.
        patience: steps that it may stay there.
    """

    def __init__(self, margin: float | int = 3.0, patience: int = 20):
        self.margin, self.patience = margin, patience
        self.best, self.suspect_since = math.inf, None

    def on_train_begin(self, args, state, control, **kwargs):
        self.best = min((log["ce"] for log in state.log_history if "ce" in log), default=math.inf)

    def on_step_end(self, args, state, control, **kwargs):
        control.should_log |= control.should_save  # nothing is saved unseen

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "ce" not in logs:
            return
        end = _kept(args.output_dir)
        for name in ("loss", "ce", "grad_norm"):
            if not math.isfinite(logs.get(name, 0.0)):
                raise Diverged(f"{name} is {logs[name]} at step {state.global_step}: stopped; {end}")
        self.best = min(self.best, logs["ce"])
        if logs["ce"] <= self.best + self.margin:
            self.suspect_since = None
            return
        control.should_save = False
        if self.suspect_since is None:
            self.suspect_since = state.global_step
        last = state.global_step >= state.max_steps
        if last or state.global_step - self.suspect_since >= self.patience:
            raise Diverged(f"loss is {logs['ce']:.2f} at step {state.global_step}, was {self.best:.2f}: stopped; {end}")


class StatusLine(TrainerCallback):
    """Prints a line per log: losses, what is frozen, the time left."""

    def __init__(self, schedule: RemovalSchedule):
        self.schedule = schedule

    def on_train_begin(self, args, state, control, **kwargs):
        self.began, self.first = time.monotonic(), state.global_step

    def on_log(self, args, state, control, logs=None, model=None, **kwargs):
        if "ce" not in logs or not state.is_world_process_zero:
            return
        step, n_layer = state.global_step, n_layers(model)
        left = (time.monotonic() - self.began) / (step - self.first) * (state.max_steps - step)
        words = [f"step {step}/{state.max_steps}", f"loss {logs['loss']:.4f}"]
        if "aux" in logs:
            words += [f"ce {logs['ce']:.4f}", f"aux {logs['aux']:.4f}"]
        if self.schedule.order:
            words.append(self.schedule.state(step, n_layer).summary(n_layer))
        words.append(f"{int(left) // 3600}:{int(left) // 60 % 60:02}:{int(left) % 60:02} left")
        print("  ".join(words), flush=True)


def last_checkpoint(out: str | Path) -> Path | None:
    """The newest complete checkpoint of a run."""
    paths = [path.parent for path in Path(out).glob("checkpoint-*/trainer_state.json") if steps_of(path.parent)]
    return max(paths, key=steps_of, default=None)


def steps_of(checkpoint: Path) -> int:
    """How many steps a checkpoint has behind it; 0 if it is not whole: Trainer writes trainer_state.json last."""
    try:
        return json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
    except (ValueError, KeyError, OSError):
        return 0


def _kept(out: str | Path) -> str:
    kept = last_checkpoint(out)
    return f"the last good checkpoint is {kept}" if kept else "there is no checkpoint yet"
