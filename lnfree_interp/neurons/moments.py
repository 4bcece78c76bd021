"""The same changes as series in moments of the model's own distribution, with a certified error.

Under p = softmax(logits), with M = m - E_p[m], w = v - E_p[v] and d = alpha M + t w,

    logsumexp(logits') - logsumexp(logits) = alpha E_p[m] + t E_p[v] + log A,       A = E_p[e^d],
    entropy' - entropy = log A - (B + C) / A,     B = E_p[l e^d],  C = E_p[d e^d],  l = logits - E_p[logits],

and A, B, C are series in alpha^j t^k / (j! k!) times moments E_p[l^a M^j w^k], a = 0 or 1. For all tokens and
neurons at once those are matrix products over the vocabulary: (p l^a M^j) @ (v^k)^T. The powers kept are k <= K_j;
what is left out is bounded through |e^u - its Taylor polynomial| <= |u|^q e^|u| / q! and Cauchy-Schwarz, by the
even moments that are known and the largest |w| and |M|. A >= 1 by Jensen, so the bounds on A, B and C carry over
to log A and the entropy. What rounding does is bounded beside it (`rounding`), in the same quantities.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .last_layer import Change, Neurons, Rows, Unembedding

Powers = tuple[int, ...]
"""Largest power k of w kept beside each power j = 0, 1, ... of M."""

# Tried in turn, each only for the neurons for which it is cheaper than summing what is not certified yet.
LEVELS: tuple[Powers, ...] = ((3, 1, 0, 0, 0), (5, 3, 1, 0, 0), (6, 4, 2, 1, 0))
# One pair's sums over the vocabulary cost about as much as it does in this many matrix products.
STREAM_COST = 150.0
FLOOR = -70.0  # log-probabilities below count for nothing (nats)
CHUNK, GPU_CHUNK = 2048, 4096  # entries of the vocabulary worked on at a time
# Rounding errors of a mean over the vocabulary, in units in the last place of the mean of its terms' sizes: as many
# were seen, of vocabularies up to 131,072.
SUM_ROUNDING = 8.0
Key = tuple[int, int, int]


def keys(powers: Powers, has_scale: bool) -> list[Key]:
    """(a, j, k) of the matrix products a level needs."""
    highest = powers if has_scale else powers[:1]
    return [(a, j, k) for j, most in enumerate(highest) for k in range(1, most + 1) for a in (0, 1)]


@dataclass(frozen=True)
class RowMoments:
    """Moments of the tokens' own: E_p[l^a M^j], the largest |M|, and how far off the logits may be."""

    values: dict[tuple[int, int], Float[Tensor, "row 1"]]
    total: Float[Tensor, "row 1"]  # of the probabilities as they are computed: 1 but for rounding
    most: Float[Tensor, "row 1"]
    rounding: Float[Tensor, "row 1"]

    def __getitem__(self, rows: slice) -> RowMoments:
        values = {key: value[rows] for key, value in self.values.items()}
        return RowMoments(values, self.total[rows], self.most[rows], self.rounding[rows])


def matrix_moments(
    unembedding: Unembedding,
    rows: Rows,
    w: Float[Tensor, "neuron d_model"],
    wanted: list[Key],
    share: Callable[[float], object] | None = None,
) -> dict[Key, Float[Tensor, "row neuron"]]:
    """E_p[l^a M^j v^k] for all rows and neurons, p as computed (see `RowMoments.total`)."""
    by_power: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for a, j, k in wanted:
        by_power[k].append((a, j))
    n_rows, highest = len(rows.x), max(j for _, j, _ in wanted)
    sums = {k: w.new_zeros(len(left) * n_rows, len(w)) for k, left in by_power.items()}
    # Each chunk's product is made apart and added: rounded to its own size, not to that of the sum so far.
    part = w.new_empty(max(map(len, by_power.values())) * n_rows, len(w))
    chunks = _chunks(unembedding)
    for done, chunk in enumerate(chunks):
        left = _weights(unembedding, rows, chunk, highest)
        v = power = w @ unembedding.W[:, chunk]
        for k in range(1, max(by_power) + 1):
            if k > 1:
                power = power * v
            if k in by_power:
                stack = [left[key] for key in by_power[k]]
                stacked = stack[0] if len(stack) == 1 else torch.cat(stack)
                sums[k] += torch.mm(stacked, power.T, out=part[: len(stacked)])
        if share is not None:
            share((done + 1) / len(chunks))
    return {(a, j, k): part for k, left in by_power.items() for (a, j), part in zip(left, sums[k].split(n_rows))}


def row_moments(unembedding: Unembedding, rows: Rows, has_scale: bool) -> RowMoments:
    """E_p[l^a M^j] of every row; without a scale only j = 0."""
    highest = 4 if has_scale else 0
    own = {(a, j): torch.zeros_like(rows.top) for a in (0, 1, 2) for j in range(highest + 1)}
    for chunk in _chunks(unembedding):
        left = _weights(unembedding, rows, chunk, highest, most=2)
        for key, total in own.items():
            total += left[key].sum(1)
    total = own[0, 0][:, None]
    values = {key: value[:, None] / total for key, value in own.items()}
    return RowMoments(values, total, rows.most_m[:, None], rows.rounding[:, None])


def _chunks(unembedding: Unembedding) -> list[slice]:
    return unembedding.chunks(CHUNK if unembedding.W.device.type == "cpu" else GPU_CHUNK)


def _weights(
    unembedding: Unembedding, rows: Rows, chunk: slice, highest: int, *, most: int = 1
) -> dict[tuple[int, int], Float[Tensor, "row d_vocab"]]:
    """p l^a M^j for a up to `most` and j up to `highest`, on a chunk of the vocabulary."""
    b = unembedding.b[chunk]
    m = rows.hidden @ unembedding.W[:, chunk]
    logits = m + b - rows.top[:, None]
    # No denormal numbers: they count for nothing and make products many times slower.
    weights = {(0, 0): (logits - rows.log_total[:, None]).clamp_min_(FLOOR).exp_()}
    m -= rows.mean_m[:, None]
    logits -= rows.mean_logit[:, None]
    for j in range(highest + 1):
        if j:
            weights[0, j] = weights[0, j - 1] * m
        for a in range(1, most + 1):
            weights[a, j] = weights[a - 1, j] * logits
    return weights


@dataclass(frozen=True)
class Central:
    """E_p[l^a M^j w^k] with w = v - E_p[v], and the largest |w|; each is computed once."""

    raw: dict[Key, Float[Tensor, "row neuron"]]  # E_p[l^a M^j v^k]
    rows: RowMoments
    most: Float[Tensor, "row neuron"]
    rounding: Float[Tensor, " neuron"]  # how far off v may be
    known: dict[Key, Float[Tensor, "row neuron"]] = field(default_factory=dict)

    def __call__(self, a: int, j: int, k: int) -> Tensor:
        if k == 0:
            return self.rows.values[a, j]
        if (a, j, k) not in self.known:
            self.known[a, j, k] = self._moment(a, j, k)
        return self.known[a, j, k]

    def _moment(self, a: int, j: int, k: int) -> Tensor:
        mean = self.raw[0, 0, 1]
        if (a, j, k) == (0, 0, 1):
            return torch.zeros_like(mean)
        total = (-mean) ** k * self.rows.values[a, j]
        for i in range(1, k + 1):
            lower = self.raw[a, j, i]
            total = total + (lower if i == k else math.comb(k, i) * (-mean) ** (k - i) * lower)
        return total

    def even(self, power: int) -> Tensor:
        """An upper bound on E[|w|^power], from the highest even moment there is up to it."""
        known = max((k for a, j, k in self.raw if a == j == 0 and k % 2 == 0 and k <= power), default=0)
        if not known:
            return self.most**power
        # Taken from moments about 0, those about the mean lose what is put back here: |E v|^k <= E[|v|^k] for even k.
        lost = SUM_ROUNDING * torch.finfo(self.most.dtype).eps * 2.0**known * self.raw[0, 0, known]
        return (self(0, 0, known).clamp_min(0) + lost) * self.most ** (power - known)


def central(raw: dict[Key, Tensor], rows: RowMoments, neurons: Neurons) -> Central:
    raw = {key: value / rows.total for key, value in raw.items()}
    mean = raw[0, 0, 1]
    return Central(raw, rows, torch.maximum(neurons.high - mean, mean - neurons.low), neurons.rounding)


def series(
    moments: Central, change: Change, powers: Powers
) -> tuple[Float[Tensor, "row neuron"], Float[Tensor, "row neuron"]]:
    """log A and the change of the entropy."""
    # A less 1, for log1p; its first-order terms vanish, moments being central.
    a_sum, b_sum, c_sum = torch.zeros(3, *change.t.shape, dtype=change.t.dtype, device=change.t.device)
    highest = powers if change.alpha is not None else powers[:1]
    of_alpha = torch.ones_like(change.t)
    for j, most in enumerate(highest):
        if j and change.alpha is not None:
            of_alpha = of_alpha * change.alpha / j
        factor = of_alpha
        for k in range(most + 1):
            if k:
                factor = factor * change.t / k
            if j + k:
                moment = moments(0, j, k)
                a_sum.addcmul_(factor, moment)
                c_sum.addcmul_(factor, moment, value=j + k)
                b_sum.addcmul_(factor, moments(1, j, k))
    log_a = torch.log1p(a_sum)
    return log_a, log_a - (b_sum + c_sum) / (1 + a_sum)


def error_bound(
    moments: Central, change: Change, powers: Powers, delta_entropy: Float[Tensor, "row neuron"] | None = None
) -> Float[Tensor, "row neuron"]:
    """Upper bound on the error of both changes; not a number or infinite where there is none.

    It may be asked for powers beyond those of the moments at hand, to see whether they would do.

    Args:
        delta_entropy: the series' log A less its change of entropy, (B + C) / A; without it that is taken to be
            small.
    """
    t, alpha = change.t.abs(), None if change.alpha is None else change.alpha.abs()
    u = t * moments.most
    exp_u = u.exp()
    tail_a = tail_b = tail_c = torch.zeros_like(t)
    highest = powers if alpha is not None else powers[:1]
    for j, most in enumerate(highest):
        q = most + 1
        factor = t**q * exp_u / (math.factorial(q) * math.factorial(j))
        if j and alpha is not None:
            factor = factor * alpha**j
        root = moments.even(2 * q).sqrt()
        size = factor * (moments.even(q) if j == 0 else own_moment(moments.rows, 0, 2 * j).sqrt() * root)
        tail_a = tail_a + size
        tail_c = tail_c + (j + q) * size
        tail_b = tail_b + factor * own_moment(moments.rows, 2, 2 * j).sqrt() * root
    if alpha is not None:
        q = len(highest)
        factor = alpha**q * (alpha * moments.rows.most + u).exp() / math.factorial(q)
        size = factor * (own_moment(moments.rows, 0, 2 * q)).sqrt()
        tail_a = tail_a + size
        tail_c = tail_c + (q + u) * size
        tail_b = tail_b + factor * own_moment(moments.rows, 2, 2 * q).sqrt()
        u = u + alpha * moments.rows.most
    ratio = 0.0 if delta_entropy is None else delta_entropy.abs()
    loss = tail_a / (1 - tail_a)
    bound = loss + tail_b + tail_c + ratio * tail_a
    # Beyond, even tokens whose probability is too small for a number might come to count.
    return torch.where((tail_a < 0.5) & (u < 20), bound + rounding(moments, change), torch.inf)


def rounding(moments: Central, change: Change) -> Float[Tensor, "row neuron"]:
    """Upper bound on what rounding does to both changes.

    It comes in by the sums over the vocabulary, each off by so much of the mean of its terms' sizes, and by the logits,
    m and v themselves. With x = |t| (|v| + |E v|) + |alpha M| the sums' errors are within E[(1 + |l|) (e^x - 1)] or
    E[x e^x], with (e^x - 1) / x <= (1 + e^x) / 2. Where logits are off by r, log A is by r |p' - p|, and the entropy by
    that of r times l'; the squared distance of p' from p is within e^s - 1, s = E[d^2], of p as large as for normal d.
    """
    t, rows = change.t.abs(), moments.rows
    eps, sd_l = torch.finfo(t.dtype).eps, rows.values[2, 0].sqrt()
    mean, size = moments.raw[0, 0, 1].abs(), moments.raw[0, 0, 2].sqrt()
    moved, x, most = t * moments.even(2).sqrt(), t * (size + mean), t * (moments.most + 2 * mean)
    off = t * moments.rounding
    if change.alpha is not None:
        alpha = change.alpha.abs()
        of_m = alpha * rows.values[0, 2].sqrt()
        moved, x, most, off = moved + of_m, x + of_m, most + alpha * rows.most, off + alpha * rows.rounding
    sums = t * size + x * (sd_l + 2 * x) * (1 + most.exp()) / 2
    off = (off + moved * rows.rounding) * (moved.square() / 2).exp()
    return SUM_ROUNDING * eps * sums + 2 * (1 + sd_l) * off


def own_moment(rows: RowMoments, a: int, power: int) -> Float[Tensor, "row 1"]:
    """An upper bound on E[l^a M^power] for even a and power."""
    known = min(power, 4)
    return rows.values[a, known].clamp_min(0) * rows.most ** (power - known)


def undone(bound: Float[Tensor, "row neuron"], tolerance: float) -> Bool[Tensor, "row neuron"]:
    return ~(bound <= tolerance)
