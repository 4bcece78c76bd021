"""The work of python -m lnfree_interp.graph: graphs of one prompt."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

import pandas as pd

from .. import cli
from ..figures.graph import graph_page
from ..figures.report import Part
from .build import attribution_graph
from .result import AttributionGraph


def run(args) -> None:
    graphs = []
    for name, model in cli.models(args):
        cli.say(f"{name}: graph ...")
        graph = attribution_graph(
            model, args.prompt, args.target, versus=args.versus, nodes=args.nodes, share=args.share
        )
        graphs.append(replace(graph, model=name))
    parts = [Part(f"Attribution graphs of {args.prompt!r}", table=pd.DataFrame([_summary(graph) for graph in graphs]))]
    for graph in graphs:
        nodes = graph.node_table().sort_values("influence", ascending=False, kind="stable")
        edges = graph.table(
            cli.clip(args, "top", int(graph.adjacency.count_nonzero()), f"edges in {graph.model}'s graph")
        )
        nodes = nodes.head(cli.clip(args, "top", len(nodes), f"nodes in {graph.model}'s graph"))
        title = f"{graph.model}: nodes with the largest influence on {graph.nodes[-1].label}"
        parts += [Part(title, table=nodes), Part(f"{graph.model}: edges that carry the most of it", table=edges)]
    of_tables = {"": AttributionGraph.table, "nodes": AttributionGraph.node_table}
    tables = {
        name: pd.concat([_with_model(table(graph), graph.model) for graph in graphs])
        for name, table in of_tables.items()
    }
    files = {f".{stem}.json": graph.save for stem, graph in zip(_stems(graph.model for graph in graphs), graphs)}
    cli.report(args, parts, tables, page=graph_page(graphs), others=files)


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


def _with_model(table: pd.DataFrame, name: str) -> pd.DataFrame:
    table.insert(0, "model", name)
    return table
