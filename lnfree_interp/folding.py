"""GPT-2 checkpoints in HookedTransformer's layout: normalisation weights folded, everything centred, in fp64."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from .layernorm import fold_reader


def fold_layernorm(config, state: Mapping[str, Tensor], *, ln_free: bool) -> Iterator[tuple[str, Tensor]]:
    """A GPT-2 checkpoint's weights as HookedTransformer's, one at a time, in float64.

    What a normalisation does besides dividing by the std is folded into what reads it (W' = C diag(g) W,
    b' = b + beta W, row vectors, C = I - 11^T/d; g is gamma, or gamma / sqrt(eps) without LayerNorm). As every
    reader subtracts the mean, what writes to the residual stream is centred over d_model exactly, and W_U and
    b_U over the vocabulary, which leaves log-probabilities alone. Value biases go into b_O: attention
    probabilities sum to one.

    Args:
        config: GPT2Config.
        state: GPT2LMHeadModel's weights without the leading "transformer."; each is read once, the token
            embedding perhaps twice. lm_head.weight may be absent (tied).
        ln_free: whether the std is the constant sqrt(layer_norm_epsilon) at every site.

    Yields:
        (name, tensor): embed.W_E, pos_embed.W_pos, blocks.{l}.attn.{W,b}_{Q,K,V,O}, blocks.{l}.mlp.{W,b}_{in,out},
        unembed.{W,b}_U.
    """
    divisor = float(config.layer_norm_epsilon) ** 0.5 if ln_free else 1.0
    n_heads = config.n_head

    def take(name: str) -> Tensor:
        return state[name].detach().cpu().double()  # not every device has fp64

    def norm(site: str) -> tuple[Tensor, Tensor]:
        return take(f"{site}.weight") / divisor, take(f"{site}.bias")

    def linear(module: str) -> tuple[Tensor, Tensor]:
        return take(f"{module}.weight"), take(f"{module}.bias")

    def centred(value: Tensor) -> Tensor:
        return value - value.mean(-1, keepdim=True)

    yield "pos_embed.W_pos", centred(take("wpe.weight"))
    yield "embed.W_E", centred(take("wte.weight"))
    for i in range(config.n_layer):
        source, target = f"h.{i}", f"blocks.{i}"
        W, b = fold_reader(*linear(f"{source}.attn.c_attn"), *norm(f"{source}.ln_1"))
        b_Q, b_K, b_V = b.chunk(3)
        for name, part in zip("QKV", W.chunk(3, dim=1)):
            yield f"{target}.attn.W_{name}", part.unflatten(1, (n_heads, -1)).transpose(0, 1)
        yield f"{target}.attn.b_Q", b_Q.unflatten(0, (n_heads, -1))
        yield f"{target}.attn.b_K", b_K.unflatten(0, (n_heads, -1))
        yield f"{target}.attn.b_V", torch.zeros_like(b_V).unflatten(0, (n_heads, -1))
        W, b = linear(f"{source}.attn.c_proj")
        yield f"{target}.attn.W_O", centred(W).unflatten(0, (n_heads, -1))
        yield f"{target}.attn.b_O", centred(b + b_V @ W)
        W, b = fold_reader(*linear(f"{source}.mlp.c_fc"), *norm(f"{source}.ln_2"))
        yield f"{target}.mlp.W_in", W
        yield f"{target}.mlp.b_in", b
        W, b = linear(f"{source}.mlp.c_proj")
        yield f"{target}.mlp.W_out", centred(W)
        yield f"{target}.mlp.b_out", centred(b)
    head = take("lm_head.weight" if "lm_head.weight" in state else "wte.weight").T
    W, b = fold_reader(head, 0.0, *norm("ln_f"))
    yield "unembed.W_U", centred(W)
    yield "unembed.b_U", b - b.mean()
