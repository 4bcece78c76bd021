"""HellaSwag (arXiv 1905.07830): which of four endings does a model find likeliest?"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..arguments import as_path, as_text, listener, whole
from ..batching import Progress, check_next_token
from ..documents import read_json_lines
from ..forward import KeysAndValues, Past, Stream, embed, run, run_streams, unembed
from ..lens import LensModel, ModelOrName
from ..metrics import log_probs
from ..models import as_model
from ..names import HELLASWAG
from ..results import Result, counted, drawing, name_of
from ..weights import read_weights


@dataclass(frozen=True, repr=False)
class HellaSwag(Result):
    """Log-probabilities of every ending, and how often the right one is the likeliest.

    Attributes:
        log_probs: Float[Tensor, "item ending"], summed over the ending's tokens (nats).
        lengths: Int[Tensor, "item ending"], tokens of each ending.
        labels: Int[Tensor, "item"], the right ending.
        accuracy: share of items whose right ending has the largest sum.
        accuracy_normalised: the same for the sum divided by the ending's length in tokens (P1's figure).
        stderr, stderr_normalised: standard errors of the two.
        model: whose answers.
    """

    log_probs: Float[Tensor, "item ending"]
    lengths: Int[Tensor, "item ending"]
    labels: Int[Tensor, " item"]
    accuracy: float
    accuracy_normalised: float
    stderr: float
    stderr_normalised: float
    model: str = ""

    def summary(self) -> str:
        """One line: both accuracies."""
        right = f"{self.accuracy:.1%} (+- {self.stderr:.1%}) right"
        normalised = f"{self.accuracy_normalised:.1%} (+- {self.stderr_normalised:.1%}) by length-normalised sums"
        over = f"{counted(len(self.labels), 'item')} of {self.lengths.shape[1]} endings"
        return f"{f'of {self.model}: ' * bool(self.model)}{right}, {normalised}, of {over}"

    def picture(self) -> str:
        """Bars of both accuracies beside chance."""
        from ..figures.measured_pictures import of_hellaswag

        return of_hellaswag(self)

    def plot(self):
        """A figure of plotly: both accuracies with two standard errors, and chance.

        Raises:
            ImportError: there is no plotly.
        """
        with drawing():
            from ..figures.evaluate import hellaswag_figure

        return hellaswag_figure({self.model or "model": self})

    def table(self):
        """One row: items, both accuracies and their standard errors."""
        import pandas as pd

        row = {"items": len(self.labels), "accuracy": self.accuracy, "stderr": self.stderr}
        row |= {"accuracy_normalised": self.accuracy_normalised, "stderr_normalised": self.stderr_normalised}
        return pd.DataFrame([row])


def hellaswag_items(
    source: str | Path = HELLASWAG, *, split: str = "validation", limit: int | None = None
) -> list[dict]:
    """Items with their context ("ctx"), "endings" and "label", from a .jsonl file or the hub's data set.

    Raises:
        ValueError: a file that cannot be read, a line that is no such item (it is named), a data set that is
            not reachable, no items.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> line = '{"ctx": "He opened the door", "endings": ["and went in.", "of the sea."], "label": 0}'
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "items.jsonl"
        ...     _ = file.write_text(line, encoding="utf-8")
        ...     items = hellaswag_items(file)
        >>> items[0]["endings"]
        ['and went in.', 'of the sea.']
    """
    as_path(source, "source")
    as_text(split, "split")
    limit = None if limit is None else whole(limit, "limit", least=1)
    rows = _lines(Path(source)) if str(source).endswith((".jsonl", ".jsonl.gz")) else _from_hub(str(source), split)
    items = list(islice(rows, limit))
    if not items:
        raise ValueError(f"{source} holds no HellaSwag items")
    return items


def _lines(file: Path) -> Iterator[dict]:
    for line, item in read_json_lines(file, "HellaSwag file"):
        yield _item(item, f"{file}, line {line}")


def _from_hub(name: str, split: str) -> Iterator[dict]:
    from datasets import load_dataset

    try:
        rows = iter(load_dataset(name, split=split, streaming=True))
    except Exception as error:
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"cannot read data set {name!r} (split {split!r}): {first}") from None
    for i, row in enumerate(rows, 1):
        yield _item(row, f"{name}, item {i}")


def _item(raw, where: str) -> dict:
    wanted = "ctx, endings and label"
    if not isinstance(raw, dict) or not {"ctx", "endings", "label"} <= raw.keys():
        has = ", ".join(raw) if isinstance(raw, dict) else type(raw).__name__
        raise ValueError(f"{where}: a HellaSwag item has {wanted}; this one has {has}")
    context, endings, label = raw["ctx"], raw["endings"], raw["label"]
    if not isinstance(context, str) or not context.strip():
        raise ValueError(f"{where}: ctx is {context!r}, not a text")
    if not isinstance(endings, list) or len(endings) < 2 or not all(isinstance(e, str) and e for e in endings):
        raise ValueError(f"{where}: endings are {endings!r}, not two texts or more")
    if not str(label).isdigit() or int(label) >= len(endings):
        raise ValueError(f"{where}: label {label!r} is not one of 0..{len(endings) - 1}")
    return {"ctx": context, "endings": endings, "label": int(label)}


def hellaswag(
    model: ModelOrName, items: Iterable[dict], *, per_pass: int = 4096, progress: Progress | None = None
) -> HellaSwag:
    """Accuracy by summed and by length-normalised log-probability of the endings.

    Contexts of one length go together; each is run once, its keys and values serve all of its endings. A
    context that leaves no room for the endings loses its beginning.

    Args:
        model: a HookedTransformer or TransformerBridge with a tokenizer, or a name.
        items: dicts with "ctx", "endings", "label", all with as many endings: see `hellaswag_items`.
        per_pass: tokens in memory at a time.
        progress: told of the items done.

    Raises:
        ValueError: a model without a tokenizer, items that are none, endings longer than the model's context.

    Example:
        >>> from lnfree_interp import hellaswag, load_model
        >>> item = {"ctx": "He opened the", "endings": ["door.", "sky.", "cat.", "sea."], "label": 0}
        >>> hellaswag(load_model("tiny-noLN", device="cpu"), [item]).log_probs.shape
        torch.Size([1, 4])
    """
    model = as_model(model)
    return hellaswag_of([ending_scores(model, items, per_pass=per_pass, progress=progress)], model=name_of(model))


@dataclass(frozen=True)
class EndingScores:
    """What `HellaSwag` needs of some items: its own fields of the same names."""

    log_probs: Float[Tensor, "item ending"]
    lengths: Int[Tensor, "item ending"]
    labels: Int[Tensor, " item"]


def ending_scores(
    model: LensModel,
    items: Iterable[dict],
    some: slice = slice(None),
    *,
    per_pass: int = 4096,
    progress: Progress | None = None,
) -> EndingScores:
    """`hellaswag`'s scores of some of the items, all of which are checked."""
    check_next_token(model)
    if model.tokenizer is None:
        raise ValueError(f"{model.cfg.model_name} has no tokenizer, so HellaSwag cannot be read for it")
    if isinstance(items, (str, Mapping)) or not isinstance(items, Iterable):
        raise ValueError(f"items must be a list of dicts, as hellaswag_items gives them, not {type(items).__name__}")
    items = [_item(item, f"items: item {i}") for i, item in enumerate(items)]
    per_pass, progress = whole(per_pass, "per_pass", least=1), listener(progress)
    if not items:
        raise ValueError("there are no HellaSwag items")
    n_endings = len(items[0]["endings"])
    for i, item in enumerate(items):
        if len(item["endings"]) != n_endings:
            raise ValueError(f"item {i} has {len(item['endings'])} endings, item 0 has {n_endings}")
    encoded = [_encode(model, item) for item in items][some]
    sums = torch.zeros(len(encoded), n_endings, dtype=torch.float64)
    done = 0
    for group in _groups(encoded, per_pass):
        contexts = torch.tensor([encoded[i][0] for i in group], device=model.cfg.device)
        with torch.no_grad():
            sums[group] = ending_log_probs(model, contexts, [e for i in group for e in encoded[i][1]])
        done += len(group)
        if progress is not None:
            progress(done, len(encoded))
    lengths = torch.tensor([[len(e) for e in endings] for _, endings in encoded], dtype=torch.long)
    labels = torch.tensor([item["label"] for item in items[some]], dtype=torch.long)
    return EndingScores(sums, lengths.view(-1, n_endings), labels)


def hellaswag_of(parts: Sequence[EndingScores], *, model: str = "") -> HellaSwag:
    """The result on the items of all parts, in their order."""
    sums, lengths, labels = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("log_probs", "lengths", "labels")
    )
    accuracy, accuracy_normalised = (
        (score.argmax(1) == labels).double().mean().item() for score in (sums, sums / lengths)
    )
    return HellaSwag(
        log_probs=sums,
        lengths=lengths,
        labels=labels,
        accuracy=accuracy,
        accuracy_normalised=accuracy_normalised,
        stderr=math.sqrt(accuracy * (1 - accuracy) / len(labels)),
        stderr_normalised=math.sqrt(accuracy_normalised * (1 - accuracy_normalised) / len(labels)),
        model=model,
    )


def _encode(model: LensModel, item: dict) -> tuple[list[int], list[list[int]]]:
    def ids(text: str) -> list[int]:
        return model.tokenizer(text, add_special_tokens=False)["input_ids"]

    endings = [ids(" " + ending) for ending in item["endings"]]
    room = model.cfg.n_ctx - max(map(len, endings))
    if room < 1:
        longest = model.cfg.n_ctx - room
        raise ValueError(f"an ending has {longest} tokens, the model's context holds {model.cfg.n_ctx}")
    return ids(item["ctx"])[-room:], endings


def _groups(encoded: Sequence[tuple[list[int], list[list[int]]]], per_pass: int) -> Iterator[list[int]]:
    """Items whose contexts have one length, those with endings of like length together."""
    by_length = defaultdict(list)
    for i, (context, _) in enumerate(encoded):
        by_length[len(context)].append(i)
    for length, members in sorted(by_length.items()):
        members.sort(key=lambda i: max(map(len, encoded[i][1])))
        rows = max(1, per_pass // ((length + 20) * len(encoded[members[0]][1])))
        yield from (members[start : start + rows] for start in range(0, len(members), rows))


def ending_log_probs(
    model: LensModel, contexts: Int[Tensor, "item pos"], endings: Sequence[Sequence[int]]
) -> Float[Tensor, "item ending"]:
    """Summed log-probability of each ending after its context (nats); in float64 on the CPU.

    Args:
        contexts: of one length.
        endings: token ids, the first context's endings first.
    """
    n_items, n_context = contexts.shape
    lengths = torch.tensor([len(e) for e in endings])
    padded = torch.zeros(len(endings), int(lengths.max()), dtype=torch.long)
    for i, ending in enumerate(endings):
        padded[i, : len(ending)] = torch.tensor(ending)
    # Where there is no padding: found on the CPU, which knows, as indices, which the device need not count.
    there = (torch.arange(padded.shape[1]) < lengths[:, None]).flatten().nonzero()[:, 0]
    scores = torch.zeros(padded.shape, dtype=torch.float64)
    padded, index, times = padded.to(contexts.device), there.to(contexts.device), len(endings) // n_items
    weights = read_weights(model)
    if weights is not None:
        item = torch.arange(n_items, device=contexts.device).repeat_interleave(times)
        keep: KeysAndValues = {}
        past = Past(n_context, keep, item)
        streams = [
            Stream(embed(weights, contexts), positions=slice(-1, None), keep=keep),
            Stream(embed(weights, padded[:, :-1], past=past), past=past),
        ]
        before, after = run_streams(weights, streams)
        resid = torch.cat([before[item], after], 1)
    else:
        whole = torch.cat([contexts.repeat_interleave(times, 0), padded], 1)
        resid = run(model, whole)[:, n_context - 1 : -1]
    rows, targets = resid.flatten(0, 1)[index], padded.flatten()[index]
    found = [
        log_probs(unembed(model, part)).gather(-1, target[:, None])[:, 0]
        for part, target in zip(rows.split(512), targets.split(512))
    ]
    scores.view(-1)[there] = torch.cat(found).cpu().double()
    return scores.sum(1).view(n_items, times)
