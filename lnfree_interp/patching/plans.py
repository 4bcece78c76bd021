"""Which cells a budget pays for, which are drawn at random of the rest, and what these say of the error left there."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..statistics import ratio, ratio_interval

SHARE = 0.1
"""Of the budget, for cells drawn at random, by which the error left is measured; up to half of it goes to them where
that pays for fewer than DRAWN."""
DRAWN, MOST_DRAWS = 10, 10_000


@dataclass(frozen=True)
class ErrorLeft:
    """What is still wrong after screening, by a random sample of the cells that were not flagged, run exactly too.

    Attributes:
        relative: sum |estimate - exact| over the cells that are still estimates / sum |exact| over all cells, effects
            as shares of each prompt's total effect: `patching_error`'s. nan if nothing could be drawn.
        interval: its 95% interval, over which cells were drawn; it holds from about ten of them on, unless a few cells
            are wrong by much that are thought to be small. nan if fewer than two were drawn.
        drawn: how many cells it is measured on.
        left: how many are still estimates.
    """

    relative: float
    interval: tuple[float, float]
    drawn: int
    left: int


@dataclass(frozen=True)
class Plan:
    """Which cells are run.

    Attributes:
        flagged: those of the largest scores.
        draws: those drawn at random of the rest, as places in the flattened cells, some of them drawn repeatedly.
        chance: with which probability a draw is of each cell; 0 where nothing is left to be known.
    """

    flagged: Bool[Tensor, "prompt _ *cell"]
    draws: Int[Tensor, " draw"]
    chance: Float[Tensor, "prompts _ *cell"]  # of one prompt, if cells are drawn for all of them

    @property
    def drawn(self) -> Bool[Tensor, "prompt _ *cell"]:
        return _mask(self.chance, self.draws).expand(self.flagged.shape) & ~self.flagged

    @property
    def run(self) -> Bool[Tensor, "prompt _ *cell"]:
        return self.flagged | self.drawn


def planned(
    score: Float[Tensor, "prompt _ *cell"],
    size: Float[Tensor, "prompt _ *cell"],
    price: Float[Tensor, "prompt _ *cell"],
    budget: float,
    *,
    together: bool,
    counts: Bool[Tensor, " prompt"] | None = None,
    whole_draws: bool = False,
    share: float | int = SHARE,
    seed: int = 0,
) -> Plan:
    """The cells of the largest scores that the budget pays for, but for its share for a random sample of the others.

    Half of the draws are of the rest as it is, half in proportion to size: errors are large where effects are.

    Args:
        size: what is thought to be there, in the units in which the error is measured.
        price: 0 for cells that need no run.
        together: cells are flagged for all prompts or for none, by their mean score.
        counts: the prompts whose errors count; None: all.
        whole_draws: cells are drawn so, too.
    """
    grouped = _summed if together else _each
    prices = grouped(price)
    order = grouped(score).flatten().argsort(descending=True, stable=True)
    order = order[prices.flatten()[order] > 0]
    sample = _for_sample(_summed(price) if whole_draws else price, budget, share)
    everything = float(price.sum()) <= budget
    paid = order if everything else _paid(order, prices.flatten(), budget - sample)
    flagged = _mask(prices, paid).expand(price.shape) & (price > 0)
    grouped = _summed if whole_draws else _each
    unflagged = (price > 0) & ~flagged
    open_ = unflagged if counts is None else unflagged & counts.view(-1, *[1] * (price.ndim - 1))
    pool, size, price = grouped(open_.double()) > 0, grouped(size * open_), grouped(price * unflagged)
    chance = _share(_share(pool) + _share(size))
    rest = budget - float(prices.flatten()[paid].sum())
    draws = _draws(chance.flatten(), price.flatten(), rest if share else 0.0, seed)
    return Plan(flagged, draws, chance)


def _mask(like: Tensor, chosen: Tensor) -> Tensor:
    mask = torch.zeros(like.numel(), dtype=torch.bool)
    mask[chosen] = True
    return mask.view(like.shape)


def _paid(order: Tensor, prices: Tensor, budget: float) -> Tensor:
    """As many as the budget pays, in order; what is too dear is passed over."""
    chosen = []
    while len(order):
        cost = prices[order].cumsum(0)
        n = int((cost <= budget).sum())
        chosen.append(order[:n])
        budget -= float(cost[n - 1]) if n else 0.0
        order = order[n:]
        order = order[prices[order] <= budget]
    return torch.cat(chosen) if chosen else order


def _for_sample(price: Tensor, budget: float, share: float | int) -> float:
    """What of the budget goes to the sample."""
    dear = price[price > 0]
    if not share or not len(dear):
        return 0.0
    return max(share * budget, min(DRAWN * float(dear.mean()), budget / 2))


def _each(x: Tensor) -> Tensor:
    return x


def _summed(x: Tensor) -> Tensor:
    return x.sum(0, keepdim=True)


def _share(x: Tensor) -> Tensor:
    total = x.double().sum()
    return x / total if total > 0 else torch.zeros_like(x, dtype=torch.float64)


def _draws(chance: Tensor, price: Tensor, budget: float, seed: int) -> Int[Tensor, " draw"]:
    """Draws, with replacement, until the next one is too dear; what is drawn again costs nothing more."""
    expected = float((chance * price).sum())
    most = int(min(2 * budget / expected, MOST_DRAWS)) if expected > 0 and budget > 0 else 0
    if not most:
        return torch.zeros(0, dtype=torch.long)
    draws = torch.multinomial(chance, most, replacement=True, generator=torch.Generator().manual_seed(seed))
    first = torch.zeros(most, dtype=torch.bool)
    first[torch.from_numpy(np.unique(draws.numpy(), return_index=True)[1])] = True
    return draws[: int(((price[draws] * first).cumsum(0) <= budget).sum())]


def error_left(
    values: Float[Tensor, "prompt _ *cell"],
    exact: Float[Tensor, "prompt _ *cell"],
    plan: Plan,
    weight: Float[Tensor, " prompt"],
    *,
    seed: int = 0,
) -> ErrorLeft:
    """The error of the estimates that are left, from those that were drawn.

    Args:
        exact: what was run; anything elsewhere.
        weight: of each prompt; 0: it does not count.
    """
    weight = weight.view(-1, *[1] * (values.ndim - 1))
    error, size = (torch.where(plan.run, x.abs() * weight, 0.0) for x in (values - exact, exact))
    flagged = float(size[plan.flagged].sum())
    error, size = ((x * ~plan.flagged).sum(0) if len(plan.chance) < len(x) else x for x in (error, size))
    distinct = plan.draws.unique()
    left = int((plan.chance > 0).sum()) - len(distinct)
    if not left:
        return ErrorLeft(0.0, (0.0, 0.0), len(distinct), 0)
    if not len(distinct):
        return ErrorLeft(math.nan, (math.nan, math.nan), 0, left)
    # Each draw by itself says what the whole error and size of the cells not flagged are, unbiased; what is drawn is
    # exact and no longer wrong.
    chance = plan.chance.flatten()[plan.draws]
    errors, sizes = (x.flatten()[plan.draws] / chance for x in (error, size))
    a, b = (errors - error.flatten()[distinct].sum()).numpy(), (sizes + flagged).numpy()
    bounds = ratio_interval(a, b, seed=seed) if len(distinct) > 1 else (math.nan, math.nan)
    low, high = (float(np.maximum(bound, 0)) for bound in bounds)
    return ErrorLeft(max(0.0, float(ratio(a.sum(), b.sum()))), (low, high), len(distinct), left)
