"""The evidence for a concept, split over the components that wrote it.

A readout of the pooled stream is a weighted sum of readings of each layer's stream, and each of these is a sum over
what components wrote before it (`attribution_to`). Without LayerNorm that is exact in both senses: the parts add up
to the readout, and it falls by a component's part if that is taken out of the streams. With a norm they still add
up, the norm's scale held; what taking a component out does is `effect_on`, and the difference is the price of the norm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..arguments import choice, text_or_none
from ..batching import Progress, Tokens
from ..dla import attribution_to, effect_on
from ..dla.record import DECOMPOSITIONS, component_labels
from ..lens import LensModel, ModelOrName
from ..models import as_model
from ..results import Prompts, Result, drawing
from ..results import by as shape_of
from ..statistics import ratio, ratio_interval
from .data import ProbeData
from .hyperprobe import HyperProbe, answer_number, check_model, held_out, observed, pool
from .reading import named
from .streams import reader, token_rows

READOUTS = ("linear", "encoder")


@dataclass(frozen=True, repr=False)
class ConceptEvidence(Result):
    """What each component adds to a readout of a concept at the end of a prompt, against the mean of all others.

    Attributes:
        concept: whose evidence.
        readout: "linear", the linear probe's logit less the mean of all answers'; "encoder", the encoder's output
            before the signs, bound with the key, along the concept's vector less the mean of all answers' (over dim).
        labels: the components.
        values: Float[Tensor, "component layer"], what each adds by way of each layer's stream, its scale held.
        effect: Float[Tensor, "component layer"], by how much that layer's reading falls without it: `values` where the
            norm is linear.
        bias: what no component adds. The sum of the values and the bias is
        total: the readout. Of the encoder it is that of the encoder as it is linear around this prompt, exactly
            since its neurons are rectified.
        points: the layers.
        prompts: the prompt and its model.
    """

    concept: str
    readout: str
    labels: tuple[str, ...]
    values: Float[Tensor, "component layer"]
    effect: Float[Tensor, "component layer"]
    bias: float
    total: float
    points: tuple[str, ...]
    prompts: Prompts

    @property
    def error(self) -> float:
        """How far the values are from the exact effects, over components: sum |values - effect| / sum |effect|."""
        return float(ratio(*_sizes(self)))

    def summary(self) -> str:
        """One line: of which concept, how much in all, the largest component, and the error."""
        sums = self.values.sum(1)
        i = int(sums.abs().argmax())
        shape = shape_of((len(self.labels), "component"), (len(self.points), "layer"))
        return (
            f"for {self.concept!r} in {self.prompts.model}, {self.readout} readout {self.total:+.3g}: {shape}; "
            f"the largest {self.labels[i]} {sums[i]:+.3g}; differs from the exact effect by {self.error:.2%}"
        )

    def picture(self) -> str:
        """Heads as a grid, and the largest components as bars that add up to the readout."""
        from ..figures.probe_pictures import of_evidence

        return of_evidence(self)

    def plot(self, *, top: int = 20):
        """A figure of plotly: the largest components, with the exact effect beside each.

        Raises:
            ImportError: there is no plotly.
        """
        with drawing():
            from ..figures.probe import evidence_figure

        return evidence_figure({self.prompts.model: self}, top=top)

    def table(self):
        """One row per component, the largest first: component, attribution, effect."""
        import pandas as pd

        columns = {"attribution": self.values.sum(1), "effect": self.effect.sum(1)}
        table = pd.DataFrame({"component": self.labels} | {name: x.double().tolist() for name, x in columns.items()})
        order = table.attribution.abs().sort_values(ascending=False, kind="stable").index
        return table.loc[order].reset_index(drop=True)


@torch.no_grad()
def concept_evidence(
    model: ModelOrName,
    probe: HyperProbe,
    prompt: Tokens,
    concept: str | None = None,
    *,
    readout: str = "linear",
    key: str | None = None,
    by: str = "head",
) -> ConceptEvidence:
    """Which components the evidence for a concept comes from, exactly where there is no norm.

    Args:
        prompt: a text, or token ids.
        concept: an answer; None: the one for which there is most.
        readout: "linear": the linear probe; "encoder": the encoder, linear as it is around this prompt.
        key: for the encoder, what its output is unbound with; None: the concept that the prompt names last.
        by: "component", "head" or "neuron", as in `attribution_to`.

    Raises:
        ValueError: a model of another shape; an unknown readout; a concept that is no answer; what `attribution_to`
            raises.

    Example:
        >>> from lnfree_interp import concept_evidence, fit_probe, load_model, recall_data
        >>> from lnfree_interp.probe import Training
        >>> model = load_model("tiny-noLN")
        >>> data = recall_data(model, 80, keys=4, values=4)
        >>> probe = fit_probe(model, data, dim=64, mastered=False, training=Training(hidden=16, epochs=2))
        >>> found = concept_evidence(model, probe, data.prompts[0].prompt)
        >>> abs(float(found.values.sum()) + found.bias - found.total) < 1e-3, found.error < 1e-4
        (True, True)
    """
    model = as_model(model)
    check_model(probe, model)
    choice(readout, "readout", READOUTS)
    text_or_none(concept, "concept")
    text_or_none(key, "key")
    choice(by, "by", DECOMPOSITIONS)
    (row,) = token_rows(model, [prompt])
    tokens = torch.tensor([row], device=model.cfg.device)
    pooled, weights = pool(probe, observed(probe, model, [row], [0]).streams)
    if readout == "linear":
        directions, biases = probe.tensors["linear.weight"], probe.tensors["linear.bias"]
    else:
        directions, biases = _linearised(probe, pooled[0], _key(probe, prompt, key))
    directions, biases = directions - directions.mean(0), biases - biases.mean()
    scores = directions @ pooled[0] + biases
    chosen = int(scores.argmax()) if concept is None else answer_number(probe, concept)
    parts = _split(model, probe, tokens, directions[chosen], weights[:, 0], by)
    labels, values, effect, bias = parts
    return ConceptEvidence(
        concept=probe.answers[chosen],
        readout=readout,
        labels=labels,
        values=values,
        effect=effect,
        bias=bias + float(biases[chosen]),
        total=float(scores[chosen]),
        points=probe.points,
        prompts=Prompts.of(model, tokens),
    )


def evidence_of_data(
    model: LensModel,
    probe: HyperProbe,
    data: ProbeData,
    n: int,
    *,
    readout: str = "linear",
    progress: Progress | None = None,
) -> list[ConceptEvidence]:
    """The evidence for their answers in n held-out prompts at most, as `concept_evidence` has it."""
    prompts = [data.prompts[i] for i in held_out(probe, data)[:n]]
    parts = []
    for prompt in prompts:
        parts.append(concept_evidence(model, probe, prompt.prompt, prompt.value, readout=readout, key=prompt.key))
        if progress is not None:
            progress(len(parts), len(prompts))
    return parts


def pooled_error(parts: Sequence[ConceptEvidence], seed: int = 0) -> tuple[float, float, float]:
    """The error of several prompts together, and its 95% interval over prompts: of at least two, else nan."""
    differences, effects = np.array([_sizes(part) for part in parts]).T
    error = float(ratio(differences.sum(), effects.sum()))
    if len(parts) < 2:
        return error, math.nan, math.nan
    low, high = ratio_interval(differences, effects, seed=seed)
    return error, float(low), float(high)


def _sizes(found: ConceptEvidence) -> Float[np.ndarray, " two"]:
    """Over components, sum |values - effect| and sum |effect|."""
    values, effect = (x.double().sum(1) for x in (found.values, found.effect))
    return torch.stack([(values - effect).abs().sum(), effect.abs().sum()]).numpy()


def _key(probe: HyperProbe, prompt: Tokens, key: str | None) -> Tensor:
    if key is None:
        found = named(prompt, probe.codebook.concepts) if isinstance(prompt, str) else []
        if not found:
            raise ValueError("the prompt names no concept: give the key that the encoder's output is unbound with")
        key = found[-1]
    return probe.codebook.vectors[probe.codebook.number(key)]


def _linearised(probe: HyperProbe, x: Float[Tensor, " d"], key: Float[Tensor, " dim"]) -> tuple[Tensor, Tensor]:
    """The encoder's readouts of all answers around x: directions [answer, d] and biases.

    A rectified network is linear where no neuron changes sides, so these are its own Jacobian and what is left at x.
    """
    read = probe.codebook.of(probe.answers).to(x) * key.to(x) / probe.codebook.dim

    def readouts(x: Tensor) -> Tensor:
        return read @ probe.encoder(x)

    with torch.enable_grad():
        jacobian = torch.autograd.functional.jacobian(readouts, x)
    return jacobian, readouts(x) - jacobian @ x


def _split(
    model: LensModel,
    probe: HyperProbe,
    tokens: Int[Tensor, "one pos"],
    direction: Float[Tensor, " d"],
    weights: Float[Tensor, " layer"],
    by: str,
) -> tuple[tuple[str, ...], Tensor, Tensor, float]:
    """Labels, values and effects, [component, layer], and bias of a direction of the pooled stream."""
    labels: Sequence[str] = component_labels(model.cfg, by)
    found: list[tuple[tuple[str, ...], Tensor, Tensor]] = []
    bias = 0.0
    for i, layer in enumerate(probe.layers):
        u = direction * weights[i] / probe.tensors["scale"][i]
        bias -= float(u @ probe.tensors["mean"][i])
        of_layer = reader(probe.n_layers, layer, u, probe.normalised)
        linear = attribution_to(model, tokens, of_layer, positions=-1, by=by)
        exact = effect_on(model, tokens, of_layer, positions=-1, by=by)
        bias += float(linear.bias)
        if "hooks" in linear.labels and "hooks" not in labels:
            labels = (*labels, "hooks")
        value, real = (x.values[0, :, 0, 0].cpu() for x in (linear, exact))
        found.append((linear.labels, value, real))
    last = found[-1][1]
    values, effect = (last.new_zeros(len(labels), len(found)) for _ in range(2))
    for i, (names, *parts) in enumerate(found):
        at = [labels.index(name) for name in names]
        values[at, i], effect[at, i] = parts
    return tuple(labels), values, effect, bias
