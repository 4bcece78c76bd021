"""What runs cost in floating-point operations: what a cell's exact run will cost at most, and what anything did cost.

Products of matrices are counted, attention's among them, as everywhere in this package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..lens import LensModel
from ..pairs import PromptPairs
from ..weights import Weights
from .cells import Request, may_matter, tokens_differ
from .sites import Site

Result = TypeVar("Result")


@dataclass(frozen=True)
class Block:
    """What one row of the residual stream costs in a block, part by part."""

    attention: float
    of_kv: float
    of_z: float  # W_O; W_Q costs as much
    mlp: float

    @classmethod
    def of(cls, model: LensModel, n_keys: int) -> Block:
        """Of a row that sees so many keys."""
        cfg = model.cfg
        d_attn = cfg.n_heads * cfg.d_head
        d_keys = (getattr(cfg, "n_key_value_heads", None) or cfg.n_heads) * cfg.d_head
        products = 3 if getattr(cfg, "gated_mlp", False) else 2
        d_mlp = 0 if getattr(cfg, "attn_only", False) else products * (cfg.d_mlp or 0)
        of_kv, of_z, mlp = (2.0 * cfg.d_model * width for width in (2 * d_keys, d_attn, d_mlp))
        return cls(4.0 * d_attn * n_keys, of_kv, of_z, mlp)

    @property
    def whole(self) -> float:
        return self.attention + self.of_kv + 2 * self.of_z + self.mlp


def forward_flops(model: LensModel, n_pos: int) -> float:
    """Running the whole model on one prompt, all logits included: what is called a forward."""
    cfg = model.cfg
    return n_pos * (cfg.n_layers * Block.of(model, n_pos).whole + 2.0 * cfg.d_model * cfg.d_vocab)


def read_flops(model: LensModel, request: Request, pairs: PromptPairs) -> float:
    """The logits that the metric reads of one prompt."""
    columns = request.metric.columns(pairs)
    width = model.cfg.d_vocab if columns is None else columns.shape[1]
    return 2.0 * len(request.reads) * model.cfg.d_model * width


def rest_flops(model: LensModel, request: Request, layer: Tensor, start: Tensor) -> Tensor:
    """The blocks from each layer on, of rows changed from `start` on; in the last one, of those that are read."""
    block, last = Block.of(model, request.n_read), model.cfg.n_layers - 1
    rows = (request.n_read - start).double()
    read = (start[..., None] <= torch.tensor(sorted(set(request.reads)))).sum(-1)
    of_last = rows * block.of_kv + read * (block.whole - block.of_kv)
    return torch.where(layer <= last, (last - layer).clamp(min=0) * rows * block.whole + of_last, 0.0)


def cell_prices(
    model: LensModel, request: Request, pairs: PromptPairs, weights: Weights | None
) -> Float[Tensor, "prompt layer *cell"]:
    """What running each cell costs at most; 0 where the prompts are known to agree or nothing depends on the cell.

    Args:
        weights: None: through hooks, whole blocks at all positions.
    """
    row, n_read = request.row, request.n_read
    possible = may_matter(request, tokens_differ(weights, pairs), model.cfg.n_layers).transpose(0, 1)
    layer, start = torch.tensor(request.layers)[:, None], torch.arange(n_read)
    if weights is None:
        # The base run's residual stream enters the layer, whatever of it is overwritten there.
        flops = (model.cfg.n_layers - layer) * n_read * Block.of(model, n_read).whole + 0.0 * start
    elif row.spreads:
        flops = rest_flops(model, request, layer, start)
    else:
        flops = rest_flops(model, request, layer + 1, start) + _written(model, request, row, start)
    flops = torch.where(possible, flops + read_flops(model, request, pairs), 0.0)  # [prompt, layer, start]
    if not (row.positional or request.by_position):
        # The first position at which anything can differ.
        first = possible.int().argmax(-1, keepdim=True)
        return flops.gather(-1, first).expand(request.shape(len(pairs))).contiguous()
    flops = torch.nn.functional.pad(flops, (0, request.n_pos - n_read))
    return flops if row.positional else flops[:, :, None].expand(request.shape(len(pairs))).contiguous()


def _written(model: LensModel, request: Request, row: Site, start: Tensor) -> Tensor:
    """What a cell costs in its own layer, where attention there does not carry it on: W_O and the MLP."""
    block = Block.of(model, request.n_read)
    rows = torch.ones_like(start) if row.positional or request.by_position else request.n_read - start
    return rows * (block.of_z + block.mlp)


def runs_flops(model: LensModel, request: Request, pairs: PromptPairs, weights: Weights | None) -> float:
    """What activation patching costs before any cell: the two runs, and what a site needs of them as a whole."""
    block, n, n_layers = Block.of(model, request.n_read), request.n_read, model.cfg.n_layers
    flops = 2 * (n * n_layers * block.whole + read_flops(model, request, pairs)) * len(pairs)
    if weights is None:
        return flops + 2 * forward_flops(model, request.n_pos)  # is the first prompt's run the same twice?
    if request.row.unit == "head":  # patterns compared, or z of other queries, keys or values
        flops += 2 * len(pairs) * len(request.layers) * n * block.attention
    return flops


# ---------------------------------------------------------------------------------------------------------
# Counting


def _attention(q, k, *args, **others) -> int:
    return 4 * q[:3].numel() * q[3] * k[2]


def _attention_backward(grad, q, k, *args, **others) -> int:
    return 10 * q[:3].numel() * q[3] * k[2]


def counted(work: Callable[..., Result], *args: Any, **options: Any) -> tuple[Result, float]:
    """A function's result, and the floating-point operations it took."""
    from torch.utils.flop_counter import FlopCounterMode

    # torch's own count knows no fused attention of the CPU, and none of grouped heads.
    kinds = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
    names = [f"_scaled_dot_product_{kind}{end}" for kind in kinds for end in ("", "_backward")]
    fused = {
        getattr(torch.ops.aten, name): _attention_backward if name.endswith("_backward") else _attention
        for name in names
        if hasattr(torch.ops.aten, name)
    }
    with FlopCounterMode(display=False, custom_mapping=fused) as counter:
        result = work(*args, **options)
    return result, float(counter.get_total_flops())
