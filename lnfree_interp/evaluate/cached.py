"""A forward that goes on from kept keys and values."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..forward import PackedWeights, attend, layer_attn_out, layer_mlp_out, layer_mlp_post, layer_qkv

Cache = list[tuple[Tensor, Tensor]]
"""Keys and values of each layer, Float[Tensor, "batch pos head d_head"]."""


def extend(
    packed: PackedWeights, tokens: Int[Tensor, "batch pos"], past: Cache | None = None
) -> tuple[Float[Tensor, "batch pos d_model"], Cache]:
    """The final residual stream of tokens that follow on what `past` holds, and keys and values of both together.

    `past` may hold fewer rows: each then serves as many consecutive rows of tokens as there are per row.
    """
    n_past = past[0][0].shape[1] if past else 0
    resid = packed.W_E[tokens] + packed.W_pos[n_past : n_past + tokens.shape[1]]
    cache: Cache = []
    for i, layer in enumerate(packed.layers):
        q, k, v = layer_qkv(layer, resid)
        if past:
            times = len(tokens) // len(past[i][0])
            k, v = (
                torch.cat([old.repeat_interleave(times, 0) if times > 1 else old, new], 1)
                for old, new in zip(past[i], (k, v))
            )
        cache.append((k, v))
        resid = resid + layer_attn_out(layer, attend(layer, q, k, v))
        if layer.W_in is not None:
            resid = resid + layer_mlp_out(layer, layer_mlp_post(packed, layer, resid))
    return resid, cache
