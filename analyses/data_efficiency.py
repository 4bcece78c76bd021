"""How much data the removal needs, and how that grows with model size.

python analyses/data_efficiency.py --text train.txt.gz
python analyses/data_efficiency.py --model small-model medium-model --text train.txt.gz
"""

from __future__ import annotations

import math
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


def needed_of(table: pd.DataFrame) -> pd.DataFrame:
    """model, parameters, the tokens it takes to come within GAP, and whether the shortest runs did so already."""
    import pandas as pd

    rows = []
    for name, part in table.groupby("model", sort=False):
        tokens = tokens_needed(part.tokens, part.gap)
        row = {"model": name, "parameters": part.parameters.iloc[0], "tokens": tokens}
        rows.append(row | {"at_most": tokens == part.tokens.min()})
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame) -> go.Figure:
    from plotly.subplots import make_subplots

    from lnfree_interp.figures.style import MARK, colour, log_axis, styled

    needed, paper = needed_of(table), published()
    titles = ("gap after fine-tuning, mean and sd over seeds", f"tokens to a gap of {GAP} nats, and the published")
    fig = make_subplots(cols=2, horizontal_spacing=0.14, subplot_titles=titles)
    for i, (name, part) in enumerate(table.groupby("model", sort=False)):
        bars, hover = {"type": "data", "array": part.sd.fillna(0)}, "%{x:,.3s} tokens: %{y:+.4f} nats<extra>" + name
        curve = {"x": part.tokens, "y": part.gap, "error_y": bars, "mode": "lines+markers", "name": name}
        look = {"line": {"color": colour(i + 2), "width": 2}, "hovertemplate": hover + "</extra>", "legendgroup": name}
        fig.add_scatter(**curve, **look, row=1, col=1)
    fig.add_hline(y=GAP, line=MARK, row=1, col=1)
    text = {"text": f"{GAP} nats", "showarrow": False, "font_size": 11}
    fig.add_annotation(x=1, xref="x domain", xanchor="right", y=math.log10(GAP), yanchor="bottom", **text, row=1, col=1)
    slope = exponent(paper.parameters, paper.tokens)
    ends = np.array([needed.parameters.min(), paper.parameters.max()])
    scale = np.exp(np.log(paper.tokens).mean() - slope * np.log(paper.parameters).mean())
    name = f"parameters<sup>{slope:.2f}</sup>"
    fig.add_scatter(x=ends, y=scale * ends**slope, mode="lines", line=MARK, name=name, hoverinfo="skip", row=1, col=2)
    hover = "%{text}: %{x:,.3s} parameters, %{y:,.3s} tokens<extra>published</extra>"
    dots = {"x": paper.parameters, "y": paper.tokens, "text": paper.model, "hovertemplate": hover}
    marker = {"color": "#555555", "size": 9, "symbol": "diamond-open"}
    fig.add_scatter(**dots, mode="markers", marker=marker, name="published GPT-2 sizes", row=1, col=2)
    for i, row in enumerate(needed.itertuples()):
        if row.tokens == row.tokens:
            most = "at most " * row.at_most
            hover = f"{row.model}: %{{x:,.3s}} parameters, {most}%{{y:,.3s}} tokens to {GAP} nats<extra></extra>"
            marker = {"color": colour(i + 2), "size": 10, "symbol": "triangle-down" if row.at_most else "circle"}
            dot = {"x": [row.parameters], "y": [row.tokens], "mode": "markers", "marker": marker}
            name = f"{row.model}{' (at most)' if row.at_most else ''}"
            fig.add_scatter(**dot, name=name, hovertemplate=hover, row=1, col=2)
    gaps = [*(table.gap - table.sd.fillna(0)), *(table.gap + table.sd.fillna(0)), GAP]
    fig.update_xaxes(title_text="fine-tuning tokens", **log_axis(table.tokens), row=1, col=1)
    fig.update_yaxes(title_text="LN-free minus control (nats per token)", **log_axis(gaps), row=1, col=1)
    every = [*paper.tokens, *needed.tokens.dropna()]
    fig.update_xaxes(title_text="parameters", **log_axis(ends), row=1, col=2)
    fig.update_yaxes(title_text="fine-tuning tokens", title_standoff=4, **log_axis(every), row=1, col=2)
    return styled(fig, title="Data needed to remove LayerNorm", height=420)


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
        parameters = load_trainable(name)[0].num_parameters()
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
                    "parameters": parameters,
                    "steps": steps,
                    "tokens": tokens,
                    "ln_free": free.mean(),
                    "control": control.mean(),
                    "gap": gap.mean(),
                    "sd": sd,
                    "seeds": len(gap),
                }
            )
    table = pd.DataFrame(rows)
    needed = needed_of(table)
    caption = (
        f"{args.seeds} seeds per length; each run is a whole schedule, shorter or longer, against the control of "
        "the same length and data; held-out text."
    )
    return common.Output(table, None, claims(table, needed), caption)


ANALYSIS = common.Analysis(run, tokens=1, flags=flags, trains=True, draw=draw)
main = ANALYSIS.main

if __name__ == "__main__":
    raise SystemExit(main())
