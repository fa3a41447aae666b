"""A small Hub: as much of the Hugging Face Hub's HTTP API as its client uses for models, in memory, with faults on
demand.

    with FakeHub() as hub:
        subprocess.run(command, env={**os.environ, **hub.environment(TOKEN)})
        hub.fail(method="POST", match="/commit/", status=503, times=2)
        hub.files("me/model")["config.json"]

Every commit keeps all files of its revision, so each stays loadable. Large files travel as on the Hub: announced,
uploaded by content, and downloaded through a redirect to another host name. Restarting (`stop`, `start`) keeps
address and contents.
"""

import base64
import contextlib
import hashlib
import json
import re
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_canary" + "0123456789" * 3  # of the user `me`, who may write
READ_TOKEN = "hf_reader" + "0123456789" * 3  # of the user `me` too, but may only read
OTHER_TOKEN = "hf_other" + "0123456789" * 3  # of the user `somebody`

LICENSES = (
    "apache-2.0",
    "mit",
    "cc-by-4.0",
    "cc-by-nc-4.0",
    "cc0-1.0",
    "openrail",
    "other",
)  # the Hub knows many more
LARGE_SUFFIXES = (".safetensors", ".png", ".bin")
PAGE = 5  # entries of a tree in one answer: small, so that several are needed
NAMES = {TOKEN: "me", READ_TOKEN: "me", OTHER_TOKEN: "somebody"}


@dataclass(frozen=True)
class Commit:
    """A revision with all its files."""

    sha: str
    parent: str | None
    message: str
    files: dict[str, bytes]


@dataclass
class Repo:
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)


@dataclass
class Fault:
    """What happens to the next requests that match, instead of or after the answer.

    kind: `status` answers with an error; `drop` closes the connection at once; `drop_upload` after half of the body;
    `lost` does all the work but closes before the answer; `cut` closes in the middle of the answer; `stall` says
    nothing for ever; `die` ends the server.
    """

    kind: str
    match: str
    method: str | None
    times: int
    status: int
    headers: dict[str, str]


class FakeHub:
    def __init__(self, port: int = 0) -> None:
        self.requests: list[tuple[str, str]] = []  # method and path with query, in order of arrival
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}  # uploaded contents by SHA-256
        self._faults: list[Fault] = []
        self._port = port
        self._lock = threading.RLock()
        self._server: _Server | None = None
        self._stopping = threading.Event()

    # -- running ---------------------------------------------------------------------------------------------------

    def __enter__(self) -> "FakeHub":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        self._stopping.clear()
        self._server = _Server(("127.0.0.1", self._port), _Handler)
        self._server.hub = self
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Goes away, with all its connections."""
        self._stopping.set()
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.close_connections()
            server.server_close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def environment(self, token: str | None = TOKEN) -> dict[str, str]:
        """What a process needs to take this for the Hub. Empty values count as not set."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0",
            "HF_TOKEN": token or "",
            "NO_PROXY": "127.0.0.1,localhost",
        }

    # -- for tests -------------------------------------------------------------------------------------------------

    def fail(
        self,
        kind: str = "status",
        *,
        match: str = "",
        method: str | None = None,
        times: int = 1,
        status: int = 500,
        headers: dict[str, str] | None = None,
    ) -> None:
        """Injects a fault into the next `times` requests whose path and query hold `match`."""
        with self._lock:
            self._faults.append(Fault(kind, match, method, times, status, headers or {}))

    def clear_faults(self) -> None:
        """Is well again from the next request on."""
        with self._lock:
            self._faults.clear()

    def release(self) -> None:
        """Closes the connections that are stalled, and from now on those that would be."""
        self._stopping.set()

    def count(self, method: str, match: str) -> int:
        """How many requests there were of a method, whose path and query hold `match`."""
        return sum(one == method and match in path for one, path in self.requests)

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a revision, but for the one that every repository starts with."""
        files = self.commit(repo_id, revision).files
        return {name: content for name, content in files.items() if name != ".gitattributes"}

    def commit(self, repo_id: str, revision: str = "main") -> Commit:
        commit = self._find(self.repos[repo_id], revision)
        assert commit is not None, f"{repo_id} has no revision {revision}"
        return commit

    def history(self, repo_id: str, revision: str = "main") -> list[Commit]:
        """Commits, newest first, without the one that every repository starts with."""
        commits, commit = [], self.commit(repo_id, revision)
        while commit.parent is not None:
            commits.append(commit)
            commit = self.repos[repo_id].commits[commit.parent]
        return commits

    def contents(self) -> Iterator[bytes]:
        """All that is stored: names, messages and files of all revisions, and all that was uploaded."""
        for repo in self.repos.values():
            for commit in repo.commits.values():
                yield commit.message.encode()
                for name, content in commit.files.items():
                    yield name.encode()
                    yield content
        yield from self.large.values()

    def create(self, repo_id: str, *, private: bool = False, files: dict[str, bytes] | None = None) -> None:
        """Makes a repository, as if somebody had done it before."""
        self.repos[repo_id] = Repo(private)
        self._commit(repo_id, "main", "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"}, None)
        if files:
            self.change(repo_id, files)

    def change(self, repo_id: str, files: dict[str, bytes], revision: str = "main") -> None:
        """Adds or changes files, as somebody else would."""
        head = self.commit(repo_id, revision)
        self._commit(repo_id, revision, "by hand", {**head.files, **files}, head.sha)

    # -- the state -------------------------------------------------------------------------------------------------

    def _commit(self, repo_id: str, branch: str, message: str, files: dict[str, bytes], parent: str | None) -> str:
        repo = self.repos[repo_id]
        named = json.dumps([parent, message, len(repo.commits), sorted(files)])
        sha = hashlib.sha1(named.encode() + b"".join(files[name] for name in sorted(files))).hexdigest()
        repo.commits[sha] = Commit(sha, parent, message, files)
        repo.branches[branch] = sha
        return sha

    @staticmethod
    def _find(repo: Repo, revision: str) -> Commit | None:
        return repo.commits.get(repo.branches.get(revision, revision))

    def _next_fault(self, method: str, path: str) -> Fault | None:
        with self._lock:
            self.requests.append((method, path))
            for fault in self._faults:
                if fault.times and fault.match in path and fault.method in (None, method):
                    fault.times -= 1
                    return fault
        return None


@contextlib.contextmanager
def in_this_process(monkeypatch: Any, cache: str) -> Iterator[FakeHub]:
    """Serves a Hub that the libraries of this process take for the real one.

    Args:
        monkeypatch: Puts everything back when the test ends.
        cache: Folder of what is downloaded.
    """
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", cache)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    # shared by the process, with the address of the Hub of the first test that used it; not in every version
    monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
    with FakeHub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield hub


class _Server(ThreadingHTTPServer):
    hub: FakeHub
    daemon_threads = True
    block_on_close = False

    def __init__(self, *arguments: Any) -> None:
        self._connections: set[socket.socket] = set()
        super().__init__(*arguments)

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self._connections.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def close_connections(self) -> None:
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError | ValueError):  # a client that went away, or we did
            super().handle_error(request, client_address)


class _Dropped(ConnectionError):
    """The connection is to be closed."""


@dataclass
class Answer:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


class Refusal(Exception):
    def __init__(self, status: int, code: str | None = None, message: str = "") -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.answer = Answer(status, json.dumps({"error": message}).encode(), headers)


def _json(value: Any, status: int = 200, **headers: str) -> Answer:
    return Answer(status, json.dumps(value).encode(), {"Content-Type": "application/json", **headers})


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _is_large(name: str) -> bool:
    return name.endswith(LARGE_SUFFIXES)


def _etag(name: str, content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if _is_large(name) else _git_hash(content)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer's body waits 40 ms for the client to have seen its headers

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        hub = self.server.hub
        fault = hub._next_fault(self.command, self.path)
        kind = None if fault is None else fault.kind
        length = int(self.headers.get("Content-Length") or 0)
        if kind == "drop_upload":
            self.rfile.read(length // 2)
        if kind == "die":
            threading.Thread(target=hub.stop).start()
        if kind == "stall":
            hub._stopping.wait()
        if kind in ("drop", "drop_upload", "die", "stall"):
            raise _Dropped
        body = self._body(length)
        if fault is not None and kind == "status":
            answer = Answer(fault.status, b'{"error": "injected"}', fault.headers)
        else:
            try:
                with hub._lock:
                    answer = self._answer(body)
            except Refusal as refusal:
                answer = refusal.answer
        if kind == "lost":
            raise _Dropped
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if "Content-Length" not in answer.headers:
            self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            if kind == "cut":
                self.wfile.write(answer.body[: len(answer.body) // 2])
                raise _Dropped
            self.wfile.write(answer.body)

    do_HEAD = do_POST = do_PUT = do_GET

    def _body(self, length: int) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(length)
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    # -- what is asked for -----------------------------------------------------------------------------------------

    def _answer(self, body: bytes) -> Answer:
        parts = urlsplit(self.path)
        self.query = parse_qs(parts.query)
        path = parts.path
        routes: list[tuple[str, str, Any]] = [
            ("GET", r"/api/whoami-v2", self._whoami),
            ("POST", r"/api/repos/create", self._create),
            ("POST", r"/api/validate-yaml", self._validate),
            ("GET", r"/api/models/([^/]+/[^/]+)", self._info),
            ("GET", r"/api/models/([^/]+/[^/]+)/revision/([^/]+)", self._info),
            ("GET", r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", self._tree),
            ("GET", r"/api/models/([^/]+/[^/]+)/refs", self._refs),
            ("GET", r"/api/models/([^/]+/[^/]+)/commits/([^/]+)", self._commits),
            ("POST", r"/api/models/([^/]+/[^/]+)/branch/([^/]+)", self._branch),
            ("POST", r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", self._preupload),
            ("POST", r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", self._commit),
            ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._batch),
            ("PUT", r"/large/upload/(\w+)", self._upload),
            ("POST", r"/large/verify", self._verify),
            ("GET", r"/large/(\w+)", self._download),
            ("GET", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._resolve),
        ]
        method = "GET" if self.command == "HEAD" else self.command
        for wanted, pattern, action in routes:
            match = re.fullmatch(pattern, path)
            if match and wanted == method:
                values = [None if value is None else unquote(value) for value in match.groups()]
                return action(*values, *([body] if method in ("POST", "PUT") else []))
        raise Refusal(404, None, f"no such address: {self.command} {path}")

    def _user(self) -> str | None:
        given = self.headers.get("Authorization")
        if given is None:
            return None
        token = given.removeprefix("Bearer ")
        if token not in NAMES:
            raise Refusal(401, None, "Invalid credentials in Authorization header")
        return NAMES[token]

    def _may_write(self, owner: str) -> bool:
        return self._user() == owner and READ_TOKEN not in self.headers.get("Authorization", "")

    def _repo(self, repo_id: str, *, write: bool = False) -> Repo:
        user, owner = self._user(), repo_id.split("/")[0]
        repo = self.server.hub.repos.get(repo_id)
        if repo is None or (repo.private and user != owner):
            raise Refusal(404 if user else 401, "RepoNotFound", "Repository not found")
        if write and not self._may_write(owner):
            raise Refusal(403 if user else 401, None, "You are not allowed to write here")
        return repo

    def _revision(self, repo: Repo, revision: str) -> Commit:
        commit = self.server.hub._find(repo, revision)
        if commit is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def _whoami(self) -> Answer:
        user = self._user()
        if user is None:
            raise Refusal(401, None, "Invalid username or password.")
        return _json({"type": "user", "name": user, "orgs": []})

    def _create(self, body: bytes) -> Answer:
        asked, hub = json.loads(body), self.server.hub
        user = self._user()
        if user is None:
            raise Refusal(401, None, "Invalid username or password.")
        owner = asked.get("organization") or user
        repo_id = f"{owner}/{asked['name']}"
        url = f"{hub.endpoint}/{repo_id}"
        if not self._may_write(owner):
            raise Refusal(403, None, f"You don't have the rights to create a model under the namespace {owner!r}")
        if repo_id in hub.repos:
            return _json({"error": "You already created this model repo", "url": url}, 409)
        hub.create(repo_id, private=asked.get("private") is True or asked.get("visibility") == "private")
        return _json({"url": url, "name": repo_id, "id": "1"})

    def _validate(self, body: bytes) -> Answer:
        text = json.loads(body)["content"]
        front = re.match(r"---\n(.*?)\n---(\n|$)", text, re.DOTALL)
        if front is None:
            return _json({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})
        named = (yaml.safe_load(front[1]) or {}).get("license")
        errors = []
        if named is not None and not isinstance(named, str):
            errors.append({"message": '"license" must be a string'})
        elif named is not None and named not in LICENSES:
            errors.append({"message": f'"license" must be one of [{", ".join(LICENSES)}]'})
        return _json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def _info(self, repo_id: str, revision: str = "main") -> Answer:
        repo = self._repo(repo_id)
        commit = self._revision(repo, revision)
        files = [{"rfilename": name} for name in sorted(commit.files)]
        return _json(
            {"_id": "1", "id": repo_id, "modelId": repo_id, "sha": commit.sha, "private": repo.private,
             "siblings": files, "tags": [], "downloads": 0, "likes": 0}
        )  # fmt: skip

    def _tree(self, repo_id: str, revision: str, folder: str | None) -> Answer:
        files = self._revision(self._repo(repo_id), revision).files
        prefix = f"{folder}/" if folder else ""
        inside = {name: content for name, content in files.items() if name.startswith(prefix)}
        if folder and not inside:
            raise Refusal(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries: dict[str, dict[str, Any]] = {}
        for name, content in sorted(inside.items()):
            steps = name.removeprefix(prefix).split("/")
            for depth in range(1, len(steps) if recursive else min(2, len(steps))):
                path = prefix + "/".join(steps[:depth])
                entries[path] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": path}
            if recursive or len(steps) == 1:
                entry = {"type": "file", "oid": _git_hash(content), "size": len(content), "path": name}
                if _is_large(name):
                    sha = hashlib.sha256(content).hexdigest()
                    entry["lfs"] = {"oid": sha, "size": len(content), "pointerSize": 134}
                entries[name] = entry
        start = int(self.query.get("cursor", ["0"])[0])
        page, headers = list(entries.values())[start : start + PAGE], {}
        if start + PAGE < len(entries):
            url = f"{self.server.hub.endpoint}{urlsplit(self.path).path}?recursive={recursive}&cursor={start + PAGE}"
            headers["Link"] = f'<{url}>; rel="next"'
        return _json(page, **headers)

    def _refs(self, repo_id: str) -> Answer:
        branches = self._repo(repo_id).branches.items()
        listed = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in branches]
        return _json({"branches": listed, "converts": [], "tags": []})

    def _commits(self, repo_id: str, revision: str) -> Answer:
        repo, listed = self._repo(repo_id), []
        commit: Commit | None = self._revision(repo, revision)
        while commit is not None:
            listed.append(
                {"id": commit.sha, "title": commit.message, "message": "", "date": "2026-01-01T00:00:00.000Z",
                 "authors": [{"user": "me"}]}
            )  # fmt: skip
            commit = None if commit.parent is None else repo.commits[commit.parent]
        return _json(listed)

    def _branch(self, repo_id: str, branch: str, body: bytes) -> Answer:
        repo = self._repo(repo_id, write=True)
        if branch in repo.branches:
            raise Refusal(409, None, "Reference already exists")
        if not re.fullmatch(r"[\w./-]+", branch):
            raise Refusal(400, None, "Invalid reference")
        start = json.loads(body or b"{}").get("startingPoint", "main")
        repo.branches[branch] = self._revision(repo, start).sha
        return _json({})

    def _preupload(self, repo_id: str, revision: str, body: bytes) -> Answer:
        files = self._revision(self._repo(repo_id, write=True), revision).files
        ignored = files.get(".gitignore", b"").decode().split()
        answers = []
        for entry in json.loads(body)["files"]:
            name = entry["path"]
            answer = {
                "path": name,
                "uploadMode": "lfs" if _is_large(name) else "regular",
                "shouldIgnore": name in ignored,
            }
            if name in files:
                answer["oid"] = _etag(name, files[name])
            answers.append(answer)
        return _json({"files": answers})

    def _batch(self, repo_id: str, body: bytes) -> Answer:
        self._repo(repo_id, write=True)
        hub, objects = self.server.hub, []
        elsewhere = hub.endpoint.replace("127.0.0.1", "localhost")
        for entry in json.loads(body)["objects"]:
            answer = {"oid": entry["oid"], "size": entry["size"]}
            if entry["oid"] not in hub.large:
                answer["actions"] = {
                    "upload": {"href": f"{elsewhere}/large/upload/{entry['oid']}"},
                    "verify": {"href": f"{hub.endpoint}/large/verify"},
                }
            objects.append(answer)
        return _json({"transfer": "basic", "objects": objects})

    def _upload(self, sha: str, body: bytes) -> Answer:
        if self.headers.get("Authorization"):
            raise Refusal(400, None, "the token must not be sent to another host")
        if hashlib.sha256(body).hexdigest() != sha:
            raise Refusal(400, None, "content does not match its SHA-256")
        self.server.hub.large[sha] = body
        return Answer()

    def _verify(self, body: bytes) -> Answer:
        asked = json.loads(body)
        content = self.server.hub.large.get(asked["oid"])
        if content is None or len(content) != asked["size"]:
            raise Refusal(404, None, "not uploaded")
        return _json({})

    def _commit(self, repo_id: str, branch: str, body: bytes) -> Answer:
        hub, repo = self.server.hub, self._repo(repo_id, write=True)
        head = self._revision(repo, branch)
        files, header = dict(head.files), {}
        for line in body.splitlines():
            entry = json.loads(line)
            key, value = entry["key"], entry["value"]
            if key == "header":
                header = value
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in hub.large:
                    raise Refusal(400, None, f"{value['path']} was not uploaded")
                files[value["path"]] = hub.large[value["oid"]]
            elif key == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise Refusal(404, "EntryNotFound", "A file with this name doesn't exist")
            else:
                raise Refusal(400, None, f"unknown operation {key}")
        if header.get("parentCommit") not in (None, head.sha):
            raise Refusal(412, None, "A commit has happened since. Please refresh and try again.")
        sha = hub._commit(repo_id, branch, header["summary"], files, head.sha)
        return _json({"success": True, "commitOid": sha, "commitUrl": f"{hub.endpoint}/{repo_id}/commit/{sha}"})

    def _resolve(self, repo_id: str, revision: str, name: str) -> Answer:
        commit = self._revision(self._repo(repo_id), revision)
        headers = {"X-Repo-Commit": commit.sha}
        if name not in commit.files:
            refusal = Refusal(404, "EntryNotFound", "Entry not found")
            refusal.answer.headers.update(headers)
            raise refusal
        content = commit.files[name]
        etag = _etag(name, content)
        if _is_large(name):
            self.server.hub.large[etag] = content
            elsewhere = self.server.hub.endpoint.replace("127.0.0.1", "localhost")
            linked = {"X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{etag}"'}
            return Answer(302, b"", {**headers, **linked, "Location": f"{elsewhere}/large/{etag}"})
        return self._content(content, {**headers, "ETag": f'"{etag}"'})

    def _download(self, sha: str) -> Answer:
        if self.headers.get("Authorization"):
            raise Refusal(400, None, "the token must not be sent to another host")
        content = self.server.hub.large.get(sha)
        if content is None:
            raise Refusal(404, "EntryNotFound", "Entry not found")
        return self._content(content, {"ETag": f'"{sha}"'})

    def _content(self, content: bytes, headers: dict[str, str]) -> Answer:
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        headers = {**headers, "Accept-Ranges": "bytes"}
        if match is None:
            return Answer(200, content, {**headers, "Content-Length": str(len(content))})
        first, last = int(match[1]), int(match[2] or len(content) - 1)
        part = content[first : last + 1]
        return Answer(206, part, {**headers, "Content-Range": f"bytes {first}-{last}/{len(content)}"})
