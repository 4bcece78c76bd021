"""Every family of checkpoints loads as the model transformers makes of it; what would not be exact is refused."""

import json
import shutil
from unittest.mock import patch

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lnfree_interp import load_model, read_weights
from lnfree_interp.checkpoints import FAMILIES
from lnfree_interp.names import CHECKPOINTS

TRAINED_FOR, CONTEXT = 8, 24
# Scalings of rotary positions, and how far fp64 log-probabilities may be off: TransformerLens computes the frequencies
# of Llama 3's scaling in fp32, whatever the model's dtype.
ROPES = {
    "default": ({}, 1e-9),
    "linear": ({"factor": 3.0}, 1e-9),
    "llama3": (
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        | {"original_max_position_embeddings": TRAINED_FOR},
        1e-6,
    ),
    "yarn": ({"factor": 3.0, "original_max_position_embeddings": TRAINED_FOR}, 1e-9),
    "yarn with all options": (
        {"factor": 3.0, "original_max_position_embeddings": TRAINED_FOR, "beta_fast": 4.0, "beta_slow": 2.0}
        | {"mscale": 0.7, "mscale_all_dim": 1.3, "truncate": False},
        1e-9,
    ),
    "yarn with a factor on attention": (
        {"factor": 3.0, "original_max_position_embeddings": TRAINED_FOR, "attention_factor": 1.3},
        1e-9,
    ),
}


def rope(name, base=500.0, **more):
    return {"rope_type": name.split()[0], "rope_theta": base} | ROPES[name][0] | more


def random_checkpoint(directory, model_type, *, ln_free=False, seed=0, shards=False, **fields):
    """A small model of a family with random weights, norms and biases included, as transformers writes it."""
    family = FAMILIES[model_type]
    config = make_config(model_type, **{family.eps: 1e12 if ln_free else 1e-2}, **fields)
    model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            is_norm = "norm" in name or ".ln_" in name
            around = 1.0 if is_norm and name.endswith("weight") else 0.0
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2 + around)
            if ln_free and around:
                p.mul_(1e6)
    model.save_pretrained(directory, max_shard_size=4000 if shards else "5GB")
    return config


def make_config(model_type, **fields):
    common = {"vocab_size": 61, "bos_token_id": 0, "eos_token_id": 0}
    if model_type == "gpt2":
        shape = {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT}
    else:
        shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 28}
        shape |= {"max_position_embeddings": CONTEXT}
    if model_type not in ("gpt2", "gpt_neox"):
        shape |= {"num_key_value_heads": 2, "head_dim": 6}
    return transformers.AutoConfig.for_model(model_type, **(common | shape | fields))


def tokens_of(vocabulary=61):
    return torch.randint(vocabulary, (2, 21), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def reference(directory, **arguments):
    """transformers' log-probabilities in fp64: it computes norms and positions in fp32 unless that is something else."""
    loaded = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64, **arguments)
    with patch.multiple(torch, float=torch.float64, float32=torch.float64):
        model = transformers.AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float64).eval()
        model.load_state_dict(loaded.state_dict())
        return model(tokens_of()).logits.log_softmax(-1)


def assert_loads_as_transformers_does(directory, expected=None, *, ln_free=False, within=1e-9):
    expected = reference(directory) if expected is None else expected
    assert expected.std() > 0.1  # weights that tell right from wrong
    for dtype in (torch.float64, torch.float32):
        model = load_model(directory, dtype=dtype, device="cpu")
        assert (model.cfg.normalization_type is None) == ln_free
        ours = model(tokens_of()).double().log_softmax(-1)
        assert read_weights(model) is not None
        if dtype == torch.float64:
            assert (ours - expected).abs().max() < within
        assert (ours - expected).norm() / expected.norm() <= 1e-5
    return model


COMMON = {
    "seed": st.integers(0, 99),
    "ln_free": st.booleans(),
    "shards": st.booleans(),
    "tie_word_embeddings": st.booleans(),
}
GROUPS = st.sampled_from([(4, 4, 6), (4, 2, 8), (3, 1, 10), (6, 2, 4)])  # heads, heads of keys, d_head
HIDDEN_ACTS = st.sampled_from(["silu", "gelu", "gelu_pytorch_tanh", "relu"])
OPTIONS = {
    "gpt2": {
        "activation_function": st.sampled_from(["gelu_new", "relu", "silu"]),
        "n_inner": st.sampled_from([None, 17]),
        "scale_attn_weights": st.booleans(),
    },
    "gpt_neox": {
        "hidden_act": HIDDEN_ACTS,
        "use_parallel_residual": st.booleans(),
        "attention_bias": st.booleans(),
        "partial_rotary_factor": st.sampled_from([1.0, 0.34, 0.7]),  # of 6: 6, 2, 4
    },
    "llama": {"groups": GROUPS, "hidden_act": HIDDEN_ACTS, "attention_bias": st.booleans()},
    "mistral": {"groups": GROUPS, "sliding_window": st.sampled_from([None, 1, 5, 21, 4096])},
    "qwen2": {
        "groups": GROUPS,
        "use_sliding_window": st.booleans(),
        "sliding_window": st.sampled_from([3, 9]),
        "max_window_layers": st.integers(0, 2),
    },
    "qwen3": {
        "groups": GROUPS,
        "attention_bias": st.booleans(),
        "use_sliding_window": st.booleans(),
        "sliding_window": st.sampled_from([3, 9]),
        "max_window_layers": st.integers(0, 2),
    },
}


@pytest.mark.parametrize("model_type", OPTIONS)
def test_log_probabilities_are_those_of_transformers(model_type, tmp_path_factory):
    ropes = st.sampled_from(list(ROPES))

    @settings(max_examples=10, deadline=None)
    @given(st.fixed_dictionaries(COMMON | OPTIONS[model_type] | {"rope": ropes}))
    def check(options):
        directory = tmp_path_factory.mktemp("checkpoint")
        ln_free, scaling = options["ln_free"], options.pop("rope")
        if "groups" in options:
            heads, keys, d_head = options.pop("groups")
            options |= {"num_attention_heads": heads, "num_key_value_heads": keys, "head_dim": d_head}
        if scaling == "linear" and options.get("sliding_window"):
            scaling = "default"
        if model_type != "gpt2":
            partial = options.pop("partial_rotary_factor", None)
            options["rope_parameters"] = rope(
                scaling, **({} if partial is None else {"partial_rotary_factor": partial})
            )
        random_checkpoint(directory, model_type, **options)
        assert_loads_as_transformers_does(directory, ln_free=ln_free, within=ROPES[scaling][1])

    check()
