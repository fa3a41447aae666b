"""Resumable training states: written whole or not at all, checked before they are read, pruned to a limit.

    output_dir/checkpoint-<step>/   model.safetensors  optimizer.safetensors  checkpoint.json

`checkpoint.json` is written last: the step, the model's configuration, the run's arguments, and size and SHA-256 of
the other files. No generator's state is needed, every draw is a function of the step (see `data.py`). Only
safetensors and JSON are read, never pickles.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ijepa_hf.export import flush_to_disk

MANIFEST_FILE = "checkpoint.json"
MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"

logger = logging.getLogger(__name__)

_FOLDER_NAME = re.compile(r"checkpoint-(\d+)")


class DamagedCheckpointError(ValueError):
    """A checkpoint folder is incomplete, or its files are not what was written."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files have been checked.

    Args:
        path: The folder.
        step: Optimiser steps done.
        config: The model's configuration, as a dictionary.
        arguments: The run's arguments.
        stream: Where a streamed set stands, see `TrainingImages.stream_state`; `None` for a map-style one.
    """

    path: Path
    step: int
    config: dict[str, Any]
    arguments: dict[str, Any]
    stream: dict[str, Any] | None = None


def save_checkpoint(
    output_dir: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    config: Mapping[str, Any],
    arguments: Mapping[str, Any],
    total_limit: int,
    stream: Mapping[str, Any] | None = None,
) -> Path:
    """Writes `checkpoint-<step>`, then removes the oldest beyond the limit.

    Everything goes into a sibling folder that is renamed when it is complete and on disk; killed at any point, this
    leaves the earlier checkpoints as they were.

    Args:
        output_dir: The run's folder.
        step: Optimiser steps done.
        model: Both encoders and the predictor.
        optimizer: Built from *named* parameters.
        config: The model's configuration.
        arguments: The run's arguments.
        total_limit: Checkpoints to keep, at least 1.
        stream: Where a streamed set stands.

    Returns:
        The checkpoint's folder.

    Raises:
        FloatingPointError: If a weight is not finite; nothing is written.
    """
    _check_finite(model, step)
    final, partial = output_dir / f"checkpoint-{step}", output_dir / f".checkpoint-{step}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file({name: _plain(tensor) for name, tensor in model.state_dict().items()}, partial / MODEL_FILE)
    save_file(_optimizer_tensors(optimizer), partial / OPTIMIZER_FILE)
    files = {name: _fingerprint(partial / name) for name in (MODEL_FILE, OPTIMIZER_FILE)}
    manifest = {"step": step, "files": files, "config": dict(config), "arguments": dict(arguments), "stream": stream}
    (partial / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2, default=str) + "\n", "utf-8")
    _move_into_place(partial, final)
    others = [folder for _, folder in _folders(output_dir) if folder != final]
    for folder in others[: max(0, len(others) - (total_limit - 1))]:
        shutil.rmtree(folder)
    return final


def adopt_checkpoint(checkpoint: Checkpoint, output_dir: Path) -> Path:
    """Takes over a checkpoint from elsewhere, so that a run that goes on from it can be resumed from its own folder.

    Args:
        checkpoint: From `read_checkpoint`.
        output_dir: The run's folder.

    Returns:
        The folder `checkpoint-<step>` in it.
    """
    final = output_dir / f"checkpoint-{checkpoint.step}"
    partial = output_dir / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for source in checkpoint.path.iterdir():
        shutil.copyfile(source, partial / source.name)  # a file of the Hub's cache is a link: its content is copied
    _move_into_place(partial, final)
    return final


def delete_checkpoints_after(output_dir: Path, step: int) -> None:
    """Deletes the checkpoints of later steps, left by an earlier life of a run that goes on from `step`.

    Args:
        output_dir: The run's folder.
        step: The step that the run goes on from; 0 deletes all.
    """
    for number, folder in _folders(output_dir):
        if number > step:
            shutil.rmtree(folder)


def read_checkpoint(path: Path) -> Checkpoint:
    """Checks a checkpoint's files against its manifest.

    Args:
        path: The folder.

    Returns:
        The checkpoint, ready for `restore`.

    Raises:
        FileNotFoundError: If there is no such folder.
        DamagedCheckpointError: If something is missing or differs from what was written.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"resume_from_checkpoint={str(path)!r}: there is no such folder.")
    try:
        manifest = json.loads((path / MANIFEST_FILE).read_text("utf-8"))
        step, files = int(manifest["step"]), manifest["files"]
        config, arguments, stream = manifest["config"], manifest["arguments"], manifest.get("stream")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpointError(f"{path}: {MANIFEST_FILE} is missing or unreadable ({error}).") from error
    for name, expected in files.items():
        if not (path / name).is_file():
            raise DamagedCheckpointError(f"{path}: {name} is missing.")
        if _fingerprint(path / name) != expected:
            raise DamagedCheckpointError(f"{path}: {name} is not what was written (size or SHA-256 differs).")
    return Checkpoint(path, step, config, arguments, stream)


def find_latest(output_dir: Path) -> Checkpoint | None:
    """The newest undamaged checkpoint of a run; damaged ones are named in the log and skipped.

    Args:
        output_dir: The run's folder; need not exist.

    Returns:
        The checkpoint, or `None` where there is none.
    """
    for _, folder in reversed(_folders(output_dir)):
        try:
            return read_checkpoint(folder)
        except DamagedCheckpointError as error:
            logger.warning("skipping a damaged checkpoint: %s", error)
    return None


def restore(
    checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer, config: Mapping[str, Any]
) -> None:
    """Puts a checkpoint's weights and optimiser state in place.

    Args:
        checkpoint: From `read_checkpoint` or `find_latest`.
        model: The model, on its device.
        optimizer: Its optimiser, built from named parameters.
        config: The model's configuration, compared with the checkpoint's first.

    Raises:
        ValueError: If the checkpoint is another model's; lists the fields that differ. Nothing is changed.
    """
    stored = checkpoint.config
    differing = [name for name in sorted({*config, *stored}) if _differs(config.get(name), stored.get(name))]
    if differing:
        listed = "; ".join(f"{name} is {stored.get(name)!r} there, {config.get(name)!r} here" for name in differing)
        raise ValueError(
            f"resume_from_checkpoint={str(checkpoint.path)!r} is another model's: {listed}. Use the arguments of that "
            "run, or another checkpoint."
        )
    model.load_state_dict(load_file(checkpoint.path / MODEL_FILE))
    tensors = load_file(checkpoint.path / OPTIMIZER_FILE)
    state = optimizer.state_dict()
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    numbers = {name: number for number, name in enumerate(names)}
    entries: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, slot = key.rpartition("/")
        entries.setdefault(numbers[name], {})[slot] = tensor
    optimizer.load_state_dict({**state, "state": entries})


def config_fields(config: Any) -> dict[str, Any]:
    """The fields that make a model what it is: the stock I-JEPA fields and those of this package.

    Args:
        config: An `IJepaConfig`.

    Returns:
        A dictionary that is equal for equal models, whichever transformers version wrote it.
    """
    names = {
        name for cls in type(config).__mro__ if cls.__module__.endswith("configuration_ijepa") for name in _own(cls)
    }
    return {
        name: value for name, value in json.loads(json.dumps(config.to_dict(), default=str)).items() if name in names
    }


def _move_into_place(partial: Path, final: Path) -> None:
    """Renames a finished folder, when it is on disk."""
    for entry in (*partial.iterdir(), partial):
        flush_to_disk(entry)
    replaced = final.with_name(f".{final.name}.replaced")
    if final.exists():  # moved aside first, so that no moment is without a whole one
        os.replace(final, replaced)
    os.replace(partial, final)
    flush_to_disk(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _own(cls: type) -> set[str]:
    return set(vars(cls).get("__annotations__", {}))


def _folders(output_dir: Path) -> list[tuple[int, Path]]:
    """Checkpoint folders, oldest first."""
    if not output_dir.is_dir():
        return []
    found = [(match, path) for path in output_dir.iterdir() if (match := _FOLDER_NAME.fullmatch(path.name))]
    return sorted((int(match[1]), path) for match, path in found if path.is_dir())


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    tensors = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            for slot, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{name}/{slot}"] = _plain(torch.as_tensor(value))
    return tensors


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous()


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}


def _check_finite(model: nn.Module, step: int) -> None:
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise FloatingPointError(
                f"step {step}: {name} has NaN or infinite values; the checkpoint was not written."
            )


def _differs(one: Any, other: Any) -> bool:
    as_list = [list(value) if isinstance(value, tuple) else value for value in (one, other)]
    return as_list[0] != as_list[1]
