"""The one reader of a model's weights: `read_weights` makes of a TransformerLens model what the fast forward runs on.

It reads HookedTransformers and TransformerBridges: blocks of GPT-2's kind, and those of GPT-NeoX (Pythia), Llama,
Mistral, Qwen 2 and 3, and Gemma: layer norm or RMS norm (before or also after attention and MLP), learnt or rotary
positions, grouped queries, gated MLPs, attention and MLP in parallel, soft caps on the scores, sliding windows. It is
None for a model whose own forward computes anything else.

Nothing is copied from the model and nothing kept from one call to the next, so that edits of the weights, which may
leave no trace (`W.data`), are always followed: each weight is read where it lies.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from . import bridge
from .layers import ACTIVATIONS, NO_NORM, Layer, Norm, Positions, Rotary, Weights, of_norms, widened_norm, widened_norms
from .lens import LensModel, ModelOrName, is_bridge
from .models import as_model

__all__ = [
    "Layer",
    "Norm",
    "Positions",
    "Weights",
    "block_of",
    "final_norm",
    "normalises_writes",
    "of_norms",
    "own_hooks",
    "read_weights",
    "weights_alone",
    "why_not_read",
    "widened_norm",
    "widened_norms",
]

# Where hooks are from by which a TransformerBridge, and Hugging Face's modules in it, note what passes through them.
_WATCHES = ("transformer_lens.model_bridge.", "transformers.")
NORMALIZATIONS = (None, "LN", "LNPre", "RMS", "RMSPre")

# cfg fields that change the forward, with the only values under which `Layer` computes the model's own.
_COVERED = {
    "positional_embedding_type": ("standard", "rotary"),
    "attention_dir": ("causal",),
    "num_experts": (None,),
    "ungroup_grouped_query_attention": (False,),
    "clip_qkv": (None,),
    "use_logn_attn": (False,),
    "use_dynamic_ntk_rope": (False,),
    "use_attention_sinks": (False,),
    "load_in_4bit": (False,),
    "n_devices": (1, None),
    "use_attn_in": (False,),
    "use_split_qkv_input": (False,),
    "use_attn_result": (False,),
    "use_hook_mlp_in": (False,),
    "original_architecture": (
        None,
        "neel",
        "neel-solu-old",
        "GPT2LMHeadModel",
        "GPTNeoForCausalLM",
        "GPTJForCausalLM",
        "GPTNeoXForCausalLM",
        "OPTForCausalLM",
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
        "PhiForCausalLM",
        "Phi3ForCausalLM",
        "GemmaForCausalLM",
        "Gemma2ForCausalLM",
        "Gemma3ForCausalLM",
    ),
}

# Those that say nothing of the weights up to the scores, or of the MLPs': of hook points, and of what is run between.
_NOT_OF_WEIGHTS = (
    *("use_attn_in", "use_split_qkv_input", "use_attn_result", "use_hook_mlp_in"),
    *("act_fn", "num_experts", "use_attention_sinks"),
)


def read_weights(model: ModelOrName) -> Weights | None:
    """The model's weights as they are now, views of them; None for a model that they are not all of.

    None exactly where `Layer` would not compute what the model's own forward computes: for blocks of another kind
    (experts, ALiBi, ...), for modules that are not TransformerLens' own (or, in a TransformerBridge, Hugging Face's),
    and while the model carries hooks of a user's, which only its own forward runs. `why_not_read` says which.

    Raises:
        ValueError: no TransformerLens model, an unknown name, a model spread over several devices.

    Example:
        >>> from lnfree_interp import load_model, read_weights
        >>> weights = read_weights(load_model("tiny-noLN"))
        >>> len(weights.layers), weights.layers[0].ln1.kind
        (8, None)
    """
    found = _read(as_model(model))
    return None if isinstance(found, str) else found


def why_not_read(model: ModelOrName) -> str | None:
    """Why `read_weights` is None for a model, in a few words; None where it is not.

    Example:
        >>> from lnfree_interp import load_model
        >>> model = load_model("tiny-noLN")
        >>> print(why_not_read(model))
        None
        >>> _ = model.add_hook("blocks.1.hook_mlp_out", lambda x, hook: 2 * x)
        >>> why_not_read(model)
        'the model carries a hook at blocks.1.hook_mlp_out, which only its own forward runs'
    """
    found = _read(as_model(model))
    return found if isinstance(found, str) else None


def weights_alone(model: LensModel) -> Weights:
    """The model's weights for what is computed of them and runs no MLP, whatever hooks and hook points it has.

    Its activation functions are not to be called, and MLPs of experts are left out.

    Raises:
        ValueError: `read_weights` is None for another reason: these would not be all of the model.
    """
    found = _read(model, alone=True)
    if isinstance(found, str):
        raise ValueError(f"the model's weights are not read: {found}")
    return found


@torch.no_grad()
def _read(model: LensModel, alone: bool = False) -> Weights | str:
    """The weights, or why they are not read; `alone`: what `weights_alone` gives."""
    known = ("transformer_lens", "torch", "transformers") if is_bridge(model) else ("transformer_lens", "torch")
    for name, module in _modules(model):
        if type(module).__module__.split(".")[0] not in known or "forward" in vars(module):
            return f"its {name or 'root'} is a {type(module).__name__}, no module of TransformerLens' own"
        if module.training and isinstance(module, torch.nn.Dropout) and module.p > 0:
            return f"it is in training mode, with dropout at {name}"
    for name in () if alone else own_hooks(model):
        return f"the model carries a hook at {name or 'its root'}, which only its own forward runs"
    if is_bridge(model):
        try:
            return bridge.read_bridge(model)
        except ValueError as error:
            return str(error)
    cfg = model.cfg
    covered = _COVERED | {"normalization_type": NORMALIZATIONS}
    if not getattr(cfg, "attn_only", False):
        covered = covered | {"act_fn": tuple(ACTIVATIONS)}
    if alone:
        covered = {field: allowed for field, allowed in covered.items() if field not in _NOT_OF_WEIGHTS}
    for field, allowed in covered.items():
        if (value := getattr(cfg, field, allowed[0])) not in allowed:
            return f"cfg.{field} is {value!r}, which this package's own forward does not compute"
    for block in model.blocks:
        if type(block).__name__ != "TransformerBlock":
            return f"its blocks are {type(block).__name__}, not TransformerLens' TransformerBlock"
    return Weights(
        layers=tuple(_layer(cfg, block) for block in model.blocks),
        ln_final=final_norm(model),
        W_E=model.embed.W_E,
        W_pos=model.pos_embed.W_pos if cfg.positional_embedding_type == "standard" else None,
        W_U=model.unembed.W_U,
        b_U=model.unembed.b_U,
        ln_embed=norm_of(model.embed.ln, "LN", cfg.eps) if getattr(cfg, "post_embedding_ln", False) else NO_NORM,
    )


def _layer(cfg, block) -> Layer:
    attn, kind = block.attn, cfg.normalization_type
    stored = "" if getattr(cfg, "n_key_value_heads", None) is None else "_"  # W_K repeats the heads of _W_K
    after = bool(getattr(cfg, "use_normalization_before_and_after", False)) and kind is not None
    norm_heads = getattr(cfg, "use_qk_norm", False)
    cap = getattr(cfg, "attn_scores_soft_cap", None)
    of_attn: dict[str, Any] = {f"{part}_{x}": getattr(attn, f"{stored}{part}_{x}") for x in "KV" for part in "Wb"}
    layer = Layer(
        ln1=norm_of(block.ln1, kind, cfg.eps),
        W_Q=attn.W_Q,
        b_Q=attn.b_Q,
        **of_attn,
        W_O=attn.W_O.flatten(0, 1),
        b_O=attn.b_O,
        attn_scale=float(attn.attn_scale),
        q_norm=norm_of(attn.q_norm, "RMS", cfg.eps) if norm_heads else NO_NORM,
        k_norm=norm_of(attn.k_norm, "RMS", cfg.eps) if norm_heads else NO_NORM,
        rotary=Rotary(attn, cfg.rotary_adjacent_pairs) if cfg.positional_embedding_type == "rotary" else None,
        cap=cap if cap is not None and cap > 0 else None,
        window=cfg.window_size if getattr(attn, "attn_type", "global") == "local" else None,
        ln1_post=norm_of(block.ln1_post, kind[:3], cfg.eps) if after else NO_NORM,
    )
    if getattr(cfg, "attn_only", False) or getattr(cfg, "num_experts", None):
        return layer
    names = ("W_in", "b_in", "W_out", "b_out", "W_gate")
    of_mlp: dict[str, Any] = {name: getattr(block.mlp, name, None) for name in names}
    return replace(
        layer,
        parallel=bool(getattr(cfg, "parallel_attn_mlp", False)),
        ln2=norm_of(block.ln2, kind, cfg.eps),
        **of_mlp,
        act=ACTIVATIONS.get(cfg.act_fn, _not_run),
        ln2_post=norm_of(block.ln2_post, kind[:3], cfg.eps) if after else NO_NORM,
    )


def _not_run(x: Any) -> Any:
    """Stands for an activation function that `_COVERED` leaves out."""
    raise NotImplementedError("an activation function that is not computed here")


def norm_of(module: Any, kind: str | None, eps: float) -> Norm:
    """The `Norm` of a TransformerLens normalisation module; `eps` is for one that has none of its own."""
    return Norm(kind, float(getattr(module, "eps", eps)), getattr(module, "w", None), getattr(module, "b", None))


def final_norm(model: LensModel) -> Norm:
    """The normalisation before the unembedding, by `cfg.normalization_type`.

    Raises:
        ValueError: a normalisation TransformerLens does not have; hooks of the model's own on the final norm or the
            unembedding, which no closed form knows of.
    """
    kind = model.cfg.normalization_type
    if kind not in NORMALIZATIONS and not is_bridge(model):
        known = ", ".join(map(str, NORMALIZATIONS))
        raise ValueError(f"normalization_type {kind!r} is unknown; known are {known}")
    parts = {"ln_final": getattr(model, "ln_final", None), "unembed": model.unembed}
    hooked = [f"{part}.{name}".rstrip(".") for part, module in parts.items() for name in own_hooks(module)]
    around = bridge.modules_around(model) if is_bridge(model) else ()
    hooked += [name for name, module in around if list(module.children()) and _carries_hooks(module)]
    if hooked or _carries_hooks(model):
        where = hooked[0] if hooked else "its root"
        raise ValueError(f"the model carries a hook at {where}, where nothing but its own forward runs it; remove it")
    if is_bridge(model):
        norm = bridge.norm_of_bridge(model.ln_final)
        bridge.check_readout(model, norm)
        return norm
    if kind is not None and getattr(model.cfg, "final_rms", False):
        kind = kind.replace("LN", "RMS")
    return norm_of(getattr(model, "ln_final", None), kind, model.cfg.eps)


def block_of(model: LensModel, layer: int) -> Any:
    """A block's weights by HookedTransformer's names: attn.W_O, attn.b_O, mlp.W_out, mlp.b_out, ...

    Raises:
        ValueError: a Bridge's whose maps are more than a matrix and a bias.
    """
    return bridge.block_of(model, layer) if is_bridge(model) else model.blocks[layer]


def normalises_writes(model: LensModel) -> bool:
    """Whether a norm comes after attention and MLP, so that what heads and neurons write is not what is added."""
    if is_bridge(model):
        return not bridge.writes_plainly(model)
    after = getattr(model.cfg, "use_normalization_before_and_after", False)
    return bool(after) or normalises_writes_alone(model)


def normalises_writes_alone(model: LensModel) -> bool:
    """Whether no norm comes before attention and MLP: they read the stream as it is."""
    names = {getattr(model.cfg, name, None) for name in ("original_architecture", "architecture")}
    return bool(names & {"Olmo2ForCausalLM", "Olmo3ForCausalLM"})


def own_hooks(model: LensModel | torch.nn.Module | None) -> tuple[str, ...]:
    """The names of a model's modules that carry hooks: a user's own, since ours never outlive a call."""
    found = [] if model is None else [(name, m) for name, m in _modules(model) if _carries_hooks(m)]
    return bridge.names_of(model, found) if is_bridge(model) else tuple(name for name, _ in found)


def _modules(model: LensModel | torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """All modules that run, by name."""
    return [*model.named_modules(), *(bridge.modules_around(model) if is_bridge(model) else ())]


def _carries_hooks(module: LensModel | torch.nn.Module) -> bool:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(_of_a_users(hooks.values()) for kind in kinds if (hooks := getattr(module, kind)))


def _of_a_users(hooks: Iterable[Any]) -> bool:
    return any(not (getattr(hook, "__module__", None) or "").startswith(_WATCHES) for hook in hooks)
