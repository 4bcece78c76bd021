"""Token ids in passes of bounded size, checked once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from jaxtyping import Int
from torch import Tensor

TokenSource = Tensor | Iterable[Tensor]
"""Int[Tensor, "batch pos"], or an iterable of such, for sets that are read as they go."""

Progress = Callable[[int, "int | None"], object]
"""Told (done, in all) as the work goes on; in all is None where nobody knows. What is counted, each function says."""


def check_tokens(model, tokens: Tensor, *, least: int = 1) -> Int[Tensor, "batch pos"]:
    """The tokens on the model's device.

    Raises:
        ValueError: no integers, not [batch pos], empty, fewer than `least` positions, longer than the model's
            context, or ids outside its vocabulary.
    """
    cfg = model.cfg
    if not isinstance(tokens, Tensor) or tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise ValueError(f"tokens must be a tensor of token ids, not {getattr(tokens, 'dtype', type(tokens).__name__)}")
    if tokens.ndim != 2 or tokens.numel() == 0:
        raise ValueError(f"tokens have shape {list(tokens.shape)}; wanted is [batch, pos], neither of them empty")
    if tokens.shape[1] < least:
        raise ValueError(f"sequences have {tokens.shape[1]} tokens, at least {least} are needed")
    if tokens.shape[1] > cfg.n_ctx:
        raise ValueError(f"sequences have {tokens.shape[1]} tokens, the model's context holds {cfg.n_ctx}")
    check_ids(tokens, cfg.d_vocab)
    return tokens.to(cfg.device, torch.long)


def check_ids(ids: Tensor, d_vocab: int, what: str = "tokens") -> None:
    """Raise ValueError unless all token ids are in the vocabulary."""
    low, high = (int(bound) for bound in ids.aminmax())
    if low < 0 or high >= d_vocab:
        wrong = low if low < 0 else high
        raise ValueError(f"{what}: token id {wrong} is outside the model's vocabulary of {d_vocab}")


def token_batches(
    model, tokens: TokenSource, *, per_pass: int = 4096, least: int = 1, progress: Progress | None = None
) -> Iterator[Int[Tensor, "batch pos"]]:
    """Batches of at most `per_pass` tokens (at least one sequence each), in order.

    Args:
        progress: told of the sequences done, once the next batch (or the end) is asked for.

    Raises:
        ValueError: see `check_tokens`; an iterable that holds nothing.
    """
    parts = [tokens] if isinstance(tokens, Tensor) else tokens
    total = sum(map(len, parts)) if isinstance(parts, (list, tuple)) else None
    done = 0
    for part in parts:
        part = check_tokens(model, part, least=least)
        for batch in part.split(max(1, per_pass // part.shape[1])):
            yield batch
            done += len(batch)
            if progress is not None:
                progress(done, total)
    if done == 0:
        raise ValueError("there are no tokens to run on")
