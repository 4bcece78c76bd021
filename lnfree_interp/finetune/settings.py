"""What a run is, so that only the same run is resumed, and a control compared with its like."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..arguments import as_path, choice, whole
from ..data import blocks_hash
from ..distributed import world_size
from ..schedule import RemovalSchedule
from .saving import RUN, STATE, checkpoints, fault, read_json

# Sequences per device and forward, at most, where nothing is said.
DEFAULT_BATCH = 16
# Fields of a schedule that a control does not share: what is removed when.
REMOVAL = (
    "start gaps order by layers position0_gap massive massive_gap auxiliary_weight auxiliary_until momentum "
    "distillation pace margin smoothing patience settle"
).split()
# What runs of versions that did not know a field of the schedule did.
BEFORE = {"pace": "fixed", "massive": None, "distillation": 0.0}
OPTIMISER = ("optim", "adam_beta1", "adam_beta2", "adam_epsilon")


def run_settings(model: nn.Module, dataset, set_aside: int, schedule, seed: int, dtype: str, training) -> dict:
    """The fields a run must share to be resumed. No path, device, number of processes or micro-batch is among them.

    Args:
        set_aside: how many blocks of the dataset are held out.
        training: the run's TrainingArguments.
    """
    fields = {**asdict(schedule), "seed": seed, "dtype": dtype}
    fields |= {"data": fingerprint(dataset), "set_aside": set_aside, "model": weights_hash(model)}
    fields |= {name: str(getattr(training, name)) for name in OPTIMISER}
    if schedule.pace == "adaptive":  # it looks at the loss as often as this
        fields["logging_steps"] = training.logging_steps
    return json.loads(json.dumps(fields, default=str))  # tuples as the lists they are read back as


def fingerprint(dataset) -> str | None:
    """Of the tokens of a dataset, whatever holds them; None: nobody knows without reading a stream to its end."""
    own = getattr(dataset, "fingerprint", None)
    if own is not None:
        return str(own)
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        return None
    if hasattr(dataset, "with_format"):  # of `datasets`, which gives many rows at once in a thirtieth of the time
        rows = dataset.with_format("torch", columns=["input_ids"])
        return blocks_hash(rows[i : i + 512]["input_ids"] for i in range(0, len(rows), 512))
    return blocks_hash(torch.as_tensor(dataset[i]["input_ids"])[None] for i in range(len(dataset)))


@torch.no_grad()
def weights_hash(model: nn.Module) -> str:
    """Of all weights, with their names and shapes."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def differences(before: Mapping[str, Any], now: Mapping[str, Any], leave_out: Iterable[str] = ()) -> list[str]:
    """ "learning_rate was 0.001, now 0.002" for each field that both know and that differs."""
    changed, skip = [], set(leave_out)
    for name, value in now.items():
        old = before.get(name)
        if name in skip or name not in before or old == value or (name == "data" and None in (old, value)):
            continue
        if isinstance(value, dict) and isinstance(old, dict):
            keys = [key for key in value if old.get(key) != value[key]]
            changed += [f"{name} of {key} was {old.get(key)}, now {value[key]}" for key in keys]
        else:
            changed.append(f"{name} was {_short(name, old)}, now {_short(name, value)}")
    return changed


def _short(name: str, value) -> str:
    return f"{str(value)[:12]}..." if name in ("data", "model", "control") else f"{value}"


def stored_settings(out: Path) -> dict | None:
    """Of a run that is there; of an older version's what is comparable. None: there is no run.json."""
    stored = read_json(out / RUN)
    if stored is None:
        return None
    try:
        if "settings" in stored:
            return {**BEFORE, **stored["settings"]}
        return {**BEFORE, **stored["schedule"], "seed": stored["seed"]}
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{out / RUN} does not say what the run is") from None


def check_same_run(out: Path, settings: dict) -> None:
    """Raises:
    ValueError: `out` holds a run of other settings; each that differs is named.
    """
    changed = differences(stored_settings(out) or {}, settings)
    if changed:
        raise ValueError(f"cannot resume {out}: {'; '.join(changed)}")


def losses_in(directory: Path) -> list[float]:
    """The training cross-entropy (nats) of each step that a checkpoint, or a final directory, has behind it.

    Of a version that kept no such list, the logged means, each for the steps it is of.
    """
    state = read_json(directory / STATE)
    if state is not None:
        return [float(loss) for loss in state["ce"]]
    losses: list[float] = []
    for log in (read_json(directory / "trainer_state.json") or {}).get("log_history", ()):
        if "ce" in log:
            losses += [float(log["ce"])] * (log["step"] - len(losses))
    return losses


def control_losses(control: str | Path, settings: dict, steps: int) -> list[float]:
    """The losses of a vanilla run, step by step, to compare a removal's with.

    Raises:
        ValueError: there is no such run, it is another's control, removes something, or is too short.
    """
    control = Path(as_path(control, "control"))
    before = stored_settings(control) if control.is_dir() else None
    if before is None:
        raise ValueError(f"control {control} is no directory of a run: there is no {RUN} in it")
    if before.get("order"):
        raise ValueError(f"control {control} removes LayerNorms: a vanilla run is needed")
    changed = differences(before, settings, leave_out=(*REMOVAL, "logging_steps", "control"))
    if changed:
        raise ValueError(f"control {control} is of another run: {'; '.join(changed)}")
    found = [control / "final", *checkpoints(control)]
    losses = next((losses for path in found if fault(path) is None and (losses := losses_in(path))), [])
    if len(losses) < steps:
        raise ValueError(f"control {control} has the losses of {len(losses)} steps, {steps} are needed")
    return losses


def losses_hash(losses: Sequence[float]) -> str:
    return hashlib.sha256(json.dumps(list(losses)).encode()).hexdigest()


def training_arguments(
    config, n_layer: int, schedule: RemovalSchedule, out: Path, batch_size, dtype, device, n_blocks
) -> dict[str, Any]:
    """TrainingArguments' of a schedule; ValueError where it, model, data and machine do not fit together."""
    choice(dtype, "dtype", ("float32", "bfloat16"))
    if device is not None:
        choice(device, "device", ("cpu", "cuda", "mps"))
    if device in ("cuda", "mps") and not getattr(torch, device).is_available():
        raise ValueError(f"device {device} is not available")
    schedule.events(n_layer)  # raises where they do not fit into the steps
    context = config.max_position_embeddings
    if schedule.block_size > context:
        raise ValueError(f"schedule has blocks of {schedule.block_size}, model has {context}")
    sequences, world = schedule.tokens_per_step // schedule.block_size, world_size()
    if n_blocks is not None and n_blocks < sequences:
        raise ValueError(
            f"text is too short: {n_blocks} blocks of {schedule.block_size} tokens, a step needs {sequences}"
        )
    if sequences % world:
        raise ValueError(f"{sequences} sequences per step do not divide among {world} processes")
    share = sequences // world
    if batch_size is None:
        batch_size = max(n for n in range(1, min(DEFAULT_BATCH, share) + 1) if share % n == 0)
    if share % whole(batch_size, "batch_size", least=1):
        raise ValueError(f"batch size {batch_size} does not divide the {share} sequences of a step")
    return {
        "output_dir": str(out),
        "max_steps": schedule.steps,
        # Said where there is nothing else too: in bfloat16 the Trainer wants to hear it.
        "use_cpu": device == "cpu" or not (torch.cuda.is_available() or torch.backends.mps.is_available()),
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": share // batch_size,
        "learning_rate": schedule.learning_rate,
        "warmup_steps": schedule.warmup_steps,
        "weight_decay": schedule.weight_decay,
        "max_grad_norm": schedule.max_grad_norm,
        "bf16": dtype == "bfloat16",
        "ignore_data_skip": True,  # the order of the data begins at the right step by itself
    }


# What may be said otherwise.
DEFAULTS: dict[str, Any] = {
    "optim": "adamw_torch_fused",
    "remove_unused_columns": False,
    "save_steps": 50,
    "save_total_limit": 2,
    "logging_steps": 1,
    "logging_nan_inf_filter": False,
    "report_to": [],
    "ddp_find_unused_parameters": False,
}
