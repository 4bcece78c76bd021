"""python -m lnfree_interp.dla"""

from __future__ import annotations

from .. import cli


def main(argv: list[str] | None = None) -> int:
    """How far direct logit attribution is from the direct effect, model by model."""
    parser = cli.parser("dla", main.__doc__, tokens=8192)
    parser.add_argument("--positions", choices=("all", "last"), default="all", help="where to measure (all)")
    parser.add_argument("--context", type=cli.positive_int, default=512, help="tokens per sequence at most (512)")
    parser.add_argument("--draws", type=cli.positive_int, default=1000, help="bootstrap draws (1,000)")
    parser.add_argument("--prompt", default="It was the best of times, it was the worst of", help="sample prompt")
    parser.add_argument("--top", type=cli.positive_int, default=8, help="components shown for the prompt (8)")
    return cli.guard(_run, parser.parse_args(argv), parser.prog, check=_check, several=True)


def _check(args) -> None:
    cli.check(args, several=True)


def _run(args) -> None:
    from .command import run

    run(args)


if __name__ == "__main__":
    raise SystemExit(main())
