"""RelP (arXiv 2508.21258): a backward pass in which norms and activation functions count as linear maps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..forward import Norm, PackedWeights


class DetachedNorm(Norm):
    """A norm whose denominator counts as a constant in the backward pass."""

    def __call__(self, x: Tensor) -> Tensor:
        if self.kind is None:
            return x
        centred = x - x.mean(-1, keepdim=True) if self.centres else x
        y = centred / self.scale(x).detach().to(x.dtype)
        y = y if self.w is None else y * self.w
        return y if self.b is None else y + self.b


def linear_activation(act: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """act(x) as x times act(x) / x, the quotient a constant in the backward pass."""

    def call(x: Tensor) -> Tensor:
        with torch.no_grad():
            near = torch.where(x.abs() < 1e-6, torch.full_like(x, 1e-6), x)
            slope = act(near) / near
        return x * slope

    return call


def relp_weights(packed: PackedWeights, *, detach_norm: bool, linear_gelu: bool) -> PackedWeights:
    """A model's weights with the norms, the final one included, and the activation function of RelP."""
    if detach_norm:

        def detached(n: Any) -> Any:
            return None if n is None else DetachedNorm(n.kind, n.eps, n.w, n.b)

        layers = tuple(replace(layer, ln1=detached(layer.ln1), ln2=detached(layer.ln2)) for layer in packed.layers)
        packed = replace(packed, layers=layers, ln_final=detached(packed.ln_final))
    return replace(packed, act=linear_activation(packed.act)) if linear_gelu else packed
