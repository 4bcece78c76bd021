"""A loss that does not come back: back to the last good checkpoint, longer waits, and an end after three."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from minute import MINUTE, Aside, At, Recorder, byte_tokenizer, interrupt, minute_blocks, minute_gpt2, train
from minute import weights_equal as equal
from transformers import TrainerControl

from lnfree_interp.finetune import Diverged, Guard, LossGuard
from lnfree_interp.finetune.callbacks import Record
from lnfree_interp.finetune.guard import Suspicion, held_out_loss
from lnfree_interp.finetune.saving import checkpoint_to_resume, checkpoints, state_in
from lnfree_interp.layernorm import is_ln_free

GUARD = Guard(patience=1, wait=4)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def times(factor):
    def sabotage(model):
        model.transformer.wpe.weight.data *= factor

    return sabotage


def after(step, factor, **kwargs):
    return At(step, times(factor), after=True, **kwargs)


def test_the_guard_lets_spikes_pass_and_suspects_what_stays():
    record = Record(MINUTE, 2, baseline=3.0, losses=[3.0])
    watch = LossGuard(Guard(multiple=2.0, patience=5), record)

    def log(step, ce, last=100, more={}):  # noqa: B006
        control = TrainerControl(should_save=True)
        state = SimpleNamespace(global_step=step, max_steps=last)
        watch.on_log(None, state, control, logs={"loss": ce, "ce": ce, "grad_norm": 1.0} | more)
        return control.should_save

    assert log(1, 3.0) and log(2, 5.9), "below the multiple"
    assert not any([log(3, 7.0), log(4, 7.0), log(7, 7.0)]), "suspect: no checkpoint"
    assert log(8, 4.0), "it came back"
    assert not log(9, 6.5)
    with pytest.raises(Suspicion, match=r"loss is 6\.40 at step 14, the untouched model's was 3\.00"):
        log(14, 6.4)
    watch.on_train_begin(None, None, None)
    assert not log(15, 6.5), "begins to count anew"
    with pytest.raises(Suspicion, match=r"loss is 6\.50 at step 16"):
        log(16, 6.5, last=16)
    for name in ("loss", "ce", "grad_norm"):
        for value in (math.nan, math.inf):
            with pytest.raises(Suspicion, match=f"{name} is {value} at step 1"):
                log(1, 3.0, more={name: value})
    for fields in ({"multiple": 1.0}, {"patience": -1}, {"wait": 0}, {"rollbacks": -1}):
        with pytest.raises(ValueError, match=next(iter(fields))):
            Guard(**fields)


def test_without_held_out_blocks_the_first_step_is_the_baseline():
    record = Record(MINUTE, 2)
    record.losses = [5.0, 4.0]
    state = SimpleNamespace(global_step=2, max_steps=9)
    LossGuard(Guard(), record).on_log(None, state, TrainerControl(), logs={"ce": 4.5})
    assert record.baseline == 5.0


@pytest.fixture(scope="module")
def rolled_back(tokenizer, tmp_path_factory):
    """A run that went to pieces once, in the middle of the removal."""
    out, recorder = tmp_path_factory.mktemp("guard") / "out", Recorder()
    _, final = train(tokenizer, out, guard=GUARD, callbacks=[after(8, math.nan, times=1), recorder])
    return SimpleNamespace(out=out, final=final, recorder=recorder)


def test_a_loss_that_is_not_finite_takes_the_run_back_and_it_ends_well(rolled_back):
    steps = [log["step"] for log in rolled_back.recorder.logs]
    assert steps == [*range(1, 9), *range(6, 19)], "from checkpoint-5 on again, and four steps longer"
    events = state_in(rolled_back.out / "final")["progress"]["happened"]
    planned = [list(event) for event in MINUTE.events(2)]
    assert events[:4] == planned[:4], "up to step 5 as it was"
    assert events[4:] == [[step + 4, site, layer] for step, site, layer in planned[4:]]
    record = state_in(rolled_back.out / "final")["rollbacks"]
    assert [(r["step"], r["to"], r["hold"], r["why"]) for r in record] == [(9, 5, 10, "loss is nan at step 9")]
    assert is_ln_free(rolled_back.final.config, rolled_back.final.state_dict())
    rates = [log["learning_rate"] for log in rolled_back.recorder.logs[-5:]]
    assert rates[1:] == [MINUTE.min_learning_rate] * 4 and rates[0] > rates[1]
    losses = state_in(rolled_back.out / "final")["ce"]
    assert len(losses) == 18 and all(map(math.isfinite, losses))


def test_a_run_that_is_resumed_after_it_went_back_ends_the_same(rolled_back, tokenizer, tmp_path):
    """Whoever resumes knows of the rollback, though no checkpoint does yet."""
    out, stop = tmp_path / "out", At(6, interrupt)
    stop.left = 0
    tear = At(8, lambda model: (times(math.nan)(model), setattr(stop, "left", 1)), after=True, times=1)
    with pytest.raises(KeyboardInterrupt):
        train(tokenizer, out, guard=GUARD, callbacks=[tear, stop])
    assert [p.name for p in checkpoints(out)] == ["checkpoint-5", "checkpoint-1"]
    _, final = train(tokenizer, out, guard=GUARD, resume=True)
    assert equal(final, rolled_back.final)


def test_what_a_rollback_went_behind_is_not_resumed(tokenizer, tmp_path):
    """Here a checkpoint that was saved after the harm: by its held-out loss it is not good."""
    out, stop = tmp_path / "out", At(7, interrupt)
    stop.left = 0
    tear = At(8, lambda model: (times(math.nan)(model), setattr(stop, "left", 1)), after=True, times=1)
    with pytest.raises(KeyboardInterrupt):
        train(tokenizer, out, guard=GUARD, save_steps=1, held_out=minute_blocks(2).blocks, callbacks=[tear, stop])
    assert [(p.name, state_in(p)["good"]) for p in checkpoints(out)] == [
        ("checkpoint-8", False),
        ("checkpoint-7", True),
    ]
    assert json.loads((out / "rollbacks.json").read_text())[-1]["to"] == 7
    assert checkpoint_to_resume(out, True).name == "checkpoint-7"


def test_an_exploded_model_is_neither_saved_nor_exported(tokenizer, tmp_path, capsys):
    out, explode = tmp_path / "out", At(12, lambda model: model.transformer.wte.weight.data.mul_(1e4), after=True)
    with pytest.raises(Diverged) as error:
        train(tokenizer, out, guard=GUARD, callbacks=[explode])
    first, *report = str(error.value).split("\n")
    assert first.startswith("loss is ") and "the untouched model's was 5.54: stopped after 3 rollbacks" in first
    assert first.endswith(f"; the last good checkpoint is {out / 'checkpoint-10'}")
    assert len(report) == 5 and report[3].startswith("  removed: ln_2 0-1 at steps 2-3, qk 0-1 at steps 4-5")
    said = capsys.readouterr().err.splitlines()
    lines = [line for line in said if "rollback" in line]
    assert len(lines) == 3 and all(f"rollback {i} of 3" in line for i, line in enumerate(lines, 1))
    assert not (out / "final").exists()
    assert all(step <= 12 for step in (state_in(p)["step"] for p in checkpoints(out)))
    with pytest.raises(Diverged, match="stopped after 3 rollbacks"):
        train(tokenizer, out, guard=GUARD, callbacks=[explode], resume=True)


def test_waits_double_and_a_checkpoint_that_did_not_help_is_gone_behind(tokenizer, tmp_path, capsys):
    with pytest.raises(Diverged):
        train(tokenizer, tmp_path / "out", guard=GUARD, callbacks=[after(7, math.nan)])
    records = json.loads((tmp_path / "out" / "rollbacks.json").read_text())
    assert [record["to"] for record in records] == [5, 1, 5]
    # the event after step 5 came at 6, the one after step 1 at 2; after step 5 of the second try one was due at 10
    assert [record["hold"] for record in records] == [6 + 4, 2 + 8, 10 + 16]
    assert capsys.readouterr().err.count("the next removal waits until step") == 3


def test_with_nothing_to_go_back_to_the_run_stops(tokenizer, tmp_path):
    with pytest.raises(Diverged, match="there is no checkpoint yet"):
        train(tokenizer, tmp_path / "out", callbacks=[At(0, times(math.nan))])
    with pytest.raises(Diverged, match="stopped; the last good checkpoint is"):
        train(tokenizer, tmp_path / "none", guard=replace(GUARD, rollbacks=0), callbacks=[after(12, math.nan)])


# -- held-out blocks --------------------------------------------------------------------------------------


def by_hand(model, blocks):
    with torch.no_grad():
        return model.eval()(blocks, labels=blocks).loss.item()


def test_good_is_measured_on_blocks_that_are_not_trained_on(tokenizer, tmp_path):
    data, recorder = Aside(minute_blocks().blocks), Recorder()
    held_out = data.blocks[-3:]  # one in twenty
    _, final = train(tokenizer, tmp_path / "out", data=data, callbacks=[recorder])
    state = state_in(tmp_path / "out" / "checkpoint-14")
    assert state["baseline"] == pytest.approx(by_hand(minute_gpt2(), held_out), rel=1e-5)
    assert state["held_out"] == pytest.approx(by_hand(final, held_out), rel=1e-5)
    assert state["good"] and not Guard(multiple=1 + 1e-9).is_good(state["baseline"] + 0.1, state["baseline"])
    rows = {tuple(row) for batch in recorder.batches for row in batch.tolist()}
    assert rows <= {tuple(row) for row in data.blocks[:-3].tolist()}
    assert not rows & {tuple(row) for row in held_out.tolist()}
    with pytest.raises(ValueError, match="set_aside was 3, now 0"):
        train(tokenizer, tmp_path / "out", data=data, resume=True, held_out=held_out)


def test_measuring_changes_nothing_else(rolled_back, tokenizer, tmp_path):
    """With blocks held out, however often it is saved, the same weights come out."""
    held_out = minute_blocks(3, seed=5).blocks
    finals = [train(tokenizer, tmp_path / str(n), held_out=held_out if n else 0, save_steps=3 + n)[1] for n in range(2)]
    assert equal(*finals)


def test_the_held_out_loss_does_not_depend_on_how_it_is_cut():
    model, blocks = minute_gpt2().train(), minute_blocks(7).blocks
    losses = [held_out_loss(model, blocks, batch_size=size) for size in (1, 3, 7, 50)]
    assert losses == pytest.approx([by_hand(minute_gpt2(), blocks)] * 4, rel=1e-6) and model.training
