"""python -m lnfree_interp.finetune --dry-run: what a run would take, and nothing written."""

import errno
import re
from pathlib import Path

import pytest
import torch
from command_lines import MINUTE, SECRET, make_files, status_of, words
from minute import minute_gpt2
from transformers import GPT2LMHeadModel

from lnfree_interp.finetune import dry_run
from lnfree_interp.finetune.removable import make_removable
from lnfree_interp.schedule import RemovalSchedule


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp(SECRET))


def dry(files, place, capsys, **changes):
    """What a dry run prints, by label."""
    assert status_of(words(files, place, dry_run="", **changes)) == 0, capsys.readouterr().err
    first, *lines, last = capsys.readouterr().out.splitlines()
    assert last == "dry run: nothing was written"
    found, label = {"": first}, ""
    for line in lines:
        label = line[:11].strip() or label
        found[label] = f"{found[label]}\n{line[12:]}" if label in found else line[12:]
    return found


def test_a_dry_run_says_what_it_takes(files, tmp_path, capsys):
    said = dry(files, tmp_path, capsys)
    assert not list(tmp_path.iterdir())
    assert said[""] == f"{files / 'model'}, minute.json"
    assert said["schedule"].split("\n") == RemovalSchedule(**MINUTE).describe(1).split("\n")
    assert said["tokens"].startswith("768 in all, 64 per step: 1 micro-batches of 2 sequences of 32")
    model = GPT2LMHeadModel.from_pretrained(files / "model")
    n = sum(p.numel() for p in model.parameters())
    assert said["parameters"] == f"{n:,}"
    text = (files / "text.txt").read_text()
    blocks = (len(text) - 2 * 39 + 40) // 32  # an end-of-text token in place of two line ends
    assert (
        f"text.txt: 1 file of {len(text) / 2**20:.1f} MiB, {blocks:,} blocks of 32 tokens; 16 held out" in said["data"]
    )
    assert said["data"].endswith(f", of the others {12 * 2 / (blocks - 16):.0%} are read")
    assert re.fullmatch(r"\S+ s, \S+ s per step.*", said["time"].replace("\n", " "))
    assert said["device"] == "cpu, float32" and "257 tokens" in said["tokenizer"]
    assert "not there yet" in said["output"] and "free" in said["disk"] and "free" in said["memory"]
    assert f"{12 * n / 2**20:.1f} MiB (weights and moments)" in said["disk"]


def test_a_dry_run_of_other_kinds(files, tmp_path, capsys, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "note.txt").write_text("mine")
    said = dry(files, tmp_path, capsys, no_timing="", steps=1200)
    assert re.search(r", the others are read 4\.\d times", said["data"])
    said = dry(files, tmp_path, capsys, no_timing="", vanilla="", gradient_checkpointing="", dtype="bfloat16")
    assert said["time"] == "not measured" and "vanilla control" in said["schedule"]
    assert said["device"] == "cpu, bfloat16" and "holds 1 other files" in said["output"]
    said = dry(files, tmp_path, capsys, no_timing="", data=files / "text.txt", text=None, cache=None, held_out=0)
    assert said["data"] == "text.txt, streamed; 0 held out"
    monkeypatch.setattr(dry_run, "CHEAP", 10)
    said = dry(files, tmp_path, capsys, no_timing="")
    exact, about = (int(re.search(pattern, said["data"])[1]) for pattern in (r"of (0)\.", r"about (\d+)"))
    assert exact == 0 and about == pytest.approx((files / "text.txt").stat().st_size / 32, rel=0.05)
    monkeypatch.setattr(dry_run, "free_memory", lambda device: 1000)
    said = dry(files, tmp_path, capsys)
    assert "IT DOES NOT FIT" in said["memory"] and said["time"] == "not measured"


def test_a_dry_run_of_a_run_that_is_there(files, tmp_path, capsys):
    said = dry(files, tmp_path, capsys, no_timing="", out=files / "run", resume="")
    assert "holds a run of 5 steps, with 1 checkpoints" in said["output"]


def test_a_place_to_write_is_tried(files, tmp_path, capsys, monkeypatch):
    """And nothing is left there; what cannot hold files is refused in the words of a run."""
    (tmp_path / "file").touch()

    def refusal(place: Path) -> str:
        assert status_of(words(files, tmp_path, dry_run="", no_timing="", out=place)) == 2
        return capsys.readouterr().err

    for place, why in (tmp_path / "file" / "a" / "b", "Not a directory"), (Path("/proc/no/such"), "No such file"):
        assert f"cannot use {place}: {why}" in refusal(place)

    def full(dir):
        assert dir == tmp_path
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(dry_run.tempfile, "TemporaryFile", full)
    assert f"cannot use {tmp_path / 'a' / 'b'}: Read-only file system\n" in refusal(tmp_path / "a" / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("removable", [False, True])
def test_what_autograd_keeps_is_counted(removable):
    """By hand, of the layers alone, from their shapes; and the count is a line in the number of sequences."""
    model = minute_gpt2(64, n_layer=3, n_embd=16).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if removable:
        make_removable(model, eot=0)
    blocks = torch.randint(0, 257, (5, 64))
    kept = [dry_run._kept(model, blocks[:n], "float32") for n in (1, 2, 5)]
    assert kept[2] - kept[0] == pytest.approx(4 * (kept[1] - kept[0]), rel=0.02)
    stream = 64 * 16 * 4  # bytes of one sequence's residual stream
    # per layer: 2 norms' inputs and outputs, q k v, heads' output, MLP's 4 and its activation's; then the logits
    least = 3 * (4 + 3 + 1 + 4 + 4) * stream + 64 * 257 * 4
    assert least <= kept[0] <= 2.5 * least
    memory = dry_run.estimate_memory(model, blocks, 5, dtype="float32", checkpointing=False)
    n = sum(p.numel() for p in model.parameters())
    assert (memory.weights, memory.gradients, memory.moments) == (4 * n, 4 * n, 8 * n)
    assert memory.activations == pytest.approx(kept[2] + 2 * 5 * 64 * 257 * 4, rel=0.02)
    less = dry_run.estimate_memory(model, blocks, 5, dtype="float32", checkpointing=True)
    assert less.activations < memory.activations
