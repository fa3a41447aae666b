"""Pushes a folder to the Hub, and fetches a checkpoint from it."""

import logging
from pathlib import Path
from typing import Any

from ijepa_hf.hub.client import HubProcess, progress_bar, show_progress
from ijepa_hf.hub.contents import LAST_CHECKPOINT, StagedFolder
from ijepa_hf.runs.checkpoints import find_latest
from ijepa_hf.runs.folder import GROWING_FILES, RUN_FILE

# The files to fetch: the checkpoint, and the logs, which the run's folder takes over.
_FETCHED = (f"{LAST_CHECKPOINT}/*", *GROWING_FILES, RUN_FILE)

logger = logging.getLogger(__name__)


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    with_checkpoint: bool = False,
) -> str:
    """Pushes the folder of a run, a converted model or a fine-tuned model in one commit.

    Args:
        folder: The folder. Only what the run wrote is taken, and of another model's folder only the model.
        repo_id: The repository, `name/repository`; made if it is missing.
        private: Make it private; an existing public one is an error then.
        revision: Branch; made if it is missing; `main` if not given.
        with_checkpoint: Push the newest checkpoint of a run as well, to resume from.

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
    checkpoint = find_latest(folder) if with_checkpoint else None
    if with_checkpoint and checkpoint is None:
        raise ValueError(f"{str(folder)!r} holds no undamaged checkpoint; push without one.")
    staged = StagedFolder.of(folder, "by-hand", None if checkpoint is None else checkpoint.path)
    try:
        with HubProcess(quiet=True) as process, progress_bar() as bar:

            def show(event: dict[str, Any]) -> None:
                if event["event"] == "retry":
                    logger.warning("%s; trying again in %g s", event["reason"], event["seconds"])
                show_progress(bar, event)

            held = process.prepare(repo_id, private=private, revision=revision, watch=show)
            staged.check_kind(held)
            other = None if staged.arguments is None else held.other_than(staged.arguments)
            if other is not None:
                logger.warning("%s holds %s; this replaces it, the commits before keep it.", held.repo_id, other)
            outcome = process.push(staged, held, revision=revision, watch=show)
    finally:
        staged.remove()
    if outcome["deleted"]:
        logger.info("deleted in %s, because they belong to another state: %s", repo_id, ", ".join(outcome["deleted"]))
    return outcome["url"]


def fetch_checkpoint(repo_id: str, *, revision: str | None = None, missing_ok: bool = False) -> Path | None:
    """Downloads the checkpoint that a run pushed, and its log, into the Hugging Face cache.

    Args:
        repo_id: The repository.
        revision: Branch, tag or commit; the newest of `main` if not given.
        missing_ok: A repository or branch that does not exist is no error; it has no checkpoint.

    Returns:
        The checkpoint's folder, for `read_checkpoint`, which checks it; the logs lie in the folder above. `None`
        where the repository has no checkpoint.

    Raises:
        ValueError: If there is no such repository or revision, or the user may not read it, or offline mode is on.
        ConnectionError: If the Hub cannot be reached. What the cache holds is not used then: it may be older.
    """
    with HubProcess() as process:
        path = process.fetch(repo_id, _FETCHED, revision=revision, missing_ok=missing_ok)
    return None if path is None else Path(path) / LAST_CHECKPOINT
