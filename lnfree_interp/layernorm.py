"""LayerNorm and its removal: freezing the std, folding what is left into the weights, the published format.

A LayerNorm is (x - mean) / std * gamma + beta. With std replaced by a constant all that remains is linear and
folds into the matrix W, b that reads it: W' = C diag(gamma / std) W, b' = b + beta W, where C = I - 11^T/d
centres (row vectors throughout, as in TransformerLens and HF's Conv1D).

Sources: P1 = arXiv 2409.13710, P2 = arXiv 2507.02559.
"""

from __future__ import annotations

from collections.abc import MutableMapping

import torch
from jaxtyping import Float
from torch import Tensor

# The published LN-free format: plain GPT-2 with an epsilon so large that every std is sqrt(eps) = 1e6.
LN_FREE_EPS = 1e12
# A variance of 1e4 (a residual norm of 3,000 at d_model 1024) is 5e-6 off at this epsilon; below it LN is alive.
HUGE_EPS = 1e9
# Loose enough for 1e6 stored in bfloat16 (999,424), far from any trained gamma.
NEUTRAL_TOLERANCE = 1e-2


def _find(state: MutableMapping[str, Tensor], name: str) -> str:
    """The key of a GPT-2 weight, with or without HF's "transformer." prefix."""
    return name if name in state else "transformer." + name


def is_ln_free(config, state: MutableMapping[str, Tensor]) -> bool:
    """Whether a GPT-2 checkpoint is LN-free, read from its epsilon and LayerNorm weights alone.

    Args:
        config: GPT2Config, of which layer_norm_epsilon and n_layer are read.
        state: HF GPT-2 state dict, names with or without "transformer.".

    Raises:
        ValueError: half-way: some LayerNorms neutral and some not, or epsilon and weights that disagree.
    """
    eps, scale = float(config.layer_norm_epsilon), float(config.layer_norm_epsilon) ** 0.5
    sites = [f"h.{layer}.ln_{i}" for layer in range(config.n_layer) for i in (1, 2)]
    if eps < HUGE_EPS:
        for site in [*sites, "ln_f"]:
            size = state[_find(state, f"{site}.weight")].double().abs().median().item()
            if not size < 1e4:  # also catches inf (1e6 in float16) and nan
                raise ValueError(
                    f"checkpoint is half-way LN-free: {site}.weight is about {size:g} "
                    f"but layer_norm_epsilon is {eps:g}"
                )
        if eps > 1:
            raise ValueError(
                f"layer_norm_epsilon {eps:g} is neither an ordinary LayerNorm's nor an LN-free checkpoint's"
            )
        return False
    for site in sites:
        weight, bias = (state[_find(state, f"{site}.{part}")].double() for part in ("weight", "bias"))
        off = (weight / scale - 1).abs().max().item()
        if not off <= NEUTRAL_TOLERANCE:
            raise ValueError(
                f"checkpoint is half-way LN-free: layer_norm_epsilon is {eps:g} "
                f"but {site}.weight is not {scale:g} throughout"
            )
        if bias.any():
            raise ValueError(
                f"checkpoint is half-way LN-free: layer_norm_epsilon is {eps:g} but {site}.bias is not zero"
            )
    size = state[_find(state, "ln_f.weight")].double().abs().median().item()
    if not 1e-5 <= size / scale < float("inf"):
        raise ValueError(
            f"checkpoint is half-way LN-free: layer_norm_epsilon is {eps:g} but ln_f.weight is about {size:g}"
        )
    return True


def fold_reader(
    weight: Float[Tensor, "d_model out"],
    bias: Float[Tensor, " out"] | float,
    gain: Float[Tensor, " d_model"],
    beta: Float[Tensor, " d_model"],
) -> tuple[Float[Tensor, "d_model out"], Float[Tensor, " out"]]:
    """What reads a linear LayerNorm, folded: C diag(gain) W and b + beta W, in the dtype given."""
    folded = gain[:, None] * weight
    return folded - folded.mean(0), bias + beta @ weight


def fold_ln_free(
    config, state: MutableMapping[str, Tensor], dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """An LN-free GPT-2 checkpoint as a HookedTransformer state dict without any normalisation.

    Every LayerNorm, ln_f included, is folded into what reads it. As every reader subtracts the mean, what writes
    to the residual stream is centred over d_model, and W_U and b_U over the vocabulary; log-probabilities do not
    change. Folds in float64, one matrix at a time, and empties `state` as it goes, so that the peak stays near
    the size of source and result together.

    Args:
        config: GPT2Config.
        state: HF state dict, names with or without "transformer."; consumed. lm_head.weight may be absent (tied).
        dtype: of the result.

    Returns:
        embed.W_E, pos_embed.W_pos, blocks.{l}.attn.{W,b}_{Q,K,V,O}, blocks.{l}.mlp.{W,b}_{in,out},
        unembed.{W,b}_U: W_Q, W_K, W_V [head, d_model, d_head], W_O [head, d_head, d_model].
    """
    root_eps = float(config.layer_norm_epsilon) ** 0.5
    d_model, n_heads = config.n_embd, config.n_head
    folded: dict[str, Tensor] = {}

    def take(name: str) -> Tensor:
        return state.pop(_find(state, name)).detach().double()

    def layer_norm(site: str) -> tuple[Tensor, Tensor]:
        return take(f"{site}.weight") / root_eps, take(f"{site}.bias")

    def put(name: str, value: Tensor) -> None:
        # clone: a view would keep the whole fp64 matrix alive
        folded[name] = value.to(dtype, copy=True, memory_format=torch.contiguous_format)

    def centred(value: Tensor) -> Tensor:
        return value - value.mean(-1, keepdim=True)

    for layer in range(config.n_layer):
        source, target = f"h.{layer}", f"blocks.{layer}"
        weight, bias = fold_reader(
            take(f"{source}.attn.c_attn.weight"), take(f"{source}.attn.c_attn.bias"),
            *layer_norm(f"{source}.ln_1"),
        )  # fmt: skip
        for i, name in enumerate("QKV"):
            part = slice(i * d_model, (i + 1) * d_model)
            put(f"{target}.attn.W_{name}", weight[:, part].unflatten(1, (n_heads, -1)).transpose(0, 1))
            put(f"{target}.attn.b_{name}", bias[part].unflatten(0, (n_heads, -1)))
        weight = centred(take(f"{source}.attn.c_proj.weight"))
        put(f"{target}.attn.W_O", weight.unflatten(0, (n_heads, -1)))
        put(f"{target}.attn.b_O", centred(take(f"{source}.attn.c_proj.bias")))
        weight, bias = fold_reader(
            take(f"{source}.mlp.c_fc.weight"), take(f"{source}.mlp.c_fc.bias"), *layer_norm(f"{source}.ln_2")
        )
        put(f"{target}.mlp.W_in", weight)
        put(f"{target}.mlp.b_in", bias)
        put(f"{target}.mlp.W_out", centred(take(f"{source}.mlp.c_proj.weight")))
        put(f"{target}.mlp.b_out", centred(take(f"{source}.mlp.c_proj.bias")))
        del weight, bias

    put("pos_embed.W_pos", centred(take("wpe.weight")))
    embedding = take("wte.weight")
    put("embed.W_E", centred(embedding))
    head = state.pop("lm_head.weight", None)
    head = (embedding if head is None else head.detach().double()).T
    weight, bias = fold_reader(head, 0.0, *layer_norm("ln_f"))
    put("unembed.W_U", centred(weight))
    put("unembed.b_U", bias - bias.mean())
    return folded
