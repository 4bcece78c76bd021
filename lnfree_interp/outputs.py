"""What commands print and write: tables without what says nothing, a report, files that overwrite no other run's."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from .asked import Asked
from .figures.report import Part, plotly_beside, plotly_within, report_page
from .files import as_value_error, replace_file

# What says in a page whose it is, and within how many characters of its beginning.
_MARK, _WITHIN = '<meta name="lnfree-settings" content="{}">', 2000


def tidied(table):
    """The DataFrame without columns in which nothing stands, and without rows that say nothing.

    A row is about what stands in columns of words and whole numbers that are full; it says something if anything stands
    in the others, of floats or with gaps, or if words of it are a number: "4.39 (+0.01)".

    Example:
        >>> import pandas as pd
        >>> table = pd.DataFrame({"layer": [0, 1], "loss": [0.5, None], "exact": [None, None]})
        >>> tidied(table).to_dict("records")
        [{'layer': 0, 'loss': 0.5}]
    """
    if table.empty:
        return table
    table = table.dropna(axis=1, how="all")
    there = table.notna().to_numpy()
    saying = [dtype.kind == "f" or not full for dtype, full in zip(table.dtypes, there.all(0))]
    if not any(saying):
        return table
    rows = zip(there[:, saying].any(1), table.itertuples(index=False, name=None))
    return table[[bool(says) or any(map(_is_number_in_words, row)) for says, row in rows]]


def _is_number_in_words(value: Any) -> bool:
    return isinstance(value, str) and value.lstrip("+-([")[:1].isdigit()


def show(table, title: str | None = None) -> None:
    """Print a DataFrame."""
    if title:
        print(f"\n{title}")
    print(tidied(table).to_string(index=False, float_format=lambda x: f"{x:.4g}", na_rep=""))


def save(out: Path, stem: str, table) -> None:
    """Write out/stem.csv: beside, then renamed, so that it is never half-written.

    Raises:
        ValueError: the disk refuses.
    """
    _make(out)
    _write_table(table, out / f"{stem}.csv")
    print(f"wrote {out / stem}.csv")


def report(
    args,
    parts: Sequence[Part],
    tables: Mapping[str, Any] | None = None,
    *,
    page: str | None = None,
    others: Mapping[str, Callable[[Path], object]] | None = None,
) -> None:
    """Print the parts; write a page of them and tables under the name of what was asked.

    Args:
        args: with `asked`, as `parsed` gives it; without an `out` nothing is written.
        tables: whole ones by name, "" or a word: STEM.csv, STEM.word.csv.
        page: HTML that is written in place of the report.
        others: more files by what follows the stem, ".word.json" say, and what writes each, whole or not at all.

    Raises:
        ValueError: the disk refuses.
    """
    for part in parts:
        if part.text:
            print("\n".join(filter(None, [part.title and f"\n{part.title}", part.text])))
        if part.table is not None:
            show(part.table, part.title)
    out, asked, others = args.out, args.asked, others or {}
    if out is None:
        return
    tidy = {f".{name}.csv" if name else ".csv": tidied(table) for name, table in (tables or {}).items()}
    _make(out)
    stem = free_stem(out, asked, [".html", *tidy, *others])
    head = _MARK.format(asked.fingerprint)
    if page is None:
        figures = any(part.figure is not None for part in parts)
        script = (plotly_within() if args.embed else plotly_beside(out)) if figures else ""
        clean = [part if part.table is None else replace(part, table=tidied(part.table)) for part in parts]
        names = {stem + suffix: table for suffix, table in tidy.items()}
        page = report_page(asked, clean, names, script=script, head=head)
    else:
        page = page.replace('<meta charset="utf-8">', f'<meta charset="utf-8">\n{head}', 1)
    text = page
    # The page first: it says whose the others are.
    replace_file(out / f"{stem}.html", lambda path: path.write_text(text, encoding="utf-8", errors="replace"))
    for suffix, table in tidy.items():
        _write_table(table, out / (stem + suffix))
    for suffix, write in others.items():
        write(out / (stem + suffix))
    print(f"wrote {', '.join(str(out / (stem + suffix)) for suffix in ('.html', *tidy, *others))}")


def free_stem(out: Path, asked: Asked, suffixes: Iterable[str]) -> str:
    """The name of a run's files: its own, with a number where files of another run have it, which is said.

    The same settings run again have the same name, and replace what they wrote.
    """
    for number in count(1):
        stem = asked.stem if number == 1 else f"{asked.stem}-{number}"
        if written_by(out / f"{stem}.html") == asked.fingerprint:
            break
        if not any((out / (stem + suffix)).exists() for suffix in suffixes):
            break
    if number > 1:
        print(f"{out / asked.stem}.html is of other settings, and stays: this is {stem}.html", file=sys.stderr)
    return stem


def written_by(page: Path) -> str | None:
    """The fingerprint of the settings by which a page was made; None if there is no such page."""
    if not page.is_file():
        return None
    with as_value_error(f"read {page}"), page.open(encoding="utf-8", errors="replace") as file:
        found = re.search(_MARK.format(r"(\w+)"), file.read(_WITHIN))
    return found[1] if found else None


def _make(out: Path) -> None:
    with as_value_error(f"write {out}"):
        out.mkdir(parents=True, exist_ok=True)


def _write_table(table, path: Path) -> None:
    replace_file(path, lambda beside: tidied(table).to_csv(beside, index=False))
