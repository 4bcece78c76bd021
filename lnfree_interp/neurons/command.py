"""The work of python -m lnfree_interp.neurons."""

from __future__ import annotations

import pandas as pd

from .. import cli
from ..figures.neurons import cumulative_figure, effects_figure, scan_figure
from ..figures.report import Part
from .ablate import ablate_cumulatively, ablate_neurons
from .rank import rank_confidence_neurons


def run(args) -> None:
    rankings, singles, cumulative, scans = {}, {}, {}, {}
    neurons = args.neurons
    if neurons is not None:
        cli.unused(args, "top", "--neurons")
    common = {"layer": args.layer, "ablation": args.ablation}
    for name, model in cli.models(args):
        ranking = rank_confidence_neurons(model, args.layer)
        tokens = cli.load_tokens(args, model, context=args.context)
        if neurons is None:
            neurons = ranking.neuron.head(cli.clip(args, "top", len(ranking), f"neurons in a layer of {name}")).tolist()
        rankings[name] = ranking
        exact = {**common, "method": args.method, "tolerance": args.tolerance}
        with cli.bar(f"{name} ablation", "unit") as progress:
            singles[name] = ablate_neurons(model, tokens, neurons=neurons, progress=progress, **exact)
        with cli.bar(f"{name} cumulative", "unit") as progress:
            cumulative[name] = ablate_cumulatively(model, tokens, neurons, progress=progress, **common)
        if args.scan:
            with cli.bar(f"{name} scan", "unit") as progress:
                scans[name] = ablate_neurons(model, tokens, progress=progress, **exact)

    parts = []
    for name, ranking in rankings.items():
        asked = ranking.assign(rank=range(1, len(ranking) + 1))
        shown = asked[asked.neuron.isin(neurons) | (asked["rank"] <= 10)]
        title = f"{name}: |w_out| / LogitVar, and the share of w_out in W_U's near-null space"
        parts.append(Part(title, table=shown))
    ablated = _joined({name: result.table() for name, result in singles.items()})
    together = _joined({name: _relative(result) for name, result in cumulative.items()})
    columns = ["model", "neuron", "loss", "loss_abs_median", "loss_abs_through_scale", "entropy"]
    alone = ablated[[*columns, "entropy_abs_median", "entropy_abs_through_scale"]]
    title = "Ablated one on top of the other (nats, and in % of the mean)"
    parts += [
        Part("Each ablated alone (nats)", table=alone, figure=effects_figure(singles)),
        Part(title, table=together, figure=cumulative_figure(cumulative)),
    ]
    ranked = pd.concat([r.assign(model=name) for name, r in rankings.items()])
    tables = {"": ablated, "ranking": ranked[["model", *ranked.columns[:-1]]], "cumulative": together}
    if args.scan:
        scanned = _joined({name: result.table() for name, result in scans.items()})
        for name, result in scans.items():
            top = scanned[scanned.model == name].nlargest(10, "loss_abs")
            series = f"series certified to {result.bound:.1g} nats, {result.streamed:.2%} summed exactly"
            title = f"{name}: largest of {len(result.labels)} ({series})"
            parts.append(Part(title, table=top[[*columns, "loss_abs"]]))
        parts.append(Part("Each neuron of the layer", figure=scan_figure(scans, rankings)))
        tables["scan"] = scanned
    cli.report(args, parts, tables)


def _joined(tables: dict):
    joined = pd.concat([table.assign(model=name) for name, table in tables.items()], ignore_index=True)
    return joined[["model", *joined.columns[:-1]]]


def _relative(result):
    """Mean changes, also in percent of the mean loss and entropy without ablation."""
    table = result.table()[["neuron", "loss", "entropy"]]
    table["loss_percent"] = 100 * table.loss / result.baseline_loss.double().mean().item()
    table["entropy_percent"] = 100 * table.entropy / result.baseline_entropy.double().mean().item()
    return table
