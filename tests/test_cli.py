"""Commands: tables on stdout, a report and .csv files on disk; bad input is one line, status 2, nothing written."""

import argparse
import gzip
import json
import os
import pty
import subprocess
import sys
import time
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import pandas as pd
import pytest
from test_models import random_checkpoint

from lnfree_interp import cli
from lnfree_interp.dla import __main__ as dla

ROOT = Path(__file__).parents[1]
COMMANDS = {
    p.parent.name: ["-m", f"lnfree_interp.{p.parent.name}"] for p in sorted(ROOT.glob("lnfree_interp/*/__main__.py"))
}
COMMANDS |= {p.name: [str(p)] for p in sorted(ROOT.glob("analyses/*.py")) if "if __name__" in p.read_text()}
HEAVY = {"torch", "transformers", "transformer_lens", "plotly", "pandas", "datasets"}
TEXT = "It was the best of times, it was the worst of times. " * 400


@pytest.fixture
def text_file(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return str(file)


@pytest.mark.slow
def test_dla_on_the_embedded_models(tmp_path, capsys):
    out = tmp_path / "out"
    assert dla.main(["--tokens", "1024", "--out", str(out), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("tiny", "tiny-vanilla", "tiny-noLN"))
    stem = "dla-tiny+tiny-vanilla+tiny-noLN-tokens=1024"
    table = pd.read_csv(out / f"{stem}.csv")
    heads = table[table.component.str.fullmatch(r"L\d+H\d+")]
    free, normed = (heads[heads.model == name] for name in ("tiny-noLN", "tiny"))
    assert len(free) == len(normed) == 32
    assert free.nmae.max() < 1e-4 < normed.nmae.min()
    assert "Plotly.newPlot" in (out / f"{stem}.html").read_text()
    assert sorted(f.name for f in out.iterdir()) == [f"{stem}.csv", f"{stem}.html", "plotly.min.js"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "flags", "of_it", "tables"),
    [
        ("norms", ["--tokens", "512"], "tokens=512", ["sinks"]),
        (
            "evaluate",
            ["--tokens", "512", "--hellaswag", "ITEMS"],
            "tokens=512-hellaswag=items.jsonl",
            ["compared", "hellaswag", "worst"],
        ),
        ("neurons", ["--tokens", "512", "--neurons", "3", "5"], "tokens=512-neurons=3+5", ["cumulative", "ranking"]),
        ("patching", ["--n-pairs", "2"], "induction-resid_pre-gradient-n_pairs=2", ["effects"]),
    ],
)
def test_a_command_shows_bars_and_writes_its_files(name, flags, of_it, tables, tmp_path, monkeypatch, capsys):
    told = []

    @contextmanager
    def bar(label, unit):
        yield lambda done, total: told.append((done, total))

    monkeypatch.setattr(cli, "bar", bar)
    items = tmp_path / "items.jsonl"
    items.write_text('{"ctx": "He opened the door", "endings": ["and went in.", "of the sea."], "label": 0}')
    flags = [str(items) if flag == "ITEMS" else flag for flag in flags]
    main = import_module(f"lnfree_interp.{name}.__main__").main
    arguments = ["--model", "tiny", "tiny-noLN", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert main([*arguments, *flags]) == 0
    stem = f"{name}-tiny+tiny-noLN-{of_it}"
    wanted = {f"{stem}.html", f"{stem}.csv", *(f"{stem}.{table}.csv" for table in tables), "plotly.min.js"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == wanted
    assert "tiny-noLN" in capsys.readouterr().out
    assert told and all(0 <= done <= total for done, total in told) and told[-1][0] == told[-1][1]


def test_dla_on_a_file_at_the_last_position(tmp_path, text_file, capsys):
    arguments = ["--model", "tiny-noLN", "--text", text_file, "--positions", "last", "--context", "64"]
    assert dla.main([*arguments, "--tokens", "640", "--out", str(tmp_path / "out"), "--dtype", "float64"]) == 0
    assert " 0.00%" in capsys.readouterr().out


BAD = [
    (["--model", "tinny"], "unknown model 'tinny'; nearest known: tiny"),
    (["--model", "EMPTY"], "is no checkpoint: it holds no config.json"),
    (["--model", "NO_TOKENIZER"], "has no tokenizer"),
    (["--text", "missing.txt"], "cannot read text file missing.txt: No such file"),
    (["--text", "BLANK"], "is empty"),
    (["--text", "SHORT"], "too few for one block of 256"),
    (["--text", "BINARY"], "is not UTF-8 text"),
    (["--text", "NOT_GZIP"], "cannot read text file"),
    (["--device", "cuda:99"], "device 'cuda:99' is not there"),
    (["--device", "abacus"], "unknown device 'abacus'"),
    (["--dtype", "float8"], "unknown dtype 'float8'"),
    (["--tokens", "0"], "'0' is not a positive whole number"),
    (["--tokens", "many"], "'many' is not a positive whole number"),
    (["--prompt", ""], "--prompt is empty"),
    (["--prompt", "word " * 300], "the model's context holds 256"),
    (["--positions", "first"], "invalid choice: 'first'"),
    (["--verbose"], "unrecognized arguments: --verbose"),
    (["--out", "SHORT"], "is not a directory"),
    (["--data", "no/such-dataset"], "cannot read dataset 'no/such-dataset'"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=lambda x: " ".join(x)[:30] if isinstance(x, list) else "")
def test_bad_input(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "BLANK").write_text("\n\n \n")
    (tmp_path / "SHORT").write_text("too short")
    (tmp_path / "BINARY").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "NOT_GZIP").write_text("x")
    (tmp_path / "NOT_GZIP").rename(tmp_path / "NOT_GZIP.gz")
    random_checkpoint(tmp_path / "NO_TOKENIZER", ln_free=True)
    before = sorted(tmp_path.rglob("*"))
    arguments = [a + ".gz" if a == "NOT_GZIP" else a for a in arguments]
    if "--model" not in arguments:
        arguments = ["--model", "tiny", *arguments]
    try:
        status = dla.main(arguments)
    except SystemExit as stopped:  # argparse's own
        status = stopped.code
    printed = capsys.readouterr()
    assert status == 2
    assert printed.out == ""
    assert printed.err.count("\n") == 1 and message in printed.err
    assert sorted(tmp_path.rglob("*")) == before


def test_gzipped_text_reads_the_same(tmp_path, text_file):
    packed = tmp_path / "text.txt.gz"
    packed.write_bytes(gzip.compress(TEXT.encode()))
    assert cli.read_documents(packed) == cli.read_documents(text_file)


def test_a_failed_write_leaves_nothing(tmp_path):
    class Table(pd.DataFrame):
        def to_csv(self, path, index):
            path.write_text("half")
            raise OSError("disk full")

    with pytest.raises(ValueError, match=r"^cannot write .*stem\.csv: disk full$"):
        cli.save(tmp_path / "out", "stem", Table())
    assert list((tmp_path / "out").iterdir()) == []
    (tmp_path / "file").write_text("here")
    with pytest.raises(ValueError, match=r"^cannot write .*file: File exists$"):
        cli.save(tmp_path / "file", "stem", Table())


# ---------------------------------------------------------------------------------------------------------
# Answers at once


def answer(command: list[str], *arguments: str) -> tuple[int, str, set[str]]:
    """Exit status, what is printed, and the names of the top packages that were imported."""
    python = [sys.executable, "-X", "importtime"]
    out = subprocess.run([*python, *command, *arguments], capture_output=True, text=True)
    lines = out.stderr.splitlines()
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in lines if line.startswith("import time:")}
    said = [line for line in lines if not line.startswith("import time:")]
    return out.returncode, "\n".join([*out.stdout.splitlines(), *said]), imported


def test_all_commands_are_found():
    assert len(COMMANDS) >= 6 + 12 and {"dla", "finetune", "all.py", "loss_table.py"} <= set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_and_a_mistyped_flag_import_nothing_heavy(name):
    status, printed, imported = answer(COMMANDS[name], "--help")
    assert status == 0 and printed.startswith("usage:") and not imported & HEAVY
    status, printed, imported = answer(COMMANDS[name], "--modle", "tiny")
    assert status == 2 and printed.count("\n") == 0 and "error: " in printed and not imported & HEAVY


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("dla", ["--model", "tinny"]),
        ("norms", ["--dtype", "float8"]),
        ("neurons", ["--text", "missing.txt"]),
        ("patching", ["--pairs", "missing.csv"]),
        ("patching", ["--max-memory", "lots"]),
        ("patching", ["--method", "atp_star"]),
        ("evaluate", ["--hellaswag", "missing.jsonl"]),
        ("finetune", ["--model", "tiny", "--preset", "huge", "--text", "x", "--out", "y"]),
        ("finetune", ["--model", "tiny", "--preset", "tiny", "--text", "missing.txt", "--out", "y"]),
        ("loss_table.py", ["--model", "tinny"]),
    ],
)
def test_a_bad_value_imports_nothing_heavy(name, arguments):
    status, printed, imported = answer(COMMANDS[name], *arguments)
    assert status == 2 and printed.count("\n") == 0 and "error: " in printed and not imported & HEAVY


def test_help_comes_at_once():
    def seconds() -> float:
        began = time.monotonic()
        assert answer(COMMANDS["dla"], "--help")[0] == 0
        return time.monotonic() - began

    assert min(seconds() for _ in range(3)) < 2


@pytest.mark.parametrize("name", ["dla", "loss_table.py"])
def test_a_person_at_a_terminal_sees_that_it_is_loading(name, tmp_path):
    ours, theirs = pty.openpty()
    arguments = ["--model", "tiny", "--tokens", "256", "--out", str(tmp_path)]
    python = [sys.executable, "-X", "importtime", *COMMANDS[name], *arguments]
    running = subprocess.Popen(python, stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    seen = ""
    try:
        while "loading" not in seen:
            seen += os.read(ours, 4096).decode()
    finally:
        running.kill()
        running.wait()
        os.close(ours)
    before = seen.partition("loading PyTorch ...")[0]
    assert "lnfree_interp.cli" in before
    assert not any(f" {package}\r\n" in before for package in HEAVY)


def test_a_bar_is_told_of_done_and_in_all(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with cli.bar("tiny", "sequence") as progress:
        progress(1, None)
        time.sleep(0.15)
        progress(3, 4)
    shown = capsys.readouterr().err
    assert "tiny" in shown and "3/4" in shown and "sequence" in shown


def test_a_bar_is_silent_where_nobody_looks(capsys):
    with cli.bar("tiny", "sequence") as progress:
        progress(4, 4)
    assert capsys.readouterr().err == ""


def test_an_interrupt_is_one_line(capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    args = cli.parser("dla", "").parse_args(["--model", "tiny"])
    assert cli.guard(interrupted, args, "dla") == 130
    assert capsys.readouterr().err == "dla: interrupted\n"


def test_text_may_be_a_directory(tmp_path):
    texts = ["It was the best of times,", "it was the worst of times."]
    (tmp_path / "a.txt").write_text(texts[0])
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": texts[1]}))
    assert list(cli.documents(argparse.Namespace(text=str(tmp_path), data=None))) == texts
