"""Backbones of many kinds against the stock models called by hand: the right tokens in their order, and refusals."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_config
from torch import nn
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    IJepaConfig,
    ResNetConfig,
    SwinConfig,
    ViTConfig,
    ViTMAEConfig,
    ViTModel,
)

from ijepa_hf.evaluation.backbones import (
    load_backbone,
    raw_patches,
    raw_pixels,
    untrained_twin,
)
from ijepa_hf.model.modeling_ijepa import IJepaForPretraining, new_model
from ijepa_hf.runs.export import export_model

SHAPE = (32, 32)
SIZES = {"hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
WIDE = {**SIZES, "intermediate_size": 64}
DECODER = {
    "decoder_hidden_size": 16, "decoder_num_attention_heads": 2, "decoder_num_hidden_layers": 1,
    "decoder_intermediate_size": 16,
}  # fmt: skip
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 20}
CONFIGS = {
    "ijepa": IJepaConfig(**WIDE),
    "vit": ViTConfig(**WIDE),
    "vit_mae": ViTMAEConfig(**WIDE, **DECODER),
    "dinov2": Dinov2Config(**SIZES),
    "registers": Dinov2WithRegistersConfig(**SIZES),
    "clip_vision": CLIPVisionConfig(**WIDE),
    "clip": CLIPConfig(vision_config=WIDE, text_config=TEXT),
    "resnet": ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]),
    "swin": SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4),
}
PREFIX = {"ijepa": 0, "vit": 1, "vit_mae": 1, "dinov2": 1, "registers": 5, "clip_vision": 1, "clip": 1, "swin": 0}


def scrambled(config) -> nn.Module:
    """A stock model with weights far from their initial values, in eval mode."""
    torch.manual_seed(0)
    model = AutoModel.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("backbones")
    for name, config in CONFIGS.items():
        scrambled(config).save_pretrained(root / name)
    return root


def images(n: int = 3, shape: tuple[int, int] = SHAPE) -> torch.Tensor:
    return torch.randn(n, 3, *shape, generator=torch.Generator().manual_seed(1))


def tower(folder, name: str) -> nn.Module:
    model = AutoModel.from_pretrained(folder / name).eval()
    return model.vision_model if name == "clip" else model


@pytest.mark.parametrize("name", sorted(set(PREFIX) - {"vit_mae"}))
def test_patches_are_the_stock_models_without_class_token_and_registers(folders, name):
    backbone = load_backbone(str(folders / name), SHAPE)
    with torch.no_grad():
        hidden = tower(folders, name)(pixel_values=images()).last_hidden_state
    tokens = backbone.tokens(images())
    assert backbone.grid_size == (4, 4)
    torch.testing.assert_close(tokens.patches.flatten(1, 2), hidden[:, PREFIX[name] :])
    assert backbone.has_class_token == (PREFIX[name] > 0)
    if backbone.has_class_token:
        torch.testing.assert_close(tokens.class_token, hidden[:, 0])
        torch.testing.assert_close(backbone.pooled(images(), "cls"), hidden[:, 0])
    torch.testing.assert_close(backbone.pooled(images(), "mean"), hidden[:, PREFIX[name] :].mean(dim=1))
    assert backbone.width == hidden.shape[-1]


def test_patches_of_a_convolutional_network_are_the_places_of_its_map(folders):
    backbone = load_backbone(str(folders / "resnet"), SHAPE)
    with torch.no_grad():
        hidden = tower(folders, "resnet")(pixel_values=images()).last_hidden_state
    patches = backbone.tokens(images()).patches
    assert patches.shape == (3, 4, 4, 16)
    torch.testing.assert_close(patches[:, 1, 3], hidden[:, :, 1, 3])
    torch.testing.assert_close(backbone.pooled(images(), "mean"), hidden.mean(dim=(2, 3)))


def test_vit_mae_hides_no_patch_and_keeps_their_order(folders):
    # a ViT with the same weights knows of no masking
    encoder = tower(folders, "vit_mae")
    vit = ViTModel(ViTConfig(**WIDE), add_pooling_layer=False).eval()
    vit.load_state_dict(encoder.state_dict())
    backbone = load_backbone(str(folders / "vit_mae"), SHAPE)
    torch.manual_seed(7)
    patches = backbone.tokens(images()).patches
    with torch.no_grad():
        expected = vit(images()).last_hidden_state
        masked = encoder(images()).last_hidden_state
    assert masked.shape[1] == 5  # left alone, it hides twelve of sixteen
    torch.testing.assert_close(patches.flatten(1, 2), expected[:, 1:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["ijepa", "vit", "vit_mae", "dinov2", "registers", "clip", "clip_vision"])
def test_four_layers_are_the_last_four_as_the_model_would_give_each_out(folders, name):
    """A copy of the network that ends after a layer gives what that layer is worth."""
    four = load_backbone(str(folders / name), SHAPE, layers=4).tokens(images())
    for depth in (2, 3, 4, 5):
        short = load_backbone(str(folders / name), SHAPE)
        layers = next(
            part for part in short.model.modules() if isinstance(part, nn.ModuleList) and len(part) == 5
        )  # fmt: skip
        del layers[depth:]
        tokens = short.tokens(images())
        part = slice(32 * (depth - 2), 32 * (depth - 1))
        torch.testing.assert_close(four.patches[..., part], tokens.patches, atol=1e-5, rtol=1e-5)
        if tokens.class_token is not None:
            torch.testing.assert_close(four.class_token[:, part], tokens.class_token, atol=1e-5, rtol=1e-5)


def test_images_of_another_size_than_the_models_have_their_own_grid(folders):
    for name in ("vit", "dinov2", "ijepa"):
        backbone = load_backbone(str(folders / name), (32, 48))
        assert backbone.grid_size == (4, 6)
        assert backbone.tokens(images(shape=(32, 48))).patches.shape == (3, 4, 6, 32)


def test_a_backbone_is_frozen_float32_and_in_eval_mode(folders, tmp_path):
    half = scrambled(CONFIGS["vit"]).to(torch.bfloat16)
    half.save_pretrained(tmp_path)
    backbone = load_backbone(str(tmp_path), SHAPE)
    assert {parameter.dtype for parameter in backbone.model.parameters()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())
    assert not any(module.training for module in backbone.model.modules())
    assert not backbone.tokens(images().requires_grad_()).patches.requires_grad


def test_our_own_folders_give_the_target_encoders_features(tmp_path):
    model = new_model(tiny_config(), 3).eval()
    export_model(model, tmp_path, step=1, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    with torch.no_grad():
        expected = model.target_encoder(images()).last_hidden_state
    found = load_backbone(str(tmp_path), SHAPE).tokens(images()).patches
    torch.testing.assert_close(found.flatten(1, 2), expected)


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ijepa", "resnet", "swin"])
def test_a_class_token_is_asked_in_vain_of_a_model_without_one(folders, name):
    backbone = load_backbone(str(folders / name), SHAPE)
    with pytest.raises(ValueError, match=r"pooling='cls': model=.* has no class token; use --pooling mean"):
        backbone.pooled(images(), "cls")
    with pytest.raises(ValueError, match="pooling='max' must be 'mean' or 'cls'"):
        backbone.pooled(images(), "max")


def test_a_model_with_one_patch_is_refused_where_patches_are_needed(tmp_path, folders):
    scrambled(ResNetConfig(embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4)).save_pretrained(tmp_path)
    backbone = load_backbone(str(tmp_path), SHAPE)
    with pytest.raises(ValueError, match=r"method='segmentation' needs a vector for each patch: .*ResNetModel"):
        backbone.check_patches("segmentation")
    load_backbone(str(folders / "resnet"), SHAPE).check_patches("segmentation")


def test_four_layers_are_refused_of_what_is_no_stack_of_four(folders, tmp_path):
    scrambled(ViTConfig(**{**WIDE, "num_hidden_layers": 3})).save_pretrained(tmp_path)
    for folder in (tmp_path, folders / "resnet", folders / "swin"):
        with pytest.raises(ValueError, match="is no stack of at least 4 equal layers; use --layers 1"):
            load_backbone(str(folder), SHAPE, layers=4)
    with pytest.raises(ValueError, match="layers=2 must be 1 "):
        load_backbone(str(folders / "vit"), SHAPE, layers=2)


def test_a_file_that_lacks_weights_of_the_encoder_is_refused_but_the_pooler_is_not_needed(folders, tmp_path):
    model = tower(folders, "vit")
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = {name: value.clone() for name, value in load_file(path).items()}
    pooler = [name for name in state if name.startswith("pooler")]
    assert pooler != []
    save_file({name: value for name, value in state.items() if name not in pooler}, path, {"format": "pt"})
    load_backbone(str(tmp_path), SHAPE)
    lost = next(name for name in state if ".3." in name)
    save_file({name: value for name, value in state.items() if name != lost}, path, {"format": "pt"})
    with pytest.raises(ValueError, match="does not hold 1 weights of ViTModel .*which would stay random"):
        load_backbone(str(tmp_path), SHAPE)


@pytest.mark.parametrize("length", [0, 100, -100])
def test_weights_that_were_not_copied_whole_are_named(folders, tmp_path, length):
    tower(folders, "vit").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"a \.safetensors file of its weights is damaged .* copy it again") as caught:
        load_backbone(str(tmp_path), SHAPE)
    assert str(tmp_path) in str(caught.value)


def test_weights_of_another_shape_than_the_configuration_says_are_refused(folders, tmp_path):
    tower(folders, "vit").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    with pytest.raises(ValueError, match="the weights do not fit config.json"):
        load_backbone(str(tmp_path), SHAPE)


def test_a_pickle_is_not_read(folders, tmp_path):
    model = tower(folders, "vit")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load_backbone(str(tmp_path), SHAPE)


def test_code_in_the_folder_is_not_run(folders, tmp_path):
    tower(folders, "vit").save_pretrained(tmp_path)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Model: pass\nclass Config: pass\n")
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "evil.Model", "AutoConfig": "evil.Config"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    load_backbone(str(tmp_path), SHAPE)
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "evil"}))
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_backbone(str(tmp_path), SHAPE)
    assert not (tmp_path / "ran").exists()


def test_images_that_the_model_does_not_take_are_refused_before_the_work(folders):
    with pytest.raises(ValueError, match=r"does not take the images of its own image processor, 3 channels of 4x4"):
        load_backbone(str(folders / "clip"), (4, 4))


# -- the rows beside the model ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_the_untrained_twin_is_the_same_network_with_weights_of_the_seed(folders, name):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    model, twins = load_backbone(str(folders / name), SHAPE), []
    for seed in (0, 0, 1):
        twins.append(untrained_twin(str(folders / name), SHAPE, seed))
    assert torch.equal(before, torch.get_rng_state())
    features = [twin.pooled(images(), "mean") for twin in twins]
    assert torch.equal(features[0], features[1])
    assert not torch.allclose(features[0], features[2])
    assert not torch.allclose(features[0], model.pooled(images(), "mean"))
    shapes = [
        {key: value.shape for key, value in one.model.state_dict().items() if "pooler" not in key}
        for one in (twins[0], model)
    ]
    assert shapes[0] == shapes[1]


def test_the_twin_of_an_ijepa_model_is_what_a_pretraining_starts_from(tmp_path):
    config = tiny_config()
    export_model(
        IJepaForPretraining(config), tmp_path, step=1, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )  # fmt: skip
    twin = untrained_twin(str(tmp_path), SHAPE, 11).model.state_dict()
    start = new_model(config, 11).target_encoder.state_dict()
    assert twin.keys() == start.keys()
    assert all(torch.equal(twin[name], start[name]) for name in twin)


def test_raw_pixels_are_all_pixels_of_a_small_image_and_32_by_32_of_a_large_one():
    small, large = images(shape=(6, 32)), images(shape=(80, 20))
    np.testing.assert_array_equal(raw_pixels(small), small.reshape(3, -1))
    expected = nn.functional.interpolate(large, size=(32, 20), mode="bilinear", antialias=True)
    np.testing.assert_array_equal(raw_pixels(large), expected.reshape(3, -1))


def test_raw_patches_are_the_pixels_at_their_places():
    pixels = images(shape=(8, 12))
    patches = raw_patches(pixels, (2, 3))
    assert patches.shape == (3, 2, 3, 3 * 4 * 4)
    for row in range(2):
        for column in range(3):
            there = pixels[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            np.testing.assert_array_equal(patches[:, row, column], there.flatten(1))
    assert raw_patches(images(shape=(64, 64)), (2, 2)).shape == (3, 2, 2, 3 * 16 * 16)
    assert raw_patches(images(shape=(33, 33)), (4, 4)).shape == (3, 4, 4, 3 * 8 * 8)
