"""Loads images with targets other than classes: numbers, boxes, and maps of the class of each pixel."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

import datasets
import numpy as np
from PIL import Image, ImageOps

from ijepa_hf.data.labelled import LabelledSource
from ijepa_hf.data.reading import ImageRows
from ijepa_hf.data.sources.opening import at_most, find_image_column, load_split

_MAP_MODES = ("1", "L", "P", "I", "I;16")  # of pictures whose pixels are whole numbers
_NUMBERS = ("int", "uint", "float")
_KINDS = {"number": "numbers", "mask": "pictures", "boxes": "lists of [left, top, right, bottom]"}
_DAMAGE = (OSError, EOFError, SyntaxError, ValueError, Image.DecompressionBombError)


class SplitPart(NamedTuple):
    """Holds the used rows of a split, and names them in errors.

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
        """Names row `index` of this part by its number in the split, counted from 0."""
        numbers = at_most(datasets.Dataset.from_dict({"row": range(self.length)}), self.limit)["row"]
        return f"row {numbers[int(index)]} of the split {self.split!r}"


class SegmentationMaps:
    """Reads the class of each pixel, for one image of a split at a time.

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
    """Holds both splits of a data set whose targets are no classes; see `load_target_splits`.

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
    labelled: LabelledSource,
    num_channels: int,
    columns: Sequence[str],
    kind: Literal["number", "mask", "boxes"],
) -> TargetSplits:
    """Loads images with targets that are no classes; reads the first held-out image, with `boxes` every image.

    Boxes become shares of the image's sides, which stay true when the whole image is resized.

    Args:
        labelled: Which images; `label_column_name` does not count.
        num_channels: Channels of the model.
        columns: Columns of the targets: one or several of numbers, else one.
        kind: `number`: columns of numbers; the target is float64 `[n, len(columns)]`. `mask`: a column of pictures
            whose pixels are numbers of classes; the target is `SegmentationMaps`. `boxes`: a column of lists of boxes
            [left, top, right, bottom] in pixels of the upright image; the target is the box of the largest area (the
            first of equals), float64 `[n, 4]`, left and right as shares of the width, top and bottom of the height,
            in [0, 1].

    Returns:
        The splits, with the images that were asked for.

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
    parts = []
    for split, limit in (
        (labelled.train_split_name, labelled.max_train_samples),
        (labelled.eval_split_name, labelled.max_eval_samples),
    ):
        rows = load_split(labelled.images, split)
        _check_target_columns(rows, split, columns, kind, find_image_column(rows, labelled.image_column_name))
        parts.append(SplitPart(at_most(rows, limit), split, len(rows), limit))
    images = [
        ImageRows(part.rows, find_image_column(part.rows, labelled.image_column_name), num_channels) for part in parts
    ]
    images[1][0]  # an image that does not fit the model is found before the work
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
    """Returns the column's numbers, float64 `[n]`."""
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
    """Returns the largest box of each row, float64 `[n, 4]`, as shares of width and height."""
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
