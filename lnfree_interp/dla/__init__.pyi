from .attribution import (
    attribution_to as attribution_to,
    attributions_to as attributions_to,
    direct_effect as direct_effect,
    direct_logit_attribution as direct_logit_attribution,
    effect_on as effect_on,
    logit_attributions as logit_attributions,
)
from .composition import composition_scores as composition_scores, virtual_weights as virtual_weights
from .error import HEADS as HEADS, AttributionError as AttributionError, attribution_error as attribution_error
from .readers import Reader as Reader
from .readout import LogitLens as LogitLens, logit_lens as logit_lens
from .result import LogitAttribution as LogitAttribution, ReaderAttribution as ReaderAttribution
from .scores import ScoreAttribution as ScoreAttribution, attention_score_attribution as attention_score_attribution
