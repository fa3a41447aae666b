"""Images of one size kept decoded in memory, and cropped a batch at a time.

Decoding a small picture, making a generator for it and calling the resizer cost ten times what its pixels do. Where
all images of a set are 8-bit pictures of one size that fit in memory together, they are decoded once; then all boxes
of an epoch are drawn at once, and the crops of a batch are two products of matrices: the resizer's weights are whole
numbers, and so are pixels, so that float32 gives its sums exactly. What comes out has the bits that `CropReader` gives
image by image: same boxes, same pixels, same substitutes for images that cannot be read.
"""

import logging
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

from ijepa_hf.data import CropReader, ImageRows, SampleKey, first_readable
from ijepa_hf.image_transforms import resize
from ijepa_hf.keyed_crops import keyed_crop_boxes
from ijepa_hf.randomness import DRAW_CROP

AUTOMATIC_BYTES = 2**30  # what `auto` keeps at most, in each process; 300,000 images of 32 x 32 in colour
_DECODED_AT_ONCE = 256
_DECODED_WITHOUT_A_BAR = 10_000
_TABLE_BYTES = 2**25  # of weights for all places of a crop; above it the resizer itself is faster
_RESIZED_AT_ONCE = 32  # of 32 x 32 pixels these, and their weights, stay in a core's cache
_EXACT = 2**24  # float32 holds all whole numbers up to here

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DecodedImages:
    """All images of a set.

    Args:
        pixels: uint8 `[n, height, C, width]`; whatever for images that cannot be read.
        unreadable: Why, by the number of the image.
    """

    pixels: Tensor
    unreadable: dict[int, str]


class CannotKeepError(ValueError):
    """The images of a set are not 8-bit pictures of one size, or too many."""


def decode_all(images: ImageRows, size: tuple[int, int] | None, *, limit: int | None) -> DecodedImages:
    """Decodes all images of a set.

    Args:
        images: The images.
        size: Height and width to resize them to, as `image_transforms.resize` does; as they are if not given.
        limit: Bytes of pixels at most; any number if not given.

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
                pixels[number] = _rows_first(decoded, size)
            progress.update(len(numbers))
    if pixels is None:
        raise CannotKeepError("no image can be read")
    return DecodedImages(pixels, unreadable)


def _room(count: int, size: tuple[int, int], channels: int, limit: int | None) -> Tensor:
    shape = (count, size[0], channels, size[1])
    if limit is not None and int(np.prod(shape)) > limit:
        raise CannotKeepError(f"their pixels take {int(np.prod(shape)) / 1e6:,.0f} MB")
    return torch.zeros(shape, dtype=torch.uint8)


def _rows_first(picture: Image.Image, size: tuple[int, int] | None) -> Tensor:
    """uint8 [height, C, width]."""
    if size is not None:
        return resize(picture, size).transpose(0, 1)
    array = np.array(picture)
    return torch.from_numpy(array if array.ndim == 3 else array[..., None]).transpose(1, 2)


class MemoryCrops(TorchDataset[dict[str, Any]]):
    """The crops of a set in memory; asked with a list of `SampleKey`s.

    Args:
        images: The decoded images; with `min_crop_scale` 1 already of the crops' size.
        crops: Says the size and how crops are drawn.
    """

    def __init__(self, images: DecodedImages, crops: CropReader) -> None:
        self.images, self.crops = images, crops
        height, _, width = images.pixels.shape[1:]
        self.image_size = (height, width)
        self.epoch, self.boxes = -1, np.empty((0, 4), dtype=np.int64)
        self.resizer = None if crops.min_crop_scale == 1.0 else BatchResizer(self.image_size, crops.size)

    def __len__(self) -> int:
        return len(self.images.pixels)

    def __getitem__(self, key: SampleKey) -> dict[str, Any]:
        """Returns what `CropReader.read` says."""
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[SampleKey]) -> list[dict[str, Any]]:
        """Returns what `CropReader.read` says of each."""
        samples: list[dict[str, Any]] = [{"sample_key": key, "unreadable": []} for key in keys]
        numbers = [key.image for key in keys]
        if self.images.unreadable:
            for place, key in enumerate(keys):
                if key.image in self.images.unreadable:
                    numbers[place], _, _, samples[place]["unreadable"] = first_readable(
                        key, self.crops.seed, key.image, self._another, self._check
                    )
        for epoch in {key.epoch for key in keys}:  # one, but for a batch that somebody puts together by hand
            places = [place for place, key in enumerate(keys) if key.epoch == epoch]
            crops = self._crops(epoch, torch.tensor([numbers[place] for place in places]))
            for place, crop in zip(places, crops.unbind(), strict=True):
                samples[place]["pixel_values"] = crop
        return samples

    def _another(self, draw: int) -> tuple[int, int]:
        return draw % len(self), draw % len(self)

    def _check(self, number: int, _: int) -> None:
        if number in self.images.unreadable:
            raise ValueError(self.images.unreadable[number])

    def _crops(self, epoch: int, numbers: Tensor) -> Tensor:
        pixels = self.images.pixels.index_select(0, numbers)
        if self.resizer is None:
            return pixels.transpose(1, 2).contiguous()
        if epoch != self.epoch:
            everything = np.arange(len(self))
            key = (self.crops.seed, DRAW_CROP, epoch)
            scale, size = self.crops.min_crop_scale, self.crops.size
            self.epoch, self.boxes = epoch, keyed_crop_boxes(key, everything, self.image_size, size, scale)
        return self.resizer(pixels, torch.from_numpy(self.boxes[numbers.numpy()]))


class BatchResizer:
    """Cuts parts out of images of one size and resizes them, with the bits of torch's antialiased bilinear filter.

    Args:
        image_size: (height, width) of the images.
        size: (height, width) of the results, at least 2 each.
    """

    def __init__(self, image_size: tuple[int, int], size: tuple[int, int]) -> None:
        self.size = size
        sides = list(zip(image_size, size, strict=True))
        table_bytes = sum(4 * side * side * (side + 1) // 2 * out for side, out in sides)
        self.tables = [PlacedWeights(*side) for side in sides] if table_bytes <= _TABLE_BYTES else []
        if not all(table.is_exact for table in self.tables):
            self.tables = []

    def __call__(self, images: Tensor, boxes: Tensor) -> Tensor:
        """Resizes one part of each image.

        Args:
            images: uint8 `[B, height, C, width]`.
            boxes: int64 `[B, 4]`: top, left, height and width.

        Returns:
            uint8 `[B, C, *size]`.
        """
        resized = torch.empty(len(images), images.shape[2], *self.size, dtype=torch.uint8)
        if not self.tables:
            self._one_by_one(images, boxes, resized)
            return resized
        for part in zip(*(values.split(_RESIZED_AT_ONCE) for values in (images, boxes, resized)), strict=True):
            self._together(*part)
        return resized

    def _together(self, images: Tensor, boxes: Tensor, resized: Tensor) -> None:
        top, left, high, wide = boxes.unbind(1)
        batch, height, channels, width = images.shape
        vertical, horizontal = self.tables
        half = torch.full((), 0.5)
        # rounded in between, as the resizer does: both sums are exact, so that floor(x + 1/2) is its rounding
        values = images.view(batch, height * channels, width).float()
        values = torch.baddbmm(half, values, horizontal(wide, left).transpose(1, 2)).floor_()
        values = torch.baddbmm(half, vertical(high, top), values.view(batch, height, -1))
        # by way of int32, for which there are vector instructions
        whole = values.to(torch.int32).view(batch, self.size[0], channels, self.size[1])
        resized.copy_(whole.transpose(1, 2))

    def _one_by_one(self, images: Tensor, boxes: Tensor, resized: Tensor) -> None:
        for number, (top, left, high, wide) in enumerate(boxes.tolist()):
            part = images[number, top : top + high, :, left : left + wide].transpose(0, 1).contiguous()[None]
            resized[number] = functional.interpolate(part, size=self.size, mode="bilinear", antialias=True)[0]


class PlacedWeights:
    """The resizer's weights along one side, for parts of every length at every place.

    Args:
        side: Pixels of the image.
        out: Pixels of the result.
    """

    def __init__(self, side: int, out: int) -> None:
        self.side = side
        table = torch.zeros(side * (side + 1) // 2, out, side)
        self.is_exact = True
        for length in range(1, side + 1):
            weights, bits = resizing_weights(length, out)
            self.is_exact &= 255 * int(weights.sum(1).max()) + (1 << bits - 1) <= _EXACT
            scaled = torch.from_numpy(weights.astype(np.float32) / np.float32(1 << bits))  # exact: a power of two
            for place in range(side - length + 1):
                table[self._row(length, place), :, place : place + length] = scaled
        self.table = table

    def __call__(self, lengths: Tensor, places: Tensor) -> Tensor:
        """float32 `[B, out, side]` for int64 `[B]` lengths and places of parts."""
        return self.table.index_select(0, self._row(lengths, places))

    def _row(self, length: Any, place: Any) -> Any:
        # parts of length 1 have `side` places, those of length 2 one less, and so on
        return (length - 1) * self.side - (length - 1) * (length - 2) // 2 + place


def resizing_weights(length: int, out: int) -> tuple[np.ndarray, int]:
    """The weights with which torch resizes 8-bit images along one side, bilinear with antialias.

    Args:
        length: Pixels before.
        out: Pixels after.

    Returns:
        int64 `[out, length]`, and the bits by which sums of products with them are shifted to the right, rounded.
    """
    scale = length / out
    support = max(scale, 1.0)
    weights = np.zeros((out, length))
    for place in range(out):
        centre = scale * (place + 0.5)
        low, high = max(int(centre - support + 0.5), 0), min(int(centre + support + 0.5), length)
        distance = np.abs(np.arange(low, high) - centre + 0.5) / support
        part = np.maximum(1.0 - distance, 0.0)
        weights[place, low:high] = part / part.sum()
    bits = 0
    while bits < 22 and int(0.5 + weights.max() * (1 << bits + 1)) < 1 << 15:
        bits += 1
    return np.floor(0.5 + weights * (1 << bits)).astype(np.int64), bits


def keep_in_memory(images: ImageRows, crops: CropReader, wish: str, *, num_reads: int) -> MemoryCrops | None:
    """Decides whether the images of a run are kept decoded, and decodes them.

    Args:
        images: The images.
        crops: Says how they will be cropped.
        wish: `yes`, `no`, or `auto`: where they are alike, take `AUTOMATIC_BYTES` at most, and are read at least once
            each.
        num_reads: Images that the run will read.

    Returns:
        The crops; `None` where images are to be read one by one.

    Raises:
        ValueError: If `wish` is `yes` and they cannot be kept.
    """
    if wish == "no" or (wish == "auto" and num_reads < len(images)):
        return None
    try:
        if min(crops.size) < 2:
            raise CannotKeepError("crops of one pixel are read one by one")
        limit = AUTOMATIC_BYTES if wish == "auto" else None
        decoded = decode_all(images, crops.size if crops.min_crop_scale == 1.0 else None, limit=limit)
    except CannotKeepError as error:
        if wish == "yes":
            raise ValueError(
                f"keep_images_in_memory='yes', but {error}; only 8-bit pictures of one size can be kept decoded. Use "
                "--keep_images_in_memory no, or bring them to one size."
            ) from error
        return None
    return MemoryCrops(decoded, crops)
