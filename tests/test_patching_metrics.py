"""A metric's rows are prompts in any order and number: which functions are refused, and what the others are spared."""

import pytest
import torch
from conftest import make_model
from test_patching import assert_matches_plain_hooks, make_pairs
from test_patching_models import steered

from lnfree_interp.metrics import Metric, kl_from_clean, logit_diff, right_log_prob
from lnfree_interp.patching import activation_patching, attribution_patching, reading

BOTH = (activation_patching, attribution_patching)


def by_place(n):
    """Functions of the logits of n prompts that tell them by where they are."""
    tokens = torch.tensor([3, 9, 20, 5, 60])[:n]
    return {
        "indexed": lambda logits: logits[torch.arange(n), -1, tokens],
        "gathered": lambda logits: logits[:, -1].gather(-1, tokens[:, None])[:, 0],
        "weighted": lambda logits: logits[:, -1, 0] * torch.arange(len(logits)),
    }


BY_OTHERS = {
    "centred": lambda logits: logits[:, -1, 0] - logits[:, -1, 0].mean(),
    "from the first": lambda logits: logits[:, -1, 0] - 0.01 * logits[0, -1, 0],
    "sorted": lambda logits: logits[:, -1, 0].sort().values,
    "scaled": lambda logits: logits[:, -1, 0] / logits.std(),
}
BY_ROW = {
    "probability": lambda logits: logits.softmax(-1)[:, -1, 3],
    "all positions": lambda logits: logits.logsumexp(-1).mean(1),
    "probe": lambda logits: logits[:, -1] @ torch.linspace(-1, 1, logits.shape[-1], dtype=logits.dtype),
    "edits its rows": lambda logits: logits.sub_(logits.mean(-1, keepdim=True))[:, 2, 5],
    "constant": lambda logits: torch.zeros(len(logits)),
}


def assert_refused(model, pairs, metric, **options):
    for function in BOTH:
        with pytest.raises(ValueError, match="depends on other prompts or on their place") as caught:
            function(model, pairs, metric=metric, **(options if function is activation_patching else {}))
        assert "\n" not in str(caught.value) and "tokens='answers'" in str(caught.value)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("name", by_place(1))
def test_a_function_that_knows_prompts_by_their_place_is_refused(random_model, name, n):
    model = random_model("LNPre")
    assert_refused(model, make_pairs(model, n=n), by_place(n)[name])


def test_so_is_one_that_shows_it_with_many_rows_alone(random_model):
    model = random_model("LNPre")
    with pytest.raises(ValueError, match=r"returns 5 numbers for \d+ rows, as one does that depends on other prompts"):
        activation_patching(model, make_pairs(model, n=5), metric=lambda logits: logits[:5, -1, 0])


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("name", BY_OTHERS)
def test_a_function_that_looks_at_other_prompts_is_refused(random_model, name, n, fast):
    model = random_model(None)
    pairs = make_pairs(model, n=n)
    assert_refused(model, pairs, BY_OTHERS[name], fast=fast)
    assert_refused(model, pairs, BY_OTHERS[name], fast=fast, max_memory=1)
    whole = {"positions": None, "tokens": None}
    assert_refused(model, pairs, Metric("mine", BY_OTHERS[name], **whole), fast=fast)


def test_what_the_error_advises_is_what_was_meant(random_model):
    model = random_model("LNPre")
    pairs = make_pairs(model)
    right, wrong = pairs.answers.T

    def meant(logits):
        return logits[torch.arange(3), -1, right] - logits[torch.arange(3), -1, wrong]

    assert_refused(model, pairs, meant)
    advised = Metric("mine", lambda logits: logits[:, -1, 0] - logits[:, -1, 1], tokens="answers")
    assert_matches_plain_hooks(model, pairs, activation_patching(model, pairs, metric=advised), "resid_pre", meant)

    def of_context(logits, right):
        return logits[:, -1].gather(-1, right[:, None])[:, 0]

    told = Metric("mine", of_context, tokens=None, context=(right,))
    effect = activation_patching(model, pairs, metric=told)
    assert_matches_plain_hooks(model, pairs, effect, "resid_pre", by_place_of(right))


def by_place_of(right):
    return lambda logits: logits[torch.arange(len(right)), -1, right]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BY_ROW)
def test_a_function_of_each_row_is_a_metric_of_all_logits(name, dtype):
    model = make_model("LNPre", dtype=dtype, d_vocab=2000)
    pairs = make_pairs(model, n=5, changed=((2, 4), (5,), (6,)))
    metric = Metric(name, BY_ROW[name], positions=None, tokens=None)
    for function in BOTH:
        got, wanted = function(model, pairs, metric=BY_ROW[name]), function(model, pairs, metric=metric)
        assert torch.equal(got.values, wanted.values) and torch.equal(got.clean, wanted.clean)
    if dtype == torch.float64:
        effect = activation_patching(model, pairs, metric=BY_ROW["all positions"])
        assert_matches_plain_hooks(model, pairs, effect, "resid_pre", BY_ROW["all positions"])


def test_a_broken_function_says_how_it_fails(random_model):
    model = random_model(None)
    for function in BOTH:
        with pytest.raises(ValueError, match=r"<lambda> fails on 3 rows \(IndexError: index 99") as caught:
            function(model, make_pairs(model), metric=lambda logits: logits[:, 99])
        assert isinstance(caught.value.__cause__, IndexError)


@pytest.mark.parametrize("fast", [True, False])
def test_logits_are_made_some_rows_at_a_time(random_model, fast, monkeypatch):
    model = random_model("LNPre")
    pairs = make_pairs(model, n=4, changed=((2, 4), (5,), (6,)))
    seen = []

    def metric(logits):
        seen.append(logits.numel())
        return logits.softmax(-1)[:, -2:, 3].sum(1)

    calls = [
        lambda: activation_patching(model, pairs, metric=metric, fast=fast).values,
        lambda: activation_patching(model, pairs, site="z", by_position=True, metric=metric, fast=fast).values,
        lambda: attribution_patching(model, pairs, metric=metric, method="second_order").values,
    ]
    wanted = [call() for call in calls]
    assert max(seen) > 5 * 7 * 61
    monkeypatch.setitem(reading.LOGITS, "cpu", 5 * 7 * 61)
    seen.clear()
    for call, values in zip(calls, wanted):
        torch.testing.assert_close(call(), values, atol=1e-12, rtol=1e-9)
    assert max(seen) == 5 * 7 * 61  # as many rows as that, or the few that are checked


# ---------------------------------------------------------------------------------------------------------
# KL from the clean run


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_clean_run_is_at_no_distance_from_itself(any_block_of, dtype):
    model = any_block_of(dtype)
    pairs = make_pairs(model, n=4, pos=6)
    metric = kl_from_clean(model, pairs)
    for function in BOTH:
        for direction in ("denoising", "noising"):
            effect = function(model, pairs, metric=metric, direction=direction)
            assert effect.clean.abs().max() < 1e-6, function
            assert effect.corrupted.min() > 1e-3


@pytest.fixture(params=["GPT-2", "Gemma"])
def any_block_of(request):
    from conftest import KINDS

    normalization, fields = KINDS[request.param]
    return lambda dtype: make_model(normalization, dtype=dtype, **fields)


def test_the_clean_run_is_the_models_own(random_model):
    for model in (random_model("LNPre"), random_model(None), make_model("LN", positional_embedding_type="alibi")):
        pairs = make_pairs(model)
        torch.testing.assert_close(kl_from_clean(model, pairs).context[0], model(pairs.clean)[:, -1])
    model = make_model("LNPre")
    model.add_hook("blocks.1.hook_resid_pre", steered, is_permanent=True)
    pairs = make_pairs(model)
    torch.testing.assert_close(kl_from_clean(model, pairs).context[0], model(pairs.clean)[:, -1])


@pytest.mark.parametrize("metric", ["right_log_prob", "kl_from_clean"])
def test_a_metric_made_for_other_pairs_is_refused(random_model, metric):
    model = random_model(None)
    pairs, others = make_pairs(model), make_pairs(model, n=2)
    made = right_log_prob(others) if metric == "right_log_prob" else kl_from_clean(model, others)
    for function in BOTH:
        with pytest.raises(ValueError, match=f"metric {metric} is made for 2 prompts, there are 3 pairs"):
            function(model, pairs, metric=made)
        function(model, pairs, metric=logit_diff)
