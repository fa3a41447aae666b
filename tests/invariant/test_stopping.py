"""What may stop a run at any moment: `kill -9`, a scheduler's signals, Ctrl-C, the loss of another process."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from forked_runs import (
    alive,
    children_of,
    ended,
    exit_code,
    newest_checkpoint,
    slow_steps,
    start_ranks,
    start_run,
    steps_logged,
    wait_until,
)
from tiny import assert_same_run, logged, tiny_flags, tiny_run

from ijepa_hf.runs.checkpoints import find_latest

ROOT = Path(__file__).resolve().parents[2]
LOGGED = ("step", "loss", "learning_rate", "grad_norm_encoder", "target_rankme")
STEPS = {"max_train_steps": 60, "checkpointing_steps": 3}
ENDLESS = {"max_train_steps": 100_000, "checkpointing_steps": 50_000, "logging_steps": 5}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("whole") / "run", **STEPS, hidden_dropout_prob=0.1)


def wait_for_a_checkpoint_after(step, output_dir, process):
    wait_until(lambda: newest_checkpoint(output_dir) > step or not process.is_alive())


def kill_at_random(output_dir, log, kills, seconds, seed, **changes):
    """Starts a run over and over, kills it at a random moment, then lets it end; returns how often it was killed."""
    draw = random.Random(seed)
    killed = 0
    while killed < kills:
        flags = tiny_flags(output_dir, resume_from_checkpoint="latest", dataloader_num_workers=killed % 3, **changes)
        before = newest_checkpoint(output_dir)
        process = start_run(flags, log)
        with ended(process):
            if killed % 2:  # in the midst of training and saving
                wait_for_a_checkpoint_after(before, output_dir, process)
                process.join(draw.uniform(0.0, 0.2))
            else:  # also before the first step
                process.join(draw.uniform(0.0, seconds))
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
                assert exit_code(process) == -signal.SIGKILL, log.read_text()[-2000:]
                killed += 1
            else:
                assert exit_code(process) == 0, log.read_text()[-2000:]
                break
    last = start_run(tiny_flags(output_dir, resume_from_checkpoint="latest", **changes), log)
    assert exit_code(last, 200) == 0, log.read_text()[-2000:]
    return killed


def test_a_run_killed_five_times_at_random_moments_has_the_bits_of_a_whole_one(uninterrupted, tmp_path):
    killed = kill_at_random(tmp_path / "run", tmp_path / "log", 5, 1.2, seed=0, **STEPS, hidden_dropout_prob=0.1)
    assert killed == 5
    assert_same_run(tmp_path / "run", uninterrupted, *LOGGED)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_killed_fifty_times_at_random_moments_has_the_bits_of_a_whole_one(tmp_path):
    steps = {"max_train_steps": 1500, "checkpointing_steps": 3, "logging_steps": 10}
    whole = tiny_run(tmp_path / "whole", **steps)
    assert kill_at_random(tmp_path / "run", tmp_path / "log", 50, 2.5, seed=1, **steps) == 50
    assert_same_run(tmp_path / "run", whole, *LOGGED)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_ends_the_step_saves_the_state_and_has_its_own_exit_status(uninterrupted, tmp_path, name, workers):
    number, output_dir, log = getattr(signal, name), tmp_path / "run", tmp_path / "log"
    flags = tiny_flags(
        output_dir, hidden_dropout_prob=0.1, dataloader_num_workers=workers, **{**STEPS, "checkpointing_steps": 50}
    )
    process = start_run(flags, log, prepare=partial(slow_steps, 0.03))
    with ended(process):
        wait_until(lambda: steps_logged(output_dir) >= 4, process)
        workers_of_it = children_of(process.pid)
        assert len(workers_of_it) >= workers
        begin = time.monotonic()
        os.kill(process.pid, number)
        assert exit_code(process, 30) == 128 + number, log.read_text()[-2000:]
        assert time.monotonic() - begin < 30
        wait_until(lambda: not alive(workers_of_it))
    said = re.search(rf"stopped by {name} at step (\d+) of 60; the state is in (\S+);", log.read_text())
    assert said, log.read_text()[-2000:]
    checkpoint = find_latest(output_dir)
    assert checkpoint.step == int(said[1]) >= 4
    assert checkpoint.path == Path(said[2])
    assert len(logged(output_dir, "step")) == checkpoint.step, "the step that was under way is logged too"
    if workers == 0:
        tiny_run(output_dir, hidden_dropout_prob=0.1, resume_from_checkpoint="latest", **STEPS)
        assert_same_run(output_dir, uninterrupted, *LOGGED)


def test_a_signal_that_all_processes_of_a_run_get_stops_it_as_well_as_one_to_it_alone(tmp_path):
    output_dir, log = tmp_path / "run", tmp_path / "log"
    process = start_run(tiny_flags(output_dir, dataloader_num_workers=2, **ENDLESS), log, prepare=os.setsid)
    with ended(process):
        wait_until(lambda: steps_logged(output_dir) >= 5, process)
        os.killpg(process.pid, signal.SIGTERM)
        assert exit_code(process, 30) == 143, log.read_text()[-2000:]
    assert "stopped by SIGTERM" in log.read_text()
    assert find_latest(output_dir).step >= 5


def test_the_death_of_accelerate_launch_stops_the_run_that_it_started_with_the_state_saved(
    tmp_path, child_environment
):
    output_dir = tmp_path / "run"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += [str(ROOT / "scripts" / "run_ijepa_pretraining.py"), *tiny_flags(output_dir, **ENDLESS)]
    with (tmp_path / "log").open("w") as log:
        launcher = subprocess.Popen(command, env=child_environment, stdout=log, stderr=log)
        wait_until(lambda: steps_logged(output_dir) >= 5)
        started = children_of(launcher.pid)
        assert len(started) == 1
        begin = time.monotonic()
        os.kill(launcher.pid, signal.SIGTERM)
        assert launcher.wait(30) == -signal.SIGTERM
        wait_until(lambda: not alive(started))
        assert time.monotonic() - begin < 30
    assert "the process that launched this one has ended" in (tmp_path / "log").read_text()
    assert find_latest(output_dir).step >= 5


# -- several processes -----------------------------------------------------------------------------------------------


def test_a_signal_to_one_of_two_processes_stops_both_at_the_same_step_with_the_state_saved(tmp_path):
    output_dir, log = tmp_path / "run", tmp_path / "log"
    processes = start_ranks(2, tiny_flags(output_dir, per_device_train_batch_size=4, **ENDLESS), log)
    with ended(*processes):
        wait_until(lambda: steps_logged(output_dir) >= 5, processes[0])
        os.kill(processes[1].pid, signal.SIGUSR1)
        codes = [exit_code(process, 30) for process in processes]
    said = [(tmp_path / f"log-{rank}").read_text() for rank in (0, 1)]
    assert codes == [128 + signal.SIGUSR1] * 2, said
    steps = [int(re.search(r"stopped by SIGUSR1 at step (\d+)", text)[1]) for text in said]
    assert steps[0] == steps[1] == find_latest(output_dir).step


def test_when_one_of_two_processes_dies_the_other_ends_with_the_reason_and_a_restart_goes_on(tmp_path):
    output_dir, log = tmp_path / "run", tmp_path / "log"
    changes = {"per_device_train_batch_size": 4, **ENDLESS, "checkpointing_steps": 5, "max_train_steps": 4000}
    processes = start_ranks(2, tiny_flags(output_dir, **changes), log)
    with ended(*processes):
        wait_until(lambda: newest_checkpoint(output_dir) >= 10, processes[0])
        begin = time.monotonic()
        os.kill(processes[1].pid, signal.SIGKILL)
        assert exit_code(processes[0], 60) == 9
        assert time.monotonic() - begin < 60
    text = (tmp_path / "log-0").read_text()
    assert "process 0 of 2 cannot go on: another process of this run has ended" in text
    assert "--resume_from_checkpoint latest goes on" in text
    assert "Traceback" not in text
    before = find_latest(output_dir).step
    flags = tiny_flags(output_dir, resume_from_checkpoint="latest", **changes)
    processes = start_ranks(2, flags, log)
    with ended(*processes):
        wait_until(lambda: newest_checkpoint(output_dir) >= before + 5, processes[0])
    assert f"continuing at step      {before}" in (tmp_path / "log-0").read_text()
