"""What each estimate makes of edges."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ...products import products
from ..estimates import AtPStar, Estimate, Gradient, Integrated, RelP, SecondOrder
from ..sides import explicit_attention, gradients
from .streams import FINAL, Watched, brought_back, stream_hook
from .terms import EdgeCase, blocks, contracted, first_order, gradients_at, pieces
from .wiring import ATTENTION

Found = tuple[Tensor, Tensor | None]
"""Effects [prompt, sender, receiver], and their reliability where an estimate tells."""


def of_gradient(case: EdgeCase, estimate: Estimate) -> Found:
    return first_order(case, gradients(case.sides.value, case.nodes)), None


# ---------------------------------------------------------------------------------------------------------
# Along the change of the prompts


def of_integrated(case: EdgeCase, estimate: Integrated) -> Found:
    parts = []
    for step in range(estimate.steps):
        resid = torch.lerp(case.entering["base"], case.entering["source"], (step + 0.5) / estimate.steps)
        there, value = _run_from(case, resid)
        parts.append(first_order(there, gradients(value, there.nodes)) / estimate.steps)
    return torch.stack(parts).sum(0), None


def of_second_order(case: EdgeCase, estimate: SecondOrder) -> Found:
    """g and half of its derivative along the change of what enters, from one product with the Hessian.

    The derivative of a gradient along a change is the gradient of the metric's derivative along it.
    """
    window, along = case.sides.window, case.entering["source"] - case.entering["base"]
    resid = case.entering["base"].clone().requires_grad_()
    case, value = _run_from(case, resid, explicit_attention(window.model.cfg.n_layers, 0))
    grads = gradients(value, {"entering": resid} | case.nodes, create_graph=True)
    streams = list(case.streams.values())
    moving = dict(zip(case.streams, _derivatives(streams, [resid], [along]) if streams else ()))
    second = gradients((grads["entering"] * along).sum((1, 2)), case.nodes)
    first, still = ({name: x.detach() for name, x in xs.items()} for xs in (grads, case.streams))
    case = replace(case, streams=still)

    def receive(layer: int, kind: str, rows: slice, at: slice) -> tuple[Tensor, Tensor]:
        x, here = gradients_at(case, first, layer, kind, rows, at)
        dx, changes = gradients_at(replace(case, streams=moving), second, layer, kind, rows, at)
        if x is None or dx is None:  # gradients at the copies themselves
            one, other = (brought_back(window.weights, layer, kind, None, g) for g in (here, changes))
            return one, other
        inputs = [t.clone().requires_grad_() for t in (x, *here)]
        at_copies = brought_back(window.weights, layer, kind, inputs[0], inputs[1:])
        (derivative,) = _derivatives([at_copies], inputs, [dx, *changes])
        return at_copies.detach(), derivative

    value, curvature = contracted(case, receive)
    return value + curvature / 2, torch.where(curvature == 0, 0.0, curvature.abs() / (2 * value.abs()))


def _derivatives(made: Sequence[Tensor], inputs: Sequence[Tensor], along: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Of what was made of inputs, along changes of them: of the product of the Jacobian with something from the left,
    the derivative by that something."""
    left = [torch.zeros_like(x, requires_grad=True) for x in made]
    pulled = torch.autograd.grad(made, inputs, left, create_graph=True, materialize_grads=True)
    product = torch.stack([(x * d).sum() for x, d in zip(pulled, along)]).sum()
    return torch.autograd.grad(product, left, materialize_grads=True)


def _run_from(case: EdgeCase, resid: Tensor, hooks: dict[str, Callable] | None = None) -> tuple[EdgeCase, Tensor]:
    """The case with receivers watched in a run from what enters the first block, and its metric."""
    window = case.sides.window
    watched = Watched(graph=resid.requires_grad)
    final = window.run(resid=resid, hooks=(hooks or {}) | watched.readers(case.wiring, window.weights))
    return replace(case, nodes=watched.nodes | {FINAL: final}, streams=watched.streams), case.sides.metric(final)


# ---------------------------------------------------------------------------------------------------------
# The softmax computed again


def of_atp_star(case: EdgeCase, estimate: AtPStar) -> Found:
    """For queries and keys, (z if they were of the changed stream - z) . gradient at z; the gradient for the others."""
    grads = gradients(case.sides.value, case.nodes)
    values = first_order(case, grads, skip=("q", "k"))
    cfg, wiring, n_pos = case.sides.window.model.cfg, case.wiring, case.request.n_read
    # Of a layer's senders: streams, what is made of them, and scores.
    per_prompt = wiring.n_attention * n_pos * (8 * cfg.d_model + 2 * cfg.n_heads * n_pos)
    for i in range(wiring.n_layers):
        for kind in ("q", "k"):
            for rows, _ in blocks(len(values), 1, case.room(per_prompt)):
                for senders, found in _by_softmax(case, grads, i, kind, rows):
                    values[rows, senders, wiring.readers(i)[kind]] = found
    return values, None


def _by_softmax(
    case: EdgeCase, grads: Mapping[str, Tensor], i: int, kind: str, rows: slice
) -> Iterator[tuple[slice, Float[Tensor, "prompt sender receiver"]]]:
    """(senders, effects through one kind of receivers of a layer), a layer's senders at a time."""
    window, block = case.sides.window, f"blocks.{i}."
    assert window.weights is not None
    layer, everywhere = window.weights.layers[i], slice(0, case.request.n_read)
    x = case.streams[stream_hook(case.wiring, i, kind)][rows]
    q, k, v, z = (case.nodes[f"{block}attn.hook_{name}"][rows].detach() for name in "qkvz")
    g = grads[block + "attn.hook_z"][rows]
    late = i == case.wiring.n_layers - 1
    queries = torch.arange(case.request.n_read, device=x.device)[window.reads] if late else everywhere
    base = {"q": layer.place_q(q, queries), "k": layer.place_k(k, everywhere), "v": v}
    place = {"q": layer.place_q, "k": layer.place_k}[kind]
    for senders, change in pieces(case, rows, slice(None), False, case.wiring.before(i, kind)):
        stream = (x + change).flatten(0, 1)
        stream = stream[:, window.reads] if late and kind == "q" else stream
        (new,) = products(layer.ln1(stream), layer.of_qkv[ATTENTION.index(kind)])

        # Of each prompt, once for each sender.
        read = {name: x.expand(len(change), *x.shape).flatten(0, 1) for name, x in base.items()}
        read[kind] = place(new, queries if kind == "q" else everywhere)
        patched = layer.attend(read["q"], read["k"], read["v"], queries).unflatten(0, change.shape[:2])
        terms = ((patched - z) * g).sum((2, 4))  # [sender, prompt, head]
        if kind == "k":
            terms = terms.unflatten(2, (case.wiring.n_keys, -1)).sum(3)
        # Computed again, z is the same up to rounding alone: without a change the effect is 0, not that.
        terms = torch.where((change != 0).any((2, 3))[..., None], terms, 0.0)
        yield senders, terms.transpose(0, 1)


EFFECTS: dict[type[Estimate], Callable[[EdgeCase, Any], Found]] = {
    Gradient: of_gradient,
    Integrated: of_integrated,
    SecondOrder: of_second_order,
    AtPStar: of_atp_star,
    RelP: of_gradient,
}
