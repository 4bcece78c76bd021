"""Edge attribution: what each sender does through each receiver, estimated from gradients, all edges at once."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from ...arguments import listener
from ...batching import Progress
from ...lens import ModelOrName
from ...metrics import logit_diff
from ...models import as_model
from ...pairs import PairedPrompts, PromptPairs, as_pairs
from ...weights import Weights, read_weights, widened_norms
from .. import hooked
from ..attribution import estimate_of
from ..cells import MetricLike, PairsLike, Request, checked, itemsize, memory_budget
from ..estimates import AtPStar, Estimate, Integrated, SecondOrder
from ..reading import check_finite
from ..sides import frozen, numbers_per_prompt, two_sides
from .estimates import EFFECTS
from .result import EdgeEffect
from .streams import FINAL, Watched, both, embed_hook, split_inputs
from .terms import EdgeCase, changed
from .wiring import Wiring, wiring_of


def edge_attribution(
    model: ModelOrName,
    pairs: PairsLike,
    *,
    metric: MetricLike = logit_diff,
    method: Estimate | str = "gradient",
    direction: str = "denoising",
    max_memory: float | int | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> EdgeEffect:
    """Estimates of `edge_patching` from gradients, of all edges at once.

    With d the sender's output in the patching run less that in the patched run, and g the gradient of the metric with
    respect to the receiver's own copy of the residual stream (before its norm) in the patched run, both at all
    positions:

    - "gradient": g.d, two forwards and one backward (edge attribution patching, arXiv 2310.10348).
    - "integrated": g averaged along the straight way between the two prompts' embeddings (EAP-IG, arXiv 2403.17806), at
      the midpoints of `steps` equal parts. There is no path="layer".
    - "relp": g of a backward pass by RelP's rules (arXiv 2508.21258).
    - "atp_star": for queries and keys their attention's softmax, and the norm before, computed again for the sender's
      change, and the gradient from z on (AtP*, arXiv 2403.00745); for the others the gradient.
    - "second_order": g and half of its derivative along the change of the whole prompt's embeddings, for all edges
      together (`joint`), by one product with the Hessian; `reliability` as of `SecondOrder`.

    Args:
        pairs, metric, direction, max_memory: as for `activation_patching`.
        method, options: as for `attribution_patching`.
        progress: called with (prompts done, prompts in all).

    Returns:
        EdgeEffect with values [prompt, sender, receiver]. Senders are "embed" (token and position: all that enters the
        first block), heads "L2H3" and MLPs "L2.mlp"; where a norm comes after attention, so that heads write nothing on
        their own, all of it is one sender, "L2.attn". Receivers are "L4H1.q", "L4H1.k", "L4H1.v" (of grouped keys and
        values each of them), "L4.mlp" and "logits".

    Raises:
        ValueError: as for `attribution_patching`; an estimate that is not for edges as it is asked for; a model that
            neither `read_weights` reads nor TransformerLens can split the inputs of.

    Example:
        >>> from lnfree_interp import edge_attribution, induction_pairs, load_model
        >>> model = load_model("tiny-noLN")
        >>> effect = edge_attribution(model, induction_pairs(model, 2, length=8))
        >>> effect.values.shape, int(effect.edges.sum())
        (torch.Size([2, 41, 105]), 1997)
        >>> effect.table(3).columns.tolist()
        ['sender', 'receiver', 'effect', 'low', 'high']
    """
    estimate, progress = _estimate(method, options), listener(progress)
    model = as_model(model)
    pairs = as_pairs(pairs, model).to("cpu")
    prompts = PairedPrompts.of_pairs(pairs, model)
    # As the residual stream is patched: the last layer computes the positions read alone.
    request = checked(model, pairs, "resid_pre", metric, direction, None, None, False)
    wiring, weights = wiring_of(model), read_weights(model)
    if estimate.needs_weights and weights is None:
        raise ValueError(f"method {estimate.name!r} needs a model that read_weights reads, and this one it does not")
    budget = memory_budget(model, max_memory)
    pairs = pairs.to(model.cfg.device)
    if weights is None:
        hooked.check_model(model, pairs.clean)
    else:
        weights = estimate.rules(widened_norms(weights))
    n_together = max(1, budget // 2 // (_numbers(model, request, wiring, weights) * itemsize(model, weights)))
    parts = []
    with (
        frozen(model),
        torch.enable_grad(),
        nullcontext() if weights is not None else split_inputs(model, wiring, pairs.clean),
    ):
        for i in range(0, len(pairs), n_together):
            here = slice(i, i + n_together)
            part = request.of_prompts(here, model.cfg.device)
            case = _case(model, part, pairs[here], weights, wiring, estimate, budget // 2)
            metrics = case.sides.at_source, case.sides.at_base
            check_finite(request, torch.stack(metrics, 1), first=i)
            parts.append((*EFFECTS[type(estimate)](case, estimate), *metrics))
            if progress is not None:
                progress(min(len(pairs), i + n_together), len(pairs))
    values, reliability, at_source, at_base = zip(*parts)
    found = torch.cat(values).detach()
    check_finite(request, found, f"{estimate.name} estimate of")
    clean, corrupted = (at_source, at_base) if direction == "denoising" else (at_base, at_source)
    return EdgeEffect(
        values=found,
        edges=wiring.edges,
        senders=wiring.senders,
        receivers=wiring.receivers,
        method=estimate.name,
        direction=direction,
        metric=request.metric.name,
        clean=torch.cat(clean),
        corrupted=torch.cat(corrupted),
        reliability=None if reliability[0] is None else torch.cat(reliability).detach(),
        cells_run=len(pairs) * int(wiring.edges.sum()),
        prompts=prompts,
    )


def _estimate(method: Estimate | str, options: dict[str, Any]) -> Estimate:
    """The estimate asked for, or a ValueError where it is not for edges."""
    if method == "second_order":
        options = {"joint": True} | options
    estimate = estimate_of(method, options)
    if type(estimate) not in EFFECTS:
        known = ", ".join(kind.name for kind in EFFECTS)
        raise ValueError(f"method {estimate.name!r} is not for edges; known are {known}")
    if isinstance(estimate, Integrated) and estimate.path != "input":
        raise ValueError(f"path {estimate.path!r} is not for edges, which have one path, 'input'")
    if isinstance(estimate, SecondOrder) and not estimate.joint:
        raise ValueError("joint=False is not for edges, which are taken together: SecondOrder(joint=True)")
    return estimate


def _numbers(model, request: Request, wiring: Wiring, weights: Weights | None) -> int:
    """Roughly what is kept of both runs for one prompt."""
    cfg = model.cfg
    written = 3 * request.n_read * cfg.n_layers * (cfg.n_heads * cfg.d_head + 2 * cfg.d_model)
    copies = 0 if weights is not None else 8 * request.n_read * len(wiring.receivers) * cfg.d_model
    return numbers_per_prompt(model, request) + written + copies


def _case(
    model,
    request: Request,
    pairs: PromptPairs,
    weights: Weights | None,
    wiring: Wiring,
    estimate: Estimate,
    budget: int,
) -> EdgeCase:
    base, source = Watched(), Watched()
    # Those who run the base prompts on their own need of this run only what was written.
    graph = not isinstance(estimate, (Integrated, SecondOrder))
    readers = base.readers(wiring, weights, at_z=isinstance(estimate, AtPStar)) if graph else {}
    hooks = both(base.writers(wiring), readers)
    sides = two_sides(model, request, pairs, weights, source.writers(wiring), hooks, graph=graph, cut=estimate.cut)
    delta = changed(sides, wiring, base.writes, source.writes)
    start = sides.window.first
    entering = {"base": base.writes[embed_hook()], "source": source.writes[embed_hook()][:, start:]}
    return EdgeCase(sides, wiring, delta, entering, base.nodes | {FINAL: sides.final}, base.streams, budget)
