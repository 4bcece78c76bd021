"""The laws of this package, measured on a model."""

from __future__ import annotations

from pathlib import Path

from ..arguments import as_path, listener, whole
from ..batching import Progress, Tokens
from ..lens import ModelOrName
from ..models import as_model
from .case import Case, make_case
from .laws import Outcome, laws
from .result import TOLERANCES, Law, ModelCheck
from .ways import ways


def check_model(
    model: ModelOrName,
    tokens: Tokens | None = None,
    *,
    checkpoint: str | Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> ModelCheck:
    """Which laws hold for a model, with the measured errors, and how each analysis is computed for it.

    The model is compared with itself: what this package computes, with its own forward run by TransformerLens under
    plain hooks. Components and cells are samples, drawn by `seed`.

    Args:
        model: a name, or any TransformerLens model.
        tokens: the prompts to try it on; default two short ones, of random tokens where the model has no tokenizer.
        checkpoint: a directory (or name) that holds the model for Hugging Face's transformers, to be compared with too;
            default the model's, where that is given by name.
        progress: told of the laws done.

    Raises:
        ValueError: no TransformerLens model, an unknown name, tokens that are no token ids of the model's or fewer
            than two a prompt.

    Example:
        >>> from lnfree_interp import check_model
        >>> check = check_model("tiny-noLN")
        >>> check.holds, check.failed
        (True, ())
    """
    if checkpoint is None and isinstance(model, (str, Path)):
        checkpoint = model
    model, progress, seed = as_model(model), listener(progress), whole(seed, "seed")
    if checkpoint is not None:
        as_path(checkpoint, "checkpoint")
    case = make_case(model, tokens, checkpoint, seed)
    todo = dict(laws(case))
    tolerance = TOLERANCES[str(case.logits.dtype).removeprefix("torch.")]
    measured = []
    for done, (name, law) in enumerate(todo.items()):
        if progress is not None:
            progress(done, len(todo))
        try:
            measured.append(_measured(name, law(case), tolerance, case))
        except ValueError as refused:
            measured.append(Law(name, None, None, tolerance, " ".join(str(refused).split())))
    found = tuple(ways(case))
    if progress is not None:
        progress(len(todo), len(todo))
    cfg, (n_prompts, n_pos) = model.cfg, case.tokens.shape
    kind = f"{cfg.n_layers} layers, d_model {cfg.d_model}, normalisation {cfg.normalization_type}, {case.logits.dtype}"
    prompts = f"{n_prompts} prompts of {n_pos} tokens"
    return ModelCheck(kind.replace("torch.", ""), prompts, tuple(measured), found)


def _measured(name: str, outcome: Outcome, tolerance: float, case: Case) -> Law:
    found, wanted, *size = outcome
    found, wanted = (x.detach().cpu().double() for x in (found, wanted))
    largest = size[0] if size else case.logits.abs().max().item()
    error, reach = ((x.abs().max() / largest).item() for x in (found - wanted, wanted))
    return Law(name, error, reach, tolerance)
