"""Norms of the residual stream from layer to layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial, reduce

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..arguments import choice, switch, whole
from ..batching import Progress, TokenSource, token_batches
from ..forward import run
from ..lens import LensModel, ModelOrName
from ..models import as_model
from ..results import Result, by, counted, drawing, name_of
from ..running import Moments, Sample, joined, moments

STATISTICS = ("mean", "stderr", "median", "low", "high")
QUANTITIES = ("norm", "growth", "cosine")
GROUPS = ("position 0", "EOT", "rest")
# Numbers kept for medians and ranges, whatever the number of sequences (64 MiB in fp64).
KEPT_NUMBERS = 2**23


@dataclass(frozen=True, repr=False)
class ResidualNorms(Result):
    """L2 norm of the residual stream at each point, growth and cosine similarity from the point before.

    Each sequence gives one number per point and group, the mean over its tokens of that group; the statistics
    are over sequences.

    Attributes:
        points: "embed" and "pos_embed" (the two parts of the stream's beginning, each on its own), then the
            stream itself: "L0.resid_pre" (their sum), "L0.resid_mid", "L0.resid_post", ...
        groups: "position 0", "EOT" (end-of-text tokens elsewhere), "rest"; or "position 0", "position 1", ...
        statistics: "mean", "stderr" (of that mean), "median", and "low" and "high", between which lie 95% of the
            sequences.
        norm: Float[Tensor, "point group statistic"].
        growth: the same for norm / norm at the point before; nan for the two embeddings (L0.resid_pre is
            compared with embed).
        cosine: the same for the cosine similarity with the point before.
        tokens: Int[Tensor, "group"], tokens of each group.
        sequences: Int[Tensor, "group"], sequences with such tokens. Groups without any are nan throughout.
        model: whose stream.
    """

    points: tuple[str, ...]
    groups: tuple[str, ...]
    statistics: tuple[str, ...]
    norm: Float[Tensor, "point group statistic"]
    growth: Float[Tensor, "point group statistic"]
    cosine: Float[Tensor, "point group statistic"]
    tokens: Int[Tensor, " group"]
    sequences: Int[Tensor, " group"]
    model: str = ""

    def summary(self) -> str:
        """One line: of which model, how many points, groups and sequences, the longest."""
        mean = self.norm[..., self.statistics.index("mean")].nan_to_num(nan=-1.0)
        point, group = divmod(int(mean.argmax()), len(self.groups))
        shape = by((len(self.points), "point"), (len(self.groups), "group"))
        longest = f"largest mean norm {mean.max().item():.4g} at {self.points[point]}, {self.groups[group]}"
        over = counted(int(self.sequences.max()), "sequence")
        return f"of the residual stream{f' of {self.model}' * bool(self.model)}: {shape} over {over}; {longest}"

    def picture(self) -> str:
        """A grid of mean norms, points from the embeddings down by groups."""
        from ..figures.measured_pictures import of_norms

        return of_norms(self)

    def plot(self, *, statistic: str = "mean"):
        """A figure of plotly: norm, growth and cosine similarity over the points, a row per group.

        Raises:
            ImportError: there is no plotly.
        """
        choice(statistic, "statistic", self.statistics)
        with drawing():
            from ..figures.norms import norms_figure

        return norms_figure({self.model or "model": self}, statistic=statistic)

    def table(self):
        """One row per point and group; columns such as norm_mean, growth_median, cosine_low."""
        import pandas as pd

        index = [(i, j) for j in range(len(self.groups)) for i in range(len(self.points))]
        table = pd.DataFrame(
            {
                "point": [self.points[i] for i, _ in index],
                "group": [self.groups[j] for _, j in index],
                "tokens": [int(self.tokens[j]) for _, j in index],
            }
        )
        for quantity in QUANTITIES:
            values = getattr(self, quantity)
            for k, statistic in enumerate(self.statistics):
                table[f"{quantity}_{statistic}"] = values[:, :, k].T.flatten().tolist()
        return table


def residual_norms(
    model: ModelOrName,
    tokens: TokenSource,
    *,
    per_position: bool = False,
    eot_token: int | None = None,
    per_pass: int = 4096,
    progress: Progress | None = None,
) -> ResidualNorms:
    """Norm, growth and cosine similarity of the residual stream at every point (P2, residual norms).

    Memory does not grow with the number of tokens: means are running ones; medians and ranges are exact up to
    some ten thousand sequences (a few hundred with per_position) and from a uniform sample of as many beyond.

    Args:
        model: any HookedTransformer or TransformerBridge, or a name. `load_model`'s are centred: norms are those of
            the stream less its mean.
        tokens: Int[Tensor, "batch pos"], or an iterable of such.
        per_position: one group per position, in place of position 0, EOT and the rest.
        eot_token: the end-of-text token; default the tokenizer's, no such group if there is none.
        per_pass: tokens in memory at a time.
        progress: told of the sequences done.

    Raises:
        ValueError: tokens that are no token ids of the model's; sequences of several lengths with per_position.

    Example:
        >>> from lnfree_interp import load_model, residual_norms
        >>> model = load_model("tiny-noLN", device="cpu")
        >>> norms = residual_norms(model, model.to_tokens("It was a dark and stormy night."))
        >>> norms.points[:4], norms.groups
        (('embed', 'pos_embed', 'L0.resid_pre', 'L0.resid_mid'), ('position 0', 'EOT', 'rest'))
    """
    model = as_model(model)
    switch(per_position, "per_position")
    part = norm_sums(
        model, tokens, per_position=per_position, eot_token=eot_token, per_pass=per_pass, progress=progress
    )
    return norms_of([part], model=name_of(model))


@dataclass(frozen=True)
class NormSums:
    """What `ResidualNorms` needs of some sequences; of parts of a set, what `norms_of` merges.

    Attributes:
        counts: Int[Tensor, "two group"], tokens and sequences with such.
        moments: of the sequences' numbers, in columns "point group quantity".
        sample: of those numbers, and which sequences they are.
    """

    points: tuple[str, ...]
    groups: tuple[str, ...]
    counts: Int[Tensor, "two group"]
    moments: Moments
    sample: tuple[np.ndarray, np.ndarray]


def norm_sums(
    model: LensModel,
    tokens: TokenSource,
    *,
    first: int = 0,
    per_position: bool = False,
    eot_token: int | None = None,
    per_pass: int = 4096,
    progress: Progress | None = None,
) -> NormSums:
    """`residual_norms`' statistics of sequences of which the first is number `first` of all."""
    if eot_token is None:
        eot_token = getattr(model.tokenizer, "eos_token_id", None)
    else:
        eot_token = whole(eot_token, "eot_token", least=0)
    names = _points(model)
    sample: Sample | None = None
    sums: Moments | None = None
    groups: tuple[str, ...] = GROUPS
    counts = torch.zeros(2, 1, dtype=torch.long)
    for batch in token_batches(model, tokens, per_pass=per_pass, progress=progress):
        if per_position:
            groups = tuple(f"position {i}" for i in range(batch.shape[1]))
        # Token by token to the CPU, in one copy, and float64 from there on: not every device has it.
        values = torch.stack(_along_stream(model, batch, list(names))).cpu().double()
        batch = batch.cpu()
        if per_position:
            per_sequence, n = (
                rearrange(values, "point quantity b pos -> b point pos quantity"),
                torch.ones_like(batch),
            )
        else:
            per_sequence, n = _by_group(values, _membership(batch, eot_token))
        rows = per_sequence.flatten(1).numpy()
        if sums is None or sample is None:
            sums, sample = moments(rows), _sample_of(rows.shape[1])
        elif sums.n.shape != rows.shape[1:]:
            raise ValueError(f"sequences have {batch.shape[1]} tokens, others another number: no common positions")
        else:
            sums = joined(sums, moments(rows, sums.origin))
        sample.add(np.arange(first, first + len(rows)), rows)
        counts = counts + torch.stack([n.sum(0), (n > 0).sum(0)])
        first += len(rows)
    assert sums is not None and sample is not None  # token_batches gives at least one
    return NormSums(tuple(names.values()), groups, counts.long(), sums, sample.kept())


def norms_of(parts: Sequence[NormSums], *, model: str = "") -> ResidualNorms:
    """The statistics of a set of sequences from those of its parts, whatever the split."""
    points, groups = parts[0].points, parts[0].groups
    sums = reduce(joined, (part.moments for part in parts))
    sample = _sample_of(len(sums.n))
    for part in parts:
        sample.add(*part.sample)
    by_sequence = torch.from_numpy(sample.kept()[1])
    levels = torch.tensor([0.5, 0.025, 0.975], dtype=torch.float64)
    # A few columns at a time: quantile sorts a copy, and takes no more than 2^24 numbers.
    columns = by_sequence.split(max(1, 2**22 // len(by_sequence)), dim=1)
    quantiles = torch.cat([part.nanquantile(levels, dim=0) for part in columns], dim=1)
    mean, stderr = (torch.from_numpy(x) for x in (sums.mean(), sums.stderr()))
    statistics = torch.stack([mean, stderr, *quantiles], -1)
    norm, growth, cosine = statistics.unflatten(0, (len(points), len(groups), len(QUANTITIES))).unbind(2)
    counts = torch.stack([part.counts for part in parts]).sum(0)
    return ResidualNorms(
        points=points,
        groups=groups,
        statistics=STATISTICS,
        norm=norm,
        growth=growth,
        cosine=cosine,
        tokens=counts[0],
        sequences=counts[1],
        model=model,
    )


def _sample_of(columns: int) -> Sample:
    return Sample(columns, max(100, KEPT_NUMBERS // columns))


# ---------------------------------------------------------------------------------------------------------
# One batch along the stream


def _points(model: LensModel) -> dict[str, str]:
    """Hook name -> label, in the order in which a forward passes them."""
    points = {"hook_embed": "embed"}
    # Others' hook point may be there all the same, and nothing passes it.
    if model.cfg.positional_embedding_type not in ("rotary", "alibi"):
        points["hook_pos_embed"] = "pos_embed"
    points["blocks.0.hook_resid_pre"] = "L0.resid_pre"
    for i in range(model.cfg.n_layers):
        points[f"blocks.{i}.hook_resid_mid"] = f"L{i}.resid_mid"
        points[f"blocks.{i}.hook_resid_post"] = f"L{i}.resid_post"
    return {name: label for name, label in points.items() if name in model.hook_dict}


def _along_stream(model: LensModel, tokens: Tensor, names: list[str]) -> list[Float[Tensor, "quantity batch pos"]]:
    """Norm, growth and cosine at each point, one activation kept back at a time."""
    values: dict[str, Tensor] = {}
    before: list[Tensor] = []  # the stream at the point before, and its norm

    def look(name: str, x: Tensor) -> None:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        norm = torch.linalg.vector_norm(x, dim=-1)
        growth = cosine = torch.full_like(norm, torch.nan)
        if before and not name.endswith("embed"):
            previous, previous_norm = before
            growth = norm / previous_norm
            cosine = torch.linalg.vecdot(x / norm[..., None], previous / previous_norm[..., None])
        values[name] = torch.stack([norm, growth, cosine]).expand(-1, len(tokens), -1)
        if name != "hook_pos_embed":
            before[:] = [x, norm]

    with torch.no_grad():
        run(model, tokens, hooks={name: partial(look, name) for name in names})
    return [values[name] for name in names]


def _membership(tokens: Int[Tensor, "batch pos"], eot_token: int | None) -> Bool[Tensor, "group batch pos"]:
    first = (torch.arange(tokens.shape[1], device=tokens.device) == 0).expand_as(tokens)
    eot = (tokens == (-1 if eot_token is None else eot_token)) & ~first
    return torch.stack([first, eot, ~first & ~eot])


def _by_group(
    values: Float[Tensor, "point quantity batch pos"], member: Bool[Tensor, "group batch pos"]
) -> tuple[Float[Tensor, "batch point group quantity"], Int[Tensor, "batch group"]]:
    """Means over each sequence's tokens of each group (nan where there are none), and how many those are."""
    n = member.sum(-1)
    # where, not a product: what explodes in one group must not reach the others as 0 * inf.
    sums = [torch.where(mask, values, 0.0).sum(-1) / count for mask, count in zip(member, n)]
    return rearrange(sums, "group point quantity b -> b point group quantity"), n.T
