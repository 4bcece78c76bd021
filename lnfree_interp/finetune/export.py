"""A removable model with every site frozen, as a plain checkpoint in the published format."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from ..layernorm import LN_FREE_EPS, as_double
from .removable import RemovableReader, fold_reader, removal_sites


def _named_weights(model: GPT2LMHeadModel) -> Iterator[tuple[str, Tensor]]:
    """Copies of a removable model's weights that are the same in a plain GPT-2."""
    for name, weight in model.state_dict().items():
        if not any(part in name for part in (".ln.", ".linear.", ".sites.", "ln_f.")):
            yield name, weight.clone()


@torch.no_grad()
def export_ln_free(model: GPT2LMHeadModel, config=None) -> GPT2LMHeadModel:
    """A removable model whose sites are all frozen, as a plain GPT2LMHeadModel in the published format. (P1)

    gamma / std, beta and the centring are folded in float64; layer_norm_epsilon is 1e12, ln_1 and ln_2 have
    weight 1e6 and bias 0. ln_f keeps its bias, and weight gamma / std * 1e6, as the tied head has no bias.

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
        if site.position0 or site.eot:
            raise ValueError(f"model is not LN-free: {site.name} treats position 0 or end-of-text apart")
    state, root_eps = dict(_named_weights(model)), LN_FREE_EPS**0.5
    transformer: Any = model.transformer
    for layer, block in enumerate(transformer.h):
        for i, owner, name in ((1, block.attn, "c_attn"), (2, block.mlp, "c_fc")):
            reader: RemovableReader = getattr(owner, name)
            gamma, beta = as_double(reader.ln.weight), as_double(reader.ln.bias)
            weight, bias = as_double(reader.linear.weight), as_double(reader.linear.bias)
            parts = [
                fold_reader(weight[:, s.columns], bias[s.columns], gamma * as_double(s.inverse()), beta)
                for s in reader.sites
            ]
            key = f"transformer.h.{layer}.{'attn' if i == 1 else 'mlp'}.{name}"
            state[f"{key}.weight"] = torch.cat([w for w, _ in parts], dim=1).to(reader.linear.weight)
            state[f"{key}.bias"] = torch.cat([b for _, b in parts]).to(reader.linear.bias)
            state[f"transformer.h.{layer}.ln_{i}.weight"] = torch.full_like(reader.ln.weight, root_eps)
            state[f"transformer.h.{layer}.ln_{i}.bias"] = torch.zeros_like(reader.ln.bias)
    ln_f = transformer.ln_f
    gain = as_double(ln_f.weight) * as_double(ln_f.site.inverse()) * root_eps
    state["transformer.ln_f.weight"] = gain.to(ln_f.weight)
    state["transformer.ln_f.bias"] = ln_f.bias.clone()
    config = copy.deepcopy(model.config if config is None else config)
    config.layer_norm_epsilon = LN_FREE_EPS
    return plain_model(config, state)


def plain_model(config, state: dict[str, Tensor]) -> GPT2LMHeadModel:
    """A GPT2LMHeadModel in eval mode of exactly these tensors: nothing is initialised, nothing copied."""
    with torch.device("meta"):
        model = GPT2LMHeadModel(copy.deepcopy(config))
    model.load_state_dict({name: w.detach() for name, w in state.items()}, assign=True)
    model.tie_weights()
    return model.eval()
