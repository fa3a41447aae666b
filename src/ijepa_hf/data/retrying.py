"""Reads files under a time limit, and repeats reads whose disk, network or server fails.

A failure of the *source* (a disk, a network, a server) may be over in a minute, and skipping the image would silently
change the run. A damaged *file* stays damaged. `RetryPolicy.call` repeats a read after a failure of the source, and
raises the error of a damaged file at once. The waits depend only on the number of failures, not on a random generator.
"""

import errno
import logging
import os
import queue
import re
import tarfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.5, 30.0  # between two tries; each is twice the last

# faults of a path, not of the source: another try gives the same
_ABOUT_THE_NAME = (
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG,
    errno.EINVAL, errno.ENXIO,
)  # fmt: skip
_NAME_ERRORS = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)
# libraries whose exceptions are not all OSErrors; compared by name, so that none has to be imported
_TRANSPORTS = ("aiohttp", "httpx", "httpx2", "httpcore", "urllib3", "requests", "http", "botocore", "huggingface_hub")
_TEMPORARY_STATUS = (408, 425, 429)  # HTTP: time-out, too early, too many requests
_QUERY_OF_ADDRESS = re.compile(r"(://[^\s'\"?]+)\?[^\s'\")]*")  # may hold a signature

_Result = TypeVar("_Result")

logger = logging.getLogger(__name__)


class DataSourceError(OSError):
    """A source of data failed for longer than its reads are repeated."""


class StalledReadError(TimeoutError):
    """A read took longer than its limit; do not use its file again."""


def is_source_failure(error: BaseException) -> bool:
    """Returns whether a read failed because of its disk, network or server, and may succeed when repeated.

    Args:
        error: What a read raised.

    Returns:
        True for I/O errors of disk and network, time-outs, cut connections and the HTTP answers 408, 425, 429 and from
        500; False for files that do not exist or may not be read, other answers from 400 to 499, and all other errors.
    """
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(status, int) and 400 <= status < 500:
        return status in _TEMPORARY_STATUS
    if isinstance(error, OSError):
        return error.errno not in _ABOUT_THE_NAME and not isinstance(error, _NAME_ERRORS)
    module = type(error).__module__.partition(".")[0]
    return module in _TRANSPORTS or isinstance(error, EOFError | tarfile.ReadError)


def is_shard_failure(error: BaseException) -> bool:
    """Returns whether reading further in a shard failed because of its source.

    Args:
        error: What a read raised.

    Returns:
        As `is_source_failure`; True also for any other OSError and answer of a server. The shard was there when the
        run began: if its file is missing now, its disk is gone, and if a server refuses it, its address has expired.
    """
    module = type(error).__module__.partition(".")[0]
    return is_source_failure(error) or isinstance(error, OSError) or module in _TRANSPORTS


def describe(error: BaseException) -> str:
    """Writes an exception on one line.

    Args:
        error: The exception.

    Returns:
        Its type, its words and those of its cause; without the query of addresses, which may hold a signature.
    """
    words = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    text = type(error).__name__ + (f": {' '.join(words.split())}" if words else "")
    if error.__cause__ is not None:
        text += f" ({describe(error.__cause__)})"
    return _QUERY_OF_ADDRESS.sub(r"\1?...", text)


@dataclass(frozen=True)
class RetryPolicy:
    """Repeats failing reads of a source for some time, and limits the time of each read.

    Args:
        seconds: Time for which a failing read is repeated, at least 0; 0 does not repeat it. It includes the waits of
            libraries: `datasets` asks a failing server 20 times in 100 s before it raises an error.
        timeout: After how many seconds a read counts as failed, at least 0; 0 waits for ever.
    """

    seconds: float = 300.0
    timeout: float = 120.0

    def call(
        self,
        what: str,
        read: Callable[[], _Result],
        is_failure: Callable[[BaseException], bool] = is_source_failure,
    ) -> _Result:
        """Calls a read, and repeats it while the source fails; each failure is logged as a warning.

        Args:
            what: Names the file, for messages.
            read: Reads; called for each try, and leaves nothing open when it fails.
            is_failure: Judges whether another try may succeed after an exception.

        Returns:
            What `read` returns.

        Raises:
            DataSourceError: If it failed for `seconds`; names the file, the reason, the tries and the time.
            Exception: As `read` raises it, where `is_failure` is false.
        """
        started, tries, wait = time.monotonic(), 0, FIRST_WAIT_SECONDS
        while True:
            try:
                return read()
            except DataSourceError:
                raise
            except Exception as error:
                if not is_failure(error):
                    raise
                tries += 1
                reason, spent = describe(error), time.monotonic() - started
                if spent >= self.seconds:
                    raise DataSourceError(self._given_up(what, reason, tries, spent)) from error
            wait = min(wait, self.seconds - spent)
            logger.warning(
                "%s cannot be read: %s; it is tried again in %.3g s, for another %.0f s",
                what, reason, wait, self.seconds - spent,
            )  # fmt: skip
            time.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT_SECONDS)

    def _given_up(self, what: str, reason: str, tries: int, spent: float) -> str:
        return (
            f"{what} cannot be read: {reason}; tried {'once' if tries == 1 else f'{tries} times'} in {spent:.1f} s "
            f"(data_retry_seconds={self.seconds:g}, data_timeout_seconds={self.timeout:g}). When the source is back, "
            "the same command with --resume_from_checkpoint latest goes on."
        )

    def within(self, read: Callable[[], _Result]) -> _Result:
        """Reads under the time limit.

        The read runs in a thread, which is abandoned when it takes longer. It must not run code of Arrow: a thread in
        Arrow can kill the process at its end (https://github.com/apache/arrow/issues/45214), one that waits in Python
        for a disk or a server cannot.

        Args:
            read: Reads.

        Returns:
            What it returns.

        Raises:
            StalledReadError: If it took longer than `timeout`.
            Exception: What `read` raises.
        """
        if self.timeout == 0:
            return read()
        thread = _own_thread()
        try:
            thread.wanted.put(read)
            result, error = thread.given.get(timeout=self.timeout)
        except queue.Empty:
            _own.thread = None
            raise StalledReadError(f"no answer within {self.timeout:g} s") from None
        except BaseException:  # an interrupt: the result that is still to come does not belong to the next read
            _own.thread = None
            raise
        if error is not None:
            raise error
        return result

    def open(self, file: Callable[[], Any]) -> "LimitedFile":
        """Opens a file of which every read is under the time limit.

        Args:
            file: Opens it.

        Returns:
            The file; close it.

        Raises:
            StalledReadError: If opening took longer than `timeout`.
            Exception: What `file` raises.
        """
        return LimitedFile(self.within(file), self)


DEFAULT_RETRIES = RetryPolicy()


class LimitedFile:
    """Wraps a binary file so that its reads have a time limit; has the methods that Arrow needs.

    Args:
        file: The opened file.
        retries: Has the limit.
    """

    def __init__(self, file: Any, retries: RetryPolicy) -> None:
        self.file, self.retries = file, retries
        self.is_stuck = False

    def read(self, size: int = -1) -> bytes:
        """Returns at most `size` bytes; a `StalledReadError` if that takes too long."""
        try:
            return self.retries.within(partial(self._read, size))
        except StalledReadError:
            self.is_stuck = True
            raise

    def _read(self, size: int) -> bytes:
        try:
            return self.file.read(size)
        finally:
            if self.is_stuck:  # nobody waits for the result
                self.file.close()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Moves to a position, and returns it; nothing is read."""
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        """Returns the position."""
        return self.file.tell()

    @property
    def closed(self) -> bool:
        """Returns whether the file is closed."""
        return self.is_stuck or self.file.closed

    def close(self) -> None:
        """Closes the file, unless a read is stuck in it: closing would wait for the read."""
        if not self.is_stuck:
            self.file.close()

    def __enter__(self) -> "LimitedFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# -- the thread that reads -------------------------------------------------------------------------------------------


class _ReadingThread:
    """Runs a thread that reads for a waiting thread; it ends with the last reference to this object."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self.wanted: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self.given: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        # a daemon, because one that is stuck must not keep the process from ending
        self.thread = threading.Thread(
            target=_read_for, args=(self.wanted, self.given), name="reads under a time limit", daemon=True
        )
        self.thread.start()

    def __del__(self) -> None:
        self.wanted.put(None)


def _read_for(
    wanted: "queue.SimpleQueue[Callable[[], Any] | None]",
    given: "queue.SimpleQueue[tuple[Any, BaseException | None]]",
) -> None:
    while (read := wanted.get()) is not None:
        result, raised = None, None
        try:
            result = read()
        except BaseException as error:
            raised = error
        given.put((result, raised))
        del read, result, raised  # not kept until the next read


_own = threading.local()  # the reading thread of each thread


def _own_thread() -> _ReadingThread:
    thread: _ReadingThread | None = getattr(_own, "thread", None)
    if thread is None or thread.process != os.getpid():  # threads do not survive a fork
        thread = _own.thread = _ReadingThread()
    return thread


def end_reading_thread() -> None:
    """Ends the thread that reads for this one, if there is one: a process that forks should have few threads."""
    thread: _ReadingThread | None = getattr(_own, "thread", None)
    _own.thread = None
    if thread is not None and thread.process == os.getpid():
        thread.wanted.put(None)
        thread.thread.join(timeout=1.0)
