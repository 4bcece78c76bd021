"""What the site is made of besides docs/*.md, put in as it is built: figures, tables, claims, flags, names, notebooks.

Pictures of figures are links to pages of the figures, to hover and zoom, drawn from the tables.

In a page stand comments, which a code host does not show:

    <!-- table: figures/x.csv | where measure=error, readout=logit | show model, value -->
    <!-- table: figures/x.csv | where measure=error | rows what | percent -->
    <!-- claims: dla_vs_direct_effect readers -->
    <!-- help: dla -->

for rows and columns of a table; one with a column per model; the verdicts of analyses (none named: of all, with their
pictures); what a command's --help says. No number is written by hand that a new model changes. Formulas in dollars
become MathML: nothing is fetched when a page is read. LNFREE_DOCS_EXECUTE=1 runs notebooks and shows what comes out.
"""

from __future__ import annotations

import ast
import contextlib
import csv
import html
import io
import json
import math
import os
import re
import sys
import uuid
from collections.abc import Callable, Container, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from unittest import mock

import griffe
from latex2mathml.converter import convert
from mkdocs.structure.files import File
from plotly.offline import get_plotlyjs

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "figures"
EXECUTE = os.environ.get("LNFREE_DOCS_EXECUTE") == "1"
# The order of figures/index.html; an analysis that is not named here comes after these.
ORDER = ("loss_table", "training_curve", "dla_vs_direct_effect", "readers", "graph_faithfulness")
ORDER += ("attribution_vs_activation", "confidence_neurons", "norms_and_sinks", "calibration")
TOP = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}


# ---------------------------------------------------------------------------------------------------------
# Tables, claims, flags


def cell(text: object) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell(x) for x in line)} |" for line in lines)


def number(text: str, percent: bool = False) -> str:
    """Four digits, or a whole number with its thousands; what is no number stays as it is."""
    try:
        value = float(text)
    except ValueError:
        return text
    if percent:
        return f"{value:.1%}"
    return f"{value:,.0f}" if value.is_integer() and "e" not in text else f"{value:.4g}"


def column(texts: Sequence[str], percent: bool = False) -> list[str]:
    """The numbers of a column, all with as many decimals: the largest's of four digits, at most what is written."""
    shown = [number(text, percent) for text in texts]
    if not (fractions := [text for text in texts if re.fullmatch(r"-?\d+\.\d+", text)]) or percent:
        return shown
    written = max(len(text.partition(".")[2]) for text in fractions)
    size = max(abs(float(text)) for text in fractions) or 1
    decimals = min(written, max(0, 3 - math.floor(math.log10(size))))
    plain = re.compile(r"-?\d+(\.\d+)?")
    return [f"{float(text):.{decimals}f}" if plain.fullmatch(s) else s for text, s in zip(texts, shown, strict=True)]


def with_interval(row: Mapping[str, str], percent: bool) -> str:
    value = next(row[name] for name in ("value", "nmae", "mean") if name in row)
    low, high = (number(row.get(name, ""), percent) for name in ("low", "high"))
    return number(value, percent) + (f" [{low}, {high}]" if low and high else "")


def table(instruction: str) -> str:
    """The table that `figures/x.csv | where ... | show ... | rows ... | percent` asks for."""
    path, *rest = (part.strip() for part in instruction.split("|"))
    how = dict(part.partition(" ")[::2] for part in rest)
    with open(ROOT / path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for condition in filter(None, how.get("where", "").split(",")):
        name, _, wanted = condition.strip().partition("=")
        rows = [row for row in rows if row[name] == wanted]
    if not rows:
        raise ValueError(f"{path}: no row is left by {how.get('where')!r}")
    percent = "percent" in how
    if "rows" in how:
        models, names = (list(dict.fromkeys(row[name] for row in rows)) for name in ("model", how["rows"]))
        found = {(row[how["rows"]], row["model"]): with_interval(row, percent) for row in rows}
        body = [[number(name), *(found.get((name, model), "") for model in models)] for name in names]
        return markdown_table(["", *(f"`{model}`" for model in models)], body)
    shown = [name.strip() for name in how["show"].split(",")] if "show" in how else list(rows[0])
    columns = [column([row[name] for row in rows], percent) for name in shown]
    return markdown_table([name.replace("_", " ") for name in shown], list(zip(*columns, strict=True)))


def records() -> dict[str, dict]:
    """What the analyses wrote, by name, in the order of the page."""
    found = {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(FIGURES.glob("*.json"))}
    return {name: found[name] for name in [*(n for n in ORDER if n in found), *(n for n in found if n not in ORDER)]}


def claims(names: Sequence[str] = ()) -> str:
    """The claims of these analyses, or of all, with headings and pictures: paper's figure, ours, whether they agree."""
    every = records()
    parts = []
    if not names:
        verdicts = [claim["agrees"] for record in every.values() for claim in record["claims"]]
        counts = ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(verdicts))
        parts.append(f"Agrees: {counts}.")
    for name in names or every:
        record = every[name]
        rows = [
            [c["statement"], c["paper"], c["ours"] + (f"<br>*{c['why']}*" if c["why"] else ""), f"**{c['agrees']}**"]
            for c in record["claims"]
        ]
        made = f"Made by `{record['command']}`; [table](../figures/{name}.csv)."
        if not names:
            parts += [f"## {record['title']}", f"![{record['title']}](../figures/{name}.png)"]
        parts += [markdown_table(["claim", "paper", "ours", "agrees"], rows), f"{record['caption']} {made}"]
    return "\n\n".join(parts)


def flags(name: str) -> str:
    """What lnfree NAME --help says."""
    said = io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, {"COLUMNS": "100"}))
        stack.enter_context(mock.patch("sys.argv", ["lnfree"]))
        stack.enter_context(contextlib.redirect_stdout(said))
        stack.enter_context(contextlib.suppress(SystemExit))
        import_module(f"lnfree_interp.{name}.__main__").main(["--help"])
    return f'??? note "`lnfree {name} --help`"\n\n' + "\n".join(
        f"    {line}" for line in ["```text", *said.getvalue().rstrip().splitlines(), "```"]
    )


INSTRUCTIONS: dict[str, Callable[[str], str]] = {
    "table": table,
    "claims": lambda names: claims(names.split()),
    "help": flags,
}


def filled(markdown: str) -> str:
    """The page with what its comments ask for."""
    pattern = rf"<!-- ({'|'.join(INSTRUCTIONS)})(?:: ([^>]*?))? -->"
    return re.sub(pattern, lambda found: INSTRUCTIONS[found[1]](found[2] or ""), markdown)


# ---------------------------------------------------------------------------------------------------------
# Pages of every public name


def public_names() -> dict[str, list[str]]:
    """Module -> its public names, as lnfree_interp/__init__.pyi lists them."""
    stub = ast.parse((ROOT / "lnfree_interp" / "__init__.pyi").read_text("utf-8"))
    found: dict[str, list[str]] = {}
    for node in stub.body:
        if isinstance(node, ast.ImportFrom):
            found.setdefault(node.module or "", []).extend(alias.asname or alias.name for alias in node.names)
    return found


def api_pages() -> dict[str, str]:
    pages = {}
    for module, names in public_names().items():
        parts = [f"# {module}", f"`from lnfree_interp import {names[0]}`, ..."]
        parts += [f"::: lnfree_interp.{name}" for name in sorted(names, key=lambda name: (name[0].isupper(), name))]
        pages[f"api/{module}.md"] = "\n\n".join(parts) + "\n"
    listed = [f"- [{m}]({m}.md): {', '.join(f'`{n}`' for n in names)}" for m, names in public_names().items()]
    head = "# Public names\n\nAll are had by `from lnfree_interp import NAME`, and are imported when first used.\n\n"
    return {"api/index.md": head + "\n".join(listed) + "\n", **pages}


class ExampleIsASection(griffe.Extension):
    """Google's style knows "Examples:"; this package's docstrings have one and say so."""

    def on_instance(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring and not obj.is_alias:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.M)


# ---------------------------------------------------------------------------------------------------------
# Notebooks


def fenced(text: str, language: str) -> str:
    return f"````{language}\n{text.rstrip()}\n````"


def plain_block(markup: str, kind: str) -> str:
    """HTML that Markdown leaves alone: a block without an empty line in it."""
    return f'<div class="{kind}">' + re.sub(r"\n\s*\n", "\n", markup.strip()) + "</div>"


def shown_output(output: Mapping) -> str:
    """One output of a cell: a figure, a picture, a table, a paragraph, or text."""
    if output["output_type"] == "stream":
        return fenced(output["text"], "text") if output["name"] == "stdout" else ""
    data = output.get("data", {})
    if "application/vnd.jupyter.widget-view+json" in data:
        return ""  # a bar of progress
    if "application/vnd.plotly.v1+json" in data:
        import plotly.io

        from lnfree_interp.figures.report import figure_element

        figure = data["application/vnd.plotly.v1+json"]
        made = plotly.io.from_json(json.dumps({k: figure[k] for k in ("data", "layout")}), skip_invalid=True)
        return plain_block(figure_element(made, f"figure-{uuid.uuid4()}"), "output")
    if "image/png" in data:
        return f'<img alt="" src="data:image/png;base64,{"".join(data["image/png"].split())}">'
    if "text/markdown" in data:
        return data["text/markdown"]
    if "text/html" in data and "<iframe" in data["text/html"]:
        return "*Here the notebook shows a page to hover and click: see [attribution graphs](../graphs.md).*"
    if "text/html" in data:
        return plain_block(data["text/html"], "output")
    return fenced(data["text/plain"], "text") if "text/plain" in data else ""


def executed(path: Path):
    """The notebook after a run from top to bottom, in an empty directory."""
    import tempfile

    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as empty:
        NotebookClient(notebook, timeout=900, coalesce_streams=True, resources={"metadata": {"path": empty}}).execute()
    return notebook


def notebook_page(path: Path, execute: bool = EXECUTE) -> str:
    notebook = executed(path) if execute else json.loads(path.read_text("utf-8"))
    parts = []
    for each in notebook["cells"]:
        source = each["source"] if isinstance(each["source"], str) else "".join(each["source"])
        parts.append(fenced(source, "python") if each["cell_type"] == "code" else source)
        parts += [shown_output(output) for output in each.get("outputs", [])]
    page = "\n\n".join(filter(None, parts))
    if "Plotly.newPlot" in page:
        page = page.replace("\n", '\n\n<script src="../figures/plotly.min.js"></script>\n', 1)
    how = (
        "as it ran when this site was built"
        if execute
        else "without its outputs; `mkdocs build` shows them if asked to"
    )
    return f"{page}\n\n---\n\n`notebooks/{path.name}`, {how}.\n"


# ---------------------------------------------------------------------------------------------------------
# What mkdocs calls


def figure_pages() -> dict[str, str]:
    """uri -> page, of every figure that is drawn from its tables; the plotting library is beside the figures."""
    from lnfree_interp.figures.report import PLOTLY, figure_page

    with mock.patch.object(sys, "path", [str(ROOT / "analyses"), *sys.path]):
        every = import_module("all")
        figures = every.drawn(every.SCRIPTS, FIGURES)
    found = {}
    for path, figure in figures.items():
        up = "../" * (len(path.relative_to(FIGURES).parts) - 1)
        script = f'<script charset="utf-8" src="{up}{PLOTLY}"></script>'
        found[f"{path.relative_to(ROOT).as_posix()}.html"] = figure_page(figure, script)
    return found


def figure_files(config) -> list[File]:
    kept = [path for path in sorted(FIGURES.rglob("*")) if path.suffix in (".png", ".csv")]
    found = [File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)) for path in kept]
    found += [File.generated(config, uri, content=page) for uri, page in figure_pages().items()]
    return [*found, File.generated(config, "figures/plotly.min.js", content=get_plotlyjs())]


def on_config(config):
    """The names' pages and the notebooks have their places in the navigation."""
    notebooks = [{title(path): f"notebooks/{path.stem}.md"} for path in sorted(ROOT.glob("notebooks/*.ipynb"))]
    names = [{Path(uri).stem: uri} for uri in api_pages() if not uri.endswith("index.md")]
    for entry in config.nav:
        if "Notebooks" in entry:
            entry["Notebooks"] = notebooks
        elif "API" in entry:
            entry["API"] = [{"All": "api/index.md"}, *names]
    return config


def title(path: Path) -> str:
    first = json.loads(path.read_text("utf-8"))["cells"][0]["source"]
    return "".join(first).splitlines()[0].lstrip("# ")


def on_files(files, config):
    made = {
        **api_pages(),
        **{uri: (ROOT / name).read_text("utf-8").replace("](docs/", "](") for uri, name in TOP.items()},
    }
    for path in sorted(ROOT.glob("notebooks/*.ipynb")):
        made[f"notebooks/{path.stem}.md"] = notebook_page(path)
    for uri, text in made.items():
        files.append(File.generated(config, uri, content=text))
    for file in figure_files(config):
        files.append(file)
    return files


def on_page_markdown(markdown: str, page, **_) -> str:
    """Comments filled in; what stands beside docs/ in the repository stands in the site's own folder."""
    up = "../" * page.file.src_uri.count("/")
    return filled(markdown).replace("](../figures/", f"]({up}figures/") if not up else filled(markdown)


def with_figures(content: str, uris: Container[str]) -> str:
    """Pictures of figures: another one on narrow pages, and a link to the figure's page, where there are such."""

    def shown(found: re.Match) -> str:
        linked, image, folder, name = found.groups()
        if f"figures/{name}-narrow.png" in uris:
            source = f'<source media="(max-width: 600px)" srcset="{folder}{name}-narrow.png">'
            image = f"<picture>{source}{image}</picture>"
        if linked or f"figures/{name}.html" not in uris:
            return (linked or "") + image
        return f'<a href="{folder}{name}.html" title="Interactive">{image}</a>'

    return re.sub(r'(<a [^>]*>)?(<img [^>]*?src="([^"]*?figures/)([^"]+)\.png"[^>]*>)', shown, content)


def on_page_content(content: str, files, **_) -> str:
    """Figures as they fit; formulas as MathML, which browsers draw by themselves."""

    def drawn(found: re.Match) -> str:
        display = "block" if found[1] == "div" else "inline"
        return convert(html.unescape(found[2]).strip(), display=display)

    content = with_figures(content, {file.src_uri for file in files})
    return re.sub(r'<(div|span) class="arithmatex">\\[\[(](.*?)\\[\])]</\1>', drawn, content, flags=re.S)
