"""One short fine-tuning run from beginning to end, in whatever process it is given to."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from runs import Run
from torch import Tensor
from treatments import made

from lnfree_interp import RemovalSchedule, evaluate_loss, load_model, remove_layernorm, token_blocks
from lnfree_interp.data import Blocks
from lnfree_interp.finetune import Diverged, Guard, StatusLine, load_trainable
from lnfree_interp.finetune.saving import state_in

EVALUATED = 32768  # tokens


def train(task) -> tuple[Run, Path, float]:
    """To the end; one that was interrupted goes on, or begins again where treatments know more than is saved."""
    run, directory, train, held_out, (device, dtype), control = task
    began = time.monotonic()
    model, tokenizer = load_trainable(run.model)
    block = min(run.schedule.block_size, model.config.n_positions)
    schedule = replace(run.schedule, block_size=block)
    history = History(schedule)
    resume = any(directory.glob("checkpoint-*/trainer_state.json"))
    if (directory / "final").exists() or (run.treatments and directory.exists()):
        shutil.rmtree(directory)
        resume = False
    held_out = evaluation_blocks(tokenizer, held_out, block)
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
            dtype=dtype,
            seed=run.seed,
            callbacks=[history, *made(run.treatments)],
            control=control,
            logging_steps=1,
            save_steps=50,
            guard=Guard(multiple=1.8, rollbacks=0),  # whether a schedule holds is what is asked
        )
    except Diverged as error:
        diverged = str(error).split(":")[0]
    loss = None if diverged else mean_loss(load_model(str(directory / "final"), device=device), held_out)
    planned = schedule.events(model.config.num_hidden_layers)
    state = None if diverged else state_in(directory / "final")
    result = {
        "variant": run.variant,
        "steps": history.steps,
        "ce": history.ce,
        "loss": loss,
        "diverged": diverged,
        "events": [list(event) for event in (state["progress"]["happened"] if state else planned)],
    }
    (directory / "result.json.part").write_text(json.dumps(result))
    (directory / "result.json.part").rename(directory / "result.json")
    for checkpoint in directory.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    return run, directory, time.monotonic() - began


def evaluation_blocks(tokenizer, documents: Sequence[str], block: int) -> Tensor:
    """What losses at the end of runs are measured on."""
    return token_blocks(tokenizer, documents, block, max_blocks=EVALUATED // block)


def mean_loss(model, blocks: Tensor) -> float:
    return evaluate_loss(model, blocks, worst=0, draws=1).mean


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
