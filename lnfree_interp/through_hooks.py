"""The contract of `forward.run` through TransformerLens' own forward: for models and hooks that nothing else serves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .lens import LensModel

Hook = Callable[[Tensor], "Tensor | None"]
"""Reads an activation; what it returns, if not None, takes the activation's place."""


def run(
    model: LensModel, tokens, resid, start_layer: int, hooks: Mapping[str, Hook], positions
) -> Float[Tensor, "batch kept_pos d_model"]:
    """What `forward.run` returns, its arguments checked: all positions are computed, then the chosen ones kept."""
    final: list[Tensor] = []

    def keep(x: Tensor) -> None:
        final.append(x)

    last = f"blocks.{model.cfg.n_layers - 1}."
    n_pos = (tokens if resid is None else resid).shape[1]
    chosen: Any = None if positions is None else torch.arange(n_pos, device=model.cfg.device)[positions]
    # The last block's per-query activations are seen by hooks at the chosen positions only, as on the fast path.
    per_query = ("hook_q", "hook_rot_q", "hook_z", "hook_attn_out", "hook_resid_mid", "hook_mlp_out")
    of_neurons = ("mlp.hook_pre", "mlp.hook_pre_linear", "mlp.hook_post")

    def adapt(name: str, hook: Hook):
        narrow = (
            chosen is not None and name.startswith(last) and name.endswith((*per_query, *of_neurons, "hook_resid_post"))
        )
        pattern = chosen is not None and name.startswith(last) and name.endswith("hook_pattern")

        def call(x: Tensor, hook=hook, **_: Any):
            if pattern:
                new = hook(x[:, :, chosen])
                return None if new is None else x.index_copy(2, chosen, new)
            if not narrow:
                return hook(x)
            new = hook(x[:, chosen])
            return None if new is None else x.index_copy(1, chosen, new)

        return name, lambda x, hook: call(x)

    fwd_hooks = [adapt(name, hook) for name, hook in hooks.items()]
    fwd_hooks.append((last + "hook_resid_post", lambda x, hook: keep(x)))
    extra: dict[str, Any] = {}
    if resid is not None:
        # Hooks of the model's own come first; what they make of the stream that is given is put right after them.
        fwd_hooks.insert(0, (f"blocks.{start_layer}.hook_resid_pre", lambda x, hook: resid))
        extra = {"start_at_layer": start_layer}
        if model.cfg.positional_embedding_type == "shortformer":  # every layer adds them to its queries and keys
            like = torch.zeros(resid.shape[:2], dtype=torch.long, device=resid.device)
            extra["shortformer_pos_embed"] = model.hook_pos_embed(model.pos_embed(like))
    model.run_with_hooks(tokens if resid is None else resid, return_type=None, fwd_hooks=fwd_hooks, **extra)
    return final[0] if chosen is None else final[0][:, chosen]
