"""The last layer's neurons and the unembedding: the change of the logits in closed form.

With x the final residual stream as the norm reads it (centred, if it centres), W its unembedding with the
norm's weights folded in, sigma the scale and m = x W / sigma the logits less their bias b, changing a neuron's
activation by da gives

    logits' = (1 + alpha) m + t v + b,   v = w_out W,   t = da / sigma',   1 + alpha = sigma / sigma',
    sigma'^2 = sigma^2 + (2 da <x, w_out> + da^2 |w_out|^2) / d_model :

two numbers per neuron and token, and one row of vocabulary length per neuron and per token each. Without a norm
alpha = 0. With the scale frozen alpha = 0 and t = da / sigma.

What all tokens of the vocabulary have in common in v and m changes no probability, but drowns the rest in rounding
where it is large. So W and b are centred over the vocabulary, and m is counted from its mean under the prediction.
What is as long as a token or a neuron, not as the vocabulary, is computed in fp64 where the device has it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..lens import LensModel
from ..weights import Norm, final_norm

# Rounding errors of a product with W, in units in the last place of `Unembedding.rounding`'s size. Root mean squares of
# 0.5 were seen, and 10 for the worst of a vocabulary: what counts is the few likely tokens'.
PRODUCT_ROUNDING = 3.0
WITH_FP64 = ("cpu", "cuda")  # kinds of device


def wide(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """In fp64 where the device has it, else in fp32."""
    return x.to(torch.float64 if x.device.type in WITH_FP64 else torch.float32)


@dataclass(frozen=True)
class Unembedding:
    """Final norm and unembedding as one: logits = x W / scale + b, x centred first where the norm centres."""

    W: Float[Tensor, "d_model d_vocab"]
    b: Float[Tensor, " d_vocab"]
    norm: Norm
    cap: float | None = None  # logits are cap * tanh(logits / cap)

    def centred(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        return x - x.mean(-1, keepdim=True) if self.norm.centres else x

    @property
    def has_scale(self) -> bool:
        return not self.norm.linear

    def chunks(self, size: int) -> list[slice]:
        return [slice(i, i + size) for i in range(0, self.W.shape[1], size)]

    @cached_property
    def spread(self) -> Float[Tensor, " d_model"]:
        """The root mean square of each of W's rows."""
        return self.W.norm(dim=1) / self.W.shape[1] ** 0.5

    def rounding(self, x: Float[Tensor, "row d_model"], most: Float[Tensor, " row"]) -> Float[Tensor, " row"]:
        """How far off x W may be, computed in W's precision; `most` is its largest entry in size.

        A sum is rounded to its own size and to that of its partial sums: of terms whose signs are random.
        """
        return PRODUCT_ROUNDING * torch.finfo(self.W.dtype).eps * (most + (x * self.spread).norm(dim=1))


def folded_unembedding(model: LensModel, *, centre: bool = True) -> Unembedding:
    """W_U and b_U with the final norm's own weights folded in, in fp32 at least.

    Args:
        centre: subtract first what all of the vocabulary have in common, which changes no probability (unless
            logits are capped: then nothing is subtracted).
    """
    norm, cap = final_norm(model), getattr(model.cfg, "output_logits_soft_cap", None)
    cap = cap if cap and cap > 0 else None
    W, b = model.unembed.W_U, model.unembed.b_U
    W, b = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (W, b))
    if centre and cap is None:
        # Any vector will do for the mean: no error is made in taking the same from all.
        W, b = W - W.mean(1, keepdim=True), b - b.mean()
    if norm.b is not None:
        b = b + norm.b.to(b.dtype) @ W
    if norm.w is not None:
        W = norm.w.to(W.dtype)[:, None] * W
    return Unembedding(W, b, norm, cap)


@dataclass(frozen=True)
class Rows:
    """Some tokens' final residual streams and what their predictions are."""

    x: Float[Tensor, "row d_model"]  # as the norm reads it
    scale: Float[Tensor, "row 1"]
    hidden: Float[Tensor, "row d_model"]  # x / scale, in W's precision
    targets: Int[Tensor, " row"]
    top: Float[Tensor, " row"]  # the largest logit
    log_total: Float[Tensor, " row"]  # logsumexp of the logits, less top
    mean_logit: Float[Tensor, " row"]  # under the prediction, less top
    target_logit: Float[Tensor, " row"]  # less top
    mean_m: Float[Tensor, " row"]  # under the prediction
    max_m: Float[Tensor, " row"]
    min_m: Float[Tensor, " row"]
    target_m: Float[Tensor, " row"]
    rounding: Float[Tensor, " row"]  # how far off the logits may be

    @property
    def most_m(self) -> Float[Tensor, " row"]:
        """The largest |m - mean_m|."""
        return torch.maximum(self.max_m - self.mean_m, self.mean_m - self.min_m)

    @property
    def loss(self) -> Float[Tensor, " row"]:
        return self.log_total - self.target_logit

    @property
    def entropy(self) -> Float[Tensor, " row"]:
        return self.log_total - self.mean_logit


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
    dtype, cap = unembedding.W.dtype, unembedding.cap
    resid = wide(resid)
    x = unembedding.centred(resid)
    scale = unembedding.norm.scale(resid) if scale is None else scale
    hidden = (x / scale).to(dtype)

    def logits_of(m: Tensor, b: Tensor) -> Tensor:
        logits = m + b
        return logits if cap is None else cap * torch.tanh(logits / cap)

    top = high = torch.full_like(hidden[:, 0], torch.finfo(dtype).min)
    low = -top
    total, mean_logit, mean_m = torch.zeros(3, len(resid), dtype=dtype, device=resid.device)
    for chunk in unembedding.chunks(_vocab_chunk(len(resid))):
        m = hidden @ unembedding.W[:, chunk]
        logits = logits_of(m, unembedding.b[chunk])
        new = torch.maximum(top, logits.amax(1))
        logits -= new[:, None]
        p, fallen = logits.exp(), top - new
        mean_logit = (mean_logit + fallen * total) * fallen.exp() + (p * logits).sum(1)
        total, mean_m = total * fallen.exp() + p.sum(1), mean_m * fallen.exp() + (p * m).sum(1)
        top, high, low = new, torch.maximum(high, m.amax(1)), torch.minimum(low, m.amin(1))
    target_m = torch.linalg.vecdot(hidden, unembedding.W.T[targets])
    most = torch.maximum(high, -low) + unembedding.b.abs().max()
    return Rows(
        x=x,
        scale=scale,
        hidden=hidden,
        targets=targets,
        top=top,
        log_total=total.log(),
        mean_logit=mean_logit / total,
        target_logit=logits_of(target_m, unembedding.b[targets]) - top,
        mean_m=mean_m / total,
        max_m=high,
        min_m=low,
        target_m=target_m,
        rounding=unembedding.rounding(hidden, most),
    )


def _vocab_chunk(rows: int) -> int:
    return max(256, min(8192, 2**23 // rows))


@dataclass(frozen=True)
class Neurons:
    """Output weights, centred where the final norm centres, and the extremes of v = w W over the vocabulary."""

    exact: Float[Tensor, "neuron d_model"]
    w: Float[Tensor, "neuron d_model"]  # the same in W's precision
    high: Float[Tensor, " neuron"]
    low: Float[Tensor, " neuron"]
    rounding: Float[Tensor, " neuron"]  # how far off v may be

    @property
    def most_v(self) -> Float[Tensor, " neuron"]:
        return torch.maximum(self.high, -self.low)

    def __getitem__(self, which) -> Neurons:
        return Neurons(self.exact[which], self.w[which], self.high[which], self.low[which], self.rounding[which])


def make_neurons(unembedding: Unembedding, w_out: Float[Tensor, "neuron d_model"]) -> Neurons:
    exact = unembedding.centred(wide(w_out))
    w = exact.to(unembedding.W.dtype)
    high = torch.full_like(w[:, 0], -torch.inf)
    low = -high
    for chunk in unembedding.chunks(_vocab_chunk(len(w))):
        v = w @ unembedding.W[:, chunk]
        high, low = torch.maximum(high, v.amax(1)), torch.minimum(low, v.amin(1))
    return Neurons(exact, w, high, low, unembedding.rounding(w, torch.maximum(high, -low)))


@dataclass(frozen=True)
class Change:
    """What ablations do to the logits: logits' = logits + alpha m + t v; pairs of a row and a neuron."""

    alpha: Float[Tensor, "*pairs"] | None  # None: 0 throughout
    t: Float[Tensor, "*pairs"]

    def __getitem__(self, which) -> Change:
        """Of some rows and neurons, or of a list of pairs of them."""
        return Change(None if self.alpha is None else self.alpha[which], self.t[which])


def changes(
    unembedding: Unembedding, rows: Rows, neurons: Neurons, da: Float[Tensor, "row neuron"]
) -> tuple[Change, Change]:
    """The total change and the one with the scale frozen; the same object twice where there is no scale."""
    w, dtype = neurons.exact, neurons.w.dtype
    if not unembedding.has_scale:
        change = Change(None, da.to(dtype))
        return change, change
    da = wide(da)
    grown = da * (2 * (rows.x @ w.T) + da * w.square().sum(1)) / w.shape[1]
    before = rows.scale
    after = (before.square() + grown).clamp_min(torch.finfo(w.dtype).tiny).sqrt()
    alpha = -grown / (after * (before + after))  # before / after - 1, without cancellation
    return Change(alpha.to(dtype), (da / after).to(dtype)), Change(None, (da / before).to(dtype))


def target_change(
    unembedding: Unembedding, rows: Rows, neurons: Neurons, change: Change
) -> Float[Tensor, "row neuron"]:
    """Change of the next token's logit, less alpha mean_m."""
    moved = change.t * (unembedding.W.T[rows.targets] @ neurons.w.T)
    return moved if change.alpha is None else moved + change.alpha * (rows.target_m - rows.mean_m)[:, None]
