"""Plain arguments, checked: numbers, switches, names, files. Imports nothing heavy.

What is wrong is one line: the argument, what was given, what is wanted. Tokens and places are checked in `batching`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from numbers import Real
from pathlib import Path
from typing import Any, SupportsIndex, TypeVar

T = TypeVar("T")
SHORT = 60  # characters of a list that errors show


def whole(value: object, what: str, *, least: int | None = None) -> int:
    """A whole number of any make as an int.

    Raises:
        ValueError: no whole number, or one below `least`.
    """
    wanted = f"{what} must be a whole number" + ("" if least is None else f" from {least} up")
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        raise ValueError(f"{wanted}, not {kind(value)}")
    try:
        number = value.__index__()
    except TypeError:  # arrays and tensors have the method whatever they hold
        raise ValueError(f"{wanted}, not {kind(value)}") from None
    if least is not None and number < least:
        raise ValueError(f"{what} is {number}; {wanted}")
    return number


def number(
    value: Any,
    what: str,
    *,
    least: float | int | None = None,
    above: float | int | None = None,
    most: float | int | None = None,
    below: float | int | None = None,
) -> float:
    """A real number of any make as a float.

    Raises:
        ValueError: no number, nan, or one that is not from `least` (or above `above`) to `most` (or below `below`).
    """
    ends = {"of at least": least, "above": above, "at most": most, "below": below}
    wanted = f"{what} must be a number " + " and ".join(f"{end} {x}" for end, x in ends.items() if x is not None)
    wanted = wanted.rstrip()
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{wanted}, not {shown(value)}")
    x = float(value)
    low = (least is None or x >= least) and (above is None or x > above)
    high = (most is None or x <= most) and (below is None or x < below)
    if x != x or not (low and high):
        raise ValueError(f"{what} is {value}; {wanted}")
    return x


def switch(value: object, what: str) -> bool:
    """True or False as it is.

    Raises:
        ValueError: something else.
    """
    if not (isinstance(value, bool) or type(value).__name__ in ("bool", "bool_")):  # numpy's too
        raise ValueError(f"{what} must be True or False, not {shown(value)}")
    return bool(value)


def choice(value: Any, what: str, allowed: Iterable[str]) -> str:
    """One of some names.

    Raises:
        ValueError: none of them.
    """
    names = list(allowed)
    if not isinstance(value, str) or value not in names:
        raise ValueError(f"unknown {what} {shown(value)}; allowed are {', '.join(names)}")
    return value


def one_of(value: Any, what: str, kinds: type[T] | tuple[type[T], ...], wanted: str) -> T:
    """What is of a kind, or of one of several.

    Args:
        wanted: the kind in words.

    Raises:
        ValueError: of another kind.
    """
    if not isinstance(value, kinds):
        raise ValueError(f"{what} must be {wanted}, not {kind(value)}")
    return value


def as_text(value: Any, what: str) -> str:
    return one_of(value, what, str, "a text")


def text_or_none(value: Any, what: str) -> str | None:
    return None if value is None else as_text(value, what)


def as_path(value: Any, what: str) -> str | Path:
    one_of(value, what, (str, os.PathLike), "a path, a text or a Path")
    return value if isinstance(value, str) else Path(value)


def sampling(draws: object, seed: object) -> dict[str, int]:
    """How often a bootstrap draws, and from which seed, as `statistics` takes them.

    Raises:
        ValueError: no such numbers.
    """
    return {"draws": whole(draws, "draws", least=1), "seed": whole(seed, "seed", least=0)}


def listener(progress: Any) -> Any:
    """What is told how the work goes on, or None.

    Raises:
        ValueError: nothing that can be called.
    """
    if progress is not None and not callable(progress):
        raise ValueError(f"progress must be a function of (done, in all) or None, not {kind(progress)}")
    return progress


def kind(value: object) -> str:
    """What something is, for errors."""
    return value.__name__ if isinstance(value, type) else type(value).__name__


def shown(value: object) -> str:
    """A name, a number or a short list of such as it was given, in one line; of anything else what it is."""
    plain = (str, bool, int, float, type(None))
    if isinstance(value, (list, tuple)) and all(isinstance(x, plain) for x in value) and len(repr(value)) <= SHORT:
        return repr(value)
    return repr(value) if isinstance(value, plain) else kind(value)
