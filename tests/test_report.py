"""The report: scores that can be checked, rows that keep it honest, and texts that say what was measured."""

import json

import numpy as np
import pytest
import torch
from tiny import scrambled_model, tiny_config, tiny_run

from ijepa_hf.arguments import DataArguments
from ijepa_hf.evaluation.knn import knn_accuracy
from ijepa_hf.report import describe_machine, evaluate_encoder, load_evaluation_sets, render_report, score_encoder
from ijepa_hf.sources import load_digits

DIGITS = {"dataset_name": "digits", "eval_split_name": "test", "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("run") / "digits-tiny", eval_split_name="test", max_eval_samples=80)


@pytest.fixture(scope="module")
def report(run):
    return json.loads((run / "report.json").read_text())


def test_rows_are_the_trained_encoder_both_untrained_ones_and_raw_pixels(report):
    assert [row["features"] for row in report["scores"]] == [
        "trained encoder",
        "untrained, patch_init_std 1/sqrt(inputs)",
        "untrained, patch_init_std 0.02",
        "raw pixels",
    ]
    for row in report["scores"]:
        assert 0 <= row["knn"] <= 1
        assert 0 <= row["linear"] <= 1
        assert row["rankme"] >= 1


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
    from ijepa_hf.modeling_ijepa import new_model

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


def test_the_machine_is_said_in_words_and_versions():
    machine = describe_machine(torch.device("cpu"), 2)
    assert machine["device"].startswith("a CPU (")
    assert machine["device"].endswith(", 1 thread")
    assert (machine["processes"], machine["torch"]) == (2, torch.__version__)


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


def test_the_text_names_scores_winners_pictures_and_three_lines_that_load_it(run, report):
    text = render_report(run)
    for row in report["scores"]:
        assert f"{100 * row['knn']:.1f}" in text
    raw, trained = report["scores"][-1], report["scores"][0]
    assert ("Raw pixels win" in text) == (raw["knn"] > trained["knn"] or raw["linear"] > trained["linear"])
    assert str(run / "figures" / "masks.png") in text
    assert str(run / "figures" / "curves.png") in text
    lines = [line.strip() for line in text.splitlines()[-3:]]
    from PIL import Image

    names = {"image": Image.new("RGB", (40, 40))}
    exec("\n".join(lines), names)
    assert names["features"].shape == (1, 32)


def test_an_evaluation_split_without_labels_is_refused_with_the_columns(tmp_path):
    from PIL import Image

    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        Image.new("RGB", (32, 32)).save(tmp_path / split / "a.png")
    data = DataArguments(dataset_name=str(tmp_path), eval_split_name="test")
    with pytest.raises(ValueError, match="'train' has no labels .*label_column_name"):
        load_evaluation_sets(data, tiny_config())
    assert load_evaluation_sets(DataArguments(dataset_name=str(tmp_path)), tiny_config()) is None
