"""The last layer's neurons and the unembedding: the change of the logits in closed form.

With x the final residual stream as the norm reads it (centred, if it centres), W its unembedding with the
norm's weights folded in, sigma the scale and m = x W / sigma the logits less their bias b, changing a neuron's
activation by da gives

    logits' = (1 + alpha) m + t v + b,   v = w_out W,   t = da / sigma',   1 + alpha = sigma / sigma',
    sigma'^2 = sigma^2 + (2 da <x, w_out> + da^2 |w_out|^2) / d_model :

two numbers per neuron and token, and one row of vocabulary length per neuron and per token each. Without a norm
alpha = 0. With the scale frozen alpha = 0 and t = da / sigma.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..forward import final_norm

Progress = Callable[[float], None]
"""Told the share of the work that is done."""


@dataclass(frozen=True)
class Unembedding:
    """Final norm and unembedding as one: logits = x W / scale + b, x centred first where the norm centres."""

    W: Float[Tensor, "d_model d_vocab"]
    b: Float[Tensor, " d_vocab"]
    norm: object

    def centred(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        return x - x.mean(-1, keepdim=True) if self.norm.centres else x

    @property
    def has_scale(self) -> bool:
        return self.norm.kind is not None

    def chunks(self, size: int) -> list[slice]:
        return [slice(i, i + size) for i in range(0, self.W.shape[1], size)]


def folded_unembedding(model) -> Unembedding:
    """W_U and b_U with the final norm's own weights folded in, in fp32 at least."""
    norm = final_norm(model)
    W, b = model.unembed.W_U, model.unembed.b_U
    W, b = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (W, b))
    if norm.b is not None:
        b = b + norm.b.to(b.dtype) @ W
    if norm.w is not None:
        W = norm.w.to(W.dtype)[:, None] * W
    return Unembedding(W, b, norm)


@dataclass(frozen=True)
class Rows:
    """Some tokens' final residual streams and what their predictions are."""

    x: Float[Tensor, "row d_model"]  # as the norm reads it
    scale: Float[Tensor, "row 1"]
    hidden: Float[Tensor, "row d_model"]  # x / scale
    targets: Int[Tensor, " row"]
    lse: Float[Tensor, " row"]  # logsumexp of the logits
    mean_logit: Float[Tensor, " row"]  # under the prediction, as is
    mean_m: Float[Tensor, " row"]
    max_m: Float[Tensor, " row"]
    min_m: Float[Tensor, " row"]
    target_logit: Float[Tensor, " row"]
    target_m: Float[Tensor, " row"]

    @property
    def most_m(self) -> Float[Tensor, " row"]:
        """The largest |m - mean_m|."""
        return torch.maximum(self.max_m - self.mean_m, self.mean_m - self.min_m)

    @property
    def loss(self) -> Float[Tensor, " row"]:
        return self.lse - self.target_logit

    @property
    def entropy(self) -> Float[Tensor, " row"]:
        return self.lse - self.mean_logit


def make_rows(
    unembedding: Unembedding,
    resid: Float[Tensor, "row d_model"],
    targets: Int[Tensor, " row"],
    *,
    scale: Float[Tensor, "row 1"] | None = None,
) -> Rows:
    """One pass over the vocabulary, in chunks, with running sums that are rescaled as the maximum grows.

    Args:
        scale: to divide by in place of the rows' own.
    """
    resid = resid.to(unembedding.W.dtype)
    x = unembedding.centred(resid)
    scale = unembedding.norm.scale(resid) if scale is None else scale
    hidden = x / scale
    top = high = torch.full_like(scale[:, 0], -torch.inf)
    low = -top
    sums = torch.zeros(3, len(resid), dtype=resid.dtype, device=resid.device)
    for chunk in unembedding.chunks(_vocab_chunk(len(resid))):
        m = hidden @ unembedding.W[:, chunk]
        logits = m + unembedding.b[chunk]
        new = torch.maximum(top, logits.amax(1))
        p = (logits - new[:, None]).exp()
        sums = sums * (top - new).exp() + torch.stack([p.sum(1), (p * logits).sum(1), (p * m).sum(1)])
        top, high, low = new, torch.maximum(high, m.amax(1)), torch.minimum(low, m.amin(1))
    target_m = torch.linalg.vecdot(hidden, unembedding.W.T[targets])
    return Rows(
        x=x,
        scale=scale,
        hidden=hidden,
        targets=targets,
        lse=top + sums[0].log(),
        mean_logit=sums[1] / sums[0],
        mean_m=sums[2] / sums[0],
        max_m=high,
        min_m=low,
        target_logit=target_m + unembedding.b[targets],
        target_m=target_m,
    )


def _vocab_chunk(rows: int) -> int:
    return max(256, min(8192, 2**23 // rows))


@dataclass(frozen=True)
class Neurons:
    """Output weights, centred where the final norm centres, and the extremes of v = w W over the vocabulary."""

    w: Float[Tensor, "neuron d_model"]
    high: Float[Tensor, " neuron"]
    low: Float[Tensor, " neuron"]

    @property
    def most_v(self) -> Float[Tensor, " neuron"]:
        return torch.maximum(self.high, -self.low)

    def __getitem__(self, which) -> Neurons:
        return Neurons(self.w[which], self.high[which], self.low[which])


def make_neurons(unembedding: Unembedding, w_out: Float[Tensor, "neuron d_model"]) -> Neurons:
    w = unembedding.centred(w_out.to(unembedding.W.dtype))
    high = torch.full_like(w[:, 0], -torch.inf)
    low = -high
    for chunk in unembedding.chunks(_vocab_chunk(len(w))):
        v = w @ unembedding.W[:, chunk]
        high, low = torch.maximum(high, v.amax(1)), torch.minimum(low, v.amin(1))
    return Neurons(w, high, low)


@dataclass(frozen=True)
class Change:
    """What ablations do to the logits: logits' = logits + alpha m + t v; pairs of a row and a neuron."""

    alpha: Float[Tensor, "*pairs"] | None  # None: 0 throughout
    t: Float[Tensor, "*pairs"]

    def __getitem__(self, which) -> Change:
        """Of some rows and neurons, or of a list of pairs of them."""
        return Change(None if self.alpha is None else self.alpha[which], self.t[which])


def changes(
    unembedding: Unembedding, rows: Rows, w: Float[Tensor, "neuron d_model"], da: Float[Tensor, "row neuron"]
) -> tuple[Change, Change]:
    """The total change and the one with the scale frozen; the same object twice where there is no scale."""
    if not unembedding.has_scale:
        change = Change(None, da)
        return change, change
    grown = (2 * da * (rows.x @ w.T) + da.square() * w.square().sum(1)) / w.shape[1]
    before = rows.scale
    after = (before.square() + grown).clamp_min(torch.finfo(w.dtype).tiny).sqrt()
    alpha = -grown / (after * (before + after))  # before / after - 1, without cancellation
    return Change(alpha, da / after), Change(None, da / before)


def target_change(
    unembedding: Unembedding, rows: Rows, w: Float[Tensor, "neuron d_model"], change: Change
) -> Float[Tensor, "row neuron"]:
    """Change of the next token's logit."""
    moved = change.t * (unembedding.W.T[rows.targets] @ w.T)
    return moved if change.alpha is None else moved + change.alpha * rows.target_m[:, None]
