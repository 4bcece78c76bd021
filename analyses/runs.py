"""Short fine-tuning runs, kept on disk: what is finished is read, what was interrupted goes on, the rest is run."""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import common

from lnfree_interp import RemovalSchedule, cli, read_documents
from lnfree_interp.names import VALIDATION_TEXT
from lnfree_interp.schedule import PRESETS

RUNS = common.FIGURES.parent / "out" / "runs"
PAPERS, CONTROL = "the papers' order", "control, nothing removed"


@dataclass(frozen=True)
class Run:
    """A fine-tuning run of one model: name of the variant, schedule, seed.

    Attributes:
        treatments: (name, value) of what is done besides the schedule: see `treatments.py`.
        control: the run whose losses an adaptive schedule compares its own with; it has to be finished before.
    """

    model: str
    variant: str
    schedule: RemovalSchedule
    seed: int
    treatments: tuple[tuple[str, float], ...] = ()
    control: Run | None = None


@dataclass(frozen=True)
class Finished:
    """What a run left: losses in nats per token.

    Attributes:
        steps, ce: the training cross-entropy and the step it was logged at.
        events: (step, site, layer) of the removals.
        loss: mean cross-entropy on the evaluation text at the end; nan if the run diverged.
        diverged: why the run ended early, or "".
    """

    run: Run
    steps: tuple[int, ...]
    ce: tuple[float, ...]
    events: tuple[tuple[int, str, int | None], ...]
    loss: float
    diverged: str = ""


def flags(parser, step_tokens: int | None = 4096) -> None:
    """The flags of analyses that train; step_tokens None: the preset's."""
    add = parser.add_argument
    usual = "the preset's" if step_tokens is None else f"{step_tokens:,}"
    add("--preset", default="tiny", choices=PRESETS, help="schedule to scale to --steps (tiny)")
    add("--step-tokens", type=cli.positive_int, default=step_tokens, metavar="N", help=f"tokens per step ({usual})")
    add("--seeds", type=cli.positive_int, default=3, metavar="N", help="runs of each variant (3)")
    add("--jobs", type=cli.positive_int, default=1, metavar="N", help="runs at a time (1)")
    add("--runs", type=Path, default=RUNS, metavar="DIR", help="where runs are kept (out/runs)")
    parser.set_defaults(model=["tiny"])


def base_schedule(args, steps: int) -> RemovalSchedule:
    schedule = RemovalSchedule.preset(args.preset)
    return replace(schedule.scaled(steps), tokens_per_step=args.step_tokens or schedule.tokens_per_step)


def texts(args) -> tuple[list[str], list[str]]:
    """Training and evaluation documents: --text and --val, or the embedded text; or two parts of the embedded text."""
    if args.data:
        raise ValueError("--data is not supported here: give training text with --text")
    embedded, val = read_documents(VALIDATION_TEXT), getattr(args, "val", None)
    if args.text or val:
        return read_documents(args.text) if args.text else embedded, read_documents(val) if val else embedded
    cut = max(1, round(0.8 * len(embedded)))
    return embedded[:cut], embedded[cut:]


def some_of(documents: Sequence[str], run: Run) -> list[str]:
    """Documents drawn from all of them, about twice as much text as the run reads."""
    drawn, length, characters = [], 0, 8 * run.schedule.steps * run.schedule.tokens_per_step
    for document in random.Random(0).sample(list(documents), len(documents)):
        if length > characters:
            break
        drawn.append(document)
        length += len(document)
    return drawn


def perform(args, wanted: Sequence[Run]) -> dict[tuple[str, str, int, int], Finished]:
    """(model, variant, steps, seed) -> finished run, in the order wanted."""
    train, held_out = texts(args)
    where = [(run, directory_of(run, args)) for run in wanted]
    tasks = [
        (
            run,
            directory,
            some_of(train, run),
            held_out,
            (args.device, args.dtype),
            run.control and directory_of(run.control, args),
        )
        for run, directory in where
        if not (directory / "result.json").exists()
    ]
    if tasks:
        with cli.bar(f"{len(tasks)} runs", "run") as progress:
            for i, (run, directory, seconds) in enumerate(_in_turn(tasks, args.jobs), 1):
                result = read(run, directory)
                print(
                    f"{run.model}, {run.variant}, {run.schedule.steps} steps, seed {run.seed}: "
                    f"{result.diverged or f'loss {result.loss:.4f}'} ({seconds:.0f} s)",
                    file=sys.stderr,
                    flush=True,
                )
                progress(i, len(tasks))
    return {(r.model, r.variant, r.schedule.steps, r.seed): read(r, directory) for r, directory in where}


def _in_turn(tasks: list, jobs: int):
    import torch
    from train_run import train

    if jobs == 1:
        yield from map(train, tasks)
        return
    threads = max(1, torch.get_num_threads() // jobs)
    with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (threads,)) as pool:
        yield from pool.map(train, tasks)


def directory_of(run: Run, args) -> Path:
    return args.runs / directory_name(run, args)


def directory_name(run: Run, args) -> str:
    """Readable, and different wherever the result could be."""
    schedule = json.dumps(asdict(run.schedule), sort_keys=True, default=list)
    text = common.file_fingerprint(Path(args.text or VALIDATION_TEXT))
    key = f"{schedule}{common.model_fingerprint(run.model)}{text}{bool(args.text)}"
    if run.treatments:
        key += repr(run.treatments)
    if args.dtype != "float32":
        key += args.dtype
    if getattr(args, "val", None):
        key += common.file_fingerprint(Path(args.val))
    key = hashlib.sha256(key.encode()).hexdigest()
    variant = "".join(c if c.isalnum() else "-" for c in run.variant)
    return f"{cli.display_name(run.model)}-{variant}-{run.schedule.steps}-seed{run.seed}-{key[:8]}"


def read(run: Run, directory: Path) -> Finished:
    stored = json.loads((directory / "result.json").read_text())
    events = tuple((step, site, layer) for step, site, layer in stored["events"])
    loss = float("nan") if stored["loss"] is None else stored["loss"]
    return Finished(run, tuple(stored["steps"]), tuple(stored["ce"]), events, loss, stored["diverged"])


def largest_rise(finished: Finished, control: Finished) -> float:
    """The most that the training loss lies above the control's from the first removal on (nats).

    Both read the same tokens in the same step, so that a hard batch is no rise.
    """
    first = finished.events[0][0] if finished.events else 0
    usual = dict(zip(control.steps, control.ce))
    return max((c - usual[s] for s, c in zip(finished.steps, finished.ce) if s > first and s in usual), default=0.0)
