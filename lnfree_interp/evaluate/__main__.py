"""Losses, divergences and calibration of models on the same tokens."""

from __future__ import annotations

from .. import cli
from ..documents import read_text
from ..names import HELLASWAG

EXAMPLES = (
    "--model tiny tiny-vanilla tiny-noLN --tokens 4096",
    '--model tiny-noLN --prompt "It was a dark and stormy"',
    "--model gpt2 gpt2-noLN --data Skylion007/openwebtext --hellaswag --items 1000",
)


def main(argv=None) -> int:
    parser = cli.parser("evaluate", __doc__, examples=EXAMPLES)
    cli.add_context(parser)
    parser.add_argument("--bins", type=cli.positive_int, default=15, help="bins of the calibration error (15)")
    parser.add_argument(
        "--hellaswag",
        nargs="?",
        const=HELLASWAG,
        metavar="FILE",
        help="HellaSwag as well, from a .jsonl file or (without one) the hub",
    )
    parser.add_argument("--items", type=cli.positive_int, metavar="N", help="HellaSwag items to use (all)")
    parser.add_argument("--prompt", help="show what each model writes after this")
    cli.add_embed(parser)
    args = cli.parsed(parser, argv, "evaluate")
    return cli.guard(_run, args, parser.prog, check=_check, several=True)


def _check(args) -> None:
    cli.check(args, several=True)
    if args.hellaswag and args.hellaswag.endswith((".jsonl", ".jsonl.gz")):
        read_text(args.hellaswag, "HellaSwag file")
    if not args.hellaswag:
        cli.unused(args, "items", "no --hellaswag")


def _run(args) -> None:
    from .command import run

    run(args)


if __name__ == "__main__":
    raise SystemExit(main())
