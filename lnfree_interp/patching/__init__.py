"""Activation patching, exact and fast, and its gradient approximations, with one type of result."""

from ..metrics import Metric, logit_diff
from ..pairs import PromptPairs
from .activation import activation_patching
from .effect import (
    DIRECTIONS,
    METHODS,
    SITES,
    PatchingEffect,
    PatchingError,
    moved,
    normalized,
    patching_error,
    solved,
    total_effect,
)
from .gradients import attribution_patching

__all__ = [
    "DIRECTIONS",
    "METHODS",
    "SITES",
    "Metric",
    "PatchingEffect",
    "PatchingError",
    "PromptPairs",
    "activation_patching",
    "attribution_patching",
    "logit_diff",
    "moved",
    "normalized",
    "patching_error",
    "solved",
    "total_effect",
]
