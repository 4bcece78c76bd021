"""Removal as a run of HF's Trainer."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_callback import PrinterCallback

from ..arguments import as_path, kind, one_of, switch, whole
from ..batching import as_ids
from ..schedule import RemovalSchedule
from .callbacks import LossGuard, Record, RemovalCallback, StatusLine, StopWhenAsked, asked_by_sigterm
from .distillation import distilled_losses, make_teacher
from .export import export_ln_free, plain_model, plain_state
from .guard import Suspicion, held_out_loss, roll_back
from .order import Share, collate, loader, place_after
from .progress import Guard, learning_rate_factor
from .removable import auxiliary_loss, final_norm, make_removable, n_layers
from .saving import (
    ROLLBACKS,
    RUN,
    STATE,
    WRITING,
    as_value_error,
    check_directory,
    check_saved,
    checkpoint_to_resume,
    checkpoints,
    finished,
    on_main,
    publish,
    read_json,
    rotate,
    save_checkpoint,
    say,
    state_in,
    steps_of,
    write_json,
)
from .settings import DEFAULTS, check_same_run, control_losses, losses_hash, run_settings, training_arguments
from .trainable import ready

# The flag's name in TrainingArguments: transformers is about to rename it.
CHECKPOINTING = (
    "activation_checkpointing"
    if "activation_checkpointing" in {field.name for field in fields(TrainingArguments)}
    else "gradient_checkpointing"
)
# Blocks set aside to measure the loss on, at most; and the least part of a data set that they may be.
HELD_OUT, PART = 16, 20


class RemovalTrainer(Trainer):
    """Trainer plus the auxiliary loss and, with a teacher, distillation.

    Logs the cross-entropy "ce", the divergence from the teacher "kl" and the unweighted auxiliary loss "aux".

    Its learning rate is the schedule's, its data in the order of `order.py`, its checkpoints are whole or not there.
    """

    model: Any  # made removable
    begin = 0  # the step it begins at
    moved: Any = None  # its stream, from there on

    def __init__(self, *args, record: Record, guard: Guard, sequences: int, teacher=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.record, self.guard, self.sequences = record, guard, sequences
        self.teacher: PreTrainedModel | None = None if teacher is None else teacher.to(self.args.device)
        self.discard: list[Path] = []  # damaged or given up; removed after the next save
        self._run_dir: str | None = None
        self._ce: list[Tensor] = []  # of each step since the last log
        self._kl: Tensor | None = None
        self._aux: Tensor | None = None
        self._step = -1

    def train(self, *args, **kwargs):
        self._ce, self._kl, self._aux, self._step = [], None, None, -1
        return super().train(*args, **kwargs)

    # -- what a step reads, and at which rate it learns

    def get_train_dataloader(self):
        share = Share(self.sequences, self._train_batch_size, self.args.process_index, self.args.world_size, self.begin)
        return loader(self.train_dataset, share, self.args.seed, self.data_collator, self.args, self.moved)

    def create_scheduler(self, num_training_steps, optimizer=None):
        record = self.record

        def factor(step: int) -> float:
            return learning_rate_factor(record.schedule, record.progress, step, record.n_layer)

        if self.lr_scheduler is None:
            optimizer = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    # -- losses

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if model.training and self.teacher is not None:
            loss, ce, outputs = self._distilled(model, inputs, num_items_in_batch)
        else:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            ce = loss.detach()
        if model.training:
            if self._step != self.state.global_step:
                self._step = self.state.global_step
                self._ce.append(torch.zeros_like(ce))
            self._ce[-1] = self._ce[-1] + ce
            final = final_norm(self.model)
            if getattr(final, "std", None) is not None:
                # The cross-entropy comes as this micro-batch's share of the step's mean; so must this.
                share = 1 / self.current_gradient_accumulation_steps
                auxiliary = auxiliary_loss(final.std, final.target) * share
                final.std = None
                self._aux = auxiliary.detach() + (0.0 if self._aux is None else self._aux)
                loss = loss + self.record.schedule.auxiliary_weight * auxiliary
        return (loss, outputs) if return_outputs else loss

    def _distilled(self, model, inputs, num_items_in_batch):
        """Loss and cross-entropy as this micro-batch's share of the step's means, and the outputs."""
        teacher: Any = self.teacher
        labels, dtype = inputs["labels"], "bfloat16" if self.args.bf16 else "float32"
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        weight = self.record.schedule.distillation
        mixed, ce, kl, count = distilled_losses(
            outputs.logits, labels, inputs["input_ids"], teacher, weight, dtype=dtype
        )
        share = 1 / (count if num_items_in_batch is None else num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            share = share * self.accelerator.num_processes  # it counts all of theirs
        self._kl = kl * share + (0.0 if self._kl is None else self._kl)
        return mixed * share, ce * share, outputs

    def log(self, logs, start_time=None):
        if "loss" in logs and self._ce:
            asked, none = torch.tensor(float(self.record.asked)), torch.zeros_like(self._ce[0])
            sums = [*self._ce, *(none if part is None else part for part in (self._kl, self._aux))]
            values = torch.stack([*sums, asked.to(none)])
            *ce, kl, aux, asked_by = self.accelerator.reduce(values, reduction="mean").tolist()
            if self.args.world_size > 1:
                self.record.stopping = asked_by > 0
            self.record.losses += ce
            logs["ce"] = sum(ce) / len(ce)
            if self._kl is not None:
                logs["kl"] = kl / len(ce)
            if self._aux is not None:
                logs["aux"] = aux / len(ce)
            self._ce, self._kl, self._aux = [], None, None
        super().log(logs, start_time)

    def held_out_loss(self) -> float | None:
        """Nats per token on the run's held-out blocks, the same on all processes; None: there are none."""
        if self.record.held_out is None:
            return None
        size, dtype = self.args.per_device_train_batch_size, "bfloat16" if self.args.bf16 else "float32"
        loss = held_out_loss(self.model, self.record.held_out, batch_size=size, dtype=dtype)
        return self.accelerator.reduce(torch.tensor(loss, device=self.args.device), reduction="mean").item()

    # -- checkpoints

    def _issue_warnings_after_load(self, load_result):
        """What Trainer warns of would go on with weights or averages that are none: of another version, say."""
        tied = getattr(self.model, "_tied_weights_keys", None) if self.model.config.tie_word_embeddings else None
        ties = set(tied or ())  # written once
        missing = [name for name in load_result.missing_keys if name not in ties]
        wrong = [f"lacks {name}" for name in missing] + [f"has {name} too" for name in load_result.unexpected_keys]
        if wrong:
            raise ValueError(f"the checkpoint is not of this model: it {wrong[0]} ({len(wrong)} such names)")

    def _get_output_dir(self, trial):
        return self._run_dir or super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial):
        """Trainer's own, written beside; with the removal's state and a manifest added it gets its name."""
        out, step, failed = Path(str(self.args.output_dir)), self.state.global_step, None
        beside = out / WRITING
        held_out = self.held_out_loss()
        on_main(lambda: shutil.rmtree(beside, ignore_errors=True))
        self._run_dir = str(beside)
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch.save raises RuntimeErrors
            failed = error
        finally:
            self._run_dir = None
        self.accelerator.wait_for_everyone()

        def finish() -> None:
            checkpoint = out / f"checkpoint-{step}"
            try:
                if failed is not None:
                    reason = getattr(failed, "strerror", None) or str(failed).split("\n")[0]
                    raise ValueError(f"cannot write {checkpoint}: {reason}")
                with as_value_error(f"write {checkpoint}"):
                    write_json(beside / checkpoint.name / STATE, self._state_to_save(held_out))
                    publish(beside / checkpoint.name, checkpoint)
                    discard = [path for path in self.discard if path != checkpoint]
                    rotate(out, self.args.save_total_limit or len(checkpoints(out)), discard)
            finally:
                shutil.rmtree(beside, ignore_errors=True)

        on_main(finish)
        self.discard = []

    def _state_to_save(self, held_out: float | None) -> dict[str, Any]:
        record, step = self.record, self.state.global_step
        loss = held_out if held_out is not None else record.losses[-1] if record.losses else float("nan")
        good = record.baseline is not None and self.guard.is_good(loss, record.baseline)
        stream = self.train_dataset if self.moved is None else self.moved
        place = place_after(stream, step * self.sequences)
        saved = {"step": step, "sequences": step * self.sequences, "place": place, "held_out": held_out, "good": good}
        return record.to_json() | saved


class Baseline(TrainerCallback):
    """Measures the untouched model's loss before the first step."""

    trainer: RemovalTrainer

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0 and self.trainer.record.baseline is None:
            self.trainer.record.baseline = self.trainer.held_out_loss()


def remove_layernorm(
    model: PreTrainedModel,
    tokenizer,
    dataset,
    schedule: RemovalSchedule,
    out: str | Path,
    *,
    resume: bool = False,
    batch_size: int | None = None,
    dtype: str = "float32",
    device: str | None = None,
    seed: int = 0,
    callbacks: Sequence[TrainerCallback] = (),
    note: dict | None = None,
    held_out: Int[Tensor, "batch pos"] | int | None = None,
    control: str | Path | None = None,
    guard: Guard | None = None,
    **training: Any,
) -> PreTrainedModel:
    """Fine-tune a GPT-2 while its LayerNorms are removed; write and return the LN-free model. (P1, P2)

    Trains without dropout: it would add to the variance that the frozen stds are averages of, and no token is
    seen often enough to overfit. A loss that does not come back takes the run back to its last good checkpoint, with
    the next removal later; SIGTERM saves at the next step, then interrupts.

    Args:
        model: trained in place, in float32; afterwards it is no longer the model it was.
        tokenizer: saved along; its eos_token_id marks end-of-text tokens.
        dataset: map-style or iterable, of {"input_ids": Int[Tensor, "pos"]}, all of schedule.block_size.
        schedule: `schedule.vanilla()` trains the control instead; with `distillation`, a copy of the model as it is
            given stays beside it, whole on each device even where the model is sharded.
        out: directory of the run: checkpoint-N/ while it lasts, final/ in the end.
        resume: go on from the newest whole checkpoint in `out`, with the removal exactly where it was; start, if there
            is none yet; return the model, if the run is finished.
        batch_size: sequences per device and forward, 16 or what fits best below; gradients are accumulated to
            schedule.tokens_per_step.
        dtype: "float32", or "bfloat16" for autocast with float32 weights.
        device: "cpu", "cuda" or "mps"; None: the best there is.
        note: kept with the run's settings, for whoever reads them.
        held_out: blocks that are not trained on, to measure the loss on, or how many of them the dataset sets aside;
            None: some, if it can (`set_aside`).
        control: directory of the vanilla run that an adaptive schedule compares its loss with.
        guard: when to go back, and when to give up; None: Guard().
        training: passed on to TrainingArguments (save_steps, gradient_checkpointing, ...).

    Raises:
        ValueError: schedule, model, data, control and directory do not fit together; the disk refuses.
        Diverged: the loss did not come back, however often the run went back.
        KeyboardInterrupt: the run was interrupted, or asked to stop by SIGTERM.

    Example:
        >>> import tempfile
        >>> from dataclasses import replace
        >>> from lnfree_interp import RemovalSchedule, read_documents, remove_layernorm, token_blocks
        >>> from lnfree_interp.data import Blocks
        >>> from lnfree_interp.finetune import load_trainable
        >>> from lnfree_interp.names import VALIDATION_TEXT
        >>> from lnfree_interp.layernorm import is_ln_free
        >>> model, tokenizer = load_trainable("tiny")
        >>> data = Blocks(token_blocks(tokenizer, read_documents(VALIDATION_TEXT), 64))
        >>> schedule = replace(RemovalSchedule.preset("tiny").scaled(20), tokens_per_step=128, block_size=64)
        >>> quiet = {"logging_strategy": "no", "save_strategy": "no", "disable_tqdm": True}
        >>> with tempfile.TemporaryDirectory() as folder:  # doctest: +ELLIPSIS
        ...     plain = remove_layernorm(model, tokenizer, data, schedule, folder, device="cpu", **quiet)
        {'train_runtime': ...}
        >>> is_ln_free(plain.config, plain.state_dict())
        True
    """
    check_saved(model, "model")
    check_saved(tokenizer, "tokenizer")
    one_of(schedule, "schedule", RemovalSchedule, "a RemovalSchedule")
    read = hasattr(dataset, "__getitem__") or hasattr(dataset, "__iter__")
    if not read or isinstance(dataset, (str, Mapping, Tensor)):
        raise ValueError(f"dataset must be blocks of token ids, such as data.Blocks, not {kind(dataset)}")
    out, seed, resume = Path(as_path(out, "out")), whole(seed, "seed", least=0), switch(resume, "resume")
    guard = Guard() if guard is None else one_of(guard, "guard", Guard, "a Guard")
    for callback in one_of(callbacks, "callbacks", (list, tuple), "a list of TrainerCallbacks"):
        one_of(callback, "each of callbacks", TrainerCallback, "a TrainerCallback")
    if note is not None:
        one_of(note, "note", dict, "a dict")
    if held_out is not None and not isinstance(held_out, Tensor):
        held_out = whole(held_out, "held_out", least=0)
    elif held_out is not None:
        as_ids(held_out, "held_out")
    if control is not None:
        as_path(control, "control")
    if getattr(model, "loss_type", None) is None:
        model.loss_type = "ForCausalLM"  # what transformers takes for a GPT-2, with a warning
    eot = tokenizer.eos_token_id
    config, layers = copy.deepcopy(model.config), n_layers(model)
    sequences = schedule.tokens_per_step // schedule.block_size
    n_blocks = len(dataset) if hasattr(dataset, "__len__") else None
    if control is None and schedule.pace == "adaptive" and schedule.order:
        raise ValueError("adaptive schedule needs control=, the directory of a vanilla run of the same data and seed")
    arguments = training_arguments(config, layers, schedule, out, batch_size, dtype, device, n_blocks)
    decided = sorted(training.keys() & (arguments.keys() | {"seed", "num_train_epochs", "lr_scheduler_type"}))
    if decided:
        raise ValueError(f"{', '.join(decided)}: the schedule or a parameter of its own says this")
    check_directory(out, resume)
    pin = {"dataloader_pin_memory": device != "cpu" and torch.cuda.is_available()}
    training_args = TrainingArguments(**{**DEFAULTS, **pin, **training, **arguments, "seed": seed})
    if training_args.parallel_mode.value == "not_distributed":
        training_args._n_gpu = 1  # several GPUs are for torchrun: DataParallel's replicas lose the statistics

    untouched = dataset
    n_aside, blocks = 0, None
    if isinstance(held_out, Tensor):
        blocks = held_out
    elif held_out is not None:
        n_aside = held_out
    elif hasattr(dataset, "set_aside"):
        n_aside = blocks_to_set_aside(n_blocks, sequences)
    if n_aside:
        blocks, dataset = dataset.set_aside(n_aside)
    settings = run_settings(model, untouched, n_aside, schedule, seed, dtype, training_args)
    losses = [] if control is None else on_main(lambda: control_losses(control, settings, schedule.steps))
    if schedule.pace == "adaptive":
        settings["control"] = losses_hash(losses[: schedule.steps])
    checkpoint = on_main(lambda: _begin(out, resume, settings, note))
    if resume and finished(out):
        return type(model).from_pretrained(out / "final").eval()

    ready(model)
    # Of the weights that the run begins with, also where it is resumed: the checkpoint's are read later.
    teacher = make_teacher(model) if schedule.distillation else None
    if schedule.order:
        make_removable(model, eot=eot, massive=schedule.massive)
    record = Record(schedule, layers, held_out=blocks, control=losses)
    removal, baseline = RemovalCallback(record), Baseline()
    trainer = RemovalTrainer(
        model,
        training_args,
        train_dataset=dataset,
        data_collator=collate,
        processing_class=tokenizer,
        callbacks=[baseline, removal, StopWhenAsked(record), LossGuard(guard, record), *callbacks],
        record=record,
        guard=guard,
        sequences=sequences,
        teacher=teacher,
    )
    baseline.trainer = trainer
    for callback in callbacks:
        if isinstance(callback, StatusLine):
            callback.record = record
            trainer.remove_callback(PrinterCallback)
            trainer.remove_callback(DEFAULT_PROGRESS_CALLBACK)  # in notebooks another than elsewhere
    _train(trainer, checkpoint, out, removal)

    final = export_ln_free(model, config) if schedule.order else plain_model(config, plain_state(model))
    state = record.to_json() | {"step": trainer.state.global_step, "rollbacks": read_json(out / ROLLBACKS) or []}
    on_main(lambda: save_checkpoint(final, tokenizer, out / "final", state))
    return final


def blocks_to_set_aside(n_blocks: int | None, sequences: int) -> int:
    """How many blocks: few of a small data set, and none that a step needs."""
    return HELD_OUT if n_blocks is None else max(0, min(HELD_OUT, n_blocks // PART, n_blocks - sequences))


def _begin(out: Path, resume: bool, settings: dict, note: dict | None) -> Path | None:
    """The checkpoint to go on from; the directory is there and says what the run is."""
    if resume:
        with as_value_error(f"use {out}"):
            check_same_run(out, settings)
        if finished(out):
            return None
    checkpoint = checkpoint_to_resume(out, resume)
    with as_value_error(f"use {out}"):
        out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(out / WRITING, ignore_errors=True)
    if not checkpoint:
        (out / ROLLBACKS).unlink(missing_ok=True)  # of a run that was never saved
    write_json(out / RUN, {"settings": settings, "note": note or {}})
    return checkpoint


def _train(trainer: RemovalTrainer, checkpoint: Path | None, out: Path, removal: RemovalCallback) -> None:
    """To the end of the schedule, from a checkpoint and, where the loss asks for it, from an earlier one again."""
    record = trainer.record
    with asked_by_sigterm(record):
        while True:
            record.restore(checkpoint, out)
            trainer.begin = 0 if checkpoint is None else steps_of(checkpoint)
            place = None if checkpoint is None else state_in(checkpoint).get("place")
            stream: Any = trainer.train_dataset
            trainer.moved = None if place is None else stream.go_on(place)
            newer = checkpoints(out) if checkpoint is None else checkpoints(out)[: checkpoints(out).index(checkpoint)]
            trainer.discard = newer
            trainer.args.max_steps = record.length()
            if checkpoint is not None and trainer.begin >= record.length():
                # All that is missing is the export; Trainer would train a step more.
                trainer._load_from_checkpoint(str(checkpoint))
                trainer.state.global_step = trainer.begin
                removal.apply(trainer.model, trainer.begin)
                return
            try:
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
                break
            except Suspicion as suspicion:
                run = (record.schedule, record.n_layer, record.progress, trainer.state.global_step, record.losses)
                checkpoint, line = on_main(partial(roll_back, out, trainer.guard, *run, str(suspicion)))
                say(line)
    if record.stopping:
        raise KeyboardInterrupt
