"""The work of python -m lnfree_interp.finetune."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.integrations import integration_utils
from transformers.utils import logging as transformers_logging

from ..cli import bar
from ..corpus import read_corpus
from ..data import StreamedBlocks
from ..distributed import rank
from ..schedule import RemovalSchedule
from . import dry_run
from .callbacks import StatusLine, on_sigterm
from .card import CARD, Facts, base_of, check_push, data_of, model_card, name_card, push, write_card
from .flags import guard_from, schedule_from, source_of
from .guard import Diverged, held_out_loss
from .removable import n_layers
from .saving import STATE, check_directory, finished, read_json
from .settings import control_losses, fingerprint, training_arguments
from .trainable import load_trainable
from .training import CHECKPOINTING, blocks_to_set_aside, remove_layernorm


def run(args) -> int:
    """Exit status 0; 1: the loss diverged; 130: interrupted."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with on_sigterm(_interrupt):  # while nothing is trained; a run has its own answer
            if args.dry_run:
                _dry_run(args)
            else:
                _train(args)
    except Diverged as error:
        print(f"{args.prog}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        again = "" if args.dry_run else "; --resume goes on from the last checkpoint"
        print(f"{args.prog}: interrupted{again}", file=sys.stderr)
        return 130
    return 0


def _interrupt() -> None:
    raise KeyboardInterrupt


def _tell(text: str) -> None:
    """On stdout, once however many processes there are."""
    if rank() == 0:
        print(text, flush=True)


def _train(args) -> None:
    schedule = schedule_from(args)
    _check_outside(args)
    check_directory(args.out, args.resume)
    final = args.out / "final"
    if args.resume and finished(args.out) and (final / CARD).is_file():
        _tell(f"the run in {args.out} is finished: nothing to resume")
        _push(args, final)
        return
    model, tokenizer = load_trainable(args.model)
    dataset = _dataset(args, tokenizer, schedule.block_size)
    print_of = fingerprint(dataset)
    held_out, dataset = _set_aside(args, dataset, schedule)
    _tell(f"{args.model}, {source_of(args)}: {schedule.describe(n_layers(model))}")
    made = remove_layernorm(
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
        held_out=0 if held_out is None else held_out,
        control=args.control,
        guard=guard_from(args),
        save_steps=args.save_steps,
        report_to=[name for name in args.report_to if name != "none"],
        logging_steps=1 if schedule.tokens_per_step > 100_000 or schedule.pace == "adaptive" else 10,
        **({CHECKPOINTING: True} if args.gradient_checkpointing else {}),
    )
    if rank() == 0:
        device = next(model.parameters()).device
        facts = _facts(args, schedule, made, n_layers(model), held_out, print_of, device)
        write_card(final, model_card(facts, args.push_to_hub))
        _tell(f"wrote {final}")
        _push(args, final)


def _push(args, final: Path) -> None:
    if args.push_to_hub and rank() == 0:
        name_card(final, args.push_to_hub)
        _tell(f"pushed to {push(final, args.push_to_hub)}")


def _facts(args, schedule: RemovalSchedule, made, layers: int, held_out, print_of: str | None, device) -> Facts:
    """What the card says; losses are measured here, the same way for this model and the control."""
    state = read_json(args.out / "final" / STATE) or {}
    base, on_hub = base_of(args.model)
    data, dataset = data_of(args.text, args.data)
    after = control = None
    if held_out is not None:
        size = args.batch_size or 1
        after = held_out_loss(made.to(device), held_out, batch_size=size, dtype=args.dtype)
        if args.control is not None and finished(args.control):
            other = AutoModelForCausalLM.from_pretrained(args.control / "final", local_files_only=True)
            control = held_out_loss(other.to(device), held_out, batch_size=size, dtype=args.dtype)
    return Facts(
        base=base,
        base_on_hub=on_hub,
        schedule=schedule,
        n_layer=layers,
        source=source_of(args),
        data=data,
        dataset=dataset,
        fingerprint=print_of,
        held_out=0 if held_out is None else len(held_out),
        before=None if held_out is None else state.get("baseline"),
        after=after,
        control=control,
        steps=state.get("step", schedule.steps),
        rollbacks=len(state.get("rollbacks", ())),
        seed=args.seed,
        dtype=args.dtype,
    )


# -- what it needs ------------------------------------------------------------------------------------------


def _check_outside(args) -> None:
    """What others must be there for: where losses are reported, and the hub."""
    known, there = integration_utils.INTEGRATION_TO_CALLBACK, integration_utils.get_available_reporting_integrations()
    for name in args.report_to:
        if name != "none" and name not in known:
            raise ValueError(f"--report-to {name}: choose from none, {', '.join(known)}")
        if name != "none" and name not in there:
            raise ValueError(f"--report-to {name}: its package is not installed; installed: {', '.join(there) or '-'}")
    if args.push_to_hub:
        check_push(args.push_to_hub)


def _stream(args, tokenizer, block_size: int) -> Any:
    buffer = {} if args.buffer is None else {"buffer": args.buffer}
    return StreamedBlocks(args.data, tokenizer, block_size, seed=args.seed, passes=None, **buffer)


def _dataset(args, tokenizer, block_size: int) -> Any:
    """Blocks of --text, tokenised into the cache, or of --data as they come."""
    if not args.text:
        return _stream(args, tokenizer, block_size)
    with bar("tokenising", "token") as progress:
        return read_corpus(args.text, tokenizer, block_size, cache=args.cache, progress=progress)


def _n_held_out(args, n_blocks: int | None, schedule: RemovalSchedule) -> int:
    """How many blocks are set aside, of so many or of a stream.

    Raises:
        ValueError: they leave less than a step needs.
    """
    sequences = schedule.tokens_per_step // schedule.block_size
    if args.held_out is None:
        return blocks_to_set_aside(n_blocks, sequences)
    if n_blocks is not None and args.held_out and n_blocks - args.held_out < sequences:
        raise ValueError(f"--held-out {args.held_out} of {n_blocks} blocks leaves too few: a step needs {sequences}")
    return args.held_out


def _set_aside(args, dataset, schedule: RemovalSchedule) -> tuple[Int[Tensor, "batch pos"] | None, Any]:
    """Held-out blocks, and the dataset without them."""
    n = _n_held_out(args, len(dataset) if hasattr(dataset, "__len__") else None, schedule)
    return dataset.set_aside(n) if n else (None, dataset)


# -- before it starts ---------------------------------------------------------------------------------------


def _dry_run(args) -> None:
    schedule = schedule_from(args)
    _check_outside(args)
    check_directory(args.out, args.resume)
    if rank() != 0:
        return
    model, tokenizer = load_trainable(args.model)
    if args.control is not None:
        control_losses(args.control, {}, schedule.steps)
    layers, sequences = n_layers(model), schedule.tokens_per_step // schedule.block_size

    def arguments(n_blocks: int | None) -> dict[str, Any]:
        known = (args.out, args.batch_size, args.dtype, args.device, n_blocks)
        return training_arguments(model.config, layers, schedule, *known)

    size = arguments(None)["per_device_train_batch_size"]  # before anything is read
    if args.text:
        text = dry_run.look_at(args.text, tokenizer, schedule.block_size, size)
        n_blocks, blocks, known = text.n_blocks, text.blocks, str(text)
    else:
        n_blocks, known = None, f"{data_of(args.text, args.data)[0]}, streamed"
        blocks = dry_run.first_blocks(_stream(args, tokenizer, schedule.block_size), size)
    fitting, n_held_out = arguments(n_blocks), _n_held_out(args, n_blocks, schedule)
    known += f"; {n_held_out} held out"
    if n_blocks is not None:
        times = schedule.steps * sequences / (n_blocks - n_held_out)
        known += f", the others are read {times:.1f} times" if times >= 1 else f", of the others {times:.0%} are read"
    lines = dry_run.report(
        model,
        tokenizer,
        schedule,
        fitting,
        blocks,
        known,
        args.out,
        dtype=args.dtype,
        device=args.device,
        checkpointing=args.gradient_checkpointing,
        timing=not args.no_timing,
    )
    _tell(f"{args.model}, {source_of(args)}")
    for label, text_ in lines:
        first, *more = text_.split("\n")
        _tell("\n".join([f"{label:<11} {first}", *(f"{'':11} {line}" for line in more)]))
    _tell("dry run: nothing was written")
