"""Faults inside a run: numbers that are not finite, disks that are full or gone, memory, two runs in one folder."""

import errno
import json
import os
import re
import shutil
import signal
from functools import partial

import pytest
import torch
from faults import limit_file_size
from forked_runs import ended, exit_code, slow_steps, start_run, steps_logged, wait_until
from tiny import assert_same_run, final_weights, logged, signal_in_step, tiny_flags, tiny_run

from ijepa_hf.data.retrying import DataSourceError
from ijepa_hf.files import SaveError
from ijepa_hf.runs import checkpoints
from ijepa_hf.runs import rows as run_rows
from ijepa_hf.runs.checkpoints import find_latest
from ijepa_hf.training import loop, report
from ijepa_hf.training import state as run_state
from ijepa_hf.training.signals import StoppedBySignal
from ijepa_hf.training.step import NonFiniteLossError

# -- NaN and infinity ------------------------------------------------------------------------------------------------


def spoil(monkeypatch, *steps):
    """Makes the pixels of some steps (from 1 on) NaN."""
    whole, taken = loop._take_step, []

    def take(state, step, micro_batches, values):
        taken.append(step + 1)
        if step + 1 in steps:
            pixels = micro_batches[0].inputs["pixel_values"].float()
            pixels[0, 0, 0, 0] = float("nan")
            micro_batches[0].inputs["pixel_values"] = pixels
        return whole(state, step, micro_batches, values)

    monkeypatch.setattr(loop, "_take_step", take)
    return taken


def test_a_step_that_is_not_finite_changes_nothing_and_the_run_goes_on(tmp_path, monkeypatch, caplog):
    spoil(monkeypatch, 4)
    run = tiny_run(tmp_path / "run", max_train_steps=4, warmup_epochs=0)
    assert "step 4 is skipped: the loss is nan; first not finite: the input pixel_values" in caplog.text
    assert [step for (step,) in logged(run, "step")] == [1, 2, 3]
    rows = [json.loads(line) for line in (run / "skipped_steps.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [4]
    assert json.loads((run / "report.json").read_text())["num_skipped_steps"] == 1
    assert "1 optimiser steps were skipped" in (run / "README.md").read_text()
    monkeypatch.undo()
    # schedules depend on the length of the run, so the twin is the same run before its last step
    twin = tiny_run(tmp_path / "twin", max_train_steps=4, warmup_epochs=0, checkpointing_steps=3)
    before = find_latest(run).path, twin / "checkpoint-3"
    ours, theirs = [checkpoints.load_file(folder / name) for folder in before for name in ("model.safetensors",)]
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_with_skipped_steps_resumes_to_the_bits_of_one_that_was_not_stopped(tmp_path, monkeypatch):
    spoil(monkeypatch, 3, 4)
    whole = tiny_run(tmp_path / "whole", checkpointing_steps=1, checkpoints_total_limit=9)
    for step in (2, 3, 4):
        other = tiny_run(tmp_path / f"{step}", resume_from_checkpoint=whole / f"checkpoint-{step}")
        assert_same_run(other, whole)
        assert (other / "skipped_steps.jsonl").read_text() == (whole / "skipped_steps.jsonl").read_text()


@pytest.mark.parametrize("limit", [0, 1, 2])
def test_one_step_too_many_in_a_row_stops_the_run_with_the_last_good_state_saved(
    finished_run, tmp_path, monkeypatch, limit
):
    taken = spoil(monkeypatch, 4, 5, 6)
    with pytest.raises(NonFiniteLossError) as raised:
        tiny_run(tmp_path / "run", max_skipped_steps=limit, checkpointing_steps=50)
    assert taken == [1, 2, 3, 4, 5, 6][: 4 + limit]
    message = str(raised.value)
    assert f"stopped at step {4 + limit}: the loss is nan" in message
    assert "first in the input pixel_values" in message
    assert "checkpoint-3" in message
    assert "--learning_rate" in message
    monkeypatch.undo()
    assert_same_run(tiny_run(tmp_path / "run", resume_from_checkpoint="latest"), finished_run)


def test_a_restart_does_not_begin_to_count_anew(tmp_path, monkeypatch):
    spoil(monkeypatch, *range(3, 99))
    flags = {"max_train_steps": 12, "max_skipped_steps": 2, "checkpointing_steps": 1}
    with pytest.raises(NonFiniteLossError, match="stopped at step 5: .* in 3 steps in a row"):
        tiny_run(tmp_path / "run", **flags)
    for _ in range(2):
        with pytest.raises(NonFiniteLossError, match="stopped at step 5: .* in 3 steps in a row"):
            tiny_run(tmp_path / "run", **flags, resume_from_checkpoint="latest")


def test_steps_that_are_skipped_now_and_then_do_not_add_up(tmp_path, monkeypatch):
    spoil(monkeypatch, 2, 4, 6)
    run = tiny_run(tmp_path / "run", max_train_steps=7, max_skipped_steps=1)
    assert [step for (step,) in logged(run, "step")] == [1, 3, 5, 7]


def test_the_command_ends_with_code_3_and_one_line(tmp_path):
    log = tmp_path / "log"
    flags = tiny_flags(tmp_path / "run", learning_rate=1e30, warmup_epochs=0, max_train_steps=50)
    process = start_run(flags, log)
    with ended(process):
        assert exit_code(process) == 3, log.read_text()[-2000:]
    said = re.search(r"ijepa-hf pretrain: stopped at step .* in 4 steps in a row, first in the ", log.read_text())
    assert said, log.read_text()[-2000:]
    assert "Traceback" not in log.read_text()


# -- disks -----------------------------------------------------------------------------------------------------------


class DiskFull:
    """Lets writing of weights fail, as a full disk does, at some of the saves."""

    def __init__(self, monkeypatch, *saves):
        self.saves, self.count, whole = saves, 0, checkpoints.save_tensors

        def save_tensors(tensors, path, *args, **options):
            self.count += path.name == checkpoints.MODEL_FILE
            if self.count in self.saves:
                whole(tensors, path, *args, **options)
                with open(path, "r+b") as file:
                    file.truncate(1000)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            return whole(tensors, path, *args, **options)

        monkeypatch.setattr(checkpoints, "save_tensors", save_tensors)


def test_a_full_disk_stops_the_run_with_the_previous_checkpoint_whole_and_one_error(
    finished_run, tmp_path, monkeypatch
):
    DiskFull(monkeypatch, 2)
    with pytest.raises(SaveError) as raised:
        tiny_run(tmp_path / "run")
    message = str(raised.value)
    assert "stopped at step 4 of 6" in message
    assert "No space left on device" in message
    assert re.search(r"\([\d,]+ bytes are needed, [\d,]+ free\)", message), message
    assert "checkpoint-2" in message
    assert find_latest(tmp_path / "run").step == 2
    assert not list((tmp_path / "run").glob(".*partial*"))
    monkeypatch.undo()
    assert_same_run(tiny_run(tmp_path / "run", resume_from_checkpoint="latest"), finished_run)


def test_with_on_save_error_continue_the_run_goes_on_and_the_next_save_is_tried(
    finished_run, tmp_path, monkeypatch, caplog
):
    disk = DiskFull(monkeypatch, 1, 2)
    run = tiny_run(tmp_path / "run", on_save_error="continue")
    assert disk.count == 3
    assert caplog.text.count("The run goes on (on_save_error=continue)") == 2
    assert find_latest(run).step == 6
    assert_same_run(run, finished_run)


def test_with_on_save_error_continue_the_end_of_a_run_is_tried_until_it_is_written(tmp_path, monkeypatch):
    disk = DiskFull(monkeypatch, 3, 4, 5)
    monkeypatch.setattr(run_state, "SAVE_AGAIN_SECONDS", 0.01)
    run = tiny_run(tmp_path / "run", on_save_error="continue")
    assert disk.count == 6
    assert find_latest(run).step == 6
    assert (run / "report.json").is_file()


@pytest.mark.parametrize("on_save_error", ["stop", "continue"])
def test_a_log_that_cannot_be_written_is_treated_likewise_and_loses_no_line(tmp_path, monkeypatch, on_save_error):
    whole, calls = run_rows.append_rows, []

    def append_rows(path, rows):
        if path.name == "metrics.jsonl":
            calls.append(len(rows))
            if len(calls) in (2, 3, 6):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        whole(path, rows)

    monkeypatch.setattr(run_rows, "append_rows", append_rows)
    if on_save_error == "stop":
        with pytest.raises(SaveError, match="stopped at step 2 of 6"):
            tiny_run(tmp_path / "run")
        return
    run = tiny_run(tmp_path / "run", on_save_error="continue")
    assert [step for (step,) in logged(run, "step")] == [1, 2, 3, 4, 5, 6]
    assert calls == [1, 1, 2, 3, 1, 1, 1], "the last one at the end of the run"


def test_a_folder_that_vanishes_is_not_made_again_and_the_command_ends_with_code_8(tmp_path):
    output_dir, log = tmp_path / "run", tmp_path / "log"
    process = start_run(tiny_flags(output_dir, max_train_steps=400), log, prepare=partial(slow_steps, 0.02))
    with ended(process):
        wait_until(lambda: steps_logged(output_dir) >= 4, process)
        output_dir.rename(tmp_path / "elsewhere")
        assert exit_code(process, 30) == 8, log.read_text()[-2000:]
    assert not output_dir.exists()
    assert "Traceback" not in log.read_text()
    assert str(output_dir) in log.read_text().splitlines()[-1]
    assert find_latest(tmp_path / "elsewhere") is not None


def test_a_real_limit_in_the_middle_of_a_file_ends_the_run_with_code_8_and_goes_on_without_it(finished_run, tmp_path):
    output_dir, log = tmp_path / "run", tmp_path / "log"
    size = sum(value.numel() * 4 for value in final_weights(finished_run).values())
    process = start_run(tiny_flags(output_dir), log, prepare=partial(limit_file_size, size // 2))
    with ended(process):
        assert exit_code(process) == 8, log.read_text()[-2000:]
    assert "File too large" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert_same_run(tiny_run(output_dir, resume_from_checkpoint="latest"), finished_run)


def test_a_disk_too_small_for_one_checkpoint_is_found_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ValueError, match="output_dir"):
        tiny_run(tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("on_save_error", ["stop", "continue"])
def test_a_signal_that_finds_the_disk_full_says_so_and_ends_with_code_8(tmp_path, monkeypatch, on_save_error):
    DiskFull(monkeypatch, 1)
    signal_in_step(monkeypatch, 3, signal.SIGUSR1)
    flags = {"checkpointing_steps": 50, "on_save_error": on_save_error}
    expected = pytest.raises(SaveError, match="No space left") if on_save_error == "stop" else pytest.raises(
        StoppedBySignal, match="stopped by SIGUSR1 at step 3 of 6; no checkpoint has been written"
    )  # fmt: skip
    with expected:
        tiny_run(tmp_path / "run", **flags)


def test_of_two_failures_the_disk_is_the_one_that_is_said(tmp_path, monkeypatch):
    DiskFull(monkeypatch, 1)
    fetched = []

    class Failing:
        def __init__(self, loader):
            self.batches = iter(loader)

        def __next__(self):
            fetched.append(True)
            if len(fetched) > 2:
                raise OSError(errno.EIO, "the images are gone")
            return next(self.batches)

        def close(self):
            self.batches.close()

    monkeypatch.setattr(loop, "iter", Failing, raising=False)
    with pytest.raises(SaveError, match="stopped at step 2 of 6: .*No space left"):
        tiny_run(tmp_path / "run")
    assert len(fetched) == 2, "a run that cannot go on asks for no more images"


# -- images that are scored -----------------------------------------------------------------------------------------


def unreadable_from_call(monkeypatch, module, name, call):
    """Lets scoring find a source that has failed for good, from some call on."""
    whole, count = getattr(module, name), iter(range(1, 99))

    def score(*arguments, **options):
        if next(count) >= call:
            raise DataSourceError("image file 'x' cannot be read: Input/output error; tried 3 times")
        return whole(*arguments, **options)

    monkeypatch.setattr(module, name, score)


def test_images_that_can_no_longer_be_scored_stop_the_run_with_its_state_saved(finished_run, tmp_path, monkeypatch):
    flags = {"eval_split_name": "test", "eval_steps": 3, "checkpointing_steps": 50}
    unreadable_from_call(monkeypatch, run_state, "evaluate_encoder", 2)
    with pytest.raises(DataSourceError, match=r"stopped at step 3 of 6: image file 'x' .* The state is in .*point-3;"):
        tiny_run(tmp_path / "run", **flags)
    monkeypatch.undo()
    assert_same_run(tiny_run(tmp_path / "run", **flags, resume_from_checkpoint="latest"), finished_run)


def test_images_that_the_report_cannot_read_are_not_called_a_full_disk(tmp_path, monkeypatch):
    unreadable_from_call(monkeypatch, report, "score_encoder", 1)
    with pytest.raises(DataSourceError, match="image file 'x'"):
        tiny_run(tmp_path / "run", eval_split_name="test")
    monkeypatch.undo()
    run = tiny_run(tmp_path / "run", eval_split_name="test", resume_from_checkpoint="latest")
    assert json.loads((run / "report.json").read_text())["scores"]


# -- memory ----------------------------------------------------------------------------------------------------------


def run_out_of_memory(most):
    """Lets the model run out of memory with more than `most` images, as torch says it."""
    from ijepa_hf.model.modeling_ijepa import IJepaForPretraining

    whole = IJepaForPretraining.forward

    def forward(self, pixel_values, **inputs):
        if self.training and len(pixel_values) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return whole(self, pixel_values, **inputs)

    IJepaForPretraining.forward = forward


def test_where_memory_runs_out_the_command_says_what_fits(tmp_path):
    log = tmp_path / "log"
    process = start_run(tiny_flags(tmp_path / "run"), log, prepare=partial(run_out_of_memory, 5))
    with ended(process):
        assert exit_code(process) == 2, log.read_text()[-2000:]
    assert "per_device_train_batch_size=8 does not fit into the memory of cpu; 4 does" in log.read_text()
    assert "--per_device_train_batch_size 4 --gradient_accumulation_steps 2" in log.read_text()
    assert "Traceback" not in log.read_text()


def test_asked_to_fit_the_batch_a_run_takes_smaller_micro_batches_of_the_same_global_batch(tmp_path):
    log = tmp_path / "log"
    flags = tiny_flags(tmp_path / "run", fit_batch_to_memory=True)
    process = start_run(flags, log, prepare=partial(run_out_of_memory, 5))
    with ended(process):
        assert exit_code(process) == 0, log.read_text()[-2000:]
    assert "taking 2 micro-batches of 4, which is the same global batch" in log.read_text()
    assert "8 = 4 x 2 micro-batches x 1 processes" in log.read_text()
    asked = tiny_run(tmp_path / "asked", per_device_train_batch_size=4, gradient_accumulation_steps=2)
    assert_same_run(tmp_path / "run", asked)
    recorded = json.loads((tmp_path / "run" / "run.json").read_text())["arguments"]
    assert (recorded["per_device_train_batch_size"], recorded["gradient_accumulation_steps"]) == (4, 2)


def test_fitting_a_batch_that_would_change_the_run_is_refused(tmp_path):
    flags = {"masking_strategy": "multi_block_official", "fit_batch_to_memory": True, "official_min_keep": 4}
    with pytest.raises(ValueError, match="fit_batch_to_memory=True would change the run"):
        tiny_run(tmp_path / "run", **flags)


# -- one folder ------------------------------------------------------------------------------------------------------


def test_a_second_run_in_the_same_folder_is_refused_and_harms_nothing(tmp_path):
    output_dir, log = tmp_path / "run", tmp_path / "log"
    flags = tiny_flags(output_dir, max_train_steps=20, resume_from_checkpoint="latest")
    process = start_run(flags, log, prepare=partial(slow_steps, 0.3))
    with ended(process):
        wait_until(lambda: steps_logged(output_dir) >= 3, process)
        second = start_run(flags, tmp_path / "second")
        with ended(second):
            assert exit_code(second, 30) == 2, (tmp_path / "second").read_text()
        assert f"{process.pid}" in (tmp_path / "second").read_text()
        assert "Traceback" not in (tmp_path / "second").read_text()
        assert exit_code(process) == 0
    clean = tiny_run(tmp_path / "clean", max_train_steps=20)
    assert_same_run(output_dir, clean)
    assert not (output_dir / ".lock").exists()


def test_a_folder_whose_run_was_killed_is_free_at_once(tmp_path):
    output_dir, log = tmp_path / "run", tmp_path / "log"
    flags = tiny_flags(output_dir, max_train_steps=4000, resume_from_checkpoint="latest", dataloader_num_workers=1)
    for life in (1, 2):
        process = start_run(flags, log.with_name(f"log-{life}"))
        with ended(process):
            begun = log.with_name(f"log-{life}")
            wait_until(lambda begun=begun: begun.is_file() and "Running training" in begun.read_text(), process)
            wait_until(lambda: steps_logged(output_dir) >= 3, process)
            process.kill()
            process.join()
