"""python -m lnfree_interp.neurons"""

from __future__ import annotations

from .. import cli
from .choices import ABLATIONS, METHODS


def main(argv=None) -> int:
    parser = cli.parser("neurons", "Confidence neurons: ranking, ablation, scan of a layer.", tokens=2048)
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
    parser.add_argument("--ablation", choices=ABLATIONS, default="mean")
    parser.add_argument("--method", choices=METHODS, default="auto")
    parser.add_argument("--tolerance", type=float, default=1e-5, help="largest error of a series, nats (1e-5)")
    parser.add_argument("--context", type=cli.positive_int, default=512, help="tokens per sequence (512)")
    args = parser.parse_args(argv)
    return cli.guard(_run, args, parser.prog)


def _run(args) -> None:
    from .command import run

    run(args)


if __name__ == "__main__":
    raise SystemExit(main())
