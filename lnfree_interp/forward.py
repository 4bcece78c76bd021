"""A lean forward pass on a model's packed weights, under TransformerLens' hook names.

`run` is TransformerLens' `run_with_hooks` with three differences: it starts from tokens or from the residual
stream at any layer, it ends at the final residual stream (nothing is unembedded that was not asked for), and
the last layer can be computed at chosen positions only. Models whose blocks the packed forward covers
(GPT-2's kind: see `covers`) take a fast path: fused layer norm, GELU and attention, each weight read where it
lies. All others, and models that carry hooks of their own, go through TransformerLens' own forward with the same
hooks and give the same results.

Nothing is copied from the model and nothing kept from one call to the next, so that edits of the weights, which may
leave no trace (`W.data`), are always followed.

The pieces of the fast path (`layer_qkv`, `attend`, `layer_attn_out`, `layer_mlp_post`, `layer_mlp_out`) work on any
number of rows, so that callers who keep keys and values of earlier positions can run a layer on the rows that changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .lens import LensModel

Hook = Callable[[Tensor], "Tensor | None"]
"""Reads an activation; what it returns, if not None, takes the activation's place."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_fast": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}
NORMALIZATIONS = (None, "LN", "LNPre", "RMS", "RMSPre")

# cfg fields that change the forward, with the only values under which the packed forward is the model's own.
_COVERED = {
    "positional_embedding_type": ("standard",),
    "attention_dir": ("causal",),
    "parallel_attn_mlp": (False,),
    "gated_mlp": (False,),
    "num_experts": (None,),
    "use_local_attn": (False,),
    "n_key_value_heads": (None,),
    "use_qk_norm": (False,),
    "clip_qkv": (None,),
    "use_logn_attn": (False,),
    "use_attention_sinks": (False,),
    "use_normalization_before_and_after": (False,),
    "post_embedding_ln": (False,),
    "attn_scores_soft_cap": (-1.0, 0.0, None),
    "load_in_4bit": (False,),
    "n_devices": (1, None),
    "use_attn_in": (False,),
    "use_split_qkv_input": (False,),
    "use_attn_result": (False,),
    "use_hook_mlp_in": (False,),
    "final_rms": (False,),
    "original_architecture": (None, "GPT2LMHeadModel", "neel", "neel-solu-old"),
}


@dataclass(frozen=True)
class Norm:
    """One normalisation of the residual stream: kind, its weights if it still has them, and epsilon."""

    kind: str | None
    eps: float
    w: Tensor | None = None
    b: Tensor | None = None

    def __call__(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        if self.kind is None:
            return x
        if self.kind.startswith("RMS"):
            return F.rms_norm(x, x.shape[-1:], self.w, self.eps)
        return F.layer_norm(x, x.shape[-1:], self.w, self.b, self.eps)

    @property
    def centres(self) -> bool:
        """Whether it subtracts the mean over d_model."""
        return self.kind is not None and self.kind.startswith("LN")

    def scale(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows 1"]:
        """What x is divided by: its standard deviation (LN) or root mean square (RMS); 1 without a norm."""
        if self.kind is None:
            return torch.ones_like(x[..., :1])
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.centres:
            x = x - x.mean(-1, keepdim=True)
        return (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()


@dataclass(frozen=True)
class Layer:
    """One block's weights: `x @ W + b` throughout, for q, k and v head by head."""

    ln1: Norm
    W_Q: Float[Tensor, "head d_model d_head"]
    b_Q: Float[Tensor, "head d_head"]
    W_K: Float[Tensor, "head d_model d_head"]
    b_K: Float[Tensor, "head d_head"]
    W_V: Float[Tensor, "head d_model d_head"]
    b_V: Float[Tensor, "head d_head"]
    W_O: Float[Tensor, "heads_d_head d_model"]
    b_O: Float[Tensor, " d_model"]
    attn_scale: float
    ln2: Norm | None = None
    W_in: Float[Tensor, "d_model d_mlp"] | None = None
    b_in: Float[Tensor, " d_mlp"] | None = None
    W_out: Float[Tensor, "d_mlp d_model"] | None = None
    b_out: Float[Tensor, " d_model"] | None = None

    @property
    def qkv(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """(W, b) of queries, keys and values."""
        return (self.W_Q, self.b_Q), (self.W_K, self.b_K), (self.W_V, self.b_V)


@dataclass(frozen=True)
class PackedWeights:
    """A model's weights as the fast path reads them: views, no copies."""

    layers: tuple[Layer, ...]
    ln_final: Norm
    W_E: Float[Tensor, "d_vocab d_model"]
    W_pos: Float[Tensor, "n_ctx d_model"]
    W_U: Float[Tensor, "d_model d_vocab_out"]
    b_U: Float[Tensor, " d_vocab_out"]
    act: Callable[[Tensor], Tensor]


# ---------------------------------------------------------------------------------------------------------
# Packing


def norm_of(module: Any, kind: str | None, eps: float) -> Norm:
    """The `Norm` of a TransformerLens normalisation module; `eps` is for one that has none of its own."""
    return Norm(kind, float(getattr(module, "eps", eps)), getattr(module, "w", None), getattr(module, "b", None))


def final_norm(model: LensModel) -> Norm:
    """The normalisation before the unembedding, by `cfg.normalization_type`.

    Raises:
        ValueError: a normalisation TransformerLens does not have; hooks of the model's own on the final norm or the
            unembedding, which no closed form knows of.
    """
    kind = model.cfg.normalization_type
    if kind not in NORMALIZATIONS:
        known = ", ".join(map(str, NORMALIZATIONS))
        raise ValueError(f"normalization_type {kind!r} is unknown; known are {known}")
    parts = {"ln_final": getattr(model, "ln_final", None), "unembed": model.unembed}
    hooked = [f"{part}.{name}".rstrip(".") for part, module in parts.items() for name in own_hooks(module)]
    if hooked or _carries_hooks(model):
        where = hooked[0] if hooked else "its root"
        raise ValueError(f"the model carries a hook at {where}, where nothing but its own forward runs it; remove it")
    if kind is not None and getattr(model.cfg, "final_rms", False):
        kind = kind.replace("LN", "RMS")
    return norm_of(getattr(model, "ln_final", None), kind, model.cfg.eps)


def own_hooks(model: LensModel | torch.nn.Module | None) -> tuple[str, ...]:
    """The names of a model's modules that carry hooks: a user's own, since ours never outlive a call."""
    return () if model is None else tuple(name for name, m in model.named_modules() if _carries_hooks(m))


def _carries_hooks(module: LensModel | torch.nn.Module) -> bool:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind) for kind in kinds)


def covers(model: LensModel) -> bool:
    """Whether the packed forward computes exactly what the model's own forward computes.

    False for blocks of another kind (rotary, gated, grouped, ...), for modules that are not TransformerLens' own, and
    while the model carries hooks of a user's, which only its own forward runs.
    """
    cfg = model.cfg
    if any(getattr(cfg, field, allowed[0]) not in allowed for field, allowed in _COVERED.items()):
        return False
    if not getattr(cfg, "attn_only", False) and cfg.act_fn not in ACTIVATIONS:
        return False
    if cfg.normalization_type not in NORMALIZATIONS or not hasattr(model, "blocks"):
        return False
    if any(type(module).__module__.split(".")[0] not in ("transformer_lens", "torch") for module in model.modules()):
        return False
    if model.training and any(m.p > 0 for m in model.modules() if isinstance(m, torch.nn.Dropout)):
        return False
    return not own_hooks(model)


def packed_weights(model: LensModel) -> PackedWeights | None:
    """The model's weights as they are now, views of them; None for a model that `covers` says is not served."""
    if not covers(model):
        return None
    with torch.no_grad():
        return _pack(model)


def _pack(model: LensModel) -> PackedWeights:
    cfg, layers = model.cfg, []
    norm = partial(norm_of, kind=cfg.normalization_type, eps=cfg.eps)
    for block in model.blocks:
        attn, mlp = block.attn, None if getattr(cfg, "attn_only", False) else block.mlp
        of_attn: dict[str, Any] = {f"{part}_{x}": getattr(attn, f"{part}_{x}") for x in "QKV" for part in "Wb"}
        of_mlp: dict[str, Any] = {name: getattr(mlp, name, None) for name in ("W_in", "b_in", "W_out", "b_out")}
        layers.append(
            Layer(
                ln1=norm(block.ln1),
                **of_attn,
                W_O=attn.W_O.flatten(0, 1),
                b_O=attn.b_O,
                attn_scale=float(attn.attn_scale),
                ln2=None if mlp is None else norm(block.ln2),
                **of_mlp,
            )
        )
    return PackedWeights(
        layers=tuple(layers),
        ln_final=final_norm(model),
        W_E=model.embed.W_E,
        W_pos=model.pos_embed.W_pos,
        W_U=model.unembed.W_U,
        b_U=model.unembed.b_U,
        act=ACTIVATIONS.get(cfg.act_fn, F.gelu),
    )


# ---------------------------------------------------------------------------------------------------------
# The pieces of a block, on any rows


def layer_qkv(
    layer: Layer, resid: Float[Tensor, "*rows d_model"]
) -> tuple[Float[Tensor, "*rows head d_head"], Float[Tensor, "*rows head d_head"], Float[Tensor, "*rows head d_head"]]:
    """Queries, keys and values of the rows given."""
    q, k, v = products(layer.ln1(resid), *layer.qkv)
    return q, k, v


Linear = tuple[Tensor, Tensor]
"""W and b of a product x W + b: a matrix [d_in, d_out] and its bias, or one of each for every head."""


def products(x: Float[Tensor, "*rows d_in"], *linears: Linear) -> tuple[Tensor, ...]:
    """x W + b for each W and b: [*rows, d_out] of a matrix, [*rows, head, d_out] of a matrix per head.

    In the precision of x: weights that are stored in less are made wide one at a time, and never kept so for gradients.
    """
    if all(W.ndim == 2 and W.dtype == x.dtype for W, _ in linears):
        return tuple(F.linear(x, W.T, b) for W, b in linears)
    return _HeadProducts.apply(x, *(t for linear in linears for t in linear))


def _product(rows: Float[Tensor, "row d_in"], W: Tensor, b: Tensor) -> Tensor:
    W, b = W.to(rows.dtype), b.to(rows.dtype)
    if W.ndim == 2:
        return F.linear(rows, W.T, b)
    return torch.baddbmm(b[:, None], rows.expand(len(W), -1, -1), W).transpose(0, 1)


class _HeadProducts(torch.autograd.Function):
    """`products`, the weights read where they lie, with a gradient for x alone that never has an axis head."""

    @staticmethod
    def forward(ctx, x: Tensor, *linears: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*linears[::2])
        rows = x.reshape(-1, x.shape[-1])
        return tuple(_product(rows, W, b).unflatten(0, x.shape[:-1]) for W, b in zip(linears[::2], linears[1::2]))

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _gradient(ctx.saved_tensors, grads), *(None for _ in range(2 * len(grads)))


def _gradient(weights: Sequence[Tensor], grads: Sequence[Tensor | None]) -> Tensor | None:
    """The gradient of x from those of its products."""
    total = None
    for W, grad in zip(weights, grads):
        if grad is None:
            continue
        W = W.to(grad.dtype)
        if W.ndim == 2:
            total = grad @ W.T if total is None else total + grad @ W.T
            continue
        heads, shape = grad.flatten(0, -3).transpose(0, 1), grad.shape[:-2]
        before = heads.new_zeros(heads.shape[1], W.shape[1]) if total is None else total.flatten(0, -2)
        total = torch.addbmm(before, heads, W.transpose(1, 2), beta=0 if total is None else 1).unflatten(0, shape)
    return total


def attend(
    layer: Layer,
    q: Float[Tensor, "batch query head d_head"],
    k: Float[Tensor, "batch key head d_head"],
    v: Float[Tensor, "batch key head d_head"],
    mask: Bool[Tensor, "query key"] | None = None,
) -> Float[Tensor, "batch query head d_head"]:
    """z of the queries, through PyTorch's fused attention. Without a mask: causal, the queries at the end."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    n_query, n_key = q.shape[2], k.shape[2]
    causal = mask is None and n_query == n_key > 1
    if mask is None and not causal and n_query > 1:
        mask = causal_mask(n_query, n_key, q.device)
    z = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=1 / layer.attn_scale)
    return z.transpose(1, 2)


def causal_mask(n_query: int, n_key: int, device=None) -> Bool[Tensor, "query key"]:
    """True where a query may look, the queries being the last of the keys' positions."""
    return torch.ones(n_query, n_key, dtype=torch.bool, device=device).tril(n_key - n_query)


def layer_attn_out(layer: Layer, z: Float[Tensor, "*rows head d_head"]) -> Float[Tensor, "*rows d_model"]:
    return F.linear(z.flatten(-2), layer.W_O.T, layer.b_O)


def layer_mlp_post(
    packed: PackedWeights, layer: Layer, resid_mid: Float[Tensor, "*rows d_model"]
) -> Float[Tensor, "*rows d_mlp"]:
    assert layer.ln2 is not None and layer.W_in is not None
    return packed.act(F.linear(layer.ln2(resid_mid), layer.W_in.T, layer.b_in))


def layer_mlp_out(layer: Layer, post: Float[Tensor, "*rows d_mlp"]) -> Float[Tensor, "*rows d_model"]:
    assert layer.W_out is not None
    return F.linear(post, layer.W_out.T, layer.b_out)


# ---------------------------------------------------------------------------------------------------------
# Whole passes


@dataclass(frozen=True)
class Past:
    """Keys and values of the first `length` positions: layer -> (k, v), each Float[Tensor, "batch length head d_head"].

    A layer's are read when the pass gets there, so that another pass may be filling them in.
    """

    length: int
    kept: dict[int, tuple[Tensor, Tensor]]


def run(
    model: LensModel,
    tokens: Int[Tensor, "batch pos"] | None = None,
    *,
    resid: Float[Tensor, "batch pos d_model"] | None = None,
    start_layer: int = 0,
    hooks: Mapping[str, Hook] | None = None,
    positions: Sequence[int] | slice | Int[Tensor, " kept"] | None = None,
    past: Past | None = None,
    packed: PackedWeights | None = None,
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
        packed: weights to run in place of the model's own: with other norms or another activation function, say.

    Raises:
        ValueError: a hook name the model does not have, a layer that is not there; `past` or other weights where the
            packed forward does not serve.
    """
    hooks, n_layers = dict(hooks or {}), model.cfg.n_layers
    if not 0 <= start_layer <= n_layers:
        raise ValueError(f"start_layer {start_layer} is outside 0..{n_layers}")
    for name in hooks:
        if name not in model.hook_dict:
            raise ValueError(f"the model has no hook {name!r}")
    if packed is not None and not _served(hooks):
        raise ValueError(f"hooks {sorted(hooks)} are not all served by the packed forward")
    if positions is not None and not isinstance(positions, (slice, Tensor)):
        positions = torch.tensor(list(positions), device=model.cfg.device)  # sent to the device once, not per use
    if resid is not None and start_layer == n_layers:
        return resid if positions is None else resid[:, positions]
    packed = packed or packed_weights(model)
    if packed is not None and _served(hooks):
        return _finish(_steps(packed, tokens, resid, start_layer, hooks, positions, past))
    if past is not None:
        raise ValueError("past keys and values need a model and hooks that the packed forward serves")
    return _run_hooked(model, tokens, resid, start_layer, hooks, positions)


_SERVED = (
    "hook_embed",
    "hook_pos_embed",
    "hook_resid_pre",
    "hook_q",
    "hook_k",
    "hook_v",
    "hook_pattern",
    "hook_z",
    "hook_attn_out",
    "hook_resid_mid",
    "mlp.hook_pre",
    "mlp.hook_post",
    "hook_mlp_out",
    "hook_resid_post",
)


def _served(hooks: Mapping[str, Hook]) -> bool:
    return all(name.endswith(_SERVED) for name in hooks)


Asked = tuple[Tensor, tuple[Linear, ...]]
"""What a pass asks for: the products of a tensor with these."""


def _steps(packed, tokens, resid, start_layer, hooks, positions, past) -> Generator[Asked, tuple[Tensor, ...], Tensor]:
    """A pass through the packed weights that leaves its matrix products to whoever drives it."""

    def at(name: str, x: Tensor) -> Tensor:
        hook = hooks.get(name)
        new = hook(x) if hook is not None else None
        return x if new is None else new

    n_past = 0 if past is None else past.length
    if resid is None:
        embed = at("hook_embed", packed.W_E[tokens])
        pos_embed = packed.W_pos[n_past : n_past + tokens.shape[1]]
        if "hook_pos_embed" in hooks:
            pos_embed = at("hook_pos_embed", pos_embed.expand_as(embed))
        resid = embed + pos_embed
    for i in range(start_layer, len(packed.layers)):
        layer, name = packed.layers[i], f"blocks.{i}."
        resid = at(name + "hook_resid_pre", resid)
        x = of_queries = layer.ln1(resid)
        mask = None
        if i < len(packed.layers) - 1:
            q, k, v = yield x, layer.qkv
        else:  # queries apart, so that passes that want all positions and passes that want some stay in step
            if positions is not None:
                n_pos = resid.shape[1]
                resid, of_queries = resid[:, positions], x[:, positions]
                mask = causal_mask(n_pos, n_past + n_pos, resid.device)[positions]
            (q,) = yield of_queries, layer.qkv[:1]
            k, v = yield x, layer.qkv[1:]
        q, k, v = at(name + "attn.hook_q", q), at(name + "attn.hook_k", k), at(name + "attn.hook_v", v)
        if past is not None:
            k, v = (torch.cat(both, 1) for both in zip(past.kept[i], (k, v)))
        if name + "attn.hook_pattern" in hooks:
            z = _attend_by_pattern(layer, q, k, v, mask, partial(at, name + "attn.hook_pattern"))
        else:
            z = attend(layer, q, k, v, mask)
        (attn_out,) = yield at(name + "attn.hook_z", z).flatten(-2), ((layer.W_O, layer.b_O),)
        resid = resid + at(name + "hook_attn_out", attn_out)
        if layer.W_in is not None:
            resid = at(name + "hook_resid_mid", resid)
            (pre,) = yield layer.ln2(resid), ((layer.W_in, layer.b_in),)
            post = at(name + "mlp.hook_post", packed.act(at(name + "mlp.hook_pre", pre)))
            (mlp_out,) = yield post, ((layer.W_out, layer.b_out),)
            resid = resid + at(name + "hook_mlp_out", mlp_out)
        resid = at(name + "hook_resid_post", resid)
    return resid


def _finish(steps: Generator[Asked, tuple[Tensor, ...], Tensor]) -> Tensor:
    try:
        x, linears = next(steps)
        while True:
            x, linears = steps.send(products(x, *linears))
    except StopIteration as end:
        return end.value


def run_both(
    model: LensModel, graph: Mapping[str, Any], plain: Mapping[str, Any], *, packed: PackedWeights | None = None
) -> tuple[Float[Tensor, "batch kept_pos d_model"], Float[Tensor, "other_batch other_kept_pos d_model"]]:
    """Two passes in step, the first with a graph for gradients and the second without, each weight read once for both.

    In every layer the second goes first, so its keys and values can be the first's `past`. The gradients of both
    passes' weights are left out.

    Args:
        graph, plain: what `run` takes by name: tokens, hooks, positions, past.

    Raises:
        ValueError: the packed forward does not serve the model or the hooks.
    """
    packed = packed or packed_weights(model)
    passes = []
    for options in (plain, graph):
        hooks = dict(options.get("hooks") or {})
        if packed is None or not _served(hooks):
            raise ValueError("two passes in step need a model and hooks that the packed forward serves")
        start = options.get("start_layer", 0)
        given = (options.get(name) for name in ("positions", "past"))
        passes.append(_steps(packed, options.get("tokens"), options.get("resid"), start, hooks, *given))
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
            found = _ProductsOfBoth.apply(x, others, *(t for linear in linears for t in linear))
        answers = found[len(linears) :], found[: len(linears)]


class _ProductsOfBoth(torch.autograd.Function):
    """`products` of two tensors at once, with a gradient for the first alone."""

    @staticmethod
    def forward(ctx, x: Tensor, others: Tensor, *linears: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*linears[::2])
        rows, sizes = torch.cat([x.flatten(0, -2), others.flatten(0, -2)]), [x[..., 0].numel(), others[..., 0].numel()]
        found = [_product(rows, W, b).split(sizes) for W, b in zip(linears[::2], linears[1::2])]
        of_x = [part.unflatten(0, x.shape[:-1]) for part, _ in found]
        of_others = [part.unflatten(0, others.shape[:-1]) for _, part in found]
        ctx.mark_non_differentiable(*of_others)
        ctx.set_materialize_grads(False)
        return *of_x, *of_others

    @staticmethod
    def backward(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        n = len(ctx.saved_tensors)
        return _gradient(ctx.saved_tensors, grads[:n]), *(None for _ in range(2 * n + 1))


def attention_pattern(layer: Layer, q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    """The attention probabilities, Float[Tensor, "batch head query key"], in plain differentiable operations."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / layer.attn_scale
    mask = causal_mask(q.shape[1], k.shape[1], q.device) if mask is None else mask
    return scores.masked_fill(~mask, -math.inf).softmax(-1)


def _attend_by_pattern(layer, q, k, v, mask, at_pattern) -> Tensor:
    return torch.einsum("bhqk,bkhd->bqhd", at_pattern(attention_pattern(layer, q, k, mask)), v)


def _run_hooked(model: LensModel, tokens, resid, start_layer, hooks, positions) -> Tensor:
    """The same through TransformerLens' own forward: all positions, then the chosen ones."""
    final: list[Tensor] = []

    def keep(x: Tensor) -> None:
        final.append(x)

    last = f"blocks.{model.cfg.n_layers - 1}."
    n_pos = (tokens if resid is None else resid).shape[1]
    chosen: Any = None if positions is None else torch.arange(n_pos, device=model.cfg.device)[positions]
    # The last block's per-query activations are seen by hooks at the chosen positions only, as on the fast path.
    per_query = ("hook_attn_out", "hook_resid_mid", "hook_pre", "hook_post", "hook_mlp_out", "hook_q", "hook_z")

    def adapt(name: str, hook: Hook):
        narrow = chosen is not None and name.startswith(last) and name.endswith((*per_query, "hook_resid_post"))
        pattern = chosen is not None and name.startswith(last) and name.endswith("hook_pattern")

        def call(x: Tensor, hook=hook, **_: Any):
            if pattern:
                new = hook(x[:, :, chosen])
                return None if new is None else x.index_copy(2, chosen, new)
            if not narrow:
                return hook(x)
            new = hook(x[:, chosen])
            return None if new is None else x.index_copy(1, chosen, new)

        return name, lambda x, hook: call(x)

    fwd_hooks = [adapt(name, hook) for name, hook in hooks.items()]
    fwd_hooks.append((last + "hook_resid_post", lambda x, hook: keep(x)))
    extra: dict[str, Any] = {}
    if resid is not None:
        # Hooks of the model's own come first; what they make of the stream that is given is put right after them.
        fwd_hooks.insert(0, (f"blocks.{start_layer}.hook_resid_pre", lambda x, hook: resid))
        extra = {"start_at_layer": start_layer}
        if model.cfg.positional_embedding_type == "shortformer":  # every layer adds them to its queries and keys
            like = torch.zeros(resid.shape[:2], dtype=torch.long, device=resid.device)
            extra["shortformer_pos_embed"] = model.hook_pos_embed(model.pos_embed(like))
    model.run_with_hooks(tokens if resid is None else resid, return_type=None, fwd_hooks=fwd_hooks, **extra)
    return final[0] if chosen is None else final[0][:, chosen]


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
