"""Everything that goes to the Hub and comes from it: models, a run's last checkpoint, and what lies beside them.

A push makes the repository hold what the folder holds, in one commit, so no revision is ever half of one state and
half of another, and one that is cut short changes nothing. What is pushed is first gathered in a hidden folder
(`.push-<step>.partial`), weights as hard links, so that the run may overwrite and prune while they travel.

The requests are made by a process of its own, see `hub_process.py`.
"""

import contextlib
import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ijepa_hf import hub_process
from ijepa_hf.arguments import HUB_STRATEGIES
from ijepa_hf.checkpointing import find_latest
from ijepa_hf.export import CODE_FILES, WEIGHTS_FILE, exported_step
from ijepa_hf.model_card import render_unfinished_card
from ijepa_hf.modeling_ijepa import PRETRAINING_SUBFOLDER
from ijepa_hf.run_folder import (
    EVAL_RESULTS_FOLDER,
    EVALUATIONS_FILE,
    METRICS_FILE,
    RECIPE_FILE,
    REPORT_FILE,
    RUN_FILE,
    UNREADABLE_FILE,
    differing_arguments,
    read_run,
)

LAST_CHECKPOINT = "last-checkpoint"  # transformers' Trainer uses this name too

# Seconds before the 2nd, ... 7th try: 126 in all. A server may ask for more, up to hub_process.LONGEST_WAIT each time;
# bytes that arrive start the count again.
RETRY_WAITS = (2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
START_WAITS = RETRY_WAITS[:2]  # before a run starts
REQUEST_TIMEOUT = 60.0  # seconds that a connection may be silent
NO_NEWS_LIMIT = 7200.0  # seconds in which no file arrived and no request failed, after which `finish` gives up

_CARD_FILE = "README.md"
_FINETUNE_FILE = "finetune.json"
_STATE_FILES = (RUN_FILE, f"{LAST_CHECKPOINT}/checkpoint.json", REPORT_FILE)  # say whose a repository is, how far on
_GROWING_FILES = (METRICS_FILE, EVALUATIONS_FILE, UNREADABLE_FILE)
_CONVERSION_FILE = "conversion.json"
_INDEX_FILE = f"{WEIGHTS_FILE}.index.json"
_SHARDS = "model-*-of-*.safetensors"
# What is taken of a folder, as patterns of `Path.glob`. First of a run's or a converted one ...
_RUN_PATTERNS = (
    "config.json", WEIGHTS_FILE, "preprocessor_config.json", "README.md", RUN_FILE, REPORT_FILE, RECIPE_FILE,
    _CONVERSION_FILE, *_GROWING_FILES, *CODE_FILES, "figures/*.png", f"{EVAL_RESULTS_FOLDER}/*.yaml",
    *(f"{PRETRAINING_SUBFOLDER}/{name}" for name in ("*.json", "*.safetensors", "*.py")),
)  # fmt: skip
# ... then of any other model in transformers' format, such as a fine-tuned one.
_MODEL_PATTERNS = (
    "config.json", WEIGHTS_FILE, _SHARDS, _INDEX_FILE, "preprocessor_config.json", "processor_config.json",
    "README.md", "finetune.json", "*_results.json", "figures/*.png", f"{EVAL_RESULTS_FOLDER}/*.yaml",
)  # fmt: skip
# What is deleted in the repository where the pushed folder has none: it would be of another state of the model.
# Cards and code stay, others may have added to them.
_OWNED_WEIGHTS = (WEIGHTS_FILE, _SHARDS, _INDEX_FILE)
_OWNED_BY_RUN = (
    *_OWNED_WEIGHTS, RUN_FILE, REPORT_FILE, RECIPE_FILE, _CONVERSION_FILE, *_GROWING_FILES,
    f"{PRETRAINING_SUBFOLDER}/*", f"{LAST_CHECKPOINT}/*",
)  # fmt: skip
_SCORES_AND_FIGURES = (f"{EVAL_RESULTS_FOLDER}/*.yaml", "figures/*.png")  # likewise, where a run pushes
# What is fetched: the checkpoint, and the log that `run_folder.prepare_output_dir` takes over.
_FETCHED = (f"{LAST_CHECKPOINT}/*", *_GROWING_FILES, RUN_FILE)

logger = logging.getLogger(__name__)


# -- commands --------------------------------------------------------------------------------------------------------


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    with_checkpoint: bool = False,
    commit_message: str | None = None,
) -> str:
    """Pushes the folder of a run, a converted model or a fine-tuned model, in one commit.

    Args:
        folder: The folder. Of a run's, nothing but what the run wrote is taken; of others, nothing but the model.
        repo_id: The repository, `name/repository`; made if it is missing.
        private: Make it private; one that exists and is public is refused then.
        revision: Branch; made if it is missing; `main` if not given.
        with_checkpoint: Push the newest checkpoint of a run as well, to resume from.
        commit_message: Its first line; says the step if not given.

    Returns:
        The URL of what was pushed.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If the folder holds no whole model, or the user has to change something (token, permission, name).
        ConnectionError: If the Hub cannot be reached, or fails again and again.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{str(folder)!r}: there is no such folder.")
    checkpoint = _newest_checkpoint(folder) if with_checkpoint else None
    _Staged.of(folder, "by-hand", checkpoint, repo_id, revision).remove()  # is it whole? before anything is asked
    with _HubProcess(quiet=True) as process, _progress_bar() as bar:

        def show(event: dict[str, Any]) -> None:
            if event["event"] == "retry":
                logger.warning("%s; trying again in %g s", event["reason"], event["seconds"])
            _show_progress(bar, event)

        job = {"job": "prepare", "repo_id": repo_id, "private": private, "revision": revision, "texts": ()}
        prepared = process.run({**job, "waits": RETRY_WAITS}, show)
        _check_same_kind(folder, prepared)
        staged = _Staged.of(folder, "by-hand", checkpoint, prepared["repo_id"], revision)
        try:
            outcome = process.run(
                _push_job(
                    staged,
                    prepared["repo_id"],
                    private=private,
                    revision=revision,
                    message=commit_message,
                    is_prepared=True,
                ),
                show,
            )
        finally:
            staged.remove()
    if outcome["deleted"]:
        logger.info("deleted in %s, not being of this state: %s", repo_id, ", ".join(outcome["deleted"]))
    return outcome["url"]


def fetch_checkpoint(repo_id: str, *, revision: str | None = None, missing_ok: bool = False) -> Path | None:
    """Downloads the checkpoint that a run pushed, and its log, into the Hugging Face cache.

    Args:
        repo_id: The repository.
        revision: Branch, tag or commit; the newest of `main` if not given.
        missing_ok: Whether a repository or revision that does not exist is one without a checkpoint.

    Returns:
        The checkpoint's folder, for `checkpointing.read_checkpoint`, which checks it; the log lies in the folder
        above. `None` where the repository has no checkpoint.

    Raises:
        ValueError: If there is no such repository or revision, or the user may not read it, or offline mode is on.
        ConnectionError: If the Hub cannot be reached. What the cache holds is not used then: it may be older.
    """
    job = {"job": "fetch", "repo_id": repo_id, "revision": revision, "waits": RETRY_WAITS, "missing_ok": missing_ok,
           "needed": [f"{LAST_CHECKPOINT}/*"], "patterns": _FETCHED}  # fmt: skip
    with _HubProcess() as process:
        path = process.run(job, _ignore)["path"]
    return None if path is None else Path(path) / LAST_CHECKPOINT


class UploadIncompleteError(OSError):
    """A finished run is on disk, but not all of it arrived on the Hub."""


# -- beside the training ---------------------------------------------------------------------------------------------


@dataclass
class _Upload:
    """A state on its way."""

    step: int
    staged: "_Staged"
    sent: int = 0  # bytes
    total: int = 0
    outcome: dict[str, Any] | None = None  # the event that ended it

    @property
    def failure(self) -> str | None:
        """Why it did not arrive, so far as is known."""
        if self.outcome is None:
            return "the run ended before it"
        return None if self.outcome["event"] == "done" else self.outcome["reason"]


class HubUploader:
    """Uploads beside the training; whatever happens to an upload, the run goes on.

    After `start`, `submit` and `finish` are to be called by one thread; a second one listens to the process that makes
    the requests.

    Args:
        output_dir: The run's folder.
        repo_id: The repository, `name/repository`.
        private: Make it private; one that exists and is public is refused.
        revision: Branch; `main` if not given.
        strategy: `end` uploads the finished model; `checkpoint` each state that is submitted, with its checkpoint.
    """

    def __init__(self, output_dir: Path, repo_id: str, *, private: bool, revision: str | None, strategy: str) -> None:
        if strategy not in HUB_STRATEGIES:
            raise ValueError(f"hub_strategy={strategy!r} must be 'end' or 'checkpoint'.")
        self._output_dir = output_dir
        self._repo_id = repo_id
        self._private = private
        self._revision = revision
        self._with_checkpoint = strategy == "checkpoint"
        self._changed = threading.Condition()  # guards all below
        self._process: _HubProcess | None = None
        self._listener: threading.Thread | None = None
        self._running: _Upload | None = None
        self._pending: _Upload | None = None
        self._full_name: str | None = None  # with its owner, when the Hub has said it
        self._submitted: _Upload | None = None  # the newest
        self._arrived: int | None = None  # newest step that the repository has
        self._heard = 0.0  # when there is nothing to worry about until, as time.monotonic()

    def start(self, arguments: Mapping[str, Any], start_step: int, *, replace: bool = False) -> None:
        """Makes the repository and the branch where they are missing, and looks at what they hold.

        Args:
            arguments: Of the run, as `run.json` keeps them.
            start_step: That it goes on from.
            replace: Whether another run, or later steps of this one, may be replaced.

        Raises:
            ValueError: If the user has to change something: no token, no permission, a bad name or licence, offline
                mode, or a repository that holds something else. A server that cannot be reached is a warning.
        """
        for left_over in self._output_dir.glob(".push-*.partial"):
            shutil.rmtree(left_over, ignore_errors=True)
        self._process = process = _HubProcess(quiet=True)
        card = render_unfinished_card(arguments, start_step)
        job = {"job": "prepare", "repo_id": self._repo_id, "private": self._private, "revision": self._revision}
        try:
            process.run({"job": "validate", "repo_id": self._repo_id, "card": card, "waits": START_WAITS}, _ignore)
            prepared = process.run({**job, "texts": _STATE_FILES, "waits": START_WAITS}, _ignore)
            self._full_name = prepared["repo_id"]
            if not replace:
                _check_holds_no_other(prepared, arguments, start_step)
        except ValueError as error:
            self.stop()
            raise ValueError(f"hub_model_id={self._repo_id!r} cannot be pushed to: {error}") from None
        except ConnectionError as error:
            logger.warning("%s. The run starts all the same, and uploads are tried as it goes.", error)
        except BaseException:
            self.stop()
            raise
        self._listen_to(process)

    def submit(self, step: int) -> None:
        """Uploads the model and the checkpoint as they are now, while the run goes on; returns at once.

        Where an upload is still under way, this state waits for it to end, and gives way to a newer one.

        Args:
            step: Of the export and of `checkpoint-<step>`.
        """
        if self._with_checkpoint:
            try:
                self._add(step, str(step))
            except Exception as error:  # whatever it is, a run does not end for its upload
                logger.warning("step %d is not uploaded: %s", step, error)

    def finish(self, step: int) -> str:
        """Uploads the final state and waits for it, at most as long as something moves.

        Args:
            step: Of the export, and with strategy `checkpoint` of `checkpoint-<step>`.

        Returns:
            For the user: where it is.

        Raises:
            UploadIncompleteError: If it did not arrive; says what the repository has, and what finishes it.
        """
        try:
            upload = self._add(step, f"{step}-final")
            outcome = self._wait_for(upload)
            reason = upload.failure
        except KeyboardInterrupt:
            reason = "interrupted"
        except Exception as error:  # the run is complete; its upload can be done again
            reason = str(error)
        finally:
            self.stop()
        if reason is None:
            return f"Step {step} is on the Hub: {outcome['url']}"
        raise UploadIncompleteError(self._left_over(step, reason))

    def stop(self, wait: float = 0.0) -> str | None:
        """Ends whatever is under way and removes what was gathered for it. The repository stays whole.

        Args:
            wait: Seconds that it may still take.

        Returns:
            What did not arrive and the command that finishes it, or `None` if all that was submitted is there.
        """
        deadline = time.monotonic() + wait
        with self._changed:
            while self._process is not None and self._running is not None and time.monotonic() < deadline:
                self._changed.wait(timeout=0.5)
            process, self._process = self._process, None
            uploads = [upload for upload in (self._running, self._pending) if upload is not None]
            self._running = self._pending = None
            newest = self._submitted
        if process is not None:
            process.kill()
            if self._listener is not None:
                self._listener.join()  # it reads the end of what it listens to
            process.close()
        for upload in uploads:
            upload.staged.remove()
        if newest is None or newest.failure is None:
            return None
        return self._left_over(newest.step, newest.failure)

    def _left_over(self, step: int, reason: str) -> str:
        has = "nothing of this run" if self._arrived is None else f"step {self._arrived}"
        if self._arrived == step:
            has += " without its card and report"
        return (
            f"Step {step} is complete in {self._output_dir}, but did not arrive on the Hub ({reason}). "
            f"{self._repo_id} has {has}. This finishes the upload:\n    {self._command()}"
        )

    def _add(self, step: int, label: str) -> _Upload:
        checkpoint = self._output_dir / f"checkpoint-{step}" if self._with_checkpoint else None
        name = self._full_name or self._repo_id
        upload = _Upload(step, _Staged.of(self._output_dir, label, checkpoint, name, self._revision))
        with self._changed:
            self._submitted = upload
            replaced, self._pending = self._pending, upload
            if self._process is None:  # it was killed, or ended by itself
                self._listen_to(_HubProcess(quiet=True))
            self._send_next()
        if replaced is not None:
            logger.info("step %d is not uploaded: a newer state is there", replaced.step)
            replaced.staged.remove()
        return upload

    def _send_next(self) -> None:
        if self._running is None and self._pending is not None and self._process is not None:
            self._running, self._pending = self._pending, None
            self._heard = time.monotonic()
            self._process.send(
                _push_job(self._running.staged, self._repo_id, private=self._private, revision=self._revision)
            )

    def _listen_to(self, process: "_HubProcess") -> None:
        self._process = process
        self._listener = threading.Thread(target=self._listen, args=(process,), name="ijepa-hf-hub", daemon=True)
        self._listener.start()

    def _listen(self, process: "_HubProcess") -> None:
        for event in process.events():
            with self._changed:
                if process is not self._process:
                    return  # stopped
                try:
                    self._handle(event)
                except Exception:  # a thread that dies in silence would let `finish` wait
                    logger.warning("an upload's event could not be handled: %r", event, exc_info=True)
                self._changed.notify_all()

    def _handle(self, event: dict[str, Any]) -> None:
        upload, kind = self._running, event["event"]
        self._heard = time.monotonic() + event.get("seconds", 0.0)
        if kind == "ended":  # with whatever was under way; the next `_add` starts another
            process, self._process = self._process, None
            assert process is not None
            process.close()
        if upload is None:
            return
        if kind == "sent":
            upload.sent, upload.total = event["bytes"], event["total"]
        elif kind == "retry":
            logger.warning(
                "uploading step %d: %s; trying again in %g s", upload.step, event["reason"], event["seconds"]
            )
        else:
            upload.outcome = event
            upload.staged.remove()
            self._running = None
            if kind == "done":
                self._arrived = upload.step
                logger.info("step %d is on the Hub: %s", upload.step, event["url"])
            else:
                logger.warning("step %d was not uploaded: %s. The run goes on.", upload.step, event["reason"])
                logger.debug("%s", event.get("details"))
            self._send_next()

    def _wait_for(self, upload: _Upload) -> dict[str, Any]:
        with _progress_bar() as bar:
            while True:
                with self._changed:
                    if upload.outcome is None:
                        if self._process is None:  # it ended with an earlier upload
                            self._listen_to(_HubProcess(quiet=True))
                            self._send_next()
                        self._changed.wait(timeout=0.5)
                    outcome, sent, total = upload.outcome, upload.sent, upload.total
                    silent = time.monotonic() - self._heard
                _show_progress(bar, {"event": "sent", "bytes": sent, "total": total})
                if outcome is not None:
                    return outcome
                if silent > NO_NEWS_LIMIT:
                    raise TimeoutError(f"nothing arrived for {NO_NEWS_LIMIT:g} s")

    def _command(self) -> str:
        words = ["ijepa-hf", "push", str(self._output_dir), self._repo_id]
        if self._private:
            words.append("--hub_private_repo")
        if self._revision is not None:
            words += ["--hub_revision", self._revision]
        if self._with_checkpoint:
            words += ["--hub_strategy", "checkpoint"]
        return shlex.join(words)


def _push_job(
    staged: "_Staged",
    repo_id: str,
    *,
    private: bool,
    revision: str | None,
    message: str | None = None,
    is_prepared: bool = False,
) -> dict[str, Any]:
    step = exported_step(staged.path) if (staged.path / RUN_FILE).is_file() else None
    default = "Upload model" if step is None else f"Step {step}"
    return {
        "job": "push",
        "folder": str(staged.path.absolute()),
        "owned": staged.owned,
        "card_is_stand_in": staged.card_is_stand_in,
        "is_prepared": is_prepared,
        "message": message or default,
        "repo_id": repo_id,
        "private": private,
        "revision": revision,
        "waits": RETRY_WAITS,
    }


def _progress_bar() -> tqdm:
    return tqdm(desc="upload", unit="B", unit_scale=True, mininterval=0.5)


def _show_progress(bar: tqdm, event: dict[str, Any]) -> None:
    if event["event"] == "sent" and (event["bytes"], event["total"]) != (bar.n, bar.total):
        bar.n, bar.total = event["bytes"], event["total"]
        bar.refresh()


# -- what is pushed --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Staged:
    """What is to be pushed, gathered so that nobody changes it.

    Args:
        path: A folder laid out as the repository is to be.
        owned: Patterns of what is deleted in the repository where it is not in the folder.
        card_is_stand_in: Whether the card is the short one of a run under way, which replaces no other.
    """

    path: Path
    owned: Sequence[str]
    card_is_stand_in: bool = False

    @classmethod
    def of(cls, folder: Path, label: str, checkpoint: Path | None, repo_id: str, revision: str | None) -> "_Staged":
        """Gathers a folder's model and, where one is named, a checkpoint.

        Args:
            folder: The folder.
            label: For the hidden folder's name.
            checkpoint: The checkpoint's folder.
            repo_id: Of the repository, which the card is to name.
            revision: Likewise.

        Raises:
            ValueError: If the model is not whole, or the checkpoint is of another step.
            FileNotFoundError: If the checkpoint is missing.
        """
        in_two_parts = _is_in_two_parts(folder)
        owned = [*(_OWNED_BY_RUN if in_two_parts else _OWNED_WEIGHTS)]
        target = _make_folder(folder, label)
        try:
            for pattern in _RUN_PATTERNS if in_two_parts else _MODEL_PATTERNS:
                for source in folder.glob(pattern):
                    if source.is_file() and not source.name.startswith("."):
                        _gather(source, target / source.relative_to(folder))
            if in_two_parts:
                _check_two_parts(target, folder, checkpoint)
            else:
                _check_model(target, folder)
            if checkpoint is not None:
                for source in checkpoint.iterdir():
                    _gather(source, target / LAST_CHECKPOINT / source.name)
            is_run, has_card = (target / RUN_FILE).is_file(), (target / _CARD_FILE).is_file()
            if is_run:
                owned += _SCORES_AND_FIGURES
            if is_run and not has_card:
                _write_stand_in(target)
            elif has_card:
                _name_repository(target, folder, repo_id, revision)
        except BaseException:
            shutil.rmtree(target)
            raise
        return cls(target, owned, is_run and not has_card)

    def remove(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self.path, ignore_errors=True)


def _is_in_two_parts(folder: Path) -> bool:
    return any((folder / name).exists() for name in (PRETRAINING_SUBFOLDER, RUN_FILE, _CONVERSION_FILE))


def _write_stand_in(staged: Path) -> None:
    """The card of a run that has not ended, so that weights are never published without their licence."""
    record = read_run(staged)
    assert record is not None  # it is there
    card = render_unfinished_card(record["arguments"], exported_step(staged) or 0)
    (staged / _CARD_FILE).write_text(card, "utf-8")


def _name_repository(staged: Path, folder: Path, repo_id: str, revision: str | None) -> None:
    """Lets the card's examples load from the repository instead of a folder; people's own words stay."""
    card = staged / _CARD_FILE
    old = re.escape(_reference_of(staged, folder))
    at_branch = f', revision="{revision}"' if revision else ""
    flag = f" --model_revision {revision}" if revision else ""
    text = card.read_text("utf-8")
    for pattern, new in (
        (rf'from_pretrained\("{old}"', f'from_pretrained("{repo_id}"{at_branch}'),
        (rf'model="{old}"', f'model="{repo_id}"{at_branch}'),
        (rf"ijepa-hf finetune {old}(?!\S)", f"ijepa-hf finetune {repo_id}{flag}"),
        (rf"--model_name_or_path {old}(?!\S)", f"--model_name_or_path {repo_id}{flag}"),
    ):
        text = re.sub(pattern, new.replace("\\", r"\\"), text)
    card.write_text(text, "utf-8")


def _reference_of(staged: Path, folder: Path) -> str:
    """What the card calls the folder."""
    for name in (REPORT_FILE, _FINETUNE_FILE):
        if (staged / name).is_file():
            arguments = json.loads((staged / name).read_text("utf-8")).get("arguments", {})
            reference = arguments.get("hub_model_id") or arguments.get("output_dir")
            if reference:
                return reference
    return folder.resolve().name


def _check_same_kind(folder: Path, prepared: Mapping[str, Any]) -> None:
    held = [name for name in (f"{PRETRAINING_SUBFOLDER}/config.json", RUN_FILE) if name in prepared["files"]]
    if held and not _is_in_two_parts(folder):
        raise ValueError(
            f"{prepared['repo_id']} holds a pretrained model ({held[0]}), which {str(folder)!r} is not; push it to "
            "another repository."
        )


def _check_holds_no_other(prepared: Mapping[str, Any], arguments: Mapping[str, Any], start_step: int) -> None:
    """Refuses a repository with something that a run's first upload would bury in its history."""
    texts, replace = prepared["texts"], "or add --overwrite_output_dir to replace it"
    if RUN_FILE not in texts:
        if any(name in prepared["files"] for name in ("config.json", WEIGHTS_FILE)):
            raise ValueError(f"it holds a model that is none of this run; name another repository, {replace}")
        return
    try:
        stored = json.loads(texts[RUN_FILE])["arguments"]
        steps = [json.loads(texts[name])["step"] for name in _STATE_FILES[1:] if name in texts]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"its {RUN_FILE} cannot be read ({error!r}); name another repository, {replace}") from None
    differing = differing_arguments(stored, arguments)
    if differing:
        raise ValueError(
            f"it holds another run: {'; '.join(differing)}. Name another repository or --hub_revision, {replace}"
        )
    if max(steps, default=0) > start_step:
        raise ValueError(
            f"it holds step {max(steps)} of this run, which would go on from {start_step}; add "
            f"--resume_from_checkpoint hub, {replace}"
        )


def _ignore(event: dict[str, Any]) -> None:
    """For jobs whose way there is of no interest."""


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
    if source.name in _GROWING_FILES:
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


def _newest_checkpoint(folder: Path) -> Path:
    checkpoint = find_latest(folder)
    if checkpoint is None:
        raise ValueError(f"{str(folder)!r} holds no undamaged checkpoint; push without one.")
    return checkpoint.path


# -- the process -----------------------------------------------------------------------------------------------------


class _HubProcess:
    """The process that makes the requests; see `hub_process.py`.

    Args:
        quiet: Show nothing of what the libraries say, nor their progress bars.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._errors = tempfile.TemporaryFile() if quiet else None  # noqa: SIM115 (`close` closes it)
        # Unbuffered, so that no lock is held when workers are forked. A session of its own, so that Ctrl-C reaches
        # the run alone, which decides.
        self._process = subprocess.Popen(
            [sys.executable, "-P", hub_process.__file__, str(os.getpid()), str(REQUEST_TIMEOUT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            bufsize=0,
            start_new_session=True,
            env={**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"} if quiet else None,
        )

    def __enter__(self) -> "_HubProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(self, job: dict[str, Any]) -> None:
        """Gives it a job. One that ended meanwhile says so in `events`."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(job).encode() + b"\n")

    def events(self) -> Iterator[dict[str, Any]]:
        """Yields what happens, the last time when the process has ended."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            yield json.loads(line)
        status = self._process.wait()
        yield {"event": "ended", "reason": f"the process that uploads ended with status {status}{self._last_words()}"}

    def run(self, job: dict[str, Any], watch: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """Does one job to its end.

        Args:
            job: The job.
            watch: Gets the events on the way.

        Returns:
            The last event.

        Raises:
            ValueError: If the user has to change something.
            ConnectionError: If it failed otherwise.
        """
        self.send(job)
        for event in self.events():
            if event["event"] == "done":
                return event
            if event["event"] in ("failed", "ended"):
                logger.debug("%s", event.get("details"))
                raise (ValueError if event.get("fault") == "user" else ConnectionError)(event["reason"])
            watch(event)
        raise AssertionError("events end with one that says so")

    def kill(self) -> None:
        """Ends it, whatever it is doing."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Ends it, and closes what leads to it; nobody may be reading `events` any more."""
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            if pipe is not None:
                pipe.close()

    def _last_words(self) -> str:
        if self._errors is None or self._errors.closed:
            return ""
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        return re.sub(r"hf_\w{20,}", "<token>", f" ({lines[-1]})") if lines else ""
