"""Concepts read off the residual stream, and what wrote them.

    python analyses/concepts.py
    python analyses/concepts.py --model FILE.gguf --task analogies --n 6000 --out figures/real_model

What the second line has written of a real model (real_model.py fetches one) stands in the claims of the first, too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import common
from common import Claim, Family

from lnfree_interp import cli

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

REAL = "real_model"  # the folder of --out that has the tables of a real model
POINTS = 6  # layers whose stream is edited, at most
TASKS = {
    "recall": "lists of pairs of words, read three times, the last time as far as a key",
    "analogies": "analogies of eight kinds in six templates",
}
READOUTS = ("linear", "encoder")
SPLITS = ("prompts", "templates", "concepts")
# What reads the same streams without symbols.
SIMPLE = ("linear probe", "nearest mean", "logit lens", "tuned lens")


# ---------------------------------------------------------------------------------------------------------
# What the paper says, P3, and what came out here


def claims(family: Family, table: pd.DataFrame, swaps: pd.DataFrame, errors: pd.DataFrame) -> list[Claim]:
    """Of a family's models, and of a real one that is in the tables too."""
    names = list(dict.fromkeys(table.model))
    c, f = family.control, family.free
    rates = table.set_index(["model", "yardstick", "split", "group"]).sort_index()
    edits = swaps.set_index(["model", "point", "edit", "who"]).value
    evidence = errors.set_index(["model", "readout"])

    def rate(name: str, yardstick: str, split: str = "prompts", group: str = "all", column: str = "value") -> float:
        return float(rates[column].get((name, yardstick, split, group), float("nan")))

    def shown(name: str, yardstick: str, split: str = "prompts", group: str = "all") -> str:
        value, low, high = (rate(name, yardstick, split, group, column) for column in ("value", "low", "high"))
        return f"{value:.0%} [{low:.0%}, {high:.0%}]"

    def best(name: str) -> str:
        return max(SIMPLE, key=partial(rate, name))

    def most(name: str, edit: str, who: str) -> float:
        return float(edits[name].xs((edit, who), level=("edit", "who")).max())

    def error(name: str, readout: str) -> str:
        row = evidence.loc[(name, readout)]
        return f"{row.nmae:.2%}" if row.nmae < 1e-3 else f"{row.nmae:.0%} [{row.low:.0%}, {row.high:.0%}]"

    def each(say: Callable[[str], str]) -> str:
        return "; ".join(f"{name} {say(name)}" for name in names)

    wrong = [rate(n, "probe", group="wrong", column="low") > rate(n, "constant", group="wrong") for n in names]
    exact = evidence.nmae.xs("linear", level="readout")
    ends = [[rate(n, "probe", group="right", column=end) for end in ("low", "high")] for n in (c, f)]
    return [
        Claim(
            "Unbound with a prompt's key, a hyperdimensional probe's output is nearest to the answer, mostly (P3).",
            "probing@1: 83% on average; GPT-2 medium 60%, Pythia-1.4B 75%, Llama-3.1-8B 85%",
            f"new prompts: {each(lambda n: shown(n, 'probe'))}",
            common.agreement(*(rate(n, "probe") > 0.5 for n in names)),
            f"Queries are made from the prompt alone; the paper's code takes the best of several by looking at the "
            f"target. New templates: {each(lambda n: format(rate(n, 'probe', 'templates'), '.0%'))}. Answers that were "
            f"never trained on: {each(lambda n: format(rate(n, 'probe', 'concepts'), '.0%'))}.",
        ),
        Claim(
            "What it puts out is near to the bundle of the prompt's pairs (P3).",
            "cosine 0.89, 94% of the bits right, ties counted as -1",
            f"of the bits that are no ties: {each(lambda n: format(rate(n, 'probe', column='bits'), '.0%'))}",
            common.agreement(*(rate(n, "probe", column="bits") > 0.85 for n in names)),
            "A sum of two pairs ties in half of the bits. A constant -1 has a cosine of 0.50 and 75% of the bits in "
            "the paper's way of counting; 0 and 50% here, where ties are drawn or left out. Its 94% are 88% of the "
            "bits that are no ties. Cosines here, 0.5 at best: "
            f"{each(lambda n: format(rate(n, 'probe', column='similarity'), '.2f'))}.",
        ),
        Claim(
            "It reads answers that the model itself does not give (P3).",
            "GPT-2 medium: 60% where 8% of its own next tokens are right",
            f"new prompts that the model gets wrong: {each(lambda n: shown(n, 'probe', group='wrong'))}",
            common.agreement(*wrong),
            f"A constant output on them: {each(lambda n: shown(n, 'constant', group='wrong'))}; a linear probe: "
            f"{each(lambda n: shown(n, 'linear probe', group='wrong'))}. Of all answers the "
            f"model prefers the right one on {each(lambda n: format(rate(n, 'model'), '.0%'))} of the new prompts. In "
            "analogies a key has one value, which a probe can learn from other prompts and then read off the key; in "
            "recall, which the embedded models do, it changes from prompt to prompt.",
        ),
        Claim(
            "Symbols read more than simpler readouts of the same streams do.",
            "not measured: no linear probe and no lens stands beside it",
            each(lambda n: f"probe {rate(n, 'probe'):.0%}, {best(n)} {rate(n, best(n)):.0%}"),
            common.agreement(*(rate(n, "probe") > rate(n, best(n)) for n in names)),
            "The best of logistic regression, nearest mean, logit lens and tuned lens on new prompts. The encoder "
            "alone is told of a prompt's other pair as well. Of new answers, which have no class, the tuned lens finds "
            f"{each(lambda n: format(rate(n, 'tuned lens', 'concepts'), '.0%'))}.",
        ),
        Claim(
            "Model and probe read the same: with another answer put into the stream, both give that one.",
            "not tested",
            "at the layer where most do: "
            + each(lambda n: ", ".join(f"{who} {most(n, 'swap', who):.0%}" for who in ("model", "probe"))),
            common.agreement(*(min(most(n, "swap", who) for who in ("model", "probe")) > 0.5 for n in names)),
            f"A linear probe: {each(lambda n: format(most(n, 'swap', 'linear probe'), '.0%'))}. Random vectors as long "
            f"move the model to that answer in {each(lambda n: format(most(n, 'random', 'model'), '.0%'))} at most.",
        ),
        Claim(
            "Concepts are read as well without LayerNorm as with it.",
            "not tested",
            f"new prompts that the model gets right: {c} {shown(c, 'probe', group='right')}, "
            f"{f} {shown(f, 'probe', group='right')}",
            common.yes_no(ends[0][0] <= ends[1][1] and ends[1][0] <= ends[0][1]),
            f"Of all new prompts: {shown(c, 'probe')} and {shown(f, 'probe')}; a linear probe "
            f"{shown(c, 'linear probe')} and {shown(f, 'linear probe')}; the model itself {shown(c, 'model')} and "
            f"{shown(f, 'model')}. Each probe is trained on what its model gets right.",
        ),
        Claim(
            "The evidence for a concept splits exactly over heads and MLPs without LayerNorm, and only then.",
            "not attempted",
            f"parts against what the readout loses without them: {each(lambda n: error(n, 'linear'))}",
            common.agreement(exact[f] < 1e-4, exact.drop(f).min() > 0.01),
            f"Linear probe; the encoder, linear around each prompt: {each(lambda n: error(n, 'encoder'))}.",
        ),
    ]


# ---------------------------------------------------------------------------------------------------------
# Measuring, drawing


def measure(name: str, model, args) -> tuple[pd.DataFrame, ...]:
    """Yardsticks, edits and errors of the evidence."""
    import pandas as pd

    from lnfree_interp import analogy_data, evaluate_probe, fit_probe, recall_data, swap_concepts
    from lnfree_interp.probe.evidence import evidence_of_data, pooled_error

    data = {"recall": recall_data, "analogies": analogy_data}[args.task](model, args.n, seed=args.seed)
    with cli.bar(f"{name}: fit", "step") as progress:
        probe = fit_probe(model, data, dim=args.dim, seed=args.seed, progress=progress)
    with cli.bar(f"{name}: yardsticks", "prompt") as progress:
        found = evaluate_probe(model, probe, data, progress=progress)
    layers = probe.layers[:: -max(1, -(-len(probe.layers) // POINTS))][::-1]  # the final stream among them
    with cli.bar(f"{name}: edits", "run") as progress:
        swap = swap_concepts(model, probe, data, layers=layers, n=args.edits, seed=args.seed, progress=progress)
    errors = []
    for readout in READOUTS:
        with cli.bar(f"{name}: evidence, {readout}", "prompt") as progress:
            parts = evidence_of_data(model, probe, data, args.evidence, readout=readout, progress=progress)
        row = dict(zip(("nmae", "low", "high"), pooled_error(parts, args.seed)))
        errors.append({"readout": readout} | row | {"prompts": len(parts)})
    facts = {"chance": found.chance, "trained_on": int(probe.facts["n_train"])}
    table = found.table().rename(columns={"at_1": "value"}).assign(**facts)
    swaps = swap.table().rename(columns={"to_other": "value"}).assign(prompts=len(swap.original))
    return tuple(t.assign(model=name)[["model", *t.columns]] for t in (table, swaps, pd.DataFrame(errors)))


def draw(table: pd.DataFrame, swaps: pd.DataFrame, errors: pd.DataFrame) -> go.Figure:
    """Above, what each yardstick finds; below, what a swap moves, and the errors of the evidence's parts."""
    from plotly.subplots import make_subplots

    from lnfree_interp.figures.style import MARK, colour, in_one, line, styled

    names, yardsticks = list(dict.fromkeys(table.model)), list(dict.fromkeys(table.yardstick))
    titles = [f"new {split}" for split in SPLITS]
    titles += ["swap: the model follows", "swap: the probe follows", "parts of the evidence: error"]
    fig = make_subplots(
        rows=2, cols=3, row_heights=[0.62, 0.38], vertical_spacing=0.12, horizontal_spacing=0.05, subplot_titles=titles
    )
    layers = sorted(set(swaps.point), key=lambda point: (point == "final", point != "final" and int(point[1:])))
    for i, name in enumerate(names):
        of, look = table[(table.model == name) & (table.group == "all")], {"name": name, "legendgroup": name}
        for col, split in enumerate(SPLITS, 1):
            rows = of[of.split == split].set_index("yardstick").reindex(yardsticks)
            fig.add_scatter(
                x=rows.value,
                y=[j + 0.22 * (i - (len(names) - 1) / 2) for j in range(len(yardsticks))],
                error_x=common.bars(rows.value, rows.low, rows.high),
                text=yardsticks,
                mode="markers",
                marker={"color": colour(i), "size": 7},
                showlegend=col == 1,
                hovertemplate=f"%{{text}}: %{{x:.1%}}<extra>{name}, new {split}</extra>",
                **look,
                row=1,
                col=col,
            )
        for col, who in enumerate(("model", "probe"), 1):
            for edit in ("swap", "random"):
                rows = swaps[(swaps.model == name) & (swaps.edit == edit) & (swaps.who == who)]
                dash = {} if edit == "swap" else {"dash": "dot", "width": 1}
                bars = {"error_y": common.bars(rows.value, rows.low, rows.high)} if edit == "swap" else {}
                fig.add_scatter(
                    x=rows.point,
                    y=rows.value,
                    **bars,
                    mode="lines+markers" if edit == "swap" else "lines",
                    line=line(i) | dash,
                    showlegend=False,
                    hovertemplate=f"%{{x}}: %{{y:.1%}}<extra>{name}, {edit}: {who}</extra>",
                    **look,
                    row=2,
                    col=col,
                )
        rows = errors[errors.model == name]
        fig.add_bar(
            x=rows.readout,
            y=rows.nmae,
            error_y=common.bars(rows.nmae, rows.low, rows.high),
            marker_color=colour(i),
            text=["0.00%" if value < 5e-5 else "" for value in rows.nmae],
            textposition="outside",
            cliponaxis=False,
            showlegend=False,
            hovertemplate=f"%{{x}} readout: error %{{y:.2%}}<extra>{name}</extra>",
            **look,
            row=2,
            col=3,
        )
    for col in (1, 2, 3):
        fig.add_vline(x=table.chance.iloc[0], line=MARK, row=1, col=col)
        ticks = {"tickvals": list(range(len(yardsticks))), "ticktext": yardsticks, "showticklabels": col == 1}
        fig.update_yaxes(range=[len(yardsticks) - 0.5, -0.5], zeroline=False, **ticks, row=1, col=col)
    percent = {"tickvals": [0, 0.5, 1], "tickformat": ".0%"}
    fig.update_xaxes(range=[-0.02, 1.02], **percent, row=1)
    for col in (1, 2):
        fig.update_xaxes(type="category", categoryorder="array", categoryarray=layers, row=2, col=col)
        fig.update_yaxes(range=[-0.04, 1.04], **percent, showticklabels=col == 1, row=2, col=col)
    fig.update_xaxes(title_text="stream that is edited", row=2, col=1)
    fig.update_xaxes(title_text="stream that is edited", row=2, col=2)
    fig.update_xaxes(title_text="readout", row=2, col=3)
    fig.update_yaxes(rangemode="tozero", tickformat=".0%", nticks=5, row=2, col=3)
    title = f"Concepts{in_one(names)}: answers found, edits, evidence [95% intervals; dotted: chance, random edits]"
    return styled(fig, title=title, height=640)


def flags(parser) -> None:
    add = parser.add_argument
    add("--task", default="recall", choices=tuple(TASKS), help="what the prompts ask for (recall)")
    add("--n", type=cli.positive_int, default=2000, metavar="N", help="how many prompts to make (2,000)")
    add("--dim", type=cli.positive_int, default=1024, metavar="D", help="signs of a concept's vector (1,024)")
    add("--edits", type=cli.positive_int, default=64, metavar="N", help="prompts whose stream is edited (64)")
    add("--evidence", type=cli.positive_int, default=24, metavar="N", help="prompts whose evidence is split (24)")


def run(args) -> common.Output:
    import pandas as pd

    measured, free = [], {}
    for name, model in cli.models(args):
        name = Path(name).stem if Path(name).is_file() else name
        measured.append(measure(name, model, args))
        free[name] = model.cfg.normalization_type is None
    table, swaps, errors = tables = [pd.concat(parts, ignore_index=True) for parts in zip(*measured)]
    said = []
    for family in common.families(free):
        own = [t[t.model.isin((family.original, family.control, family.free))] for t in tables]
        said += claims(family, *map(pd.concat, zip(own, *real_tables(args.out))))
    trained = ", ".join(f"{n} of {name}" for name, n in table.groupby("model", sort=False).trained_on.first().items())
    tested = table[table.group == "all"].groupby("split", sort=False).n.max()
    caption = (
        f"{args.n:,} prompts made here: {TASKS[args.task]}. A probe of {args.dim:,} signs for each model, trained on "
        f"prompts that the model gets right ({trained}); tested on "
        f"{', '.join(f'{n} with new {s}' for s, n in tested.items())}, among {round(1 / table.chance[0])} answers. "
        f"Edits: the stream at the last token of {swaps.prompts.max()} prompts that the model gets right, moved from "
        "the mean of one answer to that of another. Evidence: sum |part - loss| / sum |loss|, the loss being what the "
        f"readout falls by without a head or MLP, of {errors.prompts.max()} prompts, which intervals are over."
    )
    return common.Output(table, None, said, caption, {"swaps": swaps, "errors": errors})


def real_tables(out: Path) -> list[list[pd.DataFrame]]:
    """The tables of a real model, if there is one."""
    files = [out / REAL / f"concepts{more}.csv" for more in ("", "_swaps", "_errors")]
    return [[common.read_table(file) for file in files]] if all(file.is_file() for file in files) else []


ANALYSIS = common.Analysis(run, tokens=1, flags=flags, draw=draw, more=("swaps", "errors"))
main = ANALYSIS.main

if __name__ == "__main__":
    raise SystemExit(main())
