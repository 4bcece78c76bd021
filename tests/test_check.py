"""The check of a model: its laws hold on every kind of model, and a law that is broken is found."""

from dataclasses import replace

import pytest
import torch
from conftest import KINDS, make_model
from pytest import param
from test_forward import OTHER_BLOCKS
from test_models import random_checkpoint

from lnfree_interp import check_model, forward, read_weights, why_not_read
from lnfree_interp.check import __main__ as command
from lnfree_interp.check import laws
from lnfree_interp.neurons import ablate
from lnfree_interp.patching import activation, attribution

slow = pytest.mark.slow


def unmeasured(check):
    return {law.name: law.note for law in check.laws if law.error is None}


@pytest.mark.parametrize("kind", ["GPT-2", *(param(kind, marks=slow) for kind in KINDS if kind != "GPT-2")])
@pytest.mark.parametrize("normalised", [True, param(False, marks=slow)])
def test_the_laws_hold(model_of, kind, normalised):
    model = model_of(kind, normalised)
    check = check_model(model)
    assert check.holds and not check.failed
    assert all(law.error < 1e-11 for law in check.laws if law.error is not None)
    assert all(law.size > 1e-6 for law in check.laws if law.error is not None)  # nothing was compared with nothing
    notes = unmeasured(check)
    assert len(notes) == {"Gemma": 8 if normalised else 11}.get(kind, 0), notes
    assert len(check.laws) - len(notes) >= 20
    assert all(way.why == "" for way in check.ways) or kind == "Gemma"
    assert check.table().verdict.isin(["holds", "not measured"]).all()


@slow
@pytest.mark.parametrize("fields", OTHER_BLOCKS, ids=lambda fields: str(next(iter(fields.values()))))
def test_of_other_blocks_it_says_why_they_are_slow(fields):
    model = make_model(None if "shortformer" in fields.values() else "LNPre", **fields)
    why, check = why_not_read(model), check_model(model)
    assert check.holds
    assert why and any(repr(value) in why for value in fields.values())
    assert [way.why for way in check.ways][:-1] == [why] * 5
    assert [way.how for way in check.ways if "atp_star" in way.what] == ["refused"]


def test_a_models_own_hooks_are_part_of_it():
    model = make_model("LNPre")
    model.add_hook("blocks.0.hook_mlp_out", lambda x, hook: x * 1.5, is_permanent=True)
    check = check_model(model, [[5, 3, 9, 2], [1, 7, 7, 3]])
    assert check.holds and check.ways[0].why == why_not_read(model)
    assert "carries a hook at blocks.0.hook_mlp_out" in check.ways[0].why


def test_a_model_in_training_with_dropout_is_not_read():
    model = make_model("LNPre")
    model.blocks[0].mlp.add_module("noise", torch.nn.Dropout(0.5).eval())
    assert why_not_read(model) is None
    model.train()
    why = why_not_read(model)
    assert why.startswith("it is in training mode, with dropout at blocks.0.") and why.endswith("mlp.noise")


def test_a_module_of_a_users_is_named():
    class Mine(torch.nn.Module):
        pass

    model = make_model("LNPre")
    model.blocks[1].mine = Mine()
    assert why_not_read(model) == "its blocks.1.mine is a Mine, no module of TransformerLens' own"
    assert read_weights(model) is None


# ---------------------------------------------------------------------------------------------------------
# A broken law is found


def off(weights):
    """Weights of which one number is wrong."""
    W_O = weights.layers[0].W_O.clone()
    W_O[3, 2] += 1e-3
    return replace(weights, layers=(replace(weights.layers[0], W_O=W_O), *weights.layers[1:]))


@pytest.mark.parametrize(
    ("module", "broken"),
    [
        (forward, "forward = the model's own"),
        param(activation, "patched resid_pre = overwritten by a hook", marks=slow),
        param(attribution, "gradient estimate of attn_out = autograd's", marks=slow),
        param(ablate, "ablated neurons, the last layer's, stream = set by a hook", marks=slow),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_a_wrong_weight_fails_what_reads_it(module, broken, monkeypatch):
    model = make_model("LNPre")
    monkeypatch.setattr(module, "read_weights", lambda model: off(read_weights(model)))
    check = check_model(model)
    assert not check.holds
    assert broken in [law.name for law in check.failed]
    if module is not forward:  # the rest is not blamed
        assert "residual norms = the cache's" not in [law.name for law in check.failed]


@pytest.mark.parametrize(
    ("by", "kind"), [param("component", None, marks=slow), ("head", "LNPre"), param("neuron", None, marks=slow)]
)
def test_a_wrong_attribution_is_found(by, kind, monkeypatch):
    right = laws.logit_attributions

    def wrong(*args, by, **kwargs):
        linear, exact = right(*args, by=by, **kwargs)
        if by == wrong_by:
            linear = replace(linear, values=linear.values * 1.001)
            exact = None if exact is None else replace(exact, values=exact.values * 0.999)
        return linear, exact

    wrong_by = by
    monkeypatch.setattr(laws, "logit_attributions", wrong)
    wanted = [f"attributions by {by} + bias = logit", f"direct effect by {by} = removed by hand"]
    wanted += [f"LN-free: attribution by {by} = direct effect"] * (kind is None)
    model = make_model(kind)
    assert [law.name for law in check_model(model).failed] == wanted


def test_a_model_that_is_not_finite_fails():
    model = make_model("LNPre")
    model.blocks[1].mlp.b_out.data[0] = torch.nan
    check = check_model(model)
    assert not check.holds
    assert check.table().set_index("law").verdict["forward = the model's own"] == "FAILS"


def test_nothing_measured_is_nothing_that_holds():
    model = make_model("LNPre")
    model.register_forward_hook(lambda module, args, out: out * 2)
    notes = unmeasured(check := check_model(model))
    assert not check.failed or "forward = the model's own" not in [law.name for law in check.failed]
    assert "carries a hook at its root" in notes["forward = the model's own"]


# ---------------------------------------------------------------------------------------------------------
# The command


@pytest.mark.parametrize("name", ["tiny", param("tiny-vanilla", marks=slow), param("tiny-noLN", marks=slow)])
def test_the_command_on_embedded_models(name, capsys):
    assert command.main([name, "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "log-probabilities = the Hugging Face model's" in printed and "FAILS" not in printed
    assert f"All {41 if name == 'tiny-noLN' else 38} laws that were measured hold." in printed
    assert "activation patching: of each cell only what it changes" in printed


@slow
def test_the_command_names_what_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(forward, "read_weights", lambda model: off(read_weights(model)))
    random_checkpoint(tmp_path / "small", ln_free=True)
    assert command.main([str(tmp_path / "small"), "--device", "cpu", "--dtype", "float64"]) == 1
    assert "\nFAILS: forward = the model's own: off by " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["tinny"], "unknown model 'tinny'"), (["tiny", "--dtype", "int8"], "unknown dtype"), (["/"], "no config.json")],
)
def test_bad_input(arguments, message, capsys):
    assert command.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and message in printed.err
