"""Norms of the residual stream over layers, and attention sinks."""

from __future__ import annotations

from .. import cli

EXAMPLES = ("--model tiny tiny-noLN", "--model gpt2 gpt2-noLN --threshold 0.5 --text book.txt --per-position")


def main(argv=None) -> int:
    parser = cli.parser("norms", __doc__, examples=EXAMPLES)
    parser.add_argument("--threshold", type=float, default=0.3, help="attention on position 0 that makes a sink (0.3)")
    parser.add_argument("--per-position", action="store_true", help="norms at every position, not by kind of token")
    cli.add_embed(parser)
    args = cli.parsed(parser, argv, "norms")
    return cli.guard(_run, args, parser.prog, check=_check, several=True)


def _check(args) -> None:
    cli.check(args, several=True)
    if not 0 <= args.threshold <= 1:
        raise ValueError(f"--threshold {args.threshold} is outside 0..1")


def _run(args) -> None:
    from .command import run

    run(args)


if __name__ == "__main__":
    raise SystemExit(main())
