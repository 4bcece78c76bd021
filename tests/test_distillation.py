"""Distillation from the untouched model: the divergence and its gradient; runs that learn from it."""

from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from minute import MINUTE, At, Recorder, byte_tokenizer, interrupt, minute_blocks, minute_gpt2, train, weights_equal
from removable_models import KINDS, exact, make_plain, make_tokens

from lnfree_interp.finetune import distillation, dry_run
from lnfree_interp.finetune.distillation import distilled_losses, make_teacher
from lnfree_interp.finetune.saving import read_json

HALF = replace(MINUTE, distillation=0.5)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def losses_and_gradients(model, losses):
    """The losses, and the gradient of the mixed one per token with respect to every weight."""
    model.zero_grad()
    (losses[0] / losses[3]).backward()
    return [x.item() for x in losses], {name: p.grad.clone() for name, p in model.named_parameters()}


def by_definition(model, teacher, tokens, labels, weight):
    """From the probabilities, token by token."""
    with exact():
        ours, theirs = model(tokens).logits.softmax(-1), teacher(tokens).logits.softmax(-1).detach()
    ce = kl = torch.zeros(())
    count = 0
    for row in range(len(tokens)):
        for pos in range(tokens.shape[1] - 1):
            if labels[row, pos + 1] != -100:
                p, q = theirs[row, pos], ours[row, pos]
                ce, kl, count = ce - q[labels[row, pos + 1]].log(), kl + (p * (p / q).log()).sum(), count + 1
    return (1 - weight) * ce + weight * kl, ce, kl, torch.tensor(count)


@pytest.mark.parametrize("kind", ["GPT-2", "GPT-NeoX", "Llama"])
@pytest.mark.parametrize(("weight", "rows"), [(0.0, 1), (0.3, 5), (1, 36), (0.5, 1000)])
def test_losses_and_gradient_are_those_of_the_definition(monkeypatch, kind, weight, rows):
    """However many positions a piece has, labels of any places left out."""
    monkeypatch.setattr(distillation, "PIECE", rows * 23 * 8)
    model, teacher = make_plain(kind), make_teacher(make_plain(kind, seed=3))
    tokens = make_tokens()
    labels = tokens.clone()
    labels[:, 0] = labels[1, 3:6] = labels[2, -1] = labels[3] = -100
    with exact():
        losses = distilled_losses(model(tokens).logits, labels, tokens, teacher, weight)
    found, gradients = losses_and_gradients(model, losses)
    wanted, theirs = losses_and_gradients(model, by_definition(model, teacher, tokens, labels, weight))
    assert found == pytest.approx(wanted, rel=1e-9) and wanted[2] > 0.1
    torch.testing.assert_close(gradients, theirs, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_learns_nothing_from_itself(kind):
    model, tokens = make_plain(kind), make_tokens()
    with exact():
        losses = distilled_losses(model(tokens).logits, tokens, tokens, make_teacher(model), 1.0)
    (_, ce, kl, count), gradients = losses_and_gradients(model, losses)
    assert abs(kl) < 1e-10 and ce > 1 and count == 4 * 8
    assert max(gradient.abs().max() for gradient in gradients.values()) < 1e-12


def test_with_no_weight_it_is_transformers_loss():
    model, tokens = minute_gpt2(dtype=torch.float64).eval(), minute_blocks().blocks[:8]
    losses = distilled_losses(model(tokens).logits, tokens, tokens, make_teacher(model), 0)
    _, gradients = losses_and_gradients(model, losses)
    model.zero_grad()
    with patch.object(torch.Tensor, "float", torch.Tensor.double):  # transformers' loss too in fp64
        loss = model(tokens, labels=tokens).loss
    loss.backward()
    assert (losses.mixed / losses.n).item() == pytest.approx(loss.item(), rel=1e-12)
    for name, p in model.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, atol=1e-12, rtol=1e-9)


def test_half_precision_and_autocast():
    """bfloat16 logits have a bfloat16 gradient; autocast is the teacher's too."""
    model, tokens = minute_gpt2().eval(), minute_blocks().blocks[:4]
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens).logits
    assert logits.dtype == torch.bfloat16
    logits = logits.detach().requires_grad_()
    losses = distilled_losses(logits, tokens, tokens, make_teacher(model), 1.0, dtype="bfloat16")
    losses.mixed.backward()
    assert losses.kl.dtype == torch.float32 and abs(losses.kl) < 1e-5
    assert logits.grad.dtype == torch.bfloat16 and logits.grad.abs().max() < 1e-5
    other = distilled_losses(logits, tokens, tokens, make_teacher(model), 1.0)
    assert other.kl > 10 * losses.kl.abs(), "the same without autocast is not the same"


# -- runs


def in_fp64(tokenizer, out, schedule=HALF, **arguments):
    recorder = Recorder()
    _, final = train(
        tokenizer, out, schedule, callbacks=[recorder], model=minute_gpt2(dtype=torch.float64), **arguments
    )
    return SimpleNamespace(out=out, final=final, logs=recorder.logs, batches=recorder.batches)


@pytest.fixture(scope="module")
def distilled(tokenizer, tmp_path_factory):
    return in_fp64(tokenizer, tmp_path_factory.mktemp("distilled") / "out")


def test_losses_are_logged_apart(distilled):
    """And the first steps' are those of the model it began with: the first learns at rate 0."""
    for log in distilled.logs:
        expected = 0.5 * log["ce"] + 0.5 * log["kl"] + 0.1 * log.get("aux", 0.0)
        assert log["loss"] == pytest.approx(expected, rel=1e-6)
    first, later = distilled.logs[0], distilled.logs[3:]
    assert abs(first["kl"]) < 1e-9 and min(log["kl"] for log in later) > 1e-4
    model = minute_gpt2(dtype=torch.float64).eval()
    for log, tokens in zip(distilled.logs[:2], distilled.batches, strict=False):
        ce = F.cross_entropy(model(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        assert log["ce"] == pytest.approx(ce.item(), rel=1e-6)


def test_micro_batches_change_nothing(distilled, tokenizer, tmp_path):
    other = in_fp64(tokenizer, tmp_path / "out", batch_size=1)
    for ours, theirs in zip(other.logs, distilled.logs, strict=True):
        for name in ("ce", "kl", "aux", "grad_norm"):
            assert ours.get(name, 0.0) == pytest.approx(theirs.get(name, 0.0), rel=1e-8, abs=1e-12), name
    torch.testing.assert_close(dict(other.final.state_dict()), dict(distilled.final.state_dict()), atol=1e-6, rtol=1e-6)


def test_hardly_any_is_as_none(tokenizer, tmp_path):
    with patch.object(torch.Tensor, "float", torch.Tensor.double):
        runs = [in_fp64(tokenizer, tmp_path / f"{w}", replace(MINUTE, distillation=w)) for w in (0.0, 1e-14)]
    none, hardly = (run.logs for run in runs)
    assert all("kl" not in log for log in none) and all("kl" in log for log in hardly)
    for ours, theirs in zip(hardly, none, strict=True):
        assert [ours[name] for name in ("ce", "grad_norm")] == pytest.approx(
            [theirs[name] for name in ("ce", "grad_norm")], rel=1e-7
        )


def test_a_resumed_run_learns_from_the_untouched_model_too(distilled, tokenizer, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        train(tokenizer, out, HALF, callbacks=[At(7, interrupt)], model=minute_gpt2(dtype=torch.float64))
    with pytest.raises(ValueError, match=r"distillation was 0\.5, now 0\.25"):
        in_fp64(tokenizer, out, replace(HALF, distillation=0.25), resume=True)
    resumed = in_fp64(tokenizer, out, resume=True)
    assert resumed.logs == distilled.logs[5:]
    assert weights_equal(resumed.final, distilled.final)


def test_the_control_is_not_distilled(tokenizer, tmp_path):
    assert HALF.vanilla().distillation == 0 and HALF.adaptive().distillation == 0.5
    assert "distillation x 0.5" in HALF.describe(2) and "distillation" not in HALF.vanilla().describe(2)
    train(tokenizer, tmp_path / "control", HALF.vanilla())
    schedule = replace(HALF, steps=14, settle=2).adaptive(margin=9.0)
    train(tokenizer, tmp_path / "out", schedule, control=tmp_path / "control")
    assert read_json(tmp_path / "out" / "run.json")["settings"]["distillation"] == 0.5
    for wrong in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="not from 0 to 1"):
            replace(MINUTE, distillation=wrong)


def test_its_memory_is_estimated():
    """The teacher's weights besides; and the logits' gradient is what is kept in place of their log-probabilities."""
    model, blocks = minute_gpt2(64).train(), torch.randint(0, 257, (3, 64))
    teacher = dry_run.Teacher(make_teacher(model), 0.5)
    usual = dry_run.estimate_memory(model, blocks, 3, dtype="float32", checkpointing=False)
    memory = dry_run.estimate_memory(model, blocks, 3, dtype="float32", checkpointing=False, teacher=teacher)
    logits = 3 * 64 * 257 * 4
    assert (
        memory.teacher == memory.weights == usual.weights and "teacher" in str(memory) and "teacher" not in str(usual)
    )
    assert usual.activations - memory.activations == pytest.approx(logits, rel=0.1)
    for how in (None, teacher):
        seconds, _ = dry_run.measure_seconds(model, blocks, 2, dtype="bfloat16", checkpointing=False, teacher=how)
        assert seconds > 0
