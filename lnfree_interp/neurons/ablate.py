"""Ablating neurons: one at a time, all of a layer, or one on top of another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from ..batching import Tokens, check_next_token, check_tokens, token_batches
from ..forward import run
from ..models import as_model
from .choices import ABLATIONS, METHODS
from .last_layer import Progress, Rows, Unembedding, folded_unembedding, make_neurons, make_rows
from .rank import mlp_of
from .result import NeuronAblation
from .scan import BlockScan, scan_block

# Rows of a block; the moments of a whole layer of GPT-2 small on so many take 250 MiB.
ROWS_PER_BLOCK = 1024
NUMBERS_PER_BLOCK = 2**22
# Below so many neurons the vocabulary-long sums cost less than setting up the series.
FEW_NEURONS = 16


def ablate_neurons(
    model,
    tokens: Tokens,
    *,
    layer: int = -1,
    neurons: Sequence[int] | Int[Tensor, " neuron"] | None = None,
    ablation: str = "mean",
    method: str = "auto",
    tolerance: float = 1e-5,
    progress: Progress | None = None,
) -> NeuronAblation:
    """Change of cross-entropy and entropy when each neuron alone is set to its mean, or to zero (P2).

    In the last layer an ablation changes the logits by a rank-1 update and the scale in closed form: nothing is
    run again, and nothing unembedded. "moments" expands the change in moments of the model's own predictions,
    which for all neurons are matrix products, with a certified truncation error; what cannot be certified, and
    everything with "stream", is summed over the vocabulary, exact to rounding. In earlier layers, and with
    "rerun", the model is run from that layer on.

    Args:
        tokens: Int[Tensor, "batch pos"].
        layer: the neurons' layer, negative ones from the end.
        neurons: which; None: all of the layer.
        ablation: "mean" (of the neuron over all of these tokens) or "zero".
        method: "moments", "stream" (both: last layer only), "rerun", or "auto": "rerun" for earlier layers, else
            "moments" for many neurons and "stream" for few.
        tolerance: largest truncation error of a series, in nats.
        progress: called with the share of the work that is done.

    Returns:
        NeuronAblation in nats; its four tensors hold neurons x tokens numbers each, on the CPU.

    Raises:
        ValueError: tokens that are no token ids of the model's, an unknown layer, neuron, ablation or method, a
            negative tolerance, a method the layer or model does not allow.

    Example:
        >>> from lnfree_interp import ablate_neurons, load_model
        >>> model = load_model("tiny-noLN", device="cpu")
        >>> result = ablate_neurons(model, model.to_tokens("It was a dark and stormy night."), neurons=[5, 8])
        >>> result.labels, bool((result.loss == result.loss_frozen).all())
        (('L3N5', 'L3N8'), True)
    """
    model = as_model(model)
    check_next_token(model)
    mlp, layer = mlp_of(model, layer)
    chosen = _chosen(neurons, mlp.W_out.shape[0])
    method = _method(model, layer, method, len(chosen))
    _check_ablation(ablation, tolerance)
    tokens = check_tokens(model, tokens, least=2)
    with torch.no_grad():
        if method == "rerun":
            sets = [chosen[i : i + 1] for i in range(len(chosen))]
            return _rerun(model, tokens, layer, sets, _labels(layer, chosen), ablation, progress)
        return _scan(model, tokens, layer, chosen, ablation, method, tolerance, progress)


def ablate_cumulatively(
    model,
    tokens: Tokens,
    neurons: Sequence[int],
    *,
    layer: int = -1,
    ablation: str = "mean",
    progress: Progress | None = None,
) -> NeuronAblation:
    """The first neuron of a list ablated, then the first two together, and so on (P2, cumulative ablation).

    Args:
        tokens, layer, ablation, progress: as for `ablate_neurons`.
        neurons: in the order in which they go.

    Returns:
        NeuronAblation: one ablation per neuron, labelled "L11N584", "+L11N2123", ...

    Raises:
        ValueError: as `ablate_neurons`; no neurons, or one of them twice.

    Example:
        >>> from lnfree_interp import ablate_cumulatively, load_model
        >>> model = load_model("tiny-noLN", device="cpu")
        >>> tokens = model.to_tokens("It was a dark and stormy night.")
        >>> ablate_cumulatively(model, tokens, [5, 8]).labels
        ('L3N5', '+L3N8')
    """
    model = as_model(model)
    check_next_token(model)
    mlp, layer = mlp_of(model, layer)
    chosen = _chosen(neurons, mlp.W_out.shape[0])
    _check_ablation(ablation, 0.0)
    tokens = check_tokens(model, tokens, least=2)
    first, *rest = _labels(layer, chosen)
    sets = [chosen[: i + 1] for i in range(len(chosen))]
    with torch.no_grad():
        return _rerun(model, tokens, layer, sets, (first, *(f"+{r}" for r in rest)), ablation, progress)


# ---------------------------------------------------------------------------------------------------------
# What was asked for


def _chosen(neurons, n_neurons: int) -> Int[Tensor, " neuron"]:
    if neurons is None:
        return torch.arange(n_neurons)
    chosen = torch.as_tensor(neurons).cpu()
    if chosen.ndim != 1 or chosen.numel() == 0 or chosen.is_floating_point():
        raise ValueError(f"neurons must be a list of neuron numbers, not {neurons!r}")
    wrong = chosen[(chosen < 0) | (chosen >= n_neurons)]
    if len(wrong):
        raise ValueError(f"neuron {int(wrong[0])} is outside 0..{n_neurons - 1}")
    if len(chosen.unique()) < len(chosen):
        raise ValueError(f"neurons {chosen.tolist()} name one twice")
    return chosen.long()


def _check_ablation(ablation: str, tolerance: float) -> None:
    if ablation not in ABLATIONS:
        raise ValueError(f"unknown ablation {ablation!r}; allowed are {', '.join(ABLATIONS)}")
    if not tolerance >= 0:
        raise ValueError(f"tolerance {tolerance} is not a number of nats from 0 up")


def _method(model, layer: int, method: str, n_neurons: int) -> str:
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; allowed are {', '.join(METHODS)}")
    cfg = model.cfg
    capped = (getattr(cfg, "output_logits_soft_cap", -1.0) or -1.0) > 0
    last = layer == cfg.n_layers - 1 and not capped
    if getattr(cfg, "use_normalization_before_and_after", False):
        raise ValueError("the model normalises after its MLPs, so neurons do not write to the residual stream")
    if method in ("moments", "stream") and not last:
        why = "logits are capped" if capped else f"layer {layer} is not the last of {cfg.n_layers}"
        raise ValueError(f"method {method!r} does not serve: {why}; use 'rerun' or 'auto'")
    if method != "auto":
        return method
    return ("stream" if n_neurons < FEW_NEURONS else "moments") if last else "rerun"


def _labels(layer: int, neurons: Tensor) -> tuple[str, ...]:
    return tuple(f"L{layer}N{i}" for i in neurons.tolist())


# ---------------------------------------------------------------------------------------------------------
# The last layer, in closed form


def _scan(model, tokens, layer: int, neurons, ablation, method, tolerance, progress) -> NeuronAblation:
    unembedding = folded_unembedding(model)
    neurons = neurons.to(model.cfg.device)
    resid, post = _activations(model, tokens, layer, neurons)
    mean = post.mean((0, 1)) if ablation == "mean" else torch.zeros_like(post[0, 0])
    outputs = make_neurons(unembedding, model.blocks[layer].mlp.W_out[neurons])
    dtype = outputs.w.dtype
    n_batch, n_pos = tokens.shape[0], tokens.shape[1] - 1
    targets = rearrange(tokens[:, 1:], "b p -> (b p)")
    flat = rearrange(resid[:, :-1], "b p d -> (b p) d")
    da = mean - rearrange(post[:, :-1], "b p n -> (b p) n")
    n = len(targets)
    fields = ("loss", "entropy", "loss_frozen", "entropy_frozen")
    kept = fields if unembedding.has_scale else fields[:2]
    out = {field: torch.empty(len(neurons), n, dtype=dtype) for field in kept}
    baseline = torch.empty(2, n, dtype=dtype)
    streamed, bound = 0, 0.0
    size = min(ROWS_PER_BLOCK, max(64, NUMBERS_PER_BLOCK // len(neurons)))
    for start in range(0, n, size):
        part = slice(start, start + size)
        rows = make_rows(unembedding, flat[part], targets[part])
        share = None
        if progress is not None:
            share = _share(progress, start / n, min(size, n - start) / n)
        block: BlockScan = scan_block(
            unembedding, rows, outputs, da[part].to(dtype), tolerance=tolerance, method=method, progress=share
        )
        for field, table in out.items():
            table[:, part] = getattr(block, field).T.cpu()
        baseline[:, part] = torch.stack([rows.loss, rows.entropy]).cpu()
        streamed += block.streamed.sum().item()
        bound = max(bound, block.bound)
    shaped = {field: table.view(-1, n_batch, n_pos) for field, table in out.items()}
    if not unembedding.has_scale:
        shaped |= {"loss_frozen": shaped["loss"], "entropy_frozen": shaped["entropy"]}
    return NeuronAblation(
        labels=_labels(layer, neurons),
        **shaped,
        baseline_loss=baseline[0].view(n_batch, n_pos),
        baseline_entropy=baseline[1].view(n_batch, n_pos),
        streamed=streamed / (n * len(neurons)),
        bound=bound,
    )


def _share(progress: Progress, start: float, length: float) -> Progress:
    return lambda done: progress(start + length * done)


def _activations(
    model, tokens, layer: int, neurons
) -> tuple[Float[Tensor, "batch pos d_model"], Float[Tensor, "batch pos neuron"]]:
    """The residual stream after the layer and the neurons' activations, in one pass."""
    resid: list[Tensor] = []
    post: list[Tensor] = []

    def keep_resid(x: Tensor) -> None:
        resid.append(x)

    def keep_post(x: Tensor) -> None:
        post.append(x[..., neurons])

    hooks = {f"blocks.{layer}.mlp.hook_post": keep_post, f"blocks.{layer}.hook_resid_post": keep_resid}
    for batch in token_batches(model, tokens):
        run(model, batch, hooks=hooks)
    return torch.cat(resid), torch.cat(post)


# ---------------------------------------------------------------------------------------------------------
# Any layer, by running what comes after it


def _rerun(model, tokens, layer: int, sets, labels, ablation, progress) -> NeuronAblation:
    """Each set of neurons ablated together; everything after the layer computed again, its scale both ways."""
    unembedding = folded_unembedding(model)
    union = torch.cat(list(sets)).unique().to(model.cfg.device)
    resid, post = _activations(model, tokens, layer, union)
    mean = post.mean((0, 1)) if ablation == "mean" else torch.zeros_like(post[0, 0])
    W_out = model.blocks[layer].mlp.W_out[union]
    n_batch, n_pos = tokens.shape[0], tokens.shape[1] - 1
    dtype = unembedding.W.dtype
    out = torch.empty(4, len(sets), n_batch, n_pos, dtype=dtype)
    baseline = torch.empty(2, n_batch, n_pos, dtype=dtype)
    start = 0
    parts = list(_split(resid, post, tokens))
    for done, (resid_part, post_part, tokens_part) in enumerate(parts):
        rows_of = slice(start, start + len(tokens_part))
        start += len(tokens_part)
        clean = run(model, resid=resid_part, start_layer=layer + 1)
        rows = _rows_of(unembedding, clean, tokens_part)
        baseline[:, rows_of] = torch.stack([rows.loss, rows.entropy]).view(2, -1, n_pos).cpu()
        for i, chosen in enumerate(sets):
            members = torch.isin(union, chosen.to(union.device))
            change = (mean - post_part)[..., members] @ W_out[members]
            after = run(model, resid=resid_part + change, start_layer=layer + 1)
            total = _rows_of(unembedding, after, tokens_part)
            frozen = _rows_of(unembedding, after, tokens_part, scale=rows.scale) if unembedding.has_scale else total
            values = [f(x) - f(rows) for x in (total, frozen) for f in (lambda r: r.loss, lambda r: r.entropy)]
            out[:, i, rows_of] = torch.stack(values).view(4, -1, n_pos).cpu()
            if progress is not None:
                progress((done + (i + 1) / len(sets)) / len(parts))
    loss, entropy, loss_frozen, entropy_frozen = out
    return NeuronAblation(
        labels=tuple(labels),
        loss=loss,
        entropy=entropy,
        loss_frozen=loss_frozen,
        entropy_frozen=entropy_frozen,
        baseline_loss=baseline[0],
        baseline_entropy=baseline[1],
    )


def _split(resid, post, tokens) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    size = max(1, 2048 // tokens.shape[1])
    yield from zip(resid.split(size), post.split(size), tokens.split(size))


def _rows_of(unembedding: Unembedding, resid, tokens, *, scale: Tensor | None = None) -> Rows:
    flat = rearrange(resid[:, :-1], "b p d -> (b p) d")
    return make_rows(unembedding, flat, rearrange(tokens[:, 1:], "b p -> (b p)"), scale=scale)
