"""python -m lnfree_interp.neurons"""

from __future__ import annotations

from contextlib import contextmanager

from .ablate import ABLATIONS, METHODS, ablate_cumulatively, ablate_neurons
from .rank import rank_confidence_neurons


def main(argv=None) -> int:
    from .. import cli

    parser = cli.parser("neurons", "Confidence neurons: ranking, ablation, scan of a layer.", tokens=2048)
    parser.add_argument("--layer", type=int, default=-1, help="the neurons' layer (default: the last)")
    parser.add_argument(
        "--neurons",
        type=int,
        nargs="+",
        metavar="N",
        help="neurons to ablate (default: the --top ones of the first model's ranking)",
    )
    parser.add_argument("--top", type=cli.positive_int, default=3, metavar="N", help="how many of the ranking (3)")
    parser.add_argument("--scan", action="store_true", help="ablate each neuron of the layer")
    parser.add_argument("--ablation", choices=ABLATIONS, default="mean")
    parser.add_argument("--method", choices=METHODS, default="auto")
    parser.add_argument("--tolerance", type=float, default=1e-5, help="largest error of a series, nats (1e-5)")
    parser.add_argument("--context", type=cli.positive_int, default=512, help="tokens per sequence (512)")
    args = parser.parse_args(argv)
    return cli.guard(_command, args, parser.prog)


@contextmanager
def bar(label: str):
    """A progress bar fed with (done, in all)."""
    from tqdm import tqdm

    layout = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    with tqdm(total=1, desc=label, bar_format=layout, disable=None, leave=False) as shown:

        def tell(done: int, in_all: int) -> None:
            shown.total = in_all
            shown.update(done - shown.n)

        yield tell


def _command(args) -> None:
    import pandas as pd

    from .. import cli
    from ..figures.neurons import cumulative_figure, effects_figure, scan_figure

    rankings, singles, cumulative, scans = {}, {}, {}, {}
    neurons = args.neurons
    common = {"layer": args.layer, "ablation": args.ablation}
    for name, model in cli.models(args):
        ranking = rank_confidence_neurons(model, args.layer)
        tokens = cli.load_tokens(args, model, context=args.context)
        if neurons is None:
            neurons = ranking.neuron.head(args.top).tolist()
        rankings[name] = ranking
        exact = {**common, "method": args.method, "tolerance": args.tolerance}
        with bar(f"{name} ablation") as progress:
            singles[name] = ablate_neurons(model, tokens, neurons=neurons, progress=progress, **exact)
        with bar(f"{name} cumulative") as progress:
            cumulative[name] = ablate_cumulatively(model, tokens, neurons, progress=progress, **common)
        if args.scan:
            with bar(f"{name} scan") as progress:
                scans[name] = ablate_neurons(model, tokens, progress=progress, **exact)

    for name, ranking in rankings.items():
        asked = ranking.assign(rank=range(1, len(ranking) + 1))
        shown = asked[asked.neuron.isin(neurons) | (asked["rank"] <= 10)]
        cli.show(shown, f"{name}: |w_out| / LogitVar, and the share of w_out in W_U's near-null space")
    ablated = _joined({name: result.table() for name, result in singles.items()})
    together = _joined({name: _relative(result) for name, result in cumulative.items()})
    columns = ["model", "neuron", "loss", "loss_abs_median", "loss_abs_through_scale", "entropy"]
    cli.show(ablated[[*columns, "entropy_abs_median", "entropy_abs_through_scale"]], "Each ablated alone (nats)")
    cli.show(together, "Ablated one on top of the other (nats, and in % of the mean)")
    if args.scan:
        scanned = _joined({name: result.table() for name, result in scans.items()})
        for name, result in scans.items():
            top = scanned[scanned.model == name].nlargest(10, "loss_abs")
            series = f"series certified to {result.bound:.1g} nats, {result.streamed:.2%} summed exactly"
            cli.show(top[[*columns, "loss_abs"]], f"{name}: largest of {len(result.labels)} ({series})")
    ranked = pd.concat([r.assign(model=name) for name, r in rankings.items()])
    cli.save(args.out, "neurons_ranking", ranked[["model", *ranked.columns[:-1]]])
    cli.save(args.out, "neurons", ablated, effects_figure(singles))
    cli.save(args.out, "neurons_cumulative", together, cumulative_figure(cumulative))
    if args.scan:
        cli.save(args.out, "neurons_scan", scanned, scan_figure(scans, rankings))


def _joined(tables: dict):
    import pandas as pd

    joined = pd.concat([table.assign(model=name) for name, table in tables.items()], ignore_index=True)
    return joined[["model", *joined.columns[:-1]]]


def _relative(result):
    """Mean changes, also in percent of the mean loss and entropy without ablation."""
    table = result.table()[["neuron", "loss", "entropy"]]
    table["loss_percent"] = 100 * table.loss / result.baseline_loss.double().mean().item()
    table["entropy_percent"] = 100 * table.entropy / result.baseline_entropy.double().mean().item()
    return table


if __name__ == "__main__":
    raise SystemExit(main())
