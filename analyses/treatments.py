"""What may help a removal besides its schedule, each as a callback of the trainer's: see `less_data.py`."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from types import MethodType

import torch
from torch import Tensor
from transformers import TrainerCallback

from lnfree_interp import RemovalSchedule
from lnfree_interp.finetune.modules import ORDINARY, RemovableNorm, StdSite
from lnfree_interp.finetune.removable import collect_std, freeze, make_removable, removal_sites, update_averages
from lnfree_interp.finetune.trainable import ready
from lnfree_interp.schedule import KINDS, Event

Name = tuple[str, int | None]  # of a site: kind and layer


@dataclass(frozen=True)
class Ordered(RemovalSchedule):
    """A schedule whose sites go in an order of their own, at the steps of the usual ones."""

    sites: Sequence[Name] = ()

    def events(self, n_layer: int) -> list[Event]:
        planned = super().events(n_layer)
        steps = [event.step for event in planned if event.site in KINDS]
        ends = [event for event in planned if event.site not in KINDS]
        return [Event(step, *site) for step, site in zip(steps, self.sites, strict=True)] + ends if planned else []


class Treatment(TrainerCallback):
    """Does nothing; `froze` is called with the sites that are frozen since, before the first step with them."""

    def __init__(self) -> None:
        self.frozen: set[Name] = set()

    def froze(self, model, names: Collection[Name], step: int) -> None: ...

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        frozen = {name for name, site in removal_sites(model).items() if site.frozen}
        new = [name for name in removal_sites(model) if name in frozen - self.frozen]
        self.frozen = frozen
        if new:
            self.froze(model, new, state.global_step)


class Anew(Treatment):
    """After every freeze the averages of the sites that still live are estimated anew, from the next step on."""

    def froze(self, model, names, step):
        for site in removal_sites(model).values():
            if not site.frozen:
                site.average.fill_(float("nan"))


class FittedToLoss(Treatment):
    """A site's constant is the one of some around its average with which the loss on the last batch is the least."""

    factors = (0.7, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2, 1.4)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        def note(model, args, kwargs):
            if model.training:
                self.tokens = kwargs["input_ids"]

        model.register_forward_pre_hook(note, with_kwargs=True)

    @torch.no_grad()
    def froze(self, model, names, step):
        model.eval()
        for name in names:
            average = removal_sites(model)[name].average
            before = average.clone()
            losses = {}
            for factor in self.factors:
                average.copy_(before * factor)
                losses[factor] = model(input_ids=self.tokens, labels=self.tokens).loss.item()
            average.copy_(before * min(losses, key=losses.__getitem__))
        model.train()


class FittedToOutputs(Treatment):
    """A site's constant is the one that puts the norm's outputs nearest to what they were, in the mean square.

    They are x / std; of x / c the squared distance is d (1 - std / c)^2, least in the mean at c = E[std^2] / E[std].
    The ratio of that to E[std] is taken over ordinary tokens of the last micro-batch, the average being of many steps.
    """

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.ratio: dict[Name, float] = {}
        for site in removal_sites(model).values():
            site.observe = self.observing(site)

    def observing(self, site: StdSite):
        def observe(std: Tensor, total: Tensor) -> None:
            ordinary = std[:, 1:]
            self.ratio[site.kind, site.layer] = (ordinary.square().mean() / ordinary.mean().square()).item()
            StdSite.observe(site, std, total)

        return observe

    def froze(self, model, names, step):
        for name in names:
            removal_sites(model)[name].average[ORDINARY] *= self.ratio[name]


class Interpolated(Treatment):
    """After a freeze 1 / std passes from each token's own to the site's constant, in equal parts over some steps.

    The first step with the site frozen takes a part of the constant already, the last of them all of it. With all
    sites frozen at once that is TaperNorm's single gate (arXiv 2602.10408).
    """

    def __init__(self, steps: float):
        super().__init__()
        if steps < 1:
            raise ValueError(f"std is interpolated over {steps:g} steps, not at least 1")
        self.steps, self.now = steps, 0
        self.since: dict[Name, int] = {}

    def share(self, site: StdSite) -> float:
        """How much of 1 / std is the constant's."""
        return min(1.0, (self.now - self.since[site.kind, site.layer] + 1) / self.steps)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        def inverse(norm: RemovableNorm, site: StdSite, x: Tensor) -> Tensor:
            held = RemovableNorm.inverse(norm, site, x)
            share = self.share(site) if norm.training else 1.0
            if share >= 1:
                return held
            own = norm.std_of(x).reciprocal()
            return torch.lerp(own, held.expand_as(own), share)

        for module in model.modules():
            if isinstance(module, RemovableNorm):
                module.inverse = MethodType(inverse, module)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.now = state.global_step
        super().on_step_begin(args, state, control, model=model, **kwargs)
        for name, site in removal_sites(model).items():
            if name in self.since and self.share(site) < 1:  # tokens differ, as where massive ones are treated
                site.massive = True

    def froze(self, model, names, step):
        self.since.update(dict.fromkeys(names, step))


TREATMENTS = {
    "anew": lambda value: Anew(),
    "fitted": lambda value: FittedToLoss(),
    "outputs": lambda value: FittedToOutputs(),
    "interpolated": Interpolated,
}


def made(treatments: Sequence[tuple[str, float]]) -> list[Treatment]:
    """New callbacks of these names and values."""
    return [TREATMENTS[name](value) for name, value in treatments]


@torch.no_grad()
def sensitivity(model, tokens: Tensor, *, batch_size: int = 16) -> dict[Name, float]:
    """How much the loss on tokens rises when one site alone is frozen at its average over these tokens (nats).

    With the treatments of position 0 and end-of-text on, as when it goes first; the model stays as it was.
    """
    model = copy.deepcopy(model)
    ready(model)
    make_removable(model)
    for batch in tokens.split(batch_size):
        model.train()(input_ids=batch)
        collect_std(model)
    update_averages(model)
    model.eval()

    def loss() -> float:
        losses = [model(input_ids=batch, labels=batch).loss * len(batch) for batch in tokens.split(batch_size)]
        return torch.stack(losses).sum().item() / len(tokens)

    usual, rise = loss(), {}
    for name in removal_sites(model):
        freeze(model, [name], position0=True, eot=True)
        rise[name] = loss() - usual
    return rise
