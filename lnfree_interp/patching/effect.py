"""What patching returns: effects per prompt, layer and place; and how far one estimate is from another."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..arguments import number, one_of, sampling, switch, text_or_none
from ..batching import check_rows
from ..pairs import PairedPrompts
from ..results import Result, counted, drawing
from ..statistics import correlation, correlation_interval, mean_interval, ratio, ratio_interval
from .shown import largest_cell, panel, unit_of
from .sites import LEAST


@dataclass(frozen=True, repr=False)
class PatchingEffect(Result):
    """Effects of patching one site, cell by cell: metric(patched) - metric(unpatched), or an estimate of it.

    Attributes:
        values: Float[Tensor, "prompt layer pos"] for the residual stream, attn_out and mlp_out; "prompt layer head"
            for z, q, k, v, pattern and "prompt layer neuron" for neurons, all positions together; a fourth
            axis "pos" if positions were asked for one by one. In units of the metric; nan where not asked for.
        site, method, direction: "resid_pre", "activation", "denoising", ...
        axes: what the axes of `values` are.
        layers, units: the layers, and the positions, heads or neurons, that the second and third axis stand for.
        clean, corrupted: the metric of the unpatched prompts.
        reliability: of method "second_order": |d^T H d| / (2 |g.d|), shaped as `values`; large ones are suspect.
        cells_run: how many cells were run; the others are exactly 0 (nothing differs there, or nothing that the
            metric reads depends on them).
        flops: floating-point operations spent, and of running the whole model for each cell; None if not counted.
        prompts: the clean prompts, with `prompts.corrupted` and `prompts.answers`.
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
    prompts: PairedPrompts | None = None

    def __getitem__(self, prompts: slice | Tensor) -> PatchingEffect:
        """The effects of some of the prompts."""
        of_prompts = ("values", "clean", "corrupted", "reliability", "prompts")
        check_rows(prompts, "prompts")
        return replace(self, **{f: v[prompts] for f in of_prompts if (v := getattr(self, f)) is not None})

    def table(self):
        """One row per prompt and cell: prompt, layer, pos or head or neuron, effect (and reliability)."""
        import pandas as pd

        index = np.indices(tuple(self.values.shape)).reshape(self.values.ndim, -1)
        labels: list[Any] = [None, np.asarray(self.layers), np.asarray(self.units), None]
        columns = {axis: index[i] if labels[i] is None else labels[i][index[i]] for i, axis in enumerate(self.axes)}
        columns["effect"] = self.values.flatten().float().cpu().numpy()
        if self.reliability is not None:
            columns["reliability"] = self.reliability.flatten().float().cpu().numpy()
        return pd.DataFrame(columns)

    def summary(self) -> str:
        """What was patched in which model, the shape, the unit, and the largest effect."""
        how = "" if self.method == "activation" else f", {self.method}"
        of = "" if self.prompts is None else f" in {self.prompts.model}"
        names = ["position" if axis == "pos" else axis for axis in self.axes]
        sizes = [counted(n, name) for n, name in zip(self.values.shape, names)]
        total = total_effect(self).double().mean()
        return (
            f"{self.metric} with {self.site} patched, {self.direction}{how}{of}: {' x '.join(sizes)}, "
            f"in {unit_of(self.metric)}; the largest {largest_cell(panel(self))} of {total:+.3g} in all"
        ).replace("\n", "⏎")

    def picture(self) -> str:
        """Mean effects by layer and position, head or neuron; of many neurons the largest."""
        from ..figures.panels import panel_picture

        return panel_picture(panel(self), unit_of(self.metric))

    def plot(self, *, title: str | None = None):
        """The mean effects as a figure of plotly."""
        with drawing():
            from ..figures.patching import patching_heatmaps

        name = "" if self.prompts is None else self.prompts.model
        return patching_heatmaps({(self.method, name): self}, title=text_or_none(title, "title"))


def total_effect(effect: PatchingEffect) -> Float[Tensor, " prompt"]:
    """What patching everything would do: metric(clean) - metric(corrupted), or the opposite for noising.

    With pairs that differ at one position it is the effect of patching that position at layer 0.
    """
    one_of(effect, "effect", PatchingEffect, "a PatchingEffect")
    total = effect.clean - effect.corrupted
    return total if effect.direction == "denoising" else -total


def moved(effect: PatchingEffect, least: float = LEAST) -> Bool[Tensor, " prompt"]:
    """The prompts whose total effect is at least so large, either way: the others have nothing to be a share of."""
    return total_effect(effect).abs() >= number(least, "least")


def solved(effect: PatchingEffect, least: float = LEAST) -> Bool[Tensor, " prompt"]:
    """The prompts on which the metric is higher by so much for the clean than for the corrupted prompt.

    With logit_diff or right_log_prob: those on which the model does the task.
    """
    one_of(effect, "effect", PatchingEffect, "a PatchingEffect")
    return effect.clean - effect.corrupted >= number(least, "least")


def normalized(effect: PatchingEffect) -> Float[Tensor, "prompt layer *cell"]:
    """Effects as shares of each prompt's total effect, the papers' way (P2, section on attribution patching).

    Shares of a total effect near zero are noise: take `effect[moved(effect)]`.

    Raises:
        ValueError: a prompt whose total effect is 0.
    """
    total = total_effect(effect)
    zero = (total == 0).nonzero().flatten().tolist()
    if zero:
        raise ValueError(
            f"prompt {zero[0]} has metric {effect.clean[zero[0]].item():.4g} clean and corrupted: its "
            "effects cannot be normalised, leave it out (moved) or compare them raw"
        )
    return effect.values / total.view(-1, *[1] * (effect.values.ndim - 1))


# ---------------------------------------------------------------------------------------------------------
# How far apart two of them are


@dataclass(frozen=True, repr=False)
class PatchingError(Result):
    """Errors of approximate effects against exact ones; 95% intervals [low, high] over prompts (`statistics`).

    Attributes:
        n_prompts: how many prompts the errors are of.
        left_out: how many were not used, since nothing moves in them: see `moved`.
        per_layer: sum over a layer's cells of |approximate - exact|, mean over prompts.
        total: its mean over layers.
        relative: sum |approximate - exact| / sum |exact|, over all prompts and cells.
        pearson, spearman: correlations over all prompts and cells.
        sign_agreement: share of cells of the same sign, among those that either finds different from 0.
        model: its name.
    """

    site: str
    method: str
    layers: tuple[int, ...]
    normalized: bool
    n_prompts: int
    left_out: int
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
    model: str | None = None

    def table(self):
        """One row per measure: error of each layer, then total, relative, pearson, spearman, sign agreement.

        Columns site, method, prompts, left_out, measure, value, low, high.
        """
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
        table.insert(2, "prompts", self.n_prompts)
        table.insert(3, "left_out", self.left_out)
        return table

    def summary(self) -> str:
        """Of which estimate, site and model, on how many prompts, and the relative error."""
        low, high = self.relative_interval
        of = "" if self.model is None else f" in {self.model}"
        left = f" ({self.left_out} left out)" if self.left_out else ""
        return (
            f"{self.method} of {self.site}{of}: {counted(len(self.layers), 'layer')}, "
            f"{counted(self.n_prompts, 'prompt')}{left}; "
            f"relative error {self.relative:.2%} [{low:.2%}, {high:.2%}], pearson {self.pearson:.3f}"
        )

    def picture(self) -> str:
        """Each layer's error, and the measures over all with their intervals."""
        from ..figures.panels import error_picture

        return error_picture(self)

    def plot(self, *, title: str | None = None):
        """Each layer's error with its interval, as a figure of plotly."""
        with drawing():
            from ..figures.patching import error_lines

        return error_lines({self.model or self.method: self}, title=text_or_none(title, "title"))


def _ranks(x: np.ndarray) -> np.ndarray:
    """Ranks with ties at their mean."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return (last - (counts - 1) / 2.0)[inverse.reshape(x.shape)]


def compared(
    approximate: PatchingEffect, exact: PatchingEffect, *, normalize: bool = True, least: float = LEAST
) -> tuple[Float[Tensor, "prompt layer cell"], Float[Tensor, "prompt layer cell"]]:
    """The two as they are compared: on the CPU in fp64, as shares of the exact total effect where there is one.

    Raises:
        ValueError: as `patching_error`.
    """
    for name, effect in (("approximate", approximate), ("exact", exact)):
        one_of(effect, name, PatchingEffect, "a PatchingEffect")
    for name in ("site", "direction", "metric", "layers", "units", "axes"):
        a, b = getattr(approximate, name), getattr(exact, name)
        if a != b:
            raise ValueError(f"approximate effects have {name} {a}, exact ones {b}: compare like with like")
    if approximate.values.shape != exact.values.shape:
        shapes = list(approximate.values.shape), list(exact.values.shape)
        raise ValueError(f"approximate effects have shape {shapes[0]}, exact ones {shapes[1]}")
    x, y = (effect.values.detach().cpu().double().flatten(2) for effect in (approximate, exact))
    number(least, "least")
    if not switch(normalize, "normalize"):
        return x, y
    if not least > 0:
        raise ValueError(f"least is {least}, effects can only be normalised by a total effect above 0")
    total = total_effect(exact).cpu().double()
    there = total.abs() >= least
    if not there.any():
        raise ValueError(
            f"the metric moves by {least} or more on none of {len(total)} prompts (at most {total.abs().max():.3g}): "
            "nothing to normalise by, compare them raw"
        )
    total = total[there, None, None]
    return x[there] / total, y[there] / total


def patching_error(
    approximate: PatchingEffect,
    exact: PatchingEffect,
    *,
    normalize: bool = True,
    least: float = LEAST,
    draws: int = 1000,
    seed: int = 0,
) -> PatchingError:
    """How far approximate effects are from exact ones, with 95% intervals over prompts.

    Args:
        normalize: divide both by each prompt's exact total effect first (P2, arXiv 2507.02559); else raw.
        least: prompts whose total effect is smaller, in the metric's units, are left out of normalised errors.
        draws: bootstrap resamples of the prompts.

    The ranks of Spearman's correlation are those of the whole sample in every resample.

    Raises:
        ValueError: the two are not of the same site, cells, metric or prompts; none of the prompts can be
            normalised.

    Example:
        >>> from lnfree_interp import load_model
        >>> from lnfree_interp.pairs import induction_pairs
        >>> from lnfree_interp.patching import activation_patching, attribution_patching
        >>> model = load_model("tiny-noLN")
        >>> pairs = induction_pairs(model, 8, length=8)
        >>> exact = activation_patching(model, pairs)
        >>> error = patching_error(attribution_patching(model, pairs), exact, draws=50)
        >>> error.n_prompts + error.left_out, len(error.per_layer)
        (8, 8)
    """
    drawn = sampling(draws, seed)
    pair = compared(approximate, exact, normalize=normalize, least=least)
    x, y = (v.numpy() for v in pair)
    n = len(x)
    error, size = np.abs(x - y).sum(2), np.abs(y).sum(2)  # [prompt, layer]
    either = ((x != 0) | (y != 0)).sum((1, 2))
    agree = ((np.sign(x) == np.sign(y)) & (y != 0)).sum((1, 2))
    flat = x.reshape(n, -1), y.reshape(n, -1)
    ranks = tuple(_ranks(v) for v in flat)
    low, high = mean_interval(error, **drawn)

    def of_ratio(name: str, a: np.ndarray, b: np.ndarray) -> dict:
        bounds = ratio_interval(a, b, **drawn)
        return {name: float(ratio(a.sum(), b.sum())), f"{name}_interval": tuple(map(float, bounds))}

    def of_correlation(name: str, a: np.ndarray, b: np.ndarray) -> dict:
        return {name: correlation(a, b), f"{name}_interval": correlation_interval(a, b, **drawn)}

    bounds = mean_interval(error.mean(1), **drawn)
    return PatchingError(
        site=exact.site,
        method=approximate.method,
        layers=exact.layers,
        normalized=normalize,
        n_prompts=n,
        left_out=len(exact.values) - n,
        per_layer=torch.from_numpy(error.mean(0)),
        per_layer_interval=torch.from_numpy(np.stack([low, high], 1)),
        total=float(error.mean()),
        total_interval=(float(bounds[0]), float(bounds[1])),
        **of_ratio("relative", error.sum(1), size.sum(1)),
        **of_correlation("pearson", *flat),
        **of_correlation("spearman", *ranks),
        **of_ratio("sign_agreement", agree, either),
        model=None if exact.prompts is None else exact.prompts.model,
    )
