"""Invariants 1 and 5: no gradient reaches the target encoder; it follows the context encoder's moving average
exactly."""

import pytest
import torch
from accelerate import Accelerator
from tiny import scrambled_model, tiny_batch, tiny_config

from ijepa_hf import IJepaForPretraining
from ijepa_hf.recipes.arguments import PretrainingArguments
from ijepa_hf.training.plan import StepValues
from ijepa_hf.training.step import ReadyModel, make_optimizer

RUN = PretrainingArguments(learning_rate=1e-3)


def test_no_gradient_reaches_the_target_encoder_and_no_optimiser_group_holds_it():
    model = scrambled_model().train()
    model(**tiny_batch(model.config)).loss.backward()
    targets = {id(parameter) for parameter in model.target_encoder.parameters()}
    assert targets
    assert all(parameter.grad is None for parameter in model.target_encoder.parameters())
    assert all(parameter.grad is not None for parameter in model.context_encoder.parameters())
    held = {id(parameter) for group in make_optimizer(model, RUN).param_groups for parameter in group["params"]}
    assert not held & targets
    assert held == {id(p) for part in (model.context_encoder, model.predictor) for p in part.parameters()}


def test_target_encoder_stays_in_eval_mode_and_frozen_also_after_loading(tmp_path):
    model = scrambled_model(hidden_dropout_prob=0.5)
    model.save_pretrained(tmp_path)
    for each in (model, IJepaForPretraining.from_pretrained(tmp_path)):
        each.train()
        assert each.context_encoder.training
        assert not any(module.training for module in each.target_encoder.modules())
        assert not any(parameter.requires_grad for parameter in each.target_encoder.parameters())
        batch = tiny_batch(each.config)
        assert torch.equal(each(**batch).targets, each(**batch).targets)  # dropout would make them differ


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.996, 1.0])
def test_moving_average_follows_its_formula(momentum):
    model = scrambled_model()
    before = [parameter.detach().double() for parameter in model.target_encoder.parameters()]
    context = [parameter.detach().double() for parameter in model.context_encoder.parameters()]
    model.update_target_encoder(momentum)
    for old, other, new in zip(before, context, model.target_encoder.parameters(), strict=True):
        torch.testing.assert_close(new.double(), momentum * old + (1 - momentum) * other, atol=2e-7, rtol=1e-6)


def test_moving_average_is_taken_once_per_optimiser_step_after_the_optimiser_not_per_micro_batch():
    model = scrambled_model().train()
    before = [parameter.detach().double().clone() for parameter in model.target_encoder.parameters()]
    batches = [tiny_batch(tiny_config(), seed=seed) for seed in range(3)]
    optimizer = make_optimizer(model, RUN)
    ReadyModel(Accelerator(cpu=True), model, model, optimizer).step(batches, StepValues(1e-3, 0.05, 0.9))
    after = list(model.context_encoder.parameters())  # already updated
    for old, context, new in zip(before, after, model.target_encoder.parameters(), strict=True):
        torch.testing.assert_close(new.double(), 0.9 * old + 0.1 * context.detach().double(), atol=2e-7, rtol=1e-6)
