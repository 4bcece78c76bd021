"""The site: its pages are made of what there is, it builds strictly, needs no network, and fits the window."""

import html
import json
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import lnfree_interp

for package in ("mkdocs", "mkdocstrings", "latex2mathml"):
    pytest.importorskip(package)

ROOT = Path(__file__).parents[1]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
sys.path.insert(0, str(ROOT / "docs"))
hooks = import_module("hooks")
sys.path.remove(str(ROOT / "docs"))


@pytest.fixture
def figures(tmp_path, monkeypatch):
    monkeypatch.setattr(hooks, "ROOT", tmp_path)
    monkeypatch.setattr(hooks, "FIGURES", tmp_path / "figures")
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "x.csv").write_text(
        "model,what,value,low,high\na,one,0.25,0.2,0.3\nb,one,12345,,\na,two,x|y,,\n", "utf-8"
    )
    return tmp_path / "figures"


def test_tables(figures):
    whole = hooks.table("figures/x.csv | where what=one | show model, value")
    assert whole.splitlines() == ["| model | value |", "| --- | --- |", "| a | 0.25 |", "| b | 12,345 |"]
    by_model = hooks.table("figures/x.csv | rows what")
    assert by_model.splitlines()[2:] == ["| one | 0.25 [0.2, 0.3] | 12,345 |", "| two | x\\|y |  |"]
    assert "25.0% [20.0%, 30.0%]" in hooks.table("figures/x.csv | where what=one | rows what | percent")
    assert hooks.table("figures/x.csv").count("\n") == 4
    with pytest.raises(ValueError, match="no row is left"):
        hooks.table("figures/x.csv | where what=three")


@pytest.mark.parametrize(
    ("text", "said"),
    [("4.10720", "4.107"), ("570180", "570,180"), ("", ""), ("tiny", "tiny"), ("1e-07", "1e-07"), ("inf", "inf")],
)
def test_numbers(text, said):
    assert hooks.number(text) == said


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["4.1415", "0.00951", "-1", ""], ["4.141", "0.010", "-1.000", ""]),
        (["0.10404", "0.0083"], ["0.1040", "0.0083"]),
        (["12.7", "1.2914", "tiny"], ["12.70", "1.29", "tiny"]),
        (["0.0", "0.0"], ["0.0", "0.0"]),
        (["120", "60"], ["120", "60"]),
        (["570180", "0.5"], ["570,180", "0.5"]),
        (["1e-07", "2.5"], ["1e-07", "2.5"]),
        (["0.0625", "0.000"], ["0.0625", "0.0000"]),
    ],
)
def test_numbers_of_a_column_have_the_same_decimals(texts, said):
    assert hooks.column(texts) == said


def test_claims(figures):
    claim = {"statement": "S|", "paper": "P", "ours": "O", "agrees": "no", "why": "W"}
    for name in ("zzz", "readers"):
        record = {"title": f"T {name}", "caption": "C.", "command": "do", "claims": [claim]}
        (figures / f"{name}.json").write_text(json.dumps(record))
    page = hooks.filled("before <!-- claims --> after")
    assert page.startswith("before Agrees: 2 no.") and page.endswith(" after")
    assert page.index("## T readers") < page.index("## T zzz") and "| S\\| | P | O<br>*W* | **no** |" in page
    assert "##" not in hooks.claims(["zzz"]) and "do" in hooks.claims(["zzz"])


def test_flags_are_those_of_the_command():
    page = hooks.filled("<!-- help: norms -->")
    assert "`lnfree norms --help`" in page and "usage: lnfree norms [-h]" in page and "--threshold" in page


def test_every_public_name_has_a_page():
    listed = [name for names in hooks.public_names().values() for name in names]
    assert sorted(listed) == sorted(lnfree_interp.__all__)
    pages = "\n".join(hooks.api_pages().values())
    assert all(f"::: lnfree_interp.{name}\n" in pages for name in listed)


OUTPUTS = [
    ({"output_type": "stream", "name": "stdout", "text": "hello"}, "````text\nhello\n````"),
    ({"output_type": "stream", "name": "stderr", "text": "a warning"}, ""),
    (
        {
            "output_type": "display_data",
            "data": {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "Writing: 0%"},
        },
        "",
    ),
    ({"output_type": "display_data", "data": {"image/png": "QUJD\n"}}, 'src="data:image/png;base64,QUJD"'),
    (
        {"output_type": "execute_result", "data": {"text/html": "<b>x</b>\n\n<i>", "text/plain": "x"}},
        "<b>x</b>\n<i></div>",
    ),
    ({"output_type": "execute_result", "data": {"text/plain": "3"}}, "````text\n3\n````"),
]


@pytest.mark.parametrize(("output", "shown"), OUTPUTS, ids=lambda x: None if isinstance(x, dict) else x[:10])
def test_outputs_of_notebooks(output, shown):
    assert shown in hooks.shown_output(output) and (shown or not hooks.shown_output(output))


def test_figures_of_notebooks_and_of_their_own_take_the_library_from_beside_them():
    figure = {"data": [{"type": "bar", "y": [1, 2]}], "layout": {"width": 900}}
    shown = hooks.shown_output({"output_type": "display_data", "data": {"application/vnd.plotly.v1+json": figure}})
    assert "Plotly.newPlot" in shown and "https://" not in shown.replace("https://plot.ly", "") and "\n\n" not in shown
    pages = hooks.figure_pages()
    assert len(pages) > 12 and all("Plotly.newPlot" in page for page in pages.values())
    assert 'src="plotly.min.js"' in pages["figures/readers.html"]
    assert 'src="../plotly.min.js"' in pages["figures/screening/recall.html"]


@pytest.mark.slow
def test_a_notebook_is_shown_executed(tmp_path):
    import nbformat

    cells = [nbformat.v4.new_markdown_cell("# A title\nText."), nbformat.v4.new_code_cell("print(6 * 7)")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "one.ipynb")
    page = hooks.notebook_page(tmp_path / "one.ipynb", execute=True)
    assert "````python\nprint(6 * 7)\n````\n\n````text\n42\n````" in page
    assert "42" not in hooks.notebook_page(tmp_path / "one.ipynb", execute=False)


def test_pictures_follow_narrow_pages_and_lead_to_figures():
    uris = {"figures/x-narrow.png", "figures/deep/y-narrow.png", "figures/x.html", "figures/deep/y.html"}
    one, other = '<img alt="X" src="../figures/x.png" />', '<img alt="Y" src="figures/deep/y.png">'
    shown = hooks.with_figures(f"<p>{one}</p><a href='y'>{other}</a>", uris)
    source = '<source media="(max-width: 600px)" srcset="{}-narrow.png">'
    link = '<a href="../figures/x.html" title="Interactive">'
    assert f"<p>{link}<picture>{source.format('../figures/x')}{one}</picture></a></p>" in shown
    assert f"<a href='y'><picture>{source.format('figures/deep/y')}{other}</picture></a>" in shown
    alone = '<img alt="Z" src="../figures/z.png">'
    assert hooks.with_figures(alone, uris) == alone


def test_formulas_are_drawn_by_the_browser():
    shown = hooks.on_page_content('<p><span class="arithmatex">\\(a &lt; \\sum_c c\\)</span></p>', files=[])
    assert (shown.startswith("<p><math") and "arithmatex" not in shown and "&lt;" in shown) or "&#x0003C;" in shown


# ---------------------------------------------------------------------------------------------------------
# The whole of it


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    where = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(where)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return where


@pytest.mark.slow
def test_the_site_is_whole(site):
    pages = {path.relative_to(site).as_posix(): path.read_text() for path in site.rglob("*.html")}
    own = {name: text for name, text in pages.items() if not name.startswith("figures/")}
    assert len(own) > 45
    for name, text in pages.items():
        assert not re.search(r'<(?:script|img|iframe|link)[^>]*(?:src|href)="(?:https?:)?//', text), name
    for name, text in own.items():
        assert not re.search(r"<!-- (table|claims|help)|arithmatex", text), name
        for target in re.findall(r'<img[^>]*src="([^"]+)"', text):
            assert target.startswith("data:") or ((site / name).parent / target).resolve().is_file(), (name, target)
    names = "".join(text for name, text in own.items() if name.startswith("api/"))
    assert [name for name in lnfree_interp.__all__ if f'id="lnfree_interp.{name}"' not in names] == []
    for record in hooks.records().values():
        for claim in record["claims"]:
            assert claim["statement"][:40] in html.unescape(own["claims.html"]), claim
    assert own["dla.html"].count("<math") >= 5 and "usage: lnfree dla" in own["dla.html"]
    assert (site / "figures" / "plotly.min.js").stat().st_size > 10**6


# What a page says of itself, in a frame of the width: its own, its content's, pictures that did not load.
TELL = """<script>addEventListener("load", () => setTimeout(() => parent.postMessage([innerWidth,
document.documentElement.scrollWidth, [...document.images].filter(i => !i.naturalWidth).length,
[...document.querySelectorAll("math")].filter(m => !m.getBoundingClientRect().height).length].join(" "), "*"), 200))
</script></body>"""
HEAR = """<script>const said = []; addEventListener("message", event => {
said.push(event.data); document.title = said.join(", ") })</script>"""
WIDTHS = (400, 800, 1400)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
@pytest.mark.parametrize("page", ["index", "dla", "claims"])
def test_a_page_fits_and_draws_without_a_network(page, site, tmp_path):
    told = site / f"told-{page}.html"
    told.write_text((site / f"{page}.html").read_text().replace("</body>", TELL))
    frames = "".join(
        f'<iframe src="{told.as_uri()}" width="{w}" height="900" style="border:0"></iframe>' for w in WIDTHS
    )
    (tmp_path / "frames.html").write_text(f"<!doctype html><title>nothing</title>{HEAR}{frames}")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=8000", "--window-size=1500,1000"]
    flags += ["--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr"]
    command = [BROWSER, *flags, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    done = subprocess.run([*command, (tmp_path / "frames.html").as_uri()], capture_output=True, text=True, timeout=240)
    said = re.search(r"<title>([^<]*)", done.stdout)[1].split(", ")
    found = {int(width): tuple(map(int, rest)) for width, *rest in (line.split() for line in said)}
    assert set(found) == set(WIDTHS)
    for width, (content, pictures, formulas) in found.items():
        assert content <= width and pictures == formulas == 0, (width, content, pictures, formulas)
    assert "CONSOLE" not in done.stderr, done.stderr
