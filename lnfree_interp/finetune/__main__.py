"""Remove the LayerNorms of a model by fine-tuning."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

from .. import cli
from ..distributed import rank
from ..documents import files_of
from ..names import locate_checkpoint
from ..schedule import PRESETS
from .flags import ADAPTIVE, add_guard_flags, add_schedule_flags, guard_from, schedule_from, whole

EXAMPLES = (
    "--model gpt2 --preset small --data Skylion007/openwebtext --out runs/small --dry-run",
    "--model gpt2 --preset small --data Skylion007/openwebtext --out runs/control --vanilla",
    "--model gpt2 --preset small --text texts/ --out runs/small --control runs/control --resume",
)


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Exit status 2: bad input; 1: the loss diverged; 130: interrupted."""
    if rank() == 0:
        return _main(argv)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        return _main(argv)  # of several processes one speaks: all would say the same


def _main(argv: Sequence[str] | None) -> int:
    p = parser()
    return cli.guard(_run, p.parse_args(argv), p.prog, check=_check)


def parser() -> argparse.ArgumentParser:
    p = cli.OneLineParser(
        prog=cli.prog("finetune"),
        usage="%(prog)s --model NAME --preset NAME (--text PATH [PATH ...] | --data DATASET) --out DIR [...]",
        description=__doc__,
        examples=EXAMPLES,
        epilog="Exit status: 0 done; 1 the loss diverged; 2 bad input; 130 interrupted. Starts under torchrun too.",
    )
    group = p.add_argument_group("model and data")
    add, source = group.add_argument, group.add_mutually_exclusive_group(required=True)
    add("--model", required=True, metavar="NAME", help="a name, a hub id or a directory")
    texts = "text files or directories of them: .txt, .jsonl or .parquet, plain or .gz"
    source.add_argument("--text", nargs="+", metavar="PATH", help=texts)
    source.add_argument("--data", metavar="DATASET", help="hub dataset, streamed: Skylion007/openwebtext")
    add(
        "--buffer",
        type=cli.positive_int,
        metavar="N",
        help="blocks that --data is shuffled among (1024); 1: as they come",
    )
    add("--cache", type=Path, metavar="DIR", help="where tokens of --text are kept (default: the datasets cache)")
    add("--held-out", type=whole, metavar="N", help="blocks set aside to measure the loss on (16, or fewer of few)")

    add = p.add_argument_group("run").add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="checkpoints; in the end DIR/final")
    add("--dry-run", action="store_true", help="say what it takes, check what there is, write nothing")
    add("--no-timing", action="store_true", help="with --dry-run: measure no steps")
    add("--resume", action="store_true", help="go on from the last checkpoint in DIR; start, if there is none")
    add("--vanilla", action="store_true", help="the control: the same training, nothing removed")
    add("--control", type=Path, metavar="DIR", help="the vanilla run, whose loss an adaptive schedule waits for")
    add("--save-steps", type=cli.positive_int, default=50, metavar="N", help="per checkpoint (50)")
    add("--seed", type=int, default=0, metavar="N", help="of the order of the data (0)")
    add("--report-to", nargs="+", default=[], metavar="NAME", help="tensorboard, wandb, ...: as transformers' Trainer")
    add("--push-to-hub", metavar="ID", help="hub id to upload DIR/final to, once it is whole")

    add = p.add_argument_group("machine").add_argument
    add("--device", help="cpu, cuda or mps (default: a GPU if there is one)")
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="bfloat16: mixed precision (float32)")
    add("--batch-size", type=cli.positive_int, metavar="N", help="sequences per device and forward (16 or fewer)")
    add("--gradient-checkpointing", action="store_true", help="less memory, more time")

    add = p.add_argument_group("schedule").add_argument
    add("--preset", metavar="NAME", help=", ".join(PRESETS))
    add(
        "--schedule",
        metavar="FILE.json",
        help=f"its fields: all, or some on top of --preset; or {ADAPTIVE}: the preset at the model's own pace",
    )
    add("--lr", type=float, metavar="X", help="peak learning rate; the final one scales along")
    add_schedule_flags(p.add_argument_group("fields of the schedule, in place of the preset's or the file's"))
    add_guard_flags(p.add_argument_group("when a loss does not come back"))
    p.set_defaults(prog=p.prog)
    return p


def _check(args) -> None:
    """Everything that can be known to be wrong before anything heavy is imported."""
    schedule = schedule_from(args)
    guard_from(args)
    if schedule.pace == "adaptive" and args.control is None:
        raise ValueError("--control DIR is needed, the vanilla run whose loss an adaptive schedule waits for")
    if args.control is not None and not (args.control / "run.json").is_file():
        raise ValueError(f"--control {args.control} is no directory of a run: there is no run.json in it")
    if args.push_to_hub is not None and not re.fullmatch(r"([\w.-]+/)?[\w.-]+", args.push_to_hub):
        raise ValueError(f"--push-to-hub {args.push_to_hub!r} is no hub id, such as name/model")
    if args.no_timing and not args.dry_run:
        raise ValueError("--no-timing is for --dry-run")
    locate_checkpoint(args.model)
    for source in args.text or ():
        if files_of(source) is None:
            raise ValueError(f"--text {source}: no such file or directory (--data is for hub datasets)")
    for flag, value, is_for in (("--buffer", args.buffer, "data"), ("--cache", args.cache, "text")):
        if value is not None and getattr(args, is_for) is None:
            raise ValueError(f"{flag} is for --{is_for}")


def _run(args) -> int:
    from .command import run

    return run(args)


if __name__ == "__main__":
    raise SystemExit(main())
