"""The two runs of activation patching: activations of the base and of the source prompts, as far as they are needed."""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ..forward import KeysAndValues, Past, Stream, run_streams
from ..weights import Weights
from .cells import on_device
from .tally import Tally

Kept = dict[str, list[Tensor]]
"""Activations of one run by name and layer; "resid_pre" has one more, the final residual stream."""

# Streams in which the source prompts run, at most: prompts with nearby first differences share one.
STREAMS = 8

# Name of what can be kept -> its hook. Queries and keys are kept as attention compares them.
HOOKS = {
    "resid_pre": "hook_resid_pre",
    "q": "attn.hook_rot_q",
    "k": "attn.hook_rot_k",
    "v": "attn.hook_v",
    "z": "attn.hook_z",
    "attn_sum": "attn.hook_out",  # before the norm that some models have after attention
    "attn_out": "hook_attn_out",
    "resid_mid": "hook_resid_mid",
    "neurons": "mlp.hook_post",
    "mlp_sum": "mlp.hook_out",
    "mlp_out": "hook_mlp_out",
}


def numbers_kept(weights: Weights, needs: set[str], n_pos: int) -> int:
    """How many numbers the two runs together keep for one prompt."""
    layer = weights.layers[0]
    of_heads = dict(zip("qkv", (W.shape[0] * W.shape[2] for W, _ in layer.of_qkv))) | {"z": len(layer.W_O)}
    widths = of_heads | {"neurons": 0 if layer.W_in is None else layer.W_in.shape[1]}
    width = sum(widths.get(name, weights.W_E.shape[1]) for name in needs)
    return 2 * width * n_pos * len(weights.layers)


def both_runs(
    weights: Weights,
    base: Int[Tensor, "prompt pos"],
    source: Int[Tensor, "prompt pos"],
    differ: Bool[Tensor, "prompt pos"],
    needs: set[str],
    tally: Tally,
) -> tuple[Kept, Kept, KeysAndValues]:
    """Activations of the base and the source prompts, and the base's keys and values once more, by layer.

    The source prompts run from their first different token on (`differ`, on the CPU); before it the two runs agree.

    Args:
        needs: names of `HOOKS`, with "resid_pre" among them.
    """
    n_layers, n_pos = len(weights.layers), base.shape[1]
    of_base: Kept = {name: [] for name in needs}
    of_source: Kept = {name: [] for name in needs}
    keep: KeysAndValues = {}

    def note(x: Tensor, name: str) -> Tensor:
        # A copy, so that the rows of the source, made in the same product, are not kept with it.
        of_base[name].append(x.clone(memory_format=torch.contiguous_format))
        return of_base[name][-1]

    def note_over(x: Tensor, name: str, i: int, rows: Tensor, start: int, new: Tensor | None) -> None:
        if len(of_source[name]) == i:
            of_source[name].append(of_base[name][i].clone())
        kept = of_source[name][i]
        if new is not None:  # before its own first difference a prompt's are the base's, to the bit
            x = torch.where(new.view(*new.shape, *[1] * (x.ndim - 2)), x, kept[rows, start:])
        kept[rows, start:] = x

    def hooks(hook) -> dict:
        return {f"blocks.{i}.{HOOKS[name]}": hook(name, i) for i in range(n_layers) for name in needs}

    noted = hooks(lambda name, i: partial(note, name=name))
    streams = [Stream(weights.enter(base, slice(0, n_pos)), noted, keep=keep)]
    first = torch.where(differ.any(1), differ.int().argmax(1), n_pos)
    starts = first[first < n_pos].unique()
    starts = starts[:: -(-len(starts) // STREAMS) or 1].contiguous()
    of_start = torch.searchsorted(starts, first, right=True) - 1
    over = []
    for j, start in enumerate(starts.tolist()):
        here = ((of_start == j) & (first < n_pos)).nonzero().flatten()
        rows, own = on_device(here, base.device), first[here]
        new = None if (own == start).all() else on_device(torch.arange(start, n_pos) >= own[:, None], base.device)
        over.append(partial(note_over, rows=rows, start=start, new=new))
        noted = hooks(lambda name, i: partial(over[-1], name=name, i=i))
        resid = weights.enter(source[rows, start:], slice(start, n_pos))
        streams.append(Stream(resid, noted, past=Past(start, keep, rows)))
    for s in streams:
        n_rows = s.resid.shape[:2].numel()
        for layer in weights.layers:
            tally.block(layer, n_rows, n_pos)
    final, *finals = run_streams(weights, streams)
    of_base["resid_pre"].append(final)
    for put, x in zip(over, finals):
        put(x, name="resid_pre", i=n_layers)
    if not over:
        of_source = of_base
    base_run, source_run = (run | {"resid_post": run["resid_pre"][1:]} for run in (of_base, of_source))
    return base_run, source_run, keep
