"""What ablating neurons does."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from ..arguments import as_text, whole
from ..batching import indices
from ..results import Picture, Prompts, Result, by, counted, drawing


@dataclass(frozen=True, repr=False)
class NeuronAblation(Result):
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
        prompts: what the model read.
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
    prompts: Prompts | None = None

    def summary(self) -> str:
        """One line: which ablations, of which model, on how many tokens, the one that changes most."""
        n, batch, pos = self.loss.shape
        more = f" and {counted(n - 1, 'other ablation')}" if n > 1 else ""
        model = f" in {self.prompts.model}" if self.prompts else ""
        sizes = self.loss.abs().double().mean((1, 2))
        i = int(sizes.argmax())
        most = f"largest mean |change of the loss| {self.labels[i]} {sizes[i].item():.3g}"
        return f"of {self.labels[0]}{more}{model}: {by((batch, 'prompt'), (pos, 'token'))}, changes in nats; {most}"

    @property
    def cumulative(self) -> bool:
        """Whether each ablation comes on top of those before it."""
        return any(label.startswith("+") for label in self.labels)

    def picture(self) -> str:
        """Bars of the mean changes of the loss; of one prompt the text, by what the largest ablation changes."""
        from ..figures.measured_pictures import of_ablations

        return of_ablations(self)

    def plot(self, *, top: int = 30):
        """A figure of plotly: boxes over tokens of few ablations; one on top of another a line; of many the largest.

        Raises:
            ImportError: there is no plotly.
        """
        with drawing():
            from ..figures.neurons import ablation_figure

        return ablation_figure(self, whole(top, "top", least=1))

    def text(self, ablation: str | int = 0, *, prompt: int = 0, quantity: str = "loss") -> Picture:
        """The prompt as running text, each token on a background by what an ablation changes of its prediction.

        Args:
            ablation: a label or a number.
            quantity: "loss", "entropy", "loss_frozen" or "entropy_frozen", in nats.

        Raises:
            ValueError: an ablation, prompt or quantity that is not there; a result that was made without prompts.
        """
        from ..figures.measured_pictures import ablation_as_text

        if isinstance(ablation, str):
            if ablation not in self.labels:
                raise ValueError(f"ablation {ablation!r} is none of {', '.join(self.labels[:3])}, ...")
            ablation = self.labels.index(ablation)
        at = indices(ablation, len(self.labels), "ablation", range(len(self.labels)), "the ablations")[0]
        return Picture(ablation_as_text(self, at, prompt, as_text(quantity, "quantity")))

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
