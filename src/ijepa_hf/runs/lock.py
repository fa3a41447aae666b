"""Locks a run's folder for one run, on this machine and on a disk that several machines share.

The process holds `.lock` in the folder with `flock` (filelock's `FileLock`), which the kernel releases when the
process ends, even by `kill -9`. Another machine on the same disk may not see the `flock`. So the file also names its
holder, and the holder writes a new heartbeat into it every few seconds. A lock whose file does not change for three
heartbeats is abandoned.

filelock's own lock with a heartbeat, `SoftFileLease` (tried: 4.2.12), does not serve here. It takes over an abandoned
lock only where the file system can exchange two names, which NFS and SMB cannot; it mistakes a living process of
another machine with the same host name for a dead one of this machine; and its record has no start time.
"""

import contextlib
import datetime
import errno
import json
import logging
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

LOCK_FILE = ".lock"
HEARTBEAT_SECONDS = 5.0
_HEARTBEATS_TO_WATCH = 3
_SETTLE_SECONDS = 1.0  # without `flock`: the wait before a second process that wrote at the same moment is seen
_RETRY_SECONDS = 0.2  # `FileLock` finds a file that its holder is just removing held, and tries again
_NO_FLOCK = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}

logger = logging.getLogger(__name__)


class OutputDirInUseError(ValueError):
    """Another process is training in the folder."""


class RunLock:
    """Holds the lock on a run's folder until `release`, or to the end of the `with` block.

    Args:
        path: The lock file; must exist.
        flock: The kernel's lock on it; `None` if the file system has none.
        made: Folders that were created for it, innermost first; removed at the end if they are still empty.

    Raises:
        OSError: If the file cannot be written.
    """

    def __init__(self, path: Path, flock: FileLock | None, made: list[Path]) -> None:
        self.path = path
        self._flock, self._made, self._process = flock, made, os.getpid()
        self._record = {
            "host": socket.gethostname(),
            "machine": _machine(),
            "pid": os.getpid(),
            "since": _now(),
            "heartbeat": _now(),
            "token": uuid.uuid4().hex,
        }
        self._other: dict[str, Any] | None = None  # the process that has taken the lock over
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="output_dir heartbeat", daemon=True)
        self._write()

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def check(self) -> None:
        """Checks that no process has taken the lock over while this one was stopped.

        Raises:
            OutputDirInUseError: If one has; the folder is no longer this run's.
        """
        other = self._other
        with contextlib.suppress(OSError):  # the save that follows reports a folder that has gone
            other = self._taken_by()
        if other is not None:
            raise OutputDirInUseError(_in_use(self.path.parent, other))

    def release(self) -> None:
        """Releases the lock; does nothing if called again, or in a process forked from the holder."""
        if self._ended.is_set() or os.getpid() != self._process:
            return
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join(HEARTBEAT_SECONDS)
        try:
            found = _read(self.path)
            if found is not None and found.get("token") == self._record["token"]:
                self.path.unlink(missing_ok=True)  # while it is held: `FileLock` then opens a new file
        except OSError as error:
            logger.warning("%s could not be removed: %s", self.path, error)
        if self._flock is not None:
            self._flock.release()
        _remove_empty(self._made)

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):  # the folder's disk has gone, and may come back
                other = self._taken_by()
                if other is not None:
                    logger.error("%s", _in_use(self.path.parent, other))
                    return
                self._record["heartbeat"] = _now()
                self._write()

    def _write(self) -> None:
        # by path, because a descriptor is useless once the disk was mounted again; a missing file is not created
        descriptor = os.open(self.path, os.O_RDWR)
        try:
            content = (json.dumps(self._record, indent=2) + "\n").encode("utf-8")
            os.pwrite(descriptor, content, 0)
            os.ftruncate(descriptor, len(content))
        finally:
            os.close(descriptor)

    def _taken_by(self) -> dict[str, Any] | None:
        if self._other is None:
            found = _read(self.path)
            if found is not None and found.get("token") != self._record["token"]:
                self._other = found
        return self._other


def lock_output_dir(output_dir: Path) -> RunLock:
    """Locks a run's folder, and creates the folder if it is missing.

    A lock whose process has ended is taken over, with a warning. For a process of this machine the kernel knows; for
    one of another machine, its heartbeat is watched for up to three times `HEARTBEAT_SECONDS`.

    Args:
        output_dir: The run's folder.

    Returns:
        The lock.

    Raises:
        OutputDirInUseError: If another process holds it.
        ValueError: If the folder cannot be created or written to.
    """
    made = [folder for folder in (output_dir, *output_dir.absolute().parents) if not folder.exists()]
    path = output_dir / LOCK_FILE
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        flock = _take_flock(path)
        try:
            return _take(path, flock, made)
        except BaseException:
            if flock is not None:
                flock.release()
            raise
    except OSError as error:
        _remove_empty(made)
        raise ValueError(
            f"output_dir={str(output_dir)!r} cannot be written to ({error.strerror or error}); choose another "
            "--output_dir, or make that one writable."
        ) from error


def _take_flock(path: Path) -> FileLock | None:
    flock = FileLock(path, timeout=_RETRY_SECONDS, thread_local=False, fallback_to_soft=False)
    try:
        flock.acquire()
        return flock
    except Timeout:
        raise OutputDirInUseError(_in_use(path.parent, _read(path))) from None
    except OSError as error:
        if error.errno not in _NO_FLOCK:
            raise
    path.touch()
    return None


def _take(path: Path, flock: FileLock | None, made: list[Path]) -> RunLock:
    """Takes the lock, from a holder that has ended if there was one; `OutputDirInUseError` if it is alive."""
    found = _read(path)
    if found is not None:
        _refuse_living(path, found, has_flock=flock is not None)
    try:
        lock = RunLock(path, flock, made)
    except OSError:  # such as a full disk
        path.unlink()
        raise
    if flock is None:
        time.sleep(_SETTLE_SECONDS)
        lock.check()
    lock._thread.start()
    return lock


def _refuse_living(path: Path, found: dict[str, Any], *, has_flock: bool) -> None:
    here = found.get("machine") == _machine()
    # on this machine a holder has ended if the kernel's lock was free or, without `flock`, its process is gone
    if not (here and (has_flock or not _is_alive(found.get("pid")))):
        deadline = time.monotonic() + _HEARTBEATS_TO_WATCH * HEARTBEAT_SECONDS
        while time.monotonic() < deadline:
            time.sleep(HEARTBEAT_SECONDS / 5)
            later = _read(path)  # opening the file makes a network file system ask its server
            if later is not None and later != found:
                raise OutputDirInUseError(_in_use(path.parent, later))
    logger.warning(
        "%s was left by process %s on %s, which has ended without removing it; this run takes it over.",
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
        f"{record.get('host', 'an unknown machine')}, which has been training in it since "
        f"{record.get('since', 'an unknown time')}. Choose another --output_dir, or stop that process first."
    )


def _read(path: Path) -> dict[str, Any] | None:
    """Returns the record of a lock file; `None` if there is none."""
    try:
        record = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def _machine() -> str:
    """Names the space in which process numbers are unique: a boot of Linux, and a container in it."""
    try:
        start = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        return f"{start} {Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return socket.gethostname()


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:  # it is not empty, or has gone
            return
