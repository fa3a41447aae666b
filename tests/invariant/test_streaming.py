"""A streamed run survives what a map-style one does: the bits of an uninterrupted run, also after `kill -9`."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny import final_weights, logged, tiny_flags, tiny_run

from ijepa_hf.sources import load_digits

ROOT = Path(__file__).resolve().parents[2]
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


def launch(output_dir, environment, **values):
    argv = tiny_flags(output_dir, **values, resume_from_checkpoint="latest")
    command = [sys.executable, "-m", "ijepa_hf.cli", "pretrain", *argv]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def test_a_streamed_run_killed_and_resumed_has_the_bits_of_a_whole_one(
    uninterrupted, shards, tmp_path, child_environment
):
    output_dir = tmp_path / "run"
    process = launch(output_dir, child_environment, **flags(shards))
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline and not (output_dir / "checkpoint-9").exists():
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"
    tiny_run(output_dir, **flags(shards), resume_from_checkpoint="latest")
    ours, theirs = final_weights(output_dir), final_weights(uninterrupted)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert logged(output_dir, "step", "loss") == logged(uninterrupted, "step", "loss")


def test_a_streamed_run_goes_on_with_other_readers_and_other_micro_batches(uninterrupted, shards, tmp_path):
    older = sorted(uninterrupted.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))[0]
    changed = flags(shards, dataloader_num_workers=1, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    other = tiny_run(tmp_path / "run", **changed, resume_from_checkpoint=older)
    before = [row for row in logged(uninterrupted, "step", "loss") if row[0] <= int(older.name.split("-")[1])]
    assert logged(other, "step", "loss")[: len(before)] == before
    assert logged(other, "step")[-1] == (24,)


def test_a_streamed_run_ends_with_exit_code_0_whether_it_ends_or_stops_early(shards, tmp_path, child_environment):
    for workers in (0, 2):
        done = launch(tmp_path / f"run{workers}", child_environment, **flags(shards, dataloader_num_workers=workers))
        _, error = done.communicate(timeout=240)
        assert done.returncode == 0, error[-2000:]
        assert "terminate called" not in error


def test_two_ranks_of_a_stream_read_different_images(shards, tmp_path, child_environment):
    values = flags(shards, dataloader_num_workers=1, per_device_train_batch_size=4, max_train_steps=11)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command += [str(ROOT / "scripts" / "run_ijepa_pretraining.py"), *tiny_flags(tmp_path / "run", **values)]
    done = subprocess.run(command, env=child_environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "90, streamed from 4 shards" in done.stdout
    assert "8 = 4 x 1 micro-batches x 2 processes" in done.stdout
    assert logged(tmp_path / "run", "step")[-1] == (11,)
