"""A schedule and a guard on the command line: a flag for each field. Imports nothing heavy."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path
from typing import Any

from ..schedule import KINDS, PACES, PRESETS, RemovalSchedule
from .progress import Guard

ADAPTIVE = "adaptive"

# What a flag says of its field; a new field without a line here is a KeyError at the first --help.
HELP = {
    "steps": "optimiser steps; all that is counted in steps scales along",
    "start": "step of the first removal",
    "gaps": "steps from a removal of {kind} to what comes next",
    "tokens_per_step": "tokens in a step, over all devices; a multiple of the block size",
    "learning_rate": "peak learning rate, the final one left as it is (--lr scales both)",
    "min_learning_rate": "final learning rate",
    "warmup_steps": "steps in which the learning rate rises",
    "auxiliary_weight": "of the auxiliary loss on the final norm's std; 0: none",
    "auxiliary_until": "step at which that loss ends, or none: with the last event",
    "order": "all of {kinds}, in the order in which they go",
    "by": "all layers of a kind of site, then the next kind; or all kinds of a layer",
    "layers": "first layer first, or last",
    "position0_gap": "steps between the ends of the end-of-text and of the position 0 treatment",
    "massive": "from how many times the average std on a token is massive and treated apart, or none: no such class",
    "massive_gap": "steps between the ends of the position 0 and of the massive tokens' treatment",
    "block_size": "tokens in a sequence",
    "weight_decay": "AdamW's",
    "max_grad_norm": "gradients are clipped to",
    "momentum": "of the running averages of std",
    "pace": "when sites go: at their steps, or when the loss is back at the control's (--control)",
    "margin": "nats above the control's loss, within which a loss is back (adaptive)",
    "smoothing": "how much of the smoothed difference stays in each step (adaptive)",
    "patience": "the most steps that a removal waits, or none: its share of those left (adaptive)",
    "settle": "steps after the last event (adaptive)",
}
CHOICES = {"by": ("kind", "layer"), "layers": ("forward", "backward"), "pace": PACES}


def whole(text: str) -> int:
    if not re.fullmatch(r"\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return value


def or_none(read: Callable[[str], Any]) -> Callable[[str], Any]:
    def reader(text: str) -> Any:
        if text == "none":
            return None
        try:
            return read(text)
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"{error}, or none") from None

    return reader


# The same for the guard's fields.
GUARD_HELP = {
    "multiple": "of the untouched model's loss, above which a loss is suspect",
    "patience": "steps that a loss may be suspect before the run goes back to its last good checkpoint",
    "wait": "steps that the next removal comes later then; twice as many after each further rollback",
    "rollbacks": "after so many the run stops",
}
_READ: dict[str, Callable[[str], Any]] = {"int": whole, "float | int": number, "str": str}
_READ |= {f"{kind} | None": or_none(read) for kind, read in _READ.items()}


def add_schedule_flags(group) -> None:
    """A flag for each field of a schedule; `gaps` has one for each kind of site."""
    for field in fields(RemovalSchedule):
        kind, flag = str(field.type), "--" + field.name.replace("_", "-")
        options: dict[str, Any] = {"help": HELP[field.name], "default": MISSING}
        if kind.startswith("Mapping"):
            for site in KINDS:
                options["help"] = HELP[field.name].format(kind=site)
                name = f"{field.name[:-1]}_{site}"  # gap_ln_2
                group.add_argument("--" + name.replace("_", "-"), type=number, metavar="N", dest=_dest(name), **options)
        elif kind == "Sequence[str]":
            options["help"] = HELP[field.name].format(kinds=", ".join(KINDS))
            group.add_argument(flag, nargs="+", choices=KINDS, metavar="SITE", dest=_dest(field.name), **options)
        elif field.name in CHOICES:
            group.add_argument(flag, choices=CHOICES[field.name], dest=_dest(field.name), **options)
        else:
            metavar = "N" if "int" in kind.split(" | ")[0] else "X"
            group.add_argument(flag, type=_READ[kind], metavar=metavar, dest=_dest(field.name), **options)


def add_guard_flags(group) -> None:
    for field in fields(Guard):
        text = f"{GUARD_HELP[field.name]} ({field.default})"
        read = _READ[str(field.type)]
        group.add_argument(f"--guard-{field.name}", type=read, default=field.default, metavar="N", help=text)


def guard_from(args: argparse.Namespace) -> Guard:
    """The guard that the flags ask for.

    Raises:
        ValueError: one that is none; the flag is named.
    """
    try:
        return Guard(**{field.name: getattr(args, f"guard_{field.name}") for field in fields(Guard)})
    except ValueError as error:
        raise ValueError(f"--guard-{error}") from None


def schedule_from(args: argparse.Namespace) -> RemovalSchedule:
    """The schedule that the flags ask for: preset, then file, then --steps and --lr, then flags of single fields.

    Raises:
        ValueError: neither a preset nor a file of all fields; a flag that makes no schedule, which is named.
    """
    file = None if args.schedule in (None, ADAPTIVE) else args.schedule
    if args.preset is not None:
        if args.preset not in PRESETS:
            raise ValueError(f"--preset {args.preset}: unknown preset; choose from {', '.join(PRESETS)}")
        schedule = PRESETS[args.preset]
        schedule = schedule if file is None else RemovalSchedule.from_json(file, schedule)
    elif file is not None:
        schedule = RemovalSchedule.from_json(file)
    else:
        raise ValueError(f"--preset NAME (one of {', '.join(PRESETS)}) or --schedule FILE.json is needed")
    if args.schedule == ADAPTIVE:
        schedule = schedule.adaptive()
    given = {
        name: value
        for name, value in (
            (name.removeprefix("field_"), value) for name, value in vars(args).items() if _is_field(name)
        )
        if value is not MISSING
    }
    steps = given.pop("steps", None)
    if steps is not None:
        if steps < 1:
            raise ValueError(f"--steps {steps} is not at least 1")
        schedule = schedule.scaled(steps)
    changes: dict[str, dict[str, Any]] = {}
    if args.lr is not None:
        floor = schedule.min_learning_rate / schedule.learning_rate
        changes["--lr"] = {"learning_rate": args.lr, "min_learning_rate": args.lr * floor}
    for name, value in given.items():
        change = {"gaps": {name.removeprefix("gap_"): value}} if name.startswith("gap_") else {name: value}
        changes["--" + name.replace("_", "-")] = change
    schedule = _changed(schedule, changes)
    return schedule.vanilla() if args.vanilla else schedule


def _dest(name: str) -> str:
    return f"field_{name}"


def _is_field(name: str) -> bool:
    return name.startswith("field_")


def _changed(schedule: RemovalSchedule, changes: Mapping[str, Mapping[str, Any]]) -> RemovalSchedule:
    """A schedule with what each flag changes of it; where they make none, the flags to blame are named."""
    together: dict[str, Any] = {}
    for change in changes.values():
        for name, value in change.items():
            together[name] = {**(together.get(name) or getattr(schedule, name)), **value} if name == "gaps" else value
    try:
        return replace(schedule, **together)
    except ValueError as error:
        blame = [flag for flag, change in changes.items() if len(changes) > 1 and _fails(schedule, flag, change, error)]
        raise ValueError(f"{', '.join(blame or changes)}: {error}") from None


def _fails(schedule: RemovalSchedule, flag: str, change: Mapping[str, Any], error: ValueError) -> bool:
    try:
        _changed(schedule, {flag: change})
    except ValueError as own:
        return str(own) == f"{flag}: {error}"
    return False


def as_fields(schedule: RemovalSchedule) -> dict[str, Any]:
    """All fields, as JSON has them."""
    return json.loads(json.dumps(asdict(schedule)))


def source_of(args: argparse.Namespace) -> str:
    """Where a schedule comes from, in words: "preset small, adaptive"."""
    parts = [] if args.preset is None else [f"preset {args.preset}"]
    if args.schedule is not None:
        parts.append(Path(args.schedule).name)
    return ", ".join(parts)
