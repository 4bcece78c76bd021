"""What probes' results say and show, and the command."""

import copy
import json
import pickle
import re

import pandas as pd
import pytest
from test_probe import DATA, KEYS, probe_of
from test_results import Balanced

from lnfree_interp import Codebook, concept_evidence, evaluate_probe, load_model, recall_data, swap_concepts
from lnfree_interp.probe import Training
from lnfree_interp.probe.__main__ import main
from lnfree_interp.probe.command import _edits as told_edits
from lnfree_interp.results import MOST_HTML, Result


@pytest.fixture(scope="module")
def results(random_model):
    model = random_model("LN")
    probe = probe_of(model)
    prompt = DATA.prompts[0].prompt
    return {
        "evaluation": evaluate_probe(model, probe, DATA),
        "reading": probe.read(model, prompt, keys=KEYS),
        "linear": concept_evidence(model, probe, prompt),
        "encoder": concept_evidence(model, probe, prompt, readout="encoder", key=KEYS[0], by="neuron"),
        "swap": swap_concepts(model, probe, DATA, n=6),
    }


def test_each_says_what_it_is_and_draws_itself(results):
    for result in results.values():
        assert isinstance(result, Result) and len(repr(result)) < 200 and "\n" not in repr(result)
        page = result._repr_html_()
        assert len(page.encode()) < MOST_HTML and not {"script", "link", "iframe"} & Balanced(page).tags
        table, figure = result.table(), result.plot()
        assert len(table) and not table.isna().all().any() and "nan" not in result.summary()
        assert len(figure.data) and figure.layout.width is None and figure.layout.title.text
        for other in (copy.deepcopy(result), pickle.loads(pickle.dumps(result))):
            assert repr(other) == repr(result) and other._repr_html_() == page


def test_tables_hold_the_values(results):
    evaluation, swap, linear = results["evaluation"], results["swap"], results["linear"]
    row = evaluation.table().query("yardstick == 'linear probe' and group == 'all'").iloc[0]
    j = evaluation.splits.index(row.split)
    assert (
        row.at_1 == evaluation.at_1[evaluation.yardsticks.index("linear probe"), j, 0] and row.n == evaluation.n[j, 0]
    )
    table = swap.table().set_index(["point", "edit", "who"])
    assert table.loc[("final", "remove", "probe")].to_other == swap.to_other[-1, 1, 1].mean()
    assert (table.low <= table.to_other + 1e-9).all() and (table.to_other <= table.high + 1e-9).all()
    parts = linear.table().attribution.sum()
    assert parts + linear.bias == pytest.approx(linear.total, abs=1e-9)
    reading = results["reading"].table()
    own = reading[reading.key == reading.concept]
    assert len(own) == 0 and reading.similarity.abs().max() <= 1 + 1e-9


def test_figures_hold_the_values(results):
    figure = results["evaluation"].plot()
    assert [len(trace.y) for trace in figure.data] == [9] * len(results["evaluation"].splits)
    assert figure.data[0].x[0] == results["evaluation"].at_1[0, 0, 0].item()
    bars = {trace.name: list(trace.x) for trace in results["linear"].plot(top=3).data}
    assert bars["attribution"] == results["linear"].table().attribution.head(3).tolist()
    assert bars["exact effect"] == results["linear"].table().effect.head(3).tolist()
    heat = results["reading"].plot(key=0, top=4).data[0]
    assert len(heat.x) == 4 and max(max(row) for row in heat.z) <= 1


def test_the_edits_that_are_told_of_are_where_the_model_moves_most(results):
    swap, table = results["swap"], told_edits({"a": results["swap"], "b": results["swap"]})
    point = int(swap.to_other[:, 0, 0].mean(-1).argmax())
    assert table.model.tolist() == ["a"] * 3 + ["b"] * 3 and table.edited.tolist() == [swap.points[point]] * 6
    rate, together = swap.to_other[point, 2, 1].mean().item(), swap.together[point, 2, 1].mean().item()
    assert table.edit[2] == "random" and table["probe's"][2].startswith(f"{rate:.1%} [")
    assert table["probe with the model"][2] == f"{together:.1%}"


@pytest.mark.parametrize("arguments", [{"key": 9}, {"top": 0}])
def test_plots_of_what_is_not_there_are_refused(results, arguments):
    with pytest.raises(ValueError) as raised:
        results["reading"].plot(**arguments)
    assert "\n" not in str(raised.value)


def test_a_codebook_and_a_probe_are_short_in_print(random_model):
    assert len(repr(probe_of(random_model("LN")))) < 200
    assert len(repr(Codebook(("a", "b")))) < 200


# ---------------------------------------------------------------------------------------------------------
# The command


@pytest.mark.slow
def test_the_command_writes_a_report(tmp_path, capsys):
    flags = ["--n", "160", "--dim", "64", "--hidden", "16", "--epochs", "2", "--evidence", "2", "--edits", "4"]
    models = ["--model", "tiny", "tiny-noLN", "--device", "cpu", "--out", str(tmp_path), "--save-probes"]
    assert main([*models, *flags]) == 0
    printed = capsys.readouterr().out
    stem = next(file.stem for file in tmp_path.glob("*.html"))
    assert stem.startswith("probe-tiny+tiny-noLN-recall-mean")
    names = {file.name.removeprefix(stem) for file in tmp_path.iterdir()} - {"plotly.min.js"}
    assert names == {".html", ".csv", ".edits.csv", ".evidence.csv", ".reading.csv"} | {
        f".{name}.safetensors" for name in ("tiny", "tiny-noLN")
    }
    assert re.search(r"tiny-noLN +0\.00%", printed) and "probe" in printed
    evidence = pd.read_csv(tmp_path / f"{stem}.evidence.csv")
    assert evidence[evidence.model == "tiny-noLN"].error.max() < 1e-4 < evidence[evidence.model == "tiny"].error.max()


@pytest.mark.slow
def test_a_file_of_prompts_is_read(tmp_path, capsys):
    recall_data(load_model("tiny-noLN"), 120, values=8).save(tmp_path / "prompts.jsonl")
    flags = ["--dim", "32", "--hidden", "8", "--epochs", "1", "--evidence", "1", "--edits", "2", "--all-prompts"]
    task = [
        "--model",
        "tiny-noLN",
        "--task",
        str(tmp_path / "prompts.jsonl"),
        "--readout",
        "encoder",
        "--device",
        "cpu",
    ]
    assert main([*task, *flags, "--out", str(tmp_path / "out")]) == 0
    assert "encoder readout" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "colours"], "is none of recall, analogies, or a .jsonl file"),
        (["--task", "missing.jsonl"], "cannot read probe data missing.jsonl"),
        (["--seed", "-1"], "--seed -1"),
        (["--model", "tinny"], "unknown model 'tinny'"),
        (["--model", "tiny-noLN", "--pooling", "kmeans", "--clusters", "9"], "9 clusters of 5 layers"),
        (["--model", "tiny-noLN", "--layers", "12"], "layer 12 is out of range"),
    ],
)
def test_what_is_wrong_is_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*arguments, "--n", "24", "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not list(tmp_path.iterdir())


FILES = {
    "does not tell them apart": [("k", "running", " xq1"), ("k", "runner", " xq2")],
    "two answers at least, not 'dog' alone": [("k", "dog", " dog")] * 3,
    "holds no prompts": [],
    "outside the model's vocabulary of 4096": [("k", "dog", 10**6), ("k", "house", " house")],
    "begin with different tokens": [("k", "dog", " dog"), ("k", "dog", " house"), ("k", "house", " man")],
    "1 to train on, with 1 answers": [("k", "dog", " dog"), ("k", "house", " house")],
}


@pytest.mark.parametrize("message", FILES)
def test_files_that_are_wrong_are_one_line(message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": "the old man", "pairs": [pair], "answer": answer} for *pair, answer in FILES[message]]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["--model", "tiny-noLN", "--task", "x.jsonl", "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and [file.name for file in tmp_path.iterdir()] == ["x.jsonl"]


def test_training_says_what_is_wrong():
    with pytest.raises(ValueError, match="hidden"):
        Training(hidden=0)
