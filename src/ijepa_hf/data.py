"""Images for pretraining: data sets, the order in which they are visited, and the collator that draws the masks.

Every draw is a function of numbers that say where it happens: the order of an epoch of (seed, epoch), an image's
crop of (seed, epoch, index), the masks of (seed, optimiser step, slot), where slot is the sample's place in the
*global* batch. So a run is the same for any number of workers, and of ranks at a fixed global batch, and resuming at
a step needs that step's number alone.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from ijepa_hf.arguments import IMAGENET_MEAN, IMAGENET_STD, DataArguments
from ijepa_hf.configuration_ijepa import IJepaConfig
from ijepa_hf.image_transforms import decode_image, normalize, random_resized_crop, resize
from ijepa_hf.masking import draw_masks

DIGITS_TEST_SHARE = 0.2
_IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}
_IMAGE_FEATURES = (datasets.Image, datasets.Array2D, datasets.Array3D)
_DRAW_ORDER, _DRAW_CROP, _DRAW_MASKS = 1, 2, 3  # keep the streams of one seed apart


def keyed_generator(seed: int, *key: int) -> np.random.Generator:
    """A counter-based generator (Philox) that depends on nothing but the numbers given.

    Args:
        seed: The run's seed, at least 0.
        *key: What the draw is for and where it happens, each at least 0.

    Returns:
        A fresh generator.
    """
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, *key])))


class SampleKey(NamedTuple):
    """Where a sample stands: which epoch and optimiser step, which place in the global batch, which image."""

    epoch: int
    step: int
    slot: int
    image: int


# -- sources ---------------------------------------------------------------------------------------------------------


def load_split(arguments: DataArguments, split: str) -> datasets.Dataset:
    """Loads one split of the images that `arguments` name.

    Args:
        arguments: `dataset_name` is `digits`, a folder of images, a folder or file of parquet shards, or a Hub id.
        split: Name of the split, e.g. `train`.

    Returns:
        A map-style data set, cut to no length.

    Raises:
        FileNotFoundError: If `dataset_name` looks like a path and there is nothing, or no image in it.
        ValueError: If there is no such split; lists those that there are.
    """
    name = cast(str, arguments.dataset_name)
    if name == "digits":
        return load_digits(split)
    path = Path(name).expanduser()
    if path.exists():
        loaded = _load_local(path)
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"dataset_name={name!r}: there is no such file or folder.")
    else:
        loaded = datasets.load_dataset(name, arguments.dataset_config_name)
    if split not in loaded:
        raise ValueError(f"dataset_name={name!r} has no split {split!r}; it has {', '.join(map(repr, loaded))}.")
    return loaded[split]


def _load_local(path: Path) -> datasets.DatasetDict:
    if path.is_file():
        if path.suffix != ".parquet":
            raise ValueError(f"dataset_name={str(path)!r} is a file, but no .parquet file; give a folder of images.")
        return datasets.load_dataset("parquet", data_files={"train": str(path)})
    suffixes = {file.suffix.lower() for file in path.rglob("*") if file.is_file()}
    if ".parquet" in suffixes:
        return datasets.load_dataset(str(path))
    if suffixes & _IMAGE_SUFFIXES:
        return datasets.load_dataset("imagefolder", data_dir=str(path))
    raise FileNotFoundError(
        f"dataset_name={str(path)!r}: the folder holds no image ({', '.join(sorted(_IMAGE_SUFFIXES))}) and no "
        ".parquet file."
    )


def load_digits(split: str) -> datasets.Dataset:
    """scikit-learn's 1,797 scanned digits (UCI), 8x8 grayscale, enlarged to 32x32 (bilinear); works offline.

    Args:
        split: `train` (1,437 images) or `test` (360), a stratified split that never changes.

    Returns:
        Columns `image` (8-bit grayscale) and `label` (0 .. 9).

    Raises:
        ValueError: For another split.
    """
    from PIL import Image
    from sklearn.datasets import load_digits as load_scans
    from sklearn.model_selection import train_test_split

    if split not in ("train", "test"):
        raise ValueError(f"digits has no split {split!r}; it has 'train' and 'test'.")
    scans = load_scans()
    indices = np.arange(len(scans.target))
    halves = train_test_split(indices, test_size=DIGITS_TEST_SHARE, random_state=0, stratify=scans.target)
    chosen = np.sort(halves[0] if split == "train" else halves[1])
    # scans hold 0 .. 16
    pixels = np.rint(scans.images[chosen] * (255 / 16)).astype(np.uint8)
    images = [Image.fromarray(scan).resize((32, 32), Image.Resampling.BILINEAR) for scan in pixels]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(digit) for digit in range(10)])}
    )
    return datasets.Dataset.from_dict({"image": images, "label": scans.target[chosen].tolist()}, features=features)


def find_image_column(dataset: datasets.Dataset, name: str | None = None) -> str:
    """The column that holds the images.

    Args:
        dataset: Any data set.
        name: The column, where the user named one.

    Returns:
        `name`; otherwise `image`, `img`, or the only column of images or arrays.

    Raises:
        ValueError: If there is no such column, or none or several candidates; lists the columns.
    """
    columns = ", ".join(f"{column!r} ({type(feature).__name__})" for column, feature in dataset.features.items())
    if name is not None:
        if name not in dataset.features:
            raise ValueError(f"image_column_name={name!r} is no column of the data set; it has {columns}.")
        if not isinstance(dataset.features[name], _IMAGE_FEATURES):
            raise ValueError(
                f"image_column_name={name!r} holds no images: it must be an Image, Array2D or Array3D column. The "
                f"data set has {columns}."
            )
        return name
    images = [column for column, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    arrays = [
        column
        for column, feature in dataset.features.items()
        if isinstance(feature, datasets.Array2D | datasets.Array3D)
    ]
    for candidates in (images, arrays):
        preferred = [column for column in ("image", "img") if column in candidates]
        if preferred or len(candidates) == 1:
            return (preferred or candidates)[0]
        if candidates:
            raise ValueError(f"the data set has several image columns: {candidates}; choose with --image_column_name.")
    raise ValueError(f"the data set has no image column; its columns are {columns}; choose with --image_column_name.")


def find_label_column(dataset: datasets.Dataset, name: str | None = None) -> str | None:
    """The column of class labels, if there is one.

    It is `name`; else `label` or `labels`, where they hold classes or whole numbers; else the only column of classes.

    Args:
        dataset: Any data set.
        name: The column, where the user named one.

    Returns:
        The column's name, or `None`.

    Raises:
        ValueError: If `name` is no column of whole numbers or classes; lists the columns.
    """
    if name is not None:
        if name not in dataset.features or not _holds_labels(dataset.features[name]):
            raise ValueError(
                f"label_column_name={name!r} is no column of classes or whole numbers; the data set has "
                f"{', '.join(dataset.features)}."
            )
        return name
    classes = [column for column, feature in dataset.features.items() if isinstance(feature, datasets.ClassLabel)]
    for column in ("label", "labels"):
        if column in dataset.features and _holds_labels(dataset.features[column]):
            return column
    return classes[0] if len(classes) == 1 else None


def _holds_labels(feature: Any) -> bool:
    is_whole = isinstance(feature, datasets.Value) and feature.dtype.startswith(("int", "uint"))
    return is_whole or isinstance(feature, datasets.ClassLabel)


class ImageRows:
    """The images of a data set, decoded one at a time.

    Args:
        dataset: A map-style data set.
        column: Its image column.
        num_channels: Channels of the model.
    """

    def __init__(self, dataset: datasets.Dataset, column: str, num_channels: int) -> None:
        if isinstance(dataset.features[column], datasets.Image):
            # bytes, so that decoding, orientation and conversion are ours and errors name the image
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
        else:
            # keeps the column's own type, which says what range its numbers have
            dtype = np.dtype(dataset.features[column].dtype)
            dataset = dataset.with_format("numpy", columns=[column], dtype=dtype)
        self.rows = dataset.select_columns([column])
        self.column = column
        self.num_channels = num_channels

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        """Returns image `index`, a PIL image or an array; an image that cannot be read is a `ValueError` naming it."""
        value = self.rows[int(index)][self.column]
        try:
            return decode_image(value, self.num_channels)
        except ValueError as error:
            path = value.get("path") if isinstance(value, dict) else None
            raise ValueError(f"image {index} of the data set{f' ({path})' if path else ''}: {error}") from error


def resized_pixels(
    images: ImageRows, indices: Iterable[int], config: IJepaConfig, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """Whole images, as the saved image processor gives them.

    Args:
        images: The images.
        indices: Which of them.
        config: Says the size.
        mean: Of each channel.
        std: Of each channel.

    Returns:
        float32 `[n, num_channels, height, width]`.
    """
    pixels = _stack([resize(images[index], config.image_shape) for index in indices])
    return normalize(pixels, mean, std)


# -- order -----------------------------------------------------------------------------------------------------------


def global_batch_size(num_samples: int, batch_size: int, accumulation_steps: int = 1, num_ranks: int = 1) -> int:
    """Images in one optimiser step.

    Args:
        num_samples: Images in the data set.
        batch_size: Images per device and micro-batch.
        accumulation_steps: Micro-batches per optimiser step.
        num_ranks: Processes.

    Returns:
        The product of the last three.

    Raises:
        ValueError: If the data set is smaller than that.
    """
    size = batch_size * accumulation_steps * num_ranks
    if num_samples < size:
        raise ValueError(
            f"the data set has {num_samples} images, fewer than one global batch of {size} "
            f"(per_device_train_batch_size {batch_size} x gradient_accumulation_steps {accumulation_steps} x "
            f"{num_ranks} processes); use --per_device_train_batch_size "
            f"{max(1, num_samples // (accumulation_steps * num_ranks))} or less."
        )
    return size


class StepBatchSampler(Sampler[list[SampleKey]]):
    """The only source of order: yields the micro-batches of one rank, from a given optimiser step on.

    An epoch is a permutation of all images, a function of (seed, epoch); the last incomplete global batch is dropped.
    Slots of a global batch are laid out micro-batch by micro-batch, and in each of those rank by rank.

    Args:
        num_samples: Images in the data set.
        batch_size: Images per device and micro-batch.
        num_steps: Optimiser steps of the whole run.
        seed: The run's seed.
        start_step: Optimiser steps already done.
        accumulation_steps: Micro-batches per optimiser step.
        rank: This process.
        num_ranks: Processes.

    Raises:
        ValueError: If the data set is smaller than one global batch.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        num_steps: int,
        seed: int,
        *,
        start_step: int = 0,
        accumulation_steps: int = 1,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        self.global_batch_size = global_batch_size(num_samples, batch_size, accumulation_steps, num_ranks)
        self.steps_per_epoch = num_samples // self.global_batch_size
        self.num_samples, self.batch_size, self.num_steps, self.seed = num_samples, batch_size, num_steps, seed
        self.start_step, self.accumulation_steps = start_step, accumulation_steps
        self.rank, self.num_ranks = rank, num_ranks

    def __len__(self) -> int:
        return (self.num_steps - self.start_step) * self.accumulation_steps

    def __iter__(self) -> Iterator[list[SampleKey]]:
        order, order_epoch = np.empty(0, dtype=np.int64), -1
        for step in range(self.start_step, self.num_steps):
            epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
            if epoch != order_epoch:
                order = keyed_generator(self.seed, _DRAW_ORDER, epoch).permutation(self.num_samples)
                order_epoch = epoch
            first = step_in_epoch * self.global_batch_size
            for micro in range(self.accumulation_steps):
                slot = (micro * self.num_ranks + self.rank) * self.batch_size
                yield [
                    SampleKey(epoch, step, place, int(order[first + place]))
                    for place in range(slot, slot + self.batch_size)
                ]


class PretrainingImages(TorchDataset[dict[str, Any]]):
    """Crops, each a function of (seed, epoch, index). Asked with a `SampleKey`.

    Args:
        images: The decoded images.
        size: Height and width of a crop.
        min_crop_scale: Least share of the image that a crop covers; 1 means no cropping.
        seed: The run's seed.
    """

    def __init__(self, images: ImageRows, size: tuple[int, int], min_crop_scale: float, seed: int) -> None:
        self.images, self.size, self.min_crop_scale, self.seed = images, size, min_crop_scale, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: SampleKey) -> dict[str, Any]:
        """Returns `pixel_values` uint8 or float32 `[num_channels, height, width]` and the `sample_key`."""
        generator = keyed_generator(self.seed, _DRAW_CROP, key.epoch, key.image)
        crop = random_resized_crop(self.images[key.image], self.size, self.min_crop_scale, generator)
        return {"pixel_values": crop, "sample_key": key}


# -- collator --------------------------------------------------------------------------------------------------------


class IJepaDataCollator:
    """Makes a batch of rows: pixels, and the masks drawn for them.

    Works alone in any `DataLoader` and in `transformers.Trainer` (with `remove_unused_columns=False`): rows are
    those of a data set with an image column (cropped here), or hold ready `pixel_values`. Rows of
    `PretrainingImages` carry their `SampleKey`, which the masks then depend on; for other rows the draws come from
    torch's global generator, which a `DataLoader` seeds in each worker.

    Args:
        config: Says the image size, the grid and how masks are drawn.
        normalize: Give normalised floats (default), or pixels as they are, to be normalised on the device.
        image_mean: Of each channel, of pixels in [0, 1]; ImageNet's if not given.
        image_std: Likewise.
        min_crop_scale: For rows with images: least share of the image that a random crop covers; 1 means no cropping.
        image_column_name: For rows with images: their column; `image` or `img` if not given.
        seed: For rows with a `SampleKey`: the run's seed.
        global_batch_size: For rows with a `SampleKey`: images in an optimiser step, over all ranks and micro-batches.

    Raises:
        ValueError: If mean or std do not fit the number of channels.
    """

    def __init__(
        self,
        config: IJepaConfig,
        normalize: bool = True,
        *,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
        min_crop_scale: float = 0.3,
        image_column_name: str | None = None,
        seed: int = 0,
        global_batch_size: int | None = None,
    ) -> None:
        self.config = config
        self.settings = config.mask_settings()
        self.normalize = normalize
        self.image_mean = tuple(IMAGENET_MEAN if image_mean is None else image_mean)
        self.image_std = tuple(IMAGENET_STD if image_std is None else image_std)
        self.min_crop_scale = min_crop_scale
        self.image_column_name = image_column_name
        self.seed = seed
        self.global_batch_size = global_batch_size
        for name in ("image_mean", "image_std"):
            if normalize and len(getattr(self, name)) != config.num_channels:
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} values, but num_channels={config.num_channels}; give one "
                    "for each channel."
                )

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Makes a batch.

        Args:
            rows: B rows.

        Returns:
            `pixel_values` `[B, num_channels, height, width]` (float32, or as the rows have them with
            `normalize=False`), `context_indices` int64 `[B, K]` or `[B, S, K]`, `target_indices` int64 `[B, M, P]`.

        Raises:
            ValueError: If a row has neither `pixel_values` nor an image column.
        """
        keys = [row["sample_key"] for row in rows if "sample_key" in row]
        if keys:
            masks = self._masks_of_step(keys)
            pixels = _stack([row["pixel_values"] for row in rows])
        else:
            generator = np.random.Generator(np.random.Philox(int(torch.randint(2**62, ()))))
            masks = draw_masks(self.settings, len(rows), generator)
            pixels = _stack([self._pixels_of(row, generator) for row in rows])
        if self.normalize:
            pixels = normalize(pixels, self.image_mean, self.image_std)
        return {
            "pixel_values": pixels,
            "context_indices": masks.context_indices,
            "target_indices": masks.target_indices,
        }

    def _masks_of_step(self, keys: list[SampleKey]) -> Any:
        """Draws the masks of the whole optimiser step and takes this micro-batch's slots."""
        first = keys[0]
        if [(key.step, key.slot) for key in keys] != [(first.step, first.slot + i) for i in range(len(keys))]:
            raise ValueError(
                "rows of a batch must have consecutive slots of one step, as StepBatchSampler gives them."
            )
        size = self.global_batch_size or len(keys)
        slots = slice(first.slot, first.slot + len(keys))
        return draw_masks(self.settings, size, keyed_generator(self.seed, _DRAW_MASKS, first.step), slots)

    def _pixels_of(self, row: dict[str, Any], generator: np.random.Generator) -> Tensor:
        if "pixel_values" in row:
            return torch.as_tensor(row["pixel_values"])
        column = self.image_column_name or next((name for name in ("image", "img") if name in row), None)
        if column is None or column not in row:
            raise ValueError(
                f"rows have the columns {', '.join(map(repr, row))}, no pixel_values and no image column; give "
                "image_column_name, and with transformers.Trainer set remove_unused_columns=False."
            )
        image = decode_image(row[column], self.config.num_channels)
        return random_resized_crop(image, self.config.image_shape, self.min_crop_scale, generator)


def _stack(pixels: list[Tensor]) -> Tensor:
    """One tensor of images; where 8-bit ones and floats (from 16-bit files) meet, all become floats in [0, 1]."""
    if len({image.dtype for image in pixels}) > 1:
        pixels = [image / 255 if image.dtype == torch.uint8 else image for image in pixels]
    return torch.stack(pixels)


def build_loader(
    dataset: PretrainingImages,
    sampler: StepBatchSampler,
    collator: IJepaDataCollator,
    *,
    num_workers: int,
    pin_memory: bool,
) -> DataLoader:
    """The loader of one rank; do not pass it to `accelerator.prepare`, it is already that rank's own.

    Args:
        dataset: Crops.
        sampler: The order.
        collator: Draws the masks.
        num_workers: Loading processes; the batches do not depend on it.
        pin_memory: Whether batches go to a GPU.

    Returns:
        Batches as `IJepaDataCollator` makes them.
    """
    return DataLoader(
        dataset,
        batch_sampler=cast(Any, sampler),
        collate_fn=collator,
        num_workers=num_workers,
        pin_memory=pin_memory,
        # its own generator: otherwise making the iterator draws from torch's global one
        generator=torch.Generator().manual_seed(0),
    )
