"""The configuration: what it derives, what it refuses, and that stock transformers reads what it writes."""

import json
import math
import re

import numpy as np
import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_config

from ijepa_hf import IJepaConfig, MaskSettings
from ijepa_hf.model.configuration_ijepa import MASK_FIELDS


def test_defaults_are_the_published_ones():
    config = IJepaConfig()
    assert (config.predictor_hidden_size, config.predictor_num_hidden_layers) == (384, 12)
    assert config.predictor_num_attention_heads is None
    assert config.predictor_config().num_attention_heads == config.num_attention_heads
    assert (config.num_target_blocks, config.num_context_sets, config.official_min_keep) == (4, 1, 10)
    assert (config.target_scale, config.context_scale) == ((0.15, 0.2), (0.85, 1.0))
    assert config.target_aspect_ratio == (0.75, 1.5)
    assert (config.loss_type, config.normalize_targets, config.layer_norm_eps) == ("smooth_l1", True, 1e-6)


@given(rows=st.integers(4, 20), columns=st.integers(4, 20), patch=st.tuples(st.integers(1, 16), st.integers(1, 16)))
def test_grid_is_the_image_divided_by_the_patch(rows, columns, patch):
    config = IJepaConfig(image_size=[rows * patch[0], columns * patch[1]], patch_size=list(patch))
    assert config.grid_size == (rows, columns)
    assert config.num_patches == rows * columns
    assert config.mask_settings().grid_size == (rows, columns)


@pytest.mark.parametrize(("channels", "patch"), [(3, 4), (1, 16), (12, 8)])
def test_patch_init_std_of_none_is_one_over_the_root_of_a_patchs_inputs(channels, patch):
    config = IJepaConfig(num_channels=channels, image_size=patch * 14, patch_size=patch)
    assert config.resolved_patch_init_std == pytest.approx(1 / math.sqrt(channels * patch * patch))
    assert config.replace(patch_init_std=0.02).resolved_patch_init_std == 0.02


def test_predictor_config_has_the_predictors_widths_and_an_mlp_of_four_times_its_width():
    config = tiny_config(predictor_num_attention_heads=4).predictor_config()
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (16, 2, 4)
    assert config.intermediate_size == 64


def test_mask_settings_have_the_same_fields_and_defaults():
    settings = MaskSettings(grid_size=(14, 14))
    assert settings == IJepaConfig().mask_settings()
    assert set(MASK_FIELDS) == set(MaskSettings.__dataclass_fields__) - {"grid_size"}


BAD = [
    ({"image_size": 30, "patch_size": 4}, r"image_size=30: the height 30 .* 28 or 32"),
    ({"image_size": [32, 30], "patch_size": 4}, r"the width 30 .* 28 or 32"),
    ({"image_size": 3, "patch_size": 4}, r"use 4, or"),
    ({"image_size": 0}, "image_size=0 must be"),
    ({"hidden_size": 130, "num_attention_heads": 12}, r"hidden_size=130 .* nearest that works is 132"),
    ({"predictor_hidden_size": 100}, r"predictor_hidden_size=100 .* works is 96"),
    ({"predictor_num_attention_heads": 5}, r"predictor_hidden_size=384 .* predictor_num_attention_heads=5"),
    ({"predictor_num_attention_heads": 0}, "predictor_num_attention_heads=0"),
    ({"predictor_num_hidden_layers": 0}, "predictor_num_hidden_layers=0"),
    ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
    ({"num_channels": 0}, "num_channels=0"),
    ({"loss_type": "l2"}, "loss_type='l2' .* 'smooth_l1', 'mse'"),
    ({"vicreg_weight": -1}, "vicreg_weight=-1 must be from 0"),
    ({"target_type": "pixel"}, "target_type='pixel' .* 'representation', 'pixels'"),
    ({"patch_init_std": 0.0}, "patch_init_std=0.0"),
    ({"patch_init_std": math.inf}, "patch_init_std=inf"),
    ({"patch_size": -4}, "patch_size=-4 must be .* write patch_size=16"),
    ({"layer_norm_eps": math.nan}, "layer_norm_eps=nan must be greater than 0 and at most 1"),
    ({"initializer_range": -1.0}, "initializer_range=-1.0"),
    ({"initializer_range": math.inf}, "initializer_range=inf must be greater than 0 and at most 100"),
    ({"patch_init_std": 10**40}, "patch_init_std=1000.* must be greater than 0 and at most 100"),
    ({"hidden_dropout_prob": 1.0}, "hidden_dropout_prob=1.0 must be at least 0 and below 1"),
    ({"attention_probs_dropout_prob": -1}, "attention_probs_dropout_prob=-1"),
    ({"hidden_act": "gellu"}, "hidden_act='gellu' .* did you mean 'gelu'"),
    ({"hidden_act": ""}, "hidden_act='' .* write for example hidden_act='gelu'"),
    ({"pooler_output_size": 0}, "pooler_output_size=0 must be at least 1"),
    ({"dtype": "floot32"}, "dtype='floot32' is no type of torch"),
    ({"model_type": "vit"}, "model_type='vit' must be 'ijepa'"),
    ({"image_size": 16, "patch_size": 16}, r"image_size=16 with patch_size=16: .* grid"),
    ({"image_size": 4000, "patch_size": 1}, "image_size=4000 with patch_size=1: grid_size=.* 16000000 patches"),
    ({"masking_strategy": "blocky"}, "masking_strategy='blocky'"),
    ({"target_scale": (0.3, 0.2)}, "target_scale"),
    ({"context_keep_ratio": 0.9}, "context_keep_ratio"),
    ({"official_min_keep": 4}, "official_min_keep"),
    ({"masking_strategy": "multi_block_official", "context_keep_ratio": 0.3}, "context_keep_ratio"),
    ({"masking_strategy": "multi_block_official", "image_size": 32, "patch_size": 4}, "official_min_keep"),
]


@pytest.mark.parametrize(("fields", "message"), BAD)
def test_a_bad_value_is_refused_with_its_name_and_the_rule(fields, message):
    with pytest.raises(ValueError, match=message):
        IJepaConfig(**fields)


WRONG_TYPES = [
    {"hidden_size": True},
    {"hidden_size": "32"},
    {"image_size": 32.0},
    {"qkv_bias": 1},
    {"num_labels": "two"},
    {"predictor_hidden_size": 16.0},
    {"predictor_hidden_size": None},
    {"predictor_num_attention_heads": True},
    {"num_target_blocks": np.int64(4)},
    {"context_keep_ratio": np.float32(0.25)},
    {"context_keep_ratio": "a quarter"},
    {"patch_init_std": "0.02"},
    {"patch_init_std": True},
    {"context_scale": None},
    {"context_scale": 0.9},
    {"target_scale": "ab"},
    {"target_scale": [True, True]},
    {"allow_overlap": 1},
    {"normalize_targets": "no"},
]


@pytest.mark.parametrize("fields", WRONG_TYPES, ids=str)
def test_a_value_of_another_type_is_refused_with_its_name_and_an_example(fields):
    ((name, value),) = fields.items()
    with pytest.raises(TypeError, match=re.escape(f"{name}={value!r} must be ") + f".*, for example {name}="):
        IJepaConfig(**fields)


def test_an_unknown_field_is_refused_with_the_nearest_right_one():
    with pytest.raises(ValueError, match="'predictor_hiden_size' is not a field .* 'predictor_hidden_size'"):
        IJepaConfig(predictor_hiden_size=384)


def test_a_field_of_a_newer_version_in_a_file_still_loads():
    fields = {**json.loads(IJepaConfig().to_json_string()), "transformers_version": "99.0", "field_of_the_future": 1}
    assert IJepaConfig(**fields).hidden_size == 768


def test_overrides_passed_to_from_pretrained_are_validated(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    assert IJepaConfig.from_pretrained(tmp_path, image_size=48).grid_size == (12, 12)
    with pytest.raises(ValueError, match="image_size=30"):
        IJepaConfig.from_pretrained(tmp_path, image_size=30)


def test_saved_and_loaded_config_is_equal(tmp_path):
    config = tiny_config(image_size=[32, 64], context_scale=(0.9, 1.0), patch_init_std=0.1)
    config.save_pretrained(tmp_path)
    loaded = IJepaConfig.from_pretrained(tmp_path)
    assert {name: getattr(loaded, name) for name in MASK_FIELDS} == {
        name: getattr(config, name) for name in MASK_FIELDS
    }
    assert loaded.image_shape == (32, 64)
    assert loaded.patch_init_std == 0.1


def test_auto_config_of_a_saved_file_is_the_stock_class_with_every_field(tmp_path):
    tiny_config(context_keep_ratio=0.3).save_pretrained(tmp_path)
    loaded = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is transformers.IJepaConfig
    assert loaded.context_keep_ratio == 0.3
    assert IJepaConfig.from_stock(loaded).mask_settings() == tiny_config(context_keep_ratio=0.3).mask_settings()


def test_from_stock_keeps_the_attention_backend_and_refuses_other_models():
    stock = transformers.IJepaConfig(hidden_size=96, attn_implementation="eager")
    ours = IJepaConfig.from_stock(stock)
    assert (ours.hidden_size, ours._attn_implementation) == (96, "eager")
    assert ours.layer_norm_eps == 1e-12  # the stock file's own value, not our default
    assert IJepaConfig.from_stock(ours) is ours
    with pytest.raises(ValueError, match="ViTConfig"):
        IJepaConfig.from_stock(transformers.ViTConfig())


def test_replace_validates_and_leaves_the_original_alone():
    config = tiny_config()
    assert config.replace(patch_size=8).grid_size == (4, 4)
    assert config.grid_size == (8, 8)
    with pytest.raises(ValueError, match="image_size=32"):
        config.replace(patch_size=5)
