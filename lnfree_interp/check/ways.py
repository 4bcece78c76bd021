"""How each analysis is computed for a model: what is fast, what is slow and why."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping

import torch

from .. import forward
from ..neurons.ablate import why_no_closed_form
from ..patching import activation_patching
from ..weights import why_not_read
from .case import Case
from .result import Way


def ways(case: Case) -> Iterator[Way]:
    model, cfg = case.model, case.model.cfg
    why = why_not_read(model)
    own = "a forward of its own" if why is None else "TransformerLens' own forward, every activation under a hook"
    yield Way("forward, attribution, norms, loss", own, _speed(case) if why is None else "", why or "")
    how = "of each cell only what it changes" if why is None else "the layers after each cell, whole prompts"
    yield Way("activation patching", how, _spared(case) if why is None else "", why or "")
    yield Way("gradient, integrated, second order", own, "", why or "")
    yield Way("atp_star, relp", "a forward of its own" if why is None else "refused", "", why or "")
    yield Way("samples, HellaSwag", "keys and values kept" if why is None else "whole prompts again", "", why or "")
    if not getattr(cfg, "attn_only", False):
        rerun = why_no_closed_form(model, cfg.n_layers - 1)
        how = "what comes after it again for each neuron" if rerun else "in closed form, nothing run again"
        yield Way("the last layer's neurons", how, "", rerun or "")


def _spared(case: Case) -> str:
    try:
        effect = activation_patching(case.model, case.pairs)
    except ValueError:  # a metric that is not finite, say: the laws have said so
        return ""
    spent, plain = effect.flops or (1.0, 1.0)
    return f"{plain / spent:.1f} times fewer operations on these prompts"


@torch.no_grad()
def _speed(case: Case) -> str:
    """The model's own forward against ours, both with all logits: medians of interleaved runs."""
    ways: Mapping[str, Callable[[], object]] = {
        "own": lambda: case.model(case.tokens),
        "ours": lambda: forward.unembed(case.model, forward.run(case.model, case.tokens)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(3):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if case.tokens.is_cuda:
                torch.cuda.synchronize(case.tokens.device)
            seconds[name].append(time.perf_counter() - began)
    own, ours = (sorted(times)[1] for times in seconds.values())
    return f"{own / ours:.2g} times as fast as the model's own ({1000 * ours:.3g} ms)"
