"""python -m lnfree_interp.patching: how far gradient approximations are from activation patching, model by model."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch

from ..metrics import kl_from_clean, logit_diff, right_log_prob
from ..pairs import PromptPairs, groups_from_file, induction_pairs, ioi_pairs
from .activation import activation_patching
from .effect import DIRECTIONS, METHODS, SITES, PatchingEffect, normalized, patching_error
from .gradients import attribution_patching

METRICS = {
    "logit_diff": lambda model, pairs: logit_diff,
    "right_log_prob": lambda model, pairs: right_log_prob(pairs),
    "kl_from_clean": kl_from_clean,
}
PROG = "python -m lnfree_interp.patching"


def _parser():
    from ..cli import parser, positive_int

    p = parser("patching", __doc__.split(": ", 1)[1])
    add = p.add_argument
    add("--pairs", default="induction", metavar="WHICH", help="induction, ioi, or a .jsonl or .csv file (induction)")
    add("--n-pairs", type=positive_int, default=16, metavar="N", help="how many pairs to make (16)")
    add("--length", type=positive_int, default=16, metavar="N", help="tokens per induction prompt (16)")
    add("--template", type=int, default=0, metavar="I", help="which IOI template (0)")
    add("--site", default="resid_pre", choices=list(SITES), help="what to patch (resid_pre)")
    add("--method", nargs="+", default=["gradient"], choices=list(METHODS), help="approximations (gradient)")
    add("--metric", default="logit_diff", choices=list(METRICS), help="what the effect is on (logit_diff)")
    add("--direction", default="denoising", choices=DIRECTIONS)
    add("--layers", nargs="+", type=int, metavar="L", help="layers to patch (all; needed for neurons)")
    add("--by-position", action="store_true", help="heads or neurons position by position")
    add("--steps", type=positive_int, default=5, metavar="N", help="points of integrated gradients (5)")
    add("--path", default="input", choices=("input", "layer"), help="path of integrated gradients (input)")
    add("--joint", action="store_true", help="one Hessian-vector product per layer, not per cell")
    add("--raw", action="store_true", help="compare effects as they are, not as shares of the total effect")
    add("--max-memory", metavar="SIZE", help="memory to stay within, e.g. 500M or 4G (from the device)")
    return p


def parse_size(text: str | None) -> int | None:
    """Bytes from "1000", "500M", "1.5G".

    Raises:
        ValueError: not a positive size.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG]?)i?B?", text, re.IGNORECASE)
    size = int(float(match[1]) * 1024 ** " KMG".index(match[2].upper() or " ")) if match else 0
    if size < 1:
        raise ValueError(f"--max-memory {text!r} is not a positive size such as 500M or 4G")
    return size


def main(argv: list[str] | None = None) -> int:
    from ..cli import guard

    return guard(_run, _parser().parse_args(argv), PROG)


def _pairs(args, model) -> dict[int, PromptPairs]:
    """The pairs asked for, by token length."""
    if args.pairs == "induction":
        pairs = induction_pairs(model, args.n_pairs, length=args.length, seed=args.seed)
    elif args.pairs == "ioi":
        pairs = ioi_pairs(model, args.n_pairs, seed=args.seed, template=args.template)
    else:
        return groups_from_file(args.pairs, model)
    return {pairs.clean.shape[1]: pairs}


def _run(args) -> None:
    import pandas as pd

    from ..cli import models, save, show

    max_memory = parse_size(args.max_memory)
    if args.pairs not in ("induction", "ioi") and Path(args.pairs).suffix not in (".jsonl", ".csv"):
        raise ValueError(f"--pairs {args.pairs!r} is none of induction, ioi, or a .jsonl or .csv file")
    if "atp_star" in args.method and args.site not in ("q", "k"):
        raise ValueError(f"--method atp_star is for sites q and k, not {args.site}")
    methods = list(dict.fromkeys(args.method))
    errors, effects, panels, labels = [], [], {}, []
    for name, model in models(args):
        groups = _pairs(args, model)
        most = max(groups, key=lambda n: len(groups[n]))
        for n_pos, pairs in groups.items():
            common = {
                "site": args.site,
                "metric": METRICS[args.metric](model, pairs),
                "direction": args.direction,
                "layers": args.layers,
                "by_position": args.by_position,
                "max_memory": max_memory,
            }
            with _bar(f"{name}: {args.site}") as progress:
                exact = activation_patching(model, pairs, **common, progress=progress)
            found = {"activation": exact}
            for method in methods:
                with _bar(f"{name}: {method}", "prompts") as progress:
                    found[method] = attribution_patching(
                        model,
                        pairs,
                        method=method,
                        steps=args.steps,
                        path=args.path,
                        joint=args.joint,
                        **common,
                        progress=progress,
                    )
                error = patching_error(found[method], exact, normalize=not args.raw, seed=args.seed).table()
                errors.append(error.assign(model=name, tokens=n_pos, pairs=len(pairs)))
            for method, effect in found.items():
                effects.append(effect.table().assign(model=name, method=method, tokens=n_pos))
                if n_pos == most:
                    panels[method, name] = _panel(effect, raw=args.raw)
            if n_pos == most:
                labels = axis_labels(model, pairs, exact)
    error_table, effect_table = (_model_first(pd.concat(t, ignore_index=True)) for t in (errors, effects))
    show(summary(error_table), f"{args.site}, {'raw' if args.raw else 'normalised per prompt'}: error against patching")
    stem = f"patching-{args.site}"
    save(args.out, stem, error_table, _figure(args, panels, labels, exact))
    save(args.out, f"{stem}-effects", effect_table)


def _bar(label: str, unit: str = "cells"):
    """A progress bar as a context that gives the callback patching wants."""
    from contextlib import contextmanager

    from tqdm import tqdm

    @contextmanager
    def bar():
        with tqdm(desc=label, unit=unit, disable=None, leave=False, file=sys.stderr) as t:

            def report(done: int, total: int) -> None:
                t.total, t.n = total, done
                t.refresh()

            yield report

    return bar()


def _model_first(table):
    first = ["model", "tokens"]
    return table[first + [c for c in table.columns if c not in first]]


def summary(errors):
    """One row per model and method: the measures with their intervals."""
    errors = errors[~errors["measure"].str.startswith("error L")]
    text = [f"{v:.3f} [{a:.3f}, {b:.3f}]" for v, a, b in zip(errors["value"], errors["low"], errors["high"])]
    keys = ["model", "tokens", "pairs", "method"]
    table = errors[[*keys, "measure"]].assign(text=text)
    table = table.pivot(index=keys, columns="measure", values="text")[list(dict.fromkeys(errors["measure"]))]
    return table.loc[list(dict.fromkeys(zip(*(errors[k] for k in keys))))].reset_index()


def _panel(effect: PatchingEffect, *, raw: bool) -> torch.Tensor:
    """The mean over prompts, [layer, unit]; positions asked for one by one are summed."""
    values = (effect.values if raw else normalized(effect)).mean(0)
    return values if values.ndim == 2 else values.sum(-1)


def axis_labels(model, pairs: PromptPairs, effect: PatchingEffect) -> list[str]:
    """Positions as tokens, those that vary between prompts as the first prompt's in brackets; else the units."""
    if effect.axes[2] != "pos" or model.tokenizer is None:
        return [str(u) for u in effect.units]
    labels = []
    for i in effect.units:
        clean, corrupted = pairs.clean[:, i], pairs.corrupted[:, i]
        token = model.tokenizer.decode([int(clean[0])])
        if (clean != corrupted).any():
            token += f"/{model.tokenizer.decode([int(corrupted[0])])}"
        shared = bool((clean == clean[0]).all() and (corrupted == corrupted[0]).all())
        labels.append(f"{i} {token.strip()}" if shared else f"{i} ({token.strip()})")
    return labels


def _figure(args, panels, labels: list[str], exact: PatchingEffect):
    from ..figures.patching import effect_heatmaps

    return effect_heatmaps(
        panels,
        layers=exact.layers,
        labels=labels,
        axis=exact.axes[2],
        unit=exact.metric if args.raw else "share of total",
        title=f"Patching {args.site}, {args.pairs if args.pairs in ('induction', 'ioi') else Path(args.pairs).name} "
        f"pairs, {args.direction}: exact effects and estimates",
    )


if __name__ == "__main__":
    raise SystemExit(main())
