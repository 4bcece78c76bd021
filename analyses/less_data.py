"""Less data: what brings the gap of a removal down at the same tokens.

python analyses/less_data.py --text train.txt.gz --val val.txt.gz --jobs 2
python analyses/less_data.py --text train.txt.gz --only preset distilled=0.5 distilled=0.5+at-once+early
python analyses/less_data.py --text train.txt.gz --steps 60 --step-tokens 4096 --seeds 1 --only preset at-once
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import common
import numpy as np
import runs
from common import Claim
from runs import CONTROL, Run

from lnfree_interp import RemovalSchedule, cli
from lnfree_interp.schedule import KINDS

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

PRESET = "preset"
MEASURED = 64  # blocks of the training text that sensitivity is measured on

Sensitivities = Callable[[], Mapping[tuple[str, int | None], float]]


@dataclass(frozen=True)
class Recipe:
    """A schedule, and what is done besides."""

    schedule: RemovalSchedule
    treatments: tuple[tuple[str, float], ...] = ()

    def with_(self, **changes) -> Recipe:
        return replace(self, schedule=replace(self.schedule, **changes))

    def treated(self, name: str, value: float) -> Recipe:
        return replace(self, treatments=(*self.treatments, (name, value)))


def faster(recipe: Recipe, factor: float) -> Recipe:
    """Gaps and start times `factor`: more steps are left to settle, the learning rate falling as before."""
    s = recipe.schedule
    short = s.scaled(max(1, round(factor * s.steps)))
    of_the_run = {name: getattr(s, name) for name in ("steps", "warmup_steps", "patience", "settle")}
    return replace(recipe, schedule=replace(short, **of_the_run))


def one_gate(recipe: Recipe, share: float) -> Recipe:
    """All sites together, interpolated over a share of the steps; then the treatments end."""
    steps = max(1, round(share * recipe.schedule.steps))
    gated = recipe.with_(gaps=dict.fromkeys(KINDS, 0) | {recipe.schedule.order[-1]: steps})
    return gated.treated("interpolated", steps)


def by_sensitivity(recipe: Recipe, sensitivities: Sensitivities, *, gentlest: bool) -> Recipe:
    from treatments import Ordered

    rise = sensitivities()
    sites = tuple(sorted(rise, key=rise.__getitem__, reverse=not gentlest))
    return replace(recipe, schedule=Ordered(**vars(recipe.schedule) | {"sites": sites}))


class Element(NamedTuple):
    """A part of a recipe's name, such as "fast=0.4": what it says, its value if none is given, what it does."""

    says: str
    value: float | None
    change: Callable[[Recipe, float, Sensitivities], Recipe]


def _rate(recipe: Recipe, factor: float) -> Recipe:
    return recipe.with_(learning_rate=recipe.schedule.learning_rate * factor)


ELEMENTS = {
    PRESET: Element("the preset's schedule, scaled", None, lambda r, v, s: r),
    "adaptive": Element(
        "sites at the run's own pace, that part of the steps left to settle",
        0.5,
        lambda r, v, s: replace(r, schedule=r.schedule.adaptive(settle=max(1, round(v * r.schedule.steps)))),
    ),
    "distilled": Element("so much of the loss is KL(untouched || model)", 1.0, lambda r, v, s: r.with_(distillation=v)),
    "anew": Element("averages estimated anew after each freeze", None, lambda r, v, s: r.treated("anew", 0)),
    "fitted": Element("constants fitted to the loss", None, lambda r, v, s: r.treated("fitted", 0)),
    "outputs": Element("constants fitted to the norm's outputs", None, lambda r, v, s: r.treated("outputs", 0)),
    "interpolated": Element(
        "after a freeze 1/std passes to its constant in so many steps", 8, lambda r, v, s: r.treated("interpolated", v)
    ),
    "gate": Element(
        "one gate for all sites, over that part of the steps (TaperNorm)", 0.3, lambda r, v, s: one_gate(r, v)
    ),
    "at-once": Element("all sites in one step", None, lambda r, v, s: r.with_(gaps=dict.fromkeys(KINDS, 0))),
    "gentlest": Element("sites by sensitivity", None, lambda r, v, s: by_sensitivity(r, s, gentlest=True)),
    "harshest": Element("sites by sensitivity, reversed", None, lambda r, v, s: by_sensitivity(r, s, gentlest=False)),
    "fast": Element("start and gaps times so much", 0.4, lambda r, v, s: faster(r, v)),
    "early": Element("the first site goes at that step", 2, lambda r, v, s: r.with_(start=round(v))),
    "rate": Element("peak learning rate times so much, the control's too", 2.0, lambda r, v, s: _rate(r, v)),
    "auxiliary": Element("weight of the auxiliary loss", 0.0, lambda r, v, s: r.with_(auxiliary_weight=v)),
}
VARIANTS = (
    PRESET,
    "adaptive",
    "distilled=0.5",
    "distilled",
    "distilled=0.5+adaptive",
    "anew",
    "fitted",
    "outputs",
    "interpolated",
    "gate",
    "at-once",
    "gentlest",
    "harshest",
    "fast",
    "distilled=0.5+fast",
    "distilled=0.5+at-once+early",
)


def recipe(name: str, schedule: RemovalSchedule, sensitivities: Sensitivities) -> Recipe:
    """The recipe that a name such as "distilled=0.5+fast" asks for, from left to right.

    Raises:
        ValueError: an element that there is not, a value that is none, or what makes no schedule.
    """
    made = Recipe(schedule)
    for part in name.split("+"):
        word, _, given = part.partition("=")
        if word not in ELEMENTS or (given and ELEMENTS[word].value is None):
            known = ", ".join(w if e.value is None else f"{w}[={e.value:g}]" for w, e in ELEMENTS.items())
            raise ValueError(f"{name}: there is no {part!r}; parts of a name, joined by +, are {known}")
        if given and not re.fullmatch(r"\d+(\.\d+)?", given):
            raise ValueError(f"{name}: {given!r} is not a number")
        element = ELEMENTS[word]
        try:
            made = element.change(made, float(given) if given else element.value or 0.0, sensitivities)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return made


def control_of(made: Recipe, base: RemovalSchedule, model: str, seed: int) -> Run:
    """The vanilla run that a recipe's gap is taken to: of the same steps, data, seed and learning rate."""
    rates = {name: getattr(made.schedule, name) for name in ("learning_rate", "min_learning_rate")}
    schedule = replace(base, **rates).vanilla()
    other = "" if schedule == base.vanilla() else f", rate {schedule.learning_rate:g}"
    return Run(model, CONTROL + other, schedule, seed)


def run_of(name: str, base: RemovalSchedule, model: str, seed: int, sensitivities: Sensitivities) -> tuple[Run, Run]:
    """A variant's run and its control."""
    made = recipe(name, base, sensitivities)
    control = control_of(made, base, model, seed)
    adaptive = made.schedule.pace == "adaptive"
    return Run(model, name, made.schedule, seed, made.treatments, control if adaptive else None), control


def sensitivities_of(args) -> Sensitivities:
    """Measured once, when first asked for, on blocks of the training text."""

    @cache
    def measured() -> Mapping[tuple[str, int | None], float]:
        from treatments import sensitivity

        from lnfree_interp import token_blocks
        from lnfree_interp.finetune import load_trainable

        model, tokenizer = load_trainable(args.model[0])
        block = min(runs.base_schedule(args, steps_of(args)).block_size, model.config.n_positions)
        train, _ = runs.texts(args)
        rise = sensitivity(model, token_blocks(tokenizer, train, block, max_blocks=MEASURED))
        said = ", ".join(f"{k}{'' if n is None else f' {n}'} {rise[k, n]:+.3f}" for k, n in sorted(rise, key=rise.get))
        print(f"loss with one site frozen (nats): {said}", flush=True)
        return rise

    return measured


def loss_before(args) -> float:
    """The untouched model's loss on the evaluation text (nats)."""
    from train_run import evaluation_blocks, mean_loss

    from lnfree_interp import load_model

    model = load_model(args.model[0], device=args.device)
    block = min(runs.base_schedule(args, steps_of(args)).block_size, model.cfg.n_ctx)
    return mean_loss(model, evaluation_blocks(model.tokenizer, runs.texts(args)[1], block))


def kept(args) -> list[str]:
    """Names of the variants that runs of this model were made of before, of any arguments."""
    found = set()
    for path in sorted(args.runs.glob(f"{cli.display_name(args.model[0])}-*/result.json")):
        name = json.loads(path.read_text())["variant"]
        if all(part.partition("=")[0] in ELEMENTS for part in name.split("+")):
            found.add(name)
    return sorted(found)


# -- what is written


def row(name: str, free: Sequence[runs.Finished], control: Sequence[runs.Finished], full: Sequence[float]) -> dict:
    """A line of the table: runs and their controls, seed by seed; full: the gaps of the preset in all its steps."""
    loss, usual = (np.array([f.loss for f in fs]) for fs in (free, control))
    gap, steps = loss - usual, np.mean([max(f.steps, default=0) for f in free])
    return {
        "variant": name,
        "steps": steps,
        "tokens": steps * free[0].run.schedule.tokens_per_step,
        "loss": mean(loss),
        "control": mean(usual),
        "gap": mean(gap),
        "sd": np.nanstd(gap, ddof=1) if np.isfinite(gap).sum() > 1 else np.nan,
        "of_preset": mean(gap) / mean(full) if mean(full) > 0 else np.nan,
        "diverged": int(np.isnan(loss).sum()),
        **{f"seed{f.run.seed}": value for f, value in zip(free, gap)},
    }


def mean(values) -> float:
    values = np.asarray(values, float)
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def markdown(table: pd.DataFrame) -> str:
    """The table for a page."""
    seeds = [name for name in table if str(name).startswith("seed")]
    lines = ["| variant | steps | tokens | loss | control | gap | sd | of the preset's | " + " | ".join(seeds) + " |"]
    lines.append("|" + " --- |" * (8 + len(seeds)))
    for _, r in table.iterrows():
        cells = [
            f"{r['loss']:.4f}",
            f"{r.control:.4f}",
            f"{r.gap:+.4f}",
            _number(r.sd, ".4f"),
            _number(r.of_preset, ".2f"),
        ]
        cells = [f"`{r.variant}`", f"{r.steps:.0f}", f"{r.tokens / 1e6:.2f}M", *cells]
        lines.append("| " + " | ".join([*cells, *(_number(r[seed], "+.4f") for seed in seeds)]) + " |")
    return "\n".join(lines)


def _number(value: float, how: str) -> str:
    return "" if math.isnan(value) else format(value, how)


def claims(table: pd.DataFrame) -> list[Claim]:
    """table: its first line is the preset in all its steps; gaps of seeds are aligned."""
    seeds = [name for name in table if str(name).startswith("seed")]
    full, others = table.iloc[0], table.iloc[1:]
    whole = np.array(full[seeds], float)
    reached, said = [], []
    for _, line in others.sort_values("gap").iterrows():
        share, gap = line.tokens / full.tokens, np.array(line[seeds], float)
        half = (gap if share <= 0.5 else 2 * gap) - whole  # half the tokens at its gap, or half the gap at its tokens
        if share <= 1 and not line.diverged and np.nanmean(half) <= 0:
            reached.append(line)
        said.append(f"{line.variant} {line.gap:+.4f} at {share:.2f} of the tokens")
    spread = np.nanstd(whole, ddof=1) / np.sqrt(len(whole)) if len(whole) > 1 else 0.0
    tight = np.nanmean(whole) > 2 * spread and full.gap > 0
    why = f"Reached by {', '.join(line.variant for line in reached)}." if reached else "None reaches it."
    if not tight:
        why = "The preset's own gap is not above nothing: at this length there is nothing to halve. Give fewer --steps."
    return [
        Claim(
            "A removal can do with half the preset's tokens at its gap, or half its gap at its tokens.",
            "not tried",
            f"preset {full.gap:+.4f} (sd {full.sd:.4f}) after {full.tokens / 1e6:.2f}M tokens; the best: "
            + "; ".join(said[:5]),
            common.yes_no(bool(reached)) if tight and said else "not tested",
            why,
        )
    ]


def figure(table: pd.DataFrame) -> go.Figure:
    """table: its first line is the preset in all its steps."""
    import plotly.graph_objects as go

    from lnfree_interp.figures.style import colour, styled

    seeds = [name for name in table if str(name).startswith("seed")]
    fig = go.Figure()
    names = [f"{line.variant}, {line.steps:.0f} steps" for line in table.itertuples()]
    for name, (_, line) in zip(names, table.iterrows()):
        shade = colour(0 if name == names[0] else 1)
        fig.add_scatter(
            x=[line[seed] for seed in seeds],
            y=[name] * len(seeds),
            mode="markers",
            marker={"color": shade, "size": 8, "opacity": 0.55},
            text=seeds,
            hovertemplate="%{y}<br>%{text}: %{x:+.4f} nats<extra></extra>",
        )
        tick = {"color": shade, "size": 16, "symbol": "line-ns", "line": {"width": 3, "color": shade}}
        mean_of = "%{y}<br>mean: %{x:+.4f} nats<extra></extra>"
        fig.add_scatter(x=[line.gap], y=[name], mode="markers", marker=tick, hovertemplate=mean_of)
    fig.add_vline(x=table.iloc[0].gap, line={"dash": "dot", "color": "#999999"})
    fig.update_xaxes(title_text="LN-free minus control of the same steps (nats per token), each seed and mean")
    fig.update_yaxes(autorange="reversed", automargin=True)
    fig.update_layout(showlegend=False)
    return styled(fig, title="Removal with less data", height=160 + 26 * len(names))


# -- the command


def flags(parser) -> None:
    runs.flags(parser, step_tokens=None)
    add = parser.add_argument
    add("--steps", type=cli.positive_int, metavar="N", help="steps of the whole schedule (the preset's)")
    add("--part", type=float, default=0.5, metavar="X", help="of them that the variants take (0.5)")
    add("--val", metavar="FILE", help="text to evaluate on (the embedded text)")
    words = "; ".join(f"{w}{'' if e.value is None else f'[={e.value:g}]'}: {e.says}" for w, e in ELEMENTS.items())
    add("--only", nargs="+", metavar="NAME", help=f"variants to run, parts joined by + ({words})")


def steps_of(args) -> int:
    return args.steps or RemovalSchedule.preset(args.preset).steps


def run(args) -> common.Output:
    import pandas as pd

    if len(args.model) != 1:
        raise ValueError(f"--model {' '.join(args.model)}: one model is needed here")
    if not 0 < args.part <= 1:
        raise ValueError(f"--part {args.part:g} is not above 0 and at most 1")
    model, steps = args.model[0], steps_of(args)
    whole, part = (runs.base_schedule(args, n) for n in (steps, max(1, round(args.part * steps))))
    sensitivities, seeds = sensitivities_of(args), range(args.seeds)

    def pairs(name: str, base: RemovalSchedule) -> list[tuple[Run, Run]]:
        return [run_of(name, base, model, seed, sensitivities) for seed in seeds]

    wanted = {name: pairs(name, part) for name in args.only or VARIANTS}
    wanted_whole = pairs(PRESET, whole)
    for name in kept(args):  # what an earlier call has made belongs to the table
        made = wanted.get(name) or pairs(name, part)
        if all((runs.directory_of(r, args) / "result.json").exists() for pair in made for r in pair):
            wanted[name] = made
    places = {name: i for i, name in enumerate(VARIANTS)}
    wanted = dict(sorted(wanted.items(), key=lambda item: places.get(item[0], len(places))))
    everything = [pair for found in (wanted_whole, *wanted.values()) for pair in found]
    controls = runs.perform(args, list({runs.directory_name(c, args): c for _, c in everything}.values()))
    frees = runs.perform(args, list({runs.directory_name(r, args): r for r, _ in everything}.values()))

    def finished(pairs: Sequence[tuple[Run, Run]], which: int) -> list[runs.Finished]:
        of = (frees, controls)[which]
        return [of[r.model, r.variant, r.schedule.steps, r.seed] for r in (pair[which] for pair in pairs)]

    full = [f.loss - c.loss for f, c in zip(finished(wanted_whole, 0), finished(wanted_whole, 1))]
    rows = [row(f"{PRESET}, all its steps", finished(wanted_whole, 0), finished(wanted_whole, 1), full)]
    rows += [
        row(name, finished(of, 0), finished(of, 1), full)
        for name, of in wanted.items()
        if part != whole or name != PRESET
    ]
    table = pd.DataFrame(rows)
    print(markdown(table), flush=True)
    name = cli.display_name(model)
    caption = (
        f"{name}, {args.seeds} seeds; the preset in {steps} steps of {whole.tokens_per_step:,} tokens (dotted line), "
        f"the others in {part.steps}; each gap is to the control of the same steps, data and seed; held-out text, "
        f"on which the untouched model's loss is {loss_before(args):.4f}."
    )
    return common.Output(table, None, claims(table), caption)


ANALYSIS = common.Analysis(run, tokens=1, flags=flags, trains=True, draw=figure)
main = ANALYSIS.main

if __name__ == "__main__":
    raise SystemExit(main())
