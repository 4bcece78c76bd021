"""The work of python -m lnfree_interp.evaluate."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from .. import cli
from ..figures.evaluate import loss_figure, reliability_figure
from .compare import compare_models
from .hellaswag import hellaswag, hellaswag_items
from .loss import evaluate_loss, loss_table
from .samples import generate_samples


def baselines(models: dict[str, bool]) -> dict[str, str | None]:
    """For each LN-free model (True) the nearest model with LayerNorm named before it, else None."""
    found: dict[str, str | None] = {}
    latest = None
    for name, ln_free in models.items():
        found[name] = latest if ln_free else None
        latest = latest if ln_free else name
    return found


def run(args) -> None:
    items = hellaswag_items(args.hellaswag, limit=args.items) if args.hellaswag else None
    models = dict(cli.models(args))
    names = list(models)
    per_model = [cli.load_tokens(args, model, context=args.context) for model in models.values()]
    tokens = per_model[0]
    for name, other in zip(names, per_model):
        if other.shape != tokens.shape or not bool((other == tokens).all()):
            raise ValueError(f"models {names[0]} and {name} read the text as different tokens")
    losses = {}
    for name, model in models.items():
        with cli.bar(f"{name} loss", "sequence") as progress:
            losses[name] = evaluate_loss(model, tokens, seed=args.seed, progress=progress)
    ln_free = {name: model.cfg.normalization_type is None for name, model in models.items()}
    gaps = loss_table(losses, baselines(ln_free), seed=args.seed).table()
    details = pd.concat([r.table() for r in losses.values()], ignore_index=True)
    details.insert(0, "model", names)
    with cli.bar("comparison", "sequence") as progress:
        comparison = compare_models(models, tokens, n_bins=args.bins, seed=args.seed, progress=progress)
    worst = pd.DataFrame([{"model": name, **vars(w)} for name, r in losses.items() for w in r.worst])
    tables = {"evaluate": gaps.merge(details, on="model", sort=False), "evaluate_worst": worst}
    if items:
        scores = {}
        for name, model in models.items():
            with cli.bar(f"{name} HellaSwag", "item") as progress:
                scores[name] = hellaswag(model, items, progress=progress)
        table = pd.concat([r.table() for r in scores.values()], ignore_index=True)
        table.insert(0, "model", names)
        tables["hellaswag"] = table
    samples = None if args.prompt is None else generate_samples(models, args.prompt, seed=args.seed)

    source = args.data or (Path(args.text).name if args.text else "the embedded validation text")
    cli.show(gaps, f"Loss on {tokens.numel():,} tokens of {source} (nats per token; gap in brackets)")
    cli.show(details, "Tokens' losses")
    cli.show(comparison.table(), "Divergence (nats), agreement, entropy (nats), calibration")
    cli.show(worst, "Worst sequences")
    if items:
        cli.show(tables["hellaswag"], "HellaSwag")
    if samples is not None:
        for name, text in zip(samples.names, samples.texts):
            print(f"\n--- {name}\n{samples.prompt}{text[0]}")
    cli.save(args.out, "evaluate", tables.pop("evaluate"), loss_figure(losses))
    cli.save(args.out, "calibration", comparison.table(), reliability_figure(comparison))
    for stem, table in tables.items():
        cli.save(args.out, stem, table)
