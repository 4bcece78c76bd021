"""What each component contributes to what reads the residual stream, and what a reader loses without it.

The residual stream x is a sum of component outputs c. With the scale s of the norm before a reader taken as it is, what
is read is linear in them: the attribution of c is <c, u> / s, u the reader's direction (a token's column of W_U, a
neuron's of W_in, ...) as the norm lets it be read. The true direct effect removes c and normalises again,

    DE(c) = reading(x) - reading(x - c)            (P2 = arXiv 2507.02559, section 4, for logits)

which differs wherever removing c changes s. Both follow from <c, u>, <x, c> and |c|^2, and those from activations and
weights: no [head, batch, pos, d_model] tensor is ever made. Without LayerNorm the two are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, overload

import torch

from ..arguments import switch, whole
from ..batching import Places, Targets, Tokens
from ..lens import ModelOrName
from ..models import as_model
from ..results import Prompts
from .readers import Reader
from .record import DECOMPOSITIONS
from .request import CHUNK, gather, logits_of, make_request, readers_in
from .result import LogitAttribution, ReaderAttribution

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
    reader = Reader.logits(targets, versus)
    request = make_request(as_model(model), tokens, reader, positions, by, DECOMPOSITIONS)
    return logits_of(request, switch(exact, "exact"))


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
            b_O apart), "neuron" (MLPs by neurons, b_out apart) or "source" (heads by the position they read from,
            through their attention pattern; what is not moved is at its own).
        senders: labels of the components wanted; None: all before the reader. The result has them in the model's order.
        top: for each reader and token keep so many (all, if there are fewer) of the largest absolute value; all of them
            are never in memory at once.

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
    return _whole(model, tokens, reader, positions, by, senders, top, exact=False)


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
    return _whole(model, tokens, reader, positions, by, senders, top, exact=True)


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
    request = make_request(as_model(model), tokens, reader, positions, by, senders=senders, top=top)
    switch(exact, "exact")
    step = readers_in(request, whole(max_memory, "max_memory", least=1))
    prompts = Prompts.of(request.model, request.tokens)

    def parts() -> Iterator[ReaderAttribution]:
        passes = None
        for first in range(0, request.n_readers, step):
            with torch.no_grad():
                passes = passes or list(request.passes(exact))
                some = slice(first, min(first + step, request.n_readers))
                part = gather(request, passes, some, max_memory, exact=exact, prompts=prompts)
            yield part

    return parts()


def _whole(model, tokens, reader, positions, by, senders, top, exact: bool) -> ReaderAttribution:
    """Of all readers, each pass over some prompts used as it comes."""
    request = make_request(as_model(model), tokens, reader, positions, by, senders=senders, top=top)
    prompts = Prompts.of(request.model, request.tokens)
    return gather(request, request.passes(exact), slice(0, request.n_readers), exact=exact, prompts=prompts)
