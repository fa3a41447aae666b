"""What a published I-JEPA checkpoint (`*.pth.tar`) is, and how it is read without running code in it.

A file holds three networks (context encoder, target encoder, predictor), numbers about the run, and the state of its
optimiser. One table of names (`ENCODER_NAMES`, `PREDICTOR_NAMES`) says where each tensor goes, in both directions; all
else follows from it. All three networks are taken, nothing is loaded in part. The file stores no architecture: width,
depth, MLP width, patch and grid follow from shapes, the number of heads from the published sizes. The optimiser's
state is numbered: `optimizer_groups` says which number is which tensor.

A file is unpickled with `weights_only=True`. It is mapped into memory, not read; the format that torch wrote before
1.6 cannot be: such a file is read whole.
"""

import math
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ijepa_hf.escaping import on_one_line
from ijepa_hf.model.configuration_ijepa import IJepaConfig
from ijepa_hf.model.modeling_ijepa import IJepaForPretraining, sincos_position_table
from ijepa_hf.recipes.arguments import ModelArguments, argument_values

PUBLISHED_LICENSE = "cc-by-nc-4.0"
PUBLISHED_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16}  # encoder width -> heads
PUBLISHED_LAYER_NORM_EPS = 1e-6
PUBLISHED_PATCH_INIT_STD = 0.02
PUBLISHED_MASKING_STRATEGY = "multi_block_official"

Networks = Mapping[str, Mapping[str, Tensor]]  # part of the checkpoint -> name, without its prefix -> tensor

_LISTED_PROBLEMS = 40
# Published training averages the (constant) target table too, which rounds: up to 2e-7 in six steps.
_POSITION_TOLERANCE = 1e-3


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
# the numbers beside the networks
SCALARS = ("epoch", "loss", "batch_size", "world_size", "lr")
NAME_PREFIX = "module."  # of every published name: the networks were wrapped for distributed training
FROZEN_NAMES = ("pos_embed", "predictor_pos_embed")  # in the optimiser's groups, but never given a gradient or a state
ADAMW_SLOTS = ("step", "exp_avg", "exp_avg_sq")
_ENTRIES = (*PARTS, "opt", "scaler", *SCALARS)


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


def our_names(part: str, name: str) -> list[str]:
    """Where a published tensor goes in our model.

    Args:
        part: Of the file: `encoder`, `predictor` or `target_encoder`.
        name: In that part, without the `module.` prefix.

    Returns:
        Full names, such as `context_encoder.layernorm.bias`: one, three where the tensor is cut, none where the table
        has none.
    """
    ours, names = PARTS[part]
    return [f"{ours}.{key}" for key in translate(name, names) or ()]


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


def optimizer_groups(networks: Networks) -> list[list[tuple[str, str]]]:
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
            problem = "is there twice" if name in networks[part] else _unlike_published(value, owners)
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
    """Reads everything in a checkpoint, and looks at its checksums first, where the format has them.

    Args:
        path: The `.pth.tar` file.

    Returns:
        The dictionary in it, as it is: what its entries are is not looked at. Tensors are mapped from the file where
        its format allows that; it must stay as it is while they are used.

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
    """Reads a file that is known to be sound, without a look at its checksums; no code in it is run.

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
        Each of `SCALARS`; `None` where the file has no finite number.
    """
    return {name: _number(contents.get(name)) for name in SCALARS}


def _number(value: Any) -> int | float | None:
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
                state |= zip(keys, _cut(tensor, len(keys)), strict=True)
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


def _cut(tensor: Tensor, pieces: int) -> Sequence[Tensor]:
    """Cuts along the first axis; a tensor that cannot be cut comes back whole, so that its shape is found wrong."""
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
    """A table that is not the fixed sin-cos one means another layout, which loading would hide."""
    for name, table in state.items():
        if not name.endswith("position_embeddings"):
            continue
        expected = sincos_position_table(table.shape[-1], config.grid_size)
        if not float((table - expected).abs().max()) <= _POSITION_TOLERANCE:
            yield f"{name} is not the fixed sin-cos table of a {config.grid_size[0]}x{config.grid_size[1]} grid"


# -- the optimiser's state -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OptimizerState:
    """AdamW's state under our names.

    Args:
        step: Optimiser steps done, the same for every tensor.
        steps_per_epoch: Optimiser steps of an epoch; `None` where they are no whole number, or no epoch is done.
        tensors: Of each trained parameter, `step`, `exp_avg` and `exp_avg_sq`.
        arguments: What the file says of the run, under our names.
    """

    step: int
    steps_per_epoch: int | None
    tensors: dict[str, dict[str, Tensor]]
    arguments: dict[str, Any]


def read_optimizer_state(
    contents: Mapping[str, Any], networks: Networks, config: IJepaConfig, path: Path
) -> OptimizerState:
    """Reads AdamW's state, tells its numbers apart, and cuts joined tensors as the model's are cut.

    Args:
        contents: As `read_contents` returns them.
        networks: As `networks_of` returns them, in the order of the file: that is what the numbers mean.
        config: As `config_from_official` reads it off the networks.
        path: The file, for messages.

    Returns:
        The state. Its moments are the checkpoint's own memory, not copies.

    Raises:
        ValueError: If there is no state; the tensors' order or the optimiser's groups are not the published ones; a
            moment is missing, of the wrong shape or type, or impossible; or the steps do not agree with each other or
            with the epoch. All that is wrong with the state is listed.
    """
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
        if name in FROZEN_NAMES:
            problems += [f"{part}.{name} has a state, but is never trained"] if entry is not None else []
            continue
        found = list(_state_problems(entry, networks[part][name], owners))
        problems += [f"{part}.{name}: {problem}" for problem in found]
        if not found:
            steps[float(entry["step"])] = f"{part}.{name}"
            keys = our_names(part, name)
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
        raise ValueError(f"the optimiser's state in {path} does not fit:\n  " + format_problems(problems))
    done = int(next(iter(steps)))
    steps_per_epoch = _steps_per_epoch(contents.get("epoch"), done, path)
    return OptimizerState(done, steps_per_epoch, tensors, _run_arguments(contents, config))


def _check_numbering(
    opt: Any, groups: list[list[tuple[str, str]]], networks: Networks, config: IJepaConfig, path: Path
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
    if not isinstance(entry, Mapping) or set(entry) != set(ADAMW_SLOTS):
        found = ", ".join(map(str, entry)) if isinstance(entry, Mapping) else "no state"
        yield f"has {found}, where AdamW keeps {', '.join(ADAMW_SLOTS)}"
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
        elif not all_finite(entry[slot]) or (slot == "exp_avg_sq" and float(entry[slot].min()) < 0):
            yield f"{slot} has NaN, infinite or impossible values"
        else:
            owners[entry[slot].untyped_storage().data_ptr()] = slot


def _steps_per_epoch(epoch: Any, step: int, path: Path) -> int | None:
    """Optimiser steps of an epoch, or `None` where they are no whole number, or no epoch is done.

    `epoch` in a file is the number of epochs that are done (the number in the file's *name* is one higher). A file
    that `convert_to_official` made of a run before its first epoch's end has 0. Under a gradient scaler some steps
    may have been skipped, which the optimiser does not count.
    """
    if not isinstance(epoch, int) or isinstance(epoch, bool) or not 0 <= epoch <= step:
        raise ValueError(
            f"{path} says epoch={epoch!r}, but its optimiser is at step {step}; an epoch has at least one step, so "
            "the two do not belong together."
        )
    return step // epoch if epoch and step % epoch == 0 else None


def _run_arguments(contents: Mapping[str, Any], config: IJepaConfig) -> dict[str, Any]:
    model = argument_values(ModelArguments().resolved(config))
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
