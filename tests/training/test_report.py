"""The report: scores that can be checked, rows that keep it honest, and texts that say what was measured."""

import json

import pytest
import torch

from ijepa_hf.training.report import describe_machine, render_report


@pytest.fixture(scope="module")
def report(scored_run):
    return json.loads((scored_run / "report.json").read_text())


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


def test_the_machine_is_said_in_words_and_versions():
    machine = describe_machine(torch.device("cpu"), 2)
    assert machine["device"].startswith("a CPU (")
    assert machine["device"].endswith(", 1 thread")
    assert (machine["processes"], machine["torch"]) == (2, torch.__version__)


def test_the_text_names_scores_winners_pictures_and_three_lines_that_load_it(scored_run, report):
    text = render_report(scored_run)
    for row in report["scores"]:
        assert f"{100 * row['knn']:.1f}" in text
    raw, trained = report["scores"][-1], report["scores"][0]
    assert ("Raw pixels win" in text) == (raw["knn"] > trained["knn"] or raw["linear"] > trained["linear"])
    assert str(scored_run / "figures" / "masks.png") in text
    assert str(scored_run / "figures" / "curves.png") in text
    lines = [line.strip() for line in text.splitlines()[-3:]]
    from PIL import Image

    names = {"image": Image.new("RGB", (40, 40))}
    exec("\n".join(lines), names)
    assert names["features"].shape == (1, 32)
