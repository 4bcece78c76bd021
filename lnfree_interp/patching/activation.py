"""Activation patching: overwrite one activation with that of the other prompt, and read the metric."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from ..arguments import listener, switch
from ..batching import Places, Progress
from ..lens import LensModel, ModelOrName
from ..metrics import logit_diff
from ..models import as_model
from ..pairs import PairedPrompts, PromptPairs, as_pairs
from ..weights import Weights, final_norm, read_weights, widened_norms
from . import hooked
from .cells import (
    Cells,
    MetricLike,
    PairsLike,
    Request,
    checked,
    checked_mask,
    find_cells,
    itemsize,
    memory_budget,
    on_device,
    tokens_differ,
)
from .changes import differs_in, needs, sweep_of
from .effect import PatchingEffect
from .prices import forward_flops
from .reading import Sample, check_finite, check_rows, read_metric
from .runs import numbers_kept
from .sweep import sweep_cells
from .tally import Tally


@torch.no_grad()
def activation_patching(
    model: ModelOrName,
    pairs: PairsLike,
    *,
    site: str = "resid_pre",
    metric: MetricLike = logit_diff,
    direction: str = "denoising",
    layers: Places | None = None,
    units: Places | None = None,
    by_position: bool = False,
    only: Bool[Tensor, "*cell"] | None = None,
    max_memory: float | int | None = None,
    progress: Progress | None = None,
    fast: bool = True,
) -> PatchingEffect:
    """metric(patched) - metric(unpatched) of every cell of a site, exactly, for each prompt.

    A cell's activation is taken from the clean run and written into the corrupted one (denoising), or the other
    way round (noising). Cells in which both runs agree, and those nothing read depends on, are 0 and never run.

    Args:
        pairs: PromptPairs, or (clean, corrupted, answers) as for it or, as texts, for `PromptPairs.from_texts`.
        site: resid_pre, resid_mid, resid_post, attn_out, mlp_out, by position; z, q, k, v, pattern, by head; neurons.
        metric: a `Metric` or its name (logit_diff, right_log_prob, kl_from_clean), or a function of full logits [row,
            pos, d_vocab] that returns [row]. Its rows are prompts in any order and any number, some of them repeated:
            what it needs of each prompt, a `Metric` tells it.
        layers: the layers to patch (default: all; needed for neurons): one, several, or a mask; -1 is the last.
        units: the heads or neurons to patch (default: all), in the same ways.
        by_position: patch heads or neurons position by position, not at all positions together. A pattern's
            position is the query's.
        only: the cells wanted, a mask shaped as the values; the others are not run and their values are nan.
        max_memory: bytes to stay within, roughly, beyond the model (default: from the device).
        progress: called with (cells done, cells in all).
        fast: compute only what a patch changes, where `read_weights` reads the model. False: hooks only, slower; for
            comparisons.

    Returns:
        PatchingEffect with values [prompt, layer, pos], [prompt, layer, head] or [prompt, layer, neuron], and a
        fourth axis pos if `by_position`.

    Raises:
        ValueError: unknown site or direction, layers or units that are not there, a mask of another shape, tokens
            outside the vocabulary, prompts beyond the context, a metric of the wrong shape, not finite, or one that
            depends on other prompts or on their place.
            A model that draws random numbers as it runs; hooks of its own at the final norm.

    Hooks that the model carries are part of it, and may mix positions, but not prompts.

    Example:
        >>> from lnfree_interp import load_model
        >>> from lnfree_interp.pairs import induction_pairs
        >>> model = load_model("tiny-noLN")
        >>> effect = activation_patching(model, induction_pairs(model, 2, length=8), site="z")
        >>> effect.values.shape, effect.axes
        (torch.Size([2, 8, 4]), ('prompt', 'layer', 'head'))
    """
    model = as_model(model)
    pairs = as_pairs(pairs, model).to("cpu")
    prompts = PairedPrompts.of_pairs(pairs, model)
    request = checked(model, pairs, site, metric, direction, layers, units, by_position)
    only = checked_mask(only, request.shape(len(pairs)))
    budget = memory_budget(model, max_memory)
    fast, progress = switch(fast, "fast"), listener(progress)
    pairs = pairs.to(model.cfg.device)
    weights = read_weights(model)
    swept = widened_norms(weights) if fast and weights is not None else None
    if swept is None:
        hooked.check_model(model, pairs.clean)
    n_together = _prompts_at_a_time(model, swept, request, budget)
    parts = []
    for i in range(0, len(pairs), n_together):
        here = slice(i, i + n_together)
        part = request.of_prompts(here, model.cfg.device)
        report = None if progress is None else shifted(progress, i, len(pairs), n_together)
        wanted = None if only is None else only[here]
        parts.append(_patch(model, weights, swept, part, pairs[here], wanted, budget, i, report))
    patched, clean, corrupted, cells_run, flops = zip(*parts)
    values = torch.cat(patched)
    check_finite(request, values, "the patched")
    n_cells = values.numel() if only is None else int(only.sum())
    plain = plain_flops(model, request, n_cells)
    if only is not None:
        values = values.masked_fill(~on_device(only, values.device), torch.nan)
    return PatchingEffect(
        values=values,
        site=site,
        method="activation",
        direction=direction,
        metric=request.metric.name,
        axes=request.axes,
        layers=request.layers,
        units=request.units,
        clean=torch.cat(clean),
        corrupted=torch.cat(corrupted),
        cells_run=sum(cells_run),
        flops=None if swept is None else (sum(flops), plain),
        prompts=prompts,
    )


def shifted(progress: Progress, first: int, n_prompts: int, n_together: int) -> Progress:
    """Progress over all prompts from progress over some: in cells, as if each prompt had equally many."""

    def report(done: int, total: Any) -> None:
        share = min(n_together, n_prompts - first)
        everything = round(total * n_prompts / share)
        progress(min(everything, round(everything * first / n_prompts) + done), everything)

    return report


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


def plain_flops(model: LensModel, request: Request, n_cells: int) -> float:
    """Floating-point operations of running the whole model once for each cell, all logits included."""
    return forward_flops(model, request.n_pos) * n_cells


def _patch(
    model: LensModel, weights, swept, request: Request, pairs: PromptPairs, only, budget: int, first: int, progress
):
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

    def metric_of(final: Tensor, prompt: Tensor, sample: list[Sample] | None = None) -> Tensor:
        return read_metric(model, request, pairs, final, prompt, norm, tally, sample)

    sample: list[Sample] = []
    at_base, at_source = (metric_of(run["resid_pre"][n_layers][:, reads], everyone, sample) for run in (base, source))
    check_rows(request.metric, sample)
    check_finite(request, torch.stack([at_base, at_source], 1), first=first)
    cells = find_cells(request, differs, differ, n_layers, device)
    if only is not None:
        cells = cells[only.flatten()[request.place(cells)]]
    values = at_base.new_zeros(request.shape(len(pairs)))

    max_rows, done = rows_at_a_time(model, swept, request, budget), 0
    for batch in batches(cells, request, max_rows):
        finals: Iterable[tuple[Tensor, Tensor]]
        if swept is not None:
            final = sweep_cells(sweep, batch)
            if request.reads != sweep.reads:  # the metric's own order
                final = final[:, torch.searchsorted(sweep.on_device, reads)]
            finals = [(torch.arange(len(batch)), final)]
        else:
            n_runs = max(1, max_rows // request.n_read)
            finals = hooked.final_residuals(model, request, base, source, batch, n_runs, weights)
        for index, rows in finals:
            c = batch[index]
            prompt, at = on_device(torch.stack([c.prompt, request.place(c)]), device)
            values.view(-1)[at] = metric_of(rows, prompt) - at_base[prompt]
        done += len(batch)
        if progress is not None:
            progress(done, len(cells))
    clean, corrupted = (at_source, at_base) if denoising else (at_base, at_source)
    return values, clean, corrupted, len(cells), tally.flops


def rows_at_a_time(model: LensModel, weights: Weights | None, request: Request, budget: int) -> int:
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


def batches(cells: Cells, request: Request, max_rows: int) -> Iterator[Cells]:
    """Cells in batches of at most `max_rows` rows, those with the same start together."""
    if not len(cells):
        return
    order = cells.start.argsort(stable=True)
    batch_of = ((request.n_read - cells.start)[order].cumsum(0) - 1) // max_rows
    for part in order.split(batch_of.unique_consecutive(return_counts=True)[1].tolist()):
        yield cells[part]
