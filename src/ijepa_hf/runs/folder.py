"""Checks which run a folder belongs to and whether it is finished, and prepares the folder for a start or a resume.

    output_dir/   run.json  metrics.jsonl  diagnostics.jsonl  evaluations.jsonl  unreadable_images.jsonl  ...

Each line of a log has the optimiser step that wrote it, so that a run that resumes at an earlier step can drop the
later lines. `docs/architecture.md` lists all files of a run.
"""

import errno
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.constants import REPOCARD_NAME
from torch import nn

from ijepa_hf.files import (
    SaveError,
    file_bytes,
    free_bytes,
    remove_entry,
    saving,
    write_json_atomically,
    write_text_atomically,
)
from ijepa_hf.model.modeling_ijepa import PRETRAINING_SUBFOLDER
from ijepa_hf.recipes.arguments import PretrainingArguments, differing_arguments
from ijepa_hf.recipes.recipe_files import as_recipe
from ijepa_hf.runs.checkpoints import (
    Checkpoint,
    adopt_checkpoint,
    delete_checkpoints_after,
    find_latest,
    remove_leftovers,
)
from ijepa_hf.runs.export import CODE_FILES, WEIGHTS_FILE, exported_step
from ijepa_hf.runs.lock import LOCK_FILE
from ijepa_hf.runs.rows import DAMAGED_SUFFIX, move_damaged_lines, sort_rows

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
REPORT_FILE = "report.json"
CONVERSION_FILE = "conversion.json"  # of a converted model
FINETUNING_FILE = "finetune.json"  # of a fine-tuned one
METRICS_FILE = "metrics.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"
DIAGNOSTICS_FILE = "diagnostics.jsonl"
UNREADABLE_FILE = "unreadable_images.jsonl"
SKIPPED_FILE = "skipped_steps.jsonl"
RECIPE_FILE = "recipe.yaml"
EVAL_RESULTS_FOLDER = ".eval_results"  # the Hub's name for the folder of machine-readable scores

GROWING_FILES = (METRICS_FILE, EVALUATIONS_FILE, DIAGNOSTICS_FILE, UNREADABLE_FILE, SKIPPED_FILE)

# The files of a run, which `overwrite_output_dir` deletes. `run.json` is replaced instead: it says whose folder it is,
# even after a process was killed while it deleted.
_RUN_ENTRIES = (
    REPORT_FILE, RECIPE_FILE, *GROWING_FILES, *(name + DAMAGED_SUFFIX for name in GROWING_FILES), REPOCARD_NAME,
    "config.json", WEIGHTS_FILE, "preprocessor_config.json", PRETRAINING_SUBFOLDER, "figures", "trackers", *CODE_FILES,
    EVAL_RESULTS_FOLDER,
)  # fmt: skip


def check_output_dir(output_dir: Path, arguments: dict[str, Any], run: PretrainingArguments) -> None:
    """Refuses a folder that is not this run's, and an unfinished run that is not to be resumed.

    Args:
        output_dir: The folder; need not exist.
        arguments: All arguments of the run, as `run.json` keeps them.
        run: Says whether to overwrite or resume.

    Raises:
        ValueError: If the folder is not empty and holds no run, another run, or this one unfinished.
    """
    if not output_dir.exists() or all(_is_leftover(entry.name) for entry in output_dir.iterdir()):
        return
    if not (output_dir / RUN_FILE).is_file():
        raise ValueError(
            f"output_dir={str(output_dir)!r} is not empty and holds no run of ijepa-hf; choose another --output_dir."
        )
    if run.overwrite_output_dir:
        _check_nothing_needed_is_deleted(output_dir, run)
        return
    stored = read_run(output_dir, run)
    assert stored is not None  # the file is there
    differing = differing_arguments(stored["arguments"], arguments)
    if differing:
        raise ValueError(
            f"output_dir={str(output_dir)!r} holds another run: {'; '.join(differing)}. Choose another --output_dir, "
            "or add --overwrite_output_dir to delete that run."
        )
    check_begun(output_dir, run)


def check_begun(output_dir: Path, run: PretrainingArguments) -> None:
    """Refuses a folder for the reasons that are known before the weights are loaded.

    Args:
        output_dir: The folder; need not exist.
        run: Says whether to overwrite or resume, and which weights to start from.

    Raises:
        ValueError: If it holds a run from other weights, or an unfinished one that is not to be resumed.
    """
    stored = None if run.overwrite_output_dir else read_run(output_dir, run)
    if stored is None:
        return
    before = stored["arguments"].get("model_name_or_path")
    if before != run.model_name_or_path:
        raise ValueError(
            f"output_dir={str(output_dir)!r} holds another run: model_name_or_path is {before!r} there, "
            f"{run.model_name_or_path!r} here. Choose another --output_dir, or add --overwrite_output_dir to delete "
            "that run."
        )
    if run.resume_from_checkpoint is None and not is_finished(output_dir, run):
        raise ValueError(
            f"output_dir={str(output_dir)!r} holds this run, unfinished. Add --resume_from_checkpoint latest to "
            "continue it, or --overwrite_output_dir to start again."
        )


def _check_nothing_needed_is_deleted(output_dir: Path, run: PretrainingArguments) -> None:
    needed = {"model_name_or_path": run.model_name_or_path}
    if run.resume_from_checkpoint not in ("latest", "hub"):
        needed["resume_from_checkpoint"] = run.resume_from_checkpoint
    for name, value in needed.items():
        if value is not None and Path(value).exists():
            path = Path(value).resolve()
            if output_dir.resolve() in (path, *path.parents):
                raise ValueError(f"overwrite_output_dir would delete {name}={value!r}; choose another --output_dir.")


def _is_leftover(name: str) -> bool:
    """Returns whether a file or folder does not count as content: a lock, or a leftover of a killed process."""
    return name == LOCK_FILE or (name.startswith(".") and name.endswith((".partial", ".deleted")))


def read_run(output_dir: Path, run: PretrainingArguments | None = None) -> dict[str, Any] | None:
    """Reads `run.json`: `arguments`, and `config`, the model's configuration.

    Args:
        output_dir: The run's folder.
        run: The run that is to start there. If it resumes and `run.json` is damaged, the newest whole checkpoint is
            read instead, with a warning.

    Returns:
        The record, or `None` if there is none.

    Raises:
        ValueError: If it is damaged.
    """
    path = output_dir / RUN_FILE
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_bytes())
        record["arguments"]["output_dir"]
    except (ValueError, KeyError, TypeError) as error:
        resumes = run is not None and run.resume_from_checkpoint is not None
        checkpoint = find_latest(output_dir) if resumes else None
        if checkpoint is None:
            raise ValueError(f"{path} is damaged ({error!r}); choose another --output_dir.") from error
        logger.warning(
            "%s is damaged (%r); the record in %s is taken instead, and the file is written again.",
            path, error, checkpoint.path,
        )  # fmt: skip
        return {"arguments": checkpoint.arguments, "config": checkpoint.config}
    return dict(record)


def is_finished(output_dir: Path, run: PretrainingArguments) -> bool:
    """Returns whether the folder holds the report of a finished run and the weights that belong to it.

    Args:
        output_dir: The run's folder.
        run: If it overwrites the folder, the answer is `False`.

    Returns:
        The answer; `False`, with a warning, where the report is damaged.
    """
    path = output_dir / REPORT_FILE
    if run.overwrite_output_dir or not path.is_file():
        return False
    try:
        step = json.loads(path.read_bytes())["step"]
    except (ValueError, KeyError, TypeError) as error:
        logger.warning("%s is damaged (%r): the run counts as unfinished.", path, error)
        return False
    return exported_step(output_dir) == step


def prepare_output_dir(
    output_dir: Path,
    arguments: dict[str, Any],
    config: Mapping[str, Any],
    run: PretrainingArguments,
    checkpoint: Checkpoint | None,
) -> None:
    """Prepares the folder for a run: deletes checkpoints and log lines of steps after the one that it starts from.

    Leftovers of a killed process are deleted too. Damaged lines of a log are moved to a file of their own.

    Args:
        output_dir: The folder, checked by `check_output_dir`.
        arguments: Of the run; written to `run.json`, and to `recipe.yaml`, which starts the same run again.
        config: The model's configuration, for `run.json`.
        run: Says whether to overwrite.
        checkpoint: The checkpoint to resume from; one of another folder is copied, with the logs of its run.

    Raises:
        SaveError: If something cannot be written.
    """
    start_step = 0 if checkpoint is None else checkpoint.step
    kept: dict[str, list[dict[str, Any]]] = {name: [] for name in GROWING_FILES}
    damaged: dict[str, list[bytes]] = {}
    if checkpoint is not None:
        for name in GROWING_FILES:
            rows, problems = sort_rows(checkpoint.path.parent / name)
            kept[name] = [row for row in rows if row["step"] <= start_step]
            damaged[name] = [line for line, _ in problems.values()]
    logs = {name: "".join(json.dumps(row) + "\n" for row in rows) for name, rows in kept.items()}
    with saving(output_dir, sum(map(len, logs.values())) + file_bytes([])):
        output_dir.mkdir(parents=True, exist_ok=True)
        remove_leftovers(output_dir)
        if run.overwrite_output_dir:
            _delete_run(output_dir)
        _remove_partial_files(output_dir)
        write_json_atomically(output_dir / RUN_FILE, {"arguments": arguments, "config": config})
        write_text_atomically(output_dir / RECIPE_FILE, as_recipe(arguments))
        if checkpoint is not None and checkpoint.path.resolve().parent != output_dir.resolve():
            adopt_checkpoint(checkpoint, output_dir)  # before others are deleted, so that there always is one
        delete_checkpoints_after(output_dir, start_step)
        for name, lines in damaged.items():
            move_damaged_lines(output_dir / name, lines)
        for name, text in logs.items():
            if text or name == METRICS_FILE:
                write_text_atomically(output_dir / name, text)
            else:
                (output_dir / name).unlink(missing_ok=True)


def check_still_there(output_dir: Path) -> None:
    """Refuses to save into a folder that is no longer the run's, such as an empty mount point.

    Args:
        output_dir: The run's folder, prepared by `prepare_output_dir`.

    Raises:
        SaveError: If its `run.json` is missing.
    """
    if not (output_dir / RUN_FILE).is_file():
        raise SaveError(
            f"{output_dir} holds no {RUN_FILE} any more: it was deleted or replaced, or its disk has gone. Nothing "
            "was written there. Mount the disk again and resume the run; with --on_save_error continue a run goes on, "
            "and tries again at its next save.",
            errno.ENOENT,
        )


def bytes_to_come(model: nn.Module, output_dir: Path, total_limit: int) -> int:
    """Returns how much a run's folder may still grow: the checkpoints to keep, one more, and the exported model.

    Args:
        model: Both encoders and the predictor; those that are trained require a gradient.
        output_dir: The run's folder; its checkpoints and exported weights, which will be replaced, are subtracted.
        total_limit: Checkpoints to keep.

    Returns:
        Bytes, at least those of one checkpoint.
    """
    weights = model.state_dict()
    moments = [parameter for parameter in model.parameters() if parameter.requires_grad for _ in range(2)]
    one = file_bytes([*weights.values(), *moments])
    encoder = file_bytes(tensor for name, tensor in weights.items() if name.startswith("ijepa."))
    there = [*output_dir.glob("checkpoint-*/*"), output_dir / WEIGHTS_FILE, *output_dir.glob("pretraining/*")]
    held = sum(path.stat().st_size for path in there if path.is_file())
    # each is written before the one that it replaces is deleted
    return max(one, (total_limit + 1) * one + encoder + 2 * file_bytes(weights.values()) - held)


def check_space(output_dir: Path, num_bytes: int) -> None:
    """Refuses a run whose files do not fit on the disk.

    Args:
        output_dir: The run's folder; need not exist.
        num_bytes: Bytes to be written, see `bytes_to_come`.

    Raises:
        ValueError: If less is free.
    """
    free = free_bytes(output_dir)
    if free is not None and free < num_bytes:
        raise ValueError(
            f"output_dir={str(output_dir)!r} has too little space: the run will need {num_bytes:,} bytes there, and "
            f"{free:,} are free. Free some, choose an --output_dir on another disk, or keep fewer checkpoints "
            "(--checkpoints_total_limit)."
        )


def _delete_run(output_dir: Path) -> None:
    """Deletes the files of a run, and no others in the folder."""
    delete_checkpoints_after(output_dir, -1)
    for name in _RUN_ENTRIES:
        remove_entry(output_dir / name)


def _remove_partial_files(output_dir: Path) -> None:
    """Removes the files that a killed process was writing; `.push-*.partial` are the uploader's."""
    names = {f".{name}.partial" for name in (RUN_FILE, *_RUN_ENTRIES)}
    for folder in (output_dir, output_dir / PRETRAINING_SUBFOLDER):
        for entry in folder.glob(".*.partial"):
            if entry.name in names:
                remove_entry(entry)
    for entry in (output_dir / EVAL_RESULTS_FOLDER).glob(".*.partial"):
        remove_entry(entry)
