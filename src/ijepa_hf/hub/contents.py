"""Gathers the files to push to a repository on the Hub, and reads what the repository already holds.

A folder's model is gathered in a hidden folder (`.push-<label>.partial`) with the names that it will have in the
repository, weights as hard links, so that the run may overwrite and prune its files while they travel. What a
repository holds shows whether it is this run's, at which step, and what has to be deleted with the next push.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.constants import REPOCARD_NAME

from ijepa_hf.model.modeling_ijepa import PRETRAINING_SUBFOLDER
from ijepa_hf.recipes.arguments import differing_arguments
from ijepa_hf.runs.cards import with_address
from ijepa_hf.runs.checkpoints import CHECKPOINT_FILE
from ijepa_hf.runs.export import CODE_FILES, WEIGHTS_FILE, exported_step
from ijepa_hf.runs.folder import (
    CONVERSION_FILE,
    EVAL_RESULTS_FOLDER,
    FINETUNING_FILE,
    GROWING_FILES,
    RECIPE_FILE,
    REPORT_FILE,
    RUN_FILE,
    read_run,
)

LAST_CHECKPOINT = "last-checkpoint"  # transformers' Trainer uses this name too
_CHECKPOINT_RECORD = f"{LAST_CHECKPOINT}/{CHECKPOINT_FILE}"
_INDEX_FILE = f"{WEIGHTS_FILE}.index.json"
_SHARDS = "model-*-of-*.safetensors"
# Files to push from a folder, as patterns of `Path.glob`. First of a run or a converted model ...
_RUN_PATTERNS = (
    "config.json", WEIGHTS_FILE, "preprocessor_config.json", REPOCARD_NAME, RUN_FILE, REPORT_FILE, RECIPE_FILE,
    CONVERSION_FILE, *GROWING_FILES, *CODE_FILES, "figures/*.png", f"{EVAL_RESULTS_FOLDER}/*.yaml",
    *(f"{PRETRAINING_SUBFOLDER}/{name}" for name in ("*.json", "*.safetensors", "*.py")),
)  # fmt: skip
# ... then of any other model in transformers' format, such as a fine-tuned one.
_MODEL_PATTERNS = (
    "config.json", WEIGHTS_FILE, _SHARDS, _INDEX_FILE, "preprocessor_config.json", "processor_config.json",
    REPOCARD_NAME, FINETUNING_FILE, "*_results.json", "figures/*.png", f"{EVAL_RESULTS_FOLDER}/*.yaml",
)  # fmt: skip
# Files to delete in the repository if the pushed folder has none: they would belong to another state of the model.
_OWNED_WEIGHTS = (WEIGHTS_FILE, _SHARDS, _INDEX_FILE)
_OWNED_BY_RUN = (
    *_OWNED_WEIGHTS, RUN_FILE, REPORT_FILE, RECIPE_FILE, CONVERSION_FILE, *GROWING_FILES,
    f"{PRETRAINING_SUBFOLDER}/*", f"{LAST_CHECKPOINT}/*",
)  # fmt: skip
# Deleted too if they are about another run, or about the end of a run that has not ended yet. Else they stay, because
# others may have added to them.
ABOUT_THE_MODEL = (REPOCARD_NAME, f"{EVAL_RESULTS_FOLDER}/*", "figures/*.png")
# Files that show which run a repository belongs to, and its step.
STATE_FILES = (RUN_FILE, REPORT_FILE, _CHECKPOINT_RECORD)
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf")


@dataclass(frozen=True)
class RepositoryContents:
    """Holds the file names of a repository, or of a branch of it, and the text of those that show its state.

    Args:
        repo_id: With its owner.
        files: All names.
        texts: Contents of those `STATE_FILES` that exist.
    """

    repo_id: str
    files: Sequence[str] = ()
    texts: Mapping[str, str] = field(default_factory=dict)

    def other_than(self, arguments: Mapping[str, Any]) -> str | None:
        """Describes what the repository holds, if that is not this run.

        Args:
            arguments: Of the run, as `run.json` keeps them.

        Returns:
            Words for a message; `None` if the repository holds this run or no model.
        """
        if RUN_FILE not in self.files:
            weights = [name for name in self.files if name.endswith(_WEIGHT_SUFFIXES)]
            return f"weights of a model that no run of ijepa-hf left there ({weights[0]})" if weights else None
        stored = self._record(RUN_FILE).get("arguments")
        if not isinstance(stored, dict):
            return f"another run, whose {RUN_FILE} cannot be read"
        differing = differing_arguments(stored, arguments)
        return f"another run ({'; '.join(differing)})" if differing else None

    @property
    def checkpoint_step(self) -> int:
        """Returns the step of the last checkpoint; -1 if there is none."""
        return self._step(_CHECKPOINT_RECORD)

    @property
    def report_step(self) -> int:
        """Returns the step of the report; -1 if there is none."""
        return self._step(REPORT_FILE)

    def _step(self, name: str) -> int:
        step = self._record(name).get("step")
        return step if isinstance(step, int) else -1

    def _record(self, name: str) -> dict[str, Any]:
        try:
            record = json.loads(self.texts.get(name, ""))
        except ValueError:
            return {}
        return record if isinstance(record, dict) else {}


@dataclass(frozen=True)
class StagedFolder:
    """Holds a copy of the files to push, which the run does not change.

    Args:
        path: A folder with the names that the repository is to have.
        owned: Patterns of files to delete in the repository if the folder does not have them.
        arguments: The run's arguments, if the folder is that of a run.
    """

    path: Path
    owned: Sequence[str]
    arguments: Mapping[str, Any] | None

    @classmethod
    def of(cls, folder: Path, label: str, checkpoint: Path | None) -> "StagedFolder":
        """Gathers a folder's model and, if one is given, a checkpoint.

        Args:
            folder: The folder.
            label: A part of the hidden folder's name.
            checkpoint: The checkpoint's folder.

        Returns:
            What was gathered.

        Raises:
            ValueError: If the model is not whole, run.json is damaged, or the checkpoint is of another step.
            FileNotFoundError: If the checkpoint is missing.
        """
        in_two_parts = any((folder / name).exists() for name in (PRETRAINING_SUBFOLDER, RUN_FILE, CONVERSION_FILE))
        target = _make_folder(folder, label)
        try:
            for pattern in _RUN_PATTERNS if in_two_parts else _MODEL_PATTERNS:
                for source in folder.glob(pattern):
                    if source.is_file() and not source.name.startswith("."):
                        _check_link(source, folder)
                        _gather(source, target / source.relative_to(folder))
            if in_two_parts:
                _check_two_parts(target, folder, checkpoint)
            else:
                _check_model(target, folder)
            if checkpoint is not None:
                for source in checkpoint.iterdir():
                    _gather(source, target / LAST_CHECKPOINT / source.name)
            run = read_run(folder)
        except BaseException:
            shutil.rmtree(target)
            raise
        owned = _OWNED_BY_RUN if in_two_parts else _OWNED_WEIGHTS
        return cls(target, owned, None if run is None else run["arguments"])

    def check_kind(self, held: RepositoryContents) -> None:
        """Refuses to push another kind of model, such as a classifier, over a pretrained one: files of both would mix.

        Args:
            held: What the repository holds.

        Raises:
            ValueError: If it holds pretraining and the folder does not.
        """
        two_parts = (f"{PRETRAINING_SUBFOLDER}/config.json", RUN_FILE)
        found = [name for name in two_parts if name in held.files]
        if found and not any((self.path / name).is_file() for name in two_parts):
            raise ValueError(
                f"{held.repo_id!r} holds a pretrained model ({found[0]}), and the folder a model of another kind, "
                "which would replace a part of it. Push it to another repository."
            )

    def replaces(self, held: RepositoryContents) -> bool:
        """Returns whether card, scores and pictures in the repository are about another model and must be deleted."""
        if self.arguments is None:  # a converted model takes the place of a run; others are refused
            return RUN_FILE in held.files and (self.path / PRETRAINING_SUBFOLDER).is_dir()
        ended = REPORT_FILE in held.files and not (self.path / REPORT_FILE).is_file()
        return ended or held.other_than(self.arguments) is not None

    def address(self, repo_id: str, revision: str | None) -> None:
        """Writes the repository's name into the lines of the card that hold the model's address.

        Args:
            repo_id: With its owner.
            revision: Branch; `None` is `main`.
        """
        card = self.path / REPOCARD_NAME
        if card.is_file():
            card.write_bytes(with_address(card.read_bytes().decode("utf-8"), repo_id, revision).encode("utf-8"))

    def remove(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self.path, ignore_errors=True)


def _check_link(source: Path, folder: Path) -> None:
    """Refuses a link that leads out of the folder: it could publish a private file of this disk."""
    home = folder.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":  # the Hub's cache keeps the contents of a snapshot's files beside it
        allowed.append(home.parents[1] / "blobs")
    if not any(parent in source.resolve().parents for parent in allowed):
        raise ValueError(
            f"{str(source)!r} leads out of {str(folder)!r}, to {str(source.resolve())!r}; put a copy in its place if "
            "it is to be pushed."
        )


def _make_folder(folder: Path, label: str) -> Path:
    target = folder / f".push-{label}.partial"
    try:
        if target.exists():
            shutil.rmtree(target)
        target.mkdir()
    except OSError:  # a folder that may only be read
        return Path(tempfile.mkdtemp(prefix="ijepa-hf-push-"))
    return target


def _gather(source: Path, target: Path) -> None:
    """Links weights, which are only ever replaced; copies the rest, which may grow."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.suffix == ".safetensors":
        with contextlib.suppress(OSError):  # a file system without links, or another one
            os.link(source.resolve(), target)
            return
    shutil.copyfile(source, target)
    if source.name in GROWING_FILES:
        content = target.read_bytes()
        target.write_bytes(content[: content.rfind(b"\n") + 1])  # without a line that is being written


def _check_two_parts(staged: Path, folder: Path, checkpoint: Path | None) -> None:
    step = exported_step(staged)
    if step is None:
        raise ValueError(
            f"{str(folder)!r} holds no whole model: {WEIGHTS_FILE} and {PRETRAINING_SUBFOLDER}/{WEIGHTS_FILE} are "
            "missing, damaged or of different steps. Resume the run, which writes them again; if one is writing them "
            "just now, try again."
        )
    if checkpoint is not None and checkpoint.name != f"checkpoint-{step}":
        raise ValueError(
            f"{str(folder)!r} holds a model of step {step}, but its newest checkpoint is {checkpoint.name}; resume "
            "the run, which writes the model again, or push without the checkpoint."
        )


def _check_model(staged: Path, folder: Path) -> None:
    weights = {path.name for path in staged.glob("*.safetensors")}
    index = staged / _INDEX_FILE
    needed = set(json.loads(index.read_text("utf-8"))["weight_map"].values()) if index.is_file() else {WEIGHTS_FILE}
    missing = sorted(needed - weights) + [name for name in ("config.json",) if not (staged / name).is_file()]
    if missing:
        raise ValueError(
            f"{str(folder)!r} holds no model that can be pushed: {', '.join(missing)} missing. Name the folder of a "
            "run, of a converted model, or of a model that `save_pretrained` wrote."
        )
