"""A lean forward pass on a model's weights, under TransformerLens' hook names.

`run` is TransformerLens' `run_with_hooks` with three differences: it starts from tokens or from the residual
stream at any layer, it ends at the final residual stream (nothing is unembedded that was not asked for), and
the last layer can be computed at chosen positions only. Models that `read_weights` reads take a fast path: fused norms,
activation functions and attention, each weight read where it lies. All others, and models that carry hooks of their
own, go through TransformerLens' own forward with the same hooks and give the same results.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from . import through_hooks
from .lens import LensModel
from .products import Linear, ProductsOfBoth, products
from .through_hooks import Hook
from .weights import Norm, Weights, final_norm, read_weights

KeysAndValues = dict[int, tuple[Tensor, Tensor]]
"""Layer -> keys and values as attention reads them, Float[Tensor, "batch pos key_head d_head"]."""


@dataclass(frozen=True)
class Past:
    """Keys and values of positions before, of which the first `length` count.

    A layer's are read when the pass gets there, so that another pass may be filling them in.
    """

    length: int
    kept: KeysAndValues


def run(
    model: LensModel,
    tokens: Int[Tensor, "batch pos"] | None = None,
    *,
    resid: Float[Tensor, "batch pos d_model"] | None = None,
    start_layer: int = 0,
    hooks: Mapping[str, Hook] | None = None,
    positions: Sequence[int] | slice | Int[Tensor, " kept"] | None = None,
    past: Past | None = None,
    keep: KeysAndValues | None = None,
    weights: Weights | None = None,
) -> Float[Tensor, "batch kept_pos d_model"]:
    """The final residual stream (before the final norm), with hooks along the way.

    Args:
        tokens: Int[Tensor, "batch pos"]; or instead
        resid: Float[Tensor, "batch pos d_model"], the residual stream that enters `start_layer`, as it is after
            hooks that the model carries at that layer's hook_resid_pre: they are not run a second time.
        start_layer: from 0 to n_layers; at n_layers nothing is left to run.
        hooks: hook name -> function of the activation; what it returns, if not None, replaces it. Names and
            shapes are TransformerLens' (`blocks.0.attn.hook_z`); each must be a hook of the model.
        positions: compute and return the last block's residual stream at these positions only. Queries, z, and
            all that comes after are then at these positions, keys and values at all.
        past: the keys and values of earlier positions, which the tokens follow.
        keep: filled with keys and values of each layer, those of the past before them.
        weights: to run in place of the model's own: with other norms or another activation function, say.

    Raises:
        ValueError: a hook name the model does not have, a layer that is not there; `past`, `keep` or other weights
            for a model or hooks that only TransformerLens' own forward serves.
    """
    hooks, n_layers = dict(hooks or {}), model.cfg.n_layers
    if not 0 <= start_layer <= n_layers:
        raise ValueError(f"start_layer {start_layer} is outside 0..{n_layers}")
    for name in hooks:
        if name not in model.hook_dict:
            raise ValueError(f"the model has no hook {name!r}")
    if weights is not None and not _served(hooks):
        raise ValueError(f"hooks {sorted(hooks)} are not all served by the fast forward")
    if positions is not None and not isinstance(positions, (slice, Tensor)):
        positions = torch.tensor(list(positions), device=model.cfg.device)  # sent to the device once, not per use
    if resid is not None and start_layer == n_layers:
        return resid if positions is None else resid[:, positions]
    weights = weights or read_weights(model)
    if weights is not None and _served(hooks):
        return _finish(_steps(weights, tokens, resid, start_layer, hooks, positions, past, keep))
    if past is not None or keep is not None:
        raise ValueError("past keys and values need a model and hooks that the fast forward serves")
    return through_hooks.run(model, tokens, resid, start_layer, hooks, positions)


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
    "hook_mlp_out",
    "hook_resid_post",
)


def _served(hooks: Mapping[str, Hook]) -> bool:
    return all(name.endswith(_SERVED) for name in hooks)


Asked = tuple[Tensor, tuple[Linear, ...]]
"""What a pass asks for: the products of a tensor with these."""


def _steps(
    weights: Weights, tokens, resid, start_layer: int, hooks: Mapping[str, Hook], positions, past: Past | None, keep
) -> Generator[Asked, tuple[Tensor, ...], Tensor]:
    """A pass through the weights that leaves its matrix products to whoever drives it."""

    def at(name: str, x: Tensor) -> Tensor:
        hook = hooks.get(name)
        new = hook(x) if hook is not None else None
        return x if new is None else new

    n_past, n_pos = 0 if past is None else past.length, (tokens if resid is None else resid).shape[1]
    everywhere = slice(n_past, n_past + n_pos)
    weights.reach(n_past + n_pos)
    if resid is None:
        resid = embed = at("hook_embed", weights.embed(tokens))
        if weights.W_pos is not None:
            pos_embed = weights.W_pos[everywhere]
            if "hook_pos_embed" in hooks:
                pos_embed = at("hook_pos_embed", pos_embed.expand_as(embed))
            resid = embed + pos_embed
    for i in range(start_layer, len(weights.layers)):
        layer, name = weights.layers[i], f"blocks.{i}."
        resid = at(name + "hook_resid_pre", resid)
        x = of_queries = layer.ln1(resid)
        queries: slice | Tensor = everywhere
        if i < len(weights.layers) - 1:
            q, k, v = yield x, layer.of_qkv
        else:  # queries apart, so that passes that want all positions and passes that want some stay in step
            if positions is not None:
                queries = torch.arange(n_past, n_past + n_pos, device=resid.device)[positions]
                resid, of_queries = resid[:, positions], x[:, positions]
            (q,) = yield of_queries, layer.of_qkv[:1]
            k, v = yield x, layer.of_qkv[1:]
        q, k, v = at(name + "attn.hook_q", q), at(name + "attn.hook_k", k), at(name + "attn.hook_v", v)
        q, k = layer.place_q(q, queries), layer.place_k(k, everywhere)
        q, k = at(name + "attn.hook_rot_q", q), at(name + "attn.hook_rot_k", k)
        if past is not None:
            k, v = (torch.cat([old[:, :n_past], new], 1) for old, new in zip(past.kept[i], (k, v)))
        if keep is not None:
            keep[i] = k, v
        if name + "attn.hook_pattern" in hooks:
            z = layer.mix(at(name + "attn.hook_pattern", layer.pattern(q, k, queries)), v)
        else:
            z = layer.attend(q, k, v, queries)
        (attn_sum,) = yield at(name + "attn.hook_z", z).flatten(-2), layer.of_attn_out
        mid = resid + at(name + "hook_attn_out", layer.ln1_post(attn_sum))
        if layer.W_in is not None:
            mid = at(name + "hook_resid_mid", mid)
            hidden = yield layer.ln2(resid if layer.parallel else mid), layer.of_hidden
            hidden = tuple(at(name + "mlp." + hook, x) for hook, x in zip(("hook_pre", "hook_pre_linear"), hidden))
            (mlp_sum,) = yield at(name + "mlp.hook_post", layer.post_of(hidden)), layer.of_mlp_out
            mid = mid + at(name + "hook_mlp_out", layer.ln2_post(mlp_sum))
        resid = at(name + "hook_resid_post", mid)
    return resid


def _finish(steps: Generator[Asked, tuple[Tensor, ...], Tensor]) -> Tensor:
    try:
        x, linears = next(steps)
        while True:
            x, linears = steps.send(products(x, *linears))
    except StopIteration as end:
        return end.value


def run_both(
    model: LensModel, graph: Mapping[str, Any], plain: Mapping[str, Any], *, weights: Weights | None = None
) -> tuple[Float[Tensor, "batch kept_pos d_model"], Float[Tensor, "other_batch other_kept_pos d_model"]]:
    """Two passes in step, the first with a graph for gradients and the second without, each weight read once for both.

    In every layer the second goes first, so its keys and values can be the first's `past`. The gradients of both
    passes' weights are left out.

    Args:
        graph, plain: what `run` takes by name: tokens or resid, start_layer, hooks, positions, past, keep.

    Raises:
        ValueError: only TransformerLens' own forward serves the model or the hooks.
    """
    weights = weights or read_weights(model)
    passes = []
    for options in (plain, graph):
        hooks = dict(options.get("hooks") or {})
        if weights is None or not _served(hooks):
            raise ValueError("two passes in step need a model and hooks that the fast forward serves")
        start = options.get("start_layer", 0)
        given = (options.get(name) for name in ("positions", "past", "keep"))
        passes.append(_steps(weights, options.get("tokens"), options.get("resid"), start, hooks, *given))
    answers: tuple = (None, None)
    while True:
        asked: list[Asked] = []
        ends = []
        for steps, answer, with_graph in zip(passes, answers, (False, True)):
            with torch.set_grad_enabled(with_graph):
                try:
                    asked.append(steps.send(answer))
                except StopIteration as end:
                    ends.append(end.value)
        if ends:
            return ends[1], ends[0]
        (others, linears), (x, _) = asked
        with torch.enable_grad():
            found = ProductsOfBoth.apply(x, others, *(t for linear in linears for t in linear))
        answers = found[len(linears) :], found[: len(linears)]


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
