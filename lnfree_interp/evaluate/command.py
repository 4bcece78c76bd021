"""The work of python -m lnfree_interp.evaluate."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from .. import cli, distributed
from ..figures.evaluate import loss_figure, reliability_figure
from ..lens import LensModel
from .compare import comparison_of, comparison_sums
from .hellaswag import ending_scores, hellaswag_items, hellaswag_of
from .loss import KEPT, evaluation_of, loss_sums
from .samples import Samples, generate_samples
from .table import loss_table


def baselines(models: dict[str, bool]) -> dict[str, str | None]:
    """For each LN-free model (True) the nearest model with LayerNorm named before it, else None."""
    found: dict[str, str | None] = {}
    latest = None
    for name, ln_free in models.items():
        found[name] = latest if ln_free else None
        latest = latest if ln_free else name
    return found


def run(args) -> None:
    items = hellaswag_items(args.hellaswag, limit=args.items) if args.hellaswag else []
    models = dict(cli.models(args))
    rows, first, tokens = _same_rows(args, models)
    losses, scores = {}, {}
    for name, model in models.items():
        part = None
        with cli.bar(f"{name} loss", "sequence") as progress:
            if tokens:
                part = loss_sums(model, tokens, first=first, keep=KEPT, progress=progress)
        if parts := distributed.gather(part):
            losses[name] = evaluation_of(model, parts, keep=KEPT, seed=args.seed)
    compared = None
    with cli.bar("comparison", "sequence") as progress:
        if tokens:
            compared = comparison_sums(models, tokens, first=first, n_bins=args.bins, progress=progress)
    of_comparison = distributed.gather(compared)
    for name, model in models.items() if items else ():
        with cli.bar(f"{name} HellaSwag", "item") as progress:
            scored = ending_scores(model, items, distributed.shard(len(items)), progress=progress)
        if of_items := distributed.gather(scored):
            scores[name] = hellaswag_of(of_items, model=name)
    if distributed.rank() == 0:
        comparison = comparison_of(tuple(models), of_comparison, seed=args.seed)
        samples = None if args.prompt is None else generate_samples(models, args.prompt, seed=args.seed)
        ln_free = {name: model.cfg.normalization_type is None for name, model in models.items()}
        _report(args, rows.size, ln_free, losses, comparison, scores, samples)


def _same_rows(args, models: dict[str, LensModel]):
    """The rows of tokens, the same for all models; the number of the first that is this process', and its own."""
    (one, *names), (model, *others) = models, models.values()
    rows = cli.token_rows(args, model, context=args.context)
    first, tokens = cli.shards(rows)
    for name, model in zip(names, others):
        other = cli.token_rows(args, model, context=args.context)
        if other.shape != rows.shape or not all(map(np.array_equal, tokens, cli.shards(other)[1])):
            raise ValueError(f"models {one} and {name} read the text as different tokens")
    return rows, first, tokens


def _report(args, n_tokens: int, ln_free: dict[str, bool], losses, comparison, scores, samples: Samples | None) -> None:
    gaps = loss_table(losses, baselines(ln_free), seed=args.seed).table()
    details = pd.concat([r.table() for r in losses.values()], ignore_index=True)
    details.insert(0, "model", list(losses))
    worst = pd.DataFrame([{"model": name, **vars(w)} for name, r in losses.items() for w in r.worst])
    tables = {"evaluate": gaps.merge(details, on="model", sort=False), "evaluate_worst": worst}
    if scores:
        table = pd.concat([r.table() for r in scores.values()], ignore_index=True)
        table.insert(0, "model", list(scores))
        tables["hellaswag"] = table

    source = args.data or (Path(args.text).name if args.text else "the embedded validation text")
    cli.show(gaps, f"Loss on {n_tokens:,} tokens of {source} (nats per token; gap in brackets)")
    cli.show(details, "Tokens' losses")
    cli.show(comparison.table(), "Divergence (nats), agreement, entropy (nats), calibration")
    cli.show(worst, "Worst sequences")
    if scores:
        cli.show(tables["hellaswag"], "HellaSwag")
    if samples is not None:
        for name, text in zip(samples.names, samples.texts):
            print(f"\n--- {name}\n{samples.prompt}{text[0]}")
    cli.save(args.out, "evaluate", tables.pop("evaluate"), loss_figure(losses))
    cli.save(args.out, "calibration", comparison.table(), reliability_figure(comparison))
    for stem, table in tables.items():
        cli.save(args.out, stem, table)
