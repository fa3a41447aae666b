"""What a fine-tuning says at its end: its interval, and which of its accuracies is the result."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image

from ijepa_hf.data.labelled import LabelledSplits
from ijepa_hf.data.reading import ImageRows
from ijepa_hf.data.sources.builtin import load_digits
from ijepa_hf.finetuning.report import draw_finetuning_curves, finetuning_result, render_finetuning
from ijepa_hf.runs.cards import render_classifier_card


@pytest.fixture(scope="module")
def result():
    """Of three epochs of two steps on four digits, scored with eight: the second epoch was the best."""
    rows = ImageRows(load_digits("test").select(range(8)), "image", 3)
    labels = np.arange(8) % 2
    splits = LabelledSplits(
        ImageRows(load_digits("train").select(range(4)), "image", 3), labels[:4], rows, labels, list("ab"), "label"
    )
    history = []
    for epoch, accuracy in enumerate((0.25, 0.875, 0.75), start=1):
        history.append({"epoch": epoch, "step": 2 * epoch, "loss": 1 / epoch})
        history.append({"epoch": epoch, "step": 2 * epoch, "eval_accuracy": accuracy, "eval_loss": 0.5})
    history.append({"epoch": 3, "step": 6, "train_runtime": 1.0})
    values = {
        "model": "me/base", "dataset_name": "me/birds", "eval_split_name": "test", "output_dir": "runs/owls",
        "from_scratch": False, "freeze_encoder": True,
    }  # fmt: skip
    state = SimpleNamespace(log_history=history, global_step=6)
    found = finetuning_result(state, splits, values, np.array([2, 7]), seconds=2.0, resumed_from=None)
    return {"license": "mit", "license_is_known": True, "model_commit": "abc123", **found}


def test_the_last_accuracy_is_the_result_and_not_the_best(result):
    assert (result["accuracy"], result["num_correct"], result["num_eval_images"]) == (0.75, 6, 8)
    assert result["wrong_images"] == [2, 7]
    assert result["accuracy_interval"] == pytest.approx([0.40928, 0.92852], abs=1e-5)  # Wilson's, 95 %
    assert [row["accuracy"] for row in result["evaluations"]] == [0.25, 0.875, 0.75]
    assert result["losses"] == [{"step": 2, "loss": 1.0}, {"step": 4, "loss": 1 / 2}, {"step": 6, "loss": 1 / 3}]
    assert (result["num_train_images"], result["classes"], result["steps"]) == (4, ["a", "b"], 6)


def test_the_card_and_the_printed_text_say_the_same_accuracy_start_and_number_of_images(result, tmp_path):
    (tmp_path / "finetune.json").write_text(json.dumps(result))
    card, printed = render_classifier_card(result), render_finetuning(tmp_path)
    said = (
        "op-1 75.0 % (40.9 to 92.9, 95 % interval) of 8 held-out images, from pretrained weights, the encoder frozen, "
        "with 4 labelled images of 2 classes"
    )
    assert said in card
    assert said in printed
    data = ModelCard(card).data
    assert (data.base_model, data.license, data.eval_results[0].metric_value) == ("me/base", "mit", 0.75)
    assert "`me/base` (commit `abc123`), fine-tuned on `birds`" in card
    assert "licence" not in printed
    unknown = {**result, "license": None, "license_is_known": False}
    assert "Licence: that of `me/base` could not be read" in render_classifier_card(unknown)


def test_the_curves_are_a_picture(result, tmp_path):
    draw_finetuning_curves(result, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as curves:
        assert curves.size == (1050, 420)
        assert len(curves.convert("RGB").getcolors(2**20)) > 10
