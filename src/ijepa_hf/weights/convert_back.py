"""Turns a model folder into a published checkpoint."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ijepa_hf.files import flush_to_disk, read_json
from ijepa_hf.model.configuration_ijepa import IJepaConfig
from ijepa_hf.model.encoder_ijepa import from_file_name
from ijepa_hf.model.modeling_ijepa import PRETRAINING_SUBFOLDER, IJepaForPretraining
from ijepa_hf.runs.checkpoints import MODEL_FILE, OPTIMIZER_FILE, Checkpoint, find_latest
from ijepa_hf.runs.export import WEIGHTS_FILE, exported_step
from ijepa_hf.runs.folder import CONVERSION_FILE
from ijepa_hf.weights.convert import same_bits
from ijepa_hf.weights.official_checkpoint import all_finite, format_problems, networks_of, unpickle
from ijepa_hf.weights.official_names import (
    ADAMW_SLOTS,
    FROZEN_NAMES,
    NAME_PREFIX,
    PARTS,
    PUBLISHED_HEADS,
    PUBLISHED_LAYER_NORM_EPS,
    SCALARS,
    TRAINED_PARTS,
    Networks,
    official_names,
    optimizer_groups,
    our_names,
)

# What a gradient scaler starts with. The published code calls its load under bf16, and an error there sends it back to
# epoch 0; the scale changes nothing in bf16.
_FRESH_SCALER = {
    "scale": 65536.0,
    "growth_factor": 2.0,
    "backoff_factor": 0.5,
    "growth_interval": 2000,
    "_growth_tracker": 0,
}


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
        ValueError: If the target exists, or the published format cannot hold the model. Nothing is written then.
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
        part: {NAME_PREFIX + name: tensor for name, tensor in networks[part].items()} for part in PARTS
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
    """Refuses a model that the published code cannot build, or would compute differently."""
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
        f"target_type={config.target_type!r} is not 'representation'": config.target_type == "representation",
    }
    broken = [rule for rule, holds in rules.items() if not holds]
    if broken:
        raise ValueError(f"the published code has no such model: {'; '.join(broken)}.")


def _networks_from_ours(path: Path, config: IJepaConfig) -> dict[str, dict[str, Tensor]]:
    """Returns the three networks under their published names and in that order; only joined tensors are copies."""
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
        elif not all_finite(tensor):
            problems.append(f"{name} has NaN or infinite values")
    if problems:
        raise ValueError(
            f"{path} does not fit its configuration; nothing was written:\n  " + format_problems(problems)
        )
    return {
        part: {name: _join(tensors, part, name) for name in names} for part, names in official_names(config).items()
    }


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return {from_file_name(name): tensor for name, tensor in load_file(path).items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _join(tensors: Mapping[str, Tensor], part: str, name: str, slot: str = "") -> Tensor:
    """Returns the published tensor of a name: our tensor, or three of ours concatenated along the first axis."""
    pieces = [tensors[f"{key}{slot}"] for key in our_names(part, name)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _entries_of(folder: Path, checkpoint: Checkpoint | None) -> dict[str, int | float | None]:
    """Returns the numbers beside the networks, from the converted file or from the run; unknown ones are `None`."""
    report = read_json(folder / CONVERSION_FILE)
    if report is not None:
        return {name: report.get("entries", {}).get(name) for name in SCALARS}
    run = read_json(folder / "run.json") or {}
    arguments = run.get("arguments", {}) if checkpoint is None else checkpoint.arguments
    step = exported_step(folder) if checkpoint is None else checkpoint.step
    entries: dict[str, int | float | None] = dict.fromkeys(SCALARS)
    batch, steps_per_epoch = arguments.get("global_batch_size"), _epoch_length(arguments)
    if steps_per_epoch is not None and step is not None:
        entries["epoch"] = step // steps_per_epoch
    if batch:
        rank_batch = arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"]
        entries |= {"batch_size": rank_batch, "world_size": batch // rank_batch}
        entries["lr"] = _learning_rate(arguments)
    return entries


def _epoch_length(arguments: Mapping[str, Any]) -> int | None:
    """Returns the optimiser steps in an epoch; `None` if the run's arguments do not give them."""
    batch, images = arguments.get("global_batch_size"), arguments.get("num_train_images")
    return images // batch if batch and images else None


def _learning_rate(arguments: Mapping[str, Any]) -> float | None:
    """Returns the highest learning rate of a run, which may be 0; `None` if its arguments do not give it."""
    rate, base, batch = (arguments.get(name) for name in ("learning_rate", "base_learning_rate", "global_batch_size"))
    if rate is not None:
        return float(rate)
    return None if base is None or batch is None else base * batch / 256


def _official_optimizer(checkpoint: Checkpoint, networks: Networks) -> dict[str, Any]:
    """Builds the `state_dict()` that the published optimiser would have."""
    tensors = _read_tensors(checkpoint.path / OPTIMIZER_FILE)
    arguments = checkpoint.arguments
    blank = torch.optim.AdamW([torch.zeros(1)]).state_dict()["param_groups"][0]  # every field that torch knows
    rate = _learning_rate(arguments)
    blank["lr"] = blank["lr"] if rate is None else rate
    blank["betas"] = (arguments.get("adam_beta1", 0.9), arguments.get("adam_beta2", 0.999))
    blank["eps"] = arguments.get("adam_epsilon", 1e-8)
    blank["weight_decay"] = arguments.get("weight_decay", blank["weight_decay"])
    groups, state, number = [], {}, 0
    for place, members in enumerate(optimizer_groups(networks)):
        undecayed = {"WD_exclude": True, "weight_decay": 0} if place >= len(TRAINED_PARTS) else {}
        groups.append({**blank, **undecayed, "params": list(range(number, number + len(members)))})
        for part, name in members:
            if name not in FROZEN_NAMES:
                state[number] = _joined_state(tensors, part, name, checkpoint)
            number += 1
    return {"state": state, "param_groups": groups}


def _joined_state(tensors: Mapping[str, Tensor], part: str, name: str, checkpoint: Checkpoint) -> dict[str, Tensor]:
    keys = our_names(part, name)
    lacking = [f"{key}/{slot}" for key in keys for slot in ADAMW_SLOTS if f"{key}/{slot}" not in tensors]
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
        found, tensors = unpickle(path)[part], _read_tensors(weights)
        differing += [f"{part}.{name} is missing" for name in names if NAME_PREFIX + name not in found]
        differing += [
            f"{part}.{name}"
            for name, tensor in found.items()
            if not same_bits(tensor, _join(tensors, part, name.removeprefix(NAME_PREFIX)))
        ]
    if checkpoint is not None:
        contents, tensors = unpickle(path), _read_tensors(checkpoint.path / OPTIMIZER_FILE)
        members = [member for group in optimizer_groups(networks_of(contents, path)) for member in group]
        for number, entry in contents["opt"]["state"].items():
            part, name = members[number]
            differing += [
                f"opt.state[{number}].{slot}"
                for slot in ("exp_avg", "exp_avg_sq")
                if not same_bits(entry[slot], _join(tensors, part, name, f"/{slot}"))
            ]
    if differing:
        raise OSError(
            f"{path.name} is not what was written to it, in {format_problems(differing)}; is the disk sound?"
        )


def _official_message(
    folder: Path, target: Path, config: IJepaConfig, checkpoint: Checkpoint | None, entries: Mapping[str, Any]
) -> str:
    lines = [f"{target}: encoder, predictor and target encoder of {folder}, every bit compared"]
    if checkpoint is None:
        lines.append("without optimiser state: published code loads the weights, and starts at epoch 0")
    else:
        lines.append(f"optimiser state of step {checkpoint.step}, epoch {entries['epoch']}")
        steps_per_epoch = _epoch_length(checkpoint.arguments)
        if steps_per_epoch is not None and checkpoint.step % steps_per_epoch:
            lines.append(
                f"note: the epoch is rounded down: {checkpoint.step % steps_per_epoch} of the {steps_per_epoch} steps "
                "of the one that it is in are done, and published code starts that one again"
            )
    if PUBLISHED_HEADS.get(config.hidden_size) != config.num_attention_heads:
        lines.append(
            f"the file does not say that there are {config.num_attention_heads} heads: whoever loads it must know"
        )
    return "\n".join(lines)
