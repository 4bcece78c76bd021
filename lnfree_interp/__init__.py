"""GPT-2 without LayerNorm: removal by fine-tuning, and the analyses that become exact once it is gone.

The public names load on first use, so that training needs neither TransformerLens nor plotly.
"""

from importlib import import_module
from typing import TYPE_CHECKING

_PUBLIC = {
    "models": ["load_model", "available_models"],
    "data": ["read_documents", "token_blocks"],
    "metrics": ["cross_entropy", "entropy", "logit_diff"],
    "dla": ["LogitAttribution", "attribution_error", "direct_effect", "direct_logit_attribution"],
    "finetune": ["RemovalSchedule", "remove_layernorm"],
}
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names}
__all__ = sorted(_MODULE_OF)

if TYPE_CHECKING:
    from .data import read_documents, token_blocks
    from .dla import LogitAttribution, attribution_error, direct_effect, direct_logit_attribution
    from .finetune import RemovalSchedule, remove_layernorm
    from .metrics import cross_entropy, entropy, logit_diff
    from .models import available_models, load_model


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
