"""LayerNorm removal: folding is exact, half-way checkpoints are named."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from lnfree_interp.layernorm import fold_ln_free, is_ln_free


def minute_config(**changes) -> GPT2Config:
    sizes = dict(vocab_size=23, n_positions=12, n_embd=16, n_layer=2, n_head=2, eos_token_id=0, bos_token_id=0)
    return GPT2Config(**sizes | changes)


def ln_free_model(config: GPT2Config, seed: int = 0) -> GPT2LMHeadModel:
    """A random model in the published format, fp64, with every bias and the ln_f gain away from its default."""
    config.layer_norm_epsilon = 1e12
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(config).double().eval()
    for name, parameter in model.named_parameters():
        if "ln_1" in name or "ln_2" in name:
            parameter.data.fill_(1e6 if name.endswith("weight") else 0.0)
        elif "ln_f.weight" in name:
            parameter.data.uniform_(1e5, 1e6)
        else:
            parameter.data.normal_(0, 0.3)
    return model


def run_folded(config: GPT2Config, w: dict, tokens: torch.Tensor) -> torch.Tensor:
    """A transformer without normalisation, written out from HookedTransformer-layout weights."""
    resid = w["embed.W_E"][tokens] + w["pos_embed.W_pos"][: tokens.shape[1]]
    causal = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).tril()
    for layer in range(config.n_layer):
        b = f"blocks.{layer}"
        q, k, v = (
            torch.einsum("bpd,hde->bhpe", resid, w[f"{b}.attn.W_{n}"]) + w[f"{b}.attn.b_{n}"][:, None]
            for n in "QKV"
        )
        scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~causal, float("-inf"))
        z = scores.softmax(-1) @ v
        resid = resid + torch.einsum("bhpe,hed->bpd", z, w[f"{b}.attn.W_O"]) + w[f"{b}.attn.b_O"]
        pre = resid @ w[f"{b}.mlp.W_in"] + w[f"{b}.mlp.b_in"]
        post = torch.nn.functional.gelu(pre, approximate="tanh")
        resid = resid + post @ w[f"{b}.mlp.W_out"] + w[f"{b}.mlp.b_out"]
    return resid @ w["unembed.W_U"] + w["unembed.b_U"]


@settings(max_examples=10, deadline=None)
@given(
    heads=st.integers(1, 3),
    d_head=st.integers(2, 5),
    layers=st.integers(1, 3),
    prefix=st.booleans(),
    seed=st.integers(0, 99),
)
def test_folded_equals_hf(heads, d_head, layers, prefix, seed):
    config = minute_config(n_embd=heads * d_head, n_head=heads, n_layer=layers)
    model = ln_free_model(config, seed)
    tokens = torch.randint(23, (3, 12))
    with torch.no_grad():
        expected = model(tokens).logits
    state = dict((model if prefix else model.transformer).state_dict())
    assert is_ln_free(config, state)
    weights = fold_ln_free(config, state, torch.float64)
    assert not state, "fold_ln_free consumes its source"
    logits = run_folded(config, weights, tokens)
    torch.testing.assert_close(logits.log_softmax(-1), expected.log_softmax(-1), atol=1e-6, rtol=0)
    for name, weight in weights.items():
        if name.split(".")[-1] in ("W_E", "W_pos", "W_O", "b_O", "W_out", "b_out", "W_U", "b_U"):
            assert weight.mean(-1).abs().max() < 1e-9, f"{name} is not centred"


def test_half_way_checkpoints_are_named():
    config = minute_config()
    ordinary = GPT2LMHeadModel(config).state_dict()
    assert not is_ln_free(config, ordinary)
    free = ln_free_model(minute_config()).state_dict()
    huge = minute_config(layer_norm_epsilon=1e12)
    assert is_ln_free(huge, {k: v.to(torch.bfloat16) for k, v in free.items()})
    with pytest.raises(ValueError, match="h.0.ln_1.weight is not 1e"):
        is_ln_free(huge, ordinary)
    with pytest.raises(ValueError, match="h.0.ln_1.weight is about 1e"):
        is_ln_free(config, free)
    with pytest.raises(ValueError, match="h.0.ln_1.weight is about inf"):
        is_ln_free(config, {k: v.half() for k, v in free.items()})
    for name in ("h.1.ln_2.weight", "h.1.ln_2.bias", "ln_f.weight"):
        key = "transformer." + name
        with pytest.raises(ValueError, match=name):
            is_ln_free(huge, {**free, key: ordinary[key] + 0.5})
    with pytest.raises(ValueError, match="layer_norm_epsilon 5000"):
        is_ln_free(minute_config(layer_norm_epsilon=5e3), ordinary)
