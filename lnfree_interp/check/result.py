"""What checking a model returns."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from ..results import Result, drawing

# Dtype -> the largest error, as a share of the largest logit (or norm), with which a law holds.
TOLERANCES = {"float64": 1e-10, "float32": 2e-5, "float16": 2e-2, "bfloat16": 1e-1}


@dataclass(frozen=True)
class Law:
    """An equality, as it was found.

    Attributes:
        name: what must equal what.
        error: the largest difference, as a share of the largest logit (for norms: of the largest norm); None where it
            was not measured.
        size: the largest number compared, as the same share: where it is near the error, little was tried.
        tolerance: up to what error the law holds.
        note: why it was not measured.
    """

    name: str
    error: float | None
    size: float | None
    tolerance: float
    note: str = ""

    @property
    def verdict(self) -> str:
        """ "holds", "FAILS", or "not measured"."""
        if self.error is None:
            return "not measured"
        return "holds" if self.error <= self.tolerance else "FAILS"  # an error that is not a number fails


@dataclass(frozen=True)
class Way:
    """How something is computed for the model, how much that saves, and why it is not computed faster."""

    what: str
    how: str
    saves: str = ""
    why: str = ""


@dataclass(frozen=True, repr=False)
class ModelCheck(Result):
    """Which laws hold for a model, and what is fast.

    Attributes:
        model: what it is: "12 layers, d_model 768, LNPre, float32".
        prompts: what it was tried on.
        laws: in the order of `table`.
        ways: in the order of `ways_table`.
    """

    model: str
    prompts: str
    laws: tuple[Law, ...]
    ways: tuple[Way, ...]

    def summary(self) -> str:
        """One line: how many laws hold, and of what."""
        measured = [law for law in self.laws if law.error is not None]
        verdict = (
            f"all {len(measured)} laws measured hold" if self.holds else f"{len(self.failed)} of {len(measured)} fail"
        )
        return f"of {self.model}; on {self.prompts}: {verdict}"

    def picture(self) -> str:
        """The laws with their errors, and what is fast."""
        from ..figures.measured_pictures import of_check

        return of_check(self)

    def plot(self):
        """A figure of plotly: each law's error, and up to which it holds.

        Raises:
            ImportError: there is no plotly.
        """
        with drawing():
            from ..figures.check import laws_figure

        return laws_figure(self)

    @property
    def failed(self) -> tuple[Law, ...]:
        return tuple(law for law in self.laws if law.verdict == "FAILS")

    @property
    def holds(self) -> bool:
        """Whether some law was measured and none fails."""
        return not self.failed and any(law.error is not None for law in self.laws)

    def table(self):
        """One row per law: law, error, size, tolerance, verdict, note."""
        import pandas as pd

        rows = [(law.name, law.error, law.size, law.tolerance, law.verdict, law.note) for law in self.laws]
        return pd.DataFrame(rows, columns=["law", "error", "size", "tolerance", "verdict", "note"])

    def ways_table(self):
        """One row per way: what, how, saves, why."""
        import pandas as pd

        return pd.DataFrame([asdict(way) for way in self.ways])
