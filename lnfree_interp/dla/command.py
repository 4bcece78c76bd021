"""The work of python -m lnfree_interp.dla."""

from __future__ import annotations

import pandas as pd
import torch

from .. import cli, distributed
from ..batching import check_tokens, token_batches
from ..figures.dla import head_heatmaps, heads_of
from ..figures.report import Part
from ..lens import LensModel
from .attribution import logit_attributions
from .error import HEADS, ErrorSums, add, error_of, merged, no_sums
from .request import TOKENS_PER_PASS


def run(args) -> None:
    first = distributed.rank() == 0
    errors, components, prompts = [], [], []
    panels: dict[str, dict] = {"attribution": {}, "direct effect": {}, "difference": {}}
    for name, model in cli.models(args):
        rows = cli.token_rows(args, model, context=args.context)
        if first:
            prompts.append((name, *_sample(args, name, model)))
        for target in ("next token", "token just read"):
            parts = distributed.gather(_summed(model, rows, target == "next token", args.positions == "last", name))
            if not first:
                continue
            sums = merged(parts)
            error = error_of(sums, components=HEADS, draws=args.draws, seed=args.seed, model=name)
            errors.append(
                {
                    "model": name,
                    "normalization": model.cfg.normalization_type or "none",
                    "target": target,
                    "NMAE": f"{error.pooled:.2%}",
                    "95% interval": f"[{error.interval[0]:.2%}, {error.interval[1]:.2%}]",
                    "mean of heads": f"{error.per_component.mean().item():.2%}",
                    "sequences": len(rows),
                    "tokens": int(sums.tokens),
                }
            )
            if target == "next token":
                linear, exact = sums.means()
                for kind, means in (("attribution", linear), ("direct effect", exact), ("difference", linear - exact)):
                    panels[kind][f"{name}: {kind}"] = heads_of(torch.from_numpy(means)[:, None], sums.labels)
                columns = {"model": name, "component": sums.labels, "attribution": linear, "direct_effect": exact}
                per_head = error.table().rename(columns={"low": "nmae_low", "high": "nmae_high"})
                components.append(pd.DataFrame(columns).merge(per_head, on="component", how="left"))
    if not first:
        return
    title = "Direct logit attribution against direct effect, attention heads (pooled NMAE)"
    shown = [Part(title, table=pd.DataFrame(errors))]
    for name, target, table in prompts:
        shown.append(Part(f"{name}: {args.prompt!r} -> {target!r}, components of the logit", table=table))
    figure = head_heatmaps(
        panels["attribution"] | panels["direct effect"] | panels["difference"],
        title="Mean attribution of each head to the next token's logit",
        columns=len(args.model),
    )
    cli.report(args, [*shown, Part("Heads", figure=figure)], {"": pd.concat(components)})


def _summed(model: LensModel, rows, to_next: bool, at_last: bool, name: str) -> ErrorSums | None:
    """Sums over this process' part of the rows, by heads; None if it has none.

    Args:
        to_next: whether the target is the next token, or else the one just read.
        at_last: only at the last position that has a target.
    """
    first, parts = cli.shards(rows)
    if not parts:
        return None
    sums = None
    with cli.bar(name, "sequence") as progress:
        for tokens in token_batches(model, parts, per_pass=TOKENS_PER_PASS, progress=progress):
            targets, position = (None, -2) if to_next else (tokens, -1)
            positions = position if at_last else None
            linear, exact = logit_attributions(model, tokens, targets, positions=positions, by="head")
            sums = no_sums(linear.labels, len(rows)) if sums is None else sums
            add(sums, linear.values, exact.values, first=first)
            first += len(tokens)
    return sums


def _sample(args, name: str, model: LensModel):
    """(most likely next token, table of the components with the largest attribution to its logit)."""
    prompt = args.prompt
    if model.tokenizer is None:
        raise ValueError(f"{model.cfg.model_name} has no tokenizer, so the prompt cannot be read for it")
    if not prompt:
        raise ValueError("--prompt is empty")
    tokens = model.to_tokens(prompt, truncate=False)
    check_tokens(model, tokens)
    target = model(tokens)[:, -1].argmax(-1)
    linear, exact = logit_attributions(model, tokens, target, by="head")
    top = cli.clip(args, "top", len(linear.labels), f"components of {name}")
    largest = linear.values[:, 0, 0].abs().topk(top).indices.tolist()
    table = pd.DataFrame(
        {
            "component": [linear.labels[i] for i in largest],
            "attribution": [linear.values[i, 0, 0].item() for i in largest],
            "direct effect": [exact.values[i, 0, 0].item() for i in largest],
        }
    )
    return model.tokenizer.decode(target), table
