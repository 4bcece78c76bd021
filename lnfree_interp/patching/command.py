"""The work of python -m lnfree_interp.patching."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import torch

from .. import cli, metrics
from ..figures.patching import axis_of, effect_heatmaps
from ..figures.report import Part
from .activation import activation_patching
from .attribution import attribution_patching
from .effect import PatchingEffect, moved, normalized, patching_error, solved
from .shown import position_labels
from .sites import METRICS


def run(args) -> None:
    methods = list(dict.fromkeys(args.method))
    options = {"integrated": {"steps": args.steps, "path": args.path}, "second_order": {"joint": args.joint}}
    errors, effects, panels, labels, notes = [], [], {}, [], []
    for name, model in cli.models(args):
        groups = cli.load_pairs(args, model)
        most = max(groups, key=lambda n: len(groups[n]))
        for n_pos, pairs in groups.items():
            common = {
                "site": args.site,
                "metric": METRICS[args.metric](metrics, model, pairs),
                "direction": args.direction,
                "layers": args.layers,
                "by_position": args.by_position,
                "max_memory": args.max_memory,
            }
            with cli.bar(f"{name}: {args.site}", "cell") as progress:
                exact = activation_patching(model, pairs, **common, progress=progress)
            used = moved(exact, args.least)
            notes.append(f"{name}: {_of_the_task(exact, args, used)}")
            if not (args.raw or used.any()):
                continue
            found = {"activation": exact}
            for method in methods:
                with cli.bar(f"{name}: {method}", "prompt") as progress:
                    found[method] = attribution_patching(
                        model, pairs, method=method, **options.get(method, {}), **common, progress=progress
                    )
                error = patching_error(found[method], exact, normalize=not args.raw, least=args.least, seed=args.seed)
                errors.append(error.table().assign(model=name, tokens=n_pos))
            for method, effect in found.items():
                effects.append(effect.table().assign(model=name, method=method, tokens=n_pos))
                if n_pos == most:
                    panels[method, name] = _panel(effect if args.raw else effect[used], raw=args.raw)
            if n_pos == most:
                labels = _labels(exact)
    if not errors:
        raise ValueError(f"there is nothing to normalise by, --raw compares effects as they are. {'. '.join(notes)}")
    error_table, effect_table = (_model_first(pd.concat(t, ignore_index=True)) for t in (errors, effects))
    title = f"{args.site}, {'raw' if args.raw else 'normalised per prompt'}: error against patching"
    parts = [
        Part("The task", "\n".join(notes)),
        Part(title, table=summary(error_table)),
        Part("Effects", figure=_figure(args, panels, labels, exact)),
    ]
    cli.report(args, parts, {"": error_table, "effects": effect_table})


def _of_the_task(exact: PatchingEffect, args, used: torch.Tensor) -> str:
    """On how many pairs the metric moves, and whether that is the task."""
    n, n_used = len(used), int(used.sum())
    text = f"{args.metric} moves by {args.least:g} or more on {n_used} of {n} pairs"
    if args.metric == "kl_from_clean":  # a distance: no way is the right one
        return text
    right = int(solved(exact, args.least).sum())
    return f"{text}, {right} of them the right way" + ("" if 2 * right > n else ": it does not do this task on most")


def _model_first(table):
    first = ["model", "tokens"]
    return table[first + [c for c in table.columns if c not in first]]


def summary(errors):
    """One row per model and method: the measures with their intervals."""
    errors = errors[~errors["measure"].str.startswith("error L")]
    text = [f"{v:.3f} [{a:.3f}, {b:.3f}]" for v, a, b in zip(errors["value"], errors["low"], errors["high"])]
    keys = ["model", "tokens", "prompts", "left_out", "method"]
    table = errors[[*keys, "measure"]].assign(text=text)
    table = table.pivot(index=keys, columns="measure", values="text")[list(dict.fromkeys(errors["measure"]))]
    return table.loc[list(dict.fromkeys(zip(*(errors[k] for k in keys))))].reset_index()


def _panel(effect: PatchingEffect, *, raw: bool) -> torch.Tensor:
    """The mean over prompts, [layer, unit]; positions asked for one by one are summed."""
    values = (effect.values if raw else normalized(effect)).mean(0)
    return values if values.ndim == 2 else values.sum(-1)


def _labels(effect: PatchingEffect) -> list[str]:
    """Positions as the tokens there, heads and neurons by number."""
    return position_labels(effect, effect.units) if effect.axes[2] == "pos" else [str(u) for u in effect.units]


def _figure(args, panels, labels: list[str], exact: PatchingEffect):
    return effect_heatmaps(
        panels,
        layers=exact.layers,
        labels=labels,
        axis=axis_of(labels) if exact.axes[2] == "pos" else exact.axes[2],
        unit=exact.metric if args.raw else "share of total",
        title=f"Patching {args.site}, {args.pairs if args.pairs in ('induction', 'ioi') else Path(args.pairs).name} "
        f"pairs, {args.direction}: exact effects and estimates",
    )
