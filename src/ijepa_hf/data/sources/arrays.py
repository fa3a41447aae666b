"""Reads `.npy` files as rows of a data set."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets.fingerprint import Hasher

from ijepa_hf.data.sources.local_files import LocalFiles

_ARRAY_TYPES = ("uint8", "uint16", "float16", "float32", "float64")
_VALUES_PER_CHUNK = 2**31 - 1  # Arrow counts the values of a list in 32 bits


def cannot_be_read(path: Path, error: BaseException) -> ValueError:
    """Returns an error that names the data set, with the words of the innermost cause."""
    while isinstance(error, datasets.exceptions.DatasetsError) and error.__cause__ is not None:
        error = error.__cause__
    return ValueError(f"dataset_name={str(path)!r} cannot be read: {error or type(error).__name__}")


def map_array_file(path: Path) -> datasets.Dataset:
    """Returns a data set whose Arrow table is the file itself, mapped into memory."""
    array = _map_array(path)
    if array.ndim not in (3, 4) or 0 in array.shape:
        raise ValueError(
            f"dataset_name={str(path)!r} holds an array of shape {array.shape}; write [n, height, width], [n, "
            "channels, height, width] or [n, height, width, channels], or a folder with one .npy file for each image."
        )
    if not array.flags.c_contiguous:
        raise ValueError(
            f"dataset_name={str(path)!r} is in Fortran order, in which images do not lie one after another; write it "
            "again with numpy.save(path, numpy.ascontiguousarray(array))."
        )
    features = datasets.Features({"image": _array_feature(array[0])})
    kind = features.arrow_schema.field("image").type
    step = max(1, _VALUES_PER_CHUNK // array[0].size)
    chunks = [_as_arrow(array[start : start + step], kind) for start in range(0, len(array), step)]
    status = path.stat()
    return datasets.Dataset(
        pa.table({"image": pa.chunked_array(chunks)}),
        info=datasets.DatasetInfo(features=features),
        # otherwise the file would be read as a whole to work it out
        fingerprint=Hasher.hash((str(path.absolute()), status.st_size, status.st_mtime_ns)),
    )


def _map_array(path: Path) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise cannot_be_read(path, error) from error
    if array.dtype.name not in _ARRAY_TYPES or not array.dtype.isnative:
        raise ValueError(
            f"{str(path)!r} has dtype {array.dtype.str!r}, which is no image's: write it again as uint8 (0 to 255), "
            "uint16 (0 to 65535) or float (0 to 1), in this machine's byte order."
        )
    return array


def _array_feature(image: np.ndarray) -> Any:
    return (datasets.Array2D if image.ndim == 2 else datasets.Array3D)(image.shape, image.dtype.name)


def _as_arrow(array: np.ndarray, kind: pa.DataType) -> pa.Array:
    """Makes nested Arrow lists of a contiguous array, without copying its values."""
    values = pa.array(np.asarray(array).reshape(-1))
    for axis in range(array.ndim - 1, 0, -1):
        length = array.shape[axis]
        offsets = np.arange(int(np.prod(array.shape[:axis])) + 1, dtype=np.int64) * length
        values = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)
    return pa.ExtensionArray.from_storage(kind, values)


def read_array_files(files: LocalFiles, split: str) -> datasets.Dataset:
    """Copies .npy files of one image each into the cache of `datasets`, which recognises them by size and time."""
    first = _map_array(files.splits[split][0])
    if first.ndim not in (2, 3) or 0 in first.shape:
        raise ValueError(
            f"{str(files.splits[split][0])!r} holds an array of shape {first.shape}; in a folder of .npy files each "
            "is one image, [height, width], [channels, height, width] or [height, width, channels]. Give the path of "
            "the file itself if it holds many."
        )
    features = {"image": _array_feature(first)}
    if files.has_classes:
        names = sorted({file.parent.name for part in files.splits.values() for file in part})
        features["label"] = datasets.ClassLabel(names=names)
    rows = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files.splits[split]]
    arguments = {"rows": tuple(rows), "has_classes": files.has_classes}
    try:
        return datasets.Dataset.from_generator(_array_rows, features=datasets.Features(features), gen_kwargs=arguments)
    except datasets.exceptions.DatasetGenerationError as error:
        raise cannot_be_read(files.path, error) from error


def _array_rows(rows: tuple[tuple[str, int, int], ...], has_classes: bool) -> Iterator[dict[str, Any]]:
    shape_and_type = None
    for name, _, _ in rows:
        image = _map_array(Path(name))
        shape_and_type = shape_and_type or (image.shape, image.dtype)
        if (image.shape, image.dtype) != shape_and_type:
            raise ValueError(
                f"{name!r} holds {image.dtype} of shape {image.shape}, but {rows[0][0]!r} holds {shape_and_type[1]} "
                f"of shape {shape_and_type[0]}; in a folder of .npy files each is one image, and all are alike."
            )
        yield {"image": np.asarray(image), **({"label": Path(name).parent.name} if has_classes else {})}
