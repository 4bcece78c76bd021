"""Norms whose std can be frozen, site by site: the modules that stand in a model that trains.

A LayerNorm is (x - mean) / std * gamma + beta, an RMSNorm x / rms * gamma. With the std (of an RMSNorm: the root mean
square, epsilon included) replaced by a constant all that remains is linear. In training it stays a pass over the
stream, so that a step costs what a plain one does; `export` folds it into the matrix W, b that reads it:
W' = C diag(gamma / std) W, b' = b + beta W, where C = I - 11^T/d centres (row vectors; an RMSNorm has neither C nor
beta).

Sources: P1 = arXiv 2409.13710, P2 = arXiv 2507.02559.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..layernorm import LN_FREE_EPS

# Entries of a site's averages: three classes of tokens.
ORDINARY, POSITION0, MASSIVE = range(3)


def _wide(x: Tensor) -> Tensor:
    """In float32 at least: what stds are computed and summed in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class TokenClasses:
    """Where position 0 and the end-of-text tokens of the running batch are: what the treatments go by."""

    def __init__(self, eot: int | Sequence[int] | None, massive: float | int | None):
        self.eot: list[int] = [] if eot is None else [eot] if isinstance(eot, int) else list(eot)
        self.massive = massive
        self.tokens: Int[Tensor, "batch pos"] | None = None
        self._masks: dict[str, Tensor] = {}

    def read(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook of the model: note its input_ids; the masks are made when asked for."""
        tokens = args[0] if args else kwargs.get("input_ids")
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        self.tokens = None if cache is not None and cache.get_seq_length() else tokens
        self._masks = {}

    def _whole(self) -> Tensor:
        if self.tokens is None:
            raise ValueError("while a treatment is on, the model reads input_ids, whole sequences at a time")
        return self.tokens

    @property
    def at_position0(self) -> Bool[Tensor, "1 pos 1"]:
        if "position0" not in self._masks:
            tokens = self._whole()
            self._masks["position0"] = (torch.arange(tokens.shape[1], device=tokens.device) == 0)[None, :, None]
        return self._masks["position0"]

    @property
    def at_eot(self) -> Bool[Tensor, "batch pos 1"]:
        if "eot" not in self._masks:
            tokens = self._whole()
            mask = torch.zeros_like(tokens, dtype=torch.bool) if not self.eot else tokens == self.eot[0]
            for other in self.eot[1:]:
                mask = mask | (tokens == other)
            self._masks["eot"] = mask[:, :, None]
        return self._masks["eot"]


class StdSite(nn.Module):
    """One place that divides by a std: its running average per class of tokens and, once frozen, its constant.

    `average` holds the mean std of ordinary tokens, at position 0 and, where they are told apart, of massive tokens. It
    is a buffer, so it is saved with the model and resumed exactly; whether the site is frozen is the schedule's to say.
    """

    average: Float[Tensor, " 3"]

    def __init__(self, kind: str, layer: int | None, classes: TokenClasses, like: Tensor):
        super().__init__()
        self.kind, self.layer, self.classes = kind, layer, classes
        self.frozen = self.position0 = self.eot = self.massive = False
        self.latest: Float[Tensor, "parts pos"] | None = None
        self.n_sequences = 0
        self.pending: Float[Tensor, " 6"] | None = None  # sums and counts per class
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.register_buffer("average", torch.full((3,), float("nan"), dtype=dtype, device=like.device))

    @property
    def name(self) -> str:
        return self.kind if self.layer is None else f"h.{self.layer} {self.kind}"

    @property
    def is_constant(self) -> bool:
        """Whether all tokens are divided by one number."""
        return self.frozen and not (self.position0 or self.eot or self.massive)

    def is_massive(self, std: Float[Tensor, "batch pos *one"]) -> Bool[Tensor, "batch pos *one"]:
        times = self.classes.massive or float("inf")
        return std > times * self.average[ORDINARY]  # of none as long as there is no average

    def observe(self, std: Float[Tensor, "batch pos"], total: Float[Tensor, "1 pos"]) -> None:
        """Keep this forward's sums over sequences; gradient checkpointing's second forward overwrites them.

        Rows: all tokens' stds; where massive tokens are told apart: the others', theirs, and how many they are.
        """
        self.latest, self.n_sequences = total, len(std)
        if self.classes.massive is not None:
            massive = self.is_massive(std)
            parts = (std.masked_fill(massive, 0), std.masked_fill(~massive, 0), massive)
            self.latest = torch.stack([part.sum(0, dtype=std.dtype) for part in parts])

    def inverse(self, std: Float[Tensor, "batch pos 1"] | None = None) -> Tensor:
        """1 / std: one number, or [batch or 1, pos, 1] while a treatment is on; `std` is each token's own."""
        inverse = self.average.reciprocal()
        found = inverse[ORDINARY]
        if self.massive and std is not None:
            # A site that has seen none while it lived has no average of theirs.
            theirs = torch.where(inverse[MASSIVE].isnan(), found, inverse[MASSIVE])
            found = torch.where(self.is_massive(std), theirs, found)
        if self.position0:
            found = torch.where(self.classes.at_position0, inverse[POSITION0], found)
        return torch.where(self.classes.at_eot, inverse[POSITION0], found) if self.eot else found


class RemovableNorm(nn.LayerNorm):
    """A LayerNorm or RMSNorm in its own place. Where it has two sites and one is frozen, it passes the stream on.

    Then its readers do its work: each divides by its own site's constant, or normalises if its site is live.
    (It is an nn.LayerNorm in both cases, as optimisers leave those out of weight decay by their type.)
    """

    sites: Any  # kind -> StdSite

    def __init__(self, norm: nn.Module, eps: float, sites: dict[str, StdSite]):
        weight: Any = norm.weight
        bias: Any = getattr(norm, "bias", None)
        super().__init__(len(weight), eps=eps, device="meta", bias=bias is not None)
        self.weight, self.bias = weight, bias
        self.centres = bias is not None
        self.sites = nn.ModuleDict(sites)

    @property
    def passes_on(self) -> bool:
        """Whether its readers do its work, each for its own sites."""
        return len(self.sites) > 1 and any(site.frozen for site in self.sites.values())

    def std_of(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos 1"]:
        """What the norm divides by."""
        x = _wide(x)
        variance = x.var(-1, correction=0, keepdim=True) if self.centres else x.square().mean(-1, keepdim=True)
        return (variance + self.eps).sqrt()

    def normalise(self, x: Float[Tensor, "batch pos d_model"], sites: Collection[StdSite]) -> Tensor:
        """The whole norm, by transformers' own operations; in training these sites note what it divides by."""
        if self.centres:  # F.layer_norm, whose kernel has the std for the asking
            out, _, rstd = torch.native_layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        else:
            rstd = (_wide(x).pow(2).mean(-1, keepdim=True) + self.eps).rsqrt()
            out = self.weight * (_wide(x) * rstd).to(x.dtype)
        if self.training:
            std = rstd.detach().reciprocal().squeeze(-1)
            total = std.sum(0, keepdim=True)
            for site in sites:
                site.observe(std, total)
        return out

    def inverse(self, site: StdSite, x: Float[Tensor, "batch pos d_model"]) -> Tensor:
        """A frozen site's 1 / std; each token's own is looked at only where massive tokens are treated."""
        if not site.massive:
            return site.inverse()
        with torch.no_grad():
            return site.inverse(self.std_of(x))

    def left(self, x: Float[Tensor, "batch pos d_model"], gain: Tensor, beta: Tensor | None) -> Tensor:
        """What is left of a norm without its std: (x - mean) * gain + beta, of an RMSNorm x * gain.

        In one pass over the stream, forward and backward, as what it replaces: the kernel of a LayerNorm with an
        epsilon so large that its std is a constant, which is the published format too.
        """
        if not self.centres:
            return x * gain
        return F.layer_norm(x, self.normalized_shape, gain * LN_FREE_EPS**0.5, beta, LN_FREE_EPS)

    def seen_by(self, site: StdSite, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """The norm as a site has it, live or frozen."""
        if not site.frozen:
            return self.normalise(x, [site])
        gain: Tensor = self.weight
        inverse = self.inverse(site, x)
        if inverse.ndim:
            x = (x * inverse).to(x.dtype)  # inverses are in float32 at least
        else:
            gain = gain * inverse
        return self.left(x, gain, self.bias)

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        if self.passes_on:
            return x
        sites = list(self.sites.values())
        return self.seen_by(sites[0], x) if len(sites) == 1 else self.normalise(x, sites)


class RemovableFinalNorm(RemovableNorm):
    """The final norm, whose std the auxiliary loss is about.

    With `keep_std` on, a training forward leaves its std, with gradient, in `std` for the auxiliary loss. `target` is
    that loss' target: the mean std of ordinary tokens over the step before, nan until there has been one.
    """

    target: Float[Tensor, ""]

    def __init__(self, norm: nn.Module, eps: float, site: StdSite):
        super().__init__(norm, eps, {"ln_f": site})
        self.keep_std = False
        self.std: Float[Tensor, "batch pos"] | None = None
        self.latest: Float[Tensor, " 2"] | None = None  # sum and count of ordinary tokens' stds
        self.pending: Float[Tensor, " 2"] | None = None
        self.register_buffer("target", torch.full_like(site.average[0], float("nan")))

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        site = self.sites["ln_f"]
        if self.keep_std and self.training:
            std = self.std_of(x)
            ordinary = ~(site.classes.at_position0 | site.classes.at_eot)
            self.latest = torch.stack(((std.detach() * ordinary).sum(), ordinary.sum().to(std)))
            self.std = std.squeeze(-1)
        return self.seen_by(site, x)


class RemovableReader(nn.Module):
    """A linear layer that reads a RemovableNorm: parts of its outputs may lose the norm before others.

    Keeps the layer's weights under their names.

    Args:
        sites: of the parts of its outputs.
        widths: of the parts; of GPT-NeoX's queries, keys and values: of one head's, as they go head by head.
    """

    def __init__(self, linear: nn.Module, norm: RemovableNorm, sites: list[StdSite], widths: list[int], in_out: bool):
        super().__init__()
        self.weight, self.bias = linear.get_parameter("weight"), getattr(linear, "bias", None)
        self.in_out, self.widths = in_out, widths
        self.reads = (norm, sites)  # in a tuple, as they are modules of another place

    @property
    def matrix(self) -> Float[Tensor, "out d_model"]:
        """The weight as an nn.Linear has it."""
        return self.weight.T if self.in_out else self.weight

    def split(self, x: Tensor) -> list[Float[Tensor, "group width *rest"]]:
        """The parts of something with a row per output."""
        return list(x.unflatten(0, (-1, sum(self.widths))).split(self.widths, dim=1))

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos out"]:
        norm, sites = self.reads
        weight: Tensor = self.matrix
        bias = self.bias
        if not norm.passes_on:
            return F.linear(x, weight, bias)
        if len(sites) == 1:
            return F.linear(norm.seen_by(sites[0], x), weight, bias)
        if all(site.is_constant for site in sites):
            return self._scaled(x, weight, bias)
        biases: Sequence[Any] = [None] * len(sites) if bias is None else self.split(bias)
        parts = []
        for site, w, b in zip(sites, self.split(weight), biases, strict=True):
            out = F.linear(norm.seen_by(site, x), w.flatten(0, 1), None if b is None else b.flatten())
            parts.append(out.unflatten(-1, (len(w), -1)))
        return torch.cat(parts, dim=-1).flatten(-2)

    def _scaled(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """All parts in one product: each part's constant scales its rows of the weight."""
        norm, sites = self.reads
        scales = torch.cat([site.inverse().expand(width) for site, width in zip(sites, self.widths, strict=True)])
        scale = scales.repeat(len(weight) // len(scales)).to(weight.dtype)
        if norm.bias is not None:  # as a matrix of one row: its gradient has the weight's own layout in memory
            bias = F.linear(norm.bias[None], weight, bias)[0]
        return F.linear(norm.left(x, norm.weight, None), weight * scale[:, None], bias)
