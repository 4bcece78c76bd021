"""Attribution graphs: which token, head and neuron wrote how much into what each later one read, up to a logit.

The graph of one prompt (after circuit-tracer, and Ameisen et al. 2025, "Circuit Tracing: Revealing Computational Graphs
in Language Models", with the model's own heads and neurons in place of a transcoder's features): attention patterns and
each neuron's ratio of output to input are held, so that what a node reads is a sum over what earlier nodes wrote.
Without a norm that sum is exact; with one the scale is held too, and `discrepancy` says what that costs.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..arguments import choice, number, switch, whole
from ..batching import Targets, Tokens, as_ids, check_next_token, check_tokens, encode, target_ids
from ..forward import unembed
from ..layers import Weights, wide
from ..lens import LensModel, ModelOrName
from ..models import as_model
from ..results import Prompts
from ..weights import read_weights, why_not_read
from .entries import Chosen, Nodes, discrepancy, entries
from .held import Effects, Held, logit_without, run_prompt, total_effects
from .prune import influence, prune
from .result import AttributionGraph, GraphNode

KINDS_OF_MLP = ("neuron", "mlp")
MOST_HEADS = 8192
"""Heads at positions that can be nodes, those of the largest effect: what bounds the entries that are held at once."""


@torch.no_grad()
def attribution_graph(
    model: ModelOrName,
    prompt: Tokens,
    target: Targets | None = None,
    *,
    versus: Targets | None = None,
    nodes: str = "neuron",
    share: float = 0.8,
    edge_share: float = 0.98,
    max_neurons: int = 1000,
    bos: bool = True,
) -> AttributionGraph:
    """How the logit after a prompt came to be: nodes, and what each wrote into what each later one read.

    A token writes its embedding, a head what it adds at a position, a neuron its activation times its row of W_out.
    A neuron reads its pre-activation; in a gated MLP the linear part, the activation of its gate held as patterns are.
    A head or an MLP reads the length of what it writes, along its own direction: a head at the positions it attends to,
    an MLP by its neurons, each one's output / input held. The logit reads the last position; of a model that caps its
    logits, what goes into the cap. What no one wrote (biases of all kinds) is a node, and so is all that is left out:
    rows of the adjacency sum to what is read.

    Args:
        model: a HookedTransformer or TransformerBridge whose weights `read_weights` reads, or a name.
        prompt: a text, or token ids [pos] or [1, pos].
        target: a text of one token or its id; None: the most likely next token.
        versus: another one, whose logit is subtracted.
        nodes: "neuron", or "mlp": the MLP of each layer whole, at every position.
        share: nodes are kept, largest first, until they hold this share of the influence of all heads and neurons.
        edge_share: of the influence of the edges between those, likewise.
        max_neurons: at most so many neurons at positions are nodes, those of the largest total effect on the logit in
            the held model; the rest is left out.
        bos: whether the prompt begins with the model's BOS token, where its prompts do. A text gets it by itself.

    Returns:
        AttributionGraph, on the CPU, in fp32 at least.

    Raises:
        ValueError: an empty prompt, several, one beyond the model's context or without its BOS token; a target of
            several tokens; shares outside (0, 1]; unknown `nodes`; a model whose weights are not read.

    Example:
        >>> from lnfree_interp import attribution_graph
        >>> graph = attribution_graph("tiny-noLN", "It was a dark and stormy", " night")
        >>> bool((graph.adjacency.sum(1) - graph.inputs).abs().max() < 1e-3)
        True
        >>> graph.nodes[1].label, graph.nodes[-1].label
        ("'It' @1", "logit ' night'")
    """
    choice(nodes, "nodes", KINDS_OF_MLP)
    share, edge_share = (
        number(value, what, above=0, most=1) for value, what in ((share, "share"), (edge_share, "edge_share"))
    )
    max_neurons, bos = whole(max_neurons, "max_neurons", least=0), switch(bos, "bos")
    model = as_model(model)
    weights = read_weights(model)
    if weights is None:
        raise ValueError(f"a graph wants a model whose weights this package reads: {why_not_read(model)}")
    text, tokens = _tokens(model, prompt, bos)
    read, against = (
        None if t is None else _target(model, t, what) for t, what in ((target, "target"), (versus, "versus"))
    )

    layers, embed, final = run_prompt(weights, tokens)
    logits = unembed(model, final[-1])
    if read is None:
        check_next_token(model)
        read = int(logits.argmax())
    if read == against:
        raise ValueError(f"target and versus are both token {read}: there is no difference to explain")
    held = Held(tuple(layers), weights.ln_final, embed, final, *_reading(weights, read, against))
    effects = total_effects(held)
    chosen = _candidates(effects, nodes, max_neurons)
    found, adjacency = entries(held, chosen)
    kept, adjacency, share_held = prune(adjacency, len(tokens), share, edge_share)
    left = [_subset(group, rows) for group, rows in zip(found, _rows_of(found, kept))]
    strings = tuple(_string(model, i) for i in tokens.tolist())
    value = held.logit
    probability = 0.0 if against is not None else float(logits.softmax(-1)[read])
    without = value - logit_without(held, *_masks(held, left))
    label = f"logit {_string(model, read)!r}" + (f" - {_string(model, against)!r}" if against is not None else "")
    last = GraphNode("logit", len(layers), len(tokens) - 1, read, label)
    apart = (GraphNode("bias", -1, -1, None, "bias"), GraphNode("error", -1, -1, None, "left out"), last)
    return AttributionGraph(
        prompt=text,
        tokens=tuple(tokens.tolist()),
        strings=strings,
        nodes=(*(node for group in left for node in _graph_nodes(group, tokens, strings)), *apart),
        adjacency=adjacency.cpu(),
        inputs=_joined([group.inputs for group in left], 0.0, 0.0, value),
        activations=_joined([group.activations for group in left], 0.0, 0.0, probability),
        influence=influence(adjacency).cpu(),
        effects=_joined([_effects_of(group, effects) for group in left], effects.bias, without, value),
        discrepancy=discrepancy(left, held, adjacency),
        kept=share_held,
        model=str(model.cfg.model_name),
        n_layers=len(layers),
        target=read,
        versus=against,
        prompts=Prompts.of(model, tokens[None]),
    )


# ---------------------------------------------------------------------------------------------------------
# Arguments


def _tokens(model: LensModel, prompt: Tokens, bos: bool) -> tuple[str | None, Int[Tensor, " pos"]]:
    """The text, if it is one, and the token ids, BOS included where the model's prompts begin with it."""
    text = prompt if isinstance(prompt, str) else None
    if text is not None and (bos or not text):
        ids = check_tokens(model, text) if text else torch.zeros(0, dtype=torch.long)
    else:
        ids = as_ids(prompt if text is None else [encode(model, text)], "prompt")
    if not ids.numel():
        raise ValueError("the prompt is empty")
    ids = check_tokens(model, ids[None] if ids.ndim == 1 else ids)
    if len(ids) > 1:
        raise ValueError(f"a graph is of one prompt, not of {len(ids)}")
    first = getattr(getattr(model, "tokenizer", None), "bos_token_id", None)
    if bos and getattr(model.cfg, "default_prepend_bos", True) and first is not None and ids[0, 0] != first:
        raise ValueError(f"the prompt begins with token {int(ids[0, 0])}, not with BOS ({first}); bos=False allows it")
    return text, ids[0]


def _target(model: LensModel, target: Targets, what: str) -> int:
    ids = target_ids(model, target, 1, what)
    if ids.shape != (1,):
        raise ValueError(f"{what} has shape {list(ids.shape)}; a graph is of one token's logit")
    return int(ids)


def _string(model: LensModel, token: int) -> str:
    tokenizer = getattr(model, "tokenizer", None)
    return str(token) if tokenizer is None else tokenizer.decode([token])


# ---------------------------------------------------------------------------------------------------------
# Parts of a graph


def _reading(weights: Weights, target: int, versus: int | None) -> tuple[Float[Tensor, " d_model"], float]:
    """The direction that the logit reads through the final norm, but for its scale, and its bias."""
    u, bias = wide(weights.W_U[:, target]), wide(weights.b_U[target])
    if versus is not None:
        u, bias = u - weights.W_U[:, versus], bias - weights.b_U[versus]
    return weights.ln_final.read(u), float(bias + weights.ln_final.of_bias(u))


def _candidates(effects: Effects, nodes: str, max_neurons: int) -> Chosen:
    """Heads and neurons that have an effect on the logit, the largest if there are too many."""
    heads = _largest(effects.heads.flatten(), MOST_HEADS).view_as(effects.heads)
    if nodes == "mlp":
        return Chosen(heads, None)
    flat = _largest(torch.cat([x.flatten() for x in effects.neurons]), max_neurons)
    parts = flat.split([x.numel() for x in effects.neurons])
    return Chosen(heads, [part.view_as(x) for part, x in zip(parts, effects.neurons)])


def _largest(effects: Float[Tensor, " n"], k: int) -> Bool[Tensor, " n"]:
    chosen = torch.zeros_like(effects, dtype=torch.bool)
    chosen[effects.abs().topk(min(k, len(effects))).indices] = True
    return chosen & (effects != 0)


def _rows_of(nodes: list[Nodes], kept: Int[Tensor, " kept"]) -> list[Int[Tensor, " node"]]:
    """Which nodes of each group are kept, counted within it."""
    rows, first = [], 0
    for group in nodes:
        end = first + len(group.pos)
        rows.append(kept[(kept >= first) & (kept < end)] - first)
        first = end
    return rows


def _subset(nodes: Nodes, rows: Int[Tensor, " node"]) -> Nodes:
    """Some nodes of a group."""
    readers = nodes.readers
    if readers is not None:
        readers = replace(readers, u=readers.u[rows], share=readers.share[rows], constant=readers.constant[rows])
    parts = {name: getattr(nodes, name)[rows] for name in ("pos", "unit", "inputs", "activations", "vectors")}
    return replace(nodes, **parts, readers=readers)


def _masks(held: Held, nodes: list[Nodes]) -> tuple[Float[Tensor, "layer pos head"], list[Float[Tensor, "pos d_mlp"]]]:
    """1 for heads and neurons that are nodes, 0 for those that are not."""
    first = held.layers[0]
    heads = first.pre.new_zeros(len(held.layers), *first.z.shape[:2])
    neurons = [torch.zeros_like(ran.ratio) for ran in held.layers]
    for group in nodes:
        if group.kind == "head":
            heads[group.layer, group.pos, group.unit] = 1
        elif group.kind == "neuron":
            neurons[group.layer][group.pos, group.unit] = 1
        elif group.kind == "mlp":
            neurons[group.layer][group.pos] = 1
    return heads, neurons


def _effects_of(nodes: Nodes, effects: Effects) -> Float[Tensor, " node"]:
    if nodes.kind == "token":
        return effects.tokens[nodes.pos]
    if nodes.kind == "head":
        return effects.heads[nodes.layer, nodes.pos, nodes.unit]
    of_layer = effects.neurons[nodes.layer]
    return of_layer[nodes.pos, nodes.unit] if nodes.kind == "neuron" else of_layer[nodes.pos].sum(1)


def _joined(parts: list[Tensor], *apart: float) -> Float[Tensor, " node"]:
    """What belongs to nodes, and then to the biases, what is left out, and the logit."""
    joined = torch.cat(parts)
    return torch.cat([joined, joined.new_tensor(apart)]).cpu()


def _graph_nodes(nodes: Nodes, tokens: Int[Tensor, " pos"], strings: tuple[str, ...]) -> list[GraphNode]:
    made = []
    for pos, unit in zip(nodes.pos.tolist(), nodes.unit.tolist()):
        if nodes.kind == "token":
            made.append(GraphNode("token", -1, pos, int(tokens[pos]), f"{strings[pos]!r} @{pos}"))
            continue
        name = {"head": f"H{unit}", "neuron": f"N{unit}", "mlp": ".mlp"}[nodes.kind]
        number = None if nodes.kind == "mlp" else unit
        made.append(GraphNode(nodes.kind, nodes.layer, pos, number, f"L{nodes.layer}{name} @{pos}"))
    return made
