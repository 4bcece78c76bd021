"""Models whose norms can be taken out, site by site, while they train: making them, freezing sites, running averages.

What stands in such a model is in `modules`; where it stands in a GPT-2, GPT-NeoX or Llama says the table of families.

Sources: P1 = arXiv 2409.13710, P2 = arXiv 2507.02559.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..families import FAMILIES, QWEN3, Family
from ..layernorm import is_ln_free
from .modules import MASSIVE, RemovableFinalNorm, RemovableNorm, RemovableReader, StdSite, TokenClasses

# From how many times the average std of ordinary tokens on a token counts as massive, where they are told apart.
TIMES_ORDINARY = 4.0


def family_of(model: nn.Module) -> Family:
    """The family of a model of transformers.

    Raises:
        ValueError: it is of none that norms are removed from.
    """
    family = FAMILIES.get(getattr(getattr(model, "config", None), "model_type", ""))
    classes = [kind.__name__ for kind in type(model).__mro__]  # sharding makes a class of its own
    if family is None or family.architecture not in classes:
        raise ValueError(f"norms are removed from {_served()}, not from a {classes[0]}")
    return family


def _served() -> str:
    return ", ".join(family.architecture for family in FAMILIES.values() if family is not QWEN3)


def check_removable(family: Family, config) -> None:
    """Raises:
    ValueError: a model whose norms cannot all be folded away, or that `load_model` would not read.
    """
    if family.qk_norm:
        raise ValueError(
            f"a {family.architecture} has norms of queries and keys, which fold into no weight: rotary positions come "
            f"between; norms are removed from {_served()}"
        )
    if family.centres and not {"qkv", "mlp"} <= set(family.biased(config)):
        raise ValueError("attention_bias false leaves no bias for the LayerNorm's to fold into: it must be true")
    family.fields(config)


def make_removable(
    model: PreTrainedModel, *, eot: int | list[int] | None = None, massive: float | int | None = None
) -> PreTrainedModel:
    """Give a model, in place, norms whose std can be frozen site by site; its function stays the same.

    No forward is replaced: the norms and the linear layers that read them are swapped for modules that keep their
    weights and names, and a forward pre-hook notes the tokens. Sites: "ln_2", "qk", "v" of each layer, and "ln_f".

    Args:
        model: a GPT2LMHeadModel, GPTNeoXForCausalLM, LlamaForCausalLM, MistralForCausalLM or Qwen2ForCausalLM.
        eot: id or ids of the end-of-text token; None: the model config's eos_token_id.
        massive: keep averages apart for massive tokens, those with a std of more than `massive` times a site's average
            of ordinary tokens (`TIMES_ORDINARY` is a good value); None: there is no such class.

    Raises:
        ValueError: another architecture, a config that cannot be freed of its norms, a model that is removable or
            LN-free already, `massive` not above 1.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(vocab_size=50, n_positions=8, n_embd=8, n_layer=1, n_head=2)
        >>> sorted(kind for kind, _ in removal_sites(make_removable(GPT2LMHeadModel(config), eot=0)))
        ['ln_2', 'ln_f', 'qk', 'v']
    """
    if removal_sites(model):
        raise ValueError("model is removable already")
    if massive is not None and not massive > 1:
        raise ValueError(f"massive is {massive}: it must be above 1, so many times the average std")
    family, config = family_of(model), model.config
    check_removable(family, config)
    if is_ln_free(config, model.state_dict()):
        raise ValueError("model is LN-free already")
    base, eps = model.get_submodule(family.prefix.rstrip(".")), float(getattr(config, family.eps))
    classes = TokenClasses(config.eos_token_id if eot is None else eot, massive)

    def swap(name: str, new: nn.Module) -> None:
        parent, _, child = name.rpartition(".")
        setattr(base.get_submodule(parent), child, new)

    def reader(name: str, norm: RemovableNorm, kinds: Sequence[str], groups: int = 1) -> None:
        linear: Any = base.get_submodule(name)
        out = linear.weight.shape[1 if family.in_out else 0] // groups
        widths = [out] if len(kinds) == 1 else [2 * out // 3, out // 3]
        swap(name, RemovableReader(linear, norm, [norm.sites[kind] for kind in kinds], widths, family.in_out))

    for layer in range(n_layers(model)):
        block = family.block.format(layer)
        for ln, kinds in ((family.ln1, ("qk", "v")), (family.ln2, ("ln_2",))):
            old: Any = base.get_submodule(f"{block}.{ln}")
            norm = RemovableNorm(old, eps, {kind: StdSite(kind, layer, classes, old.weight) for kind in kinds})
            swap(f"{block}.{ln}", norm)
            if kinds == ("ln_2",):
                for name in family.mlp[:-1]:
                    reader(f"{block}.{name}", norm, kinds)
            elif len(family.qkv) == 1:
                groups = config.num_attention_heads if family.by_head else 1
                reader(f"{block}.{family.qkv[0]}", norm, kinds, groups)
            else:
                for name, kind in zip(family.qkv, ("qk", "qk", "v"), strict=True):
                    reader(f"{block}.{name}", norm, (kind,))
    final: Any = final_norm(model)
    swap(family.final, RemovableFinalNorm(final, eps, StdSite("ln_f", None, classes, final.weight)))
    base.register_forward_pre_hook(classes.read, with_kwargs=True)
    return model


def n_layers(model: PreTrainedModel) -> int:
    """How many blocks it has."""
    return int(model.config.num_hidden_layers)


def final_norm(model: nn.Module) -> Any:
    """The norm before the unembedding: of a removable model a RemovableFinalNorm, of another its own."""
    family = family_of(model)
    return model.get_submodule(f"{family.prefix}{family.final}")


def removal_sites(model: nn.Module) -> dict[tuple[str, int | None], StdSite]:
    """The sites of a removable model by kind and layer; layer is None for ln_f."""
    return {(m.kind, m.layer): m for m in model.modules() if isinstance(m, StdSite)}


def freeze(
    model: nn.Module,
    frozen: Collection[tuple[str, int | None]],
    *,
    position0: bool = False,
    eot: bool = False,
    massive: bool = False,
) -> None:
    """Set which sites divide by their running average from now on; all others divide by their own std.

    Args:
        frozen: (kind, layer) of each such site.
        position0: they use the average of position 0 there.
        eot: "v" sites use the average of position 0 at end-of-text tokens too.
        massive: they use the average of massive tokens at tokens that are massive there (nowhere else is a frozen
            site's std computed).

    Raises:
        ValueError: a site that does not exist, or that has no average yet; `massive` without such a class.
    """
    sites = removal_sites(model)
    for name in frozen:
        if name not in sites:
            raise ValueError(f"model has no site {name}")
        if not sites[name].frozen and not sites[name].average[:MASSIVE].isfinite().all():
            average = sites[name].average[:MASSIVE].tolist()
            raise ValueError(f"{sites[name].name} has no finite average std to freeze at: {average}")
        if massive and sites[name].classes.massive is None:
            raise ValueError("massive tokens are not told apart: make_removable(massive=...) says from which std on")
    for name, site in sites.items():
        site.frozen = name in frozen
        site.position0, site.massive = site.frozen and position0, site.frozen and massive
        site.eot = site.frozen and eot and site.kind == "v"


@torch.no_grad()
def collect_std(model: nn.Module) -> None:
    """Note the stds of the last forward; call once per micro-batch."""
    sites = [site for site in removal_sites(model).values() if site.latest is not None]
    if sites:
        latest = torch.stack([site.latest for site in sites if site.latest is not None])  # [site, part, pos]
        ordinary, at0 = latest[:, 0, 1:].sum(-1), latest[:, :2, 0].sum(-1)
        n_sequences, n_pos = sites[0].n_sequences, latest.shape[-1]
        massive = n_massive = torch.zeros_like(ordinary)
        if latest.shape[1] > 1:
            massive, n_massive = latest[:, 1, 1:].sum(-1), latest[:, 2, 1:].sum(-1)
        counts = (n_sequences * (n_pos - 1) - n_massive, torch.full_like(ordinary, n_sequences), n_massive)
        for site, row in zip(sites, torch.stack((ordinary, at0, massive, *counts), dim=-1), strict=True):
            site.pending = row if site.pending is None else site.pending + row
            site.latest = None
    for norm in model.modules():
        if isinstance(norm, RemovableFinalNorm) and norm.latest is not None:
            norm.pending = norm.latest if norm.pending is None else norm.pending + norm.latest
            norm.latest = None


@torch.no_grad()
def update_averages(model: nn.Module, momentum: float | int = 0.9) -> None:
    """Move the running averages towards the step's, and set the auxiliary loss' target; call once per step. (P2)

    A step's average is over all its tokens of a class, in all micro-batches and processes: how a step is cut into them
    changes nothing. The first step sets the average; a step without tokens of a class leaves it.
    """
    sites = [site for site in removal_sites(model).values() if site.pending is not None]
    final = [m for m in model.modules() if isinstance(m, RemovableFinalNorm) and m.pending is not None]
    rows: list[Any] = [site.pending for site in sites]
    rows += [F.pad(norm.pending[:, None], (0, 2)).flatten() for norm in final if norm.pending is not None]
    if not rows:
        return
    totals = torch.stack(rows)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(totals)
    sums, counts = totals.unflatten(-1, (2, 3)).unbind(1)
    means = sums / counts  # nan where nothing was counted
    for site, new, count in zip(sites, means[: len(sites)], counts[: len(sites)], strict=True):
        old = site.average
        moved = torch.where(old.isnan(), new.to(old), momentum * old + (1 - momentum) * new.to(old))
        old.copy_(torch.where(count > 0, moved, old))
        site.pending = None
    for norm in final:
        norm.target.copy_(torch.where(counts[-1, 0] > 0, means[-1, 0].to(norm.target), norm.target))
        norm.pending = None


def auxiliary_loss(std: Float[Tensor, "batch pos"], target: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """mean((std - target)^2) over all positions; 0 while the target is nan. (P2)

    The target is the final norm's: the mean std of ordinary tokens, neither at position 0 nor end-of-text, over the
    whole step before (P2: of the running batch, which is a step's in one forward), so that no gradient pulls it along
    and the size of micro-batches does not matter.
    """
    return (std - torch.where(target.isnan(), std.detach(), target)).square().mean()
