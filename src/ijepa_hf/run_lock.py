"""One run in one folder: a lock that dies with its process, on this machine and on a shared disk.

`.lock` in the folder is held with `flock`, which the kernel lets go when the process ends, however it ends. Where that
does not reach, because another machine uses the same disk, a heartbeat decides: the file says who holds it, and is
written anew every few seconds while its process lives.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any

LOCK_FILE = ".lock"
HEARTBEAT_SECONDS = 5.0
_HEARTBEATS_TO_WATCH = 3  # without one, another machine's process has ended
_SETTLE_SECONDS = 1.0  # until the last one of those who write at the same moment without `flock` is known
_NO_FLOCK = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}

logger = logging.getLogger(__name__)

_held_here: set[int] = set()  # descriptors


class OutputDirInUseError(ValueError):
    """Another process is training into the folder."""


class RunLock:
    """The lock on a run's folder, until `release` or the end of the `with` block.

    Args:
        path: The lock file.
        descriptor: Of the file, open and locked.
        made: Folders that were made for it, innermost first; removed with it where they are still empty.
    """

    def __init__(self, path: Path, descriptor: int, made: list[Path]) -> None:
        self.path = path
        self._descriptor, self._made, self._process = descriptor, made, os.getpid()
        now = _now()
        self._record = {
            "host": socket.gethostname(),
            "machine": _machine(),
            "pid": os.getpid(),
            "since": now,
            "heartbeat": now,
            "token": uuid.uuid4().hex,
        }
        self._other: dict[str, Any] | None = None  # who has taken the lock over
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="output_dir heartbeat", daemon=True)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, _as_bytes(self._record), 0)

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def check(self) -> None:
        """Makes sure that nobody has taken the lock over, as may happen to a process that stood still for a while.

        Raises:
            OutputDirInUseError: If somebody has; the folder is theirs now.
        """
        other = self._other
        with contextlib.suppress(OSError):  # of a folder that has gone, which is what saving says
            other = self._taken_by()
        if other is not None:
            raise OutputDirInUseError(_in_use(self.path.parent, other))

    def release(self) -> None:
        """Lets the folder go. In a process forked from the one that took the lock, and the second time, nothing."""
        if self._ended.is_set() or os.getpid() != self._process:
            return
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join(HEARTBEAT_SECONDS)
        try:
            found = _read(self.path)
            if found is not None and found.get("token") == self._record["token"]:
                self.path.unlink()  # while it is held: who opened it before finds it gone, see `_take`
        except FileNotFoundError:  # gone with its folder
            pass
        except OSError as error:
            logger.warning("%s could not be removed: %s", self.path, error)
        with contextlib.suppress(OSError):  # where there is no such lock
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        _held_here.discard(self._descriptor)
        os.close(self._descriptor)
        _remove_empty(self._made)

    def _start_beating(self) -> None:
        self._thread.start()

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            try:
                other = self._taken_by()
                if other is not None:
                    logger.error("%s", _in_use(self.path.parent, other))
                    return
                self._record["heartbeat"] = _now()
                # by its path: when a disk was mounted again, the descriptor leads nowhere; a missing file is not made
                descriptor = os.open(self.path, os.O_RDWR)
                try:
                    os.pwrite(descriptor, _as_bytes(self._record), 0)  # of the same length each time
                finally:
                    os.close(descriptor)
            except OSError:  # a folder that has gone is what saving says; it may come back
                continue

    def _taken_by(self) -> dict[str, Any] | None:
        if self._other is None:
            found = _read(self.path)
            if found is not None and found.get("token") != self._record["token"]:
                self._other = found
        return self._other


def lock_output_dir(output_dir: Path) -> RunLock:
    """Takes the lock on a run's folder, and makes the folder where there is none.

    A lock whose process has ended is taken over, which is said in the log. On the same machine the kernel knows; of
    another machine's, its heartbeat is waited for, at most `HEARTBEAT_SECONDS` three times.

    Args:
        output_dir: The run's folder.

    Returns:
        The lock.

    Raises:
        OutputDirInUseError: If another process holds it.
        ValueError: If the folder cannot be made or written to.
    """
    made = [folder for folder in (output_dir, *output_dir.absolute().parents) if not folder.exists()]
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        return _take(output_dir / LOCK_FILE, made)
    except OSError as error:
        _remove_empty(made)
        raise ValueError(
            f"output_dir={str(output_dir)!r} cannot be written to ({error.strerror or error}); choose another "
            "--output_dir, or make that one writable."
        ) from error


def _take(path: Path, made: list[Path]) -> RunLock:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        _held_here.add(descriptor)
        try:
            lock = _take_open(path, descriptor, made)
        except BaseException:
            _held_here.discard(descriptor)
            os.close(descriptor)
            raise
        if lock is not None:
            return lock
        _held_here.discard(descriptor)
        os.close(descriptor)


def _take_open(path: Path, descriptor: int, made: list[Path]) -> RunLock | None:
    """The lock, or `None` where the file was removed by its holder between opening and locking it."""
    has_flock = True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        with contextlib.suppress(FileNotFoundError):
            raise OutputDirInUseError(_in_use(path.parent, _read(path))) from None
        return None
    except OSError as error:
        if error.errno not in _NO_FLOCK:
            raise
        has_flock = False
    try:
        if not os.path.samestat(os.fstat(descriptor), path.stat()):
            return None
        _refuse_living(path, has_flock=has_flock)
    except FileNotFoundError:
        return None
    try:
        lock = RunLock(path, descriptor, made)
    except OSError:  # such as a full disk
        path.unlink()
        raise
    if not has_flock:
        time.sleep(_SETTLE_SECONDS)
        lock.check()
    lock._start_beating()
    return lock


def _refuse_living(path: Path, *, has_flock: bool) -> None:
    """Looks at who was there before: none, one that has ended, or one that lives."""
    found = _read(path)
    if found is None:
        return
    here = found.get("machine") == _machine()
    # with the kernel's lock, a process of this machine has ended; without it, one that is no longer there has
    if not (here and (has_flock or not _is_alive(found.get("pid")))):
        deadline = time.monotonic() + _HEARTBEATS_TO_WATCH * HEARTBEAT_SECONDS
        while time.monotonic() < deadline:
            time.sleep(HEARTBEAT_SECONDS / 5)
            later = _read(path)  # opened anew: a network file system then asks its server
            if later is not None and later != found:
                raise OutputDirInUseError(_in_use(path.parent, later))
    logger.warning(
        "%s was left by process %s on %s, which has ended without removing it; it is taken over.",
        path, found.get("pid"), found.get("host"),
    )  # fmt: skip


def _is_alive(pid: Any) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, TypeError, ValueError):
        return False
    except PermissionError:  # another user's
        return True
    return True


def _in_use(output_dir: Path, record: dict[str, Any] | None) -> str:
    record = record or {}
    return (
        f"output_dir={str(output_dir)!r} is in use by process {record.get('pid', '?')} on "
        f"{record.get('host', 'an unknown machine')}, which has been training into it since "
        f"{record.get('since', 'an unknown time')}. Choose another --output_dir, or stop that process first."
    )


def _read(path: Path) -> dict[str, Any] | None:
    """What a lock file says; `None` where it says nothing yet."""
    try:
        record = json.loads(path.read_bytes())
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _as_bytes(record: dict[str, Any]) -> bytes:
    return (json.dumps(record, indent=2) + "\n").encode("utf-8")


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def _machine() -> str:
    """Where a process's number means the same: a start of Linux, and a container in it, whatever their names are."""
    try:
        start = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        return f"{start} {Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return socket.gethostname()


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:  # it is used, or has gone
            return


def _close_in_child() -> None:
    """A loading worker is a fork: it would hold the lock for as long as it outlives its parent."""
    for descriptor in _held_here:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held_here.clear()


os.register_at_fork(after_in_child=_close_in_child)
