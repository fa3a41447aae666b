"""Reads a row of a data set as a crop; takes another image in place of one that cannot be read.

A crop is a function of (seed, optimiser step, slot), where slot is its index in the *global* batch. So a run is the
same for any number of workers, and of ranks at a fixed global batch, and resuming at a step needs only that step's
number.

A single image that cannot be read never stops a run: another one, drawn from the same numbers, replaces it, and the
batch names it. If not the image but its disk or server fails (`retrying`), the read is repeated: another image would
change the run.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, TypeVar, cast

import datasets
import numpy as np
from datasets.utils.file_utils import is_local_path, xopen
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from ijepa_hf.data.decoding import decode_image, read_image_file
from ijepa_hf.data.order import SampleKey
from ijepa_hf.data.retrying import DEFAULT_RETRIES, DataSourceError, RetryPolicy
from ijepa_hf.data.transforms import (
    CROP_NUMBERS,
    check_crop,
    normalize,
    random_resized_crop,
    resize,
    stack_images,
)
from ijepa_hf.model.configuration_ijepa import IJepaConfig
from ijepa_hf.randomness import DRAW_CROP, DRAW_SUBSTITUTE, keyed_generator

SUBSTITUTE_TRIES = 10
IMAGES_BEFORE_JUDGING = 1000  # a share of fewer images says little
MOST_NAMED = 20  # images that an error lists

_Row = TypeVar("_Row")
_Read = TypeVar("_Read")


class UnreadableImage(NamedTuple):
    """Names an image that was skipped: its number in the data set, the reason, and its file name if it has one."""

    image: int
    reason: str


def too_many_unreadable(
    count: int, lines: Iterable[str], num_seen: int, num_images: int, max_share: float
) -> str | None:
    """Checks whether too many images cannot be read.

    Args:
        count: Images that could not be read.
        lines: A line about each of them.
        num_seen: Different images that were asked for.
        num_images: Images in the data set.
        max_share: Share of the images seen that may be unreadable, in [0, 1].

    Returns:
        The beginning of an error's message, which lists the first `MOST_NAMED`; `None` if there are few enough, or
        fewer than `IMAGES_BEFORE_JUDGING` (and not all) were seen.
    """
    if num_seen < min(num_images, IMAGES_BEFORE_JUDGING) or count <= max_share * num_seen:
        return None
    listed = "".join(f"\n  {line}" for line in islice(lines, MOST_NAMED))
    more = f"\n  and {count - MOST_NAMED:,} more" if count > MOST_NAMED else ""
    return (
        f"{count} of the {num_seen} images seen so far cannot be read, more than max_broken_share={max_share:g}:"
        f"{listed}{more}"
    )


class ImageColumn:
    """Decodes the image of a row of a data set.

    Args:
        dataset: A map-style data set or a stream, with known features.
        column: Its image column.
        num_channels: Channels of the model.
        retries: How long failing reads of picture files are repeated, where rows have paths; a file that is mapped
            into memory (Arrow, .npy) is read by the operating system, which ends the process where it cannot.
    """

    def __init__(
        self,
        dataset: datasets.Dataset | datasets.IterableDataset,
        column: str,
        num_channels: int,
        retries: RetryPolicy = DEFAULT_RETRIES,
    ) -> None:
        feature = dataset.features[column]
        self.column, self.num_channels = column, num_channels
        self.retries = retries
        # an array column keeps its own type, which says what range its numbers have
        self.dtype = None if isinstance(feature, datasets.Image) else np.dtype(feature.dtype)

    def undecoded(
        self, dataset: datasets.Dataset | datasets.IterableDataset, *others: str
    ) -> datasets.Dataset | datasets.IterableDataset:
        """Returns the data set with this column (and `others`) only, and images as bytes."""
        if self.dtype is None:
            dataset = dataset.cast_column(self.column, datasets.Image(decode=False))
        elif isinstance(dataset, datasets.Dataset):
            dataset = dataset.with_format("numpy", columns=[self.column], output_all_columns=True, dtype=self.dtype)
        return dataset.select_columns([self.column, *others])

    def decode(self, row: Mapping[str, Any]) -> Any:
        """Returns the row's image, a PIL image or an array.

        Args:
            row: A row.

        Raises:
            ValueError: If the image cannot be read; says why.
            DataSourceError: If the file's disk or server fails for longer than `retries` allows.
        """
        value = row[self.column]
        path = value.get("path") if isinstance(value, Mapping) else None
        try:
            if path is not None and value.get("bytes") is None:
                value = {"bytes": self._bytes_of_file(str(path)), "path": path}
            return decode_image(value if self.dtype is None else np.asarray(value, self.dtype), self.num_channels)
        except DataSourceError:
            raise
        except (ValueError, OSError) as error:
            raise ValueError(f"{path}: {error}" if path and str(path) not in str(error) else str(error)) from error

    def _bytes_of_file(self, path: str) -> bytes:
        read = partial(read_image_file, path) if is_local_path(path) else partial(_read_remote_file, path)
        return self.retries.call(f"image file {path!r}", lambda: self.retries.within(read))


def _read_remote_file(address: str) -> bytes:
    with xopen(address, "rb") as file:
        return file.read()


class ImageRows:
    """Decodes the images of a data set, one at a time.

    Args:
        dataset: A map-style data set.
        column: Its image column.
        num_channels: Channels of the model.
        retries: As `ImageColumn` takes it.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        column: str,
        num_channels: int,
        retries: RetryPolicy = DEFAULT_RETRIES,
    ) -> None:
        self.images = ImageColumn(dataset, column, num_channels, retries)
        self.rows = self.images.undecoded(dataset)

    def __len__(self) -> int:
        return len(self.rows)

    def raw_rows(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Returns some rows, undecoded; several at once cost little more than one."""
        if self.images.dtype is not None:  # arrays, which come as what they are only one by one
            return [self.rows[int(index)] for index in indices]
        columns = self.rows[indices if isinstance(indices, range) else list(indices)]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def __getitem__(self, index: int) -> Any:
        """Returns image `index`, a PIL image or an array; an image that cannot be read is a `ValueError` naming it."""
        try:
            return self.images.decode(self.rows[int(index)])
        except ValueError as error:
            raise ValueError(f"image {index} of the data set: {error}") from error


def resized_pixels(images: Iterable[Any], config: IJepaConfig, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Resizes and normalises whole images, as the saved image processor does.

    Args:
        images: n decoded images, as `ImageRows` gives them.
        config: Says the size.
        mean: Mean of each channel.
        std: Standard deviation of each channel.

    Returns:
        float32 `[n, num_channels, height, width]`.
    """
    pixels = stack_images([resize(image, config.image_shape) for image in images])
    return normalize(pixels, mean, std)


def first_readable(
    key: SampleKey,
    seed: int,
    row: _Row,
    another: Callable[[int], tuple[int, _Row]],
    read: Callable[[int, _Row], _Read],
) -> tuple[int, _Row, _Read, list[UnreadableImage]]:
    """Reads an image or, if it cannot be read, others drawn from (seed, epoch, image).

    Args:
        key: Says epoch and image.
        seed: The run's seed.
        row: The image's row.
        another: Gives the number and row of some image for any number from 0 to 2**32 - 1.
        read: Reads an image, given its number and row; a `ValueError` if that cannot be done.

    Returns:
        Number and row of the image that was read, what `read` gave, and those that could not be read.

    Raises:
        ValueError: If `SUBSTITUTE_TRIES` images in a row cannot be read; lists them.
    """
    unreadable: list[UnreadableImage] = []
    image, substitutes = key.image, None
    while True:
        try:
            return image, row, read(image, row), unreadable
        except ValueError as error:
            unreadable.append(UnreadableImage(image, str(error)))
            if len(unreadable) > SUBSTITUTE_TRIES:
                listed = "".join(f"\n  image {number}: {reason}" for number, reason in unreadable)
                raise ValueError(f"{len(unreadable)} images one after the other cannot be read:{listed}") from error
        if substitutes is None:
            substitutes = keyed_generator(seed, DRAW_SUBSTITUTE, key.epoch, key.image)
        image, row = another(int(substitutes.integers(2**32)))


def crop_numbers(seed: int, keys: Sequence[SampleKey]) -> list[list[float]]:
    """Draws the random numbers that decide the boxes of some samples' crops.

    A step has one generator, and each slot of the global batch has its own part of its numbers. So the numbers of a
    sample do not depend on the other samples.

    Args:
        seed: The run's seed.
        keys: Where the samples stand; cheapest where their slots follow each other in one step.

    Returns:
        For each sample `CROP_NUMBERS` numbers, uniform in [0, 1).
    """
    first = keys[0]
    if any((key.step, key.slot) != (first.step, first.slot + place) for place, key in enumerate(keys)):
        return [crop_numbers(seed, [key])[0] for key in keys]
    generator = keyed_generator(seed, DRAW_CROP, first.step)
    # Philox makes four numbers each time that it counts
    cast(np.random.Philox, generator.bit_generator).advance(first.slot * (CROP_NUMBERS // 4))
    return cast(list[list[float]], generator.random((len(keys), CROP_NUMBERS)).tolist())


class CropReader:
    """Turns rows into crops, drawn from (seed, step, slot); finds a substitute for a row that cannot be read.

    Args:
        images: Says how to decode a row.
        size: Height and width of a crop.
        min_crop_scale: Least share of the image that a crop covers; 1 means no cropping.
        seed: The run's seed.

    Raises:
        ValueError: If `size` or `min_crop_scale` is out of range.
    """

    def __init__(
        self,
        images: ImageColumn,
        size: tuple[int, int],
        min_crop_scale: float,
        seed: int,
    ) -> None:
        check_crop(size, min_crop_scale)
        self.images, self.size, self.min_crop_scale, self.seed = images, size, min_crop_scale, seed

    def read_all(
        self,
        keys: Sequence[SampleKey],
        rows: Sequence[Mapping[str, Any]],
        others: Sequence[Callable[[int], tuple[int, Mapping[str, Any]]]],
    ) -> list[dict[str, Any]]:
        """Reads the samples of a micro-batch.

        Args:
            keys: Where they stand.
            rows: The row of each.
            others: For each, a function that gives the number and row of some image for any number from 0 to
                2**32 - 1; asked when its row cannot be read.

        Returns:
            Of each sample `pixel_values` uint8 or float32 `[num_channels, height, width]`, the `sample_key`, and the
            images that were `unreadable`.

        Raises:
            ValueError: If `SUBSTITUTE_TRIES` images in a row cannot be read; lists them.
        """
        numbers = crop_numbers(self.seed, keys)
        return [self._read(*sample) for sample in zip(keys, rows, others, numbers, strict=True)]

    def _read(
        self,
        key: SampleKey,
        row: Mapping[str, Any],
        another: Callable[[int], tuple[int, Mapping[str, Any]]],
        numbers: Sequence[float],
    ) -> dict[str, Any]:
        _, _, decoded, unreadable = first_readable(
            key, self.seed, row, another, lambda _, row: self.images.decode(row)
        )
        crop = random_resized_crop(decoded, self.size, self.min_crop_scale, numbers)
        return {"pixel_values": crop, "sample_key": key, "unreadable": unreadable}


class PretrainingImages(TorchDataset[dict[str, Any]]):
    """Makes the crops of a map-style data set, for `SampleKey`s.

    Args:
        images: The images.
        crops: Decodes and crops a row.
    """

    def __init__(self, images: ImageRows, crops: CropReader) -> None:
        self.images, self.crops = images, crops

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: SampleKey) -> dict[str, Any]:
        """Returns the sample of one key."""
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[SampleKey]) -> list[dict[str, Any]]:
        """Returns a sample for each key, as `CropReader.read_all` does."""
        rows = self.images.raw_rows([key.image for key in keys])
        return self.crops.read_all(keys, rows, [self._another] * len(keys))

    def _another(self, draw: int) -> tuple[int, Mapping[str, Any]]:
        return draw % len(self), self.images.raw_rows([draw % len(self)])[0]
