"""The work of python -m lnfree_interp.graph --edges: effects of edges on pairs of prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from .. import cli, metrics
from ..figures.edges import edge_heatmaps
from ..figures.report import Part
from ..lens import LensModel
from ..patching.edges import EdgeEffect, edge_attribution, edge_patching
from ..patching.sites import METRICS


def run(args) -> None:
    tables, panels, notes = [], {}, []
    for name, model in cli.models(args):
        found = {}
        for method in dict.fromkeys(args.method):
            measure = partial(edge_attribution, method=method)
            found[method] = _measured(args, model, measure, f"{name}: {method}", "prompt")
        exact = None
        if args.exact:
            first = next(iter(found.values()))
            k = cli.clip(args, "exact", int(first.edges.sum()), f"edges in {name}")
            measure = partial(edge_patching, edges=_strongest(first, k))
            exact = _measured(args, model, measure, f"{name}: exact", "edge").table(seed=args.seed)
            exact = exact.rename(columns={c: f"exact_{c}" for c in ("effect", "low", "high")})
        for method, effect in found.items():
            panels[method, name] = effect
            table = effect.table(seed=args.seed)
            if exact is not None:
                table = table.merge(exact, on=["sender", "receiver"], how="left")
            table.insert(0, "model", name)
            table.insert(1, "method", method)
            tables.append(table)
        notes.append(f"{name}: {_of_the_task(effect)}")
    parts = [Part("The task", "\n".join(notes))]
    for table in tables:
        name, method = table["model"].iloc[0], table["method"].iloc[0]
        title = f"{name}: edges with the largest effects on {args.metric}, {method} [95% interval]"
        top = cli.clip(args, "top", len(table), f"edges in {name}")
        parts.append(Part(title, table=_readable(table.head(top))))
    pairs = args.pairs if args.pairs in ("induction", "ioi") else Path(args.pairs).name
    title = f"Effects of edges, {pairs} pairs, mean over prompts"
    parts.append(Part("Edges", figure=edge_heatmaps(panels, unit=args.metric, title=title)))
    cli.report(args, parts, {"": pd.concat(tables)})


def _of_the_task(effect: EdgeEffect) -> str:
    """Where the metric goes from and to: edges of a task that a model does not do are edges of something else."""
    clean, corrupted = effect.clean.double(), effect.corrupted.double()
    higher = f"clean higher on {int((clean > corrupted).sum())} of {len(clean)}"
    return f"{effect.metric} {clean.mean():.3f} clean, {corrupted.mean():.3f} corrupted; {higher}"


def _measured(args, model: LensModel, measure: Callable[..., EdgeEffect], label: str, unit: str) -> EdgeEffect:
    """Effects on all pairs, those of each token length by themselves."""
    parts = []
    for pairs in cli.load_pairs(args, model).values():
        metric = METRICS[args.metric](metrics, model, pairs)
        with cli.bar(label, unit) as progress:
            parts.append(measure(model, pairs, metric=metric, direction=args.direction, progress=progress))
    return _joined(parts)


def _strongest(effect: EdgeEffect, k: int) -> list[tuple[str, str]]:
    """The edges whose mean effects are largest."""
    table = effect.table(k, draws=1)
    return list(zip(table["sender"], table["receiver"]))


def _joined(parts: list[EdgeEffect]) -> EdgeEffect:
    """Effects on pairs of several token lengths as one."""
    together: dict[str, Any] = {
        name: torch.cat([getattr(part, name) for part in parts])
        for name in ("values", "clean", "corrupted", "reliability")
        if getattr(parts[0], name) is not None
    }
    of_several = None if len(parts) > 1 else parts[0].prompts
    return replace(parts[0], **together, prompts=of_several)


def _readable(table: pd.DataFrame) -> pd.DataFrame:
    """Effects with their intervals in one column."""
    columns = {"sender": table["sender"], "receiver": table["receiver"]}
    for name, kind in (("effect", ""), ("exact", "exact_")):
        if f"{kind}effect" in table:
            numbers = zip(*(table[f"{kind}{column}"] for column in ("effect", "low", "high")))
            columns[name] = [f"{x:+.3f} [{low:+.3f}, {high:+.3f}]" if x == x else "" for x, low, high in numbers]
    if "reliability" in table:
        columns["reliability"] = table["reliability"]
    return pd.DataFrame(columns)
