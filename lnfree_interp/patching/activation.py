"""Activation patching: overwrite one activation with that of the other prompt, and read the metric."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..batching import Progress
from ..lens import LensModel, ModelOrName
from ..metrics import Metric, logit_diff
from ..models import as_model
from ..pairs import PromptPairs, as_pairs
from ..weights import Weights, final_norm, read_weights, widened_norms
from . import hooked
from .cells import (
    Cells,
    Indices,
    MetricLike,
    PairsLike,
    Request,
    Tally,
    check_finite,
    checked,
    find_cells,
    memory_budget,
    on_device,
    read_metric,
    tokens_differ,
)
from .changes import differs_in, needs, sweep_of
from .effect import PatchingEffect
from .runs import numbers_kept
from .sweep import sweep_cells


@torch.no_grad()
def activation_patching(
    model: ModelOrName,
    pairs: PairsLike,
    *,
    site: str = "resid_pre",
    metric: MetricLike = logit_diff,
    direction: str = "denoising",
    layers: Indices | None = None,
    units: Indices | None = None,
    by_position: bool = False,
    max_memory: int | None = None,
    progress: Progress | None = None,
    fast: bool = True,
) -> PatchingEffect:
    """metric(patched) - metric(unpatched) of every cell of a site, exactly, for each prompt.

    A cell's activation is taken from the clean run and written into the corrupted one (denoising), or the other
    way round (noising). Cells in which both runs agree, and those nothing read depends on, are 0 and never run.

    Args:
        pairs: PromptPairs, or (clean, corrupted, answers).
        site: resid_pre, resid_mid, resid_post, attn_out, mlp_out, by position; z, q, k, v, pattern, by head; neurons.
        metric: a `Metric`, or a function of the full logits [prompt, pos, d_vocab] that returns [prompt].
        layers: the layers to patch (default: all; needed for neurons): one, several, or a mask; -1 is the last.
        units: the heads or neurons to patch (default: all), in the same ways.
        by_position: patch heads or neurons position by position, not at all positions together. A pattern's
            position is the query's.
        max_memory: bytes to stay within, roughly, beyond the model (default: from the device).
        progress: called with (cells done, cells in all).
        fast: compute only what a patch changes, where `read_weights` reads the model. False: hooks only, slower; for
            comparisons.

    Returns:
        PatchingEffect with values [prompt, layer, pos], [prompt, layer, head] or [prompt, layer, neuron], and a
        fourth axis pos if `by_position`.

    Raises:
        ValueError: unknown site or direction, layers or units that are not there, tokens outside the vocabulary,
            prompts beyond the context, a metric of the wrong shape or not finite.
            A model that draws random numbers as it runs; hooks of its own at the final norm.

    Hooks that the model carries are part of it, and may mix positions, but not prompts.

    Example:
        >>> from lnfree_interp import load_model
        >>> from lnfree_interp.pairs import induction_pairs
        >>> model = load_model("tiny-noLN")
        >>> effect = activation_patching(model, induction_pairs(model, 2, length=8), site="z")
        >>> effect.values.shape, effect.axes
        (torch.Size([2, 4, 4]), ('prompt', 'layer', 'head'))
    """
    model, pairs = as_model(model), as_pairs(pairs).to("cpu")
    request = checked(model, pairs, site, metric, direction, layers, units, by_position)
    budget = memory_budget(model, max_memory)
    pairs = pairs.to(model.cfg.device)
    weights = read_weights(model)
    swept = widened_norms(weights) if fast and weights is not None else None
    if swept is None:
        hooked.check_model(model, pairs.clean)
    # A plain function of the logits may look at prompts by their place: it gets all of them, in order.
    n_together = len(pairs) if not isinstance(metric, Metric) else _prompts_at_a_time(model, swept, request, budget)
    parts = []
    for i in range(0, len(pairs), n_together):
        here = slice(i, i + n_together)
        part = rows_of_metric(request, here, model.cfg.device)
        report = None if progress is None else _shifted(progress, i, len(pairs), n_together)
        parts.append(_patch(model, weights, swept, part, pairs[here], budget, i, report))
    values, clean, corrupted, cells_run, flops = zip(*parts)
    check_finite(request, torch.cat(values), "the patched")
    plain = plain_flops(model, request, len(pairs))
    return PatchingEffect(
        values=torch.cat(values),
        site=site,
        method="activation",
        direction=direction,
        metric=request.metric_name,
        axes=request.axes,
        layers=request.layers,
        units=request.units,
        clean=torch.cat(clean),
        corrupted=torch.cat(corrupted),
        cells_run=sum(cells_run),
        flops=None if swept is None else (sum(flops), plain),
    )


def rows_of_metric(request: Request, rows: slice, device) -> Request:
    """The request with what the metric knows of each prompt cut to some of them."""
    metric = request.metric
    if not isinstance(metric, Metric):
        return request
    tokens = metric.tokens[rows].to(device) if isinstance(metric.tokens, Tensor) else metric.tokens
    context = tuple(c[rows].to(device) for c in metric.context)
    return replace(request, metric=replace(metric, tokens=tokens, context=context))


def _shifted(progress: Progress, first: int, n_prompts: int, n_together: int) -> Progress:
    """Progress over all prompts from progress over some: in cells, as if each prompt had equally many."""

    def report(done: int, total: Any) -> None:
        share = min(n_together, n_prompts - first)
        everything = round(total * n_prompts / share)
        progress(min(everything, round(everything * first / n_prompts) + done), everything)

    return report


def itemsize(model: LensModel, weights: Weights | None) -> int:
    """Bytes of one number of the activations."""
    return model.cfg.dtype.itemsize if weights is None else max(4, model.cfg.dtype.itemsize)


def _prompts_at_a_time(model: LensModel, weights: Weights | None, request: Request, budget: int) -> int:
    """As many prompts as have their kept activations in half of the budget."""
    cfg = model.cfg
    if weights is not None:
        numbers = numbers_kept(weights, needs(weights, request.site), request.n_read)
    else:
        sizes = {"neuron": cfg.d_mlp, "head": cfg.n_heads, "key": request.n_pos}
        sizes |= {name: getattr(cfg, name) for name in ("d_model", "d_head")}
        width = math.prod(sizes[axis] for axis in request.row.axes if axis in sizes)
        numbers = 2 * cfg.n_layers * request.n_pos * (cfg.d_model + width)
    return max(1, budget // 2 // (numbers * itemsize(model, weights)))


def plain_flops(model: LensModel, request: Request, n_prompts: int) -> float:
    """Floating-point operations of running the whole model once for each cell, all logits included."""
    cfg, n = model.cfg, request.n_pos
    tally = Tally()
    d_attn, d_keys = cfg.n_heads * cfg.d_head, (getattr(cfg, "n_key_value_heads", None) or cfg.n_heads) * cfg.d_head
    mlp = 0 if getattr(cfg, "attn_only", False) else (3 if getattr(cfg, "gated_mlp", False) else 2) * (cfg.d_mlp or 0)
    tally.linear(n * cfg.n_layers, cfg.d_model, 2 * d_attn + 2 * d_keys + mlp)
    tally.linear(n, cfg.d_model, cfg.d_vocab)
    tally.flops += 4.0 * cfg.n_layers * d_attn * n * n
    return tally.flops * float(torch.Size(request.shape(n_prompts)).numel())


def _patch(model: LensModel, weights, swept, request: Request, pairs: PromptPairs, budget: int, first: int, progress):
    """values, metric of clean and corrupted, cells run and FLOPs, of prompts whose activations fit in memory."""
    denoising = request.direction == "denoising"
    base_tokens, source_tokens = (pairs.corrupted, pairs.clean) if denoising else (pairs.clean, pairs.corrupted)
    base_tokens, source_tokens = (t[:, : request.n_read] for t in (base_tokens, source_tokens))
    tally, n_layers, device = Tally(), model.cfg.n_layers, base_tokens.device
    reads = on_device(torch.tensor(request.reads), device)
    everyone = torch.arange(len(pairs), device=device)
    differ = tokens_differ(weights, pairs)
    norm = final_norm(model) if swept is None else swept.ln_final
    if swept is not None:
        sweep = sweep_of(swept, base_tokens, source_tokens, differ[:, : request.n_read], request, tally)
        base, source = sweep.base, sweep.source
    else:
        base, source = (hooked.record(model, tokens, request.site, weights) for tokens in (base_tokens, source_tokens))

    def differs(layer: int) -> Tensor:
        if swept is not None:
            return differs_in(sweep, layer)
        return hooked.differs(request, base[request.site][layer], source[request.site][layer])

    def metric_of(final: Tensor, prompt: Tensor) -> Tensor:
        return read_metric(model, request, pairs, final, prompt, norm, tally)

    at_base, at_source = (metric_of(run["resid_pre"][n_layers][:, reads], everyone) for run in (base, source))
    check_finite(request, torch.stack([at_base, at_source], 1), first=first)
    cells = find_cells(request, differs, differ, n_layers, device)
    values = at_base.new_zeros(request.shape(len(pairs)))

    def put(c: Cells, effect: Tensor) -> None:
        values.view(-1)[on_device(request.place(c), device)] = effect

    plain = not isinstance(request.metric, Metric)
    max_rows, done = _rows_at_a_time(model, swept, request, budget), 0
    for batch in batches(cells, request, max_rows, together=plain):
        finals: Iterable[tuple[Tensor, Tensor]]
        if swept is not None:
            final = sweep_cells(sweep, batch)
            if request.reads != sweep.reads:  # the metric's own order
                final = final[:, torch.searchsorted(sweep.on_device, reads)]
            finals = [(torch.arange(len(batch)), final)]
        else:
            n_runs = max(1, max_rows // request.n_read)
            finals = hooked.final_residuals(model, request, base, source, batch, n_runs, weights)
        if plain:
            final = base["resid_pre"][n_layers].new_empty(len(batch), len(reads), model.cfg.d_model)
            for index, rows in finals:
                final[on_device(index, device)] = rows
            for index in alike(batch):
                c = batch[index]
                prompt, index = on_device(torch.stack([c.prompt, index]), device)
                everything = base["resid_pre"][n_layers][:, reads]
                everything[prompt] = final[index]
                put(c, metric_of(everything, everyone)[prompt] - at_base[prompt])
        else:
            for index, rows in finals:
                c = batch[index]
                prompt = on_device(c.prompt, device)
                put(c, metric_of(rows, prompt) - at_base[prompt])
        done += len(batch)
        if progress is not None:
            progress(done, len(cells))
    clean, corrupted = (at_source, at_base) if denoising else (at_base, at_source)
    return values, clean, corrupted, len(cells), tally.flops


def _rows_at_a_time(model: LensModel, weights: Weights | None, request: Request, budget: int) -> int:
    """Rows of the residual stream that a sweep may carry in half of the budget."""
    cfg = model.cfg
    d_mlp = cfg.d_mlp or 0
    if weights is not None:
        # Streams before and after, q, k, v, z, keys and values with their prefix; hidden rows some at a time.
        per_row = 20 * cfg.d_model
    else:
        per_row = 10 * cfg.d_model + 3 * d_mlp + 3 * cfg.n_heads * request.n_read
    rows = budget // 2 // (per_row * itemsize(model, weights))
    return max(request.n_read, rows)


def alike(cells: Cells) -> list[Tensor]:
    """Indices of the cells that are the same layer, unit and position in different prompts."""
    key = torch.stack([cells.layer, cells.unit, cells.pos])
    _, group = key.unique(dim=1, return_inverse=True)
    order = group.argsort(stable=True)
    return list(order.split(group.bincount().tolist()))


def batches(cells: Cells, request: Request, max_rows: int, *, together: bool) -> Iterator[Cells]:
    """Cells in batches of at most `max_rows` rows, those with the same start together.

    Args:
        together: never split the same cell of different prompts.
    """
    if not len(cells):
        return
    rows = request.n_read - cells.start
    if not together:
        order = cells.start.argsort(stable=True)
        batch_of = (rows[order].cumsum(0) - 1) // max_rows
        for part in order.split(batch_of.unique_consecutive(return_counts=True)[1].tolist()):
            yield cells[part]
        return
    batch: list[Tensor] = []
    size = 0
    for piece in sorted(alike(cells), key=lambda index: int(cells.start[index].min())):
        more = int(rows[piece].sum())
        if batch and size + more > max_rows:
            yield cells[torch.cat(batch)]
            batch, size = [], 0
        batch.append(piece)
        size += more
    yield cells[torch.cat(batch)]
