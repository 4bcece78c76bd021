"""Intervals hold with few sequences, which those of plain bootstrap quantiles do not."""

import numpy as np
import pytest

from lnfree_interp import statistics

FEW, TRIALS = 8, 500


def coverage(draw, interval, truth, n=FEW, trials=TRIALS):
    random = np.random.default_rng(0)
    bounds = [interval(*draw(random, n)) for _ in range(trials)]
    return np.mean([low <= truth <= high for low, high in bounds])


def by_quantiles(values):
    """The plain bootstrap."""
    drawn = values[np.random.default_rng(0).integers(len(values), size=(250, len(values)))].mean(1)
    return np.quantile(drawn, statistics.LEVELS)


def mean_of(sample):
    return lambda random, n: (sample(random, n),)


MEANS = {
    "normal": (mean_of(lambda random, n: random.normal(size=n)), 0.0),
    "exponential": (mean_of(lambda random, n: random.exponential(size=n)), 1.0),
    "lognormal": (mean_of(lambda random, n: random.lognormal(0, 0.5, size=n)), np.exp(0.125)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MEANS)
def test_the_mean_of_8_sequences_is_covered(name):
    draw, truth = MEANS[name]
    got = coverage(draw, lambda v: statistics.mean_interval(v, draws=250), truth)
    assert 0.92 <= got <= 0.98  # 95% but for skewness; three standard errors of 600 trials are 0.027
    assert coverage(draw, by_quantiles, truth) < 0.9  # as quantiles of the means do not


@pytest.mark.slow
@pytest.mark.parametrize("n", [3, 5, 30])
def test_other_numbers_of_sequences(n):
    draw, truth = MEANS["normal"]
    assert 0.92 <= coverage(draw, lambda v: statistics.mean_interval(v, draws=250), truth, n=n) <= 0.98


def sizes_and_errors(random, n):
    sizes = random.lognormal(0, 0.5, size=n)
    return sizes * random.lognormal(np.log(0.5) - 0.08, 0.4, size=n), sizes


@pytest.mark.slow
def test_a_ratio_of_sums_is_covered():
    got = coverage(sizes_and_errors, lambda a, b: statistics.ratio_interval(a, b, draws=250), 0.5)
    assert 0.91 <= got <= 0.98


def heads_and_sequences(random, n):
    """Errors with a level of each head, of each sequence, and of each pair of them."""
    levels = np.exp(0.3 * random.normal(size=(16, 1))) * np.exp(0.3 * random.normal(size=(1, n)))
    sizes = np.exp(0.3 * random.normal(size=(16, n)))
    return 0.5 * sizes * levels * np.exp(0.3 * random.normal(size=(16, n)) - 3 * 0.045), sizes


@pytest.mark.slow
def test_a_ratio_over_heads_and_sequences_is_covered():
    interval = lambda a, b: statistics.ratio_interval_of_two_ways(a, b, draws=250)  # noqa: E731
    assert 0.91 <= coverage(heads_and_sequences, interval, 0.5, trials=400) <= 0.99


def correlated(random, n):
    scale = random.lognormal(0, 0.3, size=(n, 1))
    x = random.normal(size=(n, 20))
    return x * scale, (0.8 * x + 0.6 * random.normal(size=(n, 20))) * scale


@pytest.mark.slow
def test_a_correlation_is_covered():
    assert 0.88 <= coverage(correlated, lambda x, y: statistics.correlation_interval(x, y, draws=250), 0.8) <= 0.98


def test_estimates_are_numpys():
    random = np.random.default_rng(1)
    x, y = random.normal(size=(2, 7, 5))
    assert statistics.correlation(x, y) == pytest.approx(np.corrcoef(x.ravel(), y.ravel())[0, 1])
    low, high = statistics.mean_interval(x)
    each = [statistics.mean_interval(x[:, i]) for i in range(5)]
    np.testing.assert_allclose(low, [a for a, _ in each])
    np.testing.assert_allclose(high, [b for _, b in each])
    assert (low < x.mean(0)).all() and (x.mean(0) < high).all()


def test_draws_a_few_at_a_time_are_the_same(monkeypatch):
    values = np.random.default_rng(2).normal(size=(9, 3))
    whole = statistics.mean_interval(values)
    monkeypatch.setattr(statistics, "WEIGHTS_AT_ONCE", 20)
    np.testing.assert_array_equal(whole, statistics.mean_interval(values))


def test_a_far_origin_changes_nothing():
    values = np.random.default_rng(3).normal(size=12)
    near, far = statistics.mean_interval(values), statistics.mean_interval(values + 1e8)
    np.testing.assert_allclose(np.array(far) - 1e8, near, atol=1e-6)


def test_what_has_no_spread_is_a_point_and_one_sequence_has_no_interval():
    assert statistics.mean_interval(np.full(9, 2.5)) == (2.5, 2.5)
    assert statistics.ratio_interval(np.zeros(9), np.arange(1.0, 10)) == (0.0, 0.0)
    assert statistics.ratio_interval(np.zeros(9), np.zeros(9)) == (0.0, 0.0)
    x = np.random.default_rng(0).normal(size=(9, 4))
    assert statistics.correlation_interval(x, 2 * x) == pytest.approx((1.0, 1.0))
    assert np.isnan(statistics.correlation(x, np.ones_like(x)))
    assert np.isnan(statistics.correlation_interval(x, np.ones_like(x))).all()
    assert np.isnan(statistics.mean_interval(np.array([3.0]))).all()
    with pytest.raises(ValueError, match="draws is 0"):
        statistics.mean_interval(np.ones(3), draws=0)


def test_a_share_is_never_below_nothing():
    a = np.array([0.0, 0, 0, 0, 0, 0, 0, 5])
    low, high = statistics.ratio_interval(a, np.ones(8))
    assert 0 <= low < 0.625 < high
