"""python -m lnfree_interp.evaluate"""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from pathlib import Path

from .compare import compare_models
from .hellaswag import HUB, hellaswag, hellaswag_items
from .loss import evaluate_loss, loss_table
from .samples import generate_samples


def main(argv=None) -> int:
    from .. import cli

    parser = cli.parser("evaluate", "Losses, divergences and calibration of models on the same tokens.")
    parser.add_argument("--context", type=cli.positive_int, default=512, help="tokens per sequence (512)")
    parser.add_argument("--bins", type=cli.positive_int, default=15, help="bins of the calibration error (15)")
    parser.add_argument(
        "--hellaswag",
        nargs="?",
        const=HUB,
        metavar="FILE",
        help="HellaSwag as well, from a .jsonl file or (without one) the hub",
    )
    parser.add_argument("--items", type=cli.positive_int, metavar="N", help="HellaSwag items to use (all)")
    parser.add_argument("--prompt", help="show what each model writes after this")
    args = parser.parse_args(argv)
    return cli.guard(_command, args, parser.prog)


def baselines(models: dict[str, bool]) -> dict[str, str | None]:
    """For each LN-free model (True) the nearest model with LayerNorm named before it, else None."""
    found, latest = {}, None
    for name, ln_free in models.items():
        found[name] = latest if ln_free else None
        latest = latest if ln_free else name
    return found


@contextmanager
def _bar(label: str, total: int):
    from tqdm import tqdm

    with tqdm(total=total, desc=label, unit="item", disable=None, leave=False) as shown:
        yield lambda done, _: shown.update(done - shown.n)


def _command(args) -> None:
    import pandas as pd

    from .. import cli
    from ..figures.evaluate import loss_figure, reliability_figure

    items = hellaswag_items(args.hellaswag, limit=args.items) if args.hellaswag else None
    models = dict(cli.models(args))
    names = list(models)
    per_model = [cli.load_tokens(args, model, context=args.context) for model in models.values()]
    tokens = per_model[0]
    for name, other in zip(names, per_model):
        if other.shape != tokens.shape or not bool((other == tokens).all()):
            raise ValueError(f"models {names[0]} and {name} read the text as different tokens")
    passes = list(tokens.split(max(1, 2048 // tokens.shape[1])))
    bar = partial(cli.progress, total=len(passes), unit="pass")

    losses = {
        name: evaluate_loss(model, bar(passes, label=f"{name} loss"), seed=args.seed) for name, model in models.items()
    }
    ln_free = {name: model.cfg.normalization_type is None for name, model in models.items()}
    gaps = loss_table(losses, baselines(ln_free), seed=args.seed).table()
    details = pd.concat([r.table() for r in losses.values()], ignore_index=True)
    details.insert(0, "model", names)
    comparison = compare_models(models, bar(passes, label="comparison"), n_bins=args.bins, seed=args.seed)
    worst = pd.DataFrame([{"model": name, **vars(w)} for name, r in losses.items() for w in r.worst])
    tables = {"evaluate": gaps.merge(details, on="model", sort=False), "evaluate_worst": worst}
    if items:
        scores = {}
        for name, model in models.items():
            with _bar(f"{name} HellaSwag", len(items)) as progress:
                scores[name] = hellaswag(model, items, progress=progress)
        table = pd.concat([r.table() for r in scores.values()], ignore_index=True)
        table.insert(0, "model", names)
        tables["hellaswag"] = table
    if args.prompt is not None:
        samples = generate_samples(models, args.prompt, seed=args.seed)

    source = args.data or (Path(args.text).name if args.text else "the embedded validation text")
    cli.show(gaps, f"Loss on {tokens.numel():,} tokens of {source} (nats per token; gap in brackets)")
    cli.show(details, "Tokens' losses")
    cli.show(comparison.table(), "Divergence (nats), agreement, entropy (nats), calibration")
    cli.show(worst, "Worst sequences")
    if items:
        cli.show(tables["hellaswag"], "HellaSwag")
    if args.prompt is not None:
        for name, text in zip(samples.names, samples.texts):
            print(f"\n--- {name}\n{samples.prompt}{text[0]}")
    cli.save(args.out, "evaluate", tables.pop("evaluate"), loss_figure(losses))
    cli.save(args.out, "calibration", comparison.table(), reliability_figure(comparison))
    for stem, table in tables.items():
        cli.save(args.out, stem, table)


if __name__ == "__main__":
    raise SystemExit(main())
