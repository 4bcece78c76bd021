"""TransformerBridges in HookedTransformer's words: their weights read where they lie.

A Bridge puts TransformerLens' hooks around a module that is another's: Hugging Face's (`boot_transformers`), or
TransformerLens' own (`boot_native`). The weights are that module's, in that module's coordinates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .layernorm import HUGE_EPS
from .layers import ACTIVATIONS, NO_NORM, Layer, Norm, Rotary, Weights
from .lens import LensModel

NATIVE = "TransformerLensNative"
# Architectures whose blocks `Layer` computes, by the class of the module inside.
ARCHITECTURES = {
    **{f"{name}ForCausalLM": f"{name}ForCausalLM" for name in ("GPTNeoX", "Llama", "Mistral", "Qwen2", "Qwen3")},
    "GPT2LMHeadModel": "GPT2LMHeadModel",
    NATIVE: "NativeModel",
}
# Ways to scale the frequencies of rotary positions that do not depend on the prompt's length.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def names_of(model: Any, modules: Sequence[tuple[str, nn.Module]]) -> tuple[str, ...]:
    """The names of some of a Bridge's modules, hook points by HookedTransformer's."""
    named = sorted(model.hook_dict.items(), key=lambda item: not item[0].endswith(("hook_in", "hook_out")))
    points = {id(point): name for name, point in named} if modules else {}  # HookedTransformer's name is a point's last
    return tuple(points.get(id(module), name.replace("_original_component.", "")) for name, module in modules)


def modules_around(model: Any) -> list[tuple[str, nn.Module]]:
    """The modules that a Bridge runs and does not list: the one inside, its trunk, the dropout of its embeddings."""
    listed = {id(child) for child in model.children()}

    def walk(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        if id(module) not in listed:
            yield name, module
            for child_name, child in module.named_children():
                yield from walk(f"{name}.{child_name}", child)

    return list(walk("original_model", model.original_model))


# ---------------------------------------------------------------------------------------------------------
# Reading

FEW_POSITIONS = 2048  # tables of rotary positions are made for so many at once, and for more when a prompt has more


def _linear(component: Any) -> tuple[Tensor, Tensor | None]:
    """W and b, x W + b, of what is behind a component.

    Raises:
        ValueError: more than a matrix and a bias: an adapter, quantised weights.
    """
    module = component.original_component
    if type(module) is nn.Linear:
        return module.weight.T, module.bias
    if type(module) is Conv1D:
        return module.weight, module.bias
    raise ValueError(f"the model has a {type(module).__name__} where a plain linear map is read: merge adapters first")


def _heads(component: Any, n_heads: int) -> tuple[Tensor, Tensor]:
    """W and b head by head, views: Float[Tensor, "head d_model d_head"] and Float[Tensor, "head d_head"]."""
    W, b = _linear(component)
    b = W.new_zeros(W.shape[1]) if b is None else b
    return W.unflatten(1, (n_heads, -1)).transpose(0, 1), b.unflatten(0, (n_heads, -1))


def block_of(model: LensModel, layer: int) -> Any:
    """A Bridge's block under HookedTransformer's names: attn.W_Q, attn.b_O, mlp.W_out, ..., views; absent biases are 0.

    Raises:
        ValueError: as `_linear`; a block that has no such parts, or that runs others.
    """
    block, cfg = model.blocks[layer], model.cfg
    attn = getattr(block, "attn", None)
    if any(getattr(attn, part, None) is None for part in "qkvo"):
        raise ValueError(f"a {cfg.architecture}'s block has no queries, keys, values and output to be read")
    n_heads, n_key_heads = cfg.n_heads, getattr(cfg, "n_key_value_heads", None) or cfg.n_heads
    W_Q, b_Q = _heads(block.attn.q, n_heads)
    W_K, b_K = _heads(block.attn.k, n_key_heads)
    W_V, b_V = _heads(block.attn.v, n_key_heads)
    W_O, b_O = _linear(block.attn.o)
    attn = SimpleNamespace(W_Q=W_Q, b_Q=b_Q, W_K=W_K, b_K=b_K, W_V=W_V, b_V=b_V)
    attn.W_O, attn.b_O = W_O.unflatten(0, (n_heads, -1)), W_O.new_zeros(W_O.shape[1]) if b_O is None else b_O
    if getattr(block, "mlp", None) is None:
        return SimpleNamespace(attn=attn)
    W_in, b_in = _linear(getattr(block.mlp, "in"))
    W_out, b_out = _linear(block.mlp.out)
    mlp = SimpleNamespace(W_in=W_in, b_in=b_in, W_out=W_out, b_out=b_out, W_gate=None, b_gate=None, b_linear=None)
    if "gate" in block.mlp.submodules:
        for part in ("gate", "in", "out"):  # TransformerLens 3.9 runs what processing made, whatever took its place
            weight, run = getattr(block.mlp, part).weight, getattr(block.mlp, f"_processed_W_{part}", None)
            if run is not None and run.data_ptr() != weight.data_ptr():
                raise ValueError(f"W_{part} of block {layer} was replaced, and the model runs the one before")
        mlp.W_gate, mlp.b_gate = _linear(block.mlp.gate)
        mlp.b_in, mlp.b_linear = None, b_in  # HookedTransformer's b_in comes after the product
    mlp.b_in = W_in.new_zeros(W_in.shape[1]) if mlp.b_in is None else mlp.b_in
    mlp.b_out = W_out.new_zeros(W_out.shape[1]) if b_out is None else b_out
    return SimpleNamespace(attn=attn, mlp=mlp)


def norm_of_bridge(component: Any) -> Norm:
    """The `Norm` that a component of a Bridge computes.

    Raises:
        ValueError: another normalisation than layer norm and RMS norm.
    """
    kind, module = type(component).__name__, component.original_component
    cfg_eps = float(getattr(component.config, "eps", 1e-5))
    if kind == "LayerNormPreBridge":
        return Norm("LNPre", cfg_eps)
    if kind == "RMSNormPreBridge":
        return Norm("RMSPre", cfg_eps)
    if kind == "GeneralizedComponent" and type(module) is nn.Identity:
        return NO_NORM
    if kind not in ("NormalizationBridge", "RMSNormalizationBridge"):
        raise ValueError(f"the model has a {kind} where a normalisation is read")
    of_module = component.use_native_layernorm_autograd or getattr(component.config, "layer_norm_folding", False)
    own_eps = getattr(module, "eps", getattr(module, "variance_epsilon", cfg_eps))
    eps = float(own_eps if of_module else cfg_eps)
    offset = getattr(component, "uses_weight_offset", getattr(component.config, "rmsnorm_uses_offset", False))
    if type(module) is nn.LayerNorm and not offset and not component.uses_rms_norm:
        if eps >= HUGE_EPS:
            return Norm("LNFree", 0.0, module.weight / eps**0.5, module.bias)
        return Norm("LN", eps, module.weight, module.bias)
    if "RMSNorm" in type(module).__name__ and component.uses_rms_norm:
        return Norm("RMS", eps, 1 + module.weight if offset else module.weight)
    raise ValueError(f"the model has a {type(module).__name__} where layer norm or RMS norm is read")


@dataclass
class _Tables:
    """Sines and cosines of rotary positions as a module of Hugging Face's makes them: what `Rotary` reads."""

    module: Any
    like: Tensor  # of the model's device and dtype

    def make(self, n_pos: int) -> None:
        cos, sin = self.module(self.like, torch.arange(n_pos, device=self.like.device)[None])
        self.rotary_cos, self.rotary_sin = cos[0], sin[0]

    def apply_rotary(self, x: Tensor) -> None:
        """Have tables for as many positions as x has."""
        self.make(x.shape[1])


def _rotary(model: LensModel) -> Rotary | None:
    if model.cfg.positional_embedding_type != "rotary":
        return None
    if model.cfg.architecture == NATIVE:
        own: Any = model.blocks[0].attn.original_component.rotary
        dtype = model.unembed.W_U.dtype
        stored = SimpleNamespace(rotary_cos=own.cos_cached.to(dtype), rotary_sin=own.sin_cached.to(dtype))
        return Rotary(stored, adjacent=True)
    module = model.rotary_emb.original_component  # type: ignore[attr-defined]
    if module.rope_type not in ROPE_TYPES or getattr(model.cfg, "rotary_adjacent_pairs", False):
        raise ValueError(f"rotary positions of type {module.rope_type!r} are not read")
    tables = _Tables(module, model.unembed.W_U[:1])
    tables.make(min(model.cfg.n_ctx, FEW_POSITIONS))
    return Rotary(tables, adjacent=False)


def _scale(model: LensModel, layer: int) -> float:
    """What the scores are divided by."""
    cfg, attn = model.cfg, model.blocks[layer].attn.original_component
    if cfg.architecture == NATIVE:
        return float(attn.scale)
    if cfg.architecture == "GPT2LMHeadModel":
        if not attn.scale_attn_weights or attn.reorder_and_upcast_attn:
            raise ValueError("the model scales its scores in a way of its own")
        return cfg.d_head**0.5 * (layer + 1 if cfg.scale_attn_by_inverse_layer_idx else 1)
    return 1 / float(attn.scaling)


def _window(model: LensModel, layer: int) -> int | None:
    """How many positions a query sees, its own included; None: all before it."""
    if model.cfg.architecture in ("MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"):
        config = model.original_model.config  # type: ignore[attr-defined]
        kinds = getattr(config, "layer_types", None)
        if kinds is None or kinds[layer] == "sliding_attention":
            return getattr(config, "sliding_window", None)
    return None


def _act(model: LensModel) -> Any:
    """The activation function of all blocks, by its config's name."""
    config = model.cfg if model.cfg.architecture == NATIVE else model.original_model.config  # type: ignore[attr-defined]
    names = [getattr(config, name, None) for name in ("activation_function", "hidden_act", "act_fn")]
    name = next((name for name in names if name is not None), None)
    if name not in ACTIVATIONS:
        raise ValueError(f"the activation function {name!r} is not read")
    x = torch.linspace(-4, 4, 9, device="cpu")
    wanted = ACTIVATIONS[name](x)
    for i, block in enumerate(model.blocks):
        own = _own_act(block.mlp)
        learnt = isinstance(own, nn.Module) and any(True for _ in own.parameters())
        if learnt or (own(x) - wanted).abs().max() > 1e-5:  # on the host: nothing waits for the device
            raise ValueError(f"the activation function of block {i} is not its config's {name!r}")
    return ACTIVATIONS[name]


def _own_act(mlp: Any) -> Any:
    """The activation function that a Bridge's MLP runs."""
    if "gate" in mlp.submodules and getattr(mlp, "_use_processed_weights", False):
        from transformer_lens.model_bridge.generalized_components.gated_mlp import resolve_activation_fn

        return resolve_activation_fn(mlp.config)
    inner = mlp.original_component
    return inner.act if hasattr(inner, "act") else inner.act_fn


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal but for rounding, of whatever precision."""
    return bool((a - b).abs().max() <= 0.03 * b.abs().max())


def _probe(model: LensModel, names: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and activations of two tokens."""
    found: dict[str, Tensor] = {}
    hooks = [(name, lambda x, hook, name=name: found.__setitem__(name, x)) for name in names if name in model.hook_dict]
    tokens = torch.arange(2, device=model.unembed.W_U.device)[None] % model.cfg.d_vocab
    return model.run_with_hooks(tokens, fwd_hooks=hooks), found


@torch.no_grad()
def check_readout(model: LensModel, norm: Norm) -> None:
    """Whether a Bridge reads its logits off the residual stream with its final norm and one map.

    Raises:
        ValueError: it has another head, or something around it; or its architecture is one that nothing here is
            written for, and its logits are not W_U and b_U of the norm of its last residual stream.
    """
    W_U = _linear(model.unembed)[0]
    for name, module in modules_around(model):
        if "forward" in vars(module) and list(module.children()):
            raise ValueError(f"{name} has a forward of its own around the final norm, which nothing else knows of")
    package = type(model.original_model).__module__.split(".")[0]  # type: ignore[attr-defined]
    if model.cfg.architecture in ARCHITECTURES and package in ("transformers", "transformer_lens"):
        return
    last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    logits, found = _probe(model, [last])
    read = norm(found[last]) @ W_U + model.unembed.b_U
    cap = float(getattr(model.cfg, "output_logits_soft_cap", None) or -1)
    if not _close(cap * torch.tanh(read / cap) if cap > 0 else read, logits):
        raise ValueError(
            f"the logits of a {model.cfg.architecture} are not its final norm and W_U of its residual stream"
        )


@torch.no_grad()
def writes_plainly(model: LensModel) -> bool:
    """Whether what a Bridge's heads and neurons write is z W_O and post W_out, with nothing after."""
    if model.cfg.architecture in ARCHITECTURES:
        return True
    names = [f"blocks.0.{name}" for name in ("attn.hook_z", "hook_attn_out", "mlp.hook_post", "hook_mlp_out")]
    _, found = _probe(model, names)
    if found.keys() != set(names):
        return False
    z, attn_out, post, mlp_out = (found[name] for name in names)
    parts = block_of(model, 0)
    attn = z.flatten(-2) @ parts.attn.W_O.flatten(0, 1) + parts.attn.b_O
    return _close(attn, attn_out) and _close(post @ parts.mlp.W_out + parts.mlp.b_out, mlp_out)


def read_bridge(model: LensModel) -> Weights:
    """The weights of a Bridge that is made of known modules and carries no hooks of a user's.

    Raises:
        ValueError: it computes anything else than `Layer` does.
    """
    cfg = model.cfg
    inside = type(model.original_model).__name__  # type: ignore[attr-defined]
    if ARCHITECTURES.get(cfg.architecture) != inside:
        raise ValueError(f"it is a {cfg.architecture} around a {inside}, which this package's own forward is not")
    for flag in ("use_attn_in", "use_split_qkv_input", "use_attn_result", "use_hook_mlp_in", "num_experts"):
        if getattr(cfg, flag, None):
            raise ValueError(f"cfg.{flag} is {getattr(cfg, flag)!r}, which this package's own forward does not compute")
    if cfg.attention_dir != "causal":
        raise ValueError("its attention is not causal")
    rotary, act = _rotary(model), None if cfg.attn_only else _act(model)
    cap = float(getattr(cfg, "attn_scores_soft_cap", None) or -1)
    layers = []
    for i, block in enumerate(model.blocks):
        parts, inner = block_of(model, i), block.attn.original_component
        if (block.attn.training or inner.training) and getattr(inner, "attention_dropout", None):
            raise ValueError(f"block {i} is in training mode, with dropout in its attention")
        attn = vars(parts.attn) | {"W_O": parts.attn.W_O.flatten(0, 1)}
        normed = "q_norm" in block.attn.submodules
        layer = Layer(
            ln1=norm_of_bridge(block.ln1),
            **attn,
            attn_scale=_scale(model, i),
            q_norm=norm_of_bridge(block.attn.q_norm) if normed else NO_NORM,
            k_norm=norm_of_bridge(block.attn.k_norm) if normed else NO_NORM,
            rotary=rotary,
            cap=cap if cap > 0 else None,
            window=_window(model, i),
        )
        if act is not None:
            parallel = bool(getattr(cfg, "parallel_attn_mlp", False))
            layer = replace(layer, ln2=norm_of_bridge(block.ln2), act=act, parallel=parallel, **vars(parts.mlp))
        layers.append(layer)
    standard = cfg.positional_embedding_type == "standard"
    return Weights(
        layers=tuple(layers),
        ln_final=norm_of_bridge(model.ln_final),
        W_E=model.embed.original_component.weight,
        W_pos=model.pos_embed.original_component.weight if standard else None,
        W_U=_linear(model.unembed)[0],
        b_U=model.unembed.b_U,
    )
