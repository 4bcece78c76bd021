"""The package's public names, and what importing them costs."""

import inspect
import subprocess
import sys

import pytest

import lnfree_interp


@pytest.mark.parametrize("name", lnfree_interp.__all__)
def test_public_names_load_and_are_documented(name):
    assert getattr(lnfree_interp, name).__doc__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'laod_model'"):
        lnfree_interp.laod_model  # noqa: B018


@pytest.mark.slow
@pytest.mark.parametrize(
    ("statement", "unwanted"),
    [
        ("import lnfree_interp", ("torch", "transformers", "transformer_lens", "plotly")),
        ("import lnfree_interp.finetune", ("transformer_lens", "plotly")),
        ("from lnfree_interp import direct_logit_attribution, load_model", ("plotly",)),
        ("from lnfree_interp import activation_patching, ablate_neurons, evaluate_loss, residual_norms", ("plotly",)),
    ],
)
def test_nothing_heavy_is_imported_before_it_is_needed(statement, unwanted):
    code = f"import sys; {statement}; print([m for m in {unwanted} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert out.stdout.strip() == "[]", out.stdout + out.stderr


def test_every_public_function_has_a_runnable_example():
    from lnfree_interp.figures import dla, evaluate, neurons, norms, patching

    functions = [getattr(lnfree_interp, name) for name in lnfree_interp.__all__]
    for module in (dla, evaluate, neurons, norms, patching):
        own = [x for name, x in vars(module).items() if not name.startswith("_")]
        functions += [x for x in own if getattr(x, "__module__", None) == module.__name__]
    functions = [f for f in functions if inspect.isfunction(f)]
    assert len(functions) > 30
    assert [f.__qualname__ for f in functions if ">>> " not in (f.__doc__ or "")] == []
