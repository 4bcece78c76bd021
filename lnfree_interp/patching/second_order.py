"""Second-order attribution patching (arXiv 2606.09899): g.d + d^T H d / 2, and how far it can be relied on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..metrics import Metric
from . import hooked
from .activation import alike, itemsize
from .cells import find_cells, on_device
from .sides import Case, contract, gradients, numbers_per_prompt


def _explicit_attention(n_layers: int, start: int) -> dict[str, Callable]:
    """Hooks that change nothing but make attention be computed in plain operations: the fused one has no second
    derivative."""
    return {f"blocks.{i}.attn.hook_pattern": lambda x: None for i in range(start, n_layers)}


def _second(first: Tensor, along: Tensor) -> Tensor:
    """The gradient of `first`, zero where it is constant."""
    if not first.requires_grad:
        return torch.zeros_like(along)
    return torch.autograd.grad(first.sum(), along, materialize_grads=True)[0]


def _with_reliability(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """g.d + d^T H d / 2, and |d^T H d| / (2 |g.d|): 0 where both are 0."""
    reliability = torch.where(second == 0, 0.0, second.abs() / (2 * first.abs()))
    return first + second / 2, reliability


def _patched_value(case: Case, layer: int, hook: Callable, prompt: Tensor) -> Tensor:
    hooks = _explicit_attention(case.model.cfg.n_layers, layer) | {case.request.row.name(layer): hook}
    final = case.window.run(resid=case.resid[layer][prompt], start_layer=layer, hooks=hooks)
    return case.metric(final, prompt)


def cell_by_cell(case: Case, budget: int) -> tuple[Tensor, Tensor]:
    """Second order in each cell's own change: the second derivative along it, cells in batches."""
    request, model, device = case.request, case.model, case.at_base.device
    first, second = (case.at_base.new_zeros(request.shape(len(case.pairs))) for _ in range(2))

    def where(layer: int) -> Tensor:
        return hooked.differs(request, case.base[layer], case.source[layer])

    cells = find_cells(request, where, case.differ, model.cfg.n_layers, device)
    # The graphs of the first and the second derivative.
    per_cell = 4 * numbers_per_prompt(model, request) * itemsize(model, case.window.weights)
    plain = not isinstance(request.metric, Metric)
    for layer in request.layers:
        of_layer = (cells.layer == layer).nonzero().flatten()
        for index in _pieces(cells, of_layer, plain, max(1, budget // per_cell)):
            c = cells[index].to(device)
            delta = case.delta[layer][c.prompt]
            delta = hooked.overwritten(torch.zeros_like(delta), delta, request, c)
            if plain:  # the metric wants all prompts, in order
                delta = torch.zeros_like(case.delta[layer]).index_copy_(0, c.prompt, delta)
            prompt = torch.arange(len(case.pairs), device=device) if plain else c.prompt
            t = torch.zeros(len(prompt), dtype=delta.dtype, device=device, requires_grad=True)

            def hook(x: Tensor, t=t, delta=delta) -> Tensor:
                return x + t.view(-1, *[1] * (x.ndim - 1)) * delta

            value = _patched_value(case, layer, hook, prompt)
            g = gradients(value, {0: t}, create_graph=True)[0]
            h = _second(g, t)
            if plain:
                g, h = g[c.prompt], h[c.prompt]
            at = on_device(request.place(cells[index]), device)
            first.view(-1)[at], second.view(-1)[at] = g.detach().to(first.dtype), h.detach().to(first.dtype)
    return _with_reliability(first, second)


def _pieces(cells, index: Tensor, plain: bool, size: int) -> list[Tensor]:
    """Cells of a layer in batches; for a plain metric each cell of all its prompts by itself."""
    if not plain:
        return list(index.split(size)) if len(index) else []
    return [index[i] for i in alike(cells[index])] if len(index) else []


def jointly(case: Case, budget: int) -> tuple[Tensor, Tensor]:
    """Second order with one Hessian-vector product per layer, along the change of all its cells."""
    request = case.request
    everyone = torch.arange(len(case.pairs), device=case.at_base.device)
    first, second = {}, {}
    for layer in request.layers:
        delta = case.delta[layer]
        node = case.base[layer].clone().requires_grad_()
        value = _patched_value(case, layer, lambda x, node=node: node, everyone)
        g = gradients(value, {layer: node}, create_graph=True)[layer]
        first[layer] = (delta * g).detach()
        second[layer] = delta * _second(g * delta, node)
    return _with_reliability(contract(request, first), contract(request, second))
