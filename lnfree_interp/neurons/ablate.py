"""Ablating neurons: one at a time, all of a layer, or one on top of another."""

from __future__ import annotations

from collections.abc import Callable
from typing import SupportsIndex

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from ..arguments import choice, listener, number
from ..batching import Places, Progress, Tokens, check_next_token, check_tokens, indices, token_batches
from ..forward import run
from ..lens import LensModel, ModelOrName
from ..models import as_model
from ..results import Prompts
from ..weights import block_of, normalises_writes, own_hooks, read_weights
from .choices import ABLATIONS, METHODS
from .last_layer import Rows, Unembedding, folded_unembedding, make_neurons, make_rows, wide
from .rank import mlp_of
from .result import NeuronAblation
from .scan import BlockScan, scan_block

# Rows of a block, and numbers in one of its tables of rows and neurons. The moments of a whole layer of GPT-2 small on
# 1,024 rows take 250 MiB.
ROWS_PER_BLOCK, NUMBERS_PER_BLOCK = 1024, 2**22
GPU_ROWS_PER_BLOCK, GPU_NUMBERS_PER_BLOCK = 4096, 2**24
# Below so many neurons the vocabulary-long sums cost less than setting up the series.
FEW_NEURONS = 16


def ablate_neurons(
    model: ModelOrName,
    tokens: Tokens,
    *,
    layer: SupportsIndex = -1,
    neurons: Places | None = None,
    ablation: str = "mean",
    method: str = "auto",
    tolerance: float = 1e-5,
    progress: Progress | None = None,
) -> NeuronAblation:
    """Change of cross-entropy and entropy when each neuron alone is set to its mean, or to zero (P2).

    In the last layer an ablation changes the logits by a rank-1 update and the scale in closed form: nothing is
    run again, and nothing unembedded. "moments" expands the change in moments of the model's own predictions,
    which for all neurons are matrix products, with a certified error; what cannot be certified, and everything
    with "stream", is summed over the vocabulary, exact to rounding. In earlier layers, where hooks of the model's
    own come after the neuron, and with "rerun", the model is run from that layer on.

    Args:
        tokens: Int[Tensor, "batch pos"].
        layer: the neurons' layer, negative ones from the end.
        neurons: which: numbers, negative ones from the end, one number, or a mask over all; None: all of the layer.
        ablation: "mean" (of the neuron over all of these tokens) or "zero".
        method: "moments", "stream" (both: last layer only), "rerun", or "auto": "rerun" for earlier layers and
            models whose last layer has no closed form, else "moments" for many neurons and "stream" for few.
        tolerance: largest error of a series, in nats. It counts truncation, and rounding in matrix products of the
            weights' full precision (fp32 at least).
        progress: called with (done, in all), counted in pairs of a neuron and a token.

    Returns:
        NeuronAblation in nats; its four tensors hold neurons x tokens numbers each, on the CPU.

    Raises:
        ValueError: tokens that are no token ids of the model's, an unknown layer, neuron, ablation or method, a
            negative tolerance, a method the layer or model does not allow, a model whose output vocabulary is not
            that of its tokens, or that carries hooks on its final norm or unembedding.

    Example:
        >>> from lnfree_interp import ablate_neurons, load_model
        >>> model = load_model("tiny-noLN", device="cpu")
        >>> tokens = model.to_tokens("It was a dark and stormy night.")
        >>> result = ablate_neurons(model, tokens, layer=1, neurons=[5, 8])
        >>> result.labels, bool((result.loss == result.loss_frozen).all())
        (('L1N5', 'L1N8'), True)
    """
    model = as_model(model)
    check_next_token(model)
    mlp, layer = mlp_of(model, layer)
    chosen = _chosen(slice(None) if neurons is None else neurons, mlp.W_out.shape[0])
    method = _method(model, layer, method, len(chosen))
    choice(ablation, "ablation", ABLATIONS)
    tolerance, progress = number(tolerance, "tolerance", least=0), listener(progress)
    tokens = check_tokens(model, tokens, least=2)
    with torch.no_grad():
        if method == "rerun":
            sets = [chosen[i : i + 1] for i in range(len(chosen))]
            return _rerun(model, tokens, layer, sets, _labels(layer, chosen), ablation, progress)
        return _scan(model, tokens, layer, chosen, ablation, method, tolerance, progress)


def ablate_cumulatively(
    model: ModelOrName,
    tokens: Tokens,
    neurons: Places,
    *,
    layer: SupportsIndex = -1,
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
        >>> ablate_cumulatively(model, tokens, [5, 8], layer=1).labels
        ('L1N5', '+L1N8')
    """
    model = as_model(model)
    check_next_token(model)
    mlp, layer = mlp_of(model, layer)
    chosen = _chosen(neurons, mlp.W_out.shape[0])
    choice(ablation, "ablation", ABLATIONS)
    listener(progress)
    tokens = check_tokens(model, tokens, least=2)
    first, *rest = _labels(layer, chosen)
    sets = [chosen[: i + 1] for i in range(len(chosen))]
    with torch.no_grad():
        return _rerun(model, tokens, layer, sets, (first, *(f"+{r}" for r in rest)), ablation, progress)


# ---------------------------------------------------------------------------------------------------------
# What was asked for


def _chosen(neurons: Places, n_neurons: int) -> Int[Tensor, " neuron"]:
    chosen = indices(neurons, n_neurons, "neuron", range(n_neurons), "the layer's neurons")
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"neurons {chosen} name one twice")
    return torch.tensor(chosen)


def _method(model: LensModel, layer: int, method: str, n_neurons: int) -> str:
    choice(method, "method", METHODS)
    why = why_no_closed_form(model, layer)
    if method in ("moments", "stream") and why:
        raise ValueError(f"method {method!r} does not serve: {why}; use 'rerun' or 'auto'")
    if method != "auto":
        return method
    return "rerun" if why else "stream" if n_neurons < FEW_NEURONS else "moments"


def why_no_closed_form(model: LensModel, layer: int) -> str | None:
    """Why an ablation in a layer, counted from 0, is no rank-1 update of the logits; None where it is."""
    cfg = model.cfg
    if layer != cfg.n_layers - 1:
        return f"layer {layer} is not the last of {cfg.n_layers}"
    if (getattr(cfg, "output_logits_soft_cap", -1.0) or -1.0) > 0:
        return "logits are capped"
    return _in_between(model, layer)


def _in_between(model: LensModel, layer: int) -> str | None:
    """What else than W_out comes between a layer's neurons and what a later layer or the final norm reads, if anything.

    Without that the residual stream after the layer changes by the neuron's change times its row of W_out.
    """
    if normalises_writes(model):
        return "the model normalises after its MLPs"
    for name in own_hooks(model):
        block, _, point = name.removeprefix("blocks.").partition(".")
        if not name.startswith("blocks.") or not block.isdecimal():
            continue
        after = not point or point.startswith(("mlp", "hook_mlp_out", "hook_resid_post"))
        if int(block) > layer or (int(block) == layer and after):
            return f"the model carries a hook at {name}"
    return None


def _labels(layer: int, neurons: Tensor) -> tuple[str, ...]:
    return tuple(f"L{layer}N{i}" for i in neurons.tolist())


# ---------------------------------------------------------------------------------------------------------
# The last layer, in closed form


def _scan(model: LensModel, tokens, layer: int, neurons, ablation, method, tolerance, progress) -> NeuronAblation:
    unembedding = folded_unembedding(model)
    neurons = neurons.to(model.cfg.device)
    resid, post = _activations(model, tokens, layer, neurons, "hook_resid_post")
    value = _value(post, ablation)
    outputs = make_neurons(unembedding, block_of(model, layer).mlp.W_out[neurons])
    dtype, device = outputs.w.dtype, outputs.w.device
    n_batch, n_pos = tokens.shape[0], tokens.shape[1] - 1
    targets = rearrange(tokens[:, 1:], "b p -> (b p)")
    flat = rearrange(resid[:, :-1], "b p d -> (b p) d")
    post = rearrange(post[:, :-1], "b p n -> (b p) n")
    n = len(targets)
    fields = ("loss", "entropy", "loss_frozen", "entropy_frozen")
    kept = fields if unembedding.has_scale else fields[:2]
    out = {field: torch.empty(len(neurons), n, dtype=dtype) for field in kept}
    baseline = torch.empty(2, n, dtype=dtype)
    streamed, bound = torch.zeros((), dtype=torch.long, device=device), torch.zeros((), dtype=dtype, device=device)
    most, numbers = ROWS_PER_BLOCK, NUMBERS_PER_BLOCK
    if device.type != "cpu":
        most, numbers = GPU_ROWS_PER_BLOCK, GPU_NUMBERS_PER_BLOCK
    size = min(most, max(64, numbers // len(neurons)))
    for start in range(0, n, size):
        part = slice(start, start + size)
        rows = make_rows(unembedding, flat[part], targets[part])
        share = None
        if progress is not None:
            share = _share(progress, start * len(neurons), len(rows.x) * len(neurons), n * len(neurons))
        da = value - wide(post[part])
        block: BlockScan = scan_block(unembedding, rows, outputs, da, tolerance=tolerance, method=method, share=share)
        for field, table in out.items():
            table[:, part] = getattr(block, field).T.cpu()
        baseline[:, part] = torch.stack([rows.loss, rows.entropy]).cpu()
        streamed += block.streamed.sum()
        bound = torch.maximum(bound, block.bound)
    shaped = {field: table.view(-1, n_batch, n_pos) for field, table in out.items()}
    if not unembedding.has_scale:
        shaped |= {"loss_frozen": shaped["loss"], "entropy_frozen": shaped["entropy"]}
    return NeuronAblation(
        labels=_labels(layer, neurons),
        **shaped,
        baseline_loss=baseline[0].view(n_batch, n_pos),
        baseline_entropy=baseline[1].view(n_batch, n_pos),
        streamed=streamed.item() / (n * len(neurons)),
        bound=bound.item(),
        prompts=Prompts.of(model, tokens),
    )


def _share(progress: Progress, before: int, here: int, in_all: int) -> Callable[[float], object]:
    return lambda share: progress(before + round(share * here), in_all)


def _value(post: Float[Tensor, "batch pos neuron"], ablation: str) -> Float[Tensor, " neuron"]:
    """What the neurons are set to."""
    mean = post.mean((0, 1), dtype=wide(post[:0]).dtype)
    return mean if ablation == "mean" else torch.zeros_like(mean)


def _activations(
    model: LensModel, tokens, layer: int, neurons, point: str
) -> tuple[Float[Tensor, "batch pos d_model"], Float[Tensor, "batch pos neuron"]]:
    """The residual stream at one of the layer's hook points and the neurons' activations, in one pass."""
    resid: list[Tensor] = []
    post: list[Tensor] = []

    def keep_resid(x: Tensor) -> None:
        resid.append(x)

    def keep_post(x: Tensor) -> None:
        post.append(x[..., neurons])

    weights = read_weights(model)
    hooks = {f"blocks.{layer}.mlp.hook_post": keep_post, f"blocks.{layer}.{point}": keep_resid}
    for batch in token_batches(model, tokens):
        run(model, batch, hooks=hooks, weights=weights)
    return torch.cat(resid), torch.cat(post)


# ---------------------------------------------------------------------------------------------------------
# Any layer, by running what comes after it


def _rerun(model: LensModel, tokens, layer: int, sets, labels, ablation, progress) -> NeuronAblation:
    """Each set of neurons ablated together; everything after the layer computed again, its scale both ways."""
    unembedding, weights = folded_unembedding(model), read_weights(model)
    every = torch.cat(list(sets))
    union, columns = every.unique(return_inverse=True)
    union, members = union.to(model.cfg.device), columns.to(model.cfg.device).split([len(chosen) for chosen in sets])
    hooked = _in_between(model, layer) is not None
    # Where only W_out comes after the neurons, from the stream after the layer; else the layer itself is run again.
    start, point = (layer, "hook_resid_pre") if hooked else (layer + 1, "hook_resid_post")
    resid, post = _activations(model, tokens, layer, union, point)
    value, W_out = _value(post, ablation), wide(block_of(model, layer).mlp.W_out[union])

    def ablated(resid: Tensor, post: Tensor, chosen: Tensor) -> Tensor:
        hooks = {}
        if hooked:

            def put(x: Tensor) -> Tensor:
                return x.index_copy(-1, union[chosen], value[chosen].to(x.dtype).expand(*x.shape[:-1], -1))

            hooks = {f"blocks.{layer}.mlp.hook_post": put}
        else:
            change = (value - wide(post))[..., chosen] @ W_out[chosen]
            resid = (wide(resid) + change).to(resid.dtype)
        return run(model, resid=resid, start_layer=start, hooks=hooks, weights=weights)

    n_batch, n_pos = tokens.shape[0], tokens.shape[1] - 1
    dtype = unembedding.W.dtype
    out = torch.empty(4, len(sets), n_batch, n_pos, dtype=dtype)
    baseline = torch.empty(2, n_batch, n_pos, dtype=dtype)
    first, size = 0, max(1, 2048 // tokens.shape[1])
    for resid_part, post_part, tokens_part in zip(resid.split(size), post.split(size), tokens.split(size)):
        rows_of = slice(first, first + len(tokens_part))
        clean = run(model, resid=resid_part, start_layer=start, weights=weights)
        rows = _rows_of(unembedding, clean, tokens_part)
        baseline[:, rows_of] = torch.stack([rows.loss, rows.entropy]).view(2, -1, n_pos).cpu()
        values = []
        for chosen in members:
            after = ablated(resid_part, post_part, chosen)
            total = _rows_of(unembedding, after, tokens_part)
            frozen = _rows_of(unembedding, after, tokens_part, scale=rows.scale) if unembedding.has_scale else total
            pairs = [(x.loss - rows.loss, x.entropy - rows.entropy) for x in (total, frozen)]
            values.append(torch.stack([x for pair in pairs for x in pair]))
            if progress is not None:
                done = first * len(sets) + len(values) * len(tokens_part)
                progress(done * n_pos, n_batch * len(sets) * n_pos)
        out[:, :, rows_of] = torch.stack(values, 1).unflatten(-1, (-1, n_pos)).cpu()
        first += len(tokens_part)
    loss, entropy, loss_frozen, entropy_frozen = out
    return NeuronAblation(
        labels=tuple(labels),
        loss=loss,
        entropy=entropy,
        loss_frozen=loss_frozen,
        entropy_frozen=entropy_frozen,
        baseline_loss=baseline[0],
        baseline_entropy=baseline[1],
        prompts=Prompts.of(model, tokens),
    )


def _rows_of(unembedding: Unembedding, resid, tokens, *, scale: Tensor | None = None) -> Rows:
    flat = rearrange(resid[:, :-1], "b p d -> (b p) d")
    return make_rows(unembedding, flat, rearrange(tokens[:, 1:], "b p -> (b p)"), scale=scale)
