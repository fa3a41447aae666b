"""Says whose a fine-tuning's folder is, finds its checkpoints, and deletes what a fine-tuning wrote."""

import dataclasses
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub.constants import REPOCARD_NAME
from safetensors import SafetensorError, safe_open

from ijepa_hf.finetuning.arguments import FinetuningArguments, FinetuningFlags
from ijepa_hf.recipes.arguments import differing_arguments
from ijepa_hf.runs.folder import FINETUNING_FILE

ARGUMENTS_FILE = "finetune_arguments.json"

logger = logging.getLogger(__name__)

# What may differ between a run and its continuation.
_FREE_ARGUMENTS = {
    entry.name for entry in dataclasses.fields(FinetuningFlags) if entry.metadata["changes"] in ("speed", "place")
}
_RUN_ENTRIES = (
    ARGUMENTS_FILE, FINETUNING_FILE, REPOCARD_NAME, "config.json", "model.safetensors", "preprocessor_config.json",
    "figures",
)  # fmt: skip


def check_output_dir(output_dir: Path, arguments: FinetuningArguments) -> None:
    """Refuses a folder that holds something else than this fine-tuning.

    Args:
        output_dir: The folder; it need not exist.
        arguments: Of the fine-tuning that is to write there, as they were asked for.

    Raises:
        ValueError: If the folder is not empty and holds no fine-tuning, another one, or this one unfinished and not to
            be resumed; or if overwriting it would delete the model or the checkpoint that is to be read.
    """
    if not output_dir.exists() or not any(output_dir.iterdir()):
        return
    if not (output_dir / ARGUMENTS_FILE).is_file():
        raise ValueError(
            f"output_dir={str(output_dir)!r} is not empty and holds no fine-tuning of ijepa-hf; choose another "
            "--output_dir."
        )
    if arguments.overwrite_output_dir:
        for name, path in (("model", arguments.model), ("resume_from_checkpoint", arguments.resume_from_checkpoint)):
            if path not in (None, "latest"):
                resolved = Path(path).resolve()
                if output_dir.resolve() in (resolved, *resolved.parents):
                    raise ValueError(
                        f"overwrite_output_dir would delete {name}={path!r}; choose another --output_dir."
                    )
        return
    _check_same_run(output_dir, dataclasses.asdict(arguments))
    if arguments.resume_from_checkpoint is None and not (output_dir / FINETUNING_FILE).is_file():
        raise ValueError(
            f"output_dir={str(output_dir)!r} holds this fine-tuning, unfinished. Add --resume_from_checkpoint latest "
            "to continue it, or --overwrite_output_dir to start again."
        )


def differences_from(folder: Path, values: Mapping[str, Any]) -> list[str]:
    """Names the arguments in which a fine-tuning differs from the one in a folder.

    Args:
        folder: Holds a fine-tuning, finished or not.
        values: Arguments of `FinetuningArguments`; those that a continuation is free to change do not count.

    Returns:
        Such as "seed is 0 there, 1 here"; nothing where the two are one.

    Raises:
        ValueError: If the file of its arguments is damaged.
    """
    try:
        stored = json.loads((folder / ARGUMENTS_FILE).read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / ARGUMENTS_FILE} is damaged ({error}); choose another --output_dir.") from error
    return differing_arguments(stored, values, _FREE_ARGUMENTS, {})


def find_checkpoint(output_dir: Path, arguments: FinetuningArguments) -> Path | None:
    """Finds the checkpoint that a fine-tuning goes on from.

    Args:
        output_dir: Its folder, where `latest` is looked for.
        arguments: Its arguments.

    Returns:
        The folder that was named, or the newest complete one; `None` where none was asked for or there is none.

    Raises:
        FileNotFoundError: If the folder that was named is no complete and undamaged checkpoint.
        ValueError: If it belongs to another fine-tuning.
    """
    asked = arguments.resume_from_checkpoint
    if asked is None:
        return None
    if asked != "latest":
        folder = Path(asked)
        if not _is_complete(folder):
            raise FileNotFoundError(
                f"resume_from_checkpoint={asked!r}: there is no complete and undamaged checkpoint."
            )
        if (folder.parent / ARGUMENTS_FILE).is_file():
            _check_same_run(folder.parent, dataclasses.asdict(arguments))
        return folder
    found = sorted(output_dir.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for folder in reversed(found):
        if _is_complete(folder):
            return folder
        logger.warning("skipping %s, which is incomplete or damaged", folder)
    logger.warning("%s holds no checkpoint: the fine-tuning starts at step 0", output_dir)
    return None


def delete_run(output_dir: Path) -> None:
    """Deletes what a fine-tuning writes, and nothing else that may lie in the folder.

    Args:
        output_dir: The folder.
    """
    for entry in [output_dir / name for name in _RUN_ENTRIES] + list(output_dir.glob("checkpoint-*")):
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink(missing_ok=True)


def _check_same_run(folder: Path, values: Mapping[str, Any]) -> None:
    differing = differences_from(folder, values)
    if differing:
        raise ValueError(
            f"{str(folder)!r} holds another fine-tuning: {'; '.join(differing)}. Choose another --output_dir, or add "
            "--overwrite_output_dir to delete that one."
        )


def _is_complete(checkpoint: Path) -> bool:
    """Whether all of a checkpoint can be read; `Trainer` writes `trainer_state.json` last."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text("utf-8"))
        for name in ("optimizer.pt", "scheduler.pt"):
            torch.load(checkpoint / name, map_location="cpu", weights_only=True)
        with safe_open(checkpoint / "model.safetensors", framework="pt"):
            return True
    except (OSError, ValueError, RuntimeError, EOFError, UnpicklingError, SafetensorError):
        return False
