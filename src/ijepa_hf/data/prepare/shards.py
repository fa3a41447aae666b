"""Writes the manifest and the parquet files of a prepared folder."""

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ijepa_hf.data.prepare.rows import PreparedImage, SourceRows
from ijepa_hf.files import flush_to_disk, write_json_atomically

MANIFEST_FILE = "manifest.json"
_MANIFEST_VERSION = 1
_SHARD_FOLDER = "data"
_GROUP_ROWS, _GROUP_BYTES = 100, 16_000_000  # of a row group, which a reader of a stream holds in memory


@contextlib.contextmanager
def failures_named(folder: Path) -> Iterator[None]:
    """Turns a full disk or a missing permission into an error with one plain sentence."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise OSError(
            f"out={str(folder)!r} cannot be written: {reason}. Make room or choose another folder; the same command "
            "goes on with the shards that are complete."
        ) from error


@dataclass
class Manifest:
    """Holds the record of one split in `manifest.json`.

    Args:
        settings: Options of the command that change the rows.
        source: Fingerprint, rows and configuration of the source.
        features: Features of the shards.
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
class ManifestFile:
    """Reads and writes `manifest.json`: changes the record of the split that is written, and keeps the others."""

    folder: Path
    split: str
    others: dict[str, Any]
    manifest: Manifest

    def write(self) -> None:
        """Writes the file anew."""
        splits = dict(sorted({**self.others, self.split: asdict(self.manifest)}.items()))
        write_json_atomically(self.folder / MANIFEST_FILE, {"version": _MANIFEST_VERSION, "splits": splits})


def take_up(folder: Path, split: str, new: Manifest, *, overwrite: bool) -> tuple[dict[str, Any], Manifest]:
    """Finds how much an earlier call has written; refuses other settings or another source. Changes nothing.

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


def make_ready(file: ManifestFile) -> None:
    """Writes the manifest, then removes shards that it does not list: incomplete or overwritten ones."""
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
    """Returns the name of a shard's file; a hidden one while the number of shards is unknown."""
    return f".{split}-{number:05d}.parquet" if count is None else f"{split}-{number:05d}-of-{count:05d}.parquet"


def _find_shard(folder: Path, split: str, number: int, manifest: Manifest) -> Path:
    """Finds the file of a shard that the manifest lists, under either name; checks its size."""
    names = _shard_name(split, number), _shard_name(split, number, len(manifest.shards))
    for path in (folder / _SHARD_FOLDER / name for name in names):
        if path.is_file() and path.stat().st_size == manifest.shards[number]["bytes"]:
            return path
    raise ValueError(
        f"out={str(folder)!r}: shard {number} of split {split!r} is missing or not of the size in {MANIFEST_FILE}; "
        "write the split again with --overwrite."
    )


class ShardWriter:
    """Writes rows as row groups of shards; lists the complete shards in the manifest."""

    def __init__(self, rows: SourceRows, file: ManifestFile) -> None:
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
        """Returns the path of the shard that is being filled, with its hidden name."""
        return self.file.folder / _SHARD_FOLDER / _shard_name(self.file.split, len(self.manifest.shards))

    @property
    def partial(self) -> Path:
        """Returns the path of the file that is written before it is renamed to `path`."""
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
        """Closes the last shard, and gives all shards their final names."""
        manifest, folder = self.manifest, self.file.folder
        if self.shard_rows:
            self._close_shard(next_row=manifest.source["num_rows"])
        count = len(manifest.shards)
        with failures_named(folder):
            for number, shard in enumerate(manifest.shards):
                shard["name"] = f"{_SHARD_FOLDER}/{_shard_name(self.file.split, number, count)}"
                os.replace(_find_shard(folder, self.file.split, number, manifest), folder / shard["name"])
            flush_to_disk(folder / _SHARD_FOLDER)
            manifest.finished = True
            self.file.write()

    def close(self) -> None:
        """Removes an incomplete shard; earlier shards are kept."""
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
        with failures_named(self.file.folder):
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
        with failures_named(self.file.folder):
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
