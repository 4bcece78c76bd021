"""What attribution graphs say, take and write, and the analysis that holds them against real interventions."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import virtual_device
from conftest import KINDS, make_model
from test_graph import Lab, close, every_nodes, prompt_of

from lnfree_interp import attribution_graph, load_model


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny-noLN", device="cpu")


TEXT = "It was a dark and stormy"


@pytest.fixture(scope="module")
def graph(tiny):
    return attribution_graph(tiny, TEXT, " night", versus=" day")


def test_nodes_are_labelled_in_order(tiny, graph):
    tokens = tiny.to_tokens(TEXT)[0]
    assert graph.tokens == tuple(tokens.tolist())
    assert "".join(graph.strings[1:]) == graph.prompt == TEXT
    assert [node.label for node in graph.nodes[:2]] == ["'<|endoftext|>' @0", "'It' @1"]
    assert [node.unit for node in graph.nodes[: len(tokens)]] == tokens.tolist()
    assert [node.label for node in graph.nodes[-3:]] == ["bias", "left out", "logit ' night' - ' day'"]
    assert graph.nodes[-1].pos == len(tokens) - 1 and graph.nodes[-1].layer == graph.n_layers == tiny.cfg.n_layers
    kinds = ("token", "head", "neuron", "bias", "error", "logit")
    inner = graph.nodes[len(tokens) : -3]
    keys = [(node.layer, kinds.index(node.kind), node.pos, node.unit) for node in inner]
    assert keys == sorted(keys) and len(set(keys)) == len(keys)
    for node in inner:
        mark = {"head": "H", "neuron": "N"}[node.kind]
        assert node.label == f"L{node.layer}{mark}{node.unit} @{node.pos}"
    whole = attribution_graph(tiny, TEXT, " night", nodes="mlp", share=1.0)
    assert "L2.mlp @3" in [node.label for node in whole.nodes]
    assert "logit ' night' - ' day' of tiny-noLN" in repr(graph)


def test_activations_are_what_nodes_write(tiny, graph):
    lab = Lab(tiny, torch.tensor(graph.tokens), graph.nodes)
    for node, vector, wrote, reads in zip(graph.nodes, lab.vectors, graph.activations, graph.inputs):
        if node.kind == "neuron":
            close(wrote, lab.seen[f"{node.layer}.mlp.hook_post"][0, node.pos, node.unit], 1e-5)
        elif vector is not None:
            close(wrote, vector.norm(), 1e-4)
            assert node.kind == "token" or wrote == reads
        else:
            assert wrote == 0  # of a difference there is no probability


def test_tables_list_edges_and_nodes(graph):
    table = graph.table()
    assert list(table.columns) == ["sender", "receiver", "entry", "share", "influence"]
    assert len(table) == int(graph.adjacency.count_nonzero())
    assert (np.diff(table.influence) <= 0).all()
    by_receiver = table.groupby("receiver").influence.sum()
    wanted = {node.label: float(x) for node, x in zip(graph.nodes, graph.influence) if node.label in by_receiver}
    np.testing.assert_allclose(by_receiver, [wanted[label] for label in by_receiver.index], rtol=1e-4)
    np.testing.assert_allclose(table.groupby("receiver").share.sum(), 1, atol=2e-3)
    labels = [node.label for node in graph.nodes]
    row = table.iloc[0]
    assert row.entry == pytest.approx(float(graph.adjacency[labels.index(row.receiver), labels.index(row.sender)]))
    assert graph.table(3).equals(table.head(3))
    nodes = graph.node_table()
    assert nodes.node.tolist() == labels and list(nodes.columns)[1:] == ["input", "activation", "influence", "effect"]
    np.testing.assert_allclose(nodes.effect, graph.effects)
    with pytest.raises(ValueError, match="k is 0; k must be a whole number from 1 up"):
        graph.table(0)


def test_ids_and_texts_give_one_graph(tiny, graph):
    tokens = tiny.to_tokens(TEXT)
    night, day = (tiny.tokenizer.encode(text, add_special_tokens=False)[0] for text in (" night", " day"))
    for prompt in (tokens, tokens[0], tokens[0].tolist(), tokens.numpy()):
        same = attribution_graph(tiny, prompt, night, versus=day)
        assert same.prompt is None and same.nodes == graph.nodes
        assert torch.equal(same.adjacency, graph.adjacency)
    bare = attribution_graph(tiny, TEXT, night, bos=False)
    assert bare.tokens == graph.tokens[1:] == attribution_graph(tiny, list(graph.tokens[1:]), night, bos=False).tokens


@pytest.mark.skipif(virtual_device.MISSING is not None, reason=str(virtual_device.MISSING))
@pytest.mark.parametrize("kind", KINDS)
def test_a_device_gives_the_cpus_graph(kind):
    normalization, fields = KINDS[kind]
    here = make_model(normalization, dtype=torch.float32, **fields)
    there = virtual_device.on_device(here)
    for nodes in ("neuron", "mlp"):
        wanted, found = (attribution_graph(m, prompt_of(here), 7, nodes=nodes, share=1.0) for m in (here, there))
        assert found.nodes == wanted.nodes and found.adjacency.device.type == "cpu"
        for name in ("inputs", "activations", "influence", "effects"):
            close(getattr(found, name), getattr(wanted, name), 1e-3)
        close(found.adjacency, wanted.adjacency, 1e-3)
        close(found.discrepancy, wanted.discrepancy, 1e-3)


def test_half_precision_is_computed_in_float32(random_model):
    model = random_model("LNPre", dtype=torch.bfloat16)
    graph = attribution_graph(model, prompt_of(model))
    assert graph.adjacency.dtype == graph.effects.dtype == torch.float32
    close(graph.adjacency.sum(1), graph.inputs, 1e-4)


BAD = [
    ({"prompt": ""}, "the prompt is empty"),
    ({"prompt": "", "bos": False}, "the prompt is empty"),
    ({"prompt": []}, "the prompt is empty"),
    ({"prompt": torch.zeros(1, 0, dtype=torch.long)}, "the prompt is empty"),
    ({"prompt": [[0, 5], [0, 6]]}, "a graph is of one prompt, not of 2"),
    ({"prompt": [0] * 257}, "sequences have 257 tokens, the model's context holds 256"),
    ({"prompt": [0, 4096]}, "token id 4096 is outside the model's vocabulary of 4096"),
    ({"prompt": [5, 6]}, r"the prompt begins with token 5, not with BOS \(0\); bos=False allows it"),
    ({"prompt": [0.5]}, "prompt must be a tensor of token ids"),
    ({"target": " unbelievable"}, r"target ' unbelievable' is \d tokens \[.*\], it must be one"),
    ({"versus": " unbelievable"}, r"versus ' unbelievable' is \d tokens \[.*\], it must be one"),
    ({"target": 4096}, "targets?: token id 4096 is outside"),
    ({"target": [[5]]}, r"target has shape \[1, 1\]; a graph is of one token's logit"),
    ({"target": 5, "versus": 5}, "target and versus are both token 5: there is no difference to explain"),
    ({"share": 0.0}, "share is 0.0; share must be a number above 0 and at most 1"),
    ({"share": 1.5}, "share is 1.5; share must be a number above 0 and at most 1"),
    ({"edge_share": -1.0}, "edge_share is -1.0; edge_share must be a number above 0 and at most 1"),
    ({"edge_share": float("nan")}, "edge_share is nan; edge_share must be a number above 0 and at most 1"),
    ({"nodes": "head"}, "unknown nodes 'head'; allowed are neuron, mlp"),
    ({"max_neurons": -1}, "max_neurons is -1; max_neurons must be a whole number from 0 up"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD, ids=lambda x: str(x)[:40])
def test_bad_input_is_one_line(tiny, wrong, message):
    with pytest.raises(ValueError, match=message) as error:
        attribution_graph(tiny, **{"prompt": TEXT, "target": 5} | wrong)
    assert "\n" not in str(error.value)


def test_a_model_that_is_not_read_is_refused(random_model):
    model = make_model(None)
    model.add_hook("blocks.1.hook_mlp_out", lambda x, hook: 2 * x)
    with pytest.raises(ValueError, match=r"this package reads: the model carries a hook at blocks\.1\.hook_mlp"):
        attribution_graph(model, [1, 2, 3])


# ---------------------------------------------------------------------------------------------------------
# Files

# What circuit-tracer's reader demands of each part, and Neuronpedia's schema: field -> types.
FIELDS = {
    "metadata": {"slug": str, "scan": str, "transcoder_list": list, "prompt_tokens": list, "prompt": str},
    "qParams": {"pinnedIds": list, "supernodes": list, "linkType": str, "clickedId": str, "sg_pos": str},
    "nodes": {"node_id": str, "feature": int, "layer": str, "ctx_idx": int, "feature_type": str, "jsNodeId": str}
    | {"token_prob": float, "is_target_logit": bool, "run_idx": int, "reverse_ctx_idx": int, "clerp": str}
    | {"influence": (float, type(None)), "activation": (float, type(None))},
    "links": {"source": str, "target": str, "weight": float},
}


@every_nodes
@pytest.mark.parametrize("versus", [None, " day"])
def test_a_saved_graph_is_what_its_readers_read(tiny, tmp_path, nodes, versus):
    graph = attribution_graph(tiny, TEXT + "\n", " night", versus=versus, nodes=nodes)
    path = tmp_path / "new" / "A dark night.json"
    graph.save(str(path))
    saved = json.loads(path.read_text(encoding="utf-8"))
    assert list(path.parent.iterdir()) == [path]
    assert set(saved) == set(FIELDS)
    for part, fields in FIELDS.items():
        for item in saved[part] if isinstance(saved[part], list) else [saved[part]]:
            assert set(fields) <= set(item)
            assert all(isinstance(item[name], kind) for name, kind in fields.items())
    metadata, rows = saved["metadata"], saved["nodes"]
    assert metadata["slug"] == "a-dark-night" and metadata["scan"] == "tiny-noLN" and metadata["schema_version"] == 1
    assert metadata["prompt_tokens"][1:3] == ["It", " was"] and metadata["prompt_tokens"][-1] == "⏎"
    assert metadata["node_threshold"] == graph.kept
    ids = [row["node_id"] for row in rows]
    # The browser tells nodes apart by id, and by layer, number and position.
    assert len(set(ids)) == len(ids) == len(graph.nodes)
    assert len({(row["layer"], row["feature"], row["ctx_idx"]) for row in rows}) == len(ids)
    weights = {(link["source"], link["target"]): link["weight"] for link in saved["links"]}
    assert len(weights) == len(saved["links"]) == int(graph.adjacency.count_nonzero())
    for to, of in graph.adjacency.nonzero().tolist():
        assert weights[ids[of], ids[to]] == graph.adjacency[to, of].item()
    assert all(0 <= row["ctx_idx"] < len(graph.tokens) for row in rows)
    logits = [row for row in rows if row["is_target_logit"]]
    assert [row["feature_type"] for row in logits] == ["logit"] and rows[-1] == logits[0]
    assert float(logits[0]["clerp"].split("(p=")[1].split(")")[0]) == pytest.approx(rows[-1]["token_prob"], abs=1e-3)
    assert [row["feature_type"] for row in rows[:2]] == ["embedding"] * 2 and "error" in rows[-2]["feature_type"]
    # A threshold on the cumulative influence keeps the largest nodes.
    free = [i for i, row in enumerate(rows) if row["influence"] is not None]
    assert [graph.nodes[i].kind in ("head", "neuron", "mlp") for i in range(len(rows))] == [
        i in free for i in range(len(rows))
    ]
    by_influence = sorted(free, key=lambda i: -float(graph.influence[i]))
    cumulative = [rows[i]["influence"] for i in by_influence]
    assert cumulative == sorted(cumulative) and cumulative[-1] == pytest.approx(graph.kept)


# ---------------------------------------------------------------------------------------------------------
# The analysis


@pytest.fixture
def faithfulness(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "analyses"))
    import graph_faithfulness

    return graph_faithfulness


def test_removals_are_plain_hooks(tiny, graph, faithfulness):
    tokens = torch.tensor(graph.tokens)
    ran = faithfulness.Run(tiny, tokens)
    nodes = [node for node in graph.nodes if node.kind in ("head", "neuron")]
    some = nodes[:: len(nodes) // 7]

    def logits(out, patterns):
        part = {"head": "attn.hook_z", "neuron": "mlp.hook_post"}[out.kind]

        def zero(x, hook):
            x = x.clone()
            x[0, out.pos, out.unit] = 0
            return x

        hooks = [(f"blocks.{out.layer}.{part}", zero)]
        if patterns:
            hooks.append((lambda name: name.endswith("hook_pattern"), lambda x, hook: cache[hook.name]))
        return tiny.run_with_hooks(tokens[None], fwd_hooks=hooks)[0, -1]

    _, cache = tiny.run_with_cache(tokens[None])
    for held, patterns in (((False, False), False), ((True, False), True)):
        found = faithfulness.ablated(ran, some, held)
        close(found, torch.stack([logits(node, patterns) for node in some]), 1e-4)
    # Without a norm nothing is left to follow once patterns and ratios are held: effects are exact.
    first, second = graph.target, graph.versus
    found = faithfulness.ablated(ran, some, (True, True))
    effects = [graph.effects[graph.nodes.index(node)] for node in some]
    close(ran.logits[first] - ran.logits[second] - found[:, first] + found[:, second], torch.stack(effects), 1e-4)


def test_sets_alone_are_all_others_taken_out(tiny, graph, faithfulness):
    tokens = torch.tensor(graph.tokens)
    ran = faithfulness.Run(tiny, tokens)
    nodes = [node for node in graph.nodes if node.kind in ("head", "neuron")]
    everything = [
        replace(nodes[0], kind=kind, layer=layer, pos=pos, unit=unit)
        for layer in range(tiny.cfg.n_layers)
        for pos in range(len(tokens))
        for kind, n in (("head", 4), ("neuron", tiny.cfg.d_mlp))
        for unit in range(n)
    ]
    found = faithfulness.alone(ran, [everything, [], nodes])
    close(found[0], ran.logits, 1e-4)

    def keep(x, hook):
        layer, kind = int(hook.name.split(".")[1]), "head" if hook.name.endswith("z") else "neuron"
        mask = torch.zeros(x.shape[1:3])
        for node in nodes:
            if (node.layer, node.kind) == (layer, kind):
                mask[node.pos, node.unit] = 1
        return x * (mask[..., None] if kind == "head" else mask)

    hooks = [(lambda name: name.endswith(("hook_z", "mlp.hook_post")), keep)]
    close(found[2], tiny.run_with_hooks(tokens[None], fwd_hooks=hooks)[0, -1], 1e-4)
    drawn = faithfulness.as_many(ran, nodes, 0)
    assert len(set(drawn)) == len(nodes) and {node.kind for node in drawn} == {node.kind for node in nodes}


@pytest.mark.slow
def test_the_analysis_runs_and_its_claims_hold(faithfulness, tmp_path, monkeypatch):
    import browser

    monkeypatch.setattr(browser, "BROWSERS", ())
    argv = ["--tokens", "768", "--length", "6", "--nodes", "8", "--max-neurons", "50", "--draws", "50"]
    assert faithfulness.main([*argv, "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "graph_faithfulness.json").read_text())
    assert [claim["agrees"] for claim in record["claims"]][:2] == ["yes", "yes"]
