"""The work of python -m lnfree_interp.graph: graphs of one prompt."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

import pandas as pd

from .. import cli
from ..figures.graph import graph_page
from ..files import replace_file
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
    cli.show(pd.DataFrame([_summary(graph) for graph in graphs]), f"Attribution graphs of {args.prompt!r}")
    for graph in graphs:
        nodes = graph.node_table().sort_values("influence", ascending=False, kind="stable")
        cli.show(nodes.head(args.top), f"{graph.model}: nodes with the largest influence on {graph.nodes[-1].label}")
        cli.show(graph.table(args.top), f"{graph.model}: edges that carry the most of it")
    tables = {"graph": AttributionGraph.table, "graph-nodes": AttributionGraph.node_table}
    for stem, table in tables.items():
        cli.save(args.out, stem, pd.concat([_with_model(table(graph), graph.model) for graph in graphs]))
    page = graph_page(graphs)
    replace_file(args.out / "graph.html", lambda path: path.write_text(page, encoding="utf-8"))
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


def _with_model(table: pd.DataFrame, name: str) -> pd.DataFrame:
    table.insert(0, "model", name)
    return table
