"""What the analyses use of a model, and the one place that knows which TransformerLens is installed.

TransformerLens 3.9 has HookedTransformer, and a TransformerBridge beside it; from 4 on there is the Bridge alone.
Imports nothing heavy.
"""

from __future__ import annotations

import importlib.metadata
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor


@runtime_checkable
class LensModel(Protocol):
    """A HookedTransformer or TransformerBridge of TransformerLens, or anything with these parts.

    Attributes:
        cfg: shapes and kinds: n_layers, d_model, n_heads, n_ctx, d_vocab, normalization_type, dtype, device, ...
        tokenizer: Hugging Face's, or None.
        hook_dict: hook name -> hook point.
    """

    cfg: Any
    tokenizer: Any

    @property
    def hook_dict(self) -> Any: ...

    if TYPE_CHECKING:  # isinstance looks at the above alone: it does not see the children of a Module
        training: bool
        embed: Any
        pos_embed: Any
        hook_pos_embed: Any
        blocks: Any
        ln_final: Any
        unembed: Any

        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
        def to_tokens(self, *args: Any, **kwargs: Any) -> Any: ...
        def run_with_hooks(self, *args: Any, **kwargs: Any) -> Any: ...
        def run_with_cache(self, *args: Any, **kwargs: Any) -> Any: ...
        def parameters(self, *args: Any, **kwargs: Any) -> Any: ...
        def modules(self) -> Any: ...
        def named_modules(self) -> Any: ...
        def named_parameters(self) -> Any: ...


ModelOrName = LensModel | str | Path
"""A model, or what `load_model` takes: a name, a hub id, a directory."""


def has_hooked_transformer() -> bool:
    """Whether the TransformerLens that is installed has HookedTransformer: before version 4."""
    return int(importlib.metadata.version("transformer_lens").split(".")[0]) < 4


def is_bridge(model: object) -> bool:
    """Whether a model is a TransformerBridge: TransformerLens' hooks around a module that is another's."""
    return any(kind.__name__ == "TransformerBridge" for kind in type(model).__mro__)


def build(fields: Mapping[str, Any], tokenizer: Any = None) -> Any:
    """A model of a shape, its weights uninitialised, of the kind that the installed TransformerLens has.

    Args:
        fields: HookedTransformerConfig's.

    Raises:
        ValueError: fields that only a HookedTransformer serves, with a TransformerLens that has none.
    """
    if not has_hooked_transformer():
        from .bridge_building import build_bridge

        return build_bridge(fields, tokenizer)
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    cfg = HookedTransformerConfig(**{"init_weights": False, "seed": None} | dict(fields))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "HookedTransformer is deprecated", DeprecationWarning)
        return HookedTransformer(cfg, tokenizer=tokenizer)


def parameters(model: LensModel) -> dict[str, Tensor]:
    """HookedTransformer's names -> the tensors or views of a model that `build` made, to be filled in place."""
    if not is_bridge(model):
        return dict(model.named_parameters())
    from .bridge_building import bridge_parameters

    return bridge_parameters(model)


def fill(model: LensModel, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Give a model that `build` made its weights, one at a time, by HookedTransformer's names.

    Raises:
        ValueError: a weight that the model does not have and that is not zero, or one of the model's that is not given.
    """
    missing, scale = parameters(model), 1.0
    if is_bridge(model) and not model.cfg.use_attn_scale:  # a Bridge divides its scores by it whatever it is told
        scale = model.cfg.d_head**0.5
    for name, value in weights:
        here = missing.pop(name, None)
        if here is not None:
            here.data.copy_(value * scale if name.endswith((".W_Q", ".b_Q")) else value)
        elif bool(value.any()):
            raise ValueError(f"the model has no {name}, which is not zero")
    if missing:
        raise ValueError(f"weights never given: {', '.join(sorted(missing))}")
