"""What models write after one prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..arguments import as_text, number, whole
from ..batching import check_next_token, check_tokens
from ..forward import KeysAndValues, Past, run, unembed
from ..lens import LensModel, ModelOrName
from ..metrics import log_probs
from ..models import as_models
from ..results import Result, counted
from ..weights import read_weights


@dataclass(frozen=True, repr=False)
class Samples(Result):
    """Continuations of one prompt: texts, which no figure shows.

    Attributes:
        prompt: the prompt.
        names: the models.
        texts: per model, its continuations, aligned: the i-th of each model were drawn with the same noise.
    """

    prompt: str
    names: tuple[str, ...]
    texts: tuple[tuple[str, ...], ...]

    def summary(self) -> str:
        """One line: of which prompt, and how it goes on."""
        n = counted(len(self.texts[0]) if self.texts else 0, "sample")
        first = f", first {self.texts[0][0]!r}" if self.texts and self.texts[0] else ""
        return f"of {self.prompt!r}: {n} of {counted(len(self.names), 'model')}{first}"

    def picture(self) -> str:
        """The texts, model by model."""
        from ..figures.measured_pictures import of_samples

        return of_samples(self)

    def table(self):
        """One row per sample, a column per model."""
        import pandas as pd

        return pd.DataFrame(dict(zip(self.names, self.texts)))


def generate_samples(
    models: Mapping[str, ModelOrName],
    prompt: str,
    *,
    n_samples: int = 1,
    max_new_tokens: int = 60,
    temperature: float = 1.0,
    top_k: int | None = 50,
    seed: int = 0,
) -> Samples:
    """Continuations by each model, all with the same random numbers, so that they differ only where models do.

    Args:
        models: name -> HookedTransformer or TransformerBridge with a tokenizer.
        temperature: 0 takes the likeliest token throughout.
        top_k: draw from so many likeliest tokens; None: from all.

    Raises:
        ValueError: an empty prompt, no room for the new tokens in a model's context, a model without a tokenizer,
            a negative temperature, top_k or n_samples below 1.

    Example:
        >>> from lnfree_interp import generate_samples, load_model
        >>> model = load_model("tiny-noLN", device="cpu")
        >>> samples = generate_samples({"tiny-noLN": model}, "It was a dark and", max_new_tokens=5)
        >>> samples == generate_samples({"tiny-noLN": model}, "It was a dark and", max_new_tokens=5)
        True
    """
    models = as_models(models)
    if not as_text(prompt, "prompt"):
        raise ValueError("the prompt is empty")
    temperature, seed = number(temperature, "temperature", least=0), whole(seed, "seed")
    n_samples, max_new_tokens = whole(n_samples, "n_samples", least=1), whole(max_new_tokens, "max_new_tokens", least=1)
    top_k = None if top_k is None else whole(top_k, "top_k", least=1)
    texts = []
    for name, model in models.items():
        check_next_token(model)
        if model.tokenizer is None:
            raise ValueError(f"model {name} has no tokenizer, so it cannot read the prompt")
        ids = torch.tensor([model.tokenizer(prompt, add_special_tokens=False)["input_ids"]])
        if ids.shape[1] + max_new_tokens > model.cfg.n_ctx:
            raise ValueError(
                f"a prompt of {ids.shape[1]} tokens and {max_new_tokens} new ones do not fit into the context of "
                f"{model.cfg.n_ctx} of model {name}"
            )
        ids = check_tokens(model, ids).expand(n_samples, -1)
        with torch.no_grad():
            new = _continue(model, ids, max_new_tokens, temperature, top_k, seed)
        texts.append(tuple(model.tokenizer.batch_decode(new.tolist())))
    return Samples(prompt, tuple(models), tuple(texts))


def _continue(model: LensModel, ids: Tensor, n_new: int, temperature: float, top_k: int | None, seed: int) -> Tensor:
    weights = read_weights(model)
    past: Past | None = None
    new: list[Tensor] = []
    generator = torch.Generator().manual_seed(seed)
    step = ids
    for _ in range(n_new):
        if weights is not None:
            keep: KeysAndValues = {}
            resid = run(model, step, past=past, keep=keep, positions=slice(-1, None), weights=weights)
            past = Past(ids.shape[1] + len(new), keep)
        else:
            resid = run(model, torch.cat([ids, *new], 1))
        log_p = log_probs(unembed(model, resid[:, -1])).cpu()
        # Gumbel's trick: the same noise for every model, whatever its logits.
        uniform = torch.rand(log_p.shape, generator=generator, dtype=torch.float64)
        if temperature > 0:
            if top_k is not None and top_k < log_p.shape[1]:
                log_p[log_p < log_p.topk(top_k).values[:, -1:]] = -torch.inf
            log_p = log_p.double() / temperature - (-uniform.log()).log()
        step = log_p.argmax(-1, keepdim=True).to(ids.device)
        new.append(step)
    return torch.cat(new, 1)
