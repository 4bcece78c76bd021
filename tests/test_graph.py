"""The laws of attribution graphs: entries sum to inputs, are what a vector's addition moves, effects are gradients."""

from dataclasses import dataclass, replace

import pytest
import torch
from conftest import KINDS, NORMALIZATIONS, make_model, random_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from lnfree_interp import attribution_graph, forward, read_weights, through_hooks
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
    pre = "mlp.hook_pre_linear" if gated else "mlp.hook_pre"
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
