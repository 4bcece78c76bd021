"""Residual norms at position 0 and elsewhere, and attention sinks.

python analyses/norms_and_sinks.py
python analyses/norms_and_sinks.py --model gpt2 gpt2-vanilla gpt2-noLN --data Skylion007/openwebtext
"""

from __future__ import annotations

import math
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


def draw(table: pd.DataFrame) -> go.Figure:
    from plotly.subplots import make_subplots

    from lnfree_interp.figures.style import MARK, colour, line, log_axis, styled

    norms, heads = table[table.point.notna()], table[table["head"].notna()]
    threshold, names = float(heads.threshold.iloc[0]), list(dict.fromkeys(table.model))
    most, last = heads.attention.max(), int(heads["head"].str.extract(r"L(\d+)H", expand=False).astype(int).max())
    no_sinks = bool(most < threshold)
    third = "attention on position 0, each head" + f"<br>(no head reaches {threshold:g}: no sinks)" * no_sinks
    titles = ("norm at position 0", "norm elsewhere", third)
    fig = make_subplots(cols=3, horizontal_spacing=0.1, column_widths=[0.29, 0.29, 0.42], subplot_titles=titles)
    after = norms[norms.point.str.endswith(("L0.resid_pre", "resid_post")) & (norms.group != "EOT")]
    for i, name in enumerate(names):
        part = heads[heads.model == name]
        label = f"{name} ({part.sink.astype(bool).mean():.0%} of heads are sinks)"
        for col, group in ((1, "position 0"), (2, "rest")):
            of = after[(after.model == name) & (after.group == group)]
            points = [0 if p == "L0.resid_pre" else 1 + int(p[1:].partition(".")[0]) for p in of.point]
            curve = {"x": points, "y": of.norm_mean, "mode": "lines+markers", "marker": {"size": 5}, "line": line(i)}
            hover = f"after %{{text}}, {group}: norm %{{y:.4g}}<extra>{name}</extra>"
            look = {"name": label, "legendgroup": name, "showlegend": col == 1, "hovertemplate": hover}
            fig.add_scatter(**curve, text=of.point, **look, row=1, col=col)
        layer = part["head"].str.extract(r"L(\d+)H", expand=False).astype(int)
        dots = {"x": layer + 0.22 * (i - (len(names) - 1) / 2), "y": part.attention, "text": part["head"]}
        marker = {"color": colour(i), "size": 6, "opacity": 0.75}
        hover = "%{text}: %{y:.3f} of its attention on position 0<extra>" + name + "</extra>"
        look = {"legendgroup": name, "showlegend": False, "hovertemplate": hover}
        fig.add_scatter(**dots, **look, mode="markers", marker=marker, name=name, row=1, col=3)
    if not no_sinks:
        fig.add_hline(y=threshold, line=MARK, row=1, col=3, annotation_text="a sink", annotation_font_size=11)
    sizes = after.norm_mean
    if sizes.max() > 30 * sizes.min():  # one scale for both: what is long is seen to be
        same = log_axis(sizes)
        same["range"] = [math.log10(sizes.min()) - 0.1, math.log10(sizes.max()) + 0.1]
    else:
        same = {"range": [0, 1.08 * sizes.max()]}
    fig.update_yaxes(title_text="L2 norm of the residual stream", **same, row=1, col=1)
    fig.update_yaxes(title_text="L2 norm", title_standoff=4, **same, row=1, col=2)
    fig.update_yaxes(title_text="attention", title_standoff=4, range=[0, min(1.02, 1.12 * most)], row=1, col=3)
    step = max(1, -(-(last + 2) // 9))
    points = ["embed", *(f"L{n}" for n in range(last + 1))]
    ticks = {"tickvals": list(range(0, last + 2, step)), "ticktext": points[::step], "tickangle": -90}
    fig.update_xaxes(title_text="after", **ticks, col=1)
    fig.update_xaxes(title_text="after", **ticks, col=2)
    fig.update_xaxes(title_text="layer", tick0=0, dtick=step, range=[-0.6, last + 0.6], zeroline=False, row=1, col=3)
    title = "Residual norms at position 0 and elsewhere, and attention on position 0"
    return styled(fig, title=title, height=400)


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
        heads.append(sinks.table().assign(model=name, threshold=args.threshold))
        rates[name] = sinks.head_rate
    norms, heads = pd.concat(norms, ignore_index=True), pd.concat(heads, ignore_index=True)
    kept = ["model", "point", "group", "tokens", "norm_mean", "norm_stderr", "norm_median", "norm_low", "norm_high"]
    table = pd.concat([norms[norms.tokens > 0][kept], heads], ignore_index=True)
    caption = f"{tokens.numel():,} tokens of {common.source(args)}; norms of the stream "
    caption += "less its mean, averaged over sequences."
    said = [c for f in common.families(free) for c in claims(f, norms, rates)]
    return common.Output(table, None, said, caption)


ANALYSIS = common.Analysis(run, tokens=32768, flags=flags, draw=draw)
main = ANALYSIS.main

if __name__ == "__main__":
    raise SystemExit(main())
