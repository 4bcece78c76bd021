"""What the commands share: flags, loading, progress, tables and figures on disk, errors as one line.

Nothing heavy is imported before the flags are read: --help and a mistyped flag are answered at once. `asked` has what a
command was asked, `outputs` what it prints and writes.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from . import distributed
from .asked import clip as clip
from .asked import parsed as parsed
from .asked import remark, unused
from .documents import Document, documents_of, hub_documents, kind_of, read_documents, read_text
from .lens import LensModel
from .names import DTYPES, EMBEDDED, VALIDATION_TEXT, display_names, dtype_name, locate_checkpoint
from .names import display_name as display_name
from .outputs import report as report
from .outputs import save as save
from .outputs import show as show

# Tokens that are read from their file together.
ROWS_AT_ONCE = 2**16
CONTEXT = 512
# Pairs that are made, and the flags that are for them.
MADE = {"induction": ("n_pairs", "length"), "ioi": ("n_pairs", "template")}
# What an extra of this package brings, for the line that says that it is not there.
EXTRAS = {"plotly": "plot", "accelerate": "train", "datasets": "train", "gguf": "gguf"}


class Formatter(argparse.HelpFormatter):
    """Examples keep their lines; a flag whose help says nothing in brackets at its end gets its default there."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(
            line if line.startswith(" ") else super(Formatter, self)._fill_text(line, width, indent)
            for line in text.splitlines()
        )

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, default = action.help or "", action.default
        says = isinstance(default, (str, int, float, Path)) and default is not False and default != argparse.SUPPRESS
        return f"{text} (%(default)s)".lstrip() if says and not text.endswith(")") else text


class OneLineParser(argparse.ArgumentParser):
    """argparse, but a wrong flag is one line on stderr and exit status 2, and --help ends with examples.

    Args:
        examples: what to give the command, one call each.
    """

    def __init__(self, *args, examples: Sequence[str] = (), epilog: str | None = None, **kwargs):
        calls = ["examples:", *(f"  %(prog)s {example}" for example in examples)]
        lines = [*(calls if examples else ()), *([epilog] if epilog else ())]
        kwargs = {"formatter_class": Formatter, **kwargs, "epilog": "\n".join(lines) or None}
        super().__init__(*args, **kwargs)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


def prog(module: str) -> str:
    """How a command was started: "lnfree dla" or "python -m lnfree_interp.dla"."""
    script = Path(sys.argv[0]).stem
    return f"{script} {module}" if script == "lnfree" else f"python -m lnfree_interp.{module}"


def parser(
    module: str, description: str | None, *, tokens: int | None = 16384, out: str = "out", examples: Sequence[str] = ()
) -> argparse.ArgumentParser:
    """The flags every command has: --model, --text, --data, --tokens, --device, --dtype, --seed, --out.

    Args:
        tokens: None: the command reads no text, and has none of --text, --data, --tokens.
    """
    p = OneLineParser(prog=prog(module), description=description, examples=examples)
    add = p.add_argument
    models_help = "names of available_models(), hub ids or directories (default: the embedded models)"
    add("--model", nargs="+", default=list(EMBEDDED), metavar="NAME", help=models_help)
    if tokens is not None:
        source = p.add_mutually_exclusive_group()
        source.add_argument("--text", metavar="FILE", help="text file, plain or .gz (default: the embedded one)")
        data_help = "hub dataset, streamed, e.g. Skylion007/openwebtext"
        source.add_argument("--data", metavar="DATASET", help=data_help)
        add("--tokens", type=positive_int, default=tokens, metavar="N", help=f"tokens to use ({tokens:,})")
    add("--device", help="cpu, cuda, cuda:N or mps (default: a GPU if there is one)")
    add("--dtype", default="float32", help=f"{', '.join(DTYPES)} (float32)")
    add("--seed", type=int, default=0, metavar="N", help="of what is drawn at random (0)")
    add("--out", type=Path, default=Path(out), metavar="DIR", help=f"where files go ({out})")
    return p


def add_context(parser: argparse.ArgumentParser) -> None:
    """The flag --context, for `token_rows`."""
    text = f"tokens per sequence, or the model's context if that is shorter ({CONTEXT})"
    parser.add_argument("--context", type=positive_int, metavar="N", help=text)


def add_embed(parser: argparse._ActionsContainer) -> argparse.Action:
    """The flag --embed, for `report`."""
    text = "the plotting library within the report, 5 MB, not in a file beside it"
    return parser.add_argument("--embed", action="store_true", help=text)


def add_pairs(parser: argparse._ActionsContainer) -> list[argparse.Action]:
    """The flags of commands on pairs of prompts: --pairs, --n-pairs, --length, --template."""
    add, which = parser.add_argument, "induction, ioi, or a .jsonl or .csv file (induction)"
    return [
        add("--pairs", default="induction", metavar="WHICH", help=which),
        add("--n-pairs", type=positive_int, default=16, metavar="N", help="how many pairs to make (16)"),
        add("--length", type=positive_int, default=16, metavar="N", help="tokens per induction prompt (16)"),
        add("--template", type=int, default=0, metavar="I", help="which IOI template (0)"),
    ]


def positive_int(text: str) -> int:
    value = int(text) if re.fullmatch(r"\d+", text) else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return value


def check(args: argparse.Namespace, *, several: bool = False) -> None:
    """Everything that can be known to be wrong before anything heavy is imported.

    Args:
        several: whether the command may run in several processes, as torchrun starts them.
    """
    if not several:
        check_alone()
    dtype_name(args.dtype)
    for name in args.model:
        locate_checkpoint(name)
    if getattr(args, "text", None):
        next(iter(documents(args)))
    check_out(args)


def check_out(args: argparse.Namespace) -> None:
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out} is not a directory")


def check_alone() -> None:
    """Raise ValueError where several processes would all do the same, and write the same files; in the first alone."""
    n = distributed.world_size()
    if distributed.rank() > 0:
        raise SystemExit(2)
    if n > 1:
        raise ValueError(f"this command runs in one process, not in {n}: start it without torchrun")


def check_pairs(args: argparse.Namespace) -> None:
    """What can be known to be wrong with --pairs; what of the other flags of pairs is not for these is said."""
    if args.pairs not in MADE:
        if Path(args.pairs.removesuffix(".gz")).suffix not in (".jsonl", ".csv"):
            raise ValueError(f"--pairs {args.pairs!r} is none of induction, ioi, or a .jsonl or .csv file")
        read_text(args.pairs, "pairs file")
    for name in ("n_pairs", "length", "template"):
        if name not in MADE.get(args.pairs, ()):
            unused(args, name, f"--pairs {args.pairs}")


def guard(
    run: Callable[[argparse.Namespace], int | None],
    args: argparse.Namespace,
    prog: str,
    *,
    check: Callable[[argparse.Namespace], None] = check,
    several: bool = False,
) -> int:
    """Check the arguments, then run a command that imports its own modules; exit status 0 if it returns None.

    What was wrong with the input becomes one line on stderr and status 2, an interrupt one line and status 130.

    Args:
        several: whether the command's processes, if there are several, meet in `distributed`: of these one tells what
            was wrong, and all have status 2.
    """
    status = _guarded(run, args, prog, check, several)
    return distributed.leave(status) if several else status


def _guarded(run, args: argparse.Namespace, prog: str, check, several: bool) -> int:
    try:
        with distributed.processes() if several else nullcontext():
            check(args)
            say("loading PyTorch ...")
            from .models import resolve_device

            if several:
                args.device = distributed.own_device(args.device)
            resolve_device(args.device)
            return run(args) or 0
    except distributed.Ended:
        return 2
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        extra = f"pip install 'lnfree_interp[{EXTRAS[package]}]'"
        print(f"{prog}: error: this needs {package}, which is not installed: {extra}", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if distributed.rank() == 0:
            print(f"{prog}: interrupted", file=sys.stderr)
        return 130


def say(text: str) -> None:
    """A line on stderr for the person who waits; nothing where stderr is no terminal."""
    if sys.stderr.isatty() and distributed.rank() == 0:
        print(text, file=sys.stderr, flush=True)


def models(args: argparse.Namespace) -> Iterator[tuple[str, LensModel]]:
    """(display name, model) of each --model, one in memory at a time."""
    from .models import load_model

    for name, called in zip(args.model, display_names(args.model)):
        say(f"loading {name} ...")
        model = load_model(name, device=args.device, dtype=args.dtype)
        describe(args, called, model)
        yield called, model


def describe(args: argparse.Namespace, name: str, model: LensModel) -> None:
    """Put a model into the report, and what it runs on."""
    if hasattr(args, "asked"):
        cfg, kind = model.cfg, model.cfg.normalization_type or "no normalisation"
        shape = f"{cfg.n_layers} layers of {cfg.n_heads} heads, d_model {cfg.d_model}, {kind}"
        args.asked.note("models", f"{name}: {shape}; {args.dtype} on {cfg.device}")


def source(args: argparse.Namespace) -> str:
    """What the text is called."""
    return args.data or (Path(args.text).name if args.text else "the embedded validation text")


def documents(args: argparse.Namespace) -> Iterable[Document]:
    """The documents of --text (a file, or a directory of them), of --data, or of the embedded validation text."""
    if not args.text:
        return hub_documents(args.data) if args.data else read_documents(VALIDATION_TEXT)
    path = Path(args.text)
    if path.is_dir() or (path.exists() and kind_of(path)):
        return documents_of(path)
    return read_documents(path)  # a text by any other name, or what there is not


def load_tokens(
    args: argparse.Namespace, model: LensModel, *, context: int | None = None, prepend_bos: bool | None = None
):
    """About --tokens token ids in rows of `context` (512) or the model's context, if that is shorter.

    A `context` that was given and is longer than the model's is said on stderr.

    Args:
        prepend_bos: whether each row begins with the BOS token; None: where the model's prompts do, as
            `model.to_tokens` reads them.

    Returns:
        Int[Tensor, "batch pos"] on the model's device.

    Raises:
        ValueError: the model has no tokenizer, or there is less text than one row.
    """
    import torch

    rows = token_rows(args, model, context=context, prepend_bos=prepend_bos)
    return torch.from_numpy(rows.astype("int64")).to(model.cfg.device)


def token_rows(
    args: argparse.Namespace, model: LensModel, *, context: int | None = None, prepend_bos: bool | None = None
):
    """`load_tokens`' rows as an array that lies in a temporary file, not in memory: what is read is what is sliced.

    Of the processes on a machine the first writes it (4 bytes a token), for all of them.

    Returns:
        Int[np.ndarray, "batch pos"].
    """
    import numpy as np

    if model.tokenizer is None:
        raise ValueError(f"{model.cfg.model_name} has no tokenizer, so text cannot be read for it")
    name, holds = model.cfg.model_name, model.cfg.n_ctx
    if context is not None and context > holds:
        remark(args, f"{name}: sequences of {holds} tokens, not {context}: its context holds no more")
    context = min(context or CONTEXT, model.cfg.n_ctx)
    if prepend_bos is None and not getattr(model.cfg, "default_prepend_bos", True):
        prepend_bos = False
    writes, path = distributed.local_rank() == 0, ""
    try:
        if writes:
            with tempfile.NamedTemporaryFile(prefix="tokens-", delete=False) as file:
                path = file.name
                most = max(1, args.tokens // context)
                _write_rows(file, model.tokenizer, documents(args), context, most, prepend_bos)
        first = distributed.rank() - distributed.local_rank()
        rows = np.memmap(distributed.exchange(path)[first], dtype=np.int32, mode="r").reshape(-1, context)
        distributed.exchange(None)  # all have it open
        _tell_tokens(args, name, rows)
        return rows
    except OSError as error:
        raise ValueError(f"cannot keep tokens in {tempfile.gettempdir()}: {error.strerror or error}") from None
    finally:
        if path:
            with suppress(PermissionError):  # of Windows, as long as it is open
                os.unlink(path)


def _tell_tokens(args: argparse.Namespace, name: str, rows) -> None:
    """Put into the report what is read; say it where it is not as many tokens as --tokens asks for."""
    if not hasattr(args, "asked"):
        return
    n, context = rows.shape
    args.asked.note("text", f"{source(args)}, of which {name} reads {n:,} sequences of {context:,} tokens")
    if "tokens" in args.asked.given and rows.size != args.tokens:
        short = n < args.tokens // context
        why = "the text has no more" if short else f"sequences are of {context:,}"
        remark(args, f"{name}: {rows.size:,} tokens, not {args.tokens:,}: {why}")


def _write_rows(
    file, tokenizer, documents: Iterable[Document], context: int, most: int, prepend_bos: bool | None
) -> None:
    """The documents' first rows of `context` token ids, at most so many, as int32."""
    import numpy as np

    from .data import begins_with, content, token_stream, too_few

    begin = begins_with(tokenizer, prepend_bos)
    length, written, rest = content(context, begin), 0, []
    for ids in token_stream(tokenizer, documents):
        rest += ids
        n = min(len(rest) // length, most - written)
        rows = np.asarray(rest[: n * length], np.int32).reshape(n, length)
        file.write(np.hstack([np.tile(np.asarray(begin, np.int32), (n, 1)), rows]).tobytes())
        written += n
        if written == most:
            return
        del rest[: n * length]
    if not written:
        raise too_few(len(rest), context)


def shards(rows) -> tuple[int, list]:
    """This process' part of the rows: which is its first, and the rows some at a time, none of them read yet."""
    part, step = distributed.shard(len(rows)), max(1, ROWS_AT_ONCE // rows.shape[1])
    return part.start, [rows[i : min(i + step, part.stop)] for i in range(part.start, part.stop, step)]


def load_pairs(args: argparse.Namespace, model: LensModel):
    """The pairs that --pairs asks for, by token length: dict[int, PromptPairs]."""
    from .pairs import groups_from_file, induction_pairs, ioi_pairs

    if args.pairs not in MADE:
        found = groups_from_file(args.pairs, model)
    else:
        if args.pairs == "induction":
            pairs = induction_pairs(model, args.n_pairs, length=args.length, seed=args.seed)
        else:
            pairs = ioi_pairs(model, args.n_pairs, seed=args.seed, template=args.template)
        found = {pairs.clean.shape[1]: pairs}
    counts = ", ".join(f"{len(pairs)} of {n} tokens" for n, pairs in found.items())
    args.asked.note("pairs", f"{args.pairs}: {counts} ({model.cfg.model_name})")
    return found


@contextmanager
def bar(label: str, unit: str) -> Iterator[Callable[[int, int | None], None]]:
    """A progress bar on stderr with the time left, as a `batching.Progress`; silent where stderr is no terminal."""
    from tqdm import tqdm

    disable = None if distributed.rank() == 0 else True  # None: where stderr is no terminal
    with tqdm(desc=label, unit=unit, disable=disable, leave=False) as shown:

        def report(done: int, total: int | None) -> None:
            shown.total = total
            shown.update(done - shown.n)

        yield report
