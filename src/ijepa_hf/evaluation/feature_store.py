"""Stores features on disk in shards that survive a kill; returns them only for the same model, images and settings.

    root/<hash>/                                 hash of everything that the features depend on, the identity
      manifest.json                              the identity, and the SHA-256 of each shard that is complete
      00000.safetensors  00001.safetensors ...   `features`, a tensor of at most 1,024 images

Each shard is written to a temporary file, flushed and renamed; then the manifest is written in the same way. So a kill
at any moment loses at most one shard, and a later call computes the missing shards. A shard whose SHA-256 is not that
of the manifest is computed again, with a warning. Another model, transform, version or image gives another hash and
another folder.
"""

import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from ijepa_hf.data.reading import ImageRows
from ijepa_hf.files import write_atomically, write_json_atomically

_FEATURES_FILE = "manifest.json"

logger = logging.getLogger(__name__)

_FORMAT = 1
_IMAGES_PER_SHARD = 1024
_BYTES_PER_SHARD = 2**26
_TENSOR = "features"
_ROWS_AT_ONCE = 256


class StoredFeatures:
    """Holds the features of n images on disk, mapped into memory shard by shard: reading some images reads no others.

    Args:
        folder: Where they lie.
        shards: float32 `[n_i, ...]`, maps of the files in order; what is written to them stays in memory.
        item_shape: Of an image's features.
    """

    def __init__(self, folder: Path, shards: Sequence[np.ndarray], item_shape: tuple[int, ...]) -> None:
        self.folder, self.shards, self.item_shape = folder, list(shards), item_shape
        self._starts = np.cumsum([0, *(len(shard) for shard in shards)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def shape(self) -> tuple[int, ...]:
        """`(n, ...)`."""
        return (len(self), *self.item_shape)

    def __getitem__(self, numbers: slice | np.ndarray) -> np.ndarray:
        """Returns a copy of some images' features.

        Args:
            numbers: A slice, or whole numbers or truth values `[m]`, as numpy takes them along the first axis.
        """
        chosen = np.arange(len(self))[numbers]
        found = np.empty((len(chosen), *self.item_shape), np.float32)
        shards = np.searchsorted(self._starts, chosen, side="right") - 1
        for shard in np.unique(shards):
            places = np.flatnonzero(shards == shard)
            found[places] = self.shards[shard][chosen[places] - self._starts[shard]]
        return found

    def whole(self) -> np.ndarray:
        """Returns all features as one mapped array `[n, ...]`; writing to it does not change the files.

        Where there are several shards, they are first copied into a temporary file in the folder, which takes as much
        disk again and is gone when the array is.
        """
        if len(self.shards) == 1:
            return self.shards[0]
        with tempfile.TemporaryFile(dir=self.folder) as file:
            for shard in self.shards:
                file.write(np.ascontiguousarray(shard).data)
            file.flush()
            return np.memmap(file, np.float32, "c", shape=self.shape)


@dataclass(frozen=True)
class _Plan:
    """Describes the features that a folder is to hold.

    Args:
        identity: All that the features depend on.
        num_images: Images.
        item_shape: Of an image's features.
        images_per_shard: Images in each shard but the last.
    """

    identity: dict[str, Any]
    num_images: int
    item_shape: tuple[int, ...]
    images_per_shard: int

    def parts(self) -> list[range]:
        starts = range(0, self.num_images, self.images_per_shard)
        return [range(start, min(start + self.images_per_shard, self.num_images)) for start in starts]

    def manifest(self, shards: Mapping[str, str]) -> dict[str, Any]:
        return {
            "format": _FORMAT,
            "identity": self.identity,
            "num_images": self.num_images,
            "item_shape": list(self.item_shape),
            "dtype": "float32",
            "images_per_shard": self.images_per_shard,
            "shards": dict(shards),
        }


def store_features(
    root: Path,
    identity: Mapping[str, Any],
    num_images: int,
    item_shape: tuple[int, ...],
    compute: Callable[[Sequence[range]], Iterator[np.ndarray]],
) -> StoredFeatures:
    """Returns features from the disk, after computing the missing ones.

    Args:
        root: Folder of folders of features; made if missing.
        identity: All that the features depend on, as JSON takes it: model, images, transform, layers, pooling, dtype,
            versions. Whoever asks with the same identity gets the same features.
        num_images: Images, at least 1.
        item_shape: Of an image's features.
        compute: Takes ranges of images, and yields float32 `[len(range), *item_shape]` for each, in order. Not called
            where nothing is missing.

    Returns:
        The features, mapped into memory.

    Raises:
        ValueError: If features are NaN or infinite or of another shape, or the folder holds features of another
            identity (as one that was renamed by hand does); names what differs.
    """
    image_bytes = 4 * int(np.prod(item_shape))
    per_shard = max(1, min(_IMAGES_PER_SHARD, _BYTES_PER_SHARD // image_bytes))
    plan = _Plan(json.loads(json.dumps(identity)), num_images, tuple(item_shape), per_shard)
    folder = root / _hash_of(plan)
    folder.mkdir(parents=True, exist_ok=True)
    shards = _sound_shards(folder, plan)
    missing = [(name, part) for name, part in _named(plan) if name not in shards]
    if missing:
        results = compute([part for _, part in missing])
        for (name, part), features in zip(missing, results, strict=True):
            _check(features, part, plan.item_shape)
            _write_shard(folder / name, features)
            shards[name] = _sha256(folder / name)
            _write_manifest(folder, plan.manifest(shards))
    return StoredFeatures(folder, [_map_shard(folder / name) for name, _ in _named(plan)], plan.item_shape)


def fingerprint_model(source: str, commit: str | None) -> dict[str, Any]:
    """Returns values that identify a model's weights, independent of their path.

    Args:
        source: Hub id or folder.
        commit: On the Hub; `None` for a folder.

    Returns:
        `repo` and `commit`; of a folder the SHA-256 of its configuration and of each file of weights.

    Raises:
        FileNotFoundError: If a folder holds no safetensors file.
    """
    if commit is not None:
        return {"repo": source, "commit": commit}
    folder = Path(source).expanduser()
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"model={source!r}: the folder holds no .safetensors file with weights.")
    return {"sha256": {file.name: _sha256(file) for file in [folder / "config.json", *files]}}


def fingerprint_images(images: ImageRows) -> str:
    """Computes a SHA-256 over the undecoded images: another image, order or number gives another one.

    A file beside the data set, of which rows hold the path alone, counts with its path, size and time of change.

    Args:
        images: The images.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    column = images.images.column
    for start in range(0, len(images), _ROWS_AT_ONCE):
        values = images.rows[start : start + _ROWS_AT_ONCE][column]
        for value in values:
            if isinstance(value, Mapping):
                data, path = value.get("bytes"), value.get("path")
                if data is None and path is not None and Path(path).is_file():
                    status = Path(path).stat()
                    data = f"{path} {status.st_size} {status.st_mtime_ns}".encode()
                parts = [b"" if data is None else data]
            else:
                array = np.ascontiguousarray(value)
                parts = [f"{array.shape} {array.dtype}".encode(), array.tobytes()]
            for part in parts:
                digest.update(len(part).to_bytes(8, "little"))
                digest.update(part)
    return digest.hexdigest()


def differences(mine: Any, other: Any, name: str = "") -> list[str]:
    """Describes the differences between two nested dictionaries, one sentence each.

    Args:
        mine: What is asked for.
        other: What is there.
        name: Of both, in front of each key.

    Returns:
        Such as "transform.size is [32, 32] there, [64, 64] here", in the order of the names.
    """
    if isinstance(mine, Mapping) and isinstance(other, Mapping):
        return [
            line
            for key in sorted({*mine, *other})
            for line in differences(mine.get(key), other.get(key), f"{name}.{key}" if name else str(key))
        ]
    return [] if mine == other else [f"{name} is {other!r} there, {mine!r} here"]


def _hash_of(plan: _Plan) -> str:
    return hashlib.sha256(json.dumps(plan.manifest({}), sort_keys=True).encode()).hexdigest()[:16]


def _named(plan: _Plan) -> list[tuple[str, range]]:
    return [(f"{number:05d}.safetensors", part) for number, part in enumerate(plan.parts())]


def _sound_shards(folder: Path, plan: _Plan) -> dict[str, str]:
    """Returns the SHA-256 of each shard that exists and is undamaged."""
    path = folder / _FEATURES_FILE
    if not path.is_file():
        return {}
    try:
        manifest = json.loads(path.read_text("utf-8"))
        shards = dict(manifest.pop("shards"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s is damaged (%r): its features are computed again.", path, error)
        return {}
    asked = plan.manifest({})
    del asked["shards"]
    differing = differences(asked, manifest)
    if differing:
        raise ValueError(
            f"{folder} holds features of something else: {'; '.join(differing)}. Delete the folder, or choose another "
            "--output_dir."
        )
    sound = {}
    for name, _ in _named(plan):
        if name not in shards:
            continue
        if (folder / name).is_file() and _sha256(folder / name) == shards[name]:
            sound[name] = shards[name]
        else:
            logger.warning("%s is damaged or missing: its features are computed again.", folder / name)
    return sound


def _check(features: np.ndarray, part: range, item_shape: tuple[int, ...]) -> None:
    if features.shape != (len(part), *item_shape) or features.dtype != np.float32:
        raise ValueError(
            f"features of images {part.start} to {part.stop - 1} are {features.dtype} of shape {features.shape}, not "
            f"float32 of shape {(len(part), *item_shape)}."
        )
    finite = np.isfinite(features).reshape(len(part), -1).all(axis=1)
    if not finite.all():
        raise ValueError(
            f"the features of {int((~finite).sum())} of {len(part)} images, the first of them image "
            f"{part[int(np.argmin(finite))]}, are NaN or infinite: the model's weights are broken, or its input was."
        )


def _write_shard(path: Path, features: np.ndarray) -> None:
    tensors = {_TENSOR: np.ascontiguousarray(features)}
    write_atomically(path, lambda partial: save_file(tensors, partial))


def _write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    write_json_atomically(folder / _FEATURES_FILE, manifest)


def _map_shard(path: Path) -> np.ndarray:
    """Maps the tensor of a safetensors file: 8 bytes of length, a header in JSON, then the values."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(length))[_TENSOR]
    offset = 8 + length + entry["data_offsets"][0]
    return np.memmap(path, np.dtype("<f4"), "c", offset, tuple(entry["shape"]))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
