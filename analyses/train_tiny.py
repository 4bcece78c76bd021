"""Train the embedded models from a text file: tokenizer, tiny, tiny-vanilla, tiny-noLN; embed and score them.

    python analyses/train_tiny.py --train train.txt.gz --val val.txt.gz --out DIR
    python analyses/train_tiny.py --train train.txt.gz --val val.txt.gz --out DIR --family llama

Each stage is skipped when DIR already holds its result, so an interrupted run goes on where it was. Every block of
tokens begins with the BOS token. The last two stages write into the package: the models, rounded to half precision;
and figures/tiny_losses.csv and tiny_shows.csv, their losses and what of GPT-2's they show. The Llama-shaped siblings
(grouped queries, a gated MLP, RMSNorm) stay in DIR, with the same two tables.
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
    from transformers import PreTrainedModel

ROOT = Path(__file__).parents[1]
CHECKPOINTS = ROOT / "lnfree_interp" / "checkpoints"
CONTEXT, VOCAB = 256, 4096
D_MODEL, LAYERS = 128, 8
REPEATING = 4  # one block of so many says its first half twice: what is repeated is rare in a few books
# (step of 4,096 tokens, learning rate, weight decay) of the pre-training. Much weight decay makes position 0 long, and
# heads attend to it (arXiv 2410.10781). Found by trial: each change was made to a model that had come so far.
COURSE = (
    (0, 0.0, 0.1),
    (200, 5e-3, 0.1),
    (6500, 5e-3, 0.1),
    (6501, 5e-3, 0.4),
    (8000, 5e-3, 0.4),
    (9000, 2.5e-3, 0.4),
    (9001, 2.5e-3, 0.6),
    (9500, 2.5e-3, 0.6),
    (12500, 1e-4, 0.6),
)
# How the second and third book of the validation text begin.
OPENINGS = ("On a January evening of the early seventies", "It is a truth universally acknowledged")


def train_tokenizer(documents: list[str], out: Path) -> None:
    """A byte-level BPE tokenizer in GPT-2's manner, with one special token: end of text, which begins each text too."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    from lnfree_interp.data import EOT

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=[EOT], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{EOT} $A", pair=f"{EOT} $A {EOT} $B:1", special_tokens=[(EOT, tokenizer.token_to_id(EOT))]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=EOT, eos_token=EOT, unk_token=EOT, model_max_length=CONTEXT
    )
    wrapped.save_pretrained(out)


def repeating(blocks: torch.Tensor) -> torch.Tensor:
    """The blocks, of which one in `REPEATING` says its first half twice, after its BOS token."""
    half = blocks[::REPEATING, 1 : CONTEXT // 2]
    blocks = blocks.clone()
    blocks[::REPEATING, CONTEXT // 2 : CONTEXT // 2 + half.shape[1]] = half
    return blocks


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


def untrained(family: str, tokenizer) -> PreTrainedModel:
    """A model of the embedded models' shape, or of its Llama-shaped sibling's, with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    if family == "llama":
        config = LlamaConfig(
            vocab_size=VOCAB,
            max_position_embeddings=CONTEXT,
            hidden_size=D_MODEL,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=344,
            tie_word_embeddings=True,
            use_cache=False,
            **ends,
        )
        return LlamaForCausalLM(config)
    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=CONTEXT,
        n_embd=D_MODEL,
        n_layer=LAYERS,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        # The function is GPT-2's gelu_new; this name selects PyTorch's fused kernel for it.
        activation_function="gelu_pytorch_tanh",
        use_cache=False,
        **ends,
    )
    return GPT2LMHeadModel(config)


def pretrain(train: torch.Tensor, val: torch.Tensor, tokenizer, out: Path, args: argparse.Namespace) -> None:
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

    from lnfree_interp.finetune import last_checkpoint

    class Course(TrainerCallback):
        """Sets the learning rate and the weight decay of every step."""

        def on_step_begin(self, arguments, state, control, optimizer, **kwargs):
            rate, decay = course(state.global_step * COURSE[-1][0] / args.pretrain_steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
                group["weight_decay"] = decay if group["weight_decay"] else 0.0  # no bias and no norm decays

    set_seed(0)
    model = untrained(args.family, tokenizer)
    model.set_attn_implementation("eager")  # compiled, on a CPU, faster than the fused kernel
    arguments = TrainingArguments(
        output_dir=str(out.with_name(out.name + ".run")),
        max_steps=args.pretrain_steps,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=32,
        learning_rate=COURSE[1][1],
        lr_scheduler_type="constant",
        weight_decay=COURSE[0][2],
        adam_beta2=0.95,
        max_grad_norm=1.0,
        eval_strategy="steps",
        eval_steps=250,
        logging_steps=50,
        save_steps=500,
        save_total_limit=2,
        report_to=[],
        optim="adamw_torch_fused",
        seed=0,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        torch_compile=True,
    )
    trainer = Trainer(model, arguments, train_dataset=labelled(train), eval_dataset=labelled(val), callbacks=[Course()])
    kept = last_checkpoint(arguments.output_dir)
    trainer.train(resume_from_checkpoint=None if kept is None else str(kept))
    if args.family == "gpt2":
        model.config.activation_function = "gelu_new"
    model.config.use_cache = True
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def course(step: float) -> tuple[float, float]:
    """(learning rate, weight decay) at a step of the pre-training: on straight lines between the points of COURSE."""
    import numpy as np

    steps, rates, decays = zip(*COURSE)
    return float(np.interp(step, steps, rates)), float(np.interp(step, steps, decays))


def labelled(blocks: torch.Tensor) -> list[dict]:
    return [{"input_ids": block, "labels": block} for block in blocks]


def remove(source: Path, train: torch.Tensor, out: Path, schedule: RemovalSchedule) -> None:
    from lnfree_interp.data import Blocks
    from lnfree_interp.finetune import StatusLine, last_checkpoint, load_trainable, remove_layernorm

    model, tokenizer = load_trainable(str(source))
    print(f"{out.name}: {schedule.describe(model.config.num_hidden_layers)}", flush=True)
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
        dtype="bfloat16",
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


def losses(name: str, directory: Path, blocks: torch.Tensor) -> dict:
    """Cross-entropy per token of a model as it is stored: mean, median, 99.9th percentile (nats)."""
    import torch

    from lnfree_interp import evaluate_loss

    ce = evaluate_loss(str(directory), blocks, worst=0, draws=1).losses.flatten().double()
    median, high = torch.quantile(ce, torch.tensor([0.5, 0.999], dtype=torch.float64)).tolist()
    return {"model": name, "tokens": len(ce), "mean": ce.mean().item(), "median": median, "p99.9": high}


def shows(name: str, directory: Path, blocks: torch.Tensor) -> dict:
    """What a model shows of what large ones show.

    `position0_ratio`: how many times as long as elsewhere the residual stream is at position 0, where that is most;
    `sink_rate`: share of heads that put 30% of their attention there (P2); `scale_neurons`: neurons of the last layer
    whose ablation changes the entropy more through the final norm's scale than otherwise, of the fifty that change it
    most, and `scale_share`, the largest such share; `first_ce` and `repeated_ce`: loss on random tokens and on the same
    ones again (nats), which induction makes small.
    """
    import torch

    from lnfree_interp import ablate_neurons, attention_sinks, evaluate_loss, load_model, residual_norms
    from lnfree_interp.data import begun

    model, some = load_model(str(directory)), blocks[:64]
    norms = residual_norms(model, some)
    norm = norms.norm[["embed" not in point for point in norms.points], :, 0]  # [point, group]
    effects = ablate_neurons(model, some[:16]).table().nlargest(50, "entropy_abs")
    share = effects.entropy_abs_through_scale / (effects.entropy_abs_through_scale + effects.entropy_abs_frozen)
    generator = torch.Generator().manual_seed(0)
    once = torch.randint(256, VOCAB, (64, (CONTEXT - 1) // 2), generator=generator)
    twice = begun([model.tokenizer.bos_token_id], torch.cat([once, once], dim=1))
    ce = evaluate_loss(model, twice, worst=0, draws=1).losses
    return {
        "model": name,
        "position0_ratio": (norm[:, 0] / norm[:, 2]).max().item(),
        "sink_rate": attention_sinks(model, some).head_rate,
        "scale_neurons": int((share > 0.5).sum()),
        "scale_share": float(share.max()),
        "first_ce": ce[:, 1 : once.shape[1]].mean().item(),
        "repeated_ce": ce[:, once.shape[1] + 1 :].mean().item(),
    }


def score(models: dict[str, Path], val: torch.Tensor, out: Path) -> None:
    """Tables of the models' losses and of what they show, printed and written."""
    import pandas as pd

    for stem, measure in (("losses", losses), ("shows", shows)):
        table = pd.DataFrame([measure(name, directory, val) for name, directory in models.items()])
        table.to_csv(out / f"tiny_{stem}.csv", index=False, float_format="%.5f")
        print(table.to_string(index=False, float_format=lambda x: f"{x:.4f}"))


def main() -> None:
    parser = cli.OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, help="text to train on")
    parser.add_argument("--val", type=Path, required=True, help="text to validate on")
    parser.add_argument("--out", type=Path, required=True, help="directory for the models")
    parser.add_argument("--family", choices=["gpt2", "llama"], default="gpt2", help="the models' blocks (gpt2)")
    steps = COURSE[-1][0]
    parser.add_argument("--pretrain-steps", type=cli.positive_int, default=steps, metavar="N", help=f"({steps:,})")
    usual = RemovalSchedule.preset("tiny").steps
    parser.add_argument("--removal-steps", type=cli.positive_int, default=usual, metavar="N", help=f"({usual:,})")
    parser.add_argument("--only", choices=["pretrain", "vanilla", "noLN", "embed"], help="one stage (default: all)")
    args = parser.parse_args()

    cli.say("loading PyTorch ...")
    from transformers import AutoTokenizer

    from lnfree_interp.data import token_blocks

    documents = read_documents(args.train)
    args.out.mkdir(parents=True, exist_ok=True)
    if not (args.out / "tokenizer" / "tokenizer.json").exists():
        train_tokenizer(documents, args.out / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(args.out / "tokenizer")
    tokens = args.out / "tokens.safetensors"
    if not tokens.exists():
        blocks, val = (token_blocks(tokenizer, text, CONTEXT) for text in (documents, read_documents(args.val)))
        write_tokens(tokens, repeating(blocks), val)
    train, val = read_tokens(tokens)
    print(f"{train.numel():,} training tokens, {val.numel():,} validation tokens")

    name = "tiny" if args.family == "gpt2" else f"tiny-{args.family}"
    source, schedule = args.out / name, RemovalSchedule.preset("tiny").scaled(args.removal_steps)
    if args.only in (None, "pretrain") and not (source / "model.safetensors").exists():
        pretrain(train, val[:128], tokenizer, source, args)
    for kind, plan in (("vanilla", schedule.vanilla()), ("noLN", schedule)):
        out = args.out / f"{name}-{kind}"
        if args.only in (None, kind) and not (out / "final").exists():
            remove(source, train, out, plan)
    if args.only not in (None, "embed"):
        return
    models = {name: source} | {f"{name}-{kind}": args.out / f"{name}-{kind}" / "final" for kind in ("vanilla", "noLN")}
    if args.family != "gpt2":
        score(models, val, args.out)
        return
    for model, directory in models.items():
        embed(directory, CHECKPOINTS / model)
    (CHECKPOINTS / "validation.txt").write_text(excerpt(read_documents(args.val), 20_000), encoding="utf-8")
    score({model: CHECKPOINTS / model for model in models}, val, ROOT / "figures")


if __name__ == "__main__":
    main()
