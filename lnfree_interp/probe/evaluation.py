"""How much a probe reads, beside what is read without it: the same prompts, the same candidates.

Every yardstick gives each test prompt a number for each answer there is, and is right where the prompt's own is the
largest. Prompts of one answer are not independent of each other, so intervals are over answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..arguments import listener, one_of
from ..batching import Progress
from ..dla import attribution_to
from ..dla.readers import Reader
from ..forward import unembed
from ..lens import LensModel, ModelOrName
from ..models import as_model
from ..results import Result, by, drawing, name_of
from ..shares import share_interval
from .data import SPLITS, ProbeData, answer_tokens
from .fitting import targets
from .hyperprobe import HyperProbe, check_model, linear_logits, observed, output, pool
from .streams import Observed, by_length, token_rows
from .symbols import Codebook, signs, similarity, unbind

GROUPS = ("all", "right", "wrong")
YARDSTICKS = {
    "probe": "the encoder, unbound with the prompt's key",
    "constant": "a constant output in its place: -1 throughout",
    "shuffled codebook": "the encoder, its concepts' vectors handed round",
    "linear probe": "logistic regression on the same vectors",
    "nearest mean": "the nearest mean of training prompts",
    "logit lens": "final norm and W_U on each layer's stream, mean over the layers",
    "tuned lens": "a linear map to the final stream, then final norm and W_U",
    "DLA": "direct logit attribution of the layers from the first one read on",
    "model": "the model's own logits",
}
SYMBOLIC = ("probe", "constant", "shuffled codebook")


@dataclass(frozen=True, repr=False)
class ProbeEvaluation(Result):
    """How often each yardstick finds the answer among all answers.

    Attributes:
        yardsticks: see YARDSTICKS.
        splits: what was never trained on: "prompts", their "templates", their answers ("concepts": known as what other
            pairs in a prompt hold, never as an answer).
        groups: "all" prompts, those that the model itself gets "right", those that it gets "wrong".
        at_1: Float[Tensor, "yardstick split group"], share of prompts (probing@1), and
        low, high: its 95% interval, over answers.
        context_at_1: Float[Tensor, "yardstick split group"], the same for the prompt's other pairs, unbound with their
            keys; nan of what has no symbols.
        similarity: Float[Tensor, "yardstick split group"], mean cosine with the bundle, ties drawn at random;
        bits: Float[Tensor, "yardstick split group"], share of right signs, ties left out: 0.5 is chance.
        n: Int[Tensor, "split group"], prompts.
        chance: of guessing an answer.
        facts: the probe's, and dim.
        model: whose.
    """

    yardsticks: tuple[str, ...]
    splits: tuple[str, ...]
    groups: tuple[str, ...]
    at_1: Float[Tensor, "yardstick split group"]
    low: Float[Tensor, "yardstick split group"]
    high: Float[Tensor, "yardstick split group"]
    context_at_1: Float[Tensor, "yardstick split group"]
    similarity: Float[Tensor, "yardstick split group"]
    bits: Float[Tensor, "yardstick split group"]
    n: Int[Tensor, "split group"]
    chance: float
    facts: dict[str, float | int]
    model: str = ""

    def summary(self) -> str:
        """One line: probing@1 of the probe and of the linear probe on new prompts, and chance."""
        split = int(self.n[:, 0].argmax())

        def said(name: str) -> str:
            i = self.yardsticks.index(name)
            return f"{self.at_1[i, split, 0]:.1%}"

        shape = by((len(self.yardsticks), "yardstick"), (int(self.n[:, 0].sum()), "prompt"))
        found = f"probing@1 {said('probe')}, linear probe {said('linear probe')}, chance {self.chance:.1%}"
        return f"of {self.model}, new {self.splits[split]}: {found}; {shape}"

    def picture(self) -> str:
        """A grid of probing@1, yardsticks down, splits across."""
        from ..figures.probe_pictures import of_evaluation

        return of_evaluation(self)

    def plot(self):
        """A figure of plotly: probing@1 of each yardstick with its interval, a panel for each split.

        Raises:
            ImportError: there is no plotly.
        """
        with drawing():
            from ..figures.probe import evaluation_figure

        return evaluation_figure({self.model or "model": self})

    def table(self):
        """One row per yardstick, split and group that has prompts: yardstick, split, group, n, at_1, low, high,
        context_at_1, similarity, bits."""
        import pandas as pd

        index = [
            (i, j, k)
            for i in range(len(self.yardsticks))
            for j in range(len(self.splits))
            for k in range(len(self.groups))
            if self.n[j, k]
        ]
        names = [(self.yardsticks[i], self.splits[j], self.groups[k], int(self.n[j, k])) for i, j, k in index]
        table = pd.DataFrame(names, columns=["yardstick", "split", "group", "n"])
        for name in ("at_1", "low", "high", "context_at_1", "similarity", "bits"):
            table[name] = [getattr(self, name)[cell].item() for cell in index]
        return table


@torch.no_grad()
def evaluate_probe(
    model: ModelOrName, probe: HyperProbe, data: ProbeData, *, progress: Progress | None = None
) -> ProbeEvaluation:
    """A probe and its yardsticks on the prompts that it was not trained on.

    Args:
        data: that it was fitted on, or others: what of them is held out, the probe's splits say.
        progress: told of the prompts run.

    Raises:
        ValueError: a model of another shape; concepts that the probe's codebook lacks; no prompt that is held out.

    Example:
        >>> from lnfree_interp import evaluate_probe, fit_probe, load_model, recall_data
        >>> from lnfree_interp.probe import Training
        >>> model = load_model("tiny-noLN")
        >>> data = recall_data(model, 80, keys=4, values=4)
        >>> probe = fit_probe(model, data, dim=64, mastered=False, training=Training(hidden=16, epochs=2))
        >>> found = evaluate_probe(model, probe, data)
        >>> found.yardsticks[0], found.chance
        ('probe', 0.25)
    """
    model = as_model(model)
    check_model(probe, model)
    one_of(data, "data", ProbeData, "ProbeData")
    listener(progress)
    tokens = answer_tokens(model, data)
    book, answers = probe.codebook, data.answers
    for concept in data.concepts:
        book.number(concept)
    rows = probe.splits.rows(data, *SPLITS)
    if not rows:
        raise ValueError("none of the prompts is held out: the probe has nothing to be tested on")
    held = ProbeData(tuple(data.prompts[i] for i in rows))
    columns = [tokens[answer] for answer in answers]
    prompts = [prompt.prompt for prompt in held]
    seen = observed(probe, model, prompts, columns, progress=progress)
    pooled, weights = pool(probe, seen.streams)
    truth = torch.tensor([answers.index(prompt.value) for prompt in held])
    right = seen.logits.argmax(-1) == truth
    outputs = _outputs(probe, pooled)
    scores = {name: _unbound(*outputs[name], held, answers) for name in SYMBOLIC}
    scores |= _classes(probe, pooled, answers)
    scores["logit lens"] = torch.einsum("lba,lb->ba", seen.lens, weights.to(seen.lens))
    mapped = pooled @ probe.tensors["tuned.weight"].T + probe.tensors["tuned.bias"]
    scores["tuned lens"] = _read_out(model, mapped, columns)
    scores["DLA"] = _dla(model, prompts, columns, probe.layers[0], seen)
    scores["model"] = seen.logits
    found = torch.stack([scores[name].argmax(-1) == truth for name in YARDSTICKS])

    goal = targets(book, held).to(pooled)
    of_split = [probe.splits.split(prompt) for prompt in held]
    splits = tuple(name for name in SPLITS if name in of_split)
    shape = (len(YARDSTICKS), len(splits), len(GROUPS))
    at_1, low, high, context, near, bits = (torch.full(shape, torch.nan, dtype=torch.float64) for _ in range(6))
    n = torch.zeros(shape[1:], dtype=torch.long)
    others = {name: _context(*outputs[name], held) for name in SYMBOLIC}
    drawn = signs(goal, seed=1)
    cosines = {name: torch.nn.functional.cosine_similarity(outputs[name][0], drawn) for name in SYMBOLIC}
    agrees = {name: ((outputs[name][0] == goal).sum(-1), (goal != 0).sum(-1)) for name in SYMBOLIC}
    for j, split in enumerate(splits):
        for k, group in enumerate(GROUPS):
            inside = torch.tensor([name == split for name in of_split])
            inside &= torch.ones_like(right) if group == "all" else right if group == "right" else ~right
            n[j, k] = inside.sum()
            if not n[j, k]:
                continue
            hits, counts = _by_answer(found[:, inside], truth[inside])
            at_1[:, j, k] = torch.from_numpy(hits.sum(0) / counts.sum())
            low[:, j, k], high[:, j, k] = map(torch.from_numpy, share_interval(hits, counts))
            for i, name in enumerate(SYMBOLIC):
                near[i, j, k] = cosines[name][inside].mean()
                same, decided = agrees[name]
                bits[i, j, k] = same[inside].sum() / decided[inside].sum()
                hit, of = (x[inside].sum() for x in others[name])
                context[i, j, k] = hit / of if of else torch.nan
    return ProbeEvaluation(
        yardsticks=tuple(YARDSTICKS),
        splits=splits,
        groups=GROUPS,
        at_1=at_1,
        low=low,
        high=high,
        context_at_1=context,
        similarity=near,
        bits=bits,
        n=n,
        chance=1 / len(answers),
        facts=dict(probe.facts) | {"dim": book.dim},
        model=name_of(model),
    )


def _outputs(probe: HyperProbe, pooled: Tensor) -> dict[str, tuple[Tensor, Codebook, Tensor]]:
    """Signs that are read, with which codebook's names, and which vector each name has."""
    out, vectors = output(probe, pooled), probe.codebook.vectors
    handed_round = vectors.roll(1, 0)
    return {
        "probe": (out, probe.codebook, vectors),
        "constant": (-torch.ones_like(out), probe.codebook, vectors),
        "shuffled codebook": (out, probe.codebook, handed_round),
    }


def _numbers(book: Codebook, names: Sequence[str]) -> list[int]:
    return [book.number(name) for name in names]


def _unbound(out: Tensor, book: Codebook, vectors: Tensor, data: ProbeData, answers: Sequence[str]) -> Tensor:
    """Cosines of what is bound with each prompt's key, with all answers."""
    keys = vectors[_numbers(book, [prompt.key for prompt in data])].to(out)
    return similarity(unbind(out, keys), vectors[_numbers(book, answers)])


def _context(out: Tensor, book: Codebook, vectors: Tensor, data: ProbeData) -> tuple[Tensor, Tensor]:
    """Of each prompt's other pairs, how many are found among all values of such, and how many there are."""
    values = sorted({value for prompt in data for _, value in prompt.pairs[:-1]})
    hits, counts = torch.zeros(len(out)), torch.zeros(len(out))
    candidates = vectors[_numbers(book, values)]
    for i, prompt in enumerate(data):
        for key, value in prompt.pairs[:-1]:
            near = similarity(unbind(out[i], vectors[book.number(key)].to(out)), candidates)
            hits[i] += values[int(near.argmax())] == value
            counts[i] += 1
    return hits, counts


def _classes(probe: HyperProbe, pooled: Tensor, answers: Sequence[str]) -> dict[str, Tensor]:
    """Scores of what knows the training's answers alone: the others have none."""
    known = [i for i, name in enumerate(answers) if name in probe.answers]
    classes = [probe.answers.index(answers[i]) for i in known]
    of_class = {
        "linear probe": linear_logits(probe, pooled),
        "nearest mean": -torch.cdist(pooled, probe.tensors["means"]),
    }
    found = {}
    for name, values in of_class.items():
        found[name] = values.new_full((len(values), len(answers)), -torch.inf)
        found[name][:, known] = values[:, classes]
    return found


def _read_out(model: LensModel, x: Tensor, columns: Sequence[int]) -> Tensor:
    at = torch.tensor(list(columns), device=model.cfg.device).expand(len(x), -1)
    return unembed(model, x.to(model.cfg.device, model.unembed.W_U.dtype), at).float().cpu()


def _dla(model: LensModel, prompts: Sequence, columns: Sequence[int], first: int, seen: Observed) -> Tensor:
    """What the layers from the first one read on add to each answer's logit, the final norm's scale as it is."""
    rows = token_rows(model, prompts)
    directions = model.unembed.W_U.T[list(columns)]
    reader = Reader.direction(None, directions, "final", normalised=True)
    scores = torch.zeros_like(seen.logits)
    for some, tokens in by_length(rows, model.cfg.device):
        found = attribution_to(model, tokens, reader, positions=-1)
        late = [i for i, label in enumerate(found.labels) if label.startswith("L") and _layer(label) >= first]
        scores[some] = found.values[:, late, :, 0].sum(1).T.to(scores)
    return scores


def _layer(label: str) -> int:
    return int(label[1:].split(".")[0].split("H")[0].split("N")[0])


def _by_answer(found: Tensor, truth: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Hits, [answer, yardstick], and prompts, [answer]."""
    different, where = truth.unique(return_inverse=True)
    hits = torch.zeros(len(different), len(found), dtype=torch.float64)
    hits.index_add_(0, where, found.T.double())
    return hits.numpy(), torch.bincount(where, minlength=len(different)).double().numpy()
