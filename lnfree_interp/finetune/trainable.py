"""A checkpoint as a model to train."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.activations import ACT2FN

from ..arguments import as_text
from ..checkpoints import open_checkpoint
from ..families import HEAD
from ..gguf_files import is_gguf, open_gguf
from ..names import locate_checkpoint
from .export import plain_model
from .removable import check_removable, family_of

# Vocabularies are padded to multiples of it, or of multiples of it.
PADDED_TO = 64
# transformers' activations of many small operations -> the same function in one kernel.
FUSED = {"gelu_new": "gelu_pytorch_tanh", "gelu_python_tanh": "gelu_pytorch_tanh", "gelu_python": "gelu"}


def load_trainable(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model in float32 and tokenizer of a name, hub id, directory or .gguf file, checked weight by weight.

    Raises:
        ValueError: no such model, one whose norms cannot be removed, an LN-free one, no tokenizer or one of another
            size.

    Example:
        >>> from lnfree_interp.finetune import load_trainable
        >>> model, tokenizer = load_trainable("tiny")
        >>> type(model).__name__, len(tokenizer)
        ('GPT2LMHeadModel', 4096)
    """
    path = locate_checkpoint(as_text(name, "name"))
    checkpoint = open_gguf(path) if is_gguf(path) else open_checkpoint(path)
    family, config, weights = checkpoint.family, checkpoint.config, checkpoint.weights
    try:
        check_removable(family, config)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if checkpoint.ln_free:
        raise ValueError(f"{name} is LN-free already")
    if checkpoint.tokenizer is None:
        lacks = "it holds no tokenizer" if is_gguf(path) else f"{path} holds neither tokenizer.json nor vocab.json"
        raise ValueError(f"{name} has no tokenizer: {lacks}")
    tokenizer = AutoTokenizer.from_pretrained(**checkpoint.tokenizer, local_files_only=True)
    n_tokens, n_vocab = len(tokenizer), config.vocab_size
    if n_tokens != n_vocab and not (n_tokens < n_vocab < n_tokens + 512 and n_vocab % PADDED_TO == 0):
        raise ValueError(
            f"{name}: the tokenizer has {n_tokens} tokens, the model's vocabulary {n_vocab}: it must be as many, or "
            f"padded to a multiple of {PADDED_TO}"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{name}: the tokenizer has no end-of-text token")
    state = {f"{family.prefix}{key}": weights[key].float() for key in weights if key != HEAD}
    embedding = state[f"{family.prefix}{family.embed}.weight"]
    state[HEAD] = weights[HEAD].float() if HEAD in weights else embedding
    if config.tie_word_embeddings and not torch.equal(state[HEAD], embedding):
        config.tie_word_embeddings = False  # what is stored counts, as for load_model
    config.dtype = torch.float32
    return plain_model(config, state), tokenizer


def ready(model: PreTrainedModel) -> None:
    """Make a model ready to train: no dropout, no key-value cache, its activation in one kernel where it has one.

    The function it computes stays the same. And what `save_pretrained` stores under another name than the model's own,
    GPT-NeoX's head, is found when a state dict is loaded: Trainer passes over it in silence when it resumes.

    Raises:
        ValueError: a model of no family that norms are removed from.
    """
    renamed = family_of(model).renamed
    model.config.use_cache = False
    name = getattr(model.config, "hidden_act", None) or model.config.activation_function
    for module in model.modules():
        parts: Any = module
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            parts.attention_dropout = 0.0  # Llama's and GPT-NeoX's is a number
        for act in ("act", "act_fn"):
            if name in FUSED and isinstance(getattr(module, act, None), nn.Module):
                setattr(module, act, ACT2FN[FUSED[name]])

    def rename(module, state, prefix, *args):
        for stored, name in renamed:
            if prefix + stored in state:
                state[prefix + name] = state.pop(prefix + stored)

    model.register_load_state_dict_pre_hook(rename)
