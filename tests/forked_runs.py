"""Processes of their own that start at once: forked from a server that has imported everything.

They are real processes: signals, `kill -9` and exit codes are those of `ijepa-hf pretrain`. Several talk to each other
over gloo, as those of `torchrun` do; tests/invariant/test_parallel.py starts the real one once.
"""

import contextlib
import functools
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path

import thrift

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "ijepa_hf.training.pretrain",
        "ijepa_hf.commands.main",
        "ijepa_hf.training.html_report",
        "forked_runs",
        "warm_python",
        "thrift",
    ]
)
AT_MOST = 60.0  # seconds that anything here is waited for


def _in_child(work: Callable[[], int | None], log: str, environment: dict[str, str]) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.update(environment)
    multiprocessing.set_start_method(None, force=True)  # as in a program that nobody forked
    import torch

    torch.set_num_threads(1)
    thrift.leave_out()
    code = 1
    try:
        code = work() or 0
    except Exception:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)  # what multiprocessing does at a process's end is not part of the program


def _pretrain(flags: list[str], prepare: Callable[[], None] | None) -> int:
    from ijepa_hf.commands.main import main

    if prepare is not None:
        prepare()
    return main(["pretrain", *flags])


def start(work: Callable[[], int | None], log: Path, environment: Mapping[str, str]) -> BaseProcess:
    """Has a process call something; its output is added to a file."""
    # no daemon: its loading processes are its children
    process = _CONTEXT.Process(target=_in_child, args=(work, str(log), dict(environment)))
    process.start()
    return process


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
    return start(functools.partial(_pretrain, flags, prepare), log, environment or {})


def start_ranks(number: int, work: Callable[[], int | None] | list[str], log: Path) -> list[BaseProcess]:
    """Starts processes as `torchrun` does, but with nobody who ends the others when one dies.

    Args:
        number: How many.
        work: What each does, a function of a module or a `functools.partial` of one; or the flags of a pretraining.
        log: Where their output goes: with `-<rank>` at the end of its name.

    Returns:
        The processes, by rank.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"ACCELERATE_USE_CPU": "true", "WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    work = functools.partial(_pretrain, work, None) if isinstance(work, list) else work
    return [
        start(work, log.with_name(f"{log.name}-{rank}"), {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(number)
    ]


def run_ranks(number: int, work: Callable[[], int | None] | list[str], log: Path, code: int = 0) -> str:
    """Does the same to the end, where each process has the exit code; returns what all of them said, by rank."""
    processes = start_ranks(number, work, log)
    with ended(*processes):
        codes = [exit_code(process, 200) for process in processes]
    said = "".join(log.with_name(f"{log.name}-{rank}").read_text() for rank in range(number))
    assert codes == [code] * number, said[-4000:]
    return said


def slow_steps(seconds: float) -> None:
    """Makes each step of this process's runs take longer, for `prepare`: so that they are caught in the middle."""
    from ijepa_hf.training.step import ReadyModel

    step = ReadyModel.step

    def slow(*args, **options):
        time.sleep(seconds)
        return step(*args, **options)

    ReadyModel.step = slow


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
