"""Finds files of weights on disk and on the Hub, and says what they hold."""

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from pickle import UnpicklingError
from typing import Any, NoReturn

import huggingface_hub
import torch
from huggingface_hub import errors as hub
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import IJepaConfig as StockIJepaConfig
from transformers import PreTrainedConfig, ViTConfig, ViTMAEConfig
from transformers.utils import (
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)
from transformers.utils.hub import extract_commit_hash

from ijepa_hf.runs.checkpoints import CHECKPOINT_FILE

USABLE = (
    "Usable are: a folder or repo written by ijepa-hf; IJepaModel, ViTModel and ViTMAEModel checkpoints in "
    "transformers' format, with or without their heads; and published I-JEPA .pth.tar files."
)

_CLASS_TOKEN, _TABLE = "embeddings.cls_token", "embeddings.position_embeddings"

_SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class _EncoderKind:
    """A stock class whose encoder can be taken."""

    words: str
    config_class: type[PreTrainedConfig]
    prefix: str  # of the encoder's tensors where a head is beside it
    dropped: Mapping[str, str]  # beginnings of names that are left out -> what they are
    has_class_token: bool = False


_ENCODER_KINDS = {
    "ijepa": _EncoderKind(
        "I-JEPA encoder",
        StockIJepaConfig,
        "ijepa.",
        {"pooler.": "pooler", "classifier.": "classifier", "embeddings.mask_token": "mask token"},
    ),
    "vit": _EncoderKind(
        "ViT encoder",
        ViTConfig,
        "vit.",
        {
            _CLASS_TOKEN: "class token",
            "pooler.": "pooler",
            "classifier.": "classifier",
            "embeddings.mask_token": "mask token",
            "decoder.": "decoder",
        },
        has_class_token=True,
    ),
    "vit_mae": _EncoderKind(
        "ViT-MAE encoder",
        ViTMAEConfig,
        "vit.",
        {_CLASS_TOKEN: "class token", "decoder.": "decoder"},
        has_class_token=True,
    ),
}


@dataclass(frozen=True)
class _Stored:
    """A tensor in a file, and what it is in the model."""

    file: Path
    name: str  # in the file
    shape: tuple[int, ...]
    dtype: str
    targets: tuple[str, ...] = ()  # names in the model


@dataclass(frozen=True)
class _Place:
    """A folder on this disk, or a repo on the Hub."""

    name: str
    folder: Path | None
    revision: str | None = None

    @property
    def is_offline(self) -> bool:
        """Whether only the cache of the Hub can be asked."""
        return self.folder is None and huggingface_hub.is_offline_mode()

    def find(self, filename: str) -> Path | None:
        """The path of a file, downloaded where need be; `None` where there is none, or offline none in the cache."""
        if self.folder is not None:
            path = self.folder / filename
            return path if path.is_file() else None
        try:
            return Path(huggingface_hub.hf_hub_download(self.name, filename, revision=self.revision))
        except hub.LocalEntryNotFoundError as error:
            if self.is_offline:
                return None
            raise ConnectionError(
                f"{_named(self.name)}: {filename} is not in the cache, and the Hub cannot be reached: {error}"
            ) from error
        except hub.EntryNotFoundError:
            return None
        except (hub.HTTPError, hub.HFValidationError) as error:  # type: ignore[attr-defined]  # the HTTP client's own
            _explain(self, error)

    def is_known_to_lack(self, filename: str) -> bool:
        """Whether there is no such file, as opposed to: none in the cache."""
        if not self.is_offline:
            return self.find(filename) is None
        cached = huggingface_hub.try_to_load_from_cache(self.name, filename, revision=self.revision)
        return cached is huggingface_hub._CACHED_NO_EXIST


def _explain(place: _Place, error: Exception) -> NoReturn:
    """Raises what the Hub's answer means to a user."""
    name = _named(place.name)
    if isinstance(error, hub.GatedRepoError):
        raise PermissionError(
            f"{name} is gated: accept its terms on its page, and log in with `hf auth login` or HF_TOKEN."
        ) from error
    if isinstance(error, hub.RepositoryNotFoundError):
        raise FileNotFoundError(
            f"{name}: there is no such folder on this disk, and no such repo on the Hub. If it is a private one, log "
            "in with `hf auth login` or HF_TOKEN."
        ) from error
    if isinstance(error, hub.RevisionNotFoundError):
        raise FileNotFoundError(
            f"{name} has no model_revision={place.revision!r}; write a branch, tag or commit."
        ) from error
    if isinstance(error, hub.HFValidationError):
        raise FileNotFoundError(
            f"{name}: there is no such folder or file on this disk, and it is no repo's id, which looks like "
            "facebook/ijepa_vith14_1k."
        ) from error
    raise ConnectionError(f"{name} could not be read from the Hub: {error}") from error


def _root_fields(place: _Place) -> tuple[dict[str, Any], _Place]:
    """The configuration at the root, and the place, on the commit that it came from."""
    path = place.find(CONFIG_NAME)
    if path is None:
        if place.is_offline:
            raise FileNotFoundError(
                f"{_named(place.name)}: there is no such folder on this disk, and {CONFIG_NAME} of such a repo is not "
                "in the cache (HF_HUB_OFFLINE is set)."
            )
        if place.folder is not None and (place.folder / CHECKPOINT_FILE).is_file():
            raise ValueError(
                f"{_named(place.name)} is a checkpoint inside a run; give the run's folder "
                f"{str(place.folder.parent)!r}, or go on with that run by --resume_from_checkpoint."
            )
        raise ValueError(f"{_named(place.name)} has no {CONFIG_NAME}. {USABLE}")
    if place.folder is None:
        place = replace(place, revision=extract_commit_hash(str(path), None) or place.revision)
    fields = _read_json(place, path)
    model_type = fields.get("model_type")
    if model_type is None:
        raise ValueError(
            f"{_named(place.name)}: its {CONFIG_NAME} names no model_type, so it is not in transformers' format. "
            f"{USABLE}"
        )
    if model_type not in _ENCODER_KINDS:
        classes = ", ".join(fields.get("architectures") or ["of no named class"])
        raise ValueError(
            f"{_named(place.name)} is a {model_type!r} model ({classes}), another architecture than the plain ViT "
            f"of I-JEPA: its weights cannot start one. {USABLE}"
        )
    if fields.get("quantization_config") is not None:
        raise ValueError(f"{_named(place.name)} is quantized; give the weights that it was made from.")
    return fields, place


def _weight_files(place: _Place, folder: str) -> tuple[list[Path], dict[str, Path] | None]:
    """The files of the weights; with shards, also the index: name of a tensor -> file."""
    for single, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        path = place.find(folder + single)
        if path is not None:
            return [path], None
        path = place.find(folder + index)
        if path is not None:
            return _shards(place, folder, index, _read_json(place, path).get("weight_map"))
    where = " (none in the cache, and HF_HUB_OFFLINE is set)" if place.is_offline else ""
    raise FileNotFoundError(
        f"{_named(place.name)} has a {folder}{CONFIG_NAME}, but no weights beside it{where}: neither "
        f"{SAFE_WEIGHTS_NAME} nor {WEIGHTS_NAME}, nor an index of shards."
    )


def _shards(place: _Place, folder: str, index: str, weight_map: Any) -> tuple[list[Path], dict[str, Path]]:
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{_named(place.name)}: {folder}{index} has no weight_map; it is damaged.")
    paths: dict[str, Path] = {}
    for shard in sorted(set(map(str, weight_map.values()))):
        if shard != PurePosixPath(shard).name:
            raise ValueError(f"{_named(place.name)}: {folder}{index} names {shard!r}, which is outside its folder.")
        path = place.find(folder + shard)
        if path is None:
            raise FileNotFoundError(f"{_named(place.name)}: {folder}{shard} is missing, which {index} names.")
        paths[shard] = path
    return list(paths.values()), {name: paths[str(shard)] for name, shard in weight_map.items()}


def _read_json(place: _Place, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{_named(place.name)}: {path.name} is no JSON ({error}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{_named(place.name)}: {path.name} is not a table of fields.")
    return content


def _header(place: _Place, file: Path) -> list[_Stored]:
    """Names, shapes and types of the tensors of a file."""
    if file.suffix != ".safetensors":
        return [
            _Stored(file, name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            for name, tensor in _load_torch(place.name, file).items()
        ]
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
            return [
                _Stored(file, name, tuple(part.get_shape()), _dtype_name(part.get_dtype()))
                for name, part in slices.items()
            ]
    except SafetensorError as error:
        raise ValueError(f"{_named(place.name)}: {file.name} is damaged ({error}).") from error


def _dtype_name(safetensors_name: str) -> str:
    return _SAFETENSORS_DTYPES.get(safetensors_name, safetensors_name)


def _load_torch(source: str, file: Path) -> dict[str, Tensor]:
    try:
        # memory-mapped where the format allows it
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{_named(source)}: {file.name} cannot be read (damaged, or it holds code, which is never run): {reason}"
        ) from error
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{_named(source)}: {file.name} holds something else than named tensors.")
    return {str(name): tensor for name, tensor in content.items()}


def _named(name_or_path: str) -> str:
    return f"model_name_or_path={name_or_path!r}"
