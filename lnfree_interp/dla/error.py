"""How far an attribution is from the effect it approximates."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..statistics import ratio, ratio_interval, ratio_interval_of_two_ways
from .result import LogitAttribution

# The attention heads' labels, the components that P2 pools.
HEADS = r"L\d+H\d+"


@dataclass(frozen=True)
class AttributionError:
    """Normalised mean absolute error of one attribution against another.

    Attributes:
        pooled: mean|approximate - exact| / mean|exact| over all components and samples (P2's pooled NMAE).
        interval: its 95% interval over components and sequences; nan for a single one of either.
        labels: components, aligned with the next three.
        per_component: Float[Tensor, "component"], the same ratio for each component alone.
        low, high: Float[Tensor, "component"], its 95% interval over sequences.
    """

    pooled: float
    interval: tuple[float, float]
    labels: tuple[str, ...]
    per_component: Float[Tensor, " component"]
    low: Float[Tensor, " component"]
    high: Float[Tensor, " component"]

    def table(self):
        """One row per component: NMAE and its interval; the pooled one first."""
        import pandas as pd

        return pd.DataFrame(
            {
                "component": ["pooled", *self.labels],
                "nmae": [self.pooled, *self.per_component.tolist()],
                "low": [self.interval[0], *self.low.tolist()],
                "high": [self.interval[1], *self.high.tolist()],
            }
        )


def attribution_error(
    approximate: LogitAttribution,
    exact: LogitAttribution,
    *,
    components: str | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> AttributionError:
    """Normalised mean absolute error: mean|approximate - exact| / mean|exact|, pooled and per component.

    Args:
        approximate, exact: results for the same components, sequences and positions.
        components: regular expression that a label must match in full; None for all, `dla.HEADS` for the
            attention heads the paper pools.
        draws: bootstrap draws (`statistics`). Sequences are drawn whole, since tokens of one sequence are not
            independent; the pooled interval draws components too (P2, section 4).

    Raises:
        ValueError: the two do not align, or no label matches.

    Example:
        >>> from lnfree_interp import attribution_error, direct_effect, direct_logit_attribution, load_model
        >>> model = load_model("tiny-noLN", device="cpu")
        >>> tokens = model.to_tokens("It was a dark and stormy")
        >>> approximate, exact = (f(model, tokens) for f in (direct_logit_attribution, direct_effect))
        >>> f"{attribution_error(approximate, exact).pooled:.2%}"
        '0.00%'
    """
    if approximate.labels != exact.labels or approximate.values.shape != exact.values.shape:
        raise ValueError(
            f"attributions do not align: {list(approximate.values.shape)} {approximate.labels[:2]} and "
            f"{list(exact.values.shape)} {exact.labels[:2]}"
        )
    chosen = [i for i, label in enumerate(exact.labels) if components is None or re.fullmatch(components, label)]
    if not chosen:
        raise ValueError(f"no component matches {components!r}; there are {', '.join(exact.labels[:3])}, ...")
    a, e = (r.values[chosen].cpu().double() for r in (approximate, exact))
    difference, size = ((x.abs().sum(-1).numpy()) for x in (a - e, e))  # [component, batch]
    pooled = ratio_interval_of_two_ways(difference, size, draws=draws, seed=seed)
    per_component = ratio_interval(difference.T, size.T, draws=draws, seed=seed)
    low, high = (torch.from_numpy(bound) for bound in per_component)
    return AttributionError(
        pooled=float(ratio(difference.sum(), size.sum())),
        interval=(float(pooled[0]), float(pooled[1])),
        labels=tuple(exact.labels[i] for i in chosen),
        per_component=torch.from_numpy(ratio(difference.sum(1), size.sum(1))),
        low=low,
        high=high,
    )
