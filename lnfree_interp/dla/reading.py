"""A `Reader` on a model: where it reads, through which norm, and along which directions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..batching import Places, Targets, check_next_token, indices, target_ids
from ..bridge import norm_of_bridge
from ..layers import NO_NORM, Norm, wide
from ..lens import LensModel, is_bridge
from ..weights import block_of, final_norm, norm_of, normalises_writes_alone, own_hooks
from .readers import Reader
from .record import Place


@dataclass(frozen=True)
class Directions:
    """What is read of the stream x, <x, u> / scale + bias: the same for all tokens, or one reader's for each token.

    u has been taken through the norm's weights, and is centred where the norm centres.
    """

    u: Float[Tensor, "reader_or_n d_model"]
    bias: Float[Tensor, " reader_or_n"]
    per_token: bool = False

    @property
    def n_readers(self) -> int:
        return 1 if self.per_token else len(self.u)

    def some(self, readers: slice) -> Directions:
        """Those of some readers."""
        return self if self.per_token else Directions(self.u[readers], self.bias[readers])


@dataclass(frozen=True)
class Reading:
    """A reader on a model.

    Attributes:
        labels: one name per reader.
        kept: the positions at which it reads.
        fixed: its directions, if they are the same for all tokens;
        targets, versus: if not, the tokens whose logits are read.
    """

    place: Place
    norm: Norm
    labels: tuple[str, ...]
    kept: list[int]
    fixed: Directions | None = None
    targets: Int[Tensor, "batch kept"] | None = None
    versus: Int[Tensor, "batch kept"] | None = None

    def directions(self, model: LensModel, rows: slice) -> Directions:
        """For some of the prompts."""
        if self.fixed is not None:
            return self.fixed
        assert self.targets is not None
        columns, b_U = model.unembed.W_U.T, model.unembed.b_U
        targets = self.targets[rows].flatten()
        u, bias = wide(columns[targets]), wide(b_U[targets])
        if self.versus is not None:
            versus = self.versus[rows].flatten()
            u, bias = u - columns[versus], bias - b_U[versus]
        return _through(self.norm, u, bias, per_token=True)


def _through(norm: Norm, u: Tensor, bias: Tensor, per_token: bool = False) -> Directions:
    """Directions after a norm as directions before it."""
    return Directions(norm.read(u), bias + norm.of_bias(u), per_token)


def resolve(model: LensModel, reader: Reader, tokens: Int[Tensor, "batch pos"], positions: Places | None) -> Reading:
    """A reader on a model, for some tokens.

    Raises:
        ValueError: it does not exist there; a direction of another size; a position that is not there.
    """
    if not isinstance(reader, Reader):
        raise ValueError(f"reader is a {type(reader).__name__}, not a Reader: Reader.neuron(layer, n), for example")
    if reader.kind == "logits":
        if (getattr(model.cfg, "output_logits_soft_cap", -1.0) or -1.0) > 0:
            raise ValueError("this model caps its logits with tanh, so they are not a sum over components")
        kept, targets, versus = align_targets(model, tokens, reader.targets, reader.versus, positions)
        label = "logit" if versus is None else "logit difference"
        return Reading(Place(model.cfg.n_layers), final_norm(model), (label,), kept, None, targets, versus)
    n_pos = tokens.shape[1]
    every = range(n_pos)
    kept = list(every) if positions is None else indices(positions, n_pos, "position", every, "the tokens")
    find = _direction if reader.kind == "direction" else _neurons if reader.kind == "neuron" else _heads
    place, norm, labels, u, bias = find(model, reader)
    return Reading(place, norm, labels, kept, _through(norm, wide(u), wide(bias)))


Found = tuple[Place, Norm, tuple[str, ...], Tensor, Tensor]
"""Where, the norm there, labels, and what is read of what it hands on: Float[Tensor, "reader d_model"], and biases."""


def _layer(model: LensModel, reader: Reader) -> int:
    n = model.cfg.n_layers
    assert reader.layer is not None
    return indices(reader.layer, n, "layer", range(n), "the model's layers")[0]


def _neurons(model: LensModel, reader: Reader) -> Found:
    layer = _layer(model, reader)
    mlp = None if getattr(model.cfg, "attn_only", False) else getattr(block_of(model, layer), "mlp", None)
    if mlp is None or not isinstance(getattr(mlp, "W_in", None), Tensor):
        raise ValueError(f"layer {layer} has no neurons: " + ("no MLP" if mlp is None else "its MLP is no plain one"))
    gate = getattr(mlp, "W_gate", None)
    if reader.linear and gate is None:
        raise ValueError("linear=True is for gated MLPs: this model's are not")
    if gate is None:
        W, b = mlp.W_in, mlp.b_in
    elif reader.linear:
        W, b = mlp.W_in, getattr(mlp, "b_linear", None)
    else:
        W, b = gate, getattr(mlp, "b_gate", None)
    neurons = _units(reader.units, W.shape[1], "neuron", layer)
    b = W.new_zeros(W.shape[1]) if b is None else b
    suffix = ".linear" if reader.linear else ""
    labels = tuple(f"L{layer}N{n}{suffix}" for n in neurons)
    place = Place(layer, mid=not getattr(model.cfg, "parallel_attn_mlp", False))
    return place, _norm_before(model, layer, "mlp"), labels, W.T[neurons], b[neurons]


def _heads(model: LensModel, reader: Reader) -> Found:
    layer, letter = _layer(model, reader), reader.kind[0]
    if getattr(model.cfg, "positional_embedding_type", None) == "shortformer" and letter != "v":
        raise ValueError("this model's queries and keys read positions beside the stream, so they are no sum over it")
    attn = block_of(model, layer).attn
    # HookedTransformer's W_K repeats the heads of _W_K, which are those it computes if not told otherwise.
    repeats = letter in "kv" and not getattr(model.cfg, "ungroup_grouped_query_attention", False)
    stored = "_" if repeats and getattr(model.cfg, "n_key_value_heads", None) and not is_bridge(model) else ""
    W, b = (getattr(attn, f"{stored}{x}_{letter.upper()}") for x in "Wb")
    heads = _units(reader.units, len(W), "head" if letter == "q" else "key head", layer)
    W, b = wide(W[heads]), wide(b[heads])  # head d_model d_head
    names = [f"L{layer}H{h}.{letter}" for h in heads]
    if (v := reader.vector) is None:
        labels = [f"{name}[{i}]" for name in names for i in range(W.shape[2])]
        u, bias = W.transpose(1, 2), b
    else:
        v = _sized(v, W.shape[2], "d_head").to(W)
        many = v.ndim == 2
        labels = [f"{name}[{i}]" for name in names for i in range(len(v))] if many else names
        u, bias = (v @ W.transpose(1, 2), b @ v.T) if many else ((W @ v)[:, None], (b @ v)[:, None])
    return Place(layer), _norm_before(model, layer, "attn"), tuple(labels), u.flatten(0, 1), bias.flatten()


def _direction(model: LensModel, reader: Reader) -> Found:
    assert reader.vector is not None
    if reader.site == "final":
        place, label = Place(model.cfg.n_layers), "final"
    else:
        layer = _layer(model, reader)
        place, label = Place(layer, mid=reader.site == "resid_mid"), f"L{layer}.{reader.site}"
        if place.mid and (getattr(model.cfg, "parallel_attn_mlp", False) or getattr(model.cfg, "attn_only", False)):
            raise ValueError("this model has no resid_mid: " + "nothing reads between attention and MLP")
    norm = NO_NORM
    if reader.normalised:
        final = reader.site == "final"
        norm = final_norm(model) if final else _norm_before(model, place.layer, "mlp" if place.mid else "attn")
    v = _sized(reader.vector, model.cfg.d_model, "d_model").to(model.unembed.W_U.device)
    labels = (label,) if v.ndim == 1 else tuple(f"{label}[{i}]" for i in range(len(v)))
    v = v.reshape(len(labels), -1).to(torch.promote_types(model.unembed.W_U.dtype, torch.float32))
    return place, norm, labels, v, v.new_zeros(len(v))


def _sized(v: Tensor, d: int, name: str) -> Tensor:
    if v.shape[-1] != d:
        raise ValueError(f"the direction has {v.shape[-1]} numbers, {name} is {d}")
    return v


def _units(units: Places | None, n: int, what: str, layer: int) -> list[int]:
    return list(range(n)) if units is None else indices(units, n, what, range(n), f"layer {layer}'s {what}s")


def _norm_before(model: LensModel, layer: int, part: str) -> Norm:
    """The norm through which attention or the MLP reads the stream.

    Raises:
        ValueError: hooks of the model's own between the stream and what is read.
    """
    name = {"attn": "ln1", "mlp": "ln2"}[part]
    before, block = f"blocks.{layer}.", model.blocks[layer]
    own = [hook.removeprefix(before) for hook in own_hooks(model) if hook.startswith(before)]
    for hook in own:
        inputs = hook.startswith(f"{part}.") and hook.endswith(("_in", "_input"))
        between = hook in (part, name, f"hook_{part}_in") or hook.startswith(f"{name}.") or inputs
        # A Bridge's resid_mid is what the MLP's norm reads, beside the stream.
        between |= part == "mlp" and hook == "hook_resid_mid" and is_bridge(model)
        if between or (part == "attn" and hook.endswith("_input")):
            raise ValueError(
                f"the model carries a hook at {before}{hook}, between the stream and its reader; remove it"
            )
    if normalises_writes_alone(model):
        return NO_NORM
    if is_bridge(model):
        return norm_of_bridge(getattr(block, name))
    return norm_of(getattr(block, name, None), model.cfg.normalization_type, model.cfg.eps)


# ---------------------------------------------------------------------------------------------------------
# Targets


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
