"""Calibration of the models' predictions, and their divergence from each other.

python analyses/calibration.py
python analyses/calibration.py --model gpt2 gpt2-vanilla gpt2-noLN --data lucabaroni/apollo-pile-filtered-10k
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import common
from common import Claim, Family

from lnfree_interp import cli

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


def claims(family: Family, table: pd.DataFrame) -> list[Claim]:
    t = table.set_index("model")
    o, c, f = family.original, family.control, family.free
    names = tuple(dict.fromkeys((o, c, f)))
    divergence = {pair: t.loc[pair[0], f"jsd:{pair[1]}"] for pair in ((o, c), (o, f), (c, f))}
    over = {name: t.loss[name] - t.entropy[name] for name in names}
    return [
        Claim(
            "Calibration gets somewhat worse with fine-tuning and again without LayerNorm (P2).",
            "small, expected calibration error: .0193 original, .0263 vanilla, .0354 LN-free",
            ", ".join(f"{t.ece[n]:.4f} {n}" for n in names),
            common.agreement(t.ece[f] > t.ece[c], t.ece[c] > t.ece[o]),
        ),
        Claim(
            "Fine-tuned models, with LayerNorm or without, are more confident than right: entropy below loss (P2).",
            "small, loss minus entropy: -0.089 original, +0.183 vanilla, +0.255 LN-free",
            ", ".join(f"{over[n]:+.3f} {n}" for n in names),
            common.agreement(over[f] > over[o], over[f] > 0),
        ),
        Claim(
            "The LN-free model predicts nearly what the control does, and is nearer to it than to the original (P2).",
            "small, Jensen-Shannon divergence: original-vanilla .0202, original-LN-free .0393, vanilla-LN-free .0254",
            f"original-control {divergence[o, c]:.4f}, original-LN-free {divergence[o, f]:.4f}, "
            f"control-LN-free {divergence[c, f]:.4f}; "
            f"same top token for {t.loc[c, f'agreement:{f}']:.0%}",
            common.agreement(divergence[c, f] < divergence[o, f], divergence[o, c] < divergence[o, f]),
        ),
    ]


def figure(result) -> go.Figure:
    from plotly.subplots import make_subplots

    from lnfree_interp.figures.style import DIVERGING, colour, line, styled

    fig = make_subplots(
        rows=2,
        cols=2,
        row_heights=[0.75, 0.25],
        column_widths=[0.56, 0.44],
        vertical_spacing=0.06,
        horizontal_spacing=0.16,
        specs=[[{}, {"rowspan": 2}], [{}, None]],
        subplot_titles=("reliability", "Jensen-Shannon divergence (nats)", ""),
        shared_xaxes="columns",
    )
    fig.add_scatter(
        x=[0, 1], y=[0, 1], mode="lines", line={"dash": "dot", "color": "#999999"}, showlegend=False, row=1, col=1
    )
    n_bins = result.bin_count.shape[1]
    for i, name in enumerate(result.names):
        there = result.bin_count[i] >= 20  # fewer predictions say little about how often they are right
        label = f"{name} (ECE {result.calibration_error[i].item():.4f})"
        fig.add_scatter(
            x=result.bin_confidence[i][there].tolist(),
            y=result.bin_accuracy[i][there].tolist(),
            name=label,
            line=line(i),
            mode="lines+markers",
            marker={"size": 5},
            legendgroup=name,
            row=1,
            col=1,
        )
        share = (result.bin_count[i] / result.bin_count[i].sum()).tolist()
        fig.add_bar(
            x=[(k + 0.5) / n_bins for k in range(n_bins)],
            y=share,
            marker_color=colour(i),
            showlegend=False,
            row=2,
            col=1,
        )
    values = result.divergence
    most = values.max().item()
    names = list(result.names)
    fig.add_heatmap(
        z=values.tolist(),
        x=names,
        y=names,
        text=[[f"{v:.4f}" for v in row] for row in values.tolist()],
        texttemplate="%{text}",
        colorscale=DIVERGING,
        zmid=0,
        zmin=-1.6 * most,
        zmax=1.6 * most,
        showscale=False,
        xgap=2,
        ygap=2,
        row=1,
        col=2,
    )
    fig.update_yaxes(title_text="share right", range=[0, 1], row=1, col=1)
    fig.update_yaxes(title_text="share", type="log", tickformat="~p", dtick=1, row=2, col=1)
    fig.update_yaxes(autorange="reversed", row=1, col=2)
    fig.update_xaxes(range=[0, 1], row=1, col=1)
    fig.update_xaxes(title_text="probability of the top token", range=[0, 1], row=2, col=1)
    fig.update_layout(legend={"x": 0.02, "y": 0.98, "bgcolor": "rgba(255,255,255,0.7)"})
    return styled(fig, title="Calibration and divergence", height=520)


def flags(parser) -> None:
    parser.add_argument("--bins", type=cli.positive_int, default=15, help="bins of the calibration error (15)")


def run(args) -> common.Output:
    from lnfree_interp import compare_models

    models = common.loaded(args)
    tokens = common.same_tokens(args, models)
    with cli.bar("comparison", "sequence") as progress:
        result = compare_models(models, tokens, n_bins=args.bins, seed=args.seed, progress=progress)
    said = [c for f in common.families(common.ln_free(models)) for c in claims(f, result.table())]
    caption = f"{tokens.numel():,} tokens of {common.source(args)}; {args.bins} bins, "
    caption += "those with at least 20 predictions drawn."
    return common.Output(result.table(), figure(result), said, caption)


ANALYSIS = common.Analysis(run, tokens=65536, flags=flags)
main = ANALYSIS.main

if __name__ == "__main__":
    raise SystemExit(main())
