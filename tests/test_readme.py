"""What the README and the pages show runs."""

import re
import shlex
from pathlib import Path

import pytest

from lnfree_interp import __main__ as lnfree
from lnfree_interp import cli

ROOT = Path(__file__).parent.parent
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in (ROOT / "README.md", *ROOT.glob("docs/*.md"))}
BLOCKS = {
    f"{page}:{text.count(chr(10), 0, found.start()) + 1}": found[1]
    for page, text in sorted(PAGES.items())
    for found in re.finditer(r"```python\n(.*?)```", text, re.S)
}
COMMANDS = [
    line.partition("  #")[0]
    for text in PAGES.values()
    for block in re.findall(r"```bash\n(.*?)```", text, re.S)
    for line in block.splitlines()
]


@pytest.mark.parametrize("where", BLOCKS)
def test_python_examples_run(where, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[where], where, "exec"), {})


def test_python_examples_are_found():
    pages = {where.partition(":")[0] for where in BLOCKS}
    assert {
        "README.md",
        "docs/index.md",
        "docs/dla.md",
        "docs/patching.md",
        "docs/graphs.md",
        "docs/readers.md",
    } <= pages


def called(line: str) -> tuple[str, list[str]] | None:
    """Which of the commands a line of the shell calls, and with what."""
    found = re.search(r"(?:\blnfree |-m lnfree_interp\.)(\w+)(.*)", line)
    return (found[1], shlex.split(found[2])) if found else None


@pytest.mark.parametrize("line", sorted({line for line in COMMANDS if called(line)}))
def test_commands_are_ones_that_exist(line, monkeypatch):
    """Name and flags: nothing is run."""
    seen = []
    monkeypatch.setattr(cli, "guard", lambda run, args, *_, **__: seen.append(args) or 0)
    name, arguments = called(line)
    assert lnfree.main([name, *arguments]) == 0 and len(seen) == 1


def test_scripts_and_files_that_are_named_exist():
    scripts = {found for line in COMMANDS for found in re.findall(r"\banalyses/\w+\.py", line)}
    assert {"analyses/all.py", "analyses/removal_order.py"} <= scripts
    linked = {
        (ROOT / page).parent / target
        for page, text in PAGES.items()
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
        # The site makes these, and the pages of figures; a code host the badge.
        if target not in ("contributing.md", "changelog.md", "../../actions/workflows/ci.yml/badge.svg")
        and not re.search("figures/.*html$", target)
    }
    assert len(linked) > 30
    assert [str(path) for path in (*linked, *(ROOT / script for script in scripts)) if not path.exists()] == []


def test_the_readme_is_one_screen_with_a_picture_and_both_commands():
    text = PAGES["README.md"]
    assert text.index("![") < text.index("**GPT-2") and len(text.splitlines()) <= 64
    assert text.count(".venv/bin/pip install") == 2 and text.count("<!-- test command -->") == 1
