"""What results of probes show of themselves: pictures in plain HTML."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from . import html
from .pictures import added_up, of_heads

if TYPE_CHECKING:
    from ..probe import ConceptEvidence, ConceptSwap, ProbeEvaluation, ProbeReading

CONCEPTS = 12


def of_reading(result: ProbeReading) -> str:
    top = [name for name, _ in result.top(k=CONCEPTS)]
    columns = [result.concepts.index(name) for name in top]
    values = result.similarity[-1][:, columns]
    title = html.heading(f"What {result.keys[-1]!r} is bound with: cosine of the nearest concepts")
    more = f"{len(result.keys) - 1} more keys" if len(result.keys) > 1 else ""
    left = f"not shown: {len(result.concepts) - 1 - len(top)} concepts further off" if len(top) == CONCEPTS else ""
    cells = html.grid(values.tolist(), result.points, top, "cosine", 1.0, corner="layer \\ concept")
    chance = f"chance: 0 with a standard deviation of {result.dim**-0.5:.3f}"
    return title + cells + html.note(chance, left, more)


def of_evaluation(result: ProbeEvaluation) -> str:
    columns = [f"new {split}" for split in result.splits]
    cells = html.grid(result.at_1[..., 0].tolist(), result.yardsticks, columns, "of prompts", 1.0, corner="probing@1")
    counts = [f"{int(n)} {split}" for n, split in zip(result.n[:, 0], result.splits)]
    return cells + html.note(f"prompts: {', '.join(counts)}", f"chance {result.chance:.1%}")


def of_evidence(result: ConceptEvidence) -> str:
    values = result.values.detach().cpu().double().sum(1)
    bias = torch.tensor(result.bias, dtype=torch.float64)
    unit = "units read"
    return of_heads(values, result.labels, unit) + added_up(values, bias, result.labels, unit, "readout")


def of_swap(result: ConceptSwap) -> str:
    rates = result.to_other.mean(-1)  # point edit who
    parts = []
    for i, edit in enumerate(result.edits):
        title = html.heading(f"{edit}: answers that become the other concept")
        parts.append(
            title + html.grid(rates[:, i].tolist(), result.points, result.who, "of prompts", 1.0, corner="layer")
        )
    return "".join(parts)
