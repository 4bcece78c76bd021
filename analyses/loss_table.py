"""Loss of the LN-free model against original and fine-tuned control.

python analyses/loss_table.py
python analyses/loss_table.py --model gpt2 gpt2-vanilla gpt2-noLN --data Skylion007/openwebtext
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import common
import numpy as np
from common import Claim, Family

from lnfree_interp import cli

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


PAPER = {"small": 0.0645, "medium": 0.0628, "large": 0.0085, "xl": 0.0171}  # LN-free minus control, P2


def claims(family: Family, table: pd.DataFrame) -> list[Claim]:
    row = table.set_index("model").loc[family.free]
    control = table.set_index("model").loc[family.control]
    gap = f"{row.gap:+.4f} [{row.gap_low:+.4f}, {row.gap_high:+.4f}]"
    worst = row.worst_loss / row["mean"]
    return [
        Claim(
            "LN-free models lose at most a tenth of a nat to the same fine-tuning with LayerNorm kept (P2).",
            "small +0.0645, medium +0.0628, large +0.0085, xl +0.0171 nats per token",
            f"{family.free}: {row['mean']:.4f}, {family.control}: {control['mean']:.4f}, gap {gap}",
            common.yes_no(row.gap_high <= 0.1),
        ),
        Claim(
            "On text far from its training data an LN-free model's loss can explode on a few samples (P2).",
            "xl on the unfiltered Pile: mean 130.22, median 1.09; three of 10,000 samples",
            f"{family.free}: worst sequence {row.worst_loss:.2f} ({worst:.1f} times the mean), mean {row['mean']:.2f}, "
            f"median {row['median']:.2f}, 99.95% of tokens below {row['p99.95']:.1f}",
            "yes" if worst > 10 else "not tested",
            ""
            if worst > 10
            else "This text is prose like what the model was trained on, and nothing in it explodes: "
            "it cannot show what far-off text does. Give such text with --text or --data.",
        ),
    ]


def figure(table: pd.DataFrame, baselines: dict) -> go.Figure:
    from plotly.subplots import make_subplots

    from lnfree_interp.figures.style import colour, styled

    fig = make_subplots(
        cols=2,
        horizontal_spacing=0.14,
        column_widths=[0.42, 0.58],
        subplot_titles=("mean loss", "LN-free minus fine-tuned control"),
    )
    left, right = {"row": 1, "col": 1, "showlegend": False}, {"row": 1, "col": 2, "showlegend": False}
    for i, (_, row) in enumerate(table.iterrows()):
        name, mean = row.model, np.array([row["mean"]])
        text = {"text": [f"{mean[0]:.3f}"], "textposition": "inside", "insidetextanchor": "middle"}
        bars = common.bars(mean, row.mean_low, row.mean_high)
        fig.add_bar(x=[name], y=mean, error_y=bars, marker_color=colour(i), **text, **left)
        if name in baselines:
            gap = np.array([row.gap])
            bars = common.bars(gap, row.gap_low, row.gap_high)
            text = {"text": [f"  {row.gap:+.4f}"], "textposition": "middle right", "mode": "markers+text"}
            fig.add_scatter(x=[name], y=gap, error_y=bars, marker={"color": colour(i), "size": 10}, **text, **right)
    sizes, gaps = [f"GPT-2<br>{size}" for size in PAPER], list(PAPER.values())
    text = {"text": [f"{gap:+.4f}" for gap in gaps], "textposition": "top center", "mode": "markers+text"}
    fig.add_scatter(x=sizes, y=gaps, marker={"color": "#999999", "size": 10, "symbol": "diamond"}, **text, **right)
    fig.update_yaxes(title_text="nats per token", rangemode="tozero", title_standoff=8)
    fig.update_xaxes(tickangle=0)
    fig.update_xaxes(range=[-0.5, len(baselines) + len(PAPER) - 0.5], row=1, col=2)
    return styled(fig, title="Loss, with 95% intervals over sequences", height=400)


def run(args) -> common.Output:
    import pandas as pd

    from lnfree_interp import evaluate_loss, loss_table

    models = common.loaded(args)
    tokens = common.same_tokens(args, models)
    results = {}
    for name, model in models.items():
        with cli.bar(name, "sequence") as progress:
            results[name] = evaluate_loss(model, tokens, seed=args.seed, progress=progress)
    found = common.families(common.ln_free(models))
    baselines = {family.free: family.control for family in found}
    gaps = loss_table(results, baselines, seed=args.seed).table().drop(columns="loss")
    table = pd.concat([gaps, *[pd.concat([r.table() for r in results.values()], ignore_index=True)]], axis=1)
    caption = f"{tokens.numel():,} tokens of {common.source(args)}; grey diamonds: GPT-2, Pile-filtered (P2)."
    return common.Output(table, figure(table, baselines), [c for f in found for c in claims(f, table)], caption)


ANALYSIS = common.Analysis(run, tokens=65536)
main = ANALYSIS.main

if __name__ == "__main__":
    raise SystemExit(main())
