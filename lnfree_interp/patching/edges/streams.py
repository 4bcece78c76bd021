"""The two ends of an edge: what each sender wrote in the two runs, and the stream that each receiver reads.

A receiver's copy of the residual stream is that before its norm. Where the weights are read, no copies are made: the
gradient at a copy is that at what the receiver's product makes of it (a query, the hidden activations), brought back
through the product and the norm. Elsewhere TransformerLens makes the copies (`split_inputs`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...forward import run
from ...layers import Norm
from ...lens import LensModel
from ...through_hooks import Hook
from ...weights import Weights, block_of
from ..estimates.relp import DetachedNorm
from .wiring import ATTENTION, Wiring

FINAL = "final"
"""What stands for the hook of the final residual stream, which the logits are read off."""

Writes = dict[str, Tensor]
"""Hook -> what was written there: the entering stream, z of heads (or attn_out), mlp_out. Of the last layer at the
positions that the metric reads alone."""


# ---------------------------------------------------------------------------------------------------------
# Senders


def embed_hook() -> str:
    return "blocks.0.hook_resid_pre"


def attention_hook(wiring: Wiring, layer: int) -> str:
    return f"blocks.{layer}." + ("attn.hook_z" if wiring.by_head else "hook_attn_out")


def mlp_hook(layer: int) -> str:
    return f"blocks.{layer}.hook_mlp_out"


def writing_hooks(wiring: Wiring) -> tuple[str, ...]:
    """All hooks of `Writes`."""
    names = [embed_hook()]
    for i in range(wiring.n_layers):
        names += [attention_hook(wiring, i)] + [mlp_hook(i)] * wiring.has_mlp
    return tuple(names)


def output_weights(model: LensModel, weights: Weights | None, layer: int) -> Float[Tensor, "head d_head d_model"]:
    """What a layer's heads write with."""
    if weights is None:
        return block_of(model, layer).attn.W_O
    return weights.layers[layer].W_O.unflatten(0, (model.cfg.n_heads, -1))


def heads_write(
    z: Float[Tensor, "prompt pos head d_head"], W_O: Float[Tensor, "head d_head d_model"]
) -> Float[Tensor, "head prompt pos d_model"]:
    """What each head writes, or changes of it."""
    rows = z.permute(2, 0, 1, 3)
    return torch.bmm(rows.flatten(1, 2), W_O.to(z.dtype)).unflatten(1, rows.shape[1:3])


# ---------------------------------------------------------------------------------------------------------
# Receivers


def hooks_read(weights: Weights | None, layer: int, kind: str) -> tuple[str, ...]:
    """The hooks of what a kind of receiver of a layer makes of its stream first; without weights, of its copy of it."""
    block = f"blocks.{layer}."
    if kind == "logits":
        return (FINAL,)
    if weights is None:
        return (block + (f"hook_{kind}_input" if kind in ATTENTION else "hook_mlp_in"),)
    if kind in ATTENTION:
        return (f"{block}attn.hook_{kind}",)
    gated = weights.layers[layer].W_gate is not None
    return (block + "mlp.hook_pre", block + "mlp.hook_pre_linear")[: 1 + gated]


def stream_hook(wiring: Wiring, layer: int, kind: str) -> str:
    """The hook of the stream that a kind of receiver of a layer reads."""
    after = kind == "mlp" and not wiring.parallel
    return f"blocks.{layer}." + ("hook_resid_mid" if after else "hook_resid_pre")


def brought_back(
    weights: Weights | None, layer: int, kind: str, x: Tensor | None, grads: Sequence[Tensor]
) -> Float[Tensor, "receiver prompt pos d_model"]:
    """The gradient at each receiver's copy of the stream, of those at its hooks.

    Args:
        x: the stream that they read, needed with weights alone, and not for the logits.
        grads: one for each of `hooks_read`.
    """
    if weights is None or kind == "logits":
        (grad,) = grads
        return grad.movedim(2, 0) if grad.ndim == 4 else grad[None]
    here = weights.layers[layer]
    assert x is not None
    if kind == "mlp":
        return _through_norm(here.ln2, x, [W[None] for W, _ in here.of_hidden], [g.unsqueeze(2) for g in grads])
    (W, _) = here.of_qkv[ATTENTION.index(kind)]
    return _through_norm(here.ln1, x, [W], grads)


def _through_norm(
    norm: Norm, x: Float[Tensor, "prompt pos d_model"], matrices: Sequence[Tensor], grads: Sequence[Tensor]
) -> Float[Tensor, "receiver prompt pos d_model"]:
    """The gradients at x of norm(x) @ W for each receiver's W, of those at the products [prompt, pos, receiver, d_out].

    With n = the centred x over its scale, a norm's derivative is that of its weights, less n's share of what is read
    (the scale's own derivative), over the scale; the centring and the weights are put into W.
    """
    plain = norm.linear or isinstance(norm, DetachedNorm)
    scale = norm.scale(x)
    total: Tensor | None = None
    for W, grad in zip(matrices, grads):
        W = norm.read(W.to(grad.dtype).mT)
        rows = (grad if norm.linear else grad / scale[..., None]).permute(2, 0, 1, 3)
        part = torch.bmm(rows.flatten(1, 2), W).unflatten(1, rows.shape[1:3])
        total = part if total is None else total + part
    assert total is not None
    if plain:
        return total
    n = norm.centred(x) / scale
    along = torch.einsum("rbpd,bpd->rbp", total, n) / x.shape[-1]
    return torch.addcmul(total, along[..., None], n, value=-1)


@contextmanager
def split_inputs(model: LensModel, wiring: Wiring, tokens: Int[Tensor, "prompt pos"]) -> Iterator[None]:
    """While it lasts, each head and MLP of the model reads its own copy of the stream, with a hook on it.

    Args:
        tokens: of which the first prompt is run with and without the copies.

    Raises:
        ValueError: TransformerLens makes no copies in this model, or they make it another.
    """
    with torch.no_grad():
        wanted = run(model, tokens[:1])
    cfg: object = model.cfg
    flags = ["use_attn_in", "use_split_qkv_input"] + ["use_hook_mlp_in"] * wiring.has_mlp
    before = {flag: bool(getattr(cfg, flag, False)) for flag in flags}

    def switch(flag: str, on: bool) -> None:
        if bool(getattr(cfg, flag, False)) != on:
            getattr(model, f"set_{flag}")(on)

    try:
        try:
            for flag in flags:
                switch(flag, flag != "use_attn_in")
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise ValueError(
                f"edges need a model that read_weights reads, or one whose inputs TransformerLens splits ({reason})"
            ) from error
        with torch.no_grad():
            got = run(model, tokens[:1])
        if (got - wanted).abs().max() > 1024 * torch.finfo(got.dtype).eps * wanted.abs().max():
            raise ValueError(
                "edges need a model that read_weights reads: this one TransformerLens runs otherwise with split inputs"
            )
        yield
    finally:
        for flag in reversed(flags):
            switch(flag, before[flag])


@dataclass(frozen=True)
class Watched:
    """What hooks noted of a run: at receivers in its graph, the streams they read, and what senders wrote.

    Attributes:
        graph: whether the streams, too, are noted in the graph.
    """

    nodes: dict[str, Tensor] = field(default_factory=dict)
    streams: dict[str, Tensor] = field(default_factory=dict)
    writes: Writes = field(default_factory=dict)
    graph: bool = False

    def writers(self, wiring: Wiring) -> dict[str, Hook]:
        """Hooks that note what is written."""

        def note(x: Tensor, name: str) -> None:
            self.writes[name] = x.detach()

        return {name: partial(note, name=name) for name in writing_hooks(wiring)}

    def readers(self, wiring: Wiring, weights: Weights | None, *, at_z: bool = False) -> dict[str, Hook]:
        """Hooks that note what receivers read, and put what they make of it into the graph.

        Args:
            at_z: z too.
        """

        def note(x: Tensor, name: str) -> None:
            self.streams[name] = x if self.graph else x.detach()

        def watch(x: Tensor, name: str) -> Tensor:
            # A copy to autograd: a Bridge's hook_mlp_in is on the stream itself, which goes on past the MLP.
            self.nodes[name] = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
            return self.nodes[name]

        hooks: dict[str, Hook] = {}
        for i, kind, _, _ in wiring.groups[:-1]:
            if weights is not None:
                stream = stream_hook(wiring, i, kind)
                hooks[stream] = partial(note, name=stream)
            of_z = (f"blocks.{i}.attn.hook_z",) if at_z else ()
            hooks |= {name: partial(watch, name=name) for name in (*hooks_read(weights, i, kind), *of_z)}
        return hooks


def both(one: Mapping[str, Hook], other: Mapping[str, Hook]) -> dict[str, Hook]:
    """Hooks that note and hooks that may put something in the place of an activation, after them."""

    def hook(x: Tensor, name: str) -> Tensor | None:
        one[name](x)
        return other[name](x)

    return {**one, **other} | {name: partial(hook, name=name) for name in one.keys() & other.keys()}
