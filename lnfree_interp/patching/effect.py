"""What patching returns: effects per prompt, layer and place; and how far one estimate is from another."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class PatchingEffect:
    """Effects of patching one site, cell by cell: metric(patched) - metric(unpatched), or an estimate of it.

    Attributes:
        values: Float[Tensor, "prompt layer pos"] for the residual stream, attn_out and mlp_out; "prompt layer head"
            for z, q, k, v, pattern and "prompt layer neuron" for neurons, all positions together; a fourth
            axis "pos" if positions were asked for one by one. In units of the metric.
        site, method, direction: "resid_pre", "activation", "denoising", ...
        axes: what the axes of `values` are.
        layers, units: the layers, and the positions, heads or neurons, that the second and third axis stand for.
        clean, corrupted: the metric of the unpatched prompts.
        reliability: of method "second_order": |d^T H d| / (2 |g.d|), shaped as `values`; large ones are suspect.
        cells_run: how many cells were run; the others are exactly 0 (nothing differs there, or nothing that the
            metric reads depends on them).
        flops: floating-point operations spent, and of running the whole model for each cell; None if not counted.
    """

    values: Float[Tensor, "prompt layer *cell"]
    site: str
    method: str
    direction: str
    metric: str
    axes: tuple[str, ...]
    layers: tuple[int, ...]
    units: tuple[int, ...]
    clean: Float[Tensor, " prompt"]
    corrupted: Float[Tensor, " prompt"]
    reliability: Float[Tensor, "prompt layer *cell"] | None = None
    cells_run: int = 0
    flops: tuple[float, float] | None = None

    def table(self):
        """One row per prompt and cell: prompt, layer, pos or head or neuron, effect (and reliability)."""
        import pandas as pd

        index = np.indices(tuple(self.values.shape)).reshape(self.values.ndim, -1)
        labels = [None, np.asarray(self.layers), np.asarray(self.units), None]
        columns = {axis: index[i] if labels[i] is None else labels[i][index[i]] for i, axis in enumerate(self.axes)}
        columns["effect"] = self.values.flatten().float().cpu().numpy()
        if self.reliability is not None:
            columns["reliability"] = self.reliability.flatten().float().cpu().numpy()
        return pd.DataFrame(columns)


def total_effect(effect: PatchingEffect) -> Float[Tensor, " prompt"]:
    """What patching everything would do: metric(clean) - metric(corrupted), or the opposite for noising.

    With pairs that differ at one position it is the effect of patching that position at layer 0.
    """
    total = effect.clean - effect.corrupted
    return total if effect.direction == "denoising" else -total


def normalized(effect: PatchingEffect) -> Float[Tensor, "prompt layer *cell"]:
    """Effects as shares of each prompt's total effect, the papers' way (P2, section on attribution patching).

    Raises:
        ValueError: a prompt whose total effect is 0.
    """
    total = total_effect(effect)
    zero = (total == 0).nonzero().flatten().tolist()
    if zero:
        raise ValueError(
            f"prompt {zero[0]} has metric {effect.clean[zero[0]].item():.4g} clean and corrupted: its "
            "effects cannot be normalised, compare them raw"
        )
    return effect.values / total.view(-1, *[1] * (effect.values.ndim - 1))


# ---------------------------------------------------------------------------------------------------------
# How far apart two of them are


@dataclass(frozen=True)
class PatchingError:
    """Errors of approximate effects against exact ones; intervals [low, high] by bootstrap over prompts.

    Attributes:
        per_layer: sum over a layer's cells of |approximate - exact|, mean over prompts.
        total: its mean over layers.
        relative: sum |approximate - exact| / sum |exact|, over all prompts and cells.
        pearson, spearman: correlations over all prompts and cells.
        sign_agreement: share of cells of the same sign, among those that either finds different from 0.
    """

    site: str
    method: str
    layers: tuple[int, ...]
    normalized: bool
    per_layer: Float[Tensor, " layer"]
    per_layer_interval: Float[Tensor, "layer two"]
    total: float
    total_interval: tuple[float, float]
    relative: float
    relative_interval: tuple[float, float]
    pearson: float
    pearson_interval: tuple[float, float]
    spearman: float
    spearman_interval: tuple[float, float]
    sign_agreement: float
    sign_agreement_interval: tuple[float, float]

    def table(self):
        """One row per measure: error of each layer, then total, relative, pearson, spearman, sign agreement."""
        import pandas as pd

        rows = [
            (f"error L{layer}", float(value), *map(float, interval))
            for layer, value, interval in zip(self.layers, self.per_layer, self.per_layer_interval)
        ]
        for name in ("total", "relative", "pearson", "spearman", "sign_agreement"):
            rows.append((name, getattr(self, name), *getattr(self, f"{name}_interval")))
        table = pd.DataFrame(rows, columns=["measure", "value", "low", "high"])
        table.insert(0, "site", self.site)
        table.insert(1, "method", self.method)
        return table


def _ranks(x: np.ndarray) -> np.ndarray:
    """Ranks with ties at their mean."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return (last - (counts - 1) / 2.0)[inverse.reshape(x.shape)]


def _correlation(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Pearson correlation of [prompt, cell] for each row of prompt weights [draw, prompt]; nan if one is constant."""
    x, y = x - x.mean(), y - y.mean()  # against cancellation
    w = weights / (weights.sum(1, keepdims=True) * x.shape[1])
    mx, my = w @ x.sum(1), w @ y.sum(1)
    vx, vy = w @ (x * x).sum(1) - mx**2, w @ (y * y).sum(1) - my**2
    cov = w @ (x * y).sum(1) - mx * my
    with np.errstate(invalid="ignore", divide="ignore"):
        r = cov / np.sqrt(vx * vy)
    return np.where((vx > 0) & (vy > 0), r.clip(-1, 1), np.nan)


def _interval(draws: np.ndarray) -> np.ndarray:
    if np.isnan(draws).all(0).any():
        return np.full((2, *draws.shape[1:]), np.nan)
    return np.nanquantile(draws, [0.025, 0.975], axis=0)


def patching_error(
    approximate: PatchingEffect, exact: PatchingEffect, *, normalize: bool = True, draws: int = 1000, seed: int = 0
) -> PatchingError:
    """How far approximate effects are from exact ones, with 95% intervals by bootstrap over prompts.

    Args:
        normalize: divide both by each prompt's exact total effect first (P2, arXiv 2507.02559); else raw.
        draws: bootstrap resamples of the prompts.

    The ranks of Spearman's correlation are those of the whole sample in every resample.

    Raises:
        ValueError: the two are not of the same site, cells, metric or prompts; a prompt that cannot be
            normalised.

    Example:
        >>> from lnfree_interp import load_model
        >>> from lnfree_interp.pairs import induction_pairs
        >>> from lnfree_interp.patching import activation_patching, attribution_patching
        >>> model = load_model("tiny-noLN")
        >>> pairs = induction_pairs(model, 4, length=8)
        >>> exact = activation_patching(model, pairs)
        >>> error = patching_error(attribution_patching(model, pairs), exact, draws=50)
        >>> list(error.table().columns), len(error.per_layer)
        (['site', 'method', 'measure', 'value', 'low', 'high'], 4)
    """
    for name in ("site", "direction", "metric", "layers", "units", "axes"):
        a, b = getattr(approximate, name), getattr(exact, name)
        if a != b:
            raise ValueError(f"approximate effects have {name} {a}, exact ones {b}: compare like with like")
    if approximate.values.shape != exact.values.shape:
        shapes = list(approximate.values.shape), list(exact.values.shape)
        raise ValueError(f"approximate effects have shape {shapes[0]}, exact ones {shapes[1]}")
    n = len(exact.values)
    x, y = approximate.values.double().cpu(), exact.values.double().cpu()
    if normalize:
        normalized(exact)  # for its error
        total = total_effect(exact).double().cpu().view(-1, *[1] * (y.ndim - 1))
        x, y = x / total, y / total
    x, y = (v.flatten(2).numpy() for v in (x, y))

    # Each resample of the prompts is a row of weights; the first row is the sample itself.
    counts = np.random.default_rng(seed).multinomial(n, [1 / n] * n, size=draws)
    weights = np.concatenate([np.ones((1, n)), counts]).astype(float)

    error, size = np.abs(x - y).sum(2), np.abs(y).sum(2)  # [prompt, layer]
    per_layer = weights @ error / n
    with np.errstate(invalid="ignore", divide="ignore"):
        relative = (weights @ error.sum(1)) / (weights @ size.sum(1))
        either = ((x != 0) | (y != 0)).sum((1, 2))
        agree = ((np.sign(x) == np.sign(y)) & (y != 0)).sum((1, 2))
        agreement = (weights @ agree) / (weights @ either)
    flat_x, flat_y = x.reshape(n, -1), y.reshape(n, -1)
    pearson = _correlation(flat_x, flat_y, weights)
    spearman = _correlation(_ranks(flat_x), _ranks(flat_y), weights)

    def both(name: str, values: np.ndarray) -> dict:
        return {name: float(values[0]), f"{name}_interval": tuple(map(float, _interval(values[1:])))}

    return PatchingError(
        site=exact.site,
        method=approximate.method,
        layers=exact.layers,
        normalized=normalize,
        per_layer=torch.from_numpy(per_layer[0]),
        per_layer_interval=torch.from_numpy(_interval(per_layer[1:]).T.copy()),
        **both("total", per_layer.mean(1)),
        **both("relative", relative),
        **both("pearson", pearson),
        **both("spearman", spearman),
        **both("sign_agreement", agreement),
    )
