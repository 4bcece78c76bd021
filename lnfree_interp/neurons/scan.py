"""All neurons of the last layer on a block of tokens: series where they are certified, exact sums elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .last_layer import Change, Neurons, Rows, Unembedding, changes, target_change
from .moments import LEVELS, STREAM_COST, Key, central, error_bound, keys, matrix_moments, row_moments, series, undone
from .streaming import stream

# Pairs whose series are evaluated at a time: some twenty tables of so many numbers are alive at once, on the CPU in
# cache.
PAIRS_AT_ONCE, GPU_PAIRS_AT_ONCE = 2**16, 2**22
Share = Callable[[float], object]
"""Told the share of the work that is done."""


@dataclass(frozen=True)
class BlockScan:
    """Changes on one block of tokens (nats): total and frozen, the same tensors without a final norm."""

    loss: Float[Tensor, "row neuron"]
    entropy: Float[Tensor, "row neuron"]
    loss_frozen: Float[Tensor, "row neuron"]
    entropy_frozen: Float[Tensor, "row neuron"]
    streamed: Bool[Tensor, "row neuron"]
    bound: Float[Tensor, ""]  # no series is further off


def scan_block(
    unembedding: Unembedding,
    rows: Rows,
    neurons: Neurons,
    da: Float[Tensor, "row neuron"],
    *,
    tolerance: float,
    method: str = "moments",
    share: Share | None = None,
) -> BlockScan:
    """Change of loss and entropy when each neuron alone changes by da.

    Args:
        tolerance: largest error of a series (nats).
        method: "moments", or "stream" for exact sums throughout.
    """
    total, frozen = changes(unembedding, rows, neurons, da)
    kinds = [total] if total is frozen else [total, frozen]
    done = _Work(share, 0.7 if method == "moments" else 0.0)
    # logsumexp of the changed logits less that of the old ones and alpha mean_m, and the entropy's change
    log_a, entropy = ([torch.zeros_like(kind.t) for kind in kinds] for _ in range(2))
    left, bound = [torch.ones_like(kind.t, dtype=torch.bool) for kind in kinds], total.t.new_zeros(())
    if method == "moments":
        left, bound = _by_series(unembedding, rows, neurons, kinds, tolerance, log_a, entropy, done)
    for i, change in enumerate(kinds):
        grown, changed = stream(unembedding, rows, neurons, change, left[i], done.stage(i, len(kinds)))
        log_a[i] = torch.where(left[i], grown, log_a[i])
        entropy[i] = torch.where(left[i], changed, entropy[i])
    if share is not None:
        share(1.0)
    loss = [grown - target_change(unembedding, rows, neurons, change) for grown, change in zip(log_a, kinds)]
    return BlockScan(loss[0], entropy[0], loss[-1], entropy[-1], left[0] | left[-1], bound)


def _by_series(unembedding, rows: Rows, neurons: Neurons, kinds: list[Change], tolerance, log_a, entropy, done):
    """Fills log_a and entropy; returns each kind's pairs that are not certified, and the largest bound of the rest."""
    own = row_moments(unembedding, rows, len(kinds) > 1)
    n_rows, device = len(rows.x), neurons.w.device
    active = torch.arange(len(neurons.w), device=device)
    left = [torch.ones(n_rows, len(active), dtype=torch.bool, device=device) for _ in kinds]
    raw: dict[Key, Tensor] = {}
    largest = neurons.w.new_zeros(())
    at_once = PAIRS_AT_ONCE if device.type == "cpu" else GPU_PAIRS_AT_ONCE
    for level, powers in enumerate(LEVELS):
        wanted = [key for key in keys(powers, len(kinds) > 1) if key not in raw]
        chosen, height = neurons[active], max(1, at_once // len(active))
        raw |= matrix_moments(unembedding, rows, chosen.w, wanted, done.part(level, len(LEVELS)))
        following = LEVELS[level + 1] if level + 1 < len(LEVELS) else None
        spared = torch.zeros(len(active), device=device)
        for part in (slice(i, i + height) for i in range(0, n_rows, height)):
            moments = central({key: value[part] for key, value in raw.items()}, own[part], chosen)
            for i, kind in enumerate(kinds):
                change = kind[part, active]
                grown, changed = series(moments, change, powers)
                log_a[i][part, active] = grown + change.t * moments.raw[0, 0, 1]
                entropy[i][part, active] = changed
                size = error_bound(moments, change, powers, grown - changed)
                left[i][part, active] = missing = undone(size, tolerance)
                largest = torch.maximum(largest, size.masked_fill(missing, 0.0).max())
                if following is not None:
                    ahead = undone(error_bound(moments, change, following), tolerance)
                    spared += missing.sum(0) - ahead.sum(0)
        if following is None:
            break
        # The next level is for the neurons whose exact sums it would spare are worth its matrix products.
        price = sum(key not in raw for key in keys(following, len(kinds) > 1)) * n_rows
        keep = (spared * STREAM_COST > price).nonzero()[:, 0]
        if len(keep) == 0:
            break
        active, raw = active[keep], {key: value[:, keep] for key, value in raw.items()}
    return left, largest


class _Work:
    """Shares of the work done, for a progress bar: series first, then exact sums."""

    def __init__(self, share: Share | None, series: float):
        self.share, self.series = share, series

    def part(self, i: int, n: int) -> Share | None:
        return self._between(self.series * i / n, self.series * (i + 1) / n)

    def stage(self, i: int, n: int) -> Share | None:
        rest = 1 - self.series
        return self._between(self.series + rest * i / n, self.series + rest * (i + 1) / n)

    def _between(self, low: float, high: float) -> Share | None:
        if (told := self.share) is None:
            return None
        return lambda share: told(low + (high - low) * share)
