"""Ridge regression against scikit-learn's, and bins against counting."""

import numpy as np
import pytest
from sklearn.datasets import load_diabetes
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ijepa_hf.evaluation.probes import ridge
from ijepa_hf.evaluation.probes.ridge import distance_bins, predict_ridge, to_bins


def linear_problem(n: int, columns: int, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features of different scales and two targets that are linear in them, but for noise."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(n, columns)) * np.logspace(-1, 1, columns) + 3
    y = (x - 3) / np.logspace(-1, 1, columns) @ np.random.default_rng(99).normal(size=(columns, 2))
    return x.astype(np.float32), y + noise * generator.normal(size=(n, 2))


def direct(train_x, train_y, test_x, penalty: float) -> np.ndarray:
    model = make_pipeline(StandardScaler(), Ridge(alpha=penalty * len(train_x)))
    return model.fit(train_x.astype(np.float64), train_y).predict(test_x.astype(np.float64))


@pytest.mark.parametrize("penalty", [1e-4, 0.1, 10.0])
@pytest.mark.parametrize(("n", "columns"), [(100, 7), (30, 90), (40, 40)])
def test_predictions_equal_scikit_learns_ridge_on_standardised_features(n, columns, penalty: float, monkeypatch):
    monkeypatch.setattr(ridge, "_PENALTIES", (penalty,))
    x, y = linear_problem(n + 50, columns, noise=1.0)
    for targets in (y, y[:, 0]):
        predicted = predict_ridge(x[:n], targets[:n], x[n:])
        np.testing.assert_allclose(predicted, direct(x[:n], targets[:n], x[n:], penalty), rtol=1e-7, atol=1e-7)
        assert predicted.dtype == np.float64


def test_each_target_has_the_penalty_that_does_best_on_held_out_training_images(caplog):
    """One target is nearly noiseless and wants a weak penalty, the other is mostly noise and wants a strong one."""
    caplog.set_level("INFO")
    x, y = linear_problem(500, 40, noise=0.01)
    y[:, 1] += 60 * np.random.default_rng(5).normal(size=500)
    both = predict_ridge(x[:80], y[:80], x[80:])
    chosen = [float(word.strip("[],")) for word in caplog.messages[0].split("image ")[1].split(" were")[0].split()]
    assert chosen[0] <= 1e-3
    assert chosen[1] >= 1
    for target in (0, 1):
        np.testing.assert_allclose(both[:, target], direct(x[:80], y[:80, target], x[80:], chosen[target]), rtol=1e-7)
        alone = predict_ridge(x[:80], y[:80, target], x[80:])
        np.testing.assert_allclose(alone, both[:, target], rtol=1e-9)


def test_the_choice_is_that_of_a_search_by_hand():
    x, y = load_diabetes(return_X_y=True)
    fit, held_out = ridge.hold_out(300, seed=4)
    errors = [
        np.mean((direct(x[:300][fit], y[:300][fit], x[:300][held_out], p) - y[:300][held_out]) ** 2)
        for p in ridge._PENALTIES
    ]
    best = ridge._PENALTIES[int(np.argmin(errors))]
    predicted = predict_ridge(x[:300], y[:300], x[300:], seed=4)
    np.testing.assert_allclose(predicted, direct(x[:300], y[:300], x[300:], best), rtol=1e-8)
    assert 0.4 < r2_score(y[300:], predicted) < 0.65


def test_a_planted_line_is_found_and_shuffled_targets_leave_nothing():
    x, y = linear_problem(1600, 20, noise=0.3)
    assert r2_score(y[600:], predict_ridge(x[:600], y[:600], x[600:])) > 0.97
    shuffled = np.random.default_rng(1).permutation(y[:600])
    assert abs(r2_score(y[600:], predict_ridge(x[:600], shuffled, x[600:]))) < 0.05


def test_scale_and_offset_of_features_and_targets_pass_through():
    x, y = linear_problem(200, 12, noise=1.0)
    plain = predict_ridge(x[:100], y[:100], x[100:])
    x = x.astype(np.float64)
    moved = predict_ridge(x[:100] * 64 - 7, y[:100], x[100:] * 64 - 7)
    np.testing.assert_allclose(moved, plain, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(predict_ridge(x[:100], -3 * y[:100] + 5, x[100:]), -3 * plain + 5, rtol=1e-6, atol=1e-8)


def test_constant_columns_and_copies_of_columns_do_no_harm():
    x, y = linear_problem(200, 5, noise=0.1)
    more = np.hstack([x, np.full((200, 3), 0.1, dtype=np.float32), x])
    assert r2_score(y[100:], predict_ridge(more[:100], y[:100], more[100:])) > 0.98


def test_each_test_image_is_judged_by_itself_and_the_seed_decides_the_split():
    x, y = linear_problem(200, 12, noise=8.0)
    together = predict_ridge(x[:60], y[:60], x[60:])
    np.testing.assert_allclose(predict_ridge(x[:60], y[:60], x[60:61]), together[:1], rtol=1e-12)
    np.testing.assert_array_equal(together, predict_ridge(x[:60], y[:60], x[60:]))
    others = [predict_ridge(x[:60], y[:60], x[60:], seed=seed) for seed in range(1, 9)]
    assert any(not np.allclose(other, together) for other in others)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_y": np.full(50, np.nan)}, "train_y holds NaN or infinity: leave these images out"),
        ({"train_y": np.array(["a"] * 50)}, "train_y of dtype <U1 and shape .* must hold numbers on 1 or 2 axes"),
        ({"train_y": np.zeros((50, 2, 2))}, "must hold numbers on 1 or 2 axes"),
        ({"train_y": np.zeros(49)}, "must have the same n"),
        ({"train_x": np.zeros((4, 6)), "train_y": np.zeros(4)}, "4 values: a ridge regression needs at least 5"),
        ({"test_x": np.zeros((3, 5))}, "train_x has 6 columns and test_x has 5"),
        ({"test_x": np.full((3, 6), np.nan)}, "test_x holds NaN"),
    ],
)
def test_impossible_arguments_are_named(change: dict, message: str):
    x, y = linear_problem(50, 6, noise=1.0)
    with pytest.raises(ValueError, match=message):
        predict_ridge(**{"train_x": x, "train_y": y, "test_x": x, **change})


# ---- bins -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_bins", [2, 6, 10])
def test_bins_hold_the_same_number_of_training_images(num_bins: int):
    values = np.random.default_rng(0).exponential(size=60 * num_bins)
    bins = to_bins(values, distance_bins(values, num_bins))
    assert bins.dtype == np.int64
    np.testing.assert_array_equal(np.bincount(bins), np.full(num_bins, 60))
    np.testing.assert_array_equal(bins[np.argsort(values)], np.repeat(np.arange(num_bins), 60))


def test_a_value_on_an_edge_belongs_to_the_bin_above_and_values_beyond_all_training_images_to_the_outer_bins():
    assert distance_bins(np.arange(1, 8), 3) == pytest.approx([3, 5])
    np.testing.assert_array_equal(
        to_bins(np.array([[-9, 2.9], [3, 5], [99, 4.9]]), np.array([3, 5])), [[0, 0], [1, 2], [2, 1]]
    )


@pytest.mark.parametrize(
    ("values", "num_bins", "message"),
    [
        (np.array([1.0, 1, 1, 2]), 3, "2 different values, too few or too unevenly spread for num_bins=3"),
        (np.array([0.0] * 50 + [1] * 10), 2, "give fewer bins, or take the values themselves as classes"),
        (np.arange(5), 1, "num_bins=1 must be at least 2"),
        (np.array([1, np.inf]), 2, "train_values holds NaN or infinity"),
        (np.zeros((2, 2)), 2, "must hold numbers on 1 axes"),
    ],
)
def test_values_that_cannot_be_cut_are_named(values: np.ndarray, num_bins: int, message: str):
    with pytest.raises(ValueError, match=message):
        distance_bins(values, num_bins)


def test_edges_must_rise_and_values_be_numbers():
    with pytest.raises(ValueError, match=r"edges=\[2.0, 1.0\] must rise"):
        to_bins(np.zeros(2), np.array([2, 1]))
    with pytest.raises(ValueError, match="values holds NaN"):
        to_bins(np.array([np.nan]), np.array([1.0]))
