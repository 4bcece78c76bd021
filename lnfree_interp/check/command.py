"""The work of python -m lnfree_interp.check."""

from __future__ import annotations

from .. import cli
from ..figures.report import Part
from ..models import load_model
from .checking import check_model
from .result import ModelCheck, Way


def run(args) -> int:
    name = cli.display_name(args.model)
    cli.say(f"loading {args.model} ...")
    model = load_model(args.model, device=args.device, dtype=args.dtype)
    cli.describe(args, name, model)
    with cli.bar(name, "law") as progress:
        found = check_model(model, checkpoint=args.model, seed=args.seed, progress=progress)
    table = found.table()
    measured = table[table.verdict != "not measured"]
    others = table[table.verdict == "not measured"][["law", "note"]].itertuples(index=False)
    laws = "Laws (errors and sizes as shares of the largest logit)"
    parts = [
        Part(text=f"{name}: {found.model}; on {found.prompts}"),
        Part(laws, table=measured.drop(columns="note"), figure=found.plot() if args.out else None),
        Part(text="\n".join(f"not measured: {law}: {note}" for law, note in others)),
        Part("What is fast", "\n".join(_way(way) for way in found.ways)),
        Part("Verdict", "\n".join(_verdict(found, len(measured)))),
    ]
    # What has no note has a gap there: a law that is not measured is told by its note.
    cli.report(args, parts, {"": table.assign(note=table.note.where(table.note != ""))})
    return 0 if found.holds else 1


def _way(way: Way) -> str:
    return f"{way.what}: {way.how}" + f", {way.saves}" * bool(way.saves) + f", because {way.why}" * bool(way.why)


def _verdict(found: ModelCheck, n: int) -> list[str]:
    if found.holds:
        return [f"All {n} laws that were measured hold."]
    failed = [f"FAILS: {law.name}: off by {law.error:.1e}, allowed are {law.tolerance:.0e}" for law in found.failed]
    return failed or ["No law could be measured."]
