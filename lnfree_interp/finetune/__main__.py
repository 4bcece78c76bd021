"""python -m lnfree_interp.finetune"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .. import cli
from ..documents import read_documents
from ..names import dtype_name, locate_checkpoint
from ..schedule import PRESETS, RemovalSchedule


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Exit status 2: bad input; 1: the loss diverged; 130: interrupted."""
    p = cli.OneLineParser(prog="python -m lnfree_interp.finetune", description="Remove LayerNorm by fine-tuning.")
    p.add_argument("--model", required=True, metavar="NAME", help="a name, a hub id or a directory")
    p.add_argument("--preset", required=True, metavar="NAME", help=", ".join(PRESETS))
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", nargs="+", metavar="FILE", help="text files, plain or .gz")
    source.add_argument("--data", metavar="DATASET", help="hub dataset, streamed: Skylion007/openwebtext")
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="checkpoints; in the end DIR/final")
    p.add_argument("--resume", action="store_true", help="go on from the last checkpoint in DIR")
    p.add_argument("--vanilla", action="store_true", help="the control: the same training, nothing removed")
    p.add_argument("--steps", type=cli.positive_int, metavar="N", help="scale the preset to so many steps")
    p.add_argument("--lr", type=float, help="peak learning rate; the final one scales along")
    p.add_argument("--batch-size", type=cli.positive_int, metavar="N", help="sequences per device and forward")
    p.add_argument("--save-steps", type=cli.positive_int, default=50, metavar="N", help="per checkpoint (50)")
    p.add_argument("--gradient-checkpointing", action="store_true", help="less memory, more time")
    p.add_argument("--device", help="cpu, cuda or mps (default: a GPU if there is one)")
    p.add_argument("--dtype", default="float32", help="float32, or bfloat16 for mixed precision")
    p.add_argument("--seed", type=int, default=0)
    p.set_defaults(prog=p.prog)
    return cli.guard(_run, p.parse_args(argv), p.prog, check=_check)


def _check(args) -> None:
    RemovalSchedule.preset(args.preset)
    dtype_name(args.dtype)
    locate_checkpoint(args.model)
    for file in args.text or ():
        read_documents(file)


def _run(args) -> int:
    from .command import run

    return run(args)


if __name__ == "__main__":
    raise SystemExit(main())
