"""Edge patching through TransformerLens' own forward, with hooks on each receiver's copy of the residual stream."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from jaxtyping import Int
from torch import Tensor

from ...forward import run
from ...lens import LensModel
from ..cells import Cells, Request, on_device
from ..runs import Kept
from .cells import Group, grouped, sent
from .streams import attention_hook, hooks_read, mlp_hook, output_weights
from .wiring import ATTENTION, Wiring


def record(model: LensModel, wiring: Wiring, tokens: Int[Tensor, "prompt pos"]) -> Kept:
    """What senders wrote, and the residual stream of each layer, the final one last."""
    attention = "z" if wiring.by_head else "attn_out"
    kept: Kept = {"resid_pre": [], attention: [], "mlp_out": []}
    hooks = {}
    for i in range(wiring.n_layers):
        names = {"resid_pre": f"blocks.{i}.hook_resid_pre", attention: attention_hook(wiring, i)}
        names |= {"mlp_out": mlp_hook(i)} if wiring.has_mlp else {}
        for name, hook in names.items():
            hooks[hook] = partial(lambda x, name: kept[name].append(x.detach().clone()), name=name)
    kept["resid_pre"].append(run(model, tokens, hooks=hooks))
    return kept


def final_residuals(
    model: LensModel, wiring: Wiring, request: Request, base: Kept, source: Kept, cells: Cells, rows: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """(indices of cells, their final residual streams at the positions read), `rows` prompts at a time.

    Within `split_inputs`.
    """
    reads = on_device(torch.tensor(request.reads), base["resid_pre"][0].device)
    for group in grouped(wiring, cells):
        for here in torch.arange(len(group.index)).split(rows):
            yield group.index[here], _finals(model, wiring, base, source, group, here)[:, reads]


def _finals(model: LensModel, wiring: Wiring, base: Kept, source: Kept, group: Group, here: Tensor) -> Tensor:
    """Final residual streams of some edges of a group."""
    of_layer, prompt = partial(output_weights, model, None), group.prompt[here]
    change = sent(wiring, base, source, of_layer, group.sender[here], prompt, slice(None))
    head = on_device(group.head[here], change.device)
    each = torch.arange(len(here), device=change.device)

    def hook(x: Tensor) -> Tensor:
        if group.kind not in ATTENTION:
            return x + change
        new = x.clone()
        new[each, :, head] += change
        return new

    resid = base["resid_pre"][group.layer][on_device(prompt, change.device)]
    if group.kind == "logits":
        return resid + change
    (name,) = hooks_read(None, group.layer, group.kind)
    return run(model, resid=resid, start_layer=group.layer, hooks={name: hook})
