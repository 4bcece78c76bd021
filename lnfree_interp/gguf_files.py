"""Llama models in .gguf files, as checkpoints: what the file calls things, its permutation and quantisation undone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoints import Checkpoint, checkpoint
from .families import HEAD, LLAMA

# Metadata of a Llama model that no file may lack -> LlamaConfig's fields.
_CONFIG = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_MODULES = {"token_embd": "embed_tokens", "output_norm": "norm", "output": HEAD.removesuffix(".weight")}
_OF_BLOCK = {
    "attn_norm": LLAMA.ln1,
    "attn_q": LLAMA.qkv[0],
    "attn_k": LLAMA.qkv[1],
    "attn_v": LLAMA.qkv[2],
    "attn_output": LLAMA.o,
    "ffn_norm": LLAMA.ln2,
    "ffn_up": LLAMA.mlp[0],
    "ffn_gate": LLAMA.mlp[1],
    "ffn_down": LLAMA.mlp[2],
}


def is_gguf(path: Path) -> bool:
    return path.suffix == ".gguf"


def open_gguf(file: Path) -> Checkpoint:
    """The Llama checkpoint in a .gguf file, as if it were Hugging Face's; only norms are read yet.

    Raises:
        ValueError: the package gguf is not installed; a damaged file, another architecture's, one in a type that gguf
            cannot read, one that asks for what is not computed exactly; weights missing, extra, of the wrong shape.
    """
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ValueError(f"{file}: reading it needs the package gguf: pip install 'lnfree_interp[gguf]'") from None
    try:
        reader = GGUFReader(file)
        others = ("general.architecture", "tokenizer.ggml.model")
        wanted = (name for name in reader.fields if name in others or name.startswith("llama."))
        metadata = {name: reader.fields[name].contents() for name in wanted}
    except Exception as error:  # the reader of a damaged file fails in many ways
        raise ValueError(f"{file} is no readable .gguf file ({' '.join(str(error).split())})") from None
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise ValueError(f"{file}: a .gguf of architecture {architecture!r} is not served, only of 'llama'")
    weights = Tensors(file, reader, metadata)
    try:
        config = _config(metadata, weights)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    tokenizer = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    has_tokenizer = "tokenizer.ggml.model" in metadata
    return checkpoint(LLAMA, config, file, lambda: weights, tokenizer if has_tokenizer else None)


def _config(metadata: Mapping[str, Any], weights: Tensors):
    """The LlamaConfig that a file's metadata mean.

    Raises:
        ValueError: entries missing, or that ask for what a Llama does not do.
    """
    from transformers import LlamaConfig

    of_model = {name.removeprefix("llama."): value for name, value in metadata.items() if name.startswith("llama.")}
    absent = [f"llama.{name}" for name in _CONFIG if name not in of_model]
    if absent or weights.shapes.get("embed_tokens.weight") is None:
        raise ValueError(f"lacks {', '.join(absent) or 'token_embd.weight'}")
    fields = {name: of_model[key] for key, name in _CONFIG.items()}
    n_heads = fields["num_attention_heads"]
    d_head = of_model.get("attention.key_length", fields["hidden_size"] // n_heads)
    for name, allowed in {
        "rope.dimension_count": d_head,
        "attention.value_length": d_head,
        "expert_count": 0,
        "attention.causal": True,
        "attention.sliding_window": 0,
        "attention.scale": d_head**-0.5,
        "embedding_scale": 1.0,
        "residual_scale": 1.0,
        "logit_scale": 1.0,
    }.items():
        if of_model.get(name, allowed) != allowed:
            raise ValueError(f"llama.{name} {of_model[name]} is not computed, only {allowed}")
    return LlamaConfig(
        **fields,
        vocab_size=weights.shapes["embed_tokens.weight"][0],
        num_key_value_heads=of_model.get("attention.head_count_kv", n_heads),
        head_dim=d_head,
        rope_parameters=_rope(of_model, weights, d_head),
        attention_bias=any(name.endswith("_proj.bias") for name in weights.shapes),
        tie_word_embeddings=HEAD not in weights.shapes,
    )


def _rope(of_model: Mapping[str, Any], weights: Tensors, d_head: int) -> dict[str, Any]:
    """transformers' rope_parameters of a file's metadata."""
    kind = of_model.get("rope.scaling.type", "none")
    base = float(of_model.get("rope.freq_base", 10000.0))
    if weights.factors is not None and kind == "none":
        return _llama3(weights.factors, base, d_head)
    if kind not in ("none", "linear") or weights.factors is not None:
        raise ValueError(f"llama.rope.scaling.type {kind} (or with it rope_freqs.weight) is not computed")
    # Entries of older files: a scale instead of a type and a factor.
    factor = of_model.get("rope.scaling.factor" if kind == "linear" else "rope.scale_linear", 1.0)
    return {"rope_type": "linear", "rope_theta": base, "factor": float(factor)}


def _llama3(factors: Tensor, base: float, d_head: int) -> dict[str, Any]:
    """Llama 3's scaling, of which a file holds but the factors that divide the frequencies.

    Raises:
        ValueError: factors other than those of the models that Meta published.
    """
    wavelength = 2 * torch.pi * base ** (torch.arange(0, d_head, 2, dtype=torch.float64) / d_head)
    factor, low, high, context = factors.max().item(), 1.0, 4.0, 8192
    smooth = ((context / wavelength - low) / (high - low)).clamp(0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if factors.shape != expected.shape or not torch.allclose(factors.double(), expected, rtol=1e-4):
        raise ValueError(
            "rope_freqs.weight holds other factors than Llama 3's scaling of frequencies, and is not computed"
        )
    return {
        "rope_type": "llama3",
        "rope_theta": base,
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }


class Tensors(Mapping[str, Tensor]):
    """The tensors of a .gguf file under the names LlamaForCausalLM has for them, read one at a time when asked for.

    Raises:
        ValueError: a type that gguf cannot read; on reading: a tensor that is not finite.
    """

    def __init__(self, file: Path, reader, metadata: Mapping[str, Any]):
        from gguf import dequantize

        self.file: Path = file
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.factors: Tensor | None = None  # on the frequencies of rotary positions
        self._at: dict[str, tuple[Any, ...]] = {}
        n_heads = metadata.get("llama.attention.head_count", 1)
        of_keys = metadata.get("llama.attention.head_count_kv", n_heads)
        for tensor in reader.tensors:
            try:  # a row or less: whether its type is one that gguf reads
                dequantize(tensor.data[:1], tensor.tensor_type)
            except NotImplementedError:
                raise ValueError(
                    f"{file}: {tensor.name} is of type {tensor.tensor_type.name}, which is not read"
                ) from None
            where = (tensor.data_offset, tensor.data.dtype, tensor.data.shape, tensor.tensor_type)
            if tensor.name == "rope_freqs.weight":
                self.factors = self._read(*where)
                continue
            name = _name(tensor.name)
            heads = {LLAMA.qkv[0]: n_heads, LLAMA.qkv[1]: of_keys}
            turned = next((n for module, n in heads.items() if f".{module}." in name), None)
            self._at[name] = (where, turned)
            self.shapes[name] = tuple(int(n) for n in reversed(tensor.shape))

    def _read(self, offset: int, dtype, shape: tuple[int, ...], kind) -> Tensor:
        import numpy as np
        from gguf import dequantize

        # Read, not mapped: pages of a map stay in memory.
        data = np.fromfile(self.file, dtype=dtype, count=int(np.prod(shape)), offset=int(offset))
        return torch.from_numpy(np.array(dequantize(data.reshape(shape), kind), copy=False))

    def __getitem__(self, name: str) -> Tensor:
        where, heads = self._at[name]
        tensor = self._read(*where)
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{self.file}: {name} holds values that are not finite")
        if heads is not None:  # rows of a head were put in pairs, (0, n/2), (1, n/2 + 1), ...
            tensor = tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._at  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._at)

    def __len__(self) -> int:
        return len(self._at)


def _name(stored: str) -> str:
    """A tensor's name in LlamaForCausalLM, without "model."; as it is, if that has none."""
    *block, module, part = ["", *stored.split(".")][-4:]
    if block[-2:-1] == ["blk"] and module in _OF_BLOCK:
        return f"{LLAMA.block.format(block[-1])}.{_OF_BLOCK[module]}.{part}"
    return f"{_MODULES[module]}.{part}" if module in _MODULES else stored
