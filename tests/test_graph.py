"""The laws of attribution graphs: entries sum to inputs, are what a vector's addition moves, effects are gradients."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import virtual_device
from conftest import KINDS, NORMALIZATIONS, make_model, random_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from lnfree_interp import attribution_graph, forward, load_model, read_weights, through_hooks
from lnfree_interp.graph import build, prune
from lnfree_interp.layers import Norm
from lnfree_interp.weights import widened_norms

KIND_PARAMS = [(kind, own) for kind in KINDS for own in (True, False)]
every_kind = pytest.mark.parametrize(("kind", "normalised"), KIND_PARAMS, ids=str)
every_nodes = pytest.mark.parametrize("nodes", ["neuron", "mlp"])


def close(a, b, tolerance=1e-9):
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def prompt_of(model, pos=6, seed=0):
    return random_tokens(model, 1, pos, seed)[0]


def whole_graph(model, tokens, target=7, **options):
    return attribution_graph(model, tokens, target, **{"share": 1.0, "edge_share": 1.0} | options)


# ---------------------------------------------------------------------------------------------------------
# A model held by hand: norms whose scale is given, patterns and outputs that are put in


@dataclass(frozen=True)
class HeldNorm(Norm):
    """A norm that divides by what it is told to."""

    divisor: object = None

    def __call__(self, x):
        x = x - x.mean(-1, keepdim=True) if self.centres else x
        x = x / self.divisor
        x = x if self.w is None else x * self.w
        return x if self.b is None else x + self.b


NAMES = ("hook_resid_pre", "attn.hook_pattern", "attn.hook_z", "attn.hook_out", "hook_attn_out", "hook_resid_mid")
NAMES += ("mlp.hook_pre", "mlp.hook_pre_linear", "mlp.hook_post", "mlp.hook_out", "hook_mlp_out")


class Lab:
    """A model and a prompt, what each node of a graph writes there, and runs with all outputs put in."""

    def __init__(self, model, tokens, nodes=()):
        self.model, self.nodes, self.plain = model, nodes, widened_norms(read_weights(model))
        self.seen = {"embed": self.plain.enter(tokens[None], slice(0, len(tokens)))}
        hooks = {
            f"blocks.{i}.{name}": lambda x, at=f"{i}.{name}": self.seen.__setitem__(at, x)
            for i in range(model.cfg.n_layers)
            for name in NAMES
        }
        self.seen["final"] = self.through(self.plain, self.seen["embed"], hooks)
        self.held = self.with_held_norms()
        self.vectors = [self.vector(node) for node in nodes]
        self.reads = [self.reading(node, vector) for node, vector in zip(nodes, self.vectors)]

    def through(self, weights, embed, hooks):
        return forward.run_streams(weights, [forward.Stream(embed, hooks)])[0]

    def with_held_norms(self):
        def hold(norm, x):
            return HeldNorm(norm.kind, norm.eps, norm.w, norm.b, norm.scale(x))

        layers = []
        for i, layer in enumerate(self.plain.layers):
            pre, attn, mlp = (self.seen[f"{i}.{name}"] for name in ("hook_resid_pre", "attn.hook_out", "mlp.hook_out"))
            held = {"ln1": hold(layer.ln1, pre), "ln1_post": hold(layer.ln1_post, attn)}
            held["ln2"] = hold(layer.ln2, pre if layer.parallel else self.seen[f"{i}.hook_resid_mid"])
            layers.append(replace(layer, **held, ln2_post=hold(layer.ln2_post, mlp)))
        return replace(self.plain, layers=tuple(layers), ln_final=hold(self.plain.ln_final, self.seen["final"]))

    def post(self, i):
        """What each neuron writes: a gated MLP's b_in is no neuron's."""
        layer = self.plain.layers[i]
        return self.seen[f"{i}.mlp.hook_post"] - (0 if layer.W_gate is None else layer.b_in)

    def pre_name(self, i):
        return f"{i}.mlp.hook_pre" + ("" if self.plain.layers[i].W_gate is None else "_linear")

    def writes(self, node):
        """What a node's input is multiplied with, one row per number that it is made of, after held norms."""
        layer, (_, pos, d) = self.held.layers[node.layer], self.seen["embed"].shape
        rows = layer.W_O.unflatten(0, (self.model.cfg.n_heads, -1))[node.unit] if node.kind == "head" else layer.W_out
        norm = replace(layer.ln1_post if node.kind == "head" else layer.ln2_post, b=None)
        return norm(rows[:, None].expand(-1, pos, d))[:, node.pos]

    def vector(self, node):
        """What a node adds to the stream."""
        if node.kind == "token":
            return self.seen["embed"][0, node.pos]
        if node.kind == "head":
            return self.seen[f"{node.layer}.attn.hook_z"][0, node.pos, node.unit] @ self.writes(node)
        if node.kind in ("neuron", "mlp"):
            post = self.post(node.layer)[0, node.pos]
            return (
                (post[node.unit] * self.writes(node)[node.unit]) if node.kind == "neuron" else post @ self.writes(node)
            )
        return None

    def reading(self, node, vector):
        """(activations, which of them) -> what a node reads."""
        i, pos, unit = node.layer, node.pos, node.unit
        if node.kind == "neuron":
            return lambda read, weights: read[self.pre_name(i)][0, pos, unit]
        if node.kind == "head":
            along = self.writes(node) @ vector / vector.norm()
            return lambda read, weights: read[f"{i}.attn.hook_z"][0, pos, unit] @ along
        if node.kind == "mlp":
            along = self.writes(node) @ vector / vector.norm() * self.post(i)[0, pos]
            return lambda read, weights: read[self.pre_name(i)][0, pos] / self.seen[self.pre_name(i)][0, pos] @ along
        if node.kind == "logit":
            W_U, b_U = self.plain.W_U[:, unit], self.plain.b_U[unit]
            return lambda read, weights: weights.ln_final(read["final"])[0, -1] @ W_U + b_U
        return lambda read, weights: torch.zeros((), dtype=torch.float64)

    def inputs(self, added=None, sender=None, hold_norms=True):
        """What each node reads when all outputs are put in, and a vector is added where a sender writes."""
        weights, read = self.held if hold_norms else self.plain, {}
        kind = None if sender is None else sender.kind
        name = {"head": "hook_attn_out", "neuron": "hook_mlp_out", "mlp": "hook_mlp_out"}.get(kind)

        def put_in(at):
            value = self.seen[at]
            if name is not None and at == f"{sender.layer}.{name}":
                value = value.clone()
                value[0, sender.pos] += added
            return lambda x: value

        hooks = {}
        for i in range(self.model.cfg.n_layers):
            for at in ("attn.hook_pattern", "hook_attn_out", "hook_mlp_out"):
                hooks[f"blocks.{i}.{at}"] = put_in(f"{i}.{at}")
            for at in ("attn.hook_z", "mlp.hook_pre", "mlp.hook_pre_linear"):
                hooks[f"blocks.{i}.{at}"] = lambda x, at=f"{i}.{at}": read.__setitem__(at, x)
        embed = self.seen["embed"].clone()
        if kind == "token":
            embed[0, sender.pos] += added
        read["final"] = self.through(weights, embed, hooks)
        return torch.stack([of(read, weights) for of in self.reads])

    def logit(self, target, out=(), only=None):
        """A logit of the held model, everything run, when nodes write nothing: those named, or all but `only`."""
        masks = {}
        for i in range(self.model.cfg.n_layers):
            for at in ("attn.hook_z", "mlp.hook_post"):
                if f"{i}.{at}" in self.seen:
                    masks[f"{i}.{at}"] = torch.full(self.seen[f"{i}.{at}"].shape[1:3], float(only is None)).double()
        embed = self.seen["embed"].clone()
        for node, value in [(node, 0.0) for node in out] + [(node, 1.0) for node in only or ()]:
            if node.kind == "token":
                embed[0, node.pos] *= value
            elif node.kind in ("head", "neuron", "mlp"):
                at = f"{node.layer}." + ("attn.hook_z" if node.kind == "head" else "mlp.hook_post")
                masks[at][node.pos, slice(None) if node.unit is None else node.unit] = value
        pre, hooks = {}, {}
        for i, layer in enumerate(self.held.layers):
            name = f"blocks.{i}."
            hooks[name + "attn.hook_pattern"] = lambda x, i=i: self.seen[f"{i}.attn.hook_pattern"]
            hooks[name + "attn.hook_z"] = lambda x, i=i: x * masks[f"{i}.attn.hook_z"][..., None]
            hooks["blocks." + self.pre_name(i)] = lambda x, i=i: pre.__setitem__(i, x)

            def post(x, i=i, layer=layer):
                kept = self.post(i) / self.seen[self.pre_name(i)] * pre[i] * masks[f"{i}.mlp.hook_post"]
                return kept if layer.W_gate is None else kept + layer.b_in

            hooks[name + "mlp.hook_post"] = post
        final = self.through(self.held, embed, hooks)
        return self.held.ln_final(final)[0, -1] @ self.plain.W_U[:, target] + self.plain.b_U[target]


# ---------------------------------------------------------------------------------------------------------
# Laws


@every_kind
@every_nodes
@pytest.mark.parametrize("share", [1.0, 0.6])
def test_entries_sum_to_what_each_node_reads_in_the_model(model_of, kind, normalised, nodes, share):
    model = model_of(kind, normalised)
    tokens = prompt_of(model)
    graph = attribution_graph(model, tokens, 7, nodes=nodes, share=share, edge_share=share, max_neurons=100)
    close(graph.adjacency.sum(1), graph.inputs)
    close(graph.inputs, Lab(model, tokens, graph.nodes).inputs())


@every_kind
@every_nodes
def test_adding_a_nodes_vector_moves_every_input_by_its_entry(model_of, kind, normalised, nodes):
    model = model_of(kind, normalised)
    tokens = prompt_of(model, 4)
    graph = attribution_graph(model, tokens, 7, nodes=nodes, share=0.7, edge_share=1.0, max_neurons=40)
    lab = Lab(model, tokens, graph.nodes)
    before, n = lab.inputs(), len(graph.nodes) - 3
    for i in range(0, n, max(1, n // 12)):
        moved = lab.inputs(lab.vectors[i], graph.nodes[i]) - before
        close(graph.adjacency[:, i], moved)
        if not normalised:  # then nothing but patterns and outputs needs holding
            close(moved, lab.inputs(lab.vectors[i], graph.nodes[i], False) - before)


@every_kind
@every_nodes
def test_discrepancy_is_that_of_removals_with_the_norm_computed_again(model_of, kind, normalised, nodes):
    model = model_of(kind, normalised)
    tokens = prompt_of(model, 4)
    graph = attribution_graph(model, tokens, 7, nodes=nodes, share=0.5, edge_share=0.8, max_neurons=20)
    lab = Lab(model, tokens, graph.nodes)
    before, wrong, right = lab.inputs(hold_norms=False), 0.0, 0.0
    for i, sender in enumerate(graph.nodes[:-3]):
        entry = graph.adjacency[:, i]
        exact = torch.where(entry != 0, before - lab.inputs(-lab.vectors[i], sender, False), 0.0)
        wrong, right = wrong + (entry - exact).abs().sum(), right + exact.abs().sum()
    close(graph.discrepancy, float(wrong / right), 1e-8)
    assert (graph.discrepancy > 1e-3) if normalised else (graph.discrepancy == 0)


@every_kind
@every_nodes
def test_effects_are_what_the_held_model_loses(model_of, kind, normalised, nodes):
    model = model_of(kind, normalised)
    tokens = prompt_of(model, 4)
    graph = attribution_graph(model, tokens, 7, nodes=nodes, share=0.7, edge_share=0.9, max_neurons=30)
    lab = Lab(model, tokens, graph.nodes)
    logit, n = lab.logit(7), len(graph.nodes) - 3
    close(logit, graph.inputs[-1])
    close(graph.effects[-1], logit)
    for i in range(0, n, max(1, n // 12)):
        close(graph.effects[i], logit - lab.logit(7, out=[graph.nodes[i]]))
    close(graph.effects[:4].sum() + graph.effects[-3], logit)
    close(graph.effects[-2], logit - lab.logit(7, only=graph.nodes))


def test_what_is_read_is_what_transformer_lens_computes(any_block):
    model, tokens = any_block, prompt_of(any_block)
    graph = attribution_graph(model, tokens, 7, versus=3, share=1.0, max_neurons=50)
    read = {}
    gated = read_weights(model).layers[0].W_gate is not None
    pre = "mlp.hook_pre_linear" if gated and "blocks.0.mlp.hook_pre_linear" in model.hook_dict else "mlp.hook_pre"
    if gated and pre == "mlp.hook_pre":
        pytest.skip("this model has no hook where the linear part of a gated MLP is")
    hooks = {f"blocks.{i}.{pre}": (lambda x, i=i: read.__setitem__(i, x)) for i in range(model.cfg.n_layers)}
    through_hooks.run(model, tokens[None], None, 0, hooks, None)
    neurons = [i for i, node in enumerate(graph.nodes) if node.kind == "neuron"]
    expected = [read[node.layer][0, node.pos, node.unit] for node in (graph.nodes[i] for i in neurons)]
    close(graph.inputs[neurons], torch.stack(expected))
    if (getattr(model.cfg, "output_logits_soft_cap", None) or -1) < 0:
        logits = model(tokens[None])[0, -1]
        close(graph.inputs[-1], logits[7] - logits[3])
        one = attribution_graph(model, tokens)
        assert one.target == int(logits.argmax())
        close(one.activations[-1], logits.softmax(-1).max())
        close(one.inputs[-1], logits.max())


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(NORMALIZATIONS),
    st.integers(1, 3),
    st.integers(1, 5),
    st.booleans(),
    st.sampled_from(["neuron", "mlp"]),
    st.floats(0.05, 1),
    st.floats(0.05, 1),
    st.integers(0, 30),
)
def test_laws_hold_for_any_shape(normalization, n_layers, pos, attn_only, nodes, share, edge_share, max_neurons):
    model = make_model(normalization, n_layers=n_layers, attn_only=attn_only)
    tokens, options = prompt_of(model, pos, seed=pos), {"nodes": nodes, "max_neurons": max_neurons}
    graph = attribution_graph(model, tokens, share=share, edge_share=edge_share, **options)
    whole = attribution_graph(model, tokens, share=1.0, edge_share=1.0, **options)
    close(graph.adjacency.sum(1), graph.inputs)
    close(graph.effects[:pos].sum() + graph.effects[-3], graph.inputs[-1])
    ends = [*range(pos), -3, -2]
    close(graph.influence[ends].sum(), 1.0)
    assert graph.kept >= share - 1e-9 and whole.kept == pytest.approx(1)
    assert not any(node.kind in ("neuron", "mlp") for node in graph.nodes) or not attn_only
    # What is kept is what it was; the order is the whole's.
    at = {node: i for i, node in enumerate(whole.nodes)}
    order = [at[node] for node in graph.nodes]
    assert order == sorted(order)
    apart = torch.arange(len(order)) == len(order) - 2
    kept = (graph.adjacency != 0) & ~apart
    close(graph.adjacency[kept], whole.adjacency[order][:, order][kept])
    close(graph.effects[~apart], whole.effects[order][~apart])
    close(graph.inputs, whole.inputs[order])
    # From every node that is no token or bias a path leads to the logit.
    reaching = torch.zeros(len(order), dtype=torch.bool)
    reaching[-1] = True
    for _ in order:
        reaching |= (graph.adjacency != 0)[reaching].any(0)
    assert reaching[pos:-3].all()


# ---------------------------------------------------------------------------------------------------------
# Pruning


def random_graph(n, seed):
    """Entries among n tokens and nodes, biases, what is left out and the logit."""
    generator = torch.Generator().manual_seed(seed)
    entries = torch.randn(n + 3, n + 3, generator=generator, dtype=torch.float64)
    entries *= torch.rand(n + 3, n + 3, generator=generator) < 0.6
    entries[:n, :n] = entries[:n, :n].tril(-1)
    entries[:2], entries[-3:-1], entries[:, -1] = 0, 0, 0  # two tokens, and the two that write alone
    entries[-1, n - 1] = 1.0
    return entries


def influence_by_paths(entries):
    """Every path from the logit down, one by one."""
    total = torch.zeros(len(entries), dtype=entries.dtype)

    def follow(node, share):
        total[node] += share
        size = entries[node].abs()
        for sender in size.nonzero()[:, 0].tolist():
            follow(sender, share * size[sender] / size.sum())

    follow(len(entries) - 1, 1.0)
    return total


@pytest.mark.parametrize("seed", range(5))
def test_influence_is_the_sum_over_paths(seed):
    entries = random_graph(8, seed)
    close(prune.influence(entries), influence_by_paths(entries))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("share", [0.01, 0.3, 0.8, 1.0])
def test_the_fewest_nodes_are_kept_that_hold_the_share(seed, share):
    entries = random_graph(12, seed)
    kept, inside, held = prune.prune(entries, 2, share, 1.0)
    sizes = influence_by_paths(entries)
    sizes[:2], sizes[-3:] = 0, 0
    close(held, float(sizes[kept].sum() / sizes.sum()))
    assert held >= share - 1e-9
    close(inside.sum(1), entries[kept].sum(1))
    largest = sizes.sort(descending=True).values
    fewest = int((largest.cumsum(0) < share * sizes.sum() - 1e-9).sum()) + 1
    nodes = [i for i in kept.tolist() if sizes[i] > 0]
    if share == 1:
        assert len(nodes) == int((sizes > 0).sum())
    else:
        assert len(nodes) >= fewest
        if inside[:, 2:-3].any(0).all() and len(nodes) == fewest:
            close(sizes[nodes].sum(), largest[:fewest].sum())


@pytest.mark.parametrize("edge_share", [0.2, 0.7])
def test_the_fewest_edges_are_kept_and_of_each_node_the_largest(edge_share):
    entries = random_graph(12, 3)
    _, inside, _ = prune.prune(entries, 2, 1.0, edge_share)
    _, whole, _ = prune.prune(entries, 2, 1.0, 1.0)
    sizes = whole.abs()
    size = (sizes / sizes.sum(1, keepdim=True).clamp(min=1e-30) * influence_by_paths(whole)[:, None])[:, :-3]
    edges = inside[:, :-3] != 0
    assert float(size[edges].sum()) >= edge_share * float(size.sum())
    largest = torch.zeros_like(edges)
    largest[size.argmax(0), torch.arange(size.shape[1])] = size.amax(0) > 0
    assert bool(edges[largest].all())
    fewest = int((size.flatten().sort(descending=True).values.cumsum(0) < edge_share * size.sum()).sum()) + 1
    assert int((edges & ~largest).sum()) <= fewest
    assert int(edges.sum()) < int((size > 0).sum())


def test_the_neurons_of_the_largest_effect_are_nodes(model_of):
    model = model_of("Llama")
    tokens = prompt_of(model)
    whole, some = (whole_graph(model, tokens, max_neurons=n) for n in (10**6, 20))
    neurons = {n: e for n, e in zip(whole.nodes, whole.effects.abs().tolist()) if n.kind == "neuron"}
    best = sorted(neurons, key=lambda node: -neurons[node])[:20]
    assert {node for node in some.nodes if node.kind == "neuron"} == set(best)
    # All that has an effect is in a whole graph: nothing is left out.
    close(whole.effects[-2], 0.0)
    close(whole.adjacency[-1, -2], 0.0)
    assert abs(float(some.effects[-2])) > 1e-3


def test_only_so_many_heads_are_nodes(model_of, monkeypatch):
    model = model_of("GPT-2")
    tokens = prompt_of(model)
    whole = whole_graph(model, tokens)
    monkeypatch.setattr(build, "MOST_HEADS", 5)
    some = whole_graph(model, tokens)
    close(some.adjacency.sum(1), some.inputs)
    heads = {node: abs(e) for node, e in zip(whole.nodes, whole.effects.tolist()) if node.kind == "head"}
    kept = {node for node in some.nodes if node.kind == "head"}
    assert kept == set(sorted(heads, key=lambda node: -heads[node])[:5])


# ---------------------------------------------------------------------------------------------------------
# What a graph says and takes


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
    assert graph.nodes[-1].pos == len(tokens) - 1 and graph.nodes[-1].layer == graph.n_layers == 4
    kinds = ("token", "head", "neuron", "bias", "error", "logit")
    inner = graph.nodes[len(tokens) : -3]
    keys = [(node.layer, kinds.index(node.kind), node.pos, node.unit) for node in inner]
    assert keys == sorted(keys) and len(set(keys)) == len(keys)
    for node in inner:
        mark = {"head": "H", "neuron": "N"}[node.kind]
        assert node.label == f"L{node.layer}{mark}{node.unit} @{node.pos}"
    whole = attribution_graph(tiny, TEXT, " night", nodes="mlp", share=1.0)
    assert "L2.mlp @3" in [node.label for node in whole.nodes]
    assert "AttributionGraph(logit ' night' - ' day' of tiny-noLN" in repr(graph)


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
    assert list(table.columns) == ["sender", "receiver", "entry", "share"]
    assert len(table) == int(graph.adjacency.count_nonzero())
    assert (np.diff(table.entry.abs()) <= 0).all()
    np.testing.assert_allclose(table.groupby("receiver").share.sum(), 1, atol=2e-3)
    labels = [node.label for node in graph.nodes]
    row = table.iloc[0]
    assert row.entry == pytest.approx(float(graph.adjacency[labels.index(row.receiver), labels.index(row.sender)]))
    assert graph.table(3).equals(table.head(3))
    nodes = graph.node_table()
    assert nodes.node.tolist() == labels and list(nodes.columns)[1:] == ["input", "activation", "influence", "effect"]
    np.testing.assert_allclose(nodes.effect, graph.effects)
    with pytest.raises(ValueError, match="k is 0; it must be at least 1"):
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
    ({"share": 0.0}, "share is 0.0; it must be above 0 and at most 1"),
    ({"share": 1.5}, "share is 1.5; it must be above 0 and at most 1"),
    ({"edge_share": -1.0}, "edge_share is -1.0; it must be above 0 and at most 1"),
    ({"edge_share": float("nan")}, "edge_share is nan; it must be above 0 and at most 1"),
    ({"nodes": "head"}, "nodes='head' is unknown; allowed are neuron, mlp"),
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
    return pytest.importorskip("graph_faithfulness")


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
        for layer in range(4)
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
    import common

    monkeypatch.setattr(common, "BROWSERS", ())
    argv = ["--tokens", "768", "--length", "6", "--nodes", "8", "--max-neurons", "50", "--draws", "50"]
    assert faithfulness.main([*argv, "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "graph_faithfulness.json").read_text())
    assert [claim["agrees"] for claim in record["claims"]][:2] == ["yes", "yes"]
