"""The examples run as they stand, in processes of their own, on a tiny model."""

import re
import subprocess
from pathlib import Path

import pytest
import transformers
from packaging.version import Version
from tiny import scrambled_model
from warm_python import warm_python

from ijepa_hf.data.sources.builtin import load_digits
from ijepa_hf.data.sources.shapes import draw_shape_scene
from ijepa_hf.runs.export import export_model

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
WITHOUT_PACKAGE = (
    "import runpy, sys; sys.modules['ijepa_hf'] = None; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
)


@pytest.fixture
def model(tmp_path):
    export_model(
        scrambled_model(), tmp_path / "model", step=1, image_mean=(0.485, 0.456, 0.406),
        image_std=(0.229, 0.224, 0.225),
    )  # fmt: skip
    return str(tmp_path / "model")


def run(environment, *command):
    done = subprocess.run(
        [*warm_python(package=False), *command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.18"), reason="AutoImageProcessor needs torchvision there"
)
def test_finetune_needs_no_ijepa_hf_and_its_classifier_has_the_accuracy_that_it_prints(
    model, tmp_path, child_environment
):
    digits = {split: load_digits(split).select(range(count)) for split, count in (("train", 64), ("test", 40))}
    for split, rows in digits.items():
        for number, row in enumerate(rows):
            (tmp_path / "pictures" / split / str(row["label"])).mkdir(parents=True, exist_ok=True)
            row["image"].save(tmp_path / "pictures" / split / str(row["label"]) / f"{number}.png")
    output = run(
        child_environment, "-c", WITHOUT_PACKAGE, str(EXAMPLES / "finetune.py"), model, str(tmp_path / "pictures"),
        str(tmp_path / "classifier"), "--epochs", "4",
    )  # fmt: skip
    printed = re.fullmatch(r"top-1 ([\d.]+) % of 40 held-out images", output.strip().splitlines()[-1])
    classify = transformers.pipeline("image-classification", model=str(tmp_path / "classifier"))
    answers = classify([row["image"].convert("RGB") for row in digits["test"]])
    right = sum(answer[0]["label"] == str(row["label"]) for answer, row in zip(answers, digits["test"], strict=True))
    assert float(printed[1]) == pytest.approx(100 * right / 40)


def test_segment_prints_three_rows_and_the_background_row_is_its_share_of_the_pixels(model, child_environment):
    output = run(
        child_environment,
        str(EXAMPLES / "segment.py"),
        model,
        "--num_train",
        "40",
        "--num_test",
        "20",
        "--steps",
        "30",
    )
    rows = dict(re.findall(r"^(\w[\w ]*\w) +mIoU ([\d.]+) %$", output, flags=re.MULTILINE))
    assert list(rows) == ["trained encoder", "new weights", "background alone"]
    # all pixels called background: its intersection over union is its share, that of the others is 0
    maps = [draw_shape_scene(1, index, 32).segmentation for index in range(20)]
    share = sum((drawn == 0).mean() for drawn in maps) / len(maps)
    assert float(rows["background alone"]) == pytest.approx(100 * share / 6, abs=0.051)
    assert 0 < float(rows["trained encoder"]) < 100
