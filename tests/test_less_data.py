"""What may help a removal: each treatment does what it says; recipes' names; the analysis that compares them."""

import copy
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from minute import MINUTE, byte_tokenizer, minute_gpt2, train
from removable_models import EOT, KINDS, exact, make_plain, make_tokens, measured

sys.path.insert(0, str(Path(__file__).parents[1] / "analyses"))

import common
import less_data
import runs
import train_run
import treatments
from treatments import Anew, FittedToLoss, FittedToOutputs, Interpolated, Ordered

from lnfree_interp.finetune.export import export_ln_free
from lnfree_interp.finetune.modules import ORDINARY
from lnfree_interp.finetune.removable import collect_std, final_norm, freeze, make_removable, removal_sites
from lnfree_interp.finetune.removable import update_averages as update
from lnfree_interp.schedule import KINDS as SITES

SOME = [("ln_2", 0), ("qk", 1), ("ln_f", None)]


def step(treatment, model, tokens, number=0, *, momentum=0.9):
    """What a step of a run does, but for the optimiser's: the treatment, a forward, the averages; the logits."""
    treatment.on_step_begin(None, SimpleNamespace(global_step=number), None, model=model)
    with exact():
        logits = model.train()(input_ids=tokens).logits
    collect_std(model)
    update(model, momentum)
    return logits


def begun(treatment, model):
    treatment.on_train_begin(None, None, None, model=model)
    return treatment


def averages(model):
    return {name: site.average.clone() for name, site in removal_sites(model).items()}


def test_averages_are_estimated_anew_after_every_freeze():
    """The next ones are the next step's alone; the frozen sites' stay; without a freeze nothing is forgotten."""
    model = measured(make_plain(), make_tokens(), eot=EOT)
    treatment, before = begun(Anew(), model), averages(model)
    step(treatment, model, make_tokens(seed=2))
    moved = averages(model)
    assert all(not torch.equal(moved[name], before[name]) for name in moved)
    frozen = {}
    for number, name in enumerate(SOME, 1):
        frozen[name] = averages(model)[name]
        freeze(model, frozen, position0=True)
        alone = copy.deepcopy(model)
        step(treatment, model, make_tokens(seed=3 + number), number)
        step(begun(treatments.Treatment(), alone), alone, make_tokens(seed=3 + number), momentum=0.0)
        for site, average in averages(model).items():
            torch.testing.assert_close(average, frozen.get(site, averages(alone)[site]), equal_nan=True)


def test_constants_fitted_to_the_loss_are_the_best_of_those_tried():
    model, tokens = measured(make_plain(), make_tokens(), eot=EOT), make_tokens(seed=5)
    treatment = begun(FittedToLoss(), model)
    step(treatment, model, tokens)
    before = averages(model)
    freeze(model, SOME[:1])
    with exact():
        treatment.on_step_begin(None, SimpleNamespace(global_step=1), None, model=model)
    assert model.training
    site = removal_sites(model)[SOME[0]]
    chosen = (site.average / before[SOME[0]])[:2]
    assert torch.allclose(chosen, chosen[0]) and min(abs(chosen[0] - f) for f in treatment.factors) < 1e-12

    def loss(factor):
        site.average.copy_(before[SOME[0]] * factor)
        with torch.no_grad(), exact():
            return model.eval()(input_ids=tokens, labels=tokens).loss.item()

    losses = [loss(factor) for factor in treatment.factors]
    assert loss(chosen[0].item()) == pytest.approx(min(losses), rel=1e-12) and max(losses) > min(losses) + 1e-6


def test_constants_fitted_to_the_outputs_leave_the_least_distance():
    """By trial: outputs of the final norm itself, of one step's ordinary tokens."""
    model, tokens = make_removable(make_plain(), eot=EOT), make_tokens(8, 12)
    treatment, seen = begun(FittedToOutputs(), model), []
    hook = final_norm(model).register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    step(treatment, model, tokens)
    hook.remove()
    freeze(model, SOME)
    before = averages(model)
    treatment.on_step_begin(None, SimpleNamespace(global_step=1), None, model=model)
    constant = removal_sites(model)["ln_f", None].average[ORDINARY]
    assert constant > 1.0001 * before["ln_f", None][ORDINARY]
    (x, out), norm = seen[0], final_norm(model)

    def distance(c):
        left = (x - x.mean(-1, keepdim=True)) / c * norm.weight.sign() + norm.bias
        wanted = (out - norm.bias) / norm.weight.abs() + norm.bias  # each direction as much as another
        return (left - wanted)[:, 1:].square().sum().item()

    distances = {f: distance(constant * f) for f in (0.95, 0.99, 1.0, 1.01, 1.05)}
    assert min(distances, key=distances.get) == 1.0
    torch.testing.assert_close(averages(model)["v", 0], before["v", 0], atol=0, rtol=0, equal_nan=True)


def logits_and_gradients(model, logits, tokens):
    model.zero_grad()
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("treated", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_interpolation_goes_from_each_token_s_own_std_to_the_constant(kind, treated):
    """At its beginning (in endless steps) the live model, gradients too; at its end exactly the frozen one."""
    tokens, other = make_tokens(), make_tokens(seed=4)
    live, frozen, endless, short = (measured(make_plain(kind), tokens, eot=EOT) for _ in range(4))
    wanted = logits_and_gradients(live, step(treatments.Treatment(), live, other), other)
    for model in (frozen, endless, short):
        freeze(model, removal_sites(model), position0=treated, eot=treated)
    found = logits_and_gradients(endless, step(begun(Interpolated(1e14), endless), endless, other), other)
    torch.testing.assert_close(found, wanted, atol=1e-9, rtol=1e-7)
    end = step(treatments.Treatment(), frozen, other)
    treatment, steps = begun(Interpolated(3), short), []
    for number in range(5, 10):
        freeze(short, removal_sites(short), position0=treated, eot=treated)  # as a run does at every step's end
        steps.append(step(treatment, short, other, number).detach())
    torch.testing.assert_close(steps[2], end, atol=0, rtol=0)
    torch.testing.assert_close(steps[4], end, atol=0, rtol=0)
    distances = [(logits - end).abs().max() for logits in (wanted[0], *steps[:2])]
    assert distances[0] > distances[1] > distances[2] > 1e-6
    with torch.no_grad(), exact():
        torch.testing.assert_close(short.eval()(other).logits, frozen.eval()(other).logits, atol=0, rtol=0)
    with pytest.raises(ValueError, match="over 0 steps"):
        Interpolated(0)


def test_a_third_of_the_way_is_a_third():
    model, tokens = measured(make_plain(), make_tokens(), eot=EOT), make_tokens(seed=4)
    freeze(model, [("ln_f", None)])
    norm, seen = final_norm(model), []
    norm.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    step(begun(Interpolated(3), model), model, tokens)
    x, out = seen[0]
    std = (x.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
    inverse = 2 / 3 / std + 1 / 3 / removal_sites(model)["ln_f", None].average[ORDINARY]
    torch.testing.assert_close(out, (x - x.mean(-1, keepdim=True)) * inverse * norm.weight + norm.bias)


def test_a_run_with_all_treatments_exports_what_it_trained(tmp_path):
    every = treatments.made((("anew", 0), ("fitted", 0), ("outputs", 0), ("interpolated", 3)))
    model, final = train(byte_tokenizer(), tmp_path / "out", callbacks=every)
    tokens = torch.randint(0, 257, (4, 16))
    with torch.no_grad():
        ours, theirs = (m.double().eval()(tokens).logits for m in (model, final))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_sites_in_an_order_of_their_own():
    sites = (("qk", 1), ("ln_f", None), ("v", 0), ("ln_2", 1), ("qk", 0), ("v", 1), ("ln_2", 0))
    schedule = Ordered(**vars(MINUTE) | {"sites": sites})
    usual = MINUTE.events(2)
    assert [event[1:] for event in schedule.events(2)] == [*sites, *(event[1:] for event in usual[7:])]
    assert [event.step for event in schedule.events(2)] == [event.step for event in usual]
    assert replace(schedule, start=3).sites == sites and schedule.vanilla().events(2) == []


@pytest.mark.parametrize("kind", ["GPT-2", "Llama"])
def test_sensitivity_is_the_rise_of_the_loss_with_one_site_frozen(kind):
    model, tokens = make_plain(kind), make_tokens(6)
    before = copy.deepcopy(model.state_dict())
    with exact():
        rise = treatments.sensitivity(model, tokens, batch_size=4)
    assert len(rise) == 7 and not removal_sites(model)
    torch.testing.assert_close(dict(model.state_dict()), dict(before), atol=0, rtol=0)
    losses = []
    for frozen in ([], [("v", 1)]):
        other = measured(make_plain(kind), tokens)
        freeze(other, frozen, position0=True, eot=True)
        with torch.no_grad(), exact():
            losses.append(other(input_ids=tokens, labels=tokens).loss.item())
    assert rise["v", 1] == pytest.approx(losses[1] - losses[0], abs=1e-6)  # transformers' loss is in fp32
    assert min(abs(value) for value in rise.values()) > 1e-5


# -- recipes


def of(name, schedule=MINUTE, rise=None):
    return less_data.recipe(name, schedule, lambda: rise or {})


def test_names_of_recipes():
    assert of("preset") == less_data.Recipe(MINUTE)
    assert of("distilled").schedule == replace(MINUTE, distillation=1.0)
    made = of("distilled=0.5+anew+fast=0.5+interpolated=4+auxiliary")
    assert made.treatments == (("anew", 0), ("interpolated", 4))
    assert made.schedule == replace(
        MINUTE,
        start=1,
        gaps=dict.fromkeys(SITES, 0.5),
        position0_gap=1.0,
        massive_gap=5.0,
        distillation=0.5,
        auxiliary_weight=0.0,
    )
    assert of("adaptive=0.25").schedule == MINUTE.adaptive(settle=4)
    assert {event.step for event in of("at-once+early=1").schedule.events(2)[:7]} == {1}
    gate = of("gate=0.5")
    assert [event.step for event in gate.schedule.events(2)] == [2] * 7 + [9, 11]
    assert gate.treatments == (("interpolated", 7),)
    rise = {("qk", 0): 0.3, ("v", 0): -0.1, ("ln_2", 0): 0.2, ("ln_f", None): 0.25}
    sites = [event[1:] for event in of("gentlest+fast", rise=rise).schedule.events(1)[:4]]
    assert sites == [("v", 0), ("ln_2", 0), ("ln_f", None), ("qk", 0)]
    assert [event[1:] for event in of("harshest", rise=rise).schedule.events(1)[:4]] == sites[::-1]
    for name in less_data.VARIANTS:
        of(name, replace(MINUTE, steps=100), rise)
    assert set(treatments.TREATMENTS) == {"anew", "fitted", "outputs", "interpolated"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fsat", "there is no 'fsat'"),
        ("anew=2", "there is no 'anew=2'"),
        ("distilled=half", "'half' is not a number"),
        ("distilled=2", "distilled=2: distillation is 2.0, not from 0 to 1"),
        ("fast+", "there is no ''"),
        ("early=0", "start is 0"),
    ],
)
def test_names_that_are_none(name, message):
    with pytest.raises(ValueError, match=message):
        of(name)


def test_a_control_is_of_the_same_steps_and_rate():
    run, control = less_data.run_of("distilled+fast", MINUTE, "m", 1, dict)
    assert control.schedule == MINUTE.vanilla() and control.seed == 1 and run.control is None
    run, control = less_data.run_of("rate=3+adaptive=0.2", MINUTE, "m", 1, dict)
    assert control.schedule == replace(MINUTE.vanilla(), learning_rate=3e-2) and run.control == control
    assert control.variant != runs.CONTROL


# -- the analysis


def table(*lines):
    """(variant, tokens, gap of each of two seeds)"""
    rows = [
        {"variant": v, "steps": 6.0, "tokens": t, "loss": 4.0, "control": 3.9, "gap": (a + b) / 2, "sd": abs(a - b)}
        | {"of_preset": np.nan, "diverged": 0, "seed0": a, "seed1": b}
        for v, t, a, b in lines
    ]
    return pd.DataFrame(rows)


PRESET = ("preset", 100, 0.02, 0.022)


@pytest.mark.parametrize(
    ("lines", "verdict"),
    [
        ([PRESET, ("a", 50, 0.019, 0.022)], "yes"),  # half the tokens, its gap
        ([PRESET, ("a", 50, 0.021, 0.022)], "no"),
        ([PRESET, ("a", 60, 0.019, 0.022)], "no"),
        ([PRESET, ("a", 100, 0.01, 0.0105)], "yes"),  # its tokens, half the gap
        ([PRESET, ("a", 110, 0.01, 0.0105)], "no"),
        ([("preset", 100, -0.001, 0.002), ("a", 50, -0.1, -0.1)], "not tested"),  # nothing to halve
        ([PRESET], "not tested"),
    ],
)
def test_the_claim(lines, verdict):
    (claim,) = less_data.claims(table(*lines))
    assert claim.agrees == verdict


def test_markdown_is_a_table():
    lines = less_data.markdown(table(PRESET, ("a+b=2", 50, float("nan"), 0.01))).split("\n")
    assert len({line.count("|") for line in lines}) == 1 and len(lines) == 4
    assert (
        lines[2].startswith("| `preset` | 6 | 0.00M | 4.0000 | 3.9000 | +0.0210 |") and "+0.0200 | +0.0220" in lines[2]
    )


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A minute model in a directory, with text to train and evaluate on."""
    monkeypatch.setattr(common, "BROWSERS", ())
    monkeypatch.setattr(train_run, "EVALUATED", 512)
    minute_gpt2().save_pretrained(tmp_path / "minute")
    byte_tokenizer().save_pretrained(tmp_path / "minute")
    generator = np.random.default_rng(0)
    for name, n in (("train.txt", 60), ("val.txt", 20)):
        documents = ["".join(generator.choice(list("abcdefgh "), 90)) for _ in range(n)]
        (tmp_path / name).write_text("\n\n".join(documents))
    return tmp_path


def test_the_table_grows(small, capsys):
    words = ["--model", small / "minute", "--text", small / "train.txt", "--val", small / "val.txt", "--device", "cpu"]
    words += ["--steps", 12, "--step-tokens", 256, "--seeds", 2, "--runs", small / "runs", "--out", small / "figures"]

    def variants(*more):
        assert less_data.main([str(word) for word in [*words, *more]]) == 0
        found = pd.read_csv(small / "figures" / "less_data.csv").set_index("variant")
        assert np.allclose(found.gap, found[["seed0", "seed1"]].mean(axis=1), atol=1e-5)
        return found

    first = variants("--only", "distilled=0.5+adaptive", "at-once+interpolated=2")
    assert list(first.index) == ["preset, all its steps", "distilled=0.5+adaptive", "at-once+interpolated=2"]
    assert first.steps.iloc[0] == 12 and first.steps.iloc[2] == 6 and first.tokens.iloc[2] == 1536
    said = capsys.readouterr().out
    assert "| `at-once+interpolated=2` | 6 |" in said and "half the preset's tokens" in said
    results = {path: path.stat().st_mtime_ns for path in small.glob("runs/*/result.json")}
    assert len(results) == 2 * (2 + 1 + 2)
    second = variants("--only", "gentlest")
    assert set(second.index) == {*first.index, "gentlest"}
    assert results.items() <= {path: path.stat().st_mtime_ns for path in small.glob("runs/*/result.json")}.items()
    pd.testing.assert_frame_equal(second.loc[first.index], first)
    for wrong, message in ((["--only", "none"], "there is no 'none'"), (["--part", "0"], "--part 0 is not above 0")):
        assert less_data.main([str(word) for word in [*words, *wrong]]) == 2
        assert message in capsys.readouterr().err


def test_a_treated_run_that_was_interrupted_begins_again(small):
    """As a callback does not know what it knew."""
    model, text = str(small / "minute"), ["abc def gh " * 40] * 8
    schedule = replace(MINUTE, steps=14)
    run = runs.Run(model, "v", schedule, 0, (("interpolated", 2.0),))
    losses = []
    for name in ("one", "other"):
        (small / name / "checkpoint-3").mkdir(parents=True)
        (small / name / "checkpoint-3" / "trainer_state.json").write_text("{}")
        train_run.train((run, small / name, text, text, ("cpu", "float32"), None))
        losses.append(runs.read(run, small / name))
    assert losses[0].ce == losses[1].ce and len(losses[0].ce) == 14
    assert losses[0].events == tuple(tuple(event) for event in schedule.events(2))


def test_an_exported_gate_is_the_model(small):
    made = of("gate=0.3")
    model, final = train(byte_tokenizer(), small / "out", made.schedule, callbacks=treatments.made(made.treatments))
    assert all(site.frozen for site in removal_sites(model).values())
    again = export_ln_free(model, copy.deepcopy(final.config))
    torch.testing.assert_close(dict(again.state_dict()), dict(final.state_dict()))
