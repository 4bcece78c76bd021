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


def draw(table: pd.DataFrame) -> go.Figure:
    """Mean losses with their intervals, not from 0; gaps with theirs, beside the published ones."""
    from plotly.subplots import make_subplots

    from lnfree_interp.figures.style import MARK, colour, styled

    titles = ("mean loss [95% over sequences]", "LN-free minus control [95%, paired]")
    fig = make_subplots(cols=2, horizontal_spacing=0.2, column_widths=[0.5, 0.5], subplot_titles=titles)
    look, rows = {"mode": "markers", "showlegend": False}, []
    for i, row in enumerate(table.itertuples()):
        marker, mean = {"color": colour(i), "size": 10}, np.array([row.mean])
        hover = "%{y}: %{x:.4f} nats per token<extra></extra>"
        bars = common.bars(mean, table.mean_low[i], table.mean_high[i])
        fig.add_scatter(x=mean, y=[row.model], error_x=bars, marker=marker, hovertemplate=hover, **look, row=1, col=1)
        if row.gap == row.gap:
            gap, hover = np.array([row.gap]), "%{y}: %{x:+.4f} nats per token<extra></extra>"
            bars = common.bars(gap, row.gap_low, row.gap_high)
            fig.add_scatter(
                x=gap, y=[row.model], error_x=bars, marker=marker, hovertemplate=hover, **look, row=1, col=2
            )
            rows.append(row.model)
    sizes, marker = [f"GPT-2 {size}" for size in PAPER], {"color": "#777777", "size": 10, "symbol": "diamond-open"}
    hover = "%{y}, published: %{x:+.4f} nats per token<extra></extra>"
    fig.add_scatter(x=list(PAPER.values()), y=sizes, marker=marker, hovertemplate=hover, **look, row=1, col=2)
    fig.add_vline(x=0, line=MARK, row=1, col=2)
    fig.update_xaxes(title_text="nats per token", nticks=5)
    fig.update_yaxes(autorange="reversed", automargin=True, type="category")
    title = "Loss of models with LayerNorm and without (diamonds: published, on another text)"
    return styled(fig, title=title, height=190 + 24 * max(len(table), len(rows) + len(PAPER)))


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
    return common.Output(table, None, [c for f in found for c in claims(f, table)], caption)


ANALYSIS = common.Analysis(run, tokens=65536, draw=draw)
main = ANALYSIS.main

if __name__ == "__main__":
    raise SystemExit(main())
