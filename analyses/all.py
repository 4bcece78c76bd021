"""Run every analysis that is not up to date, and write figures/index.html, claim by claim.

    python analyses/all.py
    python analyses/all.py --train train.txt.gz --jobs 2
    python analyses/all.py --redraw
    python analyses/all.py --model gpt2 gpt2-vanilla gpt2-noLN --data Skylion007/openwebtext --out figures-gpt2

An analysis is up to date if its script, its arguments, the models' files and the text are those its figure was made
with. Those that train need --train FILE; without it what they wrote last is kept. --redraw measures nothing: every
figure, those of real_model.py and screening.py too, is drawn anew from the tables that are there: its pictures, and a
page to hover and zoom, which is not kept in the repository.
"""

from __future__ import annotations

import argparse
import html
import importlib
import json
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import common

from lnfree_interp import cli
from lnfree_interp.figures import report

SCRIPTS = (
    "loss_table",
    "training_curve",
    "dla_vs_direct_effect",
    "readers",
    "graph_faithfulness",
    "attribution_vs_activation",
    "confidence_neurons",
    "norms_and_sinks",
    "calibration",
    "concepts",
    "removal_order",
    "data_efficiency",
)
# Hours of training, and not the papers' claims: run by themselves, shown and drawn with the others.
ALONE = ("less_data",)


def analyses() -> dict[str, common.Analysis]:
    return {name: importlib.import_module(name).ANALYSIS for name in (*SCRIPTS, *ALONE)}


def parser() -> argparse.ArgumentParser:
    p = cli.OneLineParser(prog="python analyses/all.py", description=__doc__.splitlines()[0])
    add = p.add_argument
    add("--only", nargs="+", choices=SCRIPTS, metavar="NAME", help=f"some of them: {', '.join(SCRIPTS)}")
    add("--redraw", action="store_true", help="only draw the figures anew, from the tables of the last run")
    add("--force", action="store_true", help="run also what is up to date")
    add("--model", nargs="+", metavar="NAME", help="models (default: the embedded ones)")
    source = p.add_mutually_exclusive_group()
    source.add_argument("--text", metavar="FILE", help="text to evaluate on (default: the embedded one)")
    source.add_argument("--data", metavar="DATASET", help="hub dataset to evaluate on, streamed")
    add("--tokens", metavar="N", help="tokens to evaluate on (default: each analysis' own)")
    add("--train", metavar="FILE", help="text to train on, for the analyses that fine-tune")
    add("--run", nargs="+", metavar="DIR", help="finished fine-tuning runs for the training curve")
    add("--jobs", metavar="N", help="fine-tuning runs at a time (1)")
    add("--device", help="cpu, cuda, cuda:N or mps")
    add("--out", type=Path, default=common.FIGURES, metavar="DIR", help="where figures go (figures)")
    return p


def arguments(analysis: common.Analysis, args: argparse.Namespace) -> list[str]:
    """The analysis' own command line from that of all.py."""
    argv = ["--out", str(args.out)]
    for name in ("device", "jobs") if analysis.trains else ("device", "model", "text", "data", "tokens"):
        value = getattr(args, name)
        if value is not None and not (name == "tokens" and analysis.tokens == 1):
            argv += [f"--{name}", *(value if isinstance(value, list) else [value])]
    if analysis.trains and args.train:
        argv += ["--text", args.train]
    if analysis.name == "training_curve" and args.run:
        argv += ["--run", *args.run]
    return argv


def recorded(out: Path, name: str) -> dict | None:
    """What an analysis wrote last; None if it never ran or its table is gone."""
    path = out / f"{name}.json"
    if not path.is_file() or not (out / f"{name}.csv").is_file():
        return None
    return json.loads(path.read_text())


def status(analysis: common.Analysis, args: argparse.Namespace) -> str:
    """ "up to date", "kept" or "needs --train FILE" (there is no text to train on), or "to run"."""
    before = recorded(args.out, analysis.name)
    given = args.train or (analysis.name == "training_curve" and args.run)
    if analysis.trains and not given:
        return "needs --train FILE" if before is None else "kept"
    parsed = analysis.parser().parse_args(arguments(analysis, args))
    same = before is not None and before["fingerprint"] == analysis.fingerprint(parsed)
    return "up to date" if same and not args.force else "to run"


def drawn(chosen: Sequence[str], out: Path) -> dict[Path, object]:
    """path without suffix -> figure: of all whose tables are in `out`."""
    import concepts
    import real_model_page
    import screening_page

    every, figures, whole = analyses(), {}, set(chosen) == set(SCRIPTS)
    for name in (*chosen, *(ALONE if whole else ())):
        for folder in (out, out / concepts.REAL):
            if recorded(folder, name) and every[name].draw is not None:
                figures[folder / name] = every[name].redrawn(folder)
    for name, page in (("real_model", real_model_page), ("screening", screening_page)):
        if whole and (out / name).is_dir():
            figures |= {out / name / stem: figure for stem, figure in page.figures_of(out / name).items()}
    return figures


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.redraw:
        common.save_figures(drawn(args.only or SCRIPTS, args.out))  # through one browser
        write_index(args.out)
        return 0
    every = analyses()
    chosen = {name: every[name] for name in args.only or SCRIPTS}
    failed = []
    for i, (name, analysis) in enumerate(chosen.items(), 1):
        began = time.monotonic()
        print(f"[{i}/{len(chosen)}] {name}: ", end="", flush=True)
        try:
            what = status(analysis, args)
            print(what, flush=True)
            code = analysis.main(arguments(analysis, args)) if what == "to run" else 0
        except (Exception, SystemExit) as error:
            code = error
            if not isinstance(error, (SystemExit, ValueError)):
                traceback.print_exc()
        if code:
            failed.append(name)
            print(f"[{i}/{len(chosen)}] {name}: failed ({code})", file=sys.stderr, flush=True)
        elif what == "to run":
            print(f"[{i}/{len(chosen)}] {name}: done in {time.monotonic() - began:.0f} s", flush=True)
    write_index(args.out)
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


# ---------------------------------------------------------------------------------------------------------
# index.html

TITLE = "The papers' claims, checked"
STYLE = """
.yes, .no, .partly, .other { font-weight: 600; color: #555; }
.yes { color: #00704a; } .no { color: #b34700; } .partly { color: #8a6d00; }
table { width: 100%; overflow-wrap: anywhere; }
@media (max-width: 600px) { th, td { display: block; border: 0; } tr:first-child { display: none; }
  tr { display: block; border-bottom: 1px solid #ddd; padding: .4em 0; } }
"""


def write_index(out: Path) -> None:
    records = [r for name in (*SCRIPTS, *ALONE) if (r := recorded(out, name))]
    out.mkdir(parents=True, exist_ok=True)
    (out / "index.html").write_text(index(records, out), encoding="utf-8")
    print(f"wrote {out / 'index.html'}")


def index(records: Sequence[dict], out: Path) -> str:
    """The page: how many claims agree, then every analysis with its claims and picture."""
    claims = [claim for record in records for claim in record["claims"]]
    counts = {verdict: sum(c["agrees"] == verdict for c in claims) for verdict in common.AGREES}
    summary = ", ".join(f"{n} {verdict}" for verdict, n in counts.items() if n)
    parts = [
        f"<h1>{TITLE}</h1>",
        "<p>P1: <a href='https://arxiv.org/abs/2409.13710'>arXiv 2409.13710</a>; P2: "
        "<a href='https://arxiv.org/abs/2507.02559'>arXiv 2507.02559</a>; their figures are GPT-2's. P3: "
        "<a href='https://arxiv.org/abs/2509.25045'>arXiv 2509.25045</a>. Ours are of "
        f"the models each command names, by default the small ones in this package. Agrees: {summary}.</p>",
    ]
    return report.page(TITLE, [*parts, *(section(record, out) for record in records)], style=STYLE)


def section(record: dict, out: Path) -> str:
    e, name = html.escape, record["name"]
    rows = "".join(
        f"<tr><td>{e(c['statement'])}</td><td>{e(c['paper'])}</td>"
        f"<td>{e(c['ours'])}{'<br><span class=small>' + e(c['why']) + '</span>' if c['why'] else ''}</td>"
        f"<td class='{c['agrees'] if c['agrees'] in ('yes', 'no', 'partly') else 'other'}'>{c['agrees']}</td></tr>"
        for c in record["claims"]
    )
    narrow = f"<source media='(max-width: 600px)' srcset='{name}-narrow.png'>"
    shown = f"<picture>{narrow}<img src='{name}.png' alt='{e(record['title'])}'></picture>"
    # Pages of figures are not kept with the tables and pictures: --redraw makes them.
    links = [f"<a href='{name}.html'>interactive</a>"] * (out / f"{name}.html").is_file()
    links += [f"<a href='{name}.csv'>table</a>"]
    return (
        f"<h2 id='{name}'>{e(record['title'])}</h2><p><code>{e(record['command'])}</code></p>"
        f"<table><tr><th>claim</th><th>paper</th><th>ours</th><th>agrees</th></tr>{rows}</table>"
        f"{shown if (out / f'{name}.png').is_file() else ''}"
        f"<p class='small'>{e(record['caption'])} {', '.join(links).capitalize()}.</p>"
    )


if __name__ == "__main__":
    raise SystemExit(main())
