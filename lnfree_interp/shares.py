"""Intervals of shares, where what is counted comes in clusters: prompts of one answer are not independent."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

Array = np.ndarray
# Of a normal distribution, 95% are within so many standard deviations.
NORMAL = 1.959964


def share_interval(hits: Float[Array, "cluster ..."], counts: Float[Array, " cluster"]) -> tuple[Array, Array]:
    """95% interval of sum(hits) / sum(counts): Wilson's, of as many prompts as the spread between clusters leaves.

    Bootstrap intervals are of no use where a share is 0 or 1, or where few clusters have hits; Wilson's hold there. The
    variance between clusters over that of independent prompts (the design effect, Kish 1965) divides the prompts.

    Example:
        >>> low, high = share_interval(np.array([0.0, 0.0]), np.array([10.0, 10.0]))
        >>> float(low), round(float(high), 3)
        (0.0, 0.161)
    """
    n = counts.sum()
    counts_of = counts.reshape(-1, *[1] * (hits.ndim - 1))
    p = hits.sum(0) / n
    k = len(counts)
    between = ((hits - p * counts_of) ** 2).sum(0) / n**2 * (k / max(1, k - 1))
    with np.errstate(invalid="ignore", divide="ignore"):
        effect = np.where(p * (1 - p) > 0, between * n / (p * (1 - p)), 1.0)
    size = n / np.maximum(effect, 1.0)
    z2 = NORMAL**2 / size
    centre = (p + z2 / 2) / (1 + z2)
    half = NORMAL * np.sqrt((p * (1 - p) + z2 / 4) / size) / (1 + z2)
    low, high = (np.asarray(np.clip(centre + sign * half, 0, 1)) for sign in (-1, 1))
    return low, high
