"""Pages of results: what was asked, tables, figures; they work without a network. Plotly is imported when it is needed.

`page` is the frame of any page, `figure_element` and the two scripts are how plotly's figures stand in one.
"""

from __future__ import annotations

import html
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..asked import Asked, shown
from ..files import replace_file

PLOTLY = "plotly.min.js"
ROWS = 100  # of a table, at most; all are in its .csv
# How plotly's figures behave in a page: no button that sends what is shown to another host, none that does little.
CONFIG: dict[str, Any] = {"responsive": True, "displaylogo": False}
CONFIG |= {"modeBarButtons": [["toImage", "zoom2d", "pan2d", "resetScale2d"]]}
STYLE = """
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; color: #222; background: #fff; max-width: 1200px;
  margin: 0 auto; padding: 1em 1.2em 3em; overflow-wrap: break-word; }
h1 { font-size: 1.45em; line-height: 1.25; margin: .4em 0; }
h2 { font-size: 1.1em; margin: 2em 0 .4em; }
code, pre { background: #f4f4f4; font-size: .92em; }
code { padding: .1em .3em; } pre { padding: .6em .8em; white-space: pre-wrap; }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .1em 1em; margin: .8em 0; }
dt { color: #666; } dd { margin: 0; }
table { border-collapse: collapse; font-size: 13px; line-height: 1.35; }
th, td { text-align: left; vertical-align: top; padding: .2em .5em; border-bottom: 1px solid #e4e4e4; }
th { vertical-align: bottom; border-bottom: 1px solid #888; font-weight: 600; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
th.number { white-space: normal; }
.wide { overflow-x: auto; } .small { color: #666; font-size: .87em; }
.figure { width: 100%; margin: .8em 0; } img { max-width: 100%; }
@media (hover: none) { .modebar { display: none; } } /* it would stand on the title all the time */
"""


@dataclass(frozen=True)
class Part:
    """A part of a report: a heading, and what stands below it.

    Attributes:
        text: lines as they are.
        table: a DataFrame.
        figure: of plotly.
    """

    title: str = ""
    text: str = ""
    table: Any = None
    figure: Any = None


def page(title: str, elements: Sequence[str], *, head: str = "", style: str = "") -> str:
    """The HTML of a page by itself, as wide as its window.

    Args:
        elements: HTML, one below the other.
        head: more HTML, for the head.
        style: more CSS.

    Example:
        >>> page("a < b", ["<p>Text.</p>"]).splitlines()[-2:]
        ['<p>Text.</p>', '</html>']
    """
    lines = [
        '<!DOCTYPE html>\n<html lang="en">\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        *filter(None, [head]),
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}{style}</style>",
        *elements,
        "</html>\n",
    ]
    return "\n".join(lines)


def report_page(
    asked: Asked, parts: Sequence[Part], files: Mapping[str, Any], *, script: str = "", head: str = ""
) -> str:
    """The report of a command.

    Args:
        files: tables by the names of their files, which stand beside the page.
        script: `plotly_beside` or `plotly_within`; needed where there are figures.
    """
    e = html.escape
    notes = asked.notes | {"made": [f"{time.strftime('%Y-%m-%d %H:%M')}, {versions()}"]}
    facts = "".join(f"<dt>{e(about)}</dt><dd>{'<br>'.join(map(e, lines))}</dd>" for about, lines in notes.items())
    settings = [
        f"<tr><td>--{e(name.replace('_', '-'))}</td><td>{e(shown(value))}</td>"
        f"<td class='small'>{'' if name in asked.changed else 'default'}</td></tr>"
        for name, value in asked.settings.items()
    ]
    elements = [
        script,
        f"<h1>{e(asked.what.rstrip('.'))}</h1>",
        f"<p class='small'>{e(asked.title)}</p><pre>{e(asked.line)}</pre><dl>{facts}</dl>",
        f"<details><summary>All settings</summary><table>{''.join(settings)}</table></details>",
    ]
    for number, part in enumerate(parts):
        elements += [f"<h2>{e(part.title)}</h2>"] if part.title else []
        elements += [f"<pre>{e(part.text)}</pre>"] if part.text else []
        elements += [table_element(part.table)] if part.table is not None else []
        elements += [figure_element(part.figure, f"figure-{number}")] if part.figure is not None else []
    listed = [
        f"<li><a href='{e(name)}'>{e(name)}</a> <span class='small'>{len(table)} rows: "
        f"{e(', '.join(map(str, table.columns)))}</span></li>"
        for name, table in files.items()
    ]
    if listed:
        elements.append(f"<h2>Tables beside this page</h2><ul>{''.join(listed)}</ul>")
    return page(asked.title, [element for element in elements if element], head=head)


def versions() -> str:
    """Of this package and of those that compute."""
    from importlib.metadata import version

    packages = {"TransformerLens": "transformer_lens", "PyTorch": "torch"}
    others = [f"{title} {version(package)}" for title, package in packages.items()]
    return ", ".join([f"lnfree_interp {__version__}", *others])


def table_element(table, most: int = ROWS) -> str:
    """The HTML of a DataFrame's first rows: numbers to four digits, nothing where there is none.

    Example:
        >>> import pandas as pd
        >>> table_element(pd.DataFrame({"name": ["<a>"], "x": [0.123456]}))[-67:]
        "<td>&lt;a&gt;</td><td class='number'>0.1235</td></tr></table></div>"
    """
    columns = list(map(list, zip(*table.head(most).itertuples(index=False, name=None)))) or [[] for _ in table.columns]
    numeric = [bool(column) and all(_is_number(x) for x in column if not _is_missing(x)) for column in columns]
    kinds = [" class='number'" * number for number in numeric]
    names = [re.sub("[_:]", r"\g<0><wbr>", html.escape(str(name))) for name in table.columns]
    head = "".join(f"<th{kind}>{name}</th>" for name, kind in zip(names, kinds))
    rows = ["".join(f"<td{kind}>{_cell(x)}</td>" for x, kind in zip(row, kinds)) for row in zip(*columns)]
    rest = len(table) - most
    more = f"<p class='small'>... and {rest:,} more rows</p>" if rest > 0 else ""
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f"<div class='wide'><table><tr>{head}</tr>{body}</table></div>{more}"


def _cell(value: Any) -> str:
    if _is_missing(value):
        return ""
    return html.escape(f"{value:.4g}" if isinstance(value, float) else str(value))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_missing(value: Any) -> bool:
    return value is None or value != value


# ---------------------------------------------------------------------------------------------------------
# Figures of plotly


def figure_element(figure, name: str) -> str:
    """The HTML of a figure of plotly, as wide as the page.

    Args:
        name: of the element, once in a page.
    """
    import plotly.graph_objects as go

    from .widths import page_script

    wide = go.Figure(figure).update_layout(autosize=True, width=None)
    drawn = wide.to_html(
        full_html=False,
        include_plotlyjs=False,
        config=CONFIG,
        div_id=name,
        default_width="100%",
        post_script=page_script(wide),
    )
    return f"<div class='figure'>{drawn}</div>"


def figure_page(figure, script: str) -> str:
    """The page of a figure of plotly alone, called what the figure is.

    Args:
        script: `plotly_beside` or `plotly_within`.
    """
    title = html.unescape(str(figure.layout.title.text or "")).replace("<br>", " ")
    return page(title, [script, figure_element(figure, "figure")])


def plotly_beside(folder: Path) -> str:
    """The script element of pages in this folder: the library stands beside them, and is written if it does not yet.

    Raises:
        ValueError: the disk refuses.
    """
    from plotly.offline import get_plotlyjs

    path, library = folder / PLOTLY, get_plotlyjs().encode()
    if not path.is_file() or path.read_bytes() != library:
        replace_file(path, lambda beside: beside.write_bytes(library))
    return f'<script charset="utf-8" src="{PLOTLY}"></script>'


def plotly_within() -> str:
    """The library itself as a script element, for a page that is to go somewhere by itself: 5 MB."""
    from plotly.offline import get_plotlyjs

    return f"<script>{get_plotlyjs()}</script>"
