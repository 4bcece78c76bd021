"""Training curve of LayerNorm removal, with the removals marked.

python analyses/training_curve.py --text train.txt.gz
python analyses/training_curve.py --run DIR [DIR]      (runs of python -m lnfree_interp.finetune)
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import common
import runs
from common import Claim
from runs import CONTROL, PAPERS

from lnfree_interp import cli

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

COLOURS = {
    "ln_2": "#009E73",
    "qk": "#E69F00",
    "v": "#CC79A7",
    "ln_f": "#222222",
    "eot": "#999999",
    "position0": "#555555",
    "massive": "#56B4E9",
}
# A treatment's end is no removal.
DASHES = {kind: "dot" if kind in ("eot", "position0", "massive") else "solid" for kind in COLOURS}
NAMES = {
    "ln_2": "ln_2 (MLP)",
    "qk": "ln_1 for q, k",
    "v": "ln_1 for v",
    "ln_f": "ln_f",
    "eot": "EOT treatment ends",
    "position0": "position-0 treatment ends",
    "massive": "massive tokens' treatment ends",
}


def claims(curve: pd.DataFrame, events: list) -> list[Claim]:
    """curve: columns step, removal, control (training cross-entropy); events: (step, site, layer)."""
    excess = (curve.removal - curve.control).set_axis(curve.step)
    if not events or excess.isna().all():
        return []
    steps = {kind: [step for step, site, _ in events if site == kind] for kind in NAMES}
    rises = {kind: rise(excess, at) for kind, at in steps.items() if at}
    end = excess.iloc[-max(1, len(excess) // 20) :].mean()
    largest = max(rises, key=rises.get)
    return [
        Claim(
            "Each removal lifts the loss, training brings it back, and the end is close to the control's (P1, P2).",
            "small: 3.0 up to 3.5 and at times 5 at a removal; in the end +0.025 (OpenWebText, P1)",
            f"on the same batches at most {excess.max():+.3f} above the control, in the end {end:+.3f}",
            common.agreement(excess.max() > 2 * max(end, 0), end < 0.1),
        ),
        Claim(
            "The largest jumps come with ln_2, the first kind to go (P2); the first removal is the hardest (P1).",
            "largest loss spikes during removal of ln_2",
            "rise over the control, from before a kind's first removal to its largest: "
            + ", ".join(f"{NAMES[kind]} {value:+.3f}" for kind, value in rises.items()),
            common.yes_no(largest == "ln_2"),
            "" if largest == "ln_2" else f"The largest rise comes with: {NAMES[largest]}.",
        ),
    ]


def rise(excess: pd.Series, steps: list[int], *, width: int = 10) -> float:
    """Largest excess from the first of the steps to `width` after the last, over the mean of `width` before (nats)."""
    before = excess[(excess.index > steps[0] - width) & (excess.index <= steps[0])].dropna()
    during = excess[(excess.index > steps[0]) & (excess.index <= steps[-1] + width)]
    return during.max() - (before.mean() if len(before) else 0.0)


def draw(table: pd.DataFrame) -> go.Figure:
    """Training losses of both runs, below it their difference; steps at which something is removed are marked."""
    from plotly.subplots import make_subplots

    from lnfree_interp.figures.style import colour, styled

    curve, both = table[table.removal.notna()], table.control.notna().any()
    titles = ("training loss", "LayerNorm removed, minus the control") if both else None
    fig = make_subplots(
        rows=2 if both else 1,
        shared_xaxes=True,
        vertical_spacing=0.11,
        row_heights=[0.58, 0.42] if both else None,
        subplot_titles=titles,
    )
    look, free = {"mode": "lines", "row": 1, "col": 1}, {"color": colour(2), "width": 1.8}
    hover = "step %{x}: %{y:.4f} nats per token<extra>"
    if both:
        control = {"color": colour(1), "width": 1.8, "dash": "dash"}
        hovered = {"hovertemplate": f"{hover}control</extra>"}
        fig.add_scatter(x=curve.step, y=curve.control, name="control, nothing removed", line=control, **hovered, **look)
    hovered = {"hovertemplate": f"{hover}LayerNorm removed</extra>"}
    fig.add_scatter(x=curve.step, y=curve.removal, name="LayerNorm removed", line=free, **hovered, **look)
    if both:
        hovered = {"hovertemplate": "step %{x}: %{y:+.4f} nats per token<extra>removed minus control</extra>"}
        difference = {"x": curve.step, "y": curve.removal - curve.control, "line": free, "mode": "lines"}
        fig.add_scatter(**difference, **hovered, showlegend=False, row=2, col=1)
        fig.add_hline(y=0, line={"color": "#999999", "width": 1}, row=2, col=1)
        fig.update_yaxes(title_text="nats per token", row=2, col=1)
    named = zip(table.step, table.removed.fillna(""))
    events = [(step, name.split()[0]) for step, names in named if names for name in names.split(", ")]
    for kind, name in NAMES.items():
        steps = [step for step, site in events if site == kind]
        for step in steps:
            fig.add_vline(x=step, line={"color": COLOURS[kind], "width": 1, "dash": DASHES[kind]}, layer="below")
        if steps:
            line = {"color": COLOURS[kind], "width": 2, "dash": DASHES[kind]}
            fig.add_scatter(x=[None], y=[None], mode="lines", name=name, line=line, showlegend=True)
    fig.update_yaxes(title_text="nats per token", row=1, col=1)
    fig.update_xaxes(title_text="step", rangemode="tozero", row=2 if both else 1, col=1)
    title = "Training loss while LayerNorms are removed (vertical lines: what is removed when)"
    return styled(fig, title=title, height=500 if both else 380)


def from_directory(directory: Path) -> tuple[dict[int, float], list, str]:
    """Step -> training cross-entropy, events and name of a run of lnfree_interp.finetune."""
    from lnfree_interp.finetune import last_checkpoint
    from lnfree_interp.finetune.saving import state_in

    found = directory / "final" if (directory / "final").is_dir() else last_checkpoint(directory)
    state = {} if found is None else state_in(found)
    if not state.get("ce"):
        raise ValueError(f"--run {directory} holds no run: a checkpoint with removal.json is missing")
    events = [tuple(event) for event in state["progress"]["happened"]]
    return dict(enumerate(state["ce"], 1)), events, directory.name


def flags(parser) -> None:
    runs.flags(parser)
    parser.add_argument(
        "--run", nargs="+", metavar="DIR", help="finished runs: with removal, and control if there is one"
    )
    parser.add_argument("--steps", type=cli.positive_int, default=120, help="steps of the runs made here (120)")


def run(args) -> common.Output:
    import pandas as pd

    if args.run:
        found = [from_directory(Path(directory)) for directory in args.run]
        with_events = [f for f in found if f[1]]
        if len(with_events) != 1 or len(found) > 2:
            raise ValueError("--run wants one run with removals, and at most one control")
        (removal, events, name) = with_events[0]
        control = next((f[0] for f in found if not f[1]), {})
    else:
        name, schedule = args.model[0], runs.base_schedule(args, args.steps)
        wanted = [runs.Run(name, v, s, args.seed) for v, s in ((PAPERS, schedule), (CONTROL, schedule.vanilla()))]
        with_norm, without = runs.perform(args, wanted).values()
        removal, control = (dict(zip(r.steps, r.ce)) for r in (with_norm, without))
        events = list(with_norm.events)
    curve = pd.DataFrame({"removal": pd.Series(removal), "control": pd.Series(control, dtype=float)})
    curve = curve.rename_axis("step").reset_index()
    marks = pd.DataFrame(
        [(s, site if layer is None else f"{site} {layer}") for s, site, layer in events], columns=["step", "removed"]
    )
    marks = marks.groupby("step").removed.agg(", ".join).reset_index()
    table = curve.merge(marks, on="step", how="outer").assign(removed=lambda t: t.removed.fillna(""))
    caption = f"{cli.display_name(name)}; loss on each training batch. "
    caption += "Vertical lines: a LayerNorm's std is frozen, or a treatment ends."
    return common.Output(table, None, claims(curve, events), caption)


ANALYSIS = common.Analysis(run, tokens=1, flags=flags, trains=True, draw=draw)
main = ANALYSIS.main

if __name__ == "__main__":
    raise SystemExit(main())
