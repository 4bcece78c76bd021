"""Activation patching here against transformer_lens.patching: 16 pairs of 16 tokens, interleaved.

The pairs differ at positions 3 and 5, or at position 11 alone, as in the papers' IOI prompts. TransformerLens runs
the whole model once for each cell, all prompts together; its metric is the same logit difference. `--quick` times
it on one position or head of each layer only, or of `MOST_CELLS` layers spread over all, and scales that up: its time
is the same for every cell.
"""

from __future__ import annotations

import pandas as pd
import torch

from lnfree_interp.pairs import PromptPairs
from lnfree_interp.patching import activation_patching

from .common import interleaved, median, random_model

MOST_CELLS = 12  # of TransformerLens', with --quick
CHANGED = {"3 and 5": (3, 5), "11": (11,)}


def shaped_pairs(model, changed: tuple[int, ...], n: int = 16, n_pos: int = 16, seed: int = 0) -> PromptPairs:
    """Random prompts that differ at the positions named, with random answers."""
    generator = torch.Generator().manual_seed(seed)
    clean, answers = (
        torch.randint(model.cfg.d_vocab - 1, shape, generator=generator) for shape in ((n, n_pos), (n, 1))
    )
    corrupted = clean.clone()
    corrupted[:, list(changed)] += 1
    return PromptPairs(clean, corrupted, torch.cat([answers, answers + 1], 1)).to(model.cfg.device)


def cells_of(model, pairs: PromptPairs, site: str, quick: bool) -> pd.DataFrame:
    """The cells TransformerLens runs: all of them, or in some layers one that has an effect."""
    second, n = ("head", model.cfg.n_heads) if site == "z" else ("pos", pairs.clean.shape[1])
    chosen = [int(pairs.first_difference[0]) if second == "pos" else 0] if quick else range(n)
    layers = range(model.cfg.n_layers)
    if quick:
        layers = layers[:: -(-len(layers) // MOST_CELLS)]
    cells = [(layer, unit) for layer in layers for unit in chosen]
    return pd.DataFrame(cells, columns=["layer", second])


@torch.no_grad()
def by_transformer_lens(model, pairs: PromptPairs, site: str, cells: pd.DataFrame):
    """The same effects from transformer_lens.patching, averaged over prompts as it returns them."""
    from transformer_lens import patching

    def metric(logits):
        last = logits[:, -1].gather(-1, pairs.answers)
        return (last[:, 0] - last[:, 1]).mean()

    setter = patching.layer_head_vector_patch_setter if site == "z" else patching.layer_pos_patch_setter
    ends = "attn.hook_z" if site == "z" else f"hook_{site}"
    _, cache = model.run_with_cache(pairs.clean, names_filter=lambda name: name.endswith(ends))
    return patching.generic_activation_patch(model, pairs.corrupted, cache, metric, setter, site, index_df=cells.copy())


def run(args) -> pd.DataFrame:
    """Median seconds of both ways, their ratio, FLOPs saved, and the largest difference between the results."""
    import transformer_lens.patching as theirs

    theirs.tqdm = lambda x, **_: x  # no bar while timing
    rows = []
    model = random_model(args.shape, True, args.device)
    for where, changed in CHANGED.items():
        pairs = shaped_pairs(model, changed)
        for site in ("resid_pre", "attn_out", "mlp_out", "z"):
            cells, results = cells_of(model, pairs, site, args.quick), {}

            def ours(site=site, pairs=pairs, results=results):
                results["ours"] = activation_patching(model, pairs, site=site)

            def lens(site=site, pairs=pairs, cells=cells, results=results):
                results["lens"] = by_transformer_lens(model, pairs, site, cells)

            seconds = interleaved({"ours": ours, "lens": lens}, args.repeats, args.device)
            effect = results["ours"]
            n_cells = effect.values[0].numel()
            fast, slow = median(seconds["ours"]), median(seconds["lens"]) * n_cells / len(cells)
            got = effect.values.mean(0)[tuple(torch.tensor(cells.values.T))]
            wanted = results["lens"].to(got) - effect.corrupted.mean()
            spent, plain = effect.flops or (float("nan"), float("nan"))
            rows.append(
                {
                    "pairs differ at": where,
                    "site": site,
                    "cells": n_cells,
                    "run": effect.cells_run / len(pairs),
                    "transformer_lens s": slow,
                    "lnfree_interp s": fast,
                    "times faster": slow / fast,
                    "times fewer FLOPs": plain / spent,
                    "largest effect": wanted.abs().max().item(),
                    "largest difference": (got - wanted).abs().max().item(),
                }
            )
    return pd.DataFrame(rows)
