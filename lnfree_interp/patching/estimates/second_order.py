"""Second-order attribution patching: the gradient and half of the second derivative along each change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import hooked
from ..cells import find_cells, itemsize, on_device
from ..sides import Case, contract, explicit_attention, gradients, numbers_per_prompt
from .estimate import Estimate


@dataclass(frozen=True)
class SecondOrder(Estimate):
    """g.d + d^T H d / 2, with |d^T H d| / (2 |g.d|) as reliability: large ones are suspect (arXiv 2606.09899).

    Args:
        joint: one Hessian-vector product per layer, with d the change of all its cells: far cheaper, but the cells'
            cross terms are shared between them. Else d is the cell's own change: one product per cell, in batches.

    Raises:
        ValueError: joint is neither True nor False.

    Example:
        >>> from lnfree_interp import attribution_patching, induction_pairs, load_model
        >>> model = load_model("tiny-noLN")
        >>> effect = attribution_patching(model, induction_pairs(model, 2, length=8), method=SecondOrder(joint=True))
        >>> effect.values.shape, effect.reliability.shape
        (torch.Size([2, 8, 8]), torch.Size([2, 8, 8]))
    """

    joint: bool = False
    name = "second_order"

    def __post_init__(self):
        self.check_switches()

    def effects(self, case: Case, budget: int) -> tuple[Tensor, Tensor | None]:
        first, second = _jointly(case) if self.joint else _cell_by_cell(case, budget)
        # 0 where both are 0.
        return first + second / 2, torch.where(second == 0, 0.0, second.abs() / (2 * first.abs()))


def _cell_by_cell(case: Case, budget: int) -> tuple[Tensor, Tensor]:
    """The first and the second derivative along each cell's own change, cells in batches."""
    request, model, device = case.request, case.model, case.at_base.device
    first, second = (case.at_base.new_zeros(request.shape(len(case.pairs))) for _ in range(2))

    def where(layer: int) -> Tensor:
        return hooked.differs(request, case.base[layer], case.source[layer])

    cells = find_cells(request, where, case.differ, model.cfg.n_layers, device)
    # The graphs of the first and the second derivative.
    per_cell = 4 * numbers_per_prompt(model, request) * itemsize(model, case.window.weights)
    for layer in cells.layer.unique().tolist():
        for index in (cells.layer == layer).nonzero().flatten().split(max(1, budget // per_cell)):
            c = cells[index].to(device)
            delta = case.delta[layer][c.prompt]
            delta = hooked.overwritten(torch.zeros_like(delta), delta, request, c)
            t = torch.zeros(len(c), dtype=delta.dtype, device=device, requires_grad=True)

            def hook(x: Tensor, t=t, delta=delta) -> Tensor:
                return x + t.view(-1, *[1] * (x.ndim - 1)) * delta

            value = _patched_value(case, layer, hook, c.prompt)
            g = gradients(value, {0: t}, create_graph=True)[0]
            h = _second(g, t)
            at = on_device(request.place(cells[index]), device)
            first.view(-1)[at], second.view(-1)[at] = g.detach().to(first.dtype), h.detach().to(first.dtype)
    return first, second


def _jointly(case: Case) -> tuple[Tensor, Tensor]:
    """The first and the second derivative along the change of all cells of a layer, by cell."""
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
    return contract(request, first), contract(request, second)


def _second(first: Tensor, along: Tensor) -> Tensor:
    """The gradient of `first`, zero where it is constant."""
    if not first.requires_grad:
        return torch.zeros_like(along)
    return torch.autograd.grad(first.sum(), along, materialize_grads=True)[0]


def _patched_value(case: Case, layer: int, hook: Callable, prompt: Tensor) -> Tensor:
    hooks = explicit_attention(case.model.cfg.n_layers, layer) | {case.request.row.name(layer): hook}
    final = case.window.run(resid=case.resid[layer][prompt], start_layer=layer, hooks=hooks)
    return case.metric(final, prompt)
