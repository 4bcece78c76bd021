"""AtP* for queries and keys: the attention softmax recomputed exactly, the gradient used from z on."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...layers import wide
from ..cells import Request
from ..sides import Activations, Case, gradients, site_hooks
from ..sites import SITES
from .estimate import Estimate


@dataclass(frozen=True)
class AtPStar(Estimate):
    """(z if a head's q or k were the source's - z) . gradient at z, for q and k (AtP*, arXiv 2403.00745).

    Of a key that several heads read, the sum over them.

    Example:
        >>> from lnfree_interp import attribution_patching, induction_pairs, load_model
        >>> model = load_model("tiny-noLN")
        >>> effect = attribution_patching(model, induction_pairs(model, 2, length=8), site="q", method=AtPStar())
        >>> effect.values.shape, effect.axes
        (torch.Size([2, 8, 4]), ('prompt', 'layer', 'head'))
    """

    name = "atp_star"
    sites = tuple(name for name, site in SITES.items() if site.scores)
    needs_weights = True

    def effects(self, case: Case, budget: int) -> tuple[Tensor, Tensor | None]:
        z, grads, kept = _at_z(case)
        by_layer = [_of_layer(case, i, z[i], grads[i], kept[i]) for i in case.request.layers]
        return wide(torch.stack(by_layer, 1)), None


def _at_z(case: Case) -> tuple[Activations, Activations, dict[int, dict[str, Tensor]]]:
    """z of the base run, the metric's gradient there, and by layer q, k and v as their products make them."""
    request, z = case.request, {}
    at_z = replace(request, site="z", by_position=True, units=tuple(range(case.model.cfg.n_heads)))
    kept: dict[int, dict[str, Tensor]] = {i: {} for i in request.layers}

    def watch(x: Tensor, i: int) -> Tensor:
        z[i] = x if x.requires_grad else x.detach().requires_grad_()
        return z[i]

    hooks = site_hooks(at_z, watch)
    for i in request.layers:
        for name in "qkv":
            hooks[SITES[name].name(i)] = lambda x, i=i, name=name: kept[i].__setitem__(name, x.detach())
    final = replace(case.window, request=at_z).run(resid=case.resid[0], hooks=hooks)
    grads = gradients(case.metric(final), z)
    return {i: x.detach() for i, x in z.items()}, grads, kept


def _of_layer(case: Case, i: int, z: Tensor, g: Tensor, kept: dict[str, Tensor]) -> Tensor:
    """Effects [prompt, unit(, pos)] of a layer."""
    request, weights, delta = case.request, case.window.weights, case.delta[i]
    assert weights is not None
    layer, everywhere = weights.layers[i], slice(request.n_read)
    place = {"q": layer.place_q, "k": layer.place_k}
    base = {name: place[name](kept[name], everywhere) for name in place}
    # The patching run's, exactly the base run's where the two agree.
    source = place[request.site](kept[request.site] + delta, everywhere)

    def term(patched: Tensor) -> Tensor:  # [prompt, query, unit]
        now = base | {request.site: patched}
        terms = ((layer.attend(now["q"], now["k"], kept["v"]) - z) * g).sum(-1)
        return terms.unflatten(-1, (len(layer.b_K), -1)).sum(-1) if request.row.of_keys else terms

    changed = (delta != 0).any(-1)  # [prompt, pos, unit]
    if not request.row.spreads:
        values = term(source)
    elif not request.by_position:
        values, changed = term(source), changed.any(1, keepdim=True)
    else:
        values = torch.stack([term(_with(base, source, request, pos)).sum(1) for pos in range(request.n_read)], 1)
    # Computed again, z is the same up to rounding alone: without a change the effect is 0, not that.
    values = request.of_units(torch.where(changed, values, 0.0), 2).transpose(1, 2)
    return values if request.by_position else values.sum(-1)


def _with(base: dict[str, Tensor], source: Tensor, request: Request, pos: int) -> Tensor:
    """The base run's activation, with one position's of the source run."""
    x = base[request.site].clone()
    x[:, pos] = source[:, pos]
    return x
