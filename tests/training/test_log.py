"""The log of a run: one line for each logged step, for the file, the screen and the trackers."""

import json
import logging
import time

import pytest
import torch
from accelerate import Accelerator

from ijepa_hf.diagnosis.measures import feature_std, rankme
from ijepa_hf.recipes.arguments import PretrainingArguments
from ijepa_hf.training.log import Clock, MetricsLog, evaluation_line, log_line
from ijepa_hf.training.plan import StepValues, make_plan
from ijepa_hf.training.step import StepResult


@pytest.fixture
def plan():
    run = PretrainingArguments(learning_rate=1e-3, per_device_train_batch_size=8, max_train_steps=20)
    return make_plan(run, num_samples=80, num_ranks=1)


def write_one(log, step=5, seconds=2.0):
    clock = log.clock
    clock.steps, clock.waited, clock.since = 4, 0.5, time.perf_counter() - seconds
    targets = torch.randn(2, 4, 3, 16, generator=torch.Generator().manual_seed(0))
    row = log.write(step, StepResult(0.25, 1.0, 2.0, targets), StepValues(1e-3, 0.04, 0.996))
    return row, targets


def test_a_line_holds_the_step_its_values_and_the_targets_spectrum(tmp_path, plan):
    log = MetricsLog(Accelerator(cpu=True), plan, tmp_path, [], {})
    row, targets = write_one(log)
    log.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == row
    assert (row["step"], row["epoch"], row["loss"]) == (5, 0.5, 0.25)
    assert (row["learning_rate"], row["weight_decay"], row["ema_momentum"]) == (1e-3, 0.04, 0.996)
    assert (row["grad_norm_encoder"], row["grad_norm_predictor"]) == (1.0, 2.0)
    assert row["target_std"] == feature_std(targets.flatten(0, 2))
    assert row["target_rankme"] == rankme(targets.flatten(0, 2))
    assert row["seconds"] == pytest.approx(2.0, abs=0.5)
    assert row["images_per_second"] == pytest.approx(4 * 8 / row["seconds"])
    assert row["data_wait_share"] == pytest.approx(0.5 / row["seconds"])
    assert "step 5 loss 0.2500" in log_line(row)


def test_time_spent_on_saving_is_no_training_time():
    clock = Clock()
    clock.since -= 10.0
    with clock.stopped():
        clock_before = clock.since
    assert clock.since >= clock_before
    seconds = clock.read(8)["seconds"]
    assert seconds == pytest.approx(10.0, abs=0.5)
    assert clock.read(8)["seconds"] < 1.0  # it starts again


class Broken:
    name = "broken"

    def log(self, *_args, **_keywords):
        raise RuntimeError("the network is down")

    def finish(self):
        raise RuntimeError("still down")


def test_a_tracker_that_fails_is_dropped_with_a_warning_and_the_file_goes_on(tmp_path, plan, caplog):
    log = MetricsLog(Accelerator(cpu=True), plan, tmp_path, [], {})
    log.trackers = [Broken()]
    with caplog.at_level(logging.WARNING):
        write_one(log, step=1)
        write_one(log, step=2)
    assert caplog.text.count("tracker broken failed at step 1 and is dropped") == 1
    assert log.trackers == []
    log.trackers = [Broken()]
    with caplog.at_level(logging.WARNING):
        log.close()
    assert "failed to finish" in caplog.text
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]


def test_scores_before_the_first_step_say_so():
    assert evaluation_line({"step": 0, "knn": 0.25, "rankme": 3.0}).startswith("step 0 kNN 25.0 (before training)")
    assert "before" not in evaluation_line({"step": 9, "knn": 0.25, "rankme": 3.0})
