"""python -m lnfree_interp.finetune"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from transformers.utils import logging as transformers_logging

from ..cli import OneLineParser, positive_int
from ..data import Blocks, StreamedBlocks, read_documents, token_blocks
from ..schedule import PRESETS, RemovalSchedule
from .callbacks import Diverged, StatusLine
from .training import CHECKPOINTING, checkpoint_to_resume, load_trainable, remove_layernorm


def _parser() -> argparse.ArgumentParser:
    p = OneLineParser(prog="python -m lnfree_interp.finetune", description="Remove LayerNorm by fine-tuning.")
    p.add_argument("--model", required=True, metavar="NAME", help="a name, a hub id or a directory")
    p.add_argument("--preset", required=True, metavar="NAME", help=", ".join(PRESETS))
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", nargs="+", metavar="FILE", help="text files, plain or .gz")
    source.add_argument("--data", metavar="DATASET", help="hub dataset, streamed: Skylion007/openwebtext")
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="checkpoints; in the end DIR/final")
    p.add_argument("--resume", action="store_true", help="go on from the last checkpoint in DIR")
    p.add_argument("--vanilla", action="store_true", help="the control: the same training, nothing removed")
    p.add_argument("--steps", type=positive_int, metavar="N", help="scale the preset to so many steps")
    p.add_argument("--lr", type=float, help="peak learning rate; the final one scales along")
    p.add_argument("--batch-size", type=positive_int, metavar="N", help="sequences per device and forward")
    p.add_argument("--save-steps", type=positive_int, default=50, metavar="N", help="per checkpoint (50)")
    p.add_argument("--gradient-checkpointing", action="store_true", help="less memory, more time")
    p.add_argument("--device", help="cpu, cuda or mps (default: a GPU if there is one)")
    p.add_argument("--dtype", default="float32", help="float32, or bfloat16 for mixed precision")
    p.add_argument("--seed", type=int, default=0)
    return p


def _run(args: argparse.Namespace) -> None:
    schedule = RemovalSchedule.preset(args.preset)
    if args.steps:
        schedule = schedule.scaled(args.steps)
    if args.lr is not None:
        floor = schedule.min_learning_rate / schedule.learning_rate
        schedule = replace(schedule, learning_rate=args.lr, min_learning_rate=args.lr * floor)
    if args.vanilla:
        schedule = schedule.vanilla()
    checkpoint_to_resume(args.out, args.resume)
    model, tokenizer = load_trainable(args.model)
    if args.text:
        documents = [document for file in args.text for document in read_documents(file)]
        dataset = Blocks(token_blocks(tokenizer, documents, schedule.block_size))
        workers = 0
    else:
        dataset = StreamedBlocks(args.data, tokenizer, schedule.block_size)
        next(iter(dataset))  # whether it is there
        workers = 1  # tokenises while the model trains
    main_process = int(os.environ.get("RANK", 0)) == 0
    if main_process:
        print(f"{args.model}, {args.preset}: {schedule.describe(model.config.n_layer)}", flush=True)
    remove_layernorm(
        model,
        tokenizer,
        dataset,
        schedule,
        args.out,
        resume=args.resume,
        batch_size=args.batch_size,
        dtype=args.dtype,
        device=args.device,
        seed=args.seed,
        callbacks=[StatusLine(schedule)],
        note={"model": args.model, "text": args.text, "data": args.data},
        save_steps=args.save_steps,
        dataloader_num_workers=workers,
        logging_steps=1 if schedule.tokens_per_step > 100_000 else 10,
        **({CHECKPOINTING: True} if args.gradient_checkpointing else {}),
    )
    if main_process:
        print(f"wrote {args.out / 'final'}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Exit status 2: bad input; 1: the loss diverged; 130: interrupted."""
    parser = _parser()
    args = parser.parse_args(argv)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        _run(args)
    except ValueError as error:
        print(f"{parser.prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except Diverged as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted; --resume goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
