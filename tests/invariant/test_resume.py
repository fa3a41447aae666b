"""Invariant 6: resuming gives the bits of an uninterrupted run, with any worker count. Kills: test_stopping.py."""

import pytest
import torch
from tiny import assert_same_run, final_weights, tiny_run

LOGGED = ("step", "loss", "learning_rate", "weight_decay", "ema_momentum", "grad_norm_encoder", "target_rankme")
STEPS = {"max_train_steps": 40, "checkpointing_steps": 3}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("whole") / "run", **STEPS, hidden_dropout_prob=0.1)


def test_worker_counts_change_nothing(uninterrupted, tmp_path):
    other = tiny_run(tmp_path / "run", **STEPS, hidden_dropout_prob=0.1, dataloader_num_workers=2)
    assert_same_run(other, uninterrupted, *LOGGED)


def test_continuing_from_an_older_checkpoint_in_another_folder_gives_the_same_bits(uninterrupted, tmp_path):
    older = sorted(uninterrupted.glob("checkpoint-*"))[0]
    other = tiny_run(tmp_path / "run", **STEPS, hidden_dropout_prob=0.1, resume_from_checkpoint=older)
    ours, theirs = final_weights(other), final_weights(uninterrupted)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_another_seed_gives_other_bits(uninterrupted, tmp_path):
    other = final_weights(tiny_run(tmp_path / "run", **STEPS, hidden_dropout_prob=0.1, seed=1))
    name = "predictor.project.weight"
    assert not torch.equal(other[name], final_weights(uninterrupted)[name])
