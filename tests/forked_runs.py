"""Pretraining runs in processes of their own that start at once: forked from a server that has imported everything.

They are real processes: signals, `kill -9` and exit codes are those of `ijepa-hf pretrain`.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["ijepa_hf.training", "ijepa_hf.cli", "ijepa_hf.html_report", "forked_runs"])
AT_MOST = 60.0  # seconds that anything here is waited for


def _command_line(argv: list[str], log: str, environment: dict[str, str], prepare: Callable[[], None] | None) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.update(environment)
    multiprocessing.set_start_method(None, force=True)  # as in a program that nobody forked
    import torch

    from ijepa_hf.cli import main

    torch.set_num_threads(1)
    if prepare is not None:
        prepare()
    code = main(argv)
    sys.stdout.flush()
    os._exit(code)  # what multiprocessing does at a process's end is not part of the program


def start_run(
    flags: list[str],
    log: Path,
    environment: Mapping[str, str] | None = None,
    prepare: Callable[[], None] | None = None,
) -> BaseProcess:
    """Starts `ijepa-hf pretrain` with some flags.

    Args:
        flags: Of the command.
        log: Where its output goes, added at the end.
        environment: More variables.
        prepare: Called first, in the new process; a function of a module, or a `functools.partial` of one.

    Returns:
        The process; `exitcode` is the command's, or -n where signal n ended it.
    """
    argv = ["pretrain", *flags]
    # no daemon: its loading processes are its children
    process = _CONTEXT.Process(target=_command_line, args=(argv, str(log), dict(environment or {}), prepare))
    process.start()
    return process


def slow_steps(seconds: float) -> None:
    """Makes each step of this process's runs take longer, for `prepare`: so that they are caught in the middle."""
    from ijepa_hf import optimization

    step = optimization.training_step

    def slow(*args, **options):
        time.sleep(seconds)
        return step(*args, **options)

    optimization.training_step = slow


def wait_until(condition: Callable[[], bool], process: BaseProcess | None = None) -> None:
    """Waits for something to become true; an `AssertionError` if it does not, or the process ends first."""
    deadline = time.monotonic() + AT_MOST
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        assert process is None or process.is_alive(), f"it ended with {process.exitcode}"
        time.sleep(0.005)


def exit_code(process: BaseProcess, at_most: float = AT_MOST) -> int:
    """Waits for the end of a process and returns its exit code."""
    process.join(at_most)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise AssertionError(f"still running after {at_most} s")
    return process.exitcode


def steps_logged(output_dir: Path) -> int:
    """The last step in `metrics.jsonl`; 0 where there is none."""
    path = output_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return json.loads(lines[-1])["step"] if lines and lines[-1].endswith("}") else 0


def newest_checkpoint(output_dir: Path) -> int:
    """The step of the newest checkpoint folder; 0 where there is none."""
    return max((int(path.name.split("-")[1]) for path in output_dir.glob("checkpoint-*")), default=0)


def children_of(pid: int) -> set[int]:
    """Processes whose parent is `pid`."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it may end while we look
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == pid:
                found.add(int(entry.name))
    return found


def alive(pids: set[int]) -> set[int]:
    """Those of some processes that run; a zombie does not."""
    running = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                running.add(pid)
    return running


@contextlib.contextmanager
def ended(*processes: BaseProcess) -> Iterator[None]:
    """Leaves no process behind, whatever happens inside."""
    try:
        yield
    finally:
        for process in processes:
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
            process.join()
