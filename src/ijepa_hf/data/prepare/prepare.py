"""Writes any source as parquet shards, shrunk once instead of in every epoch: `ijepa-hf prepare SOURCE OUT`.

The folder loads with `datasets.load_dataset(OUT)`, and as `dataset_name`, at random or as a stream:

    OUT/
      manifest.json                        settings, source, shards, and each row that was skipped with the reason
      data/train-00000-of-00004.parquet    rows in the order of the source, other columns and features as they were

The same settings and source give the same bytes, for any number of workers, and however often the command was stopped
and started again (under one version of Pillow and pyarrow). Shards have hidden names until all are written, so an
incomplete data set cannot be loaded by mistake.

A picture that is written anew is what `image_transforms.decode_image` makes of it: upright by its EXIF orientation;
the first frame of an animation; transparency composited onto white; palettes and CMYK to RGB; grayscale stays one
channel; colour profiles and other metadata are dropped unseen. 16-bit grayscale is always written as 16-bit PNG and a
float picture as float TIFF, as no lossy format holds them; colour of 16 bits becomes 8, which is all that Pillow reads
of it. Arrays stay arrays of their dtype. Shrinking is bilinear with antialias, as in training; nothing is ever
enlarged.
"""

import contextlib
import json
import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ijepa_hf.data.prepare.rewriting import PictureFormat, check_numbers
from ijepa_hf.data.prepare.rows import ROWS_AT_ONCE, PreparedImage, SourceRows
from ijepa_hf.data.prepare.shards import (
    MANIFEST_FILE,
    Manifest,
    ManifestFile,
    ShardWriter,
    failures_named,
    make_ready,
    take_up,
)
from ijepa_hf.data.reading import MOST_NAMED, too_many_unreadable
from ijepa_hf.data.sources.opening import ImageSource, load_split
from ijepa_hf.escaping import on_one_line

_NAMED_IN_SUMMARY = 3
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True, kw_only=True)
class PrepareSettings:
    """Holds the options of `ijepa-hf prepare`.

    Args:
        dataset_config_name: Configuration of a Hub data set.
        split_name: Split to read and write.
        image_column_name: Column of the images; found automatically if there is only one.
        shortest_side: Pixels. Images whose shortest side is longer are shrunk to it, with their aspect; `None` shrinks
            none.
        image_format: `keep`, `jpeg`, `png`, `webp` or `bmp`. `keep` copies pictures that need no shrinking unchanged,
            writes shrunk JPEG and WebP in their own format and everything else as PNG. `bmp` is uncompressed: six
            times the bytes of JPEG, decoded in a quarter of the time.
        quality: Of JPEG and WebP, 1 to 100. The default, 95, is 39 dB from the pixels at a quarter of the bytes of PNG
            (photographs at 256 pixels; 90 is 37 dB at a fifth).
        channel_axis: 0 or -1 for arrays to be shrunk; by default the axis, first or last, that is shortest.
        shard_size: Bytes of a shard at most, before compression; a row that is larger has a shard to itself. A number,
            or text with KB, MB or GB.
        num_workers: Processes that read, shrink and encode; 0 does it in this one.
        max_samples: Take only the first `max_samples` rows.
        max_broken_share: Stop when more than this share of the images cannot be read, judged from 1,000 images on.
        overwrite: Delete what the folder holds of this split first.
    """

    dataset_config_name: str | None = None
    split_name: str = "train"
    image_column_name: str | None = None
    shortest_side: int | None = None
    image_format: str = "keep"
    quality: int | None = None
    channel_axis: int | None = None
    shard_size: int | str = "100MB"
    num_workers: int = 0
    max_samples: int | None = None
    max_broken_share: float = 0.05
    overwrite: bool = False

    @property
    def picture_format(self) -> PictureFormat:
        """Returns how each image is written."""
        return PictureFormat(self.shortest_side, self.image_format, self.quality, self.channel_axis)

    def check(self) -> None:
        """Raises `ValueError` if a value is bad."""
        self.picture_format.check()
        parse_size(self.shard_size)
        check_numbers(num_workers=(self.num_workers, 0), max_samples=(self.max_samples, 1))
        if not 0.0 <= self.max_broken_share <= 1.0:
            raise ValueError(
                f"max_broken_share={self.max_broken_share} must be from 0 to 1; 0 stops at the first one."
            )


def prepare(source: str, out: str | Path, settings: PrepareSettings = PrepareSettings()) -> str:
    """Writes one split of any source as parquet shards; goes on where an earlier call was stopped.

    Args:
        source: Name, path or Hub id, as `load_split` opens it.
        out: Folder to write; missing, empty, or written by this function.
        settings: How images are read and written.

    Returns:
        A few lines for the user: what was written, what was skipped, and the next command.

    Raises:
        FileNotFoundError: If the source does not exist.
        ValueError: If a value is bad, the source cannot be read or holds no usable images, `out` holds something else
            (other settings, another source, files of another kind), or too many images cannot be read.
        OSError: If `out` cannot be written; what is complete stays, and the same call goes on.
    """
    settings.check()
    folder, split, picture_format = Path(out).expanduser(), settings.split_name, settings.picture_format
    _check_place(source, folder, split)
    images = ImageSource(str(source), settings.dataset_config_name, settings.image_column_name)
    rows = SourceRows(load_split(images, split), settings.image_column_name, picture_format, settings.max_samples)
    manifest = Manifest(
        settings={
            **picture_format.resolved(),
            "shard_size": parse_size(settings.shard_size),
            "max_samples": settings.max_samples,
            "image_column": rows.column,
        },
        source={
            "fingerprint": rows.fingerprint,
            "num_rows": len(rows),
            "dataset_config_name": settings.dataset_config_name,
        },
        features=json.loads(json.dumps(rows.features.to_dict())),  # as they will be read back: lists, no tuples
        source_name=str(source),
    )
    others, manifest = take_up(folder, split, manifest, overwrite=settings.overwrite)
    finished = manifest.finished
    if not finished:
        file = ManifestFile(folder, split, others, manifest)
        _write_shards(rows, file, settings.num_workers, settings.max_broken_share)
    summary = _summary(folder, split, manifest, rows, settings.image_column_name)
    return f"already finished; {summary}" if finished else summary


def parse_size(size: int | str) -> int:
    """Converts a size such as `100MB` to bytes.

    Args:
        size: A number of bytes, or a number with KB, MB or GB (powers of 1,000).

    Returns:
        Bytes, at least 1.

    Raises:
        ValueError: If the text is not a size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?B|)", str(size).strip().upper())
    count = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if count < 1:
        raise ValueError(f"shard_size={size!r} must be a number of bytes above 0, with KB, MB or GB; e.g. 100MB.")
    return count


def _check_place(source: str, folder: Path, split: str) -> None:
    """Refuses an output folder that holds other files or lies in the source; called before the source is opened."""
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
            f"out={str(folder)!r} and source={str(source)!r}: one lies inside the other; choose another folder."
        )


def _summary(folder: Path, split: str, manifest: Manifest, rows: SourceRows, column_name: str | None) -> str:
    written = sum(shard["bytes"] for shard in manifest.shards)
    shards = "shard" if len(manifest.shards) == 1 else "shards"
    lines = [
        f"{folder}: {manifest.num_images:,} images of split {split!r} in {len(manifest.shards):,} {shards}, "
        f"{_in_words(written)} (the images were {_in_words(manifest.bytes_in)}); {manifest.num_shrunk:,} shrunk"
    ]
    if manifest.skipped:
        lines.append(
            f"skipped: {len(manifest.skipped):,} of {len(rows):,} that cannot be read, all in {folder / MANIFEST_FILE}"
        )
        lines += [f"  {line}" for line in islice(_lines(manifest.skipped), _NAMED_IN_SUMMARY)]
        if len(manifest.skipped) > _NAMED_IN_SUMMARY:
            lines.append(f"  and {len(manifest.skipped) - _NAMED_IN_SUMMARY:,} more")
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


def _lines(skipped: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for row in skipped:
        named = row["path"] is None or row["path"] in row["reason"]
        words = row["reason"] if named else f"{row['path']}: {row['reason']}"
        yield f"row {row['row']}: {on_one_line(words)}"


def _write_shards(rows: SourceRows, file: ManifestFile, num_workers: int, max_broken_share: float) -> None:
    manifest = file.manifest
    first_piece = manifest.next_row // ROWS_AT_ONCE
    num_pieces = math.ceil(len(rows) / ROWS_AT_ONCE)
    loader = DataLoader(
        rows,
        sampler=cast(Any, range(first_piece, num_pieces)),
        batch_size=None,
        num_workers=num_workers,
        collate_fn=_as_it_is,
        generator=torch.Generator().manual_seed(0),  # its own: otherwise it draws from torch's global one
    )
    progress = tqdm(total=len(rows), initial=manifest.next_row, unit="image", desc="prepare", mininterval=1.0)
    with failures_named(file.folder):
        make_ready(file)
    with contextlib.closing(progress), contextlib.closing(ShardWriter(rows, file)) as writer:
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


def _judge(file: ManifestFile, num_seen: int, num_rows: int, max_share: float) -> None:
    """Raises an error if too many images cannot be read, or none can."""
    skipped = file.manifest.skipped
    if num_seen == num_rows == len(skipped):
        lines = "".join(f"\n  {line}" for line in islice(_lines(skipped), MOST_NAMED))
        words = f"none of the {num_rows} images can be read, so that there is nothing to write:{lines}"
    else:
        found = too_many_unreadable(len(skipped), _lines(skipped), num_seen, num_rows, max_share)
        if found is None:
            return
        words = found
    with failures_named(file.folder):
        file.write()
    raise ValueError(
        f"{words}\nAll are listed in {file.folder / MANIFEST_FILE}. Allow more with --max_broken_share, and the "
        "command goes on; or mend or remove them, and start again with --overwrite."
    )
