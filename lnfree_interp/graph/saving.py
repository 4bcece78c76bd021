"""Attribution graphs as the JSON that circuit-tracer's browser and Neuronpedia read.

Their fields, as facts: nodes have a layer ("E" for what is at the bottom), a position ctx_idx, a number `feature`
(metadata.schema_version 1: Cantor's pairing of layer and unit) and a `feature_type`, of which "embedding", "logit" and
all that say "error" are known; any other is drawn as a feature. `influence` is cumulative, largest first, so that a
threshold on it keeps what holds that share; a logit's `clerp` must hold its "(p=...)".
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from ..files import as_value_error, replace_file
from .result import AttributionGraph, GraphNode

_TYPES = {"token": "embedding", "head": "attention head", "neuron": "neuron", "mlp": "mlp"}
_TYPES |= {"bias": "bias", "error": "error", "logit": "logit"}
_SHOWN = str.maketrans({"\n": "⏎", "\t": "→", "\r": "↵"})


def save_graph(graph: AttributionGraph, path: Path) -> None:
    """Write a graph to a file: beside it, then renamed.

    Raises:
        ValueError: the disk refuses.
    """
    text = json.dumps(as_json(graph, path.stem), ensure_ascii=False, allow_nan=False)
    with as_value_error(f"write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def as_json(graph: AttributionGraph, name: str) -> dict:
    """A graph in that form, called `name`."""
    ids = [_node_id(graph, node) for node in graph.nodes]
    cumulative = _cumulative(graph)
    links = [
        {"source": ids[sender], "target": ids[receiver], "weight": graph.adjacency[receiver, sender].item()}
        for receiver, sender in graph.adjacency.nonzero().tolist()
    ]
    return {
        "metadata": {
            "slug": re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "graph",
            "scan": graph.model,
            "transcoder_list": [],
            "prompt_tokens": [string.translate(_SHOWN) for string in graph.strings],
            "prompt": "".join(graph.strings) if graph.prompt is None else graph.prompt,
            "node_threshold": graph.kept,
            "schema_version": 1,
            "info": {"generator": {"name": "lnfree_interp"}},
        },
        "qParams": {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""},
        "nodes": [_node(graph, i, ids[i], cumulative[i]) for i in range(len(ids))],
        "links": links,
    }


def _cumulative(graph: AttributionGraph) -> list[float | None]:
    """The share that each head, neuron or MLP and all larger ones hold; None for what is always shown."""
    found: list[float | None] = [None] * len(graph.nodes)
    free = [i for i, node in enumerate(graph.nodes) if node.kind in ("head", "neuron", "mlp")]
    sizes = graph.influence.double()
    total, so_far = float(sizes[free].sum()), 0.0
    for i in sorted(free, key=lambda i: -float(sizes[i])):
        so_far += float(sizes[i])
        found[i] = graph.kept * min(1.0, so_far / total) if total else graph.kept
    return found


def _node_id(graph: AttributionGraph, node: GraphNode) -> str:
    if node.kind == "token":
        return f"E_{node.unit}_{node.pos}"
    if node.kind == "head":
        return f"{node.layer}_H{node.unit}_{node.pos}"
    if node.kind in ("bias", "error"):
        return f"E_{node.kind}_0"
    layer = node.layer + 1 if node.kind == "logit" else node.layer
    return f"{layer}_{0 if node.unit is None else node.unit}_{node.pos}"


def _number(graph: AttributionGraph, node: GraphNode) -> int:
    """A number that no other node has at this layer and position."""
    if node.kind == "token":
        return node.pos
    if node.kind in ("bias", "error"):
        return len(graph.tokens) + (node.kind == "error")
    if node.kind == "head":
        return -1 - (node.unit or 0)
    if node.kind == "logit":
        return node.unit or 0
    unit = node.unit or 0
    return (node.layer + unit) * (node.layer + unit + 1) // 2 + unit


def _node(graph: AttributionGraph, i: int, node_id: str, cumulative: float | None) -> dict:
    node = graph.nodes[i]
    is_logit, at_bottom = node.kind == "logit", node.layer < 0
    activation = graph.activations[i].item()
    number = _number(graph, node)
    layer = "E" if at_bottom else str(node.layer + is_logit)
    clerp = f"{node.label} (input {graph.inputs[i]:.3f}, effect {graph.effects[i]:+.3f} logits)"
    if is_logit:
        shown = re.sub(r"^logit ", "", node.label).replace("'", '"')
        clerp = f"Output {shown} (p={activation:.3f})"
    return {
        "node_id": node_id,
        "feature": number,
        "layer": layer,
        "ctx_idx": max(0, node.pos),
        "feature_type": _TYPES[node.kind],
        "token_prob": activation if is_logit else 0.0,
        "is_target_logit": is_logit,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": f"{layer}_{number}-{max(0, node.pos)}",
        "clerp": clerp,
        "influence": cumulative,
        "activation": activation,
    }
