"""Feature extraction against the model called by hand."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import IJepaConfig, IJepaModel, ResNetConfig, ResNetModel

from ijepa_hf.data.transforms import normalize, resize
from ijepa_hf.evaluation import extract_features
from ijepa_hf.evaluation.features import iterate_features
from ijepa_hf.model.vision_models import ImageSettings


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


# -- images as they lie on disk --------------------------------------------------------------------------------------


def pictures(count: int) -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (10 + index, 12, 3), dtype=np.uint8)) for index in range(count)]


MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
SETTINGS = ImageSettings((8, 6), MEAN, STD)


def iterated(images, parts, batch_size=3, encode=lambda pixels: pixels.flatten(1)):
    return list(iterate_features(images, parts, encode, SETTINGS, batch_size=batch_size))


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_images_are_resized_and_normalised_in_order_part_by_part(batch_size: int):
    images = pictures(11)
    found = iterated(images, [range(5, 11), range(0, 4)], batch_size)
    expected = [normalize(resize(image, (8, 6)), MEAN, STD).flatten().numpy() for image in images]
    assert [len(part) for part in found] == [6, 4]
    np.testing.assert_allclose(found[0], expected[5:11], atol=1e-6)
    np.testing.assert_allclose(found[1], expected[:4], atol=1e-6)


def test_a_parts_batches_do_not_depend_on_the_other_parts():
    sizes: list[list[int]] = []
    for parts in ([range(0, 5), range(5, 12)], [range(5, 12)]):
        seen: list[int] = []
        iterated(pictures(12), parts, encode=lambda pixels, seen=seen: seen.append(len(pixels)) or pixels.flatten(1))
        sizes.append(seen)
    assert sizes == [[3, 2, 3, 3, 1], [3, 3, 1]]


def test_pictures_and_float_arrays_meet_in_one_batch():
    images = [pictures(1)[0], np.random.default_rng(0).random((3, 9, 9), dtype=np.float32)]
    found = np.concatenate(iterated(images, [range(2)]))
    expected = [normalize(resize(image, (8, 6)), MEAN, STD).flatten().numpy() for image in images]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_only_a_few_batches_are_read_ahead():
    read: list[int] = []
    lock = threading.Lock()

    class Counted(list):
        def __getitem__(self, index):
            with lock:
                read.append(index)
            return super().__getitem__(index)

    ahead = []

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        ahead.append(len(read) - 2 * len(ahead))
        return pixels.flatten(1)

    iterated(Counted(pictures(20)), [range(20)], batch_size=2, encode=encode)
    assert sorted(read) == list(range(20))
    assert max(ahead) <= 2 * 3


def test_an_image_that_cannot_be_read_stops_the_work_and_is_named():
    class Broken(list):
        def __getitem__(self, index):
            if index == 4:
                raise ValueError("image 4 of the data set: cut off.")
            return super().__getitem__(index)

    with pytest.raises(ValueError, match="image 4 of the data set: cut off. No image is skipped"):
        iterated(Broken(pictures(7)), [range(7)])
    with pytest.raises(ValueError, match="batch_size=0 must be 1 or more"):
        iterated(pictures(2), [range(2)], batch_size=0)
