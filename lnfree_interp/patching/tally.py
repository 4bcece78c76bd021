"""What is computed, counted."""

from __future__ import annotations

from collections.abc import Sequence

from ..products import Linear
from ..weights import Layer


class Tally:
    """Counts floating-point operations."""

    def __init__(self):
        self.flops = 0.0

    def linear(self, rows: int, n_in: int, n_out: int) -> None:
        self.flops += 2.0 * rows * n_in * n_out

    def products(self, rows: int, linears: Sequence[Linear]) -> None:
        self.flops += 2.0 * rows * sum(W.numel() for W, _ in linears)

    def block(self, layer: Layer, rows: int, keys: int, *, of_q: int | None = None, of_kv: int | None = None) -> None:
        """A block of so many rows that see so many keys; of_q, of_kv: where queries, keys, values of others are new."""
        self.products(rows if of_q is None else of_q, layer.of_qkv[:1])
        self.products(rows if of_kv is None else of_kv, layer.of_qkv[1:])
        self.attention(layer, rows, keys)
        self.products(rows, layer.of_attn_out)
        self.mlp(layer, rows)

    def attention(self, layer: Layer, rows: int, keys: int) -> None:
        self.flops += 4.0 * rows * len(layer.W_O) * keys

    def mlp(self, layer: Layer, rows: int) -> None:
        if layer.W_in is not None:
            self.products(rows, (*layer.of_hidden, *layer.of_mlp_out))
