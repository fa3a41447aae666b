"""Intervals against closed forms, against scipy, and by how often they cover what they should."""

import numpy as np
import pytest
from scipy import stats

from ijepa_hf.evaluation import intervals
from ijepa_hf.evaluation.intervals import bootstrap_interval, mean_interval


def values_of(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(3.0, 2.0, n)


def test_the_interval_of_a_mean_is_the_normal_one_where_there_are_many_images():
    values = values_of(4000, 0)
    half = stats.norm.ppf(0.975) * values.std() / np.sqrt(len(values))
    low, high = mean_interval(values, 0, resamples=4000)
    np.testing.assert_allclose([low, high], [values.mean() - half, values.mean() + half], atol=0.05 * 2 * half)


def test_the_interval_of_an_accuracy_of_few_images_is_the_binomial_one():
    # the bootstrap of k right of n is a binomial draw with p = k / n, whose quantiles are known
    low, high = mean_interval(np.arange(40) < 30, 5, resamples=4000)
    expected = stats.binom.ppf([0.025, 0.975], 40, 30 / 40) / 40
    np.testing.assert_allclose([low, high], expected, atol=1.01 / 40)


def test_ninety_five_in_a_hundred_intervals_hold_the_truth():
    covered = [
        low <= 3.0 <= high for low, high in (mean_interval(values_of(60, seed), seed, 300) for seed in range(400))
    ]
    assert stats.binomtest(sum(covered), len(covered), 0.95).pvalue > 1e-3
    assert np.mean(covered) > 0.9


def test_scipy_gives_the_same_interval():
    values = values_of(200, 1) ** 2
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(3)
    ).confidence_interval
    found = mean_interval(values, 0, resamples=4000)
    np.testing.assert_allclose(found, expected, atol=0.05 * (expected.high - expected.low))


def test_a_draw_is_a_row_of_counts_that_sums_to_the_number_of_images():
    seen = []

    def statistic(weights: np.ndarray) -> np.ndarray:
        seen.append(weights.copy())
        return weights[:, 0]

    bootstrap_interval(statistic, 30, 0, resamples=500)
    weights = np.concatenate(seen)
    assert weights.shape == (500, 30)
    assert (weights.sum(axis=1) == 30).all()
    assert (weights == weights.round()).all()
    assert abs(weights.var() - 29 / 30) < 0.05  # of a binomial with 30 tries at 1/30


def test_draws_are_the_same_in_blocks_and_of_the_seed_alone(monkeypatch):
    values = values_of(50, 2)
    whole = mean_interval(values, 7)
    monkeypatch.setattr(intervals, "_WEIGHTS_AT_ONCE", 130)
    assert mean_interval(values, 7) == pytest.approx(whole, rel=1e-12)
    assert mean_interval(values, 8) != whole


def test_one_image_gives_a_point():
    assert mean_interval(np.array([0.25]), 0) == (0.25, 0.25)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_images": 0}, "num_images=0 must be at least 1"),
        ({"seed": -1}, "seed=-1"),
        ({"resamples": 39}, "resamples=39 must be at least 40"),
        ({"statistic": lambda weights: np.full(len(weights), np.nan)}, "100 values that are not finite"),
        ({"statistic": lambda weights: weights}, "shape \\(100, 5\\)"),
    ],
)
def test_what_makes_no_interval_is_refused(change, message):
    arguments = {"statistic": lambda weights: weights[:, 0], "num_images": 5, "seed": 0, "resamples": 100}
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(**{**arguments, **change})


@pytest.mark.parametrize("values", [np.zeros((2, 2)), np.array([0.0, np.nan])])
def test_values_that_are_no_finite_vector_are_refused(values):
    with pytest.raises(ValueError, match="must be \\[n\\] and finite"):
        mean_interval(values, 0)
