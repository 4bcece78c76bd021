"""Logits -> numbers: per-token cross-entropy, entropy and divergences, and per-prompt metrics for patching.

Every function works on log-probabilities from `log_softmax`, in fp32 at least, and returns nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .arguments import as_text, kind, shown, whole
from .batching import as_ids, check_tokens
from .lens import ModelOrName
from .models import as_model
from .pairs import as_pairs


def _logits(value: Any, what: str = "logits", n_axes: int | None = None) -> Tensor:
    """Logits as they are.

    Raises:
        ValueError: no tensor of fractions [..., d_vocab], or one of another number of axes.
    """
    wanted = "[..., d_vocab]" if n_axes is None else "[batch, pos, d_vocab]"
    if not isinstance(value, Tensor) or not value.is_floating_point():
        given = value.dtype if isinstance(value, Tensor) else kind(value)
        raise ValueError(f"{what} must be a tensor of fractions {wanted}, not {given}")
    if value.ndim == 0 or n_axes not in (None, value.ndim) or 0 in value.shape[-2 if n_axes else -1 :]:
        raise ValueError(f"{what} have shape {list(value.shape)}, wanted is {wanted}")
    return value


def log_probs(logits: Float[Tensor, "*rows d_vocab"]) -> Float[Tensor, "*rows d_vocab"]:
    """log_softmax over the vocabulary, in fp32 at least (nats)."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def cross_entropy(
    logits: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "token_batch token_pos"]
) -> Float[Tensor, "batch pos_less_one"]:
    """Cross-entropy of each next token (nats): entry [b, i] is the loss at position i of predicting i + 1.

    Raises:
        ValueError: logits and tokens do not have the same rows and positions.

    Example:
        >>> import torch
        >>> cross_entropy(torch.zeros(1, 3, 4), torch.tensor([[0, 1, 2]])).exp()
        tensor([[4., 4.]])
    """
    logits, tokens = _logits(logits, n_axes=3), as_ids(tokens, "tokens")
    if logits.shape[:2] != tokens.shape:
        raise ValueError(f"logits are of {list(logits.shape[:2])} tokens, tokens are {list(tokens.shape)}")
    # Gather first, normalise by logsumexp: no second tensor of the logits' size.
    x = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    right = x.gather(-1, tokens[:, 1:, None].to(x.device)).squeeze(-1)
    return x.logsumexp(-1) - right


def entropy(logits: Float[Tensor, "*rows d_vocab"]) -> Float[Tensor, "*rows"]:
    """Entropy of each predicted distribution (nats).

    Example:
        >>> import torch
        >>> entropy(torch.zeros(2, 5)).exp()
        tensor([5., 5.])
    """
    log_p = log_probs(_logits(logits))
    return _not_negative(-_weighted(log_p.exp(), log_p).sum(-1))


def _not_negative(x: Tensor) -> Tensor:
    """0 where rounding has made x negative, with x's own derivatives (clamp would set them to 0 there)."""
    return torch.where(x < 0, x - x.detach(), x)


def _same_shape(logits: Tensor, other: Tensor, names: tuple[str, str]) -> None:
    for value, what in zip((logits, other), names):
        _logits(value, what)
    if logits.shape != other.shape:
        raise ValueError(f"logits have shapes {list(logits.shape)} and {list(other.shape)}: they must be the same")


def _weighted(p: Tensor, x: Tensor) -> Tensor:
    """p * x, and 0 where p is 0 whatever x is there; what is not a number stays so."""
    return torch.where(p == 0, 0.0, p * x)


def kl_divergence(
    logits: Float[Tensor, "*rows d_vocab"], other: Float[Tensor, "*rows d_vocab"]
) -> Float[Tensor, "*rows"]:
    """KL(logits || other) of the predicted distributions (nats, never negative).

    Raises:
        ValueError: logits of different shapes.

    Example:
        >>> import torch
        >>> kl_divergence(torch.tensor([0.0, -1e9]), torch.tensor([0.0, 0.0])).exp()
        tensor(2.)
    """
    _same_shape(logits, other, ("logits", "other"))
    log_p, log_q = log_probs(logits), log_probs(other)
    return _not_negative(_weighted(log_p.exp(), log_p - log_q).sum(-1))


def js_divergence(
    logits_a: Float[Tensor, "*rows d_vocab"], logits_b: Float[Tensor, "*rows d_vocab"]
) -> Float[Tensor, "*rows"]:
    """Jensen-Shannon divergence of the predicted distributions (nats, from 0 to log 2).

    Raises:
        ValueError: logits of different shapes.

    Example:
        >>> import torch
        >>> js_divergence(torch.tensor([0.0, -1e9]), torch.tensor([-1e9, 0.0])).exp()
        tensor(2.)
    """
    _same_shape(logits_a, logits_b, ("logits_a", "logits_b"))
    log_p, log_q = log_probs(logits_a), log_probs(logits_b)
    log_mean = torch.logaddexp(log_p, log_q) - math.log(2)
    left = _weighted(log_p.exp(), log_p - log_mean)
    right = _weighted(log_q.exp(), log_q - log_mean)
    return _not_negative((left + right).sum(-1) / 2)


# ---------------------------------------------------------------------------------------------------------
# One number per prompt, and what of the logits it reads


@dataclass(frozen=True)
class Metric:
    """One number per prompt from its logits, and which of them it reads: nothing else is computed.

    A plain function of full logits [row, pos, d_vocab] that returns [row] is a metric too, only slower, since all
    positions and all tokens must be computed for it: it is one with positions and tokens None. As of every metric its
    rows are prompts, each on its own: the same prompt may come several times, or not at all, in any order and any
    number. What must be known of each prompt, its answers say, `tokens` and `context` tell the function.

    Attributes:
        name: for tables and figures.
        function: (logits [row, read position, read token], *context rows) -> [row].
        positions: positions read, negative ones from the end; None: all.
        tokens: "answers": the pairs' (right, wrong); or Int[Tensor, "prompt k"]; or None: the whole vocabulary.
        context: tensors with one row per prompt that the function needs besides.

    Raises:
        ValueError: no function, tokens or positions that are none.

    Example:
        >>> from lnfree_interp import activation_patching, induction_pairs, load_model
        >>> right = Metric("right_logit", lambda logits: logits[:, -1, 0])  # of the two answers' logits
        >>> model = load_model("tiny-noLN")
        >>> activation_patching(model, induction_pairs(model, 2, length=8), metric=right).values.shape
        torch.Size([2, 8, 8])
    """

    name: str
    function: Callable[..., Tensor] = field(repr=False)
    positions: tuple[int, ...] | None = (-1,)
    tokens: Any = "answers"
    context: tuple[Tensor, ...] = field(default=(), repr=False)

    def __post_init__(self):
        as_text(self.name, "a metric's name")
        if not callable(self.function):
            raise ValueError(f"metric {self.name}: its function must be one of logits, not {shown(self.function)}")
        if isinstance(self.tokens, str) and self.tokens != "answers":
            raise ValueError(f"metric {self.name}: tokens must be 'answers', token ids or None, not {self.tokens!r}")
        if self.tokens is not None and not isinstance(self.tokens, str):
            object.__setattr__(self, "tokens", as_ids(self.tokens, "tokens"))
        if not isinstance(self.context, tuple) or not all(isinstance(c, Tensor) for c in self.context):
            raise ValueError(f"metric {self.name}: context must be a tuple of tensors, not {kind(self.context)}")
        if self.positions is not None:
            several = self.positions if isinstance(self.positions, (tuple, list)) else (self.positions,)
            object.__setattr__(self, "positions", tuple(whole(p, "a position") for p in several))

    def __call__(self, logits: Float[Tensor, "prompt pos d_vocab"], pairs) -> Float[Tensor, " prompt"]:
        """The metric of full logits.

        Raises:
            ValueError: logits that are not [prompt, pos, d_vocab] of the pairs' prompts, positions outside them, and
                tokens or context of another number of prompts.
        """
        pairs = as_pairs(pairs)
        self.check(pairs)
        if logits.ndim != 3 or logits.shape[:2] != pairs.clean.shape:
            wanted = [*pairs.clean.shape, "d_vocab"]
            raise ValueError(f"logits have shape {list(logits.shape)}, these pairs want {wanted}".replace("'", ""))
        logits = logits[:, list(self.reads(logits.shape[1]))]
        tokens = self.columns(pairs)
        if tokens is not None:
            index = tokens[:, None].expand(-1, logits.shape[1], -1).to(logits.device)
            logits = logits.gather(-1, index)
        return self.function(logits, *(c.to(logits.device) for c in self.context))

    def check(self, pairs) -> None:
        """Raise ValueError unless tokens and context are of as many prompts as there are pairs."""
        pairs = as_pairs(pairs)
        own = (self.tokens, *self.context) if isinstance(self.tokens, Tensor) else self.context
        for rows in own:
            if len(rows) != len(pairs):
                raise ValueError(f"metric {self.name} is made for {len(rows)} prompts, there are {len(pairs)} pairs")

    def reads(self, n_pos: int) -> tuple[int, ...]:
        """The positions read, counted from 0, of prompts with n_pos tokens.

        Raises:
            ValueError: one of them is outside the prompt.
        """
        n_pos = whole(n_pos, "n_pos", least=1)
        if self.positions is None:
            return tuple(range(n_pos))
        outside = [p for p in self.positions if not -n_pos <= p < n_pos]
        if outside or not self.positions:
            raise ValueError(f"metric {self.name} reads position {outside}, the prompts have {n_pos} tokens")
        return tuple(p % n_pos for p in self.positions)

    def columns(self, pairs) -> Int[Tensor, "prompt k"] | None:
        """The tokens whose logits are read, for each prompt; None: all."""
        pairs = as_pairs(pairs)
        return pairs.answers if isinstance(self.tokens, str) else self.tokens


def _difference(logits: Tensor) -> Tensor:
    return logits[:, -1, 0] - logits[:, -1, 1]


def _right_log_prob(logits: Tensor, right: Tensor) -> Tensor:
    return log_probs(logits[:, -1]).gather(-1, right[:, None]).squeeze(-1)


def _kl_from(logits: Tensor, reference: Tensor) -> Tensor:
    return kl_divergence(reference, logits[:, -1])


logit_diff = Metric("logit_diff", _difference)
"""Logit of the right answer minus logit of the wrong one, at the last position."""


def right_log_prob(pairs) -> Metric:
    """The metric log p(right answer) at the last position (nats); reads the whole vocabulary there.

    Example:
        >>> from lnfree_interp import activation_patching, induction_pairs, load_model
        >>> model = load_model("tiny-noLN")
        >>> pairs = induction_pairs(model, 2, length=8)
        >>> activation_patching(model, pairs, metric=right_log_prob(pairs)).metric
        'right_log_prob'
    """
    return Metric("right_log_prob", _right_log_prob, tokens=None, context=(as_pairs(pairs).answers[:, 0],))


def kl_from_clean(model: ModelOrName, pairs) -> Metric:
    """The metric KL(clean || patched) of the prediction at the last position (nats): 0 once all is restored.

    Example:
        >>> from lnfree_interp import activation_patching, induction_pairs, load_model
        >>> model = load_model("tiny-noLN")
        >>> pairs = induction_pairs(model, 2, length=8)
        >>> effect = activation_patching(model, pairs, metric=kl_from_clean(model, pairs))
        >>> bool((effect.clean.abs() < 1e-5).all()), bool((effect.corrupted > 0).all())
        (True, True)
    """
    from .forward import run, unembed
    from .weights import final_norm, read_weights, widened_norms

    model = as_model(model)
    clean, weights = check_tokens(model, as_pairs(pairs, model).clean), read_weights(model)
    last, norm = slice(clean.shape[1] - 1, clean.shape[1]), final_norm(model)
    with torch.no_grad():
        if weights is None:
            final = run(model, clean, positions=last)
        else:  # as patching runs it: in fp32 at least, on the weights as stored
            weights = widened_norms(weights)
            norm, entered = weights.ln_final, weights.enter(clean, slice(clean.shape[1]))
            final = run(model, resid=entered, positions=last, weights=weights)
        reference = unembed(model, final, norm=norm)[:, -1]
    return Metric("kl_from_clean", _kl_from, tokens=None, context=(reference,))
