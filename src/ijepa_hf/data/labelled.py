"""Loads images with their classes, chooses and reads them; `targets` loads numbers, boxes and maps of classes.

Every draw is a function of (seed, epoch, image). `LabelledImages` skips no image: one that cannot be read is an error,
which names it.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import Sampler

from ijepa_hf.data.reading import ImageRows
from ijepa_hf.data.retrying import DEFAULT_RETRIES, RetryPolicy
from ijepa_hf.data.sources.opening import (
    ImageSource,
    at_most,
    find_image_column,
    find_label_column,
    load_split,
    open_stream,
)
from ijepa_hf.data.transforms import CROP_NUMBERS, normalize, random_resized_crop, resize
from ijepa_hf.model.vision_models import ImageSettings
from ijepa_hf.randomness import DRAW_LABELLED_CROP, DRAW_LABELS, DRAW_ORDER, keyed_generator

_STRINGS = ("string", "large_string")


@dataclass(frozen=True, kw_only=True)
class LabelledSource:
    """Names a data set of labelled images, its splits and columns; fields as in `ijepa-hf pretrain`.

    Args:
        dataset_name: As for `ImageSource`.
        dataset_config_name: As for `ImageSource`.
        train_split_name: Split to train on.
        eval_split_name: Held-out split.
        image_column_name: Column of the images; found automatically if there is only one.
        label_column_name: Column of the labels; `label` if not given.
        max_train_samples: Use at most this many training images, spread evenly over the split.
        max_eval_samples: The same for held-out images.
    """

    dataset_name: str
    dataset_config_name: str | None = None
    train_split_name: str = "train"
    eval_split_name: str = "test"
    image_column_name: str | None = None
    label_column_name: str | None = None
    max_train_samples: int | None = None
    max_eval_samples: int | None = None

    @property
    def images(self) -> ImageSource:
        """Returns the data set, as `load_split` takes it."""
        return ImageSource(self.dataset_name, self.dataset_config_name, self.image_column_name)


@dataclass(frozen=True)
class LabelledReading:
    """Holds the options for reading labelled images.

    Args:
        streaming: Read `max_train_samples` and `max_eval_samples` rows of a stream, equally many of each shard, and
            keep them in memory.
        retries: How long failing reads are repeated.
        allow_new_classes: Take held-out images of classes that the training images do not have; a probe cannot name
            them. By default they are refused.
    """

    streaming: bool = False
    retries: RetryPolicy = DEFAULT_RETRIES
    allow_new_classes: bool = False


class LabelledImages(TorchDataset[dict[str, Tensor]]):
    """Reads images with their labels, as the model takes them.

    Args:
        images: n images.
        labels: int64 `[n]`.
        settings: What the model's images are like.
        min_crop_scale: Least share of the image that a random crop covers, in (0, 1].
        horizontal_flip: Whether to mirror half of the images.
        seed: Seed of crops and flips, at least 0.
    """

    def __init__(
        self,
        images: ImageRows,
        labels: np.ndarray,
        settings: ImageSettings,
        *,
        min_crop_scale: float = 1.0,
        horizontal_flip: bool = False,
        seed: int = 0,
    ) -> None:
        self.images, self.labels, self.settings = images, labels, settings
        self.min_crop_scale, self.horizontal_flip, self.seed = min_crop_scale, horizontal_flip, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Tensor]:
        """Returns a sample.

        Args:
            key: Number of an image, which is then taken whole; or (epoch, number): a crop that depends on nothing
                else.

        Returns:
            `pixel_values` float32 `[channels, height, width]`, normalised, and `labels` int64 `[]`.

        Raises:
            ValueError: If the image cannot be read, naming it.
        """
        epoch, index = key if isinstance(key, tuple) else (None, key)
        try:
            image = self.images[index]
        except ValueError as error:
            raise ValueError(
                f"{error} No labelled image is skipped: mend or remove it, or let `ijepa-hf prepare` write the set "
                "without those that cannot be read."
            ) from error
        if epoch is None:
            pixels = resize(image, self.settings.shape)
        else:
            generator = keyed_generator(self.seed, DRAW_LABELLED_CROP, epoch, index)
            numbers = generator.random(CROP_NUMBERS).tolist()
            pixels = random_resized_crop(image, self.settings.shape, self.min_crop_scale, numbers)
            if self.horizontal_flip and generator.random() < 0.5:
                pixels = pixels.flip(-1)
        pixels = normalize(pixels, self.settings.mean, self.settings.std)
        return {"pixel_values": pixels, "labels": torch.tensor(self.labels[index])}


class EpochOrder(Sampler[tuple[int, int]]):
    """Yields the keys of `LabelledImages` in the order of an epoch, a permutation that follows from (seed, epoch).

    Args:
        num_images: Images in the data set.
        seed: The run's seed.
    """

    def __init__(self, num_images: int, seed: int) -> None:
        self.num_images, self.seed, self.epoch = num_images, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch; `Trainer` calls this at its start.

        Args:
            epoch: Counted from 0.
        """
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_images

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = keyed_generator(self.seed, DRAW_ORDER, self.epoch).permutation(self.num_images)
        return iter([(self.epoch, int(index)) for index in order])


class LabelledSplits(NamedTuple):
    """Holds both splits of a labelled data set.

    Args:
        train: Images to train on.
        train_labels: int64 `[n]`.
        test: Held-out images.
        test_labels: int64 `[m]`.
        names: Names of the classes 0 .. C-1.
        label_column: Column of the labels.
    """

    train: ImageRows
    train_labels: np.ndarray
    test: ImageRows
    test_labels: np.ndarray
    names: list[str]
    label_column: str


def load_labelled_splits(
    labelled: LabelledSource,
    num_channels: int,
    *,
    samples_per_class: int | None = None,
    label_fraction: float | None = None,
    seed: int = 0,
    reading: LabelledReading = LabelledReading(),
) -> LabelledSplits:
    """Loads the images to train on and the held-out images; reads the first held-out image as a check.

    Args:
        labelled: Which images and labels.
        num_channels: Channels of the model.
        samples_per_class: See `choose_labelled`.
        label_fraction: See `choose_labelled`.
        seed: See `choose_labelled`.
        reading: How the images are read.

    Returns:
        The splits, with the training images that were asked for.

    Raises:
        FileNotFoundError: If there is no such data set.
        ValueError: If a split, its images or its labels are missing, labels are of one class only, a class has fewer
            images than asked, or images do not fit the model.
    """
    train, test = (
        _take(labelled.images, split, limit, reading)
        for split, limit in (
            (labelled.train_split_name, labelled.max_train_samples),
            (labelled.eval_split_name, labelled.max_eval_samples),
        )
    )
    column = _label_column(train, labelled.train_split_name, labelled.label_column_name)
    if column not in test.features:
        raise ValueError(f"the split {labelled.eval_split_name!r} has no column {column!r}; it cannot be scored.")
    names, train_labels = _encode_labels(train, column, labelled.train_split_name)
    names, test_labels = _encode_labels(
        test, column, labelled.eval_split_name, names, allow_new=reading.allow_new_classes
    )
    if len(set(train_labels.tolist())) < 2:
        raise ValueError(
            f"train_split_name={labelled.train_split_name!r} has labels of one class only ({column!r} is always "
            f"{names[train_labels[0]]!r}); a classifier needs at least two."
        )
    chosen = choose_labelled(train_labels, samples_per_class, label_fraction, seed, names=names)
    images = [
        ImageRows(rows, find_image_column(rows, labelled.image_column_name), num_channels, reading.retries)
        for rows in (train.select(chosen), test)
    ]
    images[1][0]  # an image that does not fit the model is found before the work
    return LabelledSplits(images[0], train_labels[chosen], images[1], test_labels, names, column)


def choose_labelled(
    labels: np.ndarray,
    samples_per_class: int | None,
    label_fraction: float | None,
    seed: int,
    *,
    names: Sequence[str] | None = None,
) -> np.ndarray:
    """Draws the images of a few-label run, class by class.

    Args:
        labels: int64 `[n]`, those of all training images.
        samples_per_class: Images of each class.
        label_fraction: Instead: share of each class, in (0, 1], rounded up to whole images.
        seed: Seed of the draw, at least 0. With the same seed a larger number of images contains the smaller one's.
        names: Names of the classes, for errors.

    Returns:
        int64 indices in ascending order; of all images where neither number is given.

    Raises:
        ValueError: If a class has fewer images than `samples_per_class`; lists them.
    """
    if samples_per_class is None and label_fraction is None:
        return np.arange(len(labels))
    classes, counts = np.unique(labels, return_counts=True)
    if samples_per_class is not None and counts.min() < samples_per_class:
        short = [
            f"{names[label] if names else label} ({count})"
            for label, count in zip(classes, counts, strict=True)
            if count < samples_per_class
        ]
        raise ValueError(
            f"samples_per_class={samples_per_class}, but there are fewer images of {', '.join(short[:10])}; use "
            f"--samples_per_class {counts.min()} or less, or --label_fraction."
        )
    chosen = []
    for label, count in zip(classes, counts, strict=True):
        wanted = samples_per_class or math.ceil(cast(float, label_fraction) * int(count))
        order = keyed_generator(seed, DRAW_LABELS, int(label)).permutation(np.flatnonzero(labels == label))
        chosen.append(order[:wanted])
    return np.sort(np.concatenate(chosen))


def _take(source: ImageSource, split: str, limit: int | None, reading: LabelledReading) -> datasets.Dataset:
    """Takes rows of a split, spread evenly over it or over its shards: sets are often sorted by class."""
    if not reading.streaming:
        return at_most(load_split(source, split), limit)
    assert limit is not None  # DataArguments.check
    rows = open_stream(source, split).rows
    each = math.ceil(limit / rows.num_shards)
    shards = [rows.shard(num_shards=rows.num_shards, index=index) for index in range(rows.num_shards)]
    taken = [row for shard in shards for row in shard.take(each)]
    return at_most(datasets.Dataset.from_list(taken, features=rows.features), limit)


def _label_column(dataset: datasets.Dataset, split: str, name: str | None) -> str:
    """Finds the column of labels; unlike `find_label_column` it takes texts as well."""
    wanted = "label" if name is None else name
    feature = dataset.features.get(wanted)
    if isinstance(feature, datasets.Value) and feature.dtype in _STRINGS:
        return wanted
    column = find_label_column(dataset, name)
    if column is None:
        raise ValueError(
            f"the split {split!r} has no labels (its columns are {', '.join(dataset.features)}); choose with "
            "--label_column_name."
        )
    return column


def _encode_labels(
    dataset: datasets.Dataset, column: str, split: str, names: list[str] | None = None, *, allow_new: bool = False
) -> tuple[list[str], np.ndarray]:
    """Returns the names of the classes, by default the split's own, and int64 labels `[n]`."""
    values, feature = list(dataset[column]), dataset.features[column]
    if any(value is None or value == -1 for value in values):  # -1 is how unlabelled sets say it
        raise ValueError(f"the split {split!r} has images without a label in {column!r} (none, or -1).")
    if isinstance(feature, datasets.ClassLabel):
        words = [feature.names[value] for value in values]
        own = list(feature.names)
    else:
        words = [str(value) for value in values]
        own = [str(value) for value in sorted(set(values))]
    names = own if names is None else names
    unknown = sorted(set(words) - set(names))
    if allow_new:
        names = [*names, *unknown]
    elif unknown:
        raise ValueError(
            f"the split {split!r} has labels that the training split does not have: {', '.join(unknown[:10])}."
        )
    numbers = {name: number for number, name in enumerate(names)}
    return names, np.array([numbers[word] for word in words], dtype=np.int64)
