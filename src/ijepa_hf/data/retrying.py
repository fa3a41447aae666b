"""Reads from where data lie: under a time limit, tried again while the source fails, then given up with a plain error.

A failure of the *source* (a disk, a network, a server) is not the same as a bad *file*: the first may be over in a
minute, and to go on without the image would silently make another run; the second stays what it is. `RetryPolicy.call`
tries the first again and lets the second through.

Every wait is a function of how often a read has failed, so that nothing draws from a generator.
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

FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.5, 30.0  # between two tries; each wait is twice the one before

# what is wrong with a name, and not with the source: trying again gives the same
_ABOUT_THE_NAME = (
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG,
    errno.EINVAL, errno.ENXIO,
)  # fmt: skip
_NAME_ERRORS = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)
# whose exceptions are not all OSErrors; told by name, because none of them has to be imported
_TRANSPORTS = ("aiohttp", "httpx", "httpx2", "httpcore", "urllib3", "requests", "http", "botocore", "huggingface_hub")
_TEMPORARY_STATUS = (408, 425, 429)  # of the answers 400 to 499: time-out, too early, too many requests
_QUERY_OF_ADDRESS = re.compile(r"(://[^\s'\"?]+)\?[^\s'\")]*")  # may hold a signature

_Result = TypeVar("_Result")

logger = logging.getLogger(__name__)


class DataSourceError(OSError):
    """A source of data failed, and went on failing for as long as it was to be tried again."""


class StalledReadError(TimeoutError):
    """A read took longer than its limit; what it read from is not to be touched any more."""


def is_source_failure(error: BaseException) -> bool:
    """Whether a read failed because of where the data lie, and may succeed when it is tried again.

    Args:
        error: What a read raised.

    Returns:
        True for I/O errors of disk and network, time-outs, cut connections and answers of servers that say "not now"
        (500 and above, 408, 425, 429); False for names that lead nowhere or may not be read, other answers from 400 to
        499, and for anything else.
    """
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(status, int) and 400 <= status < 500:
        return status in _TEMPORARY_STATUS
    if isinstance(error, OSError):
        return error.errno not in _ABOUT_THE_NAME and not isinstance(error, _NAME_ERRORS)
    module = type(error).__module__.partition(".")[0]
    return module in _TRANSPORTS or isinstance(error, EOFError | tarfile.ReadError)  # the last two: cut short


def is_shard_failure(error: BaseException) -> bool:
    """Whether reading on in a shard failed because of its source.

    Args:
        error: What a read raised.

    Returns:
        As `is_source_failure` says; True also for any other OSError and answer of a server: the shard was there when
        the run began, so that a name that leads nowhere is a disk that was taken away, and a refusal an address that
        has expired.
    """
    module = type(error).__module__.partition(".")[0]
    return is_source_failure(error) or isinstance(error, OSError) or module in _TRANSPORTS


def describe(error: BaseException) -> str:
    """Says what an exception says, on one line.

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
    """How patiently a source is read.

    Args:
        seconds: How long a read that fails is tried again, at least 0; 0 does not try again. Libraries below may have
            waits of their own, which count: `datasets` asks a server that fails 20 times in 100 s before it says so.
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
        """Reads, and reads again while the source fails; each failure is a warning.

        Args:
            what: Names the file, for messages.
            read: Reads; called anew for each try, and leaves nothing behind when it fails.
            is_failure: Whether an exception means that another try may succeed.

        Returns:
            What `read` returns.

        Raises:
            DataSourceError: If it went on failing for `seconds`; names the file, the reason, the tries and the time.
            Exception: What `read` raises and is no failure, as it is.
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

        The read runs in a thread, which is left behind where it takes longer. No code of Arrow calls back from there:
        a thread inside Arrow can kill the process at its end (https://github.com/apache/arrow/issues/45214), one that
        waits for a disk or a server in Python cannot.

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
        except BaseException:  # an interrupt: what it still gives is not for the next read
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
    """A binary file to read and to seek in, of which every read is under a time limit; what Arrow needs of one.

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
            if self.is_stuck:  # nobody waits any more
                self.file.close()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Goes to a place; arithmetic only."""
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        """Returns the place."""
        return self.file.tell()

    @property
    def closed(self) -> bool:
        """Whether it is closed."""
        return self.is_stuck or self.file.closed

    def close(self) -> None:
        """Closes the file, unless a read is still stuck in it: closing would wait for that."""
        if not self.is_stuck:
            self.file.close()

    def __enter__(self) -> "LimitedFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# -- the thread that reads -------------------------------------------------------------------------------------------


class _ReadingThread:
    """A thread that reads for another one, which waits; it ends with the last reference to this object."""

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
    """Ends the thread that reads for this one, where there is one: before a fork there should be few threads."""
    thread: _ReadingThread | None = getattr(_own, "thread", None)
    _own.thread = None
    if thread is not None and thread.process == os.getpid():
        thread.wanted.put(None)
        thread.thread.join(timeout=1.0)
