"""Checkpoints -> TransformerLens models, with or without LayerNorm or RMSNorm.

Whether a checkpoint is LN-free is read from its epsilon and its weights, never from its name. Both kinds end up
in the same coordinates: normalisation weights folded into what reads them, the residual stream centred where the
norms centre it, the unembedding centred, value biases folded into b_O (TransformerLens' usual processing), all in
fp64, one matrix at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from . import lens
from .arguments import one_of
from .checkpoints import Checkpoint, open_checkpoint
from .families import GPT2
from .folding import fold
from .gguf_files import is_gguf, open_gguf
from .lens import LensModel, ModelOrName
from .names import TOKENIZER_FILES, display_name, dtype_name, known_models, locate_checkpoint

# ---------------------------------------------------------------------------------------------------------
# Tokenizer


def load_tokenizer(checkpoint: Checkpoint):
    """The checkpoint's tokenizer, TransformerLens-ready; GPT-2's own for its vocabulary; else None.

    Embeddings may be longer than the vocabulary: many are padded to a round number.

    Raises:
        ValueError: files that make no tokenizer; one with more tokens than the model.
    """
    from transformers import AutoTokenizer

    d_vocab, arguments = checkpoint.fields["d_vocab"], checkpoint.tokenizer
    if arguments is None:
        if checkpoint.family is not GPT2 or d_vocab != 50257:
            return None
        try:
            arguments = {"pretrained_model_name_or_path": _tokenizer_of_gpt2()}
        except ValueError:
            return None
    try:
        # add_bos_token spares TransformerLens a second look-up by name, which would go to the hub.
        tokenizer = AutoTokenizer.from_pretrained(**arguments, add_bos_token=True, local_files_only=True)
    except Exception as error:  # of many kinds
        raise ValueError(
            f"{checkpoint.where}: its tokenizer is not readable ({' '.join(str(error).split())})"
        ) from None
    n_tokens = max(tokenizer.get_vocab().values(), default=-1) + 1
    if n_tokens > d_vocab:
        raise ValueError(f"{checkpoint.where}: the tokenizer has {n_tokens} tokens, the model's vocabulary {d_vocab}")
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
    one_of(device, "device", (str, torch.device), "cpu, cuda, cuda:N or mps")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(f"unknown device {device!r}; allowed are cpu, cuda, cuda:N, mps") from None
    here = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (found.index or 0) >= here.get(found.type, 0):
        present = [kind for kind, n in here.items() if n]
        raise ValueError(f"device {str(found)!r} is not there; present: {', '.join(present)}")
    return found


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
    """A checkpoint as a HookedTransformer (a TransformerBridge with TransformerLens 4) in eval mode, parameters frozen.

    LN-free checkpoints (see `layernorm.are_constant`) get `cfg.normalization_type = None`; the others "LNPre" or
    "RMSPre". log-probabilities are the HF model's; logits differ from it by a constant per position, the unembedding
    being centred.

    Args:
        name_or_path: a name of `available_models()`, a hub id, a directory with a checkpoint of a family in
            `families.FAMILIES` in safetensors format, or a .gguf file of a Llama model (with the package gguf).
            Embedded models, directories and files never touch the network.
        device: default a GPU if there is one.
        dtype: of the weights. Folding is done in fp64 whatever it is.
        revision: branch, tag or commit of a hub model.

    Raises:
        ValueError: unknown name, no checkpoint, one of another family or that asks for what is not computed exactly,
            weights missing, extra, misshapen or not finite, a tokenizer with more tokens than the model, a device or
            dtype that is not there.

    Example:
        >>> from lnfree_interp import load_model
        >>> model = load_model("tiny-noLN")
        >>> print(model.cfg.normalization_type, model.cfg.n_layers)
        None 8
    """
    device, dtype = resolve_device(device), resolve_dtype(dtype)
    path = locate_checkpoint(name_or_path, revision)
    checkpoint = open_gguf(path) if is_gguf(path) else open_checkpoint(path)
    name = str(name_or_path)
    if name not in known_models():
        name = path.name if is_gguf(path) else display_name(name)
    tokenizer = load_tokenizer(checkpoint)
    model = build_model(checkpoint.fields, tokenizer, device=device, dtype=dtype, name=name)
    lens.fill(model, fold(checkpoint))
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
        raise ValueError(
            f"model must be a HookedTransformer or TransformerBridge (see load_model) or a name, not {kind}"
        )
    inside = found.modules() if lens.is_bridge(found) else ()
    adapters = [type(m).__name__ for m in inside if type(m).__module__.startswith("peft.")]
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


def build_model(fields: Mapping[str, Any], tokenizer, *, device, dtype, name: str):
    """A model of these HookedTransformerConfig fields with uninitialised weights."""
    return lens.build(dict(fields) | {"model_name": name, "dtype": dtype, "device": str(device)}, tokenizer)
