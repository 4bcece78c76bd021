"""RelP (arXiv 2508.21258): a backward pass in which norms, activation functions and gates count as linear maps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...weights import Layer, Norm, Weights, of_norms
from .gradient import Gradient


@dataclass(frozen=True)
class RelP(Gradient):
    """Gradients of a model taken as linear where RelP's rules say so (arXiv 2508.21258); `Gradient` with all rules off.

    Args:
        detach_norm: the norms' denominators are constants.
        linear_gelu: GELU(x), or SiLU(x), is x times a constant.
        half_gate: in gated MLPs the product's gradient is halved, so that gate and linear part share it.

    Raises:
        ValueError: a rule that is neither True nor False.

    Example:
        >>> from lnfree_interp import attribution_patching, induction_pairs, load_model
        >>> model = load_model("tiny-noLN")
        >>> pairs = induction_pairs(model, 2, length=8)
        >>> attribution_patching(model, pairs, method=RelP(linear_gelu=False)).method
        'relp'
    """

    detach_norm: bool = True
    linear_gelu: bool = True
    half_gate: bool = True
    name = "relp"
    needs_weights = True

    def __post_init__(self):
        self.check_switches()

    def rules(self, weights: Weights) -> Weights:
        layers = []
        for layer in weights.layers:
            act = linear_activation(layer.act) if self.linear_gelu else layer.act
            gate = half_product if self.half_gate else layer.gate
            layers.append(replace(layer, **self._norms(layer), act=act, gate=gate))
        return replace(weights, **self._norms(weights), layers=tuple(layers))

    def _norms(self, part: Layer | Weights) -> dict[str, Any]:
        return of_norms(part, lambda n: DetachedNorm(n.kind, n.eps, n.w, n.b)) if self.detach_norm else {}


class DetachedNorm(Norm):
    """A norm whose denominator counts as a constant in the backward pass."""

    def __call__(self, x: Tensor) -> Tensor:
        if self.kind is None:
            return x
        y = self.centred(x) / self.scale(x).detach().to(x.dtype)
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
