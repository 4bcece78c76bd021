"""Reports of commands: how files are named, what they overwrite, what a page holds, that it works without a network."""

import argparse
import re
import shutil
import string
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lnfree_interp import asked as asking
from lnfree_interp import cli
from lnfree_interp.asked import Asked, parsed, word
from lnfree_interp.figures import report
from lnfree_interp.figures.report import Part, page, report_page, table_element
from lnfree_interp.outputs import free_stem, tidied, written_by

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ANGRY = '</script><script>document.title = "broken"</script><img src=x> & "'


def arguments_of(command, *argv):
    """What a command hands to its work."""
    caught = []
    guard = cli.guard
    cli.guard = lambda run, args, *_, **__: caught.append(args) or 0
    try:
        import_module(f"lnfree_interp.{command}.__main__").main(list(argv))
    finally:
        cli.guard = guard
    return caught[0]


def made(command="dla", models=("tiny",), named=(), **settings):
    changed = frozenset(settings)
    return Asked(command, "What.", "lnfree", {"model": list(models), **settings}, changed, changed, named)


# ---------------------------------------------------------------------------------------------------------
# Names


@pytest.mark.parametrize(
    ("line", "stem"),
    [
        ("dla", "dla-tiny+tiny-vanilla+tiny-noLN"),
        ("dla --model tiny --tokens 8192 --device cuda --embed --out x", "dla-tiny"),
        ("dla --model tiny --tokens 64 --positions last", "dla-tiny-tokens=64-positions=last"),
        ("norms --model org/name --per-position", "norms-org-name-per_position"),
        ("norms --model a b c d e --data Skylion007/openwebtext", "norms-a+b+3-more-data=Skylion007-openwebtext"),
        ("patching --model tiny", "patching-tiny-induction-resid_pre-gradient"),
        (
            "patching --model tiny --pairs ioi --site z --method relp gradient --n-pairs 8 --layers 0 2 --raw",
            "patching-tiny-ioi-z-relp+gradient-n_pairs=8-layers=0+2-raw",
        ),
        ("neurons --model tiny --layer -2", "neurons-tiny-layer=-2"),
        ("graph --model tiny --prompt=hello --target=you", "graph-tiny-hello-target=you"),
        ("graph --model tiny --edges --exact 3 --n-pairs 4", "edges-tiny-induction-gradient-n_pairs=4-exact=3"),
        ("check tiny --dtype float64", "check-tiny-dtype=float64"),
    ],
)
def test_files_are_named_by_what_differs(line, stem):
    assert arguments_of(*line.split()).asked.stem == stem


def test_texts_in_names(tmp_path):
    (tmp_path / "my text.txt").write_text("x")
    place = str(tmp_path / "my text.txt")
    asked = arguments_of(
        "evaluate", "--model", "tiny", "--text", place, "--prompt", "She put on her / his\n\0 hat, and"
    ).asked
    assert asked.stem == "evaluate-tiny-text=my-text.txt-prompt=She-put-on-her-his-hat-a"
    assert arguments_of("evaluate", "--model", "tiny", "--prompt", "?!").asked.stem == "evaluate-tiny-prompt"


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text(max_size=60))
def test_any_text_is_a_safe_word(text):
    said = word(f"{text} ")
    assert re.fullmatch(r"[\w.+-]*", said) and len(said) <= asking.VALUE
    assert not set(said) & set('/\\:*?"<>|' + string.whitespace) and not said.startswith((".", "-"))
    assert not said.endswith((".", "-"))


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=6), st.text(max_size=60))
def test_any_name_fits(models, text):
    stem = made(models=models, prompt=text, target=text, versus=text, named=("prompt",)).stem
    assert len(stem.encode()) <= asking.NAME and stem.startswith("dla") and not stem.endswith((".", "-", " "))


def test_what_was_given_and_what_is_the_default():
    args = arguments_of("dla", "--model", "tiny", "--tokens", "8192", "--top", "3", "--device", "cpu")
    assert args.asked.given == {"model", "tokens", "top", "device"}
    assert args.asked.changed == {"model", "top", "device"}
    assert list(args.asked.settings)[:3] == ["model", "text", "data"]
    assert args.asked.line.endswith("dla --model tiny --tokens 8192 --top 3 --device cpu")
    assert args.asked.title == "dla: tiny (top 3)"
    # The parser is as it was.
    parser = argparse.ArgumentParser(prog="p", description="A line.\n\nMore.")
    parser.add_argument("--model", nargs="+", default=["tiny"])
    parser.add_argument("--n", type=int, default=3)
    assert parsed(parser, ["--n", "4"], "p").asked.given == {"n"}
    assert parser.parse_args([]) == argparse.Namespace(model=["tiny"], n=3)
    assert parsed(parser, [], "p").asked.what == "A line"


def test_the_fingerprint_is_of_what_decides(tmp_path, monkeypatch):
    def of(*argv):
        return arguments_of("dla", *argv).asked.fingerprint

    one = of("--model", "tiny")
    assert one == of("--model", "tiny", "--out", "x", "--device", "cuda", "--embed", "--tokens", "8192")
    assert one != of("--model", "tiny", "--tokens", "64") != of("--model", "tiny", "--tokens", "65")
    assert one != arguments_of("norms", "--model", "tiny").asked.fingerprint
    for folder in ("a", "b"):
        (tmp_path / folder / "model").mkdir(parents=True)
    a, b = (arguments_of("dla", "--model", str(tmp_path / folder / "model")).asked for folder in "ab")
    assert a.stem == b.stem == "dla-model" and a.fingerprint != b.fingerprint
    monkeypatch.chdir(tmp_path)
    assert of("--model", "a/model") == a.fingerprint  # the same place


# ---------------------------------------------------------------------------------------------------------
# What is overwritten


def ran(out, asked, text="x", **options):
    """A command that was asked this, and what it writes."""
    args = argparse.Namespace(out=out, embed=False, asked=asked)
    cli.report(args, [Part("T", text=text)], {"": pd.DataFrame({"n": [text]})}, **options)


def test_a_run_replaces_its_own_files_and_no_other(tmp_path, capsys):
    one, other = made(top=1, prompt="Her"), made(top=1, prompt="Her?")
    third = replace(one, settings=one.settings | {"hidden": 3})
    assert one.stem == other.stem == third.stem
    ran(tmp_path, one, "first")
    ran(tmp_path, one, "again")
    assert capsys.readouterr().err == ""
    ran(tmp_path, other, "other")
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and "is of other settings, and stays" in said.err
    assert f"wrote {tmp_path / one.stem}-2.html, {tmp_path / one.stem}-2.csv" in said.out
    ran(tmp_path, third, "third")
    ran(tmp_path, other, "other again")
    texts = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert {name: text.split()[1] for name, text in texts.items() if name.endswith(".csv")} == {
        f"{one.stem}.csv": "again",
        f"{one.stem}-2.csv": "other",
        f"{one.stem}-3.csv": "third",
    }
    assert "other again" in texts[f"{one.stem}-2.html"] and len(texts) == 6


def test_files_of_nobody_knows_whom_stay(tmp_path):
    asked = made()
    (tmp_path / f"{asked.stem}.words.csv").write_text("mine")
    assert free_stem(tmp_path, asked, [".html", ".csv"]) == asked.stem
    assert free_stem(tmp_path, asked, [".html", ".words.csv"]) == f"{asked.stem}-2"
    (tmp_path / f"{asked.stem}-2.html").write_text("<html>")
    assert free_stem(tmp_path, asked, [".html", ".words.csv"]) == f"{asked.stem}-3"
    assert written_by(tmp_path / f"{asked.stem}-2.html") is None is written_by(tmp_path / "none.html")


def test_a_page_of_its_own_says_whose_it_is_too(tmp_path):
    asked = made("graph")
    whole = '<!DOCTYPE html>\n<html>\n<head>\n<meta charset="utf-8">\n<title>é</title></head></html>'
    others = {".tiny.json": lambda path: path.write_text("{}")}
    ran(tmp_path, asked, page=whole, others=others)
    assert written_by(tmp_path / "graph-tiny.html") == asked.fingerprint
    assert {path.name for path in tmp_path.iterdir()} == {f"graph-tiny.{s}" for s in ("html", "csv", "tiny.json")}


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ValueError, match=r"^cannot write .*dla-tiny\.html: No space left on device$"):
        ran(tmp_path, made())
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    (tmp_path / "file").write_text("here")
    with pytest.raises(ValueError, match=r"^cannot write .*file: File exists$"):
        ran(tmp_path / "file", made())


# ---------------------------------------------------------------------------------------------------------
# Tables


def test_rows_and_columns_that_say_nothing_are_left_out():
    nan = float("nan")
    table = pd.DataFrame(
        {
            "model": ["a", "b", "c", "d"],
            "layer": [0, 1, 2, 3],
            "loss": [1.0, nan, nan, 2.0],
            "event": [None, None, "b", None],
            "gap": [nan] * 4,
            "who": [None] * 4,
        }
    )
    tidy = tidied(table)
    assert list(tidy.columns) == ["model", "layer", "loss", "event"] and list(tidy.model) == ["a", "c", "d"]
    in_words = pd.DataFrame({"model": ["a", "b", "c"], "loss": ["4.39", "-", "[+4.1]"], "gap": [nan, nan, 0.1]})
    assert list(tidied(in_words).model) == ["a", "c"]
    parts = pd.concat([table, table])  # rows of the same index
    assert len(tidied(parts)) == 6
    of_one_name = pd.DataFrame([["a", 1.0, nan], ["b", nan, nan]], columns=["model", "final", "final"])
    assert tidied(of_one_name).to_numpy().tolist() == [["a", 1.0]]
    words = table[["model", "layer"]]
    pd.testing.assert_frame_equal(tidied(words), words)
    empty = pd.DataFrame({"a": [], "b": []})
    assert list(tidied(empty).columns) == ["a", "b"]


def test_tables_are_the_same_printed_written_and_shown(tmp_path, capsys):
    table = pd.DataFrame({"model": ["a", "b"], "x": [0.123456, None], "y": [None, None]})
    args = argparse.Namespace(out=tmp_path, embed=False, asked=made())
    cli.report(args, [Part("T", table=table)], {"": table, "more": table})
    printed, shown = capsys.readouterr().out, (tmp_path / "dla-tiny.html").read_text()
    assert "\nT\nmodel      x\n    a 0.1235\n" in printed and "b" not in printed.partition("wrote")[0].split()
    assert "<td>a</td><td class='number'>0.1235</td>" in shown and "<td>b</td>" not in shown
    assert "<th>y</th>" not in shown and "nan" not in shown.lower()
    for name in ("dla-tiny.csv", "dla-tiny.more.csv"):
        assert (tmp_path / name).read_text() == "model,x\na,0.123456\n"
        assert f"<a href='{name}'>" in shown


def test_a_table_on_a_page():
    table = pd.DataFrame({"some_name": ["<b>", "c"], "n": [1, 2], "x": [None, 1234.5678], "s": ["1", "2"]})
    shown = table_element(table)
    assert "some_<wbr>name" in shown and "<td>&lt;b&gt;</td>" in shown
    assert shown.count("class='number'") == 2 * 3 and "<td class='number'></td>" in shown and ">1235<" in shown
    assert "... and 1 more rows" in table_element(table, 1) and "more rows" not in shown
    assert "<th>a</th>" in table_element(pd.DataFrame({"a": []}))


# ---------------------------------------------------------------------------------------------------------
# Pages


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


def test_a_page_says_what_was_asked():
    asked = arguments_of("patching", "--model", "tiny", "--n-pairs", "4").asked
    asked.note("models", "tiny: small")
    asked.note("models", "tiny: small")
    whole = report_page(asked, [Part("Words", text="a\nb")], {"x.csv": pd.DataFrame({"a": [1]})})
    assert "<title>patching: tiny (induction, resid_pre, gradient, n_pairs 4)</title>" in whole
    assert "patching --model tiny --n-pairs 4</pre>" in whole and whole.count("tiny: small") == 1
    for name in asked.settings:
        assert f"<td>--{name.replace('_', '-')}</td>" in whole
    assert re.search(r"<td>--n-pairs</td><td>4</td><td class='small'></td>", whole)
    assert re.search(r"<td>--site</td><td>resid_pre</td><td class='small'>default</td>", whole)
    assert "lnfree_interp " in whole and "TransformerLens " in whole and "<pre>a\nb</pre>" in whole
    assert "x.csv</a> <span class='small'>1 rows: a</span>" in whole


def test_no_text_breaks_a_page():
    asked = replace(made(models=[ANGRY], prompt=ANGRY), what=ANGRY, line=ANGRY)
    asked.note(ANGRY, ANGRY)
    table = pd.DataFrame({ANGRY: [ANGRY]})
    angry = report_page(asked, [Part(ANGRY, ANGRY, table)], {ANGRY: table})
    calm = report_page(made(prompt="x"), [Part("x", "x", table.rename(columns={ANGRY: "x"}))], {"x": table})
    tags = [[tag for tag, _ in Tags(text).found if tag not in ("dt", "dd", "br")] for text in (angry, calm)]
    assert tags[0] == tags[1] and page("<", []).count("&lt;") == 1


def test_the_plotting_library_stands_beside_the_pages_once(tmp_path):
    import plotly.graph_objects as go

    parts = [Part("F", figure=go.Figure(go.Bar(y=[1, 2]), {"width": 900}))]

    def write(**flags):
        args = argparse.Namespace(out=tmp_path, embed=False, asked=made(**flags))
        args.embed = "embed" in flags
        cli.report(args, parts)
        return (tmp_path / f"{args.asked.stem}.html").read_text()

    library = tmp_path / report.PLOTLY
    text = write()
    first = library.stat()
    assert first.st_size > 10**6 and len(text) < 20_000
    sources = [attributes["src"] for tag, attributes in Tags(text).found if "src" in attributes]
    assert sources == [report.PLOTLY] and not re.search(r"cdn|<link", text)
    assert '"width":900' not in text  # it follows the page
    write(top=2)
    assert library.stat().st_mtime_ns == first.st_mtime_ns and library.stat().st_ino == first.st_ino
    library.write_text("/* plotly.js v0.1 */")  # of another version
    write()
    assert library.stat().st_size == first.st_size
    library.unlink()
    whole = write(embed=True)
    assert not library.exists() and len(whole) > 10**6
    assert not [attributes for tag, attributes in Tags(whole).found if "src" in attributes and tag == "script"]


# ---------------------------------------------------------------------------------------------------------
# What is other than asked


def test_a_clipped_value_is_said_once_given(capsys):
    args = arguments_of("dla", "--model", "tiny", "--top", "99")
    assert cli.clip(args, "top", 26, "components of tiny") == 26
    assert capsys.readouterr().err == "--top 99: there are 26 components of tiny\n"
    assert args.asked.notes == {"other than asked": ["--top 99: there are 26 components of tiny"]}
    assert cli.clip(args, "top", 99, "components") == 99
    by_default = arguments_of("dla", "--model", "tiny")
    assert cli.clip(by_default, "top", 3, "components") == 3 and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("patching --pairs ioi --length 9", "--length makes no difference with --pairs ioi"),
        ("patching --template 1", "--template makes no difference with --pairs induction"),
        ("patching --steps 7", "--steps makes no difference with --method gradient: it is for integrated"),
        ("patching --joint", "--joint makes no difference with --method gradient: it is for second_order"),
        ("patching --steps 7 --method integrated", ""),
        ("patching --pairs ioi --n-pairs 3 --template 0", ""),
        ("graph --edges --template 1", "--template makes no difference with --pairs induction"),
        ("evaluate --items 3", "--items makes no difference with no --hellaswag"),
        ("check tiny --embed", "--embed makes no difference with no --out"),
    ],
)
def test_a_setting_that_does_nothing_is_said(line, said, monkeypatch, capsys):
    name, *argv = line.split()
    module = import_module(f"lnfree_interp.{name}.__main__")
    monkeypatch.setattr(cli, "guard", lambda run, args, prog, check, **_: check(args) or 0)
    assert module.main(argv) == 0
    assert capsys.readouterr().err == f"{said}\n" * bool(said)


# ---------------------------------------------------------------------------------------------------------
# In a browser, where there is one

# What a page says of itself, in a frame of some width: its own, its content's, the widest of what could be moved
# sideways, figures, how many of them are drawn and as wide as the page, traces that are drawn.
TELL = """<script>addEventListener("load", () => setTimeout(() => {
const wide = [...document.querySelectorAll(".wide, pre")].map((e) => e.scrollWidth - e.clientWidth);
const figures = [...document.querySelectorAll(".figure")];
const drawn = figures.filter((f) => f.querySelector("svg.main-svg") &&
  Math.abs(f.querySelector("svg.main-svg").getBoundingClientRect().width - f.clientWidth) < 2);
const traces = document.querySelectorAll(".scatterlayer .trace, .barlayer .trace, .heatmaplayer image").length;
parent.postMessage([innerWidth, document.documentElement.scrollWidth, Math.max(0, ...wide), figures.length,
  drawn.length, traces].join(" "), "*"); }, 500))</script></html>"""
HEAR = """<script>const said = []; addEventListener("message", event => {
said.push(event.data); document.title = said.join(", ") })</script>"""
WIDTHS = (400, 800, 1400)


def told_by(page_file, folder):
    """What a page says at each width, and what the browser wrote."""
    told = page_file.with_name(f"told-{page_file.name}")
    told.write_text(page_file.read_text().replace("</html>", TELL))
    frames = "".join(
        f'<iframe src="{told.as_uri()}" width="{w}" height="900" style="border:0"></iframe>' for w in WIDTHS
    )
    (folder / "frames.html").write_text(f"<!doctype html><title>nothing</title>{HEAR}{frames}")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=8000", "--window-size=1500,1000"]
    flags += ["--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--dump-dom"]
    command = [BROWSER, *flags, f"--user-data-dir={folder / 'profile'}", (folder / "frames.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    said = re.search(r"<title>([^<]*)", done.stdout)[1].split(", ")
    return {int(width): tuple(map(int, rest)) for width, *rest in (line.split() for line in said)}, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")
@pytest.mark.parametrize(
    ("command", "flags", "n_figures", "n_traces"),
    [("norms", ["--tokens", "256"], 2, 4), ("patching", ["--n-pairs", "2", "--length", "8", "--embed", "--raw"], 1, 4)],
)
def test_a_report_fits_and_draws_without_a_network(command, flags, n_figures, n_traces, tmp_path):
    out = tmp_path / "out"
    models = ["--model", "tiny", "tiny-noLN", "--device", "cpu", "--out", str(out)]
    assert import_module(f"lnfree_interp.{command}.__main__").main([*models, *flags]) == 0
    (whole,) = out.glob("*.html")
    assert (out / report.PLOTLY).exists() == ("--embed" not in flags)
    found, said = told_by(whole, tmp_path)
    assert set(found) == set(WIDTHS)
    for width, (content, sideways, figures, drawn, traces) in found.items():
        assert content <= width and (figures, drawn) == (n_figures, n_figures) and traces >= n_traces, (width, found)
        assert sideways <= 0 or width < 800, (width, found)
    assert "CONSOLE" not in said, said
    for link in re.findall(r"<li><a href='([^']+)'", whole.read_text()):
        assert (out / link).is_file(), link
