"""python -m lnfree_interp.evaluate"""

from __future__ import annotations

from .. import cli
from ..documents import read_text
from ..names import HELLASWAG


def main(argv=None) -> int:
    parser = cli.parser("evaluate", "Losses, divergences and calibration of models on the same tokens.")
    parser.add_argument("--context", type=cli.positive_int, default=512, help="tokens per sequence (512)")
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
    args = parser.parse_args(argv)
    return cli.guard(_run, args, parser.prog, check=_check, several=True)


def _check(args) -> None:
    cli.check(args, several=True)
    if args.hellaswag and args.hellaswag.endswith((".jsonl", ".jsonl.gz")):
        read_text(args.hellaswag, "HellaSwag file")


def _run(args) -> None:
    from .command import run

    run(args)


if __name__ == "__main__":
    raise SystemExit(main())
