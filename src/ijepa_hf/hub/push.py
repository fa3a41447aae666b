"""Pushes a folder to the Hub, and fetches a checkpoint from it."""

import logging
from pathlib import Path
from typing import Any

from ijepa_hf.hub.client import RETRY_WAITS, _HubProcess, _prepare_job, _progress_bar, _push_job, _show_progress
from ijepa_hf.hub.contents import LAST_CHECKPOINT, RepositoryContents, StagedFolder
from ijepa_hf.runs.checkpoints import find_latest
from ijepa_hf.runs.folder import GROWING_FILES, RUN_FILE

logger = logging.getLogger(__name__)


# What is fetched: the checkpoint, and the log, which `run_folder.prepare_output_dir` takes over.
_FETCHED = (f"{LAST_CHECKPOINT}/*", *GROWING_FILES, RUN_FILE)


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    with_checkpoint: bool = False,
    commit_message: str | None = None,
) -> str:
    """Pushes the folder of a run, a converted model or a fine-tuned model in one commit.

    Args:
        folder: The folder. Only what the run wrote is taken, and of another model's folder only the model.
        repo_id: The repository, `name/repository`; made if it is missing.
        private: Make it private; an existing public one is an error then.
        revision: Branch; made if it is missing; `main` if not given.
        with_checkpoint: Push the newest checkpoint of a run as well, to resume from.
        commit_message: Its first line; names the step if not given.

    Returns:
        The URL of what was pushed.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If the folder holds no whole model, the repository holds pretraining and the folder another kind
            of model, or the user has to change something (token, permission, name).
        ConnectionError: If the Hub cannot be reached, or fails again and again.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{str(folder)!r}: there is no such folder.")
    checkpoint = _newest_checkpoint(folder) if with_checkpoint else None
    staged = StagedFolder.of(folder, "by-hand", checkpoint)
    try:
        with _HubProcess(quiet=True) as process, _progress_bar() as bar:

            def show(event: dict[str, Any]) -> None:
                if event["event"] == "retry":
                    logger.warning("%s; trying again in %g s", event["reason"], event["seconds"])
                _show_progress(bar, event)

            prepare = _prepare_job(repo_id, private=private, revision=revision, waits=RETRY_WAITS)
            held = RepositoryContents.of(process.run(prepare, show))
            staged.check_kind(held)
            other = None if staged.arguments is None else held.other_than(staged.arguments)
            if other is not None:
                logger.warning("%s holds %s; this replaces it, the commits before keep it.", held.repo_id, other)
            outcome = process.run(_push_job(staged, held, revision=revision, message=commit_message), show)
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
        missing_ok: A repository or branch that does not exist is no error; it has no checkpoint.

    Returns:
        The checkpoint's folder, for `checkpointing.read_checkpoint`, which checks it; the log lies in the folder
        above. `None` where the repository has no checkpoint.

    Raises:
        ValueError: If there is no such repository or revision, or the user may not read it, or offline mode is on.
        ConnectionError: If the Hub cannot be reached. What the cache holds is not used then: it may be older.
    """
    job = {"job": "fetch", "repo_id": repo_id, "revision": revision, "waits": RETRY_WAITS,
           "missing_ok": missing_ok, "needed": [f"{LAST_CHECKPOINT}/*"], "patterns": _FETCHED}  # fmt: skip
    with _HubProcess() as process:
        path = process.run(job, lambda event: None)["path"]
    return None if path is None else Path(path) / LAST_CHECKPOINT


def _newest_checkpoint(folder: Path) -> Path:
    checkpoint = find_latest(folder)
    if checkpoint is None:
        raise ValueError(f"{str(folder)!r} holds no undamaged checkpoint; push without one.")
    return checkpoint.path
