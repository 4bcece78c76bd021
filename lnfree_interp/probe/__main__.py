"""Concepts read off the residual stream by a hyperdimensional probe, beside simpler readouts, and what wrote them."""

from __future__ import annotations

from pathlib import Path

from .. import cli

EXAMPLES = (
    "--model tiny tiny-noLN",
    "--model gpt2 gpt2-noLN --task analogies --n 3000 --pooling kmeans --dim 4096",
    "--model tiny-noLN --task prompts.jsonl --readout encoder --save-probes",
)


def main(argv: list[str] | None = None) -> int:
    parser = cli.parser("probe", __doc__, tokens=None, examples=EXAMPLES)
    add, positive_int = parser.add_argument, cli.positive_int
    add("--task", default="recall", metavar="WHICH", help="recall, analogies, or a .jsonl file of prompts (recall)")
    add("--n", type=positive_int, default=2000, metavar="N", help="how many prompts to make (2,000)")
    add("--layers", type=int, nargs="+", metavar="I", help="streams that are read, -1 the final one (the upper half)")
    add("--pooling", default="mean", choices=("mean", "kmeans", "last"), help="how layers become one vector (mean)")
    add("--clusters", type=positive_int, default=5, metavar="K", help="of layers, for --pooling kmeans (5)")
    add("--dim", type=positive_int, default=1024, metavar="D", help="signs of a concept's vector (1,024)")
    add("--hidden", type=positive_int, default=512, metavar="N", help="width of the encoder's hidden layer (512)")
    add("--epochs", type=positive_int, default=80, metavar="N", help="of the encoder's training, at most (80)")
    add("--all-prompts", action="store_true", help="train on prompts that the model gets wrong too")
    add("--readout", default="linear", choices=("linear", "encoder"), help="whose evidence is attributed (linear)")
    add("--evidence", type=positive_int, default=12, metavar="N", help="prompts whose evidence is attributed (12)")
    add("--edits", type=positive_int, default=64, metavar="N", help="prompts whose stream is edited (64)")
    add("--top", type=positive_int, default=10, metavar="K", help="components that are printed (10)")
    add("--save-probes", action="store_true", help="write each model's probe as .safetensors")
    cli.add_embed(parser)
    args = cli.parsed(parser, argv, "probe", named=("task", "pooling"))
    return cli.guard(_run, args, parser.prog, check=_check)


def _check(args) -> None:
    cli.check(args)
    if args.seed < 0:
        raise ValueError(f"--seed {args.seed} must be a whole number from 0 up")
    if args.task not in ("recall", "analogies"):
        if Path(args.task.removesuffix(".gz")).suffix != ".jsonl":
            raise ValueError(f"--task {args.task!r} is none of recall, analogies, or a .jsonl file")
        if not Path(args.task).is_file():
            raise ValueError(f"cannot read probe data {args.task}: no such file")
        cli.unused(args, "n", f"--task {args.task}")
    if args.pooling != "kmeans":
        cli.unused(args, "clusters", f"--pooling {args.pooling}")


def _run(args) -> None:
    from .command import run

    run(args)


if __name__ == "__main__":
    raise SystemExit(main())
