"""The linear probe against scikit-learn used directly, and what it may not look at."""

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from ijepa_hf.evaluation import knn_accuracy, linear_accuracy, linear_probe


def digits(train: int = 400, test: int = 200) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    x, y = load_digits(return_X_y=True)
    return x[:train].astype(np.float32), y[:train], x[-test:].astype(np.float32), y[-test:]


def direct(train_x, train_y, test_x, test_y, penalty: float) -> float:
    """Logistic regression on features standardised by hand."""
    mean, deviation = train_x.mean(axis=0, dtype=np.float64), train_x.std(axis=0, dtype=np.float64)
    deviation[deviation == 0] = 1
    classifier = LogisticRegression(C=penalty, max_iter=10_000).fit((train_x - mean) / deviation, train_y)
    return classifier.score((test_x - mean) / deviation, test_y)


@pytest.mark.parametrize("penalty", [1e-4, 1e-2, 1.0])
def test_accuracy_is_that_of_standardised_logistic_regression(penalty: float, monkeypatch):
    monkeypatch.setattr(linear_probe, "_PENALTIES", (penalty,))
    assert linear_accuracy(*digits()) == pytest.approx(direct(*digits(), penalty), abs=1e-12)


def test_the_penalty_is_the_one_that_does_best_on_held_out_training_images():
    """Many noisy columns want a strong penalty, a few clean ones a weak one: each gets its own."""
    generator = np.random.default_rng(0)
    train_y, test_y = generator.integers(0, 2, 300), generator.integers(0, 2, 2000)

    def noisy(y: np.ndarray) -> np.ndarray:
        signal = generator.normal(size=(len(y), 40)) + 0.2 * (2 * y[:, None] - 1)
        return np.hstack([signal, generator.normal(size=(len(y), 200))])

    noisy_split = (noisy(train_y), train_y, noisy(test_y), test_y)
    assert linear_accuracy(*noisy_split) == pytest.approx(direct(*noisy_split, 1e-2), abs=1e-12)
    assert direct(*noisy_split, 1e-2) > direct(*noisy_split, 10.0) + 0.03
    assert linear_accuracy(*digits()) > direct(*digits(), 1e-2) + 0.005


def test_separable_classes_are_separated():
    generator = np.random.default_rng(0)
    y = np.arange(60) % 3
    x = np.eye(3)[y] * 10 + generator.normal(size=(60, 3))
    assert linear_accuracy(x[:30], y[:30], x[30:], y[30:]) == 1


def test_column_scale_and_offset_do_not_count():
    train_x, train_y, test_x, test_y = digits()
    scale = np.logspace(-3, 3, 64)
    moved = linear_accuracy(train_x * scale + 5 * scale, train_y, test_x * scale + 5 * scale, test_y)
    assert moved == pytest.approx(linear_accuracy(*digits()), abs=0.006)  # one image, by rounding


@pytest.mark.parametrize("probe", [linear_accuracy, knn_accuracy])
def test_test_labels_and_other_test_images_change_nothing_but_the_count(probe):
    train_x, train_y, test_x, test_y = digits(train=120, test=60)
    train_y, test_y = train_y % 3, test_y % 3
    # The prediction of one image is the label that makes its accuracy 1: it must not depend on its company.
    alone = [max(range(3), key=lambda c: probe(train_x, train_y, test_x[i : i + 1], np.array([c]))) for i in range(2)]
    assert probe(train_x, train_y, test_x[:2], np.array(alone)) == 1
    together = np.concatenate([alone, np.full(58, 9)])
    assert probe(train_x, train_y, test_x, together) == pytest.approx(2 / 60, abs=1e-12)
    shuffled = np.random.default_rng(0).permutation(60)
    assert probe(train_x, train_y, test_x[shuffled], test_y[shuffled]) == probe(train_x, train_y, test_x, test_y)


def test_the_same_seed_gives_the_same_number_and_the_seed_reaches_the_split(monkeypatch):
    assert linear_accuracy(*digits(), seed=3) == linear_accuracy(*digits(), seed=3)
    seen = []
    split = linear_probe.train_test_split

    def recording(*arrays, **options):
        parts = split(*arrays, **options)
        seen.append(parts[0])
        return parts

    monkeypatch.setattr(linear_probe, "train_test_split", recording)
    for seed in (0, 0, 1):
        linear_accuracy(*digits(), seed=seed)
    np.testing.assert_array_equal(seen[0], seen[1])
    assert not np.array_equal(seen[0], seen[2])
    assert len(seen[0]) == 320


def test_a_class_with_one_image_does_not_stop_the_probe():
    train_x, train_y, test_x, test_y = digits()
    train_y = train_y.copy()
    train_y[0] = 77
    assert linear_accuracy(train_x, train_y, test_x, test_y) > 0.8


def test_a_fit_that_does_not_converge_is_not_silent(monkeypatch):
    monkeypatch.setattr(linear_probe, "_MAX_ITERATIONS", 2)
    with pytest.warns(ConvergenceWarning):
        linear_accuracy(*digits())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_y": np.zeros(400)}, "400 labels of 1 classes: a linear probe needs"),
        ({"train_x": np.zeros((4, 64)), "train_y": np.arange(4)}, "4 labels of 4 classes"),
        ({"train_y": np.zeros(7)}, r"train_x of shape \(400, 64\) and train_y of shape \(7,\)"),
        ({"test_x": np.zeros((200, 63))}, "train_x has 64 columns and test_x has 63"),
        ({"train_x": np.full((400, 64), np.nan)}, "train_x holds NaN"),
    ],
)
def test_impossible_arguments_are_named(change: dict, message: str):
    names = ("train_x", "train_y", "test_x", "test_y")
    with pytest.raises(ValueError, match=message):
        linear_accuracy(**{**dict(zip(names, digits(), strict=True)), **change})
