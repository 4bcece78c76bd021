"""The work of python -m lnfree_interp.check."""

from __future__ import annotations

from .. import cli
from ..models import load_model
from .checking import check_model


def run(args) -> int:
    cli.say(f"loading {args.model} ...")
    model = load_model(args.model, device=args.device, dtype=args.dtype)
    with cli.bar(cli.display_name(args.model), "law") as progress:
        found = check_model(model, checkpoint=args.model, seed=args.seed, progress=progress)
    print(f"{cli.display_name(args.model)}: {found.model}; on {found.prompts}")
    table = found.table()
    measured = table[table.verdict != "not measured"]
    cli.show(measured.drop(columns="note"), "Laws (errors and sizes as shares of the largest logit)")
    for law, note in table[table.verdict == "not measured"][["law", "note"]].itertuples(index=False):
        print(f"not measured: {law}: {note}")
    print("\nWhat is fast")
    for way in found.ways:
        print(f"{way.what}: {way.how}" + f", {way.saves}" * bool(way.saves) + f", because {way.why}" * bool(way.why))
    print()
    for failed in found.failed:
        print(f"FAILS: {failed.name}: off by {failed.error:.1e}, allowed are {failed.tolerance:.0e}")
    if found.holds:
        print(f"All {len(measured)} laws that were measured hold.")
    elif not found.failed:
        print("No law could be measured.")
    return 0 if found.holds else 1
