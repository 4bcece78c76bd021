"""Cross-entropy of a model with what a mean alone hides: percentiles, intervals, the sequences that explode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..arguments import sampling, whole
from ..batching import Progress, TokenSource, check_next_token, token_batches
from ..forward import run, unembed
from ..lens import LensModel, ModelOrName
from ..metrics import cross_entropy
from ..models import as_model
from ..results import Result, by, drawing, name_of
from ..running import Sample
from ..statistics import mean_interval

# Logits held at a time: 256 MiB in fp32.
LOGITS_PER_PASS = 2**26
# Tokens whose losses the command keeps: 32 MiB.
KEPT = 2**23
# A residual norm this many times its layer's median over the sequence has exploded.
EXPLODED = 10.0


@dataclass(frozen=True)
class WorstSequence:
    """A sequence with one of the largest mean losses, and where its residual stream explodes.

    Attributes:
        index: which sequence.
        loss: its mean loss (nats per token).
        text: its first words.
        position, token, layer: the first layer after which the residual stream at some position (0 excepted) is
            more than ten times as long as its median over the sequence, and the longest position there; None if
            there is no such layer.
        ratio: that norm over the median.
    """

    index: int
    loss: float
    text: str
    position: int | None = None
    token: str | None = None
    layer: int | None = None
    ratio: float | None = None


@dataclass(frozen=True, repr=False)
class LossEvaluation(Result):
    """Losses of one model on one set of tokens, in nats per token.

    Attributes:
        losses: Float[Tensor, "batch pos"], entry [b, i] is that of predicting token i + 1; on the CPU. Where not all
            were kept (`keep`), of a uniform sample of the sequences, as are median and ranges.
        per_sequence: Float[Tensor, "sequence"], mean loss of each sequence.
        mean: over all tokens.
        interval: of the mean, 95% over sequences (`statistics`); nan for a single sequence.
        median: over tokens, as are
        range95: (2.5%, 97.5%) quantiles, and
        range999: (0.05%, 99.95%) quantiles.
        worst: the sequences of largest mean loss, worst first.
        model: whose losses.
    """

    losses: Float[Tensor, "batch pos"]
    per_sequence: Float[Tensor, " sequence"]
    mean: float
    interval: tuple[float, float]
    median: float
    range95: tuple[float, float]
    range999: tuple[float, float]
    worst: tuple[WorstSequence, ...]
    model: str = ""

    def summary(self) -> str:
        """One line: mean, its interval, median."""
        known = self.interval[0] == self.interval[0]
        between = f" (95% {self.interval[0]:.4f} to {self.interval[1]:.4f})" if known else ""
        over = by((len(self.per_sequence), "sequence"), (self.losses.shape[1], "token"))
        numbers = f"mean {self.mean:.4f}{between}, median {self.median:.4f} nats per token"
        return f"{f'of {self.model}: ' * bool(self.model)}{numbers} over {over}"

    def picture(self) -> str:
        """Bars of mean and quantiles, and the worst sequences."""
        from ..figures.measured_pictures import of_losses

        return of_losses(self)

    def plot(self):
        """A figure of plotly: mean loss by position with its interval, and quantiles over tokens.

        Raises:
            ImportError: there is no plotly.
        """
        with drawing():
            from ..figures.evaluate import loss_figure

        return loss_figure({self.model or "model": self})

    def table(self):
        """One row: tokens, mean and its interval, median, both ranges, the worst sequence."""
        import pandas as pd

        row = {"tokens": self.per_sequence.numel() * self.losses.shape[1], "mean": self.mean}
        row |= {"mean_low": self.interval[0], "mean_high": self.interval[1], "median": self.median}
        row |= {"p2.5": self.range95[0], "p97.5": self.range95[1]}
        row |= {"p0.05": self.range999[0], "p99.95": self.range999[1]}
        if self.worst:
            row |= {"worst_sequence": self.worst[0].index, "worst_loss": self.worst[0].loss}
        return pd.DataFrame([row])


def evaluate_loss(
    model: ModelOrName,
    tokens: TokenSource,
    *,
    worst: int = 3,
    draws: int = 1000,
    seed: int = 0,
    keep: int | None = None,
    per_pass: int = 4096,
    progress: Progress | None = None,
) -> LossEvaluation:
    """Cross-entropy per token with median, ranges, an interval, and the worst sequences named.

    Args:
        model: any HookedTransformer or TransformerBridge, or a name.
        tokens: Int[Tensor, "batch pos"], or an iterable of such, all of one length.
        worst: how many sequences to name.
        draws: bootstrap draws of sequences.
        seed: of the bootstrap.
        keep: tokens whose losses are kept, for median and ranges: those of a uniform sample of the sequences where
            there are more, of one at least. Mean, interval and the worst are of all. None: all tokens.
        per_pass: tokens in memory at a time; fewer where their logits would fill more than 256 MiB.
        progress: told of the sequences done.

    Returns:
        LossEvaluation in nats per token; 4 bytes per token that is kept, 8 per sequence.

    Raises:
        ValueError: tokens that are no token ids of the model's, fewer than two positions, several lengths.

    Example:
        >>> from lnfree_interp import evaluate_loss, load_model
        >>> model = load_model("tiny-noLN", device="cpu")
        >>> result = evaluate_loss(model, model.to_tokens("It was a dark and stormy night."))
        >>> result.range999[0] <= result.range95[0] <= result.median <= result.range95[1]
        True
    """
    model, drawn = as_model(model), sampling(draws, seed)
    worst, keep = whole(worst, "worst", least=0), None if keep is None else whole(keep, "keep", least=1)
    part = loss_sums(model, tokens, keep=keep, worst=worst, per_pass=per_pass, progress=progress)
    return evaluation_of(model, [part], keep=keep, worst=worst, **drawn)


@dataclass(frozen=True)
class LossSums:
    """What `LossEvaluation` needs of some sequences; of parts of a set, what `evaluation_of` merges.

    Attributes:
        index: which sequences of all these are.
        means: each one's mean loss.
        kept: which sequences' losses are kept, and the losses.
        worst: (mean loss, index, tokens) of the sequences of largest mean loss.
    """

    index: Int[np.ndarray, " sequence"]
    means: Float[np.ndarray, " sequence"]
    kept: tuple[np.ndarray, np.ndarray]
    worst: list[tuple[float, int, Int[Tensor, " pos"]]]


def loss_sums(
    model: LensModel,
    tokens: TokenSource,
    *,
    first: int = 0,
    keep: int | None = None,
    worst: int = 3,
    per_pass: int = 4096,
    progress: Progress | None = None,
) -> LossSums:
    """`evaluate_loss`' statistics of sequences of which the first is number `first` of all."""
    check_next_token(model)
    per_pass = min(whole(per_pass, "per_pass", least=1), max(1, LOGITS_PER_PASS // model.cfg.d_vocab))
    sample: Sample | None = None
    n_pos, means = 0, []
    largest: list[tuple[float, int, Tensor]] = []
    seen = first
    for batch in token_batches(model, tokens, per_pass=per_pass, least=2, progress=progress):
        if sample is None:
            n_pos = batch.shape[1]
            sample = _sample_of(n_pos - 1, keep)
        elif n_pos != batch.shape[1]:
            raise ValueError(f"sequences have {batch.shape[1]} tokens, earlier ones {n_pos}")
        with torch.no_grad():
            loss = cross_entropy(unembed(model, run(model, batch)), batch).float().cpu()
        sample.add(np.arange(seen, seen + len(loss)), loss.numpy())
        means.append(loss.double().mean(1))
        in_order = means[-1].nan_to_num(nan=torch.inf).tolist()
        # The tokens stay where they are: a copy of each would be a wait for the device.
        largest = _largest(largest + [(mean, seen + i, batch[i]) for i, mean in enumerate(in_order)], worst)
        seen += len(batch)
    assert sample is not None  # token_batches gives at least one
    return LossSums(
        np.arange(first, seen),
        torch.cat(means).numpy(),
        sample.kept(),
        [(mean, i, row.cpu().clone()) for mean, i, row in largest],
    )


def evaluation_of(
    model: LensModel,
    parts: Sequence[LossSums],
    *,
    keep: int | None = None,
    worst: int = 3,
    draws: int = 1000,
    seed: int = 0,
) -> LossEvaluation:
    """The evaluation of a set of sequences from the statistics of its parts, whatever the split."""
    index, means = (np.concatenate([getattr(part, name) for part in parts]) for name in ("index", "means"))
    means = means[np.argsort(index)]
    sample = _sample_of(parts[0].kept[1].shape[1], keep)
    for part in parts:
        sample.add(*part.kept)
    losses = sample.kept()[1]
    levels = [0.0005, 0.025, 0.5, 0.975, 0.9995]
    lowest, low, median, high, highest = np.quantile(losses.ravel(), levels).tolist()
    return LossEvaluation(
        losses=torch.from_numpy(losses),
        per_sequence=torch.from_numpy(means),
        mean=torch.from_numpy(means).mean().item(),
        interval=floats(mean_interval(means, draws=draws, seed=seed)),
        median=median,
        range95=(low, high),
        range999=(lowest, highest),
        model=name_of(model),
        worst=tuple(
            _name(model, index, loss, row.to(model.cfg.device))
            for loss, index, row in _largest([entry for part in parts for entry in part.worst], worst)
        ),
    )


def _sample_of(n_predictions: int, keep: int | None) -> Sample:
    return Sample(n_predictions, None if keep is None else max(1, keep // n_predictions), "float32")


def _largest(entries: list[tuple[float, int, Tensor]], n: int) -> list[tuple[float, int, Tensor]]:
    return sorted(entries, key=lambda entry: (-entry[0], entry[1]))[:n]


def floats(bounds: tuple[np.ndarray, np.ndarray]) -> tuple[float, float]:
    return float(bounds[0]), float(bounds[1])


# ---------------------------------------------------------------------------------------------------------
# Naming a sequence and the place where it goes wrong


def _name(model: LensModel, index: int, loss: float, tokens: Int[Tensor, " pos"]) -> WorstSequence:
    norms, ids = _norms(model, tokens), tokens.tolist()
    where: dict[str, Any] = {}
    if norms.shape[1] > 2:
        typical = norms[:, 1:].nanquantile(0.5, dim=1, keepdim=True)
        ratio = (norms[:, 1:] / typical).nan_to_num(nan=torch.inf, posinf=torch.inf)
        exploded = (ratio > EXPLODED).any(1).nonzero()
        if len(exploded):
            layer = int(exploded[0])
            position = int(ratio[layer].argmax()) + 1
            where = {
                "position": position,
                "token": _text(model, ids[position : position + 1]),
                "layer": layer,
                "ratio": ratio[layer, position - 1].item(),
            }
    return WorstSequence(index, loss, _text(model, ids[:12]), **where)


def _norms(model: LensModel, tokens: Int[Tensor, " pos"]) -> Float[Tensor, "layer pos"]:
    """After each layer; on the CPU."""
    norms: list[Tensor] = []

    def look(x: Tensor) -> None:
        # No float64 where there may be none; a residual stream as long as 1e19 is inf in float32, and has exploded.
        norms.append(torch.linalg.vector_norm(x[0].to(torch.promote_types(x.dtype, torch.float32)), dim=-1))

    hooks = {f"blocks.{i}.hook_resid_post": partial(look) for i in range(model.cfg.n_layers)}
    with torch.no_grad():
        run(model, tokens[None], hooks=hooks)
    return torch.stack(norms).cpu()


def _text(model: LensModel, ids: list[int]) -> str:
    """The tokens as text; their ids for a model without a tokenizer."""
    return " ".join(map(str, ids)) if model.tokenizer is None else model.tokenizer.decode(ids)
