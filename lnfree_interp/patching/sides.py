"""The two runs of attribution patching, the gradient at a site, and its sum over each cell."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..batching import d_vocab_out
from ..forward import Past, Stream, run, run_streams
from ..layers import wide
from ..lens import LensModel
from ..pairs import PromptPairs
from ..weights import Norm, Weights, final_norm
from .cells import Request, may_differ, on_device, tokens_differ
from .reading import Sample, check_rows, read_metric

Activations = dict[int, Tensor]
"""Layer -> the site's activation of all prompts."""

Key = TypeVar("Key", int, str)


def numbers_per_prompt(model: LensModel, request: Request) -> int:
    """Roughly what autograd keeps of a forward for one prompt."""
    cfg = model.cfg
    of_mlp = (5 if getattr(cfg, "gated_mlp", False) else 3) * (cfg.d_mlp or 0)
    per_position = 14 * cfg.d_model + of_mlp + 2 * cfg.n_heads * request.n_read
    logits = 0 if request.metric.tokens is not None else len(request.reads) * d_vocab_out(cfg)
    return request.n_read * cfg.n_layers * per_position + 3 * logits


@contextmanager
def frozen(model: LensModel) -> Iterator[None]:
    """No gradients of weights: autograd keeps less, and nothing is left in `.grad`."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    for p in trainable:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trainable:
            p.requires_grad_(True)


@dataclass(frozen=True)
class Window:
    """The positions that are run: from `first` on, before which the prompts agree and the metric reads nothing, up to
    the last one that the metric reads."""

    model: LensModel
    request: Request
    first: int
    past: Past | None  # keys and values of the positions before
    weights: Weights | None  # None: a model that goes through its own forward

    @property
    def norm(self) -> Norm:
        return final_norm(self.model) if self.weights is None else self.weights.ln_final

    @property
    def reads(self) -> Tensor | slice:
        reads = [position - self.first for position in self.request.reads]
        # A slice where it is one: nothing has to be sent to the device.
        together = reads == list(range(reads[0], reads[-1] + 1))
        return slice(reads[0], reads[-1] + 1) if together else on_device(torch.tensor(reads), self.model.cfg.device)

    @property
    def only_reads(self) -> bool:
        """Whether the last layer computes only the positions read: where the site is seen at all positions."""
        return self.request.row.spreads or self.model.cfg.n_layers - 1 not in self.request.layers

    def options(self, hooks: Mapping[str, Callable]) -> dict:
        """What `forward.run` takes by name."""
        return {"hooks": hooks, "past": self.past, "positions": self.reads if self.only_reads else None}

    def at_reads(self, final: Tensor) -> Float[Tensor, "prompt read d_model"]:
        return final if self.only_reads else final[:, self.reads]

    def run(
        self, tokens=None, *, resid=None, start_layer: int = 0, hooks: Mapping[str, Callable]
    ) -> Float[Tensor, "prompt read d_model"]:
        """The final residual stream where the metric reads it."""
        options = self.options(hooks)
        return self.at_reads(
            run(self.model, tokens, resid=resid, start_layer=start_layer, weights=self.weights, **options)
        )


@dataclass(frozen=True)
class Sides:
    """The two runs of some prompts, of which only the metric is known: hooks have seen the rest."""

    window: Window
    pairs: PromptPairs
    value: Tensor  # the metric of the base run, with its graph
    final: Tensor  # what it is read off, in that graph: Float[Tensor, "prompt read d_model"]
    at_source: Tensor
    differ: Bool[Tensor, "prompt pos"]  # where the tokens do, on the CPU

    @property
    def at_base(self) -> Tensor:
        return self.value.detach()

    def metric(self, final: Tensor, prompt: Tensor | None = None) -> Tensor:
        """Of final residual streams at the positions read, of all prompts or of those named."""
        if prompt is None:
            prompt = torch.arange(len(self.pairs), device=final.device)
        window = self.window
        return read_metric(window.model, window.request, self.pairs, final, prompt, window.norm)


@dataclass(frozen=True)
class Case:
    """The two runs of some prompts, as far as gradients need them."""

    sides: Sides
    base: Activations
    source: Activations
    delta: Activations  # source - base, exactly 0 before the first different token
    # The residual stream that enters each layer of the base run; 0 also of the source run at -1.
    resid: dict[int, Tensor]
    nodes: Activations  # the base run's, in the graph of the metric

    @property
    def window(self) -> Window:
        return self.sides.window

    @property
    def pairs(self) -> PromptPairs:
        return self.sides.pairs

    @property
    def at_base(self) -> Tensor:
        return self.sides.at_base

    @property
    def at_source(self) -> Tensor:
        return self.sides.at_source

    @property
    def differ(self) -> Bool[Tensor, "prompt pos"]:
        return self.sides.differ

    @property
    def model(self):
        return self.window.model

    @property
    def request(self) -> Request:
        return self.window.request

    def metric(self, final: Tensor, prompt: Tensor | None = None) -> Tensor:
        return self.sides.metric(final, prompt)

    def gradients(self) -> Activations:
        return gradients(self.sides.value, self.nodes)


def site_hooks(request: Request, hook: Callable[[Tensor, int], Tensor | None]) -> dict[str, Callable]:
    """The hook on the site's activation in the layers asked for; it is told the layer."""
    return {request.row.name(i): lambda x, i=i: hook(x, i) for i in request.layers}


def explicit_attention(n_layers: int, start: int) -> dict[str, Callable]:
    """Hooks that change nothing but make attention be computed in plain operations: the fused one has no second
    derivative."""
    return {f"blocks.{i}.attn.hook_pattern": lambda x: None for i in range(start, n_layers)}


def gradients(value: Tensor, nodes: Mapping[Key, Tensor], *, create_graph: bool = False) -> dict[Key, Tensor]:
    """The gradient of each prompt's metric; one backward for all, since prompts do not mix."""
    if not value.requires_grad:
        return {i: torch.zeros_like(x) for i, x in nodes.items()}
    grads = torch.autograd.grad(
        value.sum(),
        list(nodes.values()),
        create_graph=create_graph,
        retain_graph=True if create_graph else None,
        materialize_grads=True,
    )
    return dict(zip(nodes, grads))


def two_sides(
    model,
    request: Request,
    pairs: PromptPairs,
    weights: Weights | None,
    hooks_of_source: Mapping[str, Callable],
    hooks: Mapping[str, Callable],
    *,
    graph: bool = True,
    cut: bool = False,
) -> Sides:
    """One forward of the source prompts, without a graph, and one of the base prompts, with it if asked for.

    Args:
        hooks_of_source, hooks: what is seen, or made, of the activations of each.
        cut: leave out of the second what comes before the prompts differ, if the model allows.
    """
    denoising = request.direction == "denoising"
    tokens = (pairs.corrupted, pairs.clean) if denoising else (pairs.clean, pairs.corrupted)
    base_tokens, source_tokens = (t[:, : request.n_read] for t in tokens)
    everyone = torch.arange(len(pairs), device=base_tokens.device)
    differ = tokens_differ(weights, pairs)
    first = int(differ.any(0).int().argmax()) if differ.any() else request.n_pos
    start = min(first, *request.reads) if cut and weights is not None else 0
    past = Past(start, {})
    of_source = Window(model, request, 0, None, weights)
    window = Window(model, request, start, past if start else None, weights)
    options, options_of_base = of_source.options(hooks_of_source), window.options(hooks)
    if weights is not None:
        # The source's keys and values before the window are the base's, too.
        streams = [
            Stream(weights.enter(source_tokens, slice(request.n_read)), **options, keep=past.kept),
            Stream(weights.enter(base_tokens[:, start:], slice(start, request.n_read)), **options_of_base),
        ]
        with torch.set_grad_enabled(graph):
            final_of_source, final = run_streams(weights, streams)
    else:
        with torch.no_grad():
            final_of_source = run(model, source_tokens, **options)
        with torch.set_grad_enabled(graph):
            final = run(model, base_tokens, **options_of_base)
    final, final_of_source = window.at_reads(final), of_source.at_reads(final_of_source)
    sample: list[Sample] = []
    with torch.no_grad():
        at_source = read_metric(model, request, pairs, final_of_source, everyone, window.norm, sample=sample)
    with torch.set_grad_enabled(graph):
        value = read_metric(model, request, pairs, final, everyone, window.norm, sample=sample)
    check_rows(request.metric, sample)
    return Sides(window, pairs, value, final, at_source, differ)


def both_sides(
    model, request: Request, pairs: PromptPairs, weights: Weights | None, *, graph: bool = True, cut: bool = False
) -> Case:
    """`two_sides`, the site and the residual stream noted in both."""
    source: Activations = {}
    nodes: Activations = {}
    resid: dict[int, Tensor] = {}

    def keep(x: Tensor, i: int) -> None:
        source[i] = x

    def watch(x: Tensor, i: int) -> Tensor:
        nodes[i] = x if x.requires_grad or not graph else x.detach().requires_grad_()
        return nodes[i]

    hooks_of_source, hooks = site_hooks(request, keep), site_hooks(request, watch)
    _note(hooks_of_source, "blocks.0.hook_resid_pre", partial(resid.__setitem__, -1))
    for i in range(model.cfg.n_layers):
        _note(hooks, f"blocks.{i}.hook_resid_pre", partial(resid.__setitem__, i))
    sides = two_sides(model, request, pairs, weights, hooks_of_source, hooks, graph=graph, cut=cut)
    axis, start = request.row.pos_axis, sides.window.first
    source = {i: x.narrow(axis, start, x.shape[axis] - start) for i, x in source.items()}
    resid[-1] = resid[-1][:, start:]
    base = {i: x.detach() for i, x in nodes.items()}
    masks = torch.stack([may_differ(request, sides.differ, i)[:, start:] for i in base])
    delta = {
        i: torch.where(_over_positions(mask, request, source[i]), source[i] - base[i], 0.0)
        for i, mask in zip(base, on_device(masks, pairs.clean.device))
    }
    return Case(sides, base, source, delta, resid, nodes)


def _note(hooks: dict[str, Callable], name: str, note: Callable[[Tensor], None]) -> None:
    """A hook more, which is told the activation, after the one that is there if there is one."""
    own = hooks.get(name)

    def hook(x: Tensor) -> Tensor | None:
        new = None if own is None else own(x)
        note((x if new is None else new).detach())
        return new

    hooks[name] = hook


def _over_positions(mask: Tensor, request: Request, like: Tensor) -> Tensor:
    """Bool [prompt, pos] shaped to broadcast over an activation."""
    shape = [1] * like.ndim
    shape[0], shape[request.row.pos_axis] = mask.shape
    return mask.view(shape)


def first_order(case: Case, grads: Activations) -> Tensor:
    """d times a gradient, one number per cell, 0 at the positions before the window."""
    values = contract(case.request, {i: case.delta[i] * grads[i] for i in case.delta})
    return torch.nn.functional.pad(values, (case.window.first, 0)) if "pos" in case.request.axes else values


def contract(request: Request, terms: Activations) -> Tensor:
    """Terms of every entry of the site's activations -> one number per cell, [prompt, layer, unit(, pos)]."""
    return torch.stack([_contract(request, terms[i]) for i in request.layers], 1)


def _contract(request: Request, x: Tensor) -> Tensor:
    x = request.by_place(wide(x), torch.sum)
    if request.positional:
        return x
    return x.transpose(1, 2) if request.by_position else x.sum(1)
