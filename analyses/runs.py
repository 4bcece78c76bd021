"""Short fine-tuning runs, kept on disk: what is finished is read, what was interrupted goes on, the rest is run."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import common
import torch
from torch import Tensor

from lnfree_interp import (
    RemovalSchedule,
    cli,
    evaluate_loss,
    load_model,
    read_documents,
    remove_layernorm,
    token_blocks,
)
from lnfree_interp.data import Blocks
from lnfree_interp.finetune import Diverged, StatusLine, load_trainable
from lnfree_interp.schedule import PRESETS

RUNS = common.FIGURES.parent / "out" / "runs"
EVALUATED = 32768  # tokens
PAPERS, CONTROL = "the papers' order", "control, nothing removed"


@dataclass(frozen=True)
class Run:
    """A fine-tuning run of one model: name of the variant, schedule, seed."""

    model: str
    variant: str
    schedule: RemovalSchedule
    seed: int


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


def flags(parser) -> None:
    """The flags of analyses that train."""
    add = parser.add_argument
    add("--preset", default="tiny", choices=PRESETS, help="schedule to scale to --steps (tiny)")
    add("--step-tokens", type=cli.positive_int, default=4096, metavar="N", help="tokens per step (4,096)")
    add("--seeds", type=cli.positive_int, default=3, metavar="N", help="runs of each variant (3)")
    add("--jobs", type=cli.positive_int, default=1, metavar="N", help="runs at a time (1)")
    add("--runs", type=Path, default=RUNS, metavar="DIR", help="where runs are kept (out/runs)")
    parser.set_defaults(model=["tiny"])


def base_schedule(args, steps: int) -> RemovalSchedule:
    return replace(RemovalSchedule.preset(args.preset).scaled(steps), tokens_per_step=args.step_tokens)


def texts(args) -> tuple[list[str], list[str]]:
    """Training and evaluation documents: --text and the embedded text; or two parts of the embedded text."""
    embedded = read_documents(cli.VALIDATION_TEXT)
    if args.text:
        return read_documents(args.text), embedded
    if args.data:
        raise ValueError("--data is not supported here: give training text with --text")
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
    where = [(run, args.runs / directory_name(run, args)) for run in wanted]
    tasks = [
        (run, directory, some_of(train, run), held_out, args.device)
        for run, directory in where
        if not (directory / "result.json").exists()
    ]
    if tasks:
        with_bar = cli.progress(_in_turn(tasks, args.jobs), total=len(tasks), label=f"{len(tasks)} runs", unit="run")
        for run, directory, seconds in with_bar:
            result = read(run, directory)
            print(
                f"{run.model}, {run.variant}, {run.schedule.steps} steps, seed {run.seed}: "
                f"{result.diverged or f'loss {result.loss:.4f}'} ({seconds:.0f} s)",
                file=sys.stderr,
                flush=True,
            )
    return {(r.model, r.variant, r.schedule.steps, r.seed): read(r, directory) for r, directory in where}


def _in_turn(tasks: list, jobs: int):
    if jobs == 1:
        yield from map(_train, tasks)
        return
    threads = max(1, torch.get_num_threads() // jobs)
    with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (threads,)) as pool:
        yield from pool.map(_train, tasks)


def directory_name(run: Run, args) -> str:
    """Readable, and different wherever the result could be."""
    schedule = json.dumps(asdict(run.schedule), sort_keys=True, default=list)
    text = common.file_fingerprint(Path(args.text or cli.VALIDATION_TEXT))
    key = hashlib.sha256(f"{schedule}{common.model_fingerprint(run.model)}{text}{bool(args.text)}".encode()).hexdigest()
    variant = "".join(c if c.isalnum() else "-" for c in run.variant)
    return f"{cli.display_name(run.model)}-{variant}-{run.schedule.steps}-seed{run.seed}-{key[:8]}"


def read(run: Run, directory: Path) -> Finished:
    stored = json.loads((directory / "result.json").read_text())
    events = tuple((step, site, layer) for step, site, layer in stored["events"])
    loss = float("nan") if stored["loss"] is None else stored["loss"]
    return Finished(run, tuple(stored["steps"]), tuple(stored["ce"]), events, loss, stored["diverged"])


def _train(task) -> tuple[Run, Path, float]:
    run, directory, train, held_out, device = task
    began = time.monotonic()
    model, tokenizer = load_trainable(run.model)
    block = min(run.schedule.block_size, model.config.n_positions)
    schedule = replace(run.schedule, block_size=block)
    history = History(schedule)
    resume = any(directory.glob("checkpoint-*/trainer_state.json"))
    if (directory / "final").exists():
        shutil.rmtree(directory)
        resume = False
    held_out = token_blocks(tokenizer, held_out, block, max_blocks=EVALUATED // block)
    diverged = ""
    try:
        remove_layernorm(
            model,
            tokenizer,
            Blocks(token_blocks(tokenizer, train, block)),
            schedule,
            directory,
            resume=resume,
            device=device,
            seed=run.seed,
            callbacks=[history],
            logging_steps=1,
            save_steps=50,
        )
    except Diverged as error:
        diverged = str(error).split(":")[0]
    loss = None if diverged else mean_loss(directory / "final", held_out, device)
    result = {
        "variant": run.variant,
        "steps": history.steps,
        "ce": history.ce,
        "loss": loss,
        "diverged": diverged,
        "events": [list(event) for event in schedule.events(model.config.n_layer)],
    }
    (directory / "result.json.part").write_text(json.dumps(result))
    (directory / "result.json.part").rename(directory / "result.json")
    for checkpoint in directory.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    return run, directory, time.monotonic() - began


def mean_loss(name, blocks: Tensor, device: str | None) -> float:
    return evaluate_loss(load_model(str(name), device=device), blocks, worst=0, draws=1).mean


class History(StatusLine):
    """Keeps the training cross-entropy of every step, an interrupted run's beginning included; prints nothing."""

    def __init__(self, schedule: RemovalSchedule):
        super().__init__(schedule)
        self.steps: list[int] = []
        self.ce: list[float] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self._keep(state.log_history)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self._keep([{**logs, "step": state.global_step}])

    def _keep(self, logs: Sequence[Mapping]) -> None:
        for log in logs:
            if "ce" in log:
                self.steps.append(log["step"])
                self.ce.append(log["ce"])


def largest_rise(finished: Finished, control: Finished) -> float:
    """The most that the training loss lies above the control's from the first removal on (nats).

    Both read the same tokens in the same step, so that a hard batch is no rise.
    """
    first = finished.events[0][0] if finished.events else 0
    usual = dict(zip(control.steps, control.ce))
    return max((c - usual[s] for s, c in zip(finished.steps, finished.ce) if s > first and s in usual), default=0.0)
