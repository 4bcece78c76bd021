"""Removal as a run of HF's Trainer."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ..schedule import RemovalSchedule
from .callbacks import LossGuard, RemovalCallback, StatusLine, last_checkpoint, steps_of
from .export import export_ln_free, plain_model, plain_state
from .removable import auxiliary_loss, final_norm, make_removable
from .trainable import ready

# The flag's name in TrainingArguments: transformers is about to rename it.
CHECKPOINTING = (
    "activation_checkpointing"
    if "activation_checkpointing" in {field.name for field in fields(TrainingArguments)}
    else "gradient_checkpointing"
)
# Sequences per device and forward, at most, where nothing is said.
DEFAULT_BATCH = 16


class RemovalTrainer(Trainer):
    """Trainer plus the auxiliary loss; logs cross-entropy "ce" and unweighted auxiliary loss "aux"."""

    model: Any  # made removable

    def __init__(self, *args, auxiliary_weight: float | int = 0.0, eot: int = -1, **kwargs):
        super().__init__(*args, **kwargs)
        self.auxiliary_weight, self.eot = auxiliary_weight, eot
        self._sums: dict[str, Tensor] = {}
        self._summed_from: int | None = None

    def _add(self, name: str, value: Tensor) -> None:
        if self._summed_from is None:
            self._summed_from = self.state.global_step
        self._sums[name] = self._sums.get(name, 0.0) + value.detach()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            self._add("ce", loss)
            ln_f = final_norm(self.model)
            if getattr(ln_f, "std", None) is not None:
                # The cross-entropy comes as this micro-batch's share of the step's mean; so must this.
                share = 1 / self.current_gradient_accumulation_steps
                auxiliary = auxiliary_loss(ln_f.std, ln_f.target) * share
                ln_f.std = None
                self._add("aux", auxiliary)
                loss = loss + self.auxiliary_weight * auxiliary
        return (loss, outputs) if return_outputs else loss

    def log(self, logs, start_time=None):
        if "loss" in logs and self._sums:
            steps = max(1, self.state.global_step - (self._summed_from or 0))
            for name, value in self._sums.items():
                logs[name] = self.accelerator.reduce(value, reduction="mean").item() / steps
            self._sums, self._summed_from = {}, None
        super().log(logs, start_time)


def save_checkpoint(model: PreTrainedModel, tokenizer, directory: str | Path) -> None:
    """Write model and tokenizer as an HF directory: beside first, then renamed; it is whole or not there."""
    directory = Path(directory)
    beside = directory.with_name(f".{directory.name}.writing")
    shutil.rmtree(beside, ignore_errors=True)
    model.save_pretrained(beside)
    if tokenizer is not None:
        tokenizer.save_pretrained(beside)
    if directory.exists():
        shutil.rmtree(directory)
    os.replace(beside, directory)


def checkpoint_to_resume(out: str | Path, resume: bool) -> Path | None:
    """The checkpoint a run in `out` goes on from; None for a new run.

    Raises:
        ValueError: what the directory holds and `resume` do not fit.
    """
    out, kept = Path(out), last_checkpoint(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is not a directory")
    finished = (out / "final").exists()
    if not resume and (kept or finished):
        raise ValueError(f"{out} already holds a run: resume it, or choose another directory")
    if resume and finished:
        raise ValueError(f"the run in {out} is finished: nothing to resume")
    if resume and kept is None:
        raise ValueError(f"nothing to resume in {out}: it holds no checkpoint")
    return kept


def _check_same_run(out: Path, settings: dict) -> None:
    before = json.loads((out / "run.json").read_text()) if (out / "run.json").exists() else {}
    for name, value in settings.items():
        if before.get(name, value) != value:
            raise ValueError(f"cannot resume {out}: {name} was {before[name]}, now {value}")


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
    **training_arguments,
) -> PreTrainedModel:
    """Fine-tune a GPT-2 while its LayerNorms are removed; write and return the LN-free model. (P1, P2)

    Trains without dropout: it would add to the variance that the frozen stds are averages of, and no token is
    seen often enough to overfit.

    Args:
        model: trained in place, in float32; afterwards it is no longer the model it was.
        tokenizer: saved along; its eos_token_id marks end-of-text tokens.
        dataset: map-style or iterable, of {"input_ids": Int[Tensor, "pos"]}, all of schedule.block_size.
        schedule: `schedule.vanilla()` trains the control instead.
        out: directory of the run: checkpoint-N/ while it lasts, final/ in the end.
        resume: go on from the last checkpoint in `out`, with the removal exactly where it was.
        batch_size: sequences per device and forward, 16 or what fits best below; gradients are accumulated to
            schedule.tokens_per_step.
        dtype: "float32", or "bfloat16" for autocast with float32 weights.
        device: "cpu", "cuda" or "mps"; None: the best there is.
        note: kept with the run's settings, all of which a resumed run must share.
        training_arguments: passed on to TrainingArguments (save_steps, gradient_checkpointing, ...).

    Raises:
        ValueError: schedule, model, data and directory do not fit together.
        Diverged: the loss is not finite, or exploded.

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
        >>> quiet = {"logging_strategy": "no", "disable_tqdm": True}
        >>> with tempfile.TemporaryDirectory() as folder:  # doctest: +ELLIPSIS
        ...     plain = remove_layernorm(model, tokenizer, data, schedule, folder, device="cpu", **quiet)
        {'loss': ...
        {'train_runtime': ...}
        >>> is_ln_free(plain.config, plain.state_dict())
        True
    """
    out, config, eot = Path(out), copy.deepcopy(model.config), tokenizer.eos_token_id
    n_blocks = len(dataset) if hasattr(dataset, "__len__") else None
    arguments = _arguments(config, schedule, out, batch_size, dtype, device, n_blocks)
    checkpoint = checkpoint_to_resume(out, resume)
    batch_size = arguments["per_device_train_batch_size"]
    settings = {"schedule": asdict(schedule), "seed": seed, "batch_size": batch_size, **(note or {})}
    settings = json.loads(json.dumps(settings))  # tuples as the lists they are read back as
    if resume:
        _check_same_run(out, settings)

    ready(model)
    if schedule.order:
        make_removable(model, eot=eot)
    removal = RemovalCallback(schedule)
    training = TrainingArguments(**{"seed": seed, **arguments, **training_arguments})
    if training.parallel_mode.value == "not_distributed":
        training._n_gpu = 1  # several GPUs are for torchrun: DataParallel's replicas lose the statistics
    trainer = RemovalTrainer(
        model,
        training,
        train_dataset=dataset,
        data_collator=_collate,
        processing_class=tokenizer,
        callbacks=[removal, LossGuard(), *callbacks],
        auxiliary_weight=schedule.auxiliary_weight,
        eot=eot,
    )
    if any(isinstance(callback, StatusLine) for callback in callbacks):
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
    if trainer.is_world_process_zero():
        out.mkdir(parents=True, exist_ok=True)
        (out / "run.json").write_text(json.dumps(settings, indent=1))
    if checkpoint is not None and steps_of(checkpoint) >= schedule.steps:
        # All that is missing is the export; Trainer would train a step more.
        trainer._load_from_checkpoint(str(checkpoint))
        removal.apply(model, schedule.steps, out)
    else:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))

    final = export_ln_free(model, config) if schedule.order else plain_model(config, plain_state(model))
    if trainer.is_world_process_zero():
        save_checkpoint(final, tokenizer, out / "final")
    return final


def _arguments(config, schedule: RemovalSchedule, out: Path, batch_size, dtype, device, n_blocks) -> dict:
    """TrainingArguments' of a schedule; ValueError where it, model, data and machine do not fit together."""
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"unknown dtype {dtype!r}: choose float32 or bfloat16")
    if device not in (None, "cpu", "cuda", "mps"):
        raise ValueError(f"unknown device {device!r}: choose cpu, cuda or mps")
    if device in ("cuda", "mps") and not getattr(torch, device).is_available():
        raise ValueError(f"device {device} is not available")
    schedule.events(config.num_hidden_layers)  # raises where they do not fit into the steps
    if schedule.block_size > config.max_position_embeddings:
        raise ValueError(f"schedule has blocks of {schedule.block_size}, model has {config.max_position_embeddings}")
    sequences, world = schedule.tokens_per_step // schedule.block_size, int(os.environ.get("WORLD_SIZE", 1))
    if n_blocks is not None and n_blocks < sequences:
        raise ValueError(
            f"text is too short: {n_blocks} blocks of {schedule.block_size} tokens, a step needs {sequences}"
        )
    if sequences % world:
        raise ValueError(f"{sequences} sequences per step do not divide among {world} processes")
    share = sequences // world
    if batch_size is None:
        batch_size = max(n for n in range(1, min(DEFAULT_BATCH, share) + 1) if share % n == 0)
    if batch_size < 1 or share % batch_size:
        raise ValueError(f"batch size {batch_size} does not divide the {share} sequences of a step")
    return {
        "output_dir": str(out),
        "max_steps": schedule.steps,
        "use_cpu": device == "cpu",
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": share // batch_size,
        "learning_rate": schedule.learning_rate,
        "warmup_steps": schedule.warmup_steps,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr": schedule.min_learning_rate},
        "weight_decay": schedule.weight_decay,
        "max_grad_norm": schedule.max_grad_norm,
        "bf16": dtype == "bfloat16",
        "optim": "adamw_torch_fused",
        "remove_unused_columns": False,
        "dataloader_drop_last": True,
        "dataloader_pin_memory": device != "cpu" and torch.cuda.is_available(),
        "save_steps": 50,
        "save_total_limit": 2,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "report_to": [],
        "ddp_find_unused_parameters": False,
    }


def _collate(examples: list[dict]) -> dict[str, Tensor]:
    tokens = torch.stack([torch.as_tensor(example["input_ids"]) for example in examples])
    labels = tokens.clone()
    labels[:, 0] = -100  # no position predicts it; unmasked, Trainer would count it and shrink the mean
    return {"input_ids": tokens, "labels": labels}
