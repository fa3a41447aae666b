"""Feature extraction against the model called by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import IJepaConfig, IJepaModel, ResNetConfig, ResNetModel

from ijepa_hf.evaluation import extract_features


@pytest.fixture
def encoder() -> IJepaModel:
    torch.manual_seed(0)
    config = IJepaConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_dropout_prob=0.5,
    )
    return IJepaModel(config, add_pooling_layer=False)


def images(n: int = 7) -> torch.Tensor:
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("batch_size", [1, 3, 7, 256])
def test_features_are_the_mean_over_patches_in_eval_mode(encoder: IJepaModel, batch_size: int):
    encoder.train()
    features = extract_features(encoder, images(), batch_size=batch_size)
    encoder.eval()
    with torch.no_grad():
        expected = encoder(images()).last_hidden_state.numpy().mean(axis=1)
    assert features.dtype == np.float32
    assert features.shape == (7, 16)
    np.testing.assert_allclose(features, expected, atol=1e-6)


def test_the_mode_of_every_module_is_put_back(encoder: IJepaModel):
    encoder.train()
    frozen = next(module for module in encoder.modules() if isinstance(module, nn.LayerNorm))
    frozen.eval()
    before = [module.training for module in encoder.modules()]
    assert set(before) == {True, False}
    extract_features(encoder, images())
    assert [module.training for module in encoder.modules()] == before
    with pytest.raises(ValueError, match="channel"):
        extract_features(encoder, torch.zeros(2, 3, 8, 8))
    assert [module.training for module in encoder.modules()] == before


def test_no_gradient_is_left_behind(encoder: IJepaModel):
    encoder.requires_grad_(True)
    extract_features(encoder, images().requires_grad_())
    assert all(parameter.grad is None for parameter in encoder.parameters())
    assert torch.is_grad_enabled()


def test_a_bfloat16_model_gets_bfloat16_pixels_and_gives_float32(encoder: IJepaModel):
    full = extract_features(encoder, images())
    half = extract_features(encoder.to(torch.bfloat16), images())
    assert half.dtype == np.float32
    np.testing.assert_allclose(half, full, atol=0.06)
    assert not np.array_equal(half, full)


def test_a_convolutional_backbone_is_averaged_over_its_map():
    torch.manual_seed(0)
    config = ResNetConfig(
        num_channels=1,
        embedding_size=4,
        hidden_sizes=[4, 6],
        depths=[1, 1],
        layer_type="basic",
        downsample_in_first_stage=False,
    )
    model = ResNetModel(config).eval()
    pixel_values = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        expected = model(pixel_values).last_hidden_state.mean(dim=(2, 3))
    assert expected.shape == (2, 6)
    np.testing.assert_allclose(extract_features(model, pixel_values), expected.numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("pixel_values", "batch_size", "message"),
    [
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), 4, "dtype torch.uint8 must be floating point"),
        (torch.zeros(1, 8, 8), 4, r"shape \(1, 8, 8\)"),
        (torch.zeros(0, 1, 8, 8), 4, "with n at least 1"),
        (torch.zeros(2, 1, 8, 8), 0, "batch_size=0 must be 1 or more"),
    ],
)
def test_unusable_pixels_are_refused(encoder: IJepaModel, pixel_values, batch_size: int, message: str):
    with pytest.raises(ValueError, match=message):
        extract_features(encoder, pixel_values, batch_size=batch_size)


def test_a_model_without_hidden_states_is_named():
    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, pixel_values: torch.Tensor) -> SimpleNamespace:
            return SimpleNamespace(loss=pixel_values.mean() * self.weight)

    with pytest.raises(ValueError, match="output of Loss has no last_hidden_state"):
        extract_features(Loss(), images())
