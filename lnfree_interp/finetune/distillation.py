"""Distillation from the untouched model: a part of the loss is the divergence from its predictions."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from .guard import precision

# Bytes that a piece of the logits may take. Several of that size are in use at a time.
PIECE = 64 * 2**20


class Losses(NamedTuple):
    """Sums over all tokens that are predicted, in nats.

    Attributes:
        mixed: (1 - weight) * ce + weight * kl, the one with a gradient.
        ce: the cross-entropy.
        kl: KL(teacher || model).
        n: how many tokens they are.
    """

    mixed: Float[Tensor, ""]
    ce: Float[Tensor, ""]
    kl: Float[Tensor, ""]
    n: Int[Tensor, ""]


def make_teacher(model: PreTrainedModel) -> PreTrainedModel:
    """A frozen copy of a model as it is now, whole even where the model will be sharded."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def distilled_losses(
    logits: Float[Tensor, "batch pos vocab"],
    labels: Int[Tensor, "batch pos"],
    tokens: Int[Tensor, "batch pos"],
    teacher: PreTrainedModel,
    weight: float | int,
    *,
    dtype: str = "float32",
) -> Losses:
    """Cross-entropy, divergence from the teacher, and their mixture, of the same tokens.

    Its gradient with respect to the logits is softmax - (1 - weight) onehot - weight softmax of the teacher: that of
    a cross-entropy with a soft label. It is made with the losses, position by position, and is all that is kept; the
    teacher's logits are there a piece at a time.

    Args:
        labels: as transformers takes them: the tokens, -100 where none is to be predicted.
        weight: from 0 to 1.
        dtype: "bfloat16" for autocast, as the model itself has it.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=8, n_embd=8, n_layer=1, n_head=2)).eval()
        >>> tokens = torch.arange(8)[None]
        >>> losses = distilled_losses(model(tokens).logits, tokens, tokens, make_teacher(model), 0.5)
        >>> losses.n.item(), bool(losses.kl.abs() < 1e-5), bool(losses.ce > 7)
        (7, True, True)
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=-100).flatten()
    with torch.no_grad(), precision(teacher, dtype):
        hidden = teacher.base_model(input_ids=tokens).last_hidden_state.flatten(0, 1)
    args = (logits.flatten(0, 1), targets, hidden, teacher.get_output_embeddings(), weight, precision(teacher, dtype))
    mixed, ce, kl = _Mixed.apply(*args)
    return Losses(mixed, ce, kl, (targets != -100).sum())


class _Mixed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits, targets, hidden, unembed, weight, autocast):
        wide = torch.promote_types(logits.dtype, torch.float32)
        gradient = torch.empty_like(logits)
        ce = logits.new_zeros((), dtype=wide)
        kl = torch.zeros_like(ce)
        rows = max(1, PIECE // (logits.shape[-1] * wide.itemsize))
        for ours, target, state, slot in zip(
            *(x.split(rows) for x in (logits, targets, hidden, gradient)), strict=True
        ):
            counts = (target != -100)[:, None]
            target = target.clamp(min=0)[:, None]
            ours = ours.to(wide).log_softmax(-1)
            with autocast:
                theirs = unembed(state)
            theirs = theirs.to(wide).log_softmax(-1)
            p = theirs.exp()
            ce -= (ours.gather(-1, target) * counts).sum()
            kl += (theirs.sub_(ours).mul_(p).sum(-1, keepdim=True) * counts).sum()
            soft = ours.exp_().sub_(p, alpha=weight)
            soft.scatter_add_(-1, target, torch.full_like(target, weight - 1, dtype=wide))
            torch.mul(soft, counts, out=slot) if slot.dtype == wide else slot.copy_(soft * counts)
        ctx.save_for_backward(gradient)
        mixed = (1 - weight) * ce + weight * kl
        ctx.mark_non_differentiable(ce, kl)
        return mixed, ce, kl

    @staticmethod
    def backward(ctx: Any, *outer):
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(outer[0]), None, None, None, None, None  # in place: it is as large as the logits
