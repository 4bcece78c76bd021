"""How far an attribution is from the effect it approximates."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..arguments import as_text, one_of, sampling, whole
from ..results import Result, counted, drawing
from ..statistics import ratio, ratio_interval, ratio_interval_of_two_ways
from .result import LogitAttribution

# The attention heads' labels, the components that P2 pools.
HEADS = r"L(\d+)H(\d+)"
# Sequences whose sums are held apart; of more, some share a place, so that memory does not grow with them.
PLACES = 2**12


@dataclass(frozen=True, repr=False)
class AttributionError(Result):
    """Normalised mean absolute error of one attribution against another.

    Attributes:
        pooled: mean|approximate - exact| / mean|exact| over all components and samples (P2's pooled NMAE).
        interval: its 95% interval over components and sequences; nan for a single one of either.
        labels: components, aligned with the next three.
        per_component: Float[Tensor, "component"], the same ratio for each component alone.
        low, high: Float[Tensor, "component"], its 95% interval over sequences.
        model: whose attributions.
    """

    pooled: float
    interval: tuple[float, float]
    labels: tuple[str, ...]
    per_component: Float[Tensor, " component"]
    low: Float[Tensor, " component"]
    high: Float[Tensor, " component"]
    model: str = ""

    def summary(self) -> str:
        """One line: the pooled error and its interval."""
        between = (
            "" if self.interval[0] != self.interval[0] else f" (95% {self.interval[0]:.2%} to {self.interval[1]:.2%})"
        )
        model = f" in {self.model}" if self.model else ""
        over = counted(len(self.labels), "component")
        return f"of attributions against effects{model}: NMAE {self.pooled:.2%}{between} over {over}"

    def picture(self) -> str:
        """Bars of the pooled error and of the components with the largest; of heads a grid."""
        from ..figures.pictures import of_errors

        return of_errors(self)

    def plot(self, *, top: int = 30):
        """A figure of plotly: the `top` components with the largest errors, and their intervals.

        Raises:
            ImportError: there is no plotly.
        """
        with drawing():
            from ..figures.dla import errors_figure

        return errors_figure(self, whole(top, "top", least=1))

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
    for what, given in (("approximate", approximate), ("exact", exact)):
        one_of(given, what, LogitAttribution, "a LogitAttribution")
    drawn = sampling(draws, seed)
    if approximate.labels != exact.labels or approximate.values.shape != exact.values.shape:
        raise ValueError(
            f"attributions do not align: {list(approximate.values.shape)} {approximate.labels[:2]} and "
            f"{list(exact.values.shape)} {exact.labels[:2]}"
        )
    chosen = _matching(exact.labels, components)
    sums = no_sums(tuple(exact.labels[i] for i in chosen), exact.values.shape[1])
    add(sums, approximate.values[chosen], exact.values[chosen])
    model = exact.prompts.model if exact.prompts else ""
    return error_of(sums, draws=drawn["draws"], seed=drawn["seed"], model=model)


def _matching(labels: tuple[str, ...], components: str | None) -> list[int]:
    if components is None:
        return list(range(len(labels)))
    try:
        pattern = re.compile(as_text(components, "components"))
    except re.error as error:
        raise ValueError(f"components {components!r} is no regular expression: {error}") from None
    chosen = [i for i, label in enumerate(labels) if pattern.fullmatch(label)]
    if not chosen:
        raise ValueError(f"no component matches {components!r}; there are {', '.join(labels[:3])}, ...")
    return chosen


# ---------------------------------------------------------------------------------------------------------
# The same of tokens that stream by


@dataclass(frozen=True)
class ErrorSums:
    """What `AttributionError` needs of attributions, and their means: filled by `add`, sequences after sequences.

    Parts of a set of sequences add up to the whole (`merged`), whatever the split.

    Attributes:
        difference, size: Float[np.ndarray, "component place"], sums of |approximate - exact| and of |exact| over the
            tokens of the sequences at each place: one sequence, or with more sequences than places every so-manyth,
            which the bootstrap then draws together.
        totals: Float[np.ndarray, "two component"], sums of approximate and exact over all tokens.
        tokens: Int[np.ndarray, ""], how many those are.
    """

    labels: tuple[str, ...]
    difference: Float[np.ndarray, "component place"]
    size: Float[np.ndarray, "component place"]
    totals: Float[np.ndarray, "two component"]
    tokens: Int[np.ndarray, ""]

    def means(self) -> Float[np.ndarray, "two component"]:
        """Mean approximate and exact attribution."""
        return self.totals / self.tokens


def no_sums(labels: tuple[str, ...], n_sequences: int) -> ErrorSums:
    """Sums of nothing as yet, with room for so many sequences in all, those of other processes included."""
    places = np.zeros((2, len(labels), min(n_sequences, PLACES)))
    return ErrorSums(labels, places[0], places[1], np.zeros((2, len(labels))), np.zeros((), int))


def add(
    sums: ErrorSums,
    approximate: Float[Tensor, "component batch pos"],
    exact: Float[Tensor, "component batch pos"],
    *,
    first: int = 0,
) -> None:
    """Count in the attributions of sequences of which the first is number `first` of all."""
    a, e = (values.cpu().double() for values in (approximate, exact))
    places = np.arange(first, first + a.shape[1]) % sums.size.shape[1]
    for held, x in ((sums.difference, a - e), (sums.size, e)):
        np.add.at(held.T, places, x.abs().sum(-1).numpy().T)
    sums.totals[:] += torch.stack([a, e]).sum((2, 3)).numpy()
    sums.tokens[...] += a[0].numel()


def merged(parts: Sequence[ErrorSums]) -> ErrorSums:
    """The sums of a set of sequences from those of its parts."""
    names = ("difference", "size", "totals", "tokens")
    sums = (np.sum([getattr(part, name) for part in parts], axis=0) for name in names)
    return ErrorSums(parts[0].labels, *(np.asarray(x) for x in sums))


def error_of(
    sums: ErrorSums, *, components: str | None = None, draws: int = 1000, seed: int = 0, model: str = ""
) -> AttributionError:
    """`attribution_error` of what was summed."""
    chosen = _matching(sums.labels, components)
    difference, size = sums.difference[chosen], sums.size[chosen]
    pooled = ratio_interval_of_two_ways(difference, size, draws=draws, seed=seed)
    per_component = ratio_interval(difference.T, size.T, draws=draws, seed=seed)
    low, high = (torch.from_numpy(bound) for bound in per_component)
    return AttributionError(
        pooled=float(ratio(difference.sum(), size.sum())),
        interval=(float(pooled[0]), float(pooled[1])),
        labels=tuple(sums.labels[i] for i in chosen),
        per_component=torch.from_numpy(ratio(difference.sum(1), size.sum(1))),
        low=low,
        high=high,
        model=model,
    )
