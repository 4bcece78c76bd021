"""python -m lnfree_interp.norms"""

from __future__ import annotations

from functools import partial

from .residual import residual_norms
from .sinks import attention_sinks


def main(argv=None) -> int:
    from .. import cli

    parser = cli.parser("norms", "Norms of the residual stream over layers, and attention sinks.")
    parser.add_argument("--threshold", type=float, default=0.3, help="attention on position 0 that makes a sink (0.3)")
    parser.add_argument("--per-position", action="store_true", help="norms at every position, not by kind of token")
    args = parser.parse_args(argv)
    return cli.guard(_command, args, parser.prog)


def _command(args) -> None:
    import pandas as pd

    from .. import cli
    from ..figures.norms import norms_figure, sinks_figure

    if not 0 <= args.threshold <= 1:
        raise ValueError(f"--threshold {args.threshold} is outside 0..1")
    norms, sinks = {}, {}
    for name, model in cli.models(args):
        tokens = cli.load_tokens(args, model)
        passes = list(tokens.split(max(1, 4096 // tokens.shape[1])))
        bar = partial(cli.progress, total=len(passes), unit="pass")
        norms[name] = residual_norms(model, bar(passes, label=f"{name} norms"), per_position=args.per_position)
        sinks[name] = attention_sinks(model, bar(passes, label=f"{name} sinks"), threshold=args.threshold)
    table = pd.concat([result.table().assign(model=name) for name, result in norms.items()])
    heads = pd.concat([result.table().assign(model=name) for name, result in sinks.items()])
    groups = table[table.tokens > 0].pivot_table(
        index=["group", "point"], columns="model", values="norm_mean", sort=False, observed=True
    )
    if not args.per_position:
        cli.show(groups[list(norms)].reset_index(), "Mean norm of the residual stream")
    rates = [
        {
            "model": name,
            "share_of_heads": s.head_rate,
            "share_of_queries": s.query_rate,
            "mean_attention": s.attention.mean().item(),
        }
        for name, s in sinks.items()
    ]
    cli.show(pd.DataFrame(rates), f"Attention on position 0 (sink: at least {args.threshold:g})")
    cli.save(args.out, "norms", table[["model", *table.columns[:-1]]], norms_figure(norms))
    cli.save(args.out, "sinks", heads[["model", *heads.columns[:-1]]], sinks_figure(sinks))


if __name__ == "__main__":
    raise SystemExit(main())
