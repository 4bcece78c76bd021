"""The work of python -m lnfree_interp.graph."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from .. import cli, metrics
from ..figures.edges import edge_heatmaps
from ..figures.graph import graph_page
from ..lens import LensModel
from ..pairs import PromptPairs
from ..patching.edges import EdgeEffect, edge_attribution, edge_patching
from ..patching.sites import METRICS
from .attribution import attribution_graph
from .result import AttributionGraph


def run_graphs(args) -> None:
    graphs = []
    for name, model in cli.models(args):
        cli.say(f"{name}: graph ...")
        graph = attribution_graph(
            model, args.prompt, args.target, versus=args.versus, nodes=args.nodes, share=args.share
        )
        graphs.append(replace(graph, model=name))
    cli.show(pd.DataFrame([_summary(graph) for graph in graphs]), f"Attribution graphs of {args.prompt!r}")
    for graph in graphs:
        nodes = graph.node_table().sort_values("influence", ascending=False, kind="stable")
        cli.show(nodes.head(args.top), f"{graph.model}: nodes with the largest influence on {graph.nodes[-1].label}")
        cli.show(graph.table(args.top), f"{graph.model}: largest edges")
    tables = {"graph": AttributionGraph.table, "graph-nodes": AttributionGraph.node_table}
    for stem, table in tables.items():
        cli.save(args.out, stem, pd.concat([_model_first(table(graph), graph.model) for graph in graphs]))
    page = graph_page(graphs)
    cli.replace_file(args.out / "graph.html", lambda path: path.write_text(page, encoding="utf-8"))
    files = {args.out / f"graph-{stem}.json": graph for stem, graph in zip(_stems(g.model for g in graphs), graphs)}
    for path, graph in files.items():
        graph.save(path)
    print(f"wrote {args.out / 'graph.html'} and {', '.join(map(str, files))}")


def _summary(graph: AttributionGraph) -> dict:
    left_out = next(float(x) for node, x in zip(graph.nodes, graph.influence) if node.kind == "error")
    return {
        "model": graph.model,
        "target": graph.nodes[-1].label.removeprefix("logit "),
        "logit": float(graph.inputs[-1]),
        "nodes": len(graph.nodes),
        "edges": int(graph.adjacency.count_nonzero()),
        "influence kept": f"{graph.kept:.2%}",
        "left out": f"{left_out:.2%}",
        "discrepancy": f"{graph.discrepancy:.2%}",
    }


def _stems(names: Iterable[str]) -> list[str]:
    """Names of models as parts of file names, each once: directories may share theirs."""
    stems: list[str] = []
    for name in names:
        stem = re.sub(r"[^\w.-]+", "-", name)
        same = sum(re.fullmatch(rf"{re.escape(stem)}(-\d+)?", other) is not None for other in stems)
        stems.append(f"{stem}-{same + 1}" if same else stem)
    return stems


def _model_first(table: pd.DataFrame, name: str, **columns) -> pd.DataFrame:
    for at, (column, value) in enumerate({"model": name, **columns}.items()):
        table.insert(at, column, value)
    return table


# ---------------------------------------------------------------------------------------------------------
# Edges


def run_edges(args) -> None:
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
            tables.append(_model_first(table, name, method=method))
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
