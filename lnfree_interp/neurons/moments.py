"""The same changes as series in moments of the model's own distribution, with a certified error.

Under p = softmax(logits), with M = m - E_p[m], w = v - E_p[v] and d = alpha M + t w,

    logsumexp(logits') - logsumexp(logits) = alpha E_p[m] + t E_p[v] + log A,       A = E_p[e^d],
    entropy' - entropy = log A - (B + C) / A,     B = E_p[l e^d],  C = E_p[d e^d],  l = logits - E_p[logits],

and A, B, C are series in alpha^j t^k / (j! k!) times moments E_p[l^a M^j w^k], a = 0 or 1. For all tokens and
neurons at once those are matrix products over the vocabulary: (p l^a M^j) @ (v^k)^T. The powers kept are k <= K_j;
what is left out is bounded through |e^u - its Taylor polynomial| <= |u|^q e^|u| / q! and Cauchy-Schwarz, by the
even moments that are known and the largest |w| and |M|. A >= 1 by Jensen, so the bounds on A, B and C carry over
to log A and the entropy.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .last_layer import Change, Neurons, Progress, Rows, Unembedding

Powers = tuple[int, ...]
"""Largest power k of w kept beside each power j = 0, 1, ... of M."""

# Tried in turn, each only for the neurons for which it is cheaper than summing what is not certified yet.
LEVELS: tuple[Powers, ...] = ((3, 1, 0, 0, 0), (5, 3, 1, 0, 0), (6, 4, 2, 1, 0))
# One pair's sums over the vocabulary cost about as much as it does in this many matrix products.
STREAM_COST = 150.0
# Log-probabilities below count for nothing (nats); entries of the vocabulary worked on at a time.
FLOOR, CHUNK = -70.0, 2048
Key = tuple[int, int, int]


def keys(powers: Powers, has_scale: bool) -> list[Key]:
    """(a, j, k) of the matrix products a level needs."""
    highest = powers if has_scale else powers[:1]
    return [(a, j, k) for j, most in enumerate(highest) for k in range(1, most + 1) for a in (0, 1)]


@dataclass(frozen=True)
class RowMoments:
    """Moments of the tokens' own: E_p[l^a M^j], and the largest |M|."""

    values: dict[tuple[int, int], Float[Tensor, "row 1"]]
    most: Float[Tensor, "row 1"]

    def __getitem__(self, rows: slice) -> RowMoments:
        return RowMoments({key: value[rows] for key, value in self.values.items()}, self.most[rows])


def matrix_moments(
    unembedding: Unembedding,
    rows: Rows,
    w: Float[Tensor, "neuron d_model"],
    wanted: list[Key],
    progress: Progress | None = None,
) -> dict[Key, Float[Tensor, "row neuron"]]:
    """E_p[l^a M^j v^k] for all rows and neurons."""
    by_power: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for a, j, k in wanted:
        by_power[k].append((a, j))
    n_rows, highest = len(rows.x), max(j for _, j, _ in wanted)
    sums = {k: w.new_zeros(len(left) * n_rows, len(w)) for k, left in by_power.items()}
    chunks = unembedding.chunks(CHUNK)
    for done, chunk in enumerate(chunks):
        left = _weights(unembedding, rows, chunk, highest)
        v = power = w @ unembedding.W[:, chunk]
        for k in range(1, max(by_power) + 1):
            if k > 1:
                power = power * v
            if k in by_power:
                stack = [left[key] for key in by_power[k]]
                sums[k].addmm_(stack[0] if len(stack) == 1 else torch.cat(stack), power.T)
        if progress is not None:
            progress((done + 1) / len(chunks))
    return {(a, j, k): part for k, left in by_power.items() for (a, j), part in zip(left, sums[k].split(n_rows))}


def row_moments(unembedding: Unembedding, rows: Rows, has_scale: bool) -> RowMoments:
    """E_p[l^a M^j] of every row; without a scale only j = 0."""
    highest = 4 if has_scale else 0
    own = {(a, j): torch.zeros_like(rows.lse) for a in (0, 1, 2) for j in range(highest + 1)}
    for chunk in unembedding.chunks(CHUNK):
        left = _weights(unembedding, rows, chunk, highest, most=2)
        for key, total in own.items():
            total += left[key].sum(1)
    return RowMoments({key: value[:, None] for key, value in own.items()}, rows.most_m[:, None])


def _weights(
    unembedding: Unembedding, rows: Rows, chunk: slice, highest: int, *, most: int = 1
) -> dict[tuple[int, int], Float[Tensor, "row d_vocab"]]:
    """p l^a M^j for a up to `most` and j up to `highest`, on a chunk of the vocabulary."""
    b = unembedding.b[chunk]
    m = rows.hidden @ unembedding.W[:, chunk]
    logits = m + b
    # No denormal numbers: they count for nothing and make products many times slower.
    weights = {(0, 0): (logits - rows.lse[:, None]).clamp_min_(FLOOR).exp_()}
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

    raw: dict[Key, Float[Tensor, "row neuron"]]
    rows: RowMoments
    most: Float[Tensor, "row neuron"]
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
        # Rounding may have lost what improbable tokens with large |w| add: as much as it can lose is put back.
        rounding = 8 * torch.finfo(self.most.dtype).eps * self.most**known
        return (self(0, 0, known).clamp_min(0) + rounding) * self.most ** (power - known)


def central(raw: dict[Key, Tensor], rows: RowMoments, neurons: Neurons) -> Central:
    mean = raw[0, 0, 1]
    return Central(raw, rows, torch.maximum(neurons.high - mean, mean - neurons.low))


def series(
    moments: Central, change: Change, powers: Powers
) -> tuple[Float[Tensor, "row neuron"], Float[Tensor, "row neuron"]]:
    """log A and the change of the entropy."""
    # A less 1, for log1p; its first-order terms vanish, moments being central.
    a_sum, b_sum, c_sum = torch.zeros(3, *change.t.shape, dtype=change.t.dtype, device=change.t.device)
    highest = powers if change.alpha is not None else powers[:1]
    of_alpha = torch.ones_like(change.t)
    for j, most in enumerate(highest):
        if j:
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
    """Upper bound on the truncation error of both series; not a number or infinite where there is none.

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
        if j:
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
    return torch.where((tail_a < 0.5) & (u < 20), bound, torch.inf)


def own_moment(rows: RowMoments, a: int, power: int) -> Float[Tensor, "row 1"]:
    """An upper bound on E[l^a M^power] for even a and power."""
    known = min(power, 4)
    return rows.values[a, known].clamp_min(0) * rows.most ** (power - known)


def undone(bound: Float[Tensor, "row neuron"], tolerance: float) -> Bool[Tensor, "row neuron"]:
    return ~(bound <= tolerance)
