"""Attributing to all neurons of a layer by all heads, against TransformerLens' own way and against a bare forward."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import torch

from lnfree_interp.dla import Reader, attribution_to, attributions_to, effect_on

from .common import interleaved, median, peak_memory, random_model

BATCH, POS = 8, 128
HEADS_AT_A_TIME = 12  # of TransformerLens' way: outputs of all at once would be several GB


def transformer_lens_way(model, tokens, layer: int, keep: Callable[[torch.Tensor], None]) -> None:
    """Cache everything, stack every head's output, scale it by the layer's norm, multiply it with W_in; in parts."""
    _, cache = model.run_with_cache(tokens)
    heads = cache.stack_head_results(layer=layer + 1, pos_slice=None)  # [head, batch, pos, d_model]
    heads = heads[: (layer + 1) * model.cfg.n_heads]
    for part in heads.split(HEADS_AT_A_TIME):
        part = cache.apply_ln_to_stack(part, layer=layer, mlp_input=True, pos_slice=None)
        keep(torch.einsum("hbpd,dn->hbpn", part, model.blocks[layer].mlp.W_in))


def run(args) -> pd.DataFrame:
    """Seconds, ratios and peak memory, 8 x 128 tokens, all positions, LN and LN-free."""
    return pd.DataFrame([row for normalised in (True, False) for row in _rows(args, normalised)])


@torch.no_grad()
def _rows(args, normalised: bool) -> list[dict]:
    model = random_model(args.shape, normalised, args.device)
    tokens = torch.randint(model.cfg.d_vocab, (BATCH, POS), generator=torch.Generator().manual_seed(0)).to(args.device)
    middle, last = model.cfg.n_layers // 2 - 1, model.cfg.n_layers - 1
    _agree(model, tokens, middle)
    heads = [f"L{i}H{h}" for i in range(last + 1) for h in range(model.cfg.n_heads)]

    def theirs(layer: int) -> None:
        """All numbers, one after another in memory: the same result."""
        out = torch.empty((layer + 1) * model.cfg.n_heads, *tokens.shape, model.cfg.d_mlp, device=args.device)
        parts = iter(out.split(HEADS_AT_A_TIME))
        transformer_lens_way(model, tokens, layer, lambda part: next(parts).copy_(part))

    def sizes() -> torch.Tensor:
        """What is reduced on the way: each head's mean size for each neuron."""
        parts = attributions_to(model, tokens, Reader.neuron(last), by="head", senders=heads)
        return torch.cat([part.values.abs().mean((2, 3)) for part in parts])

    def ours(function, layer: int) -> object:
        of_layers = heads[: (layer + 1) * model.cfg.n_heads]
        return function(model, tokens, Reader.neuron(layer), by="head", senders=of_layers)

    ways: dict[str, Callable[[], object]] = {
        "bare forward": lambda: model(tokens),
        f"transformer_lens, layer {last}": lambda: theirs(last),
        f"attribution, layer {last}": lambda: ours(attribution_to, last),
        f"attribution, layer {middle}": lambda: ours(attribution_to, middle),
        f"effect, layer {last}": lambda: ours(effect_on, last),
        f"attribution, layer {last}, reduced on the way": sizes,
    }
    if args.quick:
        ways = {name: way for name, way in ways.items() if str(last) not in name}
    seconds = {name: median(t) for name, t in interleaved(ways, args.repeats, args.device).items()}
    usual = seconds.get(f"transformer_lens, layer {last}", float("nan"))
    return [
        {
            "normalization": str(model.cfg.normalization_type),
            "way": name,
            "seconds": seconds[name],
            "times faster than transformer_lens": usual / seconds[name] if str(last) in name else float("nan"),
            "forwards": seconds[name] / seconds["bare forward"],
            "peak MiB": peak_memory(way, args.device),
        }
        for name, way in ways.items()
    ]


def _agree(model, tokens, layer: int) -> None:
    """Both ways give the same numbers, on a part of the tokens."""
    found = attribution_to(model, tokens[:1], Reader.neuron(layer), by="head")
    heads = [i for i, label in enumerate(found.labels) if "H" in label]
    parts: list[torch.Tensor] = []
    transformer_lens_way(model, tokens[:1], layer, parts.append)
    theirs = torch.cat(parts)
    difference = (found.values[:, heads] - theirs.permute(3, 0, 1, 2)).abs().max() / theirs.abs().max()
    assert difference < 1e-4, f"the two ways differ by {difference:.1e}"
