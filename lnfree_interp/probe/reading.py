"""What a probe reads at the end of a prompt."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..arguments import whole
from ..batching import Tokens, indices
from ..lens import LensModel
from ..results import Prompts, Result, by, drawing
from .hyperprobe import HyperProbe, observed, output, pool, standard
from .streams import token_rows
from .symbols import similarity, unbind


@dataclass(frozen=True, repr=False)
class ProbeReading(Result):
    """Cosines of what a probe finds, unbound with each key, with the codebook's concepts.

    Attributes:
        keys: what was asked about.
        points: "all" (the layers together), then each layer alone: "L4", ..., "final".
        concepts: the codebook's.
        similarity: Float[Tensor, "key point concept"], from -1 to 1. A key's own concept is nan: of any vector, bound
            with itself, nothing would be left to say.
        dim: signs of the codebook; what nothing has to do with has a cosine of 0 with a standard deviation of
            1/sqrt(dim).
        prompts: the prompt and its model.
    """

    keys: tuple[str, ...]
    points: tuple[str, ...]
    concepts: tuple[str, ...]
    similarity: Float[Tensor, "key point concept"]
    dim: int
    prompts: Prompts

    def top(self, key: int = -1, k: int = 5) -> list[tuple[str, float]]:
        """(concept, cosine) of the k nearest to what a key is bound with, of all layers together."""
        at = indices(key, len(self.keys), "key", range(len(self.keys)), "the keys")[0]
        values = self.similarity[at, 0].nan_to_num(nan=-2.0)
        best = values.topk(min(whole(k, "k", least=1), len(values) - 1))
        return [(self.concepts[i], value) for i, value in zip(best.indices.tolist(), best.values.tolist())]

    def summary(self) -> str:
        """One line: what the last key is bound with, how much nearer than chance."""
        concept, value = self.top()[0]
        shape = by((len(self.keys), "key"), (len(self.points), "point"), (len(self.concepts), "concept"))
        sds = value * self.dim**0.5
        return f"of {self.prompts.model}: {self.keys[-1]} : {concept} ({value:+.3f}, {sds:.1f} sd of chance); {shape}"

    def picture(self) -> str:
        """The nearest concepts of the last key, layer by layer."""
        from ..figures.probe_pictures import of_reading

        return of_reading(self)

    def plot(self, *, key: int = -1, top: int = 12):
        """A figure of plotly: cosines of the nearest concepts of a key, by layer.

        Raises:
            ImportError: there is no plotly.
        """
        with drawing():
            from ..figures.probe import reading_figure

        return reading_figure(self, key=key, top=top)

    def table(self):
        """One row per key, point and concept: key, point, concept, similarity, sds (standard deviations of chance)."""
        import pandas as pd

        index = [(k, p, c) for k in self.keys for p in self.points for c in self.concepts]
        table = pd.DataFrame(index, columns=["key", "point", "concept"])
        table["similarity"] = self.similarity.flatten().double().tolist()
        table["sds"] = table.similarity * self.dim**0.5
        return table.dropna(ignore_index=True).sort_values("similarity", ascending=False, ignore_index=True)


@torch.no_grad()
def reading_of(probe: HyperProbe, model: LensModel, prompt: Tokens, keys: Sequence[str] | None = None) -> ProbeReading:
    """`HyperProbe.read`, of a model that fits."""
    (row,) = token_rows(model, [prompt])
    if keys is None:
        if not isinstance(prompt, str):
            raise ValueError("a prompt of token ids names no concepts: give keys")
        keys = named(prompt, probe.codebook.concepts)
        if not keys:
            raise ValueError(f"prompt {prompt!r} names none of the {len(probe.codebook.concepts)} concepts: give keys")
    elif isinstance(keys, str) or not isinstance(keys, Sequence) or not all(isinstance(key, str) for key in keys):
        raise ValueError("keys must be a list of concepts")
    numbers = [probe.codebook.number(key) for key in keys]
    if not numbers:
        raise ValueError("keys name no concept")
    streams = observed(probe, model, [row], [0]).streams
    pooled, _ = pool(probe, streams)
    outputs = output(probe, torch.cat([pooled, standard(probe, streams)[:, 0]]))  # point dim
    vectors = probe.codebook.vectors
    found = torch.stack([similarity(unbind(outputs, vectors[i].to(outputs)), vectors) for i in numbers])
    found[torch.arange(len(numbers)), :, numbers] = torch.nan
    names = tuple(probe.codebook.concepts[i] for i in numbers)
    prompts = Prompts.of(model, torch.tensor([row]))
    return ProbeReading(names, ("all", *probe.points), probe.codebook.concepts, found, probe.codebook.dim, prompts)


def named(prompt: str, concepts: Sequence[str]) -> list[str]:
    """The concepts that a text names, in the order in which each comes last: what it ends with is asked for last."""
    pattern = "|".join(re.escape(name) for name in sorted(concepts, key=len, reverse=True))
    last = {found[0]: found.start() for found in re.finditer(rf"(?<!\w)(?:{pattern})(?!\w)", prompt.lower())}
    return sorted(last, key=last.__getitem__)
