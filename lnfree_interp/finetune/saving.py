"""A run's files: each written beside and renamed, checkpoints with a manifest that says whether they are whole."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from safetensors import SafetensorError, safe_open

from ..arguments import as_path, kind, one_of, switch
from ..distributed import rank
from ..files import as_value_error, reason, replace_file

MANIFEST, STATE, RUN, ROLLBACKS = "manifest.json", "removal.json", "run.json", "rollbacks.json"
WRITING, OLD = ".writing", ".old"
PART = 1 << 26  # bytes
T = TypeVar("T")


def on_main(make: Callable[[], T]) -> T:
    """What the first process makes, for all of them; what it raises is raised in all, so that none waits for it."""
    if not (dist.is_available() and dist.is_initialized()):
        return make()
    made: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            made[0] = make()
        except Exception as error:
            made[1] = error
    dist.broadcast_object_list(made, src=0)
    if made[1] is not None:
        raise made[1]
    return made[0]


def write_json(path: Path, value: Any) -> None:
    """Beside, then renamed.

    Raises:
        ValueError: the disk refuses.
    """
    text = json.dumps(value, indent=1)
    replace_file(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> Any:
    """None if there is no such file.

    Raises:
        ValueError: it cannot be read, or is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {reason(error)}") from None


# -- whole or not -----------------------------------------------------------------------------------------


def write_manifest(directory: Path) -> None:
    """Sizes and hashes of all files of a directory, in a file of its own."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != MANIFEST)
    listed = {
        path.relative_to(directory).as_posix(): {"size": path.stat().st_size, "hash": _hash(path)} for path in files
    }
    write_json(directory / MANIFEST, {"files": listed, "hash": _hash_of_list(listed)})


def _hash_of_list(listed: dict) -> str:
    return hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()


def _hash(path: Path) -> str:
    """SHA-256 of the SHA-256s of a file's parts, which several threads read: an optimiser's state is many GB."""

    def part(start: int) -> bytes:
        with path.open("rb") as file:
            file.seek(start)
            return hashlib.sha256(file.read(PART)).digest()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        parts = pool.map(part, range(0, path.stat().st_size, PART))
        return hashlib.sha256(b"".join(parts)).hexdigest()


def fault(directory: Path, *, contents: bool = True) -> str | None:
    """What is wrong with a checkpoint, in words; None: it is whole.

    A checkpoint without a manifest, of a version that wrote none, is whole if all that Trainer writes can be read.

    Args:
        contents: compare hashes too, which reads every file, not only sizes.
    """
    try:
        stored = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        if stored["hash"] != _hash_of_list(stored["files"]):
            return f"{MANIFEST} is not what was written"
        wanted = [(name, entry["size"], entry["hash"]) for name, entry in stored["files"].items()]
    except FileNotFoundError:
        return f"{MANIFEST} is gone" if (directory / STATE).exists() else _fault_without_manifest(directory)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    for name, size, digest in wanted:
        path = directory / name
        try:
            if not path.is_file():
                return f"{name} is gone"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size:,} bytes of {size:,}"
            if contents and _hash(path) != digest:
                return f"{name} is not what was written"
        except OSError as error:
            return f"{name} cannot be read ({reason(error)})"
    return None


def _fault_without_manifest(directory: Path) -> str | None:
    names = {path.name for path in directory.iterdir()} if directory.is_dir() else set()
    if "rng_state.pth" not in names and "rng_state_0.pth" not in names:
        return "rng_state.pth is gone"
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"):
        if name not in names:
            return f"{name} is gone"
    for name in sorted(names):
        try:
            if name.endswith(".safetensors"):
                with safe_open(directory / name, "pt"):
                    pass
            elif name.endswith((".pt", ".pth")):
                with zipfile.ZipFile(directory / name) as archive:
                    if archive.testzip() is not None:
                        return f"{name} is damaged"
        except (OSError, SafetensorError, zipfile.BadZipFile):
            return f"{name} is damaged"
    return None if steps_of(directory) else "trainer_state.json is damaged"


# -- a run's directory ------------------------------------------------------------------------------------


def checkpoints(out: str | Path) -> list[Path]:
    """The checkpoints of a run, whole or not, the newest first."""
    found = [path for path in Path(out).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in found if path.is_dir()), key=_number, reverse=True)


def _number(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def steps_of(checkpoint: Path) -> int:
    """How many steps a checkpoint has behind it; 0 if it does not say."""
    try:
        return int(json.loads((checkpoint / "trainer_state.json").read_text())["global_step"])
    except (ValueError, KeyError, OSError, TypeError):
        return 0


def last_checkpoint(out: str | Path) -> Path | None:
    """The newest checkpoint of a run that has all its files."""
    found = (
        path for path in checkpoints(as_path(out, "out")) if steps_of(path) and fault(path, contents=False) is None
    )
    return next(found, None)


def state_in(checkpoint: Path) -> dict[str, Any]:
    """What `removal.json` says: progress, losses, whether it is good; empty for a version that wrote none."""
    return read_json(checkpoint / STATE) or {}


def finished(out: str | Path) -> bool:
    """Whether a run has ended and its result is whole."""
    final = Path(as_path(out, "out")) / "final"
    with as_value_error(f"read {out}"):
        if not final.is_dir():
            return False
        return fault(final) is None if (final / MANIFEST).exists() else (final / "config.json").exists()


def check_directory(out: str | Path, resume: bool) -> None:
    """Whether a run may be in `out`.

    Raises:
        ValueError: it is no directory, or holds a run and nothing is to be resumed.
    """
    out, resume = Path(as_path(out, "out")), switch(resume, "resume")
    with as_value_error(f"use {out}"):
        if out.exists() and not out.is_dir():
            raise ValueError(f"{out} is not a directory")
        if not resume and (checkpoints(out) or (out / "final").exists()):
            raise ValueError(f"{out} already holds a run: resume it, or choose another directory")


def checkpoint_to_resume(out: str | Path, resume: bool) -> Path | None:
    """The newest whole checkpoint of a run, from which it goes on; None: it starts.

    A damaged one is passed over, and stderr says so.

    Raises:
        ValueError: as `check_directory`; there are checkpoints, but none of them is whole.
    """
    check_directory(out, resume)
    found = [path for path in checkpoints(out) if not superseded(Path(out), path)]
    faults: list[str] = []
    for path in found:
        wrong = fault(path)
        if wrong is None:
            if faults:
                say(f"{faults[0]}: going on from {path.name}")
            if not (path / MANIFEST).exists():
                say(f"{path} is of an older version and has no {MANIFEST}: all its files can be read")
            return path
        faults.append(f"{path} is damaged ({wrong})")
    if faults:
        raise ValueError(f"cannot resume {out}: {'; '.join(faults)}")
    return None


def superseded(out: Path, checkpoint: Path) -> bool:
    """Whether a rollback went back behind a checkpoint."""
    records = read_json(out / ROLLBACKS) or []
    if not records or _number(checkpoint) <= records[-1]["to"]:
        return False
    try:
        rollbacks = state_in(checkpoint)["progress"]["rollbacks"]
    except (ValueError, KeyError, TypeError):
        return False  # damaged: for `fault` to say
    return rollbacks < len(records)


def good_checkpoints(out: Path) -> list[Path]:
    """Those whose loss was good when they were saved, the newest first; sizes are looked at, not contents."""
    return [path for path in checkpoints(out) if _is_good(path) and fault(path, contents=False) is None]


def _is_good(checkpoint: Path) -> bool:
    try:
        return bool(state_in(checkpoint).get("good"))
    except (ValueError, AttributeError):
        return False


def publish(beside: Path, directory: Path) -> None:
    """Add the manifest, then give the directory its name; what had the name before goes."""
    write_manifest(beside)
    old = _set_apart(directory)
    os.replace(beside, directory)
    shutil.rmtree(old, ignore_errors=True)


def _set_apart(directory: Path) -> Path:
    """A directory, if it is there, under a name for what is being removed: under its own it is whole or not there."""
    old = directory.with_name(f".{directory.name}{OLD}")
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        os.replace(directory, old)
    return old


def rotate(out: Path, keep: int, discard: Collection[Path] = ()) -> None:
    """Remove all checkpoints but the `keep` (at least two) newest and the newest good one; and those to discard."""
    for path in discard:
        _set_apart(path)
    kept = {*checkpoints(out)[: max(2, keep)], *good_checkpoints(out)[:1]}
    for path in checkpoints(out):
        if path not in kept:
            _set_apart(path)
    for path in out.glob(f".checkpoint-*{OLD}"):  # also of a process that was killed here
        shutil.rmtree(path, ignore_errors=True)


def check_saved(value: Any, what: str) -> None:
    """Raise ValueError unless this is of Hugging Face's kind, which knows how to save itself."""
    if not callable(getattr(value, "save_pretrained", None)):
        raise ValueError(f"{what} must be one of Hugging Face's transformers, not {kind(value)}")


def save_checkpoint(model, tokenizer, directory: str | Path, state: dict | None = None) -> None:
    """Write model and tokenizer as an HF directory: beside first, then renamed; it is whole or not there.

    Args:
        state: for `removal.json`.

    Raises:
        ValueError: the disk refuses.
    """
    directory = Path(as_path(directory, "directory"))
    check_saved(model, "model")
    if tokenizer is not None:
        check_saved(tokenizer, "tokenizer")
    if state is not None:
        one_of(state, "state", dict, "a dict")
    beside = directory.with_name(f".{directory.name}.writing")
    with as_value_error(f"write {directory}"):
        try:
            shutil.rmtree(beside, ignore_errors=True)
            model.save_pretrained(beside)
            if tokenizer is not None:
                tokenizer.save_pretrained(beside)
            if state is not None:
                write_json(beside / STATE, state)
            publish(beside, directory)
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def say(line: str) -> None:
    """On stderr, once however many processes there are."""
    if rank() == 0:
        print(line, file=sys.stderr, flush=True)
