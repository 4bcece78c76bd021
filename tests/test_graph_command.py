"""python -m lnfree_interp.graph: tables, a page, files of graphs; with --edges, edges on pairs; bad input."""

import json

import pandas as pd
import pytest
from test_cli import HEAVY, answer
from test_graph_page import data_of

from lnfree_interp import attribution_graph
from lnfree_interp.graph.__main__ import main
from lnfree_interp.graph.command import _stems


def run(out, *arguments):
    return main(["--device", "cpu", "--out", str(out), *arguments])


def test_graphs_of_a_prompt(tmp_path, capsys):
    prompt = "She put on her"
    flags = ["--model", "tiny-noLN", "tiny", "--nodes", "mlp", "--share", "0.6", "--target", " hat", "--versus", " bed"]
    assert run(tmp_path, *flags, "--prompt", prompt, "--top", "3") == 0
    printed = capsys.readouterr().out
    stem = "graph-tiny-noLN+tiny-She-put-on-her-top=3-target=hat-versus=bed-nodes=mlp-share=0.6"
    files = {f"{stem}.{rest}" for rest in ("html", "csv", "nodes.csv", "tiny-noLN.json", "tiny.json")}
    assert {path.name for path in tmp_path.iterdir()} == files
    assert all(f"{tmp_path / name}" in printed for name in files)
    graph = attribution_graph("tiny-noLN", prompt, " hat", versus=" bed", nodes="mlp", share=0.6)
    edges, nodes = (pd.read_csv(tmp_path / f"{stem}.{rest}") for rest in ("csv", "nodes.csv"))
    assert edges.model.unique().tolist() == nodes.model.unique().tolist() == ["tiny-noLN", "tiny"]
    mine = edges[edges.model == "tiny-noLN"]
    assert len(mine) == int(graph.adjacency.count_nonzero()) and mine.influence.is_monotonic_decreasing
    into = mine[mine.receiver == "logit ' hat' - ' bed'"]
    assert into.entry.sum() == pytest.approx(float(graph.inputs[-1]), abs=1e-4)
    assert into.influence.sum() == pytest.approx(1)
    # An edge's influence is its sender's along it: what a node's edges carry is the node's.
    head = next(node.label for node in graph.nodes if node.kind == "head")
    wanted = float(graph.influence[[node.label for node in graph.nodes].index(head)])
    assert mine[mine.sender == head].influence.sum() == pytest.approx(wanted, rel=1e-4)
    of_page = data_of((tmp_path / f"{stem}.html").read_text())
    assert [g["model"] for g in of_page] == ["tiny-noLN", "tiny"]
    assert [len(g["nodes"]) for g in of_page] == nodes.groupby("model", sort=False).size().tolist()
    assert of_page[0]["discrepancy"] < 1e-4 < of_page[1]["discrepancy"]
    assert json.loads((tmp_path / f"{stem}.tiny.json").read_text())["metadata"]
    summary = next(line for line in printed.splitlines() if line.split()[:1] == ["tiny-noLN"])
    assert "' hat' - ' bed'" in summary and "0.00%" in summary


def test_the_default_prompt_and_target(tmp_path, capsys):
    assert run(tmp_path, "--model", "tiny-noLN", "--nodes", "mlp", "--share", "0.3") == 0
    assert "'It was the best of times, it was the worst of'" in capsys.readouterr().out
    (page,) = tmp_path.glob("graph-tiny-noLN-It-was-the-best-of-times-*.html")
    assert data_of(page.read_text())[0]["prompt"].startswith("It was the best")


def test_models_of_one_name_have_files_of_their_own():
    names = ["final", "EleutherAI/pythia-70m", "final", "final-2", "a b"]
    assert _stems(names) == ["final", "EleutherAI-pythia-70m", "final-2", "final-2-2", "a-b"]


def test_edges_on_pairs(tmp_path, capsys):
    flags = ["--edges", "--model", "tiny", "tiny-noLN", "--n-pairs", "3", "--length", "8", "--exact", "4"]
    assert run(tmp_path, *flags, "--method", "gradient", "relp", "--top", "5") == 0
    printed = capsys.readouterr().out
    stem = "edges-tiny+tiny-noLN-induction-gradient+relp-top=5-n_pairs=3-length=8-exact=4"
    assert {path.name for path in tmp_path.iterdir()} == {f"{stem}.csv", f"{stem}.html", "plotly.min.js"}
    assert "clean higher on" in printed and "tiny-noLN: edges with the largest effects on logit_diff, relp" in printed
    table = pd.read_csv(tmp_path / f"{stem}.csv")
    assert table.columns[:2].tolist() == ["model", "method"]
    for key, part in table.groupby(["model", "method"], sort=False):
        assert not part.duplicated(["sender", "receiver"]).any()
        assert part.effect.abs().is_monotonic_decreasing, key
        exact = part.dropna(subset="exact_effect")
        assert len(exact) == 4
        assert (exact.exact_low <= exact.exact_effect).all() and (exact.exact_effect <= exact.exact_high).all()
        if key[1] == "gradient":  # whose strongest edges are checked
            assert exact.index.tolist() == part.index[:4].tolist()
    # Into the logits all is linear without a norm: the gradient is the effect.
    free = table[(table.model == "tiny-noLN") & (table.receiver == "logits")].dropna(subset="exact_effect")
    assert len(free) and (free.effect - free.exact_effect).abs().max() < 1e-4


def test_edges_on_pairs_of_several_lengths(tmp_path, capsys):
    pairs = tmp_path / "pairs.csv"
    rows = ["the girl said that,the man said that, she, he", "then the girl said that,then the man said that, she, he"]
    pairs.write_text("\n".join(["clean,corrupted,right,wrong", *rows]) + "\n")
    assert run(tmp_path / "out", "--edges", "--model", "tiny-noLN", "--pairs", str(pairs)) == 0
    assert "of 2" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "out" / "edges-tiny-noLN-pairs.csv-gradient.csv")
    assert table.low.notna().all() and "exact_effect" not in table


BAD = [
    (["--edges", "--prompt", "It was"], "--prompt is for one prompt, not for --edges"),
    (["--edges", "--versus", " her"], "--versus is for one prompt, not for --edges"),
    (["--edges", "--share", "0.8"], "--share is for one prompt, not for --edges"),
    (["--pairs", "induction"], "--pairs needs --edges"),
    (["--exact", "3"], "--exact needs --edges"),
    (["--n-pairs", "16"], "--n-pairs needs --edges"),
    (["--method", "relp"], "--method needs --edges"),
    (["--embed"], "--embed needs --edges"),
    (["--text", "book.txt"], "unrecognized arguments: --text"),
    (["--edges", "--exact", "0"], "'0' is not a positive whole number"),
    (["--edges", "--pairs", "missing.csv"], "cannot read pairs file missing.csv"),
    (["--edges", "--pairs", "ioo"], "--pairs 'ioo' is none of induction, ioi"),
    (["--edges", "--method", "guess"], "invalid choice: 'guess'"),
    (["--nodes", "heads"], "invalid choice: 'heads'"),
    (["--share", "0"], "--share 0.0 is not a number above 0, 1 at most"),
    (["--share", "nan"], "--share nan is not a number above 0"),
    (["--prompt", ""], "--prompt is empty"),
    (["--prompt", "word " * 300], "the model's context holds 256"),
    (["--target", " Mississippi"], "it must be one"),
    (["--target", " her", "--versus", " her"], "there is no difference"),
    (["--model", "tinny"], "unknown model 'tinny'"),
    (["--top", "0"], "'0' is not a positive whole number"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=lambda x: " ".join(x)[:30] if isinstance(x, list) else "")
def test_bad_input(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    if "--model" not in arguments:
        arguments = ["--model", "tiny-noLN", *arguments]
    try:
        status = main(arguments)
    except SystemExit as stopped:  # argparse's own
        status = stopped.code
    printed = capsys.readouterr()
    assert status == 2 and printed.out == ""
    assert printed.err.count("\n") == 1 and message in printed.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["--edges", "--prompt", "x"], ["--edges", "--pairs", "missing.csv"]])
def test_a_bad_value_imports_nothing_heavy(arguments):
    status, printed, imported = answer(["-m", "lnfree_interp.graph"], *arguments)
    assert status == 2 and printed.count("\n") == 0 and "error: " in printed and not imported & HEAVY
