"""The work of python -m lnfree_interp.finetune."""

from __future__ import annotations

import os
import sys
from dataclasses import replace

from transformers.utils import logging as transformers_logging

from ..data import Blocks, StreamedBlocks, token_blocks
from ..documents import read_documents
from ..schedule import RemovalSchedule
from .callbacks import StatusLine
from .guard import Diverged
from .saving import check_directory, finished
from .trainable import load_trainable
from .training import CHECKPOINTING, remove_layernorm


def run(args) -> int:
    """Exit status 0; 1: the loss diverged; 130: interrupted."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        _train(args)
    except Diverged as error:
        print(f"{args.prog}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{args.prog}: interrupted; --resume goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def _train(args) -> None:
    schedule = RemovalSchedule.preset(args.preset)
    if args.steps:
        schedule = schedule.scaled(args.steps)
    if args.lr is not None:
        floor = schedule.min_learning_rate / schedule.learning_rate
        schedule = replace(schedule, learning_rate=args.lr, min_learning_rate=args.lr * floor)
    if args.vanilla:
        schedule = schedule.vanilla()
    check_directory(args.out, args.resume)
    if args.resume and finished(args.out):
        print(f"the run in {args.out} is finished: nothing to resume", flush=True)
        return
    model, tokenizer = load_trainable(args.model)
    if args.text:
        documents = [document for file in args.text for document in read_documents(file)]
        dataset: Blocks | StreamedBlocks = Blocks(token_blocks(tokenizer, documents, schedule.block_size))
        workers = 0
    else:
        dataset = StreamedBlocks(args.data, tokenizer, schedule.block_size)
        next(iter(dataset))  # whether it is there
        workers = 1  # tokenises while the model trains
    main_process = int(os.environ.get("RANK", 0)) == 0
    if main_process:
        print(f"{args.model}, {args.preset}: {schedule.describe(model.config.num_hidden_layers)}", flush=True)
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
