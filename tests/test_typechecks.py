"""That types and shapes are checked while tests run: a rule that lets all pass would be seen by no other test."""

import sys

import pytest
import torch
import typechecks
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import TypeCheckError

from lnfree_interp import lens

SOURCE = """
from __future__ import annotations
from dataclasses import dataclass
from functools import cache
from collections.abc import Iterator
from typing import TYPE_CHECKING
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from nowhere import Unknown

def product(a: Float[Tensor, "m n"], b: Float[Tensor, "n"], what: Unknown = 3) -> Float[Tensor, "m"]:
    return a @ b if what == 3 else b

def halves(a: Float[Tensor, "m n"]) -> Iterator[Float[Tensor, "m"]]:
    for part in a.chunk(2, 1):
        yield product(part, part[0])

@cache
def longer(text: str, by: int = 1) -> str:
    return text * by if by < 5 else 7

@dataclass(frozen=True)
class Pair:
    left: Float[Tensor, "n"]
    right: Float[Tensor, "n"]

    @property
    def both(self) -> Float[Tensor, "n"]:
        return self.left + self.right if len(self.left) < 3 else self.left[1:, None]

    @classmethod
    def of(cls, one: Float[Tensor, "n"]) -> Pair:
        return cls(one, one)

    def with_one(self, more: Float[Tensor, "n"]) -> int:
        return len(more)
"""


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    folder = tmp_path_factory.mktemp("package")
    (folder / "package_with_shapes.py").write_text(SOURCE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setattr(sys, "meta_path", list(sys.meta_path))
        typechecks.install("package_with_shapes")
        import package_with_shapes
    return package_with_shapes


def test_what_fits_passes(module):
    ones = torch.ones
    assert module.product(ones(2, 3), ones(3)).tolist() == [3, 3]
    assert module.product(ones(2, 2), ones(2), what=4).tolist() == [1, 1]
    assert [x.tolist() for x in module.halves(ones(2, 4))] == [[2, 2], [2, 2]]
    assert module.longer("a", 2) == module.longer("a", by=2) == "aa"
    assert module.Pair.of(ones(2)).both.tolist() == [2, 2] and module.Pair.of(ones(2)).with_one(ones(5)) == 5


WRONG = {
    "a size that differs from another parameter's": lambda m, ones: m.product(ones(2, 3), ones(2)),
    "a result of another size": lambda m, ones: m.product(ones(2, 3), ones(3), what=4),
    "other numbers": lambda m, ones: m.product(ones(2, 3).int(), ones(3)),
    "another number of axes": lambda m, ones: m.halves(ones(2)),
    "another type": lambda m, ones: m.longer("a", by="b"),
    "a result of another type": lambda m, ones: m.longer("a", 5),
    "fields that do not fit": lambda m, ones: m.Pair(ones(2), ones(3)),
    "a property": lambda m, ones: m.Pair.of(ones(3)).both,
    "a class' method": lambda m, ones: m.Pair.of(3),
    "a method": lambda m, ones: m.Pair.of(ones(2)).with_one(ones(2, 2)),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused(module, case):
    with pytest.raises((BeartypeCallHintViolation, TypeCheckError)):
        WRONG[case](module, torch.ones)


def test_checks_are_put_off_as_jaxtypings_are(module, monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    assert module.longer("a", 5) == module.longer("a", by=5.5) == 7 and module.Pair.of(3).left == 3
    assert module.product(torch.ones(2, 3), torch.ones(3), what=4).shape == (3,)


def test_the_package_is_checked():
    with pytest.raises(BeartypeCallHintViolation):
        lens.build("fields")
    with pytest.raises(BeartypeCallHintViolation):
        lens.parameters(torch.nn.Linear(2, 2))
