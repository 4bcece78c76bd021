"""The figures and the page of screening.py, all numbers from its table."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

import common
from real_model_page import markdown

from lnfree_interp import cli
from lnfree_interp.files import replace_file

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

REAL = "SmolLM2-135M"
ENOUGH = 0.05
"""The error left at which a screening is compared with running everything."""
LOWEST, HIGHEST, FEWEST = 0.005, 2.0, 0.5
SEEN = {"recall": "recall of the largest cells", "error": "error left / effects"}


def figure(table: pd.DataFrame, measure: str) -> go.Figure:
    """A panel per model and site; forwards on the x axis, a line per method."""
    from plotly.subplots import make_subplots

    from lnfree_interp.figures.style import COLOURS, MARK, log_axis, styled

    models, sites, methods = (list(table[c].unique()) for c in ("model", "site", "method"))
    panels, told = [(model, site) for model in models for site in sites], SEEN[measure]
    height = 110 + 220 * len(models)
    fig = make_subplots(
        rows=len(models),
        cols=len(sites),
        subplot_titles=[f"{model}, {site}" for model, site in panels],
        horizontal_spacing=0.05,
        vertical_spacing=62 / height if len(models) > 1 else 0,
    )
    for n, (model, site) in enumerate(panels):
        row, col = n // len(sites) + 1, n % len(sites) + 1
        part = table[(table.model == model) & (table.site == site)]
        for i, method in enumerate(methods):
            line = part[part.method == method]
            if not len(line):
                continue
            value, low, high = (line[f"{measure}{end}"] for end in ("", "_low", "_high"))
            if measure == "error":  # what is beyond the panel is drawn at its edge
                value, low, high = (x.clip(LOWEST, HIGHEST) for x in (value, low, high))
            hover = f"{method}: {told} %{{customdata[0]:.3f}} at %{{customdata[1]:.2f}} forwards"
            fig.add_scatter(
                x=line.forwards.clip(lower=FEWEST),  # what costs next to nothing is at the edge
                y=value,
                error_y=common.bars(value, low, high) | {"width": 0, "thickness": 0.7},
                customdata=line[[measure, "forwards"]],
                name=method,
                legendgroup=method,
                mode="lines+markers",
                marker={"size": 4},
                line={"color": COLOURS[max(0, i - 1) % len(COLOURS)], "width": 1.5, "dash": "solid" if i else "dot"},
                hovertemplate=f"{hover}<extra>{model}, {site}</extra>",
                row=row,
                col=col,
            )
        if len(part):
            fig.add_vline(x=part.everything.iloc[0], line=MARK, row=row, col=col)
        axis = log_axis((FEWEST, table.forwards.max()))
        fig.update_xaxes(title_text="forwards", title_standoff=4, **axis, row=row, col=col)
        fig.update_yaxes(title_text=told if col == 1 else None, title_standoff=4, row=row, col=col)
    names = set()
    fig.for_each_trace(lambda t: t.update(showlegend=not (t.name in names or names.add(t.name))))
    if measure == "recall":
        fig.update_yaxes(range=[0, 1.05])
    else:
        ticks = (0.01, 0.03, 0.1, 0.3, 1)
        bounds = [math.log10(0.9 * LOWEST), math.log10(1.1 * HIGHEST)]
        fig.update_yaxes(type="log", range=bounds, tickvals=ticks, ticktext=[f"{t:g}" for t in ticks])
    title = f"{told.capitalize()} against forwards, the estimate's included (vertical: running everything)"
    return styled(fig, title=title, height=height)


def number(row, measure: str) -> str:
    return f"{row[measure]:.2f} [{row[f'{measure}_low']:.2f}, {row[f'{measure}_high']:.2f}]"


def needed(line: pd.DataFrame, there: pd.Series) -> float:
    """The forwards from which on a line is where it should be; nan: nowhere."""
    reached = [x for i, x in enumerate(line.forwards) if there.iloc[i:].all()]
    return reached[0] if reached else float("nan")


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """One row per model, site and method: what the estimate costs, what it finds alone, and what more it takes."""
    import pandas as pd

    rows = []
    for key, line in table.groupby(["model", "site", "method"], sort=False):
        first = line.iloc[0]
        row = dict(zip(("model", "site", "method"), key)) | {"cost": first.cost, "everything": first.everything}
        row |= {"recall": number(first, "recall"), "error": number(first, "error")}
        row["to_recall"] = needed(line, line.recall == 1)
        row["to_error"] = needed(line, line.error <= ENOUGH)
        rows.append(row | {"covered": line.iloc[-1].get("covered"), "drawn": line.iloc[-1].get("drawn")})
    return pd.DataFrame(rows)


def body(table: pd.DataFrame, args, folder: str) -> str:
    short, sections = summary(table), []
    for model, of_model in short.groupby("model", sort=False):
        rows = []
        for r in of_model.itertuples():
            share = f"{r.covered:.0%} ({r.drawn:.0f})" if r.covered == r.covered and r.covered is not None else ""
            rows.append([f"`{r.site}`" if r.site != "edges" else "edges", r.method, f"{r.cost:.1f}", r.recall, r.error])
            rows[-1] += [f"{x:.1f}" if x == x else "" for x in (r.to_recall, r.to_error, r.everything)] + [share]
        of = table[table.model == model].iloc[0]
        header = [
            "",
            "method",
            "its forwards",
            "recall alone",
            "error alone",
            "to recall all",
            f"to {ENOUGH:.0%} error",
        ]
        header += ["all exact", "intervals hold (drawn)"]
        sections.append(f"## {model}, {of.prompts} {of.pairs} pairs\n\n{markdown(header, rows)}\n")
    pictures = [f"![{told[:1].upper()}{told[1:]} against forwards]({folder}/{m}.png)" for m, told in SEEN.items()]
    figures = "\n\n".join([*pictures, f"All numbers: [table]({folder}/curves.csv)."])
    real = ""
    if args.real:
        real = f" Of {REAL} {args.real_layers} layers are looked at, and {args.edges} of its edges, drawn at random."
    return f"""# Screen, flag, fix

Written by `python analyses/screening.py`. An estimate says what every cell, or every edge, does; the cells with the
largest scores are run exactly; the rest stay estimates (`screen`, `screen_edges`). How much of that pays?

A *forward* is the model run once on every clean prompt, all logits included; what takes a part of its floating-point
operations is that part of a forward. Estimates are counted as they run, exact runs at their price, which is a bound and
what a budget must hold; both are on the x axis. *Recall*: the share of the {args.top} cells of the largest |mean exact
effect| over prompts that are among the {args.top} largest of what screening says. *Error*: sum |said - exact| / sum
|exact|, effects as shares of each prompt's total effect. 95% intervals over prompts, for plans made once. Cells are run
on all prompts or on none.{real}

Flags: *gradient*, *integrated*, *RelP* and *AtP\\** run the largest estimates; *gradient against integrated* the
largest differences of the two; *second order* (one Hessian-vector product per layer where joint, else one per cell; for
edges one for all) the largest corrections, |estimate| x reliability, and *joint, by reliability* the largest
reliabilities alone, as arXiv 2606.09899 has it. *No estimate* runs cells at random and says 0 of the rest.

{figures}

{said(short)}

In the tables: *recall alone* and *error alone* are the estimate's before anything is run exactly; *to recall all* and
*to {ENOUGH:.0%} error* the forwards from which on every larger budget has it; *all exact* what running all cells costs
without any estimate: where a method takes more than that, screening with it is a loss. *Intervals hold*: how often the
interval of the error left holds what is left, over random samples, at a budget of about a third of all cells; in
brackets how many cells are drawn.

{chr(10).join(sections)}"""


def said(short: pd.DataFrame) -> str:
    """Whether screening pays, in words."""
    pays = short[(short.cost > 0) & (short.to_error < short.everything)]
    lines = []
    for site, part in short[short.cost > 0].groupby("site", sort=False):
        best = part.loc[(part.to_error / part.everything).groupby(part.model).idxmin().dropna()]
        saves = ", ".join(
            f"{r.everything / r.to_error:.1f} times cheaper on {r.model} ({r.method})"
            if r.to_error < r.everything
            else f"no gain on {r.model}"
            for r in best.itertuples()
        )
        name = site if site == "edges" else f"`{site}`"
        lines.append(f"- {name}: to an error of {ENOUGH:.0%}, against running everything: {saves}.")
    never = [m for m in short.method.unique() if m != "no estimate" and m not in set(pays.method)]
    if never:
        lines.append(f"- Nowhere cheaper than running everything: {', '.join(never)}.")
    for site, part in short[short.method == "gradient"].groupby("site", sort=False):
        alone = "; ".join(f"{r.model} {r.error}" for r in part.itertuples())
        lines.append(f"- The gradient's error alone, {site if site == 'edges' else f'`{site}`'}: {alone}.")
    return "\n".join(lines)


def figures_of(out: Path) -> dict[str, go.Figure]:
    """name -> figure, all drawn from the table in `out`."""
    table = common.read_table(out / "curves.csv")
    return {measure: figure(table, measure) for measure in SEEN}


def write(table: pd.DataFrame, args, out: Path, where: Path) -> None:
    """Figures and table into `out`, the page to `where`."""
    cli.save(out, "curves", table)
    common.save_figures({out / name: figure for name, figure in figures_of(out).items()})
    where.parent.mkdir(parents=True, exist_ok=True)
    text = body(table, args, Path(os.path.relpath(out, where.parent)).as_posix()).rstrip() + "\n"
    replace_file(where, lambda path: path.write_text(text))
    cli.show(summary(table).drop(columns=["recall", "error"]), "Screening")
    print(f"\nwrote {where}")
