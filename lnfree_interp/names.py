"""What is known by name: models, and where their files are; a data set, dtypes. Imports nothing heavy."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .arguments import as_path, as_text
from .documents import read_text

CHECKPOINTS = Path(__file__).parent / "checkpoints"
VALIDATION_TEXT = CHECKPOINTS / "validation.txt"
EMBEDDED = ("tiny", "tiny-vanilla", "tiny-noLN")
HELLASWAG = "Rowan/hellaswag"  # its data set on the hub
DTYPES = ("float32", "float64", "bfloat16", "float16")

_SIZES = {"gpt2": ("small", 300), "gpt2-medium": ("medium", 500), "gpt2-large": ("large", 600), "gpt2-xl": ("xl", 800)}


@dataclass(frozen=True)
class Source:
    """Where a checkpoint is: a directory or a .gguf file, or else a hub id with an optional revision."""

    hub_id: str = ""
    revision: str | None = None
    path: Path | None = None
    kind: str = ""


def known_models() -> dict[str, Source]:
    known = {name: Source(path=CHECKPOINTS / name, kind="embedded") for name in EMBEDDED}
    for name, (size, steps) in _SIZES.items():
        known[name] = Source(f"openai-community/{name}", kind="original")
        known[f"{name}-vanilla"] = Source(f"schaeff/gpt2-{size}_vanilla{steps}", kind="fine-tuned control")
        known[f"{name}-noLN"] = Source(f"schaeff/gpt2-{size}_LNFree{steps}", kind="LN-free")
    for size in ("70m", "160m", "410m", "1b", "1.4b", "2.8b"):
        known[f"pythia-{size}"] = Source(f"EleutherAI/pythia-{size}", kind="original")
    known["smollm2-135m"] = Source("HuggingFaceTB/SmolLM2-135M", kind="original")
    known["smollm2-135m-instruct"] = Source("HuggingFaceTB/SmolLM2-135M-Instruct", kind="instruction-tuned")
    for version in range(1, 6):
        known[f"gpt2-noLN-v{version}"] = Source("apollo-research/gpt2_noLN", f"v{version}", kind="LN-free")
    return known


def display_name(name: str | Path) -> str:
    """What a model is called in tables: a directory without those that it is in, DIR/final of a fine-tuning run DIR."""
    path = Path(name)
    if not path.is_dir():
        return str(name)
    path = path.resolve()
    return path.parent.name if path.name == "final" and path.parent.name else path.name


def display_names(names: Sequence[str]) -> list[str]:
    """The same of several models; as they were given where two would be called alike."""
    short = [display_name(name) for name in names]
    return [str(name) if short.count(called) > 1 else called for name, called in zip(names, short)]


def available_models():
    """The names `load_model` knows besides hub ids and directories.

    Returns:
        DataFrame with columns name, kind (embedded, original, instruction-tuned, fine-tuned control, LN-free), source
        (a hub id, by which one sees that smollm2-135m is the base model), revision.

    Example:
        >>> available_models().query("kind == 'LN-free'").name.tolist()[:3]
        ['gpt2-noLN', 'gpt2-medium-noLN', 'gpt2-large-noLN']
    """
    import pandas as pd

    return pd.DataFrame(
        [
            {"name": name, "kind": s.kind, "source": s.hub_id or "in the package", "revision": s.revision or ""}
            for name, s in known_models().items()
        ]
    )


# ---------------------------------------------------------------------------------------------------------
# Names -> a directory of files


def locate_checkpoint(name_or_path: str | Path, revision: str | None = None) -> Path:
    """The directory that holds a checkpoint's files, fetched into the hub's cache if it must be; or a .gguf file.

    Raises:
        ValueError: an unknown name (the nearest known ones are named), a directory without a checkpoint, a .gguf file
            that is not there, a hub model that is neither in the cache nor reachable.
    """
    name = str(as_path(name_or_path, "model"))
    if revision is not None:
        as_text(revision, "revision")
    source = known_models().get(name)
    if source is None and (name.endswith(".gguf") or Path(name).is_dir()):
        source = Source(path=Path(name))
    if source is None and not _is_hub_id(name):
        near = difflib.get_close_matches(name, known_models(), n=3, cutoff=0.4) or list(EMBEDDED)
        raise ValueError(
            f"unknown model {name!r}; nearest known: {', '.join(near)} (or a hub id, a directory, a .gguf file)"
        )
    source = source or Source(name)
    if source.path is not None:
        if revision is not None:
            raise ValueError(f"revision {revision!r} given for {name!r}, which is no hub model")
        if name.endswith(".gguf"):
            if not source.path.is_file():
                raise ValueError(f"{name} is not there")
        elif not (source.path / "config.json").is_file():
            raise ValueError(f"{name} is no checkpoint: it holds no config.json")
        return source.path
    return _from_hub(name, source.hub_id, revision or source.revision)


def _is_hub_id(name: str) -> bool:
    parts = name.split("/")
    return len(parts) == 2 and all(parts) and not name.startswith((".", "~"))


_MODEL_FILES = ["config.json", "*.safetensors", "*.safetensors.index.json"]
TOKENIZER_FILES = ["tokenizer*.json", "vocab.json", "merges.txt", "special_tokens_map.json"]


def _from_hub(name: str, hub_id: str, revision: str | None) -> Path:
    """The hub's cache first, with no look-up; the hub itself for what the cache does not hold."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    where = f"{hub_id}" + (f" at revision {revision}" if revision else "")
    try:
        cached = Path(snapshot_download(hub_id, revision=revision, local_files_only=True))
        if (cached / "config.json").is_file() and weight_files(cached):
            return cached
    except LocalEntryNotFoundError:
        pass
    try:
        patterns = _MODEL_FILES + TOKENIZER_FILES
        fetched = Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns, etag_timeout=5))
    except RevisionNotFoundError:
        raise ValueError(f"model {name!r}: {hub_id} has no revision {revision!r}") from None
    except RepositoryNotFoundError:
        raise ValueError(f"model {name!r}: the hub has no model {hub_id} open to you") from None
    except Exception as error:
        raise ValueError(
            f"model {name!r} ({where}) is neither in the cache {HF_HUB_CACHE} nor reachable on the hub "
            f"({type(error).__name__})"
        ) from None
    if not weight_files(fetched):
        raise ValueError(f"model {name!r} ({where}) has no .safetensors weights; other formats are not read")
    return fetched


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files a checkpoint consists of; empty if it has none or a shard is missing."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = sorted(set(json.loads(read_text(index))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{index} is no index of safetensors files") from None
        files = [directory / shard for shard in shards]
        return files if all(f.is_file() for f in files) else []
    single = directory / "model.safetensors"
    return [single] if single.is_file() else []


def dtype_name(dtype: object) -> str:
    """The name of a dtype, given by name or as torch's own.

    Raises:
        ValueError: not one that models can have.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {str(dtype)!r}; allowed are {', '.join(DTYPES)}")
    return name
