"""The demo, shortened: two trainings in processes of their own, both verdicts, one picture."""

from pathlib import Path
from typing import Any

import pytest
from forked_runs import start_run
from PIL import Image

from ijepa_hf.commands.main import main
from ijepa_hf.diagnosis import demo
from ijepa_hf.recipes.parsing import as_flags


def start_forked(folder: Path, values: dict[str, Any]) -> Any:
    """A training as the demo starts it, but forked: Python's start takes longer than so few steps."""
    folder.mkdir(parents=True)
    process: Any = start_run(["--output_dir", str(folder), *as_flags(values)], folder.with_suffix(".log"))
    process.poll, process.wait = lambda: process.exitcode, process.join
    return process


@pytest.mark.figures
def test_the_twins_get_two_verdicts_and_one_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    short = {"max_train_steps": 60, "max_train_samples": 128, "warmup_epochs": 1, "diagnostics_steps": 15}
    monkeypatch.setattr(demo, "_RUN", {**demo._RUN, **short})
    # a collapse of so short a run hangs on the last bits; a target encoder that never moves is found in any case
    monkeypatch.setattr(demo, "_start", start_forked)
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


def test_a_training_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(demo, "_RUN", {**demo._RUN, "patch_size": 7})
    with pytest.raises(RuntimeError, match=r"failed with exit code 2:\n[\s\S]*patch_size"):
        demo.run_demo(tmp_path / "demo")
