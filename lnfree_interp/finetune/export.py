"""A removable model with every site frozen, as a plain checkpoint in the published format."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ..families import FAMILIES
from ..layernorm import LN_FREE_EPS, as_double
from .modules import RemovableFinalNorm, RemovableNorm, RemovableReader
from .removable import family_of, removal_sites


def whole(x: Tensor, *, copied: bool = False) -> Tensor:
    """A weight without autograd; a sharded one (a DTensor) gathered on the CPU, which all processes take part in."""
    if isinstance(x, DTensor):
        with torch.no_grad():
            return x.full_tensor().to("cpu", copy=copied)
    return x.detach().clone() if copied else x.detach()


@torch.no_grad()
def plain_state(model: PreTrainedModel, instead: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Copies of the weights that a plain model of its class has; sharded ones gathered one at a time, on the CPU.

    All processes take part, and each gets the whole. Of weights that are tied there is one copy.

    Args:
        instead: name -> what to take in place of a copy.
    """
    copies: dict[int, Tensor] = {}
    state = {}
    for name, weight in model.state_dict(keep_vars=True).items():
        if ".sites." in name or name.endswith(".target"):
            continue
        if instead and name in instead:
            state[name] = instead[name]
            continue
        if id(weight) not in copies:
            copies[id(weight)] = whole(weight, copied=True)
        state[name] = copies[id(weight)]
    return state


@torch.no_grad()
def export_ln_free(model: PreTrainedModel, config=None) -> PreTrainedModel:
    """A removable model whose sites are all frozen, as a plain model of its class in the published format. (P1)

    gamma / std, beta and the centring are folded in float64; the config's epsilon is 1e12, the norms of the blocks have
    weight 1e6 and bias 0. The final one keeps its bias, if it has one, and weight gamma / std * 1e6: the head may be
    tied and has no bias. Sharded weights (DTensors of `fully_shard`) are gathered one at a time: all processes call
    this, and each gets the whole model, on the CPU.

    Args:
        config: what the result's config is copied from; None: the model's own.

    Raises:
        ValueError: a site is not frozen, or a treatment is still on.

    Example:
        >>> import torch
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from lnfree_interp.finetune.removable import collect_std, freeze, update_averages
        >>> from lnfree_interp.finetune.removable import make_removable, removal_sites
        >>> from lnfree_interp.layernorm import is_ln_free
        >>> config = GPT2Config(vocab_size=50, n_positions=8, n_embd=8, n_layer=1, n_head=2)
        >>> model = make_removable(GPT2LMHeadModel(config), eot=0).train()
        >>> _ = model(torch.randint(1, 50, (2, 8)))
        >>> collect_std(model)
        >>> update_averages(model)
        >>> freeze(model, removal_sites(model))
        >>> plain = export_ln_free(model)
        >>> plain.config.layer_norm_epsilon, is_ln_free(plain.config, plain.state_dict())
        (1000000000000.0, True)
    """
    sites = removal_sites(model)
    if not sites:
        raise ValueError("model is not removable: make_removable and freeze come first")
    for site in sites.values():
        if not site.frozen:
            raise ValueError(f"model is not LN-free: {site.name} is not frozen")
        if site.position0 or site.eot or site.massive:
            raise ValueError(
                f"model is not LN-free: {site.name} treats position 0, end-of-text or massive tokens apart"
            )
    changed: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        new: dict[str, Tensor] = {}
        if isinstance(module, RemovableReader):
            new = _folded(module)
        elif isinstance(module, RemovableFinalNorm):
            gain = as_double(whole(module.weight)) * as_double(module.sites["ln_f"].inverse())
            new = {"weight": gain * LN_FREE_EPS**0.5}
        elif isinstance(module, RemovableNorm):
            new = {"weight": torch.full(module.normalized_shape, LN_FREE_EPS**0.5)}
            if module.bias is not None:
                new["bias"] = torch.zeros(module.normalized_shape)
        for part, value in new.items():
            like = getattr(module, part)
            device = "cpu" if isinstance(like, DTensor) else like.device
            changed[f"{path}.{part}"] = value.to(device, like.dtype)
    config = copy.deepcopy(model.config if config is None else config)
    setattr(config, family_of(model).eps, LN_FREE_EPS)
    return plain_model(config, plain_state(model, changed))


def _folded(reader: RemovableReader) -> dict[str, Tensor]:
    """Weight and bias of what reads a norm whose sites are frozen, in float64."""
    norm, sites = reader.reads
    gamma, beta = as_double(whole(norm.weight)), None if norm.bias is None else as_double(whole(norm.bias))
    matrix = as_double(whole(reader.weight))
    weights = reader.split(matrix.T if reader.in_out else matrix)
    biases: Any = [None] * len(sites) if reader.bias is None else reader.split(as_double(whole(reader.bias)))
    parts = []
    for site, w, b in zip(sites, weights, biases, strict=True):
        folded = w * (gamma * as_double(site.inverse()))
        if norm.centres:
            folded -= folded.mean(-1, keepdim=True)
        parts.append((folded, b if beta is None else w @ beta + b))
    weight = torch.cat([w for w, _ in parts], dim=1).flatten(0, 1)
    new = {"weight": weight.T if reader.in_out else weight}
    if reader.bias is not None:
        new["bias"] = torch.cat([b for _, b in parts], dim=1).flatten()
    return new


def plain_model(config, state: Mapping[str, Tensor]) -> PreTrainedModel:
    """A model of a config's family in eval mode of exactly these tensors: nothing is initialised, nothing copied."""
    family = FAMILIES[config.model_type]
    with torch.device("meta"):
        model = getattr(transformers, family.architecture)(copy.deepcopy(config))
    own, older = model.state_dict().keys(), {name: stored for stored, name in family.renamed}
    state = {name if name in own else older.get(name, name): weight.detach() for name, weight in state.items()}
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    device = next(iter(state.values())).device
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):  # frequencies of positions: not saved
            model.set_submodule(name, type(module)(config=model.config).to(device))
    return model.eval()
