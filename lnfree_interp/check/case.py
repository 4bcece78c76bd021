"""What the laws are tried on: a model, prompts, and its own answers, read by plain hooks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..batching import Tokens, check_tokens
from ..lens import LensModel
from ..pairs import PromptPairs
from ..patching import SITES

TEXTS = (
    "The old house by the river had stood empty for a year when the girl and her brother came to see it",
    "In the morning he took his hat and went out, and nobody in the town ever saw him or his dog again",
)
MOST_TOKENS = 8  # of a prompt
SAMPLE = 3  # layers, and cells or components of each


@dataclass(frozen=True)
class Case:
    """What the laws are tried on.

    Attributes:
        logits, corrupted_logits: the model's own, of the pairs' prompts.
        checkpoint: what Hugging Face's transformers may load of the same model.
    """

    model: LensModel
    pairs: PromptPairs
    logits: Float[Tensor, "batch pos d_vocab_out"]
    corrupted_logits: Float[Tensor, "batch pos d_vocab_out"]
    checkpoint: str | Path | None
    generator: torch.Generator

    @property
    def tokens(self) -> Int[Tensor, "batch pos"]:
        return self.pairs.clean

    @cached_property
    def clean(self) -> dict[str, Tensor]:
        """Hook name -> activation, of the clean prompts."""
        return self._read(self.pairs.clean)

    @cached_property
    def corrupted(self) -> dict[str, Tensor]:
        """Hook name -> activation, of the corrupted prompts."""
        return self._read(self.pairs.corrupted)

    @cached_property
    def gradients(self) -> dict[str, Tensor]:
        """Hook name -> gradient of the corrupted prompts' metric by what is added there, by autograd."""
        added: dict[str, Tensor] = {}

        def add(x: Tensor, hook: Any, name: str) -> Tensor:
            added[name] = torch.zeros_like(x, requires_grad=True)
            return x + added[name]

        with torch.enable_grad():
            value = self.metric(self._run(self.pairs.corrupted, add)).sum()
            found = torch.autograd.grad(value, list(added.values()), allow_unused=True)
        return {name: torch.zeros_like(x) if g is None else g for (name, x), g in zip(added.items(), found)}

    def metric(self, logits: Float[Tensor, "batch pos d_vocab_out"]) -> Float[Tensor, " batch"]:
        """The logit difference of the answers at the last position."""
        return logits[:, -1].gather(-1, self.pairs.answers).mul(logits.new_tensor([1, -1])).sum(-1)

    def some(self, n: int, k: int = SAMPLE) -> list[int]:
        """The last of n and some others, in order."""
        others = torch.randperm(n - 1, generator=self.generator)[: k - 1].tolist()
        return sorted([*others, n - 1])

    @torch.no_grad()
    def _read(self, tokens: Int[Tensor, "batch pos"]) -> dict[str, Tensor]:
        kept: dict[str, Tensor] = {}

        def keep(x: Tensor, hook: Any, name: str) -> None:
            kept[name] = x.detach().clone()

        self._run(tokens, keep)
        return kept

    def _run(self, tokens: Int[Tensor, "batch pos"], hook: Callable[..., Tensor | None]) -> Tensor:
        """The model's own forward with a plain hook wherever the package may look."""
        points = ["hook_embed", "hook_pos_embed"]
        points += [f"blocks.{i}.{site.hook}" for i in range(self.model.cfg.n_layers) for site in SITES.values()]
        hooks = [(name, partial(hook, name=name)) for name in points if name in self.model.hook_dict]
        return self.model.run_with_hooks(tokens, fwd_hooks=hooks)


def make_case(model: LensModel, tokens: Tokens | None, checkpoint: str | Path | None, seed: int) -> Case:
    """A model with the prompts given, or with some of its own."""
    generator = torch.Generator().manual_seed(seed)
    tokens = check_tokens(model, default_prompts(model, generator) if tokens is None else tokens, least=2)
    with torch.no_grad():
        logits = model(tokens)
        pairs = make_pairs(model, tokens, logits)
        return Case(model, pairs, logits, model(pairs.corrupted), checkpoint, generator)


def default_prompts(model: LensModel, generator: torch.Generator) -> Int[Tensor, "batch pos"]:
    n_pos = min(MOST_TOKENS, model.cfg.n_ctx)
    if model.tokenizer is None:
        return torch.randint(model.cfg.d_vocab, (2, n_pos), generator=generator)
    rows = [model.to_tokens(text, truncate=False)[0] for text in TEXTS]
    return torch.stack([row[: min(n_pos, *map(len, rows))] for row in rows])


def make_pairs(model: LensModel, tokens: Int[Tensor, "batch pos"], logits: Tensor) -> PromptPairs:
    """Each prompt, and itself with another token in one place; answers are the two likeliest tokens."""
    corrupted, n_pos = tokens.clone(), tokens.shape[1]
    for i in range(len(tokens)):
        pos = min(n_pos - 1, 2 + i)
        corrupted[i, pos] = (tokens[i, pos] + 1) % model.cfg.d_vocab
    return PromptPairs(tokens, corrupted, logits[:, -1].float().topk(2).indices)
