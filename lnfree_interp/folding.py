"""Checkpoints in HookedTransformer's layout: normalisation weights folded, everything centred, in fp64."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .checkpoints import Checkpoint
from .families import HEAD, key_heads


def fold(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """A checkpoint's weights as HookedTransformer's, one at a time, in float64.

    What a normalisation does besides dividing by its scale is folded into what reads it (W' = C diag(g) W,
    b' = b + beta W, row vectors; g is gamma, or gamma / sqrt(eps) without LayerNorm). LayerNorm's C = I - 11^T/d
    subtracts the mean, so what writes to the residual stream is centred over d_model exactly; an RMSNorm has neither C
    nor beta, and what writes is left alone. W_U and b_U are centred over the vocabulary, which leaves log-probabilities
    alone. Value biases go into b_O: attention probabilities sum to one. Norms of queries and keys stay, unless the
    scale is constant.

    Each weight is read once, the token embedding twice if it is the head too.

    Yields:
        (name, tensor) of every parameter: embed.W_E, blocks.{l}.attn.W_Q, ...; with grouped heads attn._W_K, ...
    """
    family, fields, state, ln_free = checkpoint.family, checkpoint.fields, checkpoint.weights, checkpoint.ln_free
    divisor = checkpoint.eps**0.5 if ln_free else 1.0
    n_heads, n_key_heads = fields["n_heads"], key_heads(fields)
    stored = "_" if fields.get("n_key_value_heads") else ""

    def take(name: str) -> Tensor:
        return state[name].detach().to("cpu", torch.float64, copy=True)  # not every device has fp64

    def bias(module: str, like: Tensor) -> Tensor:
        return take(f"{module}.bias") if f"{module}.bias" in state else like.new_zeros(like.shape[1])

    def linear(module: str) -> tuple[Tensor, Tensor]:
        """W [in, out] and b [out]."""
        W = take(f"{module}.weight")
        W = W if family.in_out else W.T
        return W, bias(module, W)

    def norm(site: str) -> tuple[Tensor, Tensor | None]:
        return take(f"{site}.weight") / divisor, take(f"{site}.bias") if family.centres else None

    def read(W: Tensor, b: Tensor, gain: Tensor, beta: Tensor | None) -> tuple[Tensor, Tensor]:
        """A reader of a norm, folded, in its own memory: the head's is a model's largest matrix."""
        b = b if beta is None else b + beta @ W
        W *= gain[:, None]
        return (W.sub_(W.mean(0)) if family.centres else W), b

    def written(value: Tensor) -> Tensor:
        return value.sub_(value.mean(-1, keepdim=True)) if family.centres else value

    def projections(block: str) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Q, K and V as [d_model, head, d_head] and [head, d_head]."""
        modules = [f"{block}.{name}" for name in family.qkv]
        gain, beta = norm(f"{block}.{family.ln1}")
        if len(modules) == 3:
            for name, module, heads in zip("QKV", modules, (n_heads, n_key_heads, n_key_heads)):
                W, b = read(*linear(module), gain, beta)
                yield name, W.unflatten(1, (heads, -1)), b.unflatten(0, (heads, -1))
        else:
            sizes, part = ((n_heads, 3, -1), 1) if family.by_head else ((3, n_heads, -1), 0)
            W, b = read(*linear(modules[0]), gain, beta)
            parts = (W.unflatten(1, sizes).unbind(part + 1), b.unflatten(0, sizes).unbind(part))
            yield from zip("QKV", *parts)

    if family.pos:
        yield "pos_embed.W_pos", written(take(f"{family.pos}.weight"))
    yield "embed.W_E", written(take(f"{family.embed}.weight"))
    for i in range(fields["n_layers"]):
        source, target = family.block.format(i), f"blocks.{i}"
        of_heads = dict(zip("QK", family.qk_norm or ()))
        b_V = torch.zeros(0)
        for name, W, b in projections(source):
            if name in of_heads and ln_free:
                gain = take(f"{source}.{of_heads[name]}.weight") / divisor
                W, b = W * gain, b * gain
            elif name in of_heads:
                yield f"{target}.attn.{name.lower()}_norm.w", take(f"{source}.{of_heads[name]}.weight")
            elif name == "V":
                b_V, b = b.repeat_interleave(n_heads // n_key_heads, 0).flatten(), torch.zeros_like(b)
            yield f"{target}.attn.{'' if name == 'Q' else stored}W_{name}", W.transpose(0, 1)
            yield f"{target}.attn.{'' if name == 'Q' else stored}b_{name}", b
        W, b = linear(f"{source}.{family.o}")
        yield f"{target}.attn.b_O", written(b + b_V @ W)
        yield f"{target}.attn.W_O", written(W).unflatten(0, (n_heads, -1))
        gain, beta = norm(f"{source}.{family.ln2}")
        *readers, writer = family.mlp
        for name, module in zip(("in", "gate"), readers):
            W, b = read(*linear(f"{source}.{module}"), gain, beta)
            yield f"{target}.mlp.W_{name}", W
            if name == "in":
                yield f"{target}.mlp.b_in", b
        W, b = linear(f"{source}.{writer}")
        yield f"{target}.mlp.W_out", written(W)
        yield f"{target}.mlp.b_out", written(b)
    W = take(HEAD if HEAD in state else f"{family.embed}.weight").T
    W, b = read(W, W.new_zeros(W.shape[1]), *norm(family.final))
    yield "unembed.W_U", W.sub_(W.mean(-1, keepdim=True))
    yield "unembed.b_U", b - b.mean()
