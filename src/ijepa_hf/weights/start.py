"""Starts a model from existing weights, to continue pretraining on other images.

Each tensor of the weights is copied bit for bit (in float32), or the notes of `start_model` name the change, or there
is an error.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ijepa_hf.model.configuration_ijepa import IJepaConfig
from ijepa_hf.model.encoder_ijepa import sincos_position_table
from ijepa_hf.model.modeling_ijepa import IJepaForPretraining, IJepaPredictor
from ijepa_hf.weights.locate import StoredTensor, load_torch, named
from ijepa_hf.weights.official_names import PUBLISHED_LAYER_NORM_EPS
from ijepa_hf.weights.starting_weights import StartingWeights, unknown_license_note

_KERNELS = "embeddings.patch_embeddings.projection.weight"
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
            f"{named(weights.source)} ({weights.kind}) cannot start such a model:\n  " + "\n  ".join(lines)
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
            raise ValueError(f"{named(weights.source)}: {name} holds NaN or infinite values; it is damaged.")
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
    """Adapts patch kernels to C' channels: each new kernel is the average of the C old ones, times C / C'.

    An image whose channels are all equal (gray, repeated) then gives the same response before and after, for any C and
    C': from 3 to 1 channels the kernel is the sum over the channels, from 1 to 3 it is a third in each. Repeating the
    old kernels in turn would do that only if C divides C', and would treat the fourth channel like the first. If
    channels differ, the response is that to their mean, until training has learnt different kernels.

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


# -- reading ---------------------------------------------------------------------------------------------------------


def _read(weights: StartingWeights) -> Iterator[tuple[str, Tensor]]:
    """Yields all tensors under their names in the model, as float32 copies (a mapped file can disappear)."""
    for name, tensor in (weights.published or {}).items():
        yield name, _own(tensor)
    for file in dict.fromkeys(tensor.file for tensor in weights.stored):
        stored = [each for each in weights.stored if each.file == file]
        try:
            yield from _read_file(weights.source, file, stored)
        except (OSError, SafetensorError, KeyError) as error:
            raise ValueError(
                f"{named(weights.source)}: {file.name} is not what it was when opened: {error}"
            ) from error


def _read_file(source: str, file: Path, stored: list[StoredTensor]) -> Iterator[tuple[str, Tensor]]:
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as opened:
            for tensor in stored:
                for target in tensor.targets:
                    yield target, _own(opened.get_tensor(tensor.name))
    else:
        content = load_torch(source, file)
        for tensor in stored:
            for target in tensor.targets:
                yield target, _own(content[tensor.name])


def _own(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def _drift(table: Tensor, grid_size: tuple[int, int]) -> tuple[float, float]:
    """Returns the largest and the mean distance of a table from the fixed one of its grid, without a class token."""
    fixed = sincos_position_table(table.shape[-1], grid_size)
    distance = (table[:, -fixed.shape[1] :] - fixed).abs()
    return float(distance.max()), float(distance.mean())


def _new_predictor(config: IJepaConfig, seed: int) -> IJepaPredictor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return IJepaPredictor(config)


# -- words -----------------------------------------------------------------------------------------------------------


def _cannot_change(name: str, asked: object, has: object, who: str) -> str:
    return f"{name}={asked!r}: {who} {has!r}, which cannot change; write {name}={has!r}"


def _encoder_notes(weights: StartingWeights) -> list[str]:
    if weights.has_predictor:  # then there are two encoders, too
        return []
    notes = [f"The {weights.kind} of {weights.source} is the start of both the context and the target encoder."]
    notes += [
        f"Its {what} is dropped ({count} tensor{'s' * (count > 1)}): I-JEPA has none."
        for what, count in weights.dropped.items()
    ]
    return notes


def _table_notes(
    weights: StartingWeights, config: IJepaConfig, drifts: Mapping[str, tuple[float, float]]
) -> list[str]:
    notes = []
    for part, words in ((("ijepa.", "context_encoder."), "encoder"), (("predictor.",), "predictor")):
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
    notes = [] if weights.license_is_known else [unknown_license_note(weights.source)]
    old, new = weights.config.num_channels, config.num_channels
    if old != new:
        notes.append(
            f"Images of {new} channel{'s' * (new > 1)} instead of {old}: each patch kernel is the average over the "
            f"old channels times {old}/{new}, so that content that is alike in all channels gives the same response."
        )
    if weights.dtypes != ("float32",):
        notes.append(f"The weights are {' and '.join(weights.dtypes)} on disk; they are trained in float32.")
    if config.layer_norm_eps != PUBLISHED_LAYER_NORM_EPS:
        notes.append(
            f"layer_norm_eps={config.layer_norm_eps:g} is kept as its encoder has it (published I-JEPA training: "
            f"{PUBLISHED_LAYER_NORM_EPS:g})."
        )
    return notes


def _new_predictor_note(weights: StartingWeights, config: IJepaConfig, seed: int) -> str:
    own = config.predictor_config()
    why = "new_predictor was asked for" if weights.has_predictor else "the source has none"
    return (
        f"The predictor is new ({why}): {own.num_hidden_layers} layers of width {own.hidden_size} with "
        f"{own.num_attention_heads} heads, initial weights from seed {seed}."
    )
