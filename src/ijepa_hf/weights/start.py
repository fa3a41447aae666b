"""Starts a model from weights that exist, to continue pretraining on images of one's own.

One name says where they are: a Hub repo, a folder, or a published `.pth.tar` file. What can be used:

    our two-part folder          both encoders and the predictor are taken
    stock `IJepaModel`           the encoder becomes both encoders; the predictor is new
    `ViTModel`, `ViTMAEModel`    likewise, and with heads or a decoder, without their class token and position table
    published `.pth.tar`         both encoders and the predictor are taken

`open_starting_weights` reads configuration, names and shapes, and refuses what cannot be used before any work is done;
`start_model` makes the model and says in sentences what was changed, dropped, or is new. Nothing is loaded in part:
each tensor of the source is taken bit for bit (in float32), or is one of those stated changes, or is an error.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import errors as hub
from huggingface_hub.constants import REPOCARD_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import (
    CONFIG_NAME,
    IMAGE_PROCESSOR_NAME,
)

from ijepa_hf.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from ijepa_hf.model.configuration_ijepa import IJepaConfig
from ijepa_hf.model.encoder_ijepa import IJepaModel, from_file_name, sincos_position_table
from ijepa_hf.model.modeling_ijepa import PRETRAINING_SUBFOLDER, IJepaForPretraining, IJepaPredictor
from ijepa_hf.runs.cards import read_license
from ijepa_hf.runs.checkpoints import config_fields
from ijepa_hf.weights.locate import (
    _CLASS_TOKEN,
    _ENCODER_KINDS,
    _SAFETENSORS_DTYPES,
    _TABLE,
    USABLE,
    _header,
    _load_torch,
    _named,
    _Place,
    _read_json,
    _root_fields,
    _Stored,
    _weight_files,
)
from ijepa_hf.weights.official_checkpoint import model_from_official, read_official_checkpoint
from ijepa_hf.weights.official_names import PUBLISHED_LICENSE

PUBLISHED_SUFFIXES = (".pth.tar", ".pth")

logger = logging.getLogger(__name__)

_WHOLE, _PUBLISHED = "I-JEPA encoders and predictor", "published I-JEPA checkpoint"
_KERNELS = "embeddings.patch_embeddings.projection.weight"
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
_FIXED_FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "qkv_bias",
    "layer_norm_eps",
)
_PREDICTOR_FIELDS = {  # field -> the same in the predictor's own configuration, where its heads are resolved
    "predictor_hidden_size": "hidden_size",
    "predictor_num_hidden_layers": "num_hidden_layers",
    "predictor_num_attention_heads": "num_attention_heads",
}
_PUBLISHED_EPS = 1e-6
_MOST_PROBLEMS = 10  # listed in one error


@dataclass(frozen=True)
class StartingWeights:
    """Weights that a model can be started from, checked by name and shape, and not loaded yet.

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
        license: What their card says, such as "cc-by-nc-4.0"; `None` where it names none or cannot be read.
        image_mean: Of each channel, of pixels in [0, 1], as they are used to; `None` where they come without an image
            processor that says so.
        image_std: Likewise.
        license_is_known: Whether it is known what their card says; not where the cache, offline, does not hold it.
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
    _stored: tuple[_Stored, ...] = field(default=(), repr=False)
    _dropped: Mapping[str, int] = field(default_factory=dict, repr=False)  # what -> number of tensors
    # of a published file: its tensors, mapped from it where its format allows that
    _published: Mapping[str, Tensor] | None = field(default=None, repr=False, compare=False)


def open_starting_weights(
    name_or_path: str, *, revision: str | None = None, num_attention_heads: int | None = None
) -> StartingWeights:
    """Finds weights and checks all of them that can be checked without reading them: configuration, names, shapes.

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
    if not path.exists() and looks_local:
        raise FileNotFoundError(f"{_named(name_or_path)}: there is no such folder or file.")
    if revision is not None and path.exists():
        raise ValueError(
            f"model_revision={revision!r} is for Hub repos, and {_named(name_or_path)} is on this disk; omit it."
        )
    if path.is_file():
        if not is_published:
            raise ValueError(f"{_named(name_or_path)} is one file; give the folder that it lies in. {USABLE}")
        return _open_published(name_or_path, path, num_attention_heads)
    place = _Place(name_or_path, path if path.is_dir() else None, revision)
    fields, place = _root_fields(place)
    weights = _with_companions(_open_whole(place, fields) or _open_encoder(place, fields), place)
    heads = weights.config.num_attention_heads
    if num_attention_heads not in (None, heads):
        raise ValueError(
            f"num_attention_heads={num_attention_heads}: {name_or_path} says that it has {heads}; write "
            f"num_attention_heads={heads}, or omit it."
        )
    return weights


def check_fits(weights: StartingWeights, config: IJepaConfig, *, new_predictor: bool = False) -> None:
    """Checks that a model of this configuration can be started from these weights, without loading them.

    Image size, channels, masks, loss and dropout may differ. Patch size, width, depth, heads, MLP width, activation,
    biases and the layer norms' epsilon cannot; nor can the predictor's shape, where a trained one is taken.

    Args:
        weights: From `open_starting_weights`.
        config: Of the new model.
        new_predictor: Start with a new predictor although there is a trained one.

    Raises:
        ValueError: If something differs that cannot; names each field, both values, and what to write instead.
    """
    theirs, lines = weights.config, []
    if config.patch_shape != theirs.patch_shape:
        lines.append(_cannot_change("patch_size", config.patch_size, theirs.patch_size, "the encoder has"))
    for name in _FIXED_FIELDS:
        if getattr(config, name) != getattr(theirs, name):
            lines.append(_cannot_change(name, getattr(config, name), getattr(theirs, name), "the encoder has"))
    if weights.has_predictor and not new_predictor:
        ours, trained = config.predictor_config(), theirs.predictor_config()
        for name, own in _PREDICTOR_FIELDS.items():
            if getattr(ours, own) != getattr(trained, own):
                line = _cannot_change(name, getattr(ours, own), getattr(trained, own), "the trained predictor has")
                lines.append(f"{line}, or ask for a new predictor with new_predictor=True")
    if lines:
        raise ValueError(
            f"{_named(weights.source)} ({weights.kind}) cannot start such a model:\n  " + "\n  ".join(lines)
        )


def start_model(
    weights: StartingWeights, config: IJepaConfig, seed: int, *, new_predictor: bool = False
) -> tuple[IJepaForPretraining, list[str]]:
    """Makes a model from weights.

    Position tables are the fixed sin-cos ones of the new grid, of any shape: computed, never stretched. Where the
    number of channels changes, `adapt_channels` says what happens. All else is the source's, bit for bit, in float32.

    Args:
        weights: From `open_starting_weights`.
        config: Of the new model, see `check_fits`.
        seed: The initial weights of a new predictor are a function of it.
        new_predictor: Start with a new predictor although there is a trained one.

    Returns:
        The model on the CPU, ready to train (target encoder frozen, in eval mode), and one sentence for each thing
        that was changed or dropped, or is new.

    Raises:
        ValueError: If the configuration does not fit, or a file is damaged or holds NaN or infinite values.
    """
    check_fits(weights, config, new_predictor=new_predictor)
    takes_predictor = weights.has_predictor and not new_predictor
    state: dict[str, Tensor] = {}
    drifts: dict[str, tuple[float, float]] = {}
    for name, tensor in _read(weights):
        if name.startswith("predictor.") and not takes_predictor:
            continue
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{_named(weights.source)}: {name} holds NaN or infinite values; it is damaged.")
        if name.endswith("position_embeddings"):
            drifts[name] = _drift(tensor, weights.config.grid_size)
            tensor = sincos_position_table(tensor.shape[-1], config.grid_size)
        elif name.endswith(_KERNELS):
            tensor = adapt_channels(tensor, config.num_channels)
        state[name] = tensor
    if not takes_predictor:
        state |= {f"predictor.{name}": tensor for name, tensor in _new_predictor(config, seed).state_dict().items()}
    with torch.device("meta"):
        model = IJepaForPretraining(config)
    model.load_state_dict(state, assign=True)  # strict: none missing, none left over
    notes = [*_encoder_notes(weights), *_table_notes(weights, config, drifts), *_other_notes(weights, config)]
    if not takes_predictor:
        notes.append(_new_predictor_note(weights, config, seed))
    return model.train(), notes


def adapt_channels(kernels: Tensor, num_channels: int) -> Tensor:
    """Patch kernels for another number of channels: the average over the C old ones, times C / C', for each new one.

    An image whose channels are all alike (gray, repeated) then gives the same response before and after, whatever C
    and C' are: 3 to 1 is the sum over the channels, 1 to 3 a third in each. Repeating the old kernels in turn would do
    that only where C divides C', and would claim that the fourth channel is like the first; the average claims
    nothing of the kind. Where channels differ, the response is that to their mean, until training tells them apart.

    Args:
        kernels: float `[D, C, height, width]`.
        num_channels: C', the new number.

    Returns:
        `[D, C', height, width]`, of the same dtype; `kernels` itself where C' = C.
    """
    if kernels.shape[1] == num_channels:
        return kernels
    kernel = kernels.double().sum(1, keepdim=True) / num_channels
    return kernel.to(kernels.dtype).repeat(1, num_channels, 1, 1)


# -- finding files ---------------------------------------------------------------------------------------------------


# -- opening ---------------------------------------------------------------------------------------------------------


def _open_published(source: str, path: Path, heads: int | None) -> StartingWeights:
    try:
        model = model_from_official(read_official_checkpoint(path), num_attention_heads=heads)
    except ValueError as error:
        raise ValueError(f"{_named(source)} cannot be used: {error}") from error
    state = model.state_dict()
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in state.values()}
    return StartingWeights(
        source,
        _PUBLISHED,
        model.config.replace(),
        True,
        dtypes=tuple(sorted(dtypes)),
        license=PUBLISHED_LICENSE,
        image_mean=IMAGENET_MEAN,
        image_std=IMAGENET_STD,
        _published=state,
    )


def _with_companions(weights: StartingWeights, place: _Place) -> StartingWeights:
    """Adds what the files beside the weights say: the card's licence, the image processor's normalisation.

    Offline, a file that is merely not in the cache must not pass for one that does not exist.
    """
    card, processor = place.find(REPOCARD_NAME), place.find(IMAGE_PROCESSOR_NAME)
    if processor is None and not place.is_known_to_lack(IMAGE_PROCESSOR_NAME):
        raise FileNotFoundError(
            f"{_named(place.name)}: the cache does not hold its {IMAGE_PROCESSOR_NAME}, and HF_HUB_OFFLINE is set, so "
            "it is not known how its images are normalised. Run `hf download "
            f"{place.name} {IMAGE_PROCESSOR_NAME} {REPOCARD_NAME}` where the Hub can be reached; or give the repo's "
            "folder in the cache, with --image_mean and --image_std."
        )
    license_is_known = card is not None or place.is_known_to_lack(REPOCARD_NAME)
    if not license_is_known:
        logger.warning(_unknown_license_note(place.name))
    fields = _read_json(place, processor) if processor is not None else {}
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


def _open_whole(place: _Place, root: Mapping[str, Any]) -> StartingWeights | None:
    """Both encoders and the predictor, at the root or in `pretraining/`; `None` where there is an encoder only."""
    fields, folder = root, ""
    if root["model_type"] != "ijepa":
        return None
    if not _is_whole(root):
        folder = f"{PRETRAINING_SUBFOLDER}/"
        path = place.find(folder + CONFIG_NAME)
        if path is None:
            _check_lacks_pretraining(place, root)
            return None
        fields = _read_json(place, path)
        if not _is_whole(fields):
            raise ValueError(f"{_named(place.name)}: {folder}{CONFIG_NAME} is not that of an IJepaForPretraining.")
    config = _config(place, fields)
    stored = {name: replace(tensor, targets=(name,)) for name, tensor in _stored_tensors(place, folder).items()}
    with torch.device("meta"):
        expected = {name: tuple(value.shape) for name, value in IJepaForPretraining(config).state_dict().items()}
    _check_tensors(place, stored, expected)
    return StartingWeights(
        place.name, _WHOLE, config, True, _commit(place), _dtypes(stored), _stored=tuple(stored.values())
    )


def _open_encoder(place: _Place, fields: Mapping[str, Any]) -> StartingWeights:
    kind = _ENCODER_KINDS[fields["model_type"]]
    config = _config(place, fields)
    with torch.device("meta"):
        expected = {name: tuple(value.shape) for name, value in IJepaModel(config).state_dict().items()}
    taken = frozenset(expected)
    if kind.has_class_token:
        expected[_TABLE] = (1, config.num_patches + 1, config.hidden_size)
        expected[_CLASS_TOKEN] = (1, 1, config.hidden_size)
    stored: dict[str, _Stored] = {}
    dropped: dict[str, int] = {}
    for full_name, tensor in _stored_tensors(place, "").items():
        name = full_name.removeprefix(kind.prefix)
        what = next((words for beginning, words in kind.dropped.items() if name.startswith(beginning)), None)
        if what is not None:
            dropped[what] = dropped.get(what, 0) + 1
            if name not in expected:
                continue
        if name in stored:
            raise ValueError(f"{_named(place.name)} holds {name} twice, with and without {kind.prefix!r}.")
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
        _stored=tuple(tensor for tensor in stored.values() if tensor.targets),
        _dropped=dropped,
    )


def _is_whole(fields: Mapping[str, Any]) -> bool:
    return fields.get("model_type") == "ijepa" and "IJepaForPretraining" in (fields.get("architectures") or [])


def _check_lacks_pretraining(place: _Place, root: Mapping[str, Any]) -> None:
    """Offline, a repo of ours whose second part is merely not in the cache must not pass for an encoder only."""
    wanted = f"{PRETRAINING_SUBFOLDER}/{CONFIG_NAME}"
    if "predictor_hidden_size" in root and not place.is_known_to_lack(wanted):
        raise FileNotFoundError(
            f"{_named(place.name)} was written by ijepa-hf, but the cache does not hold its {wanted}, and "
            "HF_HUB_OFFLINE is set: download the repo first, or give its folder in the cache to start from the "
            "encoder alone."
        )


def _config(place: _Place, fields: Mapping[str, Any]) -> IJepaConfig:
    """The source's architecture as our configuration; what its file leaves out has the default of its own class."""
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
        raise ValueError(f"{_named(place.name)}: its {CONFIG_NAME} cannot be used: {error}") from error


def _stored_tensors(place: _Place, folder: str) -> dict[str, _Stored]:
    """All tensors of the files, under the names of the model; the index of shards is held to what is in them."""
    files, index = _weight_files(place, folder)
    stored: dict[str, _Stored] = {}
    found: dict[str, Path] = {}
    for file in files:
        for tensor in _header(place, file):
            name = from_file_name(tensor.name)
            if name in stored:
                raise ValueError(
                    f"{_named(place.name)} holds {name} twice, in {file.name} and {stored[name].file.name}."
                )
            stored[name] = tensor
            found[tensor.name] = file
    if index is not None and index != found:
        wrong = sorted({name for name, file in {*index.items()} ^ {*found.items()}})
        raise ValueError(
            f"{_named(place.name)}: the index of shards and the shards differ in {_listed(wrong)}; they are damaged, "
            "or of two models."
        )
    return stored


def _check_tensors(place: _Place, stored: Mapping[str, _Stored], expected: Mapping[str, tuple[int, ...]]) -> None:
    problems = [f"{name} is missing" for name in sorted(expected.keys() - stored.keys())]
    problems += [f"{name} is unexpected" for name in sorted(stored.keys() - expected.keys())]
    for name in sorted(expected.keys() & stored.keys()):
        tensor = stored[name]
        if tensor.shape != expected[name]:
            problems.append(f"{name} has shape {list(tensor.shape)}, expected {list(expected[name])}")
        if tensor.dtype not in _SAFETENSORS_DTYPES.values():
            problems.append(f"{name} is stored as {tensor.dtype}, which is no plain float")
    if problems:
        more = [f"and {len(problems) - _MOST_PROBLEMS} more"] if len(problems) > _MOST_PROBLEMS else []
        raise ValueError(
            f"{_named(place.name)}: its weights are not those of its {CONFIG_NAME}; nothing was loaded:\n  "
            + "\n  ".join(problems[:_MOST_PROBLEMS] + more)
        )


def _dtypes(stored: Mapping[str, _Stored]) -> tuple[str, ...]:
    return tuple(sorted({tensor.dtype for tensor in stored.values() if tensor.targets}))


def _commit(place: _Place) -> str | None:
    return place.revision if place.folder is None else None


# -- reading ---------------------------------------------------------------------------------------------------------


def _read(weights: StartingWeights) -> Iterator[tuple[str, Tensor]]:
    """All tensors under their names in the model, float32, each in memory of its own (a file's map can go away)."""
    for name, tensor in (weights._published or {}).items():
        yield name, _own(tensor)
    for file in dict.fromkeys(tensor.file for tensor in weights._stored):
        stored = [each for each in weights._stored if each.file == file]
        try:
            yield from _read_file(weights.source, file, stored)
        except (OSError, SafetensorError, KeyError) as error:
            raise ValueError(
                f"{_named(weights.source)}: {file.name} is not what it was when opened: {error}"
            ) from error


def _read_file(source: str, file: Path, stored: list[_Stored]) -> Iterator[tuple[str, Tensor]]:
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as opened:
            for tensor in stored:
                for target in tensor.targets:
                    yield target, _own(opened.get_tensor(tensor.name))
    else:
        content = _load_torch(source, file)
        for tensor in stored:
            for target in tensor.targets:
                yield target, _own(content[tensor.name])


def _own(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def _drift(table: Tensor, grid_size: tuple[int, int]) -> tuple[float, float]:
    """How far a table is from the fixed one of its grid, largest and mean; a class token's row does not count."""
    fixed = sincos_position_table(table.shape[-1], grid_size)
    distance = (table[:, -fixed.shape[1] :] - fixed).abs()
    return float(distance.max()), float(distance.mean())


def _new_predictor(config: IJepaConfig, seed: int) -> IJepaPredictor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return IJepaPredictor(config)


# -- words -----------------------------------------------------------------------------------------------------------


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:_MOST_PROBLEMS])
    return f"{shown} and {len(names) - _MOST_PROBLEMS} more" if len(names) > _MOST_PROBLEMS else shown


def _cannot_change(name: str, asked: object, has: object, who: str) -> str:
    return f"{name}={asked!r}: {who} {has!r}, which cannot change; write {name}={has!r}"


def _encoder_notes(weights: StartingWeights) -> list[str]:
    if weights.has_predictor:  # then there are two encoders, too
        return []
    notes = [f"The {weights.kind} of {weights.source} is the start of both the context and the target encoder."]
    notes += [
        f"Its {what} is dropped ({count} tensor{'s' * (count > 1)}): I-JEPA has none."
        for what, count in weights._dropped.items()
    ]
    return notes


def _table_notes(
    weights: StartingWeights, config: IJepaConfig, drifts: Mapping[str, tuple[float, float]]
) -> list[str]:
    notes = []
    for part, words in (((*_ENCODERS,), "encoder"), (("predictor.",), "predictor")):
        largest, mean = max((drift for name, drift in drifts.items() if name.startswith(part)), default=(0.0, 0.0))
        if largest > 0:
            notes.append(
                f"The position table of its {words} is replaced by the fixed sin-cos one, from which it differed by "
                f"up to {largest:.2g}, {mean:.2g} on average."
            )
    old, new = weights.config.grid_size, config.grid_size
    if old != new:
        notes.append(
            f"Images of {'x'.join(map(str, config.image_shape))} instead of "
            f"{'x'.join(map(str, weights.config.image_shape))} pixels: the position tables are those of a grid of "
            f"{new[0]}x{new[1]} patches (before: {old[0]}x{old[1]}), computed, not stretched."
        )
    return notes


def _other_notes(weights: StartingWeights, config: IJepaConfig) -> list[str]:
    notes = [] if weights.license_is_known else [_unknown_license_note(weights.source)]
    old, new = weights.config.num_channels, config.num_channels
    if old != new:
        notes.append(
            f"Images of {new} channel{'s' * (new > 1)} instead of {old}: each patch kernel is the average over the "
            f"old channels times {old}/{new}, so that content that is alike in all channels gives the same response."
        )
    if weights.dtypes != ("float32",):
        notes.append(f"The weights are {' and '.join(weights.dtypes)} on disk; they are trained in float32.")
    if config.layer_norm_eps != _PUBLISHED_EPS:
        notes.append(
            f"layer_norm_eps={config.layer_norm_eps:g} is kept as its encoder has it (published I-JEPA training: "
            f"{_PUBLISHED_EPS:g})."
        )
    return notes


def _unknown_license_note(source: str) -> str:
    return (
        f"The licence of {source} is not known: its {REPOCARD_NAME} is not in the cache, and HF_HUB_OFFLINE is set. "
        "Look it up on the Hub, and set --license to it."
    )


def _new_predictor_note(weights: StartingWeights, config: IJepaConfig, seed: int) -> str:
    own = config.predictor_config()
    why = "new_predictor was asked for" if weights.has_predictor else "the source has none"
    return (
        f"The predictor is new ({why}): {own.num_hidden_layers} layers of width {own.hidden_size} with "
        f"{own.num_attention_heads} heads, initial weights from seed {seed}."
    )
