"""The linear probes against scikit-learn used directly, and what they may not look at."""

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from ijepa_hf.evaluation import knn_accuracy, linear_accuracy
from ijepa_hf.evaluation.probes import linear
from ijepa_hf.evaluation.probes.linear import TRAINING, predict_linear, predict_linear_sgd


def trained(**changes) -> dict:
    """The defaults of SGD with changes, as an argument."""
    return {"training": replace(TRAINING, **changes)}


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
    monkeypatch.setattr(linear, "_PENALTIES", (penalty,))
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


def test_weaker_penalties_are_not_tried_once_two_in_a_row_did_no_better(monkeypatch: pytest.MonkeyPatch):
    generator = np.random.default_rng(0)
    y = generator.integers(0, 2, 300)
    x = np.hstack([generator.normal(size=(300, 40)) + 0.2 * (2 * y[:, None] - 1), generator.normal(size=(300, 200))])
    tried: list[float] = []
    probe = linear._probe
    monkeypatch.setattr(linear, "_probe", lambda penalty: (tried.append(penalty), probe(penalty))[1])
    linear_accuracy(x, y, x, y)
    *search, chosen = tried
    best = search.index(chosen)
    assert search == list(linear._PENALTIES[: best + 3])  # the best and two more
    assert 10.0 not in search


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
    split = linear.hold_out

    def recording(*arguments, **options):
        seen.append(split(*arguments, **options))
        return seen[-1]

    monkeypatch.setattr(linear, "hold_out", recording)
    for seed in (0, 0, 1):
        linear_accuracy(*digits(), seed=seed)
    np.testing.assert_array_equal(seen[0][1], seen[1][1])
    assert not np.array_equal(seen[0][1], seen[2][1])
    assert len(seen[0][0]) == 320


def test_a_class_with_one_image_does_not_stop_the_probe():
    train_x, train_y, test_x, test_y = digits()
    train_y = train_y.copy()
    train_y[0] = 77
    assert linear_accuracy(train_x, train_y, test_x, test_y) > 0.8


def test_a_fit_that_does_not_converge_is_not_silent(monkeypatch):
    monkeypatch.setattr(linear, "_MAX_ITERATIONS", 2)
    with pytest.warns(ConvergenceWarning):
        linear_accuracy(*digits())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_y": np.zeros(400)}, "400 labels of 1 classes: a probe needs"),
        ({"train_x": np.zeros((4, 64)), "train_y": np.arange(4)}, "4 labels of 4 classes"),
        ({"train_y": np.zeros(7)}, r"train_x of shape \(400, 64\) and train_y of shape \(7,\)"),
        ({"test_x": np.zeros((200, 63))}, "train_x has 64 columns and test_x has 63"),
        ({"train_x": np.full((400, 64), np.nan)}, "train_x holds NaN"),
        ({"test_y": np.zeros(7)}, r"test_x of shape \(200, 64\) and test_y of shape \(7,\)"),
    ],
)
def test_impossible_arguments_are_named(change: dict, message: str):
    names = ("train_x", "train_y", "test_x", "test_y")
    with pytest.raises(ValueError, match=message):
        linear_accuracy(**{**dict(zip(names, digits(), strict=True)), **change})


def gaussian_classes(n: int, *, distance: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Four classes around points that are `distance` from the origin, in 16 dimensions."""
    generator = np.random.default_rng(seed)
    y = generator.integers(0, 4, n)
    return (distance * np.eye(4, 16)[y] + generator.normal(size=(n, 16))).astype(np.float32), y


@pytest.mark.parametrize("probe", [predict_linear, lambda *split: predict_linear_sgd(*split, **trained(epochs=20))])
def test_planted_classes_are_found_and_shuffled_labels_give_chance(probe):
    x, y = gaussian_classes(1600, distance=4.0)
    assert np.mean(probe(x[:600], y[:600], x[600:]) == y[600:]) > 0.95
    # Images of one class get much the same prediction, so a single shuffle says little.
    shuffles = [np.random.default_rng(seed).permutation(y[:600]) for seed in range(8)]
    assert abs(np.mean([probe(x[:600], labels, x[600:]) == y[600:] for labels in shuffles]) - 0.25) < 0.1


def test_predictions_are_labels_one_for_each_image_and_the_accuracy_counts_them():
    train_x, train_y, test_x, test_y = digits()
    names = np.array(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"])
    for probe in (predict_linear, lambda *split: predict_linear_sgd(*split, **trained(epochs=15))):
        numbers = probe(train_x, train_y, test_x)
        assert numbers.shape == (200,)
        assert numbers.dtype == train_y.dtype
        words = probe(train_x, names[train_y], test_x)  # they sort otherwise, so the split is another
        assert np.mean(words == names[test_y]) == pytest.approx(np.mean(numbers == test_y), abs=0.1)
        assert np.mean(numbers == test_y) > 0.7
    assert linear_accuracy(train_x, train_y, test_x, test_y) == np.mean(
        predict_linear(train_x, train_y, test_x) == test_y
    )


# ---- SGD ------------------------------------------------------------------------------------------------------------


def test_a_long_run_of_sgd_ends_at_the_minimum_that_scikit_learn_finds():
    """The loss is mean cross-entropy + decay / 2 |W|^2 over all weights, the bias too: here a column of ones."""
    x, y = gaussian_classes(5000, distance=1.5)
    train_x, train_y, test_x = x[:120], y[:120], x[120:]
    features, targets = torch.from_numpy(train_x), torch.from_numpy(train_y)
    training = replace(TRAINING, epochs=4000, batch_size=120)
    (plain,) = linear._train_heads(features, targets, 4, [linear._Setting(False, 0.4, 0.05)], training, 0)
    ours = plain(torch.from_numpy(test_x)).detach().numpy()

    def with_ones(rows: np.ndarray) -> np.ndarray:
        return np.hstack([rows, np.ones((len(rows), 1))])

    direct = LogisticRegression(C=1 / (0.05 * 120), fit_intercept=False, max_iter=10_000, tol=1e-8)
    direct.fit(with_ones(train_x), train_y)
    theirs = direct.decision_function(with_ones(test_x))
    np.testing.assert_allclose(ours - ours.mean(1, keepdims=True), theirs - theirs.mean(1, keepdims=True), atol=1e-3)


def test_each_head_is_trained_as_if_it_were_alone():
    x, y = gaussian_classes(300, distance=1.0)
    features, targets = torch.from_numpy(x), torch.from_numpy(y)
    settings = [linear._Setting(*made) for made in [(False, 0.05, 0.0), (True, 0.05, 5e-4), (False, 0.001, 0.1)]]
    training = replace(TRAINING, epochs=5, batch_size=64)
    together = linear._train_heads(features, targets, 4, settings, training, 0)
    for head, setting in zip(together, settings, strict=True):
        (alone,) = linear._train_heads(features, targets, 4, [setting], training, 0)
        torch.testing.assert_close(head(features), alone(features), rtol=0, atol=1e-6)


def test_the_learning_rate_falls_tenfold_after_15_30_and_45_of_50_epochs_and_scales_with_the_batch(monkeypatch):
    rates = []
    step = torch.optim.SGD.step

    def recording(self, *arguments, **options):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.SGD, "step", recording)
    x, y = gaussian_classes(80, distance=1.0)
    predict_linear_sgd(x, y, x, **trained(batch_size=32, learning_rates=(0.08,), weight_decays=(0.0,)))
    assert len(rates) == 50 * (64 // 32) + 50 * (80 // 32)
    expected = np.repeat(0.01 * 0.1 ** np.repeat([0, 1, 2, 3], [15, 15, 15, 5]), 2)
    np.testing.assert_allclose(rates, np.concatenate([expected, expected]), rtol=1e-9)
    rates.clear()
    settings = {"batch_size": 4096, "learning_rates": (0.256,), "weight_decays": (0.0,), "epochs": 1}
    predict_linear_sgd(x, y, x, **trained(**settings))
    np.testing.assert_allclose(rates, [0.064, 0.080], rtol=1e-9)  # 64 images to choose on, 80 in the end


def test_the_batch_normalised_head_is_chosen_where_columns_differ_in_scale_and_the_plain_one_where_scale_tells(caplog):
    caplog.set_level(logging.INFO)
    x, y = gaussian_classes(600, distance=3.0)
    scale = np.logspace(-2, 1, 16, dtype=np.float32)  # the four columns that matter are the smallest
    predicted = predict_linear_sgd(x[:400] * scale, y[:400], x[400:] * scale)
    assert "batch_norm=True" in caplog.text
    assert np.mean(predicted == y[400:]) > 0.8
    caplog.clear()
    x, y = gaussian_classes(2100, distance=2.0)
    noisy = np.hstack([x, np.random.default_rng(1).normal(size=(2100, 200)) / 100]).astype(np.float32)
    predicted = predict_linear_sgd(noisy[:100], y[:100], noisy[100:])
    assert "batch_norm=False" in caplog.text
    assert np.mean(predicted == y[100:]) > 0.7


def test_a_setting_that_diverges_is_not_chosen_and_if_all_do_it_is_said():
    train_x, train_y, test_x, _ = digits()
    sane = predict_linear_sgd(train_x, train_y, test_x, **trained(learning_rates=(0.01,), epochs=5))
    both = predict_linear_sgd(train_x, train_y, test_x, **trained(learning_rates=(1e38, 0.01), epochs=5))
    np.testing.assert_array_equal(both, sane)
    # NaN looks like class 0 to argmax, which is nearly always right here.
    x, rare = gaussian_classes(200, distance=0.0)[0], np.arange(200) % 20 == 0
    assert predict_linear_sgd(x, rare, x, **trained(learning_rates=(1e38, 0.01), epochs=5)).mean() < 0.3
    with pytest.raises(ValueError, match=r"diverged with learning_rates=\(1e\+38,\): give lower ones"):
        predict_linear_sgd(train_x, train_y, test_x, **trained(learning_rates=(1e38,), epochs=5))


def test_sgd_is_a_function_of_the_seed_alone_and_leaves_the_global_generator_alone():
    x, y = gaussian_classes(400, distance=0.7)
    state = torch.get_rng_state()
    few = trained(epochs=2, batch_size=16)
    first = predict_linear_sgd(x[:200], y[:200], x[200:], seed=1, **few)
    torch.manual_seed(77)
    again = predict_linear_sgd(x[:200], y[:200], x[200:], seed=1, **few)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, predict_linear_sgd(x[:200], y[:200], x[200:], seed=2, **few))
    features, targets = torch.from_numpy(x), torch.from_numpy(y)
    setting = [linear._Setting(False, 0.05, 0.0)]
    heads = [linear._train_heads(features, targets, 4, setting, few["training"], seed)[0] for seed in (0, 0, 1)]
    torch.testing.assert_close(heads[0][0].weight, heads[1][0].weight, rtol=0, atol=0)
    assert not torch.allclose(heads[0][0].weight, heads[2][0].weight, rtol=1e-3)  # another order of the images
    torch.set_rng_state(state)
    predict_linear_sgd(x[:200], y[:200], x[200:], **trained(epochs=1))
    assert torch.equal(state, torch.get_rng_state())


def test_sgd_judges_each_test_image_by_itself():
    x, y = gaussian_classes(400, distance=0.7)
    together = predict_linear_sgd(x[:200], y[:200], x[200:], **trained(epochs=3))
    alone = np.concatenate(
        [predict_linear_sgd(x[:200], y[:200], x[i : i + 1], **trained(epochs=3)) for i in range(200, 205)]
    )
    np.testing.assert_array_equal(together[:5], alone)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (trained(batch_size=1), "batch_size=1 must be at least 2"),
        ({"train_y": np.zeros(200)}, "200 labels of 1 classes"),
        ({"test_x": np.full((3, 16), np.inf)}, "test_x holds NaN or infinity"),
    ],
)
def test_impossible_arguments_of_sgd_are_named(change: dict, message: str):
    x, y = gaussian_classes(200, distance=1.0)
    with pytest.raises(ValueError, match=message):
        predict_linear_sgd(**{"train_x": x, "train_y": y, "test_x": x, **change})
