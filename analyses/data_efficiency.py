"""How much data the removal needs, and how that grows with model size.

python analyses/data_efficiency.py --text train.txt.gz
python analyses/data_efficiency.py --model small-model medium-model --text train.txt.gz
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import common
import numpy as np
import runs
from common import Claim
from runs import CONTROL, PAPERS

from lnfree_interp import cli
from lnfree_interp.schedule import PRESETS

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

# Parameters of the published sizes; their tokens are those of the schedules.
PARAMETERS = {"small": 124.4e6, "medium": 354.8e6, "large": 774.0e6, "xl": 1557.6e6}
GAP = 0.1  # nats: the published models end below this


def published() -> pd.DataFrame:
    """Parameters and fine-tuning tokens of the published models (P2)."""
    import pandas as pd

    tokens = [PRESETS[size].steps * PRESETS[size].tokens_per_step for size in PARAMETERS]
    return pd.DataFrame(
        {"model": [f"GPT-2 {s}" for s in PARAMETERS], "parameters": PARAMETERS.values(), "tokens": tokens}
    )


def exponent(parameters, tokens) -> float:
    """a in tokens ~ parameters^a, least squares in logarithms."""
    return float(np.polyfit(np.log(np.asarray(parameters, float)), np.log(np.asarray(tokens, float)), 1)[0])


def tokens_needed(tokens, gaps, target: float = GAP) -> float:
    """Where the gap falls to the target, interpolated in log tokens; nan if it never does."""
    tokens, gaps = np.asarray(tokens, float), np.asarray(gaps, float)
    below = np.flatnonzero(gaps <= target)
    if not len(below):
        return float("nan")
    i = below[0]
    if i == 0:
        return float(tokens[0])
    share = (gaps[i - 1] - target) / (gaps[i - 1] - gaps[i])
    return float(np.exp(np.log(tokens[i - 1]) + share * np.log(tokens[i] / tokens[i - 1])))


def claims(table: pd.DataFrame, needed: pd.DataFrame) -> list[Claim]:
    """table: model, tokens, gap, sd; needed: model, parameters, tokens (to come within GAP of the control), at_most
    (whether the shortest runs came that near already)."""
    paper = published()
    slope = exponent(paper.parameters, paper.tokens)
    reached = needed.dropna()
    said = []
    for name, part in table.groupby("model", sort=False):
        values = ", ".join(
            f"{r.tokens / 1e6:.2g}M {r.gap:+.3f}" + (f" (sd {r.sd:.3f})" if r.sd == r.sd else "")
            for r in part.itertuples()
        )
        falling = bool((np.diff(part.sort_values("tokens").gap) < 0).all())
        said.append(
            Claim(
                "More fine-tuning closes the gap to the control, and a small part of the training data is enough (P2).",
                "small 157M tokens for +0.0645; 1.3 tokens per parameter (xl 0.3)",
                f"{name}, tokens and gap: {values}",
                common.agreement(falling, bool((part.gap <= GAP).any())),
            )
        )
    if len(reached) > 1:
        ours = exponent(reached.parameters, reached.tokens)
        said.append(
            Claim(
                "The data needed grows more slowly than the model (P2).",
                f"12 times the parameters, 2.6 times the tokens: exponent {slope:.2f}",
                f"exponent {ours:.2f} over {len(reached)} sizes",
                common.yes_no(ours < 1),
            )
        )
    else:
        if len(reached):
            row = reached.iloc[0]
            predicted = paper.tokens[0] * (row.parameters / paper.parameters[0]) ** slope
            ours = (
                f"{row.model} ({row.parameters / 1e6:.1f}M parameters) comes within {GAP} nats of the control after "
                f"{'at most ' if row.at_most else ''}{row.tokens / 1e6:.2g}M tokens, "
                f"{row.tokens / row.parameters:.2f} per parameter; the papers' line, "
                f"drawn on to its size, says {predicted / 1e6:.0f}M"
            )
        else:
            ours = f"the gap is not below {GAP} nats at any length tried"
        said.append(
            Claim(
                "The data needed grows more slowly than the model (P2).",
                f"12 times the parameters, 2.6 times the tokens: exponent {slope:.2f}",
                ours,
                "not tested",
                "One model is one size. The papers' lengths were chosen, not the least that would do, so the "
                "line's height says less than its slope. Give models of several sizes with --model.",
            )
        )
    return said


def figure(table: pd.DataFrame, needed: pd.DataFrame) -> go.Figure:
    from plotly.subplots import make_subplots

    from lnfree_interp.figures.style import colour, styled

    fig = make_subplots(
        cols=2,
        horizontal_spacing=0.13,
        subplot_titles=("gap against fine-tuning tokens, mean and sd over seeds", "tokens against parameters"),
    )
    for i, (name, part) in enumerate(table.groupby("model", sort=False)):
        bars = {"type": "data", "array": part.sd.fillna(0)}
        fig.add_scatter(
            x=part.tokens,
            y=part.gap,
            error_y=bars,
            mode="lines+markers",
            name=name,
            line={"color": colour(i + 2), "width": 2},
            row=1,
            col=1,
        )
    fig.add_hline(y=GAP, line={"dash": "dot", "color": "#999999"}, row=1, col=1)
    fig.add_annotation(
        x=1, xref="x domain", y=np.log10(GAP), yanchor="top", text=f"{GAP} nats", showarrow=False, row=1, col=1
    )
    paper = published()
    slope = exponent(paper.parameters, paper.tokens)
    ends = np.array([needed.parameters.min(), paper.parameters.max()])
    scale = np.exp(np.log(paper.tokens).mean() - slope * np.log(paper.parameters).mean())
    fig.add_scatter(
        x=ends,
        y=scale * ends**slope,
        mode="lines",
        line={"dash": "dot", "color": "#999999"},
        name=f"parameters^{slope:.2f}",
        row=1,
        col=2,
    )
    fig.add_scatter(
        x=paper.parameters,
        y=paper.tokens,
        text=paper.model,
        mode="markers+text",
        textposition=["bottom right", "top left", "bottom right", "top left"],
        marker={"color": "#555555", "size": 9, "symbol": "diamond"},
        name="published (P2)",
        row=1,
        col=2,
    )
    for i, row in enumerate(needed.itertuples()):
        if row.tokens == row.tokens:
            fig.add_scatter(
                x=[row.parameters],
                y=[row.tokens],
                text=[f"{row.model}, {'at most, ' if row.at_most else ''}to {GAP} nats"],
                mode="markers+text",
                textposition="middle right",
                marker={"color": colour(i + 2), "size": 10},
                showlegend=False,
                row=1,
                col=2,
            )
    fig.update_xaxes(title_text="fine-tuning tokens", type="log", row=1, col=1)
    fig.update_yaxes(title_text="LN-free minus control (nats per token)", type="log", dtick="D2", row=1, col=1)
    fig.update_xaxes(title_text="parameters", type="log", dtick=1, range=[np.log10(ends[0]) - 0.3, 10], row=1, col=2)
    fig.update_yaxes(title_text="fine-tuning tokens", type="log", dtick=1, row=1, col=2)
    fig.update_layout(legend={"orientation": "h", "y": -0.2, "x": 0})
    return styled(fig, title="Data needed to remove LayerNorm", height=460)


def flags(parser) -> None:
    runs.flags(parser)
    parser.add_argument(
        "--steps",
        type=cli.positive_int,
        nargs="+",
        default=[40, 80, 120, 240],
        help="lengths of the runs (40 80 120 240)",
    )


def wanted(args) -> list[runs.Run]:
    found = []
    for name in args.model:
        for steps in sorted(args.steps):
            schedule = runs.base_schedule(args, steps)
            for seed in range(args.seeds):
                found += [runs.Run(name, v, s, seed) for v, s in ((PAPERS, schedule), (CONTROL, schedule.vanilla()))]
    return found


def run(args) -> common.Output:
    import pandas as pd

    from lnfree_interp.finetune import load_trainable

    finished = list(runs.perform(args, wanted(args)).values())
    rows = []
    for name in args.model:
        for steps in sorted(args.steps):
            of = [f for f in finished if f.run.model == name and f.run.schedule.steps == steps]
            free = np.array([f.loss for f in of if f.events])
            control = np.array([f.loss for f in of if not f.events])
            gap = free - control
            sd = gap.std(ddof=1) if len(gap) > 1 else np.nan
            tokens = steps * args.step_tokens
            rows.append(
                {
                    "model": cli.display_name(name),
                    "steps": steps,
                    "tokens": tokens,
                    "ln_free": free.mean(),
                    "control": control.mean(),
                    "gap": gap.mean(),
                    "sd": sd,
                    "seeds": len(gap),
                }
            )
    table, needed = pd.DataFrame(rows), []
    for name in args.model:
        part = table[table.model == cli.display_name(name)]
        parameters = load_trainable(name)[0].num_parameters()
        tokens = tokens_needed(part.tokens, part.gap)
        needed.append(
            {
                "model": cli.display_name(name),
                "parameters": parameters,
                "tokens": tokens,
                "at_most": tokens == part.tokens.min(),  # near enough in the shortest runs already
            }
        )
    needed = pd.DataFrame(needed)
    caption = (
        f"{args.seeds} seeds per length; each run is a whole schedule, shorter or longer, against the control of "
        "the same length and data; held-out text."
    )
    return common.Output(table, figure(table, needed), claims(table, needed), caption)


ANALYSIS = common.Analysis(run, tokens=1, flags=flags, trains=True)
main = ANALYSIS.main

if __name__ == "__main__":
    raise SystemExit(main())
