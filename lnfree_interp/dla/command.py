"""The work of python -m lnfree_interp.dla."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch

from .. import cli
from ..batching import check_tokens
from ..figures.dla import head_heatmaps, heads_of
from ..lens import LensModel
from .attribution import logit_attributions
from .error import HEADS, attribution_error
from .request import TOKENS_PER_PASS
from .result import LogitAttribution


def run(args) -> None:
    errors, components, prompts = [], [], []
    panels: dict[str, dict] = {"attribution": {}, "direct effect": {}, "difference": {}}
    for name, model in cli.models(args):
        tokens = cli.load_tokens(args, model, context=args.context)
        prompts.append((name, *_sample(model, args.prompt, args.top)))
        for target in ("next token", "token just read"):
            targets = None if target == "next token" else tokens
            positions = None if args.positions == "all" else -2 if targets is None else -1
            linear, exact = _streamed(model, tokens, targets, positions, name)
            error = attribution_error(linear, exact, components=HEADS, draws=args.draws, seed=args.seed)
            errors.append(
                {
                    "model": name,
                    "normalization": str(model.cfg.normalization_type),
                    "target": target,
                    "NMAE": f"{error.pooled:.2%}",
                    "95% interval": f"[{error.interval[0]:.2%}, {error.interval[1]:.2%}]",
                    "mean of heads": f"{error.per_component.mean().item():.2%}",
                    "sequences": len(tokens),
                    "tokens": linear.values[0].numel(),
                }
            )
            if targets is None:
                grids = {"attribution": linear.values, "direct effect": exact.values}
                grids["difference"] = linear.values - exact.values
                for kind, values in grids.items():
                    panels[kind][f"{name}: {kind}"] = heads_of(values, linear.labels)
                columns = {"model": name, **_means(linear, exact)}
                per_head = error.table().rename(columns={"low": "nmae_low", "high": "nmae_high"})
                components.append(pd.DataFrame(columns).merge(per_head, on="component", how="left"))
    cli.show(pd.DataFrame(errors), "Direct logit attribution against direct effect, attention heads (pooled NMAE)")
    for name, target, table in prompts:
        cli.show(table, f"{name}: {args.prompt!r} -> {target!r}, components of the logit")
    figure = head_heatmaps(
        panels["attribution"] | panels["direct effect"] | panels["difference"],
        title="Mean attribution of each head to the next token's logit",
        columns=len(args.model),
    )
    cli.save(args.out, "dla", pd.concat(components), figure)


def _streamed(model: LensModel, tokens, targets, positions, name: str) -> tuple[LogitAttribution, LogitAttribution]:
    """`logit_attributions` by heads, with a progress bar over the sequences; results on the CPU."""
    pieces: list[tuple[LogitAttribution, LogitAttribution]] = []
    done = 0
    with cli.bar(name, "sequence") as progress:
        for rows in torch.arange(len(tokens)).split(max(1, TOKENS_PER_PASS // tokens.shape[1])):
            chosen = None if targets is None else targets[rows]
            pieces.append(logit_attributions(model, tokens[rows], chosen, positions=positions, by="head"))
            done += len(rows)
            progress(done, len(tokens))
    linear, exact = (_joined(parts) for parts in zip(*pieces))
    return linear, exact


def _joined(parts: Sequence[LogitAttribution]) -> LogitAttribution:
    """Results on batches of sequences as one, on the CPU."""
    values = torch.cat([p.values.cpu() for p in parts], dim=1)
    return LogitAttribution(values, parts[0].labels, torch.cat([p.bias.cpu() for p in parts]), parts[0].positions)


def _means(linear: LogitAttribution, exact: LogitAttribution) -> dict:
    return {
        "component": list(linear.labels),
        "attribution": linear.values.flatten(1).double().mean(1).tolist(),
        "direct_effect": exact.values.flatten(1).double().mean(1).tolist(),
    }


def _sample(model: LensModel, prompt: str, top: int):
    """(most likely next token, table of the components with the largest attribution to its logit)."""
    if model.tokenizer is None:
        raise ValueError(f"{model.cfg.model_name} has no tokenizer, so the prompt cannot be read for it")
    if not prompt:
        raise ValueError("--prompt is empty")
    tokens = model.to_tokens(prompt, truncate=False)
    check_tokens(model, tokens)
    target = model(tokens)[:, -1].argmax(-1)
    linear, exact = logit_attributions(model, tokens, target, by="head")
    largest = linear.values[:, 0, 0].abs().topk(min(top, len(linear.labels))).indices.tolist()
    table = pd.DataFrame(
        {
            "component": [linear.labels[i] for i in largest],
            "attribution": [linear.values[i, 0, 0].item() for i in largest],
            "direct effect": [exact.values[i, 0, 0].item() for i in largest],
        }
    )
    return model.tokenizer.decode(target), table
