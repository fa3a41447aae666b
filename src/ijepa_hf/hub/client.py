"""Talks to the process that makes the requests to the Hub."""

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

logger = logging.getLogger(__name__)


# Seconds before the 2nd, ... 7th try: 126 in all. A server may ask for more, up to hub_process.LONGEST_WAIT each time.
RETRY_WAITS = (2.0, 4.0, 8.0, 16.0, 32.0, 64.0)

START_WAITS = RETRY_WAITS[:2]  # before a run starts

REQUEST_TIMEOUT = 60.0  # seconds that a connection may be silent


def _prepare_job(
    repo_id: str, *, private: bool, revision: str | None, waits: Sequence[float], license: str | None = None
) -> dict[str, Any]:
    return {"job": "prepare", "repo_id": repo_id, "private": private, "revision": revision, "license": license,
            "texts": STATE_FILES, "waits": waits}  # fmt: skip


def _push_job(
    staged: StagedFolder, held: RepositoryContents, *, revision: str | None, message: str | None = None
) -> dict[str, Any]:
    staged.address(held.repo_id, revision)
    step = None if staged.arguments is None else exported_step(staged.path)
    default = "Upload model" if step is None else f"Step {step}"
    return {
        "job": "push",
        "folder": str(staged.path.absolute()),
        "owned": [*staged.owned, *(ABOUT_THE_MODEL if staged.replaces(held) else ())],
        "message": message or default,
        "repo_id": held.repo_id,
        "revision": revision,
        "waits": RETRY_WAITS,
    }


def _progress_bar() -> tqdm:
    return tqdm(desc="upload", unit="B", unit_scale=True, mininterval=0.5)


def _show_progress(bar: tqdm, event: dict[str, Any]) -> None:
    if event["event"] == "sent" and (event["bytes"], event["total"]) != (bar.n, bar.total):
        bar.n, bar.total = event["bytes"], event["total"]
        bar.refresh()


class _HubProcess:
    """Starts the process that makes the requests, gives it jobs and reads what happens; see `hub_process.py`.

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

    def __enter__(self) -> "_HubProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(self, job: dict[str, Any]) -> None:
        """Sends a job. Of a process that has ended, `events` says so."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(job).encode() + b"\n")

    def events(self) -> Iterator[dict[str, Any]]:
        """Yields what happens; the last event is the end of the process."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            yield json.loads(line)
        status = self._process.wait()
        yield {"event": "ended", "reason": f"the process that uploads ended with status {status}{self._last_words()}"}

    def run(self, job: dict[str, Any], watch: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """Does one job to its end.

        Args:
            job: The job.
            watch: Gets the events before the last one.

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
        raise AssertionError("the last event is `ended`")

    def is_alive(self) -> bool:
        """Whether it can take a job."""
        return self._process.poll() is None

    def kill(self) -> None:
        """Ends it, whatever it does."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Ends it and closes its pipes; nobody may be reading `events` any more."""
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
