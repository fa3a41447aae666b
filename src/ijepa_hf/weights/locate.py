"""Finds files of weights on disk and on the Hub, and reads which tensors they hold."""

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from pickle import UnpicklingError
from typing import Any, NoReturn

import huggingface_hub
import torch
from huggingface_hub import errors as hub
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import (
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from ijepa_hf.files import read_json

FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # name in safetensors -> in torch


def named(name_or_path: str) -> str:
    """Returns the argument and its value, for the beginning of a message."""
    return f"model_name_or_path={name_or_path!r}"


@dataclass(frozen=True)
class Place:
    """Names a folder on this disk or a repo on the Hub, and finds files in it.

    Args:
        name: As the user wrote it.
        folder: The folder; `None` for a repo.
        revision: Of the repo.
    """

    name: str
    folder: Path | None
    revision: str | None = None

    def __str__(self) -> str:
        return named(self.name)

    @property
    def is_offline(self) -> bool:
        """Returns whether only the cache of the Hub can be read."""
        return self.folder is None and huggingface_hub.is_offline_mode()

    def find(self, filename: str) -> Path | None:
        """Returns a file's path, downloaded if needed; `None` if it does not exist or, offline, is not cached."""
        if self.folder is not None:
            path = self.folder / filename
            return path if path.is_file() else None
        try:
            return Path(huggingface_hub.hf_hub_download(self.name, filename, revision=self.revision))
        except hub.LocalEntryNotFoundError as error:
            if self.is_offline:
                return None
            raise ConnectionError(
                f"{self}: {filename} is not in the cache, and the Hub cannot be reached: {error}"
            ) from error
        except hub.EntryNotFoundError:
            return None
        except (hub.HTTPError, hub.HFValidationError) as error:  # type: ignore[attr-defined]  # the HTTP client's own
            _explain(self, error)

    def read_json(self, filename: str) -> dict[str, Any] | None:
        """Reads a JSON file; returns `None` if it does not exist or, offline, is not in the cache."""
        path = self.find(filename)
        try:
            return None if path is None else read_json(path)
        except ValueError as error:
            raise ValueError(f"{self}: {error}") from error

    def is_known_to_lack(self, filename: str) -> bool:
        """Returns whether it is certain that the file does not exist; offline, a missing cache entry is not proof."""
        if not self.is_offline:
            return self.find(filename) is None
        cached = huggingface_hub.try_to_load_from_cache(self.name, filename, revision=self.revision)
        return cached is huggingface_hub._CACHED_NO_EXIST


def _explain(place: Place, error: Exception) -> NoReturn:
    """Raises an error that explains the Hub's answer to the user."""
    if isinstance(error, hub.GatedRepoError):
        raise PermissionError(
            f"{place} is gated: accept its terms on its page, and log in with `hf auth login` or HF_TOKEN."
        ) from error
    if isinstance(error, hub.RepositoryNotFoundError):
        raise FileNotFoundError(
            f"{place}: there is no such folder on this disk, and no such repo on the Hub. If it is a private one, log "
            "in with `hf auth login` or HF_TOKEN."
        ) from error
    if isinstance(error, hub.RevisionNotFoundError):
        raise FileNotFoundError(
            f"{place} has no model_revision={place.revision!r}; write a branch, tag or commit."
        ) from error
    if isinstance(error, hub.HFValidationError):
        raise FileNotFoundError(
            f"{place}: there is no such folder or file on this disk, and it is no repo's id, which looks like "
            "facebook/ijepa_vith14_1k."
        ) from error
    raise ConnectionError(f"{place} could not be read from the Hub: {error}") from error


@dataclass(frozen=True)
class StoredTensor:
    """Holds the name of a tensor in a file, and its names in the model."""

    file: Path
    name: str  # in the file
    shape: tuple[int, ...]
    dtype: str
    targets: tuple[str, ...] = ()


def weight_files(place: Place, folder: str) -> tuple[list[Path], dict[str, Path] | None]:
    """Finds the files of the weights.

    Args:
        place: Where they are.
        folder: Below it, with a slash at its end; "" is the place itself.

    Returns:
        The files, and of shards the index, name of a tensor -> file; `None` of a single file.

    Raises:
        FileNotFoundError: If there are none, or a shard is missing.
        ValueError: If the index is damaged or names files elsewhere.
    """
    for single, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        path = place.find(folder + single)
        if path is not None:
            return [path], None
        fields = place.read_json(folder + index)
        if fields is not None:
            return _shards(place, folder, index, fields.get("weight_map"))
    where = " (none in the cache, and HF_HUB_OFFLINE is set)" if place.is_offline else ""
    raise FileNotFoundError(
        f"{place} has a {folder}{CONFIG_NAME}, but no weights beside it{where}: neither "
        f"{SAFE_WEIGHTS_NAME} nor {WEIGHTS_NAME}, nor an index of shards."
    )


def _shards(place: Place, folder: str, index: str, weight_map: Any) -> tuple[list[Path], dict[str, Path]]:
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{place}: {folder}{index} has no weight_map; it is damaged.")
    paths: dict[str, Path] = {}
    for shard in sorted(set(map(str, weight_map.values()))):
        if shard != PurePosixPath(shard).name:
            raise ValueError(f"{place}: {folder}{index} names {shard!r}, which is outside its folder.")
        path = place.find(folder + shard)
        if path is None:
            raise FileNotFoundError(f"{place}: {folder}{shard} is missing, which {index} names.")
        paths[shard] = path
    return list(paths.values()), {name: paths[str(shard)] for name, shard in weight_map.items()}


def read_header(place: Place, file: Path) -> list[StoredTensor]:
    """Reads names, shapes and types of the tensors of a file.

    Args:
        place: The place, for messages.
        file: A safetensors file, or one of torch's.

    Raises:
        ValueError: If it is damaged, holds code, or anything but named tensors.
    """
    if file.suffix != ".safetensors":
        return [
            StoredTensor(file, name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            for name, tensor in load_torch(place.name, file).items()
        ]
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
            return [
                StoredTensor(file, name, tuple(part.get_shape()), FLOATS.get(part.get_dtype(), part.get_dtype()))
                for name, part in slices.items()
            ]
    except SafetensorError as error:
        raise ValueError(f"{place}: {file.name} is damaged ({error}).") from error


def load_torch(source: str, file: Path) -> dict[str, Tensor]:
    """Reads a file of torch's without running code in it.

    Args:
        source: Name or path as the user wrote it, for messages.
        file: The file; it is mapped into memory where its format allows that.

    Raises:
        ValueError: If it is damaged, holds code, or anything but named tensors.
    """
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{named(source)}: {file.name} cannot be read (damaged, or it holds code, which is never run): {reason}"
        ) from error
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{named(source)}: {file.name} holds something else than named tensors.")
    return {str(name): tensor for name, tensor in content.items()}
