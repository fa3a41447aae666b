"""What a model's images are like, for every kind of vision model."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModel, CLIPConfig, CLIPVisionConfig, Dinov2Config, ResNetConfig, ViTConfig

from ijepa_hf.model.vision_models import check_model_name, commit_of, read_image_settings

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
VIT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
CLIP = {**VIT, "image_size": 28, "patch_size": 7}


def write(folder, config, **processor):
    """A model folder without weights; returns what `read_image_settings` takes."""
    config.save_pretrained(folder)
    fields = {"image_processor_type": "ViTImageProcessor", "image_mean": MEAN, "image_std": STD, **processor}
    fields = {name: value for name, value in fields.items() if value is not None}
    (folder / "preprocessor_config.json").write_text(json.dumps(fields))
    return str(folder), AutoConfig.from_pretrained(folder)


RESNET = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")


@pytest.mark.parametrize(
    ("config", "processor", "shape"),
    [
        (ViTConfig(**VIT, image_size=32, patch_size=8), {"size": {"height": 99, "width": 99}}, (32, 32)),
        (ViTConfig(**VIT, image_size=[16, 32], patch_size=8), {}, (16, 32)),
        (
            Dinov2Config(**{k: v for k, v in VIT.items() if k != "intermediate_size"}, image_size=518),
            {"do_center_crop": True, "crop_size": {"height": 224, "width": 196}, "size": {"shortest_edge": 256}},
            (224, 196),
        ),
        (ViTConfig(**VIT, image_size=32), {"do_center_crop": False, "crop_size": {"height": 9, "width": 9}}, (32, 32)),
        (CLIPConfig(vision_config=CLIP), {"size": {"shortest_edge": 99}}, (28, 28)),
        (CLIPConfig(vision_config=CLIP), {"do_center_crop": True, "crop_size": 21, "size": 21}, (21, 21)),
        (CLIPVisionConfig(**CLIP), {"size": {"shortest_edge": 99}}, (28, 28)),
        (RESNET, {"size": {"shortest_edge": 64}, "crop_pct": 0.875}, (64, 64)),
        (RESNET, {"size": {"height": 48, "width": 64}}, (48, 64)),
        (RESNET, {"size": 48}, (48, 48)),
        (RESNET, {"size": {"shortest_edge": 64}, "crop_size": {"height": 56, "width": 56}}, (56, 56)),
        (RESNET, {"size": {"shortest_edge": 64}, "do_center_crop": False, "crop_size": 56}, (64, 64)),
    ],
)
def test_the_size_is_the_centre_crop_or_the_models_or_the_processors(config, processor, shape, tmp_path):
    source, config = write(tmp_path, config, **processor)
    assert read_image_settings(source, config) == (shape, MEAN, STD)


def test_a_model_takes_images_of_the_size_that_was_read(tmp_path):
    source, config = write(tmp_path, RESNET, size={"shortest_edge": 64})
    shape, mean, _ = read_image_settings(source, config)
    features = AutoModel.from_config(config)(torch.zeros(2, len(mean), *shape)).last_hidden_state
    assert features.shape == (2, 16, 8, 8)


def test_means_are_of_pixels_from_0_to_1_however_the_processor_scales_them(tmp_path):
    config = ViTConfig(**VIT, image_size=32)
    pixels = torch.tensor([0.0, 51.0, 255.0])
    for number, (factor, fields) in enumerate(
        [(1 / 127.5, {"rescale_factor": 1 / 127.5}), (1.0, {"do_rescale": False}), (1 / 255, {"do_rescale": True})]
    ):
        (tmp_path / str(number)).mkdir()
        source, config = write(tmp_path / str(number), config, **fields)
        _, mean, std = read_image_settings(source, config)
        theirs = (pixels * factor - MEAN[1]) / STD[1]
        torch.testing.assert_close((pixels / 255 - mean[1]) / std[1], theirs)
    assert (mean, std) == (MEAN, STD)  # to the bit


def test_without_normalisation_the_pixels_stay_as_they_are_in_every_channel(tmp_path):
    config = ViTConfig(**VIT, image_size=32, num_channels=5)
    source, config = write(tmp_path, config, do_normalize=False, image_mean=None, image_std=None)
    assert read_image_settings(source, config) == ((32, 32), [0.0] * 5, [1.0] * 5)


def test_what_no_file_says_is_an_error_that_tells_what_to_write(tmp_path):
    source, config = write(tmp_path, RESNET)
    with pytest.raises(ValueError, match=r'the size of its images; write "size": \{"height"'):
        read_image_settings(source, config)
    source, config = write(tmp_path, RESNET, size=48, image_std=None)
    with pytest.raises(ValueError, match="has no image_mean and image_std; write them"):
        read_image_settings(source, config)
    source, config = write(tmp_path, RESNET, size=48, do_flip_channel_order=True)
    with pytest.raises(ValueError, match="channels in reverse order"):
        read_image_settings(source, config)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(OSError, match="preprocessor_config.json"):
        read_image_settings(source, config)


def test_a_folder_has_no_commit_and_no_revision_and_a_path_must_lead_to_a_configuration(tmp_path):
    write(tmp_path, RESNET)
    assert commit_of(str(tmp_path), None) is None
    check_model_name(str(tmp_path), None)
    check_model_name("me/birds", "v1")
    with pytest.raises(ValueError, match="model_revision='v1' is for Hub repos, and model='.*' is on this disk"):
        check_model_name(str(tmp_path), "v1")
    for name in ("./nowhere", "runs/birds/3", str(tmp_path / "empty")):
        with pytest.raises(FileNotFoundError, match=r"there is no such folder with a config\.json"):
            check_model_name(name, None)
