"""A removal at its own pace: each site goes when the loss is back within a margin of the control's."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from minute import MINUTE, At, Recorder, byte_tokenizer, interrupt, minute_blocks, train, weights_equal

from lnfree_interp.finetune.progress import Progress, advance, observe
from lnfree_interp.finetune.saving import state_in
from lnfree_interp.layernorm import is_ln_free
from lnfree_interp.schedule import RemovalSchedule

# the same, with room to wait
LONG = replace(MINUTE, steps=60)
ADAPTIVE = LONG.adaptive(margin=0.03, smoothing=0.5, settle=4)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def runs(tokenizer, tmp_path_factory):
    """A control, and a removal beside it."""
    root, recorder = tmp_path_factory.mktemp("adaptive"), Recorder()
    train(tokenizer, root / "control", LONG.vanilla(), logging_steps=7)
    _, final = train(tokenizer, root / "out", ADAPTIVE, control=root / "control", callbacks=[recorder])
    return SimpleNamespace(root=root, control=root / "control", out=root / "out", final=final, recorder=recorder)


def replayed(schedule: RemovalSchedule, losses, control) -> Progress:
    """What becomes of a schedule with these losses, step by step."""
    progress = Progress()
    for step, (loss, usual) in enumerate(zip(losses, control, strict=False), 1):
        progress = advance(schedule, observe(schedule, progress, loss - usual), step, 2)
    return progress


def test_sites_go_when_the_losses_say_so(runs):
    state, control = state_in(runs.out / "final"), state_in(runs.control / "final")
    assert len(control["ce"]) == 60, "one loss a step, though each seventh was logged"
    expected = replayed(ADAPTIVE, state["ce"], control["ce"])
    assert state["progress"] == expected.to_json() | {"happened": state["progress"]["happened"]}
    assert [tuple(event) for event in state["progress"]["happened"]] == list(expected.happened)
    last = expected.happened[-1].step
    assert len(state["ce"]) == last + ADAPTIVE.settle < ADAPTIVE.steps, "and then it ends"
    assert is_ln_free(runs.final.config, runs.final.state_dict())
    waits = [b.step - a.step for a, b in zip(expected.happened, expected.happened[1:], strict=False)]
    assert max(waits) > 2 and min(waits) == 1, "some wait, some do not"
    rates = [log["learning_rate"] for log in runs.recorder.logs]
    assert rates[last + 1] < rates[last] and len(rates) == last + 4
    # until the first event the runs differ by the auxiliary loss alone
    assert state["ce"][0] == control["ce"][0]


def test_a_resumed_one_equals_an_uninterrupted_one(runs, tokenizer, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        train(tokenizer, out, ADAPTIVE, control=runs.control, callbacks=[At(13, interrupt)])
    _, final = train(tokenizer, out, ADAPTIVE, control=runs.control, resume=True, batch_size=4)
    assert weights_equal(final, runs.final)
    assert state_in(out / "final")["progress"] == state_in(runs.out / "final")["progress"]
    # all steps done, but the export was not reached
    (out / "final").rename(tmp_path / "elsewhere")
    _, final = train(tokenizer, out, ADAPTIVE, control=runs.control, resume=True)
    assert weights_equal(final, runs.final)


def test_a_margin_that_all_is_within_needs_no_longer_than_the_gaps(runs, tokenizer, tmp_path):
    schedule = replace(ADAPTIVE, margin=9.0)
    train(tokenizer, tmp_path / "out", schedule, control=runs.control)
    events = [tuple(event) for event in state_in(tmp_path / "out" / "final")["progress"]["happened"]]
    assert events == [tuple(event) for event in MINUTE.events(2)]


def test_looked_at_as_often_as_it_is_logged(runs, tokenizer, tmp_path):
    schedule = replace(ADAPTIVE, margin=9.0)
    train(tokenizer, tmp_path / "out", schedule, control=runs.control, logging_steps=3, save_steps=100)
    steps = [event[0] for event in state_in(tmp_path / "out" / "final")["progress"]["happened"]]
    assert steps[0] == 3 and all(step % 3 == 0 for step in steps)


def test_a_control_is_of_the_same_run(runs, tokenizer, tmp_path):
    for changes, message in (
        ({"control": tmp_path}, "is no directory of a run: there is no run.json in it"),
        ({"control": tmp_path / "absent"}, "is no directory of a run"),
        ({"control": runs.out}, "removes LayerNorms: a vanilla run is needed"),
        ({"seed": 3}, "is of another run: seed was 0, now 3$"),
        ({"data": minute_blocks(seed=1)}, "is of another run: data was"),
        (
            {"schedule": replace(ADAPTIVE, steps=61, learning_rate=0.02)},
            r"another run: steps was 60, now 61; learning_rate was 0\.01, now 0\.02$",
        ),
        ({"control": None}, "adaptive schedule needs control="),
    ):
        given = {"schedule": ADAPTIVE, "control": runs.control} | changes
        with pytest.raises(ValueError, match=message):
            train(tokenizer, tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()
    short = tmp_path / "short"
    with pytest.raises(KeyboardInterrupt):
        train(tokenizer, short, LONG.vanilla(), callbacks=[At(8, interrupt)])
    with pytest.raises(ValueError, match="has the losses of 5 steps, 60 are needed"):
        train(tokenizer, tmp_path / "out", ADAPTIVE, control=short)
