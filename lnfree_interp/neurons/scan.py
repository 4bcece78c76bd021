"""All neurons of the last layer on a block of tokens: series where they are certified, exact sums elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .last_layer import Change, Progress, Rows, Unembedding, changes, stream, target_change, v_range
from .moments import (
    LEVELS,
    STREAM_COST,
    Central,
    Key,
    RowMoments,
    central,
    error_bound,
    keys,
    matrix_moments,
    row_moments,
    series,
    undone,
)

# Neurons whose series are evaluated at a time: some twenty tables of this width are alive at once.
NEURONS_AT_ONCE = 512


@dataclass(frozen=True)
class BlockScan:
    """Changes on one block of tokens (nats): total and frozen, the same tensors without a final norm."""

    loss: Float[Tensor, "row neuron"]
    entropy: Float[Tensor, "row neuron"]
    loss_frozen: Float[Tensor, "row neuron"]
    entropy_frozen: Float[Tensor, "row neuron"]
    streamed: Bool[Tensor, "row neuron"]
    bound: float


def scan_block(
    unembedding: Unembedding,
    rows: Rows,
    w: Float[Tensor, "neuron d_model"],
    da: Float[Tensor, "row neuron"],
    *,
    tolerance: float,
    method: str = "moments",
    progress: Progress | None = None,
) -> BlockScan:
    """Change of loss and entropy when each neuron alone changes by da.

    Args:
        w: the neurons' output weights, centred where the final norm centres.
        tolerance: largest truncation error of a series (nats).
        method: "moments", or "stream" for exact sums throughout.
    """
    total, frozen = changes(unembedding, rows, w, da)
    kinds = [total] if total is frozen else [total, frozen]
    done = _Work(progress, 0.7 if method == "moments" else 0.0)
    log_a = [torch.zeros_like(da) for _ in kinds]  # logsumexp of the changed logits less the old one
    entropy = [torch.zeros_like(da) for _ in kinds]
    left, bound = torch.ones_like(da, dtype=torch.bool), 0.0
    if method == "moments":
        left, bound = _by_series(unembedding, rows, w, kinds, tolerance, log_a, entropy, done)
    if left.any():
        for i, change in enumerate(kinds):
            grown, new = stream(unembedding, rows, w, change, left, done.stage(i, len(kinds)))
            log_a[i] = torch.where(left, grown, log_a[i])
            entropy[i] = torch.where(left, new - rows.entropy[:, None], entropy[i])
    loss = [grown - target_change(unembedding, rows, w, change) for grown, change in zip(log_a, kinds)]
    return BlockScan(loss[0], entropy[0], loss[-1], entropy[-1], left, bound)


def _by_series(unembedding, rows: Rows, w, kinds: list[Change], tolerance, log_a, entropy, done):
    """Fills log_a and entropy; returns which pairs are not certified, and the largest bound among those that are."""
    extremes = v_range(unembedding, w)
    own = row_moments(unembedding, rows, len(kinds) > 1)
    active = torch.arange(len(w), device=w.device)
    left = torch.ones(len(rows.x), len(w), dtype=torch.bool, device=w.device)
    raw: dict[Key, Tensor] = {}
    largest = 0.0
    for level, powers in enumerate(LEVELS):
        wanted = [key for key in keys(powers, len(kinds) > 1) if key not in raw]
        raw |= matrix_moments(unembedding, rows, w[active], wanted, done.part(level, len(LEVELS)))
        following = LEVELS[level + 1] if level + 1 < len(LEVELS) else None
        gain = []
        for columns in torch.arange(len(active), device=w.device).split(NEURONS_AT_ONCE):
            where = active[columns]
            moments = _central_of(raw, own, extremes, columns, where)
            parts = [change.neurons(where) for change in kinds]
            size = torch.zeros_like(parts[0].t)
            ahead = torch.zeros_like(size)
            for i, change in enumerate(parts):
                grown, changed = series(moments, change, powers)
                shift = change.t * moments.raw[0, 0, 1]
                if change.alpha is not None:
                    shift = shift + change.alpha * rows.mean_m[:, None]
                log_a[i][:, where], entropy[i][:, where] = grown + shift, changed
                size = torch.maximum(size, error_bound(moments, change, powers, grown - changed))
                if following is not None:
                    ahead = torch.maximum(ahead, error_bound(moments, change, following))
            left[:, where] = missing = undone(size, tolerance)
            if not missing.all():
                largest = max(largest, size[~missing].max().item())
            gain.append((missing.sum(0) - undone(ahead, tolerance).sum(0)) * STREAM_COST * len(kinds))
        if following is None:
            break
        # The next level is for the neurons whose exact sums it would spare are worth its matrix products.
        price = sum(key not in raw for key in keys(following, len(kinds) > 1)) * len(rows.x)
        keep = (torch.cat(gain) > price).nonzero()[:, 0]
        if len(keep) == 0:
            break
        active, raw = active[keep], {key: value[:, keep] for key, value in raw.items()}
    return left, largest


def _central_of(raw: dict[Key, Tensor], own: RowMoments, extremes, columns, where) -> Central:
    part = {key: value[:, columns] for key, value in raw.items()}
    return central(part, own, (extremes[0][where], extremes[1][where]))


class _Work:
    """Shares of the work done, for a progress bar: series first, then exact sums."""

    def __init__(self, progress: Progress | None, series: float):
        self.progress, self.series = progress, series

    def part(self, i: int, n: int) -> Progress | None:
        return self._between(self.series * i / n, self.series * (i + 1) / n)

    def stage(self, i: int, n: int) -> Progress | None:
        rest = 1 - self.series
        return self._between(self.series + rest * i / n, self.series + rest * (i + 1) / n)

    def _between(self, low: float, high: float) -> Progress | None:
        if self.progress is None:
            return None
        return lambda share: self.progress(low + (high - low) * share)
