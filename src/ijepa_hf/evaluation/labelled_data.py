"""Images with their labels, for whatever learns from labels or is scored on them: opened, encoded, chosen, read.

Labels are classes (`load_labelled_splits`), or numbers, boxes or maps of classes (`load_target_splits`).

Every draw is a function of (seed, epoch, image), as in `data`. No image is skipped: one that cannot be read stops the
work and is named.
"""

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import datasets
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import Sampler

from ijepa_hf.arguments import flag
from ijepa_hf.data import ImageRows
from ijepa_hf.evaluation.image_settings import ImageSettings
from ijepa_hf.image_transforms import CROP_NUMBERS, normalize, random_resized_crop, resize
from ijepa_hf.randomness import DRAW_LABELLED_CROP, DRAW_LABELS, DRAW_ORDER, keyed_generator
from ijepa_hf.sources import ImageSource, at_most, find_image_column, find_label_column, load_split

_STRINGS = ("string", "large_string")
_MAP_MODES = ("1", "L", "P", "I", "I;16")  # of pictures whose pixels are whole numbers
_NUMBERS = ("int", "uint", "float")
_KINDS = {"number": "numbers", "mask": "pictures", "boxes": "lists of [left, top, right, bottom]"}
_DAMAGE = (OSError, EOFError, SyntaxError, ValueError, Image.DecompressionBombError)


@dataclass(kw_only=True)
class LabelledDataFlags:
    """The flags of a command that say which labelled images it takes; names as in `ijepa-hf pretrain`."""

    dataset_name: str | None = flag(
        "result",
        "Labelled images, as for ijepa-hf pretrain: digits or shapes (built in), a Hub id, a folder or a file.",
    )
    dataset_config_name: str | None = flag("result", "Configuration of the Hub data set.")
    train_split_name: str = flag("result", "Split to train on.", "train")
    eval_split_name: str = flag("result", "Held-out split: scored, never used for a choice.", "test")
    image_column_name: str | None = flag("result", "Column of the images; found by itself if there is only one.")
    label_column_name: str | None = flag(
        "result", "Column of the labels: classes, whole numbers or words; `label` if any."
    )
    max_train_samples: int | None = flag("result", "Use at most N training images, spread evenly over the split.")
    max_eval_samples: int | None = flag("result", "Score with at most N images, spread evenly over the split.")


class LabelledImages(TorchDataset[dict[str, Tensor]]):
    """Images with their labels, as the model takes them.

    Args:
        images: n images.
        labels: int64 `[n]`.
        settings: What the model's images are like.
        min_crop_scale: Of the random crop.
        horizontal_flip: Whether to mirror half of the images.
        seed: Of crops and flips.
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
    """A permutation of all images for each epoch, a function of (seed, epoch); yields what `LabelledImages` is asked.

    Args:
        num_images: Images in the data set.
        seed: The run's seed.
    """

    def __init__(self, num_images: int, seed: int) -> None:
        self.num_images, self.seed, self.epoch = num_images, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by `Trainer` at the start of an epoch.

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
    """Both splits of a labelled data set.

    Args:
        train: Images to train on.
        train_labels: int64 `[n]`.
        test: Held-out images.
        test_labels: int64 `[m]`.
        names: Of the classes 0 .. C-1.
        label_column: Where the labels are from.
    """

    train: ImageRows
    train_labels: np.ndarray
    test: ImageRows
    test_labels: np.ndarray
    names: list[str]
    label_column: str


def load_labelled_splits(
    flags: LabelledDataFlags,
    num_channels: int,
    *,
    samples_per_class: int | None = None,
    label_fraction: float | None = None,
    seed: int = 0,
) -> LabelledSplits:
    """Loads the images that a model is fitted to and is scored with; reads the first image of each split.

    Args:
        flags: Which images and labels.
        num_channels: Channels of the model.
        samples_per_class: See `choose_labelled`.
        label_fraction: See `choose_labelled`.
        seed: See `choose_labelled`.

    Returns:
        The splits, training images cut down to what is asked for.

    Raises:
        FileNotFoundError: If there is no such data set.
        ValueError: If a split, its images or its labels are missing, labels are of one class only, a class has fewer
            images than asked, or images do not fit the model.
    """
    train, test = _load_splits(flags)
    column = _label_column(train, flags.train_split_name, flags.label_column_name)
    if column not in test.features:
        raise ValueError(f"the split {flags.eval_split_name!r} has no column {column!r}; it cannot be scored.")
    train = at_most(train, flags.max_train_samples)
    test = at_most(test, flags.max_eval_samples)
    names, train_labels = _encode_labels(train, column, flags.train_split_name)
    _, test_labels = _encode_labels(test, column, flags.eval_split_name, names)
    if len(set(train_labels.tolist())) < 2:
        raise ValueError(
            f"train_split_name={flags.train_split_name!r} has labels of one class only ({column!r} is always "
            f"{names[train_labels[0]]!r}); a classifier needs at least two."
        )
    chosen = choose_labelled(train_labels, samples_per_class, label_fraction, seed, names=names)
    images = [_image_rows(dataset, flags, num_channels) for dataset in (train.select(chosen), test)]
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
        seed: Of the draw. A larger number of images holds the smaller one's.
        names: Of the classes, for errors.

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


def _load_splits(flags: LabelledDataFlags) -> tuple[datasets.Dataset, datasets.Dataset]:
    source = ImageSource(str(flags.dataset_name), flags.dataset_config_name, flags.image_column_name)
    return load_split(source, flags.train_split_name), load_split(source, flags.eval_split_name)


def _image_rows(dataset: datasets.Dataset, flags: LabelledDataFlags, num_channels: int) -> ImageRows:
    images = ImageRows(dataset, find_image_column(dataset, flags.image_column_name), num_channels)
    images[0]  # an image that does not fit the model is found before the work
    return images


def _label_column(dataset: datasets.Dataset, split: str, name: str | None) -> str:
    """As `find_label_column`, which knows no words."""
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
    dataset: datasets.Dataset, column: str, split: str, names: list[str] | None = None
) -> tuple[list[str], np.ndarray]:
    """Names of the classes (those of the training split, where `names` is not given) and int64 labels `[n]`."""
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
    if unknown:
        raise ValueError(
            f"the split {split!r} has labels that the training split does not have: {', '.join(unknown[:10])}."
        )
    numbers = {name: number for number, name in enumerate(names)}
    return names, np.array([numbers[word] for word in words], dtype=np.int64)


# -- targets that are no classes -------------------------------------------------------------------------------------


class SplitPart(NamedTuple):
    """The rows of a split that are used, and how errors call them.

    Args:
        rows: The rows.
        split: Name of the split.
        length: Rows of the whole split.
        limit: The part that was asked for, as in `at_most`.
    """

    rows: datasets.Dataset
    split: str
    length: int
    limit: int | None

    def name_row(self, index: int) -> str:
        """Says which row of the split, counted from 0, row `index` of this part is."""
        numbers = at_most(datasets.Dataset.from_dict({"row": range(self.length)}), self.limit)["row"]
        return f"row {numbers[int(index)]} of the split {self.split!r}"


class SegmentationMaps:
    """For each image of a split the class of each pixel, read one at a time.

    Args:
        part: The rows that are used.
        column: Their column of pictures.
    """

    def __init__(self, part: SplitPart, column: str) -> None:
        self.part, self.column = part, column
        self.rows = part.rows.cast_column(column, datasets.Image(decode=False)).select_columns([column])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> np.ndarray:
        """Returns the map of an image, turned upright as the image is.

        Args:
            index: Number of the image.

        Returns:
            int64 `[height, width]`: whole numbers as in the file (of a palette its indices), at least 0.

        Raises:
            ValueError: If it cannot be read, or holds colours; names the row.
        """
        value = self.rows[int(index)][self.column]
        if value is None:
            raise ValueError(f"{self.part.name_row(index)} has no picture in {self.column!r}.")
        try:
            with Image.open(io.BytesIO(value["bytes"]) if value["bytes"] is not None else value["path"]) as picture:
                if picture.format == "EPS":  # Pillow would have another program run what it says
                    raise ValueError("EPS is not read; write maps of classes as PNG")
                mode, pixels = picture.mode, np.asarray(ImageOps.exif_transpose(picture))
        except _DAMAGE as error:
            raise ValueError(f"{self.part.name_row(index)}: {self.column!r} cannot be read: {error}") from error
        if mode not in _MAP_MODES:
            raise ValueError(
                f"{self.part.name_row(index)}: {self.column!r} is a picture of mode {mode}, in which pixels are no "
                "whole numbers; write maps of classes as PNG of one channel or with a palette."
            )
        numbers = pixels.astype(np.int64)
        if numbers.min(initial=0) < 0:
            raise ValueError(f"{self.part.name_row(index)}: {self.column!r} has the class {numbers.min()}, below 0.")
        return numbers


class TargetSplits(NamedTuple):
    """Both splits of a data set whose labels are no classes; see `load_target_splits` for what targets are.

    Args:
        train: n images to fit with.
        train_targets: float64 `[n, k]`, or `SegmentationMaps` of n images.
        test: m held-out images.
        test_targets: float64 `[m, k]`, or `SegmentationMaps` of m images.
    """

    train: ImageRows
    train_targets: Any
    test: ImageRows
    test_targets: Any


def load_target_splits(
    flags: LabelledDataFlags,
    num_channels: int,
    columns: Sequence[str],
    kind: Literal["number", "mask", "boxes"],
) -> TargetSplits:
    """Loads images with targets that are no classes; reads the first image of each split, with `boxes` every image.

    Boxes become shares of the image's sides, which stay true when the whole image is resized.

    Args:
        flags: Which images; `label_column_name` does not count.
        num_channels: Channels of the model.
        columns: Of the targets: one or several of numbers, else one.
        kind: `number`: columns of numbers; the target is float64 `[n, len(columns)]`. `mask`: a column of pictures
            whose pixels are numbers of classes; the target is `SegmentationMaps`. `boxes`: a column of lists of boxes
            [left, top, right, bottom] in pixels of the upright image; the target is the box of the largest area (the
            first of equals), float64 `[n, 4]`, left and right as shares of the width, top and bottom of the height,
            in [0, 1].

    Returns:
        The splits, cut down to what the flags ask for.

    Raises:
        FileNotFoundError: If there is no such data set.
        ValueError: If a split or a column is missing or of another kind, listing the columns that would do; if a row
            has no target, or one that cannot be, naming it; if images do not fit the model.
    """
    if kind not in _KINDS:
        raise ValueError(f"kind={kind!r} must be one of {', '.join(map(repr, _KINDS))}.")
    if not columns or (kind != "number" and len(columns) > 1):
        number = "at least one column" if kind == "number" else "one column"
        raise ValueError(f"columns={list(columns)} must be {number} of {_KINDS[kind]}.")
    train, test = _load_splits(flags)
    parts = []
    for rows, split, limit in (
        (train, flags.train_split_name, flags.max_train_samples),
        (test, flags.eval_split_name, flags.max_eval_samples),
    ):
        _check_target_columns(rows, split, columns, kind, find_image_column(rows, flags.image_column_name))
        parts.append(SplitPart(at_most(rows, limit), split, len(rows), limit))
    images = [_image_rows(part.rows, flags, num_channels) for part in parts]
    targets: list[Any]
    if kind == "number":
        targets = [np.stack([_numbers(part, column) for column in columns], axis=1) for part in parts]
    elif kind == "mask":
        targets = [_segmentation_maps(part, columns[0]) for part in parts]
    else:
        targets = [_largest_boxes(part, columns[0], rows) for part, rows in zip(parts, images, strict=True)]
    return TargetSplits(images[0], targets[0], images[1], targets[1])


def _check_target_columns(
    rows: datasets.Dataset, split: str, columns: Sequence[str], kind: str, image_column: str
) -> None:
    fitting = [name for name, feature in rows.features.items() if _is_of_kind(feature, kind) and name != image_column]
    for column in columns:
        if column not in fitting:
            what = f"is no column of {_KINDS[kind]}" if column in rows.features else "is no column"
            if column == image_column:
                what = "holds the images themselves"
            raise ValueError(
                f"column {column!r} of the split {split!r} {what}; columns of {_KINDS[kind]} there are: "
                f"{', '.join(map(repr, fitting)) or 'none'}."
            )


def _is_of_kind(feature: Any, kind: str) -> bool:
    lists = (datasets.List, datasets.LargeList)
    if kind == "mask":
        return isinstance(feature, datasets.Image)
    if kind == "boxes":
        if not isinstance(feature, lists) or not isinstance(feature.feature, lists):
            return False
        return getattr(feature.feature, "length", -1) in (-1, 4) and _is_of_kind(feature.feature.feature, "number")
    return isinstance(feature, datasets.Value) and feature.dtype.startswith(_NUMBERS)


def _numbers(part: SplitPart, column: str) -> np.ndarray:
    """float64 `[n]`."""
    values = part.rows[column][:]
    for index, value in enumerate(values):
        if value is None or not math.isfinite(value):
            raise ValueError(f"{part.name_row(index)}: {column!r} is {value}, which is no number to learn.")
    return np.array(values, dtype=np.float64)


def _segmentation_maps(part: SplitPart, column: str) -> SegmentationMaps:
    maps = SegmentationMaps(part, column)
    maps[0]  # a picture of colours is found before the work
    if maps.rows.data.column(column).null_count:  # perhaps of rows that are not used
        for index, row in enumerate(maps.rows):
            if cast(Mapping[str, Any], row)[column] is None:
                maps[index]
    return maps


def _largest_boxes(part: SplitPart, column: str, images: ImageRows) -> np.ndarray:
    """float64 `[n, 4]`, shares of the width and height."""
    chosen = np.empty((len(part.rows), 4))
    for index, boxes in enumerate(part.rows[column][:]):
        if not boxes:
            raise ValueError(f"{part.name_row(index)} has no box in {column!r}; leave out images without an object.")
        image = images[index]
        height, width = image.shape[-2:] if isinstance(image, np.ndarray) else image.size[::-1]
        for box in boxes:
            left, top, right, bottom = box if len(box) == 4 and None not in box else [math.nan] * 4
            if not (0 <= left < right <= width and 0 <= top < bottom <= height):
                raise ValueError(
                    f"{part.name_row(index)}: {column!r} has the box {box}, but in an image of {width}x{height} a box "
                    "is [left, top, right, bottom] in pixels, with 0 <= left < right <= width and 0 <= top < bottom "
                    "<= height."
                )
        areas = [(right - left) * (bottom - top) for left, top, right, bottom in boxes]
        chosen[index] = np.divide(boxes[int(np.argmax(areas))], [width, height, width, height])
    return chosen
