"""Train the embedded models from a text file: tokenizer, tiny, tiny-vanilla, tiny-noLN.

    python analyses/train_tiny.py --train train.txt.gz --val val.txt.gz --out DIR

Each stage is skipped when DIR already holds its result, so an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from lnfree_interp.data import EOT, read_documents, token_blocks

CONTEXT, VOCAB = 256, 4096


def train_tokenizer(documents: list[str], out: Path) -> None:
    """A byte-level BPE tokenizer in GPT-2's manner, with one special token: end of text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=[EOT], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(documents, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=EOT, eos_token=EOT, unk_token=EOT, model_max_length=CONTEXT
    )
    wrapped.save_pretrained(out)


class Blocks(torch.utils.data.Dataset):
    """Token blocks as the items a Trainer reads."""

    def __init__(self, blocks: torch.Tensor):
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, i: int) -> dict:
        return {"input_ids": self.blocks[i], "labels": self.blocks[i]}


def pretrain(train: torch.Tensor, val: torch.Tensor, tokenizer, out: Path, steps: int) -> None:
    set_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=CONTEXT, n_embd=128, n_layer=4, n_head=4,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        # The function is GPT-2's gelu_new; this name selects PyTorch's fused kernel for it.
        activation_function="gelu_pytorch_tanh",
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, use_cache=False,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    arguments = TrainingArguments(
        output_dir=str(out.with_name(out.name + ".run")), max_steps=steps, per_device_train_batch_size=32,
        per_device_eval_batch_size=32, learning_rate=3e-3, lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr": 1e-4}, warmup_steps=200, weight_decay=0.1, adam_beta2=0.95,
        max_grad_norm=1.0, eval_strategy="steps", eval_steps=250, logging_steps=50, save_steps=500,
        save_total_limit=1, report_to=[], optim="adamw_torch_fused", seed=0,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=Blocks(train), eval_dataset=Blocks(val))
    runs = Path(arguments.output_dir)
    trainer.train(resume_from_checkpoint=any(runs.glob("checkpoint-*")) if runs.exists() else None)
    model.config.activation_function, model.config.use_cache = "gelu_new", True
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, help="text to train on")
    parser.add_argument("--val", type=Path, required=True, help="text to validate on")
    parser.add_argument("--out", type=Path, required=True, help="directory for the models")
    parser.add_argument("--pretrain-steps", type=int, default=4000)
    args = parser.parse_args()

    documents = read_documents(args.train)
    args.out.mkdir(parents=True, exist_ok=True)
    if not (args.out / "tokenizer" / "tokenizer.json").exists():
        train_tokenizer(documents, args.out / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(args.out / "tokenizer")
    if not (args.out / "tokens.pt").exists():
        val = token_blocks(tokenizer, read_documents(args.val), CONTEXT)
        torch.save((token_blocks(tokenizer, documents, CONTEXT), val), args.out / "tokens.pt")
    train, val = torch.load(args.out / "tokens.pt")
    print(f"{train.numel():,} training tokens, {val.numel():,} validation tokens")
    if not (args.out / "tiny" / "model.safetensors").exists():
        pretrain(train, val[:128], tokenizer, args.out / "tiny", args.pretrain_steps)


if __name__ == "__main__":
    main()
