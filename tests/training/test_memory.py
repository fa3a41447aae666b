"""The largest micro-batch that fits: among the divisors, with nothing changed, and only where memory ran out."""

import pytest
import torch
from tiny import scrambled_model, tiny_batch

from ijepa_hf.model.mask_audit import TRIALS
from ijepa_hf.training import memory
from ijepa_hf.training.memory import does_not_fit_message, is_out_of_memory, largest_micro_batch


def limited(model, most, monkeypatch, error=None):
    """A model that runs out of memory with more than `most` images, as torch says it."""
    whole, tried = type(model).forward, []

    def forward(self, pixel_values, **inputs):
        tried.append(len(pixel_values))
        if len(pixel_values) > most:
            raise error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return whole(self, pixel_values, **inputs)

    monkeypatch.setattr(type(model), "forward", forward)
    return tried


@pytest.mark.parametrize(("most", "fitting"), [(100, 48), (48, 48), (47, 24), (17, 16), (15, 12), (1, 1), (0, None)])
def test_the_largest_divisor_that_fits_is_found(most, fitting, monkeypatch):
    model = scrambled_model().train()
    tried = limited(model, most, monkeypatch)
    assert largest_micro_batch(model, 48) == fitting
    assert all(48 % size == 0 for size in tried)
    assert tried == sorted(tried, reverse=True)


def test_weights_stay_and_gradients_go(monkeypatch):
    model = scrambled_model().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    limited(model, 3, monkeypatch)
    assert largest_micro_batch(model, 8) == 2
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_another_error_is_not_taken_for_want_of_memory(monkeypatch):
    model = scrambled_model().train()
    limited(model, 3, monkeypatch, error=RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        largest_micro_batch(model, 8)


def test_masks_are_the_largest_that_the_first_steps_draw():
    model = scrambled_model()
    inputs = memory._inputs(model, 5)
    sizes = [tiny_batch(model.config, 5, seed)["target_indices"][0].numel() for seed in range(TRIALS)]
    assert inputs["target_indices"][0].numel() == max(sizes)
    assert inputs["pixel_values"].shape == (5, 3, 32, 32)


def test_errors_of_every_allocator_count():
    assert is_out_of_memory(torch.OutOfMemoryError("x"))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


@pytest.mark.parametrize(
    ("fitting", "said"),
    [
        (16, "16 does. With --per_device_train_batch_size 16 --gradient_accumulation_steps 8 the global batch stays"),
        (None, "not even 1 image does: use a smaller model"),
        (64, "end what else uses that memory"),
    ],
)
def test_the_message_says_what_fits(fitting, said):
    message = does_not_fit_message(64, fitting, 2, torch.device("cuda", 0))
    assert message.startswith("per_device_train_batch_size=64 does not fit into the memory of cuda:0; ")
    assert said in message
    assert "--selective_checkpointing" in message
