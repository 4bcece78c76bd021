"""What freezing the norm's scale costs, reader by reader.

python analyses/readers.py
python analyses/readers.py --model gpt2 gpt2-vanilla gpt2-noLN --data lucabaroni/apollo-pile-filtered-10k
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import common
from common import Claim, Family

from lnfree_interp import cli

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

READERS = ("query", "key", "value", "neuron")


def claims(family: Family, table: pd.DataFrame) -> list[Claim]:
    def shown(name: str) -> str:
        by_kind = table[table.model == name].groupby("reads", sort=False).nmae.agg(["min", "max"])
        return name + ": " + ", ".join(f"{row[0]} {row[1]:.1%} to {row[2]:.1%}" for row in by_kind.itertuples())

    names = tuple(dict.fromkeys((family.original, family.control, family.free)))
    most = table[table.model == family.free].nmae.max()
    least = table[table.model != family.free].low.min()
    return [
        Claim(
            "Without LayerNorm queries, keys, values and neurons read exact sums over earlier heads, as the logits do.",
            "not measured (follows from P2's argument for logits)",
            f"{family.free}: pooled error of the heads {most:.4%} at most",
            common.yes_no(most < 1e-4),
        ),
        Claim(
            "With LayerNorm freezing the scale misstates what every reader would lose without a head.",
            "not measured",
            "; ".join(map(shown, names[:-1])),
            common.yes_no(least > 0.01),
            "Readers of a layer pooled, from the layer with the lowest error to the one with the highest.",
        ),
    ]


def measure(name: str, model, tokens, args) -> pd.DataFrame:
    """Pooled error over all heads before them, of all readers of a kind in a layer; its interval over sequences."""
    import pandas as pd

    from lnfree_interp import Reader
    from lnfree_interp.statistics import ratio, ratio_interval

    # In layer 0 no head comes before attention.
    cells = [(kind, layer) for kind in READERS for layer in range(kind != "neuron", model.cfg.n_layers)]
    rows = []
    with cli.bar(name, "kind of reader in a layer") as progress:
        for kind, layer in cells:
            difference, size = differences(model, tokens, getattr(Reader, kind)(layer))
            low, high = ratio_interval(difference.T.sum(1), size.T.sum(1), draws=args.draws, seed=args.seed)
            error = float(ratio(difference.sum(), size.sum()))
            rows.append({"reads": kind, "layer": layer, "nmae": error, "low": float(low), "high": float(high)})
            progress(len(rows), len(cells))
    return pd.DataFrame(rows).assign(model=name)[["model", "reads", "layer", "nmae", "low", "high"]]


def differences(model, tokens, reader):
    """Sums over readers and tokens of |attribution - effect| and |effect|, [head, sequence] in fp64."""
    import re

    import numpy as np

    from lnfree_interp import attributions_to
    from lnfree_interp.dla import HEADS

    batches = []
    for batch in tokens.split(max(1, 1024 // tokens.shape[1])):
        difference = size = 0.0
        ways = (attributions_to(model, batch, reader, by="head", exact=exact) for exact in (False, True))
        for linear, exact in zip(*ways):
            heads = [i for i, label in enumerate(exact.labels) if re.fullmatch(HEADS, label)]
            linear, exact = linear.values[:, heads].double(), exact.values[:, heads].double()
            difference = difference + (linear - exact).abs().sum((0, 3))
            size = size + exact.abs().sum((0, 3))
        batches.append((difference.cpu().numpy(), size.cpu().numpy()))
    return (np.concatenate(parts, 1) for parts in zip(*batches))


def draw(table: pd.DataFrame) -> go.Figure:
    from plotly.subplots import make_subplots

    from lnfree_interp.figures.style import line, styled

    titles = ("queries", "keys", "values", "neurons")
    fig = make_subplots(cols=4, shared_yaxes=True, horizontal_spacing=0.03, subplot_titles=titles)
    for i, name in enumerate(dict.fromkeys(table.model)):
        for column, kind in enumerate(READERS, 1):
            rows = table[(table.model == name) & (table.reads == kind)]
            fig.add_scatter(
                x=rows.layer,
                y=rows.nmae,
                error_y=common.bars(rows.nmae, rows.low, rows.high),
                mode="lines+markers",
                line=line(i),
                name=name,
                legendgroup=name,
                showlegend=column == 1,
                hovertemplate=f"layer %{{x}}, {kind}: error %{{y:.1%}}<extra>{name}</extra>",
                row=1,
                col=column,
            )
    last = int(table.layer.max())
    fig.update_xaxes(title_text="layer", range=[-0.5, last + 0.5], tick0=0, dtick=max(1, -(-last // 6)))
    fig.update_yaxes(tickformat=".0%", rangemode="tozero")
    fig.update_yaxes(title_text="mean |difference| / mean |effect|", col=1)
    title = "What a reader reads of earlier heads: error of freezing the norm's scale [95% over sequences]"
    return styled(fig, title=title, height=370)


def flags(parser) -> None:
    parser.add_argument("--draws", type=cli.positive_int, default=1000, help="bootstrap draws (1,000)")


def run(args) -> common.Output:
    import pandas as pd

    tables, free = [], {}
    for name, model in cli.models(args):
        tokens = cli.load_tokens(args, model, context=256)
        tables.append(measure(name, model, tokens, args))
        free[name] = model.cfg.normalization_type is None
    table = pd.concat(tables, ignore_index=True)
    caption = (
        f"{tokens.numel():,} tokens of {common.source(args)}; all neurons of a layer, or all coordinates of all its "
    )
    caption += "queries, keys or values, by all heads before it; 95% intervals over sequences."
    return common.Output(table, None, [c for f in common.families(free) for c in claims(f, table)], caption)


ANALYSIS = common.Analysis(run, tokens=8192, flags=flags, draw=draw)
main = ANALYSIS.main

if __name__ == "__main__":
    raise SystemExit(main())
