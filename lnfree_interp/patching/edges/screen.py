"""Screen, flag, fix, of edges: see `patching.screen`, of which all but the prices is the same."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ...arguments import listener
from ...batching import Progress
from ...lens import LensModel, ModelOrName
from ...metrics import logit_diff
from ...models import as_model
from ...pairs import PromptPairs, as_pairs
from ...weights import Weights, read_weights
from ..attribution import estimate_of
from ..cells import MetricLike, PairsLike, Request, checked, may_matter, tokens_differ
from ..estimates import Estimate
from ..plans import SHARE
from ..prices import Block, forward_flops, read_flops, rest_flops, runs_flops
from ..screen import Screening, Work, screened
from ..sites import LEAST
from .attribution import edge_attribution
from .patching import edge_patching
from .wiring import wiring_of


def screen_edges(
    model: ModelOrName,
    pairs: PairsLike,
    *,
    budget: float | int,
    metric: MetricLike = logit_diff,
    method: Estimate | str = "gradient",
    against: Estimate | str | None = None,
    flag: str | None = None,
    share: float | int = SHARE,
    direction: str = "denoising",
    normalize: bool = True,
    least: float | int = LEAST,
    seed: int = 0,
    max_memory: float | int | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Screening:
    """Effects of all edges: estimated, those flagged run exactly within a budget, the error left measured.

    As `screen` does it of cells; an edge is run on all prompts or on none, and the sample is drawn of edges.

    Args:
        method, against, options: as for `edge_attribution`.
        metric, direction, max_memory: as for `edge_patching`.
        budget, flag, share, normalize, least, seed: as for `screen`.
        progress: of the exact runs, called with (edges done, edges in all).

    Raises:
        ValueError: as for `edge_attribution` and `screen`.

    Example:
        >>> from lnfree_interp import load_model
        >>> from lnfree_interp.pairs import induction_pairs
        >>> model = load_model("tiny-noLN")
        >>> found = screen_edges(model, induction_pairs(model, 4, length=8), budget=3)
        >>> found.spent <= 3, found.fixed.shape
        (True, torch.Size([4, 41, 105]))
    """
    model, progress = as_model(model), listener(progress)
    if against is not None:
        estimate_of(against, {}, "against")
    pairs = as_pairs(pairs, model)
    on_cpu, weights = pairs.to("cpu"), read_weights(model)
    request = checked(model, on_cpu, "resid_pre", metric, direction, None, None, False)
    forward = forward_flops(model, request.n_pos) * len(pairs)
    where: dict[str, Any] = {"metric": metric, "direction": direction, "max_memory": max_memory}
    estimate = partial(edge_attribution, model, pairs, **where)
    work = Work(
        estimate=partial(estimate, method=method, **options),
        other=None if against is None else partial(estimate, method=against),
        exact=lambda only: edge_patching(model, pairs, edges=only[0], progress=progress, **where),
        prices=lambda: edge_prices(model, request, on_cpu, weights) / forward,
        of_runs=edge_runs_flops(model, request, on_cpu, weights) / forward,
        forward=forward,
        together=True,
    )
    return screened(work, flag, budget, share=share, normalize=normalize, least=least, seed=seed)


def edge_prices(
    model: LensModel, request: Request, pairs: PromptPairs, weights: Weights | None
) -> Float[Tensor, "prompt sender receiver"]:
    """What running each edge costs at most, in floating-point operations; 0 where there is none, or none can matter.

    Args:
        weights: None: through hooks, whole blocks at all positions.
    """
    wiring, n_read, n_layers = wiring_of(model), request.n_read, model.cfg.n_layers
    block, of_metric = Block.of(model, n_read), read_flops(model, request, pairs)
    # The prompts differ from the first place on at which their residual streams do.
    differ = may_matter(request, tokens_differ(weights, pairs), n_layers)[0]
    start = torch.where(differ.any(1), differ.int().argmax(1), n_read)
    rows = (n_read - start).double()
    read = (start[:, None] <= torch.tensor(sorted(set(request.reads)))).sum(1).double()
    sent = block.of_z / (wiring.n_heads if wiring.by_head else 1)
    prices = torch.zeros(len(pairs), *wiring.edges.shape, dtype=torch.float64)
    for layer, kind, which, before in wiring.groups:
        there = rows if layer < n_layers - 1 else read
        # A sender's change is made and read at all positions, in the last layer by queries and MLPs at those read.
        seen = rows if kind in ("k", "v") else there
        if weights is None:
            flops = n_read * (sent + (n_layers - layer) * block.whole + torch.zeros_like(rows))
        elif kind == "logits":
            flops = seen * sent
        else:
            own = seen * sent + there * block.mlp
            if kind != "mlp":
                own = own + seen * block.of_z + there * (block.attention + block.of_z)
            flops = own + rest_flops(model, request, torch.full_like(start, layer + 1), start)
        prices[:, :before, which] = torch.where(rows > 0, flops + of_metric, 0.0)[:, None, None]
    return prices


def edge_runs_flops(model: LensModel, request: Request, pairs: PromptPairs, weights: Weights | None) -> float:
    """What edge patching costs before any edge."""
    # Through hooks, it is seen on the first prompt whether splitting the inputs leaves the model what it is.
    return runs_flops(model, request, pairs, weights) + (
        2 * forward_flops(model, request.n_pos) if weights is None else 0
    )
