"""Direct logit attribution, and the true direct effect it approximates.

The final residual stream x is a sum of component outputs c. With the final LayerNorm's scale s taken as it is,
the logit of a token t is linear in them: the attribution of c is <c, u> / s, u the token's column of W_U as the
norm lets it be read. The true direct effect removes c and normalises again:

    DE(c) = logit(x) - logit(x - c)            (P2 = arXiv 2507.02559, section 4)

which differs wherever removing c changes s. Both follow from three numbers per head or neuron, <c, u>, <x, c> and
|c|^2, and those from z and W_O: no [head, batch, pos, d_model] tensor is ever made. Without LayerNorm the two are
the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Literal, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..batching import Places, Targets, Tokens, check_next_token, check_tokens, indices, target_ids
from ..forward import run
from ..lens import LensModel, ModelOrName
from ..models import as_model
from ..weights import block_of, final_norm, normalises_writes, own_hooks

DECOMPOSITIONS = ("component", "head", "neuron")
# Tokens per pass: what bounds the memory held for z, whatever the number of sequences.
TOKENS_PER_PASS = 2048
# Shares of |x|^2 below which |x - c|^2 is not taken from the closed form.
CANCELLED = 0.01


@dataclass(frozen=True)
class LogitAttribution:
    """What each component contributes to a logit, or to the difference of two.

    Attributes:
        values: Float[Tensor, "component batch pos"], in logits.
        labels: one name per component: "embed", "pos_embed", "L3.attn", "L3.mlp", "L3H7", "L3N1021", and "L3.b_O",
            "L3.b_out" for biases where heads or neurons are listed without them; last "hooks", for a model that
            carries hooks of its own: what they add to the final residual stream that no component wrote.
        bias: Float[Tensor, "batch pos"], the part no component owns (b_U, and the final norm's own bias).
            `values.sum(0) + bias` is the model's logit (for `direct_effect` only without LayerNorm).
        positions: the position in the prompt of each entry along pos.
    """

    values: Float[Tensor, "component batch pos"]
    labels: tuple[str, ...]
    bias: Float[Tensor, "batch pos"]
    positions: tuple[int, ...]

    def table(self):
        """One row per component: mean, mean absolute value and standard deviation in logits, largest first."""
        import pandas as pd

        flat = self.values.flatten(1).cpu().double()
        table = pd.DataFrame(
            {
                "component": self.labels,
                "mean": flat.mean(1).numpy(),
                "mean_abs": flat.abs().mean(1).numpy(),
                "std": flat.std(1, unbiased=False).numpy(),
            }
        )
        return table.sort_values("mean_abs", ascending=False, ignore_index=True)


# ---------------------------------------------------------------------------------------------------------
# Public functions


def direct_logit_attribution(
    model: ModelOrName,
    tokens: Tokens,
    targets: Targets | None = None,
    *,
    versus: Targets | None = None,
    positions: Places | None = None,
    by: str = "component",
) -> LogitAttribution:
    """Each component's part in a logit with the final norm's scale as it is: <c, u> / scale.

    Args:
        model: any HookedTransformer or TransformerBridge, or a name; with layer norm, RMS norm or none.
        tokens: Int[Tensor, "batch pos"], an array or lists of such, a text or a list of texts of one token length.
        targets: None: at every position that has one, the next token; [batch]: at the last position;
            [batch pos]: at every position. Token ids; at the last position also one id or one text of a single token,
            the same for all prompts, or a list of such texts.
        versus: second token ids, of targets' shape: everything is then about the logit difference.
        positions: only these (of those that targets gives); negative ones count from the end; or a mask of all.
        by: "component" (embed, pos_embed, attn and mlp of each layer with their biases), "head" (attention by
            heads, b_O apart) or "neuron" (MLPs by neurons, b_out apart).

    Returns:
        LogitAttribution in logits; values and bias sum to the model's own logit.

    Raises:
        ValueError: tokens, targets or positions out of range or of the wrong shape, an unknown `by`, a model whose
            logits are not a sum over components.

    Example:
        >>> from lnfree_interp import direct_logit_attribution, load_model
        >>> model = load_model("tiny-noLN", device="cpu")
        >>> tokens = model.to_tokens("It was a dark and stormy")
        >>> result = direct_logit_attribution(model, tokens, by="head")
        >>> logits = result.values.sum(0) + result.bias
        >>> logits.shape == tokens[:, 1:].shape
        True
    """
    return logit_attributions(model, tokens, targets, versus=versus, positions=positions, by=by, exact=False)[0]


def direct_effect(
    model: ModelOrName,
    tokens: Tokens,
    targets: Targets | None = None,
    *,
    versus: Targets | None = None,
    positions: Places | None = None,
    by: str = "component",
) -> LogitAttribution:
    """How much a logit falls when a component is taken out of the final residual stream and the rest normalised.

    DE(c) = logit(x) - logit(x - c), the scale computed anew for x - c, in closed form (P2, section 4). Later
    layers do not see the removal: it is the direct path's effect. Arguments and errors are
    `direct_logit_attribution`'s.

    Example:
        >>> from lnfree_interp import direct_effect, direct_logit_attribution, load_model
        >>> model = load_model("tiny-noLN", device="cpu")
        >>> tokens = model.to_tokens("It was a dark and stormy")
        >>> exact, linear = direct_effect(model, tokens), direct_logit_attribution(model, tokens)
        >>> bool((exact.values - linear.values).abs().max() < 1e-4)
        True
    """
    return logit_attributions(model, tokens, targets, versus=versus, positions=positions, by=by, exact=True)[1]


@overload
def logit_attributions(
    model: ModelOrName,
    tokens: Tokens,
    targets: Targets | None = None,
    *,
    versus: Targets | None = None,
    positions: Places | None = None,
    by: str = "component",
    exact: Literal[True] = True,
) -> tuple[LogitAttribution, LogitAttribution]: ...
@overload
def logit_attributions(
    model: ModelOrName,
    tokens: Tokens,
    targets: Targets | None = None,
    *,
    versus: Targets | None = None,
    positions: Places | None = None,
    by: str = "component",
    exact: Literal[False],
) -> tuple[LogitAttribution, None]: ...
@torch.no_grad()
def logit_attributions(
    model: ModelOrName,
    tokens: Tokens,
    targets: Targets | None = None,
    *,
    versus: Targets | None = None,
    positions: Places | None = None,
    by: str = "component",
    exact: bool = True,
) -> tuple[LogitAttribution, LogitAttribution | None]:
    """`direct_logit_attribution` and, if `exact`, `direct_effect`, from one forward pass.

    Example:
        >>> from lnfree_interp import load_model, logit_attributions
        >>> model = load_model("tiny-noLN")
        >>> approximate, exact = logit_attributions(model, model.to_tokens("It was a dark and stormy night."))
        >>> bool((approximate.values - exact.values).abs().max() < 1e-4)
        True
    """
    model = as_model(model)
    check_model(model, by)
    tokens = check_tokens(model, tokens)
    kept, targets, versus = align_targets(model, tokens, targets, versus, positions)
    hooked = bool(own_hooks(model))
    labels = component_labels(model.cfg, by) + ("hooks",) * hooked
    parts = []
    for rows in tokens.new_tensor(range(len(tokens))).split(max(1, TOKENS_PER_PASS // tokens.shape[1])):
        other = None if versus is None else versus[rows]
        parts.append(_attribute(model, tokens[rows], targets[rows], other, kept, by, exact, hooked))
    linear, effect, bias = (None if p[0] is None else torch.cat(p, dim=-2) for p in zip(*parts))
    assert linear is not None and bias is not None
    where = tuple(kept)
    approximate = LogitAttribution(linear, labels, bias, where)
    return approximate, None if effect is None else LogitAttribution(effect, labels, bias, where)


# ---------------------------------------------------------------------------------------------------------
# Checks and alignment


def check_model(model: LensModel, by: str) -> None:
    """Raise ValueError unless the model's logits are a sum over its components."""
    cfg = model.cfg
    if by not in DECOMPOSITIONS:
        raise ValueError(f"by={by!r} is unknown; allowed are {', '.join(DECOMPOSITIONS)}")
    if (getattr(cfg, "output_logits_soft_cap", -1.0) or -1.0) > 0:
        raise ValueError("this model caps its logits with tanh, so they are not a sum over components")
    if by != "component" and normalises_writes(model):
        raise ValueError(f"this model normalises what its blocks write, so by={by!r} is undefined")
    if by == "neuron" and (getattr(cfg, "attn_only", False) or getattr(cfg, "num_experts", None)):
        raise ValueError("by='neuron' wants a model with plain MLPs")


def align_targets(
    model: LensModel,
    tokens: Int[Tensor, "batch pos"],
    targets: Targets | None,
    versus: Targets | None,
    positions: Places | None,
) -> tuple[list[int], Int[Tensor, "batch kept"], Int[Tensor, "batch kept"] | None]:
    """The positions asked for and the target (and second) token ids there. The only place that aligns them.

    Raises:
        ValueError: targets or versus of the wrong shape or out of the vocabulary, a position out of range; next
            tokens where the logits are over another vocabulary.
    """
    n_batch, n_pos = tokens.shape
    available = range(n_pos)
    if targets is None:
        check_next_token(model)
        if n_pos < 2:
            raise ValueError("one token has no next token: give targets")
        chosen, available = tokens[:, 1:], range(n_pos - 1)
    else:
        chosen = target_ids(model, targets, n_batch, "targets")
        if chosen.shape == (n_batch,):
            chosen, available = chosen[:, None], range(n_pos - 1, n_pos)
        elif chosen.shape != (n_batch, n_pos):
            raise ValueError(
                f"targets have shape {list(chosen.shape)}; allowed are [{n_batch}] (last position) and "
                f"[{n_batch}, {n_pos}] (every position)"
            )
    other = None if versus is None else target_ids(model, versus, n_batch, "versus")
    if other is not None:
        other = other[:, None] if other.ndim == 1 else other
        if other.shape != chosen.shape:
            raise ValueError(f"versus has shape {list(other.shape)}, the targets {list(chosen.shape)}: they must agree")
    kept = _resolve_positions(positions, n_pos, available)
    index = torch.tensor(kept, device=tokens.device) - available.start
    return kept, chosen[:, index], None if other is None else other[:, index]


def _resolve_positions(positions: Places | None, n_pos: int, available: range) -> list[int]:
    return list(available) if positions is None else indices(positions, n_pos, "position", available, "targets")


def component_labels(cfg, by: str) -> tuple[str, ...]:
    """The components' names in the order of the values."""
    labels = ["embed"] + ["pos_embed"] * (cfg.positional_embedding_type == "standard")
    for i in range(cfg.n_layers):
        labels += [f"L{i}H{h}" for h in range(cfg.n_heads)] + [f"L{i}.b_O"] if by == "head" else [f"L{i}.attn"]
        if not getattr(cfg, "attn_only", False):
            labels += [f"L{i}N{n}" for n in range(cfg.d_mlp)] + [f"L{i}.b_out"] if by == "neuron" else [f"L{i}.mlp"]
    return tuple(labels)


# ---------------------------------------------------------------------------------------------------------
# The computation


def _attribute(model: LensModel, tokens, targets, versus, kept: list[int], by: str, exact: bool, hooked: bool):
    """(attribution, direct effect or None, bias) of a few sequences: [component, batch, kept] and [batch, kept]."""
    activations, x = _record(model, tokens, kept, by)
    # In fp32 at least: fp16 squares overflow at norms of 256, and |x - c|^2 is a small difference of large sums.
    x = _wide(x.flatten(0, 1))  # [n, d_model]; n runs over batch and kept positions
    if hooked:
        activations["hooks"] = x - _written(model, activations)
    norm = final_norm(model)

    direction, bias = _directions(model, norm, targets, versus)
    scale = norm.scale(x)[:, 0]
    shape = (-1, *targets.shape)
    exact_apart = exact and not norm.linear
    dots, left = _project(model, activations, direction, _centred(x, norm) if exact_apart else None, norm)
    linear = dots / scale
    if left is None:
        return linear.view(shape), linear.clone().view(shape) if exact else None, bias.view(targets.shape)
    whole = torch.einsum("nd,nd->n", x, direction) / scale
    effect = whole - left[0] / (left[1] / x.shape[-1] + norm.eps).sqrt()
    return linear.view(shape), effect.view(shape), bias.view(targets.shape)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _centred(x: Float[Tensor, "*rows d_model"], norm) -> Float[Tensor, "*rows d_model"]:
    """x as the norm sees it: without its mean, if the norm centres."""
    return x - x.mean(-1, keepdim=True) if norm.centres else x


def _directions(model: LensModel, norm, targets, versus) -> tuple[Float[Tensor, "n d_model"], Float[Tensor, " n"]]:
    """u with logit = <x, u> / scale + bias, and that bias: W_U through the norm's own weights and centring."""
    columns, b_U = model.unembed.W_U.T, model.unembed.b_U
    direction, bias = _wide(columns[targets].flatten(0, 1)), _wide(b_U[targets].flatten())
    if versus is not None:
        direction = direction - columns[versus].flatten(0, 1)
        bias = bias - b_U[versus].flatten()
    if norm.b is not None:
        bias = bias + direction @ _wide(norm.b)
    if norm.w is not None:
        direction = direction * norm.w
    return _centred(direction, norm), bias


def _record(model: LensModel, tokens, kept: list[int], by: str) -> tuple[dict[str, Tensor], Tensor]:
    """The activations a decomposition is made of, at the kept positions, and the final residual stream there."""
    cfg = model.cfg
    names = ["hook_embed"] + ["hook_pos_embed"] * (cfg.positional_embedding_type == "standard")
    for i in range(cfg.n_layers):
        names.append(f"blocks.{i}." + ("attn.hook_z" if by == "head" else "hook_attn_out"))
        if not getattr(cfg, "attn_only", False):
            names.append(f"blocks.{i}." + ("mlp.hook_post" if by == "neuron" else "hook_mlp_out"))
    activations: dict[str, Tensor] = {}
    # A slice where there is one: a view in place of a copy.
    where = slice(kept[0], kept[-1] + 1) if kept == list(range(kept[0], kept[-1] + 1)) else kept
    every = where == slice(0, tokens.shape[1])
    last = f"blocks.{cfg.n_layers - 1}."

    def keep(name: str):
        def hook(x: Tensor) -> None:
            # The last block runs at the kept positions alone. Copies: later hooks may change x in place.
            chosen = x if every or name.startswith(last) else x[:, where]
            activations[name] = chosen.expand(len(tokens), *chosen.shape[1:]).flatten(0, 1)

        return hook

    x = run(model, tokens, hooks={name: keep(name) for name in names}, positions=None if every else where)
    return activations, x


def _pieces(model: LensModel, activations):
    """(the activation, the weights it is multiplied with or None) of everything that writes to the residual stream."""
    for name, activation in activations.items():
        if not name.endswith(("hook_z", "hook_post")):
            yield activation, None
            continue
        block = block_of(model, int(name.split(".")[1]))
        if name.endswith("hook_z"):
            yield activation, block.attn.W_O
            yield block.attn.b_O[None], None
        else:
            yield activation, block.mlp.W_out
            yield block.mlp.b_out[None], None


def _written(model: LensModel, activations) -> Float[Tensor, "n d_model"]:
    """The sum of all components."""
    pieces = _pieces(model, activations)
    return reduce(
        torch.add, (_wide(c) if W is None else _wide(c).flatten(1) @ _wide(W).flatten(0, -2) for c, W in pieces)
    )


def _project(model: LensModel, activations, u, x, norm):
    """<c, u> of every component c and, if x is given, <x - c, u> and |x - c|^2; c is centred where the norm centres.

    Returns:
        ([component, n], None or two [component, n]). u and x must be centred themselves where the norm centres.
    """
    dots, left = [], []
    for activation, W in _pieces(model, activations):
        activation = _wide(activation)
        if W is None:  # a component given by its output
            c = _centred(activation, norm).expand(len(u), -1)
            dots.append(_dot(c, u)[None])
            if x is not None:
                rest = x - c
                left.append(torch.stack([_dot(rest, u), _dot(rest, rest)])[:, None])
        else:
            W = _centred(_wide(W), norm)
            dot = (_onto_heads if W.ndim == 3 else _onto_neurons)(activation, W, u)
            dots.append(dot)
            if x is not None:
                left.append(_left(activation, W, u, x, dot))
    return torch.cat(dots), None if x is None else torch.cat(left, 1)


def _dot(a: Float[Tensor, "n d_model"], b: Float[Tensor, "n d_model"]) -> Float[Tensor, " n"]:
    return torch.einsum("nd,nd->n", a, b)


def _onto_heads(z: Float[Tensor, "n head d_head"], W_O: Float[Tensor, "head d_head d_model"], r) -> Tensor:
    """<c, r> = <z, W_O r> for c = z W_O of each head, [head, n]."""
    return torch.einsum("nhe,nhe->hn", z, (r @ W_O.flatten(0, 1).T).unflatten(1, (len(W_O), -1)))


def _onto_neurons(post: Float[Tensor, "n d_mlp"], W_out: Float[Tensor, "d_mlp d_model"], r) -> Tensor:
    """<c, r> = post_i <W_out[i], r> for c = post_i W_out[i] of each neuron, [neuron, n]."""
    return (post * (r @ W_out.T)).T


def _left(activation, W, u, x, dot) -> Float[Tensor, "two unit n"]:
    """<x - c, u> and |x - c|^2 = |x|^2 - 2 <x, c> + |c|^2 of each head or neuron, c never made but where it must be."""
    if W.ndim == 3:
        turned = torch.einsum("nhe,hef->nhf", activation, W @ W.transpose(1, 2))
        along, square = _onto_heads(activation, W, x), torch.einsum("nhf,nhf->hn", turned, activation)
    else:
        along, square = _onto_neurons(activation, W, x), (activation.pow(2) * W.pow(2).sum(-1)).T
    size = _dot(x, x)
    left = torch.stack([_dot(x, u) - dot, size - 2 * along + square])
    # Where nearly all of x is c, as a massive activation is, the difference of the two would be rounding.
    cancelled = left[1] < CANCELLED * size
    for unit in cancelled.any(1).nonzero()[:, 0].tolist():
        rows = cancelled[unit].nonzero()[:, 0]
        c = activation[rows, unit] @ W[unit] if W.ndim == 3 else activation[rows, unit, None] * W[unit]
        left[:, unit, rows] = torch.stack([_dot(x[rows] - c, u[rows]), _dot(x[rows] - c, x[rows] - c)])
    return left
