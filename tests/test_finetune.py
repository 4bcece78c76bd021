"""Removal as a run: the schedule as data, resuming, stopping, the command's answers to bad input."""

import json
import math
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, TrainerCallback, TrainerControl

from lnfree_interp.data import Blocks, StreamedBlocks
from lnfree_interp.finetune import Diverged, LossGuard, last_checkpoint, remove_layernorm
from lnfree_interp.finetune.__main__ import main
from lnfree_interp.finetune.removable import final_norm, removal_sites
from lnfree_interp.finetune.training import CHECKPOINTING
from lnfree_interp.layernorm import is_ln_free
from lnfree_interp.schedule import KINDS, PRESETS, RemovalSchedule

# -- the schedule -----------------------------------------------------------------------------------------

#         layers, steps, tokens, lr, min lr, warm-up, aux, gaps of ln_2, qk, v, starts of ln_2, qk, v, ln_f
PUBLISHED = {
    "small": (12, 300, 524_288, 6e-4, 3e-4, 25, 0.1, (2, 2, 3), (20, 44, 68, 104)),
    "medium": (24, 500, 518_144, 6e-4, 3e-4, 10, 0.1, (2, 2, 3), (20, 68, 116, 188)),
    "large": (36, 600, 516_096, 3e-4, 4e-5, 15, 0.03, (4, 4, 6), (30, 174, 318, 534)),
    "xl": (48, 800, 516_096, 1e-4, 2e-5, 20, 0.01, (4, 4, 6), (50, 242, 434, 722)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_are_the_published_ones(name):
    n_layer, steps, tokens, lr, min_lr, warmup, aux, gaps, starts = PUBLISHED[name]
    schedule = RemovalSchedule.preset(name)
    assert (schedule.steps, schedule.tokens_per_step, schedule.warmup_steps) == (steps, tokens, warmup)
    assert (schedule.learning_rate, schedule.min_learning_rate) == (lr, min_lr)
    assert (schedule.auxiliary_weight, schedule.momentum) == (aux, 0.9)
    assert (schedule.weight_decay, schedule.max_grad_norm, schedule.block_size) == (0.01, 1.0, 1024)
    events = schedule.events(n_layer)
    assert len(events) == 3 * n_layer + 3
    for kind, start, gap in zip(KINDS, starts, (*gaps, None), strict=True):
        at = [(e.layer, e.step) for e in events if e.site == kind]
        layers = [None] if kind == "ln_f" else range(n_layer)
        assert at == [(layer, start + (gap * layer if gap else 0)) for layer in layers]
    assert [e[:2] for e in events[-2:]] == [(starts[3] + 2, "eot"), (starts[3] + 12, "position0")]


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(sorted(PRESETS)),
    n_layer=st.integers(1, 12),
    factor=st.floats(0.1, 4),
    order=st.sampled_from([KINDS, ("ln_f", "ln_2", "qk", "v"), ("v", "qk", "ln_2", "ln_f")]),
    by=st.sampled_from(["kind", "layer"]),
    layers=st.sampled_from(["forward", "backward"]),
)
def test_every_site_goes_once_in_every_order(name, n_layer, factor, order, by, layers):
    schedule = replace(RemovalSchedule.preset(name), order=order, by=by, layers=layers)
    schedule = schedule.scaled(max(40, round(schedule.steps * factor)))
    events = schedule.events(n_layer)
    assert [e.step for e in events] == sorted(e.step for e in events)
    assert events[0].step >= 1 and events[-1].step < schedule.steps
    sites = [e[1:] for e in events]
    assert len(set(sites)) == len(sites) == 3 * n_layer + 3
    assert sites[-2:] == [("eot", None), ("position0", None)]
    first, last = (0, n_layer - 1) if layers == "forward" else (n_layer - 1, 0)
    assert [layer for kind, layer in sites if kind == "v"][:: max(1, n_layer - 1)] == [first, last][:n_layer]
    if by == "kind":
        assert [k for k, layer in sites if layer in (0, None)][:4] == list(order)
    state = schedule.state(0, n_layer)
    assert not state.frozen and state.eot and state.position0 and state.auxiliary
    for step in sorted({e.step for e in events}):
        before, state = schedule.state(step - 1, n_layer), schedule.state(step, n_layer)
        assert before.frozen <= state.frozen and before != state
        assert state.auxiliary == state.position0, "the auxiliary loss ends with the last treatment"
    assert len(state.frozen) == 3 * n_layer + 1 and not state.eot and not state.position0
    table = schedule.table(n_layer)
    assert list(table.columns) == ["step", "site", "layer"] and len(table) == len(events)


def test_vanilla_removes_nothing():
    schedule = RemovalSchedule.preset("small").vanilla()
    assert schedule.events(12) == []
    state = schedule.state(299, 12)
    assert not (state.frozen or state.position0 or state.eot or state.auxiliary)
    assert "vanilla" in schedule.describe(12)


def test_schedules_that_are_none_are_refused():
    small = RemovalSchedule.preset("small")
    with pytest.raises(ValueError, match="unknown preset 'huge'"):
        RemovalSchedule.preset("huge")
    with pytest.raises(ValueError, match="not before the end of its 300 steps"):
        small.events(48)
    for changes, message in (
        ({"start": 0}, "start is 0"),
        ({"order": ("qk", "v")}, "order"),
        ({"by": "head"}, "by is 'head'"),
        ({"layers": "up"}, "layers is 'up'"),
        ({"tokens_per_step": 1000}, "no multiple"),
        ({"gaps": {"ln_2": 1}}, "gaps"),
        ({"min_learning_rate": 1.0}, "learning rate"),
        ({"by": "layer", "order": ("qk", "ln_f", "v", "ln_2")}, "first or last"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(small, **changes)
    assert RemovalSchedule(**json.loads(json.dumps(asdict(small)))) == small


def test_summary_and_description_name_what_is_frozen():
    small = RemovalSchedule.preset("small")
    assert small.state(50, 12).summary(12) == "ln_2 12/12  qk 4/12  v 0/12  ln_f -  eot on  position0 on"
    assert small.state(299, 12).summary(12) == "ln_2 12/12  qk 12/12  v 12/12  ln_f frozen"
    assert "step 20 to 42" in small.describe(12) and "until step 116" in small.describe(12)


# -- runs -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes and an end-of-text token: 257 in all."""
    vocabulary = {"<|endoftext|>": 0} | {c: i + 1 for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|endoftext|>", bos_token="<|endoftext|>")


def minute_gpt2(n_positions=16, dtype=torch.float32, **config) -> GPT2LMHeadModel:
    fields = {"vocab_size": 257, "n_embd": 8, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_positions=n_positions, **fields | config)).to(dtype)


def minute_blocks(n=64, pos=16) -> Blocks:
    return Blocks(torch.randint(0, 257, (n, pos), generator=torch.Generator().manual_seed(0)))


# 2 layers gone by step 11 of 14, four sequences of 16 tokens a step
MINUTE = RemovalSchedule(
    steps=14,
    start=2,
    gaps={"ln_2": 1, "qk": 1, "v": 1, "ln_f": 1},
    position0_gap=2,
    tokens_per_step=64,
    block_size=16,
    learning_rate=1e-2,
    min_learning_rate=1e-3,
    warmup_steps=2,
    auxiliary_weight=0.1,
)


class Recorder(TrainerCallback):
    """What was logged, the running averages after each step, and the first batch."""

    def __init__(self):
        self.logs, self.averages, self.targets, self.batch = [], [], [], None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        def keep(module, args, kwargs):
            self.batch = kwargs["input_ids"] if self.batch is None else self.batch

        model.register_forward_pre_hook(keep, with_kwargs=True)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "ce" in logs:
            self.logs.append(logs)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.averages.append({name: site.average[:2].clone() for name, site in removal_sites(model).items()})
        if self.averages[-1]:
            self.targets.append(final_norm(model).target.item())


def train(tokenizer, out, schedule=MINUTE, *, callbacks=(), model=None, **arguments):
    model = minute_gpt2() if model is None else model
    defaults = {"device": "cpu", "save_steps": 5, "disable_tqdm": True}
    final = remove_layernorm(
        model, tokenizer, minute_blocks(), schedule, out, callbacks=callbacks, **defaults | arguments
    )
    return model, final


def weights_equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def finished(tokenizer, tmp_path_factory):
    out, recorder = tmp_path_factory.mktemp("run") / "out", Recorder()
    model, final = train(tokenizer, out, callbacks=[recorder])
    return SimpleNamespace(out=out, model=model, final=final, recorder=recorder)


def test_a_run_ends_with_an_ln_free_checkpoint_of_the_model_trained(finished):
    reloaded = GPT2LMHeadModel.from_pretrained(finished.out / "final")
    assert is_ln_free(reloaded.config, reloaded.state_dict()) and weights_equal(reloaded, finished.final)
    assert reloaded.config.activation_function == "gelu_new" and reloaded.config.use_cache
    assert reloaded.config.resid_pdrop == 0.1, "the config is the original's but for epsilon"
    tokens = minute_blocks().blocks[:8]
    with torch.no_grad():
        ours, theirs = (m.double().eval()(tokens).logits for m in (finished.model, reloaded))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    assert sorted(p.name for p in finished.out.iterdir()) == ["checkpoint-10", "checkpoint-14", "final", "run.json"]


def test_losses_are_logged_apart_until_removal_is_done(finished):
    logs, done = finished.recorder.logs, MINUTE.events(2)[-1].step
    assert len(logs) == MINUTE.steps
    for step, log in enumerate(logs):
        expected = log["ce"] + (0.1 * log["aux"] if step < done else 0.0)
        assert ("aux" in log) == (step < done)
        assert log["loss"] == pytest.approx(expected, rel=1e-5)


def test_the_logged_losses_are_the_model_s(finished):
    """The first step's, computed from the model it began with and the batch it saw."""
    model, seen = minute_gpt2().eval(), []
    model.transformer.ln_f.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    tokens = finished.recorder.batch
    with torch.no_grad():
        loss = model(tokens, labels=tokens).loss
    std = (seen[0].var(-1, correction=0) + 1e-5).sqrt()
    ordinary = tokens != 0
    ordinary[:, 0] = False
    assert finished.recorder.targets[0] == pytest.approx(std[ordinary].mean().item(), rel=1e-5)
    assert finished.recorder.logs[0]["ce"] == pytest.approx(loss.item(), rel=1e-5)
    assert finished.recorder.logs[0]["aux"] == 0, "the first step has no target"
    assert all(log["aux"] > 0 for log in finished.recorder.logs[1:] if "aux" in log)


# Adam divides by gradients that are near zero at first, which makes much of float32's rounding.
TOLERANCE = 5e-3


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [{"batch_size": 1}, {"batch_size": 2}, {CHECKPOINTING: True}], ids=str)
def test_accumulation_and_checkpointing_change_no_number(finished, tokenizer, tmp_path, arguments):
    """Losses and running averages of every step, whatever a step is divided into."""
    recorder = Recorder()
    train(tokenizer, tmp_path / "out", callbacks=[recorder], **arguments)
    for ours, theirs in zip(recorder.logs, finished.recorder.logs, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() & {"loss", "ce", "aux", "grad_norm"}:
            assert ours[name] == pytest.approx(theirs[name], rel=TOLERANCE)
    for ours, theirs in zip(recorder.averages, finished.recorder.averages, strict=True):
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=TOLERANCE, atol=0)


class Interrupt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(finished, tokenizer, tmp_path):
    out, recorder = tmp_path / "out", Recorder()
    with pytest.raises(KeyboardInterrupt):
        train(tokenizer, out, callbacks=[Interrupt(7)])
    assert last_checkpoint(out).name == "checkpoint-5"
    # a checkpoint that was being written when the power went
    (out / "checkpoint-6").mkdir()
    (out / "checkpoint-6" / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="seed was 0, now 1"):
        train(tokenizer, out, resume=True, seed=1)
    with pytest.raises(ValueError, match="already holds a run"):
        train(tokenizer, out)
    _, final = train(tokenizer, out, resume=True, callbacks=[recorder])
    assert weights_equal(final, finished.final)
    for ours, theirs in zip(recorder.averages, finished.recorder.averages[5:], strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    with pytest.raises(ValueError, match="is finished"):
        train(tokenizer, out, resume=True)
    # all steps done, but the export was not reached
    (out / "final").rename(tmp_path / "elsewhere")
    _, final = train(tokenizer, out, resume=True)
    assert weights_equal(final, finished.final)


def test_vanilla_is_the_same_training_of_a_plain_model(finished, tokenizer, tmp_path):
    recorder = Recorder()
    model, final = train(tokenizer, tmp_path / "out", MINUTE.vanilla(), callbacks=[recorder])
    assert not removal_sites(model) and weights_equal(model, final)
    assert weights_equal(GPT2LMHeadModel.from_pretrained(tmp_path / "out" / "final"), final)
    assert final.config.layer_norm_epsilon == 1e-5 and final.config.activation_function == "gelu_new"
    # same data in the same order: until the first removal only the auxiliary loss differs
    assert recorder.logs[0]["ce"] == finished.recorder.logs[0]["ce"]
    assert all("aux" not in log for log in recorder.logs)


def test_bfloat16_autocast_keeps_weights_in_float32(tokenizer, tmp_path):
    model, final = train(tokenizer, tmp_path / "out", dtype="bfloat16")
    assert all(p.dtype == torch.float32 for p in (*model.parameters(), *final.parameters()))
    with torch.no_grad():
        loss = final(minute_blocks().blocks, labels=minute_blocks().blocks).loss
    assert loss.isfinite()


# -- stopping ---------------------------------------------------------------------------------------------


class Sabotage(TrainerCallback):
    """Multiplies a weight after a step."""

    def __init__(self, step, factor):
        self.step, self.factor = step, factor

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            model.transformer.wpe.weight.data *= self.factor


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tokenizer, tmp_path):
    with pytest.raises(Diverged, match=r"is nan at step 13: stopped; the last good checkpoint is .*checkpoint-10"):
        train(tokenizer, tmp_path / "out", callbacks=[Sabotage(12, math.nan)])
    assert sorted(p.name for p in (tmp_path / "out").glob("*")) == ["checkpoint-10", "checkpoint-5", "run.json"]
    # in the middle of the removal it shows in the running averages first
    with pytest.raises(Diverged, match="there is no checkpoint yet"):
        train(tokenizer, tmp_path / "early", callbacks=[Sabotage(1, math.nan)])


def test_an_exploded_model_is_neither_saved_nor_exported(tokenizer, tmp_path):
    with pytest.raises(Diverged, match=r"the last good checkpoint is .*checkpoint-10"):
        train(tokenizer, tmp_path / "out", callbacks=[Sabotage(12, 1e6)])
    assert not (tmp_path / "out" / "final").exists() and not (tmp_path / "out" / "checkpoint-14").exists()


def test_the_guard_lets_spikes_pass_and_stops_explosions(tmp_path):
    guard, args = LossGuard(margin=3.0, patience=5), SimpleNamespace(output_dir=str(tmp_path))

    def log(step, ce):
        control = TrainerControl(should_save=True)
        state = SimpleNamespace(global_step=step, max_steps=100)
        guard.on_log(args, state, control, logs={"loss": ce, "ce": ce, "grad_norm": 1.0})
        return control.should_save

    guard.on_train_begin(args, SimpleNamespace(log_history=[{"ce": 3.5}, {"eval_loss": 1.0}]), None)
    assert guard.best == 3.5, "a resumed run knows its best"
    assert log(1, 3.0) and log(2, 5.5), "a spike"
    assert not any([log(3, 7.0), log(4, 7.0), log(7, 7.0)]), "suspect: no checkpoint"
    assert log(8, 4.0), "it came back"
    assert not log(9, 6.5)
    with pytest.raises(Diverged, match=r"loss is 6\.40 at step 14, was 3\.00"):
        log(14, 6.4)
    with pytest.raises(Diverged, match="grad_norm is inf"):
        guard.on_log(args, SimpleNamespace(global_step=1, max_steps=9), None, {"ce": 1.0, "grad_norm": math.inf})


# -- the library's and the command's answers to bad input ---------------------------------------------------


def test_what_does_not_fit_together_is_named(tokenizer, tmp_path):
    out = tmp_path / "out"
    for changes, message in (
        ({"schedule": replace(MINUTE, block_size=32)}, "blocks of 32, model has 16"),
        ({"schedule": replace(MINUTE, tokens_per_step=16 * 100)}, "too short: 64 blocks of 16 tokens"),
        ({"schedule": replace(MINUTE, steps=8)}, "not before the end of its 8 steps"),
        ({"batch_size": 3}, "batch size 3 does not divide the 4 sequences"),
        ({"dtype": "float8"}, "unknown dtype 'float8'"),
        ({"device": "abacus"}, "unknown device 'abacus'"),
        ({"resume": True}, "nothing to resume"),
    ):
        with pytest.raises(ValueError, match=message):
            train(tokenizer, out, **changes)
    assert not out.exists()


@pytest.fixture(scope="module")
def files(tokenizer, tmp_path_factory):
    """A checkpoint, damaged ones, and texts."""
    root = tmp_path_factory.mktemp("files")
    for name in ("model", "no-tokenizer", "other-size", "no-weights", "no-gpt2"):
        minute_gpt2(256, n_layer=1).save_pretrained(root / name)
        if name != "no-tokenizer":
            tokenizer.save_pretrained(root / name)
    minute_gpt2(256, n_layer=1, vocab_size=300).save_pretrained(root / "other-size")
    (root / "no-weights" / "model.safetensors").unlink()
    (root / "no-gpt2" / "config.json").write_text('{"model_type": "llama"}')
    (root / "empty.txt").write_text("\n\n")
    (root / "short.txt").write_text("too short")
    (root / "text.txt").write_text("\n\n".join(f"Chapter {i}. " + "all work and no play " * 20 for i in range(40)))
    (root / "run" / "checkpoint-5").mkdir(parents=True)
    (root / "run" / "checkpoint-5" / "trainer_state.json").write_text('{"global_step": 5}')
    return root


BAD = {
    "unknown model": (["--model", "gpt9"], "gpt9"),
    "no such directory": (["--model", "{root}/absent"], "absent"),
    "no GPT-2": (["--model", "{root}/no-gpt2"], "has weights that a LlamaForCausalLM of its config has not"),
    "no weights": (["--model", "{root}/no-weights"], "model.safetensors"),
    "no tokenizer": (["--model", "{root}/no-tokenizer"], "has no tokenizer"),
    "tokenizer of another size": (["--model", "{root}/other-size"], "257 tokens"),
    "unknown preset": (["--preset", "huge"], "huge"),
    "blocks too long": (["--preset", "small"], "1024"),
    "missing text": (["--text", "{root}/absent.txt"], "absent.txt"),
    "empty text": (["--text", "{root}/empty.txt"], "empty.txt"),
    "short text": (["--text", "{root}/short.txt"], "10 tokens"),
    "unknown dtype": (["--dtype", "float7"], "float7"),
    "unknown device": (["--device", "abacus"], "abacus"),
    "batch size": (["--batch-size", "7"], "7"),
    "no steps": (["--steps", "0"], "0"),
    "too few steps": (["--steps", "1"], "1 steps"),
    "learning rate": (["--lr", "-1"], "-1"),
    "nothing to resume": (["--resume"], "nothing to resume"),
    "already a run": (["--out", "{root}/run"], "already holds a run"),
    "out is a file": (["--out", "{root}/text.txt"], "not a directory"),
    "no such dataset": (["--data", "{root}/absent"], "absent"),
    "unknown flag": (["--presets", "tiny"], "--presets"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_status_2(files, tmp_path, capsys, case):
    changes = [word.format(root=files) for word in BAD[case][0]]
    words = {
        "--model": str(files / "model"),
        "--preset": "tiny",
        "--text": str(files / "text.txt"),
        "--out": str(tmp_path / "out"),
        "--device": "cpu",
    }
    if changes[0] == "--data":
        del words["--text"]
    words |= {changes[0]: changes[1] if len(changes) > 1 else None}
    before = sorted(files.rglob("*"))
    try:
        status = main([word for pair in words.items() for word in pair if word is not None])
    except SystemExit as exit:  # argparse's own
        status = exit.code
    captured = capsys.readouterr()
    assert status == 2
    assert BAD[case][1] in captured.err and captured.err.count("\n") == 1, captured.err
    assert "Traceback" not in captured.err
    assert not (tmp_path / "out").exists() and sorted(files.rglob("*")) == before


@pytest.mark.slow
def test_the_command_trains_resumes_and_reports(files, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["--model", str(files / "model"), "--preset", "tiny", "--text", str(files / "text.txt")]
    words += ["--out", str(out), "--steps", "12", "--device", "cpu", "--save-steps", "5"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "step 10/12" in printed and "ln_2 1/1" in printed and "left" in printed and "aux" in printed
    assert "auxiliary loss x 0.1" in printed, "the schedule comes first"
    final = GPT2LMHeadModel.from_pretrained(out / "final")
    assert is_ln_free(final.config, final.state_dict())
    assert main([*words, "--resume"]) == 2 and "is finished" in capsys.readouterr().err
    assert main([*words[:1], str(out / "final"), *words[2:7], str(tmp_path / "again"), *words[8:]]) == 2
    assert "LN-free already" in capsys.readouterr().err


@pytest.mark.parametrize("column", ["text", "input_ids"])
def test_a_dataset_is_streamed_in_blocks(tokenizer, tmp_path, column):
    texts = [f"line {i} of a dataset" for i in range(7)]
    ids = [[*tokenizer(text)["input_ids"], 0] for text in texts]
    rows = [{"text": text} if column == "text" else {"input_ids": row} for text, row in zip(texts, ids, strict=True)]
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    blocks = list(StreamedBlocks(str(tmp_path), tokenizer, 16, buffer=1))
    stream = [i for row in ids for i in row]
    assert torch.cat([b["input_ids"] for b in blocks]).tolist() == stream[: len(stream) // 16 * 16]
    if column == "input_ids":
        (tmp_path / "train.jsonl").write_text(json.dumps({"input_ids": [999] * 20}))
        with pytest.raises(ValueError, match="another tokenizer"):
            next(iter(StreamedBlocks(str(tmp_path), tokenizer, 16)))
