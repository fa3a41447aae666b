"""Invariant 7: a run is the same for any number of ranks and micro-batches at one global batch.

Sums in another order round differently, by about 1e-7 of a weight in twenty steps; that is what the tolerance is for.
Nothing needs leaving out. The gradient of the attention's key bias is truly zero, and Adam would make steps of the
learning rate's size of its rounding noise; but that noise is 1e-12 in the first steps of training, far below Adam's
epsilon (1e-8 by default). With weights far from their first values it would not be.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from forked_runs import run_ranks
from safetensors.torch import load_file
from tiny import differences, final_weights, logged, tiny_flags, tiny_run

from ijepa_hf import IJepaForPretraining
from ijepa_hf.data.order import StepBatchSampler
from ijepa_hf.model.modeling_ijepa import new_model

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "run_ijepa_pretraining.py"
TOLERANCE = 1e-6
LOSS_TOLERANCE = 2e-6  # relative
GLOBAL_BATCH, STEPS, SAVED_AT, NUM_IMAGES = 8, 20, 10, 64
# A moving average that moves: with the published momentum, 0.996 and more, it would go a fiftieth of the way.
RUN = {"max_train_steps": STEPS, "checkpointing_steps": SAVED_AT, "ema_momentum": 0.9, "final_ema_momentum": 0.99}


def torchrun(ranks, flags, log):
    """As a user starts several processes; as `run_ranks` otherwise, which forks them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--standalone"]
    done = subprocess.run([*command, str(SCRIPT), *flags], capture_output=True, text=True, timeout=200, check=False)
    log.write_text(done.stderr)
    assert done.returncode == 0, f"{done.stdout[-1000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def run_on(ranks, folder, launch=run_ranks, **changes):
    """A run on some ranks at the same global batch, with a checkpoint half way."""
    flags = tiny_flags(folder, **RUN, per_device_train_batch_size=GLOBAL_BATCH // ranks, **changes)
    out = launch(ranks, flags, folder.parent / "log")
    assert f"8 = {GLOBAL_BATCH // ranks} x 1 micro-batches x {ranks} processes" in out
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("whole") / "run", **RUN)


@pytest.fixture(scope="module")
def on_two(tmp_path_factory):
    return run_on(2, tmp_path_factory.mktemp("two") / "run", torchrun)


@pytest.fixture(scope="module")
def on_four(tmp_path_factory):
    return run_on(4, tmp_path_factory.mktemp("four") / "run")


def assert_same_run(one, other, first_step=1):
    ours, theirs = (
        [
            row
            for row in logged(run, "step", "loss", "grad_norm_encoder", "grad_norm_predictor")
            if row[0] >= first_step
        ]
        for run in (one, other)
    )
    assert len(ours) == STEPS - first_step + 1
    for (step, loss, *norms), (other_step, other_loss, *other_norms) in zip(ours, theirs, strict=True):
        assert step == other_step
        assert loss == pytest.approx(other_loss, rel=LOSS_TOLERANCE)
        # Adam hides a gradient that is a multiple of what it should be; the norm does not
        assert norms == pytest.approx(other_norms, rel=1e-3)
    largest = differences(final_weights(one), final_weights(other))
    assert max(largest.values()) < TOLERANCE, largest


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_on_parts_of_the_batch_equal_one_rank_on_the_whole(whole, ranks, request):
    assert_same_run(request.getfixturevalue({2: "on_two", 4: "on_four"}[ranks]), whole)


def test_the_run_moves_all_three_networks_far_more_than_the_tolerance(whole):
    model = IJepaForPretraining.from_pretrained(whole / "pretraining")
    moved = differences(model.state_dict(), new_model(model.config, seed=0).state_dict())
    assert min(moved.values()) > 1000 * TOLERANCE, moved


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_checkpoint_of_two_ranks_goes_on_on_one_and_one_of_one_on_two(whole, on_two, ranks, tmp_path):
    if ranks == 1:
        other = tiny_run(tmp_path / "run", **RUN, resume_from_checkpoint=on_two / f"checkpoint-{SAVED_AT}")
    else:
        other = run_on(2, tmp_path / "run", resume_from_checkpoint=whole / f"checkpoint-{SAVED_AT}")
    assert_same_run(other, whole, first_step=SAVED_AT + 1)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_checkpoint_of_four_ranks_goes_on_on_fewer_at_the_same_global_batch(whole, on_four, ranks, tmp_path):
    checkpoint = on_four / f"checkpoint-{SAVED_AT}"
    assert json.loads((checkpoint / "checkpoint.json").read_text())["step"] == SAVED_AT
    if ranks == 1:
        other = tiny_run(tmp_path / "run", **RUN, resume_from_checkpoint=checkpoint)
    else:
        other = run_on(ranks, tmp_path / "run", resume_from_checkpoint=checkpoint)
    assert_same_run(other, whole, first_step=SAVED_AT + 1)


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_optimiser_states_of_several_ranks_and_of_one_are_the_same_files_up_to_rounding(whole, ranks, request):
    several = request.getfixturevalue({2: "on_two", 4: "on_four"}[ranks])
    ours, theirs = (load_file(run / f"checkpoint-{STEPS}" / "optimizer.safetensors") for run in (several, whole))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert float((value - theirs[name]).abs().max()) < TOLERANCE, name


def test_data_come_in_the_same_order_on_any_number_of_ranks_from_any_step():
    def images(ranks, start_step):
        samplers = [
            StepBatchSampler(
                NUM_IMAGES, GLOBAL_BATCH // ranks, STEPS, seed=0, start_step=start_step, rank=rank, num_ranks=ranks
            )
            for rank in range(ranks)
        ]
        return [[key for part in parts for key in part] for parts in zip(*samplers, strict=True)]

    alone = images(1, 0)
    assert len(alone) == STEPS
    for ranks in (2, 4):
        assert images(ranks, 0) == alone
    for ranks in (1, 2):
        assert images(ranks, SAVED_AT) == alone[SAVED_AT:]


def test_two_accumulated_micro_batches_equal_one_batch(whole, tmp_path):
    halves = tiny_run(tmp_path / "run", **RUN, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    assert_same_run(halves, whole)


def test_a_run_goes_on_with_another_number_of_micro_batches_at_the_same_global_batch(whole, tmp_path):
    halves = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    checkpoint = whole / f"checkpoint-{SAVED_AT}"
    assert_same_run(
        tiny_run(tmp_path / "run", **RUN, resume_from_checkpoint=checkpoint, **halves), whole, first_step=SAVED_AT + 1
    )


@pytest.mark.slow  # each day tests/invariant/test_stopping.py starts a run by accelerate launch
def test_accelerate_launch_of_the_script_is_the_same_program(whole, tmp_path, child_environment):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu"]
    command += ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += [str(SCRIPT), *tiny_flags(tmp_path / "run", **RUN)]
    done = subprocess.run(command, env=child_environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert max(differences(final_weights(tmp_path / "run"), final_weights(whole)).values()) == 0.0
