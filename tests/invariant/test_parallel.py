"""Invariant 7: two ranks on half batches, and two accumulated micro-batches, equal one rank on the whole batch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import final_weights, logged, tiny_flags, tiny_run

ROOT = Path(__file__).resolve().parents[2]
# Sums in another order round differently; Adam's first steps divide by the gradient's own size and so enlarge that.
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 2e-6, 2e-5
# The key third of attention biases has a true gradient of zero, which Adam turns into steps of rounding noise.
NOISE = "attention.key.bias"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("whole") / "run")


def assert_equal_up_to_rounding(one, other):
    for (step, loss), (other_step, other_loss) in zip(
        logged(one, "step", "loss"), logged(other, "step", "loss"), strict=True
    ):
        assert step == other_step
        assert loss == pytest.approx(other_loss, rel=LOSS_TOLERANCE)
    ours, theirs = final_weights(one), final_weights(other)
    for name, value in ours.items():
        if NOISE not in name:
            torch.testing.assert_close(value, theirs[name], atol=WEIGHT_TOLERANCE, rtol=0, msg=name)


def test_two_accumulated_micro_batches_equal_one_batch(whole, tmp_path):
    halves = tiny_run(tmp_path / "run", per_device_train_batch_size=4, gradient_accumulation_steps=2)
    assert_equal_up_to_rounding(halves, whole)


def test_two_ranks_on_half_batches_equal_one_rank(whole, tmp_path, child_environment):
    flags = tiny_flags(tmp_path / "run", per_device_train_batch_size=4)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command += [str(ROOT / "scripts" / "run_ijepa_pretraining.py"), *flags]
    done = subprocess.run(command, env=child_environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "4 x 1 micro-batches x 2 processes" in done.stdout
    assert_equal_up_to_rounding(tmp_path / "run", whole)


def test_a_run_goes_on_with_another_number_of_micro_batches_at_the_same_global_batch(whole, tmp_path):
    checkpoint = whole / "checkpoint-4"
    assert json.loads((checkpoint / "checkpoint.json").read_text())["step"] == 4
    halves = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    other = tiny_run(tmp_path / "run", resume_from_checkpoint=checkpoint, **halves)
    for name, value in final_weights(other).items():
        if NOISE not in name:
            torch.testing.assert_close(value, final_weights(whole)[name], atol=WEIGHT_TOLERANCE, rtol=0, msg=name)


def test_accelerate_launch_of_the_script_is_the_same_program(whole, tmp_path, child_environment):
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "1",
        "--num_machines",
        "1",
    ]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    command += [str(ROOT / "scripts" / "run_ijepa_pretraining.py"), *tiny_flags(tmp_path / "run")]
    done = subprocess.run(command, env=child_environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = final_weights(tmp_path / "run"), final_weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
