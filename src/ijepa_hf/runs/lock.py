"""Keeps a run's folder to one run at a time, on this machine and on a disk that machines share.

`.lock` in the folder is held with `flock` (filelock's `FileLock`), which the kernel releases when the process ends,
also by `kill -9`. Another machine on the same disk may not see that, so the file also names its holder, and the holder
writes a new heartbeat into it every few seconds. A lock whose file stays as it is for three heartbeats is abandoned.

filelock has a lock with a heartbeat too, `SoftFileLease`; as tried with 4.2.12 it does not serve here. It takes over
an abandoned lock only where the file system can exchange two names, which NFS and SMB cannot; it takes a living
process of another machine of the same host name for a dead one of this machine; and it does not say since when.
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
_SETTLE_SECONDS = 1.0  # after which two that wrote at the same moment without `flock` know who wrote last
_NO_FLOCK = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}

logger = logging.getLogger(__name__)


class OutputDirInUseError(ValueError):
    """Another process is training into the folder."""


class RunLock:
    """Holds the lock on a run's folder until `release`, or to the end of the `with` block.

    Args:
        path: The lock file, which exists.
        flock: The kernel's lock on it; `None` where the file system has none.
        made: Folders that were made for it, innermost first; removed at the end where they are still empty.

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
        self._other: dict[str, Any] | None = None  # who has taken the lock over
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="output_dir heartbeat", daemon=True)
        self._write()

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def check(self) -> None:
        """Makes sure that nobody has taken the lock over, as may happen to a process that was stopped for a while.

        Raises:
            OutputDirInUseError: If somebody has; the folder is theirs now.
        """
        other = self._other
        with contextlib.suppress(OSError):  # a folder that has gone is an error of the save that follows
            other = self._taken_by()
        if other is not None:
            raise OutputDirInUseError(_in_use(self.path.parent, other))

    def start_heartbeat(self) -> None:
        """Starts the thread that writes the heartbeat."""
        self._thread.start()

    def release(self) -> None:
        """Releases the lock; does nothing the second time, and in a process that was forked from the holder."""
        if self._ended.is_set() or os.getpid() != self._process:
            return
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join(HEARTBEAT_SECONDS)
        try:
            found = _read(self.path)
            if found is not None and found.get("token") == self._record["token"]:
                self.path.unlink()  # while it is held: `FileLock` opens it anew where it finds the file removed
        except FileNotFoundError:
            pass
        except OSError as error:
            logger.warning("%s could not be removed: %s", self.path, error)
        if self._flock is not None:
            self._flock.release()
        _remove_empty(self._made)

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):  # of a folder that has gone and may come back
                other = self._taken_by()
                if other is not None:
                    logger.error("%s", _in_use(self.path.parent, other))
                    return
                self._record["heartbeat"] = _now()
                self._write()

    def _write(self) -> None:
        # by its path, since after a disk was mounted again the old descriptor leads nowhere; makes no missing file
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
    """Locks a run's folder, and makes the folder where there is none.

    A lock whose process has ended is taken over, with a warning. The kernel knows of processes of this machine; for
    one of another machine, its heartbeat is watched for up to three times `HEARTBEAT_SECONDS`.

    Args:
        output_dir: The run's folder.

    Returns:
        The lock.

    Raises:
        OutputDirInUseError: If another process holds it.
        ValueError: If the folder cannot be made or written to.
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
    flock = FileLock(path, timeout=0, thread_local=False, fallback_to_soft=False)
    for last in (False, True):  # a file that its holder removes meanwhile looks held, so it is tried twice
        try:
            flock.acquire()
            return flock
        except Timeout:
            record = None
            with contextlib.suppress(FileNotFoundError):
                record = _read(path)
            if record is not None or last:
                raise OutputDirInUseError(_in_use(path.parent, record)) from None
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                raise
            break
    path.touch()
    return None


def _take(path: Path, flock: FileLock | None, made: list[Path]) -> RunLock:
    """Takes the lock from a holder that has ended, where there was one; `OutputDirInUseError` if it lives."""
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
    lock.start_heartbeat()
    return lock


def _refuse_living(path: Path, found: dict[str, Any], *, has_flock: bool) -> None:
    here = found.get("machine") == _machine()
    # with the kernel's lock, its holder on this machine has ended; without it, a process that is not there has
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
    """Returns the record of a lock file; `None` where it has none."""
    try:
        record = json.loads(path.read_bytes())
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def _machine() -> str:
    """Names where a process's number means the same: one start of Linux, and one container in it."""
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
