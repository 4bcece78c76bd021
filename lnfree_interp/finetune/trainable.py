"""A checkpoint as a model to train."""

from __future__ import annotations

import torch
from transformers import AutoTokenizer, GPT2LMHeadModel, PreTrainedTokenizerBase

from ..checkpoints import open_checkpoint, read_config
from ..families import GPT2, HEAD, LLAMA
from ..gguf_files import is_gguf
from ..names import locate_checkpoint
from .export import plain_model


def load_trainable(name: str) -> tuple[GPT2LMHeadModel, PreTrainedTokenizerBase]:
    """Model in float32 and tokenizer of a name, hub id or directory, checked weight by weight.

    Raises:
        ValueError: no such model, one that is no GPT-2, an LN-free one, no tokenizer or one of another size.
    """
    directory = locate_checkpoint(name)
    architecture = LLAMA.architecture if is_gguf(directory) else read_config(directory)[0].architecture
    if architecture != GPT2.architecture:
        raise ValueError(f"{name} is a {architecture}: LayerNorm is removed from a {GPT2.architecture} alone")
    checkpoint = open_checkpoint(directory)
    config, weights = checkpoint.config, checkpoint.weights
    if checkpoint.ln_free:
        raise ValueError(f"{name} is LN-free already")
    if not any((directory / file).is_file() for file in ("tokenizer.json", "vocab.json")):
        raise ValueError(f"{name} has no tokenizer: {directory} holds neither tokenizer.json nor vocab.json")
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    if len(tokenizer) != config.vocab_size:
        raise ValueError(
            f"{name}: the tokenizer has {len(tokenizer)} tokens, the model's vocabulary {config.vocab_size}"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{name}: the tokenizer has no end-of-text token")
    state = {f"transformer.{key}": weights[key].float() for key in weights if key != HEAD}
    tied = config.tie_word_embeddings or HEAD not in weights
    state[HEAD] = state["transformer.wte.weight"] if tied else weights[HEAD].float()
    config.dtype = torch.float32
    return plain_model(config, state), tokenizer
