"""The residual stream somewhere in a model, and all that was written to it until there, piece by piece."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..arguments import choice
from ..forward import run
from ..layers import wide
from ..lens import LensModel
from ..weights import Weights, block_of, normalises_writes, read_weights
from .pieces import Heads, Moves, Neurons, Piece, Whole

DECOMPOSITIONS = ("component", "head", "neuron")
BY_SOURCE = "source"


@dataclass(frozen=True)
class Place:
    """Somewhere on the residual stream: where it enters a layer, or (mid) where the layer's MLP reads it.

    The final stream enters layer n_layers.
    """

    layer: int
    mid: bool = False


@dataclass(frozen=True)
class Recorded:
    """Some tokens' stream at a place and what it is the sum of; n runs over batch and kept positions.

    Attributes:
        at: where the tokens are in their prompts: the source of what is not moved.
    """

    x: Float[Tensor, "n d_model"]
    pieces: tuple[Piece, ...]
    at: Int[Tensor, " n"]


def check_by(model: LensModel, by: str, allowed: Sequence[str] = (*DECOMPOSITIONS, BY_SOURCE)) -> None:
    """Raise ValueError unless what the model's blocks write is a sum over such components."""
    choice(by, "by", allowed)
    if by != "component" and normalises_writes(model):
        raise ValueError(f"this model normalises what its blocks write, so by={by!r} is undefined")
    if by == "neuron" and (getattr(model.cfg, "attn_only", False) or getattr(model.cfg, "num_experts", None)):
        raise ValueError("by='neuron' wants a model with plain MLPs")


def component_labels(cfg, by: str, place: Place | None = None) -> tuple[str, ...]:
    """The components' names in the order of the values: those before a place, or all."""
    place = place or Place(cfg.n_layers)
    labels = ["embed"] + ["pos_embed"] * (cfg.positional_embedding_type == "standard")
    for i in range(place.layer + place.mid):
        labels += [*heads_of(cfg, i), f"L{i}.b_O"] if by in ("head", BY_SOURCE) else [f"L{i}.attn"]
        if not getattr(cfg, "attn_only", False) and i < place.layer:
            labels += [*neurons_of(cfg, i), f"L{i}.b_out"] if by == "neuron" else [f"L{i}.mlp"]
    return tuple(labels)


def heads_of(cfg, layer: int) -> tuple[str, ...]:
    return tuple(f"L{layer}H{h}" for h in range(cfg.n_heads))


def neurons_of(cfg, layer: int) -> tuple[str, ...]:
    return tuple(f"L{layer}N{n}" for n in range(cfg.d_mlp))


@torch.no_grad()
def record(
    model: LensModel,
    tokens: Int[Tensor, "batch pos"],
    place: Place,
    kept: Sequence[int],
    by: str,
    labels: Sequence[str] | None = None,
    hooked: bool = False,
) -> Recorded:
    """The stream at a place and, of the components before it, those named (all, if none are), at the kept positions.

    In fp32 at least: fp16 squares overflow at norms of 256, and |x - c|^2 is a small difference of large sums. Layers
    from the place on are not run.

    Args:
        hooked: the model carries hooks of its own: what they write, and no component, is one too.
    """
    activations, x = _run(model, tokens, place, kept, by)
    pieces = list(_pieces(model, activations, by))
    if hooked:
        pieces.append(Whole(("hooks",), x - reduce(torch.add, (piece.total() for piece in pieces))))
    if labels is not None:
        wanted = set(labels)
        chosen = [(piece, [i for i, label in enumerate(piece.labels) if label in wanted]) for piece in pieces]
        pieces = [
            piece.of_units(units) if len(units) < len(piece.labels) else piece for piece, units in chosen if units
        ]
    at = torch.tensor(list(kept), device=x.device).repeat(len(tokens))
    return Recorded(x, tuple(pieces), at)


def _run(model: LensModel, tokens, place: Place, kept: Sequence[int], by: str) -> tuple[dict[str, Tensor], Tensor]:
    """Activations by hook name, and the stream: at the kept positions, but for values, which are read from all."""
    cfg = model.cfg
    names = ["hook_embed"] + ["hook_pos_embed"] * (cfg.positional_embedding_type == "standard")
    of_attention = {"head": ("attn.hook_z",), BY_SOURCE: ("attn.hook_pattern", "attn.hook_v")}
    for i in range(place.layer + place.mid):
        names += [f"blocks.{i}.{name}" for name in of_attention.get(by, ("hook_attn_out",))]
        if not getattr(cfg, "attn_only", False) and i < place.layer:
            names.append(f"blocks.{i}." + ("mlp.hook_post" if by == "neuron" else "hook_mlp_out"))
    kept = list(kept)
    # A slice where there is one: a view in place of a copy.
    where = slice(kept[0], kept[-1] + 1) if kept == list(range(kept[0], kept[-1] + 1)) else kept
    every = where == slice(0, tokens.shape[1])
    weights = read_weights(model)
    # The last block that is run by ourselves runs at the kept positions alone.
    last = f"blocks.{place.layer - 1 + place.mid}." if weights is not None else "none"
    activations: dict[str, Tensor] = {}

    def keep(name: str):
        def hook(x: Tensor) -> None:
            if name.endswith("hook_v"):
                activations[name] = x
            elif name.endswith("hook_pattern"):
                activations[name] = x if every or name.startswith(last) else x[:, :, where]
            else:
                chosen = x if every or name.startswith(last) else x[:, where]
                activations[name] = chosen.expand(len(tokens), *chosen.shape[1:]).flatten(0, 1)

        return hook

    def in_order() -> dict[str, Tensor]:
        return {name: activations[name] for name in names}

    hooks = {name: keep(name) for name in names}
    if weights is not None:
        weights = _until(weights, place)
        n_layers = len(weights.layers)
        positions = None if every else where
        x = run(model, tokens, hooks=hooks, positions=positions, weights=weights, stop_at_layer=n_layers)
        return in_order(), wide(x.flatten(0, 1))
    if place == Place(cfg.n_layers):
        at, stop = f"blocks.{cfg.n_layers - 1}.hook_resid_post", cfg.n_layers
    else:  # as the layer reads it, the model's own hooks there included
        at, stop = f"blocks.{place.layer}." + ("hook_resid_mid" if place.mid else "hook_resid_pre"), place.layer + 1
    run(model, tokens, hooks=hooks | {at: keep(at)}, stop_at_layer=stop)
    return in_order(), wide(activations[at])


def _until(weights: Weights, place: Place) -> Weights:
    """The weights without what comes after a place."""
    layers = weights.layers[: place.layer + place.mid]
    if place.mid:
        layers = (*layers[:-1], replace(layers[-1], W_in=None))
    return replace(weights, layers=layers)


def _pieces(model: LensModel, activations: dict[str, Tensor], by: str) -> Iterator[Piece]:
    """Everything that writes to the stream, in the order of `component_labels`."""
    cfg = model.cfg
    for name, activation in activations.items():
        if not name.startswith("blocks."):
            yield Whole((name.removeprefix("hook_"),), wide(activation))
            continue
        layer, hook = int(name.split(".")[1]), name.split(".", 2)[2]
        if hook in ("hook_attn_out", "hook_mlp_out"):
            yield Whole((f"L{layer}.{hook.split('_')[1]}",), wide(activation))
            continue
        block = block_of(model, layer)
        if hook == "mlp.hook_post":
            yield Neurons(neurons_of(cfg, layer), wide(activation), wide(block.mlp.W_out))
            yield Whole((f"L{layer}.b_out",), wide(block.mlp.b_out[None]))
        elif hook != "attn.hook_pattern":
            heads, W_O = heads_of(cfg, layer), wide(block.attn.W_O)
            if by == BY_SOURCE:
                pattern, v = activations[name.replace("hook_v", "hook_pattern")], wide(activation)
                v = v.repeat_interleave(len(heads) // v.shape[2], 2)  # of the head of keys that each head reads
                yield Moves(heads, wide(pattern), v, W_O)
            else:
                yield Heads(heads, wide(activation), W_O)
            yield Whole((f"L{layer}.b_O",), wide(block.attn.b_O[None]))
