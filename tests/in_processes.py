"""What the tests of removal do in several processes, and how they start them; as a script, what each process does."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

from lnfree_interp.finetune.export import export_ln_free, whole
from lnfree_interp.finetune.removable import (
    auxiliary_loss,
    collect_std,
    family_of,
    final_norm,
    freeze,
    make_removable,
    n_layers,
    removal_sites,
    update_averages,
)

N = 2
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", f"--nproc-per-node={N}"],
    "accelerate": [
        *("accelerate.commands.launch", "--multi_gpu", f"--num_processes={N}", "--num_machines=1"),
        *("--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"),
    ],
}


def launch(launcher: str, folder: Path, *parts: str, timeout: float = 300) -> None:
    """Do some parts in N processes, on the CPU and on one thread each; none outlives the time limit."""
    command = [sys.executable, "-m", *LAUNCHERS[launcher], __file__, str(folder), *parts]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    with (folder / f"{launcher}.log").open("w+") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            code = f"none after {timeout} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        log.seek(0)
        assert code == 0, f"{command}: {code}\n{log.read()[-6000:]}"


# -- runs of Trainer

# What happens to a run of a name besides: before step 6 and again before step 11 somebody interrupts it; one of its
# processes is asked to stop in step 5; all weights are lost in step 9; half of its loss is distillation.
STOPPED, ASKED, LOST, DISTILLED = "stopped", "asked", "lost", "distilled"


def run(folder: Path, name: str, *, rank: int = 0, resume: bool = False, batch_size: int | None = None) -> dict:
    """A removal of a minute GPT-2 in fp64; what it gave, which is kept in a file as well."""
    from minute import MINUTE, Aside, At, Recorder, byte_tokenizer, interrupt, minute_blocks, minute_gpt2, train

    from lnfree_interp.finetune.guard import Guard
    from lnfree_interp.finetune.saving import state_in

    recorder, final = Recorder(), None
    happens = {
        STOPPED: [At(10 if resume else 5, interrupt)] * (dist.is_initialized() or not resume),
        ASKED: [At(4, lambda model: rank or os.kill(os.getpid(), signal.SIGTERM), times=1 - resume)],
        LOST: [At(8, lambda model: [p.data.mul_(100) for p in model.parameters()], times=1)],
    }
    data = Aside(minute_blocks().blocks)
    options = {"resume": resume, "batch_size": batch_size, "guard": Guard(patience=0, wait=3), "data": data}
    callbacks, model = [recorder, *happens.get(name, [])], minute_gpt2(dtype=torch.float64)
    schedule = replace(MINUTE, distillation=0.5 * (name == DISTILLED))
    try:
        with patch.object(torch.Tensor, "float", torch.Tensor.double):  # transformers' loss too in fp64
            _, plain = train(byte_tokenizer(), folder / name, schedule, callbacks=callbacks, model=model, **options)
        final = plain.state_dict()
    except KeyboardInterrupt:
        assert name in (STOPPED, ASKED)
    found = {"logs": recorder.logs, "averages": recorder.averages, "batches": recorder.batches, "final": final}
    found["state"] = state_in(folder / name / "final")
    torch.save(found, folder / f"{name}-{rank}.pt")
    return found


# -- steps of a sharded model

EOT = 3
TREATED = {"position0": True, "eot": True}
# What is frozen in each step, and how.
FROZEN = (
    ([], {}),
    ([("ln_2", 0)], {"position0": True}),
    ([("ln_2", 0), ("qk", 0), ("v", 0), ("qk", 1)], TREATED),
    (None, TREATED),
    (None, {}),
)
ROWS = 4


def tokens_of(step: int):
    tokens = torch.randint(4, 23, (ROWS, 9), generator=torch.Generator().manual_seed(step))
    tokens[0, 0] = tokens[1, 4] = tokens[3, -1] = EOT
    return tokens


def removable(kind: str, seed: int = 0):
    from removable_models import make_plain

    return make_removable(make_plain(kind, seed=seed), eot=EOT).train()


def take_steps(model, rows: slice) -> list[dict]:
    """A few steps of AdamW on some rows of each batch; after each the losses, the averages and the whole weights."""
    from removable_models import exact

    optimizer, found = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for step, (frozen, how) in enumerate(FROZEN):
        freeze(model, removal_sites(model) if frozen is None else frozen, **how)
        final = final_norm(model)
        final.keep_std = step < 3
        tokens = tokens_of(step)[rows]
        with exact():
            logits = model(tokens).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        aux = auxiliary_loss(final.std, final.target) if final.keep_std else torch.zeros(())
        final.std = None
        (loss + 0.1 * aux).backward()
        collect_std(model)
        update_averages(model)
        optimizer.step()
        optimizer.zero_grad()
        losses = torch.stack([loss.detach(), aux.detach().to(loss.dtype)])
        if dist.is_initialized():
            dist.all_reduce(losses)
            losses /= dist.get_world_size()
        state = {name: whole(w).clone() for name, w in model.state_dict().items()}
        found.append({"losses": losses, "state": state})
    return found


def shard(model):
    from torch.distributed.fsdp import fully_shard

    family = family_of(model)
    base = model.get_submodule(family.prefix.rstrip("."))
    for layer in range(n_layers(model)):
        fully_shard(base.get_submodule(family.block.format(layer)))
    return fully_shard(model)


def sharded(folder: Path, kind: str, rank: int) -> None:
    """The steps, a checkpoint of shards, and what another model exports that has read it."""
    import torch.distributed.checkpoint as checkpoint

    model, share = shard(removable(kind)), ROWS // N
    found = take_steps(model, slice(rank * share, (rank + 1) * share))
    sizes = {name: w.to_local().numel() for name, w in model.named_parameters()}
    path = folder / f"{kind} shards"
    checkpoint.save(get_model_state_dict(model), checkpoint_id=path)
    other = shard(removable(kind, seed=1))
    state = get_model_state_dict(other)
    checkpoint.load(state, checkpoint_id=path)
    set_model_state_dict(other, state)
    freeze(other, removal_sites(other))
    exported = export_ln_free(other)
    result = {"steps": found, "sizes": sizes, "exported": exported.state_dict(), "config": exported.config.to_dict()}
    torch.save(result, folder / f"{kind}-{rank}.pt")


def main(folder: str, *parts: str) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=180))
    rank, at = dist.get_rank(), Path(folder)
    for part in parts:
        what, _, name = part.partition(":")
        if what == "shard":
            sharded(at, name, rank)
        else:
            run(at, name, rank=rank, resume=what == "go on", batch_size=1 if name == "accelerate" else None)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
