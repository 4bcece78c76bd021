"""Attention sinks: heads that park their attention on position 0."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..arguments import number
from ..batching import Progress, TokenSource, token_batches
from ..forward import run
from ..lens import LensModel, ModelOrName
from ..models import as_model
from ..results import Result, counted, drawing, name_of

# Entries of one layer's attention patterns held at a time.
PATTERN_ENTRIES = 2**26


@dataclass(frozen=True, repr=False)
class AttentionSinks(Result):
    """How much attention heads put on position 0.

    Queries are those at positions 1 and later: position 0 has nowhere else to look.

    Attributes:
        labels: "L0H0", "L0H1", ..., aligned with the next three.
        attention: Float[Tensor, "head"], mean attention on position 0.
        stderr: Float[Tensor, "head"], its standard error over sequences.
        queries: Float[Tensor, "head"], share of queries that put at least `threshold` on position 0.
        threshold: what makes a sink.
        head_rate: share of heads whose mean attention on position 0 reaches the threshold (P2's sink rate).
        query_rate: share of all heads' queries that reach it.
        model: whose heads.
    """

    labels: tuple[str, ...]
    attention: Float[Tensor, " head"]
    stderr: Float[Tensor, " head"]
    queries: Float[Tensor, " head"]
    threshold: float
    head_rate: float
    query_rate: float
    model: str = ""

    def summary(self) -> str:
        """One line: how many heads are sinks, and which most."""
        n, i = int((self.attention >= self.threshold).sum()), int(self.attention.argmax())
        most = f"most on position 0 has {self.labels[i]}, {self.attention[i].item():.1%} of its attention"
        rates = f"{n} of {counted(len(self.labels), 'head')} and {self.query_rate:.1%} of queries"
        return f"{f'of {self.model}: ' * bool(self.model)}{rates} are sinks (from {self.threshold:.0%} on); {most}"

    def picture(self) -> str:
        """A grid of heads by their mean attention on position 0."""
        from ..figures.measured_pictures import of_sinks

        return of_sinks(self)

    def plot(self):
        """A figure of plotly: every head's mean attention on position 0, layer by layer.

        Raises:
            ImportError: there is no plotly.
        """
        with drawing():
            from ..figures.norms import sinks_figure

        return sinks_figure({self.model or "model": self})

    def table(self):
        """One row per head, and whether it is a sink."""
        import pandas as pd

        return pd.DataFrame(
            {
                "head": self.labels,
                "attention": self.attention.tolist(),
                "stderr": self.stderr.tolist(),
                "share_of_queries": self.queries.tolist(),
                "sink": (self.attention >= self.threshold).tolist(),
            }
        )


def attention_sinks(
    model: ModelOrName,
    tokens: TokenSource,
    *,
    threshold: float = 0.3,
    per_pass: int = 4096,
    progress: Progress | None = None,
) -> AttentionSinks:
    """Mean attention on position 0 of every head, and sink rates at a threshold (P2, attention sinks).

    Args:
        tokens: Int[Tensor, "batch pos"], or an iterable of such; at least two positions.
        threshold: a head (query) is a sink if its mean attention (attention) on position 0 reaches this.
        per_pass: tokens in memory at a time; fewer where attention patterns are large.
        progress: told of the sequences done.

    Raises:
        ValueError: tokens that are no token ids of the model's, a threshold outside 0..1.

    Example:
        >>> from lnfree_interp import attention_sinks, load_model
        >>> model = load_model("tiny-noLN", device="cpu")
        >>> sinks = attention_sinks(model, model.to_tokens("It was a dark and stormy night."))
        >>> len(sinks.labels) == model.cfg.n_layers * model.cfg.n_heads, 0 <= sinks.head_rate <= 1
        (True, True)
    """
    model = as_model(model)
    threshold = number(threshold, "threshold", least=0, most=1)
    part = sink_sums(model, tokens, threshold=threshold, per_pass=per_pass, progress=progress)
    return sinks_of([part], threshold=threshold, model=name_of(model))


@dataclass(frozen=True)
class SinkSums:
    """What `AttentionSinks` needs of some sequences; of parts of a set, what `sinks_of` merges.

    Attributes:
        total, squares: sums over sequences of their mean attention on position 0 and of its square.
        reached: queries that reach the threshold.
        n_sequences, n_queries: of each head.
    """

    total: Float[Tensor, "layer head"]
    squares: Float[Tensor, "layer head"]
    reached: Float[Tensor, "layer head"]
    n_sequences: int
    n_queries: int


def sink_sums(
    model: LensModel, tokens: TokenSource, *, threshold: float, per_pass: int = 4096, progress: Progress | None = None
) -> SinkSums:
    """`attention_sinks`' sums."""
    cfg = model.cfg
    total, squares, reached = (torch.zeros(cfg.n_layers, cfg.n_heads, dtype=torch.float64) for _ in range(3))
    n_sequences = n_queries = 0
    for batch in token_batches(model, tokens, per_pass=per_pass, least=2, progress=progress):
        rows = max(1, PATTERN_ENTRIES // (cfg.n_heads * batch.shape[1] ** 2))
        for part in batch.split(rows):
            # Query by query to the CPU, in one copy, and float64 from there on: not every device has it.
            on_first = _on_first(model, part).cpu().double()
            mean = on_first.mean(-1)
            total += mean.sum(1)
            squares += mean.square().sum(1)
            reached += (on_first >= threshold).double().sum((1, 3))
            n_sequences += part.shape[0]
            n_queries += part.shape[0] * (part.shape[1] - 1)
    return SinkSums(total, squares, reached, n_sequences, n_queries)


def sinks_of(parts: Sequence[SinkSums], *, threshold: float, model: str = "") -> AttentionSinks:
    """The statistics of a set of sequences from those of its parts, whatever the split."""
    total, squares, reached = (
        torch.stack([getattr(part, name) for part in parts]).sum(0) for name in ("total", "squares", "reached")
    )
    n_layers, n_heads = total.shape
    n_sequences, n_queries = sum(part.n_sequences for part in parts), sum(part.n_queries for part in parts)
    mean = (total / n_sequences).flatten()
    variance = (squares.flatten() / n_sequences - mean.square()).clamp_min(0)
    queries = (reached / n_queries).flatten()
    return AttentionSinks(
        labels=tuple(f"L{i}H{j}" for i in range(n_layers) for j in range(n_heads)),
        attention=mean,
        stderr=(variance / max(n_sequences - 1, 1)).sqrt(),
        queries=queries,
        threshold=threshold,
        head_rate=(mean >= threshold).double().mean().item(),
        query_rate=queries.mean().item(),
        model=model,
    )


def _on_first(model: LensModel, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "layer batch head query"]:
    """Attention on position 0 of the queries at positions 1 and later."""
    seen: list[Tensor] = []

    def look(pattern: Tensor) -> None:
        # A copy, in float32 at least: what is kept must not be a view of the whole pattern.
        seen.append(pattern[:, :, 1:, 0].to(torch.promote_types(pattern.dtype, torch.float32), copy=True))

    with torch.no_grad():
        run(model, tokens, hooks={f"blocks.{i}.attn.hook_pattern": look for i in range(model.cfg.n_layers)})
    return torch.stack(seen)
