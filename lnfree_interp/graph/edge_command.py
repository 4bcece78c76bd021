"""The work of python -m lnfree_interp.graph --edges: effects of edges on pairs of prompts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from .. import cli, metrics
from ..figures.edges import edge_heatmaps
from ..lens import LensModel
from ..pairs import PromptPairs
from ..patching.edges import EdgeEffect, edge_attribution, edge_patching
from ..patching.sites import METRICS


def run(args) -> None:
    tables, shown, panels, notes = [], [], {}, []
    for name, model in cli.models(args):
        groups = cli.load_pairs(args, model)
        found = {m: _attributed(args, model, groups.values(), m) for m in dict.fromkeys(args.method)}
        checked = _checked(args, model, groups.values(), next(iter(found.values())), name) if args.exact else None
        for method, effect in found.items():
            panels[method, name] = effect
            table = effect.table(seed=args.seed)
            if checked is not None:
                exact = checked.table(seed=args.seed).drop(columns="reliability", errors="ignore")
                exact = exact.rename(columns={c: f"exact_{c}" for c in ("effect", "low", "high")})
                table = table.merge(exact, on=["sender", "receiver"], how="left")
            tables.append(table.assign(model=name, method=method))
            shown.append((name, method, table.head(args.top)))
        clean, corrupted = (float(x.double().mean()) for x in (effect.clean, effect.corrupted))
        notes.append(f"{name}: {args.metric} {clean:.3f} clean, {corrupted:.3f} corrupted, {len(effect.clean)} pairs")
    print("\n".join(notes))
    for name, method, table in shown:
        cli.show(_readable(table), f"{name}: edges with the largest effects on {args.metric}, {method} [95% interval]")
    pairs = args.pairs if args.pairs in ("induction", "ioi") else Path(args.pairs).name
    title = f"Effects of edges, {pairs} pairs, mean over prompts"
    cli.save(args.out, "edges", pd.concat(tables), edge_heatmaps(panels, unit=args.metric, title=title))


def _attributed(args, model: LensModel, groups: Iterable[PromptPairs], method: str) -> EdgeEffect:
    return _joined(
        [
            edge_attribution(model, pairs, metric=METRICS[args.metric](metrics, model, pairs), method=method)
            for pairs in groups
        ]
    )


def _checked(args, model: LensModel, groups: Iterable[PromptPairs], effect: EdgeEffect, name: str) -> EdgeEffect:
    """The exact effects of the edges whose estimates are largest."""
    strongest = effect.table(args.exact, draws=1)
    edges = list(zip(strongest["sender"], strongest["receiver"]))
    results = []
    for pairs in groups:
        with cli.bar(f"{name}: exact", "edge") as progress:
            metric = METRICS[args.metric](metrics, model, pairs)
            results.append(edge_patching(model, pairs, edges=edges, metric=metric, progress=progress))
    return _joined(results)


def _joined(parts: list[EdgeEffect]) -> EdgeEffect:
    """Effects on pairs of several token lengths as one."""
    together = {
        name: torch.cat([getattr(part, name) for part in parts])
        for name in ("values", "clean", "corrupted", "reliability")
        if getattr(parts[0], name) is not None
    }
    return replace(parts[0], **together)


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
