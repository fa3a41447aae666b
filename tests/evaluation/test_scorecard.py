import numpy as np
import pytest
import torch
from sklearn.linear_model import RidgeCV
from sklearn.metrics import r2_score
from tiny import scrambled_model, tiny_config

from ijepa_hf.data.sources.builtin import load_digits
from ijepa_hf.evaluation.probes.knn import knn_accuracy
from ijepa_hf.evaluation.scorecard import (
    LOW_SHOT_SAMPLES,
    ScoredImages,
    evaluate_encoder,
    load_evaluation_sets,
    load_scored_images,
    pooled_features,
    score_encoder,
    score_features,
)
from ijepa_hf.recipes.arguments import DataArguments

DIGITS = {"dataset_name": "digits", "eval_split_name": "test", "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


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


def test_raw_pixel_and_encoder_scores_are_those_of_features_computed_by_hand():
    evaluation = load_evaluation_sets(DataArguments(**DIGITS, max_eval_samples=200), tiny_config())
    model = scrambled_model()
    rows = {row["features"]: row for row in score_encoder(model, evaluation, [0.5] * 3, [0.5] * 3, seed=0)}
    parts = []
    for images in (evaluation.train, evaluation.test):
        arrays = np.stack([np.asarray(images[index], dtype=np.float32) for index in range(len(images))])
        parts.append((arrays / 255 - 0.5) / 0.5)
    labels = evaluation.train_labels, evaluation.test_labels
    flat = [part.transpose(0, 3, 1, 2).reshape(len(part), -1) for part in parts]
    assert rows["raw pixels"]["knn"] == knn_accuracy(flat[0], labels[0], flat[1], labels[1], k=20)
    with torch.no_grad():
        encoded = [
            model.target_encoder(torch.from_numpy(part).permute(0, 3, 1, 2)).last_hidden_state.mean(1).numpy()
            for part in parts
        ]
    assert rows["trained encoder"]["knn"] == pytest.approx(
        knn_accuracy(encoded[0], labels[0], encoded[1], labels[1], k=20), abs=0.006
    )


def test_an_untrained_model_scores_as_the_untrained_row_says():
    from ijepa_hf.model.modeling_ijepa import new_model

    evaluation = load_evaluation_sets(DataArguments(**DIGITS, max_eval_samples=150), tiny_config())
    rows = score_encoder(new_model(tiny_config(), 4), evaluation, [0.5] * 3, [0.5] * 3, seed=4)
    assert {**rows[0], "features": ""} == {**rows[1], "features": ""}


def test_the_weights_that_a_run_started_from_stand_beside_the_trained_encoder():
    evaluation = load_evaluation_sets(DataArguments(**DIGITS, max_eval_samples=100), tiny_config())
    model, before = scrambled_model(), scrambled_model(seed=5)
    means = [0.5] * 3, [0.5] * 3
    rows = score_encoder(model, evaluation, *means, seed=0, starting_encoder=before.target_encoder)
    alone = score_encoder(before, evaluation, *means, seed=0)
    assert [row["features"] for row in rows[:2]] == ["trained encoder", "the weights it started from"]
    assert {**rows[1], "features": ""} == {**alone[0], "features": ""}
    assert rows[2:] == alone[1:]


def test_scores_made_while_a_run_goes_on_are_those_of_its_report():
    evaluation = load_evaluation_sets(DataArguments(**DIGITS, max_eval_samples=100), tiny_config())
    model = scrambled_model()
    arguments = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    row = score_encoder(model, evaluation, [0.5] * 3, [0.5] * 3, seed=0)[0]
    scores = evaluate_encoder(model.target_encoder, evaluation, model.config, arguments)
    assert scores == {"knn": row["knn"], "rankme": row["rankme"]}


def test_streamed_splits_are_scored_on_as_many_images_of_each_shard(tmp_path):
    digits = load_digits("train")
    digits = digits.select(np.argsort(digits["label"], kind="stable")[100:200])  # the end of class 0, and class 1
    for split in ("train", "test"):
        for number in range(2):
            part = digits.select(range(50 * number, 50 * (number + 1)))
            part.to_parquet(str(tmp_path / f"{split}-{number:05d}-of-00002.parquet"))
    data = DataArguments(dataset_name=str(tmp_path), eval_split_name="test", streaming=True, max_eval_samples=20)
    evaluation = load_evaluation_sets(data, tiny_config())
    expected = [digits[index]["label"] for index in (*range(10), *range(50, 60))]
    assert evaluation.train_labels.tolist() == evaluation.test_labels.tolist() == expected
    assert np.array_equal(np.asarray(evaluation.test[10]), np.asarray(digits[50]["image"].convert("RGB")))


def test_an_evaluation_split_without_labels_is_refused_with_the_columns(tmp_path):
    from PIL import Image

    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        Image.new("RGB", (32, 32)).save(tmp_path / split / "a.png")
    data = DataArguments(dataset_name=str(tmp_path), eval_split_name="test")
    with pytest.raises(ValueError, match="'train' has no labels .*label_column_name"):
        load_evaluation_sets(data, tiny_config())
    assert load_evaluation_sets(DataArguments(dataset_name=str(tmp_path)), tiny_config()) is None


def test_a_run_takes_held_out_images_of_a_class_that_its_training_images_lack(tmp_path):
    for split, labels in (("train", [7, 3, 7, 3, 7]), ("test", [3, 9, 7])):
        rows = load_digits("test").select(range(len(labels))).remove_columns("label").add_column("label", labels)
        rows.to_parquet(str(tmp_path / f"{split}.parquet"))
    evaluation = load_evaluation_sets(DataArguments(dataset_name=str(tmp_path), eval_split_name="test"), tiny_config())
    assert evaluation.train_labels.tolist() == [1, 0, 1, 0, 1]
    assert evaluation.test_labels.tolist() == [0, 2, 1]
