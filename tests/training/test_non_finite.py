"""The module in which numbers first became NaN or infinite is named, wherever that is."""

import pytest
import torch
from tiny import scrambled_model, tiny_batch

from ijepa_hf.training.non_finite import first_non_finite


def stepped(model, batch):
    model.train()
    model.zero_grad()
    model(**batch).loss.backward()


def test_a_step_that_is_finite_names_nothing():
    model = scrambled_model()
    batch = tiny_batch(model.config)
    stepped(model, batch)
    assert first_non_finite(model, [batch]) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_pixels_come_before_all_else(value):
    model = scrambled_model()
    batch = tiny_batch(model.config)
    batch["pixel_values"][1, 0, 3, 3] = value
    assert first_non_finite(model, [tiny_batch(model.config), batch]) == "the input pixel_values"


def test_a_weight_that_is_broken_is_named_itself():
    model = scrambled_model()
    model.predictor.project.bias.data[0] = float("nan")
    assert first_non_finite(model, [tiny_batch(model.config)]) == "the weight predictor.project.bias"


def test_whichever_module_gives_the_first_infinity_is_named():
    model = scrambled_model()
    batch = tiny_batch(model.config)
    leaves = [(name, module) for name, module in model.named_modules() if name and not list(module.children())]
    named = 0
    for name, module in leaves:
        called = []

        def break_it(module, inputs, output, called=called):
            called.append(module)
            return output * float("inf")

        handle = module.register_forward_hook(break_it)
        found = first_non_finite(model, [batch])
        handle.remove()
        if called:  # some are computed without being called, and then what they are part of is named
            assert found == f"the output of {name}"
            named += 1
    assert named >= 50


def test_of_gradients_the_one_that_the_backward_pass_reaches_first_is_named():
    model = scrambled_model()
    batch = tiny_batch(model.config)
    inside = model.context_encoder.layers[1].mlp.fc2
    handle = inside.register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * float("nan"),))
    stepped(model, batch)
    handle.remove()
    assert torch.isfinite(inside.weight.grad).all()  # the hook broke what goes on from it, backwards
    found = first_non_finite(model, [batch])
    assert found.startswith("the gradient of context_encoder.layers.1.mlp.fc1"), found
    assert not torch.isfinite(model.context_encoder.layers[0].mlp.fc2.weight.grad).all()


def test_no_hook_is_left_and_nothing_is_changed():
    model = scrambled_model()
    batch = tiny_batch(model.config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first_non_finite(model, [batch])
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
