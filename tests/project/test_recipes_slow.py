"""Slow proofs, by `make test-slow`: the embedded default learns, on each seed; CIFAR-10's recipe trains.

Results of the last run are committed: benchmarks/results/digits.json and cifar10_300_steps.json.
"""

import json
import subprocess
import sys

import pytest


def pretrain(environment, *flags):
    command = [sys.executable, "-m", "ijepa_hf.commands.main", "pretrain", *map(str, flags)]
    subprocess.run(command, env=environment, check=True)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_digits_has_far_better_neighbours_than_the_better_untrained_network(seed, tmp_path, child_environment):
    pretrain(child_environment, "digits", "--seed", seed, "--output_dir", tmp_path / "run")
    trained, *untrained, _ = json.loads((tmp_path / "run" / "report.json").read_text())["scores"]
    assert trained["knn"] > max(row["knn"] for row in untrained) + 0.08


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_cifar10_trains_for_300_steps_without_collapse(cifar10_folder, tmp_path, child_environment):
    flags = ["--dataset_name", cifar10_folder, "--max_train_steps", 300, "--warmup_epochs", 0.02]
    flags += [
        "--per_device_train_batch_size",
        32,
        "--context_keep_ratio",
        0.25,
        "--num_cpu_threads",
        1,
        "--max_eval_samples",
        500,
    ]  # as in docs/cifar10.md
    pretrain(child_environment, "cifar10-vit-tiny", *flags, "--output_dir", tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 300
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["target_std"] > 0.3
    assert rows[-1]["target_rankme"] > 10
