"""Direct logit attribution of every head, against TransformerLens' own way and against a bare forward."""

from __future__ import annotations

import pandas as pd
import torch

from lnfree_interp.dla import direct_logit_attribution, logit_attributions

from .common import interleaved, median, peak_memory, random_model

BATCH, POS = 8, 128


def transformer_lens_way(model, tokens, targets) -> torch.Tensor:
    """Cache everything, stack every head's output, scale it by the final norm, dot with the unembedding."""
    _, cache = model.run_with_cache(tokens)
    heads = cache.stack_head_results(layer=-1, pos_slice=None)  # [component, batch, pos, d_model]
    heads = cache.apply_ln_to_stack(heads, layer=-1, pos_slice=None)
    directions = model.W_U.T[targets]  # [batch, pos, d_model]
    return torch.einsum("cbpd,bpd->cbp", heads, directions)


def run(args) -> pd.DataFrame:
    """Seconds, ratios and peak memory, 8 x 128 tokens, all positions, LN and LN-free."""
    return pd.DataFrame([row for normalised in (True, False) for row in _rows(args, normalised)])


@torch.no_grad()
def _rows(args, normalised: bool) -> list[dict]:
    model = random_model(args.shape, normalised, args.device)
    generator = torch.Generator().manual_seed(0)
    tokens, targets = torch.randint(model.cfg.d_vocab, (2, BATCH, POS), generator=generator).to(args.device)
    ways = {
        "transformer_lens": lambda: transformer_lens_way(model, tokens, targets),
        "bare forward": lambda: model(tokens),
        "attribution": lambda: direct_logit_attribution(model, tokens, targets, by="head"),
        "attribution and direct effect": lambda: logit_attributions(model, tokens, targets, by="head"),
    }
    theirs, ours = ways["transformer_lens"](), ways["attribution"]()
    heads = [i for i, label in enumerate(ours.labels) if "H" in label]
    difference = (ours.values[heads] - theirs[: len(heads)]).abs().max() / theirs.abs().max()
    assert difference < 1e-4, f"the two ways differ by {difference:.1e}"
    del theirs, ours
    seconds = {name: median(t) for name, t in interleaved(ways, args.repeats, args.device).items()}
    memory = {name: peak_memory(way, args.device) for name, way in ways.items()}
    return [
        {
            "normalization": str(model.cfg.normalization_type),
            "way": name,
            "seconds": seconds[name],
            "times faster than transformer_lens": seconds["transformer_lens"] / seconds[name],
            "forwards": seconds[name] / seconds["bare forward"],
            "peak MiB": memory[name],
            "share of transformer_lens' peak": memory[name] / memory["transformer_lens"],
        }
        for name in ways
    ]
