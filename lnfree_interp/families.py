"""Families of checkpoints as data: the names and shapes of their weights, and their configs in TransformerLens' terms.

A family says how a Hugging Face architecture names its weights and which `HookedTransformerConfig` computes what its
config asks for. What a config asks for that would not be computed exactly is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

# transformers' names of activations -> TransformerLens' for the same function.
_ACTIVATIONS = {name: name for name in ("gelu", "gelu_new", "gelu_fast", "relu", "silu")} | {
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_python_tanh": "gelu_new",
    "gelu_python": "gelu",
    "swish": "silu",
}
# The unembedding's name; it is absent where it is the token embedding.
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Family:
    """An architecture: what its config means and what its weights are called (without `prefix`)."""

    architecture: str
    model_type: str
    fields: Callable[[Any], dict[str, Any]]  # config -> fields of HookedTransformerConfig
    biased: Callable[[Any], Collection[str]]  # config -> which of qkv, o, mlp have biases
    norm: str  # LN or RMS
    eps: str  # the config's name of the norms' epsilon
    prefix: str
    embed: str
    block: str  # of layer {}
    ln1: str
    qkv: tuple[str, ...]  # one matrix for all three, or one for each
    o: str
    ln2: str
    mlp: tuple[str, ...]  # in, out; or in, gate, out
    final: str
    pos: str | None = None
    qk_norm: tuple[str, str] | None = None  # norms of each head's queries and keys
    in_out: bool = False  # matrices are [in, out], not nn.Linear's [out, in]
    by_head: bool = False  # the columns of the one matrix of q, k and v go head by head
    buffers: tuple[str, ...] = ("rotary_emb.inv_freq",)  # ends of names that old checkpoints hold beside weights
    renamed: tuple[tuple[str, str], ...] = ()  # stored name -> name here

    @property
    def centres(self) -> bool:
        """Whether its norms subtract the mean."""
        return self.norm == "LN"

    def norms(self, n_layers: int) -> list[str]:
        """All of its norms."""
        of_block = (self.ln1, *(self.qk_norm or ()), self.ln2)
        return [f"{self.block.format(i)}.{name}" for i in range(n_layers) for name in of_block] + [self.final]


def key_heads(fields: Mapping[str, Any]) -> int:
    """How many heads of keys and values a model of these HookedTransformerConfig fields has."""
    return fields.get("n_key_value_heads") or fields["n_heads"]


def expected_shapes(family: Family, fields: Mapping[str, Any], biased: Collection[str]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight of a checkpoint but the head, without the family's prefix."""
    d, mlp, vocab, d_head = (fields[name] for name in ("d_model", "d_mlp", "d_vocab", "d_head"))
    queries, keys = fields["n_heads"] * d_head, key_heads(fields) * d_head
    shapes: dict[str, tuple[int, ...]] = {f"{family.embed}.weight": (vocab, d)}
    if family.pos:
        shapes[f"{family.pos}.weight"] = (fields["n_ctx"], d)

    def norm(name: str, size: int = d) -> dict[str, tuple[int, ...]]:
        parts = ("weight", "bias") if family.centres else ("weight",)
        return dict.fromkeys((f"{name}.{part}" for part in parts), (size,))

    def linear(name: str, n_in: int, n_out: int, kind: str) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {f"{name}.weight": (n_in, n_out) if family.in_out else (n_out, n_in)}
        return found | ({f"{name}.bias": (n_out,)} if kind in biased else {})

    widths = (queries + 2 * keys,) if len(family.qkv) == 1 else (queries, keys, keys)
    *readers, writer = family.mlp
    block = norm(family.ln1) | linear(family.o, queries, d, "o") | norm(family.ln2) | linear(writer, mlp, d, "mlp")
    for name, width in zip(family.qkv, widths, strict=True):
        block |= linear(name, d, width, "qkv")
    for name in readers:
        block |= linear(name, d, mlp, "mlp")
    for name in family.qk_norm or ():
        block |= norm(name, d_head)
    for i in range(fields["n_layers"]):
        shapes |= {f"{family.block.format(i)}.{name}": shape for name, shape in block.items()}
    return shapes | norm(family.final)


# ---------------------------------------------------------------------------------------------------------
# Configs in TransformerLens' terms. Errors name what is refused; where it stands is added by who reads the file.


def _activation(name: str) -> str:
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation {name!r} is not computed; those that are: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _gpt2_fields(config) -> dict[str, Any]:
    if config.n_embd % config.n_head:
        raise ValueError(f"n_embd {config.n_embd} is no multiple of n_head {config.n_head}")
    if config.add_cross_attention:
        raise ValueError("cross-attention is not GPT-2's")
    return {
        "n_layers": config.n_layer,
        "d_model": config.n_embd,
        "n_heads": config.n_head,
        "d_head": config.n_embd // config.n_head,
        "d_mlp": config.n_inner or 4 * config.n_embd,
        "n_ctx": config.n_positions,
        "act_fn": _activation(config.activation_function),
        "use_attn_scale": config.scale_attn_weights,
        "scale_attn_by_inverse_layer_idx": config.scale_attn_by_inverse_layer_idx,
    }


def _shape_fields(config) -> dict[str, Any]:
    """What the families with rotary positions have in common."""
    d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {
        "n_layers": config.num_hidden_layers,
        "d_model": config.hidden_size,
        "n_heads": config.num_attention_heads,
        "d_head": d_head,
        "d_mlp": config.intermediate_size,
        "n_ctx": config.max_position_embeddings,
        "act_fn": _activation(config.hidden_act),
        "positional_embedding_type": "rotary",
        "rotary_adjacent_pairs": False,
    } | _rotary_fields(config, d_head)


def _gpt_neox_fields(config) -> dict[str, Any]:
    fields = _shape_fields(config)
    if fields["d_head"] * fields["n_heads"] != fields["d_model"]:
        raise ValueError(f"{fields['n_heads']} heads of {fields['d_head']} are not hidden_size {fields['d_model']}")
    return fields | {
        "parallel_attn_mlp": config.use_parallel_residual,
        "default_prepend_bos": False,  # as TransformerLens has it for these models
    }


def _llama_fields(config) -> dict[str, Any]:
    if getattr(config, "mlp_bias", False):
        raise ValueError("mlp_bias: TransformerLens' gated MLP has no biases on what the gate multiplies")
    fields = _shape_fields(config) | {"gated_mlp": True}
    if fields["rotary_dim"] != fields["d_head"]:
        raise ValueError("partial_rotary_factor other than 1 is not this architecture's")
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(
            f"num_attention_heads {config.num_attention_heads} is no multiple of "
            f"num_key_value_heads {config.num_key_value_heads}"
        )
    if config.num_key_value_heads != config.num_attention_heads:
        fields["n_key_value_heads"] = config.num_key_value_heads
    return fields


def _mistral_fields(config) -> dict[str, Any]:
    kind = "full_attention" if config.sliding_window is None else "sliding_attention"
    layers = [kind] * config.num_hidden_layers
    if getattr(config, "layer_types", None) not in (None, layers):
        raise ValueError("layer_types: a Mistral's layers all have its sliding_window, or none has one")
    return _llama_fields(config) | _window_fields(config, layers)


def _qwen2_fields(config) -> dict[str, Any]:
    return _llama_fields(config) | _window_fields(config, config.layer_types) | {"default_prepend_bos": False}


def _qwen3_fields(config) -> dict[str, Any]:
    return _qwen2_fields(config) | {"use_qk_norm": True}


def _window_fields(config, layer_types: list[str]) -> dict[str, Any]:
    """Which layers look back only so far."""
    names = {"full_attention": "global", "sliding_attention": "local"}
    if len(layer_types) != config.num_hidden_layers or not set(layer_types) <= set(names):
        raise ValueError(
            f"layer_types must be {config.num_hidden_layers} of {' and '.join(names)}, not {', '.join(layer_types)}"
        )
    if "sliding_attention" not in layer_types:
        return {}
    if not isinstance(config.sliding_window, int) or config.sliding_window < 1:
        raise ValueError(f"layer_types names sliding_attention, but sliding_window is {config.sliding_window}")
    if config.rope_parameters.get("rope_type") == "linear":
        raise ValueError("linear scaling of rotary positions in layers with a sliding window is not computed")
    return {
        "use_local_attn": True,
        "window_size": config.sliding_window,
        "attn_types": [names[kind] for kind in layer_types],
    }


def _rotary_fields(config, d_head: int) -> dict[str, Any]:
    """Rotary positions: base, how much of each head is turned, how the frequencies are scaled."""
    rope = config.rope_parameters or {}
    if any(isinstance(value, dict) for value in rope.values()):
        raise ValueError("rope_parameters that differ by layer are not computed")
    kind = rope.get("rope_type", "default")
    if kind not in _SCALINGS:
        raise ValueError(
            f"scaling {kind!r} of rotary positions is not computed; those that are: {', '.join(_SCALINGS)}"
        )
    rotary_dim = int(d_head * (rope.get("partial_rotary_factor") or 1.0))
    if rotary_dim % 2 or not 0 < rotary_dim <= d_head:
        raise ValueError(f"rotary positions of {rotary_dim} of a head's {d_head} numbers are not computed")
    try:
        scaling = _SCALINGS[kind](rope, config)
        base = float(rope["rope_theta"])
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"rope_parameters {rope} lack a number ({error})") from None
    return {"rotary_dim": rotary_dim, "rotary_base": base} | scaling


def _llama3(rope, config) -> dict[str, Any]:
    return {
        "use_NTK_by_parts_rope": True,
        "NTK_by_parts_factor": float(rope["factor"]),
        "NTK_by_parts_low_freq_factor": float(rope["low_freq_factor"]),
        "NTK_by_parts_high_freq_factor": float(rope["high_freq_factor"]),
        "NTK_original_ctx_len": int(rope["original_max_position_embeddings"]),
    }


def _yarn(rope, config) -> dict[str, Any]:
    """YaRN (arXiv 2309.00071), with transformers' default for the factor on sines and cosines."""
    original = rope["original_max_position_embeddings"]
    factor = rope["factor"] if rope.get("factor") is not None else config.max_position_embeddings / original

    def magnitude(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0

    of_attention = rope.get("attention_factor")
    if of_attention is None:
        every, dim = rope.get("mscale"), rope.get("mscale_all_dim")
        of_attention = magnitude(float(every)) / magnitude(float(dim)) if every and dim else magnitude(1.0)
    return {
        "use_yarn_rope": True,
        "yarn_factor": float(factor),
        "yarn_attention_factor": float(of_attention),
        "yarn_beta_fast": float(rope.get("beta_fast") or 32),
        "yarn_beta_slow": float(rope.get("beta_slow") or 1),
        "yarn_original_max_position_embeddings": int(original),
        "yarn_truncate": bool(rope.get("truncate", True)),
    }


_SCALINGS: dict[str, Callable[[Any, Any], dict[str, Any]]] = {
    "default": lambda rope, config: {},
    "linear": lambda rope, config: {"rotary_scaling_factor": float(rope["factor"])},
    "llama3": _llama3,
    "yarn": _yarn,
}


# ---------------------------------------------------------------------------------------------------------
# The families


def _llama_kind(architecture: str, model_type: str, fields, biased, **more: Any) -> Family:
    return Family(
        architecture,
        model_type,
        fields,
        biased,
        norm="RMS",
        eps="rms_norm_eps",
        prefix="model.",
        embed="embed_tokens",
        block="layers.{}",
        ln1="input_layernorm",
        qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        o="self_attn.o_proj",
        ln2="post_attention_layernorm",
        mlp=("mlp.up_proj", "mlp.gate_proj", "mlp.down_proj"),
        final="norm",
        **more,
    )


GPT2 = Family(
    "GPT2LMHeadModel",
    "gpt2",
    _gpt2_fields,
    biased=lambda config: ("qkv", "o", "mlp"),
    norm="LN",
    eps="layer_norm_epsilon",
    prefix="transformer.",
    embed="wte",
    pos="wpe",
    block="h.{}",
    ln1="ln_1",
    qkv=("attn.c_attn",),
    o="attn.c_proj",
    ln2="ln_2",
    mlp=("mlp.c_fc", "mlp.c_proj"),
    final="ln_f",
    in_out=True,
    buffers=(".attn.bias", ".attn.masked_bias"),
)
GPT_NEOX = Family(
    "GPTNeoXForCausalLM",
    "gpt_neox",
    _gpt_neox_fields,
    biased=lambda config: ("qkv", "o", "mlp") if config.attention_bias else ("mlp",),
    norm="LN",
    eps="layer_norm_eps",
    prefix="gpt_neox.",
    embed="embed_in",
    block="layers.{}",
    ln1="input_layernorm",
    qkv=("attention.query_key_value",),
    o="attention.dense",
    ln2="post_attention_layernorm",
    mlp=("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    final="final_layer_norm",
    by_head=True,
    buffers=(".attention.bias", ".attention.masked_bias", "rotary_emb.inv_freq"),
    renamed=(("embed_out.weight", HEAD),),
)
LLAMA = _llama_kind(
    "LlamaForCausalLM", "llama", _llama_fields, lambda config: ("qkv", "o") if config.attention_bias else ()
)
MISTRAL = _llama_kind("MistralForCausalLM", "mistral", _mistral_fields, lambda config: ())
QWEN2 = _llama_kind("Qwen2ForCausalLM", "qwen2", _qwen2_fields, lambda config: ("qkv",))
QWEN3 = _llama_kind(
    "Qwen3ForCausalLM",
    "qwen3",
    _qwen3_fields,
    lambda config: ("qkv", "o") if config.attention_bias else (),
    qk_norm=("self_attn.q_norm", "self_attn.k_norm"),
)
FAMILIES = {family.model_type: family for family in (GPT2, GPT_NEOX, LLAMA, QWEN2, QWEN3, MISTRAL)}
