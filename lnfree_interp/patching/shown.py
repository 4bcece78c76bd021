"""Effects as they are shown: means over prompts as a panel of rows and columns with their names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from .sites import UNITS

if TYPE_CHECKING:
    from .effect import PatchingEffect


@dataclass(frozen=True)
class Panel:
    """Mean effects, [row, column], with what each row and column is.

    Attributes:
        row, column: what rows and columns are: "layer" and "position", say.
        left_out: in words, "" if nothing is.
    """

    values: Float[Tensor, "row column"]
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    row: str
    column: str
    left_out: str = ""

    def largest(self, rows: int, columns: int) -> Panel:
        """The rows and columns of the largest effects, in their order."""
        size = self.values.abs().nan_to_num()
        across, down = _largest(size.amax(1), rows), _largest(size.amax(0), columns)
        parts = [
            f"{len(names) - len(kept)} of {len(names)} {what}s of smaller effects are left out"
            for names, kept, what in ((self.rows, across, self.row), (self.columns, down, self.column))
            if len(kept) < len(names)
        ]
        return Panel(
            self.values[across][:, down],
            tuple(self.rows[i] for i in across),
            tuple(self.columns[i] for i in down),
            self.row,
            self.column,
            "; ".join(parts),
        )


def _largest(sizes: Float[Tensor, " n"], k: int) -> list[int]:
    return sorted(sizes.topk(min(k, len(sizes))).indices.tolist())


def panel(effect: PatchingEffect) -> Panel:
    """The mean effects over prompts: layers by positions, heads or neurons; with positions one by one, heads or neurons
    by positions."""
    mean = effect.values.detach().cpu().double().nanmean(0)
    layers, unit = [f"L{layer}" for layer in effect.layers], effect.axes[2]
    if effect.axes[-1] != "pos":
        return Panel(mean, tuple(layers), tuple(map(str, effect.units)), "layer", unit)
    positions = tuple(position_labels(effect, effect.units if unit == "pos" else range(mean.shape[-1])))
    if unit == "pos":
        return Panel(mean, tuple(layers), positions, "layer", "position")
    letter = "H" if unit == "head" else "N"
    rows = tuple(f"{layer}{letter}{i}" for layer in layers for i in effect.units)
    return Panel(mean.flatten(0, 1), rows, positions, unit, "position")


def position_labels(effect: PatchingEffect, positions: Sequence[int]) -> list[str]:
    """Positions as the tokens there, where the prompts are known."""
    if effect.prompts is None:
        return [str(i) for i in positions]
    return effect.prompts.position_labels(positions)


def unit_of(metric: str) -> str:
    """What a metric is in; one of a user's own is in units of itself."""
    return UNITS.get(metric, metric)


def largest_cell(shown: Panel) -> str:
    """The cell of the largest mean effect, its position without the token, and that effect."""
    size = shown.values.abs().nan_to_num()
    if not size.numel():
        return "none"
    row, column = divmod(int(size.argmax()), len(shown.columns))
    joined = {"head": "H", "neuron": "N"}.get(shown.column, ", position ")
    return f"{shown.rows[row]}{joined}{shown.columns[column].split(' ')[0]} {float(shown.values[row, column]):+.3g}"
