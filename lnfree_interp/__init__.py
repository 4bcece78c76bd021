"""GPT-2 without LayerNorm: removal by fine-tuning, and the analyses that become exact once it is gone.

The public names load on first use, so that training needs neither TransformerLens nor plotly.
"""

from importlib import import_module
from typing import TYPE_CHECKING

_PUBLIC = {
    "models": ["available_models", "load_model"],
    "data": ["read_documents", "token_blocks"],
    "metrics": ["Metric", "cross_entropy", "entropy", "js_divergence", "kl_divergence", "logit_diff"],
    "dla": [
        "AttributionError",
        "LogitAttribution",
        "attribution_error",
        "direct_effect",
        "direct_logit_attribution",
        "logit_attributions",
    ],
    "pairs": ["PromptPairs", "induction_pairs", "ioi_pairs"],
    "patching": ["PatchingEffect", "PatchingError", "activation_patching", "attribution_patching", "patching_error"],
    "neurons": ["NeuronAblation", "ablate_cumulatively", "ablate_neurons", "rank_confidence_neurons"],
    "norms": ["AttentionSinks", "ResidualNorms", "attention_sinks", "residual_norms"],
    "evaluate": [
        "HellaSwag",
        "LossEvaluation",
        "ModelComparison",
        "compare_models",
        "evaluate_loss",
        "generate_samples",
        "hellaswag",
        "hellaswag_items",
        "loss_table",
    ],
    "schedule": ["RemovalSchedule"],
    "finetune": ["remove_layernorm"],
}
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names}
__all__ = sorted(_MODULE_OF)

if TYPE_CHECKING:
    from .data import read_documents, token_blocks
    from .dla import (
        AttributionError,
        LogitAttribution,
        attribution_error,
        direct_effect,
        direct_logit_attribution,
        logit_attributions,
    )
    from .evaluate import (
        HellaSwag,
        LossEvaluation,
        ModelComparison,
        compare_models,
        evaluate_loss,
        generate_samples,
        hellaswag,
        hellaswag_items,
        loss_table,
    )
    from .finetune import remove_layernorm
    from .metrics import Metric, cross_entropy, entropy, js_divergence, kl_divergence, logit_diff
    from .models import available_models, load_model
    from .neurons import NeuronAblation, ablate_cumulatively, ablate_neurons, rank_confidence_neurons
    from .norms import AttentionSinks, ResidualNorms, attention_sinks, residual_norms
    from .pairs import PromptPairs, induction_pairs, ioi_pairs
    from .patching import PatchingEffect, PatchingError, activation_patching, attribution_patching, patching_error
    from .schedule import RemovalSchedule


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
