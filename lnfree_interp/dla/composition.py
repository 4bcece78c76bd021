"""What weights alone say of how one component reads another: composition scores and virtual weights.

A component's write reaches a later one's read through the residual stream, so that the product of the two matrices is
what the one does to the other along the direct path (Elhage et al. 2021, "A Mathematical Framework for Transformer
Circuits"). What stands between them is folded in: a norm's centring and weights into what reads, the weights of a norm
that comes after a block's part into what writes. Without a norm the product is exact; with one it is divided, at each
token, by the norm's scale there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import FactoredMatrix

from ..arguments import as_text, choice, one_of, shown
from ..layers import Layer, Norm, wide
from ..lens import ModelOrName
from ..models import as_model
from ..weights import Weights, weights_alone

# ---------------------------------------------------------------------------------------------------------
# Matrices as the residual stream meets them


def _reads(norm: Norm, W: Float[Tensor, "*heads d_model d"]) -> Float[Tensor, "*heads d_model d"]:
    """W as it reads the stream that the norm takes in."""
    return norm.read(wide(W).mT).mT


def _writes(norm: Norm, W: Float[Tensor, "*heads d d_model"]) -> Float[Tensor, "*heads d d_model"]:
    """W as it adds to the stream what the norm gives out."""
    return norm.written(wide(W))


def _queries(layer: Layer) -> Float[Tensor, "head d_model d_head"]:
    return _reads(layer.ln1, layer.W_Q)


def _of_heads(layer: Layer, W: Float[Tensor, "key_head d_model d_head"]) -> Float[Tensor, "head d_model d_head"]:
    """What the keys or values read, once for each head of queries that uses them."""
    return _reads(layer.ln1, W).repeat_interleave(len(layer.W_Q) // len(W), 0)


def _outputs(layer: Layer) -> Float[Tensor, "head d_head d_model"]:
    return _writes(layer.ln1_post, layer.W_O).unflatten(0, (len(layer.W_Q), -1))


# ---------------------------------------------------------------------------------------------------------
# Composition scores

KINDS = ("Q", "K", "V")


@torch.no_grad()
def composition_scores(model: ModelOrName, kind: str) -> Float[Tensor, "layer head later_layer later_head"]:
    """How much of what a head writes a later head reads: |W_OV W| / (|W_OV| |W|), Frobenius norms.

    W is W_QK of the later head read from the queries' side (kind "Q") or the keys' ("K"), or its W_OV ("V"): Elhage et
    al. 2021, section "Three Kinds of Composition". Random heads score about 1 / sqrt(d_model). Nothing of d_model x
    d_model is made: A B has the norms of R B, A = Q R, so that a pair of heads costs a product of d_head x d_head.

    Norms' weights and centring are part of what reads, their scales cancel; rotary positions are left out (the query
    and the key at one position).

    Args:
        model: a HookedTransformer or TransformerBridge whose weights are read (whatever hooks it carries), or a name.
        kind: "Q", "K" or "V".

    Returns:
        Float[Tensor, "layer head later_layer later_head"], in [0, 1]; 0 where the second is not in a later layer.

    Raises:
        ValueError: an unknown kind, a model whose weights are not read.

    Example:
        >>> from lnfree_interp import composition_scores
        >>> scores = composition_scores("tiny-noLN", "K")
        >>> layer, head = divmod(int(scores[0].amax((1, 2)).argmax()), 4)
        >>> scores.shape, bool(scores[0].max() < 1), bool((scores[7] == 0).all())
        (torch.Size([8, 4, 8, 4]), True, True)
    """
    choice(kind, "kind", KINDS)
    weights = weights_alone(as_model(model))
    n_layers, n_heads = len(weights.layers), len(weights.layers[0].W_Q)
    senders = [_rows(layer) for layer in weights.layers[:-1]]
    scores = wide(weights.W_E).new_zeros(n_layers, n_heads, n_layers, n_heads)
    for j, layer in enumerate(weights.layers[1:], 1):
        receiver = _columns(layer, kind)
        for i, sender in enumerate(senders[:j]):
            both = sender.flatten(0, 1) @ receiver.transpose(0, 1).flatten(1)  # [head d_head, later_head d_head]
            size = both.unflatten(0, sender.shape[:2]).unflatten(-1, (n_heads, -1)).norm(dim=(1, 3))
            whole = sender.norm(dim=(1, 2))[:, None] * receiver.norm(dim=(1, 2))
            scores[i, :, j] = size / whole.clamp(min=torch.finfo(whole.dtype).tiny)  # of a head set to zero: 0
    return scores


def _square(W: Float[Tensor, "head d_model d_head"]) -> Float[Tensor, "head d_head_at_most d_head"]:
    """R of W = Q R: as long as W whatever it is multiplied with on the right."""
    return torch.linalg.qr(W, mode="r").R


def _rows(layer: Layer) -> Float[Tensor, "head d_head_at_most d_model"]:
    """W_OV of each head but for a rotation on its left."""
    outputs = _outputs(layer)
    # The mean over d_model is read by nobody where norms centre: models differ in whether it was taken out.
    return _square(_of_heads(layer, layer.W_V)) @ layer.ln1.centred(outputs)


def _columns(layer: Layer, kind: str) -> Float[Tensor, "head d_model d_head_at_most"]:
    """What a head's queries, keys or values read with all that they are multiplied with, but for a rotation at the
    end."""
    if kind == "V":
        outputs = _outputs(layer)
        outputs = layer.ln1.centred(outputs)
        return _of_heads(layer, layer.W_V) @ _square(outputs.transpose(1, 2)).transpose(1, 2)
    queries = _writes(layer.q_norm, _queries(layer))
    keys = _writes(layer.k_norm, _of_heads(layer, layer.W_K))
    read, other = (queries, keys) if kind == "Q" else (keys, queries)
    return read @ _square(other).transpose(1, 2)


# ---------------------------------------------------------------------------------------------------------
# Virtual weights

_IN_LAYER = {
    "sender": r"L(?P<layer>\d+)(H(?P<head>\d+)|N(?P<neuron>\d+)|\.mlp)",
    "head": r"L(?P<layer>\d+)H(?P<head>\d+)",
    "receiver": r"L(?P<layer>\d+)(H(?P<head>\d+)\.(?P<part>[qkv])|(N(?P<neuron>\d+)|\.mlp)(?P<linear>\.linear)?)",
}


@torch.no_grad()
def virtual_weights(
    model: ModelOrName, sender: str, receiver: str, through: str | Sequence[str] = ()
) -> FactoredMatrix:
    """What a sender adds to a receiver's input along the direct path, or through heads: W_out W_in in two factors.

    Coefficients of the sender (neurons' activations, a head's z, one-hot tokens or positions) @ the virtual weights are
    its part in what the receiver reads (neurons' pre-activations, a query, key or value as its product makes it, the
    logits): exactly without a norm; with one, before the division by its scale at each token. Biases are in none.
    Through a head the path is W_V W_O of it, to be multiplied by the pattern's entry from the position where the sender
    wrote to the one where the receiver reads. (Elhage et al. 2021, "Virtual Weights".)

    Args:
        model: a HookedTransformer or TransformerBridge whose weights are read (whatever hooks it carries), or a name.
        sender: "embed", "pos_embed", "L2.mlp" (all its neurons), "L2N5" (a neuron), "L2H3" (a head).
        receiver: "L4.mlp" (all its neurons' inputs), "L4N5", "L4H1.q", "L4H1.k", "L4H1.v", "logits". The inputs of a
            gated MLP are those of the activation function; "L4.mlp.linear" and "L4N5.linear" are what is gated.
        through: heads in between, from first to last: "L3H0", or a list of such.

    Returns:
        FactoredMatrix [sender's dimension, receiver's dimension]: d_vocab, n_ctx, d_mlp, 1 (a neuron) or d_head; its
        parts are `A` and `B`, the product `AB`, its singular values `S`.

    Raises:
        ValueError: an unknown name, a sender that writes after its receiver has read, a model whose weights
            are not read.

    Example:
        >>> from lnfree_interp import virtual_weights
        >>> weights = virtual_weights("tiny-noLN", "L1.mlp", "L3N7")
        >>> weights.shape, weights.AB[:, 0].abs().argmax().item() < 512
        (torch.Size([512, 1]), True)
        >>> virtual_weights("tiny-noLN", "embed", "L2H1.q", through="L0H3").mdim
        32
    """
    weights = weights_alone(as_model(model))
    several = (
        [through] if isinstance(through, str) else one_of(through, "through", Sequence, "a label or a list of such")
    )
    names = [as_text(name, "through") for name in several]
    written, W_out = _sender(weights, sender)
    heads = [_head(weights, name) for name in names]
    read, W_in = _receiver(weights, receiver)
    path, whens = [sender, *names, receiver], [written, *(when for when, _, _ in heads), read]
    for name, later, first, second in zip(path, path[1:], whens, whens[1:]):
        if first >= second:
            raise ValueError(f"{name} writes after {later} has read: nothing of it gets there")
    left, right = None, W_out
    for _, W_V, W_O in heads:
        narrow = right @ W_V  # as wide as a head
        left, right = narrow if left is None else left @ narrow, W_O
    return FactoredMatrix(right, W_in) if left is None else FactoredMatrix(left, right @ W_in)


# A component's name -> when in the forward pass it reads and writes (attention 0, MLP 1, attention 2, ...), and the
# matrices it does it with.


def _sender(weights: Weights, name: str) -> tuple[int, Float[Tensor, "sender d_model"]]:
    if name == "embed":
        return -1, _writes(weights.ln_embed, weights.W_E)
    if name == "pos_embed" and weights.W_pos is not None:
        return -1, wide(weights.W_pos)
    layer, when, found = _component(weights, name, "sender")
    if "head" in found:
        return when, _outputs(layer)[int(found["head"])]
    assert layer.W_out is not None
    return when, _writes(layer.ln2_post, layer.W_out[_neurons(found)])


def _head(weights: Weights, name: str) -> tuple[int, Float[Tensor, "d_model d_head"], Float[Tensor, "d_head d_model"]]:
    layer, when, found = _component(weights, name, "head")
    head = int(found["head"])
    return when, _of_heads(layer, layer.W_V)[head], _outputs(layer)[head]


def _receiver(weights: Weights, name: str) -> tuple[int, Float[Tensor, "d_model receiver"]]:
    if name == "logits":
        return 2 * len(weights.layers), _reads(weights.ln_final, weights.W_U)
    layer, when, found = _component(weights, name, "receiver")
    if "head" in found:
        W = {"q": layer.W_Q, "k": layer.W_K, "v": layer.W_V}[found["part"]]
        return when, _of_heads(layer, W)[int(found["head"])]
    hidden = layer.W_in if layer.W_gate is None or "linear" in found else layer.W_gate
    assert hidden is not None
    return when, _reads(layer.ln2, hidden[:, _neurons(found)])


def _neurons(found: dict[str, str]) -> slice:
    return slice(int(found["neuron"]), int(found["neuron"]) + 1) if "neuron" in found else slice(None)


def _component(weights: Weights, name: str, what: str) -> tuple[Layer, int, dict[str, str]]:
    """The layer of a head, a neuron or an MLP, when it reads and writes, and the parts of its name.

    Raises:
        ValueError: there is none of this name.
    """
    match = re.fullmatch(_IN_LAYER[what], name) if isinstance(name, str) else None
    found = {} if match is None else {part: text for part, text in match.groupdict().items() if text is not None}
    if found and int(found["layer"]) < len(weights.layers):
        layer, when = weights.layers[int(found["layer"])], 2 * int(found["layer"])
        n_neurons = 0 if layer.W_in is None else layer.W_in.shape[1]
        if "head" in found and int(found["head"]) < len(layer.W_Q):
            return layer, when, found
        gated = layer.W_gate is not None
        if "head" not in found and int(found.get("neuron", 0)) < n_neurons and (gated or "linear" not in found):
            return layer, when + (not layer.parallel), found
    raise ValueError(f"{what} {shown(name)} is unknown; allowed are {', '.join(_allowed(weights, what))}")


def _allowed(weights: Weights, what: str) -> list[str]:
    """The names there are, in short."""
    last, layer = len(weights.layers) - 1, weights.layers[0]
    heads = f"L0H0 to L{last}H{len(layer.W_Q) - 1}"
    if what == "head":
        return [heads]
    mlps = [] if layer.W_in is None else [f"L0N0 to L{last}N{layer.W_in.shape[1] - 1}", f"L0.mlp to L{last}.mlp"]
    if what == "sender":
        return ["embed", *["pos_embed"] * (weights.W_pos is not None), heads, *mlps]
    return [f"{heads} with .q, .k or .v", *mlps, *["these two with .linear"] * (layer.W_gate is not None), "logits"]
