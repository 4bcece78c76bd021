"""Removal as a run: what it ends with, what it logs, resuming; the command's answers to bad input."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from minute import MINUTE, At, Recorder, byte_tokenizer, interrupt, minute_blocks, minute_gpt2, train, weights_equal
from transformers import GPT2LMHeadModel

from lnfree_interp.data import StreamedBlocks
from lnfree_interp.finetune import last_checkpoint
from lnfree_interp.finetune.__main__ import main
from lnfree_interp.finetune.removable import removal_sites
from lnfree_interp.finetune.training import CHECKPOINTING
from lnfree_interp.layernorm import is_ln_free


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


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
    """The first two steps', computed from the model it began with (the first learns at rate 0) and the batches."""
    model, seen = minute_gpt2().eval(), []
    model.transformer.ln_f.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    batches = finished.recorder.batches[:2]
    with torch.no_grad():
        losses = [model(tokens, labels=tokens).loss for tokens in batches]
    stds = [(x.var(-1, correction=0) + 1e-5).sqrt() for x in seen]
    ordinary = batches[0] != 0
    ordinary[:, 0] = False
    logs = finished.recorder.logs
    for log, loss in zip(logs, losses, strict=False):
        assert log["ce"] == pytest.approx(loss.item(), rel=1e-5)
    assert logs[0]["aux"] == 0.0, "no step before"
    assert logs[1]["aux"] == pytest.approx((stds[1] - stds[0][ordinary].mean()).square().mean().item(), rel=1e-3)


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
        for name in ("loss", "ce", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=TOLERANCE)
        assert ours.get("aux", 0.0) == pytest.approx(theirs.get("aux", 0.0), rel=0.05, abs=1e-5)
    for ours, theirs in zip(recorder.averages, finished.recorder.averages, strict=True):
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=TOLERANCE, atol=0, equal_nan=True)


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(finished, tokenizer, tmp_path):
    out, recorder = tmp_path / "out", Recorder()
    with pytest.raises(KeyboardInterrupt):
        train(tokenizer, out, callbacks=[At(7, interrupt)])
    assert last_checkpoint(out).name == "checkpoint-5"
    with pytest.raises(ValueError, match="already holds a run"):
        train(tokenizer, out)
    _, final = train(tokenizer, out, resume=True, callbacks=[recorder])
    assert weights_equal(final, finished.final)
    for ours, theirs in zip(recorder.averages, finished.recorder.averages[5:], strict=True):
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0, equal_nan=True)
    assert recorder.logs == finished.recorder.logs[5:]
    # all steps done, but the export was not reached
    (out / "final").rename(tmp_path / "elsewhere")
    _, final = train(tokenizer, out, resume=True)
    assert weights_equal(final, finished.final)


def test_resuming_is_safe_always(finished, tokenizer, tmp_path):
    """Nothing there: it starts. Finished: the model comes back, and nothing is touched."""
    out = tmp_path / "absent" / "out"
    _, final = train(tokenizer, out, resume=True)
    assert weights_equal(final, finished.final)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    model, again = train(tokenizer, out, resume=True)
    assert weights_equal(again, final) and weights_equal(model, minute_gpt2())
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


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
        ({"max_steps": 3}, "max_steps: the schedule or a parameter of its own says this"),
        ({"schedule": replace(MINUTE, steps=40).adaptive()}, "adaptive schedule needs control="),
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
    (root / "no-gpt2" / "config.json").write_text('{"model_type": "bert"}')
    (root / "empty.txt").write_text("\n\n")
    (root / "short.txt").write_text("too short")
    (root / "text.txt").write_text("\n\n".join(f"Chapter {i}. " + "all work and no play " * 20 for i in range(40)))
    (root / "run" / "checkpoint-5").mkdir(parents=True)
    (root / "run" / "checkpoint-5" / "trainer_state.json").write_text('{"global_step": 5}')
    return root


BAD = {
    "unknown model": (["--model", "gpt9"], "gpt9"),
    "no such directory": (["--model", "{root}/absent"], "absent"),
    "an architecture not served": (["--model", "{root}/no-gpt2"], "bert"),
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
    assert main([*words, "--resume"]) == 0 and "is finished: nothing to resume" in capsys.readouterr().out
    assert main([*words[:1], str(out / "final"), *words[2:7], str(tmp_path / "again"), *words[8:]]) == 2
    assert "LN-free already" in capsys.readouterr().err


@pytest.mark.parametrize("column", ["text", "input_ids"])
def test_a_dataset_is_streamed_in_blocks(tokenizer, tmp_path, column):
    texts = [f"line {i} of a dataset" for i in range(7)]
    ids = [[*tokenizer(text)["input_ids"], 0] for text in texts]
    rows = [{"text": text} if column == "text" else {"input_ids": row} for text, row in zip(texts, ids, strict=True)]
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    blocks = list(StreamedBlocks(str(tmp_path), tokenizer, 16))
    stream = [i for row in ids for i in row]
    assert torch.cat([b["input_ids"] for b in blocks]).tolist() == stream[: len(stream) // 16 * 16]
    if column == "input_ids":
        (tmp_path / "train.jsonl").write_text(json.dumps({"input_ids": [999] * 20}))
        with pytest.raises(ValueError, match="another tokenizer"):
            next(iter(StreamedBlocks(str(tmp_path), tokenizer, 16)))
