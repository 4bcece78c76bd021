"""Files written beside and renamed; what the disk refuses as an error of one line. Imports nothing heavy."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def as_value_error(doing: str) -> Iterator[None]:
    """What the disk refuses becomes a ValueError of one line: "cannot write DIR: No space left on device"."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot {doing}: {reason(error)}") from None


def reason(error: BaseException) -> str:
    """Why, in one line and without the place."""
    return getattr(error, "strerror", None) or str(error).split("\n")[0] or type(error).__name__


def replace_file(path: str | Path, write: Callable[[Path], object]) -> None:
    """Write beside the path, then rename: what was there stays whole until the new file is, and nothing is left over.

    Args:
        write: writes a file to the path that it is given.

    Raises:
        ValueError: the disk refuses.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     replace_file(f"{folder}/note.txt", lambda beside: beside.write_text("whole"))
        ...     [(file.name, file.read_text()) for file in Path(folder).iterdir()]
        [('note.txt', 'whole')]
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with as_value_error(f"write {path}"):
        try:
            write(beside)
            os.replace(beside, path)
        finally:
            with suppress(OSError):  # where nothing could be written, there is nothing
                beside.unlink()
