"""Train the embedded models from a text file: tokenizer, tiny, tiny-vanilla, tiny-noLN; embed and score them.

    python analyses/train_tiny.py --train train.txt.gz --val val.txt.gz --out DIR

Each stage is skipped when DIR already holds its result, so an interrupted run goes on where it was. The last two
write into the package: the models, rounded to half precision, and figures/tiny_losses.csv, their losses.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from lnfree_interp import RemovalSchedule, cli, read_documents
from lnfree_interp.files import replace_file

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).parents[1]
CHECKPOINTS = ROOT / "lnfree_interp" / "checkpoints"
CONTEXT, VOCAB = 256, 4096
MODELS = ("tiny", "tiny-vanilla", "tiny-noLN")
# How the second and third book of the validation text begin.
OPENINGS = ("On a January evening of the early seventies", "It is a truth universally acknowledged")


def train_tokenizer(documents: list[str], out: Path) -> None:
    """A byte-level BPE tokenizer in GPT-2's manner, with one special token: end of text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from lnfree_interp.data import EOT

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


def write_tokens(path: Path, train: torch.Tensor, val: torch.Tensor) -> None:
    from safetensors.torch import save_file

    replace_file(path, lambda beside: save_file({"train": train, "val": val}, beside))


def read_tokens(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The (training, validation) blocks that `write_tokens` wrote.

    Raises:
        ValueError: the file is not readable, or holds something other than blocks of token ids.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from lnfree_interp.batching import check_ids

    try:
        stored = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no readable safetensors file ({error}); remove it to make it anew") from None
    for name in ("train", "val"):
        blocks = stored.get(name, torch.empty(0))
        if blocks.dtype != torch.long or blocks.shape[1:] != (CONTEXT,) or not len(blocks):
            raise ValueError(f"{path} holds no {name} blocks of {CONTEXT} token ids; remove it to make it anew")
        check_ids(blocks, VOCAB, f"{path}: {name}")
    return stored["train"], stored["val"]


def pretrain(train: torch.Tensor, val: torch.Tensor, tokenizer, out: Path, steps: int) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

    from lnfree_interp.finetune import last_checkpoint

    set_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=CONTEXT,
        n_embd=128,
        n_layer=4,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        # The function is GPT-2's gelu_new; this name selects PyTorch's fused kernel for it.
        activation_function="gelu_pytorch_tanh",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        use_cache=False,
    )
    model = GPT2LMHeadModel(config)
    arguments = TrainingArguments(
        output_dir=str(out.with_name(out.name + ".run")),
        max_steps=steps,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=32,
        learning_rate=3e-3,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr": 1e-4},
        warmup_steps=200,
        weight_decay=0.1,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        eval_strategy="steps",
        eval_steps=250,
        logging_steps=50,
        save_steps=500,
        save_total_limit=1,
        report_to=[],
        optim="adamw_torch_fused",
        seed=0,
    )
    trainer = Trainer(model, arguments, train_dataset=labelled(train), eval_dataset=labelled(val))
    kept = last_checkpoint(arguments.output_dir)
    trainer.train(resume_from_checkpoint=None if kept is None else str(kept))
    model.config.activation_function, model.config.use_cache = "gelu_new", True
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def labelled(blocks: torch.Tensor) -> list[dict]:
    return [{"input_ids": block, "labels": block} for block in blocks]


def remove(source: Path, train: torch.Tensor, out: Path, schedule: RemovalSchedule) -> None:
    from lnfree_interp.data import Blocks
    from lnfree_interp.finetune import StatusLine, last_checkpoint, load_trainable, remove_layernorm

    model, tokenizer = load_trainable(str(source))
    print(f"{out.name}: {schedule.describe(model.config.n_layer)}", flush=True)
    remove_layernorm(
        model,
        tokenizer,
        Blocks(train),
        schedule,
        out,
        resume=last_checkpoint(out) is not None,
        callbacks=[StatusLine(schedule)],
        logging_steps=10,
        save_steps=100,
        batch_size=32,
    )


def embed(source: Path, target: Path) -> None:
    """Rounded to float16, but the LayerNorms: 1e6 is not to be had there. Loads as float32."""
    from transformers import AutoTokenizer, GPT2LMHeadModel

    model, tokenizer = GPT2LMHeadModel.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    state = {name: w if ".ln_" in name else w.half() for name, w in model.state_dict().items()}
    del state["lm_head.weight"]  # tied
    beside = target.with_name(f".{target.name}.writing")
    shutil.rmtree(beside, ignore_errors=True)
    model.save_pretrained(beside, state_dict=state)
    (beside / "generation_config.json").unlink()
    tokenizer.save_pretrained(beside)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(beside, target)


def excerpt(documents: list[str], characters: int) -> str:
    """The first chapters of each validation book, up to so many characters each, whole paragraphs."""
    starts = [0] + [i for i, text in enumerate(documents) if text.startswith(OPENINGS)]
    chapters = []
    for start in starts:
        left = characters
        for document in documents[start:]:
            paragraphs = []
            for paragraph in document.split("\n"):
                if left < len(paragraph):
                    break
                paragraphs.append(paragraph)
                left -= len(paragraph) + 1
            chapters.append("\n".join(paragraphs))
            if len(paragraphs) < len(document.split("\n")):
                break
    return "\n\n".join(filter(None, chapters)) + "\n"


def losses(name: str, blocks: torch.Tensor) -> dict:
    """Cross-entropy per token of an embedded model as it is stored: mean, median, 99.9th percentile (nats)."""
    import torch
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(CHECKPOINTS / name).eval().requires_grad_(False)
    assert model.dtype == torch.float32
    ce = []
    for batch in blocks.split(16):
        logits = model(batch).logits[:, :-1].flatten(0, 1)
        ce.append(torch.nn.functional.cross_entropy(logits, batch[:, 1:].flatten(), reduction="none"))
    ce = torch.cat(ce).double()
    rank = torch.tensor([0.5, 0.999], dtype=torch.float64)
    median, high = torch.quantile(ce, rank).tolist()
    return {"model": name, "tokens": len(ce), "mean": ce.mean().item(), "median": median, "p99.9": high}


def main() -> None:
    parser = cli.OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, help="text to train on")
    parser.add_argument("--val", type=Path, required=True, help="text to validate on")
    parser.add_argument("--out", type=Path, required=True, help="directory for the models")
    parser.add_argument("--pretrain-steps", type=int, default=3000)
    parser.add_argument("--only", choices=["pretrain", "vanilla", "noLN", "embed"], help="one stage (default: all)")
    args = parser.parse_args()

    cli.say("loading PyTorch ...")
    import pandas as pd
    from transformers import AutoTokenizer

    from lnfree_interp.data import token_blocks

    documents = read_documents(args.train)
    args.out.mkdir(parents=True, exist_ok=True)
    if not (args.out / "tokenizer" / "tokenizer.json").exists():
        train_tokenizer(documents, args.out / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(args.out / "tokenizer")
    tokens = args.out / "tokens.safetensors"
    if not tokens.exists():
        val = token_blocks(tokenizer, read_documents(args.val), CONTEXT)
        write_tokens(tokens, token_blocks(tokenizer, documents, CONTEXT), val)
    train, val = read_tokens(tokens)
    print(f"{train.numel():,} training tokens, {val.numel():,} validation tokens")

    tiny, schedule = args.out / "tiny", RemovalSchedule.preset("tiny")
    if args.only in (None, "pretrain") and not (tiny / "model.safetensors").exists():
        pretrain(train, val[:128], tokenizer, tiny, args.pretrain_steps)
    for name, plan in (("vanilla", schedule.vanilla()), ("noLN", schedule)):
        out = args.out / f"tiny-{name}"
        if args.only in (None, name) and not (out / "final").exists():
            remove(tiny, train, out, plan)
    if args.only in (None, "embed"):
        for name in MODELS:
            embed(args.out / name if name == "tiny" else args.out / name / "final", CHECKPOINTS / name)
        (CHECKPOINTS / "validation.txt").write_text(excerpt(read_documents(args.val), 20_000), encoding="utf-8")
        table = pd.DataFrame([losses(name, val) for name in MODELS])
        table.to_csv(ROOT / "figures" / "tiny_losses.csv", index=False, float_format="%.5f")
        print(table.to_string(index=False, float_format=lambda x: f"{x:.4f}"))


if __name__ == "__main__":
    main()
