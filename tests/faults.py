"""Processes that are killed, limited or given a tiny disk while they write; forked, so that they import nothing."""

import ctypes
import os
import resource
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch

from ijepa_hf import files

_CHANGING_EVENTS = {"os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate", "os.chmod", "os.link"}
_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000
_NOT_ALLOWED = 77


def in_fork(work: Callable[[], None]) -> int:
    """Runs something in a forked process: 0, 1 for an exception (printed), minus the signal that ended it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which the child does not use
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def every_moment(template: Path, place: Path, work: Callable[[Path], None], check: Callable[[Path], None]) -> int:
    """Kills a process that works on a copy of a folder just before its first change of a file, its second, ...

    Args:
        template: The folder as it is before.
        place: Where its copies go.
        work: What the process does with the folder.
        check: Looks at the folder afterwards; also at the one of the process that came to its end.

    Returns:
        How many moments there were.
    """
    moment = 0
    while True:
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(template, place)

        def child(moment: int = moment) -> None:
            _die_before_change(moment, place)
            work(place)

        code = in_fork(child)
        check(place)
        if code == 0:
            return moment
        assert code == -signal.SIGKILL
        moment += 1


def _die_before_change(moment: int, folder: Path) -> None:
    """Counts what changes files below a folder: system calls as Python's audit sees them, and writes by halves."""
    count = 0

    def tick() -> None:
        nonlocal count
        if count == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1

    def is_below(argument: object) -> bool:
        return isinstance(argument, str | bytes | os.PathLike) and str(folder) in str(os.fsdecode(argument))

    def audit(event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR) and is_below(path):
                tick()
        elif event in _CHANGING_EVENTS:
            in_folder = [argument for argument in arguments[1:] if isinstance(argument, int) and argument >= 0]
            if is_below(arguments[0]) or (in_folder and event != "os.mkdir"):  # rmtree works relative to descriptors
                tick()

    def by_halves(write: Callable) -> Callable:
        def written(path: Path, data: str | bytes, *arguments: object, **options: object) -> int:
            write(path, data[: len(data) // 2], *arguments, **options)
            tick()
            return write(path, data, *arguments, **options)

        return written

    def save_by_halves(tensors: dict, path: Path, metadata: dict | None = None) -> None:
        content = safetensors.torch.save(tensors, metadata)
        hidden = path.with_name(".tmpA1b2C3")  # as safetensors names its own
        hidden.write_bytes(content)
        os.replace(hidden, path)

    def copy_by_halves(source: Path, target: Path) -> Path:
        target.write_bytes(source.read_bytes())
        return target

    real_fsync = os.fsync

    def fsync(descriptor: int) -> None:
        tick()
        real_fsync(descriptor)

    os.fsync = fsync
    Path.write_text, Path.write_bytes = by_halves(Path.write_text), by_halves(Path.write_bytes)
    files.save_file, shutil.copyfile = save_by_halves, copy_by_halves
    sys.addaudithook(audit)


def limit_file_size(num_bytes: int) -> None:
    """Makes every write beyond a size of a file fail with EFBIG, in this process and for good."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


def without_privileges(work: Callable[[], None]) -> int:
    """Runs something in a forked process that may do to files what their modes say, also as root; skips where not.

    Args:
        work: What to do.

    Returns:
        As `in_fork`.
    """

    def child() -> None:
        # in a namespace without a map of users, the number stays and what it may override goes
        if os.geteuid() == 0 and ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWUSER) != 0:
            os._exit(_NOT_ALLOWED)
        work()

    return _where_allowed(child, "root may write everywhere, and this machine lets no process give that up")


def on_small_disk(folder: Path, size: str, work: Callable[[], None]) -> int:
    """Runs something in a forked process that has a disk of its own at a folder; skips where that is not allowed.

    Args:
        folder: An empty folder.
        size: As tmpfs takes it, such as `1m`.
        work: What to do.

    Returns:
        As `in_fork`.
    """

    def child() -> None:
        user, group = os.getuid(), os.getgid()
        libc = ctypes.CDLL(None, use_errno=True)
        try:
            if libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNS) != 0:
                raise OSError(ctypes.get_errno(), "unshare")
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"0 {user} 1")
            Path("/proc/self/gid_map").write_text(f"0 {group} 1")
            if libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 0, f"size={size}".encode()) != 0:
                raise OSError(ctypes.get_errno(), "mount")
        except (OSError, AttributeError):
            os._exit(_NOT_ALLOWED)
        work()

    return _where_allowed(child, "this machine lets nobody mount a small disk in a process of its own")


def _where_allowed(child: Callable[[], None], reason: str) -> int:
    code = in_fork(child)
    if code == _NOT_ALLOWED:
        pytest.skip(reason)
    return code
