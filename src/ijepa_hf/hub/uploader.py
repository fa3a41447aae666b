"""Uploads a run's states while it trains; no failure of an upload stops the run.

A push is one commit, after which the repository holds the files of the folder. So no revision mixes two states, and an
interrupted push changes nothing. The repository is checked first: it may hold another run, a later step of this one,
or another kind of model (`hub/contents.py`). A separate process makes the requests (`hub/process.py`).
"""

import json
import logging
import shlex
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ijepa_hf.hub import client
from ijepa_hf.hub.contents import RepositoryContents, StagedFolder
from ijepa_hf.recipes.arguments import HUB_STRATEGIES
from ijepa_hf.runs.folder import REPORT_FILE

NO_NEWS_LIMIT = 7200.0  # seconds without a file that arrived or a request that failed, after which `finish` gives up

logger = logging.getLogger(__name__)


class UploadIncompleteError(OSError):
    """The training is finished and on disk, but the upload is incomplete; the message has the command to finish it."""


@dataclass
class _Upload:
    """Holds a state to upload, and the result of its upload."""

    step: int
    staged: StagedFolder
    sent: dict[str, Any] = field(default_factory=lambda: {"event": "sent", "bytes": 0, "total": 0})  # the last event
    url: str | None = None
    failure: str | None = None

    @property
    def has_ended(self) -> bool:
        return self.url is not None or self.failure is not None


class HubUploader:
    """Uploads states during the training; no failure of an upload stops the run.

    `start` comes first, `finish` or `stop` last; all are called by one thread. A thread of the uploader waits for
    states and pushes one after the other.

    Args:
        output_dir: The run's folder.
        repo_id: The repository, `name/repository`.
        private: Make it private; an existing public one is an error.
        revision: Branch; `main` if not given.
        strategy: `end` uploads the finished model; `checkpoint` also each submitted state, with its checkpoint.
    """

    def __init__(self, output_dir: Path, repo_id: str, *, private: bool, revision: str | None, strategy: str) -> None:
        if strategy not in HUB_STRATEGIES:
            raise ValueError(f"hub_strategy={strategy!r} must be 'end' or 'checkpoint'.")
        self._output_dir = output_dir
        self._repo_id = repo_id
        self._private = private
        self._revision = revision
        self._with_checkpoint = strategy == "checkpoint"
        self._thread = threading.Thread(target=self._work, name="ijepa-hf-hub", daemon=True)
        self._changed = threading.Condition()  # guards all below
        self._process: client.HubProcess | None = None
        self._running: _Upload | None = None
        self._waiting: _Upload | None = None
        self._has_ended = False
        self._held: RepositoryContents | None = None  # what the repository held; `None` until it could be looked at
        self._submitted: int | None = None  # newest step that was to be uploaded
        self._arrived: int | None = None  # newest step of this run that the repository has
        self._has_report = False  # the repository has the report of that step
        self._failure: str | None = None  # why the newest step did not arrive
        self._last_news = 0.0  # as time.monotonic()

    # -- what the run calls --

    def start(self, arguments: Mapping[str, Any], start_step: int, *, replace: bool = False) -> None:
        """Makes the repository and the branch if they are missing, and checks what they hold.

        Args:
            arguments: Of the run, as in `run.json`.
            start_step: Optimiser steps done; of a finished run its last.
            replace: Replace whatever model the repository holds.

        Raises:
            ValueError: If the user has to change something: no token, no permission, a bad name, a licence that the
                Hub does not know, offline mode, or a repository that holds another run, a later step of this one or
                another model. A server that cannot be reached is a warning; the check is then made later.
        """
        for left_over in self._output_dir.glob(".push-*.partial"):
            shutil.rmtree(left_over, ignore_errors=True)
        self._arguments = json.loads(json.dumps(arguments))  # as the repository's are read
        self._start_step, self._replace = start_step, replace
        self._process = client.HubProcess(quiet=True)
        try:
            self._look_into_repository(self._process, start_step, waits=client.START_WAITS)
        except ConnectionError as error:
            logger.warning("%s. The run starts all the same, and uploads are tried as it goes.", error)
        except BaseException:
            self._end()
            raise
        self._thread.start()

    def submit(self, step: int) -> None:
        """Uploads the model and the checkpoint as they are now, while the run goes on; returns at once.

        While an upload is under way, the newest submitted state waits for its end, and older ones are dropped.

        Args:
            step: Of the export and of `checkpoint-<step>`.
        """
        if self._with_checkpoint:
            try:
                self._add(step, str(step))
            except Exception as error:  # whatever it is, a run does not end for its upload
                logger.warning("step %d is not uploaded: %s", step, error)

    def finish(self, step: int) -> str:
        """Uploads the final state, and waits for it as long as the upload makes progress or is retried.

        Args:
            step: Of the export, and with strategy `checkpoint` of `checkpoint-<step>`.

        Returns:
            A sentence with the address of the upload.

        Raises:
            UploadIncompleteError: If it did not arrive; names what did, and the command that finishes it.
        """
        try:
            upload = self._add(step, f"{step}-final")
            self._wait_for(upload)
            reason = upload.failure
        except KeyboardInterrupt:
            reason = "interrupted"
        except Exception as error:  # the run is complete; its upload can be done again
            reason = str(error)
        finally:
            self._end()
        if reason is None:
            return f"Step {step} is on the Hub: {upload.url}"
        raise UploadIncompleteError(
            f"Step {step} is complete in {self._output_dir}, but did not arrive on the Hub ({reason}). "
            f"{self._repo_id} has {self._what_arrived(step)}. This finishes the upload:\n    {self._command()}"
        )

    def stop(self, wait: float = 0.0) -> str | None:
        """Ends the uploads of a run that does not reach its end. The repository stays whole.

        Args:
            wait: Seconds, at most, for the upload under way and the one that waits; 0 ends them at once.

        Returns:
            `None` if the newest submitted state has arrived; else a sentence that names the missing state and the
            command that finishes its upload.
        """
        try:
            self._wait_until_idle(wait)
        except KeyboardInterrupt:
            logger.warning("interrupted; not waiting for the upload any longer")
        under_way = not self._is_idle()
        self._end()
        if self._submitted is None or self._arrived == self._submitted:
            return None
        if under_way:
            self._failure = "it was under way when the run stopped"
        return (
            f"Step {self._submitted} did not arrive on the Hub ({self._failure}). {self._repo_id} has "
            f"{self._what_arrived(None)}. This finishes the upload:\n    {self._command()}"
        )

    def _add(self, step: int, label: str) -> _Upload:
        self._submitted = step
        checkpoint = self._output_dir / f"checkpoint-{step}" if self._with_checkpoint else None
        try:
            upload = _Upload(step, StagedFolder.of(self._output_dir, label, checkpoint))
        except Exception as error:
            self._failure = str(error)
            raise
        with self._changed:
            dropped, self._waiting = self._waiting, upload
            self._changed.notify_all()
        if dropped is not None:
            logger.info("step %d is not uploaded: a newer state is there", dropped.step)
            dropped.staged.remove()
        return upload

    def _is_idle(self) -> bool:
        return self._running is None and self._waiting is None

    def _wait_until_idle(self, seconds: float) -> None:
        with self._changed:
            if seconds > 0 and not self._is_idle():
                logger.warning("waiting up to %.0f s for step %s to arrive on the Hub", seconds, self._submitted)
                self._changed.wait_for(self._is_idle, seconds)

    def _wait_for(self, upload: _Upload) -> None:
        self._last_news = time.monotonic()
        with client.progress_bar() as bar:
            while not upload.has_ended:
                with self._changed:
                    self._changed.wait_for(lambda: upload.has_ended, 0.5)
                client.show_progress(bar, upload.sent)
                if time.monotonic() - self._last_news > NO_NEWS_LIMIT and not upload.has_ended:
                    raise TimeoutError(f"nothing arrived for {NO_NEWS_LIMIT:g} s")

    def _end(self) -> None:
        """Ends all uploads at once, and removes the files that were gathered for them."""
        with self._changed:
            self._has_ended = True
            process, self._process = self._process, None
            uploads = [upload for upload in (self._running, self._waiting) if upload is not None]
            self._running = self._waiting = None
            self._changed.notify_all()
        if process is not None:
            process.kill()  # which also ends what the thread waits for
        if self._thread.ident is not None:
            self._thread.join()
        if process is not None:
            process.close()
        for upload in uploads:
            upload.staged.remove()

    # -- what the thread does --

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._has_ended or self._waiting is not None)
                if self._has_ended:
                    return
                upload, self._waiting = self._waiting, None
                self._running = upload
                self._last_news = time.monotonic()
            assert upload is not None
            url, failure = None, None
            try:
                url = self._push(upload)
            except Exception as error:  # such as a full disk; a thread that dies in silence would let `finish` wait
                failure = str(error)
            with self._changed:
                if not self._has_ended:
                    self._record(upload, url, failure)
                    self._changed.notify_all()

    def _push(self, upload: _Upload) -> str:
        with self._changed:
            if self._has_ended:
                raise ConnectionError("the run has stopped")
            if self._process is None or not self._process.is_alive():
                if self._process is not None:
                    self._process.close()
                self._process = client.HubProcess(quiet=True)
            process = self._process

        def watch(event: dict[str, Any]) -> None:
            self._last_news = time.monotonic() + event.get("seconds", 0.0)
            if event["event"] == "sent":
                upload.sent = event
            else:
                logger.warning(
                    "uploading step %d: %s; trying again in %g s", upload.step, event["reason"], event["seconds"]
                )

        if self._held is None:  # it could not be looked at before
            self._look_into_repository(process, max(upload.step, self._start_step), watch=watch)
        assert self._held is not None
        return process.push(upload.staged, self._held, revision=self._revision, watch=watch)["url"]

    def _record(self, upload: _Upload, url: str | None, failure: str | None) -> None:
        has_report = (upload.staged.path / REPORT_FILE).is_file()
        upload.staged.remove()
        upload.url, upload.failure, self._running = url, failure, None
        if upload.step == self._submitted:  # an older state does not say why a newer one did not arrive
            self._failure = failure
        if url is None:
            logger.warning("step %d was not uploaded: %s. The run goes on.", upload.step, failure)
            return
        assert self._held is not None
        self._arrived, self._has_report = upload.step, has_report
        self._held = RepositoryContents(self._held.repo_id)  # what it held before is gone
        logger.info("step %d is on the Hub: %s", upload.step, url)

    # -- the repository --

    def _look_into_repository(
        self,
        process: client.HubProcess,
        step: int,
        *,
        waits: Sequence[float] | None = None,
        watch: client.Watch = lambda event: None,
    ) -> None:
        """Checks that the repository may be written to, and holds only this run, at no later step than `step`."""
        options = {"private": self._private, "revision": self._revision, "license": self._arguments.get("license")}
        try:
            held = process.prepare(self._repo_id, **options, waits=waits, watch=watch)
        except ValueError as error:
            raise ValueError(f"hub_model_id={self._repo_id!r} cannot be pushed to: {error}") from None
        if not self._replace:
            name = f"hub_model_id={self._repo_id!r}" + (f", branch {self._revision!r}," if self._revision else "")
            other = held.other_than(self._arguments)
            if other is not None:
                raise ValueError(
                    f"{name} holds {other}. Choose another --hub_model_id, or --hub_revision NAME, a branch of its "
                    "own, or add --overwrite_output_dir to replace it."
                )
            newest = max(held.checkpoint_step, held.report_step)
            if newest > step:
                raise ValueError(f"{name} {_further(held, step)}")
            if newest >= 0:
                self._arrived, self._has_report = newest, held.report_step == newest
        self._held = held

    def _what_arrived(self, final_step: int | None) -> str:
        if self._arrived is None:
            return "nothing of this run"
        incomplete = self._arrived == final_step and not self._has_report
        return f"step {self._arrived}" + (" without its card and report" if incomplete else "")

    def _command(self) -> str:
        words = ["ijepa-hf", "push", str(self._output_dir), self._repo_id]
        if self._private:
            words.append("--hub_private_repo")
        if self._revision is not None:
            words += ["--hub_revision", self._revision]
        if self._with_checkpoint:
            words += ["--hub_strategy", "checkpoint"]
        return shlex.join(words)


def _further(held: RepositoryContents, step: int) -> str:
    there = max(held.checkpoint_step, held.report_step)
    text = f"is at step {there} of this run already, which would start at step {step}. "
    if held.checkpoint_step > step:
        return text + "Add --resume_from_checkpoint hub to go on from there, or --overwrite_output_dir to replace it."
    return text + (
        "It has no checkpoint to go on from: choose another --hub_model_id or --hub_revision, or add "
        "--overwrite_output_dir to replace it."
    )
