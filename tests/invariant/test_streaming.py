"""A streamed run survives what a map-style one does: the bits of an uninterrupted run, also after `kill -9`."""

import os
import signal
import subprocess
import sys
from functools import partial

import pytest
from forked_runs import ended, exit_code, run_ranks, slow_steps, start_run, wait_until
from tiny import assert_same_run, logged, tiny_flags, tiny_run

from ijepa_hf.data.sources.builtin import load_digits

STEPS = {"max_train_steps": 24, "checkpointing_steps": 3, "max_train_samples": None, "shuffle_buffer_size": 7}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """90 digits in four uneven shards: eleven steps an epoch, so that runs cross into a third one."""
    folder = tmp_path_factory.mktemp("shards")
    digits = load_digits("train")
    bounds = (0, 31, 40, 71, 90)
    for number in range(4):
        part = digits.select(range(bounds[number], bounds[number + 1]))
        part.to_parquet(str(folder / f"train-{number:05d}-of-00004.parquet"))
    return folder


def flags(shards, **changes):
    return {"dataset_name": shards, "streaming": True, "dataloader_num_workers": 2, **STEPS, **changes}


@pytest.fixture(scope="module")
def uninterrupted(shards, tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("whole") / "run", **flags(shards))


def test_a_streamed_run_killed_and_resumed_has_the_bits_of_a_whole_one(uninterrupted, shards, tmp_path):
    output_dir = tmp_path / "run"
    process = start_run(tiny_flags(output_dir, **flags(shards)), tmp_path / "log", prepare=partial(slow_steps, 0.05))
    with ended(process):
        wait_until(lambda: (output_dir / "checkpoint-9").exists(), process)
        os.kill(process.pid, signal.SIGKILL)
        assert exit_code(process) == -signal.SIGKILL, "it ended before it could be killed"
    tiny_run(output_dir, **flags(shards), resume_from_checkpoint="latest")
    assert_same_run(output_dir, uninterrupted, "step", "loss")


def test_a_streamed_run_goes_on_with_other_readers_and_other_micro_batches(uninterrupted, shards, tmp_path):
    older = sorted(uninterrupted.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))[0]
    changed = flags(shards, dataloader_num_workers=1, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    other = tiny_run(tmp_path / "run", **changed, resume_from_checkpoint=older)
    before = [row for row in logged(uninterrupted, "step", "loss") if row[0] <= int(older.name.split("-")[1])]
    assert logged(other, "step", "loss")[: len(before)] == before
    assert logged(other, "step")[-1] == (24,)


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_streamed_run_ends_with_exit_code_0_whether_it_ends_or_stops_early(
    shards, tmp_path, child_environment, workers
):
    command = [sys.executable, "-m", "ijepa_hf.commands.main", "pretrain"]  # not forked: what ends Python is looked at
    command += tiny_flags(tmp_path / "run", **flags(shards, dataloader_num_workers=workers))
    done = subprocess.run(command, env=child_environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "terminate called" not in done.stderr


def test_two_ranks_of_a_stream_read_different_images(shards, tmp_path):
    values = flags(shards, dataloader_num_workers=1, per_device_train_batch_size=4, max_train_steps=11)
    said = run_ranks(2, tiny_flags(tmp_path / "run", **values), tmp_path / "log")
    assert "90, streamed from 4 shards" in said
    assert "8 = 4 x 1 micro-batches x 2 processes" in said
    assert logged(tmp_path / "run", "step")[-1] == (11,)
