"""What measurements show of themselves, norms, sinks, losses, ablations: pictures in plain HTML."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..batching import indices
from ..results import counted
from . import html
from .pictures import largest, of_heads

if TYPE_CHECKING:
    from ..check import ModelCheck
    from ..evaluate import HellaSwag, LossEvaluation, LossTable, ModelComparison, Samples
    from ..neurons import NeuronAblation
    from ..norms import AttentionSinks, ResidualNorms

QUANTITIES = ("loss", "entropy", "loss_frozen", "entropy_frozen")


def of_ablations(result: NeuronAblation) -> str:
    changes, sizes = (x.double().mean((1, 2)) for x in (result.loss, result.loss.abs()))
    through = (result.loss - result.loss_frozen).abs().double().mean((1, 2))
    shown, others = largest(sizes, html.ROWS)
    if not result.cumulative:
        shown.sort(key=lambda i: -sizes[i].item())
    said = [f"mean size {sizes[i]:.3g}, through the scale {through[i]:.3g}" for i in shown]
    bars = html.bars([result.labels[i] for i in shown], changes[shown].tolist(), "nats of loss", said)
    left = html.note(f"not shown: {counted(len(others), 'ablation')} of smaller size" if others else "")
    text = ""
    if result.prompts is not None and len(result.prompts) == 1:
        text = ablation_as_text(result, int(sizes.argmax()), 0, "loss")
    return text + bars + left


def ablation_as_text(result: NeuronAblation, ablation: int, prompt: int, quantity: str) -> str:
    if quantity not in QUANTITIES:
        raise ValueError(f"quantity {quantity!r} is unknown; allowed are {', '.join(QUANTITIES)}")
    if result.prompts is None:
        raise ValueError("the result does not know what the model read, so it has no text")
    n = len(result.prompts)
    prompt = indices(prompt, n, "prompt", range(n), "the prompts")[0]
    values = [torch.nan, *getattr(result, quantity)[ablation, prompt].tolist()]
    what = {"loss": "loss of predicting each token", "entropy": "entropy of the prediction of each token"}
    frozen = ", the final scale frozen" if quantity.endswith("frozen") else ""
    title = f"{result.labels[ablation]} ablated: change of the {what[quantity.removesuffix('_frozen')]}{frozen}"
    return html.heading(title) + html.coloured_tokens(result.prompts.strings[prompt], values, "nats")


def of_norms(result: ResidualNorms) -> str:
    groups = [i for i, n in enumerate(result.tokens.tolist()) if n > 0][: html.COLUMNS]
    points = list(range(len(result.points)))
    if len(points) > html.ROWS:  # the first, the last, and some between
        points = torch.linspace(0, len(points) - 1, html.ROWS).round().long().tolist()
    mean = result.norm[..., result.statistics.index("mean")]
    names = [result.groups[i].removeprefix("position ") if len(groups) > 3 else result.groups[i] for i in groups]
    grid = html.grid(
        mean[points][:, groups].tolist(),
        [result.points[i] for i in points],
        names,
        "mean L2 norm",
        corner="point \\ position" if len(groups) > 3 else "",
    )
    left = [f"{len(result.points) - len(points)} points between"] * (len(points) < len(result.points))
    left += [f"{len(result.groups) - len(groups)} groups"] * (len(groups) == html.COLUMNS < len(result.groups))
    return grid + html.note("not shown: " + ", ".join(left) if left else "")


def of_sinks(result: AttentionSinks) -> str:
    return of_heads(result.attention, result.labels, "of attention on position 0", 1.0)


def of_losses(result: LossEvaluation) -> str:
    (low, high), (lowest, highest) = result.range95, result.range999
    names = ["mean", "median", "2.5% of tokens below", "97.5% below", "0.05% below", "99.95% below"]
    bars = html.bars(names, [result.mean, result.median, low, high, lowest, highest], "nats per token")
    if not result.worst:
        return bars
    columns = ["sequence", "loss", "begins", "norm explodes at"]
    rows = []
    for w in result.worst:
        where = (
            f"position {w.position} {w.token!r} after layer {w.layer}, {w.ratio:.3g} times the median"
            if w.ratio
            else ""
        )
        rows.append([w.index, w.loss, html.visible(w.text, 60), where])
    if not any(row[-1] for row in rows):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    return bars + html.heading("Worst sequences") + html.table(columns, rows)


def of_loss_table(result: LossTable) -> str:
    table = result.table()
    compared = [i for i, baseline in enumerate(result.baselines) if baseline is not None]
    rows = list(zip(table.model, table.loss, table.gap_to))
    shown = html.table(("model", "loss (gap), nats", "gap to"), rows)
    if not compared:
        return shown
    said = [
        "" if low != low else f"95% [{low:+.4f}, {high:+.4f}]"
        for low, high in zip(result.low.tolist(), result.high.tolist())
    ]
    names = [f"{result.names[i]} - {result.baselines[i]}" for i in compared]
    return (
        shown
        + html.heading("Gaps")
        + html.bars(names, result.gap[compared].tolist(), "nats", [said[i] for i in compared])
    )


def of_comparison(result: ModelComparison) -> str:
    columns = ("model", "loss", "entropy", "accuracy", "calibration error")
    numbers = (result.loss, result.entropy, result.accuracy, result.calibration_error)
    table = html.table(columns, list(zip(result.names, *(x.tolist() for x in numbers))))
    if not 1 < len(result.names) <= html.ROWS:
        return table
    divergence = html.grid(result.divergence.tolist(), result.names, result.names, "nats")
    return table + html.heading("Jensen-Shannon divergence") + divergence


def of_hellaswag(result: HellaSwag) -> str:
    names = ("largest sum", "largest sum per token", "chance")
    values = (result.accuracy, result.accuracy_normalised, 1 / result.lengths.shape[1])
    said = [f"+- {result.stderr:.3g}", f"+- {result.stderr_normalised:.3g}", ""]
    return html.bars(names, values, "of items right", said, totals=1)


def of_samples(result: Samples) -> str:
    rows = []
    for name, texts in zip(result.names, result.texts):
        rows += [
            (name if i == 0 else "", _cut(text))
            for i, text in enumerate(texts[: max(1, html.ROWS // len(result.names))])
        ]
    most = max((len(texts) for texts in result.texts), default=0)
    shown = min(most, max(1, html.ROWS // max(1, len(result.names))))
    left = html.note(f"not shown: {most - shown:,} more samples of each" if shown < most else "")
    return html.table(("model", f"after {_cut(result.prompt, 60)!r}"), rows, 2 * html.ROWS) + left


def _cut(text: str, most: int = 600) -> str:
    return html.visible(text, most)


def of_check(result: ModelCheck) -> str:
    def error(x: float | int | None) -> str:
        return "" if x is None else f"{x:.1e}"

    rows = [
        (law.name, law.verdict, error(law.error), error(law.tolerance), html.visible(law.note, 60) if law.note else "")
        for law in result.laws
    ]
    rows.sort(key=lambda row: ("FAILS", "holds", "not measured").index(row[1]))
    ways = [(way.what, way.how, way.saves or way.why) for way in result.ways]
    laws = html.table(("law", "verdict", "error", "allowed", ""), rows, 2 * html.ROWS)
    return laws + html.heading("What is fast") + html.table(("what", "how", ""), ways)
