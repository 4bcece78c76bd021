"""What runs cost in floating-point operations: what a cell's exact run will cost at most, and what anything did cost.

Products of matrices are counted, attention's among them, as everywhere in this package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

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
    flops = 2 * len(pairs) * read_flops(model, request, pairs)
    if weights is None:
        # And the first prompt's run, twice: is it the same?
        return flops + 2 * len(pairs) * n * n_layers * block.whole + 2 * forward_flops(model, request.n_pos)
    # The other run begins where the prompts differ.
    rows = len(pairs) * n + int((tokens_differ(weights, pairs)[:, :n].cumsum(1) > 0).sum())
    flops += rows * n_layers * block.whole
    if request.row.unit == "head":  # patterns compared, or z of other queries, keys or values
        flops += 2 * len(pairs) * len(request.layers) * n * block.attention
    return flops


# ---------------------------------------------------------------------------------------------------------
# Counting


def _attention(q: Tensor, k: Tensor, *args: Any, **others: Any) -> int:
    return 4 * q.numel() * k.shape[2]


def _attention_backward(grad: Tensor, q: Tensor, k: Tensor, *args: Any, **others: Any) -> int:
    return 10 * q.numel() * k.shape[2]


@cache
def _counts() -> dict[Any, Callable[..., int]]:
    """Operation -> its count: torch's own, which knows no fused attention of the CPU and none of grouped heads."""
    from torch.utils.flop_counter import flop_registry

    kinds = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
    ends = {"": _attention, "_backward": _attention_backward}
    fused = {f"_scaled_dot_product_{kind}{end}": count for kind in kinds for end, count in ends.items()}
    return flop_registry | {getattr(torch.ops.aten, n): c for n, c in fused.items() if hasattr(torch.ops.aten, n)}


class _Counter(TorchDispatchMode):
    """Watches every operation: torch's FlopCounterMode without its account by module, and many times faster."""

    def __init__(self):
        super().__init__()
        self.flops, self.counts = 0, _counts()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        count = self.counts.get(operation._overloadpacket)
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        return result


def counted(work: Callable[..., Result], *args: Any, **options: Any) -> tuple[Result, float]:
    """A function's result, and the floating-point operations it took."""
    with _Counter() as counter:
        result = work(*args, **options)
    return result, float(counter.flops)
