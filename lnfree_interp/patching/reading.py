"""The metric read off final residual streams, some rows at a time, and whether it is one of each row alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..forward import unembed
from ..layers import wide
from ..lens import LensModel
from ..metrics import Metric
from ..pairs import PromptPairs
from ..weights import Norm
from .cells import Request, Tally, on_device

LOGITS = {"cpu": 2**26, "cuda": 2**28}
"""How many logits, or numbers of gathered columns of W_U, are made at a time; 2^26 on other devices."""

Sample = tuple[Tensor, Tensor, Tensor]
"""A row of logits, of which prompt it is, and what the metric made of it among others."""


def read_metric(
    model: LensModel,
    request: Request,
    pairs: PromptPairs,
    final: Tensor,
    prompt: Tensor,
    norm: Norm,
    tally: Tally | None = None,
    sample: list[Sample] | None = None,
) -> Tensor:
    """The metric of final residual streams [row, read position, d_model] of the prompts named, one number a row.

    Args:
        sample: given the last row or, if it has one, the first: for `check_rows`.

    Raises:
        ValueError: the metric's value has the wrong shape. Whether it is finite, `check_finite` says.
    """
    metric, device = request.metric, final.device
    n_rows, n_reads = final.shape[:2]
    d_model, d_vocab = model.unembed.W_U.shape
    columns = metric.columns(pairs)
    width = d_vocab if columns is None else columns.shape[1]
    if tally:
        tally.linear(n_rows * n_reads, d_model, width)
    step = max(1, LOGITS.get(device.type, 2**26) // (n_reads * width * (1 if columns is None else d_model)))
    values: list[Tensor] = []
    for rows, p in zip(final.split(step), prompt.split(step)):
        tokens = None if columns is None else columns[p][:, None].expand(-1, n_reads, -1)
        logits = wide(unembed(model, rows, tokens, norm=norm))
        one = slice(0, 1) if sample else slice(-1, None)
        row = None if sample is None or values else logits[one].detach().clone()  # a metric may write into its logits
        values.append(_value(metric, logits, p))
        if sample is not None and row is not None:
            sample.append((row, p[one], values[0][one].detach()))
    return torch.cat(values)


def _value(metric: Metric, logits: Tensor, prompt: Tensor) -> Tensor:
    """The metric of logits [row, read position, token] of the prompts named."""
    n = len(logits)
    try:
        value = metric.function(logits, *(c[prompt] for c in metric.context))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ValueError(_not_by_row(metric, f"fails on {n} rows ({reason})")) from error
    if isinstance(value, Tensor) and value.ndim == 1:
        if len(value) != n:
            raise ValueError(_not_by_row(metric, f"returns {len(value)} numbers for {n} rows"))
        return wide(value)
    got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
    raise ValueError(f"metric {metric.name} returned {got} for {n} rows, wanted is one number each")


@torch.no_grad()
def check_rows(metric: Metric, sample: Sequence[Sample]) -> None:
    """Raise ValueError unless a row of each run has the same number in another order, repeated and alone."""
    logits, prompt, values = (torch.cat(parts) for parts in zip(*sample))
    size = torch.stack([*logits.aminmax(), *values.aminmax()]).abs().nan_to_num(0, 0).max()
    tolerance = 1024 * torch.finfo(values.dtype).eps * size  # of rounding
    same = []
    for order in ([1, 0, 1], [0]):
        rows = on_device(torch.tensor(order), logits.device)
        value = _value(metric, logits[rows], prompt[rows])
        same.append(((value - values[rows]).abs() <= tolerance) | ~torch.isfinite(value))
    if not torch.cat(same).all():
        raise ValueError(_not_by_row(metric, "gives the same rows other numbers in another order or number"))


def _not_by_row(metric: Metric, what: str) -> str:
    return (
        f"metric {metric.name} {what}, as one does that depends on other prompts or on their place: its rows are "
        "prompts in any order and number. What it needs of each prompt a Metric tells it: Metric('mine', lambda "
        "logits: logits[:, -1, 0] - logits[:, -1, 1], tokens='answers'), or context= with tensors of one row per prompt"
    )


def check_finite(request: Request, values: Tensor, what: str = "", first: int = 0) -> None:
    """Raise ValueError unless the metric's values [prompt, ...] are finite.

    Args:
        what: what of the metric they are.
        first: the number of the first prompt.
    """
    bad = ~torch.isfinite(values)
    if bad.any():
        prompt = int(bad.flatten(1).any(1).int().argmax()) if bad.ndim > 1 else int(bad.int().argmax())
        value = values[bad][0].item()
        name = f"{what} metric {request.metric.name}".lstrip()
        raise ValueError(f"{name} is {value} for prompt {first + prompt}, it must be finite")
