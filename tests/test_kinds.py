"""The laws of every analysis but patching, on each kind of block, on the fast forward; and all of it on a device."""

import pytest
import torch
import virtual_device
from conftest import KINDS, NEW_KINDS, make_model, random_tokens
from test_dla import BY, component_outputs, target_logits
from test_evaluate import ITEMS, going_on, uncovered, with_letters
from test_neurons import assert_is_by_hook
from test_patching import make_pairs

from lnfree_interp import (
    ablate_neurons,
    activation_patching,
    attention_sinks,
    attribution_patching,
    evaluate_loss,
    forward,
    generate_samples,
    hellaswag,
    logit_attributions,
    read_weights,
    residual_norms,
)
from lnfree_interp.patching import SITES

UNCAPPED = {"output_logits_soft_cap": -1.0}


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("kind", NEW_KINDS)
def test_attributions_sum_to_the_logit_and_direct_effects_are_removals(model_of, kind, by, normalised):
    model = model_of(kind, normalised, **UNCAPPED)
    tokens = random_tokens(model)
    if kind == "Gemma" and by != "component":
        with pytest.raises(ValueError, match="normalises what its blocks write"):
            logit_attributions(model, tokens, by=by)
        return
    linear, exact = logit_attributions(model, tokens, by=by)
    outputs, resid = component_outputs(model, tokens, by)
    whole = target_logits(model, resid[:, :-1], tokens[:, 1:])
    close(linear.values.sum(0) + linear.bias, whole)
    removed = torch.stack([whole - target_logits(model, (resid - c)[:, :-1], tokens[:, 1:]) for c in outputs])
    close(exact.values, removed, 1e-8)
    assert normalised or torch.equal(linear.values, exact.values)


@pytest.mark.parametrize("method, layer", [("stream", -1), ("moments", -1), ("rerun", -1), ("rerun", 0)])
def test_ablating_a_neuron_is_a_hook_that_sets_it(model_of, method, layer):
    for kind in NEW_KINDS:
        model = model_of(kind)
        tokens = random_tokens(model)
        if kind == "Gemma" and method != "rerun":
            with pytest.raises(ValueError, match="does not serve"):
                ablate_neurons(model, tokens, layer=layer, method=method)
            continue
        result = ablate_neurons(model, tokens, layer=layer, neurons=[3, 11], method=method, tolerance=1e-8)
        assert_is_by_hook(result, model, tokens, layer, [[3], [11]], atol=2e-8 if method == "moments" else 1e-9)


def test_norms_and_sinks_are_those_of_transformer_lens_cache(any_kind):
    tokens = random_tokens(any_kind, batch=4, pos=9)
    _, cache = any_kind.run_with_cache(tokens)
    sinks, norms = attention_sinks(any_kind, tokens), residual_norms(any_kind, tokens)
    on_first = torch.stack([cache[f"blocks.{i}.attn.hook_pattern"][:, :, 1:, 0].mean((0, 2)) for i in range(2)])
    close(sinks.attention, on_first.flatten())
    assert ("L0.resid_mid" in norms.points) == ("blocks.0.hook_resid_mid" in cache)
    assert "pos_embed" not in norms.points
    for name in ("resid_post", "resid_pre"):
        first = cache[f"blocks.0.hook_{name}"][:, 0].norm(dim=-1).mean()
        close(norms.norm[norms.points.index(f"L0.{name}"), 0, 0], first)


def test_loss_is_transformer_lens_own(any_kind):
    tokens = random_tokens(any_kind, batch=5, pos=8)
    wanted = any_kind(tokens, return_type="loss", loss_per_token=True)
    close(evaluate_loss(any_kind, tokens).losses, wanted.float(), 1e-5)


@pytest.mark.parametrize("cut", [1, 4, 8])
def test_going_on_from_kept_keys_is_the_whole_pass(any_kind, cut):
    tokens = random_tokens(any_kind, batch=4, pos=9)
    tokens[:, :cut] = tokens[[0, 0, 2, 2], :cut]
    rest, kept = going_on(any_kind, tokens, cut)
    close(rest, forward.run(any_kind, tokens)[:, cut:])
    assert kept[0][0].shape[:2] == (4, 9)


@pytest.mark.parametrize("kind", NEW_KINDS)
def test_samples_and_hellaswag_are_those_of_the_models_own_forward(kind):
    normalization, fields = KINDS[kind]
    models = [with_letters(normalization, **fields) for _ in range(2)]
    fast, slow = models[0], uncovered(models[1])
    samples = [generate_samples({"m": m}, "abc", max_new_tokens=6, temperature=0.5).texts for m in (fast, slow)]
    assert samples[0] == samples[1]
    close(*(hellaswag(m, ITEMS).log_probs for m in (fast, slow)))


@pytest.mark.parametrize("fields", [{"use_attn_result": True}, {"positional_embedding_type": "alibi"}], ids=str)
def test_what_is_not_read_is_slow_and_right(fields):
    model = make_model("RMS", **fields)
    tokens = random_tokens(model)
    assert read_weights(model) is None
    wanted = model(tokens, return_type="loss", loss_per_token=True)
    close(evaluate_loss(model, tokens).losses, wanted.float(), 1e-5)


@pytest.mark.slow
@pytest.mark.skipif(virtual_device.MISSING is not None, reason=str(virtual_device.MISSING))
@pytest.mark.parametrize("kind", NEW_KINDS)
def test_a_device_gives_the_cpus_numbers_and_is_not_waited_for_more(kind):
    normalization, fields = KINDS[kind]
    here = make_model(normalization, dtype=torch.float32, **fields)
    there = virtual_device.on_device(here)
    for site in (site for site in SITES if f"blocks.0.{SITES[site].hook}" in here.hook_dict):
        for by_position in [SITES[site].unit != "pos"]:
            options = {"site": site, "layers": [0, 1], "by_position": by_position}
            for function in (activation_patching, attribution_patching):
                syncs = []
                for n in (2, 4):  # prompts
                    pairs = make_pairs(here, n=n, pos=6, changed=((1, 3), (4,)))
                    with virtual_device.host_syncs() as waits:
                        found = function(there, pairs, **options).values.cpu()
                    syncs.append(waits.total())
                wanted = function(here, pairs, **options).values
                size = wanted.abs().max().item()
                torch.testing.assert_close(found, wanted, atol=1e-4 * size, rtol=1e-3)
                assert syncs[1] <= syncs[0], (site, dict(waits))
