"""Opens weights that a model can be started from: checks configuration, names and shapes, and loads no tensor.

One name says where they are: a Hub repo, a folder, or a published `.pth.tar` file. What can be used:

    our two-part folder          both encoders and the predictor are taken
    stock `IJepaModel`           the encoder becomes both encoders; the predictor is new
    `ViTModel`, `ViTMAEModel`    the same, without class token and position table, with or without heads or a decoder
    published `.pth.tar`         both encoders and the predictor are taken

What cannot be used is refused here, before any work is done.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import errors as hub
from huggingface_hub.constants import REPOCARD_NAME
from torch import Tensor
from transformers import IJepaConfig as StockIJepaConfig
from transformers import PreTrainedConfig, ViTConfig, ViTMAEConfig
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME
from transformers.utils.hub import extract_commit_hash

from ijepa_hf.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from ijepa_hf.model.configuration_ijepa import IJepaConfig
from ijepa_hf.model.encoder_ijepa import IJepaModel, from_file_name
from ijepa_hf.model.modeling_ijepa import PRETRAINING_SUBFOLDER, IJepaForPretraining
from ijepa_hf.runs.cards import read_license
from ijepa_hf.runs.checkpoints import CHECKPOINT_FILE, config_fields
from ijepa_hf.weights.locate import FLOATS, Place, StoredTensor, named, read_header, weight_files
from ijepa_hf.weights.official_checkpoint import format_problems, model_from_official, read_official_checkpoint
from ijepa_hf.weights.official_names import PUBLISHED_LICENSE

PUBLISHED_SUFFIXES = (".pth.tar", ".pth")
USABLE = (
    "Usable are: a folder or repo written by ijepa-hf; IJepaModel, ViTModel and ViTMAEModel checkpoints in "
    "transformers' format, with or without their heads; and published I-JEPA .pth.tar files."
)

_ENCODERS = ("ijepa.", "context_encoder.")
# The fields of a plain ViT, all with the same names in the three stock classes.
_ENCODER_FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "initializer_range",
    "layer_norm_eps",
    "image_size",
    "patch_size",
    "num_channels",
    "qkv_bias",
)
_CLASS_TOKEN, _TABLE = "embeddings.cls_token", "embeddings.position_embeddings"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _EncoderKind:
    """Describes a stock class whose encoder can be taken."""

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
class StartingWeights:
    """Describes weights that a model can be started from; names and shapes are checked, tensors are not loaded yet.

    Args:
        source: Where they are, as the user wrote it.
        kind: What they are, in words: "I-JEPA encoders and predictor", "I-JEPA encoder", "ViT encoder",
            "ViT-MAE encoder" or "published I-JEPA checkpoint".
        config: Their architecture. The configuration of the new model is `config.replace(...)` of it, so that what
            cannot change (see `check_fits`) is carried over. Fields that the source does not have, such as the
            predictor's, have their defaults.
        has_predictor: Whether there is a trained predictor.
        commit: The commit of the Hub repo, for the record; `None` for what is local.
        dtypes: Of the tensors on disk, e.g. `("bfloat16",)`.
        license: What their card says, such as "cc-by-nc-4.0"; `None` if it names none or cannot be read.
        image_mean: Mean of each channel that their images were normalised with, of pixels in [0, 1]; `None` if no
            image processor comes with them.
        image_std: The standard deviation, in the same way.
        license_is_known: `False` if, offline, the card is not in the cache, so that its licence is not known.
        stored: Their tensors, in files; none of a published file.
        dropped: What is left out -> its number of tensors.
        published: Tensors of a published file, mapped from it where its format allows that.
    """

    source: str
    kind: str
    config: IJepaConfig
    has_predictor: bool
    commit: str | None = None
    dtypes: tuple[str, ...] = ("float32",)
    license: str | None = None
    image_mean: tuple[float, ...] | None = None
    image_std: tuple[float, ...] | None = None
    license_is_known: bool = True
    stored: tuple[StoredTensor, ...] = field(default=(), repr=False)
    dropped: Mapping[str, int] = field(default_factory=dict, repr=False)
    published: Mapping[str, Tensor] | None = field(default=None, repr=False, compare=False)


def open_starting_weights(
    name_or_path: str, *, revision: str | None = None, num_attention_heads: int | None = None
) -> StartingWeights:
    """Finds weights, and checks their configuration, names and shapes without reading them.

    Files of a Hub repo are downloaded into the cache of `huggingface_hub`, all of one commit.

    Args:
        name_or_path: A folder, a `.pth.tar` or `.pth` file, or a Hub repo's id.
        revision: Branch, tag or commit of the Hub repo.
        num_attention_heads: Heads of both networks; needed only for a published file whose encoder is no published
            size, since such a file does not say.

    Returns:
        The weights, for `check_fits` and `start_model`.

    Raises:
        FileNotFoundError: If there is no such folder, file, repo or revision, or a file of the weights is missing; or,
            offline, if the cache holds no image processor and it is not known that there is none.
        PermissionError: If the repo is gated.
        ConnectionError: If the Hub cannot be reached and the cache lacks a file.
        ValueError: If it is of a kind that cannot be used, is damaged, or its tensors are not exactly those that its
            configuration says.
    """
    path = Path(name_or_path).expanduser()
    is_published = name_or_path.lower().endswith(PUBLISHED_SUFFIXES)
    looks_local = name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1 or is_published
    place = Place(name_or_path, path if path.is_dir() else None, revision)
    if not path.exists() and looks_local:
        raise FileNotFoundError(f"{place}: there is no such folder or file.")
    if revision is not None and path.exists():
        raise ValueError(f"model_revision={revision!r} is for Hub repos, and {place} is on this disk; omit it.")
    if path.is_file():
        if not is_published:
            raise ValueError(f"{place} is one file; give the folder that it lies in. {USABLE}")
        return _open_published(name_or_path, path, num_attention_heads)
    fields, place = _root_fields(place)
    weights = _with_companions(_open_whole(place, fields) or _open_encoder(place, fields), place)
    heads = weights.config.num_attention_heads
    if num_attention_heads not in (None, heads):
        raise ValueError(
            f"num_attention_heads={num_attention_heads}: {name_or_path} says that it has {heads}; write "
            f"num_attention_heads={heads}, or omit it."
        )
    return weights


# -- opening ---------------------------------------------------------------------------------------------------------


def _root_fields(place: Place) -> tuple[dict[str, Any], Place]:
    """Reads the configuration at the root; also returns the place, on the commit that it came from."""
    path = place.find(CONFIG_NAME)
    if path is None:
        if place.is_offline:
            raise FileNotFoundError(
                f"{place}: there is no such folder on this disk, and {CONFIG_NAME} of such a repo is not "
                "in the cache (HF_HUB_OFFLINE is set)."
            )
        if place.folder is not None and (place.folder / CHECKPOINT_FILE).is_file():
            raise ValueError(
                f"{place} is a checkpoint inside a run; give the run's folder "
                f"{str(place.folder.parent)!r}, or go on with that run by --resume_from_checkpoint."
            )
        raise ValueError(f"{place} has no {CONFIG_NAME}. {USABLE}")
    if place.folder is None:
        place = replace(place, revision=extract_commit_hash(str(path), None) or place.revision)
    fields = place.read_json(CONFIG_NAME) or {}
    model_type = fields.get("model_type")
    if model_type is None:
        raise ValueError(
            f"{place}: its {CONFIG_NAME} names no model_type, so it is not in transformers' format. {USABLE}"
        )
    if model_type not in _ENCODER_KINDS:
        classes = ", ".join(fields.get("architectures") or ["of no named class"])
        raise ValueError(
            f"{place} is a {model_type!r} model ({classes}), another architecture than the plain ViT "
            f"of I-JEPA: its weights cannot start one. {USABLE}"
        )
    if fields.get("quantization_config") is not None:
        raise ValueError(f"{place} is quantized; give the weights that it was made from.")
    return fields, place


def _open_published(source: str, path: Path, heads: int | None) -> StartingWeights:
    try:
        model = model_from_official(read_official_checkpoint(path), num_attention_heads=heads)
    except ValueError as error:
        raise ValueError(f"{named(source)} cannot be used: {error}") from error
    state = model.state_dict()
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in state.values()}
    return StartingWeights(
        source,
        "published I-JEPA checkpoint",
        model.config.replace(),
        True,
        dtypes=tuple(sorted(dtypes)),
        license=PUBLISHED_LICENSE,
        image_mean=IMAGENET_MEAN,
        image_std=IMAGENET_STD,
        published=state,
    )


def _with_companions(weights: StartingWeights, place: Place) -> StartingWeights:
    """Adds what the files beside the weights say: the card's licence, the image processor's normalisation.

    Offline, a file that is not in the cache may still exist on the Hub: for the image processor that is an error, for
    the card a warning.
    """
    card = place.find(REPOCARD_NAME)
    if place.find(IMAGE_PROCESSOR_NAME) is None and not place.is_known_to_lack(IMAGE_PROCESSOR_NAME):
        raise FileNotFoundError(
            f"{place}: the cache does not hold its {IMAGE_PROCESSOR_NAME}, and HF_HUB_OFFLINE is set, so "
            "it is not known how its images are normalised. Run `hf download "
            f"{place.name} {IMAGE_PROCESSOR_NAME} {REPOCARD_NAME}` where the Hub can be reached; or give the repo's "
            "folder in the cache, with --image_mean and --image_std."
        )
    license_is_known = card is not None or place.is_known_to_lack(REPOCARD_NAME)
    if not license_is_known:
        logger.warning(unknown_license_note(place.name))
    fields = place.read_json(IMAGE_PROCESSOR_NAME) or {}
    moments: dict[str, Any] = {}
    for name in ("image_mean", "image_std"):
        values = fields.get(name)
        if (
            fields.get("do_normalize", True)
            and isinstance(values, list)
            and len(values) == weights.config.num_channels
        ):
            moments[name] = tuple(map(float, values))
    return replace(weights, license=read_license(card), license_is_known=license_is_known, **moments)


def _open_whole(place: Place, root: Mapping[str, Any]) -> StartingWeights | None:
    """Opens both encoders and the predictor, at the root or in `pretraining/`; `None` if there is only an encoder."""
    fields, folder = root, ""
    if root["model_type"] != "ijepa":
        return None
    if not _is_whole(root):
        folder = f"{PRETRAINING_SUBFOLDER}/"
        inner = place.read_json(folder + CONFIG_NAME)
        if inner is None:
            _check_lacks_pretraining(place, root)
            return None
        fields = inner
        if not _is_whole(fields):
            raise ValueError(f"{place}: {folder}{CONFIG_NAME} is not that of an IJepaForPretraining.")
    config = _config(place, fields)
    stored = {name: replace(tensor, targets=(name,)) for name, tensor in _stored_tensors(place, folder).items()}
    with torch.device("meta"):
        expected = {name: tuple(value.shape) for name, value in IJepaForPretraining(config).state_dict().items()}
    _check_tensors(place, stored, expected)
    return StartingWeights(
        place.name,
        "I-JEPA encoders and predictor",
        config,
        True,
        _commit(place),
        _dtypes(stored),
        stored=tuple(stored.values()),
    )


def _open_encoder(place: Place, fields: Mapping[str, Any]) -> StartingWeights:
    kind = _ENCODER_KINDS[fields["model_type"]]
    config = _config(place, fields)
    with torch.device("meta"):
        expected = {name: tuple(value.shape) for name, value in IJepaModel(config).state_dict().items()}
    taken = frozenset(expected)
    if kind.has_class_token:
        expected[_TABLE] = (1, config.num_patches + 1, config.hidden_size)
        expected[_CLASS_TOKEN] = (1, 1, config.hidden_size)
    stored: dict[str, StoredTensor] = {}
    dropped: dict[str, int] = {}
    for full_name, tensor in _stored_tensors(place, "").items():
        name = full_name.removeprefix(kind.prefix)
        what = next((words for beginning, words in kind.dropped.items() if name.startswith(beginning)), None)
        if what is not None:
            dropped[what] = dropped.get(what, 0) + 1
            if name not in expected:
                continue
        if name in stored:
            raise ValueError(f"{place} holds {name} twice, with and without {kind.prefix!r}.")
        targets = tuple(encoder + name for encoder in _ENCODERS) if name in taken else ()
        stored[name] = replace(tensor, targets=targets)
    _check_tensors(place, stored, expected)
    return StartingWeights(
        place.name,
        kind.words,
        config,
        False,
        _commit(place),
        _dtypes(stored),
        stored=tuple(tensor for tensor in stored.values() if tensor.targets),
        dropped=dropped,
    )


def _is_whole(fields: Mapping[str, Any]) -> bool:
    return fields.get("model_type") == "ijepa" and "IJepaForPretraining" in (fields.get("architectures") or [])


def _check_lacks_pretraining(place: Place, root: Mapping[str, Any]) -> None:
    """Refuses, offline, a repo of ours whose `pretraining/` is not in the cache: it is not an encoder only."""
    wanted = f"{PRETRAINING_SUBFOLDER}/{CONFIG_NAME}"
    if "predictor_hidden_size" in root and not place.is_known_to_lack(wanted):
        raise FileNotFoundError(
            f"{place} was written by ijepa-hf, but the cache does not hold its {wanted}, and "
            "HF_HUB_OFFLINE is set: download the repo first, or give its folder in the cache to start from the "
            "encoder alone."
        )


def _config(place: Place, fields: Mapping[str, Any]) -> IJepaConfig:
    """Makes our configuration of the source's; what its file leaves out has the default of its own class."""
    try:
        if "predictor_hidden_size" in fields:  # written by this package
            return IJepaConfig(**config_fields(IJepaConfig.from_dict(dict(fields))))
        given = {name: fields[name] for name in _ENCODER_FIELDS if name in fields}
        stock = _ENCODER_KINDS[fields["model_type"]].config_class(**given)
        encoder = {name: getattr(stock, name) for name in _ENCODER_FIELDS}
        width = IJepaConfig.__dataclass_fields__["predictor_hidden_size"].default
        odd = width % encoder["num_attention_heads"] != 0
        return IJepaConfig(**encoder, predictor_num_attention_heads=12 if odd else None)
    except (ValueError, TypeError, ZeroDivisionError, hub.StrictDataclassError) as error:
        raise ValueError(f"{place}: its {CONFIG_NAME} cannot be used: {error}") from error


def _stored_tensors(place: Place, folder: str) -> dict[str, StoredTensor]:
    """Lists all tensors of the files under the names of the model; checks the index of shards against the shards."""
    files, index = weight_files(place, folder)
    stored: dict[str, StoredTensor] = {}
    found: dict[str, Path] = {}
    for file in files:
        for tensor in read_header(place, file):
            name = from_file_name(tensor.name)
            if name in stored:
                raise ValueError(f"{place} holds {name} twice, in {file.name} and {stored[name].file.name}.")
            stored[name] = tensor
            found[tensor.name] = file
    if index is not None and index != found:
        wrong = sorted({name for name, file in {*index.items()} ^ {*found.items()}})
        raise ValueError(
            f"{place}: the index of shards and the shards differ in {', '.join(wrong[:10])}; they are damaged, "
            "or of two models."
        )
    return stored


def _check_tensors(place: Place, stored: Mapping[str, StoredTensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    problems = [f"{name} is missing" for name in sorted(expected.keys() - stored.keys())]
    problems += [f"{name} is unexpected" for name in sorted(stored.keys() - expected.keys())]
    for name in sorted(expected.keys() & stored.keys()):
        tensor = stored[name]
        if tensor.shape != expected[name]:
            problems.append(f"{name} has shape {list(tensor.shape)}, expected {list(expected[name])}")
        if tensor.dtype not in FLOATS.values():
            problems.append(f"{name} is stored as {tensor.dtype}, which is no plain float")
    if problems:
        raise ValueError(
            f"{place}: its weights are not those of its {CONFIG_NAME}; nothing was loaded:\n  "
            + format_problems(problems)
        )


def _dtypes(stored: Mapping[str, StoredTensor]) -> tuple[str, ...]:
    return tuple(sorted({tensor.dtype for tensor in stored.values() if tensor.targets}))


def _commit(place: Place) -> str | None:
    return place.revision if place.folder is None else None


def unknown_license_note(source: str) -> str:
    """Returns the sentence on weights whose card is not in the cache, offline."""
    return (
        f"The licence of {source} is not known: its {REPOCARD_NAME} is not in the cache, and HF_HUB_OFFLINE is set. "
        "Look it up on the Hub, and set --license to it."
    )
