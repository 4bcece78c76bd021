"""The work of python -m lnfree_interp.probe."""

from __future__ import annotations

import pandas as pd

from .. import cli
from ..figures.probe import evaluation_figure, evidence_figure, reading_figure, swap_figure
from ..figures.report import Part
from ..lens import LensModel
from .causal import ConceptSwap, swap_concepts
from .data import ProbeData
from .evaluation import ProbeEvaluation, evaluate_probe
from .evidence import ConceptEvidence, evidence_of_data, pooled_error
from .fitting import fit_probe
from .hyperprobe import HyperProbe, held_out
from .reading import ProbeReading
from .tasks import analogy_data, recall_data
from .training import Training

_MEANS = "components, means over prompts (error of |attribution - effect|, size of |effect|)"


def run(args) -> None:
    probes: dict[str, HyperProbe] = {}
    found: dict[str, ProbeEvaluation] = {}
    edits: dict[str, ConceptSwap] = {}
    shown: dict[str, ConceptEvidence] = {}
    readings: dict[str, ProbeReading] = {}
    sums: dict[str, pd.DataFrame] = {}
    errors: list[dict] = []
    for name, model in cli.models(args):
        data = _data(args, model)
        if data.left_out:
            args.asked.note("left out", f"{name}: {data.left_out}")
        with cli.bar(f"{name} fit", "step") as progress:
            probe = fit_probe(
                model,
                data,
                layers=args.layers,
                pooling=args.pooling,
                clusters=args.clusters,
                dim=args.dim,
                mastered=not args.all_prompts,
                training=Training(hidden=args.hidden, epochs=args.epochs),
                seed=args.seed,
                progress=progress,
            )
        with cli.bar(f"{name} yardsticks", "prompt") as progress:
            found[name] = evaluate_probe(model, probe, data, progress=progress)
        with cli.bar(f"{name} edits", "run") as progress:
            edits[name] = swap_concepts(model, probe, data, n=args.edits, seed=args.seed, progress=progress)
        with cli.bar(f"{name} evidence", "prompt") as progress:
            parts = evidence_of_data(model, probe, data, args.evidence, readout=args.readout, progress=progress)
        shown[name], sums[name], probes[name] = parts[0], _mean(parts), probe
        errors.append({"model": name} | _error(parts, args.seed))
        one = data.prompts[held_out(probe, data)[0]]
        readings[name] = probe.read(model, one.prompt, [key for key, _ in one.pairs])
    rates = _joined({name: _rates(result) for name, result in found.items()})
    moved = _joined({name: result.table() for name, result in edits.items()})
    evidence = _joined(sums)
    first = next(iter(readings.values()))
    error = pd.DataFrame(errors)
    sections = [
        Part("What was fitted", table=pd.DataFrame([_fitted(name, probe) for name, probe in probes.items()])),
        Part("Answers found among all answers (95% intervals over answers)", table=rates),
        Part(figure=evaluation_figure(found)),
        Part("Answers that become the other concept, edited where a swap moves the model most", table=_edits(edits)),
        Part(figure=swap_figure(edits)),
        Part(f"Evidence for the answer, {args.readout} readout: attribution against the exact effect", table=error),
        *[Part(f"{name}: {_MEANS}", table=table.head(args.top)) for name, table in sums.items()],
        Part(f"Evidence for {next(iter(shown.values())).concept!r} in one prompt", figure=evidence_figure(shown)),
        *[Part(f"One prompt {reading.summary()}", figure=reading_figure(reading)) for reading in readings.values()],
    ]
    args.asked.note("prompt", "".join(first.prompts.strings[0]))
    cells = _joined({name: result.table() for name, result in found.items()})
    of_readings = _joined({name: reading.table() for name, reading in readings.items()})
    tables = {"": cells, "edits": moved, "evidence": evidence, "reading": of_readings}
    others = {f".{name}.safetensors": probe.save for name, probe in probes.items()} if args.save_probes else None
    cli.report(args, sections, tables, others=others)


def _data(args, model: LensModel) -> ProbeData:
    if args.task == "recall":
        return recall_data(model, args.n, seed=args.seed)
    if args.task == "analogies":
        return analogy_data(model, args.n, seed=args.seed)
    return ProbeData.from_file(args.task)


def _fitted(name: str, probe: HyperProbe) -> dict:
    best = min(probe.history, key=lambda epoch: epoch[1])
    return {
        "model": name,
        "layers": " ".join(probe.points),
        "model is right": f"{probe.facts['right']:.1%}",
        "trained on": int(probe.facts["n_train"]),
        "stopped by": int(probe.facts["n_stop"]),
        "epochs": len(probe.history),
        "held-out distance": best[1],
    }


def _rates(result: ProbeEvaluation) -> pd.DataFrame:
    """A row per yardstick, a column per split: all prompts, of which there are so many."""
    columns: dict[str, list[str]] = {"yardstick": list(result.yardsticks)}
    for j, split in enumerate(result.splits):
        rows = zip(result.at_1[:, j, 0].tolist(), result.low[:, j, 0].tolist(), result.high[:, j, 0].tolist())
        columns[f"new {split}"] = [f"{x:.1%} [{low:.1%}, {high:.1%}]" for x, low, high in rows]
    right, wrong = (result.groups.index(group) for group in ("right", "wrong"))
    for title, k in (("model right", right), ("model wrong", wrong)):
        n = result.n[:, k].double()
        total = (result.at_1[:, :, k].nan_to_num() * n).sum(1) / n.sum()
        columns[title] = [f"{x:.1%}" if x == x else "" for x in total.tolist()]
    return pd.DataFrame(columns)


def _edits(results: dict[str, ConceptSwap]) -> pd.DataFrame:
    """Of each model, where a swap moves it the most: a row per edit, a column for each who answers."""
    rows = []
    for name, result in results.items():
        table = result.table().set_index("who")
        swapped = table[table.edit == "swap"].loc["model"]
        point = swapped.point.iloc[swapped.to_other.argmax()]
        for edit in result.edits:
            of = table[(table.point == point) & (table.edit == edit)]
            row = {"model": name, "edited": point, "edit": edit}
            row |= {f"{who}'s": f"{r.to_other:.1%} [{r.low:.1%}, {r.high:.1%}]" for who, r in of.iterrows()}
            rows.append(row | {f"{who} with the model": f"{of.together[who]:.1%}" for who in result.who[1:]})
    return pd.DataFrame(rows)


def _mean(parts: list[ConceptEvidence]) -> pd.DataFrame:
    """Means over prompts of each component's part and effect, and of their distance; the largest first."""
    tables = [part.table().set_index("component") for part in parts]
    labels = list(parts[0].labels)
    table = sum(tables[1:], tables[0]).loc[labels] / len(tables)
    distance = sum((t.attribution - t.effect).abs().loc[labels] for t in tables) / len(tables)
    sizes = sum(t.effect.abs().loc[labels] for t in tables) / len(tables)
    table = table.assign(error=distance, size=sizes).reset_index()
    return table.loc[table.attribution.abs().sort_values(ascending=False, kind="stable").index].reset_index(drop=True)


def _error(parts: list[ConceptEvidence], seed: int) -> dict:
    error, low, high = pooled_error(parts, seed)
    interval = f" [{low:.2%}, {high:.2%}]" if low == low else ""
    said = {"sum |attribution - effect| / sum |effect|": f"{error:.2%}{interval}"}
    return said | {"components": len(parts[0].labels), "prompts": len(parts)}


def _joined(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    joined = pd.concat([table.assign(model=name) for name, table in tables.items()], ignore_index=True)
    return joined[["model", *joined.columns[:-1]]]
