"""Checkpoints on disk: config, tokenizer and weights, checked against what their family expects.

`families` says what a family's weights are called and what its config means; `folding` turns the weights into
HookedTransformer's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .documents import read_text
from .families import FAMILIES, HEAD, Family, expected_shapes
from .layernorm import are_constant
from .names import weight_files

_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk: where, its config, the HookedTransformerConfig fields that follow, its weights by name.

    Names are without the family's prefix. `fields` says how it normalises: no normalization_type where it is LN-free.
    `tokenizer` holds the arguments with which AutoTokenizer reads the tokenizer that came along, if one did.
    """

    where: Path
    family: Family
    config: Any
    fields: dict[str, Any]
    weights: Mapping[str, Tensor]
    tokenizer: Mapping[str, Any] | None = None

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
    has_tokenizer = any((directory / file).is_file() for file in ("tokenizer.json", "vocab.json"))
    tokenizer = {"pretrained_model_name_or_path": directory} if has_tokenizer else None
    return checkpoint(family, config, directory, lambda: Safetensors(directory, family), tokenizer)


def checkpoint(
    family: Family, config, where: Path, read: Callable[[], Any], tokenizer: Mapping[str, Any] | None
) -> Checkpoint:
    """A checkpoint of a config and of weights that know their `shapes`, which are read once the config is accepted.

    Raises:
        ValueError: as `open_checkpoint`, each with the file or directory it is about.
    """
    try:
        if not getattr(config, "is_causal", True):
            raise ValueError("is_causal false: attention to later positions is not computed")
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
    return Checkpoint(where, family, config, fields, weights, tokenizer)


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
