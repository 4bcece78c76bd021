"""The loss of each token of a text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..batching import Tokens, check_next_token, check_tokens
from ..forward import run, unembed
from ..lens import ModelOrName
from ..metrics import log_probs
from ..models import as_model
from ..results import Picture, Prompts, Result, by, drawing
from .loss import LOGITS_PER_PASS


@dataclass(frozen=True, repr=False)
class TokenLosses(Result):
    """The loss of each token, and what was expected in its place; entry [b, i] is of predicting token i + 1.

    Attributes:
        losses: Float[Tensor, "batch pos"], in nats; on the CPU, as all are.
        entropies: Float[Tensor, "batch pos"], of the prediction, in nats.
        top: Int[Tensor, "batch pos"], the token that was found likeliest.
        prompts: what the model read.
    """

    losses: Float[Tensor, "batch pos"]
    entropies: Float[Tensor, "batch pos"]
    top: Int[Tensor, "batch pos"]
    prompts: Prompts | None = None

    def summary(self) -> str:
        """One line: of which model, how many tokens, the mean, the token of the largest loss."""
        batch, pos = self.losses.shape
        i, j = divmod(int(self.losses.argmax()), pos)
        model, worst = "", str(j + 1)
        if self.prompts is not None:
            model, worst = f"of {self.prompts.model}: ", repr(self.prompts.strings[i][j + 1])
        largest = f"largest {self.losses[i, j].item():.3g} of {worst}"
        return f"{model}{by((batch, 'prompt'), (pos, 'token'))}, mean {self.losses.mean().item():.4f} nats; {largest}"

    def picture(self) -> str:
        """The text, each token on a background by its loss; the first, which nothing predicts, in grey."""
        from ..figures.view_pictures import of_token_losses

        return of_token_losses(self)

    def text(self, *, prompt: int = 0) -> Picture:
        """The picture of one prompt.

        Raises:
            ValueError: a prompt that is not there.
        """
        from ..figures.view_pictures import losses_as_text

        return Picture(losses_as_text(self, prompt))

    def plot(self, *, prompt: int = 0):
        """A figure of plotly: loss and entropy of a prompt's tokens.

        Raises:
            ValueError: a prompt that is not there.
            ImportError: there is no plotly.
        """
        with drawing():
            from ..figures.views import token_losses_figure

        return token_losses_figure(self, prompt)

    def table(self):
        """One row per prompt and token from the second on: prompt, position, token, loss, entropy (nats), top."""
        import pandas as pd

        batch, pos = self.losses.shape
        columns: dict = {
            "prompt": [i for i in range(batch) for _ in range(pos)],
            "position": list(range(1, pos + 1)) * batch,
        }
        source = self.prompts or Prompts("", self.top)
        if self.prompts is not None:
            columns["token"] = [word for row in self.prompts.strings for word in row[1:]]
        columns["loss"] = self.losses.flatten().double().tolist()
        columns["entropy"] = self.entropies.flatten().double().tolist()
        columns["top"] = [word for row in source.words(self.top) for word in row]
        return pd.DataFrame(columns)


@torch.no_grad()
def token_losses(model: ModelOrName, tokens: Tokens) -> TokenLosses:
    """Cross-entropy of each token after the first, the entropy of its prediction, and the likeliest token.

    For texts that are looked at; `evaluate_loss` is for data sets.

    Args:
        model: any HookedTransformer or TransformerBridge, or a name.
        tokens: Int[Tensor, "batch pos"], an array or lists of such, a text or a list of texts of one token length.

    Raises:
        ValueError: tokens that are no token ids of the model's, fewer than two positions.

    Example:
        >>> from lnfree_interp import evaluate_loss, token_losses
        >>> text = "It was the best of times"
        >>> abs(token_losses("tiny-noLN", text).losses.mean().item() - evaluate_loss("tiny-noLN", text).mean) < 1e-5
        True
    """
    model = as_model(model)
    check_next_token(model)
    tokens = check_tokens(model, tokens, least=2)
    found = []
    for rows in tokens.split(max(1, LOGITS_PER_PASS // (model.cfg.d_vocab * tokens.shape[1]))):
        log_p = log_probs(unembed(model, run(model, rows)[:, :-1]))
        loss = -log_p.gather(-1, rows[:, 1:, None])[..., 0]
        entropies = -torch.where(log_p == -torch.inf, 0.0, log_p.exp() * log_p).sum(-1)
        found.append((loss.cpu(), entropies.cpu(), log_p.argmax(-1).cpu()))
    losses, entropies, top = (torch.cat(x) for x in zip(*found))
    return TokenLosses(losses, entropies, top, Prompts.of(model, tokens))
