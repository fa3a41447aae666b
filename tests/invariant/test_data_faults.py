"""Data that fail in the middle of a run: it gets over what passes, and stops resumable where it does not."""

import os
import re
import signal
import time
from functools import partial

import pytest
from failing_source import fail_in
from forked_runs import alive, children_of, ended, exit_code, slow_steps, start_run, steps_logged, wait_until
from tiny import assert_same_run, tiny_flags, tiny_run

from ijepa_hf.data.sources.builtin import load_digits
from ijepa_hf.runs.checkpoints import find_latest

# torch says that two workers on one core are many
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")

LOGGED = ("step", "loss")
STEPS = {
    "max_train_steps": 24, "checkpointing_steps": 10, "checkpoints_total_limit": 9, "max_train_samples": None,
    "shuffle_buffer_size": 7, "streaming": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """90 digits in four uneven shards of many row groups: eleven steps an epoch."""
    folder = tmp_path_factory.mktemp("shards")
    digits, bounds = load_digits("train"), (0, 31, 40, 71, 90)
    for number in range(4):
        part = digits.select(range(bounds[number], bounds[number + 1]))
        part.to_parquet(str(folder / f"train-{number:05d}-of-00004.parquet"), batch_size=4)
    return folder


@pytest.fixture(scope="module", params=[0, 2])
def whole(request, shards, tmp_path_factory):
    """A run that nothing happens to, and its number of workers: a stream's order depends on that."""
    values = {"dataset_name": shards, "dataloader_num_workers": request.param, **STEPS}
    return tiny_run(tmp_path_factory.mktemp("whole") / "run", **values), values


@pytest.mark.parametrize(("first", "count"), [(1, 2), (40, 3)])
def test_a_run_whose_source_fails_for_a_while_has_the_bits_of_one_whose_source_did_not(whole, tmp_path, first, count):
    other, values = whole
    flags = tiny_flags(tmp_path / "run", **values)
    process = start_run(flags, tmp_path / "log", prepare=partial(fail_in, first, count))
    with ended(process):
        assert exit_code(process) == 0, said(tmp_path / "log")[-2000:]
    assert said(tmp_path / "log").count("it is tried again in") >= count  # each process that reads counts by itself
    assert_same_run(tmp_path / "run", other, *LOGGED)


def has_said(log, words):
    return log.is_file() and words in log.read_text()


def said(log):
    """What the run printed last; no traceback."""
    text = log.read_text()
    assert "Traceback" not in text
    return text


def test_a_source_that_stays_away_stops_the_run_with_code_7_its_state_saved_and_no_process_left(whole, tmp_path):
    other, values = whole
    flags = tiny_flags(tmp_path / "run", **values, data_retry_seconds=0.5)
    process = start_run(flags, tmp_path / "log", prepare=partial(fail_in, 60, 10**6))
    with ended(process):
        assert exit_code(process) == 7
        text = said(tmp_path / "log")
        # 11 reads are tried again, and each try is said
        assert re.search(
            r"shard \d of the stream \(.*parquet\) cannot be read: OSError: Input/output error; it is", text
        )
        last = text.strip().splitlines()[-1]
        assert re.search(r"shard \d .*cannot be read: .*tried \d+ times in 0\.\d s \(data_retry_seconds=0\.5", last)
        assert "--resume_from_checkpoint latest" in last
        assert not alive(children_of(process.pid))
    step = steps_logged(tmp_path / "run")
    assert 0 < step < 24
    assert step % 10
    assert find_latest(tmp_path / "run").step == step
    tiny_run(tmp_path / "run", **values, resume_from_checkpoint="latest")
    assert_same_run(tmp_path / "run", other, *LOGGED)


def test_a_source_that_does_not_answer_any_more_stops_the_run_too(whole, tmp_path):
    other, values = whole
    flags = tiny_flags(tmp_path / "run", **values, data_retry_seconds=0.5, data_timeout_seconds=0.4)
    process = start_run(flags, tmp_path / "log", prepare=partial(fail_in, 60, 10**6, "stall"))
    with ended(process):
        assert exit_code(process) == 7
        assert "StalledReadError: no answer within 0.4 s" in said(tmp_path / "log").splitlines()[-1]
    tiny_run(tmp_path / "run", **values, resume_from_checkpoint="latest")
    assert_same_run(tmp_path / "run", other, *LOGGED)


def test_a_signal_stops_a_run_that_waits_for_its_source_at_once_with_its_state_saved(whole, tmp_path):
    other, values = whole
    process = start_run(
        tiny_flags(tmp_path / "run", **values), tmp_path / "log", prepare=partial(fail_in, 60, 10**6, first_wait=200.0)
    )
    with ended(process):
        wait_until(partial(has_said, tmp_path / "log", "it is tried again in 200 s"), process)
        time.sleep(0.5)  # batches that are ready are trained on
        started = time.monotonic()
        os.kill(process.pid, signal.SIGTERM)
        assert exit_code(process) == 143
        assert time.monotonic() - started < 15
    assert find_latest(tmp_path / "run").step == steps_logged(tmp_path / "run")
    tiny_run(tmp_path / "run", **values, resume_from_checkpoint="latest")
    assert_same_run(tmp_path / "run", other, *LOGGED)


@pytest.mark.parametrize("whole", [2], indirect=True)
def test_a_loading_process_that_is_killed_stops_the_run_with_code_7_named_and_resumable(whole, tmp_path):
    other, values = whole
    flags = tiny_flags(tmp_path / "run", **values)
    process = start_run(flags, tmp_path / "log", prepare=partial(slow_steps, 0.2))
    with ended(process):
        wait_until(lambda: steps_logged(tmp_path / "run") >= 3, process)
        workers = children_of(process.pid)
        assert len(workers) == 2
        os.kill(min(workers), signal.SIGKILL)
        assert exit_code(process) == 7
        last = said(tmp_path / "log").strip().splitlines()[-1]
        assert f"a loading process (pid {min(workers)}) was killed by signal SIGKILL, most often because mem" in last
        assert not alive(workers)
    assert find_latest(tmp_path / "run").step == steps_logged(tmp_path / "run")
    tiny_run(tmp_path / "run", **values, resume_from_checkpoint="latest")
    assert_same_run(tmp_path / "run", other, *LOGGED)


def test_loading_processes_end_with_a_run_that_is_killed_while_they_wait_for_the_source(shards, tmp_path):
    flags = tiny_flags(tmp_path / "run", dataset_name=shards, dataloader_num_workers=2, **STEPS)
    process = start_run(flags, tmp_path / "log", prepare=partial(fail_in, 60, 10**6, first_wait=200.0))
    with ended(process):
        wait_until(partial(has_said, tmp_path / "log", "it is tried again in 200 s"), process)
        workers = children_of(process.pid)
        assert len(alive(workers)) == 2
        os.kill(process.pid, signal.SIGKILL)
        started = time.monotonic()
        while alive(workers) and time.monotonic() - started < 15:
            time.sleep(0.05)
        assert not alive(workers)
