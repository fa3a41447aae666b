"""Reads the rows of the source that is prepared."""

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
from datasets.features.features import require_storage_embed
from datasets.table import embed_table_storage, table_cast
from PIL import Image
from torch.utils.data import Dataset as TorchDataset

from ijepa_hf.data.decoding import read_image_file
from ijepa_hf.data.prepare.rewriting import PictureFormat, rewrite_picture, shape_after, shrink_array
from ijepa_hf.data.sources.opening import find_image_column

ROWS_AT_ONCE = 16  # read by a worker and handed over together


class PreparedImage(NamedTuple):
    """Holds a row's image as it will be written, or the reason why it is skipped.

    Args:
        content: Bytes of a picture, or an array; `None` if it is skipped.
        name: File name, where it is known.
        path: Where it was read from, as far as known.
        bytes_in: Bytes that the source has for it.
        shrunk: Whether it is smaller than it was.
        reason: Why it is skipped.
    """

    content: Any
    name: str | None
    path: str | None
    bytes_in: int
    shrunk: bool
    reason: str | None = None


class SourceRows(TorchDataset[list[PreparedImage]]):
    """Reads the rows of a data set in numbered pieces of `ROWS_AT_ONCE` rows.

    Args:
        dataset: A map-style data set.
        column_name: Its image column, where the user named one.
        settings: How images are written.
        max_samples: Rows to take from the start; all if not given.

    Raises:
        ValueError: If there is no image column, or its arrays are of no dtype or shape that can be written.
    """

    def __init__(
        self, dataset: datasets.Dataset, column_name: str | None, settings: PictureFormat, max_samples: int | None
    ) -> None:
        self.column, self.settings = find_image_column(dataset, column_name), settings
        self.fingerprint = dataset._fingerprint  # has no public name; the same for the same rows, in any process
        self.num_rows = min(len(dataset), max_samples or len(dataset))
        feature = dataset.features[self.column]
        self.features, self.dtype = _features_after(dataset.features, self.column, settings), None
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(self.column, datasets.Image(decode=False))
            self.images = dataset.select_columns([self.column])
        else:
            self.dtype = np.dtype(feature.dtype)
            self.images = dataset.with_format("numpy", columns=[self.column], dtype=self.dtype)
        names = [name for name in dataset.column_names if name != self.column]
        self.others = dataset.select_columns(names).with_format("arrow") if names else None

    def __len__(self) -> int:
        return self.num_rows

    def piece(self, number: int) -> range:
        """Returns the rows of piece `number`."""
        return range(number * ROWS_AT_ONCE, min(self.num_rows, (number + 1) * ROWS_AT_ONCE))

    def __getitem__(self, number: int) -> list[PreparedImage]:
        """Returns the images of piece `number`."""
        rows = self.piece(number)
        if self.dtype is None:
            return [self._picture(value) for value in self.images[rows.start : rows.stop][self.column]]
        return [self._array(row) for row in rows]

    def other_columns(self, number: int) -> pa.Table | None:
        """Returns the other columns of piece `number`, with pictures as bytes; `None` if there are none."""
        if self.others is None:
            return None
        rows = self.piece(number)
        table = self.others[rows.start : rows.stop]
        features = datasets.Features({name: self.features[name] for name in table.column_names})
        try:
            table = table_cast(table, features.arrow_schema)
            for name, kind in features.items():
                _check_named_files(table.column(name), kind)
            return embed_table_storage(table)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"rows {rows.start} to {rows.stop - 1}: a picture of another column than {self.column!r} cannot be "
                f"read: {error}; mend it, or remove that column from the source."
            ) from error

    def columns_of_many_values(self) -> list[str]:
        """Returns the other columns that are no plain numbers, texts or classes: boxes, maps and the like."""
        plain = (datasets.Value, datasets.ClassLabel)
        return [name for name, kind in self.features.items() if name != self.column and not isinstance(kind, plain)]

    def _picture(self, value: Mapping[str, Any] | None) -> PreparedImage:
        data, path = (None, None) if value is None else (value.get("bytes"), value.get("path"))
        name = Path(path).name if path else None
        try:
            if data is None:
                if not path:
                    raise ValueError("the row has no image.")
                data = read_image_file(path)
            content, suffix, shrunk = rewrite_picture(data, self.settings)
        except (ValueError, OSError) as error:
            return PreparedImage(None, name, path, len(data or b""), False, str(error))
        if name and suffix:
            name = str(Path(name).with_suffix(suffix))
        return PreparedImage(content, name, path, len(data), shrunk)

    def _array(self, row: int) -> PreparedImage:
        array = np.asarray(self.images[row][self.column], self.dtype)
        try:
            content = shrink_array(array, self.settings)
        except ValueError as error:
            return PreparedImage(None, None, None, array.nbytes, False, str(error))
        return PreparedImage(content, None, None, array.nbytes, content.shape != array.shape)


def _check_named_files(column: pa.ChunkedArray, kind: Any) -> None:
    """Refuses a column of paths whose files are not pictures on this disk.

    Whoever wrote the source chose the paths. Without this, `/home/me/.ssh/id_ed25519` or an address inside the network
    would be read, and its bytes would become part of a data set that may be published.

    Args:
        column: A column of the source.
        kind: Its feature.

    Raises:
        OSError: If a row names a file that is not there, or that Pillow does not recognise.
        ValueError: If a row names what is no file, such as a pipe.
    """
    if require_storage_embed(kind):
        for path in _named_files(column.to_pylist()):
            Image.open(io.BytesIO(read_image_file(path)))  # not decoded: a text or a key has no picture's head


def _named_files(value: Any) -> Iterator[str]:
    """Yields the paths of pairs of `bytes` and `path` that have no bytes, at any depth."""
    if isinstance(value, dict) and value.keys() == {"bytes", "path"}:
        if value["bytes"] is None and value["path"] is not None:
            yield value["path"]
    elif isinstance(value, dict | list):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _named_files(entry)


def _features_after(features: datasets.Features, column: str, settings: PictureFormat) -> datasets.Features:
    """Returns the features of the shards: pictures decoded when read, arrays of their shape after shrinking."""
    after = {
        name: datasets.Image(mode=kind.mode) if isinstance(kind, datasets.Image) else kind
        for name, kind in features.items()
    }
    kind = features[column]
    if not isinstance(kind, datasets.Image):
        dtype = np.dtype(kind.dtype)
        if dtype.kind != "f" and dtype.name not in ("uint8", "uint16"):
            raise ValueError(
                f"image_column_name={column!r} holds arrays of {kind.dtype}, which have no stated range; store uint8 "
                "(0 to 255), uint16 (0 to 65535) or floating point."
            )
        after[column] = type(kind)(shape=shape_after(tuple(kind.shape), settings), dtype=kind.dtype)
    return datasets.Features(after)
