"""Direct logit attribution, the true direct effect, and the error of the one against the other."""

from .attribution import LogitAttribution, direct_effect, direct_logit_attribution, logit_attributions
from .error import HEADS, AttributionError, attribution_error

__all__ = [
    "HEADS",
    "AttributionError",
    "LogitAttribution",
    "attribution_error",
    "direct_effect",
    "direct_logit_attribution",
    "logit_attributions",
]
