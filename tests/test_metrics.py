"""Metrics against their definitions, where distributions are extreme too."""

import math

import pytest
import torch

from lnfree_interp.metrics import (
    Metric,
    cross_entropy,
    entropy,
    js_divergence,
    kl_divergence,
    logit_diff,
    right_log_prob,
)
from lnfree_interp.pairs import PromptPairs


@pytest.fixture
def logits():
    return torch.randn(3, 5, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3


@pytest.fixture
def pairs():
    clean = torch.arange(15).view(3, 5) % 11
    corrupted = clean.clone()
    corrupted[:, 2] = (clean[:, 2] + 1) % 11
    return PromptPairs(clean, corrupted, torch.tensor([[1, 2], [3, 4], [10, 0]]))


def test_cross_entropy_is_torch_s(logits):
    tokens = torch.arange(15).view(3, 5) % 11
    wanted = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    torch.testing.assert_close(cross_entropy(logits, tokens), wanted.view(3, 4))
    with pytest.raises(ValueError, match=r"logits are of \[3, 5\] tokens, tokens are \[3, 4\]"):
        cross_entropy(logits, tokens[:, 1:])


def test_entropy_and_divergences_are_torch_s(logits):
    p, q = (torch.distributions.Categorical(logits=x) for x in (logits, logits.flip(0)))
    torch.testing.assert_close(entropy(logits), p.entropy())
    torch.testing.assert_close(kl_divergence(logits, logits.flip(0)), torch.distributions.kl_divergence(p, q))
    mean = torch.distributions.Categorical(probs=(p.probs + q.probs) / 2)
    wanted = sum(torch.distributions.kl_divergence(x, mean) for x in (p, q)) / 2
    torch.testing.assert_close(js_divergence(logits, logits.flip(0)), wanted)
    assert js_divergence(logits, logits).abs().max() < 1e-12


def test_certain_distributions():
    one = torch.tensor([[0.0, -math.inf, -math.inf]])
    other = torch.tensor([[-math.inf, 0.0, -math.inf]])
    assert entropy(one).item() == 0
    assert math.isclose(js_divergence(one, other).item(), math.log(2), rel_tol=1e-6)
    assert kl_divergence(one, one).item() == 0 and kl_divergence(one, other).item() == math.inf


def test_what_is_not_a_number_stays_so():
    bad = torch.tensor([[math.nan, 0.0]])
    for value in (entropy(bad), kl_divergence(bad, bad), js_divergence(bad, bad)):
        assert value.isnan().all()


def test_low_precision_logits_are_summed_in_fp32():
    low = torch.linspace(-3, 3, 50000).to(torch.bfloat16)[None]
    assert entropy(low).dtype == torch.float32
    torch.testing.assert_close(entropy(low), entropy(low.double()).float(), atol=1e-4, rtol=1e-5)


def test_logit_diff_reads_the_answers_at_the_last_position(logits, pairs):
    wanted = torch.stack([logits[i, -1, a] - logits[i, -1, b] for i, (a, b) in enumerate(pairs.answers.tolist())])
    torch.testing.assert_close(logit_diff(logits, pairs), wanted)
    assert logit_diff.reads(5) == (4,)


def test_right_log_prob(logits, pairs):
    wanted = torch.stack([logits[i, -1].log_softmax(-1)[a] for i, (a, _) in enumerate(pairs.answers.tolist())])
    torch.testing.assert_close(right_log_prob(pairs)(logits, pairs), wanted)


def test_metric_of_chosen_positions_and_tokens(logits, pairs):
    tokens = torch.tensor([[0, 1, 2], [3, 4, 5], [6, 7, 8]])
    metric = Metric("mine", lambda x: x[:, 0].sum(-1) - x[:, 1, 2], positions=(3, -5), tokens=tokens)
    wanted = [logits[i, 3, t].sum() - logits[i, 0, t[2]] for i, t in enumerate(tokens)]
    torch.testing.assert_close(metric(logits, pairs), torch.stack(wanted))
    with pytest.raises(ValueError, match="reads position"):
        metric.reads(3)


def test_divergences_and_entropy_are_never_negative():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(300, 500, generator=generator) * 5
    other = logits + 1e-7 * torch.randn(300, 500, generator=generator)
    p, q = logits.log_softmax(-1), other.log_softmax(-1)
    assert ((p.exp() * (p - q)).sum(-1) < 0).any()  # rounding does that
    for value in (kl_divergence(logits, other), js_divergence(logits, other), entropy(logits * 1e3)):
        assert value.min() >= 0 and value.isfinite().all()


def test_at_0_the_derivatives_are_the_divergence_s_own():
    """Of KL(p || q) at q = p the gradient is 0 the Hessian diag(p) - p p^T, whatever rounding makes of it."""
    generator = torch.Generator().manual_seed(0)
    for logits in torch.randn(40, 6, generator=generator) * 3:
        other = (logits + 1e-7 * torch.randn(6, generator=generator)).requires_grad_()
        (gradient,) = torch.autograd.grad(kl_divergence(logits, other), other, create_graph=True)
        hessian = torch.stack([torch.autograd.grad(g, other, retain_graph=True)[0] for g in gradient])
        p = logits.softmax(-1)
        torch.testing.assert_close(hessian, p.diag() - p.outer(p), atol=1e-5, rtol=1e-4)


def test_wrong_shapes_are_one_line(logits, pairs, monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)  # the functions' own checks, not the tests'
    tokens = torch.arange(15).view(3, 5) % 11
    metric = Metric("mine", lambda x: x[:, 0, 0], tokens=torch.zeros(2, 1, dtype=torch.long))
    for function, arguments, message in (
        (
            kl_divergence,
            (logits, logits[:1]),
            r"logits have shapes \[3, 5, 11\] and \[1, 5, 11\]: they must be the same",
        ),
        (js_divergence, (logits, logits[..., :1]), r"\[3, 5, 11\] and \[3, 5, 1\]"),
        (kl_divergence, (logits[0, 0, 0], logits[0, 0, 0]), r"logits have shape \[\], wanted is \[\.\.\., d_vocab\]"),
        (cross_entropy, (logits[0], tokens[0]), r"logits have shape \[5, 11\], wanted is \[batch, pos, d_vocab\]"),
        (cross_entropy, (logits[0], logits[0].long()), r"logits have shape \[5, 11\]"),
        (logit_diff, (logits[0], pairs), r"logits have shape \[5, 11\], these pairs want \[3, 5, d_vocab\]"),
        (logit_diff, (logits[:2], pairs), r"logits have shape \[2, 5, 11\]"),
        (logit_diff, (logits[:, :4], pairs), r"logits have shape \[3, 4, 11\]"),
        (logit_diff, (logits, "pairs"), "pairs must be PromptPairs"),
        (right_log_prob, ("pairs",), "pairs must be PromptPairs"),
        (right_log_prob(pairs[:2]), (logits, pairs), "right_log_prob is made for 2 prompts, there are 3 pairs"),
        (metric, (logits, pairs), "metric mine is made for 2 prompts, there are 3 pairs"),
    ):
        with pytest.raises(ValueError, match=message) as raised:
            function(*arguments)
        assert "\n" not in str(raised.value)


def test_a_metric_takes_pairs_as_three_tensors(logits, pairs):
    plain = (pairs.clean, pairs.corrupted, pairs.answers)
    torch.testing.assert_close(logit_diff(logits, plain), logit_diff(logits, pairs))
    torch.testing.assert_close(right_log_prob(plain)(logits, plain), right_log_prob(pairs)(logits, pairs))
