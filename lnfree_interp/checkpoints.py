"""Families of checkpoints as data: the names and shapes of their weights, and their configs in TransformerLens' terms.

A family says how a Hugging Face architecture names its weights and which `HookedTransformerConfig` computes what its
config asks for; `folding` turns the weights into HookedTransformer's. What a config asks for that would not be computed
exactly is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .documents import read_text
from .layernorm import are_constant
from .names import weight_files

# transformers' names of activations -> TransformerLens' for the same function.
_ACTIVATIONS = {name: name for name in ("gelu", "gelu_new", "gelu_fast", "relu", "silu")} | {
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_python_tanh": "gelu_new",
    "gelu_python": "gelu",
    "swish": "silu",
}
_FLOATS = ("F64", "F32", "F16", "BF16")
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
    shapes = {f"{family.embed}.weight": (vocab, d)}
    if family.pos:
        shapes[f"{family.pos}.weight"] = (fields["n_ctx"], d)

    def norm(name: str, size: int = d) -> dict[str, tuple[int, ...]]:
        return {f"{name}.{part}": (size,) for part in (("weight", "bias") if family.centres else ("weight",))}

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
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"hidden_size {config.hidden_size} is no multiple of num_attention_heads {config.num_attention_heads}"
        )
    return _shape_fields(config) | {
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


# ---------------------------------------------------------------------------------------------------------
# Files


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk: its config, the HookedTransformerConfig fields that follow, and its weights by name.

    Names are without the family's prefix. `fields` says how it normalises: no normalization_type where it is LN-free.
    """

    family: Family
    config: Any
    fields: dict[str, Any]
    weights: Mapping[str, Tensor]

    @property
    def ln_free(self) -> bool:
        return self.fields["normalization_type"] is None

    @property
    def eps(self) -> float:
        """The norms' epsilon as it is stored: of an LN-free checkpoint, the square of what they divide by."""
        return float(getattr(self.config, self.family.eps))


def open_checkpoint(directory: Path) -> Checkpoint:
    """The checkpoint in a directory, in safetensors format; of the weights nothing but the norms is read yet.

    Raises:
        ValueError: config.json is not readable, is another architecture's, or asks for what is not computed exactly;
            no or unreadable weight files; weights missing, extra, of the wrong shape or dtype; some norms constant
            and some not.
    """
    family, config = read_config(directory)
    return checkpoint(family, config, directory, lambda: Safetensors(directory, family))


def checkpoint(family: Family, config, where: Path, read: Callable[[], Any]) -> Checkpoint:
    """A checkpoint of a config and of weights that know their `shapes`, which are read once the config is accepted.

    Raises:
        ValueError: as `open_checkpoint`, each with the file or directory it is about.
    """
    try:
        eps = float(getattr(config, family.eps))
        fields = {"d_vocab": config.vocab_size, "original_architecture": family.architecture, "eps": eps}
        fields |= family.fields(config)
        weights = read()
        expected = expected_shapes(family, fields, family.biased(config))
        if HEAD in weights.shapes or not config.tie_word_embeddings:
            expected[HEAD] = expected[f"{family.embed}.weight"]
        check_shapes(weights.shapes, expected, family.architecture)
        norms = ((name, weights[f"{name}.weight"]) for name in family.norms(fields["n_layers"]))
        ln_free = are_constant(norms, eps, family.eps)
    except ValueError as error:
        text = str(error)
        raise ValueError(text if str(where) in text else f"{where}: {text}") from None
    if ln_free:  # the norms of queries and keys have the same epsilon
        fields |= {"normalization_type": None, "eps": 1e-5}
        fields.pop("use_qk_norm", None)
    else:
        fields["normalization_type"] = f"{family.norm}Pre"
    return Checkpoint(family, config, fields, weights)


def read_config(directory: Path) -> tuple[Family, Any]:
    """The family of a checkpoint directory and its transformers config.

    Raises:
        ValueError: config.json is not readable, or is another architecture's.
    """
    import transformers

    try:
        raw = json.loads(read_text(directory / "config.json"))
    except ValueError as error:
        raise ValueError(f"{directory}: config.json is not readable ({error})") from None
    if not isinstance(raw, dict) or raw.get("model_type") not in FAMILIES:
        what = (
            (raw.get("architectures") or [f"model_type {raw.get('model_type')!r}"])[0] if isinstance(raw, dict) else raw
        )
        served = ", ".join(family.architecture for family in FAMILIES.values())
        raise ValueError(f"{directory}: {what} is not served; what is: {served}")
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method")
        raise ValueError(f"{directory}: quantised weights ({method}) are not read")
    family = FAMILIES[raw["model_type"]]
    try:
        config = getattr(transformers, f"{type_name(family)}Config").from_dict(raw)
    except Exception as error:  # transformers' own checks raise many kinds
        raise ValueError(
            f"{directory}: config.json is no {family.architecture}'s ({' '.join(str(error).split())})"
        ) from None
    return family, config


def type_name(family: Family) -> str:
    """Llama of LlamaForCausalLM: what transformers' class names begin with."""
    return family.architecture.removesuffix("ForCausalLM").removesuffix("LMHeadModel")


def check_shapes(
    shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], architecture: str
) -> None:
    """Raises:
    ValueError: weights missing, extra, or of the wrong shape.
    """
    for problem, names in (
        ("lacks weights", [n for n in expected if n not in shapes]),
        (f"has weights that a {architecture} of its config has not", [n for n in shapes if n not in expected]),
    ):
        if names:
            raise ValueError(f"{problem}: {_some(names)}")
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise ValueError(f"{name} has shape {list(shapes[name])}, the config wants {list(shape)}")


def _some(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


class Safetensors(Mapping[str, Tensor]):
    """The tensors of a directory's safetensors files under their names in a family, read one at a time when asked for.

    Names are without the family's prefix; buffers of old checkpoints are left out.

    Raises:
        ValueError: no or unreadable weight files, numbers that are no floats; on reading: a tensor that is not finite.
    """

    def __init__(self, directory: Path, family: Family):
        files = weight_files(directory)
        if not files:
            raise ValueError(f"{directory} is no checkpoint: it lacks model.safetensors or a part of it")
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._at: dict[str, tuple[Path, str]] = {}
        for file in files:
            try:
                with safe_open(file, framework="pt") as handle:
                    slices = {key: handle.get_slice(key) for key in handle.keys()}  # noqa: SIM118
                    stored = {key: (tuple(part.get_shape()), part.get_dtype()) for key, part in slices.items()}
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file} is no readable safetensors file ({error})") from None
            for key, (shape, dtype) in stored.items():
                name = dict(family.renamed).get(key, key.removeprefix(family.prefix))
                if name.endswith(family.buffers):
                    continue
                if dtype not in _FLOATS:
                    raise ValueError(f"{file}: {key} is stored as {dtype}; read are {', '.join(_FLOATS)}")
                self._at[name], self.shapes[name] = (file, key), shape

    def __getitem__(self, name: str) -> Tensor:
        file, key = self._at[name]
        # Opened anew for each tensor: a handle that stays open keeps all pages read so far in memory.
        with safe_open(file, framework="pt") as handle:
            tensor = handle.get_tensor(key)
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{file.parent}: {name} holds values that are not finite")
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._at  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._at)

    def __len__(self) -> int:
        return len(self._at)
