"""What patching spares, what it says of bad input, how errors between effects are measured, and the command."""

import csv
import math
import subprocess
import sys
from argparse import ArgumentTypeError

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_model
from test_patching import make_pairs

from lnfree_interp.metrics import Metric, logit_diff
from lnfree_interp.models import load_model
from lnfree_interp.pairs import PromptPairs, induction_pairs, ioi_pairs
from lnfree_interp.patching import (
    AtPStar,
    Integrated,
    PatchingEffect,
    RelP,
    SecondOrder,
    activation_patching,
    attribution_patching,
    moved,
    normalized,
    patching_error,
    solved,
    total_effect,
)
from lnfree_interp.patching.__main__ import main, size
from lnfree_interp.patching.command import summary

# ---------------------------------------------------------------------------------------------------------
# Laws of patching


@pytest.mark.parametrize("kind", [None, "LNPre"])
def test_patching_the_changed_position_of_layer_0_is_the_clean_run(random_model, kind):
    model = random_model(kind)
    pairs = make_pairs(model, changed=((2,), (5,), (6,)))
    effect = activation_patching(model, pairs)
    torch.testing.assert_close(effect.values[:, 0].sum(-1), total_effect(effect))
    torch.testing.assert_close(normalized(effect)[:, 0].sum(-1), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(effect.clean, logit_diff(model(pairs.clean), pairs))
    torch.testing.assert_close(effect.corrupted, logit_diff(model(pairs.corrupted), pairs))


def test_only_cells_that_can_matter_are_run(random_model):
    model = random_model("LNPre")
    pairs = make_pairs(model, n=2, pos=7, changed=(4,))
    effect = activation_patching(model, pairs)
    # Layer 0: the changed position alone. Layer 1: the three from it on.
    assert effect.cells_run == 2 * (1 + 3)
    assert (effect.values[:, :, :4] == 0).all() and (effect.values[:, 0, 5:] == 0).all()
    # After the last layer nothing mixes positions: only the one read.
    assert activation_patching(model, pairs, site="resid_post", layers=[1]).cells_run == 2
    early = Metric("early", lambda x: x[:, 0, 0] - x[:, 0, 1], positions=(3,))
    nothing = activation_patching(model, pairs, metric=early)
    assert nothing.cells_run == 0 and (nothing.values == 0).all()


def test_flops_are_saved(random_model):
    model = random_model(None, n_layers=4)
    spent, plain = {}, {}
    for changed in ((0,), (5,)):
        effect = activation_patching(model, make_pairs(model, changed=changed))
        spent[changed], plain[changed] = effect.flops
    assert plain[(0,)] == plain[(5,)] > 5 * spent[(0,)] > 10 * spent[(5,)]


def test_progress_ends_with_all_cells(random_model):
    model = random_model(None)
    calls = []
    effect = activation_patching(
        model, make_pairs(model), max_memory=20_000, progress=lambda done, total: calls.append((done, total))
    )
    assert len(calls) > 2 and calls == sorted(calls)
    assert effect.cells_run > 0 and calls[-1][0] == calls[-1][1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_agree_to_their_rounding(dtype):
    exact = make_model("LNPre")
    pairs = make_pairs(exact)
    wanted = activation_patching(exact, pairs, site="z").values
    got = activation_patching(make_model("LNPre", dtype=dtype), pairs, site="z").values
    assert got.dtype == torch.float32
    tol = 1e-4 if dtype == torch.float32 else 0.25
    assert (got - wanted).abs().max() < tol * wanted.abs().max()


def test_models_that_are_not_read_are_patched_through_their_own_forward():
    model = make_model("LNPre", positional_embedding_type="alibi")
    pairs = make_pairs(model, n=2, pos=5, changed=((1,), (3,)))
    effect = activation_patching(model, pairs, site="resid_mid")
    assert effect.flops is None
    _, clean = model.run_with_cache(pairs.clean)
    for layer in (0, 1):
        for pos in range(5):
            name = f"blocks.{layer}.hook_resid_mid"

            def hook(x, hook, pos=pos, name=name):
                x[:, pos] = clean[name][:, pos]
                return x

            logits = model.run_with_hooks(pairs.corrupted, fwd_hooks=[(name, hook)])
            wanted = logit_diff(logits, pairs) - effect.corrupted
            torch.testing.assert_close(effect.values[:, layer, pos], wanted, atol=1e-9, rtol=1e-9)
    assert attribution_patching(model, pairs, method="second_order").values.abs().max() > 1e-3
    with pytest.raises(ValueError, match="needs a model that read_weights reads"):
        attribution_patching(model, pairs, method="relp")


# ---------------------------------------------------------------------------------------------------------
# Bad input


def wrong_metric(logits):
    return logits[:, -1]


def infinite_metric(logits):
    return logits[:, -1, 0] / 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"site": "resid"}, "unknown site 'resid'; allowed are resid_pre, resid_mid"),
        ({"direction": "up"}, "unknown direction 'up'; allowed are denoising, noising"),
        ({"layers": [2]}, "layer 2 is out of range: the model's layers reach from 0 to 1"),
        ({"layers": [1, -1]}, "name a layer twice"),
        ({"layers": []}, "the layers given name none of 0 to 1"),
        ({"site": "z", "units": [3]}, "head 3 is out of range: a layer's heads reach from 0 to 2"),
        ({"units": [0]}, "neither heads nor neurons"),
        ({"site": "neurons"}, "site 'neurons' needs layers="),
        ({"metric": wrong_metric}, r"metric wrong_metric returned \[3, 61\] for 3 rows, wanted is one number each"),
        ({"metric": infinite_metric}, "metric infinite_metric is -?inf for prompt"),
        ({"metric": Metric("few", lambda x, y: y, context=(torch.zeros(2),))}, "made for 2 prompts, there are 3 pairs"),
        ({"metric": Metric("far", lambda x: x[:, 0, 0], positions=(9,))}, r"metric far reads position \[9\]"),
        ({"max_memory": 0}, "max_memory is 0; max_memory must be a number above 0"),
    ],
)
def test_bad_input(random_model, options, message):
    model = random_model("LNPre")
    for function in (activation_patching, attribution_patching):
        with pytest.raises(ValueError, match=message) as caught:
            function(model, make_pairs(model), **options)
        assert "\n" not in str(caught.value)


def test_tokens_outside_the_vocabulary_and_beyond_the_context(random_model):
    model = random_model(None)
    pairs = make_pairs(model)
    with pytest.raises(ValueError, match="answer 61 is outside the model's vocabulary of 61"):
        activation_patching(model, PromptPairs(pairs.clean, pairs.corrupted, torch.tensor([[61, 0]] * 3)))
    with pytest.raises(ValueError, match="clean token 99 is outside"):
        activation_patching(model, PromptPairs(pairs.clean * 0 + 99, pairs.corrupted, pairs.answers))
    with pytest.raises(ValueError, match="prompts have 33 tokens, the model's context is 32"):
        activation_patching(model, make_pairs(model, pos=33))


def test_prompts_padded_on_the_left_are_refused():
    model = load_model("tiny-noLN", device="cpu")
    model.tokenizer.padding_side = "left"
    pairs = induction_pairs(model, 2, length=8)
    activation_patching(model, pairs)
    clean, corrupted = pairs.clean.clone(), pairs.corrupted.clone()
    clean[:, :2], corrupted[:, :2] = model.tokenizer.pad_token_id, model.tokenizer.pad_token_id
    for function in (activation_patching, attribution_patching):
        with pytest.raises(ValueError, match="prompts begin with pads"):
            function(model, PromptPairs(clean, corrupted, pairs.answers))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"method": "exact"}, "unknown method 'exact'; allowed are gradient, integrated"),
        ({"method": "atp_star"}, "method 'atp_star' is for sites q and k, not 'resid_pre'"),
        ({"method": "integrated", "path": "zigzag"}, "unknown path 'zigzag'"),
        ({"method": "integrated", "steps": 0}, "steps is 0"),
        ({"method": "integrated", "joint": True}, "method 'integrated' has no option 'joint'; it has steps, path"),
        ({"method": "gradient", "steps": 5}, "method 'gradient' has no option 'steps'; it has none"),
        ({"method": Integrated(steps=3), "steps": 5}, r"steps stand beside Integrated\(steps=3, path='input'\)"),
        ({"method": "relp", "half_gate": 1}, "half_gate must be True or False, not 1"),
        ({"method": AtPStar(), "site": "v"}, "method 'atp_star' is for sites q and k, not 'v'"),
    ],
)
def test_bad_methods(random_model, options, message, monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)  # the functions' own checks, not the tests'
    model = random_model(None)
    with pytest.raises(ValueError, match=message) as caught:
        attribution_patching(model, make_pairs(model), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Integrated(steps=0), "steps is 0"),
        (lambda: Integrated(steps=2.0), "steps must be a whole number from 1 up, not float"),
        (lambda: Integrated(path="zigzag"), "unknown path 'zigzag'; allowed are input, layer"),
        (lambda: SecondOrder(joint=1), "joint must be True or False, not 1"),
        (lambda: RelP(detach_norm=None), "detach_norm must be True or False, not None"),
    ],
)
def test_estimates_check_their_options(make, message, monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("method", [Integrated, 3, None, ["gradient"]], ids=str)
def test_what_is_no_method(random_model, method, monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    with pytest.raises(ValueError, match=r"unknown method .*; allowed are gradient, integrated"):
        attribution_patching(random_model(None), make_pairs(random_model(None)), method=method)


# ---------------------------------------------------------------------------------------------------------
# Tables and errors


def effect_of(values, method="activation", clean=None, **fields):
    n, n_layers, n_units = values.shape
    clean = torch.ones(n, dtype=torch.float64) if clean is None else clean
    return PatchingEffect(
        **{
            "values": values,
            "site": "resid_pre",
            "method": method,
            "direction": "denoising",
            "metric": "logit_diff",
            "axes": ("prompt", "layer", "pos"),
            "layers": tuple(range(n_layers)),
            "units": tuple(range(n_units)),
            "clean": clean,
            "corrupted": torch.zeros_like(clean),
        }
        | fields
    )


def random_effects(n=6, n_layers=3, n_units=4):
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(n, n_layers, n_units, generator=generator, dtype=torch.float64)
    exact[:, :, 0] = 0
    noise = torch.randn(n, n_layers, n_units, generator=generator, dtype=torch.float64) * 0.5
    noise[:, :, 0] = 0
    return exact + noise, exact


def test_table_has_every_cell(random_model):
    model = random_model(None)
    effect = activation_patching(model, make_pairs(model), site="neurons", layers=[-1], units=[7, 2], by_position=True)
    table = effect.table()
    assert list(table.columns) == ["prompt", "layer", "neuron", "pos", "effect"] and len(table) == 3 * 2 * 7
    row = table[(table.prompt == 2) & (table.layer == 1) & (table.neuron == 2) & (table.pos == 6)]
    assert math.isclose(row.effect.item(), effect.values[2, 0, 1, 6].item(), rel_tol=1e-6)


def test_error_measures_are_what_they_say():
    x, y = random_effects()
    clean = torch.tensor([1.0, 2, -1, 0.5, 3, 1], dtype=torch.float64)
    error = patching_error(effect_of(x, "gradient", clean), effect_of(y, clean=clean), normalize=True, draws=200)
    x, y = ((v / clean[:, None, None]).numpy() for v in (x, y))
    np.testing.assert_allclose(error.per_layer, np.abs(x - y).sum(2).mean(0))
    assert math.isclose(error.total, np.abs(x - y).sum(2).mean(), rel_tol=1e-9)
    assert math.isclose(error.relative, np.abs(x - y).sum() / np.abs(y).sum(), rel_tol=1e-9)
    assert math.isclose(error.pearson, np.corrcoef(x.ravel(), y.ravel())[0, 1], rel_tol=1e-9)
    ranks = [pd.Series(v.ravel()).rank() for v in (x, y)]
    assert math.isclose(error.spearman, np.corrcoef(*ranks)[0, 1], rel_tol=1e-9)
    where = (x != 0) | (y != 0)
    assert math.isclose(error.sign_agreement, (np.sign(x) == np.sign(y))[where].mean(), rel_tol=1e-9)
    for name in ("total", "relative", "pearson", "spearman", "sign_agreement"):
        low, high = getattr(error, f"{name}_interval")
        assert low < getattr(error, name) < high
    assert (error.n_prompts, error.left_out) == (6, 0)


def test_prompts_in_which_nothing_moves_are_left_out_of_shares_and_counted():
    x, y = random_effects()
    clean = torch.tensor([1.0, 1e-9, -1, 0.49, 0.5, 0], dtype=torch.float64)
    a, b = effect_of(x, "gradient", clean), effect_of(y, clean=clean)
    error = patching_error(a, b)
    used = torch.tensor([0, 2, 4])
    assert moved(b).nonzero().flatten().tolist() == used.tolist()
    alone = patching_error(a[used], b[used])
    assert (error.n_prompts, error.left_out) == (3, 3) and (alone.n_prompts, alone.left_out) == (3, 0)
    assert error.table().drop(columns="left_out").equals(alone.table().drop(columns="left_out"))
    assert set(error.table().left_out) == {3} and set(error.table().prompts) == {3}
    assert patching_error(a, b, normalize=False).n_prompts == 6
    assert patching_error(a, b, least=0.1).n_prompts == 4
    with pytest.raises(ValueError, match=r"moves by 2\.0 or more on none of 6 prompts \(at most 1\)"):
        patching_error(a, b, least=2.0)
    with pytest.raises(ValueError, match=r"least is 0\.0"):
        patching_error(a, b, least=0.0)


def test_some_prompts_of_an_effect():
    x, _ = random_effects()
    effect = effect_of(x, reliability=x.abs())
    some = effect[torch.tensor([4, 1])]
    assert torch.equal(some.values, x[[4, 1]]) and torch.equal(some.reliability, x[[4, 1]].abs())
    assert torch.equal(some.clean, effect.clean[[4, 1]]) and some.layers == effect.layers


def test_error_of_itself_is_zero_and_scale_counts_only_raw():
    x, y = random_effects()
    same = patching_error(effect_of(y), effect_of(y), normalize=False)
    assert (same.total, same.relative, same.sign_agreement) == (0, 0, 1) and math.isclose(same.pearson, 1)
    raw = [patching_error(effect_of(s * x), effect_of(s * y), normalize=False).total for s in (1, 10)]
    assert math.isclose(raw[1], 10 * raw[0])
    scaled = (
        effect_of(10 * x, clean=torch.full((6,), 10.0).double()),
        effect_of(10 * y, clean=torch.full((6,), 10.0).double()),
    )
    assert math.isclose(patching_error(*scaled).total, raw[0])


def test_only_like_is_compared_with_like():
    x, y = random_effects()
    with pytest.raises(ValueError, match="approximate effects have site z, exact ones resid_pre"):
        patching_error(effect_of(x, site="z"), effect_of(y))
    with pytest.raises(ValueError, match=r"approximate effects have shape \[5, 3, 4\]"):
        patching_error(effect_of(x[:5]), effect_of(y))
    with pytest.raises(ValueError, match="prompt 0 has metric 0 clean and corrupted"):
        normalized(effect_of(y, clean=torch.zeros(6, dtype=torch.float64)))


# ---------------------------------------------------------------------------------------------------------
# The command


def test_sizes():
    assert [size(s) for s in ("1000", "2K", "1.5M", "4GB")] == [1000, 2048, 3 * 2**19, 2**32]
    for bad in ("0", "many", "-3", "5T"):
        with pytest.raises(ArgumentTypeError, match="is not a positive size"):
            size(bad)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """An LN and an LN-free checkpoint of 200 tokens, without a tokenizer."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folders = []
    for name, eps in (("original", 1e-5), ("free", 1e12)):
        torch.manual_seed(0)
        config = GPT2Config(
            n_embd=16,
            n_layer=2,
            n_head=2,
            vocab_size=200,
            n_positions=32,
            layer_norm_epsilon=eps,
            bos_token_id=0,
            eos_token_id=0,
        )
        model = GPT2LMHeadModel(config)
        for n, p in model.named_parameters():
            p.data += torch.randn_like(p) * 0.1
            if eps > 1 and "ln_" in n:
                p.data.fill_(1e6 if n.endswith("weight") else 0.0)
        folders.append(tmp_path_factory.mktemp(name) / name)
        model.save_pretrained(folders[-1])
    return folders


def test_command(checkpoints, tmp_path, capsys):
    arguments = ["--model", *map(str, checkpoints), "--pairs", "induction", "--n-pairs", "4", "--length", "8"]
    methods = ["--method", "gradient", "second_order", "integrated", "--least", "1e-6"]
    assert main([*arguments, *methods, "--out", str(tmp_path), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "second_order" in out and "free" in out and "pearson" in out
    stem = "patching-original+free-induction-resid_pre-gradient+second_order+integrated-n_pairs=4-length=8-least=1e-06"
    rows = list(csv.DictReader((tmp_path / f"{stem}.csv").open()))
    assert {(r["model"], r["method"]) for r in rows} == {
        (m, method) for m in ("original", "free") for method in ("gradient", "second_order", "integrated")
    }
    effects = list(csv.DictReader((tmp_path / f"{stem}.effects.csv").open()))
    assert len(effects) == 2 * 4 * 4 * 2 * 8  # models, methods with the exact one, prompts, layers, positions
    html = (tmp_path / f"{stem}.html").read_text()
    assert "free: activation" in html and "original: integrated" in html


@pytest.mark.parametrize(("kind", "does"), [("induction", True), ("ioi", False)])
def test_command_counts_what_it_uses_and_says_whether_the_model_does_the_task(kind, does, tmp_path, capsys):
    model = load_model("tiny-noLN", device="cpu")
    pairs = induction_pairs(model, 24) if kind == "induction" else ioi_pairs(model, 24)
    exact = activation_patching(model, pairs)
    least = round(float((exact.clean - exact.corrupted).abs().median()), 2)  # some are left out, whatever the model
    arguments = ["--model", "tiny-noLN", "--pairs", kind, "--n-pairs", "24", "--device", "cpu", "--out", str(tmp_path)]
    assert main([*arguments, "--least", str(least)]) == 0
    out = capsys.readouterr().out
    used, right = int(moved(exact, least).sum()), int(solved(exact, least).sum())
    assert 0 < used < 24
    assert f"logit_diff moves by {least:g} or more on {used} of 24 pairs, {right} of them the right way" in out
    assert ("does not do this task" in out) == (not does)
    table = pd.read_csv(tmp_path / f"patching-tiny-noLN-{kind}-resid_pre-gradient-n_pairs=24-least={least}.csv")
    error = patching_error(attribution_patching(model, pairs), exact, least=least)
    assert set(table.prompts) == {used} and set(table.left_out) == {24 - used}
    assert table.set_index("measure").value["total"] == pytest.approx(error.total, rel=1e-5)


@pytest.mark.parametrize(
    "more, message",
    [
        (["--method", "atp_star"], "--method atp_star is for sites q and k, not resid_pre"),
        (["--site", "nowhere"], "invalid choice: 'nowhere'"),
        (["--pairs", "pairs.txt"], "--pairs 'pairs.txt' is none of induction, ioi"),
        (["--pairs", "absent.csv"], "cannot read pairs file absent.csv"),
        (["--pairs", "ioi"], "no tokenizer"),
        (["--length", "99"], "length is 99"),
        (["--least", "0"], "--least 0.0 is not a number above 0"),
        (
            ["--least", "99"],
            "nothing to normalise by, --raw compares effects as they are. free: logit_diff moves by 99",
        ),
        (["--max-memory", "lots"], "--max-memory: 'lots' is not a positive size"),
        (["--site", "neurons"], "site 'neurons' needs layers="),
    ],
)
def test_command_says_what_is_wrong_and_writes_nothing(checkpoints, tmp_path, capsys, more, message):
    out = tmp_path / "out"
    try:
        status = main(["--model", str(checkpoints[1]), "--out", str(out), "--device", "cpu", *more])
    except SystemExit as stop:
        status = stop.code
    error = capsys.readouterr().err.strip()
    assert status == 2 and message in error and "\n" not in error
    assert not out.exists()


@pytest.mark.slow
def test_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "lnfree_interp.patching", "--help"], capture_output=True, text=True, check=True
    )
    assert "--pairs" in done.stdout and "atp_star" in done.stdout


def test_summary_keeps_the_order_of_models():
    x, y = random_effects()
    parts = [
        patching_error(effect_of(x, m), effect_of(y)).table().assign(model=name, tokens=16, pairs=6)
        for name in ("tiny", "free", "also")
        for m in ("relp", "gradient")
    ]
    table = summary(pd.concat(parts))
    assert list(table.model) == ["tiny", "tiny", "free", "free", "also", "also"]
    assert list(table.method) == ["relp", "gradient"] * 3
