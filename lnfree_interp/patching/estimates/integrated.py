"""Integrated gradients: the gradient averaged along the way from one run to the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...arguments import choice, whole
from ..sides import Activations, Case, first_order, gradients, site_hooks
from .estimate import Estimate

PATHS = ("input", "layer")


@dataclass(frozen=True)
class Integrated(Estimate):
    """The gradient averaged over points between the two runs, times d.

    Integrated gradients (arXiv 1703.01365); along the input as EAP-IG does it (arXiv 2403.17806).

    Args:
        steps: how many points: the midpoints of equal parts.
        path: "input" moves the embeddings: one backward per step for all layers. "layer" moves each layer's site on
            its own, so that for resid_pre each layer's effects sum to metric(clean) - metric(corrupted).

    Raises:
        ValueError: fewer than one step, another path.

    Example:
        >>> from lnfree_interp import attribution_patching, induction_pairs, load_model
        >>> model = load_model("tiny-noLN")
        >>> attribution_patching(model, induction_pairs(model, 2, length=8), method=Integrated(steps=2)).values.shape
        torch.Size([2, 8, 8])
    """

    steps: int = 5
    path: str = "input"
    name = "integrated"
    cut = True

    def __post_init__(self):
        whole(self.steps, "steps", least=1)
        choice(self.path, "path", PATHS)

    def effects(self, case: Case, budget: int) -> tuple[Tensor, Tensor | None]:
        total = {i: torch.zeros_like(x) for i, x in case.base.items()}
        add = self._along_input if self.path == "input" else self._along_layers
        for step in range(self.steps):
            add(case, (step + 0.5) / self.steps, total)
        return first_order(case, total), None

    def _along_input(self, case: Case, share: float, total: Activations) -> None:
        nodes: Activations = {}

        def watch(x: Tensor, i: int) -> Tensor:
            nodes[i] = x if x.requires_grad else x.detach().requires_grad_()
            return nodes[i]

        resid = torch.lerp(case.resid[0], case.resid[-1], share)
        self._add(case, resid, 0, site_hooks(case.request, watch), nodes, total)

    def _along_layers(self, case: Case, share: float, total: Activations) -> None:
        for i in case.request.layers:
            node = (case.base[i] + share * case.delta[i]).requires_grad_()
            hook = {case.request.row.name(i): lambda x, node=node: node}
            self._add(case, case.resid[i], i, hook, {i: node}, total)

    def _add(
        self, case: Case, resid: Tensor, start: int, hooks: dict[str, Callable], nodes: Activations, total: Activations
    ) -> None:
        value = case.metric(case.window.run(resid=resid, start_layer=start, hooks=hooks))
        for i, g in gradients(value, nodes).items():
            total[i] += g / self.steps
