"""The papers' loss table: mean losses of several models, and their gaps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..arguments import one_of, sampling
from ..results import Result, counted, drawing
from ..statistics import mean_interval
from .loss import LossEvaluation, floats


@dataclass(frozen=True, repr=False)
class LossTable(Result):
    """Mean losses of several models on the same tokens and their gaps to a baseline, in nats per token.

    Attributes:
        names: the models.
        mean: Float[Tensor, "model"].
        baselines: for each model the name of the one it is compared with, or None.
        gap: Float[Tensor, "model"], mean minus the baseline's; nan without one.
        low, high: Float[Tensor, "model"], 95% interval of the gap over sequences, the same ones drawn for
            both models.
    """

    names: tuple[str, ...]
    mean: Float[Tensor, " model"]
    baselines: tuple[str | None, ...]
    gap: Float[Tensor, " model"]
    low: Float[Tensor, " model"]
    high: Float[Tensor, " model"]

    def summary(self) -> str:
        """One line: the models' mean losses."""
        losses = ", ".join(f"{name} {mean:.4f}" for name, mean in zip(self.names, self.mean.tolist()))
        return f"of {counted(len(self.names), 'model')}, nats per token: {losses}"

    def picture(self) -> str:
        """The table, and bars of the gaps."""
        from ..figures.measured_pictures import of_loss_table

        return of_loss_table(self)

    def plot(self):
        """A figure of plotly: each model's mean loss, and the gaps to the baselines with their intervals.

        Raises:
            ImportError: there is no plotly.
        """
        with drawing():
            from ..figures.evaluate import loss_table_figure

        return loss_table_figure(self)

    def table(self):
        """One row per model; the column `loss` reads like the papers' table, "2.8757 (+0.0645)"."""
        import pandas as pd

        loss = [
            f"{mean:.4f}" if baseline is None else f"{mean:.4f} ({gap:+.4f})"
            for mean, gap, baseline in zip(self.mean.tolist(), self.gap.tolist(), self.baselines)
        ]
        return pd.DataFrame(
            {
                "model": self.names,
                "loss": loss,
                "gap_to": [baseline or "" for baseline in self.baselines],
                "gap": self.gap.tolist(),
                "gap_low": self.low.tolist(),
                "gap_high": self.high.tolist(),
            }
        )


def loss_table(
    evaluations: Mapping[str, LossEvaluation], baselines: Mapping[str, str | None], *, draws: int = 1000, seed: int = 0
) -> LossTable:
    """The papers' loss table: mean losses with gaps, for LN-free models to their fine-tuned control.

    Args:
        evaluations: name -> result, all on the same tokens.
        baselines: name -> name of the model to compare with; absent or None: no gap.

    Raises:
        ValueError: a baseline that was not evaluated, evaluations on different numbers of tokens.

    Example:
        >>> import torch
        >>> from lnfree_interp import evaluate_loss, load_model, loss_table
        >>> tokens = torch.arange(64).view(4, 16)
        >>> names = ["tiny-vanilla", "tiny-noLN"]
        >>> results = {name: evaluate_loss(load_model(name, device="cpu"), tokens) for name in names}
        >>> loss_table(results, {"tiny-noLN": "tiny-vanilla"}).baselines
        (None, 'tiny-vanilla')
    """
    bounds: list[tuple[float, float, float]] = []
    drawn = sampling(draws, seed)
    for what, given in (("evaluations", evaluations), ("baselines", baselines)):
        one_of(given, what, Mapping, "a mapping of names")
    for name, result in evaluations.items():
        one_of(result, f"evaluations[{name!r}]", LossEvaluation, "a LossEvaluation, as evaluate_loss gives it")
        baseline = baselines.get(name)
        if baseline is None:
            bounds.append((torch.nan, torch.nan, torch.nan))
            continue
        if not isinstance(baseline, str) or baseline not in evaluations:
            raise ValueError(f"baselines: baseline {baseline!r} of {name} is not among {', '.join(evaluations)}")
        shapes = [[len(e.per_sequence), e.losses.shape[1]] for e in (result, evaluations[baseline])]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{name} was evaluated on {shapes[0]} predictions, {baseline} on {shapes[1]}")
        difference = result.per_sequence - evaluations[baseline].per_sequence
        low, high = floats(mean_interval(difference.numpy(), **drawn))
        bounds.append((difference.mean().item(), low, high))
    gaps, lows, highs = torch.tensor(bounds, dtype=torch.float64).view(-1, 3).unbind(1)
    return LossTable(
        names=tuple(evaluations),
        mean=torch.tensor([e.mean for e in evaluations.values()], dtype=torch.float64),
        baselines=tuple(baselines.get(name) for name in evaluations),
        gap=gaps,
        low=lows,
        high=highs,
    )
