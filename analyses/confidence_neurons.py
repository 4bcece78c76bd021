"""Confidence neurons: their effect on loss and entropy, one by one and together.

python analyses/confidence_neurons.py
python analyses/confidence_neurons.py --model gpt2 gpt2-vanilla gpt2-noLN --data Skylion007/openwebtext
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import common
from common import Claim, Family

from lnfree_interp import cli

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


def claims(family: Family, table: pd.DataFrame, top: list[int]) -> list[Claim]:
    singles = table[table.kind == "single"].set_index(["model", "neuron"])
    last = table[table.kind == "cumulative"].groupby("model").entropy_share.last()
    names = tuple(dict.fromkeys((family.original, family.control, family.free)))
    first = {name: singles.loc[(name, top[0])] for name in names}
    medians = {name: row.loss_abs_median for name, row in first.items()}
    through = {name: row.loss_abs_through_scale / row.loss_abs if row.loss_abs else 0.0 for name, row in first.items()}
    falls = medians[family.original] > medians[family.control] > medians[family.free]
    scan = table[(table.kind == "scan") & (table.model == family.original)]
    mostly = int((scan.loss_abs_through_scale > 0.5 * scan.loss_abs).sum())
    counted = (
        f"; of all {len(scan)} neurons {mostly} act mostly through the scale in {family.original}" if len(scan) else ""
    )
    gone = medians[family.free] < 0.1 * medians[family.original]
    works = through[family.original] > 0.5
    return [
        Claim(
            "The strongest confidence neuron acts through the final LayerNorm's scale; without it nothing is left "
            "(P2).",
            "small, neuron 584, median |change of loss|: about 0.014 original, 0.0034 vanilla, 0 LN-free",
            f"neuron {top[0]}: "
            + ", ".join(f"{medians[n]:.5f} {n}" for n in names)
            + "; share of the mean effect that acts through the scale "
            + ", ".join(f"{through[n]:.0%} {n}" for n in names)
            + counted,
            common.agreement(falls, gone, works),
            ""
            if gone and works
            else f"What acts through the scale is 0 without LayerNorm; what the neuron writes to logits stays. "
            f"In {family.original} it is {1 - through[family.original]:.0%} of the effect.",
        ),
        Claim(
            f"Ablating the top {len(top)} together lowers entropy in the original, less in the control, and not at all "
            "without LayerNorm (P2).",
            "medium, top 3: -3.3% original, -0.67% vanilla, 0 LN-free",
            ", ".join(f"{last[n]:+.2%} {n}" for n in names),
            common.agreement(last[family.original] < -0.005, abs(last[family.free]) < 0.2 * abs(last[family.original])),
        ),
    ]


def measure(name: str, model, tokens, top: list[int], scanned: int) -> pd.DataFrame:
    """One row per ablation: the top neurons alone ("single"), cumulatively, and all of the layer ("scan")."""
    import pandas as pd

    from lnfree_interp import ablate_cumulatively, ablate_neurons

    together = ablate_cumulatively(model, tokens, top)
    entropy = together.baseline_entropy.mean().item()
    tables = {"single": ablate_neurons(model, tokens, neurons=top).table(), "cumulative": together.table()}
    if scanned:
        few = tokens[: max(1, scanned // tokens.shape[1])]
        with cli.bar(f"{name}, whole layer", "unit") as progress:
            tables["scan"] = ablate_neurons(model, few, progress=progress).table()
    table = pd.concat([t.assign(kind=kind) for kind, t in tables.items()], ignore_index=True)
    table["neuron"] = table.neuron.str.split("N").str[1].astype(int)
    table = table.assign(model=name, entropy_share=table.entropy / entropy)
    first = ["model", "kind", "neuron"]
    return table[[*first, *[c for c in table.columns if c not in first]]]


def draw(table: pd.DataFrame) -> go.Figure:
    from plotly.subplots import make_subplots

    from lnfree_interp.figures.style import colour, line, log_axis, styled

    names = list(table.model.unique())
    top = table[(table.model == names[0]) & (table.kind == "single")].neuron.tolist()
    several = f"the top {len(top)}, " + "one on top of the other" * (len(top) > 1)
    titles = ("each neuron of the layer (boxes)<br>and the top ones (dots)", f"neuron {top[0]}", several)
    fig = make_subplots(cols=3, horizontal_spacing=0.11, column_widths=[0.36, 0.32, 0.32], subplot_titles=titles)
    for i, name in enumerate(names):
        part = table[table.model == name]
        of = {kind: part[part.kind == kind] for kind in ("single", "cumulative", "scan")}
        scan = {"y": of["scan"].loss_abs, "x": [name] * len(of["scan"]), "boxpoints": False, "line": {"width": 1.5}}
        hover = {"hovertemplate": "%{y:.3g} nats<extra>" + name + "</extra>"}
        fig.add_box(**scan, **hover, name=name, marker_color=colour(i), showlegend=False, row=1, col=1)
        dots = {"x": [name] * len(top), "y": of["single"].loss_abs, "text": of["single"].neuron, "mode": "markers"}
        dots["marker"] = {"color": colour(i), "size": 9, "line": {"color": "white", "width": 1}}
        hover = "neuron %{text}: %{y:.3g} nats<extra>" + name + "</extra>"
        fig.add_scatter(**dots, hovertemplate=hover, name=name, showlegend=False, row=1, col=1)
        row = of["single"].iloc[0]
        y = [row.loss_abs, row.loss_abs_through_scale, row.loss_abs_frozen]
        x = ["in all", "through<br>the scale", "scale<br>frozen"]
        hover = f"neuron {top[0]}, %{{x}}: %{{y:.3g}} nats<extra>{name}</extra>"
        fig.add_bar(x=x, y=y, marker_color=colour(i), name=name, hovertemplate=hover, row=1, col=2)
        shares = [0, *(100 * of["cumulative"].entropy_share)]
        curve = {"x": list(range(len(top) + 1)), "y": shares, "mode": "lines+markers", "text": ["none", *map(str, top)]}
        hover = "with neuron %{text}: %{y:+.3g}% of the entropy<extra>" + name + "</extra>"
        fig.add_scatter(**curve, hovertemplate=hover, name=name, line=line(i), showlegend=False, row=1, col=3)
    nats = "mean |change of loss| (nats)"
    shown = table.loss_abs[table.kind.isin(["single", "scan"])]
    fig.update_yaxes(title_text=nats, **log_axis(shown), row=1, col=1)
    fig.update_xaxes(
        tickangle=0 if len(names) <= 3 and max(map(len, names)) <= 12 else -90, automargin=True, row=1, col=1
    )
    fig.update_yaxes(title_text=nats, rangemode="tozero", title_standoff=4, row=1, col=2)
    fig.update_yaxes(title_text="change of entropy (%)", tickformat="~g", title_standoff=4, row=1, col=3)
    fig.update_xaxes(title_text="neurons ablated", dtick=max(1, len(top) // 8), row=1, col=3)
    fig.update_layout(barmode="group")
    return styled(fig, title="Confidence neurons of the last MLP, set to their mean", height=410)


def flags(parser) -> None:
    add = parser.add_argument
    add("--neurons", type=int, nargs="+", metavar="N", help="neurons (default: the first model's top ones)")
    add("--top", type=cli.positive_int, default=3, metavar="N", help="how many top ones (3)")
    add("--scan", type=int, default=1024, metavar="N", help="tokens to scan the whole layer on; 0: no scan (1,024)")


def run(args) -> common.Output:
    import pandas as pd

    from lnfree_interp import rank_confidence_neurons

    free, tables, top = {}, [], args.neurons
    for name, model in cli.models(args):
        free[name] = model.cfg.normalization_type is None
        top = top or rank_confidence_neurons(model).neuron[: args.top].tolist()
        tokens = cli.load_tokens(args, model)
        tables.append(measure(name, model, tokens, top, args.scan))
    table, found = pd.concat(tables, ignore_index=True), common.families(free)
    table = pd.concat([table[table.kind != "scan"], table[table.kind == "scan"]], ignore_index=True)
    caption = f"{tokens.numel():,} tokens of {common.source(args)}; neurons {', '.join(map(str, top))}"
    caption += "." if args.neurons else f": the highest |w_out| / LogitVar of {next(iter(free))}."
    # Neurons are one family's own.
    return common.Output(table, None, claims(found[0], table, top) if found else [], caption)


ANALYSIS = common.Analysis(run, tokens=8192, flags=flags, draw=draw)
main = ANALYSIS.main

if __name__ == "__main__":
    raise SystemExit(main())
