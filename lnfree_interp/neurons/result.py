"""What ablating neurons does."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class NeuronAblation:
    """Changes of cross-entropy and entropy by ablations, token by token, in nats.

    Positions are those that have a next token. Total effects let the final norm's scale follow; frozen ones keep
    it as it was. Their difference is what acts through the scale: exactly 0 without a final norm.

    Attributes:
        labels: one per ablation: "L11N584", or "+L11N584" where it comes on top of those before it.
        loss: Float[Tensor, "ablation batch pos"], change of the cross-entropy, total.
        entropy: the same for the entropy of the prediction.
        loss_frozen, entropy_frozen: the same with the final norm's scale frozen.
        baseline_loss, baseline_entropy: Float[Tensor, "batch pos"], without any ablation.
        streamed: share of (neuron, token) pairs that were summed over the whole vocabulary one by one; the rest
            are series.
        bound: no series is further off than this, rounding included; 0 if there are none.
    """

    labels: tuple[str, ...]
    loss: Float[Tensor, "ablation batch pos"]
    entropy: Float[Tensor, "ablation batch pos"]
    loss_frozen: Float[Tensor, "ablation batch pos"]
    entropy_frozen: Float[Tensor, "ablation batch pos"]
    baseline_loss: Float[Tensor, "batch pos"]
    baseline_entropy: Float[Tensor, "batch pos"]
    streamed: float = 1.0
    bound: float = 0.0

    def table(self):
        """One row per ablation: for loss and entropy mean, mean and median size, and mean sizes of both parts."""
        import pandas as pd

        table = pd.DataFrame({"neuron": self.labels})
        for quantity in ("loss", "entropy"):
            total = getattr(self, quantity).flatten(1)
            frozen = getattr(self, f"{quantity}_frozen").flatten(1)
            size = total.abs()
            table[quantity] = total.double().mean(1).tolist()
            table[f"{quantity}_abs"] = size.double().mean(1).tolist()
            table[f"{quantity}_abs_median"] = size.median(1).values.tolist()
            table[f"{quantity}_abs_frozen"] = frozen.abs().double().mean(1).tolist()
            table[f"{quantity}_through_scale"] = (total - frozen).double().mean(1).tolist()
            table[f"{quantity}_abs_through_scale"] = (total - frozen).abs().double().mean(1).tolist()
        return table
