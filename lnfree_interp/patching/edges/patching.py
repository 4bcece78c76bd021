"""Edge patching: one receiver reads one sender's output of the other run, and the rest is run again from there."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext

import torch
from torch import Tensor

from ...arguments import listener
from ...batching import Progress
from ...forward import mlp
from ...lens import LensModel, ModelOrName
from ...metrics import logit_diff
from ...models import as_model
from ...pairs import PairedPrompts, PromptPairs, as_pairs
from ...products import products
from ...weights import Weights, final_norm, read_weights, widened_norms
from .. import hooked
from ..activation import batches, plain_flops, rows_at_a_time, shifted
from ..cells import Cells, MetricLike, PairsLike, Request, checked, itemsize, memory_budget, on_device, tokens_differ
from ..changes import Sweep, at_positions, by_heads, change_of_keys, keys_of, of_units, sweep_of
from ..reading import Sample, check_finite, check_rows, read_metric
from ..runs import numbers_kept
from ..sweep import Rows, carried, finals, rows_from
from ..tally import Tally
from .cells import Group, differing, find_edges, grouped, sent
from .hooked import final_residuals, record
from .result import EdgeEffect
from .streams import split_inputs
from .wiring import ATTENTION, Edges, Wiring, wiring_of


@torch.no_grad()
def edge_patching(
    model: ModelOrName,
    pairs: PairsLike,
    *,
    edges: Edges | None = None,
    metric: MetricLike = logit_diff,
    direction: str = "denoising",
    max_memory: float | int | None = None,
    progress: Progress | None = None,
) -> EdgeEffect:
    """metric(patched) - metric(unpatched) of every edge, exactly, for each prompt.

    The receiver reads the residual stream with what the sender wrote, at all positions, exchanged for what it wrote in
    the clean run (denoising; in the corrupted run where noising), everybody else what they did, and all from the
    receiver on is run again (path patching of a single edge, arXiv 2304.05969). Edges of all receivers share each
    product with a weight matrix as cells do; positions before the first difference are not run, and edges to the
    logits cost no run.

    Args:
        pairs: as for `activation_patching`.
        edges: (sender, receiver) labels such as ("L0H3", "L2H1.k"), or Bool[Tensor, "sender receiver"]; None: all.
            Senders and receivers are those of `edge_attribution`.
        metric, direction, max_memory: as for `activation_patching`.
        progress: called with (edges done, edges in all), each prompt's counted.

    Raises:
        ValueError: as for `activation_patching`; a sender or receiver that is not there, a sender that comes after its
            receiver; a model that neither `read_weights` reads nor TransformerLens can split the inputs of.

    Example:
        >>> from lnfree_interp import edge_patching, induction_pairs, load_model
        >>> model = load_model("tiny-noLN")
        >>> edges = [("L0H1", "L1H2.k"), ("embed", "logits")]
        >>> effect = edge_patching(model, induction_pairs(model, 2, length=8), edges=edges)
        >>> int(effect.edges.sum()), len(effect.table())
        (2, 2)
    """
    model, progress = as_model(model), listener(progress)
    pairs = as_pairs(pairs, model).to("cpu")
    prompts = PairedPrompts.of_pairs(pairs, model)
    request = checked(model, pairs, "resid_pre", metric, direction, None, None, False)
    wiring = wiring_of(model)
    mask, budget = wiring.chosen(edges), memory_budget(model, max_memory)
    pairs = pairs.to(model.cfg.device)
    weights = read_weights(model)
    swept = None if weights is None else widened_norms(weights)
    if swept is None:
        hooked.check_model(model, pairs.clean)
    n_together = max(1, budget // 2 // (_numbers(model, swept, wiring, request) * itemsize(model, swept)))
    parts = []
    with nullcontext() if swept is not None else split_inputs(model, wiring, pairs.clean):
        for i in range(0, len(pairs), n_together):
            here = slice(i, i + n_together)
            part = request.of_prompts(here, model.cfg.device)
            report = None if progress is None else shifted(progress, i, len(pairs), n_together)
            parts.append(_patch(model, swept, wiring, mask, part, pairs[here], budget, i, report))
    values, clean, corrupted, cells_run, flops = zip(*parts)
    check_finite(request, torch.cat(values), "the patched")
    return EdgeEffect(
        values=torch.cat(values),
        edges=mask,
        senders=wiring.senders,
        receivers=wiring.receivers,
        method="edge_patching",
        direction=direction,
        metric=request.metric.name,
        clean=torch.cat(clean),
        corrupted=torch.cat(corrupted),
        cells_run=sum(cells_run),
        flops=None if swept is None else (sum(flops), plain_flops(model, request, len(pairs) * int(mask.sum()))),
        prompts=prompts,
    )


def needs(wiring: Wiring) -> set[str]:
    """What must be known of the two runs."""
    of_mlp = {"resid_mid", "mlp_out"} if wiring.has_mlp else set()
    return {"resid_pre", "q", "k", "v", "z", "attn_sum"} | of_mlp | (set() if wiring.by_head else {"attn_out"})


def _numbers(model: LensModel, weights: Weights | None, wiring: Wiring, request: Request) -> int:
    """How many numbers are kept of one prompt."""
    if weights is not None:
        return numbers_kept(weights, needs(wiring), request.n_read)
    cfg = model.cfg
    return 2 * cfg.n_layers * request.n_pos * (cfg.n_heads * cfg.d_head + 2 * cfg.d_model)


def _patch(
    model: LensModel,
    weights: Weights | None,
    wiring: Wiring,
    mask: Tensor,
    request: Request,
    pairs: PromptPairs,
    budget: int,
    first: int,
    progress: Progress | None,
):
    """values, metric of clean and corrupted, cells run and FLOPs, of prompts whose activations fit in memory."""
    denoising = request.direction == "denoising"
    base_tokens, source_tokens = (pairs.corrupted, pairs.clean) if denoising else (pairs.clean, pairs.corrupted)
    base_tokens, source_tokens = (t[:, : request.n_read] for t in (base_tokens, source_tokens))
    tally, device, n_layers = Tally(), base_tokens.device, model.cfg.n_layers
    differ = tokens_differ(weights, pairs)[:, : request.n_read]
    norm = final_norm(model) if weights is None else weights.ln_final
    if weights is not None:
        sweep = sweep_of(weights, base_tokens, source_tokens, differ, request, tally, needs(wiring))
        base, source = sweep.base, sweep.source
    else:
        base, source = (record(model, wiring, tokens) for tokens in (base_tokens, source_tokens))
    reads = on_device(torch.tensor(request.reads), device)

    def metric_of(final: Tensor, prompt: Tensor, sample: list[Sample] | None = None) -> Tensor:
        return read_metric(model, request, pairs, final, prompt, norm, tally, sample)

    sample: list[Sample] = []
    everyone = torch.arange(len(pairs), device=device)
    at_base, at_source = (metric_of(run["resid_pre"][n_layers][:, reads], everyone, sample) for run in (base, source))
    check_rows(request.metric, sample)
    check_finite(request, torch.stack([at_base, at_source], 1), first=first)
    cells = find_edges(wiring, mask, differing(wiring, base, source), request)
    values = at_base.new_zeros(len(pairs), *mask.shape)
    max_rows, done = rows_at_a_time(model, weights, request, budget), 0
    for batch in batches(cells, request, max_rows):
        found: Iterable[tuple[Tensor, Tensor]]
        if weights is not None:
            final = swept_edges(sweep, wiring, batch)
            if request.reads != sweep.reads:  # the metric's own order
                final = final[:, torch.searchsorted(sweep.on_device, reads)]
            found = [(torch.arange(len(batch)), final)]
        else:
            n_runs = max(1, max_rows // request.n_read)
            found = final_residuals(model, wiring, request, base, source, batch, n_runs)
        for index, rows in found:
            c = batch[index]
            prompt, at = on_device(torch.stack([c.prompt, c.prompt * mask.numel() + c.unit]), device)
            values.view(-1)[at] = metric_of(rows, prompt) - at_base[prompt]
        done += len(batch)
        if progress is not None:
            progress(done, len(cells))
    clean, corrupted = (at_source, at_base) if denoising else (at_base, at_source)
    return values, clean, corrupted, len(cells), tally.flops


# ---------------------------------------------------------------------------------------------------------
# On the weights


def swept_edges(sweep: Sweep, wiring: Wiring, cells: Cells) -> Tensor:
    """Final residual streams of the patched runs at the positions read, [cell, read position, d_model]."""
    n_layers = len(sweep.weights.layers)
    groups: dict[int, list[Group]] = {}
    for group in grouped(wiring, cells):
        groups.setdefault(group.layer, []).append(group)
    joined = carried(
        sweep, min(groups), lambda i: [], lambda i: [rows_of(sweep, wiring, group) for group in groups.get(i, [])]
    )
    return finals(sweep, cells.prompt, [*joined, *(rows_of(sweep, wiring, g) for g in groups.get(n_layers, []))])


def rows_of(sweep: Sweep, wiring: Wiring, group: Group) -> Rows:
    """The residual stream after the receivers' layer, from the edges' start on."""
    i, kind, start, device = group.layer, group.kind, group.start, sweep.on_device.device
    index, prompt, head = on_device(torch.stack([group.index, group.prompt, group.head]), device)
    if kind == "logits":
        positions = sweep.needed(i - 1, start)
        stream = at_positions(sweep.base["resid_pre"][i], prompt, positions)
        rows = stream + _sent(sweep, wiring, group.sender, group.prompt, positions)
    elif kind == "mlp":
        rows = _by_mlp(sweep, wiring, group, prompt)
    else:
        change = _change_of_z(sweep, wiring, group, prompt, head)
        rows = by_heads(sweep, i, prompt, sweep.needed(i, start), change, head, group.head, at_positions)
    return rows_from(sweep, start, index, prompt, rows)


def _sent(sweep: Sweep, wiring: Wiring, sender: Tensor, prompt: Tensor, positions: slice | Tensor) -> Tensor:
    def of_layer(i: int) -> Tensor:
        return sweep.weights.layers[i].W_O.unflatten(0, (wiring.n_heads, -1))

    change = sent(wiring, sweep.base, sweep.source, of_layer, sender, prompt, positions)
    if wiring.by_head:
        sweep.tally.linear(change.shape[:2].numel(), len(of_layer(0)[0]), change.shape[2])
    return change


def _by_mlp(sweep: Sweep, wiring: Wiring, group: Group, prompt: Tensor) -> Tensor:
    """Rows after a block whose MLP alone reads a changed stream."""
    i, base, positions = group.layer, sweep.base, sweep.needed(group.layer, group.start)
    layer = sweep.weights.layers[i]
    stream = at_positions(base["resid_pre" if layer.parallel else "resid_mid"][i], prompt, positions)
    read = stream + _sent(sweep, wiring, group.sender, group.prompt, positions)
    sweep.tally.mlp(layer, read.shape[:-1].numel())
    return at_positions(base["resid_mid"][i], prompt, positions) + mlp(layer, read)


def _change_of_z(sweep: Sweep, wiring: Wiring, group: Group, prompt: Tensor, head: Tensor) -> Tensor:
    """Change of z [cell, row, d_heads] where one head's query, key or value is of a changed stream."""
    i, kind, start, base = group.layer, group.kind, group.start, sweep.base
    layer, queries = sweep.weights.layers[i], sweep.needed(group.layer, group.start)
    everywhere = slice(start, sweep.request.n_read)
    positions = queries if kind == "q" else everywhere
    sender, of_pair, place = group.pairs()
    # What several heads read of one sender is normalised, and multiplied with their weights, once.
    rows = on_device(of_pair, prompt.device)
    stream = at_positions(base["resid_pre"][i], rows, positions) + _sent(sweep, wiring, sender, of_pair, positions)
    linear = layer.of_qkv[ATTENTION.index(kind)]
    sweep.tally.products(stream.shape[:2].numel(), [linear])
    (made,) = products(layer.ln1(stream), linear)
    new = made[on_device(place, prompt.device), :, head].unsqueeze(2)  # [cell, row, 1, d_head]
    if kind == "q":
        keys = keys_of(sweep, i, prompt, head // (wiring.n_heads // wiring.n_keys))
        q = layer.place_q(new, positions)
        sweep.tally.flops += 4.0 * q.numel() * keys["k"].shape[1]
        z = layer.attend(q, keys["k"], keys["v"], queries).squeeze(2)
        return z - of_units(base["z"][i], prompt, queries, head)
    keys = keys_of(sweep, i, prompt, head)
    keys[kind][:, start:] = layer.place_k(new, everywhere) if kind == "k" else new
    return change_of_keys(sweep, i, queries, prompt, head, keys)
