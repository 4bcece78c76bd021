"""python -m lnfree_interp.finetune: flags, schedules from files, answers to bad input."""

import re
from dataclasses import fields, replace

import pytest
from command_lines import MINUTE, SECRET, make_files, status_of, words
from hypothesis import given, settings
from hypothesis import strategies as st

from lnfree_interp.finetune import command, flags
from lnfree_interp.finetune.__main__ import parser
from lnfree_interp.finetune.progress import Guard
from lnfree_interp.schedule import KINDS, PRESETS, RemovalSchedule


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp(SECRET))


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
def test_bad_input_is_one_line_and_status_2(files, tmp_path, capsys, monkeypatch, case, dry):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)  # the schedule's own checks, not the tests'
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
