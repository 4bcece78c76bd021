"""Is what a probe reads what the model uses? A concept is taken out of the stream, or another put in its place.

At the last token of a prompt whose answer is a, the stream x that enters a layer becomes

    swap      x + (m_b - m_a)               m_a the mean of training prompts' streams there whose answer is a
    remove    x - <x - m, u> u              u along m_a - m, m the mean over all answers
    random    x + a random vector as long as m_b - m_a

and the model runs on from there. A probe that reads what the model uses changes its answer where the model does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..arguments import listener, one_of, whole
from ..batching import Places, Progress, indices
from ..lens import ModelOrName
from ..models import as_model
from ..results import Result, by, drawing, name_of
from ..shares import share_interval
from .data import ProbeData, answer_tokens
from .hyperprobe import HyperProbe, check_model, held_out, linear_logits, observed, output, pool
from .streams import Observed
from .symbols import similarity, unbind

EDITS = ("swap", "remove", "random")
WHO = ("model", "probe", "linear probe")


@dataclass(frozen=True, repr=False)
class ConceptSwap(Result):
    """What the model, the probe and the linear probe answer before and after the stream is edited.

    Attributes:
        answers: candidates: the answers of the training.
        points: where the stream was edited, one layer at a time.
        edits: "swap", "remove", "random".
        who: "model" (the largest logit of the answers), "probe" (the encoder), "linear probe".
        before: Int[Tensor, "who prompt"], numbers of answers;
        after: Int[Tensor, "point edit who prompt"].
        original, other: Int[Tensor, "prompt"], a and b.
        model: whose stream.
    """

    answers: tuple[str, ...]
    points: tuple[str, ...]
    edits: tuple[str, ...]
    who: tuple[str, ...]
    before: Int[Tensor, "who prompt"]
    after: Int[Tensor, "point edit who prompt"]
    original: Int[Tensor, " prompt"]
    other: Int[Tensor, " prompt"]
    model: str = ""

    @property
    def moved(self) -> Float[Tensor, "point edit who prompt"]:
        """1 where the answer is another than before."""
        return (self.after != self.before).double()

    @property
    def to_other(self) -> Float[Tensor, "point edit who prompt"]:
        """1 where the answer is b."""
        return (self.after == self.other).double()

    @property
    def together(self) -> Float[Tensor, "point edit who prompt"]:
        """1 where the answer moved and the model's did, or neither did."""
        return (self.moved == self.moved[:, :, :1]).double()

    def summary(self) -> str:
        """One line: how often a swap moves the model and the probes to the other concept, where it does most."""
        rates = self.to_other[:, self.edits.index("swap")].mean(-1)  # point who
        best = int(rates[:, 0].argmax())
        said = ", ".join(f"{name} {rate:.0%}" for name, rate in zip(self.who, rates[best].tolist()))
        shape = by((len(self.original), "prompt"), (len(self.points), "point"), (len(self.edits), "edit"))
        return f"of {self.model}: a swap at {self.points[best]} moves {said} to the other concept; {shape}"

    def picture(self) -> str:
        """A grid of how often each moves to the other concept, layers down."""
        from ..figures.probe_pictures import of_swap

        return of_swap(self)

    def plot(self):
        """A figure of plotly: how often model and probes move, by edited layer, a panel for each edit.

        Raises:
            ImportError: there is no plotly.
        """
        with drawing():
            from ..figures.probe import swap_figure

        return swap_figure({self.model or "model": self})

    def table(self):
        """One row per point, edit and who: point, edit, who, moved, to_other and its 95% interval (low, high), together
        (moved where the model did, and not where it did not)."""
        import pandas as pd

        index = [(p, e, w) for p in self.points for e in self.edits for w in self.who]
        table = pd.DataFrame(index, columns=["point", "edit", "who"])
        hits, counts = self.to_other.flatten(0, 2).T.numpy(), np.ones(len(self.original))
        low, high = share_interval(hits, counts)
        table["moved"] = self.moved.mean(-1).flatten().tolist()
        table["to_other"] = self.to_other.mean(-1).flatten().tolist()
        table["low"], table["high"] = low, high
        table["together"] = self.together.mean(-1).flatten().tolist()
        return table


@torch.no_grad()
def swap_concepts(
    model: ModelOrName,
    probe: HyperProbe,
    data: ProbeData,
    *,
    layers: Places | None = None,
    n: int = 128,
    seed: int = 0,
    progress: Progress | None = None,
) -> ConceptSwap:
    """Edit concepts in the stream of held-out prompts, and see whether model and probes change together.

    Args:
        layers: where, one at a time, of those that the probe reads; None: each of them.
        n: prompts at most; of those that the model gets right, if there are any.
        seed: of the other concepts and the random vectors.
        progress: told of the runs done.

    Raises:
        ValueError: a model of another shape; no held-out prompt whose answer was trained on.

    Example:
        >>> from lnfree_interp import fit_probe, load_model, recall_data, swap_concepts
        >>> from lnfree_interp.probe import Training
        >>> model = load_model("tiny-noLN")
        >>> data = recall_data(model, 80, keys=4, values=4)
        >>> probe = fit_probe(model, data, dim=64, mastered=False, training=Training(hidden=16, epochs=2))
        >>> swap_concepts(model, probe, data, layers=-1, n=8).after.shape[:3]
        torch.Size([1, 3, 3])
    """
    model = as_model(model)
    check_model(probe, model)
    one_of(data, "data", ProbeData, "ProbeData")
    n, seed = whole(n, "n", least=1), whole(seed, "seed", least=0)
    listener(progress)
    there = range(len(probe.layers))
    which = list(there) if layers is None else _named_layers(probe, layers)
    tokens = answer_tokens(model, data)
    missing = [name for name in probe.answers if name not in tokens]
    if missing:
        raise ValueError(f"the data have no prompt with the answer {missing[0]!r}, which the probe was trained on")
    columns = [tokens[name] for name in probe.answers]
    rows = held_out(probe, data)
    seen = observed(probe, model, [data.prompts[i].prompt for i in rows], columns)
    original = torch.tensor([probe.answers.index(data.prompts[i].value) for i in rows])
    keys = probe.codebook.of([data.prompts[i].key for i in rows])
    right = (seen.logits.argmax(-1) == original).nonzero()[:, 0]
    used = (right if len(right) else torch.arange(len(rows)))[:n]
    prompts = [data.prompts[rows[i]].prompt for i in used.tolist()]
    original, keys = original[used], keys[used]
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(1, len(probe.answers), (len(used),), generator=generator)
    other = (original + steps) % len(probe.answers)
    noise = torch.randn(len(used), probe.d_model, generator=generator, dtype=torch.float64)
    before = _answers(probe, _some(seen, used), keys)
    after, done = [], 0
    for i in which:
        means = probe.tensors["raw_means"][i]
        for edit in EDITS:
            change = _editor(edit, means, original, other, noise)
            edited = observed(probe, model, prompts, columns, edit=(probe.layers[i], change))
            after.append(_answers(probe, edited, keys))
            done += 1
            if progress is not None:
                progress(done, len(which) * len(EDITS))
    return ConceptSwap(
        answers=probe.answers,
        points=tuple(probe.points[i] for i in which),
        edits=EDITS,
        who=WHO,
        before=before,
        after=torch.stack(after).unflatten(0, (len(which), len(EDITS))),
        original=original,
        other=other,
        model=name_of(model),
    )


def _named_layers(probe: HyperProbe, layers: Places) -> list[int]:
    n = probe.n_layers + 1
    wanted = indices(layers, n, "layer", range(n), "the streams")
    for layer in wanted:
        if layer not in probe.layers:
            raise ValueError(f"layer {layer} is none that the probe reads: {', '.join(map(str, probe.layers))}")
    return [probe.layers.index(layer) for layer in wanted]


def _some(seen: Observed, rows: Int[Tensor, " n"]) -> Observed:
    return Observed(seen.raw[:, rows], seen.streams[:, rows], seen.final[rows], seen.logits[rows], seen.lens[:, rows])


def _answers(probe: HyperProbe, seen: Observed, keys: Float[Tensor, "n dim"]) -> Int[Tensor, "who n"]:
    """What the model, the encoder and the linear probe answer."""
    pooled, _ = pool(probe, seen.streams)
    near = similarity(unbind(output(probe, pooled), keys.to(pooled)), probe.codebook.of(probe.answers))
    return torch.stack([x.argmax(-1) for x in (seen.logits, near, linear_logits(probe, pooled))])


def _editor(edit: str, means: Tensor, original: Tensor, other: Tensor, noise: Tensor):
    """The function of a stream and of which prompts it is that edits it."""

    def change(x: Tensor, rows: list[int]) -> Tensor:
        m_a, m_b = (means[which[rows]].to(x) for which in (original, other))
        difference = m_b - m_a
        if edit == "swap":
            return x + difference
        if edit == "random":
            drawn = noise[rows].to(x)
            return x + drawn / drawn.norm(dim=-1, keepdim=True) * difference.norm(dim=-1, keepdim=True)
        mean = means.mean(0).to(x)
        u = torch.nn.functional.normalize(m_a - mean, dim=-1)
        return x - ((x - mean) * u).sum(-1, keepdim=True) * u

    return change
