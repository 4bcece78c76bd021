"""Products with weights, read where they lie and as they are stored, with gradients for what is multiplied alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Linear = tuple[Tensor, Tensor | None]
"""W and b of a product x W + b: a matrix [d_in, d_out] and its bias or none, or one of each for every head."""


def products(x: Float[Tensor, "*rows d_in"], *linears: Linear) -> tuple[Tensor, ...]:
    """x W + b for each W and b: [*rows, d_out] of a matrix, [*rows, head, d_out] of a matrix per head.

    In the precision of x: weights that are stored in less are made wide one at a time, and never kept so for gradients.
    """
    if all(W.ndim == 2 and W.dtype == x.dtype for W, _ in linears):
        return tuple(F.linear(x, W.T, b) for W, b in linears)
    return _HeadProducts.apply(x, *(t for linear in linears for t in linear))


def _product(rows: Float[Tensor, "row d_in"], W: Tensor, b: Tensor | None) -> Tensor:
    """One product, a weight per head read where it lies."""
    W, b = W.to(rows.dtype), None if b is None else b.to(rows.dtype)
    if W.ndim == 2:
        return F.linear(rows, W.T, b)
    assert b is not None
    return torch.baddbmm(b[:, None], rows.expand(len(W), -1, -1), W).transpose(0, 1)


class _HeadProducts(torch.autograd.Function):
    """`products`, the weights read where they lie, with a gradient for x alone that never has an axis head."""

    @staticmethod
    def forward(ctx, x: Tensor, *linears: Any) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*linears[::2])
        rows = x.reshape(-1, x.shape[-1])
        return tuple(_product(rows, W, b).unflatten(0, x.shape[:-1]) for W, b in zip(linears[::2], linears[1::2]))

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _gradient(ctx.saved_tensors, grads), *(None for _ in range(2 * len(grads)))


def _gradient(weights: Sequence[Tensor], grads: Sequence[Tensor | None]) -> Tensor | None:
    """The gradient of x from those of its products."""
    total = None
    for W, grad in zip(weights, grads):
        if grad is None:
            continue
        W = W.to(grad.dtype)
        if W.ndim == 2:
            total = grad @ W.T if total is None else total + grad @ W.T
            continue
        heads, shape = grad.flatten(0, -3).transpose(0, 1), grad.shape[:-2]
        before = heads.new_zeros(heads.shape[1], W.shape[1]) if total is None else total.flatten(0, -2)
        total = torch.addbmm(before, heads, W.transpose(1, 2), beta=0 if total is None else 1).unflatten(0, shape)
    return total


class ProductsOfBoth(torch.autograd.Function):
    """`products` of two tensors at once, with a gradient for the first alone."""

    @staticmethod
    def forward(ctx, x: Tensor, others: Tensor, *linears: Any) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*linears[::2])
        rows, sizes = torch.cat([x.flatten(0, -2), others.flatten(0, -2)]), [x[..., 0].numel(), others[..., 0].numel()]
        found = [_product(rows, W, b).split(sizes) for W, b in zip(linears[::2], linears[1::2])]
        of_x = [part.unflatten(0, x.shape[:-1]) for part, _ in found]
        of_others = [part.unflatten(0, others.shape[:-1]) for _, part in found]
        ctx.mark_non_differentiable(*of_others)
        ctx.set_materialize_grads(False)
        return *of_x, *of_others

    @staticmethod
    def backward(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        n = len(ctx.saved_tensors)
        return _gradient(ctx.saved_tensors, grads[:n]), *(None for _ in range(2 * n + 1))
