"""Attribution patching proper: the gradient times the change."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..sides import Case, first_order
from .estimate import Estimate


@dataclass(frozen=True)
class Gradient(Estimate):
    """g.d: one forward on each side and one backward, for all prompts and cells.

    Nanda's attribution patching, as in P2 (arXiv 2507.02559).

    Example:
        >>> from lnfree_interp import attribution_patching, induction_pairs, load_model
        >>> model = load_model("tiny-noLN")
        >>> attribution_patching(model, induction_pairs(model, 2, length=8), method=Gradient()).method
        'gradient'
    """

    name = "gradient"
    graph = True
    cut = True

    def effects(self, case: Case, budget: int) -> tuple[Tensor, Tensor | None]:
        return first_order(case, case.gradients()), None
