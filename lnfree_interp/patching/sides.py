"""The two runs of attribution patching, the gradient at a site, and its sum over each cell."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..forward import Norm, PackedWeights, run
from ..pairs import PromptPairs
from .cells import Request, read_metric
from .effect import SITES

Activations = dict[int, Tensor]
"""Layer -> the site's activation of all prompts."""


def numbers_per_prompt(model, request: Request) -> int:
    """Roughly what autograd keeps of a forward for one prompt."""
    cfg = model.cfg
    per_position = 14 * cfg.d_model + 3 * (cfg.d_mlp or 0) + 2 * cfg.n_heads * request.n_read
    return request.n_read * cfg.n_layers * per_position


@contextmanager
def frozen(model) -> Iterator[None]:
    """No gradients of weights: autograd keeps less, and nothing is left in `.grad`."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    for p in trainable:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trainable:
            p.requires_grad_(True)


@dataclass(frozen=True)
class Case:
    """The two runs of some prompts, as far as gradients need them."""

    model: object
    request: Request
    pairs: PromptPairs
    tokens: Tensor  # of the base run
    base: Activations
    source: Activations
    delta: Activations  # source - base, exactly 0 before the first different token
    resid: dict[
        int, Tensor
    ]  # residual stream that enters each layer of the base run; 0 also of the source run at -1
    at_base: Tensor
    at_source: Tensor
    nodes: Activations  # the base run's, in the graph of `value`
    value: Tensor
    packed: PackedWeights | None
    norm: Norm | None

    def gradients(self) -> Activations:
        return gradients(self.value, self.nodes)


def site_hooks(request: Request, hook: Callable[[Tensor, int], Tensor | None]) -> dict[str, Callable]:
    """The hook on the site's activation in the layers asked for; it is told the layer."""
    name = SITES[request.site].hook
    return {f"blocks.{i}.{name}": lambda x, i=i: hook(x, i) for i in request.layers}


def gradients(value: Tensor, nodes: Activations, *, create_graph: bool = False) -> Activations:
    """The gradient of each prompt's metric; one backward for all, since prompts do not mix."""
    if not value.requires_grad:
        return {i: torch.zeros_like(x) for i, x in nodes.items()}
    grads = torch.autograd.grad(
        value.sum(), list(nodes.values()), create_graph=create_graph, retain_graph=True if create_graph else None,
        materialize_grads=True,
    )  # fmt: skip
    return dict(zip(nodes, grads))


def both_sides(
    model, request: Request, pairs: PromptPairs, packed=None, norm=None, *, graph: bool = True
) -> Case:
    """One forward of the source prompts, without a graph, and one of the base prompts, with it if asked for."""
    denoising = request.direction == "denoising"
    tokens = (pairs.corrupted, pairs.clean) if denoising else (pairs.clean, pairs.corrupted)
    base_tokens, source_tokens = (t[:, : request.n_read] for t in tokens)
    everyone = torch.arange(len(pairs), device=base_tokens.device)
    reads = list(request.reads)
    source: Activations = {}
    nodes: Activations = {}
    resid: dict[int, Tensor] = {}

    def keep(x: Tensor, i: int) -> None:
        source[i] = x

    def watch(x: Tensor, i: int) -> Tensor:
        nodes[i] = x if x.requires_grad or not graph else x.detach().requires_grad_()
        return nodes[i]

    first = "blocks.0.hook_resid_pre"
    with torch.no_grad():
        hooks = site_hooks(request, keep)
        own = hooks.get(first)

        def entrance(x: Tensor) -> None:
            resid[-1] = x
            if own is not None:
                own(x)

        final = run(model, source_tokens, hooks=hooks | {first: entrance}, packed=packed)
        at_source = read_metric(model, request, pairs, final[:, reads], everyone, norm=norm)
    hooks = site_hooks(request, watch)
    for i in range(model.cfg.n_layers):
        name = f"blocks.{i}.hook_resid_pre"

        hooks[name] = _noting(resid, i, hooks.get(name))
    with torch.set_grad_enabled(graph):
        final = run(model, base_tokens, hooks=hooks, packed=packed)
        value = read_metric(model, request, pairs, final[:, reads], everyone, norm=norm)
    base = {i: x.detach() for i, x in nodes.items()}
    after = torch.arange(request.n_read, device=final.device) >= pairs.first_difference[:, None]
    delta = {
        i: torch.where(_over_positions(after, request, source[i]), source[i] - base[i], 0.0) for i in base
    }
    return Case(
        model, request, pairs, base_tokens, base, source, delta, resid, value.detach(), at_source, nodes, value,
        packed, norm,
    )  # fmt: skip


def _noting(resid: dict[int, Tensor], i: int, own: Callable | None) -> Callable:
    """A hook that notes the residual stream that enters a layer, after the site's own hook if it has one there."""

    def note(x: Tensor) -> Tensor | None:
        new = None if own is None else own(x)
        resid[i] = (x if new is None else new).detach()
        return new

    return note


def _over_positions(mask: Tensor, request: Request, like: Tensor) -> Tensor:
    """Bool [prompt, pos] shaped to broadcast over an activation; a pattern's position is its query's."""
    axis = 2 if request.site == "pattern" else 1
    shape = [1] * like.ndim
    shape[0], shape[axis] = mask.shape
    return mask.view(shape)


def products(delta: Activations, grads: Activations) -> Activations:
    return {i: delta[i] * grads[i] for i in delta}


def contract(request: Request, terms: Activations) -> Tensor:
    """Terms of every entry of the site's activations -> one number per cell, [prompt, layer, unit(, pos)]."""
    return torch.stack([_contract(request, terms[i]) for i in request.layers], 1)


def _contract(request: Request, x: Tensor) -> Tensor:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if request.positional:
        return x.sum(-1)
    units = list(request.units)
    if request.site == "pattern":
        x = x.sum(-1)[:, units]  # [prompt, head, query]
    else:
        x = (x if request.site == "neurons" else x.sum(-1))[:, :, units].transpose(1, 2)
    return x if request.by_position else x.sum(-1)
