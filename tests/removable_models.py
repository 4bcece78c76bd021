"""Small random models of every architecture that norms are removed from, for the tests of removal."""

from contextlib import contextmanager
from unittest.mock import patch

import torch
import transformers

from lnfree_interp.finetune.removable import collect_std, make_removable, update_averages

EOT = 3
EMBEDDINGS = ("wte.weight", "embed_in.weight", "embed_tokens.weight")
_SHAPE = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 14}
_GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "rms_norm_eps": 1e-5}
KINDS = {
    "GPT-2": ("gpt2", {"n_embd": 8, "n_layer": 2, "n_head": 2}),
    "GPT-NeoX": ("gpt_neox", _SHAPE | {"use_parallel_residual": True, "rotary_pct": 0.5}),
    "GPT-NeoX, MLP after attention": ("gpt_neox", _SHAPE | {"use_parallel_residual": False, "rotary_pct": 1.0}),
    "Llama": ("llama", _SHAPE | _GROUPED),
    "Llama with biases": ("llama", _SHAPE | _GROUPED | {"attention_bias": True}),
    "Mistral": ("mistral", _SHAPE | _GROUPED | {"sliding_window": 4}),
    "Qwen2": ("qwen2", _SHAPE | _GROUPED),
}
NEW_KINDS = [kind for kind in KINDS if kind != "GPT-2"]


@contextmanager
def exact():
    """What transformers computes in fp32 whatever the model's dtype, RMSNorms and positions, in fp64."""
    with patch.multiple(torch, float=torch.float64, float32=torch.float64):
        yield


def make_plain(kind="GPT-2", *, seed=0, **fields):
    """A minute model in fp64 without dropout, every weight random, the norms' included."""
    model_type, shape = KINDS[kind]
    common = {"vocab_size": 23, "max_position_embeddings": 12, "bos_token_id": EOT, "eos_token_id": EOT}
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False}
    config = transformers.AutoConfig.for_model(model_type, **(common | none | shape | fields))
    torch.manual_seed(seed)
    with exact():
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    for name, p in model.named_parameters():
        p.data += (0.5 if name.endswith((*EMBEDDINGS, "norm.weight")) else 0.15) * torch.randn_like(p)
    return model


def make_tokens(batch=4, pos=9, seed=1):
    """Random tokens with end-of-text at position 0, in the middle and at the end."""
    tokens = torch.randint(4, 23, (batch, pos), generator=torch.Generator().manual_seed(seed))
    tokens[0, 0] = tokens[1, 4] = tokens[2, -1] = EOT
    return tokens


def measured(model, tokens, **arguments):
    """Removable, with the averages of one batch."""
    with exact():
        make_removable(model, **arguments).train()(tokens)
    collect_std(model)
    update_averages(model)
    return model.eval()


def log_probs(model, tokens):
    with torch.no_grad(), exact():
        return model(tokens).logits.log_softmax(-1)


def same(a, b, atol=1e-9):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)
