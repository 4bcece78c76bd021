"""Attribution patching: estimates of activation patching from gradients, all cells at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..batching import Progress
from ..lens import ModelOrName
from ..metrics import Metric, logit_diff
from ..models import as_model
from ..pairs import as_pairs
from ..weights import read_weights, widened_norms
from . import hooked
from .activation import itemsize, rows_of_metric
from .atp_star import exact_softmax
from .cells import Indices, MetricLike, PairsLike, Request, check_finite, checked, memory_budget
from .effect import PatchingEffect
from .relp import relp_weights
from .second_order import cell_by_cell, jointly
from .sides import Activations, Case, both_sides, contract, frozen, gradients, numbers_per_prompt, products, site_hooks
from .sites import METHODS


def attribution_patching(
    model: ModelOrName,
    pairs: PairsLike,
    *,
    site: str = "resid_pre",
    metric: MetricLike = logit_diff,
    method: str = "gradient",
    direction: str = "denoising",
    layers: Indices | None = None,
    units: Indices | None = None,
    by_position: bool = False,
    steps: int = 5,
    path: str = "input",
    joint: bool = False,
    detach_norm: bool = True,
    linear_gelu: bool = True,
    half_gate: bool = True,
    max_memory: int | None = None,
    progress: Progress | None = None,
) -> PatchingEffect:
    """Estimates of `activation_patching` from gradients, with the same cells and the same result.

    With d = activation of the patching run - activation of the patched run, g the metric's gradient and H its
    Hessian with respect to the activation, in the patched run:

    - "gradient": g.d. One forward on each side and one backward, for all prompts and cells (P2, arXiv
      2507.02559; Nanda's attribution patching).
    - "integrated": the gradient averaged over `steps` points between the two runs, times d. `path` "input" moves
      the embeddings (as EAP-IG does: one backward per step for all layers); "layer" moves each layer's site
      on its own, so that for resid_pre each layer's effects sum to metric(clean) - metric(corrupted).
    - "second_order": g.d + d^T H d / 2, d being the cell's own change, with |d^T H d| / (2 |g.d|) as reliability
      (arXiv 2606.09899). One Hessian-vector product per cell, cells in batches. `joint`: one per layer in place
      of it, with d the change of all its cells: far cheaper, but the cells' cross terms are shared between them.
    - "atp_star", for q and k: the attention softmax recomputed exactly, a gradient from z on (AtP*, 2403.00745).
    - "relp": gradients with the norms' denominators detached (`detach_norm`), GELU(x) or SiLU(x) taken as x times a
      constant (`linear_gelu`), and in gated MLPs the product's gradient halved, so that gate and linear part share
      it (`half_gate`) (RelP, 2508.21258). With all of them off it is "gradient".

    All are exact where the path from the site to the metric is linear: on LN-free models with `logit_diff`, in the
    last layer, for resid_post and mlp_out; without MLPs also for attn_out, resid_mid and z. (A norm after attention
    or after the MLP, as Gemma 2 has, bends the path from z and neurons.) Elsewhere they are
    not, whatever the norm: attention's softmax (and its product with the values) and GELU remain.

    Args:
        pairs: PromptPairs, or (clean, corrupted, answers).
        steps: points of "integrated" (midpoints of equal parts).
        by_position, layers, units, direction, metric, max_memory, progress: as for `activation_patching`.

    Raises:
        ValueError: as for `activation_patching`; an unknown method or path; "atp_star" of another site than q, k;
            "atp_star" or "relp" of a model that `read_weights` does not read.

    Example:
        >>> from lnfree_interp import load_model
        >>> from lnfree_interp.pairs import induction_pairs
        >>> model = load_model("tiny-noLN")
        >>> effect = attribution_patching(model, induction_pairs(model, 2, length=8), method="second_order")
        >>> effect.values.shape, effect.reliability.shape
        (torch.Size([2, 4, 8]), torch.Size([2, 4, 8]))
    """
    model, pairs = as_model(model), as_pairs(pairs).to("cpu")
    request = checked(model, pairs, site, metric, direction, layers, units, by_position)
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; known are {', '.join(METHODS)}")
    if path not in ("input", "layer"):
        raise ValueError(f"unknown path {path!r}; known are input, layer")
    if steps < 1:
        raise ValueError(f"steps is {steps}, it must be positive")
    if method == "atp_star" and site not in ("q", "k"):
        raise ValueError(f"method 'atp_star' is for sites q and k, not {site!r}: elsewhere it is 'gradient'")
    weights = read_weights(model)
    if method in ("atp_star", "relp") and weights is None:
        raise ValueError(f"method {method!r} needs a model that read_weights reads, and this one it does not")
    budget = memory_budget(model, max_memory)
    pairs = pairs.to(model.cfg.device)
    if weights is None:
        hooked.check_model(model, pairs.clean)
    else:
        # As stored, in fp32 at least: in half precision the difference between the runs would be mostly rounding.
        weights = widened_norms(weights)
    if method == "relp" and weights is not None:
        weights = relp_weights(weights, detach_norm=detach_norm, linear_gelu=linear_gelu, half_gate=half_gate)
    n_together = len(pairs)
    if isinstance(metric, Metric):
        n_together = max(1, budget // (numbers_per_prompt(model, request) * itemsize(model, weights)))
    parts = []
    with frozen(model), torch.enable_grad():
        for i in range(0, len(pairs), n_together):
            here = slice(i, i + n_together)
            part = rows_of_metric(request, here, model.cfg.device)
            one_backward = method in ("gradient", "relp")
            cut = one_backward or method == "integrated"
            case = both_sides(model, part, pairs[here], weights, graph=one_backward, cut=cut)
            check_finite(request, torch.stack([case.at_base, case.at_source], 1), first=i)
            estimate: tuple[Tensor, Tensor | None]
            if one_backward:
                estimate = _of_cells(case, case.gradients()), None
            elif method == "integrated":
                estimate = _of_cells(case, integrated_gradients(case, steps, path)), None
            elif method == "atp_star":
                estimate = exact_softmax(case), None
            else:
                estimate = (jointly if joint else cell_by_cell)(case, budget)
            parts.append((*estimate, case.at_source, case.at_base))
            if progress is not None:
                progress(min(len(pairs), i + n_together), len(pairs))
    values, reliability, at_source, at_base = zip(*parts)
    check_finite(request, torch.cat(values), f"{method} estimate of")
    clean, corrupted = (at_source, at_base) if direction == "denoising" else (at_base, at_source)
    return PatchingEffect(
        values=_placed(values, request),
        site=site,
        method=method,
        direction=direction,
        metric=request.metric_name,
        axes=request.axes,
        layers=request.layers,
        units=request.units,
        clean=torch.cat(clean),
        corrupted=torch.cat(corrupted),
        reliability=None if reliability[0] is None else _placed(reliability, request),
        cells_run=torch.Size(request.shape(len(pairs))).numel(),
    )


def _of_cells(case: Case, grads: Activations) -> Tensor:
    """d times a gradient, one number per cell, 0 at the positions before the window."""
    values = contract(case.request, products(case.delta, grads))
    return torch.nn.functional.pad(values, (case.window.first, 0)) if "pos" in case.request.axes else values


def _placed(parts: Sequence[Tensor], request: Request) -> Tensor:
    """Values of all prompts, with 0 at the positions beyond the last one read."""
    values = torch.cat(list(parts)).detach()
    if "pos" in request.axes and values.shape[-1] < request.n_pos:
        values = torch.nn.functional.pad(values, (0, request.n_pos - values.shape[-1]))
    return values


def integrated_gradients(case: Case, steps: int, path: str) -> Activations:
    """The gradient averaged over the midpoints of `steps` equal parts of the path from base to source."""
    request = case.request
    total = {i: torch.zeros_like(x) for i, x in case.base.items()}

    def add(resid: Tensor, start: int, hooks: dict[str, Callable], nodes: Activations) -> None:
        value = case.metric(case.window.run(resid=resid, start_layer=start, hooks=hooks))
        for i, g in gradients(value, nodes).items():
            total[i] += g / steps

    for step in range(steps):
        share = (step + 0.5) / steps
        if path == "input":
            nodes: Activations = {}

            def watch(x: Tensor, i: int, nodes=nodes) -> Tensor:
                nodes[i] = x if x.requires_grad else x.detach().requires_grad_()
                return nodes[i]

            add(torch.lerp(case.resid[0], case.resid[-1], share), 0, site_hooks(request, watch), nodes)
        else:
            for i in request.layers:
                node = (case.base[i] + share * case.delta[i]).requires_grad_()
                hook = {request.row.name(i): lambda x, node=node: node}
                add(case.resid[i], i, hook, {i: node})
    return total
