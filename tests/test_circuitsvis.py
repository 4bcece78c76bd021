"""Attention patterns as another package draws them: what it is given, and its page."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from lnfree_interp import attention_patterns

TEXT = "It was the best of times"


@pytest.fixture(scope="module")
def patterns():
    return attention_patterns("tiny-noLN", [TEXT, "It was the last of times"], layers=[1, 2])


def test_what_it_is_given(patterns, monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)  # its own checks, not the tests'
    given = {}
    attention = ModuleType("circuitsvis.attention")
    attention.attention_heads = lambda **arguments: given.update(arguments) or SimpleNamespace(local_src="<div></div>")
    monkeypatch.setitem(sys.modules, "circuitsvis", ModuleType("circuitsvis"))
    monkeypatch.setitem(sys.modules, "circuitsvis.attention", attention)
    shown = patterns.circuitsvis(2, prompt=1)
    assert shown._repr_html_() == "<div></div>"
    of_layer = [i for i, label in enumerate(patterns.labels) if label.startswith("L2H")]
    assert torch.equal(given["attention"], patterns.values[of_layer, 1])
    assert given["attention_head_names"] == [patterns.labels[i] for i in of_layer]
    assert given["tokens"] == list(patterns.prompts.strings[1]) and " last" in given["tokens"]
    for arguments, message in (({"layer": 0}, "no head of layer 0"), ({"layer": "1"}, "layer must be a whole number")):
        with pytest.raises(ValueError, match=message):
            patterns.circuitsvis(**arguments)


def test_without_it(patterns, monkeypatch):
    monkeypatch.setitem(sys.modules, "circuitsvis", None)
    monkeypatch.setitem(sys.modules, "circuitsvis.attention", None)
    with pytest.raises(ImportError, match="pip install circuitsvis"):
        patterns.circuitsvis(1)


def test_the_page_has_its_script_in_it(patterns):
    page = patterns.circuitsvis(1)
    assert "AttentionHeads" in page and "L1H0" in page and 'from "https://' not in page
