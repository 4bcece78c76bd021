"""Removal in several processes: data parallel, resumed on another number of them, sharded; all equals one process."""

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as checkpoint
from in_processes import ASKED, DISTILLED, LOST, STOPPED, N, launch, removable, run, take_steps
from minute import MINUTE

from lnfree_interp.finetune.export import export_ln_free
from lnfree_interp.finetune.removable import freeze, removal_sites
from lnfree_interp.layernorm import is_ln_free

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed"),
]
SHARDED = ("GPT-2", "Llama")


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance, equal_nan=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """All that two processes make: one start of them is most of what it takes."""
    folder = tmp_path_factory.mktemp("processes")
    run(folder, STOPPED)
    runs = ("run:torchrun", f"go on:{STOPPED}", f"run:{LOST}", f"run:{ASKED}", f"run:{DISTILLED}")
    launch("torchrun", folder, *(f"shard:{kind}" for kind in SHARDED), *runs)
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict:
    return run(tmp_path_factory.mktemp("alone"), "alone")


def of_each(folder: Path, name: str) -> list[dict]:
    """What each process found."""
    return [torch.load(folder / f"{name}-{rank}.pt", weights_only=False) for rank in range(N)]


def assert_same_run(found: dict, alone: dict, since: int = 0):
    """Losses, averages and final weights, from a step on."""
    for name in ("step", "ce", "loss", "aux", "grad_norm", "learning_rate"):
        values = [[log.get(name, 0.0) for log in logs] for logs in (found["logs"], alone["logs"][since:])]
        tolerance = 1e-6 if name == "loss" else 1e-9  # Trainer gathers it in fp32
        assert values[0] == pytest.approx(values[1], rel=tolerance), name
    close(found["averages"], alone["averages"][since:])
    close(found["final"], alone["final"])
    for name in ("ce", "baseline"):
        assert found["state"][name] == pytest.approx(alone["state"][name], rel=1e-9), name


def test_torchrun_trains_what_one_process_does(folder, alone):
    one, other = of_each(folder, "torchrun")
    assert len(alone["logs"]) == MINUTE.steps and alone["logs"][6]["aux"] > 0
    assert_same_run(one, alone)
    close(other["averages"], one["averages"], 0)
    close(other["final"], one["final"], 0)
    for *parts, whole in zip(one["batches"], other["batches"], alone["batches"], strict=True):
        assert torch.equal(torch.cat(parts), whole) and not torch.equal(*parts)


def test_two_processes_are_distilled_as_one_is(folder, tmp_path):
    wanted = run(tmp_path, DISTILLED)
    for found in of_each(folder, DISTILLED):
        assert [log["kl"] for log in found["logs"]] == pytest.approx([log["kl"] for log in wanted["logs"]], abs=1e-9)
        close(found["final"], wanted["final"])
    assert_same_run(of_each(folder, DISTILLED)[0], wanted)


def test_accelerate_launch_does_too(tmp_path, alone):
    """With a sequence per forward besides."""
    launch("accelerate", tmp_path, "run:accelerate")
    one, other = of_each(tmp_path, "accelerate")
    assert all(len(batch) == 1 for batch in one["batches"] + other["batches"])
    assert_same_run(one, alone)
    close(other["final"], one["final"], 0)


def test_one_process_then_two_then_one(folder, alone):
    parts = of_each(folder, STOPPED)
    assert [log["step"] for log in parts[0]["logs"]] == list(range(6, 11)) and parts[0]["final"] is None
    close(parts[0]["averages"], alone["averages"][5:10])
    assert_same_run(run(folder, STOPPED, resume=True), alone, since=10)


def test_one_of_two_asked_to_stop_stops_both(folder, alone):
    """After a checkpoint, from which one process goes on."""
    for found in of_each(folder, ASKED):
        assert found["final"] is None and len(found["averages"]) == 5
    assert_same_run(run(folder, ASKED, resume=True), alone, since=5)


def test_two_processes_go_back_as_one_does(folder, tmp_path):
    one, other = of_each(folder, LOST)
    wanted = run(tmp_path, LOST)
    steps = [log["step"] for log in wanted["logs"]]
    assert steps[:8] == list(range(1, 9)) and steps[8] == 6  # step 9 is suspect: from checkpoint-5 again
    assert [log["step"] for log in one["logs"]] == steps
    close(one["averages"], wanted["averages"])
    close(one["final"], wanted["final"])
    close(other["final"], one["final"], 0)


@pytest.fixture(scope="module", params=SHARDED)
def sharded(request, folder):
    """A kind of model, what the two processes found, and the steps on one process."""
    model = removable(request.param)
    return request.param, of_each(folder, request.param), take_steps(model, slice(None)), model


def test_a_sharded_model_takes_the_same_steps(sharded):
    """Frozen sites and live ones; averages, and the auxiliary loss' target, of the whole step."""
    _, both, steps, model = sharded
    for found in both:
        for step, wanted in zip(found["steps"], steps, strict=True):
            close(step["losses"], wanted["losses"])
            close(step["state"], wanted["state"])
    assert min(step["losses"][1] for step in steps[1:3]) > 0 and not steps[-1]["state"]["lm_head.weight"].isnan().any()
    for name, weight in model.named_parameters():
        assert sum(found["sizes"][name] for found in both) == weight.numel()
    assert all(sum(found["sizes"].values()) < 0.7 * sum(p.numel() for p in model.parameters()) for found in both)


def test_shards_are_gathered_into_the_same_export(sharded):
    """Through a checkpoint of shards, into a model of shards; each process has the whole."""
    _, both, _, model = sharded
    freeze(model, removal_sites(model))
    wanted = export_ln_free(model)
    for found in both:
        assert is_ln_free(wanted.config, found["exported"])
        assert found["config"] == wanted.config.to_dict()
        close(found["exported"], dict(wanted.state_dict()))


def test_a_checkpoint_of_shards_is_read_by_one_process(sharded, folder):
    kind, _, _, model = sharded
    other = removable(kind, seed=1)
    state = other.state_dict()
    checkpoint.load(state, checkpoint_id=folder / f"{kind} shards", no_dist=True)
    other.load_state_dict(state)
    close(dict(other.state_dict()), dict(model.state_dict()))
