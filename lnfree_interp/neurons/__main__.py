"""Confidence neurons: ranking, ablation, scan of a layer."""

from __future__ import annotations

from .. import cli
from .choices import ABLATIONS, METHODS

EXAMPLES = (
    "--model tiny tiny-noLN --top 5",
    "--model tiny --neurons 12 40 --ablation zero",
    "--model gpt2-medium gpt2-medium-noLN --scan --tokens 8192 --data Skylion007/openwebtext",
)


def main(argv=None) -> int:
    parser = cli.parser("neurons", __doc__, tokens=2048, examples=EXAMPLES)
    parser.add_argument("--layer", type=int, default=-1, help="the neurons' layer (default: the last)")
    parser.add_argument(
        "--neurons",
        type=int,
        nargs="+",
        metavar="N",
        help="neurons to ablate (default: the --top ones of the first model's ranking)",
    )
    parser.add_argument("--top", type=cli.positive_int, default=3, metavar="N", help="how many of the ranking (3)")
    parser.add_argument("--scan", action="store_true", help="ablate each neuron of the layer")
    parser.add_argument(
        "--ablation", choices=ABLATIONS, default="mean", help="what a neuron's activation becomes (mean)"
    )
    parser.add_argument("--method", choices=METHODS, default="auto", help="how a layer is scanned (auto)")
    parser.add_argument("--tolerance", type=float, default=1e-5, help="largest error of a series, nats (1e-5)")
    cli.add_context(parser)
    cli.add_embed(parser)
    args = cli.parsed(parser, argv, "neurons")
    return cli.guard(_run, args, parser.prog)


def _run(args) -> None:
    from .command import run

    run(args)


if __name__ == "__main__":
    raise SystemExit(main())
