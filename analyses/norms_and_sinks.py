"""Residual norms at position 0 and elsewhere, and attention sinks.

python analyses/norms_and_sinks.py
python analyses/norms_and_sinks.py --model gpt2 gpt2-vanilla gpt2-noLN --data Skylion007/openwebtext
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import common
from common import Claim, Family

from lnfree_interp import cli

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


def ratio(norms: pd.DataFrame, model: str) -> float:
    """Largest norm at position 0 over that of the rest at the same point after a layer."""
    part = norms[(norms.model == model) & norms.point.str.endswith("resid_post")]
    by = part.pivot(index="point", columns="group", values="norm_mean")
    return (by["position 0"] / by["rest"]).max()


def claims(family: Family, norms: pd.DataFrame, rates: dict[str, float]) -> list[Claim]:
    names = tuple(dict.fromkeys((family.original, family.control, family.free)))
    ratios = {name: ratio(norms, name) for name in names}
    big = ratios[family.original] > 3
    even = ratios[family.free] < 2 and ratios[family.free] < ratios[family.original]
    sinks, fewer = rates[family.original] > 0.1, rates[family.free] < rates[family.original]
    return [
        Claim(
            "At position 0 the residual stream is many times longer than elsewhere; not so without LayerNorm (P1, P2).",
            "medium: about 4,000 original, 300 to 500 LN-free (the rest of the positions: some hundreds)",
            "position 0 over the rest, at most: " + ", ".join(f"{ratios[n]:.2f} {n}" for n in names),
            common.agreement(big, even) if big else "no",
            "" if big else f"{family.original} has no long position 0 to lose.",
        ),
        Claim(
            "Fewer heads are attention sinks without LayerNorm, but many stay (P2: at least 30% on position 0).",
            "55.3% of the heads original, 45.3% LN-free (medium)",
            ", ".join(f"{rates[n]:.1%} {n}" for n in names),
            common.agreement(sinks, fewer) if sinks else "no",
            "" if sinks else f"{family.original} has hardly any sinks to lose.",
        ),
    ]


def figure(norms: pd.DataFrame, heads: pd.DataFrame, rates: dict[str, float], threshold: float) -> go.Figure:
    from plotly.subplots import make_subplots

    from lnfree_interp.figures.style import colour, line, styled

    titles = ("norm at position 0", "norm elsewhere", "attention on position 0, each head")
    fig = make_subplots(cols=3, horizontal_spacing=0.09, column_widths=[0.3, 0.3, 0.4], subplot_titles=titles)
    after = norms[norms.point.str.endswith(("L0.resid_pre", "resid_post"))]
    for i, (name, rate) in enumerate(rates.items()):
        label = f"{name} ({rate:.0%} of heads are sinks)"
        for col, group in ((1, "position 0"), (2, "rest")):
            part = after[(after.model == name) & (after.group == group)]
            points = ["embed" if p == "L0.resid_pre" else p.removesuffix(".resid_post") for p in part.point]
            curve = {"x": points, "y": part.norm_mean, "mode": "lines+markers", "marker": {"size": 5}, "line": line(i)}
            fig.add_scatter(**curve, name=label, legendgroup=name, showlegend=col == 1, row=1, col=col)
        part = heads[heads.model == name]
        box = {"x": part["head"].str.split("H").str[0], "y": part.attention, "text": part["head"], "boxpoints": "all"}
        look = {"pointpos": 0, "jitter": 0.4, "line": {"width": 1}, "marker": {"color": colour(i), "size": 4}}
        hover = "%{text}: %{y:.3f}<extra>" + name + "</extra>"
        fig.add_box(**box, **look, name=name, legendgroup=name, hovertemplate=hover, showlegend=False, row=1, col=3)
    fig.add_hline(y=threshold, line={"dash": "dot", "color": "#999999"}, row=1, col=3)
    top = 1.1 * after.norm_mean[after.group != "EOT"].max()
    fig.update_yaxes(title_text="L2 norm", range=[0, top], row=1, col=1)
    fig.update_yaxes(range=[0, top], row=1, col=2)
    fig.update_yaxes(range=[0, min(1.0, max(1.1 * heads.attention.max(), 1.2 * threshold))], row=1, col=3)
    fig.update_xaxes(title_text="after layer")
    fig.update_xaxes(title_text="layer", row=1, col=3)
    fig.update_layout(boxmode="group", legend={"orientation": "h", "y": -0.2, "x": 0})
    return styled(fig, title="Residual norms and attention sinks", height=440)


def flags(parser) -> None:
    parser.add_argument("--threshold", type=float, default=0.3, help="attention on position 0 that makes a sink (0.3)")


def run(args) -> common.Output:
    import pandas as pd

    from lnfree_interp import attention_sinks, residual_norms

    free, norms, heads, rates = {}, [], [], {}
    for name, model in cli.models(args):
        tokens = cli.load_tokens(args, model)
        free[name] = model.cfg.normalization_type is None
        with cli.bar(f"{name} norms", "sequence") as progress:
            norms.append(residual_norms(model, tokens, progress=progress).table().assign(model=name))
        with cli.bar(f"{name} sinks", "sequence") as progress:
            sinks = attention_sinks(model, tokens, threshold=args.threshold, progress=progress)
        heads.append(sinks.table().assign(model=name))
        rates[name] = sinks.head_rate
    norms, heads = pd.concat(norms, ignore_index=True), pd.concat(heads, ignore_index=True)
    kept = ["model", "point", "group", "tokens", "norm_mean", "norm_stderr", "norm_median", "norm_low", "norm_high"]
    table = pd.concat([norms[norms.tokens > 0][kept], heads], ignore_index=True)
    caption = f"{tokens.numel():,} tokens of {common.source(args)}; norms of the stream "
    caption += "less its mean, averaged over sequences."
    said = [c for f in common.families(free) for c in claims(f, norms, rates)]
    return common.Output(table, figure(norms, heads, rates, args.threshold), said, caption)


ANALYSIS = common.Analysis(run, tokens=32768, flags=flags)
main = ANALYSIS.main

if __name__ == "__main__":
    raise SystemExit(main())
