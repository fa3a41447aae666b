"""The demo, shortened: two trainings in processes of their own, both verdicts, one picture."""

import sys
from pathlib import Path

import pytest
from PIL import Image
from warm_python import warm_executable

from ijepa_hf.commands.main import main
from ijepa_hf.diagnosis import demo

REAL = pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.slow)])  # interpreters


@pytest.mark.figures
@REAL
def test_the_twins_get_two_verdicts_and_one_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, real: bool
):
    short = {"max_train_steps": 60, "max_train_samples": 128, "warmup_epochs": 1, "diagnostics_steps": 15}
    monkeypatch.setattr(demo, "_RUN", {**demo._RUN, **short})
    # a collapse of so short a run hangs on the last bits; a target encoder that never moves is found in any case
    if not real:
        monkeypatch.setattr(sys, "executable", warm_executable(tmp_path))
    monkeypatch.setitem(demo.TWINS, "collapsing", {"ema_momentum": 1.0, "final_ema_momentum": 1.0})
    folder = tmp_path / "demo"
    assert main(["diagnose", "--demo", "--output_dir", str(folder)]) == 0
    text = capsys.readouterr().out
    assert "--ema_momentum=1.0 --final_ema_momentum=1.0" in text
    healthy, collapsing = text.split("\nhealthy")[1].split("\ncollapsing")
    assert "collapse:" not in healthy
    assert "EMA stuck:" in collapsing
    assert f"picture: {folder / 'collapse.png'}" in text
    with Image.open(folder / "collapse.png") as picture:
        assert picture.size[0] > 1000


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "thesis.txt").write_text("precious")
    assert main(["diagnose", "--demo", "--output_dir", str(tmp_path)]) == 2
    assert "holds files that no demo wrote" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "precious"


@REAL
def test_a_training_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, real: bool):
    if not real:
        monkeypatch.setattr(sys, "executable", warm_executable(tmp_path))
    monkeypatch.setattr(demo, "_RUN", {**demo._RUN, "patch_size": 7})
    with pytest.raises(RuntimeError, match=r"failed with exit code 2:\n[\s\S]*patch_size"):
        demo.run_demo(tmp_path / "demo")
