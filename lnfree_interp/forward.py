"""A lean forward pass on a model's weights, under TransformerLens' hook names.

`run` is TransformerLens' `run_with_hooks` with three differences: it starts from tokens or from the residual
stream at any layer, it ends at the final residual stream (nothing is unembedded that was not asked for), and
the last layer can be computed at chosen positions only. Models that `read_weights` reads take a fast path: fused norms,
activation functions and attention, each weight read where it lies. All others, and models that carry hooks of their
own, go through TransformerLens' own forward with the same hooks and give the same results.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from . import through_hooks
from .lens import LensModel
from .products import joined, parted, products_of
from .through_hooks import Hook
from .weights import Layer, Norm, Positions, Weights, final_norm, read_weights

KeysAndValues = dict[int, tuple[Tensor, Tensor]]
"""Layer -> keys and values as attention reads them, Float[Tensor, "batch pos key_head d_head"]."""


@dataclass(frozen=True)
class Past:
    """Keys and values of positions before, of which the first `length` count.

    A layer's are read when the pass gets there, so that another stream may be filling them in.
    """

    length: int
    kept: KeysAndValues
    rows: Int[Tensor, " batch"] | None = None  # which of what is kept each row follows on; None: its own

    def before(self, layer: int) -> list[Tensor]:
        """The layer's keys and values."""
        return [x[:, : self.length] if self.rows is None else x[self.rows, : self.length] for x in self.kept[layer]]


@dataclass(frozen=True)
class Stream:
    """A residual stream on its way through the blocks, and what is to be done to it there.

    Attributes:
        resid: what enters the next block, Float[Tensor, "batch pos d_model"].
        hooks, positions, past, keep: as for `run`.
        qkv: what attention reads in the next block, where it is known: queries at the positions that the block
            computes (where `resid` then is, too), keys and values at all, those of the past before them.
    """

    resid: Float[Tensor, "batch pos d_model"]
    hooks: Mapping[str, Hook] = field(default_factory=dict)
    positions: slice | Tensor | None = None
    past: Past | None = None
    keep: KeysAndValues | None = None
    qkv: tuple[Tensor, Tensor, Tensor] | None = None

    def at(self, name: str, x: Tensor) -> Tensor:
        """What the hook of this name makes of an activation."""
        hook = self.hooks.get(name)
        new = None if hook is None else hook(x)
        return x if new is None else new

    @property
    def first(self) -> int:
        """The position of the first row."""
        return 0 if self.past is None else self.past.length


def run(
    model: LensModel,
    tokens: Int[Tensor, "batch pos"] | None = None,
    *,
    resid: Float[Tensor, "batch pos d_model"] | None = None,
    start_layer: int = 0,
    stop_at_layer: int | None = None,
    hooks: Mapping[str, Hook] | None = None,
    positions: Sequence[int] | slice | Int[Tensor, " kept"] | None = None,
    past: Past | None = None,
    keep: KeysAndValues | None = None,
    weights: Weights | None = None,
) -> Float[Tensor, "batch kept_pos d_model"]:
    """The final residual stream (before the final norm), or that of a layer, with hooks along the way.

    Args:
        tokens: Int[Tensor, "batch pos"]; or instead
        resid: Float[Tensor, "batch pos d_model"], the residual stream that enters `start_layer`, as it is after
            hooks that the model carries at that layer's hook_resid_pre: they are not run a second time.
        start_layer: from 0 to n_layers; at n_layers nothing is left to run.
        stop_at_layer: the first layer that is not run, from start_layer to n_layers (the default): what is returned is
            the stream that enters it, before hooks at its hook_resid_pre. Hooks of it and of later layers never run.
        hooks: hook name -> function of the activation; what it returns, if not None, replaces it. Names and
            shapes are TransformerLens' (`blocks.0.attn.hook_z`); each must be a hook of the model.
        positions: compute and return the residual stream of the last block that runs at these positions only. Queries,
            z, and all that comes after are then at these positions, keys and values at all.
        past: the keys and values of earlier positions, which the tokens follow.
        keep: filled with keys and values of each layer, those of the past before them.
        weights: to run in place of the model's own: with other norms or another activation function, say.

    Raises:
        ValueError: a hook name the model does not have, a layer that is not there; `past`, `keep` or other weights
            for a model or hooks that only TransformerLens' own forward serves.
    """
    hooks, n_layers = dict(hooks or {}), model.cfg.n_layers
    stop = n_layers if stop_at_layer is None else stop_at_layer
    if not 0 <= start_layer <= n_layers:
        raise ValueError(f"start_layer {start_layer} is outside 0..{n_layers}")
    if not start_layer <= stop <= n_layers:
        raise ValueError(f"stop_at_layer {stop} is outside {start_layer}..{n_layers}")
    for name in hooks:
        if name not in model.hook_dict:
            raise ValueError(f"the model has no hook {name!r}")
    if weights is not None and not _served(hooks):
        raise ValueError(f"hooks {sorted(hooks)} are not all served by the fast forward")
    if positions is not None and not isinstance(positions, (slice, Tensor)):
        positions = torch.tensor(list(positions), device=model.cfg.device)  # sent to the device once, not per use
    if resid is not None and start_layer == stop:
        return resid if positions is None else resid[:, positions]
    weights = weights or read_weights(model)
    if weights is not None and _served(hooks):
        if resid is None:
            assert tokens is not None
            resid = embed(weights, tokens, hooks, past)
            if stop == 0:
                return resid if positions is None else resid[:, positions]
        if stop < len(weights.layers):
            weights = replace(weights, layers=weights.layers[:stop])
        return run_streams(weights, [Stream(resid, hooks, positions, past, keep)], start_layer=start_layer)[0]
    if past is not None or keep is not None:
        raise ValueError("past keys and values need a model and hooks that the fast forward serves")
    return through_hooks.run(model, tokens, resid, start_layer, hooks, positions, stop)


_SERVED = (
    "hook_embed",
    "hook_pos_embed",
    "hook_resid_pre",
    "hook_q",
    "hook_k",
    "hook_v",
    "hook_rot_q",
    "hook_rot_k",
    "hook_pattern",
    "hook_z",
    "hook_attn_out",
    "hook_resid_mid",
    "mlp.hook_pre",
    "mlp.hook_pre_linear",
    "mlp.hook_post",
    "attn.hook_out",
    "mlp.hook_out",
    "hook_mlp_out",
    "hook_resid_post",
)


def _served(hooks: Mapping[str, Hook]) -> bool:
    return all(name.endswith(_SERVED) for name in hooks)


AnyStream = TypeVar("AnyStream", bound=Stream)


def embed(
    weights: Weights,
    tokens: Int[Tensor, "batch pos"],
    hooks: Mapping[str, Hook] | None = None,
    past: Past | None = None,
) -> Float[Tensor, "batch pos d_model"]:
    """The residual stream that enters the first block."""
    stream = Stream(weights.embed(tokens), hooks or {}, past=past)
    resid = stream.at("hook_embed", stream.resid)
    if weights.W_pos is None:
        return resid
    pos_embed = weights.W_pos[stream.first : stream.first + tokens.shape[1]]
    if "hook_pos_embed" in stream.hooks:
        pos_embed = stream.at("hook_pos_embed", pos_embed.expand_as(resid))
    return resid + pos_embed


def run_streams(weights: Weights, streams: Sequence[Stream], *, start_layer: int = 0) -> list[Tensor]:
    """The final residual streams, all going up the layers together, each weight read once for all of them.

    In every part of a block they are served in their order, so that keys and values of one can be the `past` of a later
    one. Where there are several, gradients of the weights are left out.
    """
    weights.reach(max(s.first + s.resid.shape[1] for s in streams))
    for i in range(start_layer, len(weights.layers)):
        streams = block(weights, i, streams)
    return [s.resid for s in streams]


def block(weights: Weights, i: int, streams: Sequence[AnyStream]) -> list[AnyStream]:
    """The streams after block i."""
    if not streams:
        return []
    layer, name = weights.layers[i], f"blocks.{i}."
    resids, mids = _attentions(layer, i, streams, last=i == len(weights.layers) - 1)
    if layer.W_in is not None:
        mids = [s.at(name + "hook_resid_mid", mid) for s, mid in zip(streams, mids)]
        mlp_outs = _mlps(layer, name, streams, resids if layer.parallel else mids)
        mids = [mid + s.at(name + "hook_mlp_out", x) for s, mid, x in zip(streams, mids, mlp_outs)]
    return [replace(s, resid=s.at(name + "hook_resid_post", mid), qkv=None) for s, mid in zip(streams, mids)]


def _attentions(
    layer: Layer, i: int, streams: Sequence[Stream], last: bool
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Each stream before and after attention, at the positions that the block computes."""
    name = f"blocks.{i}."
    resids = [s.at(name + "hook_resid_pre", s.resid) for s in streams]
    positions = [s.positions if last else None for s in streams]
    new = [j for j, s in enumerate(streams) if s.qkv is None]
    xs = [layer.ln1(resids[j]) for j in new]
    if last:
        of_queries = [x if positions[j] is None else x[:, positions[j]] for j, x in zip(new, xs)]
        made = products_of(of_queries, *layer.of_qkv[:1]) + products_of(xs, *layer.of_qkv[1:])
        for j in new:
            resids[j] = resids[j] if positions[j] is None else resids[j][:, positions[j]]
    else:
        made = products_of(xs, *layer.of_qkv)
    qkvs = zip(*made)
    zs = [_attention(layer, i, s, s.qkv or next(qkvs), where).flatten(-2) for s, where in zip(streams, positions)]
    (sums,) = products_of(zs, *layer.of_attn_out)
    attn_outs = [layer.ln1_post(s.at(name + "attn.hook_out", x)) for s, x in zip(streams, sums)]
    return resids, [resid + s.at(name + "hook_attn_out", x) for s, resid, x in zip(streams, resids, attn_outs)]


def _attention(
    layer: Layer, i: int, s: Stream, qkv: tuple[Tensor, Tensor, Tensor], positions: slice | Tensor | None
) -> Float[Tensor, "batch query head d_head"]:
    """z of a stream in block i, of its q, k and v as the products make them, or as it knows them."""
    name = f"blocks.{i}.attn."
    q, k, v = qkv
    end = k.shape[1] if s.qkv else s.first + k.shape[1]
    queries = _absolute(positions, s.first, end, k.device)
    if s.qkv is None:
        q, k, v = s.at(name + "hook_q", q), s.at(name + "hook_k", k), s.at(name + "hook_v", v)
        q, k = layer.place_q(q, queries), layer.place_k(k, slice(s.first, end))
        q, k = s.at(name + "hook_rot_q", q), s.at(name + "hook_rot_k", k)
        if s.past is not None and s.first:
            k, v = (torch.cat([old, x], 1) for old, x in zip(s.past.before(i), (k, v)))
    if s.keep is not None:
        s.keep[i] = k, v
    if name + "hook_pattern" in s.hooks:
        z = layer.mix(s.at(name + "hook_pattern", layer.pattern(q, k, queries)), v)
    else:
        z = layer.attend(q, k, v, queries)
    return s.at(name + "hook_z", z)


def _absolute(positions: slice | Tensor | None, first: int, end: int, device) -> Positions:
    """Positions counted from the start of the prompt: a slice where they are the last ones, which attention knows."""
    if positions is None:
        return slice(first, end)
    if isinstance(positions, slice):
        where = range(first, end)[positions]
        if where.step == 1 and where.stop == end and len(where):
            return slice(where.start, end)
    return torch.arange(first, end, device=device)[positions]


_INSIDE_MLP = ("hook_pre", "hook_pre_linear", "hook_post", "hook_out")


def _mlps(layer: Layer, name: str, streams: Sequence[Stream], reads: Sequence[Tensor]) -> Sequence[Tensor]:
    """What the MLP adds to each stream, of what it reads."""
    watched = any(f"{name}mlp.{hook}" in s.hooks for s in streams if s.hooks for hook in _INSIDE_MLP)
    if watched or any(x.requires_grad for x in reads):
        pre, pre_linear, post, out = (f"{name}mlp.{hook}" for hook in _INSIDE_MLP)
        made = products_of([layer.ln2(x) for x in reads], *layer.of_hidden)
        hidden = [[s.at(at, x) for s, x in zip(streams, xs)] for at, xs in zip((pre, pre_linear), made)]
        posts = [s.at(post, layer.post_of(x)) for s, x in zip(streams, zip(*hidden))]
        (sums,) = products_of(posts, *layer.of_mlp_out)
        return [layer.ln2_post(s.at(out, x)) for s, x in zip(streams, sums)]
    return parted(mlp(layer, joined(reads)), reads)


HIDDEN = {"cpu": 2**21, "cuda": 2**27}
"""Hidden activations of an MLP at a time, where nobody looks at them: on a CPU, what its caches hold; 2^24 on other
devices."""


def mlp(layer: Layer, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
    """What the MLP adds to the residual stream that it reads, some rows at a time."""
    assert layer.W_in is not None
    step = max(1, HIDDEN.get(x.device.type, 2**24) // layer.W_in.shape[1])
    if x.shape[:-1].numel() <= step:
        return layer.mlp(x)
    return torch.cat([layer.mlp(rows) for rows in x.flatten(0, -2).split(step)]).view_as(x)


def unembed(
    model: LensModel,
    resid: Float[Tensor, "*rows d_model"],
    tokens: Int[Tensor, "*rows k"] | None = None,
    *,
    norm: Norm | None = None,
) -> Float[Tensor, "*rows d_vocab_or_k"]:
    """Logits of a final residual stream: of the whole vocabulary, or of k tokens for each row.

    Asking for a few tokens costs k columns of W_U per row in place of all of them.

    Args:
        norm: in place of the model's final norm.
    """
    x = (norm or final_norm(model))(resid)
    W_U, b_U = model.unembed.W_U, model.unembed.b_U
    if tokens is None:
        logits = F.linear(x, W_U.T.to(x.dtype), b_U.to(x.dtype))
    else:
        logits = torch.einsum("...d,...kd->...k", x, W_U.T[tokens].to(x.dtype)) + b_U[tokens]
    cap = getattr(model.cfg, "output_logits_soft_cap", -1.0)
    return cap * torch.tanh(logits / cap) if cap and cap > 0 else logits
