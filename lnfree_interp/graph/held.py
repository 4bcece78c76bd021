"""A model held as it ran on one prompt: then the logit is linear in all that is written into the residual stream.

Held are the attention patterns, the scale by which each norm divides at each position, and of each neuron the ratio of
what it writes to what it reads: activation / pre-activation or, in a gated MLP, the activation of its gate, which lets
the linear part through as a pattern lets values through.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..forward import Stream, run_streams
from ..layers import Layer, Norm, Weights, wide, widened_norms


@dataclass(frozen=True)
class HeldLayer:
    """A block as it ran.

    Attributes:
        pre: what attention reads; reads: what the MLP reads, before their norms.
        inputs: what each neuron reads: its pre-activation; of a gated MLP the linear part, `hook_pre_linear`.
        ratio: what of it each neuron writes.
        scale1, scale2, scale1_post, scale2_post: what each of the block's norms divides by.
    """

    layer: Layer
    pre: Float[Tensor, "pos d_model"]
    pattern: Float[Tensor, "head query key"]
    z: Float[Tensor, "pos head d_head"]
    scale1: Float[Tensor, "pos 1"]
    scale1_post: Float[Tensor, "pos 1"]
    reads: Float[Tensor, "pos d_model"]
    inputs: Float[Tensor, "pos d_mlp"]
    ratio: Float[Tensor, "pos d_mlp"]
    scale2: Float[Tensor, "pos 1"]
    scale2_post: Float[Tensor, "pos 1"]

    @property
    def W_V(self) -> Float[Tensor, "head d_model d_head"]:
        return self._for_heads(self.layer.W_V)

    @property
    def b_V(self) -> Float[Tensor, "head d_head"]:
        return self._for_heads(self.layer.b_V)

    @property
    def W_O(self) -> Float[Tensor, "head d_head d_model"]:
        return wide(self.layer.W_O).unflatten(0, (len(self.pattern), -1))

    def _for_heads(self, of_keys: Float[Tensor, "key_head ..."]) -> Float[Tensor, "head ..."]:
        group = len(self.pattern) // len(of_keys)
        return wide(of_keys) if group == 1 else wide(of_keys).repeat_interleave(group, 0)

    @property
    def has_mlp(self) -> bool:
        return self.layer.W_in is not None

    @property
    def post(self) -> Float[Tensor, "pos d_mlp"]:
        """What each neuron writes along its W_out."""
        return self.inputs * self.ratio

    @property
    def neuron_bias(self) -> Float[Tensor, " d_mlp"]:
        """What of a neuron's input no one wrote, but for the norm's bias."""
        b = self.layer.b_in if self.layer.W_gate is None else self.layer.b_linear
        return self.inputs.new_zeros(self.inputs.shape[1]) if b is None else wide(b)

    @property
    def mlp_constant(self) -> Float[Tensor, " d_model"]:
        """What the MLP writes that no neuron does, before ln2_post."""
        layer = self.layer
        assert layer.W_out is not None and layer.b_out is not None
        constant = wide(layer.b_out)
        if layer.W_gate is None or layer.b_in is None:
            return constant
        return constant + wide(layer.b_in) @ wide(layer.W_out)

    def head_vectors(self) -> Float[Tensor, "pos head d_model"]:
        """What each head adds to the stream."""
        v = torch.einsum("phe,hed->phd", self.z, self.W_O)
        return self.layer.ln1_post.written(v) / self.scale1_post[:, None]

    def attn_biases(self) -> Float[Tensor, "pos d_model"]:
        """What attention adds to the stream that no head does."""
        return _constant(self.layer.ln1_post, wide(self.layer.b_O), self.scale1_post)

    def mlp_vectors(self, post: Float[Tensor, "pos d_mlp"]) -> Float[Tensor, "pos d_model"]:
        """What neurons together add to the stream."""
        assert self.layer.W_out is not None
        return self.layer.ln2_post.written(post @ wide(self.layer.W_out)) / self.scale2_post

    def neuron_vectors(self, pos: Int[Tensor, " node"], unit: Int[Tensor, " node"]) -> Float[Tensor, "node d_model"]:
        """What some neurons at some positions add to the stream."""
        assert self.layer.W_out is not None
        v = self.post[pos, unit][:, None] * wide(self.layer.W_out[unit])
        return self.layer.ln2_post.written(v) / self.scale2_post[pos]

    def mlp_biases(self) -> Float[Tensor, "pos d_model"]:
        """What the MLP adds to the stream that no neuron does."""
        return _constant(self.layer.ln2_post, self.mlp_constant, self.scale2_post)


def _constant(norm: Norm, b: Float[Tensor, " d_model"], scale: Float[Tensor, "pos 1"]) -> Float[Tensor, "pos d_model"]:
    made = norm.written(b) / scale
    return made if norm.b is None else made + wide(norm.b)


@dataclass(frozen=True)
class Held:
    """A model as it ran on one prompt, and the logit that is read: <final, direction> / scale + bias at the end."""

    layers: tuple[HeldLayer, ...]
    ln_final: Norm
    embed: Float[Tensor, "pos d_model"]
    final: Float[Tensor, "pos d_model"]
    direction: Float[Tensor, " d_model"]
    bias: float

    @property
    def final_scale(self) -> Float[Tensor, " 1"]:
        return self.ln_final.scale(self.final[-1])

    @property
    def logit(self) -> float:
        return float(self.final[-1] @ self.direction / self.final_scale[0]) + self.bias


def run_prompt(weights: Weights, tokens: Int[Tensor, " pos"]) -> tuple[list[HeldLayer], Tensor, Tensor]:
    """The blocks as they run on a prompt, in fp32 at least, and the stream before the first and after the last."""
    weights = widened_norms(weights)
    seen: dict[str, Tensor] = {}

    def keep(name: str):
        return lambda x: seen.__setitem__(name, x[0])

    of_attn, of_mlp = ("hook_resid_pre", "attn.hook_pattern", "attn.hook_z"), ("mlp.hook_pre", "mlp.hook_pre_linear")
    parts = (*of_attn, "hook_resid_mid", *of_mlp)
    names = [f"blocks.{i}.{part}" for i in range(len(weights.layers)) for part in parts]
    embed = weights.enter(tokens[None], slice(0, len(tokens)))
    (final,) = run_streams(weights, [Stream(embed, {name: keep(name) for name in names})])
    held = []
    for i, layer in enumerate(weights.layers):
        of = {part: x for part in parts if (x := seen.get(f"blocks.{i}.{part}")) is not None}
        held.append(_held_layer(layer, of))
    return held, embed[0], final[0]


def _held_layer(layer: Layer, of: Mapping[str, Tensor]) -> HeldLayer:
    pre, z = of["hook_resid_pre"], of["attn.hook_z"]
    reads = pre if layer.parallel else of.get("hook_resid_mid", pre)
    inputs = ratio = pre.new_zeros(len(pre), 0)
    if layer.W_in is not None:
        hidden = of["mlp.hook_pre"]
        inputs, ratio = of.get("mlp.hook_pre_linear", hidden), layer.act(hidden)
        if layer.W_gate is None:  # all activation functions are 0 at 0, where any ratio will do
            ratio = torch.where(hidden == 0, 0.0, ratio / hidden)
    held = HeldLayer(
        *(layer, pre, of["attn.hook_pattern"], z, layer.ln1.scale(pre), _ones(pre)),
        *(reads, inputs, ratio, layer.ln2.scale(reads), _ones(pre)),
    )
    if not layer.ln1_post.linear:
        held = replace(held, scale1_post=layer.ln1_post.scale(layer.attn_sum(z)))
    if held.has_mlp and not layer.ln2_post.linear:
        assert layer.b_in is not None
        post = held.post if layer.W_gate is None else held.post + wide(layer.b_in)
        held = replace(held, scale2_post=layer.ln2_post.scale(layer.mlp_sum(post)))
    return held


def _ones(x: Float[Tensor, "pos d_model"]) -> Float[Tensor, "pos 1"]:
    return torch.ones_like(x[:, :1])


@dataclass(frozen=True)
class Effects:
    """By how much the logit falls when a vector is taken out of a held model, all paths counted, in logits."""

    tokens: Float[Tensor, " pos"]
    heads: Float[Tensor, "layer pos head"]
    neurons: Sequence[Float[Tensor, "pos d_mlp"]]
    bias: float


def total_effects(held: Held) -> Effects:
    """Of everything at once, by one pass back. The tokens' and the biases' sum to the logit."""
    g = torch.zeros_like(held.final)  # of the logit, by the stream
    g[-1] = held.direction / held.final_scale
    bias = g.new_tensor(held.bias)
    heads: list[Tensor] = []
    neurons: list[Tensor] = []
    for ran in reversed(held.layers):
        layer, of_mlp = ran.layer, torch.zeros_like(g)
        neurons.append(ran.inputs)  # of no neurons, where there is no MLP
        if ran.has_mlp:
            assert layer.W_in is not None and layer.W_out is not None
            bias = bias + (g * ran.mlp_biases()).sum()
            onto = (layer.ln2_post.read(g) / ran.scale2_post) @ wide(layer.W_out).T
            neurons[-1] = onto * ran.post
            onto = onto * ran.ratio
            by_normed = onto @ wide(layer.W_in).T
            bias = bias + (onto @ ran.neuron_bias).sum() + layer.ln2.of_bias(by_normed).sum()
            of_mlp = layer.ln2.read(by_normed) / ran.scale2
        if not layer.parallel:
            g, of_mlp = g + of_mlp, torch.zeros_like(g)
        bias = bias + (g * ran.attn_biases()).sum()
        onto = torch.einsum("pd,hed->phe", layer.ln1_post.read(g) / ran.scale1_post, ran.W_O)
        heads.append((onto * ran.z).sum(-1))
        of_values = torch.einsum("hqk,qhe->khe", ran.pattern, onto)
        by_normed = torch.einsum("khe,hde->kd", of_values, ran.W_V)
        bias = bias + (of_values * ran.b_V).sum() + layer.ln1.of_bias(by_normed).sum()
        g = g + of_mlp + layer.ln1.read(by_normed) / ran.scale1
    return Effects((g * held.embed).sum(-1), torch.stack(heads[::-1]), neurons[::-1], float(bias))


def logit_without(
    held: Held, heads: Float[Tensor, "layer pos head"], neurons: Sequence[Float[Tensor, "pos d_mlp"]]
) -> float:
    """The held model's logit when heads and neurons write so many times what they would: 0 takes them out."""
    x = held.embed
    for ran, of_heads, of_neurons in zip(held.layers, heads, neurons):
        layer = ran.layer
        values = torch.einsum("kd,hde->khe", _normed(layer.ln1, x, ran.scale1), ran.W_V) + ran.b_V
        z = torch.einsum("hqk,khe->qhe", ran.pattern, values) * of_heads[..., None]
        sums = torch.einsum("phe,hed->pd", z, ran.W_O)
        mid = x + layer.ln1_post.written(sums) / ran.scale1_post + ran.attn_biases()
        if ran.has_mlp:
            assert layer.W_in is not None
            reads = _normed(layer.ln2, x if layer.parallel else mid, ran.scale2)
            post = (reads @ wide(layer.W_in) + ran.neuron_bias) * ran.ratio * of_neurons
            mid = mid + ran.mlp_vectors(post) + ran.mlp_biases()
        x = mid
    return float(x[-1] @ held.direction / held.final_scale[0]) + held.bias


def _normed(norm: Norm, x: Float[Tensor, "pos d_model"], scale: Float[Tensor, "pos 1"]) -> Float[Tensor, "pos d_model"]:
    """What a norm makes of a stream, its scale held."""
    made = norm.written(x) / scale
    return made if norm.b is None else made + wide(norm.b)
