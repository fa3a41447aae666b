"""Published I-JEPA checkpoints (`*.pth.tar`) into this package's model folder, and back.

One table of names (`ENCODER_NAMES`, `PREDICTOR_NAMES`) says where each tensor goes, in both directions; all else
follows from it. A checkpoint holds the context encoder, the target encoder and the predictor; all three are carried
over, nothing is loaded in part. The file stores no architecture: width, depth, MLP width, patch and grid follow from
shapes, the number of heads from the published sizes. Its optimiser state is numbered: `optimizer_groups` says which
number is which tensor.

    convert              FILE.pth.tar -> a model folder and, if asked, the `checkpoint-<step>/` to go on from
    convert_to_official  a model folder, a run's too -> FILE.pth.tar

A file is unpickled with `weights_only=True`: no code in it is run. It is mapped into memory, not read (the format that
torch wrote before 1.6 cannot be: such a file is read whole), and what is written is read back and compared, tensor by
tensor, so that the peak of memory stays near the size of the weights.
"""

import contextlib
import dataclasses
import hashlib
import inspect
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import ModelCard, ModelCardData
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ijepa_hf.arguments import IMAGENET_MEAN, IMAGENET_STD, ModelArguments
from ijepa_hf.checkpointing import MODEL_FILE, OPTIMIZER_FILE, Checkpoint, config_fields, find_latest, save_checkpoint
from ijepa_hf.configuration_ijepa import IJepaConfig
from ijepa_hf.export import WEIGHTS_FILE, export_model, exported_step, flush_to_disk, write_atomically
from ijepa_hf.masking import draw_masks
from ijepa_hf.modeling_ijepa import (
    PRETRAINING_SUBFOLDER,
    IJepaForPretraining,
    from_file_name,
    sincos_position_table,
    to_file_name,
)

REPORT_FILE = "conversion.json"
PARITY_TOLERANCE = 1e-4  # of the largest value: float32 sums in another order; a wrong head or layer is off by tenths

_Networks = Mapping[str, Mapping[str, Tensor]]
_PARITY_IMAGES = 2
_LISTED_PROBLEMS = 40
_ADAMW_SLOTS = ("step", "exp_avg", "exp_avg_sq")

# -- the table -------------------------------------------------------------------------------------------------------

_BLOCK = {
    "norm1": ("layernorm_before",),
    "attn.qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    "attn.proj": ("attention.o_proj",),
    "norm2": ("layernorm_after",),
    "mlp.fc1": ("mlp.fc1",),
    "mlp.fc2": ("mlp.fc2",),
}


def _with_weight_and_bias(modules: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    return {
        f"{theirs}.{kind}": tuple(f"{name}.{kind}" for name in ours)
        for theirs, ours in modules.items()
        for kind in ("weight", "bias")
    }


# published name -> ours, in the order of the published files; three names on the right: the tensor is cut in three
# along its first axis; `*` stands for the layer's number
ENCODER_NAMES: dict[str, tuple[str, ...]] = {
    "pos_embed": ("embeddings.position_embeddings",),
    **_with_weight_and_bias(
        {
            "patch_embed.proj": ("embeddings.patch_embeddings.projection",),
            **{f"blocks.*.{theirs}": tuple(f"layers.*.{name}" for name in ours) for theirs, ours in _BLOCK.items()},
            "norm": ("layernorm",),
        }
    ),
}
PREDICTOR_NAMES: dict[str, tuple[str, ...]] = {
    "mask_token": ("mask_token",),
    "predictor_pos_embed": ("position_embeddings",),
    **_with_weight_and_bias(
        {
            "predictor_embed": ("embed",),
            **{
                f"predictor_blocks.*.{theirs}": tuple(f"layers.*.{name}" for name in ours)
                for theirs, ours in _BLOCK.items()
            },
            "predictor_norm": ("layernorm",),
            "predictor_proj": ("project",),
        }
    ),
}
# part of the checkpoint -> part of our model, and its names
PARTS = {
    "encoder": ("context_encoder", ENCODER_NAMES),
    "predictor": ("predictor", PREDICTOR_NAMES),
    "target_encoder": ("ijepa", ENCODER_NAMES),
}
TRAINED_PARTS = ("encoder", "predictor")
_SCALARS = ("epoch", "loss", "batch_size", "world_size", "lr")
_ENTRIES = (*PARTS, "opt", "scaler", *_SCALARS)
_PREFIX = "module."  # of every published name: the networks were wrapped for distributed training
_FROZEN = ("pos_embed", "predictor_pos_embed")  # in the optimiser's groups, but never given a gradient or a state
PUBLISHED_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16}  # encoder width -> heads
PUBLISHED_LAYER_NORM_EPS = 1e-6
PUBLISHED_PATCH_INIT_STD = 0.02
PUBLISHED_MASKING_STRATEGY = "multi_block_official"
# Published training averages the (constant) target table too, which rounds: up to 2e-7 in six steps.
_POSITION_TOLERANCE = 1e-3


def translate(name: str, names: Mapping[str, tuple[str, ...]]) -> tuple[str, ...] | None:
    """Our names of a published tensor.

    Args:
        name: E.g. `blocks.3.attn.qkv.weight`.
        names: `ENCODER_NAMES` or `PREDICTOR_NAMES`.

    Returns:
        One or three names, or `None` where the table has none.
    """
    layer = re.search(r"\.([0-9]+)\.", name)
    pattern = name.replace(layer[0], ".*.", 1) if layer else name
    if pattern not in names or (layer is None and "*" in name):
        return None
    return tuple(ours.replace("*", layer[1] if layer else "") for ours in names[pattern])


def official_names(config: IJepaConfig) -> dict[str, list[str]]:
    """The names in a published file of this architecture, in its order: that of the modules and of the optimiser.

    Args:
        config: The architecture.

    Returns:
        For each part of the file its names, without the `module.` prefix.
    """
    depths = {"encoder": config.num_hidden_layers, "target_encoder": config.num_hidden_layers}
    depths["predictor"] = config.predictor_num_hidden_layers
    found = {}
    for part, (_, names) in PARTS.items():
        patterns = [name for name in names if config.qkv_bias or not name.endswith("qkv.bias")]
        blocks = [name for name in patterns if "*" in name]
        first = patterns.index(blocks[0])
        layers = [name.replace("*", str(layer)) for layer in range(depths[part]) for name in blocks]
        found[part] = patterns[:first] + layers + patterns[first + len(blocks) :]
    return found


def optimizer_groups(networks: _Networks) -> list[list[tuple[str, str]]]:
    """Which tensors the published optimiser holds, group by group; its state numbers them through in this order.

    Encoder decayed, predictor decayed, encoder not decayed, predictor not decayed; biases and 1-D tensors do not
    decay. The frozen position tables take part in the numbering and have no state.

    Args:
        networks: As `read_official_checkpoint` returns them; order and dimensions count, values do not.

    Returns:
        Four lists of (part, name).
    """

    def members(part: str, decays: bool) -> list[tuple[str, str]]:
        return [
            (part, name)
            for name, tensor in networks[part].items()
            if decays == ("bias" not in name and tensor.ndim != 1)
        ]

    return [members(part, decays) for decays in (True, False) for part in TRAINED_PARTS]


# -- published -> ours -----------------------------------------------------------------------------------------------


def convert(
    checkpoint: str | Path,
    output_dir: str | Path,
    *,
    num_attention_heads: int | None = None,
    with_optimizer: bool = False,
    published_code: str | Path | None = None,
) -> str:
    """Converts a published checkpoint into a model folder that stock transformers loads.

    The folder is complete or not there: it is written under a hidden name beside its place and renamed when everything
    in it was read back and found equal to the file, bit for bit. `conversion.json` in it says what was compared.

    Args:
        checkpoint: The `.pth.tar` file.
        output_dir: Folder to write; must be missing or empty.
        num_attention_heads: Heads of both networks; needed only where the encoder is no published size.
        with_optimizer: Also write `checkpoint-<step>/` with the optimiser's state, from which
            `ijepa-hf pretrain RECIPE --resume_from_checkpoint` goes on.
        published_code: Folder of a checkout of the published code. Its networks then compute the same images as ours,
            in a process of its own, and the values are compared. The code in that folder is run: name only one that
            you trust.

    Returns:
        A few lines for the user: what was found and how to load it.

    Raises:
        FileNotFoundError: If there is no such file, or the checkout lacks the networks.
        ValueError: If the file is not such a checkpoint; a tensor is missing, unexpected, of the wrong shape or type,
            or not finite; the optimiser's state does not fit; the values differ from the published code's; or the
            folder is not empty. Nothing is written then.
    """
    source, target = Path(checkpoint), Path(output_dir)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"output_dir={str(target)!r} is not an empty folder; choose another.")
    checkout = None if published_code is None else _check_checkout(Path(published_code))
    contents = _read_file(source)
    if not with_optimizer:
        contents.pop("opt", None)  # of a file that could not be mapped, this frees the memory
    networks = _networks_of(contents, source)
    model = model_from_official(networks, num_attention_heads=num_attention_heads)
    state = _official_optimizer_state(contents, networks, model.config, source) if with_optimizer else None
    report = _describe(source, contents, networks, model, state)
    if checkout is not None:
        report["published_code"] = _compare_with_published_code(checkout, source, model)
    with _hidden_folder(target) as hidden:
        _write_folder(hidden, model, state, report, target.resolve().name)
    return _converted_message(model.config, source, target, report)


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
    return _networks_of(_read_file(path), path)


def model_from_official(networks: _Networks, *, num_attention_heads: int | None = None) -> IJepaForPretraining:
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
    for part, (ours, names) in PARTS.items():
        for name, tensor in networks[part].items():
            translated = translate(name, names)
            keys = [f"{ours}.{key}" for key in translated or ()]
            if not keys or not expected.keys() >= set(keys):
                problems.append(f"{part}.{name!r} is unexpected")
            else:
                state |= zip(keys, _cut(tensor, len(keys)), strict=True)
    problems += [f"{name} is missing" for name in expected if name not in state]
    wrong = {name: tensor for name, tensor in state.items() if tensor.shape != expected[name]}
    problems += [f"{name} has shape {list(it.shape)}, expected {list(expected[name])}" for name, it in wrong.items()]
    right = {name: tensor for name, tensor in state.items() if name not in wrong}
    problems += [f"{name} has NaN or infinite values" for name, tensor in right.items() if not _is_finite(tensor)]
    problems += _misplaced_tables(right, config)
    if problems:
        raise ValueError("the checkpoint does not fit; nothing was loaded:\n  " + _listed(problems))
    model.load_state_dict(state, assign=True)
    for trained in (model.context_encoder, model.predictor):
        trained.requires_grad_(True)
    model.ijepa.requires_grad_(False)
    return model.eval()


def config_from_official(networks: _Networks, *, num_attention_heads: int | None = None) -> IJepaConfig:
    """Reads the architecture off the shapes.

    Masks are drawn as the published runs drew them, where the grid is large enough for that sampler, and as this
    package does by default where not.

    Args:
        networks: As `read_official_checkpoint` returns them.
        num_attention_heads: Heads of both networks; looked up among the published sizes if not given.

    Returns:
        The configuration.

    Raises:
        ValueError: If a telling tensor is missing or has the wrong number of dimensions, layers are missing, the grid
            is no square, or the heads are not known.
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


# -- ours -> published -----------------------------------------------------------------------------------------------


def convert_to_official(folder: str | Path, target: str | Path, *, with_optimizer: bool = False) -> str:
    """Converts a model folder into a file that the published code loads.

    Args:
        folder: As `convert` or a run wrote it.
        target: The `.pth.tar` file to write; must not exist.
        with_optimizer: Take weights and optimiser state from the folder's newest checkpoint, so that published
            training goes on; else the exported weights are taken and `opt` is `None`.

    Returns:
        A few lines for the user.

    Raises:
        FileNotFoundError: If the folder holds no model, or no checkpoint where one is needed.
        ValueError: If the target exists, or the model cannot be said in the published format. Nothing is written then.
    """
    folder, target = Path(folder), Path(target)
    if target.exists():
        raise ValueError(f"target={str(target)!r} exists already; choose another name.")
    checkpoint = _newest_checkpoint(folder) if with_optimizer else None
    config = _read_config(folder) if checkpoint is None else IJepaConfig(**checkpoint.config)
    _check_is_published_architecture(config)
    weights = folder / PRETRAINING_SUBFOLDER / WEIGHTS_FILE if checkpoint is None else checkpoint.path / MODEL_FILE
    networks = _networks_from_ours(weights, config)
    entries = _entries_of(folder, checkpoint)
    contents: dict[str, Any] = {
        part: {_PREFIX + name: tensor for name, tensor in networks[part].items()} for part in PARTS
    }
    contents |= {"opt": None, "scaler": None, **entries}
    if checkpoint is not None:
        contents["opt"] = _official_optimizer(checkpoint, networks)
        contents["scaler"] = _FRESH_SCALER
    target.parent.mkdir(parents=True, exist_ok=True)
    hidden = target.with_name(f".{target.name}.partial")
    try:
        torch.save(contents, hidden)
        del contents, networks  # unmapped before the file is read back
        _check_official_file(hidden, weights, config, checkpoint)
        flush_to_disk(hidden)
        os.replace(hidden, target)
    finally:
        hidden.unlink(missing_ok=True)
    flush_to_disk(target.parent)
    return _official_message(folder, target, config, checkpoint, entries)


# What a gradient scaler starts with. The published code calls its load under bf16, and an error there sends it back to
# epoch 0; the scale changes nothing in bf16.
_FRESH_SCALER = {
    "scale": 65536.0,
    "growth_factor": 2.0,
    "backoff_factor": 0.5,
    "growth_interval": 2000,
    "_growth_tracker": 0,
}


# -- reading a published file ----------------------------------------------------------------------------------------


def _read_file(path: Path) -> dict[str, Any]:
    """The contents of a `.pth.tar` file, mapped into memory where its format allows that."""
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint={str(path)!r}: there is no such file.")
    try:
        if zipfile.is_zipfile(path):
            _check_records(path)
        contents = _unpickle(path)
    except OSError:
        raise
    except Exception as error:  # a damaged or hostile pickle can make anything go wrong
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"checkpoint={str(path)!r} cannot be read as a published I-JEPA checkpoint (damaged, or it holds code, "
            f"which is never run): {reason}"
        ) from error
    if not isinstance(contents, Mapping):
        raise ValueError(f"checkpoint={str(path)!r} holds a {type(contents).__name__}, no dictionary of networks.")
    return dict(contents)


def _unpickle(path: Path) -> Any:
    # files that torch wrote before 1.6 are no zip files and cannot be mapped
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def _check_records(path: Path) -> None:
    """Checksums, which torch does not look at: a download with a hole in it has wrong weights and no other sign."""
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise ValueError("its records are compressed, which torch never does")
        if sum(record.file_size for record in records) > path.stat().st_size:
            raise ValueError("its records overlap")
        damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of its record {damaged!r} is wrong")


def _networks_of(contents: Mapping[str, Any], path: Path) -> dict[str, dict[str, Tensor]]:
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
            name = key.removeprefix(_PREFIX) if isinstance(key, str) else repr(type(key))
            problem = "is there twice" if name in networks[part] else _unlike_published(value, owners)
            if problem is not None:
                problems.append(f"{part}.{name!r} {problem}")
                continue
            networks[part][name] = value.detach()
            owners[value.untyped_storage().data_ptr()] = f"{part}.{name}"
    if problems:
        raise ValueError(f"checkpoint={str(path)!r} is no published I-JEPA checkpoint:\n  " + _listed(problems))
    return networks


def _unlike_published(value: Any, owners: Mapping[int, str]) -> str | None:
    """What makes a value no tensor of a published file, if anything; shapes are looked at elsewhere."""
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


def _check_telling_tensors(networks: _Networks) -> None:
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


def _cut(tensor: Tensor, pieces: int) -> Sequence[Tensor]:
    """Cuts along the first axis; a tensor that cannot be cut comes back whole, so that its shape is found wrong."""
    if pieces == 1 or tensor.ndim == 0:
        return [tensor] * pieces
    return tensor.tensor_split(pieces)


def _is_finite(tensor: Tensor) -> bool:
    low, high = tensor.aminmax()  # one pass and no copy; NaN comes through
    return math.isfinite(low) and math.isfinite(high)


def _misplaced_tables(state: Mapping[str, Tensor], config: IJepaConfig) -> Iterator[str]:
    """A table that is not the fixed sin-cos one means another layout, which loading would hide."""
    for name, table in state.items():
        if not name.endswith("position_embeddings"):
            continue
        expected = sincos_position_table(table.shape[-1], config.grid_size)
        if not float((table - expected).abs().max()) <= _POSITION_TOLERANCE:
            yield f"{name} is not the fixed sin-cos table of a {config.grid_size[0]}x{config.grid_size[1]} grid"


def _listed(problems: Sequence[str]) -> str:
    shown = list(problems[:_LISTED_PROBLEMS])
    if len(problems) > len(shown):
        shown.append(f"and {len(problems) - len(shown)} more")
    return "\n  ".join(shown)


# -- the optimiser, published -> ours --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _OptimizerState:
    """AdamW's state under our names.

    Args:
        step: Optimiser steps done, the same for every tensor.
        tensors: Of each trained parameter, `step`, `exp_avg` and `exp_avg_sq`.
        arguments: What the file says of the run, under our names.
    """

    step: int
    tensors: dict[str, dict[str, Tensor]]
    arguments: dict[str, Any]


def _official_optimizer_state(
    contents: Mapping[str, Any], networks: _Networks, config: IJepaConfig, path: Path
) -> _OptimizerState:
    groups = optimizer_groups(networks)
    _check_numbering(contents.get("opt"), groups, networks, config, path)
    opt = contents["opt"]
    members = [member for group in groups for member in group]
    problems: list[str] = []
    steps: dict[float, str] = {}
    owners: dict[int, str] = {}
    tensors: dict[str, dict[str, Tensor]] = {}
    for number, (part, name) in enumerate(members):
        entry = opt["state"].get(number)
        if name in _FROZEN:
            problems += [f"{part}.{name} has a state, but is never trained"] if entry is not None else []
            continue
        found = list(_state_problems(entry, networks[part][name], owners))
        problems += [f"{part}.{name}: {problem}" for problem in found]
        if not found:
            steps[float(entry["step"])] = f"{part}.{name}"
            ours, names = PARTS[part]
            keys = [f"{ours}.{key}" for key in translate(name, names) or ()]
            cut = {slot: _cut(entry[slot], len(keys)) for slot in ("exp_avg", "exp_avg_sq")}
            for place, key in enumerate(keys):
                step = torch.tensor(float(entry["step"]))
                tensors[key] = {"step": step, **{slot: pieces[place] for slot, pieces in cut.items()}}
    problems += [
        f"state {number!r} belongs to no tensor" for number in opt["state"] if number not in range(len(members))
    ]
    if len(steps) > 1:
        problems.append("; ".join(f"{name} is at step {step:g}" for step, name in sorted(steps.items())))
    if problems:
        raise ValueError(f"the optimiser's state in {path} does not fit:\n  " + _listed(problems))
    done = int(next(iter(steps)))
    _steps_per_epoch(contents.get("epoch"), done, path)
    return _OptimizerState(done, tensors, _run_arguments(contents, config))


def _check_numbering(
    opt: Any, groups: list[list[tuple[str, str]]], networks: _Networks, config: IJepaConfig, path: Path
) -> None:
    """Numbers mean the order of the modules: the file has to have it, and the published groups."""
    if not isinstance(opt, Mapping) or not isinstance(opt.get("state"), Mapping) or not opt["state"]:
        raise ValueError(f"{path} holds no state of an optimiser to go on from; convert it without with_optimizer.")
    names = official_names(config)
    if any(list(networks[part]) != names[part] for part in TRAINED_PARTS):
        raise ValueError(
            f"the tensors in {path} are not in the order in which published code writes them, so it is not known "
            "which of them a numbered state belongs to; convert it without with_optimizer."
        )
    sizes = [len(group) for group in groups]
    expected = [list(range(sum(sizes[:place]), sum(sizes[: place + 1]))) for place in range(len(sizes))]
    found = opt.get("param_groups")
    if (
        not isinstance(found, list)
        or [group.get("params") if isinstance(group, Mapping) else None for group in found] != expected
    ):
        raise ValueError(
            f"the optimiser in {path} does not have the published groups (sizes {sizes}: encoder and predictor "
            "decayed, encoder and predictor not decayed); convert it without with_optimizer."
        )


def _state_problems(entry: Any, weight: Tensor, owners: dict[int, str]) -> Iterator[str]:
    if not isinstance(entry, Mapping) or set(entry) != set(_ADAMW_SLOTS):
        found = ", ".join(map(str, entry)) if isinstance(entry, Mapping) else "no state"
        yield f"has {found}, where AdamW keeps {', '.join(_ADAMW_SLOTS)}"
        return
    step = entry["step"]
    is_number = isinstance(step, int | float) or (isinstance(step, Tensor) and step.numel() == 1)
    if not is_number or not float(step) >= 1 or float(step) != round(float(step)):
        yield "step is no positive whole number"
    for slot in ("exp_avg", "exp_avg_sq"):
        problem = _unlike_published(entry[slot], owners)
        if problem is not None:
            yield f"{slot} {problem}"
        elif entry[slot].shape != weight.shape:
            yield f"{slot} has shape {list(entry[slot].shape)}, the weight {list(weight.shape)}"
        elif not _is_finite(entry[slot]) or (slot == "exp_avg_sq" and float(entry[slot].min()) < 0):
            yield f"{slot} has NaN, infinite or impossible values"
        else:
            owners[entry[slot].untyped_storage().data_ptr()] = slot


def _steps_per_epoch(epoch: Any, step: int, path: Path) -> int | None:
    """Optimiser steps of an epoch, or `None` where they are no whole number.

    `epoch` in a file is the number of epochs that are done (the number in the file's *name* is one higher). Under a
    gradient scaler some steps may have been skipped, which the optimiser does not count.
    """
    if not isinstance(epoch, int) or isinstance(epoch, bool) or not 1 <= epoch <= step:
        raise ValueError(
            f"{path} says epoch={epoch!r}, but its optimiser is at step {step}; an epoch has at least one step, so "
            "the two do not belong together."
        )
    return step // epoch if step % epoch == 0 else None


def _run_arguments(contents: Mapping[str, Any], config: IJepaConfig) -> dict[str, Any]:
    model = dataclasses.asdict(ModelArguments().resolved(config))
    del model["given"]
    group = contents["opt"]["param_groups"][0]
    batch_size, world_size = _number(contents.get("batch_size")), _number(contents.get("world_size"))
    betas = group.get("betas")
    known = {
        "learning_rate": _number(contents.get("lr")),
        "per_device_train_batch_size": batch_size,
        "global_batch_size": batch_size * world_size if batch_size and world_size else None,
        "adam_beta1": _number(betas[0]) if isinstance(betas, list | tuple) and len(betas) == 2 else None,
        "adam_beta2": _number(betas[1]) if isinstance(betas, list | tuple) and len(betas) == 2 else None,
        "adam_epsilon": _number(group.get("eps")),
    }
    return model | {name: value for name, value in known.items() if value is not None}


def _number(value: Any) -> int | float | None:
    return value if isinstance(value, int | float) and math.isfinite(value) else None


# -- writing our folder ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _hidden_folder(target: Path) -> Iterator[Path]:
    """A folder beside the target that becomes the target at the end, or is gone if anything goes wrong."""
    target = target.resolve()
    hidden = target.with_name(f".{target.name}.partial")
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.mkdir(parents=True)
    try:
        yield hidden
        if target.exists():
            target.rmdir()  # it was empty when we started; if it is not now, this fails
        os.replace(hidden, target)
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)
        raise
    flush_to_disk(target.parent)


def _write_folder(
    folder: Path, model: IJepaForPretraining, state: _OptimizerState | None, report: dict[str, Any], name: str
) -> None:
    """Writes everything and reads it back.

    Args:
        folder: Where to, for now.
        model: The model.
        state: The optimiser's, or `None`.
        report: What `conversion.json` says; gets what was compared.
        name: Of the folder when it is finished, for the card.
    """
    step = 0 if state is None else state.step
    export_model(model, folder, step=step, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD)
    weights = {to_file_name(key): tensor for key, tensor in model.state_dict().items()}
    encoder = {key: tensor for key, tensor in weights.items() if key.startswith("ijepa.")}
    written = {WEIGHTS_FILE: encoder, f"{PRETRAINING_SUBFOLDER}/{WEIGHTS_FILE}": weights}
    if state is not None:
        checkpoint = _write_checkpoint(folder, model, state)
        states = {f"{key}/{slot}": value for key, slots in state.tensors.items() for slot, value in slots.items()}
        written[f"{checkpoint.name}/{MODEL_FILE}"] = model.state_dict()
        written[f"{checkpoint.name}/{OPTIMIZER_FILE}"] = states
    for path, tensors in written.items():
        _check_written(folder / path, tensors)
    report["bit_equal"] = {path: {"tensors": len(tensors)} for path, tensors in written.items()}
    _write_text(folder / REPORT_FILE, _report_text(report))
    _write_text(folder / "README.md", _card(model.config, report, name))


def _write_checkpoint(folder: Path, model: IJepaForPretraining, state: _OptimizerState) -> Path:
    """The checkpoint that a run goes on from, through the writer of all checkpoints."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)  # only carries names and state: the groups are those of the run to come
    for name, parameter in trained:
        optimizer.state[parameter] = state.tensors[name]
    return save_checkpoint(
        folder,
        state.step,
        model,
        optimizer,
        config=config_fields(model.config),
        arguments=state.arguments,
        total_limit=1,
    )


def _check_written(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Reads a file back; it is opened anew for each tensor, so that its pages do not add up in memory."""
    with safe_open(path, framework="pt") as file:
        found = set(file.keys())
    differing = sorted(found ^ tensors.keys())
    for name in found & tensors.keys():
        with safe_open(path, framework="pt") as file:
            if not _same_bits(file.get_tensor(name), tensors[name]):
                differing.append(name)
    if differing:
        raise OSError(f"{path.name} is not what was written to it, in {_listed(differing)}; is the disk sound?")


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype or one.dtype != torch.float32:
        return False
    return torch.equal(one.detach().reshape(-1).view(torch.int32), other.detach().reshape(-1).view(torch.int32))


def _write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda partial: partial.write_text(text, "utf-8"))


# -- what is said about it -------------------------------------------------------------------------------------------


def _describe(
    path: Path,
    contents: Mapping[str, Any],
    networks: _Networks,
    model: IJepaForPretraining,
    state: _OptimizerState | None,
) -> dict[str, Any]:
    """The report, but for what is only known when everything was written."""
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    pairs = []
    for part, (ours, names) in PARTS.items():
        for name, tensor in networks[part].items():
            keys = [f"{ours}.{key}" for key in translate(name, names) or ()]
            pairs.append(
                {
                    "published": f"{part}.{_PREFIX}{name}",
                    "shape": list(tensor.shape),
                    "ours": {key: shapes[key] for key in keys},
                }
            )
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    report: dict[str, Any] = {
        "source": {"name": path.name, "size": path.stat().st_size, "sha256": digest},
        "entries": {name: _number(contents.get(name)) for name in _SCALARS},
        "optimizer_step": None,
        "steps_per_epoch": None,
        "published": {
            "tensors": len(pairs),
            "parameters": sum(tensor.numel() for part in PARTS for tensor in networks[part].values()),
        },
        "ours": {"tensors": len(shapes), "parameters": sum(map(math.prod, shapes.values()))},
        "published_code": None,
        "tensors": pairs,
    }
    if state is not None:
        report["optimizer_step"] = state.step
        report["steps_per_epoch"] = _steps_per_epoch(contents["epoch"], state.step, path)
    return report


def _report_text(report: Mapping[str, Any]) -> str:
    """JSON with one tensor a line."""
    head = json.dumps({name: value for name, value in report.items() if name != "tensors"}, indent=2)
    lines = ",\n".join(f"    {json.dumps(pair)}" for pair in report["tensors"])
    return f'{head.removesuffix("}").rstrip()},\n  "tensors": [\n{lines}\n  ]\n}}\n'


def _converted_message(config: IJepaConfig, source: Path, target: Path, report: Mapping[str, Any]) -> str:
    lines = [
        f"{source.name}: width {config.hidden_size}, depth {config.num_hidden_layers}, "
        f"{config.num_attention_heads} heads, {config.image_size} px, patch {config.patch_size}; predictor "
        f"{config.predictor_num_hidden_layers} x {config.predictor_hidden_size}",
        f"encoder for everyone:  AutoModel.from_pretrained({str(target)!r})",
        f"both encoders and the predictor:  IJepaForPretraining.from_pretrained({str(target)!r})",
    ]
    step = report["optimizer_step"]
    if step is not None:
        lines.append(f"training goes on with:  --resume_from_checkpoint {target / f'checkpoint-{step}'}")
        if report["steps_per_epoch"] is None:
            lines.append(
                f"note: step {step} is no multiple of the {report['entries']['epoch']} epochs in the file; published "
                "training skips steps whose scaled gradient overflows, and does not count them"
            )
    if report["published_code"] is not None:
        largest = max(value["largest_difference"] for value in report["published_code"]["outputs"].values())
        lines.append(f"published code computes the same: largest difference {largest:.2g}")
    return "\n".join([*lines, "licence: weights of published checkpoints stay CC BY-NC 4.0"])


def _card(config: IJepaConfig, report: Mapping[str, Any], name: str) -> str:
    data = ModelCardData(
        license="cc-by-nc-4.0",
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        tags=["ijepa", "jepa", "self-supervised-learning", "vision"],
    )
    height, width = config.image_shape
    text = f"""---
{data.to_yaml()}
---

# I-JEPA, converted from `{report["source"]["name"]}`

The weights of a checkpoint published with [I-JEPA](https://arxiv.org/abs/2301.08243), every bit compared: the target
encoder at the root, both encoders and the predictor in `pretraining/`. `{REPORT_FILE}` has the SHA-256 of the file and
lists each tensor.

- {config.num_hidden_layers} layers of width {config.hidden_size}, {config.num_attention_heads} heads
- images of {height}x{width} pixels, patches of {config.patch_shape[0]}x{config.patch_shape[1]}
- ImageNet mean and standard deviation

The weights keep the licence of the original, CC BY-NC 4.0.

## Features of an image

```python
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained("{name}")
model = AutoModel.from_pretrained("{name}")
with torch.no_grad():
    patches = model(**processor(Image.open("image.jpg").convert("RGB"), return_tensors="pt")).last_hidden_state
features = patches.mean(dim=1)  # [1, {config.hidden_size}], as evaluated in the paper
```

## Fine-tune a classifier

```python
from transformers import AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained("{name}", num_labels=10)  # only the last layer is new
```

## Go on pretraining, on your own images

```bash
pip install ijepa-hf
ijepa-hf pretrain adapt --model_name_or_path {name} --dataset_name path/to/images
```
"""
    return str(ModelCard(text))


# -- beside the published code ---------------------------------------------------------------------------------------


def _check_checkout(folder: Path) -> Path:
    module = folder / "src" / "models" / "vision_transformer.py"
    if not module.is_file():
        raise FileNotFoundError(
            f"published_code={str(folder)!r} has no src/models/vision_transformer.py; name the folder of a checkout "
            "of facebookresearch/ijepa."
        )
    return folder.resolve()


def _compare_with_published_code(checkout: Path, source: Path, model: IJepaForPretraining) -> dict[str, Any]:
    """Both sides compute the same random images in float32; the published code in a process of its own."""
    config = model.config
    masks = draw_masks(config.mask_settings(), _PARITY_IMAGES, np.random.Generator(np.random.Philox(0)))
    shape = (_PARITY_IMAGES, config.num_channels, *config.image_shape)
    inputs = {
        "pixel_values": torch.randn(shape, generator=torch.Generator().manual_seed(0)),
        "context_indices": masks.context_indices,
        "target_indices": masks.target_indices,
    }
    with tempfile.TemporaryDirectory() as scratch:
        theirs = _run_published_code(checkout, source, config, inputs, Path(scratch))
    with torch.no_grad():
        context = model.context_encoder(inputs["pixel_values"], context_indices=inputs["context_indices"])
        ours = {
            "encoder": model.context_encoder(inputs["pixel_values"]).last_hidden_state,
            "encoder_of_context": context.last_hidden_state,
            "target_encoder": model.ijepa(inputs["pixel_values"]).last_hidden_state,
            "predictor": model.predict(context.last_hidden_state, inputs["context_indices"], inputs["target_indices"]),
        }
    outputs = {}
    for name, value in ours.items():
        if theirs[name].shape != value.shape:
            raise ValueError(f"published_code: {name} gives {list(theirs[name].shape)}, ours {list(value.shape)}.")
        largest = float(theirs[name].abs().max())
        difference = float((theirs[name] - value).abs().max())
        tolerance = PARITY_TOLERANCE * max(1.0, largest)
        outputs[name] = {"largest_difference": difference, "tolerance": tolerance, "largest_value": largest}
    wrong = [f"{name} by {it['largest_difference']:.3g}" for name, it in outputs.items() if not _within(it)]
    if wrong:
        raise ValueError(
            f"published_code={str(checkout)!r} computes other values than ours: {', '.join(wrong)}, where "
            f"{PARITY_TOLERANCE:g} of the largest value is allowed. Are num_attention_heads="
            f"{config.num_attention_heads} those of the model? Nothing was written."
        )
    return {"images": list(shape), "dtype": "float32", "outputs": outputs}


def _within(output: Mapping[str, float]) -> bool:
    return output["largest_difference"] <= output["tolerance"]  # False for NaN


def _run_published_code(
    checkout: Path, source: Path, config: IJepaConfig, inputs: dict[str, Tensor], scratch: Path
) -> dict[str, Tensor]:
    shared = {"qkv_bias": config.qkv_bias, "num_heads": config.num_attention_heads, "embed_dim": config.hidden_size}
    request = {
        "checkout": str(checkout),
        "source": str(source.resolve()),
        "mmap": zipfile.is_zipfile(source),
        "encoder": {
            **shared,
            "img_size": [config.image_shape[0]],
            "patch_size": config.patch_shape[0],
            "depth": config.num_hidden_layers,
            # rounded down there: half a unit more, so that the division cannot lose one
            "mlp_ratio": (config.intermediate_size + 0.5) / config.hidden_size,
        },
        "predictor": {
            **shared,
            "num_patches": config.num_patches,
            "predictor_embed_dim": config.predictor_hidden_size,
            "depth": config.predictor_num_hidden_layers,
        },
        "layer_norm_eps": config.layer_norm_eps,
    }
    (scratch / "request.json").write_text(json.dumps(request), "utf-8")
    save_file({name: tensor.contiguous() for name, tensor in inputs.items()}, scratch / "inputs.safetensors")
    # other people's code gets no token
    environment = {name: value for name, value in os.environ.items() if "TOKEN" not in name.upper()}
    program = f"{inspect.getsource(_published_side)}\nimport sys\n_published_side(sys.argv[1])\n"
    child = subprocess.run(
        [sys.executable, "-P", "-c", program, str(scratch)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if child.returncode:
        last = (child.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ValueError(
            f"published_code={str(checkout)!r} could not be run with this checkpoint (exit status "
            f"{child.returncode}): {last}"
        )
    return {name: tensor.clone() for name, tensor in load_file(scratch / "outputs.safetensors").items()}


def _published_side(scratch: str) -> None:
    """What the process beside us runs: the published networks on given images.

    It is handed over as source, imports nothing of this package (seconds), and is the only place where the code in a
    checkout is imported.

    Args:
        scratch: Folder with `request.json` (which checkout, file and sizes) and `inputs.safetensors`; gets
            `outputs.safetensors`.
    """
    import functools
    import importlib
    import json
    import pathlib
    import sys

    import torch
    from safetensors.torch import load_file, save_file

    folder = pathlib.Path(scratch)
    request = json.loads((folder / "request.json").read_text("utf-8"))
    inputs = load_file(folder / "inputs.safetensors")
    sys.path.insert(0, request["checkout"])
    published = importlib.import_module("src.models.vision_transformer")
    if not pathlib.Path(str(published.__file__)).is_relative_to(request["checkout"]):
        raise ImportError(f"another package named src hides the checkout: {published.__file__}")
    norm_layer = functools.partial(torch.nn.LayerNorm, eps=request["layer_norm_eps"])
    encoder = published.VisionTransformer(norm_layer=norm_layer, **request["encoder"]).eval()
    predictor = published.VisionTransformerPredictor(norm_layer=norm_layer, **request["predictor"]).eval()
    contents = torch.load(request["source"], map_location="cpu", weights_only=True, mmap=request["mmap"])

    def load(module: torch.nn.Module, part: str) -> None:
        state = {name.removeprefix("module."): tensor for name, tensor in contents[part].items()}
        module.load_state_dict(state, strict=True, assign=True)

    images, context_masks = inputs["pixel_values"], [inputs["context_indices"]]
    target_masks = list(inputs["target_indices"].unbind(1))
    outputs = {}
    with torch.no_grad():
        load(encoder, "encoder")
        load(predictor, "predictor")
        outputs["encoder"] = encoder(images)
        outputs["encoder_of_context"] = encoder(images, context_masks)
        rows = predictor(outputs["encoder_of_context"].clone(), context_masks, target_masks)  # all of block 1 first
        outputs["predictor"] = rows.unflatten(0, (len(target_masks), len(images))).transpose(0, 1)
        load(encoder, "target_encoder")
        outputs["target_encoder"] = encoder(images)
    save_file({name: value.contiguous() for name, value in outputs.items()}, folder / "outputs.safetensors")


# -- reading our folder ----------------------------------------------------------------------------------------------


def _read_config(folder: Path) -> IJepaConfig:
    inner = folder / PRETRAINING_SUBFOLDER
    if not (inner / "config.json").is_file() or not (inner / WEIGHTS_FILE).is_file():
        raise FileNotFoundError(
            f"folder={str(folder)!r} holds no model with both encoders and the predictor (no {PRETRAINING_SUBFOLDER}/ "
            "with config.json and weights); name one that `ijepa-hf convert` or `ijepa-hf pretrain` wrote."
        )
    return IJepaConfig.from_pretrained(inner)


def _newest_checkpoint(folder: Path) -> Checkpoint:
    checkpoint = find_latest(folder)
    if checkpoint is None:
        raise FileNotFoundError(
            f"folder={str(folder)!r} holds no usable checkpoint, which with_optimizer takes weights and state from."
        )
    return checkpoint


def _check_is_published_architecture(config: IJepaConfig) -> None:
    """What the published code has no way to say would be lost, or computed otherwise there."""
    predictor_heads = config.predictor_num_attention_heads or config.num_attention_heads
    rules = {
        f"image_size={config.image_size} and patch_size={config.patch_size} are not square": (
            config.grid_size[0] == config.grid_size[1] and config.patch_shape[0] == config.patch_shape[1]
        ),
        f"num_channels={config.num_channels} is not 3": config.num_channels == 3,
        f"predictor_num_attention_heads={predictor_heads} are not the encoder's {config.num_attention_heads}": (
            predictor_heads == config.num_attention_heads
        ),
        f"layer_norm_eps={config.layer_norm_eps:g} is not {PUBLISHED_LAYER_NORM_EPS:g}": (
            config.layer_norm_eps == PUBLISHED_LAYER_NORM_EPS
        ),
        f"hidden_act={config.hidden_act!r} is not 'gelu'": config.hidden_act == "gelu",
    }
    broken = [rule for rule, holds in rules.items() if not holds]
    if broken:
        raise ValueError(f"the published code has no such model: {'; '.join(broken)}.")


def _networks_from_ours(path: Path, config: IJepaConfig) -> dict[str, dict[str, Tensor]]:
    """The three networks under their published names, in the published order; mapped, but for what is joined."""
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in IJepaForPretraining(config).state_dict().items()}
    tensors = _read_tensors(path)
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    problems += [f"{name!r} is unexpected" for name in tensors if name not in expected]
    for name, tensor in tensors.items():
        if name not in expected:
            continue
        if tensor.shape != expected[name] or tensor.dtype != torch.float32:
            problems.append(f"{name} is {tensor.dtype} {list(tensor.shape)}, expected float32 {list(expected[name])}")
        elif not _is_finite(tensor):
            problems.append(f"{name} has NaN or infinite values")
    if problems:
        raise ValueError(f"{path} does not fit its configuration; nothing was written:\n  " + _listed(problems))
    return {
        part: {name: _join(tensors, part, name) for name in names} for part, names in official_names(config).items()
    }


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return {from_file_name(name): tensor for name, tensor in load_file(path).items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _join(tensors: Mapping[str, Tensor], part: str, name: str, slot: str = "") -> Tensor:
    """The published tensor of a name: ours, or three of ours one below the other."""
    ours, names = PARTS[part]
    pieces = [tensors[f"{ours}.{key}{slot}"] for key in translate(name, names) or ()]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _entries_of(folder: Path, checkpoint: Checkpoint | None) -> dict[str, int | float | None]:
    """The numbers beside the networks: those of the file that a folder came from, or of the run; else `None`."""
    report = _read_json(folder / REPORT_FILE)
    if report is not None:
        return {name: report.get("entries", {}).get(name) for name in _SCALARS}
    run = _read_json(folder / "run.json") or {}
    arguments = run.get("arguments", {}) if checkpoint is None else checkpoint.arguments
    step = exported_step(folder) if checkpoint is None else checkpoint.step
    entries: dict[str, int | float | None] = dict.fromkeys(_SCALARS)
    batch, images = arguments.get("global_batch_size"), arguments.get("num_train_images")
    if batch and images and step is not None:
        entries["epoch"] = step // (images // batch)
    if batch:
        rank_batch = arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"]
        entries |= {"batch_size": rank_batch, "world_size": batch // rank_batch}
        entries["lr"] = arguments["learning_rate"] or arguments["base_learning_rate"] * batch / 256
    return entries


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


# -- the optimiser, ours -> published --------------------------------------------------------------------------------


def _official_optimizer(checkpoint: Checkpoint, networks: _Networks) -> dict[str, Any]:
    """What the published optimiser's `state_dict()` would be."""
    tensors = _read_tensors(checkpoint.path / OPTIMIZER_FILE)
    arguments = checkpoint.arguments
    blank = torch.optim.AdamW([torch.zeros(1)]).state_dict()["param_groups"][0]  # every field that torch knows
    blank["lr"] = arguments.get("learning_rate") or blank["lr"]
    blank["betas"] = (arguments.get("adam_beta1", 0.9), arguments.get("adam_beta2", 0.999))
    blank["eps"] = arguments.get("adam_epsilon", 1e-8)
    blank["weight_decay"] = arguments.get("weight_decay", blank["weight_decay"])
    groups, state, number = [], {}, 0
    for place, members in enumerate(optimizer_groups(networks)):
        undecayed = {"WD_exclude": True, "weight_decay": 0} if place >= len(TRAINED_PARTS) else {}
        groups.append({**blank, **undecayed, "params": list(range(number, number + len(members)))})
        for part, name in members:
            if name not in _FROZEN:
                state[number] = _joined_state(tensors, part, name, checkpoint)
            number += 1
    return {"state": state, "param_groups": groups}


def _joined_state(tensors: Mapping[str, Tensor], part: str, name: str, checkpoint: Checkpoint) -> dict[str, Tensor]:
    ours, names = PARTS[part]
    keys = [f"{ours}.{key}" for key in translate(name, names) or ()]
    lacking = [f"{key}/{slot}" for key in keys for slot in _ADAMW_SLOTS if f"{key}/{slot}" not in tensors]
    if lacking:
        raise ValueError(f"{checkpoint.path / OPTIMIZER_FILE} lacks {', '.join(lacking)}; nothing was written.")
    steps = {float(tensors[f"{key}/step"]) for key in keys}
    if steps != {float(checkpoint.step)}:
        raise ValueError(f"{keys[0]} is at step {steps} of the optimiser, the checkpoint at {checkpoint.step}.")
    joined = {slot: _join(tensors, part, name, f"/{slot}") for slot in ("exp_avg", "exp_avg_sq")}
    return {"step": tensors[f"{keys[0]}/step"].clone(), **joined}


def _check_official_file(path: Path, weights: Path, config: IJepaConfig, checkpoint: Checkpoint | None) -> None:
    """Reads the file back and compares each tensor with ours; mapped anew for each network, to keep memory small."""
    differing = []
    for part, names in official_names(config).items():
        found, tensors = _unpickle(path)[part], _read_tensors(weights)
        differing += [f"{part}.{name} is missing" for name in names if _PREFIX + name not in found]
        differing += [
            f"{part}.{name}"
            for name, tensor in found.items()
            if not _same_bits(tensor, _join(tensors, part, name.removeprefix(_PREFIX)))
        ]
    if checkpoint is not None:
        contents, tensors = _unpickle(path), _read_tensors(checkpoint.path / OPTIMIZER_FILE)
        members = [member for group in optimizer_groups(_networks_of(contents, path)) for member in group]
        for number, entry in contents["opt"]["state"].items():
            part, name = members[number]
            differing += [
                f"opt.state[{number}].{slot}"
                for slot in ("exp_avg", "exp_avg_sq")
                if not _same_bits(entry[slot], _join(tensors, part, name, f"/{slot}"))
            ]
    if differing:
        raise OSError(f"{path.name} is not what was written to it, in {_listed(differing)}; is the disk sound?")


def _official_message(
    folder: Path, target: Path, config: IJepaConfig, checkpoint: Checkpoint | None, entries: Mapping[str, Any]
) -> str:
    lines = [f"{target}: encoder, predictor and target encoder of {folder}, every bit compared"]
    if checkpoint is None:
        lines.append("without optimiser state: published code loads the weights, and starts at epoch 0")
    else:
        lines.append(f"optimiser state of step {checkpoint.step}, epoch {entries['epoch']}")
    if PUBLISHED_HEADS.get(config.hidden_size) != config.num_attention_heads:
        lines.append(
            f"the file does not say that there are {config.num_attention_heads} heads: whoever loads it must know"
        )
    return "\n".join(lines)
