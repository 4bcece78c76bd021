"""What each component contributes to what reads the residual stream, and what a reader loses without it.

The residual stream x is a sum of component outputs c. With the scale s of the norm before a reader taken as it is, what
is read is linear in them: the attribution of c is <c, u> / s, u the reader's direction (a token's column of W_U, a
neuron's of W_in, ...) as the norm lets it be read. The true direct effect removes c and normalises again,

    DE(c) = reading(x) - reading(x - c)            (P2 = arXiv 2507.02559, section 4, for logits)

which differs wherever removing c changes s. Both follow from <c, u>, <x, c> and |c|^2, and those from activations and
weights: no [head, batch, pos, d_model] tensor is ever made. Without LayerNorm the two are the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, overload

import torch
from jaxtyping import Int
from torch import Tensor

from ..batching import Places, Targets, Tokens, check_tokens, whole
from ..lens import LensModel, ModelOrName
from ..models import as_model
from ..weights import own_hooks
from .project import project, removals
from .readers import Reader
from .reading import Directions, Reading, resolve
from .record import BY_SOURCE, DECOMPOSITIONS, Recorded, check_by, component_labels, record
from .result import LogitAttribution, ReaderAttribution

# Tokens per pass: what bounds the memory held for z, whatever the number of sequences.
TOKENS_PER_PASS = 2048
# Bytes of values at a time, where they are not kept.
CHUNK = 2**28


# ---------------------------------------------------------------------------------------------------------
# Public functions


def direct_logit_attribution(
    model: ModelOrName,
    tokens: Tokens,
    targets: Targets | None = None,
    *,
    versus: Targets | None = None,
    positions: Places | None = None,
    by: str = "component",
) -> LogitAttribution:
    """Each component's part in a logit with the final norm's scale as it is: <c, u> / scale.

    Args:
        model: any HookedTransformer or TransformerBridge, or a name; with layer norm, RMS norm or none.
        tokens: Int[Tensor, "batch pos"], an array or lists of such, a text or a list of texts of one token length.
        targets: None: at every position that has one, the next token; [batch]: at the last position;
            [batch pos]: at every position. Token ids; at the last position also one id or one text of a single token,
            the same for all prompts, or a list of such texts.
        versus: second token ids, of targets' shape: everything is then about the logit difference.
        positions: only these (of those that targets gives); negative ones count from the end; or a mask of all.
        by: "component" (embed, pos_embed, attn and mlp of each layer with their biases), "head" (attention by
            heads, b_O apart) or "neuron" (MLPs by neurons, b_out apart).

    Returns:
        LogitAttribution in logits; values and bias sum to the model's own logit.

    Raises:
        ValueError: tokens, targets or positions out of range or of the wrong shape, an unknown `by`, a model whose
            logits are not a sum over components.

    Example:
        >>> from lnfree_interp import direct_logit_attribution, load_model
        >>> model = load_model("tiny-noLN", device="cpu")
        >>> tokens = model.to_tokens("It was a dark and stormy")
        >>> result = direct_logit_attribution(model, tokens, by="head")
        >>> logits = result.values.sum(0) + result.bias
        >>> logits.shape == tokens[:, 1:].shape
        True
    """
    return logit_attributions(model, tokens, targets, versus=versus, positions=positions, by=by, exact=False)[0]


def direct_effect(
    model: ModelOrName,
    tokens: Tokens,
    targets: Targets | None = None,
    *,
    versus: Targets | None = None,
    positions: Places | None = None,
    by: str = "component",
) -> LogitAttribution:
    """How much a logit falls when a component is taken out of the final residual stream and the rest normalised.

    DE(c) = logit(x) - logit(x - c), the scale computed anew for x - c, in closed form (P2, section 4). Later
    layers do not see the removal: it is the direct path's effect. Arguments and errors are
    `direct_logit_attribution`'s.

    Example:
        >>> from lnfree_interp import direct_effect, direct_logit_attribution, load_model
        >>> model = load_model("tiny-noLN", device="cpu")
        >>> tokens = model.to_tokens("It was a dark and stormy")
        >>> exact, linear = direct_effect(model, tokens), direct_logit_attribution(model, tokens)
        >>> bool((exact.values - linear.values).abs().max() < 1e-4)
        True
    """
    return logit_attributions(model, tokens, targets, versus=versus, positions=positions, by=by, exact=True)[1]


@overload
def logit_attributions(
    model: ModelOrName,
    tokens: Tokens,
    targets: Targets | None = None,
    *,
    versus: Targets | None = None,
    positions: Places | None = None,
    by: str = "component",
    exact: Literal[True] = True,
) -> tuple[LogitAttribution, LogitAttribution]: ...
@overload
def logit_attributions(
    model: ModelOrName,
    tokens: Tokens,
    targets: Targets | None = None,
    *,
    versus: Targets | None = None,
    positions: Places | None = None,
    by: str = "component",
    exact: Literal[False],
) -> tuple[LogitAttribution, None]: ...
@torch.no_grad()
def logit_attributions(
    model: ModelOrName,
    tokens: Tokens,
    targets: Targets | None = None,
    *,
    versus: Targets | None = None,
    positions: Places | None = None,
    by: str = "component",
    exact: bool = True,
) -> tuple[LogitAttribution, LogitAttribution | None]:
    """`direct_logit_attribution` and, if `exact`, `direct_effect`, from one forward pass.

    Example:
        >>> from lnfree_interp import load_model, logit_attributions
        >>> model = load_model("tiny-noLN")
        >>> approximate, exact = logit_attributions(model, model.to_tokens("It was a dark and stormy night."))
        >>> bool((approximate.values - exact.values).abs().max() < 1e-4)
        True
    """
    request = _request(as_model(model), tokens, Reader.logits(targets, versus), positions, by, DECOMPOSITIONS)
    linear = request.empty(request.n_tokens, 1)
    effect = torch.empty_like(linear) if exact else None
    bias = []
    for rows, recorded in request.passes():
        directions = request.directions(rows)
        bias.append(directions.bias)
        of_pass = request.tokens_of(rows)
        if effect is None or request.reading.norm.linear:
            project(recorded, directions, request.reading.norm, linear[:, of_pass])
        else:
            removed = removals(recorded, request.reading.norm)
            project(recorded, directions, request.reading.norm, effect[:, of_pass], removed, linear[:, of_pass])
    if effect is not None and request.reading.norm.linear:
        effect.copy_(linear)
    shape, where = request.shape, tuple(request.reading.kept)
    of_logits = torch.cat(bias).view(shape)
    made = [
        None if x is None else LogitAttribution(x.view(-1, *shape), request.labels, of_logits, where)
        for x in (linear, effect)
    ]
    assert made[0] is not None
    return made[0], made[1]


@torch.no_grad()
def attribution_to(
    model: ModelOrName,
    tokens: Tokens,
    reader: Reader,
    *,
    positions: Places | None = None,
    by: str = "component",
    senders: str | Sequence[str] | None = None,
    top: int | None = None,
) -> ReaderAttribution:
    """Each earlier component's part in what readers read, with the scale of the norm before them as it is.

    Args:
        model: any HookedTransformer or TransformerBridge, or a name; with layer norm, RMS norm or none.
        tokens: Int[Tensor, "batch pos"], an array or lists of such, a text or a list of texts of one token length.
        reader: what reads: neurons, queries, keys, values, directions, a logit. Layers after it are not run.
        positions: where it reads; negative ones count from the end; or a mask of all.
        by: "component" (embed, pos_embed, attn and mlp of each layer with their biases), "head" (attention by heads,
            b_O apart), "neuron" (MLPs by neurons, b_out apart) or "source" (heads by the position they read from, through
            their attention pattern; what is not moved is at its own).
        senders: labels of the components wanted; None: all before the reader. The result has them in the model's order.
        top: keep the so many of the largest absolute value for each reader and token; never all at once are in memory.

    Returns:
        ReaderAttribution, which holds reader x component x batch x pos (x pos) numbers: `attributions_to` gives some
        readers at a time.

    Raises:
        ValueError: a reader that does not exist, a direction of the wrong size, a sender that comes after its reader;
            tokens, targets or positions out of range or of the wrong shape, an unknown `by`; a model that normalises
            what its blocks write, by anything but component.

    Example:
        >>> from lnfree_interp import Reader, attribution_to, load_model
        >>> model = load_model("tiny-noLN", device="cpu")
        >>> result = attribution_to(model, "It was a dark and stormy", Reader.neuron(2), by="head")
        >>> result.values.shape[:2] == (model.cfg.d_mlp, len(result.labels))
        True
        >>> pre = model.run_with_cache("It was a dark and stormy")[1]["blocks.2.mlp.hook_pre"]
        >>> bool(((result.values.sum(1) + result.bias).permute(1, 2, 0) - pre).abs().max() < 1e-4)
        True
    """
    request = _request(as_model(model), tokens, reader, positions, by, senders=senders, top=top)
    return request.gather(request.passes(), slice(0, request.n_readers), exact=False)


@torch.no_grad()
def effect_on(
    model: ModelOrName,
    tokens: Tokens,
    reader: Reader,
    *,
    positions: Places | None = None,
    by: str = "component",
    senders: str | Sequence[str] | None = None,
    top: int | None = None,
) -> ReaderAttribution:
    """How much a reading falls when a component is taken out of the stream and the rest normalised: in closed form.

    What lies between the component and the reader does not see the removal: it is the direct path's effect. Arguments
    and errors are `attribution_to`'s, whose values these are where the norm is none.

    Example:
        >>> from lnfree_interp import Reader, attribution_to, effect_on, load_model
        >>> model = load_model("tiny-noLN", device="cpu")
        >>> arguments = model, "It was a dark and stormy", Reader.query(3, head=1)
        >>> exact, linear = effect_on(*arguments, by="head"), attribution_to(*arguments, by="head")
        >>> bool((exact.values - linear.values).abs().max() < 1e-4)
        True
    """
    request = _request(as_model(model), tokens, reader, positions, by, senders=senders, top=top)
    return request.gather(request.passes(), slice(0, request.n_readers), exact=True)


def attributions_to(
    model: ModelOrName,
    tokens: Tokens,
    reader: Reader,
    *,
    positions: Places | None = None,
    by: str = "component",
    senders: str | Sequence[str] | None = None,
    top: int | None = None,
    exact: bool = False,
    max_memory: int = CHUNK,
) -> Iterator[ReaderAttribution]:
    """`attribution_to`, or (exact) `effect_on`, of some readers after others, from one pass over the tokens.

    For what is reduced on the way: all neurons of a layer by all heads, say. In memory are the tokens' activations, of
    every layer before the readers, and the values of as many readers as fit (one at least).

    Args:
        max_memory: bytes of values at a time.

    Example:
        >>> from lnfree_interp import Reader, attributions_to, load_model
        >>> model = load_model("tiny-noLN", device="cpu")
        >>> parts = attributions_to(model, "It was a dark and stormy", Reader.neuron(2), by="head", max_memory=10**5)
        >>> largest = [label for part in parts for label in part.values.abs().mean((2, 3)).argmax(1).tolist()]
        >>> len(largest) == model.cfg.d_mlp
        True
    """
    request = _request(as_model(model), tokens, reader, positions, by, senders=senders, top=top)
    step = request.readers_in(whole(max_memory, "max_memory", least=1), request.n_tokens)

    def parts() -> Iterator[ReaderAttribution]:
        with torch.no_grad():
            passes = list(request.passes())
        for first in range(0, request.n_readers, step):
            with torch.no_grad():
                part = request.gather(passes, slice(first, min(first + step, request.n_readers)), exact)
            yield part

    return parts()


# ---------------------------------------------------------------------------------------------------------
# The computation


@dataclass(frozen=True)
class _Request:
    """What is asked for, checked."""

    model: LensModel
    tokens: Int[Tensor, "batch pos"]
    reading: Reading
    by: str
    labels: tuple[str, ...]
    some: bool  # whether these are some of the components alone
    top: int | None

    @property
    def n_readers(self) -> int:
        return len(self.reading.labels)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.tokens), len(self.reading.kept)

    @property
    def n_tokens(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def cells(self) -> tuple[int, ...]:
        """Of a component and token: its sources, or nothing."""
        return (self.tokens.shape[1],) if self.by == BY_SOURCE else ()

    def empty(self, n_tokens: int, n_readers: int, n_components: int | None = None) -> Tensor:
        """Room for values: zeros by source, where not every cell is written."""
        dtype = torch.promote_types(self.model.unembed.W_U.dtype, torch.float32)
        n_components = len(self.labels) if n_components is None else n_components
        shape = (n_components, n_tokens, *self.cells, n_readers)
        return (torch.zeros if self.cells else torch.empty)(shape, dtype=dtype, device=self.tokens.device)

    def passes(self) -> Iterator[tuple[slice, Recorded]]:
        """The prompts some at a time, and what is recorded of them."""
        step = max(1, TOKENS_PER_PASS // self.tokens.shape[1])
        for first in range(0, len(self.tokens), step):
            rows = slice(first, min(first + step, len(self.tokens)))
            chosen = self.labels if self.some else None
            yield rows, record(self.model, self.tokens[rows], self.reading.place, self.reading.kept, self.by, chosen)

    def tokens_of(self, rows: slice) -> slice:
        """Of prompts, among all tokens."""
        return slice(rows.start * self.shape[1], rows.stop * self.shape[1])

    def directions(self, rows: slice) -> Directions:
        return self.reading.directions(self.model, rows)

    def readers_in(self, memory: int, n_tokens: int, n_components: int | None = None) -> int:
        """How many readers' values are in so many bytes; 1 at least."""
        one = self.empty(0, 0)
        n_components = len(self.labels) if n_components is None else n_components
        each = n_components * n_tokens * (self.cells or (1,))[0] * one.itemsize
        return max(1, min(self.n_readers, memory // each))

    def gather(self, passes: Iterable[tuple[slice, Recorded]], readers: slice, exact: bool) -> ReaderAttribution:
        """The values of some readers."""
        n_readers = readers.stop - readers.start
        out = self.empty(self.n_tokens, n_readers)
        bias = out.new_empty(self.n_tokens, n_readers)
        norm = self.reading.norm
        for rows, recorded in passes:
            directions, of_pass = self.directions(rows).some(readers), self.tokens_of(rows)
            removed = removals(recorded, norm) if exact and not norm.linear else None
            project(recorded, directions, norm, out[:, of_pass], removed)
            bias[of_pass] = directions.bias[:, None] if directions.per_token else directions.bias
        return ReaderAttribution(
            out.movedim(-1, 0).unflatten(2, self.shape),
            self.labels,
            self.reading.labels[readers],
            bias.T.unflatten(1, self.shape),
            tuple(self.reading.kept),
        )


def _request(
    model: LensModel,
    tokens: Tokens,
    reader: Reader,
    positions: Places | None,
    by: str,
    allowed: Sequence[str] = (*DECOMPOSITIONS, BY_SOURCE),
    senders: str | Sequence[str] | None = None,
    top: int | None = None,
) -> _Request:
    """The arguments, checked."""
    check_by(model, by, allowed)
    tokens = check_tokens(model, tokens)
    reading = resolve(model, reader, tokens, positions)
    hooks = ("hooks",) * bool(own_hooks(model))
    labels = component_labels(model.cfg, by, reading.place) + hooks
    if senders is None:
        return _Request(model, tokens, reading, by, labels, False, top)
    chosen = (senders,) if isinstance(senders, str) else tuple(senders)
    if not chosen:
        raise ValueError("senders name no component")
    for label in chosen:
        if label in labels:
            continue
        if label in component_labels(model.cfg, by):
            raise ValueError(
                f"sender {label} comes after its reader {reading.labels[0]}; the last before it is {labels[-1]}"
            )
        raise ValueError(f"sender {label!r} is unknown; by={by!r} there are {', '.join(labels[:3])}, ..., {labels[-1]}")
    return _Request(model, tokens, reading, by, tuple(label for label in labels if label in set(chosen)), True, top)
