"""What a model has at the last token of prompts, layer by layer, and how a probe makes one vector of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..batching import Progress, Tokens, as_ids, tokens_as_given
from ..dla.readers import Reader
from ..dla.reading import resolve
from ..forward import run, unembed
from ..layers import Norm, wide
from ..lens import LensModel
from ..through_hooks import Hook

POOLINGS = ("mean", "kmeans", "last")
# Tokens per pass.
TOKENS_PER_PASS = 4096
Prompt = Tokens


@dataclass(frozen=True)
class Observed:
    """The stream at the last token of prompts, on the CPU.

    Attributes:
        raw: Float[Tensor, "layer prompt d_model"], where it enters each of the layers; the final one enters n_layers.
        streams: the same as the probe reads it, through the norm there.
        final: Float[Tensor, "prompt d_model"].
        logits: Float[Tensor, "prompt answer"], the model's own, of the answers' tokens.
        lens: Float[Tensor, "layer prompt answer"], the logit lens of `raw`.
    """

    raw: Float[Tensor, "layer prompt d_model"]
    streams: Float[Tensor, "layer prompt d_model"]
    final: Float[Tensor, "prompt d_model"]
    logits: Float[Tensor, "prompt answer"]
    lens: Float[Tensor, "layer prompt answer"]


def reader(n_layers: int, layer: int, vector: Tensor, normalised: bool) -> Reader:
    """Of a direction of the stream that enters a layer; the final one enters n_layers."""
    if layer == n_layers:
        return Reader.direction(None, vector, "final", normalised=normalised)
    return Reader.direction(layer, vector, normalised=normalised)


def norm_at(model: LensModel, layer: int, normalised: bool) -> Norm:
    """The norm through which the stream that enters a layer is read."""
    tokens = torch.zeros(1, 1, dtype=torch.long)
    anything = torch.zeros(model.cfg.d_model)
    return resolve(model, reader(model.cfg.n_layers, layer, anything, normalised), tokens, None).norm


def token_rows(model: LensModel, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Token ids of each prompt.

    Raises:
        ValueError: as `tokens_as_given`.
    """
    rows = []
    for prompt in prompts:
        ids = prompt if isinstance(prompt, str) else as_ids(prompt, "tokens")
        tokens = tokens_as_given(model, ids[None] if isinstance(ids, Tensor) and ids.ndim == 1 else ids)
        if len(tokens) != 1:
            raise ValueError(f"a probe reads one prompt at a time, not tokens of {len(tokens)}")
        rows.append(tokens[0].tolist())
    return rows


def by_length(
    rows: Sequence[Sequence[int]], device: str | torch.device | int | None
) -> Iterator[tuple[list[int], Int[Tensor, "batch pos"]]]:
    """Which prompts, and their tokens, some of one length at a time."""
    groups: dict[int, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        groups[len(row)].append(i)
    for length, members in sorted(groups.items()):
        step = max(1, TOKENS_PER_PASS // length)
        for first in range(0, len(members), step):
            some = members[first : first + step]
            yield some, torch.tensor([rows[i] for i in some], device=device)


@torch.no_grad()
def observe(
    model: LensModel,
    prompts: Sequence[Prompt],
    layers: Sequence[int],
    answers: Sequence[int],
    *,
    normalised: bool = True,
    edit: tuple[int, Callable[[Tensor, list[int]], Tensor]] | None = None,
    progress: Progress | None = None,
) -> Observed:
    """Run the model on prompts.

    Args:
        layers: where to look, from 0 to n_layers.
        answers: tokens whose logits are wanted.
        edit: (layer, function): the stream that enters it at the last token, Float[Tensor, "batch d_model"], and which
            prompts these are -> the stream that it is to be instead.
        progress: told of the prompts done.
    """
    n_layers, rows = model.cfg.n_layers, token_rows(model, prompts)
    norms = [norm_at(model, layer, normalised) for layer in layers]
    columns = torch.tensor(list(answers), device=model.cfg.device)
    found: dict[int, tuple[Tensor, ...]] = {}
    for some, tokens in by_length(rows, model.cfg.device):
        seen: dict[int, Tensor] = {}

        def look(layer: int, some: list[int] = some, seen: dict[int, Tensor] = seen) -> Hook:
            def hook(x: Tensor) -> Tensor | None:
                if edit is None or layer != edit[0]:
                    seen[layer] = x[:, -1]
                    return None
                x = x.clone()
                x[:, -1] = edit[1](x[:, -1], some)
                seen[layer] = x[:, -1]
                return x

            return hook

        names = {f"blocks.{layer}.hook_resid_pre": look(layer) for layer in {*layers, *_where(edit)} - {n_layers}}
        names[f"blocks.{n_layers - 1}.hook_resid_post"] = look(n_layers)
        final = run(model, tokens, hooks=names, positions=slice(tokens.shape[1] - 1, tokens.shape[1]))[:, -1]
        raw = torch.stack([wide(seen[layer]) for layer in layers])
        read = torch.stack([wide(norm(seen[layer])) for norm, layer in zip(norms, layers)])
        lens = torch.stack([_logits(model, seen[layer], columns) for layer in layers])
        parts = [x.cpu() for x in (raw, read, wide(final), _logits(model, final, columns), lens)]
        for j, i in enumerate(some):
            found[i] = tuple(x[..., j, :] for x in parts)
        if progress is not None:
            progress(len(found), len(rows))
    raw, read, final, logits, lens = (torch.stack(x, -2) for x in zip(*(found[i] for i in range(len(rows)))))
    return Observed(raw, read, final, logits, lens)


def _where(edit: tuple[int, object] | None) -> set[int]:
    return set() if edit is None else {edit[0]}


def _logits(model: LensModel, x: Float[Tensor, "batch d_model"], columns: Int[Tensor, " k"]) -> Tensor:
    return wide(unembed(model, x, columns.expand(len(x), -1)))


# ---------------------------------------------------------------------------------------------------------
# One vector of several layers'


def pooled(
    x: Float[Tensor, "layer batch d"], pooling: str, clusters: int
) -> tuple[Float[Tensor, "batch d"], Float[Tensor, "layer batch"]]:
    """One vector for each prompt of its layers', and how much each layer counts in it."""
    weights = pool_weights(x, pooling, clusters)
    return torch.einsum("lbd,lb->bd", x, weights), weights


def pool_weights(x: Float[Tensor, "layer batch d"], pooling: str, clusters: int) -> Float[Tensor, "layer batch"]:
    """How much each layer counts in each prompt's vector; all together 1.

    "mean": all the same; "last": the last one alone; "kmeans": the layers fall into clusters, prompt by prompt, which
    count the same: the mean of their centroids.

    Raises:
        ValueError: fewer layers than clusters.
    """
    n, batch = x.shape[:2]
    if pooling == "mean":
        return x.new_full((n, batch), 1 / n)
    if pooling == "last":
        weights = x.new_zeros(n, batch)
        weights[-1] = 1
        return weights
    check_clusters(n, clusters)
    member = one_hot(kmeans(x.transpose(0, 1), clusters), clusters).to(x)  # batch layer cluster
    sizes = member.sum(1, keepdim=True)
    return ((member / sizes.clamp(min=1)).sum(-1) / (sizes > 0).sum(-1)).T


def check_clusters(n_layers: int, clusters: int) -> None:
    """Raise ValueError where there are fewer layers than clusters."""
    if n_layers < clusters:
        raise ValueError(
            f"pooling='kmeans' makes {clusters} clusters of {n_layers} layers: give more layers or fewer clusters"
        )


def kmeans(x: Float[Tensor, "batch n d"], clusters: int, steps: int = 20) -> Int[Tensor, "batch n"]:
    """Which cluster each of n points is in (Lloyd 1982), each row of the batch by itself.

    Centroids begin at points evenly spaced along n, so that nothing is drawn at random.
    """
    start = torch.linspace(0, x.shape[1] - 1, clusters).round().long()
    centroids = x[:, start]
    which = torch.cdist(x, centroids).argmin(-1)
    for _ in range(steps):
        member = one_hot(which, clusters).to(x)
        sizes = member.sum(1)[..., None]
        means = member.transpose(1, 2) @ x / sizes.clamp(min=1)
        centroids = torch.where(sizes > 0, means, centroids)
        before, which = which, torch.cdist(x, centroids).argmin(-1)
        if torch.equal(before, which):
            break
    return which


def one_hot(which: Int[Tensor, "*rows"], n: int) -> Int[Tensor, "*rows n"]:
    return torch.nn.functional.one_hot(which, n)
