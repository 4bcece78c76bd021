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

FEWEST = 20  # predictions of a bin: fewer say little about how often they are right


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


def bins(result) -> pd.DataFrame:
    """How many predictions each bin of each model holds, their mean confidence and how many are right."""
    import pandas as pd

    rows = []
    for i, name in enumerate(result.names):
        columns = zip(*(x[i].tolist() for x in (result.bin_count, result.bin_confidence, result.bin_accuracy)))
        for k, (count, confidence, accuracy) in enumerate(columns):
            row = {"model": name, "bin": k, "predictions": int(count)}
            rows.append(row | {"confidence": confidence, "accuracy": accuracy})
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame, bins: pd.DataFrame) -> go.Figure:
    from plotly.subplots import make_subplots

    from lnfree_interp.figures.evaluate import share_bars
    from lnfree_interp.figures.style import MARK, colour, line, styled

    names = list(table.model)
    fig = make_subplots(
        rows=2,
        cols=2,
        row_heights=[0.72, 0.28],
        column_widths=[0.54, 0.46],
        vertical_spacing=0.08,
        horizontal_spacing=0.19,
        specs=[[{}, {"rowspan": 2}], [{}, None]],
        subplot_titles=("how often the top token is right [95%]", "Jensen-Shannon divergence (nats)", ""),
        shared_xaxes="columns",
    )
    fig.add_scatter(x=[0, 1], y=[0, 1], mode="lines", line=MARK, showlegend=False, hoverinfo="skip", row=1, col=1)
    n_bins = int(bins.bin.max()) + 1
    for i, name in enumerate(names):
        of = bins[bins.model == name]
        there = of[of.predictions >= FEWEST]
        label = f"{name} (calibration error {table.ece[i]:.4f})"
        curve = {"x": there.confidence, "y": there.accuracy, "line": line(i), "mode": "lines+markers"}
        curve["error_y"] = share_bars(list(there.accuracy), list(there.predictions))
        hover = "probability %{x:.3f}: right %{y:.1%}<extra>" + name + "</extra>"
        look = {"marker": {"size": 5}, "legendgroup": name, "hovertemplate": hover}
        fig.add_scatter(**curve, **look, name=label, row=1, col=1)
        share = of.predictions / of.predictions.sum()
        hover = "probability %{x:.2f}: %{y:.2%} of the predictions<extra>" + name + "</extra>"
        bar = {"x": (of.bin + 0.5) / n_bins, "y": share, "marker_color": colour(i), "hovertemplate": hover}
        fig.add_bar(**bar, name=name, showlegend=False, row=2, col=1)
    values = table[[f"jsd:{name}" for name in names]].to_numpy()
    fig.add_heatmap(
        z=values,
        x=names,
        y=names,
        text=[[f"{v:.4f}" if v else "0" for v in row] for row in values],
        texttemplate="%{text}",
        colorscale="Blues",
        zmin=0,
        zmax=1.6 * values.max(),
        showscale=False,
        xgap=2,
        ygap=2,
        hovertemplate="%{y} and %{x}: %{z:.5f} nats<extra></extra>",
        row=1,
        col=2,
    )
    fig.update_yaxes(title_text="share right", range=[0, 1], row=1, col=1)
    fig.update_yaxes(title_text="predictions", tickformat=".0%", rangemode="tozero", nticks=4, row=2, col=1)
    fig.update_yaxes(autorange="reversed", automargin=True, row=1, col=2)
    fig.update_xaxes(range=[0, 1], row=1, col=1)
    fig.update_xaxes(title_text="probability of the top token", range=[0, 1], row=2, col=1)
    return styled(fig, title="Calibration of the models' predictions, and their divergence from each other", height=480)


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
    caption += f"those with at least {FEWEST} predictions drawn, with intervals as if tokens were independent."
    return common.Output(result.table(), None, said, caption, {"bins": bins(result)})


ANALYSIS = common.Analysis(run, tokens=65536, flags=flags, draw=draw, more=("bins",))
main = ANALYSIS.main

if __name__ == "__main__":
    raise SystemExit(main())
