"""What to run: activations of both prompts, the cells in which they differ, the metric read off the final residual."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from ..forward import unembed
from ..metrics import Metric
from ..pairs import PromptPairs
from .sites import DIRECTIONS, SITES

MetricLike = Metric | Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Cells:
    """Cells to run, as aligned vectors. `start` is the first position a cell changes; `pos` is -1 for all of them."""

    prompt: Int[Tensor, " cell"]
    layer: Int[Tensor, " cell"]
    unit: Int[Tensor, " cell"]
    pos: Int[Tensor, " cell"]
    start: Int[Tensor, " cell"]

    def __len__(self) -> int:
        return len(self.prompt)

    def __getitem__(self, rows) -> Cells:
        return Cells(*(getattr(self, name)[rows] for name in ("prompt", "layer", "unit", "pos", "start")))


def concatenated(parts: Sequence[Cells]) -> Cells:
    names = ("prompt", "layer", "unit", "pos", "start")
    return Cells(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


@dataclass(frozen=True)
class Request:
    """A checked request: which activations of which layers are patched, and what is read afterwards."""

    site: str
    layers: tuple[int, ...]
    units: tuple[int, ...]
    by_position: bool
    direction: str
    metric: MetricLike
    n_pos: int

    @property
    def unit_axis(self) -> str:
        return SITES[self.site].unit

    @property
    def positional(self) -> bool:
        return self.unit_axis == "pos"

    @property
    def axes(self) -> tuple[str, ...]:
        more = ("pos",) if self.by_position and not self.positional else ()
        return ("prompt", "layer", self.unit_axis, *more)

    def shape(self, n_prompts: int) -> tuple[int, ...]:
        more = (self.n_pos,) if self.by_position and not self.positional else ()
        return (n_prompts, len(self.layers), len(self.units), *more)

    @property
    def reads(self) -> tuple[int, ...]:
        """The positions whose logits the metric reads, in its order."""
        return self.metric.reads(self.n_pos) if isinstance(self.metric, Metric) else tuple(range(self.n_pos))

    @property
    def n_read(self) -> int:
        """Positions up to the last one that the metric reads; causal models need no more."""
        return max(self.reads) + 1

    @property
    def metric_name(self) -> str:
        return self.metric.name if isinstance(self.metric, Metric) else getattr(self.metric, "__name__", "metric")


def checked(model, pairs: PromptPairs, site, metric, direction, layers, units, by_position) -> Request:
    """The request, or a ValueError that says what about it is wrong."""
    cfg = model.cfg
    if site not in SITES:
        raise ValueError(f"unknown site {site!r}; known are {', '.join(SITES)}")
    if direction not in DIRECTIONS:
        raise ValueError(f"unknown direction {direction!r}; known are {', '.join(DIRECTIONS)}")
    if not callable(metric):
        raise ValueError(f"metric {metric!r} is neither a Metric nor a function of the logits")
    n_pos = pairs.clean.shape[1]
    if n_pos > cfg.n_ctx:
        raise ValueError(f"prompts have {n_pos} tokens, the model's context is {cfg.n_ctx}")
    for name in ("clean", "corrupted", "answers"):
        ids = getattr(pairs, name)
        outside = ids[(ids < 0) | (ids >= cfg.d_vocab)]
        if len(outside):
            what = "answer" if name == "answers" else f"{name} token"
            raise ValueError(f"{what} {int(outside[0])} is outside the model's vocabulary of {cfg.d_vocab}")
    if site == "neurons" and layers is None:
        raise ValueError("site 'neurons' needs layers=, for example layers=[-1]: every neuron is a cell")
    if not (layers is None or len(layers)):
        raise ValueError("layers is empty")
    chosen = tuple(range(cfg.n_layers)) if layers is None else tuple(layers)
    for layer in chosen:
        if not -cfg.n_layers <= layer < cfg.n_layers:
            raise ValueError(f"layer {layer} is not there; the model has {cfg.n_layers} layers")
    chosen = tuple(layer % cfg.n_layers for layer in chosen)
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"layers {list(chosen)} name a layer twice")
    hook = f"blocks.{chosen[0]}.{SITES[site].hook}"
    # An attention-only block has a hook point for the MLP it lacks.
    absent = site == "mlp_out" and getattr(model.cfg, "attn_only", False)
    if absent or hook not in model.hook_dict:
        raise ValueError(f"site {site!r} is not in this model: it has no {hook}")
    available = {
        "pos": n_pos,
        "head": getattr(cfg, "n_key_value_heads", None) if site in "kv" else None,
        "neuron": cfg.d_mlp,
    }[SITES[site].unit] or cfg.n_heads
    if units is not None and SITES[site].unit == "pos":
        raise ValueError(f"site {site!r} has positions, neither heads nor neurons to choose from")
    units = tuple(range(available)) if units is None else tuple(units)
    if not units or len(set(units)) < len(units):
        raise ValueError(f"{SITES[site].unit}s {list(units)} are none, or one of them twice")
    for unit in units:
        if not 0 <= unit < available:
            raise ValueError(f"{SITES[site].unit} {unit} is not there; layer has {available}")
    return Request(site, chosen, units, by_position, direction, metric, n_pos)


# ---------------------------------------------------------------------------------------------------------
# Which cells differ


def find_cells(request: Request, differs: Callable[[int], Tensor], pairs: PromptPairs, n_layers: int) -> Cells:
    """The cells in which the prompts differ and on which something that the metric reads depends.

    Args:
        differs: layer -> where the site differs, up to the last position read: Bool[Tensor, "prompt pos"] for
            positional sites, else Bool[Tensor, "prompt pos unit"] for the units asked for.
    """
    n_pos, device = request.n_read, pairs.clean.device
    # Before the first different token causal models agree, whatever rounding says.
    after = torch.arange(n_pos, device=device) >= pairs.first_difference[:, None]
    read = torch.zeros(n_pos, dtype=torch.bool, device=device)
    read[list(request.reads)] = True
    parts = []
    for layer in request.layers:
        where = differs(layer)
        where = (where[..., None] if request.positional else where) & after[..., None]
        if layer == 0 and request.site in ("resid_pre", "q", "k", "v"):
            # Row by row the same function of the same token.
            where = where & pairs.differ[:, :n_pos, None]
        if layer == n_layers - 1 and request.site not in ("resid_pre", "k", "v"):
            where = where & read[:, None]  # nothing above it carries a change to other positions
        if request.positional or request.by_position:
            prompt, pos, unit = where.nonzero(as_tuple=True)
            start, unit = pos, pos if request.positional else unit
        else:
            prompt, unit = where.any(1).nonzero(as_tuple=True)
            start = where.int().argmax(1)[prompt, unit]
            pos = torch.full_like(start, -1)
        parts.append(Cells(prompt, torch.full_like(start, layer), unit, pos, start))
    return concatenated(parts)


# ---------------------------------------------------------------------------------------------------------
# The metric


class Tally:
    """Counts floating-point operations."""

    def __init__(self):
        self.flops = 0.0

    def linear(self, rows: int, n_in: int, n_out: int) -> None:
        self.flops += 2.0 * rows * n_in * n_out


def read_metric(
    model, request: Request, pairs: PromptPairs, final: Tensor, prompt: Tensor, tally: Tally | None = None, norm=None
) -> Tensor:
    """The metric of final residual streams [row, read position, d_model] of the prompts named, one number a row.

    Raises:
        ValueError: the metric's value has the wrong shape or is not finite.
    """
    metric = request.metric
    n_rows, n_reads = final.shape[:2]
    cfg = model.cfg
    if not isinstance(metric, Metric):
        logits = unembed(model, final, norm=norm)
        if tally:
            tally.linear(n_rows * n_reads, cfg.d_model, cfg.d_vocab)
        return _valid(metric(logits), n_rows, request)
    columns = metric.columns(pairs)
    width = cfg.d_vocab if columns is None else columns.shape[1]
    if tally:
        tally.linear(n_rows * n_reads, cfg.d_model, width)
    # Logits, or gathered columns of W_U, of at most 2^26 numbers at a time.
    step = max(1, 2**26 // (n_reads * width * (1 if columns is None else cfg.d_model)))
    values = []
    for i in range(0, n_rows, step):
        p = prompt[i : i + step]
        tokens = None if columns is None else columns[p][:, None].expand(-1, n_reads, -1)
        logits = unembed(model, final[i : i + step], tokens, norm=norm)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        values.append(_valid(metric.function(logits, *(c[p] for c in metric.context)), len(p), request))
    return torch.cat(values)


def _valid(value, n_rows: int, request: Request) -> Tensor:
    if not isinstance(value, Tensor) or tuple(value.shape) != (n_rows,):
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"metric {request.metric_name} returned {got}, wanted is one number per prompt, [{n_rows}]")
    value = value.to(torch.promote_types(value.dtype, torch.float32))
    if not torch.isfinite(value.detach()).all():
        bad = int((~torch.isfinite(value.detach())).nonzero()[0])
        raise ValueError(f"metric {request.metric_name} is {value[bad].item()} for prompt {bad}, it must be finite")
    return value


def memory_budget(model, max_memory: int | None) -> int:
    """Bytes that patching may use beyond the model: what was asked for, else a part of what the device has free.

    Raises:
        ValueError: max_memory is not positive.
    """
    if max_memory is not None:
        if max_memory <= 0:
            raise ValueError(f"max_memory is {max_memory} bytes, it must be positive")
        return int(max_memory)
    device = torch.device(model.cfg.device)
    if device.type == "cuda":
        return int(0.6 * torch.cuda.mem_get_info(device)[0])
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        free = 4 * 2**30
    return int(min(free / 2, 4 * 2**30))
