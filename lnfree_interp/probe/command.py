"""The work of python -m lnfree_interp.probe."""

from __future__ import annotations

import pandas as pd

from .. import cli
from ..figures.probe import evaluation_figure, evidence_figure, reading_figure, swap_figure
from ..figures.report import Part
from ..lens import LensModel
from .causal import ConceptSwap, swap_concepts
from .data import SPLITS, ProbeData
from .evaluation import ProbeEvaluation, evaluate_probe
from .evidence import ConceptEvidence, concept_evidence
from .fitting import fit_probe
from .hyperprobe import HyperProbe
from .reading import ProbeReading
from .tasks import analogy_data, recall_data
from .training import Training


def run(args) -> None:
    probes: dict[str, HyperProbe] = {}
    found: dict[str, ProbeEvaluation] = {}
    edits: dict[str, ConceptSwap] = {}
    shown: dict[str, ConceptEvidence] = {}
    readings: dict[str, ProbeReading] = {}
    sums: dict[str, pd.DataFrame] = {}
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
        held = [data.prompts[i] for i in probe.splits.rows(data, *SPLITS) if data.prompts[i].value in probe.answers]
        parts = []
        with cli.bar(f"{name} evidence", "prompt") as progress:
            for i, prompt in enumerate(held[: args.evidence]):
                asked = {"concept": prompt.value, "readout": args.readout, "key": prompt.key}
                parts.append(concept_evidence(model, probe, prompt.prompt, **asked))
                progress(i + 1, min(args.evidence, len(held)))
        shown[name], sums[name], probes[name] = parts[0], _mean(parts), probe
        readings[name] = probe.read(model, held[0].prompt, [key for key, _ in held[0].pairs])
    rates = _joined({name: _rates(result) for name, result in found.items()})
    moved = _joined({name: result.table() for name, result in edits.items()})
    evidence = _joined(sums)
    first = next(iter(readings.values()))
    errors = pd.DataFrame([_error(name, table) for name, table in sums.items()])
    sections = [
        Part("What was fitted", table=pd.DataFrame([_fitted(name, probe) for name, probe in probes.items()])),
        Part("Answers found among all answers (95% intervals over answers)", table=rates),
        Part(figure=evaluation_figure(found)),
        Part("Answers that become the other concept once the stream is edited", table=_edits(moved)),
        Part(figure=swap_figure(edits)),
        Part(f"Evidence for the answer, {args.readout} readout: attribution against the exact effect", table=errors),
        *[Part(f"{name}: components, mean over prompts", table=table.head(args.top)) for name, table in sums.items()],
        Part(f"Evidence for {next(iter(shown.values())).concept!r} in one prompt", figure=evidence_figure(shown)),
        *[Part(f"{name}: {reading.summary()}", figure=reading_figure(reading)) for name, reading in readings.items()],
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


def _edits(table: pd.DataFrame) -> pd.DataFrame:
    return table[["model", "point", "edit", "who", "moved", "to_other", "low", "high", "together"]]


def _mean(parts: list[ConceptEvidence]) -> pd.DataFrame:
    """Means over prompts of each component's part and effect, and of their distance; the largest first."""
    tables = [part.table().set_index("component") for part in parts]
    labels = list(parts[0].labels)
    table = sum(tables[1:], tables[0]).loc[labels] / len(tables)
    distance = sum((t.attribution - t.effect).abs().loc[labels] for t in tables) / len(tables)
    sizes = sum(t.effect.abs().loc[labels] for t in tables) / len(tables)
    table = table.assign(error=distance, size=sizes).reset_index()
    return table.loc[table.attribution.abs().sort_values(ascending=False, kind="stable").index].reset_index(drop=True)


def _error(name: str, table: pd.DataFrame) -> dict:
    total = table["size"].sum()
    error = table.error.sum() / total if total else 0.0
    return {"model": name, "mean |attribution - effect| / mean |effect|": f"{error:.2%}", "components": len(table)}


def _joined(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    joined = pd.concat([table.assign(model=name) for name, table in tables.items()], ignore_index=True)
    return joined[["model", *joined.columns[:-1]]]
