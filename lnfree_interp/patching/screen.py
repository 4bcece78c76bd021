"""Screen, flag, fix: estimate every cell, run the doubtful ones exactly within a budget, and say what error is left."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..arguments import choice, listener, number, switch, text_or_none, whole
from ..batching import Places, Progress
from ..lens import ModelOrName
from ..metrics import logit_diff
from ..models import as_model
from ..pairs import PairedPrompts, as_pairs
from ..results import Result, drawing
from ..weights import read_weights
from .activation import activation_patching
from .attribution import attribution_patching, estimate_of
from .cells import MetricLike, PairsLike, checked
from .edges.result import EdgeEffect
from .effect import PatchingEffect
from .estimates import Estimate
from .plans import SHARE, ErrorLeft, error_left, planned
from .prices import cell_prices, counted, forward_flops, runs_flops
from .shown import panel, unit_of
from .sites import LEAST

Score = Callable[..., Tensor]
"""Of estimates, their reliability and other estimates: how much each cell wants to be run."""

FLAGS: Mapping[str, Score] = {
    "largest": lambda values, reliability, other: values.abs(),
    "reliability": lambda values, reliability, other: reliability,
    "correction": lambda values, reliability, other: values.abs() * reliability,
    "difference": lambda values, reliability, other: (values - other).abs(),
}


@dataclass(frozen=True, repr=False)
class Screening(Result):
    """Effects of which some are exact, the others estimates, and what that took.

    Attributes:
        effect: exact where `fixed`, else the estimate.
        estimate: before anything was fixed.
        fixed: the cells that were run, and those that are 0 without being run.
        drawn: those of them that were drawn at random, not flagged.
        flag: what cells were flagged by.
        budget: forwards that exact runs were allowed.
        spent: forwards that they took. A forward is the model run once on every clean prompt, all logits included;
            what takes a part of its floating-point operations is that part of a forward.
        cost: forwards that the estimates took, on top of that.
        error_left: what is still wrong.
    """

    effect: PatchingEffect | EdgeEffect
    estimate: PatchingEffect | EdgeEffect
    fixed: Bool[Tensor, "prompt _ *cell"]
    drawn: Bool[Tensor, "prompt _ *cell"]
    flag: str
    budget: float
    spent: float
    cost: float
    error_left: ErrorLeft

    def table(self):
        """The effect's table, with columns estimate and fixed: a row per prompt and cell, or per edge its mean."""
        table, estimate, fixed = self.effect.table(), self.estimate.values.detach().cpu().double(), self.fixed
        if isinstance(self.effect, EdgeEffect):
            names = (self.effect.senders, self.effect.receivers)
            at = [[n.index(label) for label in table[c]] for n, c in zip(names, ("sender", "receiver"))]
            estimate, fixed = estimate.mean(0)[at[0], at[1]], fixed.all(0)[at[0], at[1]]
        table["estimate"] = estimate.flatten().numpy().astype(table["effect"].dtype)
        table["fixed"] = fixed.flatten().numpy()
        return table

    @property
    def prompts(self) -> PairedPrompts | None:
        """The clean prompts, with `prompts.corrupted` and `prompts.answers`."""
        return self.effect.prompts

    def summary(self) -> str:
        """What was screened in which model, how much was run exactly for what, and the error left."""
        left, of = self.error_left, "" if self.prompts is None else f" in {self.prompts.model}"
        if isinstance(self.effect, EdgeEffect):
            n, what = len(self.effect.values) * int(self.effect.edges.sum()), "edges"
        else:
            n, what = self.fixed.numel(), f"cells of {self.effect.site}"
        error = "unknown" if left.relative != left.relative else f"{left.relative:.2%}"
        return (
            f"{what}{of}, {self.estimate.method}, flagged by {self.flag}: {n - left.left} of {n} exact, "
            f"{self.spent:.3g} of {self.budget:.3g} forwards spent and {self.cost:.3g} on estimates; error left {error}"
        )

    def picture(self) -> str:
        """The effects, and the error left with its interval."""
        from ..figures.html import note
        from ..figures.panels import panel_picture

        low, high = self.error_left.interval
        known = f"error left {self.error_left.relative:.3g} [{low:.3g}, {high:.3g}], by {self.error_left.drawn} cells"
        said = note(known if low == low else "")
        if isinstance(self.effect, EdgeEffect):
            return self.effect.picture() + said
        return panel_picture(panel(self.effect), unit_of(self.effect.metric)) + said

    def plot(self, *, title: str | None = None):
        """The effects, and below them the estimates, as a figure of plotly."""
        both = (self.effect, self.estimate)
        name = "" if self.prompts is None else self.prompts.model
        title = text_or_none(title, "title")
        with drawing():
            from ..figures.edges import edge_heatmaps
            from ..figures.patching import patching_heatmaps

        if isinstance(self.effect, EdgeEffect):
            told = f"{self.effect.metric} with an edge patched: screened, and before" if title is None else title
            panels = {(e.method, name): e for e in both if isinstance(e, EdgeEffect)}
            return edge_heatmaps(panels, unit=unit_of(self.effect.metric), title=told)
        cells = {(e.method, name): e for e in both if isinstance(e, PatchingEffect)}
        return patching_heatmaps(cells, title=title)


def screen(
    model: ModelOrName,
    pairs: PairsLike,
    *,
    budget: float | int,
    site: str = "resid_pre",
    metric: MetricLike = logit_diff,
    method: Estimate | str = "gradient",
    against: Estimate | str | None = None,
    flag: str | None = None,
    each_prompt: bool = False,
    share: float | int = SHARE,
    direction: str = "denoising",
    layers: Places | None = None,
    units: Places | None = None,
    by_position: bool = False,
    normalize: bool = True,
    least: float | int = LEAST,
    seed: int = 0,
    max_memory: float | int | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Screening:
    """Effects of all cells: estimated, those flagged run exactly within a budget, the error left measured.

    The workflow of arXiv 2606.09899, with a choice of estimates and flags. Of the budget a share goes to cells drawn at
    random, which are run like those flagged: what the estimate is off by there, is what it is off by where nobody
    looked.

    Args:
        pairs: as for `activation_patching`.
        budget: forwards of the model (see `Screening`) that exact runs may take; `math.inf`: all cells are run. Two of
            them are the runs that patching starts from.
        method: the estimate, or its name with its options beside it, as for `attribution_patching`.
        against: another estimate, for the flag "difference".
        flag: by what cells are flagged, the largest first. "largest": the size of the estimate. "reliability": that of
            "second_order", as in the paper, whatever the cell's size. "correction": their product, which is about what
            the second order changed. "difference": |estimate - other estimate|. Default: "difference" where there is
            another, else "correction" where there is a reliability, else "largest".
        each_prompt: flag cells of each prompt by themselves; else a cell is run on all prompts or on none.
        share: of the budget, for the random sample (more, up to half, if it pays for fewer than ten); 0: no error left
            is known.
        site, metric, direction, layers, units, by_position, max_memory: as for `activation_patching`.
        normalize, least: of the error left, as for `patching_error`.
        seed: of the random sample.
        progress: of the exact runs, called with (cells done, cells in all).

    Raises:
        ValueError: as for `attribution_patching`; a budget that is negative or no number, a share that is not in
            [0, 1), an unknown flag, or one that the method does not go with; nothing to normalise by.

    Example:
        >>> from lnfree_interp import load_model
        >>> from lnfree_interp.pairs import induction_pairs
        >>> model = load_model("tiny-noLN")
        >>> pairs = induction_pairs(model, 4, length=8)
        >>> found = screen(model, pairs, method="gradient", against="integrated", budget=2)
        >>> found.spent <= 2, found.fixed.shape
        (True, torch.Size([4, 8, 8]))
    """
    estimate, other = estimate_of(method, options), None if against is None else estimate_of(against, {}, "against")
    model, progress = as_model(model), listener(progress)
    pairs = as_pairs(pairs, model)
    request = checked(model, pairs.to("cpu"), site, metric, direction, layers, units, by_position)
    where: dict[str, Any] = {
        "site": site,
        "metric": metric,
        "direction": direction,
        "layers": layers,
        "units": units,
        "by_position": by_position,
        "max_memory": max_memory,
    }
    weights, on_cpu = read_weights(model), pairs.to("cpu")
    forward = forward_flops(model, request.n_pos) * len(pairs)
    run = partial(attribution_patching, model, pairs, **where)
    work = Work(
        estimate=partial(run, method=estimate),
        other=None if other is None else partial(run, method=other),
        exact=lambda only: activation_patching(model, pairs, only=only, progress=progress, **where),
        prices=lambda: cell_prices(model, request, on_cpu, weights) / forward,
        of_runs=runs_flops(model, request, on_cpu, weights) / forward,
        forward=forward,
    )
    return screened(
        work, flag, budget, each_prompt=each_prompt, share=share, normalize=normalize, least=least, seed=seed
    )


# ---------------------------------------------------------------------------------------------------------
# The same for cells and for edges


@dataclass(frozen=True)
class Work:
    """What screening needs of cells, or of edges.

    Attributes:
        estimate, other: makes effects of all cells [prompt, *cell], and another estimate of them.
        exact: a mask of them -> their exact effects.
        prices: what each costs to run, in forwards; 0 for those known to be 0.
        of_runs: what is to be paid before the first.
        forward: floating-point operations of one.
        together: a cell is run on all prompts or on none.
    """

    estimate: Callable[[], Any]
    other: Callable[[], Any] | None
    exact: Callable[[Tensor], Any]
    prices: Callable[[], Float[Tensor, "prompt _ *cell"]]
    of_runs: float
    forward: float
    together: bool = False


def screened(
    work: Work,
    flag: str | None,
    budget: float | int,
    *,
    each_prompt: bool = False,
    share: float | int,
    normalize: bool,
    least: float | int,
    seed: int,
) -> Screening:
    """Estimate, plan, run what is planned, measure."""
    budget, share = number(budget, "budget", least=0), number(share, "share", least=0, below=1)
    seed = whole(seed, "seed", least=0)
    normalize, least = switch(normalize, "normalize"), number(least, "least", least=0)
    each_prompt = switch(each_prompt, "each_prompt")
    _check_flag(flag, work.other)
    found, flops = counted(work.estimate)
    values, compared = found.values.detach().cpu().double(), None
    if work.other is not None:
        another, more = counted(work.other)
        compared, flops = another.values.detach().cpu().double(), flops + more
    reliability = None if found.reliability is None else found.reliability.detach().cpu().double()
    flag = _flag(flag, found, work.other)
    score = FLAGS[flag](values, reliability, compared).nan_to_num(0.0, math.inf)
    weight = prompt_weights(found, normalize, least)
    price = work.prices()
    plan = planned(
        score,
        values.abs() * weight.view(-1, *[1] * (values.ndim - 1)),
        price,
        budget - work.of_runs,
        together=work.together or not each_prompt,
        counts=weight > 0,
        whole_draws=work.together,
        share=share,
        seed=seed,
    )
    effect, spent, exact = found, 0.0, values
    if plan.run.any():
        run, ran = counted(work.exact, plan.run)
        spent, exact = ran / work.forward, run.values.detach().cpu().double()
        chosen = plan.run.to(found.values.device)
        effect = replace(
            found, values=torch.where(chosen, run.values, found.values), method=f"{found.method}, screened"
        )
    return Screening(
        effect=effect,
        estimate=found,
        fixed=plan.run | (price == 0),
        drawn=plan.drawn,
        flag=flag,
        budget=budget,
        spent=spent,
        cost=flops / work.forward,
        error_left=error_left(values, exact, plan, weight, seed=seed),
    )


def _check_flag(flag: str | None, other: Any | None) -> None:
    if flag is not None:
        choice(flag, "flag", FLAGS)
    if flag == "difference" and other is None:
        raise ValueError("flag 'difference' needs another estimate, for example against='integrated'")
    if flag not in (None, "difference") and other is not None:
        raise ValueError(f"flag {flag!r} does not look at another estimate, and against= is one")


def _flag(flag: str | None, found: Any, other: Any | None) -> str:
    if flag is None:
        return "difference" if other is not None else "largest" if found.reliability is None else "correction"
    if flag in ("reliability", "correction") and found.reliability is None:
        raise ValueError(f"flag {flag!r} needs a method with a reliability, such as second_order, not {found.method!r}")
    return flag


def prompt_weights(found: Any, normalize: bool, least: float | int) -> Float[Tensor, " prompt"]:
    """What each prompt's errors count: as shares of its total effect, or as they are."""
    total = (found.clean - found.corrupted).detach().cpu().double().abs()
    if not normalize:
        return torch.ones_like(total)
    there = total >= least
    if not there.any():
        raise ValueError(
            f"the metric moves by {least} or more on none of {len(total)} prompts: nothing to normalise by, "
            "take normalize=False"
        )
    return torch.where(there, 1 / total, 0.0)
