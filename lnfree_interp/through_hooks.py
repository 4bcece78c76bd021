"""The contract of `forward.run` through TransformerLens' own forward: for models and hooks that nothing else serves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .lens import LensModel, is_bridge

Hook = Callable[[Tensor], "Tensor | None"]
"""Reads an activation; what it returns, if not None, takes the activation's place."""


def run(
    model: LensModel,
    tokens,
    resid,
    start_layer: int,
    hooks: Mapping[str, Hook],
    positions,
    stop_at_layer: int | None = None,
) -> Float[Tensor, "batch kept_pos d_model"]:
    """What `forward.run` returns, its arguments checked: all positions are computed, then the chosen ones kept.

    Raises:
        ValueError: a hook that a Bridge never runs, or runs where what it returns would change nothing.
    """
    final: list[Tensor] = []

    def keep(x: Tensor) -> None:
        final.append(x)

    stop = model.cfg.n_layers if stop_at_layer is None else stop_at_layer
    last = f"blocks.{stop - 1}."  # of those that run
    n_pos = (tokens if resid is None else resid).shape[1]
    chosen: Any = None if positions is None else torch.arange(n_pos, device=model.cfg.device)[positions]
    hooks = {name: hook for name, hook in hooks.items() if _layer_of(name) < stop}
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
    if is_bridge(model):
        _run_bridge(model, tokens, resid, start_layer, stop, fwd_hooks, keep)
        return final[0] if chosen is None else final[0][:, chosen]
    extra = _stopping(model, stop)
    if stop:
        fwd_hooks.append((last + "hook_resid_post", lambda x, hook: keep(x)))
    if resid is not None:
        # Hooks of the model's own come first; what they make of the stream that is given is put right after them.
        fwd_hooks.insert(0, (f"blocks.{start_layer}.hook_resid_pre", lambda x, hook: resid))
        extra["start_at_layer"] = start_layer
        if model.cfg.positional_embedding_type == "shortformer":  # every layer adds them to its queries and keys
            like = torch.zeros(resid.shape[:2], dtype=torch.long, device=resid.device)
            extra["shortformer_pos_embed"] = model.hook_pos_embed(model.pos_embed(like))
    end = model.run_with_hooks(tokens if resid is None else resid, return_type=None, fwd_hooks=fwd_hooks, **extra)
    if not stop:
        keep(end)
    return final[0] if chosen is None else final[0][:, chosen]


def _stopping(model: LensModel, stop: int) -> dict[str, Any]:
    """What TransformerLens' forward is told so that it ends before a layer."""
    return {"stop_at_layer": stop} if stop < model.cfg.n_layers else {}


def _layer_of(name: str) -> int:
    """The layer of a hook; -1 before the first."""
    return int(name.split(".")[1]) if name.startswith("blocks.") else -1


def _run_bridge(model: LensModel, tokens, resid, start_layer: int, stop: int, fwd_hooks: list, keep: Hook) -> None:
    """The same hooks in a Bridge, whose hook points differ from HookedTransformer's in place and shape."""
    never = {name for name, _ in fwd_hooks}
    own: list[tuple[str, Callable]] = []
    after: list[tuple[str, Callable]] = []  # on attn_out, after those that are given

    def plain(name: str, call: Callable) -> Callable:
        fixed = name.endswith("hook_pattern") and not _reads_pattern(model, name)

        def run(x: Tensor, hook: Any) -> Tensor | None:
            never.discard(name)
            new = call(x, hook=hook)
            if new is not None and fixed:
                raise ValueError(f"this Bridge runs {name} after the pattern is used: nothing returned changes it")
            return new

        return run

    def of_mid(name: str, call: Callable) -> None:
        """A Bridge's resid_mid is what ln2 reads, beside the skip path: the hook sees it, and changes attn_out."""
        block = name.removesuffix("hook_resid_mid")
        pre: list[Tensor] = []

        def change(x: Tensor, hook: Any) -> Tensor | None:
            never.discard(name)
            before = pre.pop()
            mid = before + x
            new = call(mid, hook=hook)
            if new is None:
                return None
            # Its gradient is that of what is left of the new stream without the skip path, so that all of it goes
            # through `new`; its value changes nothing where `new` does not.
            left = new - before
            return left + (x + (new - mid) - left).detach()

        after.append((block + "hook_resid_pre", lambda x, hook: pre.append(x)))
        after.append((block + "hook_attn_out", change))

    if resid is not None:  # the layers before run on whatever tokens
        tokens = torch.zeros(resid.shape[:2], dtype=torch.long, device=resid.device)
        own.append((f"blocks.{start_layer}.hook_resid_pre", lambda x, hook: resid))
    for name, call in fwd_hooks:
        if resid is not None and _layer_of(name) < start_layer:
            never.discard(name)
        elif name.endswith("hook_resid_mid"):
            of_mid(name, call)
        else:
            own.append((name, plain(name, call)))
    last = [(f"blocks.{stop - 1}.hook_resid_post", lambda x, hook: keep(x))] if stop else []
    end = model.run_with_hooks(tokens, return_type=None, fwd_hooks=[*own, *after, *last], **_stopping(model, stop))
    if not stop:
        keep(end)
    if never:
        raise ValueError(f"this Bridge never runs the hook {sorted(never)[0]}")


def _reads_pattern(model: LensModel, name: str) -> bool:
    """Whether attention goes on with what hook_pattern makes of the pattern."""
    attn = model.blocks[int(name.split(".")[1])].attn
    rebuilt = ("JointQKV", "PositionEmbeddings")
    return type(attn).__name__.startswith(rebuilt) or getattr(attn.original_component, "accepts_pattern_fn", False)
