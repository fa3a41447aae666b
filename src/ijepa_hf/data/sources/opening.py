"""Opens a data set of images by name or path, and finds its columns of images and labels.

Every source becomes a `datasets` data set with an image column, by a builder of `datasets` if there is one; nothing is
decoded here. `local_files` decides what a path holds and the split of each file, by the files' names, both for data
sets read at random and for streams.
"""

import glob
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple, TypeAlias, cast

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]

from ijepa_hf.data.sources.arrays import cannot_be_read, map_array_file, read_array_files
from ijepa_hf.data.sources.builtin import BUILT_IN
from ijepa_hf.data.sources.local_files import (
    IMAGE_SUFFIXES,
    KIND_OF_SUFFIX,
    KINDS_IN_WORDS,
    LocalFiles,
    find_files,
    is_shard,
)

_STREAMED = ("images", "parquet", "tar")
_IMAGE_FEATURES = (datasets.Image, datasets.Array2D, datasets.Array3D)
_IMAGE_NAMES = ("image", "img")
_LABEL_NAMES = ("label", "labels", "cls")

AnyDataset: TypeAlias = datasets.Dataset | datasets.IterableDataset


@dataclass(frozen=True)
class ImageSource:
    """Names a data set of images.

    Args:
        name: What `load_split` opens: a built-in set, a path, or a Hub id; `dataset_name` of a run.
        config: Configuration of a Hub data set; `dataset_config_name` of a run.
        image_column: Column of the images, where there are several; `image_column_name` of a run.
    """

    name: str
    config: str | None = None
    image_column: str | None = None


class ImageStream(NamedTuple):
    """Holds images to be read from front to end.

    Args:
        rows: The images, undecoded.
        files: The file of each shard, in the order of the shards, a local path or an address such as `hf://...`; empty
            where shards are no files.
    """

    rows: datasets.IterableDataset
    files: list[str]


def load_split(source: ImageSource, split: str) -> datasets.Dataset:
    """Loads one split of a source of images, to be read at random.

    Its `name` may be

    - `digits` or `shapes`, which are built in;
    - a folder of pictures, of any depth. Where each lies in one of several class folders, exactly one level deep,
      there is a `label`; otherwise there is none. A `metadata.jsonl` beside them adds columns (see `imagefolder`);
    - a .parquet file or a folder of them: columns of pictures, of arrays, or of paths of pictures;
    - a .tar file or a folder of them, named as WebDataset does; a whole number in `.cls`, or one called `label` in
      `.json`, is the label;
    - a .csv or .tsv file, or a folder of them, with a column of paths, absolute or relative to the table's folder.
      Only the first path is checked: a run skips and lists pictures that cannot be read. Paths are kept in memory;
    - a .npy file, `[n, height, width]`, `[n, channels, height, width]` or `[n, height, width, channels]`: read in
      place through a memory map, so that neither memory nor a cache holds a copy;
    - a folder of .npy files, an image each, all of one shape and dtype, labelled as pictures are. They are copied once
      into the cache of `datasets` (HF_DATASETS_CACHE), which takes as much disk as they do, and little memory;
    - a folder made by `save_to_disk`, or a copy of a Hub repository whose README.md lists configurations;
    - a Hub id.

    Splits are the folders at the top if all have names such as `train`, `val` or `test`; for .parquet, .tar and .csv
    files also words of the file names (`train-00000-of-00002.parquet`, `birds-test-0001.tar`); else all is `train`. As
    in `datasets`, `val` and `dev` are called `validation`. One file is always `train`. Hidden files and folders, and
    those that begin with two underscores, are passed over; so are .csv files beside anything else.

    Args:
        source: Which images.
        split: Name of the split, e.g. `train`.

    Returns:
        A map-style data set, cut to no length. Arrays are in a column `image`, of their own dtype.

    Raises:
        FileNotFoundError: If the name looks like a path and there is nothing, or no image in it, or if the first
            of a table's paths leads nowhere.
        ValueError: If there is no such split, listing those that there are; if a folder holds several kinds of files;
            if a file is broken or of no kind that is read.
    """
    return cast(datasets.Dataset, _open(source, split, streaming=False).rows)


def open_stream(source: ImageSource, split: str) -> ImageStream:
    """Opens one split of a source of images, to be read once from front to end.

    Args:
        source: As for `load_split`; a folder of pictures (which is one shard), a .parquet or .tar file, a folder of
            either, or a Hub id.
        split: Name of the split.

    Returns:
        A stream with the rows of `load_split` in its order, of known features; a .parquet or .tar file is a shard, and
        named. Pictures are not decoded: their columns are `datasets.Image(decode=False)`.

    Raises:
        FileNotFoundError: As for `load_split`.
        ValueError: As for `load_split`; also for a source that is local and read at random, and needs no stream.
    """
    opened = _open(source, split, streaming=True)
    rows = cast(datasets.IterableDataset, opened.rows)
    find_image_column(rows, source.image_column)
    for column, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(column, datasets.Image(decode=False))
    # a folder of pictures has many files in one shard
    is_shard_a_file = len(opened.files) == rows.num_shards and all(map(is_shard, opened.files))
    return ImageStream(rows, list(opened.files) if is_shard_a_file else [])


class _Opened(NamedTuple):
    """Holds an opened split; for a stream that `datasets` builds also its files."""

    rows: AnyDataset
    files: Sequence[str] = ()


def _open(source: ImageSource, split: str, *, streaming: bool) -> _Opened:
    name, config = source.name, source.config
    if name in BUILT_IN:
        _refuse_stream(name, "built in", streaming)
        return _Opened(BUILT_IN[name](split))
    path = Path(name).expanduser()
    if not path.exists():
        if name.startswith((".", "/", "~")) or name.count("/") > 1 or path.suffix.lower() in KIND_OF_SUFFIX:
            raise FileNotFoundError(f"dataset_name={name!r}: there is no such file or folder.")
        opened = _load(name, config, name, split, streaming=streaming)
    elif path.is_dir() and (config is not None or _lists_configurations(path)):
        opened = _load(str(path), config, name, split, streaming=streaming)
    else:
        return _open_local(find_files(path), split, source.image_column, streaming=streaming)
    return opened._replace(rows=_with_known_features(opened.rows, source.image_column))


def _load(path: str, config: str | None, name: str, split: str, *, streaming: bool, **options: Any) -> _Opened:
    """Opens a split by `datasets`; `name` is the data set's name in errors."""
    if not streaming:
        return _Opened(_pick(name, datasets.load_dataset(path, config, **options), split))
    builder = datasets.load_dataset_builder(path, config, **options)
    rows = _pick(name, builder.as_streaming_dataset(), split)
    return _Opened(rows, [str(file) for file in (builder.config.data_files or {}).get(split, [])])


def _refuse_stream(name: str, what: str, streaming: bool) -> None:
    if streaming:
        raise ValueError(
            f"dataset_name={name!r} is {what}, read at random from where it lies, and cannot be streamed: leave "
            "--streaming out, or write shards of it with `ijepa-hf prepare`."
        )


def _pick(name: str, splits: Any, split: str) -> Any:
    if split not in splits:
        raise ValueError(f"dataset_name={name!r} has no split {split!r}; it has {', '.join(map(repr, splits))}.")
    return splits[split]


# -- files -----------------------------------------------------------------------------------------------------------


def _lists_configurations(folder: Path) -> bool:
    card = folder / huggingface_hub.constants.REPOCARD_NAME
    metadata = huggingface_hub.metadata_load(card) if card.is_file() else None
    return bool(metadata) and "configs" in cast(dict[str, Any], metadata)


def _open_local(files: LocalFiles, split: str, column: str | None, *, streaming: bool) -> _Opened:
    name = str(files.path)
    if files.kind not in _STREAMED:
        _refuse_stream(name, KINDS_IN_WORDS[files.kind], streaming)
    if files.kind == "saved":
        saved = datasets.load_from_disk(name)
        return _Opened(_pick(name, saved if isinstance(saved, dict) else {"train": saved}, split))
    of_split = _pick(name, files.splits, split)
    if files.kind == "arrays":
        return _Opened(map_array_file(files.path) if files.path.is_file() else read_array_files(files, split))
    if files.kind == "images":
        patterns = {part: [f"{name}/**" for name in _escaped(folders)] for part, folders in files.folders.items()}
        return _build("imagefolder", files, patterns, split, streaming, drop_labels=not files.has_classes)
    if files.kind == "table":
        separator = {"sep": "\t"} if of_split[0].suffix.lower() == ".tsv" else {}
        table = _build("csv", files, {split: _escaped(of_split)}, split, streaming, **separator)
        return _Opened(_paths_to_images(cast(datasets.Dataset, table.rows), of_split, column))
    if files.kind == "tar":
        tars = _build("webdataset", files, {split: _escaped(of_split)}, split, streaming)
        return tars if streaming else _Opened(_with_label_of_json(cast(datasets.Dataset, tars.rows)))
    opened = _build("parquet", files, {split: _escaped(of_split)}, split, streaming)
    shards = _with_known_features(opened.rows, column)
    if any(isinstance(feature, _IMAGE_FEATURES) for feature in shards.features.values()):
        return opened._replace(rows=shards)
    _refuse_stream(name, "a table of paths", streaming)
    return _Opened(_paths_to_images(shards, of_split, column))


def _escaped(files: list[Path]) -> list[str]:
    return [glob.escape(str(file)) for file in files]


def _build(
    builder: str, files: LocalFiles, patterns: dict[str, list[str]], split: str, streaming: bool, **options: Any
) -> _Opened:
    """Opens files with a builder of `datasets`; one that cannot be read is a `ValueError` naming the data set."""
    try:
        return _load(builder, None, str(files.path), split, streaming=streaming, data_files=patterns, **options)
    except UnpicklingError as error:  # torch's words advise to trust the file
        raise ValueError(
            f"dataset_name={str(files.path)!r} cannot be read: a .pth file in it is damaged or holds code, which is "
            "never run; leave those files out."
        ) from error
    except (datasets.exceptions.DatasetsError, pa.ArrowException, tarfile.TarError, ValueError) as error:
        raise cannot_be_read(files.path, error) from error


# -- columns that a builder leaves raw -------------------------------------------------------------------------------


def _with_known_features(dataset: Any, column: str | None) -> Any:
    """Makes Image columns of pairs of `bytes` and `path`, and of bytes in a column named as images are."""
    if dataset.features is None:
        dataset = dataset._resolve_features()  # reads the first row; has no public name
    for name, feature in dataset.features.items():
        is_pair = isinstance(feature, dict) and "bytes" in feature and set(feature) <= {"bytes", "path"}
        is_bytes = isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary")
        if is_pair or (is_bytes and name in (column, *_IMAGE_NAMES)):
            dataset = dataset.cast_column(name, datasets.Image())
    return dataset


def _with_label_of_json(dataset: datasets.Dataset) -> datasets.Dataset:
    """Copies whole numbers called `label` out of the `.json` of a WebDataset, unless it has labels already."""
    feature = dataset.features.get("json")
    has_label = isinstance(feature, dict) and "label" in feature and _holds_labels(feature["label"])
    if not has_label or find_label_column(dataset) is not None:
        return dataset
    return dataset.add_column("label", pc.struct_field(dataset.data.column("json"), "label").to_pylist())


def _paths_to_images(dataset: datasets.Dataset, files: list[Path], column: str | None) -> datasets.Dataset:
    """Makes a column of paths an undecoded Image column; relative paths start at the table's folder."""
    name = ", ".join(map(str, files[:2]))
    column = _find_path_column(dataset, name, column)
    paths = dataset.data.column(column).to_pylist()
    roots = sorted({file.parent for file in files})
    if len(roots) > 1:
        raise ValueError(
            f"dataset_name: tables of paths of one split lie in several folders ({roots[0]}, {roots[1]}, ...), so "
            "that relative paths have no one meaning; put them in one folder, or give one table."
        )
    root = roots[0].absolute()
    first = root / Path(paths[0]).expanduser()
    if not first.is_file():
        raise FileNotFoundError(
            f"dataset_name={name!r}: the first path in column {column!r} is {paths[0]!r}, and there is no file "
            f"{first}; paths must be absolute or relative to the folder of the table."
        )
    paths = [path and str(root / Path(path).expanduser()) for path in paths]
    order, complete = dataset.column_names, f"{column}, complete"
    dataset = dataset.add_column(complete, paths, feature=datasets.Value("string")).remove_columns(column)
    dataset = dataset.rename_column(complete, column).select_columns(order)
    return dataset.cast_column(column, datasets.Image(decode=False))


def _find_path_column(dataset: datasets.Dataset, name: str, column: str | None) -> str:
    columns = ", ".join(map(repr, dataset.column_names))
    if not len(dataset):
        raise ValueError(f"dataset_name={name!r} is a table without rows.")
    texts = {key: value for key, value in dataset[0].items() if isinstance(value, str)}
    if column is not None:
        if column not in texts:
            raise ValueError(
                f"image_column_name={column!r} is no column of paths of the table {name!r}; it has {columns}."
            )
        return column
    paths = [key for key, value in texts.items() if Path(value).suffix.lower() in IMAGE_SUFFIXES]
    preferred = [key for key in _IMAGE_NAMES if key in paths]
    if preferred or len(paths) == 1:
        return (preferred or paths)[0]
    found = f"several columns of paths: {paths}" if paths else "no column of pictures or of paths of pictures"
    raise ValueError(f"dataset_name={name!r} has {found}; its columns are {columns}; choose with --image_column_name.")


def at_most(dataset: datasets.Dataset, limit: int | None) -> datasets.Dataset:
    """Selects rows that are spread evenly over a data set (sets are often sorted by class).

    Args:
        dataset: A map-style data set.
        limit: Rows to keep, at least 1; `None` keeps all.

    Returns:
        At most `limit` rows, in their order; of two or more the first and the last are always among them.
    """
    if limit is None or limit >= len(dataset):
        return dataset
    return dataset.select(np.linspace(0, len(dataset) - 1, limit).round().astype(int))


# -- columns that matter ---------------------------------------------------------------------------------------------


def find_image_column(dataset: AnyDataset, name: str | None = None) -> str:
    """Finds the column of the images.

    Args:
        dataset: Any data set or stream, with known features.
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
        preferred = [column for column in _IMAGE_NAMES if column in candidates]
        if preferred or len(candidates) == 1:
            return (preferred or candidates)[0]
        if candidates:
            raise ValueError(f"the data set has several image columns: {candidates}; choose with --image_column_name.")
    raise ValueError(f"the data set has no image column; its columns are {columns}; choose with --image_column_name.")


def find_label_column(dataset: AnyDataset, name: str | None = None) -> str | None:
    """Finds the column of class labels, if there is one.

    It is `name`; else `label`, `labels` or `cls`, where they hold classes or whole numbers; else the only column of
    classes.

    Args:
        dataset: Any data set or stream, with known features.
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
    for column in _LABEL_NAMES:
        if column in dataset.features and _holds_labels(dataset.features[column]):
            return column
    return classes[0] if len(classes) == 1 else None


def _holds_labels(feature: Any) -> bool:
    is_whole = isinstance(feature, datasets.Value) and feature.dtype.startswith(("int", "uint"))
    return is_whole or isinstance(feature, datasets.ClassLabel)
