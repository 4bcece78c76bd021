"""Bootstrap intervals over sequences or prompts, studentised so that they hold with few of them.

Tokens of one sequence are not independent, so sequences are drawn whole. Quantiles of the drawn estimates themselves
cover too little with few sequences (84 to 89% in place of 95% with 8 of them, BCa no more): they forget that the
spread is estimated too. Here each draw's distance from the estimate is measured in that draw's own standard error, and
the quantiles of those t are what the interval is made of (Efron 1981; Davison and Hinkley 1997, section 5.2.1). With
fewer than FEWEST sequences the draws repeat each other too much for that, and Student's t is taken in their place.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Real

from .arguments import sampling

FEWEST = 6
LEVELS = (0.025, 0.975)
# Weights of draws held at a time.
WEIGHTS_AT_ONCE = 2**22
# The largest t that is told from infinity.
FAR = 1e6

Array = np.ndarray
Estimates = tuple[Array, Array]
"""Estimates of each draw, [draw, *what], and their standard errors."""


def interval(statistic: Callable[..., Estimates], *sizes: int, draws: int = 1000, seed: int = 0) -> tuple[Array, Array]:
    """95% interval (low, high) of a statistic of n sequences, by studentised bootstrap.

    Args:
        statistic: weights [draw, n], how often each sequence is drawn, to (estimates, standard errors), each
            [draw, *what]. With several sizes it is given weights for each: two ways in which the data vary.
        sizes: n; nan is returned if one of them is below 2.
        draws: bootstrap draws.
        seed: of the draws.

    Raises:
        ValueError: draws is not positive.
    """
    sampling(draws, seed)
    estimate, error = (x[0] for x in statistic(*(np.ones((1, n)) for n in sizes)))
    least = min(sizes)
    if least < 2:
        return np.full_like(estimate, np.nan), np.full_like(estimate, np.nan)
    if least < FEWEST:
        from scipy.stats import t as student

        low, high = (np.full_like(estimate, q) for q in student.ppf(LEVELS, least - 1))
    else:
        random, step, distances = np.random.default_rng(seed), max(1, WEIGHTS_AT_ONCE // max(sizes)), []
        for start in range(0, draws, step):
            rows = min(step, draws - start)
            drawn, errors = statistic(*(random.multinomial(n, [1 / n] * n, size=rows).astype(float) for n in sizes))
            with np.errstate(invalid="ignore", divide="ignore"):
                distances.append(np.where(drawn == estimate, 0.0, (drawn - estimate) / errors))
        t = np.concatenate(distances)
        undefined = np.isnan(t).all(0)
        # Infinite distances, of draws without spread, count as the largest there are.
        t = np.where(undefined, 0.0, np.clip(t, -FAR, FAR))
        low, high = np.nanquantile(t, LEVELS, axis=0)
        low, high = (np.where(undefined, np.nan, x) for x in (low, high))
    with np.errstate(invalid="ignore"):
        return tuple(np.where(error == 0, estimate, estimate - t * error) for t in (high, low))


def mean_interval(values: Float[Array, "n ..."], *, draws: int = 1000, seed: int = 0) -> tuple[Array, Array]:
    """95% interval of means over sequences.

    Args:
        values: one number per sequence (and whatever else).

    Example:
        >>> low, high = mean_interval(np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]))
        >>> bool(low < 3.5 < high)
        True
    """
    values = np.asarray(values, dtype=float)
    n = len(values)
    centre = values.mean(0)  # against cancellation
    flat = (values - centre).reshape(n, -1)

    def statistic(weights: Array) -> Estimates:
        mean = weights @ flat / n
        variance = (weights @ flat**2 / n - mean**2).clip(0)
        shape = (-1, *values.shape[1:])
        return centre + mean.reshape(shape), np.sqrt(variance / max(1, n - 1)).reshape(shape)

    return interval(statistic, n, draws=draws, seed=seed)


def ratio(numerator: Array | np.number, denominator: Array | np.number) -> Array:
    """Their quotient, 0 where both are 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(numerator == 0, 0.0, numerator / denominator)


def ratio_interval(
    numerator: Real[Array, "n ..."], denominator: Real[Array, "n ..."], *, draws: int = 1000, seed: int = 0
) -> tuple[Array, Array]:
    """95% interval of sum(numerator) / sum(denominator), one of each per sequence; never below 0 if none of them is."""
    a, b = (np.asarray(x, dtype=float) for x in (numerator, denominator))
    n, shape = len(a), (-1, *a.shape[1:])
    flat_a, flat_b = a.reshape(n, -1), b.reshape(n, -1)

    def statistic(weights: Array) -> Estimates:
        total = weights @ flat_b
        estimate = ratio(weights @ flat_a, total)
        # Of a - R b, whose sum is 0.
        squares = (
            weights @ flat_a**2 - 2 * estimate * (weights @ (flat_a * flat_b)) + estimate**2 * (weights @ flat_b**2)
        )
        error = ratio(np.sqrt(squares.clip(0) * n / max(1, n - 1)), np.abs(total))
        return estimate.reshape(shape), error.reshape(shape)

    return _not_below_zero(interval(statistic, n, draws=draws, seed=seed), a, b)


def ratio_interval_of_two_ways(
    numerator: Float[Array, "unit n"], denominator: Float[Array, "unit n"], *, draws: int = 1000, seed: int = 0
) -> tuple[Array, Array]:
    """95% interval of a ratio of sums where both the units (heads, say) and the sequences are a sample.

    Both are drawn (Owen 2007); the standard error counts what units share, what sequences share, and once less what
    both do (Cameron, Gelbach and Miller 2011).
    """
    a, b = (np.asarray(x, dtype=float) for x in (numerator, denominator))
    factors = [size / max(1, size - 1) for size in a.shape]

    def statistic(of_units: Array, of_sequences: Array) -> Estimates:
        def total(x: Array) -> Array:
            return np.einsum("du,un,dn->d", of_units, x, of_sequences, optimize=True)

        size = total(b)
        estimate = ratio(total(a), size)
        by_unit = of_sequences @ a.T - estimate[:, None] * (of_sequences @ b.T)
        by_sequence = of_units @ a - estimate[:, None] * (of_units @ b)
        units = factors[0] * (of_units * by_unit**2).sum(1)
        sequences = factors[1] * (of_sequences * by_sequence**2).sum(1)
        both = total(a**2) - 2 * estimate * total(a * b) + estimate**2 * total(b**2)
        variance = np.maximum(units + sequences - both, np.maximum(units, sequences))
        return estimate, ratio(np.sqrt(variance.clip(0)), np.abs(size))

    return _not_below_zero(interval(statistic, *a.shape, draws=draws, seed=seed), a, b)


def _not_below_zero(bounds: tuple[Array, Array], a: Array, b: Array) -> tuple[Array, Array]:
    low, high = bounds
    return np.where((low < 0) & (a >= 0).all() & (b >= 0).all(), 0.0, low), high


def correlation(x: Float[Array, "n cell"], y: Float[Array, "n cell"]) -> float:
    """Pearson correlation over all cells of all sequences; nan if one is constant."""
    return float(_correlations(x, y)(np.ones((1, len(x))))[0][0])


def correlation_interval(
    x: Float[Array, "n cell"], y: Float[Array, "n cell"], *, draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95% interval of that correlation over sequences, on Fisher's scale; with 8 of them it covers about 90%."""
    estimates = _correlations(x, y)

    def statistic(weights: Array) -> Estimates:
        r, error = estimates(weights)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.arctanh(r), np.where(error == 0, 0.0, error / (1 - r**2))

    low, high = (float(np.tanh(bound)) for bound in interval(statistic, len(x), draws=draws, seed=seed))
    return low, high


def _correlations(x: Array, y: Array) -> Callable[[Array], Estimates]:
    """Weights to correlations and their standard errors, from what each sequence adds to each moment."""
    x, y = (np.asarray(v, dtype=float) - np.mean(v) for v in (x, y))  # against cancellation
    n, cells = x.shape
    sx, sy, sxx, syy, sxy = (v.sum(1) for v in (x, y, x * x, y * y, x * y))

    def of(weights: Array) -> Estimates:
        w = weights / (weights.sum(1, keepdims=True) * cells)
        mx, my = w @ sx, w @ sy
        vx, vy = w @ sxx - mx**2, w @ syy - my**2
        scale = np.sqrt((vx * vy).clip(0))
        with np.errstate(invalid="ignore", divide="ignore"):
            r = np.where((vx > 0) & (vy > 0), ((w @ sxy - mx * my) / scale).clip(-1, 1), np.nan)
            mx, my, vx, vy, scale, half = (v[:, None] for v in (mx, my, vx, vy, scale, r / 2))
            cx, cy = sxx - 2 * mx * sx + cells * mx**2, syy - 2 * my * sy + cells * my**2
            cxy = sxy - mx * sy - my * sx + cells * mx * my
            influence = (cxy / scale - half * (cx / vx + cy / vy)) / cells
            error = np.sqrt((weights * influence**2).sum(1) * n / max(1, n - 1)) / n
        # A perfect correlation has no spread; what is left of it is rounding.
        return r, np.where(np.abs(r) > 1 - 1e-12, 0.0, error)

    return of
