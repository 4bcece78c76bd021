"""AtP* (arXiv 2403.00745) for q and k: the attention softmax recomputed exactly, the gradient used from z on."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..forward import attend
from .sides import Case, gradients, site_hooks


def exact_softmax(case: Case) -> Tensor:
    """(z if a head's q or k were the source's - z) . gradient at z, for q and k."""
    assert case.window.packed is not None
    request, model, packed = case.request, case.model, case.window.packed
    base, at_z = {}, replace(request, site="z", by_position=True, units=tuple(range(model.cfg.n_heads)))
    kept: dict[tuple[str, int], Tensor] = {}

    def watch(x: Tensor, i: int) -> Tensor:
        base[i] = x if x.requires_grad else x.detach().requires_grad_()
        return base[i]

    hooks = site_hooks(at_z, watch)
    for i in request.layers:
        for name in "qkv":
            hooks[f"blocks.{i}.attn.hook_{name}"] = lambda x, at=(name, i): kept.__setitem__(at, x.detach())
    window = replace(case.window, request=at_z)
    grads = gradients(case.metric(window.run(resid=case.resid[0], hooks=hooks)), base)
    by_layer = []
    for i in request.layers:
        layer, z, g = packed.layers[i], base[i].detach(), grads[i]
        q, k, v = (kept[name, i] for name in "qkv")
        delta = case.delta[i]
        # The patching run's, exactly the base run's where the two agree.
        new = (q if request.site == "q" else k) + delta
        changed = (delta != 0).any(-1)  # [prompt, pos, head]
        if request.site == "q":
            term = ((attend(layer, new, k, v) - z) * g).sum(-1)  # [prompt, query, head]
        elif not request.by_position:
            term = ((attend(layer, q, new, v) - z) * g).sum(-1)
            changed = changed.any(1, keepdim=True)
        else:
            terms = []
            for pos in range(request.n_read):
                one = k.clone()
                one[:, pos] = new[:, pos]
                terms.append(((attend(layer, q, one, v) - z) * g).sum((1, 3)))
            term = torch.stack(terms, 1)
        # Computed again, z is the same up to rounding alone: without a change the effect is 0, not that.
        term = request.of_units(torch.where(changed, term, 0.0), 2).transpose(1, 2)
        by_layer.append(term if request.by_position else term.sum(-1))
    values = torch.stack(by_layer, 1)
    return values.to(torch.promote_types(values.dtype, torch.float32))
