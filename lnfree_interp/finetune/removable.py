"""LayerNorms whose std can be frozen, site by site, in a model that trains.

A LayerNorm is (x - mean) / std * gamma + beta. With std replaced by a constant all that remains is linear and
folds into the matrix W, b that reads it: W' = C diag(gamma / std) W, b' = b + beta W, where C = I - 11^T/d
centres (row vectors throughout, as in TransformerLens and HF's Conv1D).

Sources: P1 = arXiv 2409.13710, P2 = arXiv 2507.02559.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from ..layernorm import is_ln_free


def fold_reader(
    weight: Float[Tensor, "d_model out"],
    bias: Float[Tensor, " out"] | float,
    gain: Float[Tensor, " d_model"],
    beta: Float[Tensor, " d_model"],
) -> tuple[Float[Tensor, "d_model out"], Float[Tensor, " out"]]:
    """What reads a linear LayerNorm, folded: C diag(gain) W and b + beta W, in the dtype given."""
    folded = gain[:, None] * weight
    return folded - folded.mean(0), bias + beta @ weight


class TokenClasses:
    """Where position 0 and the end-of-text tokens of the running batch are: what the treatments go by."""

    def __init__(self, eot: int | list[int] | None):
        self.eot: Any = eot
        self.position0_mask: Bool[Tensor, "1 pos 1"] | None = None
        self.eot_mask: Bool[Tensor, "batch pos 1"] | None = None
        self.wanted = False

    def read(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook of GPT2Model: note the classes of its input_ids."""
        if not self.wanted:
            return
        tokens: Int[Tensor, "batch pos"] | None = args[0] if args else kwargs.get("input_ids")
        cache = kwargs.get("past_key_values")
        if tokens is None or (cache is not None and cache.get_seq_length()):
            raise ValueError("while a treatment is on, the model reads input_ids, whole sequences at a time")
        self.position0_mask = (torch.arange(tokens.shape[1], device=tokens.device) == 0)[None, :, None]
        self.eot_mask = (tokens == self.eot)[:, :, None]


class StdSite(nn.Module):
    """One place that divides by a std: its running average per position class and, once frozen, its constant.

    `average` holds the mean std over positions > 0 and at position 0. It is a buffer, so it is saved with the
    model and resumed exactly; whether the site is frozen is the schedule's to say.
    """

    average: Float[Tensor, " 2"]

    def __init__(self, kind: str, layer: int | None, columns: slice, classes: TokenClasses, like: Tensor):
        super().__init__()
        self.kind, self.layer, self.columns, self.classes = kind, layer, columns, classes
        self.frozen = self.position0 = self.eot = False
        self.latest: Tensor | None = None
        self.pending: list[Tensor] = []
        self.register_buffer("average", torch.full_like(like[:2], float("nan")))

    @property
    def name(self) -> str:
        return self.kind if self.layer is None else f"h.{self.layer} {self.kind}"

    def observe(self, std: Float[Tensor, "batch pos 1"]) -> None:
        """Keep this forward's mean std per class; gradient checkpointing's second forward overwrites it."""
        self.latest = torch.stack((std[:, 1:].mean(), std[:, 0].mean()))

    def inverse(self) -> Tensor:
        """1 / std: one number, or [batch or 1, pos, 1] while a treatment is on."""
        inverse = self.average.reciprocal()
        masks: list[Any] = [self.classes.position0_mask] * self.position0 + [self.classes.eot_mask] * self.eot
        if not masks:
            return inverse[0]
        return torch.where(masks[0] if len(masks) == 1 else masks[0] | masks[1], inverse[1], inverse[0])


def _layer_norm(ln: nn.LayerNorm, x: Tensor, sites: list[StdSite], *, measure: bool) -> Tensor:
    """F.layer_norm, whose kernel has the std for the asking."""
    out, _, rstd = torch.native_layer_norm(x, ln.normalized_shape, ln.weight, ln.bias, ln.eps)
    if measure and sites:
        std = rstd.detach().reciprocal()
        for site in sites:
            site.observe(std)
    return out


class RemovableReader(nn.Module):
    """A LayerNorm and the Conv1D that reads it, in one: the Conv1D's columns may lose the LayerNorm in parts.

    Stands where the Conv1D stood and reads the residual stream; the LayerNorm's own place passes it on. What is
    left of a frozen LayerNorm is applied to the weights or to the activations, whichever is the smaller matrix.
    """

    linear: Any  # a Conv1D
    sites: Any  # a ModuleList of StdSites

    def __init__(self, ln: nn.LayerNorm, linear: nn.Module, sites: list[StdSite]):
        super().__init__()
        self.ln, self.linear, self.sites = ln, linear, nn.ModuleList(sites)
        self.widths = [len(self.linear.bias[site.columns]) for site in sites]

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos out"]:
        live = [site for site in self.sites if not site.frozen]
        normed: Any = _layer_norm(self.ln, x, live, measure=self.training) if live else None
        if len(live) == len(self.sites):
            return self.linear(normed)
        weight, bias, gamma, beta = self.linear.weight, self.linear.bias, self.ln.weight, self.ln.bias
        inverses = {site: site.inverse() for site in self.sites if site.frozen}
        fold = x.shape[0] * x.shape[1] > weight.shape[1]
        if fold and not live and all(inverse.ndim == 0 for inverse in inverses.values()):
            weight, bias = fold_reader(weight, bias, gamma, beta)
            scale = [i.expand(width) for i, width in zip(inverses.values(), self.widths, strict=True)]
            return F.linear(x, (weight * torch.cat(scale)).T, bias)
        centred: Any = None if fold else x - x.mean(-1, keepdim=True)
        parts = []
        columns = zip(self.sites, weight.split(self.widths, dim=1), bias.split(self.widths), strict=True)
        for site, w, b in columns:
            if not site.frozen:
                read = normed
            elif fold:
                w, b = fold_reader(w, b, gamma, beta)
                read = x * inverses[site]
            elif inverses[site].ndim:
                read = torch.addcmul(beta, centred * inverses[site], gamma)
            else:
                read = torch.addcmul(beta, centred, gamma * inverses[site])
            parts.append(F.linear(read, w.T, b))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


class RemovableLayerNorm(nn.LayerNorm):
    """ln_f: its reader, the tied unembedding, is too large to fold into at every step, so it stays a module.

    With `keep_std` on, a training forward leaves its std, with gradient, in `std` for the auxiliary loss.
    """

    def __init__(self, ln: nn.LayerNorm, site: StdSite):
        super().__init__(ln.normalized_shape, eps=ln.eps, device="meta")
        self.weight, self.bias, self.site = ln.weight, ln.bias, site
        self.keep_std = False
        self.std: Float[Tensor, "batch pos"] | None = None

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        if self.keep_std and self.training:
            self.std = (x.var(-1, correction=0) + self.eps).sqrt()
        if not self.site.frozen:
            return _layer_norm(self, x, [self.site], measure=self.training)
        centred = x - x.mean(-1, keepdim=True)
        return torch.addcmul(self.bias, centred, self.weight * self.site.inverse())


def make_removable(model: GPT2LMHeadModel, *, eot: int | None = None) -> GPT2LMHeadModel:
    """Give a GPT-2, in place, LayerNorms whose std can be frozen site by site; its function stays the same.

    No forward is replaced: modules are swapped where ln_1, ln_2 and ln_f are read, and a forward pre-hook
    notes where position 0 and end-of-text tokens are. Sites: "ln_2", "qk", "v" of each layer, and "ln_f".

    Args:
        eot: id of the end-of-text token; None: the model config's eos_token_id.

    Raises:
        ValueError: the model has cross-attention, or is removable or LN-free already.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(vocab_size=50, n_positions=8, n_embd=8, n_layer=1, n_head=2)
        >>> sorted(kind for kind, _ in removal_sites(make_removable(GPT2LMHeadModel(config), eot=0)))
        ['ln_2', 'ln_f', 'qk', 'v']
    """
    if removal_sites(model):
        raise ValueError("model is removable already")
    if model.config.add_cross_attention:
        raise ValueError("model has cross-attention: its LayerNorms are not GPT-2's")
    if is_ln_free(model.config, model.state_dict()):
        raise ValueError("model is LN-free already")
    transformer: Any = model.transformer
    d_model, eos = model.config.n_embd, model.config.eos_token_id
    classes = TokenClasses(eos if eot is None else eot)
    for layer, block in enumerate(transformer.h):

        def site(kind: str, columns: slice, layer=layer, block=block) -> StdSite:
            return StdSite(kind, layer, columns, classes, block.ln_1.bias.detach())

        qk, v = site("qk", slice(0, 2 * d_model)), site("v", slice(2 * d_model, 3 * d_model))
        ln_2 = site("ln_2", slice(None))
        block.attn.c_attn = RemovableReader(block.ln_1, block.attn.c_attn, [qk, v])
        block.mlp.c_fc = RemovableReader(block.ln_2, block.mlp.c_fc, [ln_2])
        block.ln_1, block.ln_2 = nn.Identity(), nn.Identity()
    ln_f = transformer.ln_f
    site_f = StdSite("ln_f", None, slice(None), classes, ln_f.bias.detach())
    transformer.ln_f = RemovableLayerNorm(ln_f, site_f)
    transformer.register_forward_pre_hook(classes.read, with_kwargs=True)
    return model


def removal_sites(model: nn.Module) -> dict[tuple[str, int | None], StdSite]:
    """The sites of a removable model by kind and layer; layer is None for ln_f."""
    return {(m.kind, m.layer): m for m in model.modules() if isinstance(m, StdSite)}


def freeze(
    model: nn.Module, frozen: Collection[tuple[str, int | None]], *, position0: bool = False, eot: bool = False
) -> None:
    """Set which sites divide by their running average from now on; all others divide by their own std.

    Args:
        frozen: (kind, layer) of each such site.
        position0: they use the average of position 0 there.
        eot: "v" sites use the average of position 0 at end-of-text tokens too.

    Raises:
        ValueError: a site that does not exist, or that has no average yet.
    """
    sites = removal_sites(model)
    for name in frozen:
        if name not in sites:
            raise ValueError(f"model has no site {name}")
        if not sites[name].frozen and not sites[name].average.isfinite().all():
            average = sites[name].average.tolist()
            raise ValueError(f"{sites[name].name} has no finite average std to freeze at: {average}")
    for name, site in sites.items():
        site.frozen = name in frozen
        site.position0, site.eot = site.frozen and position0, site.frozen and eot and site.kind == "v"
        site.classes.wanted = bool(frozen) and (position0 or eot)


def collect_std(model: nn.Module) -> None:
    """Note the stds of the last forward; call once per micro-batch."""
    for site in removal_sites(model).values():
        if site.latest is not None:
            site.pending.append(site.latest)
            site.latest = None


@torch.no_grad()
def update_averages(model: nn.Module, momentum: float = 0.9) -> None:
    """Move the running averages towards the collected stds; call once per optimiser step. (P2: momentum 0.9)

    Micro-batches, and processes if there are several, count equally. The first update sets the average.
    """
    sites = [site for site in removal_sites(model).values() if site.pending]
    if not sites:
        return
    batch = torch.stack([torch.stack(site.pending).mean(0) for site in sites])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(batch)
        batch /= dist.get_world_size()
    for site, new in zip(sites, batch, strict=True):
        old = site.average
        old.copy_(torch.where(old.isnan(), new.to(old), momentum * old + (1 - momentum) * new.to(old)))
        site.pending = []


def auxiliary_loss(std: Float[Tensor, "batch pos"], tokens: Int[Tensor, "batch pos"], eot: int) -> Float[Tensor, ""]:
    """mean((std - target)^2) over all positions, target: the mean std of ordinary tokens, detached. (P2)

    Ordinary tokens are neither at position 0 nor end-of-text; a batch without any has no target and loss 0.
    """
    ordinary = tokens != eot
    ordinary[:, 0] = False
    count = ordinary.sum()
    target = (std.detach() * ordinary).sum() / count.clamp(min=1)
    return (std - target).square().mean() * (count > 0)
