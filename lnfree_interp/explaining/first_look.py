"""Where a logit after a prompt comes from: attribution and exact effect, by component and by head, and by token."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..batching import Targets, Tokens, check_next_token, check_tokens, target_ids
from ..dla import Reader, attribution_to, logit_attributions
from ..forward import run, unembed
from ..lens import LensModel, ModelOrName
from ..metrics import log_probs
from ..models import as_model
from ..results import Prompts
from ..weights import normalises_writes
from .result import Explanation

# Next tokens that are told of.
PREDICTIONS = 5


@torch.no_grad()
def explain(
    model: ModelOrName, prompt: Tokens, target: Targets | None = None, versus: Targets | None = None
) -> Explanation:
    """A first look at a prompt: what the logit after it comes from, by component, head and token.

    Args:
        model: any HookedTransformer or TransformerBridge, or a name.
        prompt: a text, or token ids [pos] or [1, pos].
        target: a text of one token, or its id; None: the most likely next token.
        versus: another one, whose logit is subtracted.

    Returns:
        Explanation in logits: direct logit attribution (the norm's scale as it is) beside the exact direct effect (the
        norm computed again without the component), which are one where there is no norm; and what came from each
        token, directly or moved by a head. Of a model that normalises what its blocks write, by component alone.

    Raises:
        ValueError: several prompts, none, or one beyond the model's context; a target that is not one token.

    Example:
        >>> from lnfree_interp import explain
        >>> found = explain("tiny-noLN", "She put on", " her", versus=" his")
        >>> found.error < 1e-4, bool((found.by_token.sum() + found.attribution.bias.sum() - found.logit).abs() < 1e-4)
        (True, True)
    """
    model = as_model(model)
    check_next_token(model)
    tokens = _one_prompt(model, prompt)
    logits = _last_logits(model, tokens)
    chosen = int(logits.argmax()) if target is None else _one_target(model, target, "target")
    against = None if versus is None else _one_target(model, versus, "versus")
    if chosen == against:
        raise ValueError(f"target and versus are both token {chosen}: there is no difference to explain")
    asked: dict[str, Any] = {"targets": [chosen], "versus": None if against is None else [against]}
    attribution, effect = logit_attributions(model, tokens, **asked)
    of_heads, effects_of_heads, by_token = None, None, None
    if not normalises_writes(model):
        of_heads, effects_of_heads = logit_attributions(model, tokens, **asked, by="head")
        sources = attribution_to(model, tokens, Reader.logits(**asked), by="source")
        by_token = sources.values[0, :, 0, 0].sum(0).cpu()
    p = log_probs(logits).exp()
    top = p.topk(min(PREDICTIONS, len(p)))
    return Explanation(
        attribution=attribution,
        effect=effect,
        head_attribution=of_heads,
        head_effect=effects_of_heads,
        by_token=by_token,
        target=chosen,
        versus=against,
        logit=float(logits[chosen] - (0.0 if against is None else logits[against])),
        probabilities=(float(p[chosen]), None if against is None else float(p[against])),
        predictions=tuple(zip(top.indices.tolist(), top.values.tolist())),
        prompts=Prompts.of(model, tokens),
    )


def _one_prompt(model: LensModel, prompt: Tokens) -> Tensor:
    if isinstance(prompt, Tensor) and prompt.ndim == 1:
        prompt = prompt[None]
    elif isinstance(prompt, (list, tuple)) and prompt and isinstance(prompt[0], int):
        prompt = [prompt]
    tokens = check_tokens(model, prompt)
    if len(tokens) != 1:
        raise ValueError(f"an explanation is of one prompt, not of {len(tokens)}")
    return tokens


def _one_target(model: LensModel, target: Targets, what: str) -> int:
    ids = target_ids(model, target, 1, what)
    if ids.shape != (1,):
        raise ValueError(f"{what} has shape {list(ids.shape)}; an explanation is of one token's logit")
    return int(ids)


def _last_logits(model: LensModel, tokens: Tensor) -> Float[Tensor, " d_vocab"]:
    n = tokens.shape[1]
    return unembed(model, run(model, tokens, positions=slice(n - 1, n)))[0, -1].float()
