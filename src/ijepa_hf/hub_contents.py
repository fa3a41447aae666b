"""What is pushed to a repository of the Hub, and what a repository holds already.

A folder's model is gathered in a hidden folder (`.push-<label>.partial`) laid out as the repository is to be, weights
as hard links, so that the run may overwrite and prune while they travel. What a repository holds says whether it is
this run's, how far on, and what of it has to go with the next push.
"""

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ijepa_hf.export import CODE_FILES, WEIGHTS_FILE, exported_step
from ijepa_hf.hub_process import CARD
from ijepa_hf.model_card import render_unfinished_card
from ijepa_hf.modeling_ijepa import PRETRAINING_SUBFOLDER
from ijepa_hf.run_folder import (
    EVAL_RESULTS_FOLDER,
    GROWING_FILES,
    RECIPE_FILE,
    REPORT_FILE,
    RUN_FILE,
    differing_arguments,
    read_run,
)

LAST_CHECKPOINT = "last-checkpoint"  # transformers' Trainer uses this name too
_CONVERSION_FILE = "conversion.json"
_FINETUNING_FILE = "finetune.json"
_CHECKPOINT_RECORD = f"{LAST_CHECKPOINT}/checkpoint.json"
_INDEX_FILE = f"{WEIGHTS_FILE}.index.json"
_SHARDS = "model-*-of-*.safetensors"
# What is taken of a folder, as patterns of `Path.glob`. First of a run's or a converted one ...
_RUN_PATTERNS = (
    "config.json", WEIGHTS_FILE, "preprocessor_config.json", CARD, RUN_FILE, REPORT_FILE, RECIPE_FILE,
    _CONVERSION_FILE, *GROWING_FILES, *CODE_FILES, "figures/*.png", f"{EVAL_RESULTS_FOLDER}/*.yaml",
    *(f"{PRETRAINING_SUBFOLDER}/{name}" for name in ("*.json", "*.safetensors", "*.py")),
)  # fmt: skip
# ... then of any other model in transformers' format, such as a fine-tuned one.
_MODEL_PATTERNS = (
    "config.json", WEIGHTS_FILE, _SHARDS, _INDEX_FILE, "preprocessor_config.json", "processor_config.json",
    CARD, _FINETUNING_FILE, "*_results.json", "figures/*.png", f"{EVAL_RESULTS_FOLDER}/*.yaml",
)  # fmt: skip
# What is deleted in the repository where the pushed folder has none: it would be of another state of the model.
_OWNED_WEIGHTS = (WEIGHTS_FILE, _SHARDS, _INDEX_FILE)
_OWNED_BY_RUN = (
    *_OWNED_WEIGHTS, RUN_FILE, REPORT_FILE, RECIPE_FILE, _CONVERSION_FILE, *GROWING_FILES,
    f"{PRETRAINING_SUBFOLDER}/*", f"{LAST_CHECKPOINT}/*",
)  # fmt: skip
# Deleted too where they are about another run, or about the end of one that is not at its end; else they stay, others
# may have added to them.
ABOUT_THE_MODEL = (CARD, f"{EVAL_RESULTS_FOLDER}/*", "figures/*.png")
# What says whose a repository is, and how far.
TELLING_FILES = (RUN_FILE, REPORT_FILE, _CHECKPOINT_RECORD)
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf")


@dataclass(frozen=True)
class RepositoryContents:
    """What a repository, or a branch of it, holds.

    Args:
        repo_id: With its owner.
        files: All names.
        texts: Contents of `TELLING_FILES`, as far as they are there.
    """

    repo_id: str
    files: Sequence[str] = ()
    texts: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, event: Mapping[str, Any]) -> "RepositoryContents":
        """Takes what the process found.

        Args:
            event: The end of a `prepare` job, see `hub_process.py`.

        Returns:
            The contents.
        """
        return cls(event["repo_id"], event["files"], event["texts"])

    def other_than(self, arguments: Mapping[str, Any]) -> str | None:
        """What it holds that is not this run.

        Args:
            arguments: Of the run, as `run.json` keeps them.

        Returns:
            Words for a message, or `None` where it is this run or holds no model.
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
        """Step of the last checkpoint, -1 where there is none that says."""
        return self._step(_CHECKPOINT_RECORD)

    @property
    def report_step(self) -> int:
        """Step of the report, -1 where there is none that says."""
        return self._step(REPORT_FILE)

    def _step(self, name: str) -> int:
        step = self._record(name).get("step")
        return step if isinstance(step, int) else -1

    def _record(self, name: str) -> dict[str, Any]:
        return _parsed(self.texts.get(name, ""))


def _parsed(text: str) -> dict[str, Any]:
    """A record; empty where the text is none."""
    try:
        record = json.loads(text)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


@dataclass(frozen=True)
class StagedFolder:
    """What is to be pushed, gathered so that nobody changes it.

    Args:
        path: A folder laid out as the repository is to be.
        owned: Patterns of what is deleted in the repository where it is not in the folder.
        reference: What its card was written for: the name of a folder or repository.
        arguments: Of a run.
        card_is_stand_in: The run has not written its card yet; this one says so, and carries the licence.
    """

    path: Path
    owned: Sequence[str]
    reference: str
    arguments: Mapping[str, Any] | None
    card_is_stand_in: bool

    @classmethod
    def of(cls, folder: Path, label: str, checkpoint: Path | None) -> "StagedFolder":
        """Gathers a folder's model and, where one is named, a checkpoint.

        Args:
            folder: The folder.
            label: For the hidden folder's name.
            checkpoint: The checkpoint's folder.

        Returns:
            What was gathered.

        Raises:
            ValueError: If the model is not whole, run.json is damaged, or the checkpoint is of another step.
            FileNotFoundError: If the checkpoint is missing.
        """
        in_two_parts = any((folder / name).exists() for name in (PRETRAINING_SUBFOLDER, RUN_FILE, _CONVERSION_FILE))
        target = _make_folder(folder, label)
        try:
            for pattern in _RUN_PATTERNS if in_two_parts else _MODEL_PATTERNS:
                for source in folder.glob(pattern):
                    if source.is_file() and not source.name.startswith("."):
                        _check_link(source, folder)
                        _gather(source, target / source.relative_to(folder))
            step = _check_two_parts(target, folder, checkpoint) if in_two_parts else None
            if not in_two_parts:
                _check_model(target, folder)
            if checkpoint is not None:
                for source in checkpoint.iterdir():
                    _gather(source, target / LAST_CHECKPOINT / source.name)
            run = read_run(folder)
            arguments = None if run is None else run["arguments"]
            card_is_stand_in = False
            if step is not None and arguments is not None and not (target / CARD).is_file():
                (target / CARD).write_text(render_unfinished_card(arguments, step), "utf-8")
                card_is_stand_in = True
        except BaseException:
            shutil.rmtree(target)
            raise
        owned = _OWNED_BY_RUN if in_two_parts else _OWNED_WEIGHTS
        return cls(target, owned, _card_reference(target, folder), arguments, card_is_stand_in)

    def check_kind(self, held: RepositoryContents) -> None:
        """Refuses to lay a model over pretraining that it is no part of, which would leave half of each.

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
        """Whether the card and what belongs to it, as the repository has them, are about something else.

        Args:
            held: What the repository holds.

        Returns:
            The answer.
        """
        if self.arguments is None:  # a converted model takes the place of a run; others are refused
            return RUN_FILE in held.files and (self.path / PRETRAINING_SUBFOLDER).is_dir()
        ended = REPORT_FILE in held.files and not (self.path / REPORT_FILE).is_file()
        return ended or held.other_than(self.arguments) is not None

    def address(self, repo_id: str, revision: str | None) -> None:
        """Makes the card name the repository where it names the folder.

        Args:
            repo_id: With its owner.
            revision: Branch; `None` is `main`.
        """
        card = self.path / CARD
        if card.is_file():
            text = _readdressed(card.read_bytes().decode("utf-8"), self.reference, repo_id, revision)
            card.write_bytes(text.encode("utf-8"))

    def remove(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self.path, ignore_errors=True)


def _card_reference(staged: Path, folder: Path) -> str:
    """What the folder's card calls the model: as `model_card.py`, `finetune.py` and `conversion.py` write it."""
    for name in (REPORT_FILE, RUN_FILE, _FINETUNING_FILE):
        path = staged / name
        arguments = _parsed(path.read_text("utf-8", errors="replace")).get("arguments") if path.is_file() else None
        if isinstance(arguments, dict):
            reference = arguments.get("hub_model_id") or arguments.get("output_dir")
            if isinstance(reference, str):
                return reference
    return folder.resolve().name


def _readdressed(card: str, reference: str, repo_id: str, revision: str | None) -> str:
    """A card that loads the model from the repository; all that a person may have written stays.

    Args:
        card: Markdown.
        reference: The folder or name that it was written for.
        repo_id: With its owner.
        revision: Branch; `None` is `main`.

    Returns:
        Markdown.
    """
    old, name = re.escape(reference), re.escape(Path(reference).name)
    branch = None if revision in (None, "main") else revision
    argument = f', revision="{branch}"' if branch else ""
    flag = f" --model_revision {branch}" if branch else ""
    call = rf'(from_pretrained\(|\bpipeline\([^()]*?\bmodel=)"{old}"(?!, revision=)'
    card = re.sub(call, lambda found: f'{found[1]}"{repo_id}"{argument}', card)
    command = rf"(--model_name_or_path |\bfinetune ){old}(?=\s|$)(?! --model_revision)"
    card = re.sub(command, lambda found: f"{found[1]}{repo_id}{flag}", card)
    title = rf"\A(---\n.*?\n---\n\s*)?# {name}(?=\n|\Z)"
    return re.sub(title, lambda found: f"{found[1] or ''}# {Path(repo_id).name}", card, flags=re.DOTALL)


def _check_link(source: Path, folder: Path) -> None:
    """Refuses a link by which a folder of somebody else's would have a file of this disk published."""
    home = folder.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":  # the Hub's cache keeps the contents of a snapshot's files beside it
        allowed.append(home.parents[1] / "blobs")
    if not any(place in source.resolve().parents for place in allowed):
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


def _check_two_parts(staged: Path, folder: Path, checkpoint: Path | None) -> int:
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
    return step


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
