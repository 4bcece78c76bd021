"""How far gradient approximations are from activation patching, model by model."""

from __future__ import annotations

import argparse
import re

from .. import cli
from .sites import DIRECTIONS, LEAST, METHODS, METRICS, SITES

EXAMPLES = (
    "--model tiny tiny-noLN --pairs induction --site resid_pre --method gradient integrated",
    "--model gpt2 gpt2-noLN --pairs ioi --n-pairs 64 --site z",
    "--model tiny-noLN --pairs mine.jsonl --site neurons --layers 2 3 --method relp",
)


def main(argv: list[str] | None = None) -> int:
    parser = cli.parser("patching", __doc__, tokens=None, examples=EXAMPLES)
    add, positive_int = parser.add_argument, cli.positive_int
    cli.add_pairs(parser)
    add("--site", default="resid_pre", choices=list(SITES), help="what to patch (resid_pre)")
    add("--method", nargs="+", default=["gradient"], choices=METHODS, help="approximations (gradient)")
    add("--metric", default="logit_diff", choices=METRICS, help="what the effect is on (logit_diff)")
    add(
        "--direction",
        default="denoising",
        choices=DIRECTIONS,
        help="clean into corrupted; noising: the reverse (denoising)",
    )
    add("--layers", nargs="+", type=int, metavar="L", help="layers to patch (all; needed for neurons)")
    add("--by-position", action="store_true", help="heads or neurons position by position")
    add("--steps", type=positive_int, default=5, metavar="N", help="points of integrated gradients (5)")
    add("--path", default="input", choices=("input", "layer"), help="path of integrated gradients (input)")
    add("--joint", action="store_true", help="one Hessian-vector product per layer, not per cell")
    add("--raw", action="store_true", help="compare effects as they are, not as shares of the total effect")
    least = f"leave out pairs between which the metric moves by less, unless --raw ({LEAST})"
    add("--least", type=float, default=LEAST, metavar="X", help=least)
    add("--max-memory", type=size, metavar="SIZE", help="memory to stay within, e.g. 500M or 4G (from the device)")
    cli.add_embed(parser)
    args = cli.parsed(parser, argv, "patching", named=("pairs", "site", "method"))
    return cli.guard(_run, args, parser.prog, check=_check)


def size(text: str) -> int:
    """Bytes from "1000", "500M", "1.5G"."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG]?)i?B?", text, re.IGNORECASE)
    found = int(float(match[1]) * 1024 ** " KMG".index(match[2].upper() or " ")) if match else 0
    if found < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive size such as 500M or 4G")
    return found


def _check(args) -> None:
    cli.check(args)
    cli.check_pairs(args)
    if not args.least > 0:
        raise ValueError(f"--least {args.least} is not a number above 0")
    if "atp_star" in args.method and not SITES[args.site].scores:
        raise ValueError(f"--method atp_star is for sites q and k, not {args.site}")
    for name, method in (("steps", "integrated"), ("path", "integrated"), ("joint", "second_order")):
        if method not in args.method:
            cli.unused(args, name, f"--method {' '.join(args.method)}: it is for {method}")


def _run(args) -> None:
    from .command import run

    run(args)


if __name__ == "__main__":
    raise SystemExit(main())
