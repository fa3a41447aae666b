"""Gives all vision backbones of transformers one interface: one vector for each patch (and a class token) of an image.

I-JEPA, DINOv2, ViT, ViT-MAE, the vision tower of CLIP, ResNet and others differ in which of their tokens are patches.
One forward pass at loading finds this out, so that a model that does not fit is refused before the work. Each model
can be compared with its untrained twin: the same configuration with new weights.
"""

import contextlib
import copy
import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from ijepa_hf.model.configuration_ijepa import IJepaConfig
from ijepa_hf.model.modeling_ijepa import new_model
from ijepa_hf.model.vision_models import damaged_weights, refuse_kernels

POOLINGS = ("mean", "cls")
LAYERS = (1, 4)
RAW_SIDE = 32  # larger images are shrunk to this: a probe on 224 x 224 x 3 raw inputs is no use
RAW_PATCH_SIDE = 16  # as wide as a large encoder: 16 x 16 x 3 is 768
_CLASS_TOKENS = ("cls_token", "class_token", "class_embedding")
_UNUSED = "pooler."  # weights that no feature passes through


class Tokens(NamedTuple):
    """Holds the output of a backbone for B images.

    Args:
        patches: float32 `[B, rows, columns, D]`, without class token and registers.
        class_token: float32 `[B, D]`, where the model has one.
    """

    patches: Tensor
    class_token: Tensor | None


@dataclass(frozen=True)
class Backbone:
    """Computes features with a frozen vision model, in eval mode and float32.

    Args:
        model: The vision tower.
        source: Hub id or folder, for messages.
        layers: Layers that are concatenated, counted from the last: 1 or 4.
        shape: Height and width of its images.
        grid_size: Rows and columns of patches.
        num_prefix_tokens: Tokens before the patches: the class token and registers.
        has_class_token: Whether the first token is a class token.
        width: D, of all its layers together.
        norm: The model's final norm, which is also applied to inner layers; `None` if the model has none.
    """

    model: nn.Module
    source: str
    layers: int
    shape: tuple[int, int]
    grid_size: tuple[int, int] = (0, 0)
    num_prefix_tokens: int = 0
    has_class_token: bool = False
    width: int = 0
    norm: nn.Module | None = None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @torch.no_grad()
    def tokens(self, pixel_values: Tensor) -> Tokens:
        """Runs the model.

        Args:
            pixel_values: Floating `[B, C, height, width]`, normalised, on any device.

        Returns:
            Patches and class token of the last layer, or of the last four layers concatenated (the last one last); on
            the model's device. Inner layers pass through the model's final norm, as the last one does.
        """
        with _recorded(self._recorded_layers()) as recorded:
            hidden = _hidden_states(self.model, pixel_values.to(self.device, torch.float32), self.shape)
        if hidden.ndim == 4:
            return Tokens(hidden.permute(0, 2, 3, 1), None)
        inner = [output if self.norm is None else self.norm(output) for output in recorded[:-1]]
        states = torch.cat([*inner, hidden], dim=-1)
        patches = states[:, self.num_prefix_tokens :].unflatten(1, self.grid_size)
        return Tokens(patches, states[:, 0] if self.has_class_token else None)

    def pooled(self, pixel_values: Tensor, pooling: str) -> Tensor:
        """Computes one vector for each image.

        Args:
            pixel_values: As for `tokens`.
            pooling: `mean` over the patches, or `cls`, the class token.

        Returns:
            float32 `[B, D]`.

        Raises:
            ValueError: As `check_pooling`.

        Source: I-JEPA (arXiv 2301.08243), appendix A.2: patches of the last layer, or of the last four concatenated,
            average-pooled.
        """
        self.check_pooling(pooling)
        tokens = self.tokens(pixel_values)
        if pooling == "cls" and tokens.class_token is not None:
            return tokens.class_token
        return tokens.patches.mean(dim=(1, 2))

    def check_pooling(self, pooling: str) -> None:
        """Raises `ValueError` for another pooling than `POOLINGS`, and for `cls` where there is no class token."""
        if pooling not in POOLINGS:
            raise ValueError(f"pooling={pooling!r} must be 'mean' or 'cls'.")
        if pooling == "cls" and not self.has_class_token:
            raise ValueError(
                f"pooling='cls': model={self.source!r} ({type(self.model).__name__}) has no class token; use "
                "--pooling mean."
            )

    def check_patches(self, method: str) -> None:
        """Raises `ValueError` where a method that needs patches is given a model with one patch an image."""
        if math.prod(self.grid_size) < 2:
            raise ValueError(
                f"method={method!r} needs a vector for each patch: model={self.source!r} "
                f"({type(self.model).__name__}) gives one for a whole image of {self.shape[0]}x{self.shape[1]}. Use "
                "knn, linear, low_shot or regression, or a model with patches."
            )

    def _recorded_layers(self) -> list[nn.Module]:
        return [] if self.layers == 1 else _stack(self.model)[-self.layers :]


def load_backbone(
    source: str,
    shape: tuple[int, int],
    *,
    layers: int = 1,
    revision: str | None = None,
    device: torch.device | str = "cpu",
) -> Backbone:
    """Loads a vision backbone and finds which of its tokens are patches; runs no code of its folder, reads no pickle.

    Args:
        source: Hub id or folder of a transformers model; of one for pictures and text the vision tower is taken.
        shape: Height and width of the images that it will be given.
        layers: 1 for the last layer, 4 for the last four concatenated.
        revision: Branch, tag or commit on the Hub.
        device: Where to.

    Returns:
        The backbone.

    Raises:
        OSError: If there is no such model, or no safetensors file of it.
        ValueError: If the file is damaged or lacks weights of the encoder, if the model is none that gives patches, or
            if it is no stack of equal layers and `layers` is 4.
    """
    config = _without_masking(AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False))
    refuse_kernels(config, source)
    try:
        model, info = AutoModel.from_pretrained(
            source,
            config=config,
            revision=revision,
            dtype=torch.float32,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except RuntimeError as error:  # shapes of weights that differ from the configuration's
        raise ValueError(f"model={source!r}: the weights do not fit config.json: {error}") from error
    except SafetensorError as error:
        raise damaged_weights(source, error) from error
    missing = sorted(name for name in info["missing_keys"] if not name.split("vision_model.")[-1].startswith(_UNUSED))
    if missing:
        raise ValueError(
            f"model={source!r}: the file does not hold {len(missing)} weights of {type(model).__name__} (the first is "
            f"{missing[0]}), which would stay random. Is it an encoder of this kind?"
        )
    return _described(model, source, shape, layers, device)


def untrained_twin(
    source: str,
    shape: tuple[int, int],
    seed: int,
    *,
    layers: int = 1,
    revision: str | None = None,
    device: torch.device | str = "cpu",
) -> Backbone:
    """Makes the same network with new weights, to measure what the architecture alone gives.

    Args:
        source: See `load_backbone`; only its configuration is read.
        shape: See `load_backbone`.
        seed: Of the weights. Those of an I-JEPA model are what a pretraining with this seed starts from.
        layers: See `load_backbone`.
        revision: See `load_backbone`.
        device: See `load_backbone`.

    Returns:
        The backbone; torch's global generator is left as it was.

    Raises:
        OSError: As `load_backbone`.
        ValueError: As `load_backbone`.
    """
    config = _without_masking(AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False))
    if config.model_type == "ijepa":
        # the stock class would draw a random position table, which in a pretraining is fixed
        model: nn.Module = new_model(IJepaConfig.from_stock(config), seed).target_encoder
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False)
    return _described(model, f"untrained {source}", shape, layers, device)


def raw_pixels(pixel_values: Tensor) -> Tensor:
    """Returns the pixels themselves as features; any encoder should be better than this row.

    Args:
        pixel_values: Floating `[B, C, height, width]`.

    Returns:
        `[B, C x h x w]`, of the image shrunk to at most 32x32.
    """
    sides = [min(side, RAW_SIDE) for side in pixel_values.shape[-2:]]
    return _shrunk(pixel_values, sides).flatten(1)


def raw_patches(pixel_values: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Returns the pixels of each patch as features.

    Args:
        pixel_values: Floating `[B, C, height, width]`.
        grid_size: Rows and columns.

    Returns:
        `[B, rows, columns, C x h x w]`, of patches shrunk to at most 16x16 pixels.
    """
    sides = zip(pixel_values.shape[-2:], grid_size, strict=True)
    height, width = (max(1, min(side // number, RAW_PATCH_SIDE)) for side, number in sides)
    shrunk = _shrunk(pixel_values, [grid_size[0] * height, grid_size[1] * width])
    patches = shrunk.unflatten(3, (grid_size[1], width)).unflatten(2, (grid_size[0], height))
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3)


def _shrunk(pixel_values: Tensor, sides: list[int]) -> Tensor:
    if list(pixel_values.shape[-2:]) == sides:
        return pixel_values
    return nn.functional.interpolate(pixel_values, size=sides, mode="bilinear", antialias=True)


# -- what a model gives ----------------------------------------------------------------------------------------------


def _without_masking(config: Any) -> Any:
    """Returns a configuration without masking: ViT-MAE hides three quarters of the patches by default."""
    if config.model_type == "vit_mae":
        config = copy.deepcopy(config)
        config.mask_ratio = 0.0
    return config


def _described(model: Any, source: str, shape: tuple[int, int], layers: int, device: torch.device | str) -> Backbone:
    if layers not in LAYERS:
        raise ValueError(f"layers={layers} must be 1 (the last) or 4 (the last four, concatenated).")
    if hasattr(model.config, "vision_config"):
        model = getattr(model, "vision_model", None)
        if model is None:
            raise ValueError(f"model={source!r} has no vision_model to take as a backbone.")
    model = model.eval().requires_grad_(False).to(device)
    config = model.config
    trial = torch.randn(1, config.num_channels, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    stack = _stack(model) if layers > 1 else []
    if layers > 1 and len(stack) < layers:
        raise ValueError(
            f"layers={layers}: model={source!r} ({type(model).__name__}) is no stack of at least {layers} equal "
            "layers; use --layers 1."
        )
    with torch.no_grad(), _recorded(stack[-layers:] if stack else []) as recorded:
        try:
            hidden = _hidden_states(model, trial, shape)
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"model={source!r} does not take the images of its own image processor, {config.num_channels} "
                f"channels of {shape[0]}x{shape[1]}: {error}"
            ) from error
        norm = _final_norm(model, recorded[-1], hidden, source) if recorded else None
    if hidden.ndim == 4:
        grid = (int(hidden.shape[2]), int(hidden.shape[3]))
        return Backbone(model, source, layers, shape, grid_size=grid, width=int(hidden.shape[1]))
    has_class_token = any(name.split(".")[-1] in _CLASS_TOKENS for name, _ in model.named_parameters())
    grid, prefix = _grid_of(config, shape, int(hidden.shape[1]), has_class_token, source)
    return Backbone(
        model, source, layers, shape, grid, prefix, has_class_token, layers * int(hidden.shape[-1]), norm
    )  # fmt: skip


def _hidden_states(model: nn.Module, pixel_values: Tensor, shape: tuple[int, int]) -> Tensor:
    """Returns `last_hidden_state`: `[B, tokens, D]` or `[B, D, rows, columns]`."""
    config: Any = model.config
    known = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {}
    if config.model_type == "vit_mae":  # patches are shuffled by the order of these
        count = math.prod(side // patch for side, patch in zip(shape, _pair(config.patch_size), strict=True))
        options["noise"] = torch.arange(count, device=pixel_values.device).expand(len(pixel_values), count)
    own_size = getattr(config, "image_size", None)
    if "interpolate_pos_encoding" in known and own_size is not None and _pair(own_size) != tuple(shape):
        options["interpolate_pos_encoding"] = True
    hidden = getattr(model(pixel_values=pixel_values, **options), "last_hidden_state", None)
    if hidden is None or hidden.ndim not in (3, 4):
        raise ValueError(f"the output of {type(model).__name__} has no last_hidden_state of tokens or of a map.")
    return hidden


def _grid_of(
    config: Any, shape: tuple[int, int], num_tokens: int, has_class_token: bool, source: str
) -> tuple[tuple[int, int], int]:
    """Returns the rows and columns of the patches, and the number of tokens before them."""
    if getattr(config, "patch_size", None) is not None:
        patch = _pair(config.patch_size)
        rows, columns = shape[0] // patch[0], shape[1] // patch[1]
        prefix = num_tokens - rows * columns
        if prefix >= has_class_token and (prefix == 0 or has_class_token):
            return (rows, columns), prefix
    # of hierarchical networks, whose patches grow from stage to stage
    rows = round(math.sqrt(num_tokens * shape[0] / shape[1]))
    if not has_class_token and rows and num_tokens % rows == 0 and rows * shape[1] == num_tokens // rows * shape[0]:
        return (rows, num_tokens // rows), 0
    raise ValueError(
        f"model={source!r} gives {num_tokens} tokens for an image of {shape[0]}x{shape[1]}; it is not known which of "
        "them are patches, so the model cannot be evaluated here."
    )


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _stack(model: nn.Module) -> list[nn.Module]:
    """Returns the layers of a plain transformer; empty for other models."""
    count = getattr(model.config, "num_hidden_layers", None)
    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) == count]
    return list(lists[0]) if lists else []


@contextlib.contextmanager
def _recorded(layers: list[nn.Module]) -> Iterator[list[Tensor]]:
    """Records the outputs of some layers, by hooks: the last hidden state differs between versions of transformers."""
    outputs: list[Tensor] = []

    def record(_module: nn.Module, _inputs: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_hook(record) for layer in layers]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _final_norm(model: nn.Module, last: Tensor, hidden: Tensor, source: str) -> nn.Module | None:
    """Finds the norm that is applied to the last layer's output, by comparing results; `None` if there is none."""
    if torch.allclose(last, hidden, atol=1e-5):
        return None
    width = hidden.shape[-1]
    for part in model.children():
        is_norm = isinstance(part, nn.LayerNorm) and tuple(part.normalized_shape) == (width,)
        if is_norm and torch.allclose(part(last), hidden, atol=1e-4):
            return part
    raise ValueError(f"layers=4: model={source!r} has an unknown step after its last layer; use --layers 1.")
