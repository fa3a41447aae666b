"""From what a dataset row holds to the pixels that a model sees.

Three steps, each a function without state: `decode_image` turns encoded bytes, a picture or an array into one of two
well-defined things; `random_resized_crop` (training) or `resize` (evaluation) turns that into a tensor of fixed size
in the loader's worker; `normalize` runs on the device, so that 8-bit pixels travel as bytes.

The two things are an 8-bit `PIL.Image` of mode "L" or "RGB", and a float32 array [C, height, width] for everything
that eight bits or three channels cannot hold (16-bit, float, multi-spectral), resized by torch with the same filter.
`resize` gives Pillow's bytes, as the published code and `ViTImageProcessorPil` do. Crops for training are resized by
torch, with weights of 15 bits instead of 22: twice as fast, and one value in thirty is off by one of 255 (in noise,
seldom, by two).
"""

import io
import math
import os
import re
import stat
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import torch
from PIL import ExifTags, Image, ImageOps
from torch.nn import functional

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# What Pillow raises on damaged bytes. Beside the three documented ones, its PNG, TIFF and PPM readers let the others
# through (seen by feeding it 200,000 damaged files of fourteen formats).
_DAMAGE = (
    Image.UnidentifiedImageError,
    Image.DecompressionBombError,
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    TypeError,
    IndexError,
    OverflowError,
    NotImplementedError,
    struct.error,
)
_MEMORY_ADDRESS = re.compile(r" <_io\.BytesIO object at 0x[0-9a-f]+>")  # in Pillow's words: another one in each run
CROP_NUMBERS = 40  # numbers from 0 to 1 that a crop is drawn from: four for each of ten tries
_LOG_ASPECT = math.log(4 / 3)
_LARGEST_FILE = 2**30  # bytes; what Pillow agrees to decode (179 million pixels) takes half of it uncompressed
_PIXELS_COMPOSITED_AT_ONCE = 2**24
_NORMALIZED_AT_ONCE = 2**18  # values, so that they stay in a core's cache between the three passes


def decode_image(value: Any, num_channels: int, *, channel_axis: int | None = None) -> Image.Image | np.ndarray:
    """Decode one image and bring it to `num_channels` channels, without resizing or normalising it.

    Pictures (encoded or `PIL.Image`; the first frame of an animation) are turned upright by their EXIF orientation.

    - `num_channels=3`: "RGB". Grayscale is repeated three times; palettes and CMYK are converted by Pillow.
    - `num_channels=1`: "L". Colours become luma (0.299 R + 0.587 G + 0.114 B).
    - Transparency (alpha channel, transparent palette entry or colour) is composited onto **white**, as viewers do.
    - 16-bit grayscale (modes "I;16", "I") becomes float32, divided by 65535; mode "F" is taken as it is. A transparent
      colour in a 16-bit file is ignored. Pillow itself reduces 16-bit *colour* files to 8 bits; use arrays for them.

    Arrays (anything with `__array__`) are [height, width], [height, width, C] or [C, height, width]. The channel axis
    is the one, first or last, whose length is `num_channels`; when both have it, `channel_axis` must say which. uint8
    with 1 or 3 channels becomes a picture; other uint8 is divided by 255, uint16 by 65535; floats are taken as they
    are, so the mean and std given to `normalize` must be in their unit. One channel is repeated for `num_channels=3`.

    Args:
        value: a `PIL.Image.Image`; encoded bytes; a dict with "bytes" and "path", as a `datasets.Image(decode=False)`
            column gives; or an array.
        num_channels: channels wanted, 1 or more; pictures can give 1 or 3.
        channel_axis: 0 or -1 for a three-dimensional array whose first and last axes both have `num_channels` entries.

    Returns:
        A `PIL.Image.Image` of mode "L" or "RGB" (8 bits), or a float32 array [num_channels, height, width].

    Raises:
        ValueError: bytes that are no readable image; an image that cannot give `num_channels` channels; an array of
            another shape or dtype, with an undecidable channel axis, or with values that are not finite.
        FileNotFoundError: a dict without bytes whose path does not exist.
    """
    if num_channels < 1:
        raise ValueError(f"num_channels={num_channels} must be 1 or more.")
    if isinstance(value, Mapping):
        value, path = _bytes_and_path(value)
    else:
        path = None
    if isinstance(value, bytes | bytearray | memoryview):
        name = f"image of {len(value)} bytes" if path is None else f"image {path!r}"
        with _DamageNamed(name):
            value = Image.open(io.BytesIO(value))
            if value.format == "EPS":  # Pillow would have another program run what it says
                raise ValueError("a PostScript program and no picture")
    else:
        name = "image"
    if isinstance(value, Image.Image):
        return _decode_picture(value, num_channels, name)
    if hasattr(value, "__array__"):
        try:
            array = np.asarray(value)
        except (TypeError, ValueError) as error:  # a tensor of a kind that numpy does not have
            raise ValueError(f"no image array can be made of this {type(value).__name__}: {error}") from error
        return _decode_array(array, num_channels, channel_axis)
    raise ValueError(
        f"cannot read an image from a {type(value).__name__}: pass a PIL image, encoded bytes, a dict with 'bytes' "
        "and 'path', or a uint8, uint16 or float array (nested lists have no bit depth: use "
        "numpy.asarray(rows, dtype=...))."
    )


def read_image_file(path: str) -> bytes:
    """Reads the file of a picture as it is.

    Args:
        path: The file.

    Returns:
        Its bytes.

    Raises:
        ValueError: no regular file (to read a pipe or a device would wait for ever), or one too large for a picture.
        OSError: a file that is missing or cannot be read.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is no file, but a {'folder' if stat.S_ISDIR(status.st_mode) else 'pipe or device'}.")
    if status.st_size > _LARGEST_FILE:
        raise ValueError(
            f"{path} has {status.st_size / 1e6:,.0f} MB; a picture has at most {_LARGEST_FILE / 1e6:,.0f} MB."
        )
    return Path(path).read_bytes()


def random_resized_crop(
    image: Image.Image | np.ndarray, size: tuple[int, int], min_crop_scale: float, numbers: Sequence[float]
) -> torch.Tensor:
    """Cut a random part out of an image and resize it: the only augmentation of the published runs.

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
    """Work out the box that `random_resized_crop` cuts out.

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
    """Refuses what no crop can be drawn with.

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
    """Resize a whole image, bilinear with antialias: what evaluation does, and the stock ViT image processor.

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
    """One tensor of images; where 8-bit ones and floats (from 16-bit files) meet, all become floats in [0, 1].

    Args:
        images: each [C, height, width] of one shape, uint8 or float32; at least one.

    Returns:
        [B, C, height, width], uint8 if all images are, else float32.
    """
    if len({image.dtype for image in images}) > 1:
        images = [image / 255 if image.dtype == torch.uint8 else image for image in images]
    return torch.stack(list(images))


def normalize(pixel_values: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Scale pixels to the model's range: (pixel - mean) / std, channel by channel, on the tensor's own device.

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


def _bytes_and_path(row: Mapping[str, Any]) -> tuple[bytes, str | None]:
    data, path = row.get("bytes"), row.get("path")
    if data is not None:
        return data, path
    if path is None:
        raise ValueError(f"an image dict must have 'bytes' or 'path'; this one has {sorted(row)} with neither set.")
    if not isinstance(path, str | os.PathLike) or "\0" in str(path):
        raise ValueError(f"the 'path' of an image dict must be the path of a file, not {path!r}.")
    return read_image_file(str(path)), str(path)


class _DamageNamed:
    """Turns every way in which Pillow reports damage into one ValueError that says which image it was."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, _DAMAGE):
            words = _MEMORY_ADDRESS.sub("", str(error))
            raise ValueError(f"{self.name} cannot be decoded: {type(error).__name__}: {words}") from error


def _decode_picture(image: Image.Image, num_channels: int, name: str) -> Image.Image | np.ndarray:
    if num_channels not in (1, 3):
        raise ValueError(
            f"num_channels={num_channels}, but a picture can give 1 or 3 channels (this one, mode {image.mode!r}, has "
            f"{len(image.getbands())}): pass a numpy array of shape [{num_channels}, height, width], or set "
            "num_channels=3."
        )
    with _DamageNamed(name):
        if 0 in image.size:
            raise ValueError(f"it has no pixels: {image.width}x{image.height}")
        image = _upright(image)
        if image.mode[0] not in "IF":
            return _to_eight_bits(image, num_channels)
    return _decode_wide(image, num_channels)


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    # Only when needed: exif_transpose copies every image, turned or not.
    turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    return ImageOps.exif_transpose(image) if turned else image


def _to_eight_bits(image: Image.Image, num_channels: int) -> Image.Image:
    if image.has_transparency_data:
        if image.mode == "La":
            image = image.convert("LA")  # Pillow converts premultiplied grayscale to this one mode only
        image = _on_white(image)
    if image.mode not in ("L", "RGB", "1"):
        image = image.convert("RGB")  # so that luma is taken of what is seen, not of ink or palette numbers
    wanted = "L" if num_channels == 1 else "RGB"
    return image if image.mode == wanted else image.convert(wanted)  # to convert is to copy


def _on_white(image: Image.Image) -> Image.Image:
    """A picture with transparency on white; a large one is done in parts, because each step makes a copy."""
    rows = max(1, _PIXELS_COMPOSITED_AT_ONCE // image.width)
    if rows >= image.height:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    result = Image.new("RGB", image.size)
    for top in range(0, image.height, rows):
        part = image.crop((0, top, image.width, min(image.height, top + rows)))
        result.paste(_on_white(part).convert("RGB"), (0, top))
    return result


def _decode_wide(image: Image.Image, num_channels: int) -> np.ndarray:
    """Single-channel picture of more than 8 bits to float32 [num_channels, height, width]."""
    values = np.asarray(image)
    if image.mode.startswith("I"):
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(
                f"integers from {values.min()} to {values.max()} in a picture of mode {image.mode!r}; 16-bit values, "
                "0 to 65535, are expected: pass a float array in [0, 1] instead."
            )
        values = values.astype(np.float32) / np.float32(65535)
    return _checked_float(values[None], num_channels)


def _decode_array(array: np.ndarray, num_channels: int, channel_axis: int | None) -> Image.Image | np.ndarray:
    array = _channels_first(array, num_channels, channel_axis)
    kind, bits = array.dtype.kind, 8 * array.dtype.itemsize
    if kind == "u" and bits == 8 and len(array) in (1, 3):
        picture = Image.fromarray(array[0] if len(array) == 1 else array.transpose(1, 2, 0).copy())
        return picture if picture.mode == ("L" if num_channels == 1 else "RGB") else picture.convert("RGB")
    if kind == "u" and bits in (8, 16):
        array = array.astype(np.float32) / np.float32(2**bits - 1)
    elif kind != "f":
        raise ValueError(
            f"an image array of dtype {array.dtype} has no stated range: convert it to uint8 (0 to 255), uint16 "
            "(0 to 65535) or float (0 to 1). A datasets column formatted as numpy turns integers into int64: ask for "
            "with_format('numpy', dtype=...) with the column's own dtype."
        )
    return _checked_float(array, num_channels)


def _channels_first(array: np.ndarray, num_channels: int, channel_axis: int | None) -> np.ndarray:
    """View as [C, height, width], with C equal to num_channels, or 1 where one channel may be repeated."""
    if array.size == 0:
        raise ValueError(f"an image array of shape {array.shape} has no pixels.")
    if array.ndim == 2:
        found, array = 1, array[None]
    elif array.ndim == 3:
        axis = _channel_axis(array.shape, num_channels) if channel_axis is None else channel_axis
        if axis not in (0, -1):
            raise ValueError(f"channel_axis={channel_axis} must be 0 ([C, H, W]) or -1 ([H, W, C]).")
        found, array = array.shape[axis], np.moveaxis(array, axis, 0)
    else:
        raise ValueError(f"an image array of shape {array.shape} must be [H, W], [H, W, C] or [C, H, W].")
    if found != num_channels and (found, num_channels) != (1, 3):
        raise ValueError(
            f"num_channels={num_channels}, but the image array has {found}: set num_channels={found} in the "
            "configuration, or select the channels beforehand."
        )
    return array


def _channel_axis(shape: tuple[int, ...], num_channels: int) -> int:
    lengths = {0: shape[0], -1: shape[-1]}
    for wanted in (num_channels, 1) if num_channels == 3 else (num_channels,):
        matches = [axis for axis, length in lengths.items() if length == wanted]
        if len(matches) == 1:
            return matches[0]
        if len(matches) == 2:
            raise ValueError(
                f"an image array of shape {shape} may be [C, H, W] or [H, W, C]: both its first and its last axis "
                f"have {wanted} entries. Write channel_axis=0 or channel_axis=-1, or give the images another height "
                "or width."
            )
    raise ValueError(
        f"num_channels={num_channels}, but neither the first nor the last axis of the image array of shape {shape} "
        f"has {num_channels} entries: set num_channels={min(shape[0], shape[-1])} if that is its number of channels, "
        "or select the channels beforehand."
    )


def _resized_part(picture: Image.Image, box: tuple[int, int, int, int], size: tuple[int, int]) -> torch.Tensor:
    """A part (top, left, height, width) of a picture, resized by torch: uint8 [C, height, width]."""
    top, left, height, width = box
    if min(size) < 2:  # torch without vector instructions returns wrong numbers there
        return resize(picture.crop((left, top, left + width, top + height)), size)
    pixels = torch.from_numpy(_pixels_of_part(picture, box)).permute(2, 0, 1)[None]
    resized = functional.interpolate(pixels, size=tuple(size), mode="bilinear", antialias=True)[0]
    return resized[: len(picture.getbands())].contiguous()


def _pixels_of_part(picture: Image.Image, box: tuple[int, int, int, int]) -> np.ndarray:
    """uint8 [height, width, bands] of one part of a picture; the fourth band that Pillow keeps with RGB is left in."""
    top, left, height, width = box
    try:
        exported = pa.array(picture)  # Pillow's own memory, where it is in one piece
    except (ValueError, TypeError, pa.ArrowException):  # larger than 16 MB, or a Pillow before 11.2
        return np.array(picture.crop((left, top, left + width, top + height))).reshape(height, width, -1)
    whole = np.frombuffer(exported.buffers()[-1], np.uint8).reshape(picture.height, picture.width, -1)
    return whole[top : top + height, left : left + width].copy()


def _checked_float(array: np.ndarray, num_channels: int) -> np.ndarray:
    with np.errstate(over="ignore"):  # what is too large for float32 becomes infinite, and is refused with the rest
        array = np.array(array, dtype=np.float32, order="C", copy=None if min(array.strides) > 0 else True)
    finite = np.isfinite(array)
    if not finite.all():
        raise ValueError(
            f"{array.size - int(finite.sum())} of {array.size} values of the image are NaN or infinite: fill them "
            "beforehand, for example with the channel's mean."
        )
    return array if len(array) == num_channels else np.repeat(array, num_channels, axis=0)


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
