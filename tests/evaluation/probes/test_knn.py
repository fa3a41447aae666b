"""Weighted kNN against a direct computation, and at its limits."""

import math
import subprocess

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from warm_python import warm_python

from ijepa_hf.evaluation import knn_accuracy
from ijepa_hf.evaluation.probes.knn import predict_knn


def digits(n: int = 600) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    x, y = load_digits(return_X_y=True)
    return x[:n], y[:n], x[n : n + 200], y[n : n + 200]


def at_angle(*degrees: float) -> np.ndarray:
    return np.array([[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees])


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (20, 1.0), (600, 0.02)])
def test_accuracy_equals_the_direct_computation(k: int, temperature: float):
    train_x, train_y, test_x, test_y = digits()
    unit_train = train_x / np.linalg.norm(train_x, axis=1, keepdims=True)
    right = 0
    for image, label in zip(test_x, test_y, strict=True):
        similarity = unit_train @ image / np.linalg.norm(image)
        nearest = np.argsort(-similarity, kind="stable")[:k]
        votes = [np.exp(similarity[nearest][train_y[nearest] == c] / temperature).sum() for c in range(10)]
        right += int(np.argmax(votes) == label)
    assert knn_accuracy(*digits(), k=k, temperature=temperature) == right / 200


def test_a_cold_vote_is_the_nearest_neighbours_without_overflow():
    train_x, train_y, test_x, test_y = digits()
    classifier = KNeighborsClassifier(n_neighbors=1, metric="cosine").fit(train_x, train_y)
    assert knn_accuracy(*digits(), k=50, temperature=1e-6) == classifier.score(test_x, test_y)


def test_near_neighbours_outvote_a_far_majority_only_when_it_is_cold():
    train_x, train_y = at_angle(0, 60, 60, 60), np.array([1, 0, 0, 0])
    exact = 1 / math.log(3) / 2  # exp(1 / T) = 3 exp(0.5 / T)
    vote = {"train_x": train_x, "train_y": train_y, "test_x": at_angle(0), "test_y": np.array([1]), "k": 4}
    assert knn_accuracy(**vote, temperature=0.97 * exact) == 1
    assert knn_accuracy(**vote, temperature=1.03 * exact) == 0


def test_tied_votes_go_to_the_lowest_label():
    train_x = at_angle(0, 0, 0, 0)
    for train_y in ([7, 7, 3, 3], [3, 7, 3, 7], [3, 3, 7, 7]):
        assert knn_accuracy(train_x, np.array(train_y), at_angle(0), np.array([3]), k=4) == 1


def test_labels_may_be_words_and_a_label_without_training_images_is_wrong():
    train_x, train_y = at_angle(0, 90), np.array(["cat", "dog"])
    assert knn_accuracy(train_x, train_y, at_angle(5, 85, 10), np.array(["cat", "dog", "emu"]), k=1) == 2 / 3


def test_length_of_a_feature_does_not_count():
    train_x, train_y, test_x, test_y = digits()
    lengths = np.random.default_rng(0).uniform(0.5, 2, (len(train_x), 1))
    assert knn_accuracy(train_x * lengths, train_y, test_x * 3, test_y) == knn_accuracy(*digits())


def test_random_features_score_about_chance():
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(1200, 8)), generator.integers(0, 10, 1200)
    accuracy = knn_accuracy(x[:600], y[:600], x[600:], y[600:])
    assert abs(accuracy - 0.1) < 4 * math.sqrt(0.1 * 0.9 / 600)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 601}, "k=601 must be from 1 to the number of training images, 600"),
        ({"k": 0}, "k=0 must be from 1"),
        ({"train_y": np.ones(600)}, "600 labels of 1 classes"),
        ({"test_y": np.ones(201)}, r"test_y of shape \(201,\) must have the same n"),
        ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"train_y": np.zeros(7)}, r"train_x of shape \(600, 64\) and train_y of shape \(7,\)"),
        ({"test_x": np.zeros((0, 64)), "test_y": np.zeros(0)}, "with n at least 1"),
        ({"test_x": np.zeros((200, 63))}, "train_x has 64 columns and test_x has 63"),
        ({"test_x": np.full((200, 64), np.nan)}, "test_x holds NaN"),
    ],
)
def test_impossible_arguments_are_named(change: dict, message: str):
    names = ("train_x", "train_y", "test_x", "test_y")
    with pytest.raises(ValueError, match=message):
        knn_accuracy(**{**dict(zip(names, digits(), strict=True)), **change})


# ---- predictions -----------------------------------------------------------------------------------


def gaussian(n: int, columns: int, seed: int) -> np.ndarray:
    """Features of one direction in common, as encoders make them, so that neighbours lie close together."""
    return (np.random.default_rng(seed).normal(size=(n, columns)) + 1).astype(np.float32)


def reference(train_x, train_y, test_x, k: int, temperature: float) -> np.ndarray:
    """scikit-learn's classifier in float64 with the same vote."""
    classifier = KNeighborsClassifier(
        n_neighbors=k, metric="cosine", algorithm="brute", weights=lambda distances: np.exp(-distances / temperature)
    )
    return classifier.fit(train_x.astype(np.float64), train_y).predict(test_x.astype(np.float64))


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (200, 0.5), (600, 0.02)])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_predictions_equal_scikit_learns_classifier(k: int, temperature: float, dtype: type):
    train_x, test_x = gaussian(600, 24, 0).astype(dtype), gaussian(90, 24, 1).astype(dtype)
    train_y = np.random.default_rng(2).integers(0, 5, 600)
    predicted = predict_knn(train_x, train_y, test_x, k=k, temperature=temperature)
    np.testing.assert_array_equal(predicted, reference(train_x, train_y, test_x, k, temperature))
    assert predicted.dtype == train_y.dtype


@pytest.mark.parametrize("spread", [1e-8, 1e-7, 1e-6, 1e-4])
def test_neighbours_closer_together_than_float32_can_tell_are_ranked_in_float64(spread: float):
    """A nearly collapsed encoder: all similarities lie within about `spread` of 1."""
    generator = np.random.default_rng(0)
    centre = generator.normal(size=32)
    train_x, test_x = (centre + math.sqrt(spread) * generator.normal(size=(n, 32)) for n in (400, 40))
    train_y = np.arange(400)
    unit_train, unit_test = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train_x, test_x))
    nearest = (unit_test @ unit_train.T).argmax(axis=1)
    np.testing.assert_array_equal(predict_knn(train_x, train_y, test_x, k=1), nearest)


def test_a_row_of_zeros_is_equally_far_from_all_but_another_one():
    train_x = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    labels = np.array([2, 1, 0])
    assert predict_knn(train_x, labels, np.zeros((1, 2)), k=1) == 0
    assert predict_knn(train_x[:2], np.array([1, 2]), np.zeros((1, 2)), k=2) == 1  # a tie
    # Its similarity of 0 is more than that of an opposite image.
    assert predict_knn(train_x, labels, np.array([[-1.0, -1.0]]), k=1) == 0


def test_planted_classes_are_found_and_shuffled_labels_give_chance():
    y = np.random.default_rng(0).integers(0, 4, 1600)
    x = 4 * np.eye(4, 16)[y] + np.random.default_rng(1).normal(size=(1600, 16))
    assert np.mean(predict_knn(x[:600], y[:600], x[600:]) == y[600:]) > 0.9
    # Images of one class share their neighbours and get much the same prediction, so a single shuffle says little.
    shuffles = [np.random.default_rng(seed).permutation(y[:600]) for seed in range(20)]
    assert abs(np.mean([predict_knn(x[:600], labels, x[600:]) == y[600:] for labels in shuffles]) - 0.25) < 0.07


def test_an_images_label_does_not_depend_on_the_other_test_images_nor_on_the_order_of_training_images():
    train_x, train_y, test_x, _ = digits()
    together = predict_knn(train_x, train_y, test_x)
    alone = np.concatenate([predict_knn(train_x, train_y, test_x[i : i + 1]) for i in range(20)])
    np.testing.assert_array_equal(alone, together[:20])
    order = np.random.default_rng(0).permutation(len(train_x))
    np.testing.assert_array_equal(predict_knn(train_x[order], train_y[order], test_x), together)


def test_memory_stays_far_below_that_of_all_pairs():
    """16,000 x 8,000 similarities are 512 MB in float32."""
    source = """
import resource, sys
import numpy as np
from ijepa_hf.evaluation.probes.knn import predict_knn
generator = np.random.default_rng(0)
x, y = generator.normal(size=(24_000, 8)).astype(np.float32), generator.integers(0, 3, 16_000)
predict_knn(x[:2000], y[:2000], x[:2000])
open("/proc/self/clear_refs", "w").write("5")  # the peak so far is that of what has been imported
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
predict_knn(x[:16_000], y, x[16_000:])
unit = 1 if sys.platform == "darwin" else 1024
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit / 1e6)
"""
    process = subprocess.run([*warm_python(), "-c", source], capture_output=True, text=True, check=True, timeout=120)
    assert 0 < float(process.stdout) < 200
