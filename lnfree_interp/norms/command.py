"""The work of python -m lnfree_interp.norms."""

from __future__ import annotations

import pandas as pd

from .. import cli, distributed
from ..figures.norms import norms_figure, sinks_figure
from ..figures.report import Part
from .residual import norm_sums, norms_of
from .sinks import sink_sums, sinks_of


def run(args) -> None:
    norms, sinks = {}, {}
    for name, model in cli.models(args):
        first, tokens = cli.shards(cli.token_rows(args, model))
        of_norms = of_sinks = None
        if tokens:
            with cli.bar(f"{name} norms", "sequence") as progress:
                of_norms = norm_sums(model, tokens, first=first, per_position=args.per_position, progress=progress)
            with cli.bar(f"{name} sinks", "sequence") as progress:
                of_sinks = sink_sums(model, tokens, threshold=args.threshold, progress=progress)
        parts = distributed.gather(of_norms), distributed.gather(of_sinks)
        if distributed.rank() == 0:
            norms[name] = norms_of(parts[0], model=name)
            sinks[name] = sinks_of(parts[1], threshold=args.threshold, model=name)
    if distributed.rank() > 0:
        return
    table = pd.concat([result.table().assign(model=name) for name, result in norms.items()])
    heads = pd.concat([result.table().assign(model=name) for name, result in sinks.items()])
    groups = table[table.tokens > 0].pivot_table(
        index=["group", "point"], columns="model", values="norm_mean", sort=False, observed=True
    )
    means = None if args.per_position else groups[list(norms)].reset_index()
    rates = [
        {
            "model": name,
            "share_of_heads": s.head_rate,
            "share_of_queries": s.query_rate,
            "mean_attention": s.attention.mean().item(),
        }
        for name, s in sinks.items()
    ]
    title = f"Attention on position 0 (sink: at least {args.threshold:g})"
    shown = [
        Part("Mean norm of the residual stream", table=means, figure=norms_figure(norms)),
        Part(title, table=pd.DataFrame(rates), figure=sinks_figure(sinks)),
    ]
    tables = {"": table[["model", *table.columns[:-1]]], "sinks": heads[["model", *heads.columns[:-1]]]}
    cli.report(args, shown, tables)
