"""AtP* (arXiv 2403.00745) for q and k: the attention softmax recomputed exactly, the gradient used from z on."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .sides import Case, gradients, site_hooks


def exact_softmax(case: Case) -> Tensor:
    """(z if a head's q or k were the source's - z) . gradient at z, for q and k.

    Of a key that several heads read, the sum over them.
    """
    request, model, weights = case.request, case.model, case.window.weights
    assert weights is not None
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
    everywhere = slice(request.n_read)
    by_layer = []
    for i in request.layers:
        layer, z, g = weights.layers[i], base[i].detach(), grads[i]
        q, k, v = (kept[name, i] for name in "qkv")
        delta = case.delta[i]
        # The patching run's, exactly the base run's where the two agree.
        new = (q if request.site == "q" else k) + delta
        changed = (delta != 0).any(-1)  # [prompt, pos, head]
        q, k = layer.place_q(q, everywhere), layer.place_k(k, everywhere)
        new = (layer.place_q if request.site == "q" else layer.place_k)(new, everywhere)

        def term_of(q: Tensor, k: Tensor, layer=layer, v=v, z=z, g=g) -> Tensor:  # [prompt, query, head]
            terms = ((layer.attend(q, k, v) - z) * g).sum(-1)
            return terms if request.site == "q" else terms.unflatten(-1, (len(layer.b_K), -1)).sum(-1)

        if request.site == "q":
            term = term_of(new, k)
        elif not request.by_position:
            term = term_of(q, new)
            changed = changed.any(1, keepdim=True)
        else:
            terms = []
            for pos in range(request.n_read):
                one = k.clone()
                one[:, pos] = new[:, pos]
                terms.append(term_of(q, one).sum(1))
            term = torch.stack(terms, 1)
        # Computed again, z is the same up to rounding alone: without a change the effect is 0, not that.
        term = request.of_units(torch.where(changed, term, 0.0), 2).transpose(1, 2)
        by_layer.append(term if request.by_position else term.sum(-1))
    values = torch.stack(by_layer, 1)
    return values.to(torch.promote_types(values.dtype, torch.float32))
