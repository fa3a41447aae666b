"""The loop: groups, plan, log, folder, and every mistake found before work starts."""

import json
import shutil

import pytest
import torch
from accelerate import Accelerator
from tiny import final_weights, logged, tiny_config, tiny_run

from ijepa_hf.runs.export import CODE_FILES, exported_step
from ijepa_hf.training import pretrain
from ijepa_hf.training.report import render_report


@pytest.fixture
def run(finished_run):
    return finished_run


# -- what a run leaves behind ----------------------------------------------------------------------------------------


def test_a_run_leaves_behind_what_the_documents_say(run):
    entries = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    expected = {"config.json", "model.safetensors", "preprocessor_config.json", "README.md", "metrics.jsonl"}
    expected |= {"run.json", "report.json", "pretraining/config.json", "pretraining/model.safetensors"}
    expected |= {"figures/masks.png", "figures/curves.png", "recipe.yaml", *CODE_FILES}
    expected |= {
        f"checkpoint-{step}/{name}"
        for step in (4, 6)
        for name in ("checkpoint.json", "model.safetensors", "optimizer.safetensors")
    }
    assert entries == expected
    assert exported_step(run) == 6
    assert all((run / "figures" / f"{name}.png").stat().st_size > 10_000 for name in ("masks", "curves"))


def test_metrics_have_a_line_each_with_every_promised_number(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    promised = {"step", "epoch", "loss", "learning_rate", "weight_decay", "ema_momentum", "grad_norm_encoder"}
    promised |= {
        "grad_norm_predictor",
        "seconds",
        "images_per_second",
        "data_wait_share",
        "target_std",
        "target_rankme",
    }
    for row in rows:
        assert set(row) == promised
        assert 0 <= row["data_wait_share"] <= 1
        assert 1 <= row["target_rankme"] <= 32
    assert rows[0]["loss"] != rows[-1]["loss"]


def test_logging_steps_thin_the_log_but_keep_first_and_last(tmp_path):
    run = tiny_run(tmp_path / "run", logging_steps=4)
    assert [step for (step,) in logged(run, "step")] == [1, 4, 6]


def test_going_on_from_an_older_checkpoint_drops_what_came_after_it(tmp_path, run):
    again = shutil.copytree(run, tmp_path / "again")
    (again / "report.json").unlink()
    tiny_run(again, resume_from_checkpoint=again / "checkpoint-4", checkpoints_total_limit=1)
    assert [path.name for path in again.glob("checkpoint-*")] == ["checkpoint-6"]
    assert logged(again, "step", "loss") == logged(run, "step", "loss")
    assert all(torch.equal(value, final_weights(run)[name]) for name, value in final_weights(again).items())


def test_a_run_started_in_a_new_folder_from_the_last_checkpoint_reports_the_log_that_came_with_it(tmp_path, run):
    other = tiny_run(tmp_path / "other", resume_from_checkpoint=run / "checkpoint-6")
    assert logged(other, "step", "loss") == logged(run, "step", "loss")
    orphan = shutil.copytree(run / "checkpoint-6", tmp_path / "moved" / "checkpoint-6")  # no log beside it
    assert "log of this run was lost" in render_report(tiny_run(tmp_path / "third", resume_from_checkpoint=orphan))


def test_a_finished_run_whose_export_was_lost_is_not_trained_again(tmp_path, run):
    again = shutil.copytree(run, tmp_path / "again")
    (again / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="Add --resume_from_checkpoint latest"):
        tiny_run(again)
    tiny_run(again, resume_from_checkpoint="latest")
    assert exported_step(again) == 6
    assert all(torch.equal(value, final_weights(run)[name]) for name, value in final_weights(again).items())


def test_another_global_batch_is_another_run_and_for_official_masks_another_device_batch_too(tmp_path, run):
    with pytest.raises(ValueError, match="global_batch_size is 8 there, 4 here"):
        tiny_run(run, per_device_train_batch_size=4, warmup_epochs=0.125)
    flags = {"masking_strategy": "multi_block_official", "official_min_keep": 4, "context_keep_ratio": None}
    official = tiny_run(tmp_path / "official", **flags)
    with pytest.raises(ValueError, match="per_device_train_batch_size is 8 there, 4 here"):
        tiny_run(official, **flags, per_device_train_batch_size=4, gradient_accumulation_steps=2)


def test_an_image_that_cannot_be_used_is_found_before_the_old_run_is_deleted(tmp_path, run):
    again = shutil.copytree(run, tmp_path / "again")
    flags = {"num_channels": 6, "image_mean": [0.5] * 6, "image_std": [0.5] * 6}
    with pytest.raises(ValueError, match="num_channels=6"):
        tiny_run(again, overwrite_output_dir="true", **flags)
    assert exported_step(again) == 6


def test_a_finished_run_prints_its_report_again_and_does_nothing_else(run, capsys):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    tiny_run(run, resume_from_checkpoint="latest")
    text = capsys.readouterr().out
    assert "holds this run, finished" in text
    assert "loss" in text
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before


def test_bfloat16_and_gradient_checkpointing_train_to_nearly_the_same_loss(run, tmp_path):
    reference = logged(run, "loss")[-1][0]
    half = tiny_run(tmp_path / "half", mixed_precision="bf16", attn_implementation="eager")
    assert logged(half, "loss")[-1][0] == pytest.approx(reference, rel=0.05)
    saving = tiny_run(tmp_path / "saving", gradient_checkpointing="true")
    assert all(torch.equal(value, final_weights(run)[name]) for name, value in final_weights(saving).items())
    selective = tiny_run(tmp_path / "selective", selective_checkpointing="true")
    assert all(torch.equal(value, final_weights(run)[name]) for name, value in final_weights(selective).items())


def test_an_export_cut_short_is_written_again_from_the_checkpoint(finished_run, tmp_path):
    run = shutil.copytree(finished_run, tmp_path / "run")
    expected = final_weights(run)
    (run / "report.json").unlink()
    (run / "pretraining" / "model.safetensors").write_bytes(b"half")
    tiny_run(run, resume_from_checkpoint="latest")
    assert exported_step(run) == 6
    assert all(torch.equal(value, expected[name]) for name, value in final_weights(run).items())


def test_latest_on_an_empty_folder_starts_at_the_beginning_and_says_so(tmp_path, caplog):
    run = tiny_run(tmp_path / "run", resume_from_checkpoint="latest", max_train_steps=4)
    assert "holds no checkpoint; starting at step 0" in caplog.text
    assert [step for (step,) in logged(run, "step")] == [1, 2, 3, 4]


def test_overwriting_deletes_the_other_run_and_nothing_else(finished_run, tmp_path):
    run = shutil.copytree(finished_run, tmp_path / "run")
    (run / "mine.txt").write_text("precious")
    tiny_run(run, max_train_steps=2, warmup_epochs=0, overwrite_output_dir="true")
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-2"]
    assert (run / "mine.txt").read_text() == "precious"
    assert [step for (step,) in logged(run, "step")] == [1, 2]


class FailingTracker:
    name = "failing"

    def log(self, values, step):
        raise OSError("the network is down")


class FailingAtTheEnd:
    name = "late"
    logged = 0

    def log(self, values, step):
        FailingAtTheEnd.logged += 1

    def finish(self):
        raise OSError("the network is down again")


def test_a_tracker_that_fails_is_dropped_with_a_warning_and_the_run_goes_on(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(
        Accelerator, "init_trackers", lambda self, *_: setattr(self, "trackers", [FailingTracker(), FailingAtTheEnd()])
    )
    monkeypatch.setattr(pretrain, "make_accelerator", lambda *_: Accelerator(cpu=True))
    run = tiny_run(tmp_path / "run", report_to="tensorboard")
    assert len(logged(run, "step")) == 6
    assert caplog.text.count("tracker failing failed at step 1 and is dropped: the network is down") == 1
    assert FailingAtTheEnd.logged == 6
    assert "tracker late failed to finish: the network is down again" in caplog.text


# -- mistakes --------------------------------------------------------------------------------------------------------

MISTAKES = [
    ({"image_size": 30}, "image_size=30"),
    ({"context_keep_ratio": 0.95}, "context_keep_ratio"),
    ({"per_device_train_batch_size": 65}, "64 images, fewer than one global batch of 65"),
    ({"image_column_name": "photo"}, "image_column_name='photo' is no column .*'image'"),
    ({"train_split_name": "validation"}, "no split 'validation'"),
    ({"eval_split_name": "validation"}, "no split 'validation'"),
    ({"report_to": "notatracker"}, "report_to='notatracker' is no tracker that is installed here"),
    ({"warmup_epochs": 1}, "warmup_epochs=1 are 8 steps, but the run has only 6"),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES)
def test_a_mistake_is_found_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_run(tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_a_missing_checkpoint_and_another_models_checkpoint_are_refused(run, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        tiny_run(tmp_path / "run", resume_from_checkpoint=tmp_path / "checkpoint-9")
    with pytest.raises(ValueError, match="another model's: hidden_size is 32 there, 48 here"):
        tiny_run(tmp_path / "run", hidden_size=48, resume_from_checkpoint=run / "checkpoint-4")
    assert not (tmp_path / "run").exists()


def test_resuming_with_other_arguments_is_said_and_beyond_the_end_refused(run, tmp_path, caplog):
    tiny_run(tmp_path / "run", resume_from_checkpoint=run / "checkpoint-4", learning_rate=5e-4)
    assert (
        "resuming with other arguments than the checkpoint's: learning_rate is 0.001 there, 0.0005 here" in caplog.text
    )
    with pytest.raises(ValueError, match="is at step 4, but this run ends at step 3"):
        tiny_run(tmp_path / "other", resume_from_checkpoint=run / "checkpoint-4", max_train_steps=3)
    with pytest.raises(ValueError, match="overwrite_output_dir would delete resume_from_checkpoint"):
        tiny_run(run, resume_from_checkpoint=run / "checkpoint-4", overwrite_output_dir="true")
    assert (run / "checkpoint-4").is_dir()


def test_a_folder_of_another_run_of_something_else_or_of_this_run_unfinished_is_refused(run, tmp_path):
    before = final_weights(run)
    with pytest.raises(ValueError, match=r"holds another run: seed is 0 there, 1 here.*--overwrite_output_dir"):
        tiny_run(run, seed=1)
    assert all(torch.equal(value, before[name]) for name, value in final_weights(run).items())
    (tmp_path / "thesis.tex").write_text("precious")
    for overwrite in ("false", "true"):
        with pytest.raises(ValueError, match="is not empty and holds no run of ijepa-hf"):
            tiny_run(tmp_path, overwrite_output_dir=overwrite)
    other = tiny_run(tmp_path / "other", max_train_steps=4)
    (other / "report.json").unlink()
    with pytest.raises(ValueError, match=r"holds this run, unfinished\. Add --resume_from_checkpoint latest"):
        tiny_run(other, max_train_steps=4)


def test_the_configuration_of_a_run_is_the_arguments_own(run):
    config = json.loads((run / "pretraining" / "config.json").read_text())
    assert config["hidden_size"] == tiny_config().hidden_size
    assert config["architectures"] == ["IJepaForPretraining"]
