"""Which LayerNorm goes at which step: a schedule as data, to print and test without training anything.

Sources: P1 = arXiv 2409.13710 (the order, the treatments), P2 = arXiv 2507.02559 (the presets).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from .arguments import as_path, choice, one_of, shown, whole
from .documents import read_text
from .files import replace_file

KINDS = ("ln_2", "qk", "v", "ln_f")
# Tokens that are treated apart for a while, in the order in which that ends. Massive tokens come last: position 0 is
# massive too, so that it shares their constant first and comes down in two steps (SmolLM2-135M untrained, all values'
# norms frozen: +15.1 nats, then +2.7; the other way round +1.4, then +16.4), and a token that becomes massive because
# position 0 no longer is one, as another sink of attention, is taken care of. Meanwhile frozen sites look at each
# token's own std; afterwards all is linear.
TREATMENTS = ("eot", "position0", "massive")
PACES = ("fixed", "adaptive")


class Event(NamedTuple):
    """At `step`, before its forward: a site is frozen, or one of TREATMENTS ends."""

    step: int
    site: str
    layer: int | None


@dataclass(frozen=True)
class RemovalState:
    """What a schedule says of one step; the arguments of `freeze`, and whether the auxiliary loss is on."""

    frozen: frozenset[tuple[str, int | None]]
    position0: bool
    eot: bool
    massive: bool
    auxiliary: bool

    def summary(self, n_layer: int) -> str:
        """One line, such as "ln_2 12/12  qk 3/12  v 0/12  ln_f -  eot on  position0 on"."""
        counts = {kind: sum(site == kind for site, _ in self.frozen) for kind in KINDS}
        parts = [f"{kind} {counts[kind]}/{n_layer}" for kind in KINDS[:3]]
        parts.append(f"ln_f {'frozen' if counts['ln_f'] else '-'}")
        return "  ".join(parts + [f"{name} on" for name in TREATMENTS if getattr(self, name)])


@dataclass(frozen=True)
class RemovalSchedule:
    """When which LayerNorm goes, and how the model is trained meanwhile. Steps are optimiser steps.

    Removals follow each other from `start` on in `order`, each the `gaps` of its kind before the next; then
    the end-of-text treatment ends, `position0_gap` steps later that of position 0, and, with `massive`, `massive_gap`
    steps later that of massive tokens. Gaps may be fractions: the step of an event is rounded down. An empty `order`
    removes nothing: the vanilla control.

    With pace "fixed" that is when they go. With pace "adaptive" the gaps are least distances: a site goes once the
    training loss, smoothed, is back within `margin` of the control's at the same steps, and when it has waited its
    even share of the steps left (at most `patience`) in any case. `settle` steps after the last event the run ends;
    meanwhile the learning rate falls in a line from where the cosine was to its minimum. `steps` is the most it takes.

    Raises:
        ValueError: a value that makes no schedule.

    Example:
        >>> schedule = RemovalSchedule.preset("small")
        >>> schedule.steps, [tuple(event) for event in schedule.events(n_layer=12)[:2]]
        (300, [(20, 'ln_2', 0), (22, 'ln_2', 1)])
    """

    steps: int
    start: int
    gaps: Mapping[str, float | int]
    tokens_per_step: int
    learning_rate: float | int
    min_learning_rate: float | int
    warmup_steps: int
    auxiliary_weight: float | int
    # A step. None: until the last treatment has ended, so that a step after it computes no std at all; the
    # reference implementation keeps the loss on (auxiliary_until=steps).
    auxiliary_until: int | None = None
    order: Sequence[str] = KINDS
    by: str = "kind"  # all layers of a kind, then the next kind; or "layer": all kinds of a layer
    layers: str = "forward"  # or "backward"
    position0_gap: float | int = 10
    # From how many times a site's average std of ordinary tokens on a token is massive; None: none are told apart.
    massive: float | int | None = None
    massive_gap: float | int = 10
    block_size: int = 1024
    weight_decay: float | int = 0.01
    max_grad_norm: float | int = 1.0
    momentum: float | int = 0.9  # of the running averages of std
    # How much of the loss is KL(untouched model || model), in nats per token, in place of the cross-entropy.
    distillation: float | int = 0.0
    pace: str = "fixed"  # or "adaptive", of which speak:
    margin: float | int = 0.05  # nats above the control's loss, within which a loss is back
    smoothing: float | int = 0.7  # how much of the smoothed difference stays in each step; it begins anew per event
    patience: int | None = None  # the most steps that one event waits; None: its even share of those left
    settle: int = 20  # steps after the last event

    def __post_init__(self):
        for field in fields(RemovalSchedule):  # a subclass knows what its own are
            if not _is_a(value := getattr(self, field.name), str(field.type)):
                raise ValueError(f"{field.name} is {shown(value)}, not {_KIND_OF_FIELD[str(field.type)]}")
        object.__setattr__(self, "order", tuple(self.order))  # a list, when it comes from JSON
        if self.order and sorted(self.order) != sorted(KINDS):
            raise ValueError(f"order {self.order} does not name each of {KINDS} once")
        if self.by not in ("kind", "layer"):
            raise ValueError(f"by is {self.by!r}, not 'kind' or 'layer'")
        if self.by == "layer" and self.order and "ln_f" not in (self.order[0], self.order[-1]):
            raise ValueError(f"order {self.order}: layer by layer, ln_f comes first or last")
        if self.layers not in ("forward", "backward"):
            raise ValueError(f"layers is {self.layers!r}, not 'forward' or 'backward'")
        if sorted(self.gaps) != sorted(KINDS) or not min(*self.gaps.values(), self.position0_gap) >= 0:
            raise ValueError(f"gaps {self.gaps}, {self.position0_gap}: one per kind is needed, none negative")
        if self.massive is not None and not 1 < self.massive < math.inf:
            raise ValueError(f"massive is {self.massive}, not a number above 1, of times the average std")
        if self.pace not in PACES:
            raise ValueError(f"pace is {self.pace!r}, not 'fixed' or 'adaptive'")
        for name in ("steps", "start", "tokens_per_step", "block_size", "settle", "patience"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, not at least 1")
        for name in (
            "warmup_steps",
            "position0_gap",
            "auxiliary_weight",
            "weight_decay",
            "max_grad_norm",
            "margin",
            "massive_gap",
        ):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, not a number of at least 0")
        for name in ("momentum", "smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, not at least 0 and below 1")
        if not 0 <= self.distillation <= 1:
            raise ValueError(f"distillation is {self.distillation}, not from 0 to 1")
        if self.tokens_per_step % self.block_size:
            raise ValueError(f"{self.tokens_per_step} tokens per step are no multiple of {self.block_size}")
        if not 0 <= self.min_learning_rate <= self.learning_rate or not self.learning_rate > 0:
            raise ValueError(
                f"learning rate {self.learning_rate:g} -> {self.min_learning_rate:g} is none: learning_rate must be "
                "above 0, min_learning_rate from 0 to that"
            )

    @classmethod
    def preset(cls, name: str) -> RemovalSchedule:
        """The published schedule of a GPT-2 size (P2), the embedded models' ("tiny"), or one by analogy with GPT-2's.

        Raises:
            ValueError: no such preset.
        """
        return PRESETS[choice(name, "preset", PRESETS)]

    def scaled(self, steps: int) -> RemovalSchedule:
        """The same schedule over another number of steps; tokens per step and learning rate stay."""
        factor = whole(steps, "steps", least=1) / self.steps
        until = self.auxiliary_until
        return replace(
            self,
            steps=steps,
            start=max(1, round(self.start * factor)),
            gaps={kind: gap * factor for kind, gap in self.gaps.items()},
            position0_gap=self.position0_gap * factor,
            massive_gap=self.massive_gap * factor,
            warmup_steps=round(self.warmup_steps * factor),
            auxiliary_until=None if until is None else round(until * factor),
            patience=None if self.patience is None else max(1, round(self.patience * factor)),
            settle=max(1, round(self.settle * factor)),
        )

    def vanilla(self) -> RemovalSchedule:
        """The control: the same training with nothing removed, no massive tokens, auxiliary loss or distillation."""
        return replace(self, order=(), massive=None, auxiliary_weight=0.0, distillation=0.0, pace="fixed")

    def adaptive(self, **changes) -> RemovalSchedule:
        """The same schedule at the model's own pace: its gaps are least distances, its steps the most it takes.

        Args:
            changes: margin, smoothing, patience, settle, or any other field.
        """
        return replace(self, pace="adaptive", **changes)

    def to_json(self, path: str | Path) -> None:
        """Write all fields as JSON.

        Raises:
            ValueError: the file cannot be written.
        """
        text = json.dumps(asdict(self), indent=1) + "\n"
        replace_file(as_path(path, "path"), lambda beside: beside.write_text(text, encoding="utf-8"))

    @classmethod
    def from_json(cls, path: str | Path, base: RemovalSchedule | None = None) -> RemovalSchedule:
        """A schedule from a JSON file of its fields.

        Args:
            base: whose fields, and gaps of kinds, the file may leave out; None: only those with a default.

        Raises:
            ValueError: the file is no JSON object; a field that there is not, is missing, or has a wrong value.

        Example:
            >>> import tempfile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     RemovalSchedule.preset("small").to_json(f"{folder}/schedule.json")
            ...     RemovalSchedule.from_json(f"{folder}/schedule.json") == RemovalSchedule.preset("small")
            True
        """
        try:
            stored = json.loads(read_text(as_path(path, "path"), "schedule"))
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"schedule {path} is no JSON ({getattr(error, 'msg', error)})") from None
        if not isinstance(stored, dict):
            raise ValueError(f"schedule {path} is no JSON object of fields")
        known = {field.name: field for field in fields(cls)}
        for name in stored:
            if name not in known:
                raise ValueError(f"schedule {path}: there is no field {name!r}; there are {', '.join(known)}")
        if base is not None:
            one_of(base, "base", RemovalSchedule, "a RemovalSchedule")
            given = stored.get("gaps")
            gaps = {"gaps": {**base.gaps, **given}} if isinstance(given, dict) else {}
            stored = {name: getattr(base, name) for name in known} | stored | gaps
        missing = [name for name, field in known.items() if field.default is MISSING and name not in stored]
        if missing:
            raise ValueError(f"schedule {path}: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing")
        try:
            return cls(**stored)
        except ValueError as error:
            raise ValueError(f"schedule {path}: {error}") from None

    def events(self, n_layer: int) -> list[Event]:
        """What happens at which step to a model of n_layer layers, in order.

        Raises:
            ValueError: the last of it would not come before the last step.
        """
        whole(n_layer, "n_layer", least=1)
        if not self.order:
            return []
        layers = range(n_layer) if self.layers == "forward" else range(n_layer - 1, -1, -1)
        if self.by == "kind":
            sites = [(k, layer) for k in self.order for layer in (layers if k != "ln_f" else [None])]
        else:
            sites = [(k, layer) for layer in layers for k in self.order if k != "ln_f"]
            sites.insert(0 if self.order[0] == "ln_f" else len(sites), ("ln_f", None))
        events, step = [], float(self.start)
        for kind, layer in sites:
            events.append(Event(math.floor(step + 1e-6), kind, layer))
            step += self.gaps[kind]
        gaps = {"eot": 0.0, "position0": self.position0_gap, "massive": self.massive_gap}
        for treatment in TREATMENTS[: 2 if self.massive is None else 3]:
            step += gaps[treatment]
            events.append(Event(math.floor(step + 1e-6), treatment, None))
        if events[-1].step >= self.steps:
            raise ValueError(
                f"schedule is done with {n_layer} layers at step {events[-1].step}, "
                f"which is not before the end of its {self.steps} steps"
            )
        if self.pace == "adaptive" and events[-1].step + self.settle > self.steps:
            raise ValueError(
                f"adaptive schedule is done with {n_layer} layers at step {events[-1].step} at the earliest: "
                f"{self.settle} more to settle do not fit into its {self.steps} steps"
            )
        return events

    def state(self, step: int, n_layer: int) -> RemovalState:
        """What is frozen and which treatments are on in step `step`, counted from 0, if nothing delays it."""
        step, events = whole(step, "step", least=0), self.events(n_layer)
        return self.state_after([event for event in events if event.step <= step], step, len(events))

    def state_after(self, happened: Sequence[Event], step: int, n_events: int) -> RemovalState:
        """What is frozen and which treatments are on in step `step`, where these of `n_events` events have happened."""
        one_of(happened, "happened", (list, tuple), "a list of events")
        for event in happened:
            one_of(event, "each event in happened", tuple, "an event, as events() gives them")
        step = whole(step, "step", least=0)
        if not whole(n_events, "n_events", least=0):
            return RemovalState(frozenset(), position0=False, eot=False, massive=False, auxiliary=False)
        gone = {event[1:] for event in happened}
        wanted = len(happened) < n_events if self.auxiliary_until is None else step < self.auxiliary_until
        return RemovalState(
            frozen=frozenset((site, layer) for site, layer in gone if site in KINDS),
            position0=("position0", None) not in gone,
            eot=("eot", None) not in gone,
            massive=self.massive is not None and ("massive", None) not in gone,
            auxiliary=self.auxiliary_weight > 0 and wanted,
        )

    def table(self, n_layer: int):
        """DataFrame of the events: step, site, layer."""
        import pandas as pd

        table = pd.DataFrame(self.events(n_layer), columns=Event._fields)
        return table.astype({"layer": "Int64"})

    def describe(self, n_layer: int) -> str:
        """The schedule in a few lines to read."""
        lines = [
            f"{self.steps} steps of {self.tokens_per_step:,} tokens, learning rate {self.learning_rate:g} -> "
            f"{self.min_learning_rate:g} after {self.warmup_steps} steps of warm-up"
        ]
        steps: dict[str, list[int]] = {}
        for event in self.events(n_layer):
            steps.setdefault(event.site, []).append(event.step)
        for site, at in steps.items():
            layers = "" if len(at) == 1 else f" to {at[-1]}, {self.layers}"
            of_what = f" (of tokens from {self.massive:g} times the average std on)" if site == "massive" else ""
            lines.append(f"  {site + ('' if site in KINDS else ' treatment off'):24}step {at[0]}{layers}{of_what}")
        if not steps:
            lines.append("  nothing is removed: vanilla control")
        elif self.pace == "adaptive":
            lines.append(
                f"  at the earliest, each when the loss is within {self.margin:g} nats of the control's; "
                f"ends {self.settle} steps after the last"
            )
        if steps and self.auxiliary_weight:
            until = self.auxiliary_until or max(at[-1] for at in steps.values())
            end = "the last event" if self.pace == "adaptive" and self.auxiliary_until is None else f"step {until}"
            lines.append(f"  {f'auxiliary loss x {self.auxiliary_weight:g}':24}until {end}")
        if self.distillation:
            lines.append(f"  {f'distillation x {self.distillation:g}':24}KL(untouched model || model)")
        return "\n".join(lines)


# What a field's annotation, a string, asks of a JSON value, in words.
_KIND_OF_FIELD = {
    "int": "a whole number",
    "int | None": "a whole number or null",
    "float | int": "a number",
    "float | int | None": "a number or null",
    "str": "a string",
    "Sequence[str]": "a list of strings",
    "Mapping[str, float | int]": "an object of a number for each of " + ", ".join(KINDS),
}


def _is_a(value: Any, kind: str) -> bool:
    def all_are(values: Iterable, kind: str) -> bool:
        return all(_is_a(v, kind) for v in values)

    if kind.endswith(" | None"):
        return value is None or _is_a(value, kind.removesuffix(" | None"))
    if kind == "Mapping[str, float | int]":
        return isinstance(value, Mapping) and all_are(value.values(), "float | int")
    if kind == "Sequence[str]":
        return isinstance(value, (list, tuple)) and all_are(value, "str")
    if isinstance(value, bool):
        return False
    return isinstance(value, {"int": int, "str": str}.get(kind, (int, float)))


def _preset(steps, tokens, lr, min_lr, warmup, aux, start, ln_2, qk, v) -> RemovalSchedule:
    gaps = {"ln_2": ln_2, "qk": qk, "v": v, "ln_f": 2}
    return RemovalSchedule(
        steps=steps,
        start=start,
        gaps=gaps,
        tokens_per_step=tokens,
        learning_rate=lr,
        min_learning_rate=min_lr,
        warmup_steps=warmup,
        auxiliary_weight=aux,
    )


_TINY = RemovalSchedule(  # 8 layers of d_model 128, trained on a few books: many small steps instead of few large
    steps=600,
    start=40,
    gaps={"ln_2": 8, "qk": 8, "v": 12, "ln_f": 10},
    position0_gap=20,
    tokens_per_step=8192,
    block_size=256,
    learning_rate=1e-3,
    min_learning_rate=1e-4,
    warmup_steps=20,
    auxiliary_weight=0.1,
)

PRESETS = {
    "small": _preset(300, 524_288, 6e-4, 3e-4, 25, 0.1, 20, 2, 2, 3),
    "medium": _preset(500, 518_144, 6e-4, 3e-4, 10, 0.1, 20, 2, 2, 3),
    "large": _preset(600, 516_096, 3e-4, 4e-5, 15, 0.03, 30, 4, 4, 6),
    "xl": _preset(800, 516_096, 1e-4, 2e-5, 20, 0.01, 50, 4, 4, 6),
    "tiny": _TINY,
    # Nobody has published these: the numbers are those of the GPT-2 next in parameters and layers.
    "pythia-70m": _preset(300, 524_288, 6e-4, 3e-4, 25, 0.1, 20, 2, 2, 3),
    "pythia-160m": _preset(300, 524_288, 6e-4, 3e-4, 25, 0.1, 20, 2, 2, 3),
    "pythia-410m": _preset(500, 518_144, 6e-4, 3e-4, 10, 0.1, 20, 2, 2, 3),
    "pythia-1b": _preset(600, 516_096, 3e-4, 4e-5, 15, 0.03, 30, 4, 4, 6),
    "pythia-1.4b": _preset(800, 516_096, 1e-4, 2e-5, 20, 0.01, 50, 4, 4, 6),
    # Some of its tokens are massive besides position 0: frozen alone, untrained, the MLP's norm of layer 8 costs 3.87
    # nats without their class and 0.02 with it, all values' norms 1.7 and 0.1.
    "smollm2-135m": replace(_preset(500, 518_144, 6e-4, 3e-4, 25, 0.1, 20, 2, 2, 3), massive=4),
}
