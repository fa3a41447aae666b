"""Writes, checks, prunes and restores checkpoints: resumable training states, written whole or not at all.

    output_dir/checkpoint-<step>/   model.safetensors  optimizer.safetensors  checkpoint.json

`checkpoint.json` is written last. It has its own SHA-256, the step, the model's configuration, the run's arguments,
and size and SHA-256 of the other files. The files hold unsharded tensors, for any number of processes:
`collect_state` gathers the parts, `restore` gives each process its part again. No state of a generator is needed:
every draw is a function of the step (`randomness.py`). Only safetensors and JSON are read, never pickles.

A folder is filled under a hidden name, `.checkpoint-<step>.partial`, and then renamed; before one is replaced or
deleted, it is renamed too (`.replaced`, `.deleted`). So a killed process leaves hidden folders (`remove_leftovers`),
and never an incomplete checkpoint.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ijepa_hf.files import file_bytes, flush_to_disk, remove_entry, save_tensors, saving
from ijepa_hf.model.sharding import whole_tensor

CHECKPOINT_FILE = "checkpoint.json"
MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"

logger = logging.getLogger(__name__)

_FOLDER_NAME = re.compile(r"checkpoint-(\d+)")
_HIDDEN_NAME = re.compile(r"\.checkpoint-(\d+)\.(partial|replaced|deleted)")
_NO_DIGEST = "0" * 64  # placeholder for the SHA-256 of `checkpoint.json` while that is computed
_MANIFEST_FIELDS = {"step", "files", "config", "arguments", "stream"}
_ADAMW_SLOTS = {"step", "exp_avg", "exp_avg_sq"}
_MOST_LISTED = 5


class DamagedCheckpointError(ValueError):
    """A checkpoint folder is incomplete, or its files were changed after they were written."""


@dataclass(frozen=True)
class Checkpoint:
    """Describes a checkpoint whose files have been checked.

    Args:
        path: The folder.
        step: Optimiser steps done.
        config: The model's configuration, as a dictionary.
        arguments: The run's arguments.
        stream: Position in a streamed data set, see `TrainingImages.stream_state`; `None` for a map-style one.
    """

    path: Path
    step: int
    config: dict[str, Any]
    arguments: dict[str, Any]
    stream: dict[str, Any] | None = None


@dataclass(frozen=True)
class TrainingTensors:
    """Holds all tensors of a training state, unsharded, on the CPU; a model on the CPU shares its memory with them.

    Args:
        model: By name: both encoders and the predictor.
        optimizer: By `name/slot`.
    """

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]


def collect_state(model: nn.Module, optimizer: torch.optim.Optimizer, *, keep: bool = True) -> TrainingTensors:
    """Gathers a training state; all processes of a sharded model have to call this together.

    Args:
        model: Both encoders and the predictor.
        optimizer: Built from *named* parameters.
        keep: Whether this process keeps the tensors, to write them; another process only helps to gather.

    Returns:
        The tensors; empty if `keep` is false.
    """
    tensors = TrainingTensors({}, {})
    for name, tensor in model.state_dict().items():
        whole = whole_tensor(tensor)
        if keep:
            tensors.model[name] = whole.cpu().contiguous()
    for name, parameter in _named_parameters(optimizer).items():
        for slot, value in optimizer.state.get(parameter, {}).items():
            whole = whole_tensor(torch.as_tensor(value))
            if keep:
                tensors.optimizer[f"{name}/{slot}"] = whole.cpu().contiguous()
    return tensors


def save_checkpoint(
    output_dir: Path,
    step: int,
    tensors: TrainingTensors,
    *,
    config: Mapping[str, Any],
    arguments: Mapping[str, Any],
    total_limit: int,
    stream: Mapping[str, Any] | None = None,
) -> Path:
    """Writes `checkpoint-<step>`, then deletes the oldest checkpoints beyond the limit. For one process only.

    A process that is killed at any point leaves the earlier checkpoints as they were.

    Args:
        output_dir: The run's folder, which must exist: after its disk has gone, it must not be created elsewhere.
        step: Optimiser steps done.
        tensors: From `collect_state`.
        config: The model's configuration.
        arguments: The run's arguments.
        total_limit: Checkpoints to keep, at least 1.
        stream: Position in a streamed data set.

    Returns:
        The checkpoint's folder.

    Raises:
        FloatingPointError: If a weight is not finite; nothing is written.
        SaveError: If it cannot be written; nothing of it is left, and earlier checkpoints are whole.
    """
    _check_finite(tensors.model, step)
    final = output_dir / f"checkpoint-{step}"
    with _new_folder(final, file_bytes([*tensors.model.values(), *tensors.optimizer.values()])) as partial:
        save_tensors(tensors.model, partial / MODEL_FILE)
        save_tensors(tensors.optimizer, partial / OPTIMIZER_FILE)
        files = {name: _fingerprint(partial / name) for name in (MODEL_FILE, OPTIMIZER_FILE)}
        text = _sealed(
            {"step": step, "files": files, "config": dict(config), "arguments": dict(arguments), "stream": stream}
        )
        (partial / CHECKPOINT_FILE).write_text(text, "utf-8")
    others = [folder for _, folder in _folders(output_dir) if folder != final]
    for folder in others[: max(0, len(others) - (total_limit - 1))]:
        try:
            _delete(folder)
        except OSError as error:  # the new state is safe, and an old folder does no harm
            logger.warning("%s is beyond checkpoints_total_limit and could not be removed: %s", folder, error)
    return final


def adopt_checkpoint(checkpoint: Checkpoint, output_dir: Path) -> Path:
    """Copies a checkpoint of another folder, so that the run can later be resumed from its own folder.

    Args:
        checkpoint: From `read_checkpoint`.
        output_dir: The run's folder.

    Returns:
        The folder `checkpoint-<step>` in it.

    Raises:
        SaveError: If it cannot be written; nothing of it is left.
    """
    final = output_dir / f"checkpoint-{checkpoint.step}"
    sources = [source for source in checkpoint.path.iterdir() if source.is_file()]
    with _new_folder(final, sum(source.stat().st_size for source in sources) + file_bytes([])) as partial:
        for source in sources:
            # a file of the Hub's cache is a link: its content is copied
            shutil.copyfile(source, partial / source.name)
    return final


def delete_checkpoints_after(output_dir: Path, step: int) -> None:
    """Deletes the checkpoints of steps after the one that a run resumes from.

    Args:
        output_dir: The run's folder.
        step: The step that the run resumes from; 0 deletes all.
    """
    for number, folder in reversed(_folders(output_dir)):
        if number > step:
            _delete(folder)


def remove_leftovers(output_dir: Path) -> None:
    """Deletes the hidden folders of a killed process; gives a checkpoint that it was replacing its name back.

    Args:
        output_dir: A run's folder that no other process is writing to.
    """
    for path in list(output_dir.iterdir()):
        match = _HIDDEN_NAME.fullmatch(path.name)
        if match is None:
            continue
        final = output_dir / f"checkpoint-{match[1]}"
        if match[2] == "replaced" and not final.exists():
            os.replace(path, final)
        else:
            remove_entry(path)


def read_checkpoint(path: Path) -> Checkpoint:
    """Checks the files of a checkpoint against its `checkpoint.json`.

    Args:
        path: The folder.

    Returns:
        The checkpoint, ready for `restore`.

    Raises:
        FileNotFoundError: If there is no such folder.
        DamagedCheckpointError: If a file is missing or was changed. Both messages name the newest whole checkpoint in
            the same folder, if there is one.
    """
    if not path.is_dir():
        raise FileNotFoundError(
            f"resume_from_checkpoint={str(path)!r}: there is no such folder.{_advice(path.parent)}"
        )
    try:
        return _read(path)
    except DamagedCheckpointError as error:
        raise DamagedCheckpointError(f"{error}{_advice(path.parent)}") from error


def find_latest(output_dir: Path) -> Checkpoint | None:
    """Finds the newest whole checkpoint of a run; logs newer ones that are damaged, and the steps that this costs.

    Args:
        output_dir: The run's folder; need not exist.

    Returns:
        The checkpoint, or `None` if there is none.
    """
    checkpoint, damaged = _newest_whole(output_dir)
    for error in damaged.values():
        logger.warning("a damaged checkpoint: %s", error)
    if damaged and checkpoint is None:
        logger.warning("no whole checkpoint is left in %s.", output_dir)
    elif damaged and checkpoint is not None:
        newest = max(damaged)
        logger.warning(
            "the newest whole checkpoint is %s, of step %d, %d before the damaged one of step %d: a run that resumes "
            "from it repeats those %d steps.",
            checkpoint.path, checkpoint.step, newest - checkpoint.step, newest, newest - checkpoint.step,
        )  # fmt: skip
    return checkpoint


def restore(
    checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer, config: Mapping[str, Any]
) -> None:
    """Loads weights and optimiser state of a checkpoint; each process of a sharded model loads its part.

    Each process reads the files; the processes send each other nothing.

    Args:
        checkpoint: From `read_checkpoint` or `find_latest`.
        model: The model, on its device.
        optimizer: Its optimiser, an AdamW built from named parameters.
        config: The model's configuration, as `config_fields` gives it.

    Raises:
        ValueError: If the checkpoint is another model's; the message lists the fields that differ.
        DamagedCheckpointError: If it lacks tensors or has others; the message names them. Both errors leave the model
            unchanged.
    """
    stored = checkpoint.config
    differing = [name for name in sorted({*config, *stored}) if _differs(config.get(name), stored.get(name))]
    if differing:
        listed = "; ".join(f"{name} is {stored.get(name)!r} there, {config.get(name)!r} here" for name in differing)
        raise ValueError(
            f"resume_from_checkpoint={str(checkpoint.path)!r} is another model's: {listed}. Use the arguments of that "
            "run, or another checkpoint."
        )
    own, parameters = model.state_dict(), _named_parameters(optimizer)
    weights, moments = _load(checkpoint.path / MODEL_FILE), _load(checkpoint.path / OPTIMIZER_FILE)
    _check_weights(checkpoint.path / MODEL_FILE, weights, own)
    _check_moments(checkpoint.path / OPTIMIZER_FILE, moments, parameters)
    model.load_state_dict({name: _like(weights[name], tensor) for name, tensor in own.items()})
    numbers = {name: number for number, name in enumerate(parameters)}
    entries: dict[int, dict[str, Tensor]] = {}
    for key, tensor in moments.items():
        name, _, slot = key.rpartition("/")
        placed = tensor if slot == "step" else _like(tensor, parameters[name])
        entries.setdefault(numbers[name], {})[slot] = placed
    optimizer.load_state_dict({**optimizer.state_dict(), "state": entries})


def config_fields(config: Any) -> dict[str, Any]:
    """Returns the fields that define a model: those of the stock I-JEPA configuration and those of this package.

    Args:
        config: An `IJepaConfig`.

    Returns:
        A dictionary that is equal for equal models, in every version of transformers.
    """
    names = {
        name for cls in type(config).__mro__ if cls.__module__.endswith("configuration_ijepa") for name in _own(cls)
    }
    return {
        name: value for name, value in json.loads(json.dumps(config.to_dict(), default=str)).items() if name in names
    }


@contextlib.contextmanager
def _new_folder(final: Path, num_bytes: int) -> Iterator[Path]:
    """Yields a hidden folder, and renames it when the block has filled it; deletes it where the block fails."""
    partial = final.with_name(f".{final.name}.partial")
    with saving(final, num_bytes):
        try:
            remove_entry(partial)
            partial.mkdir()
            yield partial
            _move_into_place(partial, final)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _move_into_place(partial: Path, final: Path) -> None:
    """Renames a finished folder, once it is on disk."""
    for entry in (*partial.iterdir(), partial):
        flush_to_disk(entry)
    replaced = final.with_name(f".{final.name}.replaced")
    if final.exists():  # moved aside first; it counts as a checkpoint while none has the name (`_candidates`)
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(final, replaced)
    try:
        os.replace(partial, final)
    except BaseException:
        if replaced.exists():
            os.replace(replaced, final)
        raise
    flush_to_disk(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _delete(folder: Path) -> None:
    """Deletes a checkpoint; a killed process leaves all of it or a hidden folder."""
    hidden = folder.with_name(f".{folder.name}.deleted")
    shutil.rmtree(hidden, ignore_errors=True)
    os.replace(folder, hidden)
    shutil.rmtree(hidden)


def _read(path: Path) -> Checkpoint:
    """Reads and checks a folder that exists."""
    try:
        content = (path / CHECKPOINT_FILE).read_bytes()
        manifest = json.loads(content)
        if not _seal_holds(content, manifest):
            raise ValueError("it was changed after it was written: its SHA-256 differs")
        step, files = int(manifest["step"]), {name: manifest["files"][name] for name in (MODEL_FILE, OPTIMIZER_FILE)}
        config, arguments, stream = manifest["config"], manifest["arguments"], manifest.get("stream")
    except (OSError, ValueError, KeyError, TypeError) as error:
        if _is_passing(error):
            raise
        raise DamagedCheckpointError(f"{path}: {CHECKPOINT_FILE} is missing or unreadable ({error}).") from error
    for name, expected in files.items():
        try:
            same = _fingerprint(path / name) == expected
        except OSError as error:
            if _is_passing(error):
                raise
            said = "is missing" if error.errno == errno.ENOENT else f"cannot be read ({error.strerror})"
            raise DamagedCheckpointError(f"{path}: {name} {said}.") from error
        if not same:
            raise DamagedCheckpointError(f"{path}: {name} is not what was written (size or SHA-256 differs).")
    return Checkpoint(path, step, config, arguments, stream)


def _is_passing(error: Exception) -> bool:
    """Returns whether an error may pass and is no damage of the file: a silent server, no permission, no memory."""
    lasting = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO, errno.ELOOP}  # EIO: a bad sector
    return isinstance(error, OSError) and error.errno not in lasting


def _newest_whole(output_dir: Path) -> tuple[Checkpoint | None, dict[int, DamagedCheckpointError]]:
    """Returns the newest whole checkpoint, and the error of each newer one by step."""
    damaged: dict[int, DamagedCheckpointError] = {}
    for step, folder in reversed(_candidates(output_dir)):
        try:
            return _read(folder), damaged
        except DamagedCheckpointError as error:
            damaged[step] = error
    return None, damaged


def _advice(output_dir: Path) -> str:
    """Returns the end of a message: the checkpoint to resume from instead."""
    checkpoint, _ = _newest_whole(output_dir)
    if checkpoint is None:
        return ""
    return f" The newest whole one beside it is of step {checkpoint.step}: use {str(checkpoint.path)!r} instead."


def _sealed(manifest: Mapping[str, Any]) -> str:
    """Returns the text of `checkpoint.json`. Its first entry is the SHA-256 of the text with zeros in its place."""
    text = json.dumps({"sha256": _NO_DIGEST, **manifest}, indent=2, default=str) + "\n"
    return text.replace(_NO_DIGEST, hashlib.sha256(text.encode()).hexdigest(), 1)


def _seal_holds(content: bytes, manifest: Mapping[str, Any]) -> bool:
    """Returns whether every byte is as written; an earlier version's record has no SHA-256, but must be complete."""
    if "sha256" not in manifest:
        return set(manifest) | {"stream"} == _MANIFEST_FIELDS
    digest = str(manifest["sha256"]).encode()
    return hashlib.sha256(content.replace(digest, _NO_DIGEST.encode(), 1)).hexdigest().encode() == digest


def _own(cls: type) -> set[str]:
    return set(vars(cls).get("__annotations__", {}))


def _folders(output_dir: Path) -> list[tuple[int, Path]]:
    """Lists the checkpoint folders, oldest first."""
    if not output_dir.is_dir():
        return []
    found = [(match, path) for path in output_dir.iterdir() if (match := _FOLDER_NAME.fullmatch(path.name))]
    return sorted((int(match[1]), path) for match, path in found if path.is_dir())


def _candidates(output_dir: Path) -> list[tuple[int, Path]]:
    """Lists the checkpoint folders, and those that a killed process renamed without replacing them."""
    folders = dict(_folders(output_dir))
    for path in output_dir.glob(".checkpoint-*.replaced") if output_dir.is_dir() else ():
        match = _HIDDEN_NAME.fullmatch(path.name)
        if match is not None:
            folders.setdefault(int(match[1]), path)
    return sorted(folders.items())


def _named_parameters(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Returns the parameters by name, in the order in which `state_dict` numbers them."""
    return {
        name: parameter
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    }


def _like(whole: Tensor, tensor: Tensor) -> Tensor:
    """Returns this process's part of an unsharded tensor, cut like the given sharded one."""
    if not isinstance(tensor, DTensor):
        return whole
    return distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None)


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise DamagedCheckpointError(f"{path} cannot be read: {error}") from error


def _check_weights(path: Path, weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    problems = [f"{name} is missing" for name in own if name not in weights]
    problems += [f"{name} is not of this model" for name in weights if name not in own]
    problems += [
        f"{name} is {list(weights[name].shape)}, expected {list(tensor.shape)}"
        for name, tensor in own.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    _raise_for(path, problems)


def _check_moments(path: Path, moments: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    """Checks that a network has the state of all its parameters, or of none: it was frozen from the start."""
    begun = {key.partition(".")[0] for key in moments}
    expected = {
        f"{name}/{slot}": torch.Size() if slot == "step" else parameter.shape
        for name, parameter in parameters.items()
        if name.partition(".")[0] in begun
        for slot in sorted(_ADAMW_SLOTS)
    }
    problems = [f"{key} is missing" for key in expected if key not in moments]
    problems += [f"{key} is not of this optimiser" for key in moments if key not in expected]
    problems += [
        f"{key} is {list(moments[key].shape)}, expected {list(shape)}"
        for key, shape in expected.items()
        if key in moments and moments[key].shape != shape
    ]
    _raise_for(path, problems)


def _raise_for(path: Path, problems: list[str]) -> None:
    if problems:
        listed = "; ".join(problems[:_MOST_LISTED])
        more = f"; and {len(problems) - _MOST_LISTED} more" if len(problems) > _MOST_LISTED else ""
        raise DamagedCheckpointError(f"{path} does not fit the model: {listed}{more}. Nothing was changed.")


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}


def _check_finite(weights: Mapping[str, Tensor], step: int) -> None:
    for name, tensor in weights.items():
        if not bool(torch.isfinite(tensor).all()):
            raise FloatingPointError(
                f"step {step}: {name} has NaN or infinite values; the checkpoint was not written."
            )


def _differs(one: Any, other: Any) -> bool:
    as_list = [list(value) if isinstance(value, tuple) else value for value in (one, other)]
    return as_list[0] != as_list[1]
