"""Crops, resizes, stacks and normalises decoded images.

Three steps, each a function without state: `decoding.decode_image` turns encoded bytes, a picture or an array into one
of two well-defined things; `random_resized_crop` (training) or `resize` (evaluation) turns that into a tensor of fixed
size in the loader's worker; `normalize` runs on the device, so that 8-bit pixels travel as bytes.

The two things are an 8-bit `PIL.Image` of mode "L" or "RGB", and a float32 array [C, height, width] for everything
that eight bits or three channels cannot hold (16-bit, float, multi-spectral), resized by torch with the same filter.
`resize` gives Pillow's bytes, as the published code and `ViTImageProcessorPil` do. Crops for training are resized by
torch, with weights of 15 bits instead of 22: twice as fast, and one value in thirty is off by one of 255 (in noise,
seldom, by two).
"""

import math
from collections.abc import Sequence

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import torch
from PIL import Image
from torch.nn import functional

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

CROP_NUMBERS = 40  # numbers from 0 to 1 that a crop is drawn from: four for each of ten tries
_LOG_ASPECT = math.log(4 / 3)
_NORMALIZED_AT_ONCE = 2**18  # values, so that they stay in a core's cache between the three passes


def random_resized_crop(
    image: Image.Image | np.ndarray, size: tuple[int, int], min_crop_scale: float, numbers: Sequence[float]
) -> torch.Tensor:
    """Cuts a random part out of an image and resizes it; this is the only augmentation of the published runs.

    Args:
        image: what `decode_image` returns: a picture of mode "L" or "RGB", or a float32 array [C, height, width].
        size: (height, width) of the result in pixels.
        min_crop_scale: smallest share of the image's area to keep, in (0, 1]; 0.3 as published. 1.0 means the whole
            image.
        numbers: `CROP_NUMBERS` random numbers, uniform in [0, 1), which the part follows from.

    Returns:
        [C, height, width]: uint8 for a picture, resized by torch (see the top of this module); float32 for an array.

    Raises:
        ValueError: `min_crop_scale` outside (0, 1], a size that is not two positive integers, an image that did not
            come from `decode_image`.

    Source: the published runs; the crop is that of GoogLeNet (arXiv 1409.4842), section 6.
    """
    height, width = _height_and_width(image)
    check_crop(size, min_crop_scale)
    if min_crop_scale == 1.0:
        return resize(image, size)
    top, left, crop_height, crop_width = crop_box(height, width, size, min_crop_scale, numbers)
    if isinstance(image, Image.Image):
        return _resized_part(image, (top, left, crop_height, crop_width), size)
    return resize(image[:, top : top + crop_height, left : left + crop_width], size)


def crop_box(
    height: int, width: int, size: tuple[int, int], min_crop_scale: float, numbers: Sequence[float]
) -> tuple[int, int, int, int]:
    """Computes the box that `random_resized_crop` cuts out.

    The area's share is uniform in [min_crop_scale, 1], the logarithm of width / height uniform within a factor 4/3
    of that of `size`, and the place uniform over all that fit. A box that does not fit is drawn again; after ten such
    tries the largest centred box of an allowed shape is taken.

    Args:
        height: image height in pixels.
        width: image width in pixels.
        size: (height, width) of the result, which gives the aspect that the draws vary around.
        min_crop_scale: smallest share of the area, in (0, 1].
        numbers: `CROP_NUMBERS` random numbers, uniform in [0, 1).

    Returns:
        (top, left, height, width) of the box in pixels, inside the image.
    """
    aspect = size[1] / size[0]
    for number in range(0, CROP_NUMBERS, 4):
        area = height * width * (min_crop_scale + (1.0 - min_crop_scale) * numbers[number])
        ratio = aspect * math.exp(_LOG_ASPECT * (2.0 * numbers[number + 1] - 1.0))
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(numbers[number + 2] * (height - crop_height + 1))
            left = int(numbers[number + 3] * (width - crop_width + 1))
            return top, left, crop_height, crop_width
    ratio = min(max(width / height, aspect * 3 / 4), aspect * 4 / 3)
    crop_width = max(1, min(width, round(height * ratio)))
    crop_height = max(1, min(height, round(width / ratio)))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def check_crop(size: tuple[int, int], min_crop_scale: float) -> None:
    """Checks the size and the scale of crops.

    Args:
        size: (height, width) of the result in pixels.
        min_crop_scale: smallest share of the area.

    Raises:
        ValueError: `min_crop_scale` outside (0, 1], or a size that is not two positive integers.
    """
    _check_size(size)
    if not 0.0 < min_crop_scale <= 1.0:
        raise ValueError(f"min_crop_scale={min_crop_scale} must be in (0, 1]: 0.3 as published, 1.0 for no crop.")


def resize(image: Image.Image | np.ndarray, size: tuple[int, int]) -> torch.Tensor:
    """Resizes a whole image, bilinear with antialias: what evaluation does, and the stock ViT image processor.

    Args:
        image: what `decode_image` returns: a picture of mode "L" or "RGB", or a float32 array [C, height, width].
        size: (height, width) of the result in pixels; the aspect is not kept.

    Returns:
        [C, height, width]: uint8 for a picture, float32 for an array.

    Raises:
        ValueError: a size that is not two positive integers, an image that did not come from `decode_image`.
    """
    _check_size(size)
    _height_and_width(image)
    height, width = size
    if isinstance(image, np.ndarray):
        pixels = torch.from_numpy(np.ascontiguousarray(image))[None]
        return functional.interpolate(pixels, size=(height, width), mode="bilinear", antialias=True)[0]
    pixels = torch.from_numpy(np.array(image.resize((width, height), Image.Resampling.BILINEAR)))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()


def stack_images(images: Sequence[torch.Tensor]) -> torch.Tensor:
    """Stacks images; where 8-bit ones and floats (from 16-bit files) meet, all become floats in [0, 1].

    Args:
        images: each [C, height, width] of one shape, uint8 or float32; at least one.

    Returns:
        [B, C, height, width], uint8 if all images are, else float32.
    """
    if len({image.dtype for image in images}) > 1:
        images = [image / 255 if image.dtype == torch.uint8 else image for image in images]
    return torch.stack(list(images))


def normalize(pixel_values: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Scales pixels to the model's range: (pixel - mean) / std, channel by channel, on the tensor's own device.

    Args:
        pixel_values: [C, height, width] or [B, C, height, width]; uint8 is divided by 255 first, floating point is
            taken as already in [0, 1] (or in whatever unit `mean` and `std` have).
        mean: C values, subtracted.
        std: C values above 0, divided by.

    Returns:
        float32, same shape and device; the input is left as it was.

    Raises:
        ValueError: another dtype or number of dimensions, `mean` or `std` of another length than C, or a `std` that is
            not above 0.
    """
    if pixel_values.ndim not in (3, 4):
        raise ValueError(f"pixel_values of shape {tuple(pixel_values.shape)} must be [C, H, W] or [B, C, H, W].")
    channels = pixel_values.shape[-3]
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != channels:
            raise ValueError(
                f"{name} has {len(values)} values, but pixel_values of shape {tuple(pixel_values.shape)} have "
                f"{channels} channels: give one value a channel."
            )
    if min(std) <= 0:
        raise ValueError(f"std={list(std)} must be above 0 in every channel.")
    if pixel_values.dtype != torch.uint8 and not pixel_values.is_floating_point():
        raise ValueError(f"pixel_values of dtype {pixel_values.dtype} must be uint8 (0 to 255) or floating point.")
    unit = 255.0 if pixel_values.dtype == torch.uint8 else 1.0
    # one multiplication and one addition; the factors are worked out in double precision
    factors = [1 / (unit * value) for value in std], [-m / s for m, s in zip(mean, std, strict=True)]
    scale, shift = torch.tensor(factors, dtype=torch.float32, device=pixel_values.device).view(2, channels, 1, 1)
    if pixel_values.device.type != "cpu" or pixel_values.requires_grad:
        values_in = pixel_values if pixel_values.dtype == torch.uint8 else pixel_values.to(torch.float32)
        return torch.mul(values_in, scale).add_(shift)  # bytes become floats inside the multiplication
    images = pixel_values if pixel_values.ndim == 4 else pixel_values[None]
    normalized = torch.empty(images.shape, dtype=torch.float32)
    at_once = max(1, _NORMALIZED_AT_ONCE // max(1, images[:1].numel()))
    for part, pixels in zip(normalized.split(at_once), images.split(at_once), strict=True):
        part.copy_(pixels).mul_(scale).add_(shift)
    return normalized.view(pixel_values.shape)


def _resized_part(picture: Image.Image, box: tuple[int, int, int, int], size: tuple[int, int]) -> torch.Tensor:
    """Resizes a part (top, left, height, width) of a picture by torch: uint8 [C, height, width]."""
    top, left, height, width = box
    if min(size) < 2:  # torch without vector instructions returns wrong numbers there
        return resize(picture.crop((left, top, left + width, top + height)), size)
    pixels = torch.from_numpy(_pixels_of_part(picture, box)).permute(2, 0, 1)[None]
    resized = functional.interpolate(pixels, size=tuple(size), mode="bilinear", antialias=True)[0]
    return resized[: len(picture.getbands())].contiguous()


def _pixels_of_part(picture: Image.Image, box: tuple[int, int, int, int]) -> np.ndarray:
    """Returns the pixels of a part of a picture, uint8 [height, width, bands]; keeps Pillow's fourth band of RGB."""
    top, left, height, width = box
    try:
        exported = pa.array(picture)  # Pillow's own memory, where it is in one piece
    except (ValueError, TypeError, pa.ArrowException):  # larger than 16 MB, or a Pillow before 11.2
        return np.array(picture.crop((left, top, left + width, top + height))).reshape(height, width, -1)
    whole = np.frombuffer(exported.buffers()[-1], np.uint8).reshape(picture.height, picture.width, -1)
    return whole[top : top + height, left : left + width].copy()


def _height_and_width(image: Image.Image | np.ndarray) -> tuple[int, int]:
    if isinstance(image, Image.Image) and image.mode in ("L", "RGB"):
        return image.height, image.width
    if isinstance(image, np.ndarray) and image.ndim == 3 and image.dtype == np.float32:
        return image.shape[1], image.shape[2]
    found = (
        f"a picture of mode {image.mode!r}"
        if isinstance(image, Image.Image)
        else f"{type(image).__name__} of dtype {getattr(image, 'dtype', None)}, shape {getattr(image, 'shape', None)}"
    )
    raise ValueError(
        f"image must be a picture of mode 'L' or 'RGB' or a float32 array [C, height, width], not {found}: pass it "
        "through decode_image first."
    )


def _check_size(size: tuple[int, int]) -> None:
    if len(size) != 2 or any(int(n) != n or n < 1 for n in size):
        raise ValueError(f"size={size} must be (height, width), two integers of at least 1.")
