"""Small networks trained with early stopping: one loop, for the encoder and for the linear probe."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..arguments import number, whole
from ..batching import Progress


@dataclass(frozen=True)
class Training:
    """How an encoder is trained. The paper's own has hidden layers of 4,096 and a learning rate of 3e-5 to 1e-4.

    Attributes:
        hidden: width of each hidden layer.
        depth: how many of them.
        dropout: share of hidden numbers that are dropped in training.
        epochs: at most.
        patience: epochs without a nearer output on the held-out prompts, after which it stops; the best are kept.

    Raises:
        ValueError: a number outside its range.
    """

    hidden: int = 512
    depth: int = 1
    dropout: float = 0.1
    epochs: int = 80
    patience: int = 15
    batch: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4

    def __post_init__(self):
        for name in ("hidden", "depth", "epochs", "patience", "batch"):
            whole(getattr(self, name), name, least=1)
        number(self.dropout, "dropout", least=0.0, below=1.0)
        number(self.learning_rate, "learning_rate", above=0.0)
        number(self.weight_decay, "weight_decay", least=0.0)


def encoder_of(d_model: int, dim: int, training: Training) -> nn.Sequential:
    """The network from a pooled stream to the codebook's space: ReLU, so that it is linear around every prompt."""
    widths = [d_model, *[training.hidden] * training.depth]
    parts: list[nn.Module] = []
    for a, b in pairwise(widths):
        parts += [nn.Linear(a, b), nn.ReLU(), nn.Dropout(training.dropout)]
    return nn.Sequential(*parts, nn.Linear(widths[-1], dim))


def bundle_loss(out: Float[Tensor, "batch dim"], target: Float[Tensor, "batch dim"]) -> Float[Tensor, ""]:
    """Binary cross-entropy of the signs and 0.1 of the squared error; a tie, 0, is as likely the one as the other."""
    of_signs = F.binary_cross_entropy_with_logits(out, (target + 1) / 2)
    return of_signs + 0.1 * F.mse_loss(torch.tanh(out / 2), target)


def distance(out: Float[Tensor, "batch dim"], target: Float[Tensor, "batch dim"]) -> Float[Tensor, ""]:
    """1 less the mean cosine: what stops the training.

    Of answers that it has never seen an encoder can know nothing: their cross-entropy grows with all that it learns of
    the others, their cosine does not.
    """
    return 1 - F.cosine_similarity(torch.tanh(out / 2), target).mean()


def train(
    module: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    data: tuple[Tensor, Tensor],
    held_out: tuple[Tensor, Tensor],
    training: Training,
    seed: int,
    progress: Progress | None = None,
    *,
    judge: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> list[tuple[float, float]]:
    """Train a module in place, and leave it with the best weights, in eval mode.

    Args:
        data, held_out: inputs and targets; without any held out the training's own loss decides.
        judge: in place of the loss on what is held out, smaller is better.

    Returns:
        (loss, judge's number or loss on what is held out) after each epoch.
    """
    x, y = data
    optimizer = torch.optim.AdamW(module.parameters(), training.learning_rate, weight_decay=training.weight_decay)
    history: list[tuple[float, float]] = []
    best, kept, since = float("inf"), copy.deepcopy(module.state_dict()), 0
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        for epoch in range(training.epochs):
            module.train()
            total = 0.0
            for rows in torch.randperm(len(x)).split(training.batch):
                optimizer.zero_grad()
                value = loss(module(x[rows]), y[rows])
                value.backward()
                optimizer.step()
                total += value.item() * len(rows)
            module.eval()
            with torch.no_grad():
                other = (judge or loss)(module(held_out[0]), held_out[1]).item() if len(held_out[0]) else total / len(x)
            history.append((total / len(x), other))
            if progress is not None:
                progress(epoch + 1, training.epochs)
            if other < best:
                best, kept, since = other, copy.deepcopy(module.state_dict()), 0
            elif (since := since + 1) >= training.patience:
                break
    module.load_state_dict(kept)
    module.eval().requires_grad_(False)
    return history
