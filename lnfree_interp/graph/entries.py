"""What every node wrote into what every later one reads: one product for all that read at the same place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..layers import Norm, wide
from .held import Held, HeldLayer


@dataclass(frozen=True)
class Chosen:
    """The heads and neurons (or whole MLPs) that are nodes, as masks; all others are left out.

    Attributes:
        neurons: of each layer; None where MLPs are nodes whole, at every position.
    """

    heads: Bool[Tensor, "layer pos head"]
    neurons: Sequence[Bool[Tensor, "pos d_mlp"]] | None


@dataclass(frozen=True)
class Readers:
    """What reads the residual stream at one place, through one norm.

    Attributes:
        stream: what is read there.
        scale: what the norm divides by.
        u: the direction that each reads, through the norm but for its scale.
        share: how much each reads of each position: its attention pattern, or 1 where it stands.
        constant: what each reads that is in no one's vector.
    """

    norm: Norm
    stream: Float[Tensor, "pos d_model"]
    scale: Float[Tensor, "pos 1"]
    u: Float[Tensor, "node d_model"]
    share: Float[Tensor, "node pos"]
    constant: Float[Tensor, " node"]

    def of(self, vectors: Float[Tensor, "writer d_model"], pos: Int[Tensor, " writer"]) -> Float[Tensor, "node writer"]:
        """What each reads of each vector, written at a position."""
        return self.u @ (vectors / self.scale[pos]).T * self.share[:, pos]

    def of_stream(self, stream: Float[Tensor, "pos d_model"]) -> Float[Tensor, " node"]:
        """What each reads of a stream."""
        return torch.einsum("np,np->n", self.u @ (stream / self.scale).T, self.share)


@dataclass(frozen=True)
class Nodes:
    """Nodes of one kind, that read and write together: all tokens, the heads of a layer, the neurons of a layer.

    Attributes:
        kind, layer, pos, unit: as a `GraphNode`'s; unit is -1 where there is none.
        inputs, activations: what each reads and writes, as in `AttributionGraph`.
        vectors: what each adds to the stream.
        readers: None: they read nothing.
    """

    kind: str
    layer: int
    pos: Int[Tensor, " node"]
    unit: Int[Tensor, " node"]
    inputs: Float[Tensor, " node"]
    activations: Float[Tensor, " node"]
    vectors: Float[Tensor, "node d_model"]
    readers: Readers | None


@dataclass(frozen=True)
class _Written:
    """What is in the stream so far: vectors of nodes, and at each position what no one wrote and what is left out."""

    vectors: Float[Tensor, "writer d_model"]
    pos: Int[Tensor, " writer"]
    biases: Float[Tensor, "pos d_model"]
    rest: Float[Tensor, "pos d_model"]

    def and_then(self, nodes: Nodes, biases: Tensor, rest: Tensor) -> _Written:
        vectors, pos = torch.cat([self.vectors, nodes.vectors]), torch.cat([self.pos, nodes.pos])
        return _Written(vectors, pos, self.biases + biases, self.rest + rest)

    def read_by(self, readers: Readers | None) -> Float[Tensor, "node writer"]:
        """What each reads of each vector, of the biases, and of what is left out."""
        assert readers is not None
        of_no_one = readers.of_stream(self.biases) + readers.constant
        apart = torch.stack([of_no_one, readers.of_stream(self.rest)], 1)
        return torch.cat([readers.of(self.vectors, self.pos), apart], 1)


def entries(held: Held, chosen: Chosen) -> tuple[list[Nodes], Float[Tensor, "receiver sender"]]:
    """All nodes in the order in which they run, and the part of each one's input that each other one wrote.

    Rows and columns are those of the nodes, then the biases, what is left out, and the logit. Norms' scales are held.
    """
    everywhere, zeros = torch.arange(len(held.embed), device=held.embed.device), torch.zeros_like(held.embed)
    nothing, length = zeros[:, 0], held.embed.norm(dim=1)
    tokens = Nodes("token", -1, everywhere, everywhere.new_full((len(zeros),), -1), nothing, length, held.embed, None)
    nodes, parts = [tokens], []
    written = _Written(held.embed, everywhere, zeros, zeros)
    for i, ran in enumerate(held.layers):
        before = written
        heads, rest = _heads(ran, i, chosen.heads[i])
        written = before.and_then(heads, ran.attn_biases(), rest)
        nodes.append(heads)
        parts.append(before.read_by(heads.readers))
        if ran.has_mlp:
            mlp, rest = _mlps(ran, i) if chosen.neurons is None else _neurons(ran, i, chosen.neurons[i])
            parts.append((before if ran.layer.parallel else written).read_by(mlp.readers))
            written = written.and_then(mlp, ran.mlp_biases(), rest)
            nodes.append(mlp)
    n = len(written.vectors)
    adjacency, row = held.embed.new_zeros(n + 3, n + 3), len(tokens.pos)
    for part in parts:
        rows = slice(row, row + len(part))
        adjacency[rows, : part.shape[1] - 2], adjacency[rows, n : n + 2] = part[:, :-2], part[:, -2:]
        row = rows.stop
    adjacency[-1, : n + 2] = written.read_by(logit_readers(held))[0]
    return nodes, adjacency


def logit_readers(held: Held) -> Readers:
    """The logit, that reads the last position."""
    at_end = torch.zeros_like(held.embed[:, 0])[None]
    at_end[0, -1] = 1
    bias = at_end.new_tensor([held.bias])
    return Readers(held.ln_final, held.final, held.ln_final.scale(held.final), held.direction[None], at_end, bias)


def _along(vectors: Float[Tensor, "*rows d_model"]) -> tuple[Float[Tensor, "*rows d_model"], Float[Tensor, "*rows"]]:
    """Each vector's direction and length; where there is no length, no direction."""
    length = vectors.norm(dim=-1)
    return torch.where(length[..., None] == 0, 0.0, vectors / length[..., None]), length


def _heads(ran: HeldLayer, i: int, mask: Bool[Tensor, "pos head"]) -> tuple[Nodes, Float[Tensor, "pos d_model"]]:
    """The heads that are nodes, and what the others wrote."""
    layer, vectors = ran.layer, ran.head_vectors()
    along, length = _along(vectors)
    by_sum = layer.ln1_post.read(along) / ran.scale1_post[:, None]
    by_value = torch.einsum("phd,hed->phe", by_sum, ran.W_O)
    by_normed = torch.einsum("phe,hde->phd", by_value, ran.W_V)
    constant = (by_value * ran.b_V).sum(-1) + layer.ln1.of_bias(by_normed)
    u, share = layer.ln1.read(by_normed), ran.pattern.transpose(0, 1)
    readers = Readers(layer.ln1, ran.pre, ran.scale1, u[mask], share[mask], constant[mask])
    pos, head = mask.nonzero(as_tuple=True)
    nodes = Nodes("head", i, pos, head, length[mask], length[mask], vectors[mask], readers)
    return nodes, (vectors * ~mask[..., None]).sum(1)


def _neurons(ran: HeldLayer, i: int, mask: Bool[Tensor, "pos d_mlp"]) -> tuple[Nodes, Float[Tensor, "pos d_model"]]:
    """The neurons that are nodes, and what the others wrote."""
    layer, (pos, unit) = ran.layer, mask.nonzero(as_tuple=True)
    assert layer.W_in is not None
    by_normed = wide(layer.W_in.T[unit])
    constant = ran.neuron_bias[unit] + layer.ln2.of_bias(by_normed)
    u = layer.ln2.read(by_normed)
    readers = Readers(layer.ln2, ran.reads, ran.scale2, u, _stands(ran, pos), constant)
    vectors = ran.neuron_vectors(pos, unit)
    nodes = Nodes("neuron", i, pos, unit, ran.inputs[mask], ran.post[mask], vectors, readers)
    return nodes, ran.mlp_vectors(ran.post * ~mask)


def _mlps(ran: HeldLayer, i: int) -> tuple[Nodes, Float[Tensor, "pos d_model"]]:
    """The layer's MLP at every position: its neurons read as they are weighed in what it writes."""
    layer, vectors = ran.layer, ran.mlp_vectors(ran.post)
    assert layer.W_in is not None and layer.W_out is not None
    along, length = _along(vectors)
    by_sum = layer.ln2_post.read(along) / ran.scale2_post
    by_input = by_sum @ wide(layer.W_out).T * ran.ratio
    by_normed = by_input @ wide(layer.W_in).T
    constant = by_input @ ran.neuron_bias + layer.ln2.of_bias(by_normed)
    pos = torch.arange(len(vectors), device=vectors.device)
    u = layer.ln2.read(by_normed)
    readers = Readers(layer.ln2, ran.reads, ran.scale2, u, _stands(ran, pos), constant)
    nodes = Nodes("mlp", i, pos, torch.full_like(pos, -1), length, length, vectors, readers)
    return nodes, torch.zeros_like(vectors)


def _stands(ran: HeldLayer, pos: Int[Tensor, " node"]) -> Float[Tensor, "node pos"]:
    """1 where a node stands."""
    return torch.eye(len(ran.pre), dtype=ran.pre.dtype, device=ran.pre.device)[pos]


def discrepancy(nodes: Sequence[Nodes], held: Held, adjacency: Float[Tensor, "receiver sender"]) -> float:
    """How far entries are from what a removal changes, the norm computed again: sum |entry - exact| / sum |exact|.

    Of the entries that are not 0 and of nodes with a vector. Removing c from the stream x at a position, a reader
    loses share (<x, u> / scale(x) - <x - c, u> / scale(x - c)).

    Args:
        nodes: all of them, or those that are left.
        adjacency: of these nodes, then the biases, what is left out and the logit.
    """
    vectors, pos = torch.cat([group.vectors for group in nodes]), torch.cat([group.pos for group in nodes])
    row, wrong, right = 0, 0.0, 0.0
    for group in (*nodes, None):
        readers = logit_readers(held) if group is None else group.readers
        rows = slice(-1, None) if group is None else slice(row, row + len(group.pos))
        row += 0 if group is None else len(group.pos)
        if readers is None:
            continue
        entry = adjacency[rows, : len(vectors)]
        senders = (entry != 0).any(0).nonzero()[:, 0]
        entry, c, where = entry[:, senders], vectors[senders], pos[senders]
        exact = entry
        if not readers.norm.linear:
            whole, part = (readers.u @ readers.stream.T)[:, where], readers.u @ c.T
            before, after = readers.scale[where].T, readers.norm.scale(readers.stream[where] - c).T
            exact = readers.share[:, where] * (whole / before - (whole - part) / after)
            exact = torch.where(entry == 0, 0.0, exact)
        wrong, right = wrong + float((entry - exact).abs().sum()), right + float(exact.abs().sum())
    return wrong / right if right else 0.0
