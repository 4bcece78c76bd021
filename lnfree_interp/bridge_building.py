"""TransformerBridges built of HookedTransformer's config and filled with HookedTransformer's weights.

What TransformerLens 4 has in place of HookedTransformer: Hugging Face's module of the shape asked for, with the norms
that the config names (or none), biases on all of its maps and a head of its own, under TransformerLens' hooks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .bridge import ARCHITECTURES, block_of
from .layers import ACTIVATIONS
from .lens import LensModel

# What else than these fields of HookedTransformerConfig says is refused unless it is off.
_SHAPE = (
    "n_layers",
    "d_model",
    "n_heads",
    "d_head",
    "d_mlp",
    "n_ctx",
    "d_vocab",
    "act_fn",
    "eps",
    "normalization_type",
)
_ROTARY = ("rotary_dim", "rotary_base", "rotary_scaling_factor", "rotary_adjacent_pairs")
_WITHOUT_EFFECT = (
    "model_name",
    "init_weights",
    "dtype",
    "device",
    "seed",
    "original_architecture",
    "default_prepend_bos",
)
_OTHER = (
    *("positional_embedding_type", "gated_mlp", "parallel_attn_mlp", "use_qk_norm", "n_key_value_heads"),
    *("use_local_attn", "window_size", "attn_types", "use_attn_scale", "scale_attn_by_inverse_layer_idx"),
)
_OFF = (None, False, -1, -1.0)
# What a Bridge's cfg says only if it is told.
_KEPT = ("use_attn_scale", "original_architecture", "use_local_attn", "window_size", "attn_types")


def build_bridge(fields: Mapping[str, Any], tokenizer: Any = None) -> LensModel:
    """A Bridge of HookedTransformerConfig's fields, its weights uninitialised, in compatibility mode and eval mode.

    Raises:
        ValueError: fields that no module of Hugging Face's serves.
    """
    import transformers
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    architecture, config = _hf_config(fields)
    dtype, device = fields.get("dtype", torch.float32), torch.device(fields.get("device") or "cpu")
    with _default_dtype(dtype), torch.device("meta"):
        module = getattr(transformers, architecture)(config)
        module.lm_head = nn.Linear(fields["d_model"], fields["d_vocab"])
    module = module.eval().to_empty(device=device)
    for part in module.modules():
        if hasattr(part, "rope_type"):  # its frequencies are computed, not stored
            part.__init__(config)
            part.to(device)

    def plan(adapter: Any) -> None:
        adapter.cfg.eps = float(fields.get("eps", 1e-5))
        adapter.cfg.normalization_type = fields["normalization_type"]
        with _default_dtype(dtype), device:
            _swap_norms(module, adapter, fields)

    bridge: Any = build_bridge_from_module(
        module,
        architecture,
        hf_config=config,
        tokenizer=tokenizer,
        dtype=dtype,
        device=str(device),
        model_name=fields.get("model_name", "custom"),
        post_adapter_hook=plan,
    )
    for name in (*_KEPT, *_ROTARY):
        if name in fields:
            setattr(bridge.cfg, name, fields[name])
    bridge.cfg.default_prepend_bos = fields.get("default_prepend_bos", True)  # an architecture's own is another's
    for block in bridge.blocks:
        _one_copy(block.attn)
        for part in (block.attn.q, block.attn.k, block.attn.v, block.attn.o, block.mlp.out):
            linear = part.original_component
            if linear.bias is None:
                linear.bias = nn.Parameter(linear.weight.new_empty(len(linear.weight)))
    bridge.enable_compatibility_mode(no_processing=True, disable_warnings=True)
    return bridge


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _swap_norms(module: Any, adapter: Any, fields: Mapping[str, Any]) -> None:
    """Put the norms that the fields name in a module and in the plan of its Bridge, in place of its own."""
    from transformer_lens.model_bridge import generalized_components as components
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

    d_model, d_head, eps = fields["d_model"], fields["d_head"], float(fields.get("eps", 1e-5))
    plain = {"elementwise_affine": False}  # run in place of its component where inputs are split by head
    kinds: dict[str | None, tuple[Any, Any]] = {
        None: (nn.Identity, GeneralizedComponent),
        "LNPre": (lambda: nn.LayerNorm(d_model, eps, **plain), components.LayerNormPreBridge),
        "RMSPre": (lambda: nn.RMSNorm(d_model, eps, **plain), components.RMSNormPreBridge),
        "LN": (lambda: nn.LayerNorm(d_model, eps), components.NormalizationBridge),
        "RMS": (lambda: nn.RMSNorm(d_model, eps), components.RMSNormalizationBridge),
    }
    norm, component = kinds[fields["normalization_type"]]
    plan = adapter.component_mapping
    of_block = plan["blocks"].submodules
    for block in module.get_submodule(plan["blocks"].name):
        for name in ("ln1", "ln2"):
            setattr(block, of_block[name].name, norm())
        attn = getattr(block, of_block["attn"].name)
        for name in ("q_norm", "k_norm"):  # torch's, which computes in the precision of what it reads
            if name in of_block["attn"].submodules:
                setattr(attn, name, nn.RMSNorm(d_head, eps))
    for name in ("ln1", "ln2"):
        of_block[name] = component(name=of_block[name].name, config=adapter.cfg)
    path, _, name = plan["ln_final"].name.rpartition(".")
    setattr(module.get_submodule(path), name, norm())
    plan["ln_final"] = component(name=plan["ln_final"].name, config=adapter.cfg)


def _one_copy(attn: Any) -> None:
    """Free the joint matrix of queries, keys and values that a Bridge has split into copies, and does not use."""
    if "qkv" not in attn.submodules:
        return
    joint, of_q = attn.qkv.original_component, attn.q.original_component
    if joint.weight.untyped_storage().data_ptr() != of_q.weight.untyped_storage().data_ptr():
        joint.weight, joint.bias = nn.Parameter(joint.weight.new_empty(0)), nn.Parameter(joint.bias.new_empty(0))


# ---------------------------------------------------------------------------------------------------------
# Shapes in Hugging Face's words


def _hf_config(fields: Mapping[str, Any]) -> tuple[str, Any]:
    """The class of Hugging Face's that has a shape, and its config.

    Raises:
        ValueError: there is none.
    """
    import transformers

    scaling = ("use_NTK_by_parts_rope", "NTK_", "use_yarn_rope", "yarn_")
    known = _SHAPE + _ROTARY + _WITHOUT_EFFECT + _OTHER
    for name, value in fields.items():
        if name not in known and not name.startswith(scaling) and value not in _OFF:
            raise ValueError(f"TransformerLens 4 builds no model with {name} {value!r}")
    served = {
        "act_fn": ACTIVATIONS,
        "positional_embedding_type": ("standard", "rotary"),
        "original_architecture": (None, *ARCHITECTURES),
    }
    for name, values in served.items():
        if fields.get(name) not in values and name in fields:
            raise ValueError(f"TransformerLens 4 builds no model with {name} {fields[name]!r}")
    d_model, n_heads = fields["d_model"], fields["n_heads"]
    standard, gated = fields.get("positional_embedding_type", "standard") == "standard", bool(fields.get("gated_mlp"))
    grouped, local = bool(fields.get("n_key_value_heads")), bool(fields.get("use_local_attn"))
    shape = {
        "vocab_size": fields["d_vocab"],
        "max_position_embeddings": fields["n_ctx"],
        "hidden_size": d_model,
        "num_hidden_layers": fields["n_layers"],
        "num_attention_heads": n_heads,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    plain = fields["d_head"] * n_heads == d_model and not (gated or grouped or local or fields.get("use_qk_norm"))
    if standard and plain and not fields.get("parallel_attn_mlp"):
        return "GPT2LMHeadModel", transformers.GPT2Config(
            **shape,
            n_inner=fields["d_mlp"],
            activation_function=fields["act_fn"],
            embd_pdrop=0.0,  # a HookedTransformer has no dropout
            resid_pdrop=0.0,
            attn_pdrop=0.0,
            scale_attn_by_inverse_layer_idx=bool(fields.get("scale_attn_by_inverse_layer_idx")),
        )
    shape |= {"intermediate_size": fields["d_mlp"], "hidden_act": fields["act_fn"], "rope_parameters": _rope(fields)}
    by_layer, adjacent = fields.get("scale_attn_by_inverse_layer_idx"), fields.get("rotary_adjacent_pairs")
    if not standard and plain and not by_layer and not adjacent:
        parallel = bool(fields.get("parallel_attn_mlp"))
        return "GPTNeoXForCausalLM", transformers.GPTNeoXConfig(**shape, use_parallel_residual=parallel)
    whole = (fields.get("rotary_dim") or fields["d_head"]) == fields["d_head"]
    if not standard and gated and whole and not (by_layer or adjacent or fields.get("parallel_attn_mlp")):
        shape |= {"num_key_value_heads": fields.get("n_key_value_heads") or n_heads, "head_dim": fields["d_head"]}
        if local:
            names = {"global": "full_attention", "local": "sliding_attention"}
            kinds = [names[kind] for kind in fields["attn_types"][: fields["n_layers"]]]
            shape |= {"use_sliding_window": True, "sliding_window": fields["window_size"], "layer_types": kinds}
        if fields.get("use_qk_norm"):
            return "Qwen3ForCausalLM", transformers.Qwen3Config(**shape, rms_norm_eps=float(fields.get("eps", 1e-5)))
        if local:
            return "Qwen2ForCausalLM", transformers.Qwen2Config(**shape)
        return "LlamaForCausalLM", transformers.LlamaConfig(**shape)
    raise ValueError("TransformerLens 4 builds no model of this shape: it is none of GPT-2's, GPT-NeoX's or Llama's")


def _rope(fields: Mapping[str, Any]) -> dict[str, Any]:
    """HookedTransformerConfig's fields of rotary positions as Hugging Face's rope_parameters."""
    share = (fields.get("rotary_dim") or fields["d_head"]) / fields["d_head"]
    base = {"rope_theta": float(fields.get("rotary_base", 10000)), "partial_rotary_factor": share}
    if fields.get("use_NTK_by_parts_rope"):
        return base | {
            "rope_type": "llama3",
            "factor": float(fields.get("NTK_by_parts_factor", 8.0)),
            "low_freq_factor": float(fields.get("NTK_by_parts_low_freq_factor", 1.0)),
            "high_freq_factor": float(fields.get("NTK_by_parts_high_freq_factor", 4.0)),
            "original_max_position_embeddings": int(fields.get("NTK_original_ctx_len", 8192)),
        }
    if fields.get("use_yarn_rope"):
        return base | {
            "rope_type": "yarn",
            "factor": float(fields.get("yarn_factor", 1.0)),
            "attention_factor": float(fields.get("yarn_attention_factor", 1.0)),
            "beta_fast": float(fields.get("yarn_beta_fast", 32.0)),
            "beta_slow": float(fields.get("yarn_beta_slow", 1.0)),
            "original_max_position_embeddings": int(fields.get("yarn_original_max_position_embeddings", 4096)),
            "truncate": bool(fields.get("yarn_truncate", True)),
        }
    if fields.get("rotary_scaling_factor", 1.0) != 1.0:
        return base | {"rope_type": "linear", "factor": float(fields["rotary_scaling_factor"])}
    return base | {"rope_type": "default"}


# ---------------------------------------------------------------------------------------------------------
# Filling


def bridge_parameters(model: LensModel) -> dict[str, Tensor]:
    """HookedTransformer's names, in its order -> the tensors of a Bridge that `build_bridge` made, or views."""
    found = {"embed.W_E": model.embed.original_component.weight}
    if model.cfg.positional_embedding_type == "standard":
        found["pos_embed.W_pos"] = model.pos_embed.original_component.weight

    def add_norm(name: str, component: Any) -> None:
        for part, tensor in component.original_component.named_parameters():
            found[f"{name}.{part[0]}"] = tensor

    stored = "_" if getattr(model.cfg, "n_key_value_heads", None) else ""
    for i, block in enumerate(model.blocks):
        name, parts = f"blocks.{i}.", block_of(model, i)
        for norm in ("ln1", "ln2"):
            add_norm(name + norm, getattr(block, norm))
        for part in ("W_Q", "W_O", "b_Q", "b_O", "W_K", "W_V", "b_K", "b_V"):
            found[f"{name}attn.{stored if part[-1] in 'KV' else ''}{part}"] = getattr(parts.attn, part)
        for norm in ("q_norm", "k_norm"):
            if norm in block.attn.submodules:
                add_norm(f"{name}attn.{norm}", getattr(block.attn, norm))
        plain, gated = ("W_in", "b_in", "W_out", "b_out"), ("W_in", "W_out", "W_gate", "b_out")
        for part in plain if parts.mlp.W_gate is None else gated:
            found[f"{name}mlp.{part}"] = getattr(parts.mlp, part)
    add_norm("ln_final", model.ln_final)
    head = model.unembed.original_component
    return found | {"unembed.W_U": head.weight.T, "unembed.b_U": head.bias}
