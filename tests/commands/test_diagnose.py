"""`ijepa-hf diagnose`: the same verdict as during the run, on models without a run too, with an exit code."""

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import scrambled_model, tiny_run
from transformers import ResNetConfig, ResNetModel, ViTConfig, ViTModel

from ijepa_hf.commands.diagnose import DiagnoseFlags, measure_model
from ijepa_hf.commands.main import main
from ijepa_hf.diagnosis.verdict import judge_collapse
from ijepa_hf.runs.export import export_model

PROCESSOR = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32},
             "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_normalize": True, "do_resize": True}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(tmp_path_factory.mktemp("runs") / "run", diagnostics_steps=2, eval_split_name="test")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (6, 40, 40, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def model_folder(folder: Path, model: Any) -> Path:
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return folder


def test_the_json_holds_the_verdict_and_all_numbers(run: Path, capsys: pytest.CaptureFixture[str]):
    main(["diagnose", str(run), "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert answer["rows"][-1]["step"] == 6
    assert set(answer["verdict"]) == {"name", "step", "numbers", "reason", "advice", "is_failure"}


@pytest.mark.figures
def test_a_run_is_judged_by_its_rows_and_drawn(run: Path, capsys: pytest.CaptureFixture[str]):
    rows = [json.loads(line) for line in (run / "diagnostics.jsonl").read_text().splitlines()]
    verdict = judge_collapse(rows)
    code = main(["diagnose", str(run)])
    text = capsys.readouterr().out
    assert code == (5 if verdict.is_failure else 0)
    assert f"verdict at step 6: {verdict.name}" in text
    assert verdict.reason in text
    assert f"{rows[-1]['context_lidar']:.4g}" in text
    assert f"{rows[-1]['prediction_patch_rankme']:.4g}" in text
    pixels = np.asarray(Image.open(run / "figures" / "diagnostics.png").convert("L"))
    assert pixels.std() > 5


def test_a_run_is_measured_again_on_images_that_are_named(
    run: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
):
    main(["diagnose", str(run), "--json", "--dataset_name", str(pictures), "--split_name", "train"])
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert "step" not in row
    stored = json.loads((run / "diagnostics.jsonl").read_text().splitlines()[-1])
    assert row["loss"] != pytest.approx(stored["loss"], rel=1e-3)


def test_the_same_images_give_the_runs_last_numbers_again(run: Path):
    row = measure_model(str(run), DiagnoseFlags(dataset_name="digits", max_samples=60))
    stored = json.loads((run / "diagnostics.jsonl").read_text().splitlines()[-1])
    # the run scores at most 60 held-out images; both take all of them, but the run's 60 are themselves spread
    assert row["target_patch_normalized_std"] == pytest.approx(stored["target_patch_normalized_std"], rel=0.1)
    assert row["prediction_patch_effective_rank"] == pytest.approx(stored["prediction_patch_effective_rank"], rel=0.2)


def test_a_collapsed_model_folder_gives_exit_code_five(
    tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
):
    model = scrambled_model()
    with torch.no_grad():
        for encoder in (model.target_encoder, model.context_encoder):
            encoder.layernorm.weight.mul_(1e-3)
    folder = tmp_path / "model"
    folder.mkdir()
    export_model(model, folder, step=0, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    code = main(["diagnose", str(folder), "--dataset_name", str(pictures), "--split_name", "train"])
    assert code == 5
    assert "verdict: complete collapse" in capsys.readouterr().out


@pytest.mark.parametrize(
    "model",
    [
        ViTModel(
            ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32,
                      patch_size=8)
        ),
        ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")),
    ],
)  # fmt: skip
def test_any_backbone_is_judged_by_its_own_patches(
    tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str], model: Any
):
    folder = model_folder(tmp_path / "model", model)
    code = main(["diagnose", str(folder), "--dataset_name", str(pictures), "--split_name", "train", "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert code == (5 if answer["verdict"]["is_failure"] else 0)
    (row,) = answer["rows"]
    assert row["target_patch_rankme"] >= 1
    assert "cross_image_gap" not in row


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "name one run or model to diagnose, or give --demo alone"),
        (["RUN", "--demo"], "give --demo alone"),
        (["RUN", "--max_sample", "3"], "did you mean '--max_samples'"),
        (["RUN", "--max_samples", "1", "--dataset_name", "digits"], "max_samples=1 must be at least 2"),
        (["/nowhere/at/all"], "there is no such folder with a config.json"),
        (["RUN", "--output", "x.jpg"], "must end in .png"),
        (["RUN", "--output", "/nowhere/x.png"], "there is no folder"),
        (["RUN", "--output", "x.png", "--dataset_name", "digits"], "has no rows over steps to draw"),
        (["RUN", "--dataset_name", "digits", "--split_name", "dev"], "dev"),
        (["RUN", "--max_samples", "7"], "max_samples=7 is about measuring images, and this run has rows"),
        (["RUN", "--output_dir", "x"], "output_dir='x' is the demo's folder"),
        (["--demo", "--split_name", "x"], "split_name='x' is about measuring a model, and the demo has its own"),
    ],
)
def test_bad_flags_are_refused(run: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str):
    assert main(["diagnose", *(str(run) if flag == "RUN" else flag for flag in flags)]) == 2
    assert message.lower() in capsys.readouterr().err.lower()


def test_a_picture_that_cannot_be_written_is_no_reason_for_no_verdict(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "figures")
    (copy / "figures").write_text("in the way")
    assert main(["diagnose", str(copy)]) in (0, 5)
    text = capsys.readouterr().out
    assert "verdict at step 6" in text
    assert "no picture:" in text


def test_a_model_is_measured_on_its_runs_own_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    images = [
        Image.fromarray(pixels) for pixels in np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), np.uint8)
    ]
    features = datasets.Features({"left": datasets.Image(), "right": datasets.Image()})
    rows = datasets.Dataset.from_dict({"left": images, "right": images[::-1]}, features=features)
    rows.to_parquet(tmp_path / "pairs.parquet")
    run = tiny_run(tmp_path / "run", dataset_name=str(tmp_path / "pairs.parquet"), image_column_name="right")
    assert main(["diagnose", str(run)]) in (0, 5)
    assert "verdict" in capsys.readouterr().out


def test_a_damaged_row_is_named(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    with (copy / "diagnostics.jsonl").open("a") as file:
        file.write("{broken\n")
    assert main(["diagnose", str(copy)]) == 2
    assert "diagnostics.jsonl, line 5 is damaged" in capsys.readouterr().err


def test_a_model_without_a_run_needs_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32)
    folder = model_folder(tmp_path / "model", ViTModel(config))
    assert main(["diagnose", str(folder)]) == 2
    assert "name some with --dataset_name" in capsys.readouterr().err
