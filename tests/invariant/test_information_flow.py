"""Invariants 2, 3 and 4: who may see what."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import scrambled_model, tiny_batch

from ijepa_hf import IJepaDataCollator


def pixel_mask(config, indices: torch.Tensor) -> torch.Tensor:
    """True where a pixel belongs to one of the patches; `[B, 1, height, width]`."""
    visible = torch.zeros(len(indices), config.num_patches).scatter_(1, indices.flatten(1), 1.0).bool()
    rows, columns = config.grid_size
    height, width = config.patch_shape
    grid = visible.view(-1, 1, rows, columns)
    return grid.repeat_interleave(height, 2).repeat_interleave(width, 3)


@pytest.mark.parametrize("image_size", [32, [16, 48]])
def test_hidden_pixels_cannot_change_the_context_encoders_output(image_size):
    model = scrambled_model(image_size=image_size)
    batch = tiny_batch(model.config)
    hidden = ~pixel_mask(model.config, batch["context_indices"])
    spoilt = torch.where(hidden, torch.full_like(batch["pixel_values"], 1e3), batch["pixel_values"])
    with torch.no_grad():
        clean, other = model(**batch), model(**{**batch, "pixel_values": spoilt})
    assert torch.equal(clean.predictions, other.predictions)
    assert not torch.allclose(clean.targets, other.targets)  # the target encoder sees everything


def test_visible_pixels_do_change_the_context_encoders_output():
    model = scrambled_model()
    batch = tiny_batch(model.config)
    visible = pixel_mask(model.config, batch["context_indices"])
    other = torch.where(visible, batch["pixel_values"] + 1, batch["pixel_values"])
    with torch.no_grad():
        change = model(**batch).predictions - model(**{**batch, "pixel_values": other}).predictions
    assert bool((change.abs().amax((-1, -2, -3)) > 1e-3).all())


def test_any_pixel_changes_the_targets():
    model = scrambled_model()
    batch = tiny_batch(model.config, size=1)
    pixels = batch["pixel_values"].clone().requires_grad_(True)
    features = model.target_encoder(pixels).last_hidden_state  # encode_targets has no gradient to ask
    features[0, batch["target_indices"][0, 0]].square().sum().backward()
    assert bool((pixels.grad != 0).all())


def test_a_blocks_prediction_does_not_depend_on_the_other_blocks():
    model = scrambled_model()
    batch = tiny_batch(model.config)
    pixels, context, targets = batch.values()
    with torch.no_grad():
        whole = model(pixels, context, targets).predictions
        swapped = model(pixels, context, torch.cat([targets[:, :1], targets.roll(1, 0)[:, 1:]], 1)).predictions
        alone = model(pixels, context, targets[:, 2:3]).predictions
    torch.testing.assert_close(whole[:, 0], swapped[:, 0], atol=1e-6, rtol=0)
    torch.testing.assert_close(whole[:, 2], alone[:, 0], atol=1e-6, rtol=0)


def test_predictions_follow_the_order_of_indices_and_nothing_else():
    model = scrambled_model()
    pixels, context, targets = tiny_batch(model.config).values()
    generator = torch.Generator().manual_seed(0)
    context_order = torch.randperm(context.shape[1], generator=generator)
    patch_order = torch.randperm(targets.shape[2], generator=generator)
    block_order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        plain = model(pixels, context, targets)
        shuffled = model(pixels, context[:, context_order], targets[:, block_order][:, :, patch_order])
    expected = plain.predictions[:, block_order][:, :, patch_order]
    torch.testing.assert_close(shuffled.predictions, expected, atol=1e-5, rtol=0)
    assert shuffled.loss.item() == pytest.approx(plain.loss.item(), abs=1e-6)


@given(
    seed=st.integers(0, 2**31),
    size=st.integers(1, 9),
    image_size=st.sampled_from([32, [16, 40], 64]),
    num_context_sets=st.sampled_from([1, 2]),
)
def test_collated_context_and_targets_never_overlap_and_stay_inside_the_grid(seed, size, image_size, num_context_sets):
    config = scrambled_config(image_size, num_context_sets)
    torch.manual_seed(seed)
    rows = [{"pixel_values": torch.zeros(3, *config.image_shape)} for _ in range(size)]
    batch = IJepaDataCollator(config)(rows)
    context, targets = batch["context_indices"].view(size, -1), batch["target_indices"].view(size, -1)
    for indices in (context, targets):
        assert int(indices.min()) >= 0
        assert int(indices.max()) < config.num_patches
    assert not bool((context[:, :, None] == targets[:, None, :]).any())


def scrambled_config(image_size, num_context_sets):
    from tiny import tiny_config

    return tiny_config(image_size=image_size, num_context_sets=num_context_sets)
