__version__: str

from .check import Law as Law, ModelCheck as ModelCheck, check_model as check_model
from .comparison import Comparison as Comparison, compare as compare
from .corpus import read_corpus as read_corpus
from .data import token_blocks as token_blocks
from .dla import (
    AttributionError as AttributionError,
    LogitAttribution as LogitAttribution,
    LogitLens as LogitLens,
    Reader as Reader,
    ReaderAttribution as ReaderAttribution,
    ScoreAttribution as ScoreAttribution,
    attention_score_attribution as attention_score_attribution,
    attribution_error as attribution_error,
    attribution_to as attribution_to,
    attributions_to as attributions_to,
    composition_scores as composition_scores,
    direct_effect as direct_effect,
    direct_logit_attribution as direct_logit_attribution,
    effect_on as effect_on,
    logit_attributions as logit_attributions,
    logit_lens as logit_lens,
    virtual_weights as virtual_weights,
)
from .documents import documents_of as documents_of, read_documents as read_documents
from .evaluate import (
    HellaSwag as HellaSwag,
    LossEvaluation as LossEvaluation,
    LossTable as LossTable,
    ModelComparison as ModelComparison,
    Samples as Samples,
    TokenLosses as TokenLosses,
    compare_models as compare_models,
    evaluate_loss as evaluate_loss,
    generate_samples as generate_samples,
    hellaswag as hellaswag,
    hellaswag_items as hellaswag_items,
    loss_table as loss_table,
    token_losses as token_losses,
)
from .explaining import Explanation as Explanation, explain as explain
from .finetune import remove_layernorm as remove_layernorm
from .graph import AttributionGraph as AttributionGraph, GraphNode as GraphNode, attribution_graph as attribution_graph
from .metrics import (
    Metric as Metric,
    cross_entropy as cross_entropy,
    entropy as entropy,
    js_divergence as js_divergence,
    kl_divergence as kl_divergence,
    logit_diff as logit_diff,
)
from .models import load_model as load_model
from .names import available_models as available_models
from .neurons import (
    NeuronAblation as NeuronAblation,
    ablate_cumulatively as ablate_cumulatively,
    ablate_neurons as ablate_neurons,
    rank_confidence_neurons as rank_confidence_neurons,
)
from .norms import (
    AttentionPatterns as AttentionPatterns,
    AttentionSinks as AttentionSinks,
    ResidualNorms as ResidualNorms,
    attention_patterns as attention_patterns,
    attention_sinks as attention_sinks,
    residual_norms as residual_norms,
)
from .pairs import PromptPairs as PromptPairs, induction_pairs as induction_pairs, ioi_pairs as ioi_pairs
from .patching import (
    AtPStar as AtPStar,
    EdgeEffect as EdgeEffect,
    Gradient as Gradient,
    Integrated as Integrated,
    PatchingEffect as PatchingEffect,
    PatchingError as PatchingError,
    RelP as RelP,
    Screening as Screening,
    SecondOrder as SecondOrder,
    activation_patching as activation_patching,
    attribution_patching as attribution_patching,
    edge_attribution as edge_attribution,
    edge_patching as edge_patching,
    patching_error as patching_error,
    screen as screen,
    screen_edges as screen_edges,
)
from .probe import (
    Codebook as Codebook,
    ConceptEvidence as ConceptEvidence,
    ConceptSwap as ConceptSwap,
    HyperProbe as HyperProbe,
    ProbeData as ProbeData,
    ProbeEvaluation as ProbeEvaluation,
    ProbePrompt as ProbePrompt,
    ProbeReading as ProbeReading,
    analogy_data as analogy_data,
    concept_evidence as concept_evidence,
    evaluate_probe as evaluate_probe,
    fit_probe as fit_probe,
    recall_data as recall_data,
    swap_concepts as swap_concepts,
)
from .schedule import RemovalSchedule as RemovalSchedule
from .weights import read_weights as read_weights, why_not_read as why_not_read
