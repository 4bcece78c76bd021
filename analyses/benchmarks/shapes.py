"""Shapes of models, as fields of a TransformerLens config. Imports nothing heavy."""

from __future__ import annotations

from typing import Any


def _gpt2(n_layers: int, d_model: int, n_heads: int) -> dict[str, Any]:
    sizes = {"n_layers": n_layers, "d_model": d_model, "n_heads": n_heads, "d_head": d_model // n_heads}
    kind = {"act_fn": "gelu_new", "normalization_type": "LNPre", "positional_embedding_type": "standard"}
    return sizes | kind | {"d_mlp": 4 * d_model, "n_ctx": 1024, "d_vocab": 50257}


SHAPES: dict[str, dict[str, Any]] = {
    "small": _gpt2(12, 768, 12),
    "medium": _gpt2(24, 1024, 16),
    "large": _gpt2(36, 1280, 20),
    "xl": _gpt2(48, 1600, 25),
    "smollm2": {"n_layers": 30, "d_model": 576, "n_heads": 9, "n_key_value_heads": 3, "d_head": 64, "d_mlp": 1536}
    | {"n_ctx": 1024, "d_vocab": 49152, "act_fn": "silu", "gated_mlp": True, "normalization_type": "RMSPre"}
    | {"positional_embedding_type": "rotary", "rotary_dim": 64, "rotary_base": 100000, "final_rms": True},
}
NAMES = {"smollm2": "SmolLM2's shape"} | {name: f"GPT-2 {name}'s shape" for name in SHAPES if name != "smollm2"}
"""What a heading calls them."""
