"""What the analyses use of a model. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable


@runtime_checkable
class LensModel(Protocol):
    """A HookedTransformer of TransformerLens, or anything with these parts.

    Attributes:
        cfg: shapes and kinds: n_layers, d_model, n_heads, n_ctx, d_vocab, normalization_type, dtype, device, ...
        tokenizer: Hugging Face's, or None.
        hook_dict: hook name -> hook point.
    """

    cfg: Any
    tokenizer: Any
    hook_dict: dict[str, Any]

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


ModelOrName = LensModel | str | Path
"""A model, or what `load_model` takes: a name, a hub id, a directory."""
