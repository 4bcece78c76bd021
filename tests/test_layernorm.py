"""LayerNorm removal: freezing, treatments, running averages and export, against definitions written out."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel

from lnfree_interp.finetune.export import export_ln_free
from lnfree_interp.finetune.removable import (
    auxiliary_loss,
    collect_std,
    freeze,
    make_removable,
    removal_sites,
    update_averages,
)
from lnfree_interp.layernorm import is_ln_free

EOT = 3


def make_gpt2(*, n_head=2, d_head=4, n_layer=2, seed=0, **config) -> GPT2LMHeadModel:
    """A minute GPT-2 in fp64 without dropout, every weight random, the LayerNorms' included."""
    fields = {
        "vocab_size": 23,
        "n_positions": 12,
        "n_embd": n_head * d_head,
        "n_layer": n_layer,
        "n_head": n_head,
        "bos_token_id": EOT,
        "eos_token_id": EOT,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "use_cache": False,
    } | config
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(**fields)).double().eval()
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return model


def make_tokens(batch=4, pos=9, seed=1):
    """Random tokens with end-of-text at position 0, in the middle and at the end."""
    tokens = torch.randint(4, 23, (batch, pos), generator=torch.Generator().manual_seed(seed))
    tokens[0, 0] = tokens[1, 4] = tokens[2, -1] = EOT
    return tokens


def measured(model: GPT2LMHeadModel, tokens) -> GPT2LMHeadModel:
    """Removable, with the averages of one batch."""
    make_removable(model).train()(tokens)
    collect_std(model)
    update_averages(model)
    return model.eval()


def log_probs(model, tokens):
    with torch.no_grad():
        return model(tokens).logits.log_softmax(-1)


def same(a, b, atol=1e-9):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


# -- the checkpoint's format ------------------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(
    n_head=st.integers(1, 3),
    d_head=st.integers(2, 5),
    n_layer=st.integers(1, 3),
    n_inner=st.sampled_from([None, 7]),
    tied=st.booleans(),
    seed=st.integers(0, 99),
)
def test_frozen_exported_and_reloaded_agree(tmp_path_factory, n_head, d_head, n_layer, n_inner, tied, seed):
    shape = {"n_head": n_head, "d_head": d_head, "n_layer": n_layer, "n_inner": n_inner}
    model = make_gpt2(**shape, tie_word_embeddings=tied, seed=seed)
    original, tokens = copy.deepcopy(model), make_tokens(seed=seed)
    measured(model, tokens)
    assert torch.equal(log_probs(model, tokens), log_probs(original, tokens)), "nothing is frozen yet"

    freeze(model, removal_sites(model))
    exported = export_ln_free(model)
    assert is_ln_free(exported.config, exported.state_dict())
    assert exported.state_dict().keys() == original.state_dict().keys()
    expected = log_probs(model, tokens)
    assert not torch.allclose(expected, log_probs(original, tokens), atol=1e-3)
    same(log_probs(exported, tokens), expected, atol=1e-6)

    directory = tmp_path_factory.mktemp("exported")
    exported.save_pretrained(directory)
    reloaded = GPT2LMHeadModel.from_pretrained(directory, dtype=torch.float64)
    same(log_probs(reloaded, tokens), expected, atol=1e-6)


def test_exported_equals_hooked_transformer_without_normalization(tmp_path):
    from lnfree_interp.models import load_model

    model, tokens = make_gpt2(), make_tokens()
    measured(model, tokens)
    freeze(model, removal_sites(model))
    export_ln_free(model).save_pretrained(tmp_path)
    hooked = load_model(tmp_path, dtype=torch.float64, device="cpu")
    assert hooked.cfg.normalization_type is None
    same(hooked(tokens, prepend_bos=False).log_softmax(-1), log_probs(model, tokens), atol=1e-6)


def test_half_way_checkpoints_are_named():
    ordinary, model = make_gpt2(), make_gpt2()
    measured(model, make_tokens())
    freeze(model, removal_sites(model))
    exported = export_ln_free(model)
    free, huge = exported.state_dict(), exported.config
    ordinary, config = ordinary.state_dict(), ordinary.config
    assert not is_ln_free(config, ordinary)
    assert is_ln_free(huge, {k.removeprefix("transformer."): v.to(torch.bfloat16) for k, v in free.items()})
    for state, conf, message in (
        (ordinary, huge, r"h\.0\.ln_1\.weight is about .* but layer_norm_epsilon is 1e\+12"),
        (free, config, r"h\.0\.ln_1\.weight is about 1e\+06"),
        ({k: v.half() for k, v in free.items()}, config, r"h\.0\.ln_1\.weight is about inf"),
    ):
        with pytest.raises(ValueError, match=message):
            is_ln_free(conf, state)
    for name in ("h.1.ln_2.weight", "ln_f.weight"):
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            is_ln_free(huge, {**free, f"transformer.{name}": ordinary[f"transformer.{name}"]})
    with pytest.raises(ValueError, match="layer_norm_epsilon 5000"):
        is_ln_free(GPT2Config(n_layer=2, layer_norm_epsilon=5e3), ordinary)


# -- what a frozen site computes, token by token ----------------------------------------------------------


def naive_reader(reader, x, tokens, frozen, position0, eot):
    """LayerNorm and Conv1D by the definition, one token at a time, q,k and v (or all) apart."""
    out = torch.empty(*x.shape[:2], len(reader.linear.bias), dtype=x.dtype)
    for b in range(x.shape[0]):
        for p in range(x.shape[1]):
            centred = x[b, p] - x[b, p].mean()
            for site in reader.sites:
                std = (centred.square().mean() + reader.ln.eps).sqrt()
                if site.kind in frozen:
                    at_eot = eot and site.kind == "v" and tokens[b, p] == EOT
                    std = site.average[1] if (position0 and p == 0) or at_eot else site.average[0]
                normed = centred / std * reader.ln.weight + reader.ln.bias
                columns = site.columns
                out[b, p, columns] = normed @ reader.linear.weight[:, columns] + reader.linear.bias[columns]
    return out


@pytest.mark.parametrize("eot", [False, True])
@pytest.mark.parametrize("position0", [False, True])
@pytest.mark.parametrize("frozen", [(), ("qk",), ("v",), ("ln_2", "qk"), ("ln_2", "qk", "v", "ln_f")])
@pytest.mark.parametrize("d_head", [4, 16], ids=["long batch", "wide model"])
def test_frozen_sites_equal_the_definition(frozen, position0, eot, d_head):
    model, tokens = make_gpt2(d_head=d_head), make_tokens()
    measured(model, tokens)
    sites = removal_sites(model)
    freeze(model, [name for name in sites if name[0] in frozen], position0=position0, eot=eot)
    # readers in pairs: what comes in, what goes out
    seen = []
    readers = [m for b in model.transformer.h for m in (b.attn.c_attn, b.mlp.c_fc)]
    for reader in readers:
        reader.register_forward_hook(lambda module, args, out: seen.append((module, args[0], out)))
    ln_f = model.transformer.ln_f
    ln_f.register_forward_hook(lambda module, args, out: seen.append((module, args[0], out)))
    with torch.no_grad():
        model(tokens)
        assert len(seen) == len(readers) + 1
        for module, x, out in seen[:-1]:
            same(out, naive_reader(module, x, tokens, frozen, position0, eot))
        _, x, out = seen[-1]
        std = (x.var(-1, correction=0, keepdim=True) + ln_f.eps).sqrt()
        if "ln_f" in frozen:
            std = ln_f.site.average[0].expand_as(std).clone()
            if position0:
                std[:, 0] = ln_f.site.average[1]
        same(out, (x - x.mean(-1, keepdim=True)) / std * ln_f.weight + ln_f.bias)


def test_freezing_qk_leaves_v_exact():
    model, tokens = make_gpt2(), make_tokens()
    original, d = copy.deepcopy(model), model.config.n_embd
    measured(model, tokens)
    freeze(model, [("qk", 0)], position0=True, eot=True)
    outs = []
    for m in (original, model):
        m.transformer.h[0].attn.c_attn.register_forward_hook(lambda module, args, out: outs.append(out))
        m(tokens)
    same(outs[0][..., 2 * d :], outs[1][..., 2 * d :], atol=1e-14)
    assert not torch.allclose(outs[0][..., : 2 * d], outs[1][..., : 2 * d], atol=1e-3)


def test_every_weight_still_learns_once_all_is_frozen():
    model, tokens = make_gpt2(), make_tokens()
    measured(model, tokens)
    freeze(model, removal_sites(model))
    model(tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


# -- running averages -------------------------------------------------------------------------------------


def naive_stds(model, tokens):
    """Mean std per site and class of an unfrozen removable model: (positions > 0, position 0)."""
    inputs = {}
    hooks = [
        m.register_forward_pre_hook(lambda module, args: inputs.update({module: args[0]}))
        for m in model.modules()
        if hasattr(m, "sites") or hasattr(m, "site")
    ]
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()
    stds = {}
    for module, x in inputs.items():
        std = (x - x.mean(-1, keepdim=True)).square().mean(-1).add(1e-5).sqrt()
        for site in getattr(module, "sites", None) or [module.site]:
            stds[site.kind, site.layer] = torch.stack((std[:, 1:].mean(), std[:, 0].mean()))
    return stds


@pytest.mark.parametrize("checkpointing", [False, True])
def test_running_averages_equal_their_definition(checkpointing):
    """Two steps of two micro-batches: the first sets, the second moves by a tenth. Recomputing changes nothing."""
    model = make_removable(make_gpt2()).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    expected = {}
    for step in range(2):
        batches = [make_tokens(seed=10 * step + i) for i in range(2)]
        stds = [naive_stds(model.eval(), tokens) for tokens in batches]
        for name in stds[0]:
            batch = (stds[0][name] + stds[1][name]) / 2
            expected[name] = batch if step == 0 else 0.9 * expected[name] + 0.1 * batch
        for tokens in batches:
            model.train()(tokens, labels=tokens).loss.backward()
            collect_std(model)
        update_averages(model)
        model.eval()(batches[0])  # an evaluation in between counts for nothing
    assert removal_sites(model).keys() == expected.keys()
    for name, site in removal_sites(model).items():
        same(site.average, expected[name])


def test_a_frozen_average_stays():
    model, tokens = make_gpt2(), make_tokens()
    measured(model, tokens)
    freeze(model, [("qk", 0)])
    sites = removal_sites(model)
    before = {name: site.average.clone() for name, site in sites.items()}
    model.train()(make_tokens(seed=5))
    collect_std(model)
    update_averages(model)
    moved = {name for name, site in sites.items() if not torch.equal(site.average, before[name])}
    assert moved == sites.keys() - {("qk", 0)}


# -- cost -------------------------------------------------------------------------------------------------


class Ops(TorchDispatchMode):
    """The ATen operations that run inside, and how many elements they write."""

    def __init__(self):
        super().__init__()
        self.names, self.written = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
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


def test_a_std_is_computed_only_where_it_is_needed_and_nothing_syncs():
    model, tokens = make_gpt2(), make_tokens()
    syncs = ops_of_a_training_step(copy.deepcopy(model), tokens).count(*SYNC)  # transformers' own
    measured(model, tokens)
    sites = removal_sites(model)
    for kinds, computed in (
        ((), 5),
        (("ln_2",), 3),
        (("ln_2", "qk"), 3),
        (("ln_2", "qk", "v"), 1),
        (("ln_2", "qk", "v", "ln_f"), 0),
    ):
        for position0, eot in ((True, True), (True, False), (False, False)):
            freeze(model, [name for name in sites if name[0] in kinds], position0=position0, eot=eot)
            ops = ops_of_a_training_step(model, tokens)
            collect_std(model)
            assert ops.count(*STD) == computed, (kinds, ops.names)
            assert ops.count(*SYNC) == syncs, "a device sync"


def test_after_full_removal_a_step_writes_no_more_than_a_plain_one():
    """Counted, not timed: elements written by all operations, forward and backward, on a batch of some size."""
    model, tokens = make_gpt2(d_head=8, n_positions=64), make_tokens(batch=32, pos=64)
    plain = ops_of_a_training_step(copy.deepcopy(model), tokens)
    measured(model, tokens)
    freeze(model, removal_sites(model))
    frozen = ops_of_a_training_step(model, tokens)
    assert frozen.written <= plain.written


# -- the auxiliary loss -----------------------------------------------------------------------------------


def test_auxiliary_loss_equals_a_loop():
    tokens = make_tokens()
    std = torch.rand(tokens.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    std = std.requires_grad_()
    ordinary = [std[b, p].item() for b in range(4) for p in range(1, 9) if tokens[b, p] != EOT]
    target = sum(ordinary) / len(ordinary)
    loss = auxiliary_loss(std, tokens, EOT)
    assert loss.item() == pytest.approx(sum((s - target) ** 2 for s in std.flatten().tolist()) / std.numel())
    loss.backward()
    same(std.grad, 2 * (std.detach() - target) / std.numel())  # the target is not pulled along
    assert auxiliary_loss(std, torch.full_like(tokens, EOT), EOT) == 0


def test_kept_std_is_ln_f_s_own():
    model, tokens = make_removable(make_gpt2()).train(), make_tokens()
    ln_f = model.transformer.ln_f
    ln_f.keep_std, inputs = True, []
    ln_f.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    model(tokens)
    same(ln_f.std, (inputs[0].var(-1, correction=0) + ln_f.eps).sqrt())
    assert ln_f.std.requires_grad
    ln_f.std = None
    model.eval()(tokens)
    assert ln_f.std is None, "evaluation keeps none"


# -- wrong use --------------------------------------------------------------------------------------------


def test_wrong_use_is_named():
    model, tokens = make_gpt2(), make_tokens()
    with pytest.raises(ValueError, match="not removable"):
        export_ln_free(model)
    make_removable(model)
    with pytest.raises(ValueError, match="removable already"):
        make_removable(model)
    with pytest.raises(ValueError, match="h\\.1 v has no finite average std"):
        freeze(model, [("v", 1)])
    with pytest.raises(ValueError, match="no site"):
        freeze(model, [("ln_3", 0)])
    model.train()(tokens)
    collect_std(model)
    update_averages(model)
    sites = list(removal_sites(model))
    freeze(model, sites[:-1])
    with pytest.raises(ValueError, match="ln_f is not frozen"):
        export_ln_free(model)
    freeze(model, sites, position0=True)
    with pytest.raises(ValueError, match="treats position 0"):
        export_ln_free(model)
    with pytest.raises(ValueError, match="reads input_ids"):
        model(inputs_embeds=torch.zeros(1, 2, 8, dtype=torch.float64))
    freeze(model, sites)
    with pytest.raises(ValueError, match="LN-free already"):
        make_removable(export_ln_free(model))
    with pytest.raises(ValueError, match="cross-attention"):
        make_removable(make_gpt2(add_cross_attention=True))
