"""What the analyses share: their command, what they write, and the claims that make up figures/index.html."""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import browser

from lnfree_interp import cli
from lnfree_interp.files import replace_file
from lnfree_interp.names import EMBEDDED, locate_checkpoint

FIGURES = Path(__file__).resolve().parent.parent / "figures"
AGREES = ("yes", "partly", "no", "not tested", "open question")
SHOWN = 24  # rows of a table that are printed
# Arguments that do not change what is written.
_WHERE = ("out", "device", "jobs", "runs")


@dataclass(frozen=True)
class Claim:
    """What a paper says, its figure, ours, and whether ours agrees: one of AGREES. `why` explains, with numbers."""

    statement: str
    paper: str
    ours: str
    agrees: str
    why: str = ""

    def __post_init__(self):
        if self.agrees not in AGREES:
            raise ValueError(f"agrees is {self.agrees!r}; allowed are {', '.join(AGREES)}")


@dataclass(frozen=True)
class Output:
    """What an analysis hands back.

    Attributes:
        table: a DataFrame.
        figure: of plotly; None where the analysis draws from its tables.
        claims: what papers say, and what came out.
        caption: a sentence about the figure.
        more: name -> another DataFrame that the figure is drawn from.
    """

    table: object
    figure: object
    claims: Sequence[Claim]
    caption: str
    more: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """An LN-free model and the models with LayerNorm it is compared with: the original and the fine-tuned control."""

    original: str
    control: str
    free: str


def families(models: Mapping[str, bool]) -> list[Family]:
    """Families from name -> is LN-free, in the order given: original, control, LN-free, original, ...

    With one model before the LN-free one it is both original and control.
    """
    found, normed, last_free = [], [], False
    for name, free in models.items():
        if free and normed:
            found.append(Family(normed[0], normed[-1], name))
        elif not free:
            normed = [name] if last_free else [*normed, name]
        last_free = free
    return found


def yes_no(condition: bool) -> str:
    return "yes" if condition else "no"


def agreement(*conditions: bool) -> str:
    """All hold: yes; none: no; some: partly."""
    return "yes" if all(conditions) else "partly" if any(conditions) else "no"


# ---------------------------------------------------------------------------------------------------------
# An analysis as a command


@dataclass(frozen=True)
class Analysis:
    """One script: its file, what it computes, the flags it has besides the shared ones.

    Attributes:
        run: (arguments) -> Output; its module's docstring is the command's description, first line the title.
        flags: adds flags to the parser.
        tokens: the default of --tokens.
        trains: --text is training text, and the results are kept by all.py when none is given.
        draw: (table, name=another table, ...) -> the figure, from what is written alone; so that it can be drawn anew
            without measuring anything.
        more: the names of the other tables that it is drawn from, each in a file of its own.
    """

    run: Callable[[argparse.Namespace], Output]
    tokens: int
    flags: Callable[[argparse.ArgumentParser], None] | None = None
    trains: bool = False
    draw: Callable[..., object] | None = None
    more: Sequence[str] = ()

    @property
    def file(self) -> Path:
        return Path(inspect.getfile(self.run))

    @property
    def name(self) -> str:
        return self.file.stem

    @property
    def title(self) -> str:
        return inspect.getmodule(self.run).__doc__.strip().splitlines()[0].rstrip(".")

    def parser(self) -> argparse.ArgumentParser:
        parser = cli.parser(self.name, self.title, tokens=self.tokens, out=str(FIGURES))
        parser.prog = f"python analyses/{self.name}.py"
        if self.flags is not None:
            self.flags(parser)
        return parser

    def main(self, argv: Sequence[str] | None = None) -> int:
        argv = list(sys.argv[1:] if argv is None else argv)
        parser = self.parser()
        args = parser.parse_args(argv)
        return cli.guard(self._command, args, parser.prog)

    def _command(self, args) -> None:
        import torch

        torch.manual_seed(args.seed)
        output = self.run(args)
        cli.show(output.table.head(SHOWN), self.title)
        if len(output.table) > SHOWN:
            print(f"... {len(output.table) - SHOWN} more rows in {self.name}.csv")
        tables = {"": output.table, **output.more}
        for more, table in tables.items():
            cli.save(args.out, self._stem(more), rounded(table))
        if self.draw is None:
            save_figures({args.out / self.name: output.figure})
        else:
            save_figures({args.out / self.name: self.redrawn(args.out)})
        for claim in output.claims:
            print(f"\n{claim.statement}\n  paper: {claim.paper}\n  ours:  {claim.ours}\n  agrees: {claim.agrees}")
            if claim.why:
                print(f"  {claim.why}")
        record = {
            "name": self.name,
            "title": self.title,
            "caption": output.caption,
            "command": self.shown(args),
            "fingerprint": self.fingerprint(args),
            "claims": [asdict(claim) for claim in output.claims],
        }
        text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
        replace_file(args.out / f"{self.name}.json", lambda path: path.write_text(text))

    def _stem(self, more: str) -> str:
        return f"{self.name}_{more}" if more else self.name

    def redrawn(self, out: Path):
        """The figure, drawn from the tables in `out`.

        Raises:
            ValueError: the analysis does not draw from its tables alone, or one of them is not there.
        """
        if self.draw is None:
            raise ValueError(f"{self.name} draws only what it has just measured")
        table, *more = (read_table(out / f"{self._stem(name)}.csv") for name in ("", *self.more))
        return self.draw(table, **dict(zip(self.more, more)))

    def settings(self, args: argparse.Namespace) -> dict:
        """The arguments that decide what is written."""
        return {name: value for name, value in sorted(vars(args).items()) if name not in _WHERE}

    def shown(self, args: argparse.Namespace) -> str:
        """The command line of these arguments: those that are not the default, files without their folders."""
        defaults, words = vars(self.parser().parse_args([])), ["python", f"analyses/{self.name}.py"]
        for name, value in self.settings(args).items():
            if value != defaults[name]:
                values = value if isinstance(value, list) else [value]
                flag = f"--{name.replace('_', '-')}"
                words += [flag] if value is True else [flag, *(Path(str(v)).name for v in values)]
        return " ".join(words)

    def fingerprint(self, args: argparse.Namespace) -> str:
        """A hash of the script, its arguments, the models' files and the text: what is up to date has the same."""
        settings = self.settings(args)
        digest = hashlib.sha256(self.file.read_bytes())
        digest.update(repr({k: v for k, v in settings.items() if k not in ("model", "text", "run")}).encode())
        for name in args.model:
            digest.update(model_fingerprint(name).encode())
        for name in (args.text, *(settings.get("run") or ())):
            if name:
                digest.update(file_fingerprint(Path(name)).encode())
        return digest.hexdigest()[:16]


def model_fingerprint(name: str) -> str:
    """A hash of a model's name and files."""
    path = locate_checkpoint(name)
    files = [path] if path.is_file() else sorted([*path.glob("*.json"), *path.glob("*.safetensors")])
    return ":".join([cli.display_name(name), *(file_fingerprint(file) for file in files)])


def file_fingerprint(path: Path) -> str:
    """A hash of a file's content; of a directory's name."""
    if not path.is_file():
        return path.name
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16] if sys.version_info >= (3, 11) else _digest(file)


def _digest(file) -> str:
    digest = hashlib.sha256()
    for block in iter(partial(file.read, 2**20), b""):
        digest.update(block)
    return digest.hexdigest()[:16]


def rounded(table):
    """The DataFrame with its floats to six digits, for a .csv to commit."""
    floats = table.select_dtypes("float").columns
    return table.assign(**{c: [float(f"{x:.6g}") for x in table[c]] for c in floats})


# ---------------------------------------------------------------------------------------------------------
# Models, tokens, pictures


def loaded(args: argparse.Namespace) -> dict[str, object]:
    """display name -> model of every --model, all in memory."""
    return dict(cli.models(args))


def ln_free(models: Mapping[str, object]) -> dict[str, bool]:
    return {name: model.cfg.normalization_type is None for name, model in models.items()}


def same_tokens(args: argparse.Namespace, models: Mapping[str, object], *, context: int = 512):
    """The tokens of the text, the same for all models.

    Raises:
        ValueError: models that read the text as different tokens.
    """
    first = None
    for name, model in models.items():
        tokens = cli.load_tokens(args, model, context=context)
        if first is None:
            first = tokens
        elif tokens.shape != first.shape or not bool((tokens == first).all()):
            raise ValueError(f"models {next(iter(models))} and {name} read the text as different tokens")
    return first


def source(args: argparse.Namespace) -> str:
    """What the text is called in a caption."""
    return args.data or (Path(args.text).name if args.text else "the embedded validation text")


def is_embedded(args: argparse.Namespace) -> bool:
    return set(args.model) <= set(EMBEDDED)


def bars(value, low, high) -> dict:
    """plotly error bars from value to low and high."""
    ends = {"array": high - value, "arrayminus": value - low}
    return {"type": "data", "symmetric": False, **ends, "width": 3, "thickness": 1.3}


def read_table(path: Path):
    """A table that was written as .csv, with its empty texts.

    Raises:
        ValueError: it is not there.
    """
    import pandas as pd

    if not path.is_file():
        raise ValueError(f"{path} is not there: run the analysis first")
    return pd.read_csv(path, keep_default_na=False, na_values=["", "nan"])


def save_figures(figures: Mapping[Path, object]) -> None:
    """path without suffix -> figure: each as a page; where there is a browser, also .png and -narrow.png."""
    import plotly.graph_objects as go

    from lnfree_interp.figures.report import figure_page, plotly_beside
    from lnfree_interp.figures.style import WIDTH
    from lnfree_interp.figures.widths import narrow_figure

    drawn, written = {}, []
    for path, figure in figures.items():
        page = figure_page(figure, plotly_beside(path.parent))
        written.append(path.with_name(f"{path.name}.html"))
        replace_file(written[-1], lambda beside, page=page: beside.write_text(page, encoding="utf-8"))
        drawn[path.with_name(f"{path.name}.png")] = go.Figure(figure).update_layout(width=WIDTH)
        drawn[path.with_name(f"{path.name}-narrow.png")] = narrow_figure(figure)
    made = browser.pictures(list(drawn.values()))
    for path, data in zip(drawn, made or ()):
        replace_file(path, lambda beside, data=data: beside.write_bytes(data))
        written.append(path)
    print("wrote " + ", ".join(map(str, written)))
