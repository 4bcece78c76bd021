"""How a logit came to be, model by model, as a graph; with --edges which edges between components a task needs."""

from __future__ import annotations

import argparse
from dataclasses import replace

from .. import cli
from ..patching.sites import DIRECTIONS, METHODS, METRICS

PROMPT = "It was the best of times, it was the worst of"
WHAT = "Effects of edges between components, on pairs of prompts."
EXAMPLES = (
    '--model tiny tiny-noLN --prompt "She put on her" --target " hat" --versus " coat"',
    "--model tiny-noLN --nodes mlp --share 0.5",
    "--model tiny tiny-noLN --edges --pairs induction --method gradient integrated --exact 10",
)


def main(argv: list[str] | None = None) -> int:
    parser = cli.parser("graph", __doc__, tokens=None, examples=EXAMPLES)
    parser.add_argument("--top", type=cli.positive_int, default=10, metavar="K", help="nodes and edges printed (10)")
    add = parser.add_argument_group("the graph of one prompt").add_argument
    of_graphs = [
        add("--prompt", default=PROMPT, metavar="TEXT", help=f"of the graph ({PROMPT})"),
        add("--target", metavar="TOKEN", help="whose logit, its space included, e.g. ' her' (default: the likeliest)"),
        add("--versus", metavar="TOKEN", help="whose logit is subtracted (none)"),
        add("--nodes", choices=("neuron", "mlp"), default="neuron", help="how fine MLPs are (neuron)"),
        add("--share", type=float, default=0.8, metavar="X", help="of the influence that the nodes shall hold (0.8)"),
    ]
    group = parser.add_argument_group("effects of edges on pairs of prompts")
    add = group.add_argument
    add("--edges", action="store_true", help="these, not the graph of one prompt")
    of_edges = [
        *cli.add_pairs(group),
        add("--method", nargs="+", default=["gradient"], choices=METHODS, help="estimates (gradient)"),
        add("--metric", default="logit_diff", choices=METRICS, help="what the effect is on (logit_diff)"),
        add(
            "--direction",
            default="denoising",
            choices=DIRECTIONS,
            help="clean into corrupted; noising: the reverse (denoising)",
        ),
        add("--exact", type=cli.positive_int, metavar="K", help="run the K strongest edges exactly too (none)"),
        cli.add_embed(group),
    ]
    args = cli.parsed(parser, argv, "graph", named=("prompt",))
    foreign = [action.dest for action in (of_graphs if args.edges else of_edges)]
    settings = {name: value for name, value in args.asked.settings.items() if name not in (*foreign, "edges")}
    args.asked = replace(args.asked, settings=settings)
    if args.edges:
        args.asked = replace(args.asked, command="edges", what=WHAT, named=("pairs", "method"))
    return cli.guard(_run, args, parser.prog, check=lambda args: _check(args, foreign))


def _check(args: argparse.Namespace, foreign: list[str]) -> None:
    for name in foreign:
        if name in args.asked.given:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} is for one prompt, not for --edges" if args.edges else f"{flag} needs --edges")
    cli.check(args)
    if not args.prompt:
        raise ValueError("--prompt is empty")
    if not 0 < args.share <= 1:
        raise ValueError(f"--share {args.share} is not a number above 0, 1 at most")
    if args.edges:
        cli.check_pairs(args)


def _run(args: argparse.Namespace) -> None:
    if args.edges:
        from .edge_command import run
    else:
        from .command import run
    run(args)


if __name__ == "__main__":
    raise SystemExit(main())
