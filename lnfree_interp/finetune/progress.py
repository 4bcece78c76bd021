"""Where a removal stands: which events have happened, and when the next one may. Pure functions of frozen values.

With nothing rolled back and pace "fixed" this is the schedule to the step; else it is what a checkpoint must know.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..arguments import number, whole
from ..schedule import TREATMENTS, Event, RemovalSchedule, RemovalState


@dataclass(frozen=True)
class Progress:
    """What has become of a schedule.

    Attributes:
        happened: the events so far, at the steps at which they happened.
        hold: no event happens before this step: what a rollback asks for.
        rollbacks: how many there were.
        excess: the smoothed difference to the control's loss (nats) since the last event; None: not measured yet.
    """

    happened: tuple[Event, ...] = ()
    hold: int = 0
    rollbacks: int = 0
    excess: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Progress:
        return cls(**stored | {"happened": tuple(Event(*event) for event in stored["happened"])})


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
        if not number(self.multiple, "multiple") > 1:
            raise ValueError(f"multiple is {self.multiple}, not above 1")
        for name, least in (("patience", 0), ("wait", 1), ("rollbacks", 0)):
            if whole(getattr(self, name), name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, not at least {least}")

    def is_good(self, loss: float, baseline: float) -> bool:
        """Whether a loss (nats) is finite and not suspect."""
        return math.isfinite(loss) and loss <= self.multiple * baseline


def least_step(schedule: RemovalSchedule, progress: Progress, n_layer: int) -> int | None:
    """Before which step the next event does not happen: its gap after the one before. None: all have happened."""
    planned, i = schedule.events(n_layer), len(progress.happened)
    if i == len(planned):
        return None
    if i == 0:
        return max(planned[0].step, progress.hold)
    gap = planned[i].step - planned[i - 1].step
    if schedule.pace == "adaptive":
        gap = max(1, gap)  # whether a loss is back has to be seen first
    return max(progress.happened[-1].step + gap, progress.hold)


def latest_step(schedule: RemovalSchedule, progress: Progress, n_layer: int) -> int | None:
    """At which step the next event happens in any case; None: all have happened.

    An adaptive schedule shares the steps it has left evenly among the events it has left, so that what one did not
    need the later ones may wait, and the last comes `settle` steps before the end.
    """
    least = least_step(schedule, progress, n_layer)
    if least is None or schedule.pace == "fixed" or not progress.happened:
        return least
    last, left = progress.happened[-1].step, len(schedule.events(n_layer)) - len(progress.happened)
    wait = max(0, schedule.steps - schedule.settle - last) // left
    return max(least, last + (wait if schedule.patience is None else min(wait, schedule.patience)))


def advance(schedule: RemovalSchedule, progress: Progress, step: int, n_layer: int) -> Progress:
    """The events that happen at `step`, before its forward, added."""
    planned = schedule.events(n_layer)
    while True:
        least = least_step(schedule, progress, n_layer)
        latest = latest_step(schedule, progress, n_layer)
        if least is None or latest is None or step < least:
            return progress
        back = progress.excess is not None and progress.excess <= schedule.margin
        if step < latest and not back:
            return progress
        # Named by the step it was due at where steps were not looked at one by one, so that gaps stay the plan's.
        event = planned[len(progress.happened)]
        at = least if schedule.pace == "fixed" else step
        progress = replace(progress, happened=(*progress.happened, event._replace(step=at)), excess=None)


def observe(schedule: RemovalSchedule, progress: Progress, difference: float) -> Progress:
    """One more step's loss minus the control's (nats), smoothed into the excess."""
    share = 0.0 if progress.excess is None else schedule.smoothing
    return replace(progress, excess=share * (progress.excess or 0.0) + (1 - share) * difference)


def rolled_back(schedule: RemovalSchedule, good: Progress, failed: Progress, wait: int, n_layer: int) -> Progress:
    """Go on from `good`, as the run that became `failed` did not end well: the next event waits longer.

    Args:
        good: as the checkpoint has it, which the run goes back to.
        failed: as it was when the loss was given up.
        wait: steps that the event after `good` comes later than it came, or was due, in the failed run.
    """
    again, due = failed.happened[len(good.happened) :], least_step(schedule, good, n_layer)
    hold = good.hold if due is None else (again[0].step if again else due) + wait
    return replace(good, hold=max(hold, good.hold), rollbacks=failed.rollbacks + 1, excess=None)


def state_of(schedule: RemovalSchedule, progress: Progress, step: int, n_layer: int) -> RemovalState:
    """What is frozen and which treatments are on in step `step`."""
    return schedule.state_after(progress.happened, step, len(schedule.events(n_layer)))


def length(schedule: RemovalSchedule, progress: Progress, n_layer: int) -> int:
    """After how many steps the run ends, as far as can be said now: the schedule's, but

    as many more as the events come later, if that puts the last past the end; an adaptive one's `settle` steps after
    the last event, once that has happened.
    """
    planned, least = schedule.events(n_layer), least_step(schedule, progress, n_layer)
    if not planned:
        return schedule.steps
    if least is None:
        last = progress.happened[-1].step
    else:
        last = least + planned[-1].step - planned[len(progress.happened)].step
    if schedule.pace == "adaptive":
        return last + schedule.settle if least is None else max(schedule.steps, last + schedule.settle)
    return schedule.steps if last < schedule.steps else schedule.steps + last - planned[-1].step


def learning_rate_factor(schedule: RemovalSchedule, progress: Progress, step: int, n_layer: int) -> float:
    """The learning rate of step `step`, as a part of the highest.

    Linear warm-up, then a cosine over `steps` to the minimum, where it stays. Once an adaptive schedule's last event
    has happened it falls in a line from where the cosine was then to the minimum, `settle` steps later.
    """
    if step < schedule.warmup_steps:
        return step / max(1, schedule.warmup_steps)
    floor = schedule.min_learning_rate / schedule.learning_rate

    def cosine(step: int) -> float:
        done = (step - schedule.warmup_steps) / max(1, schedule.steps - schedule.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, done)))) * (1 - floor) + floor

    if schedule.pace == "adaptive" and len(progress.happened) == len(schedule.events(n_layer)):
        end = progress.happened[-1].step
        settled = min(1.0, max(0.0, (step - end) / schedule.settle))
        return cosine(end) + (floor - cosine(end)) * settled
    return cosine(step)


def removed(progress: Progress) -> str:
    """What was removed when, in a line: "ln_2 0-11 at steps 20-42, qk 0 at step 44"."""
    kinds: dict[str, list[Event]] = {}
    for event in progress.happened:
        kinds.setdefault(event.site, []).append(event)
    return ", ".join(_span(site, events) for site, events in kinds.items()) or "nothing"


def _span(site: str, events: Sequence[Event]) -> str:
    first, last = events[0], events[-1]
    layers = "" if first.layer is None else f" {first.layer}" + (f"-{last.layer}" if len(events) > 1 else "")
    steps = f"step {first.step}" if first.step == last.step else f"steps {first.step}-{last.step}"
    return f"{site}{' treatment off' if site in TREATMENTS else ''}{layers} at {steps}"
