"""Keeps images of one size decoded in memory, and crops a batch of them at a time.

Decoding a small picture and calling the resizer take ten times as long as the work on its pixels. Where all images of
a set are 8-bit pictures of one size that fit in memory together, they are decoded once, and the crops of a batch are
two products of matrices. The crops' boxes and the replaced images are the same as for images that are read one by one;
a pixel may differ by 2 of 255, because nothing is rounded between the two products.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset as TorchDataset
from tqdm.auto import tqdm

from ijepa_hf.data.order import SampleKey
from ijepa_hf.data.reading import CropReader, ImageRows, crop_numbers, first_readable
from ijepa_hf.data.transforms import crop_box, resize

AUTOMATIC_BYTES = 2**30  # what `auto` keeps at most, in each process; 300,000 images of 32 x 32 in colour
_DECODED_AT_ONCE = 256
_DECODED_WITHOUT_A_BAR = 10_000
_LARGEST_PRODUCT = 40  # pixels of a side; above it the resizer itself is faster
_RESIZED_AT_ONCE = 64  # of 32 x 32 pixels these, and their weights, stay in a core's cache


@dataclass(frozen=True)
class DecodedImages:
    """Holds the pixels of a set of images.

    Args:
        pixels: uint8 `[n, C, height, width]`; zeros for images that cannot be read.
        unreadable: Why, by the number of the image.
    """

    pixels: Tensor
    unreadable: dict[int, str]


class CannotKeepError(ValueError):
    """The images are not 8-bit pictures of one size, or do not fit in memory."""


def decode_all(images: ImageRows, size: tuple[int, int] | None, *, limit: int | None) -> DecodedImages:
    """Decodes all images of a set.

    Args:
        images: The images.
        size: Height and width to resize them to, as `transforms.resize` does; as they are if not given.
        limit: Largest number of bytes of pixels; without limit if not given.

    Returns:
        The images.

    Raises:
        CannotKeepError: If two differ in size, one is no 8-bit picture, none can be read, or they take more than
            `limit`; raised as soon as it is known.
    """
    pixels: Tensor | None = None
    unreadable: dict[int, str] = {}
    first = 0
    few = len(images) < _DECODED_WITHOUT_A_BAR
    with tqdm(desc="decode", total=len(images), unit="image", mininterval=1.0, disable=few) as progress:
        for start in range(0, len(images), _DECODED_AT_ONCE):
            numbers = range(start, min(len(images), start + _DECODED_AT_ONCE))
            for number, row in zip(numbers, images.raw_rows(numbers), strict=True):
                try:
                    decoded = images.images.decode(row)
                except ValueError as error:
                    unreadable[number] = str(error)
                    continue
                if not isinstance(decoded, Image.Image):
                    raise CannotKeepError(f"image {number} has more than 8 bits or other channels than a picture")
                if pixels is None:
                    shape = size or (decoded.height, decoded.width)
                    pixels = _room(len(images), shape, len(decoded.getbands()), limit)
                    first, first_size = number, decoded.size
                if size is None and decoded.size != first_size:
                    raise CannotKeepError(
                        f"image {number} has {decoded.height}x{decoded.width} pixels, but image {first} has "
                        f"{first_size[1]}x{first_size[0]}"
                    )
                pixels[number] = _pixels(decoded, size)
            progress.update(len(numbers))
    if pixels is None:
        raise CannotKeepError("no image can be read")
    return DecodedImages(pixels, unreadable)


def _room(count: int, size: tuple[int, int], channels: int, limit: int | None) -> Tensor:
    shape = (count, channels, *size)
    if limit is not None and int(np.prod(shape)) > limit:
        raise CannotKeepError(f"their pixels take {int(np.prod(shape)) / 1e6:,.0f} MB")
    return torch.zeros(shape, dtype=torch.uint8)


def _pixels(picture: Image.Image, size: tuple[int, int] | None) -> Tensor:
    """Returns the pixels of a picture, uint8 [C, height, width]."""
    if size is not None:
        return resize(picture, size)
    array = np.array(picture)
    return torch.from_numpy(array if array.ndim == 3 else array[..., None]).permute(2, 0, 1)


class MemoryCrops(TorchDataset[dict[str, Any]]):
    """Makes crops of a set in memory, for a list of `SampleKey`s.

    Args:
        images: The decoded images; with `min_crop_scale` 1 already of the crops' size.
        crops: Says the size and how crops are drawn.
    """

    def __init__(self, images: DecodedImages, crops: CropReader) -> None:
        self.images, self.crops = images, crops

    def __len__(self) -> int:
        return len(self.images.pixels)

    def __getitem__(self, key: SampleKey) -> dict[str, Any]:
        """Returns the sample of one key."""
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[SampleKey]) -> list[dict[str, Any]]:
        """Returns a sample for each key, as `CropReader.read_all` does."""
        found = [
            first_readable(key, self.crops.seed, key.image, self._another, self._check)
            if key.image in self.images.unreadable
            else (key.image, key.image, None, [])
            for key in keys
        ]
        pixels = self.images.pixels.index_select(0, torch.tensor([image for image, *_ in found]))
        size, scale = self.crops.size, self.crops.min_crop_scale
        if scale != 1.0:
            height, width = pixels.shape[2:]
            numbers = crop_numbers(self.crops.seed, keys)
            pixels = resize_parts(pixels, [crop_box(height, width, size, scale, row) for row in numbers], size)
        return [
            {"pixel_values": crop, "sample_key": key, "unreadable": unreadable}
            for crop, key, (*_, unreadable) in zip(pixels.unbind(), keys, found, strict=True)
        ]

    def _another(self, draw: int) -> tuple[int, int]:
        return draw % len(self), draw % len(self)

    def _check(self, number: int, _: int) -> None:
        if number in self.images.unreadable:
            raise ValueError(self.images.unreadable[number])


def resize_parts(images: Tensor, boxes: Sequence[tuple[int, int, int, int]], size: tuple[int, int]) -> Tensor:
    """Cuts one part out of each image and resizes it, bilinear with antialias.

    Args:
        images: uint8 `[B, C, height, width]`.
        boxes: Top, left, height and width of each part, in pixels, inside the image.
        size: (height, width) of the results, at least 2 each: torch resizes wrongly to one pixel.

    Returns:
        uint8 `[B, C, *size]`, off by 2 at most from what `torch.nn.functional.interpolate` gives.
    """
    if max(*images.shape[2:], *size) > _LARGEST_PRODUCT:
        parts = [
            image[None, :, top : top + high, left : left + wide]
            for image, (top, left, high, wide) in zip(images, boxes, strict=True)
        ]
        return torch.cat([functional.interpolate(part, size=size, mode="bilinear", antialias=True) for part in parts])
    (channels, height, width), (high, wide) = images.shape[1:], size
    resized = torch.empty(len(images), channels, *size, dtype=torch.uint8)
    top, left, heights, widths = torch.from_numpy(np.array(boxes)).unbind(1)
    numbers = top * height + heights - 1, left * width + widths - 1
    half = torch.full((), 0.5)
    together = (part.split(_RESIZED_AT_ONCE) for part in (images, *numbers, resized))
    for pixels, vertical, horizontal, result in zip(*together, strict=True):
        across = pixels.flatten(1, 2).float() @ _weights(width, wide).index_select(0, horizontal).mT
        columns = across.unflatten(1, (channels, height)).transpose(1, 2).flatten(2)  # one product for all channels
        down = torch.baddbmm(half, _weights(height, high).index_select(0, vertical), columns)
        # by way of int32, for which there are vector instructions
        result.copy_(down.to(torch.int32).unflatten(2, (channels, wide)).transpose(1, 2))
    return resized


@functools.lru_cache(maxsize=8)
def _weights(side: int, out: int) -> Tensor:
    """Computes the weight of each pixel of a side in each of `out` pixels: float32 [side * side, out, side].

    The part that begins at pixel p and has n pixels is number p * side + n - 1; numbers whose part would reach beyond
    the side are never used.
    """
    number = torch.arange(side * side)[:, None, None]
    first, length = number // side, number % side + 1
    scale = length / out
    centres = first + scale * (torch.arange(out)[:, None] + 0.5)
    pixels = torch.arange(side)
    # a triangle around each centre, as wide as two pixels of the coarser of both
    weights = (1 - (pixels + 0.5 - centres).abs_() / scale.clamp(min=1)).clamp_(min=0)
    weights *= (pixels >= first) & (pixels < first + length)
    return weights / weights.sum(2, keepdim=True)


def keep_in_memory(images: ImageRows, crops: CropReader, choice: str, *, num_reads: int) -> MemoryCrops | None:
    """Decides whether the images of a run are kept decoded, and decodes them.

    Args:
        images: The images.
        crops: Says how they will be cropped.
        choice: `yes`, `no`, or `auto`. `auto` keeps images that are 8-bit pictures of one size and take at most
            `AUTOMATIC_BYTES`, if the run reads as many images as the set has or more.
        num_reads: Images that the run will read.

    Returns:
        The crops; `None` if images are to be read one by one.

    Raises:
        ValueError: If `choice` is `yes` and they cannot be kept.
    """
    if choice == "no" or (choice == "auto" and num_reads < len(images)):
        return None
    try:
        if min(crops.size) < 2:
            raise CannotKeepError("crops of one pixel are cut one by one")
        limit = AUTOMATIC_BYTES if choice == "auto" else None
        decoded = decode_all(images, crops.size if crops.min_crop_scale == 1.0 else None, limit=limit)
    except CannotKeepError as error:
        if choice == "yes":
            raise ValueError(
                f"keep_images_in_memory='yes', but {error}; only 8-bit pictures of one size can be kept decoded. Use "
                "--keep_images_in_memory no, or bring them to one size."
            ) from error
        return None
    return MemoryCrops(decoded, crops)
