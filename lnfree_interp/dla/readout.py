"""The logit lens: what the residual stream would say at each layer, were the layers after it not there.

(nostalgebraist 2020, "interpreting GPT: the logit lens".) The stream x after a layer is read as the final stream is,
by the final norm and W_U. A norm divides by the scale of what it is given, so that what a layer's stream says is no
sum of what components add to the logits. With the scale s of the final stream instead,

    frozen(x) = <x, u> / s + bias        (u a token's direction of W_U as the norm lets it be read)

it is: from layer to layer it grows by the layer's direct logit attribution. The difference of the two is what the norm
makes of the layer; without a norm it is 0, and the lens is exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..batching import Places, Targets, Tokens, check_next_token, check_tokens
from ..forward import run, unembed
from ..layers import wide
from ..lens import LensModel, ModelOrName
from ..metrics import log_probs
from ..models import as_model
from ..results import Prompts, Result, by, drawing
from .readers import Reader
from .reading import resolve

# Tokens per pass, and logits held at a time.
TOKENS_PER_PASS, LOGITS = 2048, 2**25


@dataclass(frozen=True, repr=False)
class LogitLens(Result):
    """What the residual stream says at each layer.

    Attributes:
        points: where: "embed" (the stream before the first layer), "L0", "L1", ... (after each).
        positions: the position in the prompt of each entry along pos.
        logit: Float[Tensor, "point batch pos"], the targets' logit (less that of `versus`) with the final norm applied
            to the stream there; at the last point the model's own.
        frozen: the same with the final stream's scale: `logit - frozen` is what the norm makes of the layer, 0 without.
        top: Int[Tensor, "point batch pos"], the token that it finds likeliest, and
        top_prob: Float[Tensor, "point batch pos"], its probability, from 0 to 1.
        rank: Int[Tensor, "point batch pos"], how many tokens have a larger logit than the target.
        targets, versus: Int[Tensor, "batch pos"], the tokens asked for.
        prompts: what the model read.
    """

    points: tuple[str, ...]
    positions: tuple[int, ...]
    logit: Float[Tensor, "point batch pos"]
    frozen: Float[Tensor, "point batch pos"]
    top: Int[Tensor, "point batch pos"]
    top_prob: Float[Tensor, "point batch pos"]
    rank: Int[Tensor, "point batch pos"]
    targets: Int[Tensor, "batch pos"]
    versus: Int[Tensor, "batch pos"] | None
    prompts: Prompts | None = None

    def summary(self) -> str:
        """One line: of which model, how many points, from where on the target leads, what the norm makes of it."""
        n, batch, pos = self.logit.shape
        model = f"of {self.prompts.model}: " if self.prompts else ""
        error = (self.logit - self.frozen).abs().max().item()
        norm = "exact, there is no norm" if error == 0 else f"the norm makes up to {error:.3g} logits of a layer"
        right = (self.rank[-1] == 0).double().mean().item()
        end = (
            f"in the end the target leads at {right:.0%}"
            if batch * pos > 1
            else f"in the end rank {int(self.rank[-1])}"
        )
        return f"{model}{by((n, 'point'), (batch, 'prompt'), (pos, 'position'))}, in logits; {end}; {norm}"

    def picture(self) -> str:
        """The likeliest tokens at each point, the embeddings first, and how probable they are."""
        from ..figures.view_pictures import of_lens

        return of_lens(self)

    def plot(self, *, prompt: int = 0):
        """A figure of plotly: likeliest tokens by point and token of a prompt; at one position the target's logits.

        Raises:
            ValueError: a prompt that is not there.
            ImportError: there is no plotly.
        """
        with drawing():
            from ..figures.views import lens_figure

        return lens_figure(self, prompt)

    def table(self):
        """One row per point, prompt and position: point, prompt, position, token, target, (versus,) logit, frozen,
        rank, top, top_prob. Logits; probabilities from 0 to 1."""
        import pandas as pd

        n, batch, pos = self.logit.shape
        columns: dict = {
            "point": [point for point in self.points for _ in range(batch * pos)],
            "prompt": [i for _ in range(n) for i in range(batch) for _ in range(pos)],
            "position": list(self.positions) * (n * batch),
        }
        words = self.words()
        columns |= {
            name: [w for row in words[name] for w in row] * n for name in ("token", "target", "versus") if words[name]
        }
        columns["logit"] = self.logit.flatten().double().tolist()
        columns["frozen"] = self.frozen.flatten().double().tolist()
        columns["rank"] = self.rank.flatten().tolist()
        columns["top"] = [w for row in words["top"] for w in row]
        columns["top_prob"] = self.top_prob.flatten().double().tolist()
        return pd.DataFrame(columns)

    def words(self) -> dict[str, tuple[tuple[str, ...], ...]]:
        """The texts of tokens, targets, versus, and (rows of all points after one another) of the likeliest tokens."""
        source = self.prompts or Prompts("", self.targets)
        tokens = tuple(tuple(row[p] for p in self.positions) for row in self.prompts.strings) if self.prompts else ()
        versus = () if self.versus is None else source.words(self.versus)
        return {
            "token": tokens,
            "target": source.words(self.targets),
            "versus": versus,
            "top": source.words(self.top.flatten(0, 1)),
        }


@torch.no_grad()
def logit_lens(
    model: ModelOrName,
    tokens: Tokens,
    targets: Targets | None = None,
    *,
    versus: Targets | None = None,
    positions: Places | None = None,
) -> LogitLens:
    """What the residual stream says after each layer, read as the final one is; exact where there is no norm.

    Args:
        model: any HookedTransformer or TransformerBridge, or a name; with layer norm, RMS norm or none.
        tokens: Int[Tensor, "batch pos"], an array or lists of such, a text or a list of texts of one token length.
        targets, versus, positions: as in `direct_logit_attribution`.

    Returns:
        LogitLens, in logits, on the CPU.

    Raises:
        ValueError: as `direct_logit_attribution`; logits over another vocabulary than the tokens'.

    Example:
        >>> from lnfree_interp import direct_logit_attribution, logit_lens
        >>> text = "It was the best of"
        >>> lens = logit_lens("tiny-noLN", text, " times")
        >>> bool((lens.logit == lens.frozen).all())
        True
        >>> linear = direct_logit_attribution("tiny-noLN", text, " times")
        >>> layer = [linear.labels.index(label) for label in ("L0.attn", "L0.mlp")]
        >>> bool((lens.frozen[1] - lens.frozen[0] - linear.values[layer].sum(0).cpu()).abs().max() < 1e-4)
        True
    """
    model = as_model(model)
    check_next_token(model)
    tokens = check_tokens(model, tokens)
    reading = resolve(model, Reader.logits(targets, versus), tokens, positions)
    assert reading.targets is not None
    points = ("embed", *(f"L{i}" for i in range(model.cfg.n_layers)))
    found: list[list[Tensor]] = []
    step = max(1, TOKENS_PER_PASS // tokens.shape[1])
    for first in range(0, len(tokens), step):
        rows = slice(first, min(first + step, len(tokens)))
        streams = _streams(model, tokens[rows], reading.kept)
        directions, ids = reading.directions(model, rows), reading.targets[rows].flatten()
        last = reading.norm.scale(streams[-1])
        parts = []
        for x in streams:
            read = (wide(x) * directions.u).sum(-1)
            logits = (read / scale[..., 0] + directions.bias for scale in (reading.norm.scale(x), last))
            parts.append([*logits, *_likeliest(model, x, ids)])
        shape = (len(points), -1, len(reading.kept))
        found.append([torch.stack(x).view(shape).cpu() for x in zip(*parts)])
    logit, frozen, top, top_prob, rank = (torch.cat(x, 1) for x in zip(*found))
    return LogitLens(
        points=points,
        positions=tuple(reading.kept),
        logit=logit,
        frozen=logit.clone() if reading.norm.linear else frozen,
        top=top,
        top_prob=top_prob,
        rank=rank,
        targets=reading.targets.cpu(),
        versus=None if reading.versus is None else reading.versus.cpu(),
        prompts=Prompts.of(model, tokens),
    )


def _streams(model: LensModel, tokens: Int[Tensor, "batch pos"], kept: list[int]) -> list[Float[Tensor, "n d_model"]]:
    """Before the first layer and after each, at the kept positions."""
    seen: dict[int, Tensor] = {}

    def look(i: int, x: Tensor) -> None:
        seen[i] = x[:, kept].flatten(0, 1)

    names = ["blocks.0.hook_resid_pre", *(f"blocks.{i}.hook_resid_post" for i in range(model.cfg.n_layers))]
    run(model, tokens, hooks={name: partial(look, i) for i, name in enumerate(names)})
    return [seen[i] for i in range(len(names))]


def _likeliest(
    model: LensModel, x: Float[Tensor, "n d_model"], targets: Int[Tensor, " n"]
) -> tuple[Tensor, Tensor, Tensor]:
    """The likeliest token, its probability, and the rank of the target, some rows at a time."""
    found = []
    for rows, ids in zip(*(y.split(max(1, LOGITS // model.cfg.d_vocab)) for y in (x, targets))):
        log_p = log_probs(unembed(model, rows))
        best, top = log_p.max(-1)
        found.append((top, best.exp(), (log_p > log_p.gather(-1, ids[:, None])).sum(-1)))
    top, prob, rank = (torch.cat(y) for y in zip(*found))
    return top, prob, rank
