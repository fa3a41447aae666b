"""Setting up a model, and one step: the groups of AdamW, schedules, clipping, frozen encoders, non-finite numbers."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tiny import scrambled_model, tiny_batch

from ijepa_hf.recipes.arguments import PretrainingArguments
from ijepa_hf.training.plan import StepValues
from ijepa_hf.training.step import NonFiniteLossError, make_optimizer, set_up_model


def make_ready(**changes):
    run = PretrainingArguments(learning_rate=1e-3, **changes)
    return set_up_model(scrambled_model(), run, Accelerator(cpu=True))


@pytest.mark.parametrize(
    ("mixed_precision", "asked", "attention"),
    [("no", None, "sdpa"), ("bf16", None, "eager"), ("bf16", "sdpa", "sdpa"), ("no", "eager", "eager")],
)
def test_attention_is_as_asked_else_the_fastest(mixed_precision, asked, attention):
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision)
    run = PretrainingArguments(learning_rate=1e-3, gradient_checkpointing=attention == "eager")
    ready = set_up_model(scrambled_model().eval(), run, accelerator, asked)
    AcceleratorState._reset_state(True)
    assert ready.model.config._attn_implementation == attention
    checkpointed = any(getattr(module, "gradient_checkpointing", False) for module in ready.model.modules())
    assert checkpointed == run.gradient_checkpointing
    assert ready.model.training


def test_weight_decay_is_kept_from_biases_and_vectors_and_not_from_the_mask_token():
    model = scrambled_model()
    decayed, plain = make_optimizer(model, PretrainingArguments(learning_rate=1e-3)).param_groups
    names = dict(model.named_parameters())
    assert all(names[name].ndim > 1 and not name.endswith("bias") for name in decayed["param_names"])
    assert all(names[name].ndim == 1 for name in plain["param_names"])
    assert "predictor.mask_token" in decayed["param_names"]
    assert plain["weight_decay"] == 0.0


def test_scheduled_values_reach_the_right_groups():
    ready = make_ready()
    ready.step([tiny_batch(ready.model.config)], StepValues(0.01, 0.3, 0.9))
    groups = ready.optimizer.param_groups
    assert [group["lr"] for group in groups] == [0.01, 0.01]
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]


def test_with_frozen_encoders_only_the_predictor_moves_and_the_encoder_gets_no_optimiser_state():
    ready = make_ready(max_grad_norm=1.0)
    model, batch = ready.model, tiny_batch(ready.model.config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = ready.step([batch], StepValues(1e-2, 0.3, 1.0, encoder_is_frozen=True))
    moved = {
        name.split(".")[0] for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])
    }
    assert moved == {"predictor"}
    assert result.grad_norm_encoder > 0  # the gradient is logged although nothing follows it
    known = {id(parameter) for parameter in ready.optimizer.state}
    assert not known & {id(parameter) for parameter in model.context_encoder.parameters()}
    # and when it thaws, the encoder's AdamW starts at its first step: the first update of every weight is lr in size
    frozen = {name: parameter.detach().clone() for name, parameter in model.context_encoder.named_parameters()}
    ready.max_grad_norm = None
    ready.step([batch], StepValues(1e-3, 0.0, 0.9))
    step = (model.context_encoder.layers[0].mlp.fc1.weight - frozen["layers.0.mlp.fc1.weight"]).abs()
    assert step.median().item() == pytest.approx(1e-3, rel=1e-2)


def test_clipping_limits_the_step_and_the_logged_norms_are_those_before_it():
    results = {}
    for limit in (None, 1e-3):
        ready = make_ready(max_grad_norm=limit)
        result = ready.step([tiny_batch(ready.model.config)], StepValues(1e-3, 0.0, 0.9))
        total = torch.nn.utils.get_total_norm([p.grad for p in ready.model.parameters() if p.grad is not None])
        results[limit] = (result.grad_norm_encoder, result.grad_norm_predictor, float(total))
    assert results[None][:2] == results[1e-3][:2]
    assert results[None][2] == pytest.approx((results[None][0] ** 2 + results[None][1] ** 2) ** 0.5, rel=1e-5)
    assert results[1e-3][2] == pytest.approx(1e-3, rel=1e-3)


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_reaches_the_weights():
    ready = make_ready()
    before = {name: value.clone() for name, value in ready.model.state_dict().items()}
    ready.model.predictor.project.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(NonFiniteLossError, match="gradient norm is .* in the predictor"):
        ready.step([tiny_batch(ready.model.config)], StepValues(1e-3, 0.0, 0.9))
    assert all(torch.equal(value, before[name]) for name, value in ready.model.state_dict().items())
