"""Decodes bytes, a picture or an array to an 8-bit picture or a float array."""

import io
import os
import re
import stat
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

# Errors that Pillow raises on damaged bytes: the three documented ones, and others from its PNG, TIFF and PPM readers
# (found with 200,000 damaged files of fourteen formats).
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

_LARGEST_FILE = 2**30  # bytes; what Pillow agrees to decode (179 million pixels) takes half of it uncompressed

_PIXELS_COMPOSITED_AT_ONCE = 2**24


def decode_image(value: Any, num_channels: int, *, channel_axis: int | None = None) -> Image.Image | np.ndarray:
    """Decodes one image and brings it to `num_channels` channels, without resizing or normalising it.

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
    """Turns every error by which Pillow reports damage into one ValueError that names the image."""

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
    """Composites a picture onto white; a large one in parts, because each step makes a copy."""
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
    """Converts a single-channel picture of more than 8 bits to float32 [num_channels, height, width]."""
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
    """Returns a view as [C, height, width]; C is num_channels, or 1 if one channel may be repeated."""
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
