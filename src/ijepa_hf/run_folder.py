"""A run's folder: whose it is, whether it is finished, and what of it stays when a run goes on.

    output_dir/   run.json  metrics.jsonl  diagnostics.jsonl  evaluations.jsonl  unreadable_images.jsonl  ...

The files that grow have a line of JSON for each entry, with the optimiser step that wrote it, so that a run that goes
on from an earlier step can drop what came after it. `docs/architecture.md` lists all that a run leaves behind.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ijepa_hf.arguments import PretrainingArguments, argument_defaults, as_recipe
from ijepa_hf.checkpointing import Checkpoint, adopt_checkpoint, delete_checkpoints_after
from ijepa_hf.export import CODE_FILES, exported_step, write_atomically

RUN_FILE = "run.json"
REPORT_FILE = "report.json"
METRICS_FILE = "metrics.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"
DIAGNOSTICS_FILE = "diagnostics.jsonl"
UNREADABLE_FILE = "unreadable_images.jsonl"
RECIPE_FILE = "recipe.yaml"
EVAL_RESULTS_FOLDER = ".eval_results"  # the Hub's name for the folder of machine-readable scores

GROWING_FILES = (METRICS_FILE, EVALUATIONS_FILE, DIAGNOSTICS_FILE, UNREADABLE_FILE)

# What may differ between a run and its continuation: none of it changes a weight (the global batch is compared).
_FREE_ARGUMENTS = frozenset(
    [
        "output_dir",
        "overwrite_output_dir",
        "resume_from_checkpoint",
        "dataloader_num_workers",
        "keep_images_in_memory",
        "logging_steps",
        "checkpointing_steps",
        "checkpoints_total_limit",
        "report_to",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "eval_split_name",
        "label_column_name",
        "max_eval_samples",
        "eval_steps",
        "diagnostics_steps",
        "on_collapse",
        "max_broken_share",
        "license",
        "push_to_hub",
        "hub_model_id",
        "hub_private_repo",
        "hub_strategy",
        "hub_revision",
    ]
)
# What a run writes, and `overwrite_output_dir` deletes.
_RUN_ENTRIES = (
    RUN_FILE, REPORT_FILE, RECIPE_FILE, *GROWING_FILES, "README.md", "config.json", "model.safetensors",
    "preprocessor_config.json", "pretraining", "figures", "trackers", *CODE_FILES, EVAL_RESULTS_FOLDER,
)  # fmt: skip


def check_output_dir(output_dir: Path, arguments: dict[str, Any], run: PretrainingArguments) -> None:
    """Refuses a folder that is not this run's, or a run that is not finished and was not asked to go on.

    Args:
        output_dir: The folder; need not exist.
        arguments: All arguments of the run, as `run.json` keeps them.
        run: Says whether to overwrite or resume.

    Raises:
        ValueError: If the folder is not empty and holds no run, another run, or this one unfinished.
    """
    if not output_dir.exists() or all(entry.name.endswith(".partial") for entry in output_dir.iterdir()):
        return
    if not (output_dir / RUN_FILE).is_file():
        raise ValueError(
            f"output_dir={str(output_dir)!r} is not empty and holds no run of ijepa-hf; choose another --output_dir."
        )
    if run.overwrite_output_dir:
        _check_nothing_needed_is_deleted(output_dir, run)
        return
    stored = read_run(output_dir)
    assert stored is not None  # the file is there
    differing = differing_arguments(stored["arguments"], arguments)
    if differing:
        raise ValueError(
            f"output_dir={str(output_dir)!r} holds another run: {'; '.join(differing)}. Choose another --output_dir, "
            "or add --overwrite_output_dir to delete that run."
        )
    check_begun(output_dir, run)


def check_begun(output_dir: Path, run: PretrainingArguments) -> None:
    """Refuses what can be refused before weights are looked for.

    Args:
        output_dir: The folder; need not exist.
        run: Says whether to overwrite or resume, and what weights to start from.

    Raises:
        ValueError: If it holds a run from other weights, or one that is not finished and was not asked to go on.
    """
    stored = None if run.overwrite_output_dir else read_run(output_dir)
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


def read_run(output_dir: Path) -> dict[str, Any] | None:
    """What `run.json` says: `arguments`, and `config`, the model's configuration.

    Args:
        output_dir: The run's folder.

    Returns:
        The record, or `None` where there is none.

    Raises:
        ValueError: If it is damaged.
    """
    path = output_dir / RUN_FILE
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text("utf-8"))
        record["arguments"]["output_dir"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); choose another --output_dir.") from error
    return record


def is_finished(output_dir: Path, run: PretrainingArguments) -> bool:
    """Whether the folder holds this run's report and the weights that it is about.

    Args:
        output_dir: The run's folder.
        run: A run that overwrites the folder has no use for a finished one.

    Returns:
        The answer.
    """
    if run.overwrite_output_dir or not (output_dir / REPORT_FILE).is_file():
        return False
    report = json.loads((output_dir / REPORT_FILE).read_text("utf-8"))
    return exported_step(output_dir) == report["step"]


def prepare_output_dir(
    output_dir: Path,
    arguments: dict[str, Any],
    config: Mapping[str, Any],
    run: PretrainingArguments,
    checkpoint: Checkpoint | None,
) -> None:
    """Makes the folder this run's, as of the step that it starts from: later checkpoints and log lines go.

    Args:
        output_dir: The folder, checked by `check_output_dir`.
        arguments: What `run.json` is to hold, and `recipe.yaml`, which starts the same run again.
        config: The model's configuration, for `run.json`.
        run: Says whether to overwrite.
        checkpoint: What the run goes on from; one of another folder is taken over, with that run's log.
    """
    start_step = 0 if checkpoint is None else checkpoint.step
    kept = {
        name: [] if checkpoint is None else read_rows(checkpoint.path.parent / name, up_to_step=start_step)
        for name in GROWING_FILES
    }
    if run.overwrite_output_dir and output_dir.exists():
        _delete_run(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    _write_text(output_dir / RUN_FILE, json.dumps({"arguments": arguments, "config": config}, indent=2) + "\n")
    _write_text(output_dir / RECIPE_FILE, as_recipe(arguments))
    delete_checkpoints_after(output_dir, start_step)
    if checkpoint is not None and checkpoint.path.resolve().parent != output_dir.resolve():
        adopt_checkpoint(checkpoint, output_dir)
    for name, rows in kept.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        if lines or name == METRICS_FILE:
            _write_text(output_dir / name, lines)
        else:
            (output_dir / name).unlink(missing_ok=True)


def read_rows(path: Path, *, up_to_step: int | None = None) -> list[dict[str, Any]]:
    """The lines of a file that grows with the run; a last line cut short by a crash is left out.

    Args:
        path: `metrics.jsonl` or one of its kind.
        up_to_step: Leave out lines of later optimiser steps.

    Returns:
        A dictionary for each line; none where the file is missing.

    Raises:
        ValueError: If a line is damaged; names the file and the line.
    """
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(path.read_text("utf-8").split("\n")[:-1], start=1):
        try:
            rows += [json.loads(line)] if line else []
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is damaged ({error}); remove that line.") from error
    return rows if up_to_step is None else [row for row in rows if row["step"] <= up_to_step]


def append_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Adds lines to a file that grows with the run.

    Args:
        path: The file; made if it is missing.
        rows: Each with its `step`.
    """
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def _write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda partial: partial.write_text(text, "utf-8"))


def _delete_run(output_dir: Path) -> None:
    """Deletes what a run writes, and nothing else that may lie in the folder."""
    delete_checkpoints_after(output_dir, -1)
    for entry in [output_dir / name for name in _RUN_ENTRIES] + list(output_dir.glob(".*.partial")):
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink(missing_ok=True)


def differing_arguments(stored: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """What keeps two sets of arguments from being one run.

    Args:
        stored: Arguments of a run or checkpoint.
        current: Arguments of the run that would go on from it.

    Returns:
        A sentence for each argument that differs and changes a weight.
    """
    free = set(_FREE_ARGUMENTS)
    if current["masking_strategy"] == "multi_block_official":  # its context depends on the batch of each device
        free.discard("per_device_train_batch_size")
    # a run of an earlier version lacks later arguments: it had their defaults
    before = {name: stored.get(name, default) for name, default in argument_defaults().items() if name in current}
    before |= stored
    return [
        f"{name} is {before.get(name)!r} there, {current.get(name)!r} here"
        for name in sorted({*before, *current} - free)
        if before.get(name) != current.get(name)
    ]
