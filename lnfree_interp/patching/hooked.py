"""Patching through hooks that overwrite activations: for every model TransformerLens runs, cells in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from ..forward import run
from .cells import Cells, Request
from .sites import SITES

Recorded = dict[str, list[Tensor]]


def names(site: str, layer: int) -> dict[str, str]:
    """Name -> hook of what a site needs recorded in a layer, the residual stream before it included."""
    block = f"blocks.{layer}."
    return {"resid_pre": block + SITES["resid_pre"].hook, site: block + SITES[site].hook}


def record(model, tokens: Tensor, site: str) -> Recorded:
    """The site's activations and the residual stream of each layer, and the final one at the end of "resid_pre"."""
    kept: Recorded = {"resid_pre": [], site: []}

    def keep(x: Tensor, name: str) -> None:
        kept[name].append(x.detach().clone())

    hooks = {
        hook: partial(keep, name=name)
        for layer in range(model.cfg.n_layers)
        for name, hook in names(site, layer).items()
    }
    final = run(model, tokens, hooks=hooks)
    kept["resid_pre"].append(final)
    return kept


def differs(request: Request, base: Tensor, source: Tensor) -> Tensor:
    """Where a layer's activation differs between the runs: Bool[Tensor, "prompt pos"], or "prompt pos unit"."""
    different = base != source
    if request.positional:
        return different.any(-1)
    units = list(request.units)
    if request.site == "pattern":
        return different[:, units].any(-1).transpose(1, 2)
    return different[:, :, units] if request.site == "neurons" else different[:, :, units].any(-1)


def overwritten(x: Tensor, values: Tensor, request: Request, cells: Cells) -> Tensor:
    """x [cell, ...] with each cell's activation replaced by that of `values`, shaped alike."""
    new = x.clone()
    row = torch.arange(len(x), device=x.device)
    if request.positional:
        new[row, cells.start] = values[row, cells.start]
        return new
    unit = torch.tensor(request.units, device=x.device)[cells.unit]
    if request.site == "pattern":  # [cell, head, query, key]
        at = (row, unit, cells.pos) if request.by_position else (row, unit)
    else:  # [cell, pos, head or neuron, ...]
        at = (row, cells.pos, unit) if request.by_position else (row, slice(None), unit)
    new[at] = values[at]
    return new


def patched(model, tokens: Tensor, base: Recorded, cells: Cells, hooks: dict[str, Callable]) -> Tensor:
    """Final residual stream of cells of one layer, started at that layer, with hooks."""
    layer = int(cells.layer[0])
    if getattr(model.cfg, "positional_embedding_type", "") == "shortformer":
        return run(model, tokens[cells.prompt], hooks=hooks)  # its layers need more than the residual stream
    return run(model, resid=base["resid_pre"][layer][cells.prompt], start_layer=layer, hooks=hooks)


def patch_hooks(request: Request, base: Recorded, source: Recorded, cells: Cells) -> dict[str, Callable]:
    """The hook that overwrites each cell's activation in its layer."""
    layer, site = int(cells.layer[0]), request.site
    values = source[site][layer][cells.prompt]
    if site == "resid_mid":
        # An edit of resid_mid is one of attn_out: the rest of resid_mid is what it is without the patch.
        site, values = "attn_out", values - base["resid_pre"][layer][cells.prompt]
    return {f"blocks.{layer}.{SITES[site].hook}": lambda x: overwritten(x, values, request, cells)}


def final_residuals(
    model, request: Request, tokens: Tensor, base: Recorded, source: Recorded, cells: Cells, rows: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """(indices of cells, their final residual streams at the positions read), `rows` prompts at a time."""
    reads = list(request.reads)
    for layer in cells.layer.unique().tolist():
        for index in (cells.layer == layer).nonzero().flatten().split(rows):
            batch = cells[index]
            hooks = patch_hooks(request, base, source, batch)
            yield index, patched(model, tokens, base, batch, hooks)[:, reads]
