"""Shrinks and encodes one picture or array."""

import io
import math
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
from PIL import Image

from ijepa_hf.data.decoding import decode_image
from ijepa_hf.data.transforms import resize

IMAGE_FORMATS = ("keep", "jpeg", "png", "webp", "bmp")
DEFAULT_QUALITY = 95
_SUFFIXES = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "BMP": ".bmp", "TIFF": ".tif"}
_KEPT_LOSSY = {"JPEG": "JPEG", "MPO": "JPEG", "WEBP": "WEBP"}  # formats with `keep` after shrinking; else PNG
_LOSSLESS = ("png", "bmp")
_GRAY_MODES = ("1", "L", "LA", "La", "F")  # beside I and I;16...


def check_numbers(**values: tuple[int | None, int]) -> None:
    """Raises `ValueError` if a number is below its least value; `None` is allowed."""
    for name, (value, least) in values.items():
        if value is not None and value < least:
            raise ValueError(f"{name}={value} must be at least {least}.")


@dataclass(frozen=True)
class PictureFormat:
    """Describes how images are written.

    Args:
        shortest_side: Pixels to which larger ones are shrunk; `None` keeps sizes.
        image_format: One of `IMAGE_FORMATS`.
        quality: Of JPEG and WebP; `None` means `DEFAULT_QUALITY`.
        channel_axis: Of arrays, 0 or -1; `None` for the shortest.
    """

    shortest_side: int | None = None
    image_format: str = "keep"
    quality: int | None = None
    channel_axis: int | None = None

    def check(self) -> None:
        """Raises `ValueError` if a value is bad."""
        check_numbers(shortest_side=(self.shortest_side, 1))
        if self.image_format not in IMAGE_FORMATS:
            raise ValueError(f"image_format={self.image_format!r} must be one of {', '.join(IMAGE_FORMATS)}.")
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise ValueError(f"quality={self.quality} must be from 1 to 100; {DEFAULT_QUALITY} if not given.")
        if self.quality is not None and self.image_format in _LOSSLESS:
            raise ValueError(
                f"quality={self.quality} is of no use with image_format={self.image_format!r}, which loses nothing."
            )
        if self.channel_axis not in (None, 0, -1):
            raise ValueError(f"channel_axis={self.channel_axis} must be 0 ([C, H, W]) or -1 ([H, W, C]).")

    def resolved(self) -> dict[str, Any]:
        """Returns the values by name, with the quality that is used."""
        quality = None if self.image_format in _LOSSLESS else self.quality or DEFAULT_QUALITY
        return {**asdict(self), "quality": quality}

    def size_after(self, height: int, width: int) -> tuple[int, int]:
        """Returns height and width in pixels after shrinking; what is small enough keeps its size."""
        shortest = min(height, width)
        if self.shortest_side is None or shortest <= self.shortest_side:
            return height, width
        return round(height * self.shortest_side / shortest), round(width * self.shortest_side / shortest)


def rewrite_picture(data: bytes, settings: PictureFormat) -> tuple[bytes, str | None, bool]:
    """Decodes a picture, shrinks it if it is larger than wanted, and encodes it.

    Args:
        data: An encoded picture.
        settings: How to write it.

    Returns:
        The bytes; a file name's suffix that fits them, `None` if they are `data` unchanged; whether it was shrunk.

    Raises:
        ValueError: If it cannot be decoded, or not be written in that format.
    """
    try:
        picture = Image.open(io.BytesIO(data))
    except Exception:
        decode_image(data, 3)  # says why, in the words of training
        raise
    if picture.format == "EPS":  # to decode it from here would start Ghostscript
        decode_image(data, 3)  # refuses it
    is_gray = picture.mode in _GRAY_MODES or picture.mode.startswith("I")
    kind = picture.format or ""
    decoded = decode_image(picture, 1 if is_gray else 3)
    old_size = decoded.shape[1:] if isinstance(decoded, np.ndarray) else (decoded.height, decoded.width)
    size = settings.size_after(*old_size)
    shrunk = size != tuple(old_size)
    if settings.image_format == "keep" and not shrunk:
        return data, None, False
    if isinstance(decoded, np.ndarray):
        channel = (resize(decoded, size).numpy() if shrunk else decoded)[0]
        if picture.mode == "F":
            return *_encode(Image.fromarray(channel), "TIFF", settings), shrunk
        # decode_image divided by 65535, which float32 undoes exactly
        return *_encode(Image.fromarray(np.rint(channel * 65535).astype(np.uint16)), "PNG", settings), shrunk
    if shrunk:
        pixels = resize(decoded, size).numpy()
        decoded = Image.fromarray(pixels[0] if is_gray else np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    wanted = _KEPT_LOSSY.get(kind, "PNG") if settings.image_format == "keep" else settings.image_format.upper()
    return *_encode(decoded, wanted, settings), shrunk


def _encode(picture: Image.Image, kind: str, settings: PictureFormat) -> tuple[bytes, str]:
    quality = {"quality": settings.quality or DEFAULT_QUALITY} if kind in ("JPEG", "WEBP") else {}
    # what Pillow remembers of the file, e.g. a transparent colour, was applied when it was decoded
    picture.info.clear()
    stream = io.BytesIO()
    try:
        picture.save(stream, kind, **quality)
    except (OSError, ValueError) as error:
        raise ValueError(f"{picture.width} x {picture.height} pixels cannot be written as {kind}: {error}") from error
    return stream.getvalue(), _SUFFIXES[kind]


def shrink_array(array: np.ndarray, settings: PictureFormat) -> np.ndarray:
    """Shrinks an array channel by channel, bilinear with antialias, if it is larger than wanted.

    Args:
        array: [height, width], or with a channel axis; uint8, uint16 or floating point.
        settings: The size and, where it does not follow from the shape, the channel axis.

    Returns:
        The same dtype; whole numbers are rounded.

    Raises:
        ValueError: If values are not finite, or the channel axis does not follow from the shape.
    """
    if not np.isfinite(array).all():
        raise ValueError(f"{int((~np.isfinite(array)).sum())} of {array.size} values are NaN or infinite.")
    if array.ndim == 2:
        return shrink_array(array[None], PictureFormat(settings.shortest_side, channel_axis=0))[0]
    if array.shape == shape_after(array.shape, settings):
        return array
    axis = _shortest_axis(array.shape, settings)
    planes = np.moveaxis(array, axis, 0)
    shrunk = resize(planes.astype(np.float32), settings.size_after(*planes.shape[1:])).numpy()
    shrunk = np.moveaxis(np.rint(shrunk) if array.dtype.kind == "u" else shrunk, 0, axis)
    return np.ascontiguousarray(shrunk, dtype=array.dtype)


def shape_after(shape: tuple[int | None, ...], settings: PictureFormat) -> tuple[int | None, ...]:
    """Computes the shape of the array that `shrink_array` returns.

    Args:
        shape: Two or three numbers; the first may be `None`, if it is that of the channels: it then varies.
        settings: As for `shrink_array`.

    Returns:
        As many numbers.

    Raises:
        ValueError: If the channel axis does not follow from the shape, or the height varies.
    """
    axis = None if len(shape) == 2 else _shortest_axis(shape, settings) if settings.shortest_side is not None else 0
    sides = list(shape) if axis is None else [side for number, side in enumerate(shape) if number != axis % 3]
    if settings.shortest_side is None:
        return tuple(shape)
    if None in sides:
        raise ValueError(
            f"shortest_side={settings.shortest_side}: arrays of shape {shape} have heights that vary, and a column of "
            "arrays has one width; leave --shortest_side out, or store pictures instead of arrays."
        )
    after: list[int | None] = list(settings.size_after(*cast(list[int], sides)))
    if axis is not None:
        after.insert(axis % 3, shape[axis])
    return tuple(after)


def _shortest_axis(shape: tuple[int | None, ...], settings: PictureFormat) -> int:
    """Returns the channel axis: as given, else the first or the last where that is the shortest of the three."""
    if settings.channel_axis is not None:
        return settings.channel_axis
    lengths = [math.inf if length is None else length for length in shape]
    for axis in (0, -1):
        if lengths[axis] < min(length for number, length in enumerate(lengths) if number != axis % 3):
            return axis
    raise ValueError(
        f"shortest_side={settings.shortest_side}: the shape {shape} of the arrays does not show which axis is that of "
        "the channels; write --channel_axis 0 ([channels, height, width]) or --channel_axis -1 ([height, width, "
        "channels])."
    )
