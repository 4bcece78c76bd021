"""A block of a transformer computed from its weights: norms, rotary positions, attention, MLP; each in this one place.

A `Layer`'s methods work on any number of rows, so that callers who keep keys and values of earlier positions can run a
layer on the rows that changed. Where rows stand is said by positions: Int[Tensor, "pos"], or a slice where they follow
on each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .products import Linear, products

Positions = slice | Tensor
"""Positions in the prompt, absolute: Int[Tensor, "pos"], or a slice with a start (and a stop, if it ends early)."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_fast": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


def wide(x: Tensor) -> Tensor:
    """A tensor in fp32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclass(frozen=True)
class Norm:
    """One normalisation of the residual stream: kind, its weights if it still has them, and epsilon.

    Kind "LNFree" is what layer norm is in an LN-free checkpoint, whose epsilon of 1e12 makes every standard deviation
    1e6: an affine map, (x - mean) * w + b, the constant in w.
    """

    kind: str | None
    eps: float
    w: Tensor | None = None
    b: Tensor | None = None

    def __call__(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        if self.kind is None:
            return x
        if self.kind.startswith("RMS"):
            return F.rms_norm(x, x.shape[-1:], self.w, self.eps)
        if self.linear:
            assert self.w is not None and self.b is not None
            return torch.addcmul(self.b, self.centred(x), self.w)
        return F.layer_norm(x, x.shape[-1:], self.w, self.b, self.eps)

    @property
    def centres(self) -> bool:
        """Whether it subtracts the mean over d_model."""
        return self.kind is not None and self.kind.startswith("LN")

    @property
    def linear(self) -> bool:
        """Whether it divides by nothing that depends on x, so that it is no norm."""
        return self.kind in (None, "LNFree")

    def scale(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows 1"]:
        """What x is divided by: its standard deviation (LN) or root mean square (RMS); 1 where it is linear."""
        if self.linear:
            return torch.ones_like(x[..., :1])
        return (self.centred(wide(x)).pow(2).mean(-1, keepdim=True) + self.eps).sqrt()

    # Its linear part: but for the scale and the bias, the norm of a sum is the sum of what it makes of each part.

    def centred(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        """x without its mean, if the norm takes that away."""
        return x - x.mean(-1, keepdim=True) if self.centres else x

    def written(self, v: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        """What it makes of a part of what it reads, but for the scale and the bias."""
        v = self.centred(v)
        return v if self.w is None else v * wide(self.w)

    def read(self, u: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        """The direction of what it reads, but for the scale, where u is that of what it hands on."""
        return self.centred(u if self.w is None else u * wide(self.w))

    def of_bias(self, u: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows"]:
        """What u reads of its bias."""
        return u.new_zeros(u.shape[:-1]) if self.b is None else u @ wide(self.b)


NO_NORM = Norm(None, 0.0)


@dataclass(frozen=True)
class Rotary:
    """Rotary positions: the first numbers of a query or key turned pair by pair, by angles that grow with position.

    The tables of sines and cosines are the model's own, whatever scaling of the frequencies they were made with.
    """

    attn: Any
    adjacent: bool  # pairs are (0, 1), (2, 3), ...; else (0, n/2), (1, n/2 + 1), ...

    def reach(self, n_pos: int) -> None:
        """Have the tables long enough for so many positions, as the model's own forward has them."""
        if n_pos > len(self.attn.rotary_cos):
            with torch.inference_mode(False), torch.no_grad():
                cos = self.attn.rotary_cos
                self.attn.apply_rotary(cos.new_zeros(1, n_pos, 1, cos.shape[1]))

    def __call__(
        self, x: Float[Tensor, "*batch pos head d_head"], positions: Positions
    ) -> Float[Tensor, "*batch pos head d_head"]:
        cos, sin = (table[positions].unsqueeze(1) for table in (self.attn.rotary_cos, self.attn.rotary_sin))
        x, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
        if self.adjacent:
            across = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
        else:
            across = torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1)
        turned = x * cos + across * sin
        return torch.cat([turned, rest], -1) if rest.shape[-1] else turned


@dataclass(frozen=True)
class Layer:
    """One block's weights: `x @ W + b` throughout, for q, k and v head by head; and the block computed from them.

    Keys and values may have fewer heads, each for as many consecutive heads of queries. The keys and queries of a block
    are as attention compares them: normalised and turned by their positions where a model does that.
    """

    ln1: Norm
    W_Q: Float[Tensor, "head d_model d_head"]
    b_Q: Float[Tensor, "head d_head"]
    W_K: Float[Tensor, "key_head d_model d_head"]
    b_K: Float[Tensor, "key_head d_head"]
    W_V: Float[Tensor, "key_head d_model d_head"]
    b_V: Float[Tensor, "key_head d_head"]
    W_O: Float[Tensor, "heads_d_head d_model"]
    b_O: Float[Tensor, " d_model"]
    attn_scale: float
    q_norm: Norm = NO_NORM
    k_norm: Norm = NO_NORM
    rotary: Rotary | None = None
    cap: float | None = None  # scores are cap tanh(score / cap)
    window: int | None = None  # how many positions, its own included, a query sees
    ln1_post: Norm = NO_NORM  # of what attention adds to the residual stream
    parallel: bool = False  # the MLP reads what attention reads
    ln2: Norm = NO_NORM
    W_in: Float[Tensor, "d_model d_mlp"] | None = None  # None: there is no MLP
    b_in: Float[Tensor, " d_mlp"] | None = None
    W_out: Float[Tensor, "d_mlp d_model"] | None = None
    b_out: Float[Tensor, " d_model"] | None = None
    W_gate: Float[Tensor, "d_model d_mlp"] | None = None
    act: Callable[[Tensor], Tensor] = F.gelu
    gate: Callable[[Tensor, Tensor], Tensor] = torch.mul  # the product in a gated MLP
    b_gate: Float[Tensor, " d_mlp"] | None = None
    b_linear: Float[Tensor, " d_mlp"] | None = None  # of a gated MLP's linear part, before the product
    ln2_post: Norm = NO_NORM

    # The products of a block: what `products` takes, and how many numbers each makes of a row.

    @property
    def of_qkv(self) -> tuple[Linear, Linear, Linear]:
        return (self.W_Q, self.b_Q), (self.W_K, self.b_K), (self.W_V, self.b_V)

    @property
    def of_attn_out(self) -> tuple[Linear]:
        return ((self.W_O, self.b_O),)

    @property
    def of_hidden(self) -> tuple[Linear, ...]:
        """Of an MLP: x W_in + b_in; or the gate and the linear part, to whose product b_in is added."""
        assert self.W_in is not None
        if self.W_gate is None:
            return ((self.W_in, self.b_in),)
        return (self.W_gate, self.b_gate), (self.W_in, self.b_linear)

    @property
    def of_mlp_out(self) -> tuple[Linear]:
        assert self.W_out is not None
        return ((self.W_out, self.b_out),)

    # What comes between the products.

    def place_q(
        self, q: Float[Tensor, "*batch pos head d_head"], positions: Positions
    ) -> Float[Tensor, "*batch pos head d_head"]:
        """Queries as attention compares them, of what the product makes."""
        q = self.q_norm(q)
        return q if self.rotary is None else self.rotary(q, positions)

    def place_k(
        self, k: Float[Tensor, "*batch pos head d_head"], positions: Positions
    ) -> Float[Tensor, "*batch pos head d_head"]:
        """Keys as attention compares them, of what the product makes."""
        k = self.k_norm(k)
        return k if self.rotary is None else self.rotary(k, positions)

    def visible(self, n_query: int, n_key: int, positions: Positions, device=None) -> Bool[Tensor, "query key"]:
        """Where a query may look; the queries are the keys' last positions (any slice), or stand at those given."""
        keys = torch.arange(n_key, device=device)
        queries = positions if isinstance(positions, Tensor) else keys[n_key - n_query :]
        seen = keys <= queries[:, None]
        if self.window is not None and n_key > self.window:
            seen &= keys > queries[:, None] - self.window
        return seen

    def attend(
        self,
        q: Float[Tensor, "batch query head d_head"],
        k: Float[Tensor, "batch key key_head d_head"],
        v: Float[Tensor, "batch key key_head d_head"],
        positions: Positions = slice(None),
    ) -> Float[Tensor, "batch query head d_head"]:
        """z of queries that are the keys' last positions (any slice), or stand at the positions given."""
        if self.cap is not None:
            return self.mix(self.pattern(q, k, positions), v)
        n_query, n_key = q.shape[1], k.shape[1]
        at_end = not isinstance(positions, Tensor) and (self.window is None or n_key <= self.window)
        causal = at_end and n_query == n_key > 1
        # One query at the end sees everything.
        mask = None if at_end and (causal or n_query == 1) else self.visible(n_query, n_key, positions, q.device)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        grouped = q.shape[1] != k.shape[1]
        z = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=causal, scale=1 / self.attn_scale, enable_gqa=grouped
        )
        return z.transpose(1, 2)

    def pattern(
        self,
        q: Float[Tensor, "batch query head d_head"],
        k: Float[Tensor, "batch key key_head d_head"],
        positions: Positions = slice(None),
    ) -> Float[Tensor, "batch head query key"]:
        """The attention probabilities, in plain differentiable operations; queries as for `attend`."""
        scores = torch.einsum("bqhd,bkhd->bhqk", q, _for_heads(k, q.shape[2])) / self.attn_scale
        if self.cap is not None:
            scores = self.cap * torch.tanh(scores / self.cap)
        return scores.masked_fill(~self.visible(q.shape[1], k.shape[1], positions, q.device), -math.inf).softmax(-1)

    def mix(
        self, pattern: Float[Tensor, "batch head query key"], v: Float[Tensor, "batch key key_head d_head"]
    ) -> Float[Tensor, "batch query head d_head"]:
        """z: values mixed by attention probabilities."""
        return torch.einsum("bhqk,bkhd->bqhd", pattern, _for_heads(v, pattern.shape[1]))

    def post_of(self, hidden: Sequence[Tensor]) -> Float[Tensor, "*rows d_mlp"]:
        """The neurons' activations, of what the products `of_hidden` make."""
        if self.W_gate is None:
            return self.act(*hidden)
        gate, linear = hidden
        assert self.b_in is not None
        return self.gate(self.act(gate), linear) + self.b_in

    # The parts of a block, whole.

    def qkv(
        self, resid: Float[Tensor, "*batch pos d_model"], positions: Positions
    ) -> tuple[
        Float[Tensor, "*batch pos head d_head"],
        Float[Tensor, "*batch pos key_head d_head"],
        Float[Tensor, "*batch pos key_head d_head"],
    ]:
        """Queries, keys and values of the rows given."""
        q, k, v = products(self.ln1(resid), *self.of_qkv)
        return self.place_q(q, positions), self.place_k(k, positions), v

    def __call__(
        self, resid: Float[Tensor, "batch pos d_model"], positions: Positions
    ) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream after the block, of all positions of prompts: the parts in their order."""
        mid = resid + self.attn_out(self.attend(*self.qkv(resid, positions)))
        return mid if self.W_in is None else mid + self.mlp(resid if self.parallel else mid)

    def attn_sum(self, z: Float[Tensor, "*rows head d_head"]) -> Float[Tensor, "*rows d_model"]:
        """What the heads write, before the norm that some models put on it: `ln1_post` of it is attn_out."""
        return products(z.flatten(-2), *self.of_attn_out)[0]

    def attn_out(self, z: Float[Tensor, "*rows head d_head"]) -> Float[Tensor, "*rows d_model"]:
        return self.ln1_post(self.attn_sum(z))

    def mlp_post(self, resid: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_mlp"]:
        """The neurons' activations, of the residual stream that the MLP reads."""
        return self.post_of(products(self.ln2(resid), *self.of_hidden))

    def mlp_sum(self, post: Float[Tensor, "*rows d_mlp"]) -> Float[Tensor, "*rows d_model"]:
        """What the neurons write, before the norm that some models put on it: `ln2_post` of it is mlp_out."""
        return products(post, *self.of_mlp_out)[0]

    def mlp(self, resid: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """What the MLP adds to the residual stream, of the one that it reads."""
        return self.ln2_post(self.mlp_sum(self.mlp_post(resid)))


def _for_heads(x: Float[Tensor, "batch key key_head d_head"], n_heads: int) -> Float[Tensor, "batch key head d_head"]:
    """Keys or values, each as often as there are heads of queries that read it."""
    return x if x.shape[2] == n_heads else x.repeat_interleave(n_heads // x.shape[2], 2)


@dataclass(frozen=True)
class Weights:
    """A model's weights: views, no copies.

    Example:
        >>> from lnfree_interp import load_model, read_weights
        >>> model = load_model("tiny-noLN")
        >>> weights, tokens = read_weights(model), model.to_tokens("It was a dark and")
        >>> everywhere = slice(0, tokens.shape[1])
        >>> resid = weights.enter(tokens, everywhere)
        >>> for layer in weights.layers:
        ...     resid = layer(resid, everywhere)
        >>> logits = weights.ln_final(resid) @ weights.W_U + weights.b_U
        >>> bool((logits - model(tokens)).abs().max() < 1e-3)
        True
    """

    layers: tuple[Layer, ...]
    ln_final: Norm
    W_E: Float[Tensor, "d_vocab d_model"]
    W_pos: Float[Tensor, "n_ctx d_model"] | None  # None: positions are rotary
    W_U: Float[Tensor, "d_model d_vocab_out"]
    b_U: Float[Tensor, " d_vocab_out"]
    ln_embed: Norm = NO_NORM

    def reach(self, n_pos: int) -> None:
        """Have tables of rotary positions for prompts of so many tokens."""
        for layer in self.layers:
            if layer.rotary is not None:
                layer.rotary.reach(n_pos)

    def embed(self, tokens: Int[Tensor, "*rows"]) -> Float[Tensor, "*rows d_model"]:
        return self.ln_embed(self.W_E[tokens])

    def enter(self, tokens: Int[Tensor, "*batch pos"], positions: Positions) -> Float[Tensor, "*batch pos d_model"]:
        """The residual stream before the first layer, in fp32 at least."""
        embed = widened_norm(self.ln_embed)(wide(self.W_E[tokens]))
        return embed if self.W_pos is None else embed + wide(self.W_pos[positions])


def widened_norm(norm: Norm) -> Norm:
    return replace(norm, w=None if norm.w is None else wide(norm.w), b=None if norm.b is None else wide(norm.b))


def widened_norms(weights: Weights) -> Weights:
    """Weights for a pass in fp32 at least: the norms made wide, since `products` does it for the others."""
    layers = tuple(replace(layer, **of_norms(layer, widened_norm)) for layer in weights.layers)
    return replace(weights, layers=layers, **of_norms(weights, widened_norm))


def of_norms(part: Layer | Weights, change: Callable[[Norm], Norm]) -> dict[str, Any]:
    """Name -> what a change makes of it, of all norms of a layer or of weights themselves."""
    return {f.name: change(x) for f in fields(part) if isinstance(x := getattr(part, f.name), Norm)}
