"""What every estimate of patching has: a name, its needs, and effects that it computes from the two runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import ClassVar

from torch import Tensor

from ...arguments import switch
from ...weights import Weights
from ..sides import Case
from ..sites import SITES


@dataclass(frozen=True)
class Estimate(ABC):
    """An estimate of activation patching from gradients; its fields are its options.

    With d = activation of the patching run - activation of the patched run, g the metric's gradient and H its Hessian
    with respect to the activation, in the patched run, all of them are exact where the path from the site to the metric
    is linear: on LN-free models with `logit_diff`, in the last layer, for resid_post and mlp_out; without MLPs also for
    attn_out, resid_mid and z. (A norm after attention or after the MLP, as Gemma 2 has, bends the path from z and
    neurons.) Elsewhere they are not, whatever the norm: attention's softmax (and its product with the values) and GELU
    remain.

    Class attributes:
        name: what it is called in results and on the command line.
        sites: those it is for.
        needs_weights: whether it needs a model that `read_weights` reads.
        graph: whether it uses the patched run's graph from the site to the metric, not runs of its own.
        cut: whether it does without the positions before the first at which the prompts differ.
    """

    name: ClassVar[str]
    sites: ClassVar[tuple[str, ...]] = tuple(SITES)
    needs_weights: ClassVar[bool] = False
    graph: ClassVar[bool] = False
    cut: ClassVar[bool] = False

    def rules(self, weights: Weights) -> Weights:
        """The weights that the runs go through, given the model's."""
        return weights

    @abstractmethod
    def effects(self, case: Case, budget: int) -> tuple[Tensor, Tensor | None]:
        """Effects [prompt, layer, unit(, pos)] up to the last position read; and their reliability, where it tells.

        Args:
            budget: bytes to stay within, roughly.
        """

    def check_switches(self) -> None:
        """Raise ValueError unless every field is True or False."""
        for field in fields(self):
            switch(getattr(self, field.name), field.name)
