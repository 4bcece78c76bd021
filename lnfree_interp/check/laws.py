"""The laws: what this package computes, against the model's own forward with plain hooks.

A law is a function of a `Case` that returns what was found and what was wanted; the error is the largest difference, as
a share of the largest logit or of the size it names. A function of the package that refuses the model by a ValueError
leaves its law unmeasured, with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .. import forward
from ..dla.attribution import attribution_to, logit_attributions
from ..dla.readers import Reader
from ..dla.record import DECOMPOSITIONS
from ..lens import LensModel
from ..metrics import cross_entropy, entropy
from ..names import locate_checkpoint, weight_files
from ..neurons import ablate_neurons
from ..norms import residual_norms
from ..patching import DIRECTIONS, SITES, activation_patching, attribution_patching
from ..weights import block_of, own_hooks
from .case import SAMPLE, Case
from .result import TOLERANCES

HF_BYTES = 4 * 2**30  # larger checkpoints are not loaded a second time

# What reads the residual stream, and the hook of what it reads.
READERS: dict[str, tuple[Callable[[int], Reader], str]] = {
    "queries": (Reader.query, "attn.hook_q"),
    "keys": (Reader.key, "attn.hook_k"),
    "values": (Reader.value, "attn.hook_v"),
    "neurons": (Reader.neuron, "mlp.hook_pre"),
}

Outcome = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, float]
"""Found and wanted, and what an error is a share of, if that is not the largest logit."""


def laws(case: Case) -> Iterator[tuple[str, Callable[[Case], Outcome]]]:
    yield "forward = the model's own", _forward
    if case.checkpoint is not None:
        yield "log-probabilities = the Hugging Face model's", _hugging_face
    for by in DECOMPOSITIONS:
        yield f"attributions by {by} + bias = logit", partial(_sum_is_logit, by=by)
        yield f"direct effect by {by} = removed by hand", partial(_effect_is_removal, by=by)
        if case.model.cfg.normalization_type is None:
            yield f"LN-free: attribution by {by} = direct effect", partial(_linear, by=by)
    for site in _sites(case.model):
        yield f"patched {site} = overwritten by a hook", partial(_patched, site=site)
    for site in _sites(case.model):
        yield f"gradient estimate of {site} = autograd's", partial(_estimated, site=site)
    for layer, method in ((-1, "stream"), (-1, "moments"), (0, "rerun")):
        where = "the first layer's" if layer == 0 else "the last layer's"
        yield f"ablated neurons, {where}, {method} = set by a hook", partial(_ablated, layer=layer, method=method)
    for what in READERS:
        yield f"attributions to {what} + bias = the model's own", partial(_sum_is_reading, what=what)
    yield "residual norms = the cache's", _norms


def _sites(model: LensModel) -> list[str]:
    return [site for site in SITES if f"blocks.0.{SITES[site].hook}" in model.hook_dict]


@torch.no_grad()
def _forward(case: Case) -> Outcome:
    return forward.unembed(case.model, forward.run(case.model, case.tokens)), case.logits


@torch.no_grad()
def _hugging_face(case: Case) -> Outcome:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    assert case.checkpoint is not None
    directory = locate_checkpoint(case.checkpoint)
    size = sum(file.stat().st_size for file in weight_files(directory))
    if size > HF_BYTES:
        raise ValueError(f"the checkpoint's {size / 2**30:.0f} GiB are not loaded a second time")
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=case.logits.dtype, local_files_only=True)
    except Exception as error:  # whatever transformers raises
        raise ValueError(f"transformers does not load {directory}: {error}") from None
    finally:
        if bars:
            logging.enable_progress_bar()
    wanted = theirs.eval().to(case.tokens.device)(case.tokens).logits
    return case.logits.log_softmax(-1), wanted.log_softmax(-1)


def _targets(case: Case) -> Int[Tensor, "batch pos"]:
    return case.logits.argmax(-1)


def _own_logit(case: Case, resid: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos"]:
    """The targets' logits of final residual streams, by the model's own modules."""
    norm = getattr(case.model, "ln_final", None)
    logits = case.model.unembed(resid if norm is None else norm(resid))
    return logits.gather(-1, _targets(case)[..., None])[..., 0]


@torch.no_grad()
def _sum_is_logit(case: Case, by: str) -> Outcome:
    found, _ = logit_attributions(case.model, case.tokens, _targets(case), by=by, exact=False)
    return found.values.sum(0) + found.bias, case.logits.gather(-1, _targets(case)[..., None])[..., 0]


@torch.no_grad()
def _linear(case: Case, by: str) -> Outcome:
    linear, exact = logit_attributions(case.model, case.tokens, _targets(case), by=by)
    return linear.values, exact.values


@torch.no_grad()
def _effect_is_removal(case: Case, by: str) -> Outcome:
    model = case.model
    _, exact = logit_attributions(model, case.tokens, _targets(case), by=by)
    resid = case.clean[f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"]
    whole = _own_logit(case, resid)
    # The components that the decomposition adds to the others, and the embeddings.
    own = {"component": r"L.*", "head": r"L\d+(H\d+|\.b_O)", "neuron": r"L\d+(N\d+|\.b_out)"}[by]
    chosen = [i for i, label in enumerate(exact.labels) if re.fullmatch(own, label)]
    chosen = [0, *(chosen[i] for i in case.some(len(chosen), 2 * SAMPLE))]
    removed = []
    for i in chosen:
        removed.append(whole - _own_logit(case, resid - _component(case, exact.labels[i])))
    return exact.values[chosen], torch.stack(removed)


@torch.no_grad()
def _sum_is_reading(case: Case, what: str) -> Outcome:
    """Of all readers of a kind in a layer."""
    make, hook = READERS[what]
    (layer,) = case.some(case.model.cfg.n_layers, 1)
    found = attribution_to(case.model, case.tokens, make(layer))
    wanted: list[Tensor] = []
    name = f"blocks.{layer}.{hook}"
    if name not in case.model.hook_dict:
        raise ValueError(f"the model has no hook {name}")
    case.model.run_with_hooks(case.tokens, fwd_hooks=[(name, lambda x, hook: wanted.append(x.flatten(2)))])
    return (found.values.sum(1) + found.bias).permute(1, 2, 0), wanted[0], wanted[0].abs().max().item()


def _component(case: Case, label: str) -> Float[Tensor, "#batch #pos d_model"]:
    """What a component writes, by hand."""
    if not (parts := re.fullmatch(r"L(\d+)(?:\.(\w+)|([HN])(\d+))", label)):
        return case.clean[f"hook_{label}"]
    layer, name, kind, unit = parts.groups()
    block, hook = block_of(case.model, int(layer)), f"blocks.{layer}."
    if name in ("attn", "mlp"):
        return case.clean[hook + f"hook_{name}_out"]
    if name is not None:
        return (block.attn.b_O if name == "b_O" else block.mlp.b_out)[None, None]
    if kind == "H":
        return case.clean[hook + "attn.hook_z"][:, :, int(unit)] @ block.attn.W_O[int(unit)]
    return case.clean[hook + "mlp.hook_post"][:, :, int(unit), None] * block.mlp.W_out[int(unit)]


def _edited(model: LensModel, site: str, layer: int) -> tuple[str, str | None]:
    """The hook at which a site is edited and, if it is not the site's own, the rest that the site is made of."""
    block = f"blocks.{layer}."
    hook = block + SITES[site].hook
    if site == "resid_mid" and hook not in own_hooks(model):
        # Where resid_mid is only what the MLP reads (TransformerBridge), an edit of it must be one of attn_out.
        return block + SITES["attn_out"].hook, block + SITES["resid_pre"].hook
    return hook, None


def _at(site: str, unit: int) -> tuple[Any, ...]:
    """Where a position, head or neuron is in the site's activation."""
    first = SITES[site].unit == "pos" or site == "pattern"
    return (slice(None), unit) if first else (slice(None), slice(None), unit)


def _choice(case: Case, site: str) -> tuple[list[int], list[int], dict[str, Any]]:
    """Layers, positions or units, and what the functions take of them."""
    layers = case.some(case.model.cfg.n_layers)
    if SITES[site].unit == "pos":
        return layers, list(range(case.tokens.shape[1])), {"site": site, "layers": layers}
    x = case.clean[f"blocks.{layers[0]}.{SITES[site].hook}"]
    units = case.some(x.shape[1 if site == "pattern" else 2])
    return layers, units, {"site": site, "layers": layers, "units": units}


@torch.no_grad()
def _patched(case: Case, site: str) -> Outcome:
    """A cell of each of some layers, in both directions."""
    model, pairs = case.model, case.pairs
    layers, units, options = _choice(case, site)
    tokens: list[Tensor] = []  # all cells in one run, each in a copy of the prompts
    before, hooks, found = [], [], []
    for direction in DIRECTIONS:
        effect = activation_patching(model, pairs, direction=direction, **options)
        runs = (pairs.corrupted, case.corrupted_logits, case.corrupted), (pairs.clean, case.logits, case.clean)
        (base_tokens, logits, base), (_, _, source) = runs if direction == "denoising" else runs[::-1]
        for i, layer in enumerate(layers):
            edited, rest = _edited(model, site, layer)
            new = source[f"blocks.{layer}.{SITES[site].hook}"]
            new = new if rest is None else new - base[rest]
            # Of positions one from the first on where a prompt differs: before it there is nothing to find.
            j = case.some(len(units), 2)[0] if SITES[site].unit != "pos" else (2 + i) % len(units)
            copy = slice(len(tokens) * len(pairs), (len(tokens) + 1) * len(pairs))
            hooks.append((edited, partial(_put, copy=copy, at=_at(site, units[j]), new=new)))
            tokens.append(base_tokens)
            before.append(case.metric(logits))
            found.append(effect.values[:, i, j])
    after = model.run_with_hooks(torch.cat(tokens), fwd_hooks=hooks).unflatten(0, (len(hooks), -1))
    wanted = torch.stack([case.metric(logits) for logits in after]) - torch.stack(before)
    return torch.stack(found), wanted


def _put(x: Tensor, hook: Any, copy: slice, at: tuple[Any, ...], new: Tensor) -> Tensor:
    """Overwrite some of an activation in one of the copies of the prompts."""
    x = x.clone()
    x[copy][at] = new[at]
    return x


def _estimated(case: Case, site: str) -> Outcome:
    """All positions, or some units, of some layers: the gradient times what is patched in."""
    layers, units, options = _choice(case, site)
    effect = attribution_patching(case.model, case.pairs, **options)
    wanted = []
    for layer in layers:
        hook = f"blocks.{layer}.{SITES[site].hook}"
        product = (case.clean[hook] - case.corrupted[hook]) * case.gradients[_edited(case.model, site, layer)[0]]
        wanted.append(torch.stack([product[_at(site, unit)].flatten(1).sum(1) for unit in units], 1))
    return effect.values, torch.stack(wanted, 1)


@torch.no_grad()
def _ablated(case: Case, layer: int, method: str) -> Outcome:
    """Loss and entropy, token by token, in nats."""
    model, tokens = case.model, case.tokens
    if getattr(model.cfg, "attn_only", False):
        raise ValueError("the model has no MLPs")
    neurons = case.some(model.cfg.d_mlp)
    tolerance = 0.1 * TOLERANCES[str(case.logits.dtype).removeprefix("torch.")]
    result = ablate_neurons(model, tokens, layer=layer, neurons=neurons, method=method, tolerance=tolerance)
    hook = f"blocks.{layer % model.cfg.n_layers}.mlp.hook_post"
    mean = case.clean[hook].mean((0, 1))
    wanted = []
    for neuron in neurons:

        def put(x: Tensor, hook: Any, neuron=neuron) -> Tensor:
            x = x.clone()
            x[..., neuron] = mean[neuron]
            return x

        logits = model.run_with_hooks(tokens, fwd_hooks=[(hook, put)])
        changes = (quantity(logits) - quantity(case.logits) for quantity in (_loss(tokens), _entropy))
        wanted.append(torch.stack(list(changes)))
    return torch.stack([result.loss, result.entropy], 1), torch.stack(wanted)


def _loss(tokens: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda logits: cross_entropy(logits, tokens)


def _entropy(logits: Tensor) -> Tensor:
    return entropy(logits[:, :-1])


@torch.no_grad()
def _norms(case: Case) -> Outcome:
    found = residual_norms(case.model, case.tokens, per_position=True)
    streams = [case.clean[_hook_of(point)].expand(len(case.tokens), -1, -1) for point in found.points]
    wanted = torch.stack([x.cpu().double().norm(dim=-1).mean(0) for x in streams])
    return found.norm[..., found.statistics.index("mean")], wanted, wanted.max().item()


def _hook_of(point: str) -> str:
    layer, _, name = point.rpartition(".")
    return f"blocks.{layer[1:]}.hook_{name}" if layer else f"hook_{name}"
