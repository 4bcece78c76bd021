from .activation import activation_patching as activation_patching
from .attribution import attribution_patching as attribution_patching
from .edges import (
    EdgeEffect as EdgeEffect,
    edge_attribution as edge_attribution,
    edge_patching as edge_patching,
    screen_edges as screen_edges,
)
from .effect import (
    PatchingEffect as PatchingEffect,
    PatchingError as PatchingError,
    moved as moved,
    normalized as normalized,
    patching_error as patching_error,
    solved as solved,
    total_effect as total_effect,
)
from .estimates import (
    AtPStar as AtPStar,
    Estimate as Estimate,
    Gradient as Gradient,
    Integrated as Integrated,
    RelP as RelP,
    SecondOrder as SecondOrder,
)
from .plans import ErrorLeft as ErrorLeft
from .screen import FLAGS as FLAGS, Screening as Screening, screen as screen
from .sites import DIRECTIONS as DIRECTIONS, METHODS as METHODS, SITES as SITES
