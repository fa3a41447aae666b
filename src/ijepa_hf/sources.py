"""Where images come from: opens a data set by name and finds the columns that matter.

Everything becomes a `datasets` data set with an image column, whatever it was on disk, by a builder of `datasets`
wherever there is one; decoding is left to `data`. What a path holds, and which split each file belongs to, is decided
in one place, by the files' names, for data sets read at random and for streams alike.
"""

import functools
import glob
import io
import os
import re
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple, TypeAlias, cast

import datasets
import huggingface_hub
import numpy as np
import PIL.Image
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
from datasets.fingerprint import Hasher

from ijepa_hf import shapes

DIGITS_TEST_SHARE = 0.2
SHAPES_SPLITS = {"train": (0, 5000), "test": (1, 1000)}  # seed and number of scenes

_IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_KIND_OF_SUFFIX = {
    **dict.fromkeys(_IMAGE_SUFFIXES, "images"),
    ".parquet": "parquet",
    ".tar": "tar",
    ".csv": "table",
    ".tsv": "table",
    ".npy": "arrays",
}
_KINDS_IN_WORDS = {
    "images": "pictures", "parquet": ".parquet files", "tar": ".tar files", "table": ".csv or .tsv files",
    "arrays": ".npy files", "saved": "a data set saved by save_to_disk",
}  # fmt: skip
_STREAMED = ("images", "parquet", "tar")
_METADATA = ("metadata.csv", "metadata.parquet")  # columns beside the pictures of a folder, read by imagefolder
_SPLIT_OF_WORD = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
_SHARD_NAME = re.compile(r"(.+)-\d{5}-of-\d{5}")
_IMAGE_FEATURES = (datasets.Image, datasets.Array2D, datasets.Array3D)
_IMAGE_NAMES = ("image", "img")
_LABEL_NAMES = ("label", "labels", "cls")
_ARRAY_TYPES = ("uint8", "uint16", "float16", "float32", "float64")
_VALUES_PER_CHUNK = 2**31 - 1  # Arrow counts the values of a list in 32 bits

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
    """Images to be read from front to end.

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
      Only the first path is checked: a run skips pictures that cannot be read, and says so. Paths are kept in memory;
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
    is_shard_a_file = len(opened.files) == rows.num_shards and all(map(_is_shard, opened.files))
    return ImageStream(rows, list(opened.files) if is_shard_a_file else [])


def _is_shard(file: str) -> bool:
    return _KIND_OF_SUFFIX.get(os.path.splitext(file)[1].lower()) in ("parquet", "tar")


class _Opened(NamedTuple):
    """A split as it was opened; for a stream that `datasets` builds also the files that it is built from."""

    rows: AnyDataset
    files: Sequence[str] = ()


def _open(source: ImageSource, split: str, *, streaming: bool) -> _Opened:
    name, config = source.name, source.config
    if name in _BUILT_IN:
        _refuse_stream(name, "built in", streaming)
        return _Opened(_BUILT_IN[name](split))
    path = Path(name).expanduser()
    if not path.exists():
        if name.startswith((".", "/", "~")) or name.count("/") > 1 or path.suffix.lower() in _KIND_OF_SUFFIX:
            raise FileNotFoundError(f"dataset_name={name!r}: there is no such file or folder.")
        opened = _load(name, config, name, split, streaming=streaming)
    elif path.is_dir() and (config is not None or _lists_configurations(path)):
        opened = _load(str(path), config, name, split, streaming=streaming)
    else:
        return _open_local(_find_files(path), split, source.image_column, streaming=streaming)
    return opened._replace(rows=_with_known_features(opened.rows, source.image_column))


def _load(path: str, config: str | None, name: str, split: str, *, streaming: bool, **options: Any) -> _Opened:
    """Has `datasets` open a split; `name` is what errors call the data set."""
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


class _LocalFiles(NamedTuple):
    """What a path holds: files of one kind, by split; whether the folder that each lies in is its class."""

    path: Path
    kind: str
    splits: dict[str, list[Path]]
    folders: dict[str, list[Path]]  # those that are wholly of one split
    has_classes: bool = False


def _find_files(path: Path) -> _LocalFiles:
    """Finds the files of a path: the only place that decides what kind they are and which split they belong to."""
    if path.is_file():
        kind = _KIND_OF_SUFFIX.get(path.suffix.lower())
        if kind == "images":
            raise ValueError(f"dataset_name={str(path)!r} is one picture; give the folder that it lies in.")
        if kind is None:
            raise ValueError(
                f"dataset_name={str(path)!r} is a file of no kind that is read: give a .parquet, .tar, .csv, .tsv or "
                ".npy file, or a folder (an archive has to be unpacked first)."
            )
        return _LocalFiles(path, kind, {"train": [path]}, {})
    if any((path / mark).is_file() for mark in ("dataset_dict.json", "state.json")):
        return _LocalFiles(path, "saved", {}, {})
    kind, files = _files_of_one_kind(path)
    below = [file.relative_to(path).parts for file in files]
    if {parts[0] for parts in below} == {"data"}:
        return _find_files(path / "data")._replace(path=path)
    named = _split_folders(path, below)
    if named:
        files_of: dict[str, list[Path]] = defaultdict(list)
        folders_of: dict[str, list[Path]] = defaultdict(list)
        for top in named:
            folders_of[_SPLIT_OF_WORD[top.lower()]].append(path / top)
        for file, parts in zip(files, below, strict=True):
            files_of[_SPLIT_OF_WORD[parts[0].lower()]].append(file)
        below = [parts[1:] for parts in below]
    elif kind in ("images", "arrays"):
        files_of, folders_of = {"train": files}, {"train": [path]}
    else:
        files_of, folders_of = _splits_by_file_name(path, files), {}
    has_classes = len({parts[0] for parts in below}) > 1 and all(len(parts) == 2 for parts in below)
    return _LocalFiles(path, kind, dict(files_of), dict(folders_of), has_classes)


def _split_folders(folder: Path, below: Sequence[tuple[str, ...]]) -> list[str]:
    """The folders at the top that stand for splits: all, or none; a single one among others may well be a class."""
    tops = {parts[0] if len(parts) > 1 else "" for parts in below}
    named = sorted(top for top in tops if top.lower() in _SPLIT_OF_WORD)
    others = sorted(top for top in tops if top not in named)
    if len(named) > 1 and others:
        raise ValueError(
            f"dataset_name={str(folder)!r}: {' and '.join(named)} look like splits, but there are files outside of "
            f"them ({others[0] or 'beside them'}); move those away, or give the folder of one split."
        )
    return [] if others else named


def _files_of_one_kind(folder: Path) -> tuple[str, list[Path]]:
    found: dict[str, list[Path]] = defaultdict(list)
    for here, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(
            name for name in folders if not name.startswith((".", "__")) and not _leads_back(Path(here, name))
        )
        for name in sorted(names):
            kind = _KIND_OF_SUFFIX.get(os.path.splitext(name)[1].lower())
            if kind is not None and not name.startswith((".", "__")) and name not in _METADATA:
                found[kind].append(Path(here, name))
    if len(found) > 1:
        found.pop("table", None)
    if len(found) > 1:
        kinds = ", ".join(f"{len(files)} {_KINDS_IN_WORDS[kind]}" for kind, files in sorted(found.items()))
        raise ValueError(
            f"dataset_name={str(folder)!r} holds {kinds}; give a folder of one kind, or the path of one file."
        )
    if not found:
        raise FileNotFoundError(
            f"dataset_name={str(folder)!r}: the folder holds no image ({', '.join(_IMAGE_SUFFIXES)}) and no "
            ".parquet, .tar, .csv, .tsv or .npy file."
        )
    return next(iter(found.items()))


def _leads_back(folder: Path) -> bool:
    """Whether a folder is a link to one that it lies in: following it would never end."""
    return folder.is_symlink() and folder.parent.resolve().is_relative_to(folder.resolve())


def _splits_by_file_name(folder: Path, files: list[Path]) -> dict[str, list[Path]]:
    splits: dict[str, list[Path]] = defaultdict(list)
    for file in files:
        shard = _SHARD_NAME.fullmatch(file.stem)
        words = re.split(r"[-._ ]+", shard[1] if shard else file.stem)
        said = {_SPLIT_OF_WORD[word.lower()] for word in words if word.lower() in _SPLIT_OF_WORD}
        if shard and not said:
            said = {shard[1]}
        splits[said.pop() if len(said) == 1 else ""].append(file)
    if "" in splits and len(splits) > 1:
        raise ValueError(
            f"dataset_name={str(folder)!r}: some files say their split ({', '.join(sorted(set(splits) - {''}))}), "
            f"{splits[''][0].name!r} does not; name all like train-00000-of-00002{files[0].suffix}, or give one file."
        )
    return {name or "train": part for name, part in splits.items()}


def _lists_configurations(folder: Path) -> bool:
    card = folder / "README.md"
    metadata = huggingface_hub.metadata_load(card) if card.is_file() else None
    return bool(metadata) and "configs" in cast(dict[str, Any], metadata)


def _open_local(files: _LocalFiles, split: str, column: str | None, *, streaming: bool) -> _Opened:
    name = str(files.path)
    if files.kind not in _STREAMED:
        _refuse_stream(name, _KINDS_IN_WORDS[files.kind], streaming)
    if files.kind == "saved":
        saved = datasets.load_from_disk(name)
        return _Opened(_pick(name, saved if isinstance(saved, dict) else {"train": saved}, split))
    of_split = _pick(name, files.splits, split)
    if files.kind == "arrays":
        return _Opened(_map_array_file(files.path) if files.path.is_file() else _read_array_files(files, split))
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
    builder: str, files: _LocalFiles, patterns: dict[str, list[str]], split: str, streaming: bool, **options: Any
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
        raise _unreadable(files.path, error) from error


def _unreadable(path: Path, error: BaseException) -> ValueError:
    while isinstance(error, datasets.exceptions.DatasetsError) and error.__cause__ is not None:
        error = error.__cause__
    return ValueError(f"dataset_name={str(path)!r} cannot be read: {error or type(error).__name__}")


# -- columns that a builder leaves raw -------------------------------------------------------------------------------


def _with_known_features(dataset: Any, column: str | None) -> Any:
    """Calls pictures what they are: pairs of `bytes` and `path`, or bytes under an image's name, are Image columns."""
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
    paths = [key for key, value in texts.items() if Path(value).suffix.lower() in _IMAGE_SUFFIXES]
    preferred = [key for key in _IMAGE_NAMES if key in paths]
    if preferred or len(paths) == 1:
        return (preferred or paths)[0]
    found = f"several columns of paths: {paths}" if paths else "no column of pictures or of paths of pictures"
    raise ValueError(f"dataset_name={name!r} has {found}; its columns are {columns}; choose with --image_column_name.")


# -- arrays ----------------------------------------------------------------------------------------------------------


def _map_array_file(path: Path) -> datasets.Dataset:
    """A data set whose Arrow table is the very file, mapped into memory."""
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
        raise _unreadable(path, error) from error
    if array.dtype.name not in _ARRAY_TYPES or not array.dtype.isnative:
        raise ValueError(
            f"{str(path)!r} has dtype {array.dtype.str!r}, which is no image's: write it again as uint8 (0 to 255), "
            "uint16 (0 to 65535) or float (0 to 1), in this machine's byte order."
        )
    return array


def _array_feature(image: np.ndarray) -> Any:
    return (datasets.Array2D if image.ndim == 2 else datasets.Array3D)(image.shape, image.dtype.name)


def _as_arrow(array: np.ndarray, kind: pa.DataType) -> pa.Array:
    """Nested lists around the values of a contiguous array, which are not copied."""
    values = pa.array(np.asarray(array).reshape(-1))
    for axis in range(array.ndim - 1, 0, -1):
        length = array.shape[axis]
        offsets = np.arange(int(np.prod(array.shape[:axis])) + 1, dtype=np.int64) * length
        values = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)
    return pa.ExtensionArray.from_storage(kind, values)


def _read_array_files(files: _LocalFiles, split: str) -> datasets.Dataset:
    """Copies .npy files of one image each into the cache of `datasets`, which knows them again by size and time."""
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
        raise _unreadable(files.path, error) from error


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


# -- built in --------------------------------------------------------------------------------------------------------


@functools.cache
def load_digits(split: str) -> datasets.Dataset:
    """scikit-learn's 1,797 scanned digits (UCI), 8x8 grayscale, enlarged to 32x32 (bilinear); works offline.

    They are drawn once in a process: the result is shared, so do not change its format in place.

    Args:
        split: `train` (1,437 images) or `test` (360), a stratified split that never changes.

    Returns:
        Columns `image` (8-bit grayscale) and `label` (0 .. 9).

    Raises:
        ValueError: For another split.
    """
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
    images = [PIL.Image.fromarray(scan).resize((32, 32), PIL.Image.Resampling.BILINEAR) for scan in pixels]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(digit) for digit in range(10)])}
    )
    return datasets.Dataset.from_dict({"image": images, "label": scans.target[chosen].tolist()}, features=features)


def load_shapes(split: str) -> datasets.Dataset:
    """Drawn scenes of a few coloured shapes (see `draw_shape_scene`), 96x96; works offline.

    They are drawn once, about 2 ms each on one CPU core, and kept in the cache of `datasets`, 7 MB per 1,000.

    Args:
        split: `train` (5,000 scenes) or `test` (1,000, of another seed), which never change.

    Returns:
        Columns `image` (RGB), `label` (kind of the object of which most is visible), `count` (objects, 2 .. 6),
        `nearest_distance` (pixels between the two nearest centres), `boxes` (left, top, right, bottom of the visible
        part of each object, in pixels), `box_classes` (their kinds), and `segmentation` (picture of mode L: 0 for the
        background, else 1 + kind).

    Raises:
        ValueError: For another split.
    """
    if split not in SHAPES_SPLITS:
        raise ValueError(f"shapes has no split {split!r}; it has 'train' and 'test'.")
    seed, count = SHAPES_SPLITS[split]
    kinds = datasets.ClassLabel(names=list(shapes.SHAPE_KINDS))
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": kinds,
            "count": datasets.Value("int32"),
            "nearest_distance": datasets.Value("float32"),
            "boxes": datasets.List(datasets.List(datasets.Value("int32"), length=4)),
            "box_classes": datasets.List(kinds),
            "segmentation": datasets.Image(),
        }
    )
    # the cache is asked for what these very lines of code draw
    key = (Path(shapes.__file__).read_text("utf-8"), PIL.__version__, np.__version__)
    arguments = {"seed": seed, "count": count, "key": Hasher.hash(key)}
    return datasets.Dataset.from_generator(_shapes_rows, features=features, gen_kwargs=arguments)


def _shapes_rows(seed: int, count: int, key: str) -> Iterator[dict[str, Any]]:
    del key
    for index in range(count):
        scene = shapes.draw_shape_scene(seed, index)
        yield {
            "image": {"bytes": _to_png(scene.image)},
            "label": scene.label,
            "count": scene.count,
            "nearest_distance": scene.nearest_distance,
            "boxes": scene.boxes.tolist(),
            "box_classes": scene.box_classes.tolist(),
            "segmentation": {"bytes": _to_png(PIL.Image.fromarray(scene.segmentation))},
        }


def _to_png(image: PIL.Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG", compress_level=1)
    return stream.getvalue()


_BUILT_IN: dict[str, Callable[[str], datasets.Dataset]] = {"digits": load_digits, "shapes": load_shapes}


def at_most(dataset: datasets.Dataset, limit: int | None) -> datasets.Dataset:
    """A part of a data set, spread evenly over it (sets are often sorted by class).

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
    """The column that holds the images.

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
    """The column of class labels, if there is one.

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
