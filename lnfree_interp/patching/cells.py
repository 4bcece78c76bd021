"""What to run: the checked request, the cells in which the prompts differ, and what that may cost."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from .. import metrics
from ..arguments import choice, number, shown, switch
from ..batching import Places, check_pads, d_vocab_out, indices
from ..lens import LensModel
from ..metrics import Metric
from ..pairs import PromptPairs
from ..weights import Weights, own_hooks
from .sites import DIRECTIONS, METRICS, SITES, Site

MetricLike = Metric | Callable[[Tensor], Tensor] | str
"""A metric or the name of one ("logit_diff", "right_log_prob", "kl_from_clean"), or a function of full logits
[row, pos, d_vocab] that returns [row]: see `Metric`."""

PairsLike = PromptPairs | Sequence[Any]


@dataclass(frozen=True)
class Cells:
    """Cells to run, as aligned vectors. They stay on the CPU, so that what to run is planned without waiting for the
    device. `unit` is the position, head or neuron; `start` the first position a cell changes; `pos` is -1 for all of
    them."""

    prompt: Int[Tensor, " cell"]
    layer: Int[Tensor, " cell"]
    unit: Int[Tensor, " cell"]
    pos: Int[Tensor, " cell"]
    start: Int[Tensor, " cell"]

    def __len__(self) -> int:
        return len(self.prompt)

    def __getitem__(self, rows) -> Cells:
        return Cells(*(vector[rows] for vector in self._vectors()))

    def to(self, device) -> Cells:
        return Cells(*on_device(torch.stack(self._vectors()), device).unbind())

    def _vectors(self) -> list[Tensor]:
        return [self.prompt, self.layer, self.unit, self.pos, self.start]


def on_device(x: Tensor, device) -> Tensor:
    """A tensor of the CPU on a device, without waiting for what the device is at."""
    x = x.pin_memory() if torch.device(device).type == "cuda" else x
    return x.to(device, non_blocking=True)


@dataclass(frozen=True)
class Request:
    """A checked request: which activations of which layers are patched, and what is read afterwards."""

    site: str
    layers: tuple[int, ...]
    units: tuple[int, ...]
    by_position: bool
    direction: str
    metric: Metric
    n_pos: int
    causal: bool  # whether a position is known to depend on itself and on earlier ones alone

    @property
    def row(self) -> Site:
        """The site's row of the table."""
        return SITES[self.site]

    @property
    def positional(self) -> bool:
        return self.row.positional

    @property
    def axes(self) -> tuple[str, ...]:
        more = ("pos",) if self.by_position and not self.positional else ()
        return ("prompt", "layer", self.row.unit, *more)

    def shape(self, n_prompts: int) -> tuple[int, ...]:
        more = (self.n_pos,) if self.by_position and not self.positional else ()
        return (n_prompts, len(self.layers), len(self.units), *more)

    def place(self, cells: Cells) -> Int[Tensor, " cell"]:
        """Where cells are in values of `shape`, flattened."""
        place = cells.prompt
        for names, vector in ((self.layers, cells.layer), (self.units, cells.unit)):
            slot = torch.zeros(max(names) + 1, dtype=torch.long)
            slot[list(names)] = torch.arange(len(names))
            place = place * len(names) + slot[vector]
        return place * self.n_pos + cells.pos if self.by_position and not self.positional else place

    def of_units(self, x: Tensor, axis: int) -> Tensor:
        """The heads or neurons asked for, of all of them along an axis."""
        if self.units == tuple(range(x.shape[axis])):
            return x
        return x.index_select(axis, on_device(torch.tensor(self.units), x.device))

    def by_place(self, x: Tensor, reduce: Callable[[Tensor, tuple[int, ...]], Tensor]) -> Tensor:
        """[prompt, pos], or [prompt, pos, unit] of the units asked for, of a whole activation of the site.

        Args:
            reduce: makes one number of those along the axes that it is told.
        """
        row = self.row
        x = x if row.positional else self.of_units(x, row.unit_axis)
        x = reduce(x, row.inner_axes) if row.inner_axes else x
        return x.movedim(row.pos_axis, 1)

    def index(self, cells: Cells) -> tuple[Any, ...]:
        """Where the site's activation is overwritten for cells, one in each of its rows."""
        rows = torch.arange(len(cells), device=cells.unit.device)
        at = {"prompt": rows, "pos": cells.pos if self.by_position else slice(None), self.row.unit: cells.unit}
        return tuple(at.get(axis, slice(None)) for axis in self.row.axes)

    @property
    def reads(self) -> tuple[int, ...]:
        """The positions whose logits the metric reads, in its order."""
        return self.metric.reads(self.n_pos)

    @property
    def n_read(self) -> int:
        """Positions up to the last one that the metric reads; causal models need no more."""
        return max(self.reads) + 1 if self.causal else self.n_pos

    def of_prompts(self, rows: slice, device) -> Request:
        """The request with what the metric knows of each prompt cut to some of them."""
        metric = self.metric
        tokens = metric.tokens[rows].to(device) if isinstance(metric.tokens, Tensor) else metric.tokens
        context = tuple(c[rows].to(device) for c in metric.context)
        return replace(self, metric=replace(metric, tokens=tokens, context=context))


def checked(model: LensModel, pairs: PromptPairs, site, metric, direction, layers, units, by_position) -> Request:
    """The request, or a ValueError that says what about it is wrong. The pairs are on the CPU."""
    cfg = model.cfg
    choice(site, "site", SITES)
    choice(direction, "direction", DIRECTIONS)
    switch(by_position, "by_position")
    if isinstance(metric, str):
        metric = METRICS[choice(metric, "metric", METRICS)](metrics, model, pairs)
    if not isinstance(metric, Metric):
        if not callable(metric):
            raise ValueError(f"metric {shown(metric)} is neither a Metric nor a function of the logits")
        metric = Metric(getattr(metric, "__name__", "metric"), metric, positions=None, tokens=None)
    metric.check(pairs)
    n_pos = pairs.clean.shape[1]
    if n_pos > cfg.n_ctx:
        raise ValueError(f"prompts have {n_pos} tokens, the model's context is {cfg.n_ctx}")
    for name in ("clean", "corrupted", "answers"):
        what, d_vocab = ("answer", d_vocab_out(cfg)) if name == "answers" else (f"{name} token", cfg.d_vocab)
        ids = getattr(pairs, name)
        outside = ids[(ids < 0) | (ids >= d_vocab)]
        if len(outside):
            raise ValueError(f"{what} {int(outside[0])} is outside the model's vocabulary of {d_vocab}")
    for prompts in (pairs.clean, pairs.corrupted):
        check_pads(model, prompts)
    row = SITES[site]
    if row.unit == "neuron" and layers is None:
        raise ValueError(f"site {site!r} needs layers=, for example layers=[-1]: every neuron is a cell")
    layers = _named("layers", layers, cfg.n_layers, "layer", "the model's layers")
    hook = row.name(layers[0])
    # An attention-only block has a hook point for the MLP it lacks.
    absent = row.of_mlp and getattr(cfg, "attn_only", False)
    if absent or hook not in model.hook_dict:
        raise ValueError(f"site {site!r} is not in this model: it has no {hook}")
    grouped = row.of_keys and not getattr(cfg, "ungroup_grouped_query_attention", False)
    available = {
        "pos": n_pos,
        "head": getattr(cfg, "n_key_value_heads", None) if grouped else None,
        "neuron": cfg.d_mlp,
    }[row.unit] or cfg.n_heads
    if units is not None and row.positional:
        raise ValueError(f"units: site {site!r} has positions, neither heads nor neurons to choose from")
    units = _named("units", units, available, row.unit, f"a layer's {row.unit}s")
    # What hooks of a user's do is not known: they may mix positions.
    causal = getattr(cfg, "attention_dir", "causal") == "causal" and not own_hooks(model)
    return Request(site, layers, units, by_position, direction, metric, n_pos, causal)


def checked_mask(only: Any, shape: tuple[int, ...]) -> Bool[Tensor, "*cell"] | None:
    """The mask of the cells wanted, on the CPU.

    Raises:
        ValueError: it is no mask, or not shaped as the values.
    """
    if only is None:
        return None
    if not isinstance(only, Tensor) or only.dtype != torch.bool:
        kind = only.dtype if isinstance(only, Tensor) else type(only).__name__
        raise ValueError(f"only must be a mask, a bool tensor shaped as the values, not {kind}")
    if only.shape != shape:
        raise ValueError(f"only has shape {list(only.shape)}, the values have {list(shape)}")
    return only.cpu()


def _named(argument: str, which: Places | None, n: int, what: str, those: str) -> tuple[int, ...]:
    """The layers or units that an argument names; None: all."""
    if which is None:
        return tuple(range(n))
    found = indices(which, n, what, range(n), those)
    if len(set(found)) < len(found):
        raise ValueError(f"{argument} {found} name a {what} twice")
    return tuple(found)


# ---------------------------------------------------------------------------------------------------------
# Which cells differ


def tokens_differ(weights: Weights | None, pairs: PromptPairs) -> Bool[Tensor, "prompt pos"]:
    """Where the pairs have different tokens, on the CPU; two tokens of one embedding are the same to a model."""
    if weights is None:
        return pairs.differ.cpu()
    return (weights.W_E[pairs.clean] != weights.W_E[pairs.corrupted]).any(-1).cpu()


def may_differ(request: Request, differ: Bool[Tensor, "prompt pos"], layer: int) -> Bool[Tensor, "prompt read"]:
    """Where activations of a layer can differ between the runs, whatever rounding says, up to the last one read."""
    differ = differ[:, : request.n_read]
    if not request.causal:
        return torch.ones_like(differ)
    if layer == 0 and request.row.of_token:
        return differ
    return differ.cumsum(1) > 0


def may_matter(
    request: Request, differ: Bool[Tensor, "prompt pos"], n_layers: int
) -> Bool[Tensor, "layer prompt read"]:
    """Where the layers' activations can differ between the runs and something that the metric reads depends on them."""
    allowed = torch.stack([may_differ(request, differ, layer) for layer in request.layers])
    if request.causal and n_layers - 1 in request.layers and not request.row.spreads:
        read = torch.zeros(request.n_read, dtype=torch.bool)
        read[list(request.reads)] = True
        allowed[request.layers.index(n_layers - 1)] &= read
    return allowed


def find_cells(request: Request, differs: Callable[[int], Tensor], differ: Tensor, n_layers: int, device) -> Cells:
    """The cells in which the prompts differ and on which something that the metric reads depends.

    Args:
        differs: layer -> where the site differs, up to the last position read: Bool[Tensor, "prompt pos"] for
            positional sites, else Bool[Tensor, "prompt pos unit"] for the units asked for.
        differ: where the tokens do, on the CPU.
    """
    n_pos, allowed = request.n_read, may_matter(request, differ, n_layers)
    by_unit = not (request.positional or request.by_position)
    found = []
    for i, mask in zip(request.layers, on_device(allowed, device)):
        where = differs(i)
        where = (where[..., None] if request.positional else where) & mask[..., None]
        found.append(torch.where(where.any(1), where.int().argmax(1), n_pos) if by_unit else where)
    where = torch.stack(found).cpu()  # the one time that the device is waited for
    layers = torch.tensor(request.layers)
    if by_unit:  # [layer, prompt, unit], the first position
        layer, prompt, unit = at = (where < n_pos).nonzero(as_tuple=True)
        start = where[at]
        pos = torch.full_like(start, -1)
    else:
        layer, prompt, pos, unit = where.nonzero(as_tuple=True)
        start = pos
    unit = pos if request.positional else torch.tensor(request.units)[unit]
    return Cells(prompt, layers[layer], unit, pos, start)


def itemsize(model: LensModel, weights: Weights | None) -> int:
    """Bytes of one number of the activations."""
    return model.cfg.dtype.itemsize if weights is None else max(4, model.cfg.dtype.itemsize)


def memory_budget(model: LensModel, max_memory: float | int | None) -> int:
    """Bytes that patching may use beyond the model: what was asked for, else a part of what the device has free.

    Raises:
        ValueError: max_memory is no number, or not positive.
    """
    if max_memory is not None:
        return int(number(max_memory, "max_memory", above=0))
    device = torch.device(model.cfg.device)
    if device.type == "cuda":
        return int(0.6 * torch.cuda.mem_get_info(device)[0])
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        free = 4 * 2**30
    return int(min(free / 2, 4 * 2**30))
