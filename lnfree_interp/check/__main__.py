"""Which of this package's laws hold for a model, and what of it is fast. Exit status 1 if one fails."""

from __future__ import annotations

from pathlib import Path

from .. import cli
from ..names import DTYPES, dtype_name, locate_checkpoint

EXAMPLES = ("tiny-noLN", "gpt2 --device cuda", "runs/small/final --dtype float64")


def main(argv: list[str] | None = None) -> int:
    parser = cli.OneLineParser(prog=cli.prog("check"), description=__doc__, examples=EXAMPLES)
    add = parser.add_argument
    add("model", metavar="MODEL", help="a name of available_models(), a hub id or a directory")
    add("--device", help="cpu, cuda, cuda:N or mps (default: a GPU if there is one)")
    add("--dtype", default="float32", help=f"{', '.join(DTYPES)} (float32); float64 is sharper")
    add("--seed", type=int, default=0, help="of the cells and components that are tried (0)")
    add("--out", type=Path, metavar="DIR", help="write a report there (default: print only)")
    cli.add_embed(parser)
    args = cli.parsed(parser, argv, "check")
    return cli.guard(_run, args, parser.prog, check=_check)


def _check(args) -> None:
    cli.check_alone()
    dtype_name(args.dtype)
    locate_checkpoint(args.model)
    if args.out is None:
        cli.unused(args, "embed", "no --out")
    else:
        cli.check_out(args)


def _run(args) -> int:
    from .command import run

    return run(args)


if __name__ == "__main__":
    raise SystemExit(main())
