"""Who writes into the residual stream of a model, who reads from it, and who comes before whom."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from ...lens import LensModel
from ...weights import normalises_writes

ATTENTION = ("q", "k", "v")

Edges = Tensor | np.ndarray | Sequence[Sequence[str]]
"""(sender, receiver) labels, or Bool[Tensor, "sender receiver"] of all."""


@dataclass(frozen=True)
class Wiring:
    """Senders and receivers of a model, in the order of its forward pass.

    Senders are "embed" (the token and its position: all that enters the first block), then of each layer the heads
    "L2H3" and the MLP "L2.mlp". Where a norm comes after attention, so that no head writes on its own, all of it
    is one sender, "L2.attn". Receivers are of each layer "L2H3.q" of each head, "L2H3.k" and "L2H3.v" of each head of
    keys and values, and "L2.mlp"; last "logits". An edge goes from a sender to each receiver after it.
    """

    n_layers: int
    n_heads: int
    n_keys: int
    by_head: bool
    has_mlp: bool
    parallel: bool  # the MLP reads what attention reads

    @property
    def n_attention(self) -> int:
        """How many senders attention is in a layer."""
        return self.n_heads if self.by_head else 1

    def attention(self, layer: int) -> slice:
        """A layer's heads among the senders, or its attention."""
        first = self.before(layer, "q")
        return slice(first, first + self.n_attention)

    def mlp(self, layer: int) -> int:
        """A layer's MLP among the senders."""
        return self.attention(layer).stop

    def before(self, layer: int, kind: str) -> int:
        """How many senders come before a kind of receiver of a layer (the logits': of layer n_layers)."""
        writers = 1 + layer * (self.n_attention + self.has_mlp)
        return writers + self.n_attention if kind == "mlp" and not self.parallel else writers

    def readers(self, layer: int) -> dict[str, slice]:
        """Kind -> a layer's receivers of it; "logits" of layer n_layers."""
        sizes = {"q": self.n_heads, "k": self.n_keys, "v": self.n_keys} | ({"mlp": 1} if self.has_mlp else {})
        first = layer * sum(sizes.values())
        if layer == self.n_layers:
            return {"logits": slice(first, first + 1)}
        found = {}
        for kind, n in sizes.items():
            found[kind] = slice(first, first + n)
            first += n
        return found

    @cached_property
    def groups(self) -> tuple[tuple[int, str, slice, int], ...]:
        """(layer, kind, its receivers, how many senders come before them) of all receivers, in order."""
        return tuple(
            (i, kind, which, self.before(i, kind))
            for i in range(self.n_layers + 1)
            for kind, which in self.readers(i).items()
        )

    @cached_property
    def senders(self) -> tuple[str, ...]:
        labels = ["embed"]
        for i in range(self.n_layers):
            labels += [f"L{i}H{h}" for h in range(self.n_heads)] if self.by_head else [f"L{i}.attn"]
            labels += [f"L{i}.mlp"] * self.has_mlp
        return tuple(labels)

    @cached_property
    def sent(self) -> tuple[tuple[str, int, int | None], ...]:
        """(name of the activation, layer, head or None) that each sender writes."""
        found: list[tuple[str, int, int | None]] = [("resid_pre", 0, None)]
        for i in range(self.n_layers):
            found += [("z", i, h) for h in range(self.n_heads)] if self.by_head else [("attn_out", i, None)]
            found += [("mlp_out", i, None)] * self.has_mlp
        return tuple(found)

    @cached_property
    def receivers(self) -> tuple[str, ...]:
        labels: list[str] = []
        for i, kind, which, _ in self.groups:
            heads = range(which.stop - which.start)
            labels += [f"L{i}H{h}.{kind}" for h in heads] if kind in ATTENTION else [f"L{i}.mlp"]
        return (*labels[:-1], "logits")

    @cached_property
    def edges(self) -> Bool[Tensor, "sender receiver"]:
        """Where there is one."""
        there = torch.zeros(len(self.senders), len(self.receivers), dtype=torch.bool)
        for _, _, which, before in self.groups:
            there[:before, which] = True
        return there

    def chosen(self, edges: Edges | None) -> Bool[Tensor, "sender receiver"]:
        """The edges that are named; None: all.

        Raises:
            ValueError: a sender or receiver that is not there, a sender that does not come before its receiver, a mask
                of another shape, no edge at all.
        """
        if edges is None:
            return self.edges
        if isinstance(edges, np.ndarray) and edges.dtype == bool:
            edges = torch.from_numpy(edges)
        mask = self._mask(edges) if isinstance(edges, Tensor) else self._of_labels(edges)
        wrong = (mask & ~self.edges).nonzero().tolist()
        if wrong:
            sender, receiver = self.senders[wrong[0][0]], self.receivers[wrong[0][1]]
            raise ValueError(
                f"sender {sender!r} does not write before receiver {receiver!r} reads: there is no such edge"
            )
        if not mask.any():
            raise ValueError("edges names no edge at all")
        return mask

    def _mask(self, edges: Tensor) -> Bool[Tensor, "sender receiver"]:
        shape = tuple(self.edges.shape)
        if edges.dtype != torch.bool or tuple(edges.shape) != shape:
            got = f"{edges.dtype} {list(edges.shape)}"
            raise ValueError(f"edges is a tensor of {got}, a mask is torch.bool {list(shape)} [sender, receiver]")
        return edges.cpu()

    def _of_labels(self, edges: Any) -> Bool[Tensor, "sender receiver"]:
        mask = torch.zeros_like(self.edges)
        try:
            labels = [(sender, receiver) for sender, receiver in edges]
        except (TypeError, ValueError):
            raise ValueError("edges must be (sender, receiver) pairs of labels, or a mask [sender, receiver]") from None
        for sender, receiver in labels:
            mask[self.sender(sender), self.receiver(receiver)] = True
        return mask

    def sender(self, label: str) -> int:
        """Where a sender is."""
        if label in self.senders:
            return self.senders.index(label)
        if not self.by_head and re.fullmatch(r"L\d+H\d+", str(label)):
            whole = str(label).split("H")[0] + ".attn"
            raise ValueError(
                f"sender {label!r}: this model normalises what attention writes, take all of it: {whole!r}"
            )
        raise ValueError(f"unknown sender {label!r}; known are {self._shown(self.senders)}")

    def receiver(self, label: str) -> int:
        """Where a receiver is."""
        if label in self.receivers:
            return self.receivers.index(label)
        raise ValueError(f"unknown receiver {label!r}; known are {self._shown(self.receivers)}")

    def _shown(self, labels: Sequence[str]) -> str:
        return ", ".join(labels) if len(labels) <= 8 else f"{labels[0]}, {labels[1]}, ... {labels[-2]}, {labels[-1]}"


def wiring_of(model: LensModel) -> Wiring:
    """A model's wiring."""
    cfg = model.cfg
    grouped = not getattr(cfg, "ungroup_grouped_query_attention", False)
    return Wiring(
        n_layers=cfg.n_layers,
        n_heads=cfg.n_heads,
        n_keys=(getattr(cfg, "n_key_value_heads", None) if grouped else None) or cfg.n_heads,
        by_head=not normalises_writes(model),
        has_mlp=not getattr(cfg, "attn_only", False),
        parallel=bool(getattr(cfg, "parallel_attn_mlp", False)),
    )
