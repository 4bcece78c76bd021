"""Patching through hooks that overwrite activations: for every model TransformerLens runs, cells in batches."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial

import torch
from jaxtyping import Int
from torch import Tensor

from ..forward import run
from ..lens import LensModel
from ..weights import Weights, own_hooks
from .cells import Cells, Request, on_device
from .sites import SITES

Recorded = dict[str, list[Tensor]]


def check_model(model: LensModel, tokens: Int[Tensor, "prompt pos"]) -> None:
    """Whether two runs of the model can be compared: the first prompt, run twice, must give the same.

    Raises:
        ValueError: it does not.
    """
    dtype = model.cfg.dtype
    if dtype.itemsize < 4:
        warnings.warn(
            f"this model is patched through its own forward, in {dtype}: what a single cell changes is of the size of "
            "the rounding errors, and effects are off by tens of percent, a neuron's by more than its size; use "
            "torch.float32",
            stacklevel=3,
        )
    with torch.no_grad():
        once, again = (run(model, tokens[:1]).float() for _ in range(2))
    if (once - again).abs().max() > 64 * torch.finfo(dtype).eps * once.abs().max():
        raise ValueError(
            "the model draws random numbers as it runs (dropout, or a hook or module of its own), so that patching "
            "cannot tell their effect from a patch's: call model.eval(), or take them out"
        )


def names(site: str, layer: int) -> dict[str, str]:
    """Name -> hook of what a site needs recorded in a layer, the residual stream before it included."""
    return {name: SITES[name].name(layer) for name in ("resid_pre", site)}


def record(model: LensModel, tokens: Tensor, site: str, weights: Weights | None) -> Recorded:
    """The site's activations and the residual stream of each layer, and the final one at the end of "resid_pre"."""
    kept: Recorded = {"resid_pre": [], site: []}

    def keep(x: Tensor, name: str) -> None:
        kept[name].append(x.detach().clone())

    hooks = {
        hook: partial(keep, name=name)
        for layer in range(model.cfg.n_layers)
        for name, hook in names(site, layer).items()
    }
    final = run(model, tokens, hooks=hooks, weights=weights)
    kept["resid_pre"].append(final)
    return kept


def differs(request: Request, base: Tensor, source: Tensor) -> Tensor:
    """Where a layer's activation differs between the runs: Bool[Tensor, "prompt pos"], or "prompt pos unit"."""
    return request.by_place(base != source, torch.any)


def overwritten(x: Tensor, values: Tensor, request: Request, cells: Cells) -> Tensor:
    """x [cell, ...] with each cell's activation replaced by that of `values`, shaped alike; cells on the device."""
    new, at = x.clone(), request.index(cells)
    new[at] = values[at]
    return new


def patch_hooks(
    request: Request, base: Recorded, source: Recorded, layer: int, cells: Cells, own: tuple[str, ...]
) -> dict[str, Callable]:
    """The hook that overwrites the activation of each cell of a layer; `own` are the model's own hooks."""
    name, values = request.row.name(layer), source[request.site][layer][cells.prompt]
    if request.row.edited_through is not None and name not in own:
        # On a TransformerBridge resid_mid is only what the MLP reads.
        name = SITES[request.row.edited_through].name(layer)
        values = values - base["resid_pre"][layer][cells.prompt]
    return {name: lambda x: overwritten(x, values, request, cells)}


def final_residuals(
    model: LensModel,
    request: Request,
    base: Recorded,
    source: Recorded,
    cells: Cells,
    rows: int,
    weights: Weights | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """(indices of cells, their final residual streams at the positions read), `rows` prompts at a time."""
    device = base["resid_pre"][0].device
    reads = on_device(torch.tensor(request.reads), device)
    own = own_hooks(model)
    for layer in cells.layer.unique().tolist():
        for index in (cells.layer == layer).nonzero().flatten().split(rows):
            batch = cells[index].to(device)
            hooks = patch_hooks(request, base, source, layer, batch, own)
            start = base["resid_pre"][layer][batch.prompt]
            yield index, run(model, resid=start, start_layer=layer, hooks=hooks, weights=weights)[:, reads]
