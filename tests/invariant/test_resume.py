"""Invariant 6: stopping anywhere, also by `kill -9`, and resuming gives the bits of an uninterrupted run."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from tiny import final_weights, logged, tiny_flags, tiny_run

LOGGED = ("step", "loss", "learning_rate", "weight_decay", "ema_momentum", "grad_norm_encoder", "target_rankme")
STEPS = {"max_train_steps": 40, "checkpointing_steps": 3}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("whole") / "run", **STEPS, hidden_dropout_prob=0.1)


def assert_same_run(one, other):
    ours, theirs = final_weights(one), final_weights(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    assert logged(one, *LOGGED) == logged(other, *LOGGED)


def start(output_dir, environment, **changes):
    flags = tiny_flags(output_dir, **STEPS, hidden_dropout_prob=0.1, resume_from_checkpoint="latest", **changes)
    command = [sys.executable, "-m", "ijepa_hf.cli", "pretrain", *flags]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def test_a_run_killed_twice_and_resumed_with_other_worker_counts_has_the_bits_of_a_whole_one(
    uninterrupted, tmp_path, child_environment
):
    output_dir = tmp_path / "run"
    for wanted, workers in ((6, 0), (15, 2)):
        process = start(output_dir, child_environment, dataloader_num_workers=workers)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            steps = [int(path.name.split("-")[1]) for path in output_dir.glob("checkpoint-*")]
            if max(steps, default=0) >= wanted:
                break
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
    tiny_run(output_dir, **STEPS, hidden_dropout_prob=0.1, resume_from_checkpoint="latest", dataloader_num_workers=1)
    assert_same_run(output_dir, uninterrupted)


def test_worker_counts_change_nothing(uninterrupted, tmp_path):
    other = tiny_run(tmp_path / "run", **STEPS, hidden_dropout_prob=0.1, dataloader_num_workers=2)
    assert_same_run(other, uninterrupted)


def test_continuing_from_an_older_checkpoint_in_another_folder_gives_the_same_bits(uninterrupted, tmp_path):
    older = sorted(uninterrupted.glob("checkpoint-*"))[0]
    other = tiny_run(tmp_path / "run", **STEPS, hidden_dropout_prob=0.1, resume_from_checkpoint=older)
    ours, theirs = final_weights(other), final_weights(uninterrupted)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_another_seed_gives_other_bits(uninterrupted, tmp_path):
    other = final_weights(tiny_run(tmp_path / "run", **STEPS, hidden_dropout_prob=0.1, seed=1))
    name = "predictor.project.weight"
    assert not torch.equal(other[name], final_weights(uninterrupted)[name])
