"""Which order to remove the LayerNorms in.

python analyses/removal_order.py --text train.txt.gz
python analyses/removal_order.py --model gpt2 --preset small --steps 300 --step-tokens 524288 --text openwebtext.txt.gz
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import common
import numpy as np
import runs
from common import Claim
from runs import CONTROL, PAPERS

from lnfree_interp import cli
from lnfree_interp.schedule import KINDS

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

ORDERS = {
    PAPERS: {},
    "ln_f first": {"order": ("ln_f", "ln_2", "qk", "v")},
    "ln_1 before ln_2": {"order": ("qk", "v", "ln_2", "ln_f")},
    "layers backward": {"layers": "backward"},
    "layer by layer": {"by": "layer"},
    "layer by layer, backward": {"by": "layer", "layers": "backward"},
    "all at once": {"gaps": dict.fromkeys(KINDS, 0)},
}
# Colours that can be told apart, and dashes where two are near: in the table's order, the control last.
LOOKS = (
    ("#222222", "solid"),
    ("#0072B2", "solid"),
    ("#56B4E9", "dash"),
    ("#009E73", "solid"),
    ("#CC79A7", "solid"),
    ("#E69F00", "dash"),
    ("#D55E00", "solid"),
    ("#777777", "dot"),
)
SMALL = 0.01  # nats: differences below this are called even


def claims(losses: Mapping[str, list[float]], rises: Mapping[str, list[float]]) -> list[Claim]:
    """losses, rises: variant -> one number per seed, aligned; nan for a run that diverged.

    Rises are the most that the training loss lay above the control's in the same step (nats).
    """
    base = np.array(losses[PAPERS])

    def against(variant: str) -> np.ndarray:
        return np.array(losses[variant]) - base

    def said(variant: str) -> str:
        values = against(variant)
        lost = int(np.isnan(losses[variant]).sum())
        diverged = f", {lost} of {len(values)} runs diverged" if lost else ""
        return f"{variant} {mean_sd(values)}{diverged} (largest rise {np.nanmean(rises[variant]):+.2f})"

    def worse(variant: str) -> bool:
        values = against(variant)
        return bool(np.isnan(losses[variant]).any() or (values.min() > 0 and values.mean() > SMALL))

    def even(variant: str) -> bool:
        return bool(abs(np.nanmean(against(variant))) <= max(SMALL, 2 * np.nanstd(against(variant))))

    def verdict(variant: str) -> str:
        return "yes" if worse(variant) else "partly" if np.nanmean(against(variant)) > SMALL else "no"

    reference = f"{PAPERS} {mean_sd(base, sign=False)} (largest rise {np.nanmean(rises[PAPERS]):+.2f})"
    control = f"over the control {mean_sd(base - np.array(losses[CONTROL]))}"
    return [
        Claim(
            "Removing ln_f first is worse (P1).",
            "stuck at 3.138 after 400 iterations, against 3.014 in the end for the usual order",
            f"{said('ln_f first')}; {reference}, {control}",
            verdict("ln_f first"),
        ),
        Claim(
            "Layers forward or backward: the losses differ on the way and end even (P1).",
            "ln_2 removed from layer 0 up or from layer 11 down: even in the end",
            said("layers backward"),
            common.yes_no(even("layers backward")),
        ),
        Claim(
            "ln_2 is easier to begin with than ln_1 (P1).",
            "observed, without figures",
            said("ln_1 before ln_2"),
            verdict("ln_1 before ln_2"),
        ),
        Claim(
            "All LayerNorms of a kind first, or all of a layer first? (P1 did not try the second.)",
            "no figures",
            f"{said('layer by layer')}; {said('layer by layer, backward')}",
            "open question",
        ),
        Claim(
            "Changing too much at once can lift the loss so far that it never recovers (P1).",
            "around 8.0, usually for good",
            said("all at once"),
            verdict("all at once"),
        ),
    ]


def mean_sd(values, *, sign: bool = True) -> str:
    values = np.asarray(values, float)
    if np.isnan(values).all():
        return "no run that ended"
    mean, sd = (np.nanmean(values), np.nanstd(values, ddof=1) if (~np.isnan(values)).sum() > 1 else float("nan"))
    return (f"{mean:+.4f}" if sign else f"{mean:.4f}") + ("" if np.isnan(sd) else f" (sd {sd:.4f})")


def draw(table: pd.DataFrame, curves: pd.DataFrame) -> go.Figure:
    from plotly.subplots import make_subplots

    from lnfree_interp.figures.style import styled

    titles = ("training loss minus the control's,<br>mean over seeds", "loss in the end, each seed and mean")
    fig = make_subplots(cols=2, column_widths=[0.56, 0.44], horizontal_spacing=0.26, subplot_titles=titles)
    looks = dict(zip(table.order, LOOKS))
    for variant, part in curves.groupby("order", sort=False):
        name, (colour, dash) = str(variant), looks[variant]
        hover = "step %{x}: %{y:+.4f} nats per token<extra>" + name + "</extra>"
        curve = {"x": part.step, "y": part.excess, "line": {"color": colour, "dash": dash, "width": 2}}
        fig.add_scatter(**curve, name=name, mode="lines", hovertemplate=hover, legendgroup=name, row=1, col=1)
    for row in table.to_dict("records"):
        name, (colour, _) = row["order"], looks[row["order"]]
        ends = [row[column] for column in table.columns if re.fullmatch(r"seed\d+", column)]
        look = {"mode": "markers", "showlegend": False, "legendgroup": name}
        marker, hover = (
            {"color": colour, "size": 8, "opacity": 0.6},
            "%{y}: %{x:.4f} nats per token<extra>%{text}</extra>",
        )
        seeds = [f"seed {i}" for i in range(len(ends))]
        fig.add_scatter(
            x=ends, y=[name] * len(ends), text=seeds, marker=marker, hovertemplate=hover, **look, row=1, col=2
        )
        mean = {"color": colour, "size": 16, "symbol": "line-ns", "line": {"width": 3, "color": colour}}
        fig.add_scatter(
            x=[row["loss"]], y=[name], text=["mean"], marker=mean, hovertemplate=hover, **look, row=1, col=2
        )
    fig.update_xaxes(title_text="step", rangemode="tozero", row=1, col=1)
    fig.update_yaxes(title_text="nats per token", row=1, col=1)
    fig.update_xaxes(title_text="nats per token, held-out text", nticks=5, row=1, col=2)
    fig.update_yaxes(autorange="reversed", automargin=True, row=1, col=2)
    return styled(fig, title="Orders in which LayerNorms are removed: loss on the way and in the end", height=430)


def excess_curves(by_variant: Mapping[str, list[runs.Finished]]) -> pd.DataFrame:
    """order, step, excess: training loss over the control's, a mean of five logged steps and of the seeds."""
    import pandas as pd

    control, tables = curves(by_variant[CONTROL]), []
    for variant, finished in by_variant.items():
        if variant != CONTROL:
            excess = (curves(finished) - control).rolling(5, min_periods=1).mean().mean(axis=1)
            tables.append(pd.DataFrame({"order": variant, "step": excess.index, "excess": excess.to_numpy()}))
    return pd.concat(tables, ignore_index=True)


def curves(finished: list[runs.Finished]) -> pd.DataFrame:
    """Training loss, step x seed."""
    import pandas as pd

    return pd.DataFrame({f.run.seed: pd.Series(dict(zip(f.steps, f.ce))) for f in finished})


def flags(parser) -> None:
    runs.flags(parser)
    parser.add_argument("--steps", type=cli.positive_int, default=120, help="steps of each run (120)")


def wanted(args) -> list[runs.Run]:
    schedule = runs.base_schedule(args, args.steps)
    schedules = {name: replace(schedule, **changes) for name, changes in ORDERS.items()} | {CONTROL: schedule.vanilla()}
    return [runs.Run(args.model[0], v, s, seed) for seed in range(args.seeds) for v, s in schedules.items()]


def run(args) -> common.Output:
    import pandas as pd

    if len(args.model) != 1:
        raise ValueError(f"--model {' '.join(args.model)}: one model is needed here")
    finished = list(runs.perform(args, wanted(args)).values())
    by_variant = {
        v: sorted((f for f in finished if f.run.variant == v), key=lambda f: f.run.seed) for v in (*ORDERS, CONTROL)
    }
    losses = {v: [f.loss for f in fs] for v, fs in by_variant.items()}
    rises = {v: [runs.largest_rise(f, c) for f, c in zip(fs, by_variant[CONTROL])] for v, fs in by_variant.items()}
    base = np.array(losses[PAPERS])
    table = pd.DataFrame(
        [
            {
                "order": v,
                "loss": np.nanmean(x) if not np.isnan(x).all() else np.nan,
                "sd": np.nanstd(x, ddof=1) if len(x) > 1 else np.nan,
                "minus_papers": np.nanmean(x - base),
                "sd_of_difference": np.nanstd(x - base, ddof=1) if len(x) > 1 else np.nan,
                "largest_rise": np.nanmean(rises[v]),
                "diverged": int(np.isnan(x).sum()),
                **{f"seed{i}": value for i, value in enumerate(x)},
            }
            for v, x in ((v, np.array(x, float)) for v, x in losses.items())
        ]
    )
    schedule = finished[0].run.schedule
    name = cli.display_name(args.model[0])
    caption = (
        f"{name}, {args.seeds} seeds, {schedule.steps} steps of {schedule.tokens_per_step:,} tokens each; seeds change "
        "the order of the training data, and differences are taken within a seed. In every order the training loss "
        f"lay at most {max(map(np.nanmax, rises.values())):.2f} nats above the control's on the way."
    )
    return common.Output(table, None, claims(losses, rises), caption, {"curves": excess_curves(by_variant)})


ANALYSIS = common.Analysis(run, tokens=1, flags=flags, trains=True, draw=draw, more=("curves",))
main = ANALYSIS.main

if __name__ == "__main__":
    raise SystemExit(main())
