"""Settings of every kind, good and bad: what is accepted works, what is not is refused by name and value."""

import math
import tempfile
from typing import Any

import numpy as np
import torch
from bad_input import ODD_VALUES, bounded, examples, says
from hypothesis import given
from hypothesis import strategies as st

from ijepa_hf import IJepaConfig, IJepaForPretraining
from ijepa_hf.model.masking import ASPECT_RATIO_LIMITS, MAX_BLOCKS, STRATEGIES, Masks, MaskSettings, draw_masks

BASE = {
    "image_size": 32,
    "patch_size": 4,
    "num_channels": 3,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "predictor_hidden_size": 8,
    "predictor_num_hidden_layers": 1,
}


def pairs(low: float, high: float) -> st.SearchStrategy[Any]:
    """Two numbers, nearly always in order, as a list or a tuple."""
    numbers = st.tuples(st.floats(low, high), st.floats(low, high))
    return st.one_of(numbers.map(sorted), numbers.map(lambda pair: tuple(sorted(pair))), numbers)


SIDES = st.one_of(st.integers(1, 64), st.lists(st.integers(1, 64), min_size=2, max_size=2), st.sampled_from([16, 32]))
SMALL_WHOLE = st.integers(1, 12)
PLAUSIBLE = {
    "image_size": SIDES,
    "patch_size": st.one_of(st.sampled_from([1, 2, 4, 8]), st.lists(st.integers(1, 8), min_size=2, max_size=2)),
    "num_channels": st.integers(1, 14),
    "hidden_size": st.integers(1, 40),
    "num_hidden_layers": st.integers(1, 2),
    "num_attention_heads": SMALL_WHOLE,
    "intermediate_size": st.integers(1, 64),
    "hidden_act": st.sampled_from(["gelu", "relu", "gellu"]),
    "hidden_dropout_prob": st.floats(0, 1),
    "attention_probs_dropout_prob": st.floats(0, 1),
    "initializer_range": st.floats(0, 1),
    "layer_norm_eps": st.floats(0, 1),
    "qkv_bias": st.booleans(),
    "pooler_output_size": st.integers(-1, 9),
    "predictor_hidden_size": st.integers(1, 40),
    "predictor_num_hidden_layers": st.integers(1, 2),
    "predictor_num_attention_heads": st.one_of(st.none(), SMALL_WHOLE),
    "masking_strategy": st.sampled_from([*STRATEGIES, "blocks"]),
    "num_context_sets": st.integers(1, 4),
    "num_target_blocks": st.integers(1, 6),
    "context_scale": pairs(0.01, 1.0),
    "target_scale": pairs(0.01, 1.0),
    "target_aspect_ratio": pairs(0.1, 10.0),
    "context_keep_ratio": st.floats(0, 1),
    "official_min_keep": st.integers(0, 12),
    "allow_overlap": st.booleans(),
    "mask_ratio": st.floats(0, 1),
    "target_type": st.sampled_from(["representation", "pixels", "pixel"]),
    "vicreg_weight": st.sampled_from([0, 0.01, -1]),
    "loss_type": st.sampled_from(["smooth_l1", "mse", "l2"]),
    "normalize_targets": st.booleans(),
    "patch_init_std": st.one_of(st.none(), st.floats(0, 1)),
}


@st.composite
def configs(draw: Any) -> dict[str, Any]:
    """The fields that differ from a small configuration that works."""
    own: dict[str, Any] = {}
    if draw(st.booleans()):  # a strategy with fields of its own, which is refused less often than one with others
        strategy = draw(st.sampled_from(sorted(STRATEGIES)))
        own["masking_strategy"] = strategy
        for name in draw(st.lists(st.sampled_from(STRATEGIES[strategy].fields or ("masking_strategy",)), max_size=3)):
            own[name] = own.get(name) or draw(PLAUSIBLE[name])
    for name in draw(st.lists(st.sampled_from(sorted(PLAUSIBLE)), max_size=3, unique=True)):
        own[name] = draw(PLAUSIBLE[name] if draw(st.booleans()) else ODD_VALUES)
    return own


def outcome_of_config(own: dict[str, Any]) -> str:
    fields = {**BASE, **own}
    with bounded(seconds=5, megabytes=400):
        try:
            config = IJepaConfig(**fields)
        except (ValueError, TypeError) as error:
            message = str(error)
            assert own
            assert names_a_field(message, fields), (message, own)
            return type(error).__name__
        for name, value in fields.items():  # nothing was changed on the way
            if name == "pooler_output_size" and value is None:  # which is what it says: the encoder's width
                value = config.hidden_size
            assert plain(getattr(config, name)) == plain(value)
            assert type(plain(getattr(config, name))) is type(plain(value))
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            again = IJepaConfig.from_pretrained(folder)
        for name in (*fields, *PLAUSIBLE):
            assert plain(getattr(again, name)) == plain(getattr(config, name)), name
        assert again.mask_settings() == config.mask_settings()
        masks = draw_masks(config.mask_settings(), 2, np.random.default_rng(0))
        check_masks(masks, config.mask_settings(), 2)
        if is_small(config):
            take_a_step(config, masks)
    return "right"


def names_a_field(message: str, fields: dict[str, Any]) -> bool:
    """Whether it shows a field with its value, which may be the preset one that goes badly with those given."""
    preset = {name: IJepaConfig.__dataclass_fields__[name].default for name in PLAUSIBLE}
    return any(says(message, name, value) for name, value in {**preset, **fields}.items())


def plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def is_small(config: IJepaConfig) -> bool:
    """Whether a model of it is built in milliseconds."""
    widths = (config.hidden_size, config.predictor_hidden_size, config.intermediate_size, config.pooler_output_size)
    depths = (config.num_hidden_layers, config.predictor_num_hidden_layers)
    inputs = config.num_channels * math.prod(config.image_shape)
    return max(widths) <= 64 and max(depths) <= 2 and config.num_patches <= 256 and inputs <= 2**15


def take_a_step(config: IJepaConfig, masks: Masks) -> None:
    torch.manual_seed(0)
    model = IJepaForPretraining(config).train()
    before = [parameter.clone() for parameter in model.parameters()]
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-3)
    pixels = torch.randn(2, config.num_channels, *config.image_shape)
    loss = model(pixel_values=pixels, context_indices=masks.context_indices, target_indices=masks.target_indices).loss
    assert torch.isfinite(loss)
    loss.backward()
    optimizer.step()
    model.update_target_encoder(0.9)
    assert any(not torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))


def check_masks(masks: Masks, settings: MaskSettings, batch: int) -> None:
    """Shapes, ranges, order, and that context and targets share no patch where they must not."""
    context, target = masks.context_indices, masks.target_indices
    sets, patches = settings.num_context_sets, settings.num_patches
    assert context.dtype == target.dtype == torch.int64
    assert context.shape[:-1] == ((batch,) if sets == 1 else (batch, sets))
    assert target.dim() == 3
    assert target.shape[0] == batch
    assert 0 <= masks.redraw_rate <= 1
    for indices in (context, target):
        assert indices.shape[-1] >= 1
        assert 0 <= int(indices.min()) <= int(indices.max()) < patches
        assert bool((indices.diff(dim=-1) > 0).all())  # ascending, so none twice
    assert target.shape[1] == settings.num_targets
    if settings.masking_strategy in ("multi_block", "random", "rasterized"):
        assert context.shape[-1] == settings.num_context_patches
    # the published rule gives up target blocks where it finds no place beside all of them
    if not settings.allow_overlap and settings.masking_strategy != "multi_block_official":
        seen = torch.zeros(batch, patches, dtype=torch.bool)
        seen.scatter_(1, context.reshape(batch, -1), True)
        assert not bool(seen.gather(1, target.reshape(batch, -1)).any())


@examples(100, 2000)
@given(own=configs())
def test_a_config_works_wholly_or_is_refused_by_name_and_value(own):
    outcome_of_config(own)


# -- geometries ------------------------------------------------------------------------------------------------------

BAD_SCALES = st.sampled_from([(0.0, 1.0), (0.5, 0.4), (0.1, 1.5), (-1.0, 0.5), (5e-324, 1e-300), (1.0, 1.0)])
BAD_RATIOS = st.sampled_from([(0.0, 1.0), (2.0, 1.0), ASPECT_RATIO_LIMITS, (1e-300, 1e300), (1e-6, 1.0), (1e4, 1e5)])


@st.composite
def geometries(draw: Any) -> dict[str, Any]:
    """Images and patches of any shape, up to grids far larger than anybody uses, and blocks of any size."""
    most = draw(st.sampled_from([6, 20, 60, 300, 70_000]))
    rows = draw(st.integers(1, most))
    columns = draw(st.integers(1, most if most <= 300 else max(1, 80_000 // rows)))
    patch = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    cut = draw(st.sampled_from([0, 0, 0, 0, 1]))  # an image that is no multiple of its patches
    strategy = draw(st.sampled_from(sorted(STRATEGIES)))
    fields: dict[str, Any] = {
        "image_size": [rows * patch[0] + cut, columns * patch[1]],
        "patch_size": list(patch),
        "num_channels": draw(st.integers(1, 300)),
        "masking_strategy": strategy,
    }
    kinds = {
        "num_context_sets": st.one_of(st.integers(1, 4), st.sampled_from([MAX_BLOCKS, MAX_BLOCKS + 1, 10**9])),
        "num_target_blocks": st.one_of(st.integers(1, 8), st.sampled_from([MAX_BLOCKS, MAX_BLOCKS + 1, 10**9])),
        "context_scale": st.one_of(pairs(0.3, 1.0), pairs(0.001, 1.0), BAD_SCALES),
        "target_scale": st.one_of(pairs(0.02, 0.3), pairs(0.001, 1.0), BAD_SCALES),
        "target_aspect_ratio": st.one_of(pairs(0.5, 2.0), pairs(1e-5, 1e5), BAD_RATIOS),
        "context_keep_ratio": st.one_of(st.floats(0.01, 0.5), st.floats(0, 1.1)),
        "official_min_keep": st.one_of(st.integers(0, 10), st.integers(-1, 10**5)),
        "allow_overlap": st.booleans(),
        "mask_ratio": st.one_of(st.floats(0.1, 0.9), st.floats(0, 1)),
    }
    for name in STRATEGIES[strategy].fields:
        if draw(st.booleans()):
            fields[name] = draw(kinds[name])
    return fields


def outcome_of_geometry(fields: dict[str, Any], seed: int) -> str:
    with bounded(seconds=6, megabytes=1000):
        try:
            config = IJepaConfig(**fields)
        except ValueError as error:
            message = str(error)
            assert names_a_field(message, fields), (message, fields)
            return "ValueError"
        settings, generator = config.mask_settings(), np.random.default_rng(seed)
        assert settings.grid_size == config.grid_size
        blocks = settings.num_context_sets * settings.num_targets
        batch = 3 if blocks * settings.num_patches < 2**20 else 1
        check_masks(draw_masks(settings, batch, generator), settings, batch)
    return "right"


@examples(100, 2000)
@given(fields=geometries(), seed=st.integers(0, 2**32))
def test_masks_of_any_geometry_come_in_time_or_the_geometry_is_refused_by_name(fields, seed):
    outcome_of_geometry(fields, seed)
