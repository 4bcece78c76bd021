"""Checkpoints -> TransformerLens models, with or without LayerNorm.

Whether a checkpoint is LN-free is read from its epsilon and its weights, never from its name. Both kinds end up
in the same centred coordinates: normalisation weights folded into what reads them, the residual stream and the
unembedding centred, value biases folded into b_O (TransformerLens' usual processing), all in fp64, one matrix
at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from . import lens
from .documents import read_text
from .folding import fold_layernorm
from .layernorm import is_ln_free
from .lens import LensModel, ModelOrName
from .names import TOKENIZER_FILES, dtype_name, known_models, locate_checkpoint, weight_files

# ---------------------------------------------------------------------------------------------------------
# Files -> config and weights


def read_config(directory: Path):
    """The GPT2Config of a checkpoint directory.

    Raises:
        ValueError: config.json is not readable, or is another architecture's, or asks for what GPT-2 has not.
    """
    from transformers import GPT2Config

    try:
        raw = json.loads(read_text(directory / "config.json"))
    except ValueError as error:
        raise ValueError(f"{directory}: config.json is not readable ({error})") from None
    if not isinstance(raw, dict) or raw.get("model_type") != "gpt2":
        kind = raw.get("model_type") if isinstance(raw, dict) else raw
        raise ValueError(f"{directory} is no GPT-2 checkpoint: config.json has model_type {kind!r}, not 'gpt2'")
    config = GPT2Config.from_dict(raw)
    if config.n_embd % config.n_head:
        raise ValueError(f"{directory}: n_embd {config.n_embd} is no multiple of n_head {config.n_head}")
    if config.add_cross_attention:
        raise ValueError(f"{directory}: cross-attention is not GPT-2's")
    return config


class Weights(Mapping[str, Tensor]):
    """A checkpoint's tensors under GPT2LMHeadModel's names, read from disk one at a time when asked for.

    Names are without the leading "transformer."; mask buffers of old checkpoints are left out.

    Raises:
        ValueError: no or unreadable weight files; weights missing, extra, of the wrong shape; on reading: one
            that is not finite.
    """

    def __init__(self, directory: Path, config):
        files = weight_files(directory)
        if not files:
            raise ValueError(f"{directory} is no GPT-2 checkpoint: it lacks model.safetensors or a part of it")
        self.directory: Path = directory
        self._at: dict[str, tuple[Path, str]] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for file in files:
            try:
                with safe_open(file, framework="pt") as handle:
                    stored_shapes = {key: tuple(handle.get_slice(key).get_shape()) for key in handle.keys()}  # noqa: SIM118
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file} is no readable safetensors file ({error})") from None
            for stored, shape in stored_shapes.items():
                name = stored.removeprefix("transformer.")
                if not name.endswith((".attn.bias", ".attn.masked_bias")):
                    self._at[name], shapes[name] = (file, stored), shape
        expected = expected_shapes(config)
        if "lm_head.weight" in shapes or not config.tie_word_embeddings:
            expected["lm_head.weight"] = expected["wte.weight"]
        for problem, names in (
            ("lacks weights", [n for n in expected if n not in shapes]),
            ("has weights GPT-2 has not", [n for n in shapes if n not in expected]),
        ):
            if names:
                raise ValueError(f"{directory} {problem}: {_some(names)}")
        for name, shape in expected.items():
            if shapes[name] != shape:
                raise ValueError(f"{directory}: {name} has shape {list(shapes[name])}, the config wants {list(shape)}")

    def __getitem__(self, name: str) -> Tensor:
        file, stored = self._at[name]
        # Opened anew for each tensor: a handle that stays open keeps all pages read so far in memory.
        with safe_open(file, framework="pt") as handle:
            tensor = handle.get_tensor(stored)
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{self.directory}: {name} holds values that are not finite")
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._at  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._at)

    def __len__(self) -> int:
        return len(self._at)


def _some(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def expected_shapes(config) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight of a GPT2LMHeadModel but the tied head, without "transformer."."""
    d, mlp = config.n_embd, config.n_inner or 4 * config.n_embd
    shapes = {"wte.weight": (config.vocab_size, d), "wpe.weight": (config.n_positions, d)}
    block = {
        "ln_1.weight": (d,),
        "ln_1.bias": (d,),
        "attn.c_attn.weight": (d, 3 * d),
        "attn.c_attn.bias": (3 * d,),
        "attn.c_proj.weight": (d, d),
        "attn.c_proj.bias": (d,),
        "ln_2.weight": (d,),
        "ln_2.bias": (d,),
        "mlp.c_fc.weight": (d, mlp),
        "mlp.c_fc.bias": (mlp,),
        "mlp.c_proj.weight": (mlp, d),
        "mlp.c_proj.bias": (d,),
    }
    for i in range(config.n_layer):
        shapes |= {f"h.{i}.{name}": shape for name, shape in block.items()}
    return shapes | {"ln_f.weight": (d,), "ln_f.bias": (d,)}


# ---------------------------------------------------------------------------------------------------------
# Tokenizer


def load_tokenizer(directory: Path, config):
    """The checkpoint's tokenizer, TransformerLens-ready; GPT-2's own for its vocabulary; else None.

    Raises:
        ValueError: the tokenizer's size disagrees with the model's vocabulary.
    """
    from transformers import AutoTokenizer

    if not any((directory / file).is_file() for file in ("tokenizer.json", "vocab.json")):
        if config.vocab_size != 50257:
            return None
        try:
            directory = _tokenizer_of_gpt2()
        except ValueError:
            return None
    # add_bos_token spares TransformerLens a second look-up by name, which would go to the hub.
    tokenizer = AutoTokenizer.from_pretrained(directory, add_bos_token=True, local_files_only=True)
    if len(tokenizer) != config.vocab_size:
        raise ValueError(
            f"{directory}: the tokenizer has {len(tokenizer)} tokens, the model's vocabulary {config.vocab_size}"
        )
    return tokenizer


def _tokenizer_of_gpt2() -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download("openai-community/gpt2", allow_patterns=TOKENIZER_FILES, etag_timeout=5))
    except Exception:
        raise ValueError("GPT-2's tokenizer is neither in the cache nor reachable on the hub") from None


# ---------------------------------------------------------------------------------------------------------
# The model


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device asked for; without one a GPU if there is one.

    Raises:
        ValueError: no such device here.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
    except RuntimeError:
        raise ValueError(f"unknown device {device!r}; allowed are cpu, cuda, cuda:N, mps") from None
    here = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= here.get(device.type, 0):
        present = [kind for kind, n in here.items() if n]
        raise ValueError(f"device {str(device)!r} is not there; present: {', '.join(present)}")
    return device


def resolve_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A torch dtype from itself or its name.

    Raises:
        ValueError: not one of float32, float64, bfloat16, float16.
    """
    return getattr(torch, dtype_name(dtype))


def load_model(
    name_or_path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str = torch.float32,
    revision: str | None = None,
):
    """A GPT-2 checkpoint as a HookedTransformer in eval mode, parameters frozen.

    LN-free checkpoints (see `layernorm.is_ln_free`) get `cfg.normalization_type = None`; the others "LNPre".
    log-probabilities are the HF model's; logits differ from it by a constant per position, the unembedding
    being centred.

    Args:
        name_or_path: a name of `available_models()`, a hub id, or a directory with a GPT2LMHeadModel in
            safetensors format. Embedded models and directories never touch the network.
        device: default a GPU if there is one.
        dtype: of the weights. Folding is done in fp64 whatever it is.
        revision: branch, tag or commit of a hub model.

    Raises:
        ValueError: unknown name, no GPT-2 checkpoint, weights missing, extra, misshapen or not finite, a
            tokenizer of the wrong size, a device or dtype that is not there.

    Example:
        >>> from lnfree_interp import load_model
        >>> model = load_model("tiny-noLN")
        >>> print(model.cfg.normalization_type, model.cfg.n_layers)
        None 4
    """
    device, dtype = resolve_device(device), resolve_dtype(dtype)
    directory = locate_checkpoint(name_or_path, revision)
    config = read_config(directory)
    weights = Weights(directory, config)
    try:
        ln_free = is_ln_free(config, weights)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None
    tokenizer = load_tokenizer(directory, config)
    name = name_or_path if str(name_or_path) in known_models() else directory.name
    model = build_model(config, ln_free, tokenizer, device=device, dtype=dtype, name=str(name))
    lens.fill(model, fold_layernorm(config, weights, ln_free=ln_free))
    return model.eval().requires_grad_(False)


def as_model(model: ModelOrName) -> LensModel:
    """A model as it is, or the one of that name, loaded with `load_model`: what functions that take a model begin with.

    Raises:
        ValueError: an unknown name, an object that is no TransformerLens model, a model with adapters or spread over
            several devices.
    """
    found = load_model(model) if isinstance(model, (str, Path)) else model
    if isinstance(found, type) or not all(hasattr(found, name) for name in ("cfg", "hook_dict", "blocks")):
        kind = found.__name__ if isinstance(found, type) else type(found).__name__
        raise ValueError(f"model must be a HookedTransformer (see load_model) or a name, not {kind}")
    adapters = [type(m).__name__ for m in found.modules() if type(m).__module__.startswith("peft.")]
    if adapters:
        raise ValueError(f"the model has adapters ({adapters[0]}): merge them first (merge_and_unload)")
    n_devices = getattr(found.cfg, "n_devices", 1) or 1
    if n_devices > 1:
        raise ValueError(f"the model is spread over {n_devices} devices (cfg.n_devices); it must be on one")
    return found


def as_models(models: Mapping[str, ModelOrName]) -> dict[str, LensModel]:
    """name -> model, each through `as_model`.

    Raises:
        ValueError: as `as_model`; no mapping.
    """
    if not isinstance(models, Mapping):
        raise ValueError(f"models must be a mapping of names to models, not {type(models).__name__}")
    return {name: as_model(model) for name, model in models.items()}


def build_model(config, ln_free: bool, tokenizer, *, device, dtype, name: str):
    """A model of a GPT2Config's shape with uninitialised weights."""
    fields = {
        "n_layers": config.n_layer,
        "d_model": config.n_embd,
        "n_heads": config.n_head,
        "d_head": config.n_embd // config.n_head,
        "d_mlp": config.n_inner or 4 * config.n_embd,
        "n_ctx": config.n_positions,
        "d_vocab": config.vocab_size,
        "act_fn": "gelu_new" if config.activation_function == "gelu_pytorch_tanh" else config.activation_function,
        "eps": 1e-5 if ln_free else config.layer_norm_epsilon,
        "use_attn_scale": config.scale_attn_weights,
        "scale_attn_by_inverse_layer_idx": config.scale_attn_by_inverse_layer_idx,
        "normalization_type": None if ln_free else "LNPre",
        "original_architecture": "GPT2LMHeadModel",
        "model_name": name,
        "dtype": dtype,
        "device": str(device),
    }
    return lens.build(fields, tokenizer)
