"""Says whose a fine-tuning's folder is, finds its checkpoints, and deletes what a fine-tuning wrote."""

import dataclasses
import json
import logging
import shutil
from pathlib import Path
from pickle import UnpicklingError

import torch
from huggingface_hub.constants import REPOCARD_NAME
from safetensors import SafetensorError, safe_open

from ijepa_hf.files import read_json
from ijepa_hf.finetuning.arguments import FinetuningArguments, FinetuningFlags
from ijepa_hf.recipes.arguments import differing_arguments
from ijepa_hf.runs.folder import FINETUNING_FILE

ARGUMENTS_FILE = "finetune_arguments.json"

logger = logging.getLogger(__name__)

# What may differ between a run and its continuation.
_FREE_ARGUMENTS = {
    entry.name for entry in dataclasses.fields(FinetuningFlags) if entry.metadata["changes"] in ("speed", "place")
}
_OVERWRITE = "Choose another --output_dir, or add --overwrite_output_dir to delete that one."
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
    if not holds_a_run(output_dir):
        return
    if arguments.overwrite_output_dir:
        for name, path in (("model", arguments.model), ("resume_from_checkpoint", arguments.resume_from_checkpoint)):
            if path not in (None, "latest"):
                resolved = Path(path).resolve()
                if output_dir.resolve() in (resolved, *resolved.parents):
                    raise ValueError(
                        f"overwrite_output_dir would delete {name}={path!r}; choose another --output_dir."
                    )
        return
    check_same_run(output_dir, arguments, _OVERWRITE)
    if arguments.resume_from_checkpoint is None and not (output_dir / FINETUNING_FILE).is_file():
        raise ValueError(
            f"output_dir={str(output_dir)!r} holds this fine-tuning, unfinished. Add --resume_from_checkpoint latest "
            "to continue it, or --overwrite_output_dir to start again."
        )


def holds_a_run(folder: Path) -> bool:
    """Says whether a folder holds a fine-tuning, finished or not.

    Args:
        folder: The folder; it need not exist.

    Returns:
        `False` if it is missing or empty.

    Raises:
        ValueError: If it holds something else.
    """
    if not folder.exists() or not any(folder.iterdir()):
        return False
    if not (folder / ARGUMENTS_FILE).is_file():
        raise ValueError(
            f"output_dir={str(folder)!r} is not empty and holds no fine-tuning of ijepa-hf; choose another "
            "--output_dir."
        )
    return True


def check_same_run(folder: Path, arguments: FinetuningArguments, advice: str) -> None:
    """Refuses a folder that holds another fine-tuning.

    Args:
        folder: Holds a fine-tuning, finished or not.
        arguments: Of this one; those that a continuation is free to change do not count.
        advice: The last sentence of the error.

    Raises:
        ValueError: If they differ, naming in what; or if the file of its arguments is damaged.
    """
    stored = read_json(folder / ARGUMENTS_FILE)
    differing = differing_arguments(stored or {}, dataclasses.asdict(arguments), _FREE_ARGUMENTS, {})
    if differing:
        raise ValueError(f"{str(folder)!r} holds another fine-tuning: {'; '.join(differing)}. {advice}")


def find_checkpoint(output_dir: Path, arguments: FinetuningArguments) -> Path | None:
    """Finds the checkpoint that a fine-tuning goes on from.

    Args:
        output_dir: Its folder, where `latest` is looked for.
        arguments: Its arguments.

    Returns:
        The folder that was named, or the newest complete one; `None` if none was asked for or there is none.

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
            check_same_run(folder.parent, arguments, _OVERWRITE)
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


def _is_complete(checkpoint: Path) -> bool:
    """Returns whether all of a checkpoint can be read; `Trainer` writes `trainer_state.json` last."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text("utf-8"))
        for name in ("optimizer.pt", "scheduler.pt"):
            torch.load(checkpoint / name, map_location="cpu", weights_only=True)
        with safe_open(checkpoint / "model.safetensors", framework="pt"):
            return True
    except (OSError, ValueError, RuntimeError, EOFError, UnpicklingError, SafetensorError):
        return False
