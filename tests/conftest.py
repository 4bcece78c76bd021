"""Shared fixtures. Types and shapes in signatures are checked by beartype as tests run, unless JAXTYPING_DISABLE=1."""

import os
from pathlib import Path

# Tests must never wait for a hub that may not be there.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
# What tests start in processes of their own imports this package, not one that happens to be installed.
os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])
# The tests' tensors are small: handing them to several threads costs more than it gains, here and in those processes.
os.environ["OMP_NUM_THREADS"] = "1"

import jaxtyping

if not jaxtyping.config.jaxtyping_disable:
    jaxtyping.install_import_hook("lnfree_interp", "beartype.beartype")

import pytest
import torch
import virtual_device

from lnfree_interp import lens

# Autograd makes room for devices at the first backward pass of a process: the virtual one must be there before.
if virtual_device.MISSING is None:
    virtual_device.register()

if not lens.has_hooked_transformer():
    from transformer_lens.model_bridge.generalized_components.attention import AttentionBridge

    masked_softmax = AttentionBridge._masked_softmax

    def softmax_of_the_scores_precision(self, scores, dtype=None):
        """Some of TransformerLens 4's takes its softmax in fp32: that rounding would hide what tests look for."""
        return masked_softmax(self, scores, dtype=torch.promote_types(scores.dtype, dtype or scores.dtype))

    AttentionBridge._masked_softmax = softmax_of_the_scores_precision

NORMALIZATIONS = (None, "LNPre", "LN", "RMSPre", "RMS")

_ROTARY = {"positional_embedding_type": "rotary"}
_GROUPED = {"n_heads": 4, "n_key_value_heads": 2, "d_head": 6}
# Kind of block -> its own normalisation, and what else it has.
KINDS = {
    "GPT-2": ("LNPre", {}),
    "Pythia": ("LN", _ROTARY | {"rotary_dim": 4, "parallel_attn_mlp": True, "act_fn": "gelu"}),
    "Llama": (
        "RMSPre",
        _ROTARY
        | _GROUPED
        | {"gated_mlp": True, "act_fn": "silu", "rotary_base": 500, "use_NTK_by_parts_rope": True}
        | {"NTK_original_ctx_len": 16},
    ),
    "Qwen": ("RMS", _ROTARY | _GROUPED | {"gated_mlp": True, "act_fn": "silu", "use_qk_norm": True}),
    "Gemma": (
        "RMS",
        _ROTARY
        | _GROUPED
        | {"gated_mlp": True, "act_fn": "gelu_pytorch_tanh", "use_normalization_before_and_after": True}
        | {"attn_scores_soft_cap": 2.0, "output_logits_soft_cap": 3.0}
        | {"use_local_attn": True, "window_size": 3, "attn_types": ["local", "global"] * 4},
    ),
}
NEW_KINDS = tuple(kind for kind in KINDS if kind != "GPT-2")


def make_model(normalization_type, *, seed=0, dtype=torch.float64, **overrides):
    """A small model of the installed TransformerLens with random weights, biases and norms included.

    Skips the test where TransformerLens 4 has no such model.
    """
    fields = {
        "n_layers": 2,
        "d_model": 24,
        "n_heads": 3,
        "d_head": 8,
        "d_mlp": 40,
        "n_ctx": 32,
        "d_vocab": 61,
        "act_fn": "gelu_new",
        "normalization_type": normalization_type,
        "device": "cpu",
        "dtype": dtype,
    } | overrides
    try:
        model = lens.build(fields)
    except ValueError as error:
        if not str(error).startswith("TransformerLens 4 builds no model"):
            raise
        pytest.skip(str(error))
    return randomise(model, seed)


def randomise(model, seed=0):
    """A model of `lens.build` with random weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in lens.parameters(model).items():
            around = 1.0 if name.endswith(".w") else 0.0
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.3 + around)
    return model.eval().requires_grad_(False)


def copy_weights(source, target):
    """Give a model another's weights, in its own precision."""
    if lens.has_hooked_transformer():
        dtype = target.cfg.dtype
        state = {k: p.to(dtype) if p.is_floating_point() else p for k, p in source.state_dict().items()}
        target.load_state_dict(state)
    else:
        given = lens.parameters(source)
        for name, p in lens.parameters(target).items():
            p.copy_(given[name])


HOOKED = lens.has_hooked_transformer()
hooked_only = pytest.mark.skipif(not HOOKED, reason="TransformerLens 4 has no HookedTransformer")


def random_tokens(model, batch=3, pos=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.cfg.d_vocab, (batch, pos), generator=generator)


@pytest.fixture(scope="session")
def random_model():
    """Factory of small random models, one of each configuration per session."""
    made = {}

    def factory(normalization_type, **fields):
        key = (normalization_type, *sorted((name, str(field)) for name, field in fields.items()))
        if key not in made:
            made[key] = make_model(normalization_type, **fields)
        return made[key]

    return factory


@pytest.fixture(scope="session")
def model_of(random_model):
    """Factory of small random models of a kind of block, with its own normalisation or without any."""

    def factory(kind, normalised=True, **fields):
        normalization, own = KINDS[kind]
        return random_model(normalization if normalised else None, **(own | fields))

    return factory


@pytest.fixture(params=NORMALIZATIONS, ids=str)
def any_model(request, random_model):
    """One model of each kind of normalisation, none included."""
    return random_model(request.param)


@pytest.fixture(
    params=[(kind, own) for kind in NEW_KINDS for own in (True, False)],
    ids=lambda p: p[0] if p[1] else f"{p[0]} without norms",
)
def any_kind(request, model_of):
    """One model of each other kind of block than GPT-2's, with its own normalisation and without any."""
    return model_of(*request.param)


@pytest.fixture(
    params=[(n, "GPT-2") for n in NORMALIZATIONS] + [(n, kind) for kind in NEW_KINDS for n in (KINDS[kind][0], None)],
    ids=lambda p: f"{p[1]} {p[0]}",
)
def any_block(request, random_model):
    """`any_model` and `any_kind`."""
    normalization, kind = request.param
    return random_model(normalization, **KINDS[kind][1])
