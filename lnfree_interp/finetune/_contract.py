"""Shim: what the removable models of other families bring; goes when they do."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.activations import ACT2FN


def final_norm(model: Any) -> Any:
    return model.transformer.ln_f


def n_layers(model: Any) -> int:
    return model.config.n_layer


def ready(model: Any) -> None:
    """Without dropout and key-value cache, and with GPT-2's activation in one kernel."""
    model.config.use_cache = False
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if model.config.activation_function == "gelu_new":
        for block in model.transformer.h:
            block.mlp.act = ACT2FN["gelu_pytorch_tanh"]


def target_of(final: Any, tokens: Tensor, eot: int) -> Tensor:
    """The auxiliary loss' target; in the contract `final.target`, of the whole step before."""
    ordinary = tokens != eot
    ordinary[:, 0] = False
    return (final.std.detach() * ordinary).sum() / ordinary.sum()


def auxiliary_loss(std: Tensor, target: Tensor) -> Tensor:
    return (std - target).square().mean().nan_to_num(0.0)
