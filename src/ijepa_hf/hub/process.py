"""Makes the requests to the Hub in a separate process, so that no request can slow, hang or end a run.

`hub/client.py` starts this file as a script, gives it jobs and reads events, both as lines of JSON:

    {"job": "prepare", ...}   makes the repository and the branch if they are missing, checks the licence and the
                              permission to write, and returns what they hold
    {"job": "push", ...}      pushes the files of a folder to a prepared repository, in one commit
    {"job": "fetch", ...}     downloads a part of the repository into the cache

    {"event": "sent", "bytes": 1000, "total": 2000}
    {"event": "retry", "reason": "HTTP 503 ...", "seconds": 4.0}
    {"event": "done", ...}   or   {"event": "failed", "fault": "user" | "server" | "program", "reason": "..."}

Why a process: huggingface_hub waits for ever for a server that has stalled, uploads in threads that Python waits for
at exit, and closes connections that a streamed data set may be reading from. A process can be killed at any time.
This one imports only huggingface_hub, so it starts in a third of a second and takes 40 MB.

Why retries of our own: the library's `http_backoff` covers only some requests (not the commit), reports nothing and
waits as long as a server says.

No event holds the token.
"""

import hashlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    ModelCardData,
    get_session,
    get_token,
    set_client_factory,
    snapshot_download,
)
from huggingface_hub.constants import REPOCARD_NAME
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import parse_ratelimit_headers

LONGEST_WAIT = 300.0  # seconds; a server that asks for more is asked again after this
SMALL_FILE = 1_000_000  # bytes; smaller files are sent together, larger ones one by one

Report = Callable[[dict[str, Any]], None]


class TemporaryError(Exception):
    """A request that may succeed later.

    Args:
        reason: What happened.
        asked_wait: Seconds that the server asked to wait, if it did.
    """

    def __init__(self, reason: str, asked_wait: float | None = None) -> None:
        super().__init__(reason)
        self.asked_wait = asked_wait


class UserError(ValueError):
    """Something that the user has to change; the message says what."""


# -- requests --------------------------------------------------------------------------------------------------------


def bound_requests(seconds: float) -> None:
    """Gives every request of this process a time limit, and leaves all retries to `retrying`.

    Args:
        seconds: How long a connection may be silent, at each of connecting, sending and receiving.
    """
    plain = get_session()
    client_class: Any = type(plain)  # httpx.Client or httpx2.Client, as the library's version has it

    class BoundedClient(client_class):
        def send(self, request: Any, **options: Any) -> Any:
            """Sends a request as the library does, within the limit; failures that may pass are `TemporaryError`s."""
            limits = request.extensions.get("timeout") or {}
            bounded = {name: limits.get(name) or seconds for name in ("connect", "read", "write", "pool")}
            request.extensions = {**request.extensions, "timeout": bounded}
            try:
                response = super().send(request, **options)
            except HTTPError as error:
                raise TemporaryError(f"{type(error).__name__} at {request.method} {request.url.path}") from error
            if response.status_code in (408, 429) or response.status_code >= 500:
                wait = _asked_wait(response.headers)
                response.close()
                raise TemporaryError(f"HTTP {response.status_code} at {request.method} {request.url.path}", wait)
            return response

    hooks = plain.event_hooks
    set_client_factory(lambda: BoundedClient(event_hooks=hooks, follow_redirects=True, timeout=seconds))


def _asked_wait(headers: Mapping[str, str]) -> float | None:
    """Returns the seconds that a server asks to wait, from either of the Hub's headers; `None` if it does not ask."""
    text = headers.get("Retry-After", "")
    if text.isdigit():
        return float(text)
    limit = parse_ratelimit_headers(headers)
    return float(limit.reset_in_seconds) if limit is not None and limit.remaining == 0 else None


def retrying(attempt: Callable[[Report], dict[str, Any]], job: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """Tries a job until it succeeds, until no retry can help, or until all waits are used up.

    Args:
        attempt: Does the job once. An event `sent` with more bytes than before starts the count of failures again.
        job: With `waits`, the seconds before the second, third, ... try. A server may ask for more, up to
            `LONGEST_WAIT`.
        report: Gets the events of `attempt`, and one for each failure that is followed by another try.

    Returns:
        What `attempt` returned.
    """
    failures, most = 0, -1

    def watch(event: dict[str, Any]) -> None:
        nonlocal failures, most
        if event["event"] == "sent" and event["bytes"] > most:
            failures, most = 0, event["bytes"]
        report(event)

    while True:
        try:
            return attempt(watch)
        except Exception as error:
            fault, reason, asked = explain(error, job["repo_id"])
            if fault != "server" or failures == len(job["waits"]):
                raise
            wait = min(LONGEST_WAIT, max(job["waits"][failures], asked or 0.0))
            failures += 1
            if asked is not None and asked > LONGEST_WAIT:
                reason += f", which asks to wait {asked:g} s"
            report({"event": "retry", "reason": reason, "seconds": wait})
            time.sleep(wait)


def explain(error: BaseException, repo_id: str) -> tuple[str, str, float | None]:
    """Explains an error in a sentence for the user.

    Args:
        error: What was raised, by huggingface_hub or here.
        repo_id: The repository.

    Returns:
        The cause (`user`; `server`, which may pass; or `program`), the sentence, and the seconds that the server asked
        to wait.
    """
    for link in _chain(error):
        if isinstance(link, TemporaryError):
            return "server", str(link), link.asked_wait
        if isinstance(link, UserError):
            return "user", str(link), None
        if isinstance(link, OfflineModeIsEnabled):
            return "user", "offline mode is on: unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE to use the Hub", None
        if isinstance(link, HFValidationError):
            return "user", f"{str(link).rstrip('.')}. Write it as name/repository, such as me/my-ijepa", None
        if isinstance(link, HfHubHTTPError):
            return _explain_status(link, repo_id)
        if type(link).__name__ == "XetAuthenticationError":
            return "user", f"the token may not write to {repo_id!r}", None
        # invalid JSON is a proxy's page; a RuntimeError without a cause is a failed request of hf_xet
        passing = isinstance(link, HTTPError | ConnectionError | TimeoutError | json.JSONDecodeError)
        if passing or (type(link) is RuntimeError and link.__cause__ is None):
            return "server", f"{type(link).__name__}: {link}", None
        if type(link) is ValueError:  # such as a model card whose metadata are refused
            return "user", str(link), None
    return "program", f"{type(error).__name__}: {error}", None


def _explain_status(error: HfHubHTTPError, repo_id: str) -> tuple[str, str, float | None]:
    status = error.response.status_code
    said = f" (the server says: {error.server_message})" if error.server_message else ""
    if status in (409, 412):
        return "server", f"HTTP {status}: another process is writing to {repo_id!r}", None
    if status == 401:
        text = (
            f"HTTP 401: the Hub does not take this token, or it may not see {repo_id!r}; log in again with "
            "`hf auth login`, or set HF_TOKEN to a token with write permission"
        )
    elif status == 403:
        text = (
            f"HTTP 403: the token may not write to {repo_id!r}; use one with write permission, or another repository"
        )
    elif status == 404:
        text = f"HTTP 404: there is no repository {repo_id!r} or no such revision, or the token may not see it"
    else:
        text = f"HTTP {status} at {error.response.request.method} {error.response.request.url.path}"
    return "user", text + said, None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


# -- jobs ------------------------------------------------------------------------------------------------------------


def do(job: Mapping[str, Any], report: Report) -> None:
    """Does a job and reports its result as an event; raises nothing.

    Args:
        job: See the module's description.
        report: Gets the events, without the token.
    """
    token: str | None = None

    def redacted(event: dict[str, Any]) -> None:
        texts = {name: value for name, value in event.items() if isinstance(value, str)}
        report({**event, **{name: text.replace(token, "<token>") for name, text in texts.items() if token}})

    try:
        token = get_token()
        if token is None and job["job"] != "fetch":
            raise UserError("there is no token: log in with `hf auth login`, or set HF_TOKEN")
        api = HfApi(token=token if token is not None else False, library_name="ijepa-hf")
        action = {"prepare": _prepare, "push": _push, "fetch": _fetch}[job["job"]]
        result = retrying(lambda watch: action(api, job, watch), job, redacted)
        redacted({"event": "done", **result})
    except Exception as error:
        fault, reason, _ = explain(error, job["repo_id"])
        details = "".join(traceback.format_exception(error))
        redacted({"event": "failed", "fault": fault, "reason": " ".join(reason.split()), "details": details})


def _prepare(api: HfApi, job: Mapping[str, Any], _: Report) -> dict[str, Any]:
    repo_id, revision = _full_name(api, job["repo_id"]), job["revision"]
    if job["license"] is not None:  # else the commit of the card would be refused, when the training is over
        try:
            ModelCard(f"---\n{ModelCardData(license=job['license']).to_yaml()}\n---\n").validate(repo_type="model")
        except ValueError as error:
            raise UserError(
                f"the Hub does not take license={job['license']!r} ({error}); write an identifier that it knows, such "
                "as --license apache-2.0, or --license other"
            ) from None
    api.create_repo(repo_id, private=True if job["private"] else None, exist_ok=True)
    if job["private"] and not api.repo_info(repo_id).private:
        raise UserError(
            f"{repo_id!r} exists and everybody can read it, but it was to be private; make it private in its settings "
            "on the Hub, or use another name"
        )
    if revision is not None:
        _make_branch(api, repo_id, revision)
    # creating an existing repository is no error even without permission to write: check that here; sends nothing
    api.preupload_lfs_files(repo_id, [CommitOperationAdd(REPOCARD_NAME, b"# A model\n")], revision=revision)
    head = _head(api, repo_id, revision)
    files = sorted(_list_files(api, repo_id, head))
    texts = {name: _read(api, repo_id, head, name) for name in job["texts"] if name in files}
    return {"repo_id": repo_id, "files": files, "texts": texts}


def _make_branch(api: HfApi, repo_id: str, revision: str) -> None:
    """Makes a branch that is missing."""
    try:
        api.repo_info(repo_id, revision=revision)
    except RevisionNotFoundError:
        # from the first commit: a copy of `main` would be the state of something else
        first = api.list_repo_commits(repo_id)[-1].commit_id
        api.create_branch(repo_id, branch=revision, revision=first, exist_ok=True)


def _push(api: HfApi, job: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """Pushes once; files that are already there, also from a try whose answer was lost, are not sent again."""
    repo_id, revision, folder = job["repo_id"], job["revision"], Path(job["folder"])
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    head = _head(api, repo_id, revision)
    there = _list_files(api, repo_id, head)
    changed = [name for name, path in files.items() if not _is_same(path, there.get(name))]
    stale = [name for name in there if name not in files and _matches(name, job["owned"])]
    if changed or stale:
        additions = [CommitOperationAdd(name, files[name]) for name in changed]
        _send(api, repo_id, revision, additions, report)
        head = api.create_commit(
            repo_id,
            [*additions, *map(CommitOperationDelete, stale)],
            commit_message=job["message"],
            revision=revision,
            parent_commit=head,  # so that what was compared with is what is changed
        ).oid
        kept_out = sorted(set(files) - set(_list_files(api, repo_id, head)))
        if kept_out:
            raise UserError(f"{repo_id!r} keeps out {', '.join(kept_out)}; look at its .gitignore")
    return {"url": _url(api, repo_id, revision), "commit": head, "deleted": stale}


def _fetch(api: HfApi, job: Mapping[str, Any], _: Report) -> dict[str, Any]:
    repo_id = _full_name(api, job["repo_id"])
    try:
        # one commit for the list and the files; of a server that is down the cache is not asked, it may be older
        commit = _head(api, repo_id, job["revision"])
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        if job["missing_ok"] and not isinstance(error, GatedRepoError):
            return {"path": None}
        raise
    if not any(_matches(name, job["patterns"][:1]) for name in _list_files(api, repo_id, commit)):
        return {"path": None}
    path = snapshot_download(repo_id, revision=commit, allow_patterns=list(job["patterns"]), token=api.token)
    return {"path": path, "commit": commit}


def _full_name(api: HfApi, repo_id: str) -> str:
    """Returns the repository's name with its owner; the owner is the user if none is given."""
    return repo_id if "/" in repo_id or api.token is False else f"{api.whoami()['name']}/{repo_id}"


def _head(api: HfApi, repo_id: str, revision: str | None) -> str:
    """Returns the newest commit of a revision."""
    commit = api.repo_info(repo_id, revision=revision).sha
    assert commit is not None  # it is asked for
    return commit


def _read(api: HfApi, repo_id: str, commit: str, name: str) -> str:
    return Path(api.hf_hub_download(repo_id, name, revision=commit)).read_text("utf-8", errors="replace")


def _url(api: HfApi, repo_id: str, revision: str | None) -> str:
    return f"{api.endpoint}/{repo_id}" + (f"/tree/{revision}" if revision else "")


def _list_files(api: HfApi, repo_id: str, commit: str) -> dict[str, RepoFile]:
    entries = api.list_repo_tree(repo_id, recursive=True, revision=commit)
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def _is_same(path: Path, there: RepoFile | None) -> bool:
    if there is None or there.size != path.stat().st_size:
        return False
    if there.lfs is None:
        content = path.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == there.blob_id
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == there.lfs.sha256


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _send(api: HfApi, repo_id: str, revision: str | None, additions: list[CommitOperationAdd], report: Report) -> None:
    """Sends the contents of files; they become visible with the commit that follows."""
    small = [addition for addition in additions if addition.upload_info.size < SMALL_FILE]
    large = [addition for addition in additions if addition.upload_info.size >= SMALL_FILE]
    total, sent = sum(addition.upload_info.size for addition in additions), 0
    report({"event": "sent", "bytes": 0, "total": total})
    for group in [small, *([addition] for addition in large)]:
        if group:
            api.preupload_lfs_files(repo_id, group, revision=revision, free_memory=False)
            sent += sum(addition.upload_info.size for addition in group)
            report({"event": "sent", "bytes": sent, "total": total})


# -- the process -----------------------------------------------------------------------------------------------------


def _leave_with(parent: int) -> None:
    """Ends this process when the one that started it has ended."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def main() -> None:
    """Reads jobs from standard input until it ends; events go to standard output, which nothing else may write to."""
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    parent, timeout = int(sys.argv[1]), float(sys.argv[2])
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    bound_requests(timeout)

    def report(event: dict[str, Any]) -> None:
        events.write(json.dumps(event) + "\n")
        events.flush()

    for line in sys.stdin:
        do(json.loads(line), report)
    os._exit(0)  # threads of the libraries, if any, are not waited for


if __name__ == "__main__":
    main()
