"""Attributions as they are asked for, checked, and worked through: some prompts and some readers at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor

from ..arguments import as_text, one_of, whole
from ..batching import Places, Tokens, check_tokens
from ..lens import LensModel
from ..results import Prompts
from ..weights import own_hooks
from .project import Removal, project, removals
from .readers import Reader
from .reading import Directions, Reading, resolve
from .record import BY_SOURCE, DECOMPOSITIONS, Recorded, check_by, component_labels, record
from .result import LogitAttribution, ReaderAttribution

# Tokens per pass: what bounds the memory held for z, whatever the number of sequences.
TOKENS_PER_PASS = 2048
# Bytes of values at a time, where they are not kept.
CHUNK = 2**28
# Components at a time, at least, where the largest are looked for among them.
GROUP = 256


@dataclass(frozen=True)
class Pass:
    """Some of the prompts.

    Attributes:
        rows: which.
        removed: for effects with a norm, what removing each component does to its scale.
    """

    rows: slice
    recorded: Recorded
    removed: tuple[Removal, ...] | None


@dataclass(frozen=True)
class Request:
    """What is asked for, checked.

    Attributes:
        labels: the components wanted;
        some: whether they are not all there are.
        hooked: whether the model carries hooks of its own.
    """

    model: LensModel
    tokens: Int[Tensor, "batch pos"]
    reading: Reading
    by: str
    labels: tuple[str, ...]
    some: bool
    hooked: bool
    top: int | None

    @property
    def n_readers(self) -> int:
        return len(self.reading.labels)

    @property
    def shape(self) -> tuple[int, int]:
        """Of the tokens at which something is read, [batch, pos]."""
        return len(self.tokens), len(self.reading.kept)

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.model.unembed.W_U.dtype, torch.float32)

    @property
    def n_sources(self) -> int | None:
        return self.tokens.shape[1] if self.by == BY_SOURCE else None

    def tokens_of(self, rows: slice) -> slice:
        """Some prompts' tokens among all."""
        return slice(rows.start * self.shape[1], rows.stop * self.shape[1])

    def room(self, n_components: int, n_tokens: int, n_readers: int) -> Tensor:
        """For values, [component, n, (source,) reader]; zeros by source, where not every cell is written."""
        device = self.tokens.device
        if self.n_sources is None:
            return torch.empty(n_components, n_tokens, n_readers, dtype=self.dtype, device=device)
        return torch.zeros(n_components, n_tokens, self.n_sources, n_readers, dtype=self.dtype, device=device)

    def passes(self, exact: bool) -> Iterator[Pass]:
        """The prompts some at a time, and what is recorded of them; for effects, if `exact`."""
        reading, chosen = self.reading, self.labels if self.some else None
        step = max(1, TOKENS_PER_PASS // self.tokens.shape[1])
        for first in range(0, len(self.tokens), step):
            rows = slice(first, min(first + step, len(self.tokens)))
            tokens, place = self.tokens[rows], reading.place
            recorded = record(self.model, tokens, place, reading.kept, self.by, chosen, self.hooked)
            removed = removals(recorded, reading.norm) if exact and not reading.norm.linear else None
            yield Pass(rows, recorded, removed)


def make_request(
    model: LensModel,
    tokens: Tokens,
    reader: Reader,
    positions: Places | None,
    by: str,
    allowed: Sequence[str] = (*DECOMPOSITIONS, BY_SOURCE),
    senders: str | Sequence[str] | None = None,
    top: int | None = None,
) -> Request:
    """The arguments, checked.

    Raises:
        ValueError: as `attribution_to`.
    """
    check_by(model, by, allowed)
    one_of(reader, "reader", Reader, "a Reader, such as Reader.neuron(2, 5)")
    tokens = check_tokens(model, tokens)
    top = None if top is None else whole(top, "top", least=1)
    reading = resolve(model, reader, tokens, positions)
    hooked = bool(own_hooks(model))
    labels = component_labels(model.cfg, by, reading.place) + ("hooks",) * hooked
    if senders is None:
        return Request(model, tokens, reading, by, labels, False, hooked, top)
    several = (
        [senders] if isinstance(senders, str) else one_of(senders, "senders", Sequence, "a label or a list of such")
    )
    chosen = dict.fromkeys(as_text(label, "a sender") for label in several)
    if not chosen:
        raise ValueError("senders name no component")
    before, later = set(labels), set(component_labels(model.cfg, by))
    for label in chosen:
        if label not in before:
            reads = f"its reader {reading.labels[0]}"
            if label in later:
                raise ValueError(f"sender {label} comes after {reads}; the last before it is {labels[-1]}")
            raise ValueError(
                f"sender {label!r} is unknown; by={by!r} there are {', '.join(labels[:3])}, ..., {labels[-1]}"
            )
    labels = tuple(label for label in labels if label in chosen)
    return Request(model, tokens, reading, by, labels, True, hooked, top)


def logits_of(request: Request, exact: bool) -> tuple[LogitAttribution, LogitAttribution | None]:
    """A logit's attributions and, if `exact`, the effects too."""
    n_tokens, norm = request.shape[0] * request.shape[1], request.reading.norm
    linear = request.room(len(request.labels), n_tokens, 1)
    effect, bias = torch.empty_like(linear) if exact else None, []
    for part in request.passes(exact):
        directions, of_pass = request.reading.directions(request.model, part.rows), request.tokens_of(part.rows)
        bias.append(directions.bias)
        if effect is None or part.removed is None:
            project(part.recorded, directions, norm, linear[:, of_pass])
        else:
            project(part.recorded, directions, norm, effect[:, of_pass], part.removed, linear[:, of_pass])
    if effect is not None and norm.linear:
        effect.copy_(linear)
    of_bias, where = torch.cat(bias).view(request.shape), tuple(request.reading.kept)
    targets, versus = (None if x is None else x.cpu() for x in (request.reading.targets, request.reading.versus))
    prompts = Prompts.of(request.model, request.tokens)

    def result(values: Tensor, kind: str) -> LogitAttribution:
        values = values.view(-1, *request.shape)
        return LogitAttribution(values, request.labels, of_bias, where, targets, versus, kind, prompts)

    return result(linear, "attribution"), None if effect is None else result(effect, "direct effect")


def readers_in(request: Request, memory: int) -> int:
    """How many readers' values are in so many bytes; 1 at least."""
    n_components = len(request.labels) if request.top is None else request.top
    each = n_components * (1 if request.top else request.n_sources or 1) * request.shape[0] * request.shape[1]
    return max(1, min(request.n_readers, memory // (each * request.dtype.itemsize)))


def gather(
    request: Request, passes: Iterable[Pass], readers: slice, memory: int = CHUNK, *, exact: bool, prompts: Prompts
) -> ReaderAttribution:
    """The values of some readers: all, or the largest, with so many bytes of them beside the result."""
    n_tokens, n_readers = request.shape[0] * request.shape[1], readers.stop - readers.start
    found = []
    if request.top is None:
        found.append(request.room(len(request.labels), n_tokens, n_readers))
    bias = request.tokens.new_empty(n_tokens, n_readers, dtype=request.dtype)
    for part in passes:
        directions = request.reading.directions(request.model, part.rows).some(readers)
        of_pass = request.tokens_of(part.rows)
        bias[of_pass] = directions.bias[:, None] if directions.per_token else directions.bias
        if request.top is None:
            project(part.recorded, directions, request.reading.norm, found[0][:, of_pass], part.removed)
            continue
        largest = _largest(request, part, directions, memory)
        found = found or [x.new_empty(len(x), n_tokens, n_readers) for x in largest]
        for x, of_part in zip(found, largest):
            x[:, of_pass] = of_part
    values, *where = (x.movedim(-1, 0).unflatten(2, request.shape) for x in found)
    senders, sources = (*where, None, None)[:2]
    return ReaderAttribution(
        values,
        request.labels,
        request.reading.labels[readers],
        bias.T.unflatten(1, request.shape),
        tuple(request.reading.kept),
        senders,
        sources,
        "effect" if exact else "attribution",
        prompts,
    )


def _largest(request: Request, part: Pass, directions: Directions, memory: int) -> list[Tensor]:
    """A pass' largest values, their senders and, by source, their sources: [top, n, reader] of each."""
    of_unit = len(part.recorded.x) * (request.n_sources or 1) * request.dtype.itemsize
    groups = _groups(part, max(1, min(GROUP, memory // of_unit)))
    widest = max(sum(len(piece.labels) for piece in group.recorded.pieces) for group in groups)
    step = max(1, memory // (widest * of_unit))
    readers = [slice(first, first + step) for first in range(0, directions.n_readers, step)]
    found = [_largest_among(request, groups, directions.some(some)) for some in readers]
    return [torch.cat(x, -1) for x in zip(*found)]


def _groups(part: Pass, n_units: int) -> list[Pass]:
    """A pass with some pieces after others: so many units at most, or a single piece."""
    groups: list[list[int]] = [[]]
    sizes = [len(piece.labels) for piece in part.recorded.pieces]
    for i, size in enumerate(sizes):
        if groups[-1] and sum(sizes[j] for j in groups[-1]) + size > n_units:
            groups.append([])
        groups[-1].append(i)

    def some(group: list[int]) -> Pass:
        pieces = slice(group[0], group[-1] + 1)
        removed = None if part.removed is None else part.removed[pieces]
        return Pass(part.rows, replace(part.recorded, pieces=part.recorded.pieces[pieces]), removed)

    return [some(group) for group in groups]


def _largest_among(request: Request, groups: Sequence[Pass], directions: Directions) -> list[Tensor]:
    """`_largest`, of some readers, group by group: what was best before is compared with the next."""
    assert request.top is not None
    first, n_sources = 0, request.n_sources or 1
    best: tuple[Tensor, Tensor] | None = None  # values, and which of all cells they are
    for group in groups:
        n_units = sum(len(piece.labels) for piece in group.recorded.pieces)
        room = request.room(n_units, len(group.recorded.x), directions.n_readers)
        project(group.recorded, directions, request.reading.norm, room, group.removed)
        cells = room if request.n_sources is None else room.movedim(2, 1).flatten(0, 1)
        before = 0 if best is None else len(best[0])
        cells = cells if best is None else torch.cat([best[0], cells])
        chosen = cells.abs().topk(min(request.top, len(cells)), dim=0).indices
        which = chosen - before + first * n_sources
        if best is not None:
            which = torch.where(chosen < before, best[1].gather(0, chosen.clamp(max=before - 1)), which)
        best, first = (cells.gather(0, chosen), which), first + n_units
    assert best is not None
    values, which = best
    return [values, which] if request.n_sources is None else [values, which // n_sources, which % n_sources]
