"""Any source to parquet shards, shrunk once instead of in every epoch: `ijepa-hf prepare SOURCE OUT`.

What is written loads with `datasets.load_dataset(OUT)`, and as `dataset_name`, at random or as a stream:

    OUT/
      manifest.json                        settings, source, shards, and each row that was skipped with the reason
      data/train-00000-of-00004.parquet    rows in the order of the source, other columns and features as they were

The same settings and source give the same bytes, for any number of workers, and however often the command was stopped
and started again (under one version of Pillow and pyarrow). Shards have hidden names until all are written, so that
half a data set is never taken for a whole one.

A picture that is written anew is what `image_transforms.decode_image` makes of it: upright by its EXIF orientation;
the first frame of an animation; transparency composited onto white; palettes and CMYK to RGB; grayscale stays one
channel; colour profiles and other metadata are dropped unseen. 16-bit grayscale is always written as 16-bit PNG and a
float picture as float TIFF, as no lossy format holds them; colour of 16 bits becomes 8, which is all that Pillow reads
of it. Arrays stay arrays of their dtype. Shrinking is bilinear with antialias, as in training; nothing is ever
enlarged.
"""

import contextlib
import io
import json
import math
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import datasets
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import torch
from datasets.features.features import require_storage_embed
from datasets.table import embed_table_storage, table_cast
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from tqdm.auto import tqdm

from ijepa_hf.argument_parsing import CommandParser, command_parser
from ijepa_hf.escaping import on_one_line
from ijepa_hf.files import flush_to_disk, write_json_atomically
from ijepa_hf.image_transforms import decode_image, read_image_file, resize
from ijepa_hf.sources import ImageSource, find_image_column, load_split

MANIFEST_FILE = "manifest.json"
IMAGE_FORMATS = ("keep", "jpeg", "png", "webp", "bmp")
DEFAULT_QUALITY = 95
_MANIFEST_VERSION = 1
_SHARD_FOLDER = "data"
_ROWS_BEFORE_JUDGING = 1000  # as in training: a share of fewer images says little
_ROWS_AT_ONCE = 16  # read by a worker and handed over together
_GROUP_ROWS, _GROUP_BYTES = 100, 16_000_000  # of a row group, which a reader of a stream holds in memory
_NAMED_IN_SUMMARY, _NAMED_AT_A_STOP = 3, 20
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_SUFFIXES = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "BMP": ".bmp", "TIFF": ".tif"}
_KEPT_LOSSY = {"JPEG": "JPEG", "MPO": "JPEG", "WEBP": "WEBP"}  # what `keep` shrinks to; all else becomes PNG
_LOSSLESS = ("png", "bmp")
_GRAY_MODES = ("1", "L", "LA", "La", "F")  # beside I and I;16...


# -- the command -----------------------------------------------------------------------------------------------------


def build_prepare_parser() -> CommandParser:
    """Returns the parser of `ijepa-hf prepare`, whose values are the arguments of `prepare`."""
    parser = command_parser(
        "prepare",
        "Write the images of any source as parquet shards, shrunk once instead of in every epoch. The "
        "same command goes on where an earlier one was stopped. Images that cannot be read are skipped, and listed "
        "with the reason in OUT/manifest.json. Other columns are kept as they are: boxes and maps in pixels are not "
        "rescaled when their pictures shrink.",
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", help="What --dataset_name of ijepa-hf pretrain takes: a folder, file or Hub id.")
    add("out", metavar="OUT", help="Folder to write; missing, empty, or written by this command.")
    add("--dataset_config_name", help="Configuration of the Hub data set.")
    add("--split_name", default="train", help="Split to write; another call may add another split to the same OUT.")
    add("--image_column_name", help="Column of the images; found by itself if there is only one.")
    add(
        "--shortest_side", type=int, help="Shrink images whose shortest side has more pixels; sizes stay if not given."
    )
    add(
        "--image_format",
        choices=IMAGE_FORMATS,
        default="keep",
        help="How pictures are written. keep: those that need no shrinking stay the very files they are, shrunk JPEG "
        "and WebP keep their format, all else becomes PNG, so that nothing lossless becomes lossy. bmp: uncompressed, "
        "six times the bytes of JPEG, decoded in a quarter of the time. 16-bit pictures are PNG in any case.",
    )
    add("--quality", type=int, help=f"Of JPEG and WebP, 1 to 100; {DEFAULT_QUALITY} if not given.")
    add(
        "--channel_axis",
        type=int,
        choices=(0, -1),
        help="For arrays to be shrunk: 0 if they are [channels, height, width], -1 if [height, width, channels]; the "
        "shortest axis if not given.",
    )
    add("--shard_size", default="100MB", help="Bytes of a shard at most, with a unit: KB, MB or GB.")
    add(
        "--num_workers",
        type=int,
        default=0,
        help="Processes that read and write pictures; what is written is the same.",
    )
    add("--max_samples", type=int, help="Write only the first N images of the source.")
    add(
        "--max_broken_share",
        type=float,
        default=0.05,
        help="Stop, and list them, when more than this share of the images cannot be read; others are skipped.",
    )
    add("--overwrite", action="store_true", help="Delete what OUT holds of this split, and start again.")
    return parser


def prepare(
    source: str,
    out: str | Path,
    *,
    dataset_config_name: str | None = None,
    split_name: str = "train",
    image_column_name: str | None = None,
    shortest_side: int | None = None,
    image_format: str = "keep",
    quality: int | None = None,
    channel_axis: int | None = None,
    shard_size: int | str = "100MB",
    num_workers: int = 0,
    max_samples: int | None = None,
    max_broken_share: float = 0.05,
    overwrite: bool = False,
) -> str:
    """Writes one split of any source as parquet shards; goes on where an earlier call was stopped.

    Args:
        source: What `sources.load_split` opens.
        out: Folder to write; missing, empty, or written by this function.
        dataset_config_name: Configuration of a Hub data set.
        split_name: Split to read and write.
        image_column_name: Column of the images; found by itself if there is only one.
        shortest_side: Pixels to which images are shrunk whose shortest side has more, aspect kept; `None` keeps sizes.
        image_format: `keep`, `jpeg`, `png`, `webp` or `bmp`. `keep` leaves pictures that need no shrinking the very
            bytes they are, writes shrunk JPEG and WebP in their own format and all else as PNG. `bmp` is uncompressed:
            six times the bytes of JPEG, decoded in a quarter of the time.
        quality: Of JPEG and WebP, 1 to 100. The default, 95, is 39 dB from the pixels at a quarter of the bytes of PNG
            (photographs at 256 pixels; 90 is 37 dB at a fifth).
        channel_axis: 0 or -1 for arrays to be shrunk; by default the axis, first or last, that is shortest.
        shard_size: Bytes of a shard at most, before compression; a row that is larger has a shard to itself. A number,
            or text with KB, MB or GB.
        num_workers: Processes that read, shrink and encode; 0 does it in this one.
        max_samples: Take only the first so many rows.
        max_broken_share: Stop when more than this share of the images cannot be read, judged from 1,000 images on.
        overwrite: Delete what `out` holds of this split first.

    Returns:
        A few lines for the user: what was written, what was skipped, and the next command.

    Raises:
        FileNotFoundError: If the source does not exist.
        ValueError: If a value is bad, the source cannot be read or holds no usable images, `out` holds something else
            (other settings, another source, files of another kind), or too many images cannot be read.
        OSError: If `out` cannot be written; what is complete stays, and the same call goes on.
    """
    format_settings = PictureFormat(shortest_side, image_format, quality, channel_axis)
    format_settings.check()
    limit = parse_size(shard_size)
    _check_numbers(num_workers=(num_workers, 0), max_samples=(max_samples, 1))
    if not 0.0 <= max_broken_share <= 1.0:
        raise ValueError(f"max_broken_share={max_broken_share} must be from 0 to 1; 0 stops at the first one.")
    folder = Path(out).expanduser()
    _check_place(source, folder, split_name)
    images = ImageSource(str(source), dataset_config_name, image_column_name)
    rows = SourceRows(load_split(images, split_name), image_column_name, format_settings, max_samples)
    manifest = Manifest(
        settings={
            **format_settings.resolved(),
            "shard_size": limit,
            "max_samples": max_samples,
            "image_column": rows.column,
        },
        source={"fingerprint": rows.fingerprint, "num_rows": len(rows), "dataset_config_name": dataset_config_name},
        features=json.loads(json.dumps(rows.features.to_dict())),  # as they will be read back: lists, no tuples
        source_name=str(source),
    )
    others, manifest = _take_up(folder, split_name, manifest, overwrite=overwrite)
    finished = manifest.finished
    if not finished:
        _write_shards(rows, _ManifestFile(folder, split_name, others, manifest), num_workers, max_broken_share)
    return ("already finished; " if finished else "") + _summary(folder, split_name, manifest, rows, image_column_name)


def parse_size(size: int | str) -> int:
    """Bytes of a size such as `100MB`.

    Args:
        size: A number of bytes, or a number with KB, MB or GB (powers of 1,000).

    Returns:
        Bytes, at least 1.

    Raises:
        ValueError: If it is no such size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?B|)", str(size).strip().upper())
    count = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if count < 1:
        raise ValueError(f"shard_size={size!r} must be a number of bytes above 0, with KB, MB or GB; e.g. 100MB.")
    return count


def _check_numbers(**values: tuple[int | None, int]) -> None:
    for name, (value, least) in values.items():
        if value is not None and value < least:
            raise ValueError(f"{name}={value} must be at least {least}.")


def _check_place(source: str, folder: Path, split: str) -> None:
    """Refuses what could be overwritten or read back by mistake, before the source is opened, which may take long."""
    if not re.fullmatch(r"\w+", split):
        raise ValueError(f"split_name={split!r} must be a split's whole name of letters, digits and _, e.g. train.")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out={str(folder)!r} is a file; give a folder, or a path where there is nothing yet.")
    # a command that was killed at its very start leaves half a manifest
    others = {path.name for path in folder.iterdir()} - {f".{MANIFEST_FILE}.partial"} if folder.is_dir() else set()
    if others and MANIFEST_FILE not in others:
        raise ValueError(
            f"out={str(folder)!r} holds other files (and no {MANIFEST_FILE} of ijepa-hf prepare); choose an "
            "empty folder, or a path where there is nothing yet."
        )
    given, place = Path(source).expanduser(), folder.resolve()
    if given.exists() and (given.resolve() in (place, *place.parents) or place in given.resolve().parents):
        raise ValueError(
            f"out={str(folder)!r} and source={str(source)!r} lie in one another; choose a folder beside the source."
        )


@contextlib.contextmanager
def _failures_named(folder: Path) -> Iterator[None]:
    """One sentence for a full disk or a folder that may not be written."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise OSError(
            f"out={str(folder)!r} cannot be written: {reason}. Make room or choose another folder; the same command "
            "goes on with the shards that are complete."
        ) from error


def _summary(folder: Path, split: str, manifest: "Manifest", rows: "SourceRows", column_name: str | None) -> str:
    written, shards = (
        sum(shard["bytes"] for shard in manifest.shards),
        "shard" if len(manifest.shards) == 1 else "shards",
    )
    lines = [
        f"{folder}: {manifest.num_images:,} images of split {split!r} in {len(manifest.shards):,} {shards}, "
        f"{_in_words(written)} (the images were {_in_words(manifest.bytes_in)}); {manifest.num_shrunk:,} shrunk"
    ]
    if manifest.skipped:
        lines.append(
            f"skipped: {len(manifest.skipped):,} of {len(rows):,} that cannot be read, all in {folder / MANIFEST_FILE}"
        )
        lines += _listed(manifest.skipped, _NAMED_IN_SUMMARY)
    in_pixels = rows.columns_of_many_values()
    if manifest.num_shrunk and in_pixels:
        lines.append(
            f"kept as they were, also where they hold positions in pixels: {', '.join(map(on_one_line, in_pixels))}"
        )
    command = ["ijepa-hf", "pretrain", "RECIPE", "--dataset_name", str(folder), "--streaming"]
    command += [] if split == "train" else ["--train_split_name", split]
    command += [] if column_name is None else ["--image_column_name", column_name]
    return "\n".join([*lines, f"next: {shlex.join(command)}"])


def _in_words(count: float) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def _listed(skipped: Sequence[Mapping[str, Any]], most: int) -> list[str]:
    lines = []
    for row in skipped[:most]:
        named = row["path"] is None or row["path"] in row["reason"]
        words = row["reason"] if named else f"{row['path']}: {row['reason']}"
        lines.append(f"  row {row['row']}: {on_one_line(words)}")
    return lines + ([f"  and {len(skipped) - most:,} more"] if len(skipped) > most else [])


# -- one image -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PictureFormat:
    """How images are written.

    Args:
        shortest_side: Pixels to which larger ones are shrunk; `None` keeps sizes.
        image_format: One of `IMAGE_FORMATS`.
        quality: Of JPEG and WebP; `None` means `DEFAULT_QUALITY`.
        channel_axis: Of arrays, 0 or -1; `None` for the shortest.
    """

    shortest_side: int | None = None
    image_format: str = "keep"
    quality: int | None = None
    channel_axis: int | None = None

    def check(self) -> None:
        """Raises `ValueError` if a value is bad."""
        _check_numbers(shortest_side=(self.shortest_side, 1))
        if self.image_format not in IMAGE_FORMATS:
            raise ValueError(f"image_format={self.image_format!r} must be one of {', '.join(IMAGE_FORMATS)}.")
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise ValueError(f"quality={self.quality} must be from 1 to 100; {DEFAULT_QUALITY} if not given.")
        if self.quality is not None and self.image_format in _LOSSLESS:
            raise ValueError(
                f"quality={self.quality} is of no use with image_format={self.image_format!r}, which loses nothing."
            )
        if self.channel_axis not in (None, 0, -1):
            raise ValueError(f"channel_axis={self.channel_axis} must be 0 ([C, H, W]) or -1 ([H, W, C]).")

    def resolved(self) -> dict[str, Any]:
        """Returns the values by name, with the quality that is used."""
        quality = None if self.image_format in _LOSSLESS else self.quality or DEFAULT_QUALITY
        return {**asdict(self), "quality": quality}

    def size_after(self, height: int, width: int) -> tuple[int, int]:
        """Returns height and width in pixels after shrinking; what is small enough keeps its size."""
        shortest = min(height, width)
        if self.shortest_side is None or shortest <= self.shortest_side:
            return height, width
        return round(height * self.shortest_side / shortest), round(width * self.shortest_side / shortest)


def rewrite_picture(data: bytes, settings: PictureFormat) -> tuple[bytes, str | None, bool]:
    """Decodes a picture, shrinks it if it is larger than wanted, and encodes it.

    Args:
        data: An encoded picture.
        settings: How to write it.

    Returns:
        The bytes; a file name's suffix that fits them, `None` where they are `data` unchanged; whether it was shrunk.

    Raises:
        ValueError: If it cannot be decoded, or not be written in that format.
    """
    try:
        picture = Image.open(io.BytesIO(data))
    except Exception:
        decode_image(data, 3)  # says why, in the words of training
        raise
    if picture.format == "EPS":  # to decode it from here would start Ghostscript
        decode_image(data, 3)  # refuses it
    is_gray = picture.mode in _GRAY_MODES or picture.mode.startswith("I")
    kind = picture.format or ""
    decoded = decode_image(picture, 1 if is_gray else 3)
    old_size = decoded.shape[1:] if isinstance(decoded, np.ndarray) else (decoded.height, decoded.width)
    size = settings.size_after(*old_size)
    shrunk = size != tuple(old_size)
    if settings.image_format == "keep" and not shrunk:
        return data, None, False
    if isinstance(decoded, np.ndarray):
        channel = (resize(decoded, size).numpy() if shrunk else decoded)[0]
        if picture.mode == "F":
            return *_encode(Image.fromarray(channel), "TIFF", settings), shrunk
        # decode_image divided by 65535, which float32 undoes exactly
        return *_encode(Image.fromarray(np.rint(channel * 65535).astype(np.uint16)), "PNG", settings), shrunk
    if shrunk:
        pixels = resize(decoded, size).numpy()
        decoded = Image.fromarray(pixels[0] if is_gray else np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    wanted = _KEPT_LOSSY.get(kind, "PNG") if settings.image_format == "keep" else settings.image_format.upper()
    return *_encode(decoded, wanted, settings), shrunk


def _encode(picture: Image.Image, kind: str, settings: PictureFormat) -> tuple[bytes, str]:
    quality = {"quality": settings.quality or DEFAULT_QUALITY} if kind in ("JPEG", "WEBP") else {}
    # what Pillow remembers of the file, e.g. a transparent colour, was applied when it was decoded
    picture.info.clear()
    stream = io.BytesIO()
    try:
        picture.save(stream, kind, **quality)
    except (OSError, ValueError) as error:
        raise ValueError(f"{picture.width} x {picture.height} pixels cannot be written as {kind}: {error}") from error
    return stream.getvalue(), _SUFFIXES[kind]


def shrink_array(array: np.ndarray, settings: PictureFormat) -> np.ndarray:
    """Shrinks an array channel by channel, bilinear with antialias, if it is larger than wanted.

    Args:
        array: [height, width], or with a channel axis; uint8, uint16 or floating point.
        settings: Say the size and, where it cannot be told, the channel axis.

    Returns:
        The same dtype; whole numbers are rounded.

    Raises:
        ValueError: If values are not finite, or the channel axis cannot be told.
    """
    if not np.isfinite(array).all():
        raise ValueError(f"{int((~np.isfinite(array)).sum())} of {array.size} values are NaN or infinite.")
    if array.ndim == 2:
        return shrink_array(array[None], PictureFormat(settings.shortest_side, channel_axis=0))[0]
    if array.shape == shape_after(array.shape, settings):
        return array
    axis = _channel_axis(array.shape, settings)
    planes = np.moveaxis(array, axis, 0)
    shrunk = resize(planes.astype(np.float32), settings.size_after(*planes.shape[1:])).numpy()
    shrunk = np.moveaxis(np.rint(shrunk) if array.dtype.kind == "u" else shrunk, 0, axis)
    return np.ascontiguousarray(shrunk, dtype=array.dtype)


def shape_after(shape: tuple[int | None, ...], settings: PictureFormat) -> tuple[int | None, ...]:
    """The shape that `shrink_array` gives.

    Args:
        shape: Two or three numbers; the first may be `None`, if it is that of the channels: it then varies.
        settings: As for `shrink_array`.

    Returns:
        As many numbers.

    Raises:
        ValueError: If the channel axis cannot be told, or the height varies.
    """
    axis = None if len(shape) == 2 else _channel_axis(shape, settings) if settings.shortest_side is not None else 0
    sides = list(shape) if axis is None else [side for number, side in enumerate(shape) if number != axis % 3]
    if settings.shortest_side is None:
        return tuple(shape)
    if None in sides:
        raise ValueError(
            f"shortest_side={settings.shortest_side}: arrays of shape {shape} have heights that vary, and a column of "
            "arrays has one width; leave --shortest_side out, or store pictures instead of arrays."
        )
    after: list[int | None] = list(settings.size_after(*cast(list[int], sides)))
    if axis is not None:
        after.insert(axis % 3, shape[axis])
    return tuple(after)


def _channel_axis(shape: tuple[int | None, ...], settings: PictureFormat) -> int:
    if settings.channel_axis is not None:
        return settings.channel_axis
    lengths = [math.inf if length is None else length for length in shape]
    for axis in (0, -1):
        if lengths[axis] < min(length for number, length in enumerate(lengths) if number != axis % 3):
            return axis
    raise ValueError(
        f"shortest_side={settings.shortest_side}: which axis of arrays of shape {shape} counts the channels cannot be "
        "told from their lengths; write --channel_axis 0 ([channels, height, width]) or --channel_axis -1 ([height, "
        "width, channels])."
    )


# -- rows of the source ----------------------------------------------------------------------------------------------


class PreparedImage(NamedTuple):
    """A row's image as it will be written, or the reason why it will not.

    Args:
        content: Bytes of a picture, or an array; `None` where it is skipped.
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
    """The rows of a data set in pieces of `_ROWS_AT_ONCE`, at multiples of it; asked with a piece's number.

    Args:
        dataset: A map-style data set.
        column_name: Its image column, where the user named one.
        settings: How images are written.
        max_samples: Only the first so many rows, if given.

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
        return range(number * _ROWS_AT_ONCE, min(self.num_rows, (number + 1) * _ROWS_AT_ONCE))

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
    """Refuses a column that names files where they are no pictures on this disk.

    Whoever wrote the source chose the paths. Without this, `/home/me/.ssh/id_ed25519` or an address inside the network
    would be read, and its bytes would become part of a data set that may be published.

    Args:
        column: Of the source.
        kind: Its feature.

    Raises:
        OSError: If a row names a file that is not there, or that Pillow does not recognise.
        ValueError: If a row names what is no file, such as a pipe.
    """
    if require_storage_embed(kind):
        for path in _named_files(column.to_pylist()):
            Image.open(io.BytesIO(read_image_file(path)))  # not decoded: a text or a key has no picture's head


def _named_files(value: Any) -> Iterator[str]:
    """The paths of pairs of `bytes` and `path` that have no bytes, at any depth."""
    if isinstance(value, dict) and value.keys() == {"bytes", "path"}:
        if value["bytes"] is None and value["path"] is not None:
            yield value["path"]
    elif isinstance(value, dict | list):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _named_files(entry)


def _features_after(features: datasets.Features, column: str, settings: PictureFormat) -> datasets.Features:
    """What the columns of the shards are: pictures decoded when read, arrays of their shape after shrinking."""
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


# -- shards ----------------------------------------------------------------------------------------------------------


@dataclass
class Manifest:
    """What `manifest.json` says of one split.

    Args:
        settings: What the rows depend on beside the source.
        source: What tells the source from another one.
        features: Of the shards.
        source_name: As the user gave it; for readers only.
        next_row: Rows of the source before this one are done.
        num_images: Rows written.
        num_shrunk: Those of them that were shrunk.
        bytes_in: Bytes of the images before.
        shards: For each its `name`, `rows`, `bytes`, `first_row` and `last_row` of the source.
        skipped: For each its `row`, `path` and `reason`.
        finished: Whether all shards are written and have their names.
    """

    settings: dict[str, Any]
    source: dict[str, Any]
    features: dict[str, Any]
    source_name: str
    next_row: int = 0
    num_images: int = 0
    num_shrunk: int = 0
    bytes_in: int = 0
    shards: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    finished: bool = False


@dataclass
class _ManifestFile:
    """`manifest.json`: the split that is being written, and the others, which stay as they are."""

    folder: Path
    split: str
    others: dict[str, Any]
    manifest: Manifest

    def write(self) -> None:
        splits = dict(sorted({**self.others, self.split: asdict(self.manifest)}.items()))
        write_json_atomically(self.folder / MANIFEST_FILE, {"version": _MANIFEST_VERSION, "splits": splits})


def _take_up(folder: Path, split: str, new: Manifest, *, overwrite: bool) -> tuple[dict[str, Any], Manifest]:
    """Finds how far an earlier call came, and refuses to go on with something else; changes nothing.

    Returns:
        The other splits of the manifest, and this one's: `new`, or the one found.
    """
    others = _read_manifest(folder)
    found = others.pop(split, None)
    for name, other in others.items():
        if other["features"] != new.features:
            raise ValueError(
                f"out={str(folder)!r} holds the split {name!r} with other columns or shapes: "
                f"{_named(other['features'])} instead of {_named(new.features)}. They would not load together; choose "
                "another folder."
            )
    if found is None or overwrite:
        return others, new
    old = Manifest(**found)
    _check_same(folder, split, old, new)
    for number in range(len(old.shards)):
        _find_shard(folder, split, number, old)
    old.skipped = [row for row in old.skipped if row["row"] < old.next_row]
    return others, old


def _make_ready(file: _ManifestFile) -> None:
    """Writes the manifest as it is, and then removes shards that it does not list: half done ones, or overwritten."""
    folder, split = file.folder, file.split
    folder.mkdir(parents=True, exist_ok=True)
    file.write()
    (folder / _SHARD_FOLDER).mkdir(exist_ok=True)
    kept = {_find_shard(folder, split, number, file.manifest) for number in range(len(file.manifest.shards))}
    of_split = re.compile(rf"\.?{split}-\d{{5}}(-of-\d{{5}})?\.parquet(\.partial)?")
    for path in (folder / _SHARD_FOLDER).iterdir():
        if of_split.fullmatch(path.name) and path not in kept:
            path.unlink()


def _named(features: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} ({kind.get('_type', 'dict')}{kind.get('shape') or ''})"
        if isinstance(kind, dict)
        else f"{name} (list)"
        for name, kind in features.items()
    )


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST_FILE
    if not path.is_file():
        return {}
    try:
        contents = json.loads(path.read_text("utf-8"))
        if contents["version"] != _MANIFEST_VERSION:
            raise ValueError(f"version {contents['version']}, not {_MANIFEST_VERSION}")
        return {name: asdict(Manifest(**found)) for name, found in contents["splits"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"out={str(folder)!r}: {MANIFEST_FILE} is not one that this version of ijepa-hf prepare wrote ({error}); "
            "choose another folder, or delete this one."
        ) from error


def _check_same(folder: Path, split: str, old: Manifest, new: Manifest) -> None:
    differences = [
        f"{name} was {before[name]!r} and is now {now[name]!r}"
        for before, now in ((old.settings, new.settings), (old.source, new.source))
        for name in now
        if before.get(name) != now[name]
    ]
    if old.source != new.source:
        differences.append(f"source was {old.source_name!r} and is now {new.source_name!r}, or its files have changed")
    if differences:
        raise ValueError(
            f"out={str(folder)!r} holds the split {split!r} as another command wrote it: {'; '.join(differences)}. "
            "Give the same values to go on with it, --overwrite to replace it, or another folder."
        )


def _shard_name(split: str, number: int, count: int | None = None) -> str:
    """A shard's name; a hidden one as long as it is not known how many there will be."""
    return f".{split}-{number:05d}.parquet" if count is None else f"{split}-{number:05d}-of-{count:05d}.parquet"


def _find_shard(folder: Path, split: str, number: int, manifest: Manifest) -> Path:
    """The file of a shard that the manifest lists, whatever its name is by now; checked by its size."""
    names = _shard_name(split, number), _shard_name(split, number, len(manifest.shards))
    for path in (folder / _SHARD_FOLDER / name for name in names):
        if path.is_file() and path.stat().st_size == manifest.shards[number]["bytes"]:
            return path
    raise ValueError(
        f"out={str(folder)!r}: shard {number} of split {split!r} is missing or not of the size in {MANIFEST_FILE}; "
        "write the split again with --overwrite."
    )


def _write_shards(rows: SourceRows, file: _ManifestFile, num_workers: int, max_broken_share: float) -> None:
    manifest = file.manifest
    first_piece = manifest.next_row // _ROWS_AT_ONCE
    num_pieces = math.ceil(len(rows) / _ROWS_AT_ONCE)
    loader = DataLoader(
        rows,
        sampler=cast(Any, range(first_piece, num_pieces)),
        batch_size=None,
        num_workers=num_workers,
        collate_fn=_as_it_is,
        generator=torch.Generator().manual_seed(0),  # its own: otherwise it draws from torch's global one
    )
    progress = tqdm(total=len(rows), initial=manifest.next_row, unit="image", desc="prepare", mininterval=1.0)
    with _failures_named(file.folder):
        _make_ready(file)
    with contextlib.closing(progress), contextlib.closing(_ShardWriter(rows, file)) as writer:
        for number, images in zip(range(first_piece, num_pieces), loader, strict=True):
            others = rows.other_columns(number) if any(image.reason is None for image in images) else None
            for place, (row, image) in enumerate(zip(rows.piece(number), images, strict=True)):
                if row < manifest.next_row:
                    continue  # an earlier call wrote the front of this piece
                if image.reason is None:
                    writer.add(row, image, None if others is None else others.slice(place, 1))
                else:
                    writer.skip(row, image)
                    _judge(file, row + 1, len(rows), max_broken_share)
                progress.update()
        _judge(file, len(rows), len(rows), max_broken_share)
        writer.finish()


def _as_it_is(images: list[PreparedImage]) -> list[PreparedImage]:
    return images


def _judge(file: _ManifestFile, num_seen: int, num_rows: int, max_share: float) -> None:
    skipped = file.manifest.skipped
    none_left = num_seen == num_rows == len(skipped)
    if not none_left and (num_seen < min(num_rows, _ROWS_BEFORE_JUDGING) or len(skipped) <= max_share * num_seen):
        return
    with _failures_named(file.folder):
        file.write()
    raise ValueError(
        f"{len(skipped)} of the {num_seen} images seen so far cannot be read, "
        + ("so that there is nothing to write:\n" if none_left else f"more than max_broken_share={max_share:g}:\n")
        + "\n".join(_listed(skipped, _NAMED_AT_A_STOP))
        + f"\nAll are listed in {file.folder / MANIFEST_FILE}. Allow more with --max_broken_share, and the command "
        "goes on; or mend or remove them, and start again with --overwrite."
    )


class _ShardWriter:
    """Puts rows into row groups and row groups into shards; notes in the manifest what is complete."""

    def __init__(self, rows: SourceRows, file: _ManifestFile) -> None:
        self.file, self.manifest, self.column = file, file.manifest, rows.column
        self.features, self.limit = rows.features, file.manifest.settings["shard_size"]
        self.schema = rows.features.arrow_schema
        self.writer: pq.ParquetWriter | None = None
        self._start_shard()

    def _start_shard(self) -> None:
        self.shard_rows: list[int] = []  # numbers in the source
        self.shard_bytes = self.group_bytes = self.bytes_in = self.num_shrunk = 0
        self.images: list[PreparedImage] = []
        self.others: list[pa.Table] = []

    @property
    def path(self) -> Path:
        return self.file.folder / _SHARD_FOLDER / _shard_name(self.file.split, len(self.manifest.shards))

    @property
    def partial(self) -> Path:
        return self.path.with_name(self.path.name + ".partial")

    def add(self, row: int, image: PreparedImage, others: pa.Table | None) -> None:
        """Adds a row; closes the shard before it if it would grow too large."""
        size = image.content.nbytes if isinstance(image.content, np.ndarray) else len(image.content)
        size += 0 if others is None else others.nbytes
        if self.shard_rows and self.shard_bytes + size > self.limit:
            self._close_shard(next_row=row)
        if self.images and (len(self.images) == _GROUP_ROWS or self.group_bytes + size > _GROUP_BYTES):
            self._write_group()
        self.shard_rows.append(row)
        self.images.append(image)
        self.others += [] if others is None else [others]
        self.shard_bytes, self.group_bytes = self.shard_bytes + size, self.group_bytes + size
        self.bytes_in, self.num_shrunk = self.bytes_in + image.bytes_in, self.num_shrunk + image.shrunk

    def skip(self, row: int, image: PreparedImage) -> None:
        """Notes a row that is left out."""
        self.manifest.skipped.append({"row": row, "path": image.path, "reason": image.reason})

    def finish(self) -> None:
        """Closes the last shard, and gives all of them the names that readers look for."""
        manifest, folder = self.manifest, self.file.folder
        if self.shard_rows:
            self._close_shard(next_row=manifest.source["num_rows"])
        count = len(manifest.shards)
        with _failures_named(folder):
            for number, shard in enumerate(manifest.shards):
                shard["name"] = f"{_SHARD_FOLDER}/{_shard_name(self.file.split, number, count)}"
                os.replace(_find_shard(folder, self.file.split, number, manifest), folder / shard["name"])
            flush_to_disk(folder / _SHARD_FOLDER)
            manifest.finished = True
            self.file.write()

    def close(self) -> None:
        """Removes what is half written; the rows before it are safe."""
        if self.writer is not None:
            with contextlib.suppress(OSError):  # of a disk that is full, which was reported already
                self.writer.close()
            self.partial.unlink(missing_ok=True)
            self.writer = None

    def _write_group(self) -> None:
        columns = {self.column: self._image_column()}
        if self.others:
            joined = pa.concat_tables(self.others)
            columns |= {name: joined.column(name) for name in joined.column_names}
        # in one piece, so that the pages of the file depend on the rows alone
        table = pa.table([columns[name] for name in self.schema.names], schema=self.schema).combine_chunks()
        with _failures_named(self.file.folder):
            if self.writer is None:
                # dictionaries and statistics would only repeat pictures, zstd leaves alone what is compressed, and
                # who asks for uncompressed pictures wants to read them fast
                compression = "none" if self.manifest.settings["image_format"] == "bmp" else "zstd"
                self.writer = pq.ParquetWriter(
                    self.partial, self.schema, compression=compression, use_dictionary=False, write_statistics=False
                )
            self.writer.write_table(table, row_group_size=len(table))
        self.images, self.others, self.group_bytes = [], [], 0

    def _image_column(self) -> pa.ChunkedArray:
        kind = self.schema.field(self.column).type
        if isinstance(self.features[self.column], datasets.Image):
            pictures = [{"bytes": image.content, "path": image.name} for image in self.images]
            return pa.chunked_array([pa.array(pictures, kind)])
        arrays = {self.column: [image.content for image in self.images]}
        feature = datasets.Features({self.column: self.features[self.column]})
        return datasets.Dataset.from_dict(arrays, feature).data.column(0)

    def _close_shard(self, *, next_row: int) -> None:
        self._write_group()
        assert self.writer is not None
        manifest = self.manifest
        with _failures_named(self.file.folder):
            self.writer.close()
            flush_to_disk(self.partial)
            os.replace(self.partial, self.path)
            flush_to_disk(self.path.parent)
            self.writer = None
            shard = {"name": f"{_SHARD_FOLDER}/{self.path.name}", "rows": len(self.shard_rows)}
            shard |= {"bytes": self.path.stat().st_size}
            manifest.shards.append({**shard, "first_row": self.shard_rows[0], "last_row": self.shard_rows[-1]})
            manifest.next_row = next_row
            manifest.num_images += len(self.shard_rows)
            manifest.num_shrunk += self.num_shrunk
            manifest.bytes_in += self.bytes_in
            self.file.write()
        self._start_shard()
