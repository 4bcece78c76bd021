"""What attributions are returned as."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class LogitAttribution:
    """What each component contributes to a logit, or to the difference of two.

    Attributes:
        values: Float[Tensor, "component batch pos"], in logits.
        labels: one name per component: "embed", "pos_embed", "L3.attn", "L3.mlp", "L3H7", "L3N1021", and "L3.b_O",
            "L3.b_out" for biases where heads or neurons are listed without them; last "hooks", for a model that
            carries hooks of its own: what they add to the final residual stream that no component wrote.
        bias: Float[Tensor, "batch pos"], the part no component owns (b_U, and the final norm's own bias).
            `values.sum(0) + bias` is the model's logit (for `direct_effect` only without LayerNorm).
        positions: the position in the prompt of each entry along pos.
    """

    values: Float[Tensor, "component batch pos"]
    labels: tuple[str, ...]
    bias: Float[Tensor, "batch pos"]
    positions: tuple[int, ...]

    def table(self):
        """One row per component: mean, mean absolute value and standard deviation in logits, largest first."""
        import pandas as pd

        flat = self.values.flatten(1).cpu().double()
        table = pd.DataFrame(
            {
                "component": self.labels,
                "mean": flat.mean(1).numpy(),
                "mean_abs": flat.abs().mean(1).numpy(),
                "std": flat.std(1, unbiased=False).numpy(),
            }
        )
        return table.sort_values("mean_abs", ascending=False, ignore_index=True)


@dataclass(frozen=True)
class ReaderAttribution:
    """What each component contributes to what readers read of the residual stream.

    Attributes:
        values: Float[Tensor, "reader component batch pos"], in units of what is read (a neuron's pre-activation, a
            query's coordinate, a logit); by source [reader, component, batch, pos, source], the last axis the position
            that a head read from (for what is not moved, its own). With `top` Float[Tensor, "reader top batch pos"].
        labels: one name per component, as in `LogitAttribution`, of those before the readers.
        readers: one name per reader: "L3N17" (".linear" after it for the linear part of a gated MLP), "L2H3.q[5]" or,
            along one direction, "L2H3.q", "L4.resid_mid", "final", "logit", "logit difference".
        bias: Float[Tensor, "reader batch pos"], the part that no component owns. The values' sum over component (and
            source) + `bias` is what is read (for `effect_on` only without a norm; not with `top` or some `senders`).
        positions: the position in the prompt of each entry along pos.
        senders: with `top`, which component each value is of: an index into labels, largest values first.
        sources: with `top` by source, where each value was read from.
    """

    values: Float[Tensor, "reader component batch pos *source"]
    labels: tuple[str, ...]
    readers: tuple[str, ...]
    bias: Float[Tensor, "reader batch pos"]
    positions: tuple[int, ...]
    senders: Int[Tensor, "reader component batch pos"] | None = None
    sources: Int[Tensor, "reader component batch pos"] | None = None

    def table(self):
        """One row per reader and component: mean, mean absolute value and standard deviation, largest first.

        By source the sum over sources is shown. With `top`, over the tokens at which a component is among the largest,
        and how often per token it is (by source, more than once where several of its sources are).
        """
        import pandas as pd

        rows = self._rows() if self.senders is None else self._top_rows(self.senders)
        table = pd.DataFrame(rows)
        return table.sort_values("mean_abs", ascending=False, ignore_index=True)

    def _rows(self) -> dict:
        values = self.values.sum(-1) if self.values.ndim == 5 else self.values
        flat = values.flatten(2)
        columns = {"mean": flat.mean(2), "mean_abs": flat.abs().mean(2), "std": flat.std(2, unbiased=False)}
        names = {
            "reader": [reader for reader in self.readers for _ in self.labels],
            "component": [label for _ in self.readers for label in self.labels],
        }
        return names | {name: column.flatten().cpu().double().numpy() for name, column in columns.items()}

    def _top_rows(self, senders: Tensor) -> dict:
        import pandas as pd

        reader = torch.arange(len(self.readers), device=senders.device)[:, None].expand_as(senders.flatten(1))
        n_tokens = senders[0, 0].numel()
        flat = pd.DataFrame(
            {
                "reader": reader.flatten().cpu().numpy(),
                "component": senders.flatten().cpu().numpy(),
                "value": self.values.flatten().cpu().double().numpy(),
            }
        )
        flat["size"] = flat["value"].abs()
        groups = flat.groupby(["reader", "component"])
        return {
            "reader": [self.readers[i] for i, _ in groups.groups],
            "component": [self.labels[i] for _, i in groups.groups],
            "per_token": (groups["value"].count() / n_tokens).to_numpy(),
            "mean": groups["value"].mean().to_numpy(),
            "mean_abs": groups["size"].mean().to_numpy(),
            "std": groups["value"].std(ddof=0).to_numpy(),
        }
