"""Weighted kNN against a direct computation, and at its limits."""

import math

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from ijepa_hf.evaluation import knn_accuracy


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


def test_a_hot_vote_is_scikit_learns_unweighted_one():
    train_x, train_y, test_x, test_y = digits()
    classifier = KNeighborsClassifier(n_neighbors=9, metric="cosine").fit(train_x, train_y)
    assert knn_accuracy(*digits(), k=9, temperature=1e9) == classifier.score(test_x, test_y)


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
