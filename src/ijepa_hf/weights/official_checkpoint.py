"""Reads a published I-JEPA checkpoint (`*.pth.tar`) without running code in it.

A file holds three networks (context encoder, target encoder, predictor), numbers about the run, and the state of its
optimiser (`official_optimizer.py`). The table in `official_names.py` gives our name of each tensor. All three networks
are read, or none. The file stores no architecture: width, depth, MLP width, patch and grid follow from shapes, the
number of heads from the published sizes.

A file is unpickled with `weights_only=True`. It is mapped into memory; only a file that torch wrote before 1.6 cannot
be mapped and is read whole.
"""

import math
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ijepa_hf.escaping import on_one_line
from ijepa_hf.model.configuration_ijepa import IJepaConfig
from ijepa_hf.model.encoder_ijepa import sincos_position_table
from ijepa_hf.model.modeling_ijepa import IJepaForPretraining
from ijepa_hf.weights.official_names import (
    NAME_PREFIX,
    PARTS,
    PUBLISHED_HEADS,
    PUBLISHED_LAYER_NORM_EPS,
    PUBLISHED_MASKING_STRATEGY,
    PUBLISHED_PATCH_INIT_STD,
    SCALARS,
    Networks,
    our_names,
)

_ENTRIES = (*PARTS, "opt", "scaler", *SCALARS)
_LISTED_PROBLEMS = 40
# Published training averages the (constant) target table too, which rounds: up to 2e-7 in six steps.
_POSITION_TOLERANCE = 1e-3


# -- reading a file --------------------------------------------------------------------------------------------------


def read_official_checkpoint(path: Path) -> dict[str, dict[str, Tensor]]:
    """Reads the three networks of a checkpoint.

    Args:
        path: The `.pth.tar` file.

    Returns:
        `encoder`, `target_encoder` and `predictor`, each names to float32 tensors, without the `module.` prefix. They
        are mapped from the file, which must stay as it is while they are used.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged or cannot be read without running code, if a network is missing, or if something
            in them is no plain float32 tensor.
    """
    return networks_of(read_contents(path), path)


def networks_of(contents: Mapping[str, Any], path: Path) -> dict[str, dict[str, Tensor]]:
    """Takes the three networks out of what a file holds.

    Args:
        contents: As `read_contents` returns them.
        path: The file, for messages.

    Returns:
        As `read_official_checkpoint` does. The tensors are those in `contents`, not copies.

    Raises:
        ValueError: If a network is missing, if there is an unknown one, or if something in them is no plain float32
            tensor; all are listed.
    """
    missing = [part for part in PARTS if not isinstance(contents.get(part), Mapping)]
    if missing:
        found = ", ".join(repr(name) for name in contents if isinstance(name, str))
        raise ValueError(f"checkpoint={str(path)!r} lacks {', '.join(missing)}; it holds {found or 'nothing known'}.")
    unknown = [name for name, value in contents.items() if name not in _ENTRIES and _holds_tensors(value)]
    problems = [f"{name!r} is unexpected" for name in unknown]
    networks: dict[str, dict[str, Tensor]] = {}
    owners: dict[int, str] = {}
    for part in PARTS:
        networks[part] = {}
        for key, value in contents[part].items():
            name = key.removeprefix(NAME_PREFIX) if isinstance(key, str) else repr(type(key))
            problem = "is there twice" if name in networks[part] else unlike_published(value, owners)
            if problem is not None:
                problems.append(f"{part}.{name!r} {problem}")
                continue
            networks[part][name] = value.detach()
            owners[value.untyped_storage().data_ptr()] = f"{part}.{name}"
    if problems:
        raise ValueError(
            f"checkpoint={str(path)!r} is no published I-JEPA checkpoint:\n  " + format_problems(problems)
        )
    return networks


def read_contents(path: Path) -> dict[str, Any]:
    """Reads everything in a checkpoint; first checks its checksums, if the format has them.

    Args:
        path: The `.pth.tar` file.

    Returns:
        The dictionary in it; its entries are not checked. Tensors are mapped from the file if its format allows that;
        the file must not change while they are used.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, cannot be read without running code, or holds no dictionary.
    """
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint={str(path)!r}: there is no such file.")
    try:
        if zipfile.is_zipfile(path):
            _check_records(path)
        contents = unpickle(path)
    except OSError:
        raise
    except Exception as error:  # a damaged or hostile pickle can make anything go wrong
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"checkpoint={str(path)!r} cannot be read as a published I-JEPA checkpoint (damaged, or it holds code, "
            f"which is never run): {on_one_line(reason)}"
        ) from error
    if not isinstance(contents, Mapping):
        raise ValueError(f"checkpoint={str(path)!r} holds a {type(contents).__name__}, no dictionary of networks.")
    return dict(contents)


def unpickle(path: Path) -> Any:
    """Reads a file without checking its checksums; no code in it is run.

    Args:
        path: The `.pth.tar` file.

    Returns:
        What it holds; tensors are mapped from it where its format allows that.

    Raises:
        Exception: Whatever torch raises on a damaged file; `read_contents` turns that into a message.
    """
    # files that torch wrote before 1.6 are no zip files and cannot be mapped
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def _check_records(path: Path) -> None:
    """Checks the checksums, which torch ignores: a damaged download can have wrong weights and no other sign."""
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise ValueError("its records are compressed, which torch never does")
        if sum(record.file_size for record in records) > path.stat().st_size:
            raise ValueError("its records overlap")
        damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of its record {damaged!r} is wrong")


def unlike_published(value: Any, owners: Mapping[int, str]) -> str | None:
    """Returns why a value is no tensor of a published file; `None` if it is one. Shapes are checked elsewhere."""
    if not isinstance(value, Tensor):
        return f"is a {type(value).__name__}, no tensor"
    if value.layout is not torch.strided or value.device.type != "cpu" or value.is_quantized or value.is_neg():
        return "is no plain tensor"
    if value.dtype != torch.float32:
        return f"has dtype {value.dtype}; published weights are float32, so convert them first"
    if not value.is_contiguous():
        return f"is not contiguous in memory: shape {list(value.shape)}, strides {list(value.stride())}"
    if value.untyped_storage().data_ptr() in owners:
        return f"shares its memory with {owners[value.untyped_storage().data_ptr()]}"
    return None


def _holds_tensors(value: Any) -> bool:
    values = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else [value]
    return any(isinstance(entry, Tensor) for entry in values)


def format_problems(problems: Sequence[str]) -> str:
    """Writes problems one below the other, for the end of a message.

    Args:
        problems: One sentence each.

    Returns:
        The first forty of them, and how many more there are.
    """
    shown = list(problems[:_LISTED_PROBLEMS])
    if len(problems) > len(shown):
        shown.append(f"and {len(problems) - len(shown)} more")
    return "\n  ".join(shown)


def read_scalars(contents: Mapping[str, Any]) -> dict[str, int | float | None]:
    """Reads the numbers beside the networks.

    Args:
        contents: As `read_contents` returns them.

    Returns:
        Each of `SCALARS`; `None` if the file has no finite number.
    """
    return {name: finite_number(contents.get(name)) for name in SCALARS}


def finite_number(value: Any) -> int | float | None:
    """Returns a finite number as it is, and `None` for anything else."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None


# -- the model -------------------------------------------------------------------------------------------------------


def model_from_official(networks: Networks, *, num_attention_heads: int | None = None) -> IJepaForPretraining:
    """Makes a model of the three networks of a checkpoint.

    Args:
        networks: As `read_official_checkpoint` returns them.
        num_attention_heads: Heads of both networks; needed only where the encoder is no published size.

    Returns:
        The model in eval mode. Its tensors are the checkpoint's own memory, not copies.

    Raises:
        ValueError: If a tensor is missing, unexpected, of the wrong shape, or not finite; all are listed.
    """
    config = config_from_official(networks, num_attention_heads=num_attention_heads)
    with torch.device("meta"):
        model = IJepaForPretraining(config)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    state: dict[str, Tensor] = {}
    problems: list[str] = []
    for part in PARTS:
        for name, tensor in networks[part].items():
            keys = our_names(part, name)
            if not keys or not expected.keys() >= set(keys):
                problems.append(f"{part}.{name!r} is unexpected")
            else:
                state |= zip(keys, cut(tensor, len(keys)), strict=True)
    problems += [f"{name} is missing" for name in expected if name not in state]
    wrong = {name: tensor for name, tensor in state.items() if tensor.shape != expected[name]}
    problems += [f"{name} has shape {list(it.shape)}, expected {list(expected[name])}" for name, it in wrong.items()]
    right = {name: tensor for name, tensor in state.items() if name not in wrong}
    problems += [f"{name} has NaN or infinite values" for name, tensor in right.items() if not all_finite(tensor)]
    problems += _misplaced_tables(right, config)
    if problems:
        raise ValueError("the checkpoint does not fit; nothing was loaded:\n  " + format_problems(problems))
    model.load_state_dict(state, assign=True)
    for trained in (model.context_encoder, model.predictor):
        trained.requires_grad_(True)
    model.ijepa.requires_grad_(False)
    return model.eval()


def config_from_official(networks: Networks, *, num_attention_heads: int | None = None) -> IJepaConfig:
    """Reads the architecture off the shapes.

    Masks are drawn as the published runs drew them, where the grid is large enough for that sampler, and as this
    package does by default where not.

    Args:
        networks: As `read_official_checkpoint` returns them.
        num_attention_heads: Heads of both networks; looked up among the published sizes if not given.

    Returns:
        The configuration.

    Raises:
        ValueError: If a tensor whose shape is needed is missing or has the wrong number of dimensions, layers are
            missing, the grid is no square, or the heads are not known.
    """
    _check_telling_tensors(networks)
    encoder, predictor = networks["target_encoder"], networks["predictor"]
    width, channels, patch_height, patch_width = encoder["patch_embed.proj.weight"].shape
    patches = encoder["pos_embed"].shape[1]
    side = math.isqrt(patches)
    if side * side != patches or patch_height != patch_width:
        raise ValueError(
            f"the checkpoint has {patches} patches of {patch_height}x{patch_width} pixels; published code makes "
            "square grids of square patches only."
        )
    if num_attention_heads is not None and num_attention_heads < 1:
        raise ValueError(f"num_attention_heads={num_attention_heads} must be at least 1; ViT-H has 16.")
    heads = num_attention_heads or PUBLISHED_HEADS.get(width)
    if heads is None:
        raise ValueError(
            f"an encoder of width {width} is no published size, and the file does not say its number of heads: add "
            "--num_attention_heads."
        )
    config = IJepaConfig(
        image_size=side * patch_height,
        patch_size=patch_height,
        num_channels=channels,
        hidden_size=width,
        num_hidden_layers=_depth(encoder, "blocks"),
        num_attention_heads=heads,
        intermediate_size=encoder["blocks.0.mlp.fc1.weight"].shape[0],
        qkv_bias="blocks.0.attn.qkv.bias" in encoder,
        layer_norm_eps=PUBLISHED_LAYER_NORM_EPS,
        predictor_hidden_size=predictor["predictor_embed.weight"].shape[0],
        predictor_num_hidden_layers=_depth(predictor, "predictor_blocks"),
        patch_init_std=PUBLISHED_PATCH_INIT_STD,
    )
    try:  # the architecture has been accepted, so only the masks can be refused here
        return config.replace(masking_strategy=PUBLISHED_MASKING_STRATEGY)
    except ValueError:
        return config


def _check_telling_tensors(networks: Networks) -> None:
    telling = {
        "target_encoder": {"patch_embed.proj.weight": 4, "pos_embed": 3, "blocks.0.mlp.fc1.weight": 2},
        "predictor": {"predictor_embed.weight": 2, "predictor_blocks.0.mlp.fc1.weight": 2},
    }
    named = [(part, name, ndim) for part, names in telling.items() for name, ndim in names.items()]
    lacking = [f"{part}.{name}" for part, name, _ in named if name not in networks[part]]
    if lacking:
        raise ValueError(f"the checkpoint lacks {', '.join(lacking)}, which say what the architecture is.")
    for part, name, ndim in named:
        shape = list(networks[part][name].shape)
        if len(shape) != ndim or 0 in shape:
            raise ValueError(f"{part}.{name} has shape {shape}; it needs {ndim} dimensions, none of them 0.")
    channels = networks["target_encoder"]["patch_embed.proj.weight"].shape[1]
    if channels != 3:
        raise ValueError(f"the checkpoint is for images of {channels} channels; published code reads 3, RGB.")


def _depth(state: Mapping[str, Tensor], blocks: str) -> int:
    numbers = {match[1] for name in state if (match := re.match(rf"{blocks}\.([0-9]+)\.", name))}
    lacking = {str(layer) for layer in range(len(numbers))} - numbers
    if lacking:
        raise ValueError(
            f"{blocks} are numbered with gaps: {len(numbers)} of them, but no {', '.join(sorted(lacking)[:10])}; "
            "tensors are missing."
        )
    return len(numbers)


def cut(tensor: Tensor, pieces: int) -> Sequence[Tensor]:
    """Cuts a tensor along its first axis; returns it whole if that is impossible, so that its shape is refused."""
    if pieces == 1 or tensor.ndim == 0:
        return [tensor] * pieces
    return tensor.tensor_split(pieces)


def all_finite(tensor: Tensor) -> bool:
    """Says whether a tensor has neither NaN nor infinite values.

    Args:
        tensor: Of any shape but an empty one; float.

    Returns:
        `True` if all values are finite.
    """
    low, high = tensor.aminmax()  # one pass and no copy; NaN comes through
    return math.isfinite(low) and math.isfinite(high)


def _misplaced_tables(state: Mapping[str, Tensor], config: IJepaConfig) -> Iterator[str]:
    """Finds position tables that are not the fixed sin-cos ones: the file then has another layout of patches."""
    for name, table in state.items():
        if not name.endswith("position_embeddings"):
            continue
        expected = sincos_position_table(table.shape[-1], config.grid_size)
        if not float((table - expected).abs().max()) <= _POSITION_TOLERANCE:
            yield f"{name} is not the fixed sin-cos table of a {config.grid_size[0]}x{config.grid_size[1]} grid"
