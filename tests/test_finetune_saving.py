"""What a run leaves on disk: whole or passed over, the same run or refused, the state before kept on a full disk."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from minute import MINUTE, At, byte_tokenizer, interrupt, minute_blocks, minute_gpt2, train, weights_equal
from safetensors.torch import load_file, save_file
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from lnfree_interp.data import Blocks
from lnfree_interp.finetune import last_checkpoint, saving
from lnfree_interp.finetune.saving import (
    MANIFEST,
    STATE,
    checkpoint_to_resume,
    checkpoints,
    fault,
    finished,
    rotate,
    state_in,
    write_manifest,
)
from lnfree_interp.finetune.settings import differences, fingerprint


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def whole(tokenizer, tmp_path_factory):
    """A run that was finished."""
    out = tmp_path_factory.mktemp("whole") / "out"
    _, final = train(tokenizer, out)
    return out, final


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of it, before the export."""
    shutil.copytree(whole[0], tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "final")
    return tmp_path / "out"


def cut(path: Path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zero(path: Path):
    path.write_bytes(bytes(path.stat().st_size))


def empty(path: Path):
    path.write_bytes(b"")


def flip(path: Path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def directory(path: Path):
    path.unlink()
    path.mkdir()


FILES = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
FILES += [MANIFEST, STATE, "config.json", "tokenizer.json"]
WAYS = [cut, zero, empty, flip, directory, Path.unlink]


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_passed_over_and_stderr_says_why(copy, capsys, name):
    newest, before = checkpoints(copy)
    path = newest / name
    for way in WAYS:
        original = path.read_bytes()
        way(path)
        assert checkpoint_to_resume(copy, True) == before
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and said.startswith(f"{newest} is damaged ({name} ")
        assert said.endswith(": going on from checkpoint-10\n")
        if path.is_dir():
            path.rmdir()
        path.write_bytes(original)
    assert checkpoint_to_resume(copy, True) == newest and not capsys.readouterr().err


def test_if_none_is_whole_each_fault_is_named_and_nothing_begins_anew(copy, tokenizer):
    zero(copy / "checkpoint-14" / "optimizer.pt")
    (copy / "checkpoint-10" / "rng_state.pth").unlink()
    before = sorted(copy.rglob("*"))
    with pytest.raises(ValueError) as error:
        train(tokenizer, copy, resume=True)
    said = str(error.value)
    assert "\n" not in said and said.startswith(f"cannot resume {copy}: ")
    assert "checkpoint-14 is damaged (optimizer.pt is not what was written)" in said
    assert "checkpoint-10 is damaged (rng_state.pth is gone)" in said
    assert sorted(copy.rglob("*")) == before


def test_a_run_resumed_from_the_one_before_ends_the_same(whole, copy, tokenizer):
    cut(copy / "checkpoint-14" / "model.safetensors")
    _, final = train(tokenizer, copy, resume=True)
    assert weights_equal(final, whole[1]) and finished(copy)
    assert sorted(p.name for p in copy.iterdir()) == ["checkpoint-10", "checkpoint-14", "final", "run.json"]
    assert fault(copy / "checkpoint-14") is None, "written anew"
    # a damaged result is made anew from the last checkpoint
    cut(copy / "final" / "model.safetensors")
    assert not finished(copy)
    _, final = train(tokenizer, copy, resume=True)
    assert weights_equal(final, whole[1]) and finished(copy)


def test_a_damaged_checkpoint_that_is_not_written_anew_goes_with_the_next(copy, tokenizer):
    """Else it would be taken for one of the newest."""
    (copy / "checkpoint-14").rename(copy / "checkpoint-12")
    zero(copy / "checkpoint-12" / "model.safetensors")
    train(tokenizer, copy, resume=True)
    assert [p.name for p in checkpoints(copy)] == ["checkpoint-14", "checkpoint-10"]


def old_version(out: Path):
    """As a version without manifests left it: its settings too."""
    for checkpoint in checkpoints(out):
        (checkpoint / MANIFEST).unlink()
        (checkpoint / STATE).unlink()
    stored = json.loads((out / "run.json").read_text())["settings"]
    schedule = {k: v for k, v in stored.items() if hasattr(MINUTE, k) and k not in ("pace", "settle", "margin")}
    (out / "run.json").write_text(json.dumps({"schedule": schedule, "seed": 0, "batch_size": 4, "text": ["a.txt"]}))


def test_an_older_version_s_checkpoint_is_taken_if_all_its_files_can_be_read(whole, copy, tokenizer, capsys):
    old_version(copy)
    newest, before = checkpoints(copy)
    assert checkpoint_to_resume(copy, True) == newest
    assert "is of an older version and has no manifest.json" in capsys.readouterr().err
    for name in FILES[:5]:
        for way in (cut, empty, Path.unlink):
            original = (newest / name).read_bytes()
            way(newest / name)
            assert checkpoint_to_resume(copy, True) == before
            assert f"{name} is " in capsys.readouterr().err
            (newest / name).write_bytes(original)
    with pytest.raises(ValueError, match="steps was 14, now 15"):
        train(tokenizer, copy, replace(MINUTE, steps=15), resume=True)
    shutil.rmtree(newest)
    _, final = train(tokenizer, copy, resume=True)
    assert weights_equal(final, whole[1]), "which events had happened followed from the step"


def test_a_hash_is_of_all_parts_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "PART", 10)
    path = tmp_path / "model.safetensors"
    for text in (b"", b"0123456789", b"0123456789abcdefghij?"):
        path.write_bytes(text)
        write_manifest(tmp_path)
        assert fault(tmp_path) is None
        for damaged in (text[10:20] + text[:10] + text[20:], text[:-1] + b"!"):
            if damaged != text and len(damaged) == len(text):
                path.write_bytes(damaged)
                assert fault(tmp_path) == "model.safetensors is not what was written"


def fake_run(out: Path, checkpoints: dict[int, bool]):
    for step, good in checkpoints.items():
        checkpoint = out / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / STATE).write_text(json.dumps({"good": good}))
        write_manifest(checkpoint)


def test_rotation_keeps_the_newest_two_and_the_newest_good_one(tmp_path):
    fake_run(tmp_path, {5: True, 9: True, 10: False, 100: False, 110: False})
    rotate(tmp_path, 1)
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-110", "checkpoint-100", "checkpoint-9"]
    rotate(tmp_path, 3)
    assert len(checkpoints(tmp_path)) == 3
    (tmp_path / "checkpoint-x").mkdir()
    (tmp_path / "checkpoint-9" / STATE).unlink()
    rotate(tmp_path, 2)
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-110", "checkpoint-100"]


def minute_neox():
    torch.manual_seed(0)
    sizes = {"vocab_size": 257, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    config = GPTNeoXConfig(**sizes, num_attention_heads=2, max_position_embeddings=16, **ids)
    return GPTNeoXForCausalLM(config)


def test_an_architecture_whose_weights_are_published_under_other_names(tokenizer, tmp_path):
    """GPT-NeoX's head is: a resumed run has it, and one that goes back has it too."""
    _, final = train(tokenizer, tmp_path / "a", model=minute_neox())
    with pytest.raises(KeyboardInterrupt):
        train(tokenizer, tmp_path / "b", model=minute_neox(), callbacks=[At(7, interrupt)])
    _, resumed = train(tokenizer, tmp_path / "b", model=minute_neox(), resume=True)
    assert weights_equal(resumed, final)
    (tmp_path / "b" / "final").rename(tmp_path / "c")
    checkpoint = last_checkpoint(tmp_path / "b")
    weights = load_file(checkpoint / "model.safetensors")
    del weights["embed_out.weight"]
    save_file(weights, checkpoint / "model.safetensors")
    write_manifest(checkpoint)
    with pytest.raises(ValueError, match=r"is not of this model: it lacks lm_head\.weight"):
        train(tokenizer, tmp_path / "b", model=minute_neox(), resume=True)


# -- the same run -----------------------------------------------------------------------------------------


def test_what_a_run_must_share_is_named_field_by_field(copy, tokenizer):
    other = minute_gpt2()
    other.transformer.wte.weight.data[3, 3] += 1e-6
    for changes, message in (
        ({"seed": 1}, "seed was 0, now 1$"),
        ({"dtype": "bfloat16"}, "dtype was float32, now bfloat16$"),
        ({"schedule": replace(MINUTE, learning_rate=2e-2)}, r"learning_rate was 0\.01, now 0\.02$"),
        (
            {"schedule": replace(MINUTE, steps=30, gaps=MINUTE.gaps | {"v": 2})},
            "steps was 14, now 30; gaps of v was 1, now 2$",
        ),
        ({"schedule": replace(MINUTE, auxiliary_until=5)}, "auxiliary_until was None, now 5$"),
        ({"data": minute_blocks(seed=1)}, r"data was \w{12}\.\.\., now \w{12}\.\.\.$"),
        ({"model": other}, r"model was \w{12}\.\.\., now \w{12}\.\.\.$"),
        ({"adam_beta2": 0.95}, r"adam_beta2 was 0\.999, now 0\.95$"),
    ):
        with pytest.raises(ValueError, match=f"^cannot resume .*: {message}"):
            train(tokenizer, copy, resume=True, **changes)
    train(tokenizer, copy, resume=True, batch_size=1, save_steps=3, note={"text": "elsewhere"}, logging_steps=2)


def test_data_is_known_by_its_tokens():
    class Named(list):
        fingerprint = "abc"

    assert fingerprint(Named()) == "abc"
    tokens = minute_blocks(n=600).blocks
    kept = Blocks(tokens)
    rows = [Dataset.from_dict({"input_ids": tokens.tolist()}), [{"input_ids": row} for row in tokens.tolist()]]
    rows += [[{"input_ids": row.astype(dtype)} for row in tokens.numpy()] for dtype in ("uint16", "int32", "int64")]
    rows += [[{"input_ids": row} for row in tokens.int()], torch.utils.data.Subset(kept, range(600))]
    rows += [rows[0].with_format("torch"), Blocks(tokens.int())]
    assert {fingerprint(held) for held in rows} == {fingerprint(kept)}, "whatever holds them"
    _, rest = kept.set_aside(7)
    assert fingerprint([*rest]) == fingerprint(rest) != fingerprint(kept)
    changed = [*rows[1][:3], {"input_ids": tokens[4].tolist()}, *rows[1][4:]]
    assert fingerprint(changed) != fingerprint(kept), "each block counts"
    assert fingerprint([{"input_ids": row} for row in tokens.view(-1, 8)]) != fingerprint(kept)
    items = [{"input_ids": row} for row in minute_blocks().blocks]
    assert fingerprint(items) != fingerprint([{"input_ids": row} for row in minute_blocks(seed=1).blocks])
    assert fingerprint(minute_blocks()) == fingerprint(minute_blocks()) != fingerprint(minute_blocks(seed=1))
    assert fingerprint(items[:-1]) != fingerprint(items)
    assert fingerprint(iter(())) is None
    assert not differences({"data": None, "seed": 1}, {"data": "abc", "seed": 1, "new": 3})


# -- signals and kills ------------------------------------------------------------------------------------


def test_sigterm_saves_at_the_next_step_and_interrupts(whole, tokenizer, tmp_path):
    out, before = tmp_path / "out", signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        train(tokenizer, out, callbacks=[At(6, lambda model: os.kill(os.getpid(), signal.SIGTERM))])
    assert signal.getsignal(signal.SIGTERM) is before
    assert last_checkpoint(out).name == "checkpoint-7" and not (out / "final").exists()
    _, final = train(tokenizer, out, resume=True)
    assert weights_equal(final, whole[1])


def test_a_thread_may_train_too(whole, tokenizer, tmp_path):
    made = []
    thread = threading.Thread(target=lambda: made.append(train(tokenizer, tmp_path / "out")[1]))
    thread.start()
    thread.join()
    assert weights_equal(made[0], whole[1])


KILLED = """
import os, sys, time
from minute import byte_tokenizer, train
from lnfree_interp.finetune.saving import checkpoints, fault

out = sys.argv[1]
for delay in [0.2, 0.35, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, None]:
    child = os.fork()  # what is imported is imported
    if not child:
        train(byte_tokenizer(), out, resume=True, save_steps=1)
        os._exit(0)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, 9)
    status = os.waitpid(child, 0)[1]
    assert all(fault(path) is None for path in checkpoints(out)), delay
    print(delay, status, checkpoints(out)[:1], flush=True)
assert status == 0
"""


@pytest.mark.slow
def test_killed_wherever_it_is_a_run_ends_the_same(whole, tmp_path):
    here = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    environment = os.environ | {"PYTHONPATH": here}
    run = [sys.executable, "-c", KILLED, str(tmp_path / "out")]
    ran = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    print(ran.stdout)
    assert weights_equal(type(whole[1]).from_pretrained(tmp_path / "out" / "final"), whole[1])


# -- disks ------------------------------------------------------------------------------------------------


@contextmanager
def files_of_at_most(size: int):
    """What a full disk is to whoever writes a larger one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [4_000, 20_000, 40_000])
def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_before(whole, tokenizer, tmp_path, size):
    """The tokenizer, the weights or the optimiser's state do not fit."""
    out, full = tmp_path / "out", files_of_at_most(size)
    with pytest.raises(ValueError) as error:
        try:
            train(tokenizer, out, callbacks=[At(7, lambda model: full.__enter__())])
        finally:
            full.__exit__(None, None, None)
    assert str(error.value).startswith(f"cannot write {out / 'checkpoint-10'}: ") and "\n" not in str(error.value)
    assert sorted(p.name for p in out.iterdir()) == ["checkpoint-1", "checkpoint-5", "run.json"]
    assert fault(last_checkpoint(out)) is None
    _, final = train(tokenizer, out, resume=True)
    assert weights_equal(final, whole[1])


def test_the_result_is_whole_or_not_there(copy, tokenizer):
    with files_of_at_most(4_000), pytest.raises(ValueError, match=r"cannot write .*final: "):
        train(tokenizer, copy, resume=True)
    assert sorted(p.name for p in copy.iterdir()) == ["checkpoint-10", "checkpoint-14", "run.json"]


def test_directories_that_are_none(tokenizer, tmp_path):
    (tmp_path / "file").write_text("here")
    (tmp_path / "run.json").mkdir()
    for out, message in (
        (tmp_path / "file", "is not a directory"),
        (tmp_path / "file" / "out", "cannot use .*: Not a directory|cannot write .*: Not a directory"),
        (tmp_path / ("long" * 100), "cannot use .*: File name too long"),
        (Path("/proc/no/such"), "cannot use /proc/no/such: No such file"),
        (tmp_path, "cannot write .*run.json: Is a directory"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            train(tokenizer, out)
        assert "\n" not in str(error.value)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"cannot read .*run\.json"):
        train(tokenizer, tmp_path / "other", resume=True)


def test_the_state_of_the_removal_is_in_every_checkpoint_and_in_the_result(whole):
    out, _ = whole
    for directory in (out / "checkpoint-10", out / "final"):
        state = state_in(directory)
        assert state["step"] == len(state["ce"]) == (10 if directory.name == "checkpoint-10" else 14)
        events = [tuple(event) for event in state["progress"]["happened"]]
        assert events == [tuple(e) for e in MINUTE.events(2) if e.step <= state["step"]]
    assert state_in(out / "final")["rollbacks"] == []
    assert torch.tensor(state_in(out / "final")["ce"]).isfinite().all()
