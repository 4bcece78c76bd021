"""What the edges do: effects per prompt, sender and receiver."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from ...arguments import sampling, text_or_none, whole
from ...batching import check_rows
from ...pairs import PairedPrompts
from ...results import Result, counted, drawing
from ...statistics import mean_interval
from ..shown import unit_of

# Edges whose intervals are made at a time.
AT_ONCE = 1024


@dataclass(frozen=True, repr=False)
class EdgeEffect(Result):
    """Effects of edges, metric(edge patched) - metric(unpatched), or an estimate of it.

    An edge is patched where one receiver reads, in place of what a sender wrote in its run, what the sender wrote in
    the other run, at all positions; everybody else reads what they did.

    Attributes:
        values: Float[Tensor, "prompt sender receiver"], in units of the metric; 0 where there is no edge, or none was
            asked for.
        edges: Bool[Tensor, "sender receiver"]: the edges that the values are of.
        senders, receivers: their names, as in `edge_attribution`.
        method, direction, metric: "edge_patching" or the estimate, "denoising" or "noising", the metric's name.
        clean, corrupted: the metric of the unpatched prompts.
        reliability: of method "second_order": the second-order term's share, |second| / (2 |first|), shaped as values;
            large ones are suspect.
        cells_run: how many edges of prompts were run, or estimated; the others are exactly 0, since nothing differs
            there or nothing that the metric reads depends on them.
        flops: floating-point operations spent, and of running the whole model for each edge; None if not counted.
        prompts: the clean prompts, with `prompts.corrupted` and `prompts.answers`.
    """

    values: Float[Tensor, "prompt sender receiver"]
    edges: Bool[Tensor, "sender receiver"]
    senders: tuple[str, ...]
    receivers: tuple[str, ...]
    method: str
    direction: str
    metric: str
    clean: Float[Tensor, " prompt"]
    corrupted: Float[Tensor, " prompt"]
    reliability: Float[Tensor, "prompt sender receiver"] | None = None
    cells_run: int = 0
    flops: tuple[float, float] | None = None
    prompts: PairedPrompts | None = None

    def __getitem__(self, prompts: slice | Tensor) -> EdgeEffect:
        """The effects of some of the prompts."""
        of_prompts = ("values", "clean", "corrupted", "reliability", "prompts")
        check_rows(prompts, "prompts")
        return replace(self, **{f: v[prompts] for f in of_prompts if (v := getattr(self, f)) is not None})

    def table(self, k: int | None = None, *, draws: int = 1000, seed: int = 0):
        """One row per edge, the largest mean effects first.

        Columns sender, receiver, effect (mean over prompts), low, high (its 95% interval, studentised bootstrap over
        prompts: nan with a single one) and, where there is one, reliability (its median over prompts).

        Args:
            k: only so many rows.
            draws: bootstrap resamples of the prompts.
        """
        import pandas as pd

        k, drawn = None if k is None else whole(k, "k", least=0), sampling(draws, seed)
        sender, receiver = (x.numpy() for x in self.edges.cpu().nonzero(as_tuple=True))
        values = self.values.detach().cpu().double().numpy()[:, sender, receiver]
        mean = values.mean(0)
        order = np.argsort(-np.abs(mean), kind="stable")[:k]
        parts = np.split(order, range(AT_ONCE, len(order), AT_ONCE))
        bounds = [mean_interval(values[:, part], **drawn) for part in parts]
        low, high = (np.concatenate(side) for side in zip(*bounds))
        columns = {
            "sender": np.array(self.senders)[sender[order]],
            "receiver": np.array(self.receivers)[receiver[order]],
            "effect": mean[order],
            "low": low,
            "high": high,
        }
        if self.reliability is not None:
            suspect = self.reliability.detach().cpu().double()[:, sender[order], receiver[order]]
            columns["reliability"] = suspect.median(0).values.numpy()
        return pd.DataFrame(columns)

    def named(self) -> tuple[list[str], list[float]]:
        """Each edge, as "L0H1 → L1H2.k", and its mean effect over prompts."""
        sender, receiver = self.edges.cpu().nonzero(as_tuple=True)
        means = self.values.detach().cpu().double().mean(0)[sender, receiver].tolist()
        names = zip(sender.tolist(), receiver.tolist())
        return [f"{self.senders[i]} → {self.receivers[j]}" for i, j in names], means

    def summary(self) -> str:
        """Whose edges, how many, the unit, and the largest."""
        of = "" if self.prompts is None else f" in {self.prompts.model}"
        names, means = self.named()
        i = int(np.abs(means).argmax())
        return (
            f"{self.metric} with an edge patched ({self.direction}, {self.method}){of}: "
            f"{counted(len(self.values), 'prompt')} x {counted(len(names), 'edge')}, in {unit_of(self.metric)}; "
            f"the largest mean {names[i]} {means[i]:+.3g}"
        )

    def picture(self) -> str:
        """The edges of the largest mean effects."""
        from ...figures.panels import largest_bars

        return largest_bars(*self.named(), unit_of(self.metric), "edges")

    def plot(self, *, title: str | None = None):
        """The mean effects, senders by receivers, as a figure of plotly."""
        with drawing():
            from ...figures.edges import edge_heatmaps

        name = "" if self.prompts is None else self.prompts.model
        text_or_none(title, "title")
        told = f"{self.metric} with an edge patched, {self.direction}" if title is None else title
        return edge_heatmaps({(self.method, name): self}, unit=unit_of(self.metric), title=told)
