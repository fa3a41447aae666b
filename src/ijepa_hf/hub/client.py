"""Talks to the process that makes the requests to the Hub, see `hub/process.py`."""

import contextlib
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tqdm.auto import tqdm

from ijepa_hf.hub import process as hub_process
from ijepa_hf.hub.contents import ABOUT_THE_MODEL, STATE_FILES, RepositoryContents, StagedFolder
from ijepa_hf.runs.export import exported_step

# Seconds before the 2nd, ... 7th try: 126 in all. A server may ask for more, up to hub_process.LONGEST_WAIT each time.
RETRY_WAITS = (2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
START_WAITS = RETRY_WAITS[:2]  # before a run starts
REQUEST_TIMEOUT = 60.0  # seconds that a connection may be silent

Watch = Callable[[dict[str, Any]], None]

logger = logging.getLogger(__name__)


class HubProcess:
    """Starts the process that makes the requests, gives it jobs and reads their events.

    Every job raises a `ValueError` if the user has to change something, and a `ConnectionError` if it failed for
    another reason. The events `sent` and `retry` are passed to `watch`.

    Args:
        quiet: Show neither the libraries' messages nor their progress bars.
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

    def __enter__(self) -> "HubProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def prepare(
        self,
        repo_id: str,
        *,
        private: bool,
        revision: str | None,
        watch: Watch,
        license: str | None = None,
        waits: Sequence[float] | None = None,
    ) -> RepositoryContents:
        """Makes the repository and the branch if they are missing, and reads what they hold.

        Args:
            repo_id: The repository.
            private: Make it private; an existing public one is an error.
            revision: Branch; `None` is `main`.
            watch: Gets the events.
            license: Of the card to come; one that the Hub does not know is an error.
            waits: Seconds before each further try; `RETRY_WAITS` if not given.
        """
        job = {"job": "prepare", "repo_id": repo_id, "private": private, "revision": revision, "license": license,
               "texts": STATE_FILES, "waits": RETRY_WAITS if waits is None else waits}  # fmt: skip
        event = self._run(job, watch)
        return RepositoryContents(event["repo_id"], event["files"], event["texts"])

    def push(
        self, staged: StagedFolder, held: RepositoryContents, *, revision: str | None, watch: Watch
    ) -> dict[str, Any]:
        """Pushes the gathered files in one commit, whose message names the step.

        Args:
            staged: What was gathered; its card gets the repository's name.
            held: What the repository holds, from `prepare`.
            revision: Branch; `None` is `main`.
            watch: Gets the events.

        Returns:
            `url`, `commit`, and `deleted`, the names of files that were deleted.
        """
        staged.address(held.repo_id, revision)
        step = None if staged.arguments is None else exported_step(staged.path)
        job = {
            "job": "push",
            "folder": str(staged.path.absolute()),
            "owned": [*staged.owned, *(ABOUT_THE_MODEL if staged.replaces(held) else ())],
            "message": "Upload model" if step is None else f"Step {step}",
            "repo_id": held.repo_id,
            "revision": revision,
            "waits": RETRY_WAITS,
        }
        return self._run(job, watch)

    def fetch(self, repo_id: str, patterns: Sequence[str], *, revision: str | None, missing_ok: bool) -> str | None:
        """Downloads files into the Hugging Face cache.

        Args:
            repo_id: The repository.
            patterns: Patterns of file names; without a file of the first pattern, nothing is fetched.
            revision: Branch, tag or commit; `None` is the newest of `main`.
            missing_ok: Return `None` if the repository or revision does not exist, instead of raising an error.

        Returns:
            The folder; `None` if there is nothing to fetch.
        """
        job = {"job": "fetch", "repo_id": repo_id, "revision": revision, "missing_ok": missing_ok,
               "patterns": patterns, "waits": RETRY_WAITS}  # fmt: skip
        return self._run(job, lambda event: None)["path"]

    def is_alive(self) -> bool:
        """Returns whether the process can take a job."""
        return self._process.poll() is None

    def kill(self) -> None:
        """Kills the process, even during a job."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Ends the process and closes its pipes; no other thread may be running a job."""
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            if pipe is not None:
                pipe.close()

    def _run(self, job: dict[str, Any], watch: Watch) -> dict[str, Any]:
        for event in self._events(job):
            if event["event"] == "done":
                return event
            if event["event"] in ("failed", "ended"):
                logger.debug("%s", event.get("details"))
                raise (ValueError if event.get("fault") == "user" else ConnectionError)(event["reason"])
            watch(event)
        raise AssertionError("the last event is `ended`")

    def _events(self, job: dict[str, Any]) -> Iterator[dict[str, Any]]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # of a process that has ended: the last event says so
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
        for line in self._process.stdout:
            yield json.loads(line)
        status = self._process.wait()
        yield {"event": "ended", "reason": f"the process that uploads ended with status {status}{self._last_words()}"}

    def _last_words(self) -> str:
        if self._errors is None or self._errors.closed:
            return ""
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        return re.sub(r"hf_\w{20,}", "<token>", f" ({lines[-1]})") if lines else ""


def progress_bar() -> tqdm:
    """Returns a bar that counts the bytes of an upload."""
    return tqdm(desc="upload", unit="B", unit_scale=True, mininterval=0.5)


def show_progress(bar: tqdm, event: dict[str, Any]) -> None:
    """Shows an event `sent` on a bar; other events are ignored.

    Args:
        bar: The bar.
        event: The event.
    """
    if event["event"] == "sent" and (event["bytes"], event["total"]) != (bar.n, bar.total):
        bar.n, bar.total = event["bytes"], event["total"]
        bar.refresh()
