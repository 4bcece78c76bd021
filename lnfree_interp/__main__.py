"""The commands by name: lnfree dla ..., or python -m lnfree_interp dla ...; without a name they are listed."""

from __future__ import annotations

import ast
import difflib
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from . import __version__


def commands() -> dict[str, str]:
    """Name -> what it does: each folder with a __main__.py, and the first line of that file's docstring."""
    files = sorted(Path(__file__).parent.glob("*/__main__.py"))
    docs = {file.parent.name: ast.get_docstring(ast.parse(file.read_text("utf-8"))) or "" for file in files}
    return {name: doc.partition("\n")[0] for name, doc in docs.items()}


def main(argv: Sequence[str] | None = None) -> int:
    prog = "lnfree" if Path(sys.argv[0]).stem == "lnfree" else "python -m lnfree_interp"
    name, *rest = (sys.argv[1:] if argv is None else list(argv)) or ["--help"]
    known = commands()
    if name == "--version":
        print(f"lnfree_interp {__version__}")
    elif name in ("-h", "--help", "help"):
        width = max(map(len, known))
        print(f"usage: {prog} COMMAND [...]\n")
        print("\n".join(f"  {command:<{width}}  {line}" for command, line in known.items()))
        print(f"\n{prog} COMMAND --help says what each takes; {prog} --version, which version this is.")
    elif name in known:
        return import_module(f"lnfree_interp.{name}.__main__").main(rest)
    else:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"nearest known: {near[0]}" if near else f"known: {', '.join(known)}"
        print(f"{prog}: error: unknown command {name!r}; {hint}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
