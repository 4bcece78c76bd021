"""What a command was asked: its settings, which of them are not the default, and the name of its files.

Files are named by the command, its models, what it always names (site, method, ...) and every setting that is not the
default: `patching-tiny+tiny-noLN-induction-resid_pre-gradient-n_pairs=8`. Imports nothing heavy.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import distributed
from .names import display_names

# Settings of where and how a command runs: they decide nothing that it writes.
ELSEWHERE = ("out", "device", "max_memory", "embed")
# Characters of a value in a name, bytes of a name, and values that are named when there are more.
VALUE, NAME, VALUES = 24, 120, 3


@dataclass(frozen=True)
class Asked:
    """What a command was asked.

    Attributes:
        command: its name.
        what: what it measures: the first sentence of its help.
        line: the command line.
        settings: all of them, in the order of --help.
        given: those that stand in the command line.
        changed: those that are not the default.
        named: those that stand in the files' name, the default or not.
        notes: what there is to say of the run, by what it is about; commands add to it as they go.
    """

    command: str
    what: str
    line: str
    settings: dict[str, Any]
    given: frozenset[str]
    changed: frozenset[str]
    named: tuple[str, ...] = ()
    notes: dict[str, list[str]] = field(default_factory=dict)

    def note(self, about: str, text: str) -> None:
        """Add a line, once."""
        lines = self.notes.setdefault(about, [])
        if text not in lines:
            lines.append(text)

    @property
    def models(self) -> list[str]:
        models = self.settings["model"]
        return display_names(models if isinstance(models, list) else [models])

    @property
    def distinguishing(self) -> list[tuple[str, Any]]:
        """What tells the run from others of its command and models: what is named, then what is not the default."""
        others = [name for name in self.settings if name in self.changed and name not in ("model", *ELSEWHERE)]
        return [(name, self.settings[name]) for name in dict.fromkeys((*self.named, *others))]

    @property
    def stem(self) -> str:
        """The name of the files, safe on any disk; other settings may have the same, where names are cut."""
        words = [self.command, word(self.models)]
        for name, value in self.distinguishing:
            text = "" if value is True else word(value)
            words.append(text if name in self.named else f"{name}={text}".rstrip("="))
        stem = "-".join(filter(None, words))
        return stem.encode()[:NAME].decode(errors="ignore").rstrip("-.+=")

    @property
    def title(self) -> str:
        """The run in a line, for people."""
        settings = [(name, textwrap.shorten(shown(value), 60)) for name, value in self.distinguishing]
        told = [value if name in self.named else f"{name} {value}" for name, value in settings]
        return f"{self.command}: {', '.join(self.models)}" + f" ({', '.join(told)})" * bool(told)

    @property
    def fingerprint(self) -> str:
        """A hash of the settings that decide what is written; files count by their places."""
        deciding = {name: _placed(value) for name, value in self.settings.items() if name not in ELSEWHERE}
        text = json.dumps([self.command, deciding], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def parsed(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, command: str, *, named: Sequence[str] = ()
) -> argparse.Namespace:
    """The arguments, and as `asked` what was asked."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(argv)
    settings = vars(args).copy()
    changed = {name for name, value in settings.items() if value != parser.get_default(name)}
    what = re.split(r"\.\s|\n", parser.description or "", maxsplit=1)[0]
    line = shlex.join([*parser.prog.split(), *argv])
    given = _given(parser, argv)
    args.asked = Asked(command, what, line, settings, given, frozenset(changed), tuple(named))
    return args


def _given(parser: argparse.ArgumentParser, argv: Sequence[str]) -> frozenset[str]:
    """The settings that a command line has, whatever their values."""
    actions = parser._actions
    defaults = [action.default for action in actions]
    try:
        for action in actions:
            action.default = argparse.SUPPRESS
        return frozenset(vars(parser.parse_args(argv)))
    finally:
        for action, default in zip(actions, defaults):
            action.default = default


def remark(args: argparse.Namespace, text: str) -> None:
    """A line on stderr that is in the report too: what is other than one would think who asked."""
    if distributed.rank() == 0:
        print(text, file=sys.stderr)
    if hasattr(args, "asked"):
        args.asked.note("other than asked", text)


def clip(args: argparse.Namespace, name: str, there: int, what: str) -> int:
    """The value of a setting, or what there is where that is less, which is said if the flag was given.

    Args:
        what: is counted: "components of tiny".
    """
    wanted = getattr(args, name)
    if wanted > there and hasattr(args, "asked") and name in args.asked.given:
        remark(args, f"--{name.replace('_', '-')} {wanted:,}: there are {there:,} {what}")
    return min(wanted, there)


def unused(args: argparse.Namespace, name: str, of: str) -> None:
    """Say of a setting that it makes no difference, if its flag was given.

    Args:
        of: what does not use it: "--pairs ioi".
    """
    if name in args.asked.given:
        remark(args, f"--{name.replace('_', '-')} makes no difference with {of}")


def word(value: Any) -> str:
    """A value, or several, as a part of a file name: without what a disk or a shell would read otherwise."""
    if isinstance(value, (list, tuple)):
        rest = len(value) - VALUES + 1
        several = [*map(word, value[: VALUES - 1]), f"{rest}-more"] if rest > 1 else map(word, value)
        return "+".join(several)
    if not isinstance(value, (str, Path)):
        return str(value)
    text = Path(value).name if os.path.exists(value) else str(value)
    return re.sub(r"[^\w.+]+", "-", text).strip("-.")[:VALUE].rstrip("-.")


def shown(value: Any) -> str:
    """A value as people read it; several with commas."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(shown, value))
    if value is None or value is False:
        return "none" if value is None else "no"
    return "yes" if value is True else f"{value:,}" if isinstance(value, int) else str(value)


def _placed(value: Any) -> Any:
    """A value in which files and directories are named by where they are."""
    if isinstance(value, (list, tuple)):
        return [_placed(each) for each in value]
    return os.path.abspath(value) if isinstance(value, (str, Path)) and value and os.path.exists(value) else value
