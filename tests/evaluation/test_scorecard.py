import numpy as np
import pytest
import torch
from sklearn.linear_model import RidgeCV
from sklearn.metrics import r2_score

from ijepa_hf.evaluation.knn import knn_accuracy
from ijepa_hf.evaluation.scorecard import (
    LOW_SHOT_SAMPLES,
    ScoredImages,
    load_scored_images,
    pooled_features,
    score_features,
)
from ijepa_hf.sources import load_digits


def made_up(train: int = 300, test: int = 120, classes: int = 3, numbers: bool = True) -> ScoredImages:
    generator = np.random.default_rng(0)
    labels = [generator.permutation(np.arange(count) % classes) for count in (train, test)]
    values = {
        "count": tuple(generator.integers(2, 7, count).astype(float) for count in (train, test)),
        "nearest_distance": tuple(generator.uniform(5, 60, count) for count in (train, test)),
    }
    pixels = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    return ScoredImages(pixels, pixels, labels[0], labels[1], values if numbers else {})


def noise(count: int, width: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


def test_features_that_hold_the_answers_score_one_and_noise_scores_chance():
    images = made_up()
    answers = []
    for part in (0, 1):
        labels = (images.train_labels, images.test_labels)[part]
        columns = [np.eye(3)[labels] * 5, *(images.numbers[name][part][:, None] for name in images.numbers)]
        answers.append(np.concatenate(columns, axis=1).astype(np.float32))
    scores = score_features(*answers, images)
    assert scores["linear"] == 1
    assert scores["count_r2"] == pytest.approx(1, abs=1e-4)
    assert scores["nearest_distance_r2"] == pytest.approx(1, abs=1e-4)
    assert scores["count"] > 0.95
    blind = score_features(noise(300), noise(120, seed=1), images)
    assert 0.2 < blind["linear"] < 0.5
    assert 0.2 < blind["low_shot"] < 0.5
    assert blind["count_r2"] < 0.1


def test_each_score_is_that_of_the_probe_by_itself():
    images = made_up()
    train_x, test_x = noise(300), noise(120, seed=1)
    train_x[:, 0] += images.train_labels
    test_x[:, 0] += images.test_labels
    train_x[:, 1] += images.numbers["count"][0]
    test_x[:, 1] += images.numbers["count"][1]
    scores = score_features(train_x, test_x, images)
    assert scores["knn"] == knn_accuracy(train_x, images.train_labels, test_x, images.test_labels)
    # another implementation with another choice of the penalty: near, not equal
    ridge = RidgeCV(np.logspace(-3, 3, 13)).fit(train_x, images.numbers["count"][0])
    assert scores["count_r2"] == pytest.approx(r2_score(images.numbers["count"][1], ridge.predict(test_x)), abs=0.02)
    singular = np.linalg.svd(test_x, compute_uv=False)
    shares = singular / singular.sum()
    assert scores["rankme"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-4)


def test_a_low_shot_score_sees_few_labels_only():
    images = made_up(numbers=False)
    train_x, test_x = noise(300, 200), noise(120, 200, seed=1)
    train_x[:, 0] += 1.5 * images.train_labels
    test_x[:, 0] += 1.5 * images.test_labels
    scores = score_features(train_x, test_x, images)
    assert LOW_SHOT_SAMPLES == 10
    assert scores["low_shot"] < scores["linear"]
    assert set(scores) == {"knn", "linear", "low_shot", "rankme"}


def test_digits_are_read_whole_and_resized_and_have_no_numbers():
    images = load_scored_images("digits", (16, 24), max_train=50, max_test=20)
    assert (images.train_pixels.shape, images.test_pixels.shape) == ((50, 3, 16, 24), (20, 3, 16, 24))
    assert images.train_pixels.dtype == torch.uint8
    assert images.numbers == {}
    assert set(images.test_labels) <= set(load_digits("test")["label"])


def test_images_without_labels_are_refused(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        for number in range(3):
            load_digits("train")[number]["image"].save(tmp_path / split / f"{number}.png")
    with pytest.raises(ValueError, match="no labels"):
        load_scored_images(str(tmp_path), (8, 8))


def test_features_are_those_of_one_batch_after_the_other():
    pixels = torch.arange(7 * 3 * 4, dtype=torch.uint8).view(7, 3, 2, 2)
    features = pooled_features(lambda images: images.mean(dim=(2, 3)), pixels, lambda part: part / 255, batch_size=3)
    np.testing.assert_allclose(features, (pixels / 255).mean(dim=(2, 3)).numpy())
