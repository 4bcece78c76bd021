"""An attribution graph of a prompt of 20 tokens, against a bare forward: seconds, nodes, edges, peak memory."""

from __future__ import annotations

import pandas as pd
import torch

from lnfree_interp import attribution_graph

from .common import interleaved, median, peak_memory, random_model

POS = 20


def run(args) -> pd.DataFrame:
    """Seconds and ratios, one prompt of random tokens, by neurons and by whole MLPs, LN and LN-free."""
    return pd.DataFrame([row for normalised in (True, False) for row in _rows(args, normalised)])


@torch.no_grad()
def _rows(args, normalised: bool) -> list[dict]:
    model = random_model(args.shape, normalised, args.device)
    tokens = torch.randint(model.cfg.d_vocab, (POS,), generator=torch.Generator().manual_seed(0)).to(args.device)
    ways = {"bare forward": lambda: model(tokens[None])}
    for nodes in ("mlp",) if args.quick else ("neuron", "mlp"):
        ways[f"graph, nodes={nodes!r}"] = lambda nodes=nodes: attribution_graph(model, tokens, nodes=nodes)
    graphs = {name: way() for name, way in ways.items() if name.startswith("graph")}
    for graph in graphs.values():
        difference = (graph.adjacency.sum(1) - graph.inputs).abs().max() / graph.inputs.abs().max()
        assert difference < 1e-4, f"entries and inputs differ by {difference:.1e}"
    seconds = {name: median(t) for name, t in interleaved(ways, args.repeats, args.device).items()}
    return [
        {
            "normalization": str(model.cfg.normalization_type),
            "way": name,
            "seconds": seconds[name],
            "forwards": seconds[name] / seconds["bare forward"],
            "nodes": len(graphs[name].nodes) if name in graphs else None,
            "edges": int(graphs[name].adjacency.count_nonzero()) if name in graphs else None,
            "peak MiB": peak_memory(way, args.device),
        }
        for name, way in ways.items()
    ]
