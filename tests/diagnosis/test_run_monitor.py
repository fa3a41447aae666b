"""Rows of a run: when they are taken, what is kept of them, who hears of them, and how a run stops on a collapse."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_runs import run_ranks
from tiny import final_weights, tiny_flags, tiny_model, tiny_run

from ijepa_hf.commands.main import main
from ijepa_hf.diagnosis import run_monitor
from ijepa_hf.diagnosis.monitor import CollapseMonitor, make_monitor_batch
from ijepa_hf.diagnosis.run_monitor import MOST_SHARE, RunDiagnostics, is_due, steps_between
from ijepa_hf.diagnosis.verdict import judge_collapse

COLLAPSING = {"ema_momentum": 0.0, "final_ema_momentum": 0.0, "learning_rate": 0.1, "max_train_steps": 40,
              "checkpointing_steps": 100}  # fmt: skip


def diagnostics(folder: Path) -> RunDiagnostics:
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    monitor = CollapseMonitor(make_monitor_batch(tiny_model().config, images))
    return RunDiagnostics(monitor, folder, num_steps=10)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "diagnostics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("batch", "steps"), [(16, 390), (64, 100), (2048, 100), (1, 6240)])
def test_rows_are_so_seldom_that_their_images_are_a_hundredth_of_the_runs(batch: int, steps: int):
    assert steps_between(batch, 64) == steps
    assert steps_between(batch, 768) == max(steps, 768)
    assert MOST_SHARE * steps * batch >= 1.3 * 48 - 1e-9 or steps == 100


def test_rows_are_due_at_the_first_and_last_step_and_in_between():
    assert [step for step in range(11) if is_due(step, 4, 10)] == [0, 4, 8, 10]
    assert [step for step in range(11) if is_due(step, 0, 10)] == []


def test_a_row_is_kept_told_and_judged(tmp_path: Path):
    told: list[Any] = []
    run = diagnostics(tmp_path)
    model = tiny_model()
    verdict = run.measure(model, 0, 0.0, lambda row, step: told.append((step, row)))
    assert (verdict.name, run.verdict) == ("not judged yet", verdict)
    run.note_step(0.9)
    run.note_step(None)  # the moving average stood still
    run.note_step(0.5)
    run.measure(model, 3, 0.25, lambda row, step: told.append((step, row)))
    first, second = rows_of(tmp_path)
    assert (first["step"], first["progress"], first["ema_expected"]) == (0, 0.0, None)
    assert (second["step"], second["progress"], second["epoch"]) == (3, 0.3, 0.25)
    assert second["ema_expected"] == pytest.approx(1 - 0.9 * 0.5)
    assert [step for step, _ in told] == [0, 3]
    assert told[1][1]["target_patch_rankme"] == second["target_patch_rankme"]
    assert all(isinstance(value, int | float) for value in told[0][1].values())
    run.note_step(None)
    run.measure(model, 4, 0.5, lambda row, step: None)
    assert rows_of(tmp_path)[2]["ema_expected"] is None  # nothing but steps that left the encoders alone


@pytest.mark.figures
def test_features_that_are_no_numbers_do_not_end_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    run, model = diagnostics(tmp_path), tiny_model()
    run.measure(model, 0, 0.0, lambda row, step: None)
    with torch.no_grad():
        model.target_encoder.layernorm.bias.fill_(float("nan"))
    verdict = run.measure(model, 5, 0.5, lambda row, step: None)
    run.draw(model, is_last=True)
    assert verdict is not None
    assert verdict.name == "not judged yet"
    assert len(rows_of(tmp_path)) == 1
    assert "step 5 could not be measured for signs of collapse" in caplog.text
    assert "no pictures of the features" in caplog.text


def test_a_set_that_is_too_small_to_be_measured_is_trained_on_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    run = tiny_run(
        tmp_path / "run", diagnostics_steps=2, max_train_samples=1, per_device_train_batch_size=1, max_train_steps=2
    )
    assert (run / "report.json").exists()
    assert "needs at least 2 images" in caplog.text


def test_a_predictor_warm_up_is_no_stuck_target_encoder(finished_run: Path, tmp_path: Path):
    run = tiny_run(
        tmp_path / "run", diagnostics_steps=2, model_name_or_path=str(finished_run), new_predictor=True,
        predictor_warmup_steps=6, max_train_steps=8, warmup_epochs=0,
    )  # fmt: skip
    verdicts = [judge_collapse(rows_of(run)[: count + 1]).name for count in range(5)]
    assert "EMA stuck" not in verdicts


def test_one_row_a_step_is_no_stuck_target_encoder(tmp_path: Path):
    run = tiny_run(tmp_path / "run", diagnostics_steps=1, max_train_steps=30, final_ema_momentum=0.9999)
    rows = rows_of(run)
    assert not [1 for count in range(2, 31) if judge_collapse(rows[:count]).name == "EMA stuck"]


def test_rows_of_a_run_that_goes_on_are_judged_together(tmp_path: Path):
    diagnostics(tmp_path).measure(tiny_model(), 0, 0.0, lambda row, step: None)
    again = diagnostics(tmp_path)
    assert again.verdict is not None
    assert again.verdict.name == "not judged yet"
    assert again.measure(tiny_model(), 5, 0.5, lambda row, step: None).name != "not judged yet"


@pytest.mark.figures
def test_a_run_leaves_rows_and_pictures_behind(tmp_path: Path):
    run = tiny_run(tmp_path / "run", diagnostics_steps=None)
    assert [row["step"] for row in rows_of(run)] == [0, 6]
    names = {"masks.png", "curves.png", "pca.png", "predictions.png", "spectrum.png", "diagnostics.png"}
    assert {path.name for path in (run / "figures").iterdir()} == names
    report = json.loads((run / "report.json").read_text())
    assert report["collapse_verdict"]["step"] == 6
    assert report["collapse_verdict"]["reason"] in (run / "README.md").read_text()


def test_pictures_before_the_end_wait_until_they_are_a_small_part_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    now = [0.0]
    drawn: list[float] = []
    monkeypatch.setattr(run_monitor.time, "monotonic", lambda: now[0])

    def draw(*_: Any) -> None:
        drawn.append(now[0])
        now[0] += 2.0

    monkeypatch.setattr(run_monitor, "draw_training_figures", draw)
    run, model = diagnostics(tmp_path), tiny_model()
    for moment in (1.0, 49.0, 51.0, 52.0, 99.0, 160.0, 180.0):
        now[0] = max(now[0], moment)
        run.draw(model, is_last=False)
    assert drawn == [51.0, 160.0]  # 2 % of 51 s are a second; after 2 s of drawing, 100 s are needed
    run.draw(model, is_last=True)
    assert drawn[-1] == 180.0


def test_a_training_takes_rows_of_held_out_images_where_there_are_some(tmp_path: Path):
    run = tiny_run(tmp_path / "a", diagnostics_steps=3, eval_split_name="test")
    other = tiny_run(tmp_path / "b", diagnostics_steps=3)
    assert [row["step"] for row in rows_of(run)] == [0, 3, 6]
    assert rows_of(run)[0]["loss"] != rows_of(other)[0]["loss"]  # other images, the same network
    assert rows_of(run)[0]["target_distance"] == 0
    expected = rows_of(run)[1]["ema_expected"]
    momenta = [json.loads(line)["ema_momentum"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert expected == pytest.approx(1 - momenta[0] * momenta[1] * momenta[2])


def test_rows_change_no_bit_of_the_run(finished_run: Path, tmp_path: Path):
    with_rows, without = tiny_run(tmp_path / "a", diagnostics_steps=1), finished_run
    assert not (without / "diagnostics.jsonl").exists()
    ours, theirs = final_weights(with_rows), final_weights(without)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_resumed_run_has_the_rows_of_an_uninterrupted_one(tmp_path: Path):
    whole = tiny_run(tmp_path / "whole", diagnostics_steps=2)
    half = tiny_run(tmp_path / "half", diagnostics_steps=2)
    (half / "report.json").unlink()
    tiny_run(half, diagnostics_steps=2, resume_from_checkpoint=str(half / "checkpoint-4"))
    for one, other in zip(rows_of(whole), rows_of(half), strict=True):
        # the way since the row before is not known to a run that has just begun
        assert {**one, "target_moved": None} == {**other, "target_moved": None}


def test_a_collapse_is_said_and_the_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    flags = tiny_flags(tmp_path / "run", diagnostics_steps=5, **COLLAPSING)
    assert main(["pretrain", *flags]) == 0
    # which of the two it is hangs on the last bits of so wild a training
    assert re.search("verdict: (complete|dimensional) collapse", capsys.readouterr().out)
    assert (tmp_path / "run" / "report.json").exists()


def test_a_collapse_stops_the_run_where_that_is_asked_for_with_a_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    flags = tiny_flags(tmp_path / "run", diagnostics_steps=5, on_collapse="stop", **COLLAPSING)
    assert main(["pretrain", *flags]) == 5
    message = capsys.readouterr().err
    assert "ijepa-hf pretrain: stopped at step" in message
    assert "--learning_rate" in message
    step = rows_of(tmp_path / "run")[-1]["step"]
    assert step < 40
    assert (tmp_path / "run" / f"checkpoint-{step}").is_dir()
    assert not (tmp_path / "run" / "report.json").exists()
    assert main(["diagnose", str(tmp_path / "run")]) == 5


def test_all_ranks_stop_on_a_collapse_that_one_has_measured(tmp_path: Path):
    flags = tiny_flags(
        tmp_path / "run", **COLLAPSING, diagnostics_steps=5, on_collapse="stop", per_device_train_batch_size=4
    )
    said = run_ranks(2, flags, tmp_path / "log", code=5)
    assert said.count("stopped at step") >= 2  # on both ranks
    step = rows_of(tmp_path / "run")[-1]["step"]
    assert (tmp_path / "run" / f"checkpoint-{step}" / "checkpoint.json").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [({"on_collapse": "cry"}, "on_collapse='cry' must be 'warn' or 'stop'"),
     ({"diagnostics_steps": -1}, "diagnostics_steps=-1 must be at least 0"),
        ({"diagnostics_steps": 0, "on_collapse": "stop"}, "on_collapse='stop' needs measurements")],
)  # fmt: skip
def test_bad_flags_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: Any, message: str):
    assert main(["pretrain", *tiny_flags(tmp_path / "run", **flags)]) == 2
    assert message in capsys.readouterr().err
