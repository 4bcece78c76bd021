"""The same measurement on several models, as one result."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .arguments import as_text, shown
from .lens import LensModel, ModelOrName
from .models import as_model
from .results import Result, drawing

# Characters of HTML that pictures of several results have together.
MOST_HTML = 150_000


@dataclass(frozen=True, repr=False)
class Comparison(Result):
    """One measurement on several models: `found["tiny"]` is that model's result.

    Attributes:
        results: name of the model -> its result, all of one kind.
        measure: what was called.
    """

    results: Mapping[str, Any]
    measure: str

    def __getitem__(self, name: str) -> Any:
        if as_text(name, "name") not in self.results:
            raise KeyError(f"there is no model {name!r}; there are {', '.join(self.results)}")
        return self.results[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)

    def table(self, *args: Any, **options: Any):
        """The results' tables below each other, with a first column model; arguments are those of their `table`."""
        import pandas as pd

        parts = []
        for name, result in self.results.items():
            part = (result if isinstance(result, pd.DataFrame) else result.table(*args, **options)).copy()
            if "model" in part:
                part = part.drop(columns="model")
            part.insert(0, "model", name)
            parts.append(part)
        return pd.concat(parts, ignore_index=True)

    def summary(self) -> str:
        """What was measured on which models."""
        kind = type(next(iter(self.results.values()))).__name__
        names = ", ".join(self.results)
        names = names if len(names) < 90 else names[:89] + "…"
        return f"{self.measure} of {len(self.results)} models, each a result of kind {kind}: {names}"

    def picture(self) -> str:
        """The results' own pictures, model by model."""
        from .figures.panels import side_by_side

        return side_by_side(self.results, MOST_HTML)

    def plot(self, **options: Any):
        """The results side by side, as the figure (or page) of their kind.

        Raises:
            ValueError: a kind of result without a figure of several models, or results that are not alike (of different
                layers, say): draw these one by one, `found[name].plot()`.
        """
        with drawing():
            from .figures.comparison import comparison_figure

        return comparison_figure(self.results, **options)


def compare(
    models: Sequence[ModelOrName] | Mapping[str, ModelOrName],
    measure: Callable[..., Any] | str,
    *arguments: Any,
    **options: Any,
) -> Comparison:
    """The same measurement on several models.

    Args:
        models: names or models, or a mapping of names to such; loaded one after another, and dropped.
        measure: a function whose first argument is a model, or the name of a public one: "explain".
        arguments, options: what else it takes, the same for all models: texts, where their tokenizers differ.

    Raises:
        ValueError: no models, the same name twice, a measure that is no function, one that returns no result with a
            table; whatever the measure raises.

    Example:
        >>> from lnfree_interp import compare, explain
        >>> found = compare(["tiny", "tiny-noLN"], explain, "She put on", " her", versus=" his")
        >>> found["tiny-noLN"].error < 1e-4 < found["tiny"].error
        True
        >>> found.table().columns.tolist()
        ['model', 'kind', 'name', 'attribution', 'effect']
    """
    function = _function(measure)
    said = getattr(function, "__name__", "measurement")
    results: dict[str, Any] = {}
    for given, one in _named(models):
        model = as_model(one)
        name = str(model.cfg.model_name) if given is None else given
        if name in results:
            raise ValueError(f"two models are called {name!r}: give a mapping of names to models")
        results[name] = function(model, *arguments, **options)
        del model  # before the next one is loaded
        if not (hasattr(results[name], "table") or type(results[name]).__name__ == "DataFrame"):
            kind = type(results[name]).__name__
            raise ValueError(f"{said} returned a {kind}, a comparison is of results that have a table()")
    return Comparison(results, said)


def _function(measure: Callable[..., Any] | str) -> Callable[..., Any]:
    found: Any = measure
    if isinstance(measure, str):
        package: Any = importlib.import_module(__package__)
        found = getattr(package, measure, None) if measure in package.__all__ else None
    if not callable(found) or isinstance(found, type):
        raise ValueError(f"measure must be a function of a model, or the name of a public one, not {shown(measure)}")
    return found


def _named(models: object) -> list[tuple[str | None, ModelOrName]]:
    named: list[tuple[str | None, Any]]
    if isinstance(models, Mapping):
        named = [(str(name), model) for name, model in models.items()]
    elif isinstance(models, (list, tuple)):
        named = [(str(m) if isinstance(m, str) else None, m) for m in models]
    elif isinstance(models, (str, Path, LensModel)):
        named = [(None, models)]
    else:
        raise ValueError(f"models must be a list of names or models, or a mapping, not {type(models).__name__}")
    if not named:
        raise ValueError("there are no models to compare")
    return named
