"""Several models on the same tokens: divergence, agreement, entropy, calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..arguments import sampling, whole
from ..batching import Progress, TokenSource, check_next_token, token_batches
from ..forward import run, unembed
from ..lens import LensModel, ModelOrName
from ..metrics import entropy, js_divergence, log_probs
from ..models import as_models
from ..results import Result, counted, drawing
from ..statistics import mean_interval
from .loss import LOGITS_PER_PASS


@dataclass(frozen=True, repr=False)
class ModelComparison(Result):
    """What several models predict on the same tokens, wherever there is a next token.

    Attributes:
        names: the models, aligned with every axis "model" and "other".
        divergence: Float[Tensor, "model other"], mean Jensen-Shannon divergence (nats).
        low, high: Float[Tensor, "model other"], its 95% interval over sequences (`statistics`).
        agreement: Float[Tensor, "model other"], share of positions with the same top token.
        loss: Float[Tensor, "model"], mean cross-entropy (nats).
        entropy: Float[Tensor, "model"], mean entropy of the predictions (nats).
        accuracy: Float[Tensor, "model"], share of next tokens that are the top token.
        calibration_error: Float[Tensor, "model"], expected calibration error of the top token: the mean over
            positions of |accuracy - confidence| of the bin they fall into.
        bin_confidence, bin_accuracy: Float[Tensor, "model bin"], means over each bin of confidence, of equal width
            from 0 to 1; nan where empty.
        bin_count: Int[Tensor, "model bin"].
    """

    names: tuple[str, ...]
    divergence: Float[Tensor, "model other"]
    low: Float[Tensor, "model other"]
    high: Float[Tensor, "model other"]
    agreement: Float[Tensor, "model other"]
    loss: Float[Tensor, " model"]
    entropy: Float[Tensor, " model"]
    accuracy: Float[Tensor, " model"]
    calibration_error: Float[Tensor, " model"]
    bin_confidence: Float[Tensor, "model bin"]
    bin_accuracy: Float[Tensor, "model bin"]
    bin_count: Int[Tensor, "model bin"]

    def summary(self) -> str:
        """One line: the models' losses, and the two that differ most."""
        losses = ", ".join(f"{name} {loss:.4f}" for name, loss in zip(self.names, self.loss.tolist()))
        i, j = divmod(int(self.divergence.argmax()), len(self.names))
        furthest = f"; furthest apart {self.names[i]} and {self.names[j]}, JSD {self.divergence[i, j].item():.4f}"
        n = counted(int(self.bin_count[0].sum()), "token") if len(self.names) else "no tokens"
        return f"of {counted(len(self.names), 'model')} on {n}, losses in nats: {losses}{furthest * (i != j)}"

    def picture(self) -> str:
        """The models' numbers, and a grid of divergences."""
        from ..figures.measured_pictures import of_comparison

        return of_comparison(self)

    def plot(self):
        """A figure of plotly: accuracy of the top token against its probability.

        Raises:
            ImportError: there is no plotly.
        """
        with drawing():
            from ..figures.evaluate import reliability_figure

        return reliability_figure(self)

    def table(self):
        """One row per model: loss, entropy, accuracy, calibration, divergence from and agreement with each other."""
        import pandas as pd

        table = pd.DataFrame(
            {
                "model": self.names,
                "loss": self.loss.tolist(),
                "entropy": self.entropy.tolist(),
                "accuracy": self.accuracy.tolist(),
                "ece": self.calibration_error.tolist(),
            }
        )
        for quantity, values in (("jsd", self.divergence), ("agreement", self.agreement)):
            for j, other in enumerate(self.names):
                table[f"{quantity}:{other}"] = values[:, j].tolist()
        return table


def compare_models(
    models: Mapping[str, ModelOrName],
    tokens: TokenSource,
    *,
    n_bins: int = 15,
    draws: int = 1000,
    seed: int = 0,
    per_pass: int = 4096,
    progress: Progress | None = None,
) -> ModelComparison:
    """Divergence, top-token agreement, entropy and calibration of models on the same tokens (P2, calibration).

    Args:
        models: name -> HookedTransformer or TransformerBridge, all of one vocabulary.
        tokens: Int[Tensor, "batch pos"], or an iterable of such.
        n_bins: bins of the calibration error and the reliability plot.
        draws: bootstrap draws of sequences. Some numbers per sequence and pair of models are kept.
        per_pass: tokens in memory at a time; fewer where all models' logits would fill more than 256 MiB.
        progress: told of the sequences done.

    Raises:
        ValueError: no models, models of different vocabularies, fewer than one bin, tokens that are no token ids
            of the models'.

    Example:
        >>> from lnfree_interp import compare_models, load_model
        >>> models = {name: load_model(name, device="cpu") for name in ("tiny-vanilla", "tiny-noLN")}
        >>> tokens = models["tiny-noLN"].to_tokens("It was a dark and stormy night.")
        >>> result = compare_models(models, tokens)
        >>> result.divergence.shape, result.agreement.diagonal().tolist()
        (torch.Size([2, 2]), [1.0, 1.0])
    """
    models, drawn = as_models(models), sampling(draws, seed)
    part = comparison_sums(models, tokens, n_bins=n_bins, per_pass=per_pass, progress=progress)
    return comparison_of(tuple(models), [part], **drawn)


@dataclass(frozen=True)
class ComparisonSums:
    """What `ModelComparison` needs of some sequences; of parts of a set, what `comparison_of` merges.

    Attributes:
        index: which sequences of all these are.
        values: each one's means: divergence and agreement of each two models; loss, entropy, accuracy of each.
        bins: count, sum of confidence and sum of right answers in each bin.
    """

    index: Int[Tensor, " sequence"]
    values: Float[Tensor, "sequence quantity"]
    bins: Float[Tensor, "three model bin"]


def comparison_sums(
    models: Mapping[str, LensModel],
    tokens: TokenSource,
    *,
    first: int = 0,
    n_bins: int = 15,
    per_pass: int = 4096,
    progress: Progress | None = None,
) -> ComparisonSums:
    """`compare_models`' statistics of sequences of which the first is number `first` of all."""
    if not models:
        raise ValueError("there are no models to compare")
    n_bins, per_pass = whole(n_bins, "n_bins", least=1), whole(per_pass, "per_pass", least=1)
    parts = list(models.values())
    sizes = {name: model.cfg.d_vocab for name, model in models.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"models of different vocabularies cannot be compared: {sizes}")
    for model in parts:
        check_next_token(model)
    n = len(parts)
    # Pairs hold three more tensors of the logits' size while they are compared.
    per_pass = min(per_pass, max(1, LOGITS_PER_PASS // (parts[0].cfg.d_vocab * (n + 3))))
    sequences: list[Tensor] = []  # per batch: [batch, model, other] of divergence and agreement, [batch, 3, model]
    bins = torch.zeros(3, n, n_bins, dtype=torch.float64)  # count, sum of confidence, sum of right answers
    for batch in token_batches(parts[0], tokens, per_pass=per_pass, least=2, progress=progress):
        with torch.no_grad():
            logits = [
                unembed(model, run(model, batch.to(model.cfg.device))[:, :-1]).to(batch.device) for model in parts
            ]
            sequences.append(_per_sequence(logits, batch[:, 1:], bins))
    values = torch.cat(sequences)
    return ComparisonSums(torch.arange(first, first + len(values)), values, bins)


def comparison_of(
    names: tuple[str, ...], parts: Sequence[ComparisonSums], *, draws: int = 1000, seed: int = 0
) -> ModelComparison:
    """The comparison on a set of sequences from the statistics of its parts, whatever the split."""
    n = len(names)
    values = torch.cat([part.values for part in parts])[torch.cat([part.index for part in parts]).argsort()]
    square = values[:, : 2 * n * n].unflatten(1, (2, n, n))
    loss, entropies, accuracy = values[:, 2 * n * n :].unflatten(1, (3, n)).mean(0)
    low, high = (torch.from_numpy(b) for b in mean_interval(square[:, 0].numpy(), draws=draws, seed=seed))
    divergence, agreement = square.mean(0)
    count, confidence, right = torch.stack([part.bins for part in parts]).sum(0)
    error = (right - confidence).abs().sum(1) / count.sum(1)
    return ModelComparison(
        names=names,
        divergence=divergence,
        low=low,
        high=high,
        agreement=agreement,
        loss=loss,
        entropy=entropies,
        accuracy=accuracy,
        calibration_error=error,
        bin_confidence=confidence / count,
        bin_accuracy=right / count,
        bin_count=count.long(),
    )


def _per_sequence(
    logits: list[Float[Tensor, "batch pos d_vocab"]],
    targets: Int[Tensor, "batch pos"],
    bins: Float[Tensor, "three model bin"],
) -> Float[Tensor, "batch quantity"]:
    """Each sequence's means: divergences, agreements, losses, entropies, accuracies; fills the bins."""
    n = len(logits)
    top, of_models, of_pairs = [], [], []
    for x in logits:
        log_p = log_probs(x)
        best, token = log_p.max(-1)
        loss = -log_p.gather(-1, targets[..., None])[..., 0]
        top.append(token)
        of_models += [loss, entropy(x), token == targets, best]
    pairs = [(i, j) for i in range(n) for j in range(i)]
    for i, j in pairs:
        of_pairs += [js_divergence(logits[i], logits[j]), top[i] == top[j]]
    # Token by token to the CPU, in one copy, and float64 from there on: not every device has it.
    dtype = reduce(torch.promote_types, (x.dtype for x in of_models))
    values = torch.stack([x.to(dtype) for x in of_models + of_pairs]).cpu().double()
    loss, entropies, right, best = values[: 4 * n].unflatten(0, (n, 4)).unbind(1)
    confidence = best.exp()
    which = (confidence * bins.shape[2]).long().clamp_max(bins.shape[2] - 1)
    for j, amount in enumerate((torch.ones_like(right), confidence, right)):
        bins[j].scatter_add_(1, which.flatten(1), amount.flatten(1))
    square = torch.zeros(2, n, n, len(targets), dtype=torch.float64)
    square[1] = torch.eye(n, dtype=torch.float64)[..., None]
    for (i, j), of_pair in zip(pairs, values[4 * n :].mean(-1).unflatten(0, (-1, 2))):
        square[:, i, j] = square[:, j, i] = of_pair
    summary = torch.stack([loss, entropies, right]).mean(-1)
    return torch.cat([square.flatten(0, 2), summary.flatten(0, 1)]).T
