"""Every argument of what works on pairs, graphs and several models, given what it is not: a line that says what is
wanted."""

import inspect
import re

import jaxtyping
import pytest
from conftest import make_model, random_tokens
from test_patching import make_pairs

import lnfree_interp
from lnfree_interp import activation_patching, evaluate_loss


class Thing:
    """What no argument is."""

    def __repr__(self):
        return "Thing()"


THING = Thing()
WRONG = (THING, [THING], {"a": THING})
MODEL = make_model("LNPre")
TOKENS = random_tokens(MODEL, batch=2, pos=6)
PAIRS = make_pairs(MODEL, n=2, pos=5, changed=((1,), (2,)))
EFFECT = activation_patching(MODEL, PAIRS)
_OF_PAIRS = {"model": MODEL, "pairs": PAIRS}
# Function -> arguments that are right.
RIGHT = {
    "activation_patching": _OF_PAIRS,
    "attribution_graph": {"model": MODEL, "prompt": TOKENS[:1], "bos": False},
    "attribution_patching": _OF_PAIRS,
    "compare": {"models": {"m": MODEL}, "measure": lambda model: evaluate_loss(model, TOKENS)},
    "edge_attribution": _OF_PAIRS,
    "edge_patching": _OF_PAIRS | {"edges": [("embed", "logits")]},
    "explain": {"model": MODEL, "prompt": TOKENS[:1]},
    "induction_pairs": {"model": MODEL, "n": 2, "length": 8},
    "patching_error": {"approximate": EFFECT, "exact": EFFECT, "normalize": False, "draws": 2},
    "screen": _OF_PAIRS | {"budget": 1.0, "normalize": False},
    "screen_edges": _OF_PAIRS | {"budget": 2.0, "normalize": False},
}
# Called as the work goes on, and not looked at before.
FREE = {"progress"}
# What Python and torch say of their own operations, which does not tell what an argument should be.
RAW = re.compile(
    r"unhashable|object is not|has no len|not supported between|unsupported operand|must be real number|positional arg"
    r"|can't convert|Could not infer|object cannot be|argument of type|indices must be|unexpected keyword|not callable"
)


def cases():
    for name in RIGHT:
        for parameter in inspect.signature(inspect.unwrap(getattr(lnfree_interp, name))).parameters.values():
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) and parameter.name not in FREE:
                yield name, parameter.name


@pytest.fixture(scope="module", autouse=True)
def as_users_have_it():
    """Without the checks of shapes that only tests have."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.mark.parametrize("function, argument", list(cases()), ids="-".join)
def test_what_an_argument_is_not(function, argument):
    for wrong in WRONG:
        with pytest.raises((ValueError, TypeError)) as caught:
            getattr(lnfree_interp, function)(**RIGHT[function] | {argument: wrong})
        text = str(caught.value)
        assert text and "\n" not in text and not RAW.search(text), (wrong, text)


@pytest.mark.parametrize("function", RIGHT)
def test_what_is_right_is_served(function):
    assert getattr(lnfree_interp, function)(**RIGHT[function]) is not None
