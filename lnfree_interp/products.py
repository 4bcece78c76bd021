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


def products(x: Float[Tensor, "*rows d_in"], *linears: Linear) -> Sequence[Tensor]:
    """x W + b for each W and b: [*rows, d_out] of a matrix, [*rows, head, d_out] of a matrix per head.

    In the precision of x: weights that are stored in less are made wide one at a time, and never kept so for gradients.
    """
    if all(W.ndim == 2 and W.dtype == x.dtype for W, _ in linears):
        return [F.linear(x, W.T, b) for W, b in linears]
    return _products([x], linears)


def products_of(xs: Sequence[Tensor], *linears: Linear) -> list[Sequence[Tensor]]:
    """`products` of several tensors at once, each weight read once for all: for each W and b, one product of each x.

    Of several tensors, those that want gradients get them; what the others make has none.
    """
    if not xs:
        return [() for _ in linears]
    found = products(xs[0], *linears) if len(xs) == 1 else _products(xs, linears)
    return [found[j : j + len(xs)] for j in range(0, len(found), len(xs))]


def _products(xs: Sequence[Tensor], linears: Sequence[Linear]) -> Sequence[Tensor]:
    """Of the first linear one product of each tensor, then of the next."""
    if torch.is_grad_enabled():
        return _Products.apply(len(xs), *xs, *(t for linear in linears for t in linear))
    rows = joined(xs)
    return [y for W, b in linears for y in parted(_product(rows, W, b), xs)]


def joined(xs: Sequence[Tensor]) -> Tensor:
    """The rows of tensors [*rows, d], one after another, [row, d]; one tensor as it is."""
    return xs[0] if len(xs) == 1 else torch.cat([x.flatten(0, -2) for x in xs])


def parted(rows: Tensor, xs: Sequence[Tensor]) -> Sequence[Tensor]:
    """What was made of `joined` tensors, as [*rows, *more] of each."""
    if len(xs) == 1:
        return [rows]
    parts = rows.split([x.shape[:-1].numel() for x in xs])
    return [part.unflatten(0, x.shape[:-1]) for part, x in zip(parts, xs)]


def _product(x: Float[Tensor, "*rows d_in"], W: Tensor, b: Tensor | None) -> Tensor:
    """One product, a weight per head read where it lies."""
    W, b = W.to(x.dtype), None if b is None else b.to(x.dtype)
    if W.ndim == 2:
        return F.linear(x, W.T, b)
    assert b is not None
    rows = x.flatten(0, -2).expand(len(W), -1, -1)
    return torch.baddbmm(b[:, None], rows, W).transpose(0, 1).unflatten(0, x.shape[:-1])


class _Products(torch.autograd.Function):
    """`products` of n tensors, the weights read where they lie: with gradients for the tensors alone, that never have
    an axis head."""

    @staticmethod
    def forward(ctx, n: int, *tensors: Any) -> tuple[Tensor, ...]:
        found = _products(tensors[:n], list(zip(tensors[n::2], tensors[n + 1 :: 2])))  # no gradients are on in here
        wanted = ctx.needs_input_grad[1 : n + 1]
        ctx.save_for_backward(*tensors[n::2])
        ctx.mark_non_differentiable(*(y for j, y in enumerate(found) if not wanted[j % n]))
        ctx.set_materialize_grads(False)
        return tuple(found)

    @staticmethod
    def backward(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        n = len(grads) // len(ctx.saved_tensors)
        of_xs = [_gradient(ctx.saved_tensors, grads[j::n]) for j in range(n)]
        return None, *of_xs, *(None for _ in range(2 * len(ctx.saved_tensors)))


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
