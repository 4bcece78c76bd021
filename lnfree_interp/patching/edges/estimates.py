"""What each estimate makes of edges."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ...weights import Layer
from ..estimates import AtPStar, Estimate, Gradient, Integrated, RelP, SecondOrder
from ..sides import explicit_attention, gradients
from .streams import FINAL, Watched, attention_hook, brought_back
from .terms import EdgeCase, blocks, contracted, first_order, gradients_at, pieces
from .wiring import ATTENTION

Found = tuple[Tensor, "Tensor | None"]
"""Effects [prompt, sender, receiver], and their reliability where an estimate tells."""


def of_gradient(case: EdgeCase, estimate: Estimate) -> Found:
    return first_order(case, gradients(case.sides.value, case.nodes)), None


def of_integrated(case: EdgeCase, estimate: Integrated) -> Found:
    total: Tensor | None = None
    for step in range(estimate.steps):
        resid = torch.lerp(case.entering["base"], case.entering["source"], (step + 0.5) / estimate.steps)
        there, value = run_from(case, resid)
        terms = first_order(there, gradients(value, there.nodes)) / estimate.steps
        total = terms if total is None else total + terms
    assert total is not None
    return total, None


def run_from(case: EdgeCase, resid: Tensor, hooks: dict[str, Callable] | None = None) -> tuple[EdgeCase, Tensor]:
    """The case with receivers watched in a run from what enters the first block, and its metric."""
    window = case.sides.window
    watched = Watched({}, {}, {})
    seen = watched.hooks(case.wiring, window.weights)
    final = window.run(resid=resid, hooks=(hooks or {}) | dict(seen))
    return replace(case, nodes=watched.nodes | {FINAL: final}, streams=watched.streams), case.sides.metric(final)


EFFECTS: dict[type[Estimate], Callable[[EdgeCase, Any], Found]] = {
    Gradient: of_gradient,
    RelP: of_gradient,
    Integrated: of_integrated,
}
