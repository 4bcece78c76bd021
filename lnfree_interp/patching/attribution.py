"""Attribution patching: estimates of activation patching from gradients, all cells at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from ..arguments import choice, listener
from ..batching import Places, Progress
from ..lens import ModelOrName
from ..metrics import logit_diff
from ..models import as_model
from ..pairs import PairedPrompts, as_pairs
from ..weights import read_weights, widened_norms
from . import hooked
from .cells import MetricLike, PairsLike, Request, checked, itemsize, memory_budget
from .effect import PatchingEffect
from .estimates import AtPStar, Estimate, Gradient, Integrated, RelP, SecondOrder
from .reading import check_finite
from .sides import both_sides, frozen, numbers_per_prompt

ESTIMATES = {estimate.name: estimate for estimate in (Gradient, Integrated, SecondOrder, AtPStar, RelP)}


def attribution_patching(
    model: ModelOrName,
    pairs: PairsLike,
    *,
    site: str = "resid_pre",
    metric: MetricLike = logit_diff,
    method: Estimate | str = "gradient",
    direction: str = "denoising",
    layers: Places | None = None,
    units: Places | None = None,
    by_position: bool = False,
    max_memory: float | int | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> PatchingEffect:
    """Estimates of `activation_patching` from gradients, with the same cells and the same result.

    Args:
        pairs: as for `activation_patching`.
        method: an estimate, or its name: `Gradient()` or "gradient", `Integrated()` or "integrated", `SecondOrder()` or
            "second_order", for sites q and k `AtPStar()` or "atp_star", `RelP()` or "relp". Each says what it is; where
            they are exact, `Estimate` says.
        options: the fields of an estimate that is named: method="integrated", steps=10 is Integrated(steps=10).
        site, metric, by_position, layers, units, direction, max_memory: as for `activation_patching`.
        progress: called with (prompts done, prompts in all).

    Raises:
        ValueError: as for `activation_patching`; an unknown method; an option that the estimate does not have or take;
            an estimate of a site that it is not for, or one that needs weights of a model that `read_weights` does
            not read.

    Example:
        >>> from lnfree_interp import load_model
        >>> from lnfree_interp.pairs import induction_pairs
        >>> model = load_model("tiny-noLN")
        >>> effect = attribution_patching(model, induction_pairs(model, 2, length=8), method="second_order")
        >>> effect.values.shape, effect.reliability.shape
        (torch.Size([2, 8, 8]), torch.Size([2, 8, 8]))
    """
    estimate, progress = estimate_of(method, options), listener(progress)
    model = as_model(model)
    pairs = as_pairs(pairs, model).to("cpu")
    prompts = PairedPrompts.of_pairs(pairs, model)
    request = checked(model, pairs, site, metric, direction, layers, units, by_position)
    if site not in estimate.sites:
        raise ValueError(f"method {estimate.name!r} is for sites {' and '.join(estimate.sites)}, not {site!r}")
    weights = read_weights(model)
    if estimate.needs_weights and weights is None:
        raise ValueError(f"method {estimate.name!r} needs a model that read_weights reads, and this one it does not")
    budget = memory_budget(model, max_memory)
    pairs = pairs.to(model.cfg.device)
    if weights is None:
        hooked.check_model(model, pairs.clean)
    else:
        # As stored, in fp32 at least: in half precision the difference between the runs would be mostly rounding.
        weights = estimate.rules(widened_norms(weights))
    n_together = max(1, budget // (numbers_per_prompt(model, request) * itemsize(model, weights)))
    parts = []
    with frozen(model), torch.enable_grad():
        for i in range(0, len(pairs), n_together):
            here = slice(i, i + n_together)
            part = request.of_prompts(here, model.cfg.device)
            case = both_sides(model, part, pairs[here], weights, graph=estimate.graph, cut=estimate.cut)
            check_finite(request, torch.stack([case.at_base, case.at_source], 1), first=i)
            parts.append((*estimate.effects(case, budget), case.at_source, case.at_base))
            if progress is not None:
                progress(min(len(pairs), i + n_together), len(pairs))
    values, reliability, at_source, at_base = zip(*parts)
    check_finite(request, torch.cat(values), f"{estimate.name} estimate of")
    clean, corrupted = (at_source, at_base) if direction == "denoising" else (at_base, at_source)
    return PatchingEffect(
        values=_placed(values, request),
        site=site,
        method=estimate.name,
        direction=direction,
        metric=request.metric.name,
        axes=request.axes,
        layers=request.layers,
        units=request.units,
        clean=torch.cat(clean),
        corrupted=torch.cat(corrupted),
        reliability=None if reliability[0] is None else _placed(reliability, request),
        cells_run=torch.Size(request.shape(len(pairs))).numel(),
        prompts=prompts,
    )


def estimate_of(method: Estimate | str, options: dict[str, Any], what: str = "method") -> Estimate:
    """The estimate that a method and the options beside it say."""
    if isinstance(method, Estimate):
        if options:
            raise ValueError(f"{', '.join(options)} stand beside {method!r}, which has its options in it")
        return method
    choice(method, what, ESTIMATES)
    there = [field.name for field in fields(ESTIMATES[method])]
    for option in options:
        if option not in there:
            raise ValueError(f"method {method!r} has no option {option!r}; it has {', '.join(there) or 'none'}")
    return ESTIMATES[method](**options)


def _placed(parts: Sequence[Tensor], request: Request) -> Tensor:
    """Values of all prompts, with 0 at the positions beyond the last one read."""
    values = torch.cat(list(parts)).detach()
    if "pos" in request.axes and values.shape[-1] < request.n_pos:
        values = torch.nn.functional.pad(values, (0, request.n_pos - values.shape[-1]))
    return values
