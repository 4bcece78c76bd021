"""How far direct logit attribution is from the direct effect, model by model."""

from __future__ import annotations

from .. import cli

EXAMPLES = (
    "--model tiny tiny-noLN",
    "--model gpt2 gpt2-noLN --data Skylion007/openwebtext --tokens 100000 --out out/gpt2",
    '--model tiny-noLN --prompt "She put on her" --top 5 --positions last',
)


def main(argv: list[str] | None = None) -> int:
    parser = cli.parser("dla", __doc__, tokens=8192, examples=EXAMPLES)
    parser.add_argument("--positions", choices=("all", "last"), default="all", help="where to measure (all)")
    cli.add_context(parser)
    parser.add_argument("--draws", type=cli.positive_int, default=1000, help="bootstrap draws (1,000)")
    parser.add_argument("--prompt", default="It was the best of times, it was the worst of", help="sample prompt")
    parser.add_argument("--top", type=cli.positive_int, default=8, help="components shown for the prompt (8)")
    cli.add_embed(parser)
    args = cli.parsed(parser, argv, "dla")
    return cli.guard(_run, args, parser.prog, check=_check, several=True)


def _check(args) -> None:
    cli.check(args, several=True)


def _run(args) -> None:
    from .command import run

    run(args)


if __name__ == "__main__":
    raise SystemExit(main())
