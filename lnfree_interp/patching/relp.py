"""RelP (arXiv 2508.21258): a backward pass in which norms, activation functions and gates count as linear maps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..weights import Layer, Norm, Weights, of_norms


class DetachedNorm(Norm):
    """A norm whose denominator counts as a constant in the backward pass."""

    def __call__(self, x: Tensor) -> Tensor:
        if self.linear:
            return super().__call__(x)
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


def half_product(gate: Tensor, linear: Tensor) -> Tensor:
    """gate * linear, each factor given half of its gradient: of two that make a product, each is owed half of it."""
    half = gate * linear / 2
    return half + half.detach()


def relp_weights(weights: Weights, *, detach_norm: bool, linear_gelu: bool, half_gate: bool) -> Weights:
    """A model's weights with the norms, the final one included, the activation function and the gates of RelP."""

    def changed(part: Layer | Weights) -> dict[str, Any]:
        return of_norms(part, lambda n: DetachedNorm(n.kind, n.eps, n.w, n.b)) if detach_norm else {}

    layers = []
    for layer in weights.layers:
        act = linear_activation(layer.act) if linear_gelu else layer.act
        gate = half_product if half_gate else layer.gate
        layers.append(replace(layer, **changed(layer), act=act, gate=gate))
    return replace(weights, **changed(weights), layers=tuple(layers))
