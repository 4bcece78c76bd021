"""python -m lnfree_interp.finetune: runs, their cards and uploads, signals."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from command_lines import MINUTE, SECRET, make_files, status_of, words
from transformers import AutoTokenizer, GPT2LMHeadModel

from lnfree_interp import load_model
from lnfree_interp.finetune import Diverged, command, flags
from lnfree_interp.finetune.card import Facts, base_of, data_of, model_card
from lnfree_interp.finetune.guard import held_out_loss
from lnfree_interp.finetune.progress import Guard
from lnfree_interp.finetune.saving import fault
from lnfree_interp.layernorm import is_ln_free
from lnfree_interp.schedule import RemovalSchedule


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Below a directory whose name is nobody's business."""
    return make_files(tmp_path_factory.mktemp(SECRET))


@pytest.fixture(scope="module")
def runs(files, tmp_path_factory):
    """A control and a removal by the command, in one place, and what the removal printed."""
    place = tmp_path_factory.mktemp(f"{SECRET}-runs")
    assert status_of(words(files, place, out=place / "control", vanilla="")) == 0
    assert status_of(words(files, place, control=place / "control", save_steps=5)) == 0
    return place


def metadata_of(card):
    _, head, body = card.split("---\n", 2)
    return head, body


def losses_of(card):
    return {label: float(loss) for label, loss in re.findall(r"\| ([^|]+) \| (\d+\.\d{4}) \|", card)}


def test_a_run_ends_with_a_card_that_is_true(files, runs):
    final = runs / "out" / "final"
    card = (final / "README.md").read_text()
    head, body = metadata_of(card)
    assert "library_name: transformers" in head and "- ln-free" in head and "base_model" not in head
    state = json.loads((final / "removal.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(final)
    dataset = command.read_corpus(files / "text.txt", tokenizer, 32, cache=runs / "cache")
    held_out, _ = dataset.set_aside(16)
    assert dataset.fingerprint in body and "text.txt" in body and "minute.json" in body
    assert "12 steps of 64 tokens, 768 in all" in body and "2409.13710" in body and "2507.02559" in body
    assert json.loads(re.search(r"```json\n(.*)\n```", body)[1]) == flags.as_fields(RemovalSchedule(**MINUTE))
    expected = [
        held_out_loss(GPT2LMHeadModel.from_pretrained(path), held_out, batch_size=16)
        for path in (files / "model", final, runs / "control" / "final")
    ]
    assert [*losses_of(body).values()] == pytest.approx(expected, abs=6e-5) and state["baseline"] is not None
    assert f"{expected[1] - expected[2]:+.4f} nats" in body
    assert is_ln_free(*(lambda m: (m.config, m.state_dict()))(GPT2LMHeadModel.from_pretrained(final)))
    assert fault(final) is None, "the card does no harm to what is whole"
    control = (runs / "control" / "final" / "README.md").read_text()
    assert (
        "nothing removed" in control
        and "- ln-free" not in control
        and [*losses_of(control)] == ["before the fine-tuning", "this model"]
    )


def test_what_a_card_says_of_loading_is_so(runs, tmp_path):
    """Its code, run as it stands, but for the model's place."""
    card = (runs / "out" / "final" / "README.md").read_text()
    for code in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        names = {}
        exec(code.replace("path/to/this/directory", str(runs / "out" / "final")), names)
        assert names["model"] is not None
    assert load_model(str(runs / "out" / "final")).cfg.normalization_type is None


def test_no_name_of_this_machine_goes_out(runs):
    for path in (runs / "out" / "final").iterdir():
        if path.name not in ("manifest.json", "removal.json"):
            assert SECRET.encode() not in path.read_bytes() and str(Path.home()).encode() not in path.read_bytes(), path


def test_a_finished_run_is_pushed_whole_or_not_at_all(files, runs, capsys, monkeypatch):
    import huggingface_hub

    pushed = []
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "of nobody")
    monkeypatch.setattr(huggingface_hub, "create_repo", lambda repo_id, **options: pushed.append(repo_id))

    def upload(*, repo_id, folder_path, ignore_patterns, **options):
        whole = fault(Path(folder_path)) is None and (Path(folder_path) / "README.md").exists()
        pushed.append((repo_id, Path(folder_path), whole, "removal.json" in ignore_patterns))

    monkeypatch.setattr(huggingface_hub, "upload_folder", upload)
    again = words(files, runs, control=runs / "control", save_steps=5, resume="")
    assert status_of(again) == 0 and not pushed
    assert "is finished: nothing to resume" in capsys.readouterr().out
    assert status_of([*again, "--push-to-hub", "somebody/minute-noLN"]) == 0
    assert pushed == ["somebody/minute-noLN", ("somebody/minute-noLN", runs / "out" / "final", True, True)]
    assert "pushed to https://huggingface.co/somebody/minute-noLN" in capsys.readouterr().out
    assert 'from_pretrained("somebody/minute-noLN")' in (runs / "out" / "final" / "README.md").read_text()

    def refuse(**options):
        raise ConnectionError("no such host\nand more")

    monkeypatch.setattr(huggingface_hub, "upload_folder", refuse)
    assert status_of([*again, "--push-to-hub", "somebody/minute-noLN"]) == 2
    said = capsys.readouterr().err
    assert "cannot push to somebody/minute-noLN: no such host; " in said and said.count("\n") == 1
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert status_of(words(files, runs, out=runs / "other", push_to_hub="somebody/minute-noLN")) == 2
    assert "nobody is logged in" in capsys.readouterr().err and not (runs / "other").exists()


FACTS = Facts(
    base="openai-community/gpt2",
    base_on_hub=True,
    schedule=RemovalSchedule.preset("small"),
    n_layer=12,
    source="preset small",
    data="Skylion007/openwebtext",
    dataset="Skylion007/openwebtext",
    fingerprint=None,
    held_out=0,
    before=None,
    after=None,
    control=None,
    steps=300,
    rollbacks=1,
    seed=0,
    dtype="bfloat16",
)


def test_a_card_for_the_hub(tmp_path):
    card = model_card(FACTS, "somebody/gpt2-noLN")
    head, body = metadata_of(card)
    assert "base_model: openai-community/gpt2\n" in head and "datasets:\n- Skylion007/openwebtext\n" in head
    assert "# gpt2-noLN\n" in body and "157,286,400 in all" in body and "nats per token" not in body
    from huggingface_hub import ModelCard

    data = ModelCard(card).data
    assert data.base_model == "openai-community/gpt2" and data.library_name == "transformers"
    alone = model_card(replace(FACTS, schedule=FACTS.schedule.vanilla(), held_out=16, before=3.1, after=3.0))
    assert "# gpt2, control\n" in alone and [*losses_of(alone).values()] == [3.1, 3.0]


def test_what_things_are_called_elsewhere(files, tmp_path):
    assert base_of("gpt2") == ("openai-community/gpt2", True)
    assert base_of("some/model") == ("some/model", True)
    assert base_of("tiny") == ("tiny", False)
    assert base_of(str(files / "model")) == ("model", False)
    assert data_of(None, "some/data") == ("some/data", "some/data")
    assert data_of(None, str(files / "run")) == ("run", None)
    assert data_of([str(files / "text.txt"), str(files / "run")], None) == ("text.txt, run", None)


@pytest.mark.parametrize("held_out", [0, 3])
def test_a_run_from_a_stream(files, tmp_path, capsys, held_out):
    changes = {"data": files / "text.txt", "text": None, "cache": None, "buffer": 8, "held_out": held_out}
    assert status_of(words(files, tmp_path, save_steps=5, **changes)) == 0
    card = (tmp_path / "out" / "final" / "README.md").read_text()
    assert (f"Loss on {held_out} held-out blocks" in card) == bool(held_out)
    assert "step 10/12" in capsys.readouterr().out


def test_an_adaptive_run(files, runs, tmp_path):
    """More steps than the control has are refused; its like is run, and ends early or on time."""
    changes = {"pace": "adaptive", "control": runs / "control", "settle": 1, "margin": 5, "cache": runs / "cache"}
    assert status_of(words(files, tmp_path, **changes)) == 0
    card = (tmp_path / "out" / "final" / "README.md").read_text()
    assert 8 <= int(re.search(r"(\d+) steps of 64 tokens, ", card)[1]) <= 12
    assert "beside the control" in card


def test_divergence_is_status_1_and_its_report_is_printed(files, tmp_path, capsys, monkeypatch):
    def diverge(*arguments, **options):
        raise Diverged("loss is nan at step 3: stopped\n  removed: nothing")

    monkeypatch.setattr(command, "remove_layernorm", diverge)
    assert status_of(words(files, tmp_path)) == 1
    assert "loss is nan at step 3: stopped\n  removed: nothing\n" in capsys.readouterr().err
    assert status_of(words(files, tmp_path, guard_multiple="1.01", guard_rollbacks="0")) == 1


def test_the_guard_s_flags_reach_it(files, tmp_path, monkeypatch):
    seen = {}

    def look(*arguments, **options):
        seen.update(options)
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "remove_layernorm", look)
    flagged = {"guard_multiple": 2, "guard_patience": 3, "guard_wait": 4, "guard_rollbacks": 5}
    assert status_of(words(files, tmp_path, **flagged)) == 130
    assert seen["guard"] == Guard(2, 3, 4, 5) and len(seen["held_out"]) == 16


def test_sigterm_is_status_130_before_training(files, tmp_path, capsys, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(command, "load_trainable", lambda name: os.kill(os.getpid(), signal.SIGTERM))
    assert status_of(words(files, tmp_path)) == 130
    assert "interrupted; --resume goes on" in capsys.readouterr().err
    assert status_of(words(files, tmp_path, dry_run="")) == 130
    assert capsys.readouterr().err.endswith("interrupted\n") and signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow
def test_sigterm_is_status_130_in_training(files, tmp_path):
    """Of a process of its own; the run goes on with --resume."""
    command_line = [sys.executable, "-m", "lnfree_interp.finetune", *words(files, tmp_path, steps=4000)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command_line, **pipes) as running:
        assert any(line.startswith("step ") for line in iter(running.stdout.readline, ""))
        running.send_signal(signal.SIGTERM)
        _, said = running.communicate(timeout=300)
    assert running.returncode == 130, said
    assert said.endswith("interrupted; --resume goes on from the last checkpoint\n") and said.count("\n") == 1
    assert list((tmp_path / "out").glob("checkpoint-*")) and not (tmp_path / "out" / "final").exists()
