"""Reads the commit and the image settings of any kind of vision model from its files."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from transformers.image_processing_base import ImageProcessingMixin
from transformers.utils import CONFIG_NAME, cached_file
from transformers.utils.hub import extract_commit_hash


class ImageSettings(NamedTuple):
    """Holds how a model's images are prepared.

    Args:
        shape: Height and width in pixels.
        mean: Mean of each channel, of pixels in [0, 1].
        std: Standard deviation of each channel, of pixels in [0, 1].
    """

    shape: tuple[int, int]
    mean: list[float]
    std: list[float]


def check_model_name(model: str, revision: str | None) -> None:
    """Refuses a model's name that cannot be right, before anything is loaded.

    Args:
        model: Hub id or folder.
        revision: Branch, tag or commit on the Hub, if one was asked for.

    Raises:
        FileNotFoundError: If the name is that of a folder, and there is none with a configuration in it.
        ValueError: If a revision was asked of what is on this disk.
    """
    if revision is not None and Path(model).expanduser().exists():
        raise ValueError(
            f"model_revision={revision!r} is for Hub repos, and model={model!r} is on this disk; omit it."
        )
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        path = Path(model).expanduser()
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"model={model!r}: there is no such folder with a config.json in it.")


def commit_of(model: str, revision: str | None) -> str | None:
    """Finds the commit to which a revision on the Hub points now.

    Args:
        model: Hub id or folder.
        revision: Branch, tag or commit on the Hub; `None` is the main branch.

    Returns:
        The commit's hash; `None` for a folder.

    Raises:
        OSError: If there is no such model or revision, or the Hub cannot be asked.
    """
    if Path(model).is_dir():
        return None
    path = cached_file(model, CONFIG_NAME, revision=revision)
    return None if path is None else extract_commit_hash(str(path), None)


def read_image_settings(source: str, config: Any, *, revision: str | None = None) -> ImageSettings:
    """Reads how a model's images are prepared from its configuration and its image processor's file.

    Args:
        source: Hub id or folder.
        config: The model's configuration; if it has a `vision_config`, that one is used.
        revision: Branch, tag or commit on the Hub.

    Returns:
        The settings. The size is the processor's centre crop where it has one, else the model's, else (of a
        convolutional network, which has none) the processor's; a shortest edge stands for a square. Mean and standard
        deviation are of pixels in [0, 1] also where the processor scales them otherwise.

    Raises:
        OSError: If there is no image processor.
        ValueError: If neither file has a size, or the processor changes colours in a way that a mean and a standard
            deviation cannot express.
    """
    fields, _ = ImageProcessingMixin.get_image_processor_dict(source, revision=revision)
    config = getattr(config, "vision_config", config)
    mean, std = fields.get("image_mean"), fields.get("image_std")
    if fields.get("do_flip_channel_order"):
        raise ValueError(f"model={source!r} takes pictures with channels in reverse order, which is not supported.")
    if not fields.get("do_normalize", True):
        channels = getattr(config, "num_channels", None) or len(mean or [0.0] * 3)
        mean, std = [0.0] * channels, [1.0] * channels
    elif mean is None or std is None:
        raise ValueError(
            f"model={source!r}: preprocessor_config.json has no image_mean and image_std; write them, or "
            '"do_normalize": false, into it.'
        )
    brightest = 255 * fields.get("rescale_factor", 1 / 255) if fields.get("do_rescale", True) else 255.0
    if not math.isclose(brightest, 1.0):  # (255 factor x - mean) / std, of x in [0, 1]
        mean, std = [value / brightest for value in mean], [value / brightest for value in std]
    return ImageSettings(_image_shape(source, config, fields), list(mean), list(std))


def _image_shape(source: str, config: Any, fields: Mapping[str, Any]) -> tuple[int, int]:
    own = getattr(config, "image_size", None)
    crop = fields.get("crop_size")
    is_cropped = fields.get("do_center_crop", own is None and crop is not None)
    for size in (crop if is_cropped else None, own, fields.get("size")):
        if isinstance(size, int):
            return size, size
        if isinstance(size, Mapping):
            edge = size.get("shortest_edge")
            height, width = size.get("height", edge), size.get("width", edge)
            if height is not None and width is not None:
                return int(height), int(width)
        elif size is not None:
            height, width = size
            return int(height), int(width)
    raise ValueError(
        f"model={source!r}: neither config.json (image_size) nor preprocessor_config.json (crop_size, size) has the "
        'size of its images; write "size": {"height": ..., "width": ...} into the latter.'
    )


def damaged_weights(source: str, error: SafetensorError) -> ValueError:
    """Makes the error for weights that cannot be read.

    Args:
        source: Hub id or folder of the model.
        error: The reader's error.

    Returns:
        The error to raise.
    """
    return ValueError(
        f"model={source!r}: a .safetensors file of its weights is damaged or not whole ({error}); copy it again, or "
        "delete it from the Hub's cache, so that it is downloaded again."
    )


def refuse_kernels(config: Any, source: str) -> None:
    """Refuses a configuration that names a repository of the Hub as its attention.

    Where the package `kernels` is installed, transformers would fetch its code and run it.

    Args:
        config: The model's configuration.
        source: The model's name, for the message.

    Raises:
        ValueError: The configuration, or one of its parts, names one.
    """
    parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))]
    for named in (str(getattr(part, "_attn_implementation", None)) for part in parts):
        if "/" in named:
            raise ValueError(
                f"model={source!r}: its config.json names {named!r} as its attention, which is code of the Hub; "
                "remove attn_implementation from it."
            )
