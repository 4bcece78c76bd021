"""Running averages of stds, what they cost, the auxiliary loss, against definitions written out."""

import copy

import pytest
import torch
from removable_models import EOT, KINDS, exact, make_plain, make_tokens, measured, same
from torch.utils._python_dispatch import TorchDispatchMode

from lnfree_interp.finetune.modules import RemovableNorm
from lnfree_interp.finetune.removable import (
    auxiliary_loss,
    collect_std,
    final_norm,
    freeze,
    make_removable,
    removal_sites,
    update_averages,
)
from lnfree_interp.layernorm import LN_FREE_EPS

of_every_kind = pytest.mark.parametrize("kind", KINDS)


# -- running averages -------------------------------------------------------------------------------------


def naive_stds(model, tokens):
    """Each token's std per site of a removable model, [batch, pos]."""
    stds, hooks = {}, []

    def note(norm, args):
        x = args[0] - args[0].mean(-1, keepdim=True) if norm.centres else args[0]
        std = x.square().mean(-1).add(norm.eps).sqrt()
        stds.update({(site.kind, site.layer): std for site in norm.sites.values()})

    for module in model.modules():
        if isinstance(module, RemovableNorm):
            hooks.append(module.register_forward_pre_hook(note))
    with torch.no_grad(), exact():
        model(tokens)
    for hook in hooks:
        hook.remove()
    return stds


def train_step(model, batches):
    """Forward and backward of each micro-batch, then the averages, as the trainer does it."""
    for tokens in batches:
        with exact():
            model.train()(tokens, labels=tokens).loss.backward()
        collect_std(model)
    update_averages(model)


@of_every_kind
@pytest.mark.parametrize("checkpointing", [False, True])
def test_running_averages_equal_their_definition(kind, checkpointing):
    """Two steps of two micro-batches: the first sets, the second moves by a tenth. Recomputing changes nothing."""
    model = make_removable(make_plain(kind)).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    expected = {}
    for step in range(2):
        batches = [make_tokens(seed=10 * step + i, batch=4 + i) for i in range(2)]
        stds = [naive_stds(model.eval(), tokens) for tokens in batches]
        for name in stds[0]:
            std = torch.cat([each[name] for each in stds])
            batch = torch.stack((std[:, 1:].mean(), std[:, 0].mean()))
            expected[name] = batch if step == 0 else 0.9 * expected[name] + 0.1 * batch
        train_step(model, batches)
        model.eval()(batches[0])  # an evaluation in between counts for nothing
    assert removal_sites(model).keys() == expected.keys()
    for name, site in removal_sites(model).items():
        same(site.average[:2], expected[name])
        assert site.average[2].isnan(), "nothing is massive unless asked for"


def test_a_frozen_average_stays():
    model, tokens = make_plain(), make_tokens()
    measured(model, tokens)
    freeze(model, [("qk", 0)])
    sites = removal_sites(model)
    before = {name: site.average.clone() for name, site in sites.items()}
    model.train()(make_tokens(seed=5))
    collect_std(model)
    update_averages(model)
    moved = {name for name, site in sites.items() if not torch.equal(site.average[:2], before[name][:2])}
    assert moved == sites.keys() - {("qk", 0)}


# -- cost -------------------------------------------------------------------------------------------------


class Ops(TorchDispatchMode):
    """The ATen operations that run inside, and how many elements they write."""

    def __init__(self):
        super().__init__()
        self.names, self.written = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if LN_FREE_EPS not in [a for a in args if isinstance(a, float)]:  # with it, the kernel has no std of its own
            self.names.append(func.overloadpacket.__name__)
        if not func.is_view:
            outs = out if isinstance(out, tuple) else (out,)
            self.written += sum(o.numel() for o in outs if isinstance(o, torch.Tensor))
        return out

    def count(self, *names):
        return sum(self.names.count(name) for name in names)


STD = ("native_layer_norm", "var", "std", "var_mean", "std_mean", "sqrt", "rsqrt")
SYNC = ("_local_scalar_dense", "nonzero")


def ops_of_a_training_step(model, tokens):
    with Ops() as ops:
        model.train()(tokens, labels=tokens).loss.backward()
    return ops


@of_every_kind
def test_a_std_is_computed_only_where_it_is_needed_and_nothing_syncs(kind):
    model, tokens = make_plain(kind), make_tokens()
    syncs = ops_of_a_training_step(copy.deepcopy(model), tokens).count(*SYNC)  # transformers' own
    measured(model, tokens)
    sites = removal_sites(model)
    readers_of_v = 1 if kind.startswith("GPT") else 2  # queries and keys, in layers of their own
    for kinds, computed in (
        ((), 5),
        (("ln_2",), 3),
        (("ln_2", "v"), 1 + 2 * readers_of_v),
        (("ln_2", "qk"), 3),
        (("ln_2", "qk", "v"), 1),
        (("ln_2", "qk", "v", "ln_f"), 0),
    ):
        for position0, eot in ((True, True), (True, False), (False, False)):
            freeze(model, [name for name in sites if name[0] in kinds], position0=position0, eot=eot)
            with Ops() as ops:
                model.train()(tokens, labels=tokens).loss.backward()
                collect_std(model)
                update_averages(model)
            assert ops.count(*STD) == computed, (kinds, ops.names)
            assert ops.count(*SYNC) == syncs, "a device sync"


@of_every_kind
def test_after_full_removal_a_step_writes_no_more_than_a_plain_one(kind):
    """Counted, not timed: elements written by all operations, forward and backward, on a batch of some size.

    1.00 times a plain step's, to two places: constants of queries and keys and of values scale the one weight's rows.
    """
    wide = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    wide |= {"intermediate_size": 40, "max_position_embeddings": 64}
    model, tokens = make_plain(kind, **wide), make_tokens(batch=32, pos=64)
    plain = ops_of_a_training_step(copy.deepcopy(model), tokens)
    measured(model, tokens)
    live = ops_of_a_training_step(model, tokens)
    freeze(model, removal_sites(model))
    frozen = ops_of_a_training_step(model, tokens)
    assert frozen.written <= 1.005 * plain.written
    assert live.written <= 1.01 * plain.written


# -- the auxiliary loss -----------------------------------------------------------------------------------


def test_auxiliary_loss_equals_a_loop():
    std = torch.rand(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    target = torch.tensor(0.4, dtype=torch.float64)
    loss = auxiliary_loss(std, target)
    assert loss.item() == pytest.approx(sum((s - 0.4) ** 2 for s in std.flatten().tolist()) / std.numel())
    loss.backward()
    same(std.grad, 2 * (std.detach() - target) / std.numel())  # the target is not pulled along
    std.grad = None
    nothing = auxiliary_loss(std, torch.tensor(float("nan"), dtype=torch.float64))
    nothing.backward()
    assert nothing == 0 and not std.grad.any(), "no step has been seen yet"


@of_every_kind
def test_target_is_the_mean_std_of_ordinary_tokens_of_the_step_before(kind):
    model = make_removable(make_plain(kind)).train()
    norm = final_norm(model)
    assert norm.target.isnan() and any(name.endswith(".target") for name in model.state_dict()), "it is saved"
    norm.keep_std = True
    for step, frozen in enumerate([(), (), removal_sites(model)]):
        freeze(model, frozen)
        batches = [make_tokens(seed=step), make_tokens(seed=step + 5, batch=3)]
        stds = [naive_stds(model.eval(), tokens)["ln_f", None] for tokens in batches]
        places = [(i, b, p) for i, tokens in enumerate(batches) for b in range(len(tokens)) for p in range(1, 9)]
        ordinary = [stds[i][b, p].item() for i, b, p in places if batches[i][b, p] != EOT]
        train_step(model, batches)
        assert norm.target.item() == pytest.approx(sum(ordinary) / len(ordinary), rel=1e-12)
    before = norm.target.clone()
    train_step(model, [torch.full((2, 9), EOT)])
    assert torch.equal(norm.target, before), "a step without ordinary tokens has no target of its own"


@of_every_kind
def test_kept_std_is_the_final_norm_s_own(kind):
    model, tokens = make_removable(make_plain(kind)).train(), make_tokens()
    norm = final_norm(model)
    norm.keep_std = True
    with exact():
        model(tokens)
    same(norm.std, naive_stds(model.eval(), tokens)["ln_f", None])
    assert norm.std.requires_grad
    norm.std = None
    model.eval()(tokens)
    assert norm.std is None, "evaluation keeps none"
