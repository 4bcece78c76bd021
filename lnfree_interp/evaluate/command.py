"""The work of python -m lnfree_interp.evaluate."""

from __future__ import annotations

import numpy as np
import pandas as pd

from .. import cli, distributed
from ..figures.evaluate import loss_figure, reliability_figure
from ..figures.report import Part
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
    if items and args.items:
        cli.clip(args, "items", len(items), "HellaSwag items")
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
    compared = comparison.table()
    tables = {"": gaps.merge(details, on="model", sort=False), "compared": compared, "worst": worst}
    title = f"Loss on {n_tokens:,} tokens of {cli.source(args)} (nats per token; gap in brackets)"
    of_both = "Divergence (nats), agreement, entropy (nats), calibration"
    parts = [
        Part(title, table=gaps, figure=loss_figure(losses)),
        Part("Tokens' losses", table=details),
        Part(of_both, table=compared, figure=reliability_figure(comparison)),
        Part("Worst sequences", table=worst),
    ]
    if scores:
        table = pd.concat([r.table() for r in scores.values()], ignore_index=True)
        table.insert(0, "model", list(scores))
        tables["hellaswag"] = table
        parts.append(Part("HellaSwag", table=table))
    if samples is not None:
        parts += [Part(f"{n} writes", f"{samples.prompt}{text[0]}") for n, text in zip(samples.names, samples.texts)]
    cli.report(args, parts, tables)
