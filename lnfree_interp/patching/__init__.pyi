from .activation import activation_patching as activation_patching
from .effect import (
    PatchingEffect as PatchingEffect,
    PatchingError as PatchingError,
    normalized as normalized,
    patching_error as patching_error,
    total_effect as total_effect,
)
from .gradients import attribution_patching as attribution_patching
from .sites import DIRECTIONS as DIRECTIONS, METHODS as METHODS, SITES as SITES
