"""python -m lnfree_interp.finetune: flags, schedules from files, dry runs, cards, uploads, answers to bad input."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from minute import byte_tokenizer, minute_gpt2
from transformers import AutoTokenizer, GPT2LMHeadModel

from lnfree_interp import load_model
from lnfree_interp.finetune import Diverged, command, dry_run, flags
from lnfree_interp.finetune.__main__ import main, parser
from lnfree_interp.finetune.card import Facts, base_of, data_of, model_card
from lnfree_interp.finetune.guard import held_out_loss
from lnfree_interp.finetune.progress import Guard
from lnfree_interp.finetune.removable import make_removable
from lnfree_interp.finetune.saving import fault
from lnfree_interp.layernorm import is_ln_free
from lnfree_interp.schedule import KINDS, PRESETS, RemovalSchedule

# 1 layer gone by step 7 of 12, in steps of 2 sequences of 32 bytes
MINUTE = {"steps": 12, "start": 2, "gaps": {kind: 1 for kind in KINDS}, "position0_gap": 1, "tokens_per_step": 64}
MINUTE |= {"block_size": 32, "learning_rate": 1e-3, "min_learning_rate": 1e-4, "warmup_steps": 2}
MINUTE |= {"auxiliary_weight": 0.1}
SECRET = "secret-place"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A checkpoint, damaged ones, texts, schedules; all below a directory whose name is nobody's business."""
    root = tmp_path_factory.mktemp(SECRET)
    tokenizer = byte_tokenizer()
    for name in ("model", "no-tokenizer", "other-size", "no-weights", "other-kind"):
        minute_gpt2(256, n_layer=1).save_pretrained(root / name)
        if name != "no-tokenizer":
            tokenizer.save_pretrained(root / name)
    minute_gpt2(256, n_layer=1, vocab_size=300).save_pretrained(root / "other-size")
    (root / "no-weights" / "model.safetensors").unlink()
    (root / "other-kind" / "config.json").write_text('{"model_type": "bert"}')
    (root / "empty.txt").write_text("\n\n")
    (root / "short.txt").write_text("too short")
    (root / "text.txt").write_text("\n\n".join(f"Chapter {i}. " + "all work and no play " * 20 for i in range(40)))
    for name, value in {
        "minute.json": MINUTE,
        "some.json": {"gaps": {"v": 5}, "momentum": 0.5},
        "list.json": [1],
        "unknown.json": {"stepps": 3},
        "mistyped.json": {"start": "three"},
        "range.json": {"momentum": 2.5},
        "lacking.json": {"steps": 10},
    }.items():
        (root / name).write_text(json.dumps(value))
    (root / "no.json").write_text("{")
    (root / "run" / "checkpoint-5").mkdir(parents=True)
    (root / "run" / "checkpoint-5" / "trainer_state.json").write_text('{"global_step": 5}')
    return root


def words(files, place, **changes):
    """A command line of the minute run; a flag of None is left out, one of "" has no value."""
    given = {"model": files / "model", "schedule": files / "minute.json", "text": files / "text.txt"}
    given |= {"out": place / "out", "device": "cpu", "cache": place / "cache"} | changes
    flagged = {"--" + name.replace("_", "-"): value for name, value in given.items() if value is not None}
    return [word for flag, value in flagged.items() for word in [flag, *str(value).split("|")] if word]


def status_of(arguments):
    try:
        return main([str(word) for word in arguments])
    except SystemExit as exit:  # argparse's own
        return exit.code


# -- flags ------------------------------------------------------------------------------------------------


def parsed(*arguments):
    return parser().parse_args(["--model", "tiny", "--text", "x", "--out", "y", *map(str, arguments)])


def test_every_field_has_a_flag_and_a_line_of_help():
    assert set(flags.HELP) == {field.name for field in fields(RemovalSchedule)}
    options = parser()._option_string_actions
    for field in fields(RemovalSchedule):
        flag = "--" + field.name.replace("_", "-")
        of_it = [f"--gap-{kind.replace('_', '-')}" for kind in KINDS] if field.name == "gaps" else [flag]
        assert all(options[name].help for name in of_it)
    assert set(flags.GUARD_HELP) == {field.name for field in fields(Guard)}
    assert flags.guard_from(parsed()) == Guard()


VALUES = {
    "int": st.integers(1, 50),
    "int | None": st.none() | st.integers(1, 50),
    "float": st.floats(0, 0.9),
    "float | int": st.floats(0, 0.9),
    "float | int | None": st.none() | st.floats(0, 9),
    "Sequence[str]": st.permutations(KINDS).map(tuple),
    "Mapping[str, float | int]": st.fixed_dictionaries({kind: st.floats(0, 9) for kind in KINDS}),
}


def value_of(field):
    known = {"by": ("kind", "layer"), "layers": ("forward", "backward"), "pace": ("fixed", "adaptive")}
    return st.sampled_from(known[field.name]) if field.name in known else VALUES[field.type]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(PRESETS)))
def test_flags_set_fields(data, name):
    """Any fields by flags = the same by dataclasses.replace, but for steps, which scale."""
    chosen = data.draw(st.lists(st.sampled_from(fields(RemovalSchedule)), unique_by=lambda field: field.name))
    values = {field.name: data.draw(value_of(field)) for field in chosen if field.name != "steps"}
    arguments = []
    for field, value in values.items():
        if field == "gaps":
            arguments += [word for kind, gap in value.items() for word in (f"--gap-{kind.replace('_', '-')}", gap)]
        else:
            several = value if isinstance(value, tuple) else ["none" if value is None else value]
            arguments += ["--" + field.replace("_", "-"), *several]
    try:
        expected = replace(RemovalSchedule.preset(name), **values)
    except ValueError as error:
        with pytest.raises(ValueError, match=re.escape(str(error))):
            flags.schedule_from(parsed("--preset", name, *arguments))
    else:
        assert flags.schedule_from(parsed("--preset", name, *arguments)) == expected


def test_what_overrides_what(files):
    small = RemovalSchedule.preset("small")

    def made(*arguments):
        return flags.schedule_from(parsed(*arguments))

    assert made("--preset", "small") == small
    assert made("--preset", "small", "--steps", 600) == small.scaled(600)
    assert made("--preset", "small", "--steps", 600, "--gap-v", 1).gaps == small.scaled(600).gaps | {"v": 1}
    assert made("--preset", "small", "--lr", 1e-4).min_learning_rate == pytest.approx(5e-5)
    assert made("--preset", "small", "--schedule", "adaptive") == small.adaptive()
    assert made("--preset", "small", "--vanilla") == small.vanilla()
    assert made("--preset", "small", "--vanilla", "--schedule", "adaptive") == small.vanilla()
    some = made("--preset", "small", "--schedule", files / "some.json")
    assert some == replace(small, gaps=small.gaps | {"v": 5}, momentum=0.5)
    assert made("--preset", "small", "--schedule", files / "some.json", "--momentum", 0.6).momentum == 0.6
    assert made("--schedule", files / "minute.json") == RemovalSchedule(**MINUTE)
    assert made("--schedule", files / "minute.json", "--preset", "xl") == replace(
        RemovalSchedule.preset("xl"), **MINUTE
    )


def test_help_is_in_groups(capsys):
    assert status_of(["--help"]) == 0
    printed = capsys.readouterr().out
    titles = ["model and data:", "run:", "machine:", "schedule:", "fields of the schedule", "when a loss does not"]
    places = [printed.index(title) for title in titles]
    assert places == sorted(places) and max(map(len, printed.splitlines())) <= 130


# -- answers to bad input -----------------------------------------------------------------------------------

BAD = {
    "unknown model": ({"model": "gpt9"}, "gpt9"),
    "no such directory": ({"model": "{root}/absent"}, "absent"),
    "no hub": ({"model": "gpt2", "schedule": None, "preset": "small", "dry_run": ""}, "nor reachable on the hub"),
    "LN-free": ({"model": "tiny-noLN"}, "LN-free already"),
    "another kind": ({"model": "{root}/other-kind"}, "other-kind"),
    "no weights": ({"model": "{root}/no-weights"}, "model.safetensors"),
    "no tokenizer": ({"model": "{root}/no-tokenizer"}, "has no tokenizer"),
    "tokenizer of another size": ({"model": "{root}/other-size"}, "257 tokens"),
    "unknown preset": ({"preset": "huge"}, "--preset huge: unknown preset; choose from small"),
    "no schedule": ({"schedule": None}, "--preset NAME (one of small, "),
    "adaptive of nothing": ({"schedule": "adaptive"}, "--preset NAME"),
    "no schedule file": ({"schedule": "{root}/absent.json"}, "absent.json"),
    "schedule no JSON": ({"schedule": "{root}/no.json", "preset": "tiny"}, "is no JSON"),
    "schedule a list": ({"schedule": "{root}/list.json", "preset": "tiny"}, "is no JSON object"),
    "unknown field": ({"schedule": "{root}/unknown.json", "preset": "tiny"}, "no field 'stepps'; there are steps"),
    "mistyped field": ({"schedule": "{root}/mistyped.json", "preset": "tiny"}, "start is 'three', not a whole number"),
    "field out of range": ({"schedule": "{root}/range.json", "preset": "tiny"}, "range.json: momentum is 2.5"),
    "lacking fields": ({"schedule": "{root}/lacking.json"}, "are missing"),
    "number": ({"momentum": "much"}, "argument --momentum: 'much' is not a number"),
    "infinity": ({"margin": "inf"}, "argument --margin: 'inf' is not a number"),
    "whole number": ({"start": "1.5"}, "argument --start: '1.5' is not a whole number"),
    "whole number or none": ({"patience": "no"}, "argument --patience: 'no' is not a whole number of"),
    "number or none": ({"massive": "much"}, "argument --massive: 'much' is not a number, or none"),
    "no multiple": ({"massive": "1"}, "--massive: massive is 1.0, not a number above 1"),
    "choice": ({"by": "head"}, "argument --by: invalid choice: 'head' (choose from"),
    "order": ({"order": "qk|ln_3"}, "argument --order: invalid choice: 'ln_3'"),
    "half an order": ({"order": "qk|v"}, "--order: order ('qk', 'v') does not name each of"),
    "out of range": ({"momentum": "1"}, "--momentum: momentum is 1.0, not at least 0 and below 1"),
    "gap": ({"gap_v": "-1"}, "--gap-v: gaps"),
    "one of two": ({"by": "kind", "warmup_steps": "3", "smoothing": "2"}, "error: --smoothing: smoothing is 2.0"),
    "together": (
        {"tokens_per_step": "100", "block_size": "30"},
        "--tokens-per-step, --block-size: 100 tokens per step",
    ),
    "blocks too long": ({"block_size": "512", "tokens_per_step": "512"}, "blocks of 512"),
    "guard": ({"guard_multiple": "1"}, "--guard-multiple is 1.0, not above 1"),
    "guard's wait": ({"guard_wait": "0"}, "--guard-wait is 0, not at least 1"),
    "adaptive without control": ({"pace": "adaptive"}, "--control DIR is needed"),
    "control is no run": ({"control": "{root}/model"}, "model is no directory of a run"),
    "missing text": ({"text": "{root}/absent.txt"}, "absent.txt"),
    "text is no path": ({"text": "some/dataset"}, "--text some/dataset"),
    "empty text": ({"text": "{root}/empty.txt"}, "empty.txt"),
    "short text": ({"text": "{root}/short.txt"}, "10 tokens"),
    "text of another kind": ({"text": "{root}/model/model.safetensors"}, "model.safetensors"),
    "empty directory": ({"text": "{root}/run"}, "run"),
    "held-out": ({"held_out": "100000"}, "--held-out 100000 of"),
    "no such dataset": ({"data": "{root}/absent", "text": None, "cache": None}, "absent"),
    "buffer of files": ({"buffer": "3"}, "--buffer is for --data"),
    "unknown dtype": ({"dtype": "float7"}, "argument --dtype: invalid choice: 'float7'"),
    "unknown device": ({"device": "abacus"}, "abacus"),
    "batch size": ({"batch_size": "7"}, "batch size 7"),
    "no steps": ({"steps": "0"}, "--steps 0 is not at least 1"),
    "too few steps": ({"steps": "1"}, "1 steps"),
    "learning rate": ({"lr": "-1"}, "--lr: learning rate -1"),
    "already a run": ({"out": "{root}/run"}, "already holds a run"),
    "out is a file": ({"out": "{root}/text.txt"}, "not a directory"),
    "unknown reporter": ({"report_to": "pigeons"}, "--report-to pigeons: choose from none, "),
    "no hub id": ({"push_to_hub": "a/b/c"}, "--push-to-hub 'a/b/c' is no hub id"),
    "timing of a run": ({"no_timing": ""}, "--no-timing is for --dry-run"),
    "unknown flag": ({"presets": "tiny"}, "--presets"),
}
GOOD = {("timing of a run", True)}  # --no-timing is for dry runs


@pytest.mark.parametrize(("case", "dry"), [(c, dry) for c in BAD for dry in (False, True) if (c, dry) not in GOOD])
def test_bad_input_is_one_line_and_status_2(files, tmp_path, capsys, case, dry):
    changes, message = BAD[case]
    changes = {name: value.format(root=files) if value else value for name, value in changes.items()}
    arguments = words(files, tmp_path, **({"dry_run": ""} if dry else {}) | changes)
    before = sorted(files.rglob("*"))
    status = status_of(arguments)
    captured = capsys.readouterr()
    assert status == 2
    assert message in captured.err and captured.err.count("\n") == 1, captured.err
    assert "Traceback" not in captured.err
    assert not (tmp_path / "out").exists() and sorted(files.rglob("*")) == before
    assert not dry or not list(tmp_path.iterdir())


def test_what_is_not_installed_is_one_line(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command.integration_utils, "get_available_reporting_integrations", lambda: ["wandb"])
    assert status_of(words(files, tmp_path, report_to="tensorboard")) == 2
    assert "--report-to tensorboard: its package is not installed; installed: wandb\n" in capsys.readouterr().err


def test_of_several_processes_one_complains(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert status_of(words(files, tmp_path, momentum="much")) == 2
    assert status_of(words(files, tmp_path, preset="huge")) == 2
    assert capsys.readouterr() == ("", "")


# -- dry runs -----------------------------------------------------------------------------------------------


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


def test_a_place_to_write_is_looked_for(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(dry_run.os, "access", lambda path, mode: False)
    assert status_of(words(files, tmp_path, dry_run="", no_timing="", out=tmp_path / "a" / "b")) == 2
    assert f"--out {tmp_path / 'a' / 'b'}: cannot write in {tmp_path}\n" in capsys.readouterr().err


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


# -- runs, cards, uploads -----------------------------------------------------------------------------------


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
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command_line, env=environment, **pipes) as running:
        assert any(line.startswith("step ") for line in iter(running.stdout.readline, ""))
        running.send_signal(signal.SIGTERM)
        _, said = running.communicate(timeout=300)
    assert running.returncode == 130, said
    assert said.endswith("interrupted; --resume goes on from the last checkpoint\n") and said.count("\n") == 1
    assert list((tmp_path / "out").glob("checkpoint-*")) and not (tmp_path / "out" / "final").exists()
