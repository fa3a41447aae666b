"""Configures an I-JEPA model: the stock `transformers.IJepaConfig` plus the fields of pretraining.

The stock fields describe the encoder (width, depth, heads, image and patch size). The fields added here describe the
predictor, the masks and the loss; their defaults are the published ones. A file written by this class is read by the
stock class as well (`model_type` stays `"ijepa"`), which is why `AutoModel.from_pretrained` needs nothing from here.

Bad values are refused here, when the configuration is made, before any work is done.
"""

import difflib
import inspect
import math
from dataclasses import field
from typing import Any, Self, get_args

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import IJepaConfig as StockIJepaConfig
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from .masking import MaskSettings  # relative: the file is shipped with models, see runs/export.py

MASK_FIELDS = tuple(name for name in MaskSettings.__dataclass_fields__ if name != "grid_size")
LOSS_TYPES = ("smooth_l1", "mse")
TARGET_TYPES = ("representation", "pixels")

_LARGEST_STD = 100  # of initial weights, far above any use
_LARGEST_WEIGHT = 100  # of a term of the loss, far above any use

# Keyword arguments that transformers itself understands although they are not dataclass fields of the stock class.
_TRANSFORMERS_KEYWORDS = frozenset(
    [
        "attn_implementation",
        "auto_map",
        "experts_implementation",
        "model_type",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "pooler_act",
        "tie_word_embeddings",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    ]
)


_Pair = tuple[float | int, float | int] | list[float | int]


def _added(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


def _mask_field(name: str) -> Any:
    """Copies default and help text of a field of `MaskSettings`."""
    entry = MaskSettings.__dataclass_fields__[name]
    return _added(entry.default, entry.metadata["help"])


class IJepaConfig(StockIJepaConfig):
    """Configures `IJepaModel`, `IJepaPredictor` and `IJepaForPretraining`.

    `metadata["help"]` describes each field added to those of `transformers.IJepaConfig`; those of the masks are
    described in `masking.MaskSettings`. `layer_norm_eps` is 1e-6, as in the published models, where the stock class
    has 1e-12. `image_size` and `patch_size` are pixels, an `int` or `(height, width)`; each side
    of an image must be a multiple of the patch.

    Raises:
        ValueError: If a field has a bad value, is not used by the chosen masking strategy, is unknown, or if blocks
            cannot fit the patch grid. The message names the field, the value, the rule and a value that works.
        TypeError: If a field is of another type. The message names the field, the value, and one that works.
    """

    layer_norm_eps: float = _added(1e-6, "Added to the variance in each layer norm.")
    predictor_hidden_size: int = _added(384, "Width E of the predictor, a multiple of 4 and of its heads.")
    predictor_num_hidden_layers: int = _added(12, "Depth of the predictor.")
    predictor_num_attention_heads: int | None = _added(
        None, "Heads of the predictor; the encoder's number if not given, as published."
    )
    masking_strategy: str = _mask_field("masking_strategy")
    num_context_sets: int = _mask_field("num_context_sets")
    num_target_blocks: int = _mask_field("num_target_blocks")
    context_scale: _Pair = _mask_field("context_scale")
    target_scale: _Pair = _mask_field("target_scale")
    target_aspect_ratio: _Pair = _mask_field("target_aspect_ratio")
    context_keep_ratio: float | int = _mask_field("context_keep_ratio")
    official_min_keep: int = _mask_field("official_min_keep")
    allow_overlap: bool = _mask_field("allow_overlap")
    mask_ratio: float | int = _mask_field("mask_ratio")
    loss_type: str = _added("smooth_l1", "smooth_l1 (published code) or mse (paper, squared L2).")
    normalize_targets: bool = _added(
        True, "Layer-normalise (no affine) the targets: representations, or the pixels of each patch."
    )
    patch_init_std: float | None = _added(
        None,
        "Std of the initial patch embedding; 1/sqrt(inputs of a patch) if not given, which keeps small patches from "
        "drowning under the position table. Published models have 0.02, right for 16x16x3 inputs.",
    )
    target_type: str = _added(
        "representation",
        "What is predicted: representation, or pixels of the target patches (table 7 of the paper), to compare with.",
    )
    # Source: arXiv 2410.19560 (C-JEPA), which has 0.001.
    vicreg_weight: float | int = _added(
        0.0,
        "Weight of VICReg's variance and covariance terms on the context features of each image, averaged over its "
        "patches (C-JEPA); 0 is off.",
    )

    def __post_init__(self, **kwargs: Any) -> None:
        self._refuse_unknown(kwargs)
        self._check_types()
        for name in ("context_scale", "target_scale", "target_aspect_ratio"):
            setattr(self, name, tuple(getattr(self, name)))  # JSON has no tuples
        self._check_geometry()
        self._check_widths()
        self._check_loss()
        self._check_stock_fields(kwargs)
        try:
            self.mask_settings()  # refuses masks that cannot fit
        except ValueError as error:
            if "grid" not in str(error):
                raise
            raise ValueError(f"image_size={self.image_size!r} with patch_size={self.patch_size!r}: {error}") from error
        super().__post_init__(**kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        try:
            super().__setattr__(name, value)
        except StrictDataclassError as error:  # neither a ValueError nor a TypeError
            raise _wrong_type(name, value, type(self)) from error

    # -- derived ---------------------------------------------------------------------------------------------------

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width of an image, in pixels."""
        return _pair(self.image_size)

    @property
    def patch_shape(self) -> tuple[int, int]:
        """Height and width of a patch, in pixels."""
        return _pair(self.patch_size)

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of the patch grid."""
        (height, width), (patch_height, patch_width) = self.image_shape, self.patch_shape
        return height // patch_height, width // patch_width

    @property
    def num_patches(self) -> int:
        """Patches of one image, N."""
        return math.prod(self.grid_size)

    @property
    def target_size(self) -> int:
        """Channels of a target: the encoder's width D, or the pixels of a patch times the channels of an image."""
        return self.hidden_size if self.target_type == "representation" else self.pixels_per_patch

    @property
    def pixels_per_patch(self) -> int:
        """Numbers of which a patch is made: its pixels times the channels of an image."""
        return self.num_channels * math.prod(self.patch_shape)

    @property
    def resolved_patch_init_std(self) -> float:
        """`patch_init_std`, or 1/sqrt(inputs of a patch) where that is `None`."""
        if self.patch_init_std is not None:
            return self.patch_init_std
        return 1.0 / math.sqrt(self.pixels_per_patch)

    def mask_settings(self) -> MaskSettings:
        """Returns the settings for `ijepa_hf.model.masking.draw_masks`."""
        return MaskSettings(grid_size=self.grid_size, **{name: getattr(self, name) for name in MASK_FIELDS})

    def predictor_config(self) -> "IJepaConfig":
        """Returns a copy whose encoder fields (width, depth, heads, MLP width) are the predictor's."""
        fields = self.to_dict()
        fields["num_attention_heads"] = self.predictor_num_attention_heads or self.num_attention_heads
        fields["hidden_size"] = self.predictor_hidden_size
        fields["num_hidden_layers"] = self.predictor_num_hidden_layers
        fields["intermediate_size"] = 4 * self.predictor_hidden_size
        fields["pooler_output_size"] = None
        config = type(self)(**fields)
        config._attn_implementation_internal = self._attn_implementation_internal
        return config

    # -- reading ---------------------------------------------------------------------------------------------------

    @classmethod
    def from_stock(cls, config: PreTrainedConfig) -> "IJepaConfig":
        """Returns `config` itself if it is an `IJepaConfig` of this package, else its fields carried over into one.

        Args:
            config: This package's configuration, or a stock `transformers.IJepaConfig`.

        Raises:
            ValueError: If it is the configuration of another kind of model.
        """
        if isinstance(config, cls):
            return config
        if config.model_type != cls.model_type:
            raise ValueError(
                f"config is a {type(config).__name__} (model_type={config.model_type!r}); expected 'ijepa'."
            )
        converted = cls(**config.to_dict())
        converted._attn_implementation_internal = getattr(config, "_attn_implementation_internal", None)
        return converted

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Reads as in transformers, but merges overrides of fields *before* validation, so that they are validated."""
        known = cls.__dataclass_fields__.keys()
        overrides = {name: kwargs.pop(name) for name in list(kwargs) if name in known and name != "dtype"}
        return super().from_dict({**config_dict, **overrides}, **kwargs)

    # -- rules -----------------------------------------------------------------------------------------------------

    def _refuse_unknown(self, extra: dict[str, Any]) -> None:
        """Refuses names that are no field. Files (with a `transformers_version`) may hold fields of the future."""
        if "transformers_version" in extra or getattr(self, "transformers_version", None) is not None:
            return
        known = set(self.__dataclass_fields__)
        for name in extra:
            if name.startswith("_") or name in known or name in _TRANSFORMERS_KEYWORDS:
                continue
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"known fields are {', '.join(sorted(known))}."
            raise ValueError(f"{name!r} is not a field of IJepaConfig; {hint}")

    def _check_types(self) -> None:
        """Refuses other types, more strictly than Python: JSON cannot hold numpy's numbers, True is no width."""
        for name, kind in inspect.get_annotations(IJepaConfig).items():  # the added fields
            if name in self.__dataclass_fields__ and not _is_of(kind, getattr(self, name)):
                raise _wrong_type(name, getattr(self, name), type(self))

    def _check_geometry(self) -> None:
        for name in ("image_size", "patch_size"):
            value = getattr(self, name)
            pair = (value, value) if isinstance(value, int) else tuple(value)
            if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
                example = IJepaConfig.__dataclass_fields__[name].default
                raise ValueError(
                    f"{name}={value!r} must be a positive integer or (height, width); write {name}={example}."
                )
        for axis, side, patch in zip(("height", "width"), self.image_shape, self.patch_shape, strict=True):
            if side % patch:
                below, above = side // patch * patch, (side // patch + 1) * patch
                works = f"{below} or {above}" if below else f"{above}"
                raise ValueError(
                    f"image_size={self.image_size!r}: the {axis} {side} is not a multiple of the patch's {axis} "
                    f"{patch} (patch_size={self.patch_size!r}); use {works}, or a patch_size that divides {side}."
                )
        if self.num_channels < 1:
            raise ValueError(f"num_channels={self.num_channels} must be at least 1; write 3 for colour images.")

    def _check_widths(self) -> None:
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.predictor_num_hidden_layers < 1:
            raise ValueError(
                f"predictor_num_hidden_layers={self.predictor_num_hidden_layers} must be at least 1; the paper "
                "uses 6 or 12."
            )
        heads = self.predictor_num_attention_heads
        if heads is not None and heads < 1:
            raise ValueError(
                f"predictor_num_attention_heads={heads} must be at least 1, or None for the encoder's "
                f"num_attention_heads={self.num_attention_heads}."
            )
        heads_name = "num_attention_heads" if heads is None else "predictor_num_attention_heads"
        _check_width("hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)
        _check_width(
            "predictor_hidden_size", self.predictor_hidden_size, heads_name, heads or self.num_attention_heads
        )

    def _check_loss(self) -> None:
        if self.loss_type not in LOSS_TYPES:
            raise ValueError(f"loss_type={self.loss_type!r} must be one of {', '.join(map(repr, LOSS_TYPES))}.")
        if self.target_type not in TARGET_TYPES:
            raise ValueError(f"target_type={self.target_type!r} must be one of {', '.join(map(repr, TARGET_TYPES))}.")
        if not 0 <= self.vicreg_weight <= _LARGEST_WEIGHT:
            raise ValueError(f"vicreg_weight={self.vicreg_weight} must be from 0, which is off, to {_LARGEST_WEIGHT}.")
        if self.patch_init_std is not None and not 0 < self.patch_init_std <= _LARGEST_STD:
            raise ValueError(
                f"patch_init_std={self.patch_init_std} must be greater than 0 and at most {_LARGEST_STD}; write None "
                "for 1/sqrt(inputs of a patch) or 0.02 as published."
            )

    def _check_stock_fields(self, extra: dict[str, Any]) -> None:
        """Refuses values that the stock class accepts, but on which torch or a run would fail later."""
        for name, highest, example in (("layer_norm_eps", 1, 1e-6), ("initializer_range", _LARGEST_STD, 0.02)):
            if not 0 < getattr(self, name) <= highest:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} must be greater than 0 and at most {highest}, for example "
                    f"{name}={example}."
                )
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} must be at least 0 and below 1, for example {name}=0.0."
                )
        for name in ("hidden_act", "pooler_act"):
            value = getattr(self, name, "gelu")  # the oldest supported transformers has no pooler_act
            if value not in ACT2FN:
                nearest = difflib.get_close_matches(value, ACT2FN, n=1, cutoff=0.5)
                hint = f"did you mean {nearest[0]!r}?" if nearest else f"write for example {name}='gelu'."
                raise ValueError(f"{name}={value!r} is no activation that transformers knows; {hint}")
        pooled = getattr(self, "pooler_output_size", None)
        if pooled is not None and pooled < 1:
            raise ValueError(f"pooler_output_size={pooled} must be at least 1, or None for hidden_size.")
        for name, value in (("dtype", self.dtype), ("torch_dtype", extra.get("torch_dtype"))):
            known = getattr(torch, value, None) if isinstance(value, str) else value
            if value is not None and not isinstance(known, torch.dtype):
                raise ValueError(f"{name}={value!r} is no type of torch; write for example {name}='float32'.")
        if type(extra.get("num_labels", 0)) not in (int, type(None)):
            raise TypeError(f"num_labels={extra['num_labels']!r} must be int, for example num_labels=2.")
        if extra.get("model_type", self.model_type) != type(self).model_type:
            raise ValueError(f"model_type={extra['model_type']!r} must be 'ijepa'; leave it out.")

    def replace(self, **changes: Any) -> Self:
        """Returns a validated copy with some fields changed.

        Args:
            **changes: Fields and their new values.

        Raises:
            ValueError: As the constructor does; also for an unknown field.
        """
        fields = {name: value for name, value in self.to_dict().items() if name in self.__dataclass_fields__}
        fields.pop("transformers_version", None)
        return type(self)(**{**fields, **changes})


def _is_of(kind: Any, value: Any) -> bool:
    """Returns whether a value is of the type that a field declares."""
    if kind is _Pair:
        return isinstance(value, list | tuple) and all(_is_of(float, part) for part in value)
    kinds = get_args(kind) or (kind,)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float in kinds or (type(value) is int and int in kinds)
    return type(value) in kinds


def _wrong_type(name: str, value: Any, config_class: Any) -> TypeError:
    entry = config_class.__dataclass_fields__[name]
    kind = entry.type.__name__ if isinstance(entry.type, type) else str(entry.type)
    return TypeError(f"{name}={value!r} must be {kind}, for example {name}={entry.default!r}.")


def _pair(value: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    height, width = value
    return height, width


def _check_width(name: str, width: int, heads_name: str, heads: int) -> None:
    """Refuses a width that is no multiple of its heads and of 4 (sines and cosines of rows and columns)."""
    step = math.lcm(4, heads)
    if width < 1 or width % step:
        works = max(step, round(width / step) * step)
        raise ValueError(
            f"{name}={width} must be a multiple of 4 and of {heads_name}={heads}; the nearest that works is {works}."
        )
