"""Commands: a table on stdout, a .csv and an .html on disk; bad input is one line, status 2, nothing written."""

import gzip

import pandas as pd
import pytest
from test_models import random_checkpoint

from lnfree_interp import cli
from lnfree_interp.dla import __main__ as dla

TEXT = "It was the best of times, it was the worst of times. " * 400


@pytest.fixture
def text_file(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return str(file)


def test_dla_on_the_embedded_models(tmp_path, capsys):
    out = tmp_path / "out"
    assert dla.main(["--tokens", "1024", "--out", str(out), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("tiny", "tiny-vanilla", "tiny-noLN"))
    table = pd.read_csv(out / "dla.csv")
    heads = table[table.component.str.fullmatch(r"L\d+H\d+")]
    free, normed = (heads[heads.model == name] for name in ("tiny-noLN", "tiny"))
    assert len(free) == len(normed) == 16
    assert free.nmae.max() < 1e-4 < normed.nmae.min()
    assert "<html>" in (out / "dla.html").read_text()
    assert sorted(f.name for f in out.iterdir()) == ["dla.csv", "dla.html"]


def test_dla_on_a_file_at_the_last_position(tmp_path, text_file, capsys):
    arguments = ["--model", "tiny-noLN", "--text", text_file, "--positions", "last", "--context", "64"]
    assert dla.main([*arguments, "--tokens", "640", "--out", str(tmp_path / "out"), "--dtype", "float64"]) == 0
    assert " 0.00%" in capsys.readouterr().out


BAD = [
    (["--model", "tinny"], "unknown model 'tinny'; nearest known: tiny"),
    (["--model", "EMPTY"], "is no GPT-2 checkpoint: it holds no config.json"),
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
    class Table:
        def to_csv(self, path, index):
            path.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        cli.save(tmp_path / "out", "stem", Table())
    assert list((tmp_path / "out").iterdir()) == []
