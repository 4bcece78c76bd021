"""Attention patterns: where heads look."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from ..arguments import text_or_none, whole
from ..batching import Places, Tokens, check_tokens, indices
from ..forward import run
from ..lens import ModelOrName
from ..models import as_model
from ..results import Picture, Prompts, Result, by, counted, drawing


@dataclass(frozen=True, repr=False)
class AttentionPatterns(Result):
    """Where heads look: the share of attention that each query puts on each key.

    Attributes:
        labels: "L0H0", "L0H1", ...
        values: Float[Tensor, "head batch query key"], from 0 to 1, on the CPU; 0 where a query may not look.
        prompts: what the model read.
    """

    labels: tuple[str, ...]
    values: Float[Tensor, "head batch query key"]
    prompts: Prompts | None = None

    def summary(self) -> str:
        """One line: of which model, how many heads and tokens."""
        n, batch, pos = self.values.shape[:3]
        model = f" in {self.prompts.model}" if self.prompts else ""
        first = f", {self.labels[0]} to {self.labels[-1]}" if n > 1 else f", {self.labels[0]}"
        return f"of {counted(n, 'head')}{first}{model}: {by((batch, 'prompt'), (pos, 'token'))}, shares of attention"

    def picture(self) -> str:
        """Of one head query by key, of several a small picture each, layer 0 at the top; of the first prompt."""
        from ..figures.view_pictures import of_patterns

        return of_patterns(self)

    def plot(self, head: str | None = None, *, prompt: int = 0):
        """A figure of plotly: query by key of a head, to be chosen among all where none is given.

        Raises:
            ValueError: a head or prompt that is not there.
            ImportError: there is no plotly.

        Example:
            >>> from lnfree_interp import attention_patterns
            >>> attention_patterns("tiny-noLN", "It was the best of times", layers=1).plot("L1H0").data[0].type
            'heatmap'
        """
        with drawing():
            from ..figures.views import patterns_figure

        return patterns_figure(self, text_or_none(head, "head"), prompt)

    def circuitsvis(self, layer: int = 0, *, prompt: int = 0) -> Picture:
        """A layer's heads as the package circuitsvis (1.43) shows them in a notebook, with its script in the page.

        By itself that package asks a host whether there is a network, and then takes its script from a CDN.

        Raises:
            ValueError: a layer none of whose heads is here, a prompt that is not there.
            ImportError: there is no circuitsvis.
        """
        layer = whole(layer, "layer", least=0)
        try:
            from circuitsvis.attention import attention_heads
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != "circuitsvis":
                raise
            raise ImportError("circuitsvis() shows with another package: pip install circuitsvis") from None
        chosen = [i for i, label in enumerate(self.labels) if label.startswith(f"L{layer}H")]
        if not chosen or self.prompts is None:
            raise ValueError(f"no head of layer {layer} is among {self.labels[0]} to {self.labels[-1]}")
        n = len(self.prompts)
        at = indices(prompt, n, "prompt", range(n), "the prompts")[0]
        names = [self.labels[i] for i in chosen]
        tokens = list(self.prompts.strings[at])
        shown = attention_heads(attention=self.values[chosen, at], tokens=tokens, attention_head_names=names)
        return Picture(shown.local_src)

    def table(self):
        """One row per head, prompt, query and key from the first to the query: head, prompt, query, key, query_token,
        key_token, attention (from 0 to 1)."""
        import pandas as pd

        n, batch, pos = self.values.shape[:3]
        query, key = torch.tril_indices(pos, pos)
        columns: dict = {
            "head": [label for label in self.labels for _ in range(batch * len(query))],
            "prompt": [i for _ in range(n) for i in range(batch) for _ in range(len(query))],
            "query": query.tolist() * (n * batch),
            "key": key.tolist() * (n * batch),
        }
        if self.prompts is not None:
            strings = self.prompts.strings
            for name, where in (("query_token", query.tolist()), ("key_token", key.tolist())):
                columns[name] = [row[p] for row in strings for p in where] * n
        columns["attention"] = self.values[:, :, query, key].flatten().double().tolist()
        return pd.DataFrame(columns)


def attention_patterns(
    model: ModelOrName, tokens: Tokens, *, layers: Places | None = None, heads: Places | None = None
) -> AttentionPatterns:
    """The attention patterns of heads, with the tokens they are between.

    Args:
        model: any HookedTransformer or TransformerBridge, or a name.
        tokens: Int[Tensor, "batch pos"], an array or lists of such, a text or a list of texts of one token length.
        layers: which; negative ones count from the end; None: all.
        heads: which of each of these layers; None: all.

    Returns:
        AttentionPatterns: heads x prompts x positions^2 numbers.

    Raises:
        ValueError: tokens that are no token ids of the model's, a layer or head that is not there.

    Example:
        >>> from lnfree_interp import attention_patterns
        >>> found = attention_patterns("tiny-noLN", "It was the best of times", layers=[0, -1], heads=1)
        >>> len(found.labels), bool(((found.values.sum(-1) - 1).abs() < 1e-5).all())
        (2, True)
    """
    model = as_model(model)
    tokens = check_tokens(model, tokens)
    n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
    at = list(range(n_layers)) if layers is None else indices(layers, n_layers, "layer", range(n_layers), "the layers")
    of = list(range(n_heads)) if heads is None else indices(heads, n_heads, "head", range(n_heads), "the heads")
    seen: dict[int, Tensor] = {}

    def look(i: int, pattern: Tensor) -> None:
        seen[i] = pattern[:, of].detach().to("cpu", copy=True).transpose(0, 1)

    with torch.no_grad():
        run(model, tokens, hooks={f"blocks.{i}.attn.hook_pattern": partial(look, i) for i in at})
    labels = tuple(f"L{i}H{h}" for i in at for h in of)
    return AttentionPatterns(labels, torch.cat([seen[i] for i in at]), Prompts.of(model, tokens))
