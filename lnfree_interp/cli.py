"""What the commands share: flags, loading, progress, tables and figures on disk, errors as one line."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from .data import hub_documents, read_documents, token_blocks
from .models import CHECKPOINTS, EMBEDDED, load_model, locate_checkpoint, resolve_device, resolve_dtype

VALIDATION_TEXT = CHECKPOINTS / "validation.txt"


class OneLineParser(argparse.ArgumentParser):
    """argparse, but a wrong flag is one line on stderr and exit status 2."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


def parser(module: str, description: str | None, *, tokens: int = 16384, out: str = "out") -> argparse.ArgumentParser:
    """The flags every command has: --model, --text, --data, --tokens, --device, --dtype, --seed, --out."""
    p = OneLineParser(prog=f"python -m lnfree_interp.{module}", description=description)
    add = p.add_argument
    models_help = "names of available_models(), hub ids or directories (default: the embedded models)"
    add("--model", nargs="+", default=list(EMBEDDED), metavar="NAME", help=models_help)
    source = p.add_mutually_exclusive_group()
    source.add_argument("--text", metavar="FILE", help="text file, plain or .gz (default: the embedded one)")
    data_help = "hub dataset, streamed, e.g. Skylion007/openwebtext"
    source.add_argument("--data", metavar="DATASET", help=data_help)
    add("--tokens", type=positive_int, default=tokens, metavar="N", help=f"tokens to use ({tokens:,})")
    add("--device", help="cpu, cuda, cuda:N or mps (default: a GPU if there is one)")
    add("--dtype", default="float32", help="float32, float64, bfloat16 or float16")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path(out), metavar="DIR", help=f"where files go ({out})")
    return p


def positive_int(text: str) -> int:
    value = int(text) if re.fullmatch(r"\d+", text) else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return value


def guard(run: Callable[[argparse.Namespace], None], args: argparse.Namespace, prog: str) -> int:
    """Run a command; what was wrong with the input becomes one line on stderr and status 2."""
    try:
        check(args)
        run(args)
    except ValueError as error:
        print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def check(args: argparse.Namespace) -> None:
    """Everything that can be known to be wrong before the work starts."""
    resolve_device(args.device)
    resolve_dtype(args.dtype)
    for name in args.model:
        locate_checkpoint(name)
    if args.text:
        read_documents(args.text)
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out} is not a directory")


def models(args: argparse.Namespace) -> Iterator[tuple[str, object]]:
    """(display name, model) of each --model, one in memory at a time."""
    for name in args.model:
        yield display_name(name), load_model(name, device=args.device, dtype=args.dtype)


def display_name(name: str) -> str:
    return Path(name).name if Path(name).is_dir() else name


def documents(args: argparse.Namespace) -> Iterable[str]:
    """The documents of --text, --data, or the embedded validation text."""
    return hub_documents(args.data) if args.data else read_documents(args.text or VALIDATION_TEXT)


def load_tokens(args: argparse.Namespace, model, *, context: int = 512) -> Int[Tensor, "batch pos"]:
    """About --tokens token ids in rows of `context` or the model's context, if that is shorter.

    Raises:
        ValueError: the model has no tokenizer, or there is less text than one row.
    """
    if model.tokenizer is None:
        raise ValueError(f"{model.cfg.model_name} has no tokenizer, so text cannot be read for it")
    context = min(context, model.cfg.n_ctx)
    n_rows = max(1, args.tokens // context)
    blocks = token_blocks(model.tokenizer, documents(args), context, max_blocks=n_rows)
    return blocks.to(model.cfg.device)


def progress(iterable: Iterable, *, total: int | None = None, label: str = "", unit: str = "it"):
    """A progress bar on stderr with the time left; silent where stderr is no terminal."""
    from tqdm import tqdm

    return tqdm(iterable, total=total, desc=label, unit=unit, disable=None, leave=False)


def show(table, title: str | None = None) -> None:
    """Print a DataFrame."""
    if title:
        print(f"\n{title}")
    print(table.to_string(index=False, float_format=lambda x: f"{x:.4g}"))


def save(out: Path, stem: str, table=None, figure=None) -> None:
    """Write out/stem.csv and out/stem.html: beside, then renamed, so that neither is ever half-written."""
    out.mkdir(parents=True, exist_ok=True)
    if table is not None:
        replace_file(out / f"{stem}.csv", lambda path: table.to_csv(path, index=False))
    if figure is not None:
        # The plotting library is linked, not embedded: 4 MB less per file.
        replace_file(out / f"{stem}.html", lambda path: figure.write_html(path, include_plotlyjs="cdn"))
    files = [f"{stem}.csv"] * (table is not None) + [f"{stem}.html"] * (figure is not None)
    print(f"wrote {' and '.join(str(out / f) for f in files)}")


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside the path, then rename: what was there stays whole until the new file is."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
