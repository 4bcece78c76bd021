"""The analysis of screening: what it measures and writes."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "analyses"))

import browser
import common
import screening
import screening_page
import smollm2

from lnfree_interp.figures.report import PLOTLY


def test_recall_and_error_of_effects():
    exact = torch.tensor([[[4.0, -3, 2, 1, 0, 0]], [[4.0, -3, 2, 1, 0, 0]]], dtype=torch.float64)
    found = exact.clone()
    found[:, 0, 1] = 0.5  # no longer among the two largest
    assert screening.recall(exact, exact, 2, 0) == {"recall": 1.0, "recall_low": 1.0, "recall_high": 1.0}
    assert screening.recall(found, exact, 2, 0)["recall"] == 0.5
    assert screening.recall(found, exact, 3, 0)["recall"] == pytest.approx(2 / 3)
    assert screening.recall(found, exact, 10, 0)["recall"] == 1.0  # of the four that do anything
    weight = torch.tensor([1.0, 0.0], dtype=torch.float64).view(2, 1, 1)
    assert screening.error(found, exact, weight, 0)["error"] == pytest.approx(3.5 / 10)


def test_what_it_takes():
    line = pd.DataFrame({"forwards": [1.0, 2, 3, 4], "recall": [1.0, 0.5, 1, 1]})
    assert screening_page.needed(line, line.recall == 1) == 3
    assert np.isnan(screening_page.needed(line, line.recall == 2))


@pytest.mark.slow
def test_the_page_of_a_small_run(tmp_path, monkeypatch):
    monkeypatch.setattr(browser, "BROWSERS", ())
    monkeypatch.setattr(screening, "SEEDS", 4)
    monkeypatch.setattr(smollm2, "fetched", lambda: pytest.fail("fetched though it was not asked for"))
    out = tmp_path / "out"
    flags = ["--no-real", "--pairs", "3", "--edges", "60", "--model", "tiny-noLN", "--device", "cpu", "--out", str(out)]
    assert screening.main(flags) == 0
    table = pd.read_csv(out / "curves.csv")
    assert set(table.site) == set(screening.SITES)
    assert set(table.method[table.site == "q"]) == set(screening.METHODS)
    assert (table.cells[table.site == "edges"] == 60).all()
    for _, line in table.groupby(["site", "method"]):
        assert list(line.share) == list(screening.SHARES) and line.forwards.is_monotonic_increasing
        assert line.recall.iloc[-1] == 1 and line.error.iloc[-1] < 1e-4
        assert line.forwards.iloc[0] == pytest.approx(line.cost.iloc[0])
    assert (table.error_low <= table.error + 1e-12).all() and (table.error <= table.error_high + 1e-12).all()
    page = (out / "screening.md").read_text()
    assert "## tiny-noLN, 3 induction pairs" in page and str(tmp_path) not in page and "nan" not in page
    assert {f.name for f in out.iterdir()} == {"curves.csv", "recall.html", "error.html", "screening.md", PLOTLY}


def test_bad_input_is_one_line(tmp_path, capsys):
    assert screening.main(["--real-layers", "1", "--out", str(tmp_path / "out")]) == 2
    assert "--real-layers is 1, at least 2 are needed" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_committed_page_is_whole_and_small():
    page = screening.PAGE.read_text()
    files = {common.FIGURES.parent / part.split(")")[0] for part in page.split("](../")[1:]}
    assert len(files) == 3 and all(file.is_file() for file in files)
    assert sum(file.stat().st_size for file in files) < 1_500_000
    assert page.count("\n## ") == 4 and "nan" not in page
