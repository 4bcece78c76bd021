"""What an explanation is: attributions and effects of one logit, and tables and pictures of them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from ..arguments import choice, text_or_none, whole
from ..dla import HEADS, LogitAttribution
from ..results import Prompts, Result, drawing
from ..statistics import ratio


@dataclass(frozen=True, repr=False)
class Explanation(Result):
    """Where the logit after a prompt, or the difference of two, comes from.

    Attributes:
        attribution, effect: direct logit attribution and the exact direct effect of each component, at the last
            position, in logits; the attribution's sum and its bias are the logit.
        head_attribution, head_effect: the same by head; None of a model that normalises what its blocks write.
        by_token: Float[Tensor, "pos"], the part of the logit that came from each position, at the last position
            directly or moved there by a head: the attribution by source. Its sum and the bias are the logit.
        target, versus: the token whose logit it is, and the one whose logit is subtracted.
        logit: what is explained.
        probabilities: of the two as the next token.
        predictions: (token, probability) of the most likely next tokens.
        prompts: the prompt and its model.
    """

    attribution: LogitAttribution
    effect: LogitAttribution
    head_attribution: LogitAttribution | None
    head_effect: LogitAttribution | None
    by_token: Float[Tensor, " pos"] | None
    target: int
    versus: int | None
    logit: float
    probabilities: tuple[float, float | None]
    predictions: tuple[tuple[int, float], ...]
    prompts: Prompts

    @property
    def what(self) -> str:
        """Whose logit it is: "' her' - ' his'"."""
        target = repr(self.word(self.target))
        return target if self.versus is None else f"{target} - {self.word(self.versus)!r}"

    def word(self, token: int) -> str:
        """A token's text; its number where there is no tokenizer."""
        token, tokenizer = whole(token, "token", least=0), self.prompts.tokenizer
        return str(token) if tokenizer is None else tokenizer.decode([token])

    @property
    def error(self) -> float:
        """How far the attribution is from the exact effect: sum |attribution - effect| / sum |effect|, over the heads,
        or over the components where there are none."""
        approximate, exact = self.head_attribution, self.head_effect
        if approximate is None or exact is None:
            approximate, exact = self.attribution, self.effect
        heads = [i for i, label in enumerate(exact.labels) if re.fullmatch(HEADS, label)]
        a, e = (x.values.detach().cpu().double().flatten(1) for x in (approximate, exact))
        if heads:
            a, e = a[heads], e[heads]
        return float(ratio((a - e).abs().sum().numpy(), e.abs().sum().numpy()))

    def parts(self, kind: str) -> list[tuple[str, float, float]]:
        """(name, attribution, effect) of each "component" or "head", in the model's order."""
        choice(kind, "kind", ("component", "head"))
        both = (self.attribution, self.effect) if kind == "component" else (self.head_attribution, self.head_effect)
        approximate, exact = both
        if approximate is None or exact is None:
            return []
        numbers = zip(approximate.values.flatten().tolist(), exact.values.flatten().tolist())
        named = [(label, a, e) for label, (a, e) in zip(exact.labels, numbers)]
        return [row for row in named if kind == "component" or re.fullmatch(HEADS, row[0])]

    def table(self):
        """One row per component, head and token: kind, name, attribution, effect (logits), the largest of each kind
        first. Tokens, named by position and text, have an attribution alone."""
        import pandas as pd

        rows: list[tuple] = []
        for kind in ("component", "head"):
            rows += [(kind, *row) for row in sorted(self.parts(kind), key=lambda row: -abs(row[1]))]
        if self.by_token is not None:
            tokens = [(f"{i} {s}", value) for i, (s, value) in enumerate(zip(self.strings, self.by_token.tolist()))]
            rows += [("token", *row, float("nan")) for row in sorted(tokens, key=lambda row: -abs(row[1]))]
        return pd.DataFrame(rows, columns=["kind", "name", "attribution", "effect"])

    @property
    def strings(self) -> tuple[str, ...]:
        """The prompt's tokens as text."""
        return self.prompts.strings[0]

    def summary(self) -> str:
        """Whose logit after which prompt in which model, how likely, the largest component, and the error."""
        right, wrong = self.probabilities
        likely = f"{right:.1%}" if wrong is None else f"{right:.1%} against {wrong:.1%}"
        name, value, _ = max(self.parts("component"), key=lambda row: abs(row[1]))
        return (
            f"{self.what} after {len(self.strings)} tokens in {self.prompts.model}: "
            f"{self.logit:+.3g} logits, {likely}; the largest component {name} {value:+.3g}; "
            f"attribution differs from the exact effect by {self.error:.2%}"
        ).replace("\n", "⏎")

    def picture(self) -> str:
        """The next tokens, the prompt coloured by what came from each token, components and heads with both numbers."""
        from ..figures.first_look import explanation_picture

        return explanation_picture(self)

    def plot(self, *, title: str | None = None):
        """Attribution and exact effect of the largest heads and MLPs, and what came from each token, as a figure of
        plotly."""
        with drawing():
            from ..figures.explanations import explanation_figure

        return explanation_figure({self.prompts.model: self}, title=text_or_none(title, "title"))
