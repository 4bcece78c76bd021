"""The package's public names, and what importing them costs."""

import inspect
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import pytest
from pytest import param

import lnfree_interp

slow = pytest.mark.slow
PATH = lnfree_interp.__path__


def run_python(code: str) -> str:
    """What the code prints in a Python of its own."""
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    return out.stdout.strip() + out.stderr


@pytest.mark.parametrize("name", lnfree_interp.__all__)
def test_public_names_load_and_are_documented(name):
    assert getattr(lnfree_interp, name).__doc__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="attribute laod_model"):
        lnfree_interp.laod_model  # noqa: B018


PACKAGES = [lnfree_interp, *(import_module(f"lnfree_interp.{m.name}") for m in iter_modules(PATH) if m.ispkg)]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda p: p.__name__)
def test_a_package_exports_what_its_stub_lists(package):
    stub = Path(package.__file__).with_suffix(".pyi")
    listed = re.findall(r"\bas (\w+)", stub.read_text()) if stub.is_file() else []
    assert sorted(listed) == sorted(getattr(package, "__all__", []))
    assert all(getattr(package, name) is not None for name in listed)
    assert set(listed) <= set(dir(package))


def test_a_star_import_gives_the_public_names():
    got: dict = {}
    exec("from lnfree_interp import *", got)
    assert set(lnfree_interp.__all__) <= set(got)


@slow
def test_a_function_is_not_hidden_by_the_module_it_lives_in():
    """Whatever is imported first: in processes of their own, forked from one that has torch."""
    code = "import os, torch\n"
    for first in ("lnfree_interp.evaluate.hellaswag", "lnfree_interp.evaluate", "lnfree_interp"):
        code += f"if not os.fork():\n    import {first}, lnfree_interp\n"
        code += "    from lnfree_interp.evaluate import hellaswag as one\n"
        code += "    two, three = lnfree_interp.hellaswag, lnfree_interp.evaluate.hellaswag\n"
        code += "    print(type(one).__name__, one is two, one is three, flush=True); os._exit(0)\nos.wait()\n"
    assert run_python(code).splitlines() == ["function True True"] * 3


ANALYSES = ("activation_patching", "ablate_neurons", "evaluate_loss", "residual_norms")
HEAVY = ("torch", "transformers", "transformer_lens", "plotly", "pandas", "datasets")


NOTHING = f"import lnfree_interp, {', '.join(p.__name__ for p in PACKAGES)}; dir(lnfree_interp)"
# Statement and what must not be there after it and all before.
LIGHT = [(NOTHING, HEAVY), ("from lnfree_interp import RemovalSchedule, cli, read_documents", HEAVY)]
SOME = [
    ("from lnfree_interp.finetune import remove_layernorm", ("transformer_lens", "plotly")),
    ("from lnfree_interp import direct_logit_attribution, load_model", ("plotly",)),
    (f"from lnfree_interp import {', '.join(ANALYSES)}", ("plotly",)),
]


@pytest.mark.parametrize("statements", [LIGHT, param(SOME, marks=slow)], ids=["light", "some"])
def test_nothing_heavy_is_imported_before_it_is_needed(statements):
    code = "import sys\n"
    for statement, unwanted in statements:
        code += f"{statement}; print([m for m in {unwanted} if m in sys.modules])\n"
    assert run_python(code).splitlines() == ["[]"] * len(statements)


def test_every_public_function_has_a_runnable_example():
    from lnfree_interp.figures import check, dla, edges, evaluate, graph, neurons, norms, patching, views

    functions = [getattr(lnfree_interp, name) for name in lnfree_interp.__all__]
    for module in (check, dla, edges, evaluate, graph, neurons, norms, patching, views):
        own = [x for name, x in vars(module).items() if not name.startswith("_")]
        functions += [x for x in own if getattr(x, "__module__", None) == module.__name__]
    functions = [f for f in functions if inspect.isfunction(f)]
    assert len(functions) > 30
    assert [f.__qualname__ for f in functions if ">>> " not in (f.__doc__ or "")] == []
