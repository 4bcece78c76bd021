from .attribution import (
    LogitAttribution as LogitAttribution,
    direct_effect as direct_effect,
    direct_logit_attribution as direct_logit_attribution,
    logit_attributions as logit_attributions,
)
from .composition import composition_scores as composition_scores, virtual_weights as virtual_weights
from .error import HEADS as HEADS, AttributionError as AttributionError, attribution_error as attribution_error
from .scores import ScoreAttribution as ScoreAttribution, attention_score_attribution as attention_score_attribution
