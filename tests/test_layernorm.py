"""Removal of norms: freezing, treatments and export, against definitions written out."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from removable_models import EOT, KINDS, exact, log_probs, make_plain, make_tokens, measured, same
from transformers import AutoModelForCausalLM, GPT2Config

from lnfree_interp.finetune.export import export_ln_free
from lnfree_interp.finetune.modules import RemovableNorm, RemovableReader
from lnfree_interp.finetune.removable import (
    collect_std,
    final_norm,
    freeze,
    make_removable,
    removal_sites,
    update_averages,
)
from lnfree_interp.layernorm import is_ln_free
from lnfree_interp.lens import has_hooked_transformer

of_every_kind = pytest.mark.parametrize("kind", KINDS)


# -- the checkpoint's format ------------------------------------------------------------------------------


def export(model):
    with exact():  # the frequencies of positions
        return export_ln_free(model)


def check_export(model, original, tokens, directory):
    """Frozen = exported = reloaded by transformers = load_model's, and nothing is left of the norms."""
    from lnfree_interp.models import load_model

    freeze(model, removal_sites(model))
    exported = export(model)
    assert is_ln_free(exported.config, exported.state_dict())
    assert type(exported) is type(original) and exported.state_dict().keys() == original.state_dict().keys()
    expected = log_probs(model, tokens)
    assert not torch.allclose(expected, log_probs(original, tokens), atol=1e-3)
    same(log_probs(exported, tokens), expected)
    exported.save_pretrained(directory)
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
    assert all(torch.equal(w, exported.state_dict()[name]) for name, w in loaded.state_dict().items())
    with exact():
        reloaded = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float64).eval()
    reloaded.load_state_dict(loaded.state_dict())
    same(log_probs(reloaded, tokens), expected)
    ours = load_model(directory, dtype=torch.float64, device="cpu")
    assert ours.cfg.normalization_type is None
    # TransformerLens 4's positions are transformers' own, in fp32
    in_fp32 = not has_hooked_transformer() and original.config.model_type != "gpt2"
    same(ours(tokens, prepend_bos=False).log_softmax(-1), expected, atol=1e-5 if in_fp32 else 1e-9)


@of_every_kind
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_frozen_exported_and_reloaded_agree(tmp_path, kind, tied):
    model, tokens = make_plain(kind, tie_word_embeddings=tied), make_tokens()
    original = copy.deepcopy(model)
    measured(model, tokens)
    assert torch.equal(log_probs(model, tokens), log_probs(original, tokens)), "nothing is frozen yet"
    check_export(model, original, tokens, tmp_path)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(list(KINDS)),
    groups=st.sampled_from([(1, 1), (2, 1), (3, 3), (4, 2)]),
    d_head=st.sampled_from([2, 4, 6]),
    n_layer=st.integers(1, 3),
    d_mlp=st.sampled_from([7, 40]),
    tied=st.booleans(),
    seed=st.integers(0, 99),
)
def test_models_of_any_shape_are_exported(tmp_path_factory, kind, groups, d_head, n_layer, d_mlp, tied, seed):
    n_head, n_key = groups
    if KINDS[kind][0] == "gpt2":
        shape = {"n_head": n_head, "n_layer": n_layer, "n_inner": d_mlp, "n_embd": n_head * d_head}
    else:
        shape = {"num_attention_heads": n_head, "num_hidden_layers": n_layer, "intermediate_size": d_mlp}
        shape |= {"hidden_size": n_head * d_head, "num_key_value_heads": n_key, "head_dim": d_head, "rotary_pct": 1.0}
    model, tokens = make_plain(kind, **shape, tie_word_embeddings=tied, seed=seed), make_tokens(seed=seed)
    original = copy.deepcopy(model)
    measured(model, tokens)
    check_export(model, original, tokens, tmp_path_factory.mktemp("exported"))


def test_half_way_checkpoints_are_named():
    ordinary, model = make_plain(), make_plain()
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


def part_of_output(reader, i):
    """Which of a reader's sites output i stands for, from the layout that the architectures document."""
    n_heads = 2
    if len(reader.reads[1]) == 1:
        return 0
    if reader.in_out:  # GPT-2: all queries, all keys, all values
        return int(i >= 2 * len(reader.matrix) // 3)
    width = len(reader.matrix) // n_heads  # GPT-NeoX: head by head
    return int(i % width >= 2 * width // 3)


def naive_norm(norm, site, x, token, position, *, frozen, position0, eot):
    """A norm and what is frozen of it by the definition, of one token's stream."""
    centred = x - x.mean() if norm.centres else x
    std = (centred.square().mean() + norm.eps).sqrt()
    if site.kind in frozen:
        at_eot = eot and site.kind == "v" and token == EOT
        std = site.average[1] if (position0 and position == 0) or at_eot else site.average[0]
    return centred / std * norm.weight + (0 if norm.bias is None else norm.bias)


def naive_reader(reader, x, tokens, **state):
    """Norm and linear layer by the definition, one token and output at a time."""
    norm, sites = reader.reads
    parts = [part_of_output(reader, i) for i in range(len(reader.matrix))]
    out = torch.empty(*x.shape[:2], len(parts), dtype=x.dtype)
    for b in range(x.shape[0]):
        for p in range(x.shape[1]):
            read = [naive_norm(norm, site, x[b, p], tokens[b, p], p, **state) for site in sites]
            for i, part in enumerate(parts):
                out[b, p, i] = read[part] @ reader.matrix[i]
    return out if reader.bias is None else out + reader.bias


@pytest.mark.parametrize("eot", [False, True])
@pytest.mark.parametrize("position0", [False, True])
@pytest.mark.parametrize("frozen", [(), ("qk",), ("v",), ("ln_2", "qk"), ("ln_2", "qk", "v", "ln_f")])
@pytest.mark.parametrize("batch", [2, 6], ids=["activations are smaller", "weights are smaller"])
@pytest.mark.parametrize("kind", ["GPT-2", "GPT-NeoX", "Llama with biases"])
def test_frozen_sites_equal_the_definition(kind, frozen, position0, eot, batch):
    model, tokens = make_plain(kind, num_hidden_layers=1), make_tokens(batch=6)
    if kind.startswith("Llama"):
        model = make_plain(kind, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=10)
    measured(model, tokens)
    tokens = tokens[:batch, :4] if batch == 2 else tokens
    sites = removal_sites(model)
    freeze(model, [name for name in sites if name[0] in frozen], position0=position0, eot=eot)
    state = {"frozen": frozen, "position0": position0, "eot": eot}
    streams, seen = {}, []
    for module in model.modules():
        if isinstance(module, RemovableNorm):
            module.register_forward_hook(lambda module, args, out: streams.update({module: args[0]}))
        if isinstance(module, RemovableReader):
            module.register_forward_hook(lambda module, args, out: seen.append((module, out)))
    final = final_norm(model)
    final.register_forward_hook(lambda module, args, out: seen.append((module, out)))
    with torch.no_grad(), exact():
        model(tokens)
    assert len(seen) == sum(isinstance(m, RemovableReader) for m in model.modules()) + 1
    for module, out in seen[:-1]:
        same(out, naive_reader(module, streams[module.reads[0]], tokens, **state))
    _, out = seen[-1]
    for b in range(len(tokens)):
        for p in range(tokens.shape[1]):
            expected = naive_norm(final, final.sites["ln_f"], streams[final][b, p], tokens[b, p], p, **state)
            same(out[b, p], expected)


def test_freezing_qk_leaves_v_exact():
    model, tokens = make_plain(), make_tokens()
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
    model, tokens = make_plain(), make_tokens()
    measured(model, tokens)
    freeze(model, removal_sites(model))
    model(tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


# -- wrong use --------------------------------------------------------------------------------------------


def test_wrong_use_is_named():
    model, tokens = make_plain(), make_tokens()
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
        make_removable(make_plain(add_cross_attention=True))
