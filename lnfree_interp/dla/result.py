"""What attributions are returned as."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..arguments import text_or_none, whole
from ..batching import indices
from ..results import Picture, Prompts, Result, by, counted, drawing


def _aside(kind: str) -> str:
    """What a result named an attribution is in truth."""
    return "" if kind == "attribution" else f"({kind}) "


@dataclass(frozen=True, repr=False)
class LogitAttribution(Result):
    """What each component contributes to a logit, or to the difference of two.

    Attributes:
        values: Float[Tensor, "component batch pos"], in logits.
        labels: one name per component: "embed", "pos_embed", "L3.attn", "L3.mlp", "L3H7", "L3N1021", and "L3.b_O",
            "L3.b_out" for biases where heads or neurons are listed without them; last "hooks", for a model that
            carries hooks of its own: what they add to the final residual stream that no component wrote.
        bias: Float[Tensor, "batch pos"], the part no component owns (b_U, and the final norm's own bias).
            `values.sum(0) + bias` is the model's logit (for `direct_effect` only without LayerNorm).
        positions: the position in the prompt of each entry along pos.
        targets: Int[Tensor, "batch pos"], the tokens whose logit it is, on the CPU;
        versus: those that are subtracted, if any.
        kind: "attribution" or "direct effect".
        prompts: what the model read.
    """

    values: Float[Tensor, "component batch pos"]
    labels: tuple[str, ...]
    bias: Float[Tensor, "batch pos"]
    positions: tuple[int, ...]
    targets: Int[Tensor, "batch pos"] | None = None
    versus: Int[Tensor, "batch pos"] | None = None
    kind: str = "attribution"
    prompts: Prompts | None = None

    def summary(self) -> str:
        """One line: of which logit and model, how many components, the largest."""
        n, batch, pos = self.values.shape
        mean = self.values.mean((1, 2))
        which, on = "", "" if batch * pos == 1 else " on average"
        if n:
            i = int(mean.abs().argmax())
            which = f"; the largest{on} {self.labels[i]} {mean[i].item():+.3g}"
        model = f" in {self.prompts.model}" if self.prompts else ""
        shape = by((n, "component"), (batch, "prompt"), (pos, "position"))
        return f"{_aside(self.kind)}of {self.what}{model}: {shape}, in logits{which}"

    @property
    def what(self) -> str:
        """Whose logit it is, in words: "' her' - ' his'", "the next token"."""
        if self.prompts is None or self.targets is None:
            return "logits" if self.versus is None else "logit differences"
        here = torch.tensor([p for p in self.positions if p + 1 < self.prompts.tokens.shape[1]])
        next_tokens = self.prompts.tokens[:, here + 1] if len(here) == len(self.positions) else None
        named = []
        for ids in (self.targets, self.versus):
            if ids is None:
                continue
            if next_tokens is not None and ids.numel() > 1 and torch.equal(ids, next_tokens):
                named.append("the next token")
            elif ids.numel() and bool((ids == ids.flatten()[0]).all()):
                named.append(repr(self.prompts.words(ids[:1, :1])[0][0]))
            else:
                named.append(f"{counted(len(ids.unique()), 'different token')}")
        return " - ".join(named)

    def picture(self) -> str:
        """At one place bars, at several of one prompt a grid over its tokens, of several prompts their means."""
        from ..figures.pictures import of_logits

        return of_logits(self)

    def plot(self, kind: str | None = None, *, prompt: int | None = None, position: int | None = None, top: int = 20):
        """A figure of plotly.

        Args:
            kind: "waterfall", how components in the model's order add up to the logit; "tokens", component by token of
                one prompt; "heads", layer by head. None: what shows most.
            prompt, position: entries along batch and pos; None: their mean ("tokens": prompt 0).
            top: components of largest size that are shown one by one.

        Raises:
            ValueError: an unknown kind, "heads" without heads, a prompt or position that is not there.
            ImportError: there is no plotly.

        Example:
            >>> from lnfree_interp import direct_logit_attribution
            >>> result = direct_logit_attribution("tiny-noLN", "It was the best of", " times", versus=" days")
            >>> result.plot().layout.title.text
            "' times' - ' days' in tiny-noLN: what adds up to it"
        """
        with drawing():
            from ..figures.dla import attribution_figure

        return attribution_figure(self, text_or_none(kind, "kind"), prompt, position, whole(top, "top", least=1))

    def text(self, component: str | None = None, *, prompt: int = 0) -> Picture:
        """The prompt as running text, each token on a background by what a component contributes there.

        Where the targets are the next tokens, these are coloured; else those at which the logits are.

        Args:
            component: a label; None: all together, the logit without its bias.

        Raises:
            ValueError: a component or prompt that is not there; a result that was made without prompts.
        """
        from ..figures.pictures import logits_as_text

        return Picture(logits_as_text(self, text_or_none(component, "component"), prompt))

    def table(self):
        """One row per component: mean, mean absolute value and standard deviation in logits, largest first."""
        import pandas as pd

        flat = self.values.flatten(1).cpu().double()
        table = pd.DataFrame(
            {
                "component": self.labels,
                "mean": flat.mean(1).numpy(),
                "mean_abs": flat.abs().mean(1).numpy(),
                "std": flat.std(1, unbiased=False).numpy(),
            }
        )
        return table.sort_values("mean_abs", ascending=False, ignore_index=True)

    def cells(self):
        """One row per component, prompt and position: component, prompt, position, token, target, versus, value
        (logits); the bias last, as a component of its own. Tokens are those at the positions."""
        import pandas as pd

        batch, pos = self.bias.shape
        values = torch.cat([self.values, self.bias[None].to(self.values)]).cpu()
        columns: dict = {
            "component": [label for label in (*self.labels, "bias") for _ in range(batch * pos)],
            "prompt": [i for _ in range(len(values)) for i in range(batch) for _ in range(pos)],
            "position": list(self.positions) * (len(values) * batch),
        }
        if self.prompts is not None:
            rows = [[row[p] for p in self.positions] for row in self.prompts.strings]
            words: dict[str, Sequence[Sequence[str]]] = {"token": rows}
            for name, ids in (("target", self.targets), ("versus", self.versus)):
                if ids is not None:
                    words[name] = self.prompts.words(ids)
            columns |= {name: [w for row in of for w in row] * len(values) for name, of in words.items()}
        return pd.DataFrame(columns | {"value": values.flatten().double().numpy()})


@dataclass(frozen=True, repr=False)
class ReaderAttribution(Result):
    """What each component contributes to what readers read of the residual stream.

    Attributes:
        values: Float[Tensor, "reader component batch pos"], in units of what is read (a neuron's pre-activation, a
            query's coordinate, a logit); by source [reader, component, batch, pos, source], the last axis the position
            that a head read from (for what is not moved, its own). With `top` Float[Tensor, "reader top batch pos"].
        labels: one name per component, as in `LogitAttribution`, of those before the readers.
        readers: one name per reader: "L3N17" (".linear" after it for the linear part of a gated MLP), "L2H3.q[5]" or,
            along one direction, "L2H3.q", "L4.resid_mid", "final", "logit", "logit difference".
        bias: Float[Tensor, "reader batch pos"], the part that no component owns. The values' sum over component (and
            source) + `bias` is what is read (for `effect_on` only without a norm; not with `top` or some `senders`).
        positions: the position in the prompt of each entry along pos.
        senders: with `top`, which component each value is of: an index into labels, largest values first.
        sources: with `top` by source, where each value was read from.
        kind: "attribution" or "effect".
        prompts: what the model read.
    """

    values: Float[Tensor, "reader component batch pos *source"]
    labels: tuple[str, ...]
    readers: tuple[str, ...]
    bias: Float[Tensor, "reader batch pos"]
    positions: tuple[int, ...]
    senders: Int[Tensor, "reader component batch pos"] | None = None
    sources: Int[Tensor, "reader component batch pos"] | None = None
    kind: str = "attribution"
    prompts: Prompts | None = None

    def summary(self) -> str:
        """One line: of which readers and model, how many components, in which unit."""
        n_readers, n, batch, pos = self.values.shape[:4]
        more = f" and {counted(n_readers - 1, 'other reader')}" if n_readers > 1 else ""
        model = f" in {self.prompts.model}" if self.prompts else ""
        parts = [(n_readers, "reader")] * (n_readers > 1) + [(n, "component"), (batch, "prompt"), (pos, "position")]
        parts += [(n, "source") for n in self.values.shape[4:]]
        largest = f", of {len(self.labels)} the largest at each" if self.senders is not None else ""
        what = self.readers[0] if self.readers else "nothing"
        return f"{_aside(self.kind)}of what {what}{more} reads{model}: {by(*parts)}{largest}, in units of what is read"

    @property
    def by_source(self) -> bool:
        """Whether its values have an axis of sources."""
        return self.values.ndim == 5

    def picture(self) -> str:
        """Of one reader as `LogitAttribution.picture`, by source the text too; of several a grid of readers."""
        from ..figures.pictures import of_readers

        return of_readers(self)

    def plot(self, reader: int | str = 0, *, prompt: int | None = None, position: int | None = None, top: int = 20):
        """A figure of plotly: readers by components, or of one of them, by name or number, what adds up to its reading.

        With one reader or `prompt` or `position` given it is a waterfall; else a heatmap of means over tokens.

        Raises:
            ValueError: a reader, prompt or position that is not there.
            ImportError: there is no plotly.
        """
        with drawing():
            from ..figures.dla import readers_figure

        return readers_figure(self, self._reader(reader), prompt, position, whole(top, "top", least=1))

    def text(
        self, reader: int | str = 0, *, component: str | None = None, prompt: int = 0, position: int = -1
    ) -> Picture:
        """By source: the prompt as running text, each token by what was read from it, by all components or by one.

        Args:
            position: entry along pos at which the reader reads.

        Raises:
            ValueError: values that are not by source; a reader, component, prompt or position that is not there; a
                result that was made without prompts.

        Example:
            >>> from lnfree_interp import Reader, attribution_to
            >>> her = Reader.logits(" her", " his")
            >>> result = attribution_to("tiny-noLN", "The queen took", her, by="source")
            >>> "took" in result.text()
            True
        """
        from ..figures.pictures import sources_as_text

        return Picture(
            sources_as_text(self, self._reader(reader), text_or_none(component, "component"), prompt, position)
        )

    def _reader(self, reader: int | str) -> int:
        if isinstance(reader, str):
            if reader not in self.readers:
                raise ValueError(f"reader {reader!r} is none of {', '.join(self.readers[:3])}, ...")
            return self.readers.index(reader)
        n = len(self.readers)
        return indices(reader, n, "reader", range(n), "the readers")[0]

    def table(self):
        """One row per reader and component: mean, mean absolute value and standard deviation, largest first.

        By source the sum over sources is shown. With `top`, over the tokens at which a component is among the largest,
        and how often per token it is (by source, more than once where several of its sources are).
        """
        import pandas as pd

        rows = self._rows() if self.senders is None else self._top_rows(self.senders)
        table = pd.DataFrame(rows)
        return table.sort_values("mean_abs", ascending=False, ignore_index=True)

    def cells(self):
        """One row per number: reader, component, prompt, position, token, by source source and source_token, value.

        Each reader's bias is a component of its own, the last; its source is its own position.
        """
        import numpy as np
        import pandas as pd

        n = self.bias.shape  # [reader, batch, pos]
        reader, component, prompt, at, *source = np.indices(tuple(self.values.shape)).reshape(self.values.ndim, -1)
        if self.senders is not None:
            component = self.senders.flatten().cpu().numpy()
        if self.sources is not None:
            source = [self.sources.flatten().cpu().numpy()]
        position = np.asarray(self.positions, dtype=int)
        bias = np.indices(tuple(n)).reshape(3, -1)
        reader, prompt, at = (np.concatenate(both) for both in zip((reader, prompt, at), bias))
        names = np.array([*self.labels, "bias"])
        columns = {
            "reader": np.array(self.readers)[reader],
            "component": names[np.concatenate([component, np.full(n.numel(), len(self.labels))])],
            "prompt": prompt,
            "position": position[at],
        }
        places = {"token": columns["position"]}
        if source:
            places["source_token"] = columns["source"] = np.concatenate([source[0], position[bias[2]]])
        if self.prompts is not None:
            words = np.array(self.prompts.strings, dtype=object)
            columns |= {name: words[prompt, where] for name, where in places.items()}
        values = torch.cat([self.values.flatten(), self.bias.flatten()]).cpu().double().numpy()
        return pd.DataFrame(columns | {"value": values})

    def _rows(self) -> dict:
        values = self.values.sum(-1) if self.by_source else self.values
        flat = values.flatten(2)
        columns = {"mean": flat.mean(2), "mean_abs": flat.abs().mean(2), "std": flat.std(2, unbiased=False)}
        names = {
            "reader": [reader for reader in self.readers for _ in self.labels],
            "component": [label for _ in self.readers for label in self.labels],
        }
        return names | {name: column.flatten().cpu().double().numpy() for name, column in columns.items()}

    def _top_rows(self, senders: Tensor) -> dict:
        import pandas as pd

        reader = torch.arange(len(self.readers), device=senders.device)[:, None].expand_as(senders.flatten(1))
        n_tokens = senders[0, 0].numel()
        flat = pd.DataFrame(
            {
                "reader": reader.flatten().cpu().numpy(),
                "component": senders.flatten().cpu().numpy(),
                "value": self.values.flatten().cpu().double().numpy(),
            }
        )
        flat["size"] = flat["value"].abs()
        groups = flat.groupby(["reader", "component"])
        return {
            "reader": [self.readers[i] for i, _ in groups.groups],
            "component": [self.labels[i] for _, i in groups.groups],
            "per_token": (groups["value"].count() / n_tokens).to_numpy(),
            "mean": groups["value"].mean().to_numpy(),
            "mean_abs": groups["size"].mean().to_numpy(),
            "std": groups["value"].std(ddof=0).to_numpy(),
        }
