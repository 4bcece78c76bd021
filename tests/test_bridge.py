"""The analyses' laws on TransformerBridges that a user holds: raw, in compatibility mode, native, or as `load_model`'s.

Each is compared with the Bridge's own forward and hooks, in its own coordinates.
"""

import re
from functools import cache

import pytest
import torch
import transformers
from conftest import HOOKED, random_tokens, randomise

from lnfree_interp import (
    PromptPairs,
    Reader,
    ablate_neurons,
    activation_patching,
    attention_sinks,
    attribution_patching,
    attribution_to,
    direct_logit_attribution,
    evaluate_loss,
    forward,
    load_model,
    logit_attributions,
    rank_confidence_neurons,
    read_weights,
    residual_norms,
    through_hooks,
)
from lnfree_interp.bridge_building import build_bridge
from lnfree_interp.models import as_model
from lnfree_interp.weights import final_norm, own_hooks, why_not_read

SHAPE = {
    "vocab_size": 61,
    "max_position_embeddings": 32,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "bos_token_id": None,
    "eos_token_id": None,
}
GROUPED = SHAPE | {"num_key_value_heads": 2}
GPT2 = {"vocab_size": 61, "n_positions": 32, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_inner": 40}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
HF = {
    "GPT2": GPT2 | {"scale_attn_by_inverse_layer_idx": True},
    "GPT2 LN-free": GPT2 | {"layer_norm_epsilon": 1e12},
    "GPTNeoX": SHAPE,
    "GPTNeoX one after the other": SHAPE | {"use_parallel_residual": False},
    "Llama": GROUPED
    | {"mlp_bias": True, "attention_bias": True}
    | {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 16}},
    "Mistral": GROUPED | {"sliding_window": 3},
    "Qwen2": GROUPED | {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    "Qwen3": GROUPED | {"head_dim": 6},
}
FIELDS = {
    "n_layers": 2,
    "d_model": 24,
    "n_heads": 3,
    "d_head": 8,
    "d_mlp": 40,
    "n_ctx": 32,
    "d_vocab": 61,
    "act_fn": "gelu_new",
    "dtype": torch.float64,
}
OTHERS = {f"{how} {norm}": (how, norm) for how in ("native", "loaded") for norm in ("LN", "LNPre", None)}
NAMES = (*HF, "GPT2 processed", *OTHERS)
# Hugging Face's RMS norms and some of the Bridge's softmax are in fp32.
IN_FP32 = ("Llama", "Mistral", "Qwen2", "Qwen3")


def hf_module(name):
    """A module of Hugging Face's with random weights."""
    kind = name.split()[0]
    architecture = f"{kind}LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
    module = getattr(transformers, architecture)(getattr(transformers, f"{kind}Config")(**HF[name])).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, p in module.named_parameters():
            around = 1.0 if key.endswith("weight") and ("norm" in key or ".ln_" in key) else 0.0
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.3 + around)
            if name == "GPT2 LN-free" and (".ln_1." in key or ".ln_2." in key):
                p.fill_(1e6 * around)
            elif name == "GPT2 LN-free" and ".ln_f.weight" in key:
                p.mul_(1e6)
    return module


@cache
def bridge_of(name):
    """A Bridge in fp64."""
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    if name in OTHERS:
        how, norm = OTHERS[name]
        if how == "loaded":
            return randomise(build_bridge(FIELDS | {"normalization_type": norm}))
        cfg = TransformerBridgeConfig(**FIELDS, normalization_type=norm, seed=0)
        bridge = TransformerBridge.boot_native(cfg, dtype=torch.float64)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in bridge.parameters():
                p.add_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.3)
        return bridge.eval()
    module = hf_module(name.removesuffix(" processed"))
    bridge = build_bridge_from_module(module, type(module).__name__, hf_config=module.config)
    if name.endswith("processed"):
        bridge.enable_compatibility_mode(disable_warnings=True)
    return bridge.eval()


@pytest.fixture(params=NAMES)
def named(request):
    return request.param, bridge_of(request.param)


def close(name, a, b, tolerance=1e-8):
    """Equal; but as fp32 has it where a Bridge computes in fp32, and to 1e12's effect on what it is added to."""
    kind = name.split()[0]
    tolerance = 1e-4 if kind in IN_FP32 else 1e-6 if name == "GPT2 LN-free" else tolerance
    torch.testing.assert_close(a, b, atol=tolerance * max(1.0, float(b.abs().max())), rtol=tolerance)


def is_ln_free(name):
    return name == "GPT2 LN-free" or name.endswith("None")


@torch.no_grad()
def own(model, tokens, *names):
    """Activations of a Bridge's own forward."""
    found = {}
    hooks = [(name, lambda x, hook, name=name: found.__setitem__(name, x.clone())) for name in names]
    logits = model.run_with_hooks(tokens, fwd_hooks=hooks)
    return [logits, *(found[name] for name in names)]


def make_pairs(model, n=2, pos=6):
    clean = random_tokens(model, n, pos)
    corrupted = clean.clone()
    corrupted[:, 2] = (clean[:, 2] + 1) % model.cfg.d_vocab
    return PromptPairs(clean, corrupted, torch.tensor([[3, 4]] * n))


@torch.no_grad()
def test_weights_are_read_and_both_paths_give_the_bridges_own_logits(named):
    name, model = named
    tokens = random_tokens(model)
    assert why_not_read(model) is None
    wanted = model(tokens)
    close(name, forward.unembed(model, forward.run(model, tokens)), wanted)
    close(name, forward.unembed(model, through_hooks.run(model, tokens, None, 0, {}, None)), wanted)
    resid = torch.randn(2, 5, model.cfg.d_model, dtype=torch.float64)
    fast = forward.run(model, resid=resid, start_layer=1, positions=[-1, 2])
    close(name, through_hooks.run(model, None, resid, 1, {}, [-1, 2]), fast)


@torch.no_grad()
def test_hooks_do_the_same_on_both_paths(named):
    name, model = named
    tokens = random_tokens(model)
    sites = ["hook_resid_pre", "attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_z", "hook_attn_out"]
    sites += ["attn.hook_pattern", "hook_resid_mid", "mlp.hook_pre", "mlp.hook_post", "hook_mlp_out", "hook_resid_post"]
    for site in sites:
        if site == "hook_resid_mid" and getattr(model.cfg, "parallel_attn_mlp", False):
            continue
        hooks = {f"blocks.1.{site}": lambda x: x * 1.5}
        if site == "attn.hook_pattern" and name.startswith("native") and not reads_pattern(model):
            with pytest.raises(ValueError, match="after the pattern is used"):
                through_hooks.run(model, tokens, None, 0, hooks, None)
            continue
        fast = forward.run(model, tokens, hooks=hooks, positions=[2, 5])
        close(name, through_hooks.run(model, tokens, None, 0, hooks, [2, 5]), fast)


def reads_pattern(model):
    return getattr(model.blocks[0].attn.original_component, "accepts_pattern_fn", False)


@torch.no_grad()
@pytest.mark.parametrize("by", ["component", "head", "neuron"])
def test_attributions_sum_to_the_logit_and_direct_effects_are_removals(named, by):
    name, model = named
    tokens = random_tokens(model)
    linear, exact = logit_attributions(model, tokens, by=by)
    last = model.cfg.n_layers - 1
    logits, resid, attn_out, z, post = own(
        model,
        tokens,
        f"blocks.{last}.hook_resid_post",
        "blocks.0.hook_attn_out",
        "blocks.0.attn.hook_z",
        "blocks.0.mlp.hook_post",
    )
    targets = tokens[:, 1:, None]
    wanted = logits[:, :-1].gather(-1, targets)[..., 0]
    close(name, linear.values.sum(0) + linear.bias, wanted)
    W_O = model.blocks[0].attn.W_O
    parts = {
        "component": ("L0.attn", lambda: attn_out),
        "head": ("L0H1", lambda: z[:, :, 1] @ W_O[1]),
        "neuron": ("L0N7", lambda: post[..., 7:8] * model.blocks[0].mlp.W_out[7]),
    }
    label, c = parts[by]
    without = model.unembed(model.ln_final(resid - c()))[:, :-1].gather(-1, targets)[..., 0]
    found = dict(zip(exact.labels, exact.values))[label]
    close(name, found, wanted - without, 1e-7)
    assert torch.equal(linear.values, exact.values) == is_ln_free(name)


@pytest.mark.parametrize("site", ["resid_pre", "z", "attn_out"])
def test_a_patched_cell_is_a_hook_that_overwrites_it(named, site):
    name, model = named
    pairs = make_pairs(model)
    found = activation_patching(model, pairs, site=site).values
    hook_name = f"blocks.1.{'attn.hook_z' if site == 'z' else f'hook_{site}'}"
    with torch.no_grad():
        clean = own(model, pairs.clean, hook_name)[1]

        def put(x, hook):
            x = x.clone()
            if site == "z":
                x[:, :, 2] = clean[:, :, 2]
            else:
                x[:, 2] = clean[:, 2]
            return x

        patched = model.run_with_hooks(pairs.corrupted, fwd_hooks=[(hook_name, put)])
        before = model(pairs.corrupted)
    wanted = (patched - before)[:, -1, 3] - (patched - before)[:, -1, 4]
    close(name, found[:, 1, 2].double(), wanted, 1e-7)


def test_gradients_are_the_bridges_own(named, monkeypatch):
    name, model = named
    pairs = make_pairs(model)
    found = attribution_patching(model, pairs, site="resid_pre").values
    with torch.no_grad():
        clean = own(model, pairs.clean, "blocks.1.hook_resid_pre")[1]
    nodes = []

    def grab(x, hook):
        nodes.append(x.detach().requires_grad_())
        return nodes[-1]

    logits = model.run_with_hooks(pairs.corrupted, fwd_hooks=[("blocks.1.hook_resid_pre", grab)])
    (logits[:, -1, 3] - logits[:, -1, 4]).sum().backward(inputs=nodes)
    wanted = (nodes[0].grad * (clean - nodes[0].detach())).sum(-1)
    close(name, found[:, 1].double(), wanted, 1e-7)


@torch.no_grad()
def test_norms_and_sinks_are_those_of_the_bridges_activations(named):
    name, model = named
    tokens = random_tokens(model)
    _, resid, pattern = own(model, tokens, "blocks.1.hook_resid_post", "blocks.1.attn.hook_pattern")
    norms = residual_norms(model, tokens)
    assert ("pos_embed" in norms.points) == (model.cfg.positional_embedding_type == "standard")
    mean = norms.norm[norms.points.index("L1.resid_post"), norms.groups.index("position 0"), 0]
    close(name, mean.double(), resid[:, 0].norm(dim=-1).mean())
    at_first = attention_sinks(model, tokens).attention.view(2, -1)[1]
    close(name, at_first.double(), pattern[:, :, 1:, 0].mean((0, 2)))


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, 1])
def test_ablating_a_neuron_is_a_hook_that_sets_it(named, layer):
    name, model = named
    tokens = random_tokens(model)
    found = ablate_neurons(model, tokens, layer=layer, neurons=[7])
    hook_name = f"blocks.{layer}.mlp.hook_post"
    mean = own(model, tokens, hook_name)[1][..., 7].mean()

    def put(x, hook):
        x = x.clone()
        x[..., 7] = mean
        return x

    losses = [
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        for logits in (model.run_with_hooks(tokens, fwd_hooks=[(hook_name, put)]), model(tokens))
    ]
    close(name, found.loss.flatten().double(), losses[0] - losses[1], 2e-5)
    assert torch.equal(found.loss, found.loss_frozen) == is_ln_free(name)
    assert len(rank_confidence_neurons(model, layer)) == model.cfg.d_mlp


@torch.no_grad()
def test_losses_are_those_of_the_bridges_logits(named):
    name, model = named
    tokens = random_tokens(model)
    wanted = torch.nn.functional.cross_entropy(model(tokens)[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    close(name, evaluate_loss(model, tokens).losses.double(), wanted, 1e-6)


# ---------------------------------------------------------------------------------------------------------
# What is not read


@torch.no_grad()
def test_hooks_of_a_users_are_run(named):
    name, model = named
    tokens = random_tokens(model)
    for hook_name in ("blocks.0.hook_mlp_out", "blocks.1.attn.hook_v"):
        model.add_hook(hook_name, lambda x, hook: x * 1.5)
        try:
            assert own_hooks(model) == (hook_name,) and read_weights(model) is None
            wanted = model(tokens)
            close(name, forward.unembed(model, forward.run(model, tokens)), wanted)
            linear = direct_logit_attribution(model, tokens)
            targets = wanted[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
            close(name, linear.values.sum(0) + linear.bias, targets)
        finally:
            model.reset_hooks()
    assert own_hooks(model) == () and read_weights(model) is not None


def changed(name, change):
    """A Bridge of its own, changed."""
    model = bridge_of.__wrapped__(name)
    change(model)
    return model


class Doubled(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Adapter(torch.nn.Module):
    __module__ = "peft.tuners.lora.layer"


def test_adapters_are_refused():
    model = changed("GPT2", lambda model: setattr(model.blocks[0].mlp, "lora", Adapter()))
    for function in (as_model, read_weights):
        with pytest.raises(ValueError, match=r"the model has adapters \(Adapter\): merge them first"):
            function(model)


@torch.no_grad()
def test_modules_of_a_users_are_run_or_refused_where_they_would_be_read():
    def double(model):
        inner = model.blocks[0].attn.o.original_component
        own = Doubled(24, 24).double()
        own.weight, own.bias = torch.nn.Parameter(inner.weight.T.clone()), torch.nn.Parameter(inner.bias.clone())
        model.blocks[0].attn.o.add_module("_original_component", own)

    model = changed("GPT2", double)
    tokens = random_tokens(model)
    assert "Doubled" in why_not_read(model)
    wanted = model(tokens)
    close("GPT2", forward.unembed(model, forward.run(model, tokens)), wanted)
    linear = direct_logit_attribution(model, tokens)
    close("GPT2", linear.values.sum(0) + linear.bias, wanted[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0])
    with pytest.raises(ValueError, match="a Doubled where a plain linear map is read"):
        direct_logit_attribution(model, tokens, by="head")


def set_act(model):
    model.blocks[1].mlp.original_component.act = torch.nn.ReLU()


def set_config(model):
    model.original_model.config.hidden_act = "gelu"


def hook_dropout(model):
    model.original_model.transformer.drop.register_forward_hook(lambda module, given, made: 2 * made)


def replace_gated(model):
    for part in ("gate", "in", "out"):
        inner = getattr(model.blocks[1].mlp, part).original_component
        inner.weight = torch.nn.Parameter(inner.weight * 1.5)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "change", "why"),
    [
        ("GPT2", set_act, "activation function of block 1 is not its config's 'gelu_new'"),
        ("Llama", set_config, "activation function of block 0 is not its config's 'gelu'"),
        ("GPT2", hook_dropout, r"a hook at original_model\.transformer\.drop"),
        ("Llama processed", replace_gated, None if not HOOKED else "W_gate of block 1 was replaced"),
    ],
)
def test_what_is_run_is_what_counts(name, change, why):
    model = changed(name, change)
    tokens = random_tokens(model)
    assert why_not_read(model) is None if why is None else re.search(why, why_not_read(model))
    close(name, forward.unembed(model, forward.run(model, tokens)), model(tokens))


@pytest.mark.parametrize("name", ["GPT2", "Llama"])
def test_modules_in_training_mode_drop_out_whatever_the_bridge_says(name, monkeypatch):
    for dropout in ("embd_pdrop", "resid_pdrop", "attn_pdrop") if name == "GPT2" else ("attention_dropout",):
        off = {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0} if name == "GPT2" else {}
        monkeypatch.setitem(HF, name, HF[name] | off | {dropout: 0.5})
        model = changed(name, lambda model: model.original_model.train())
        assert "in training mode, with dropout" in why_not_read(model)
        model.eval()
        assert why_not_read(model) is None


def hook_trunk(model):
    model.original_model.transformer.register_forward_hook(lambda module, given, made: None)


def hook_inside(model):
    model.original_model.register_forward_hook(lambda module, given, made: None)


def own_forward(model):
    inside = model.original_model
    forward = inside.forward
    inside.forward = lambda *args, **kwargs: forward(*args, **kwargs)


def own_kind(model):
    kind = type(model.original_model)

    class Odd(kind):
        def forward(self, *args, **kwargs):
            made = super().forward(*args, **kwargs)
            made.logits = made.logits * 3
            return made

    model.original_model.__class__ = Odd


def own_head(model):
    head = Doubled(24, 61).double()
    head.weight, head.bias = model.unembed.original_component.weight, None
    model.unembed.add_module("_original_component", head)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (hook_trunk, r"carries a hook at original_model\.transformer, where nothing but its own"),
        (hook_inside, "carries a hook at original_model, where nothing but its own"),
        (own_forward, "original_model has a forward of its own"),
        (own_kind, "the logits of a GPT2LMHeadModel are not its final norm and W_U"),
        (own_head, "a Doubled where a plain linear map is read"),
    ],
)
def test_what_comes_after_the_final_norm_is_refused(change, message):
    model = changed("GPT2", change)
    assert why_not_read(model) is not None
    for function in (direct_logit_attribution, evaluate_loss):
        with pytest.raises(ValueError, match=message):
            function(model, random_tokens(model))


UNREAD = {
    "GPTNeo": {"vocab_size": 61, "max_position_embeddings": 32, "hidden_size": 24, "num_layers": 2, "num_heads": 4}
    | {"attention_types": [[["global", "local"], 1]], "window_size": 3},
    "Gemma": GROUPED | {"head_dim": 6},
    "Granite": GROUPED | {"logits_scaling": 3.0},
    "Olmo2": GROUPED | {"pad_token_id": 0},
}


@pytest.fixture
def unread(monkeypatch):
    """Bridges of architectures that nothing here is written for."""
    for name, fields in UNREAD.items():
        monkeypatch.setitem(HF, name, fields)
    return bridge_of.__wrapped__


@torch.no_grad()
@pytest.mark.parametrize("name", ["GPTNeo", "Gemma"])
def test_other_architectures_go_through_their_own_forward(unread, name):
    model = unread(name)
    tokens = random_tokens(model)
    assert f"it is a {name}ForCausalLM" in why_not_read(model)
    wanted = model(tokens)
    torch.testing.assert_close(forward.unembed(model, forward.run(model, tokens)), wanted, atol=1e-5, rtol=1e-5)
    linear = direct_logit_attribution(model, tokens, by="head")
    targets = wanted[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    torch.testing.assert_close(linear.values.sum(0) + linear.bias, targets, atol=1e-5, rtol=1e-5)


def test_architectures_that_would_come_out_wrong_are_refused(unread):
    model = unread("Granite")
    with pytest.raises(ValueError, match="logits of a GraniteForCausalLM are not its final norm and W_U"):
        evaluate_loss(model, random_tokens(model))
    model = unread("Olmo2")
    for by in ("head", "neuron"):
        with pytest.raises(ValueError, match=f"by='{by}' is undefined"):
            direct_logit_attribution(model, random_tokens(model), by=by)
    tokens = random_tokens(model)
    for reader, hook in ((Reader.query(1), "attn.hook_q"), (Reader.neuron(1), "mlp.hook_pre")):
        found = attribution_to(model, tokens, reader)  # of the stream itself: no norm comes before
        wanted = model.run_with_cache(tokens)[1][f"blocks.1.{hook}"].flatten(2).permute(2, 0, 1)
        torch.testing.assert_close(found.values.sum(1) + found.bias, wanted, atol=1e-5, rtol=1e-5)


def test_ln_free_bridges_have_an_affine_norm():
    norm = final_norm(bridge_of("GPT2 LN-free"))
    assert norm.kind == "LNFree" and norm.linear and norm.centres
    assert final_norm(bridge_of("GPT2")).kind == "LN"
    assert final_norm(bridge_of("loaded None")).kind is None


def test_a_hook_that_a_bridge_never_runs_is_said():
    model = bridge_of("GPTNeoX")
    with pytest.raises(ValueError, match=r"never runs the hook blocks\.0\.attn\.hook_rot_q"):
        through_hooks.run(model, random_tokens(model), None, 0, {"blocks.0.attn.hook_rot_q": lambda x: x}, None)


# ---------------------------------------------------------------------------------------------------------
# TransformerLens 4's own tools on what load_model returns there


@pytest.mark.skipif(HOOKED, reason="HookedTransformers run their norms in whatever way their inputs are split")
@pytest.mark.parametrize("kind", ["GPT-2", "Llama", "Qwen"])
def test_split_inputs_are_normalised(model_of, kind):
    model = model_of(kind)
    tokens = random_tokens(model)
    logits = model(tokens)
    model.set_use_split_qkv_input(True)
    try:
        torch.testing.assert_close(model(tokens), logits)
    finally:
        model.set_use_split_qkv_input(False)


@pytest.mark.skipif(HOOKED, reason="in TransformerLens 3.9 they are for its HookedTransformer, or not there")
@pytest.mark.parametrize("checkpoint", ["tiny", "tiny-noLN"])
def test_transformer_lens_own_tools_run_on_loaded_models(checkpoint):
    from transformer_lens.patching import get_act_patch_direct_path
    from transformer_lens.tools.analysis.attribution_patching import EdgeAttributionConfig, attribution_patch
    from transformer_lens.tools.analysis.direct_logit_attribution import direct_logit_attribution as theirs
    from transformer_lens.tools.analysis.logit_lens import logit_lens

    model = load_model(checkpoint, device="cpu", dtype="float64")
    clean = model.to_tokens("It was a dark and stormy night")
    corrupted = clean.clone()
    corrupted[:, 2] = clean[:, 5]
    answer, wrong = clean[:, 3], clean[:, 4]
    ours = direct_logit_attribution(model, clean, answer, versus=wrong)
    torch.testing.assert_close(ours.values[..., 0], theirs(model, clean, answer, wrong).attribution.double())
    lens = logit_lens(model, clean)
    torch.testing.assert_close(lens.values[-1].flatten().log_softmax(-1), model(clean)[0, -1].log_softmax(-1))

    def difference(logits):
        return (logits[:, -1, answer] - logits[:, -1, wrong]).sum()

    model.requires_grad_(True)
    try:
        for granularity in ("node", "edge"):
            config = EdgeAttributionConfig(granularity=granularity)
            assert attribution_patch(model, clean, corrupted, difference, config).node_scores
    finally:
        model.requires_grad_(False)
    caches = [model.run_with_cache(tokens)[1] for tokens in (clean, corrupted)]
    path = get_act_patch_direct_path(model, corrupted, *caches, difference, 0, 1, verbose=False)
    assert path.shape == (model.cfg.n_layers, model.cfg.n_heads) and path[1:].isfinite().all()
    assert read_weights(model) is not None
