"""Loading processes: their errors come with their own words, their death is named, and none is left behind."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torch.utils.data._utils import signal_handling
from warm_python import warm_python

from ijepa_hf.data.loader import DataWorkerError, PlainLoader, _describe_deaths
from ijepa_hf.data.retrying import DataSourceError

# torch says that two workers on one core are many
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


class OfItsOwn(OSError):
    """An exception that cannot be sent, because its constructor wants more than its words."""

    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


class Stuck:
    """Stands for an error: reads that never come back."""


LONG = "11 images one after the other cannot be read:\n  image 3: no\n  image 4: ValueError: no"
ERRORS = {
    "value": ValueError(LONG),
    "source": DataSourceError("shard 3 cannot be read: OSError: Input/output error"),
    "file": FileNotFoundError(2, "No such file or directory", "a.parquet"),
    "own": OfItsOwn("this", "that"),
    "memory": MemoryError(),
    "bug": AttributeError("no attribute"),
    "exit": 3,
    "stuck": Stuck(),
}


def fail(kind):
    error = ERRORS[kind]
    if isinstance(error, Exception):
        raise error
    if isinstance(error, int):
        os._exit(error)
    time.sleep(600)


class Numbers(Dataset):
    """Gives numbers, and fails at 7."""

    def __init__(self, kind=None):
        self.kind = kind

    def __len__(self):
        return 40

    def __getitems__(self, numbers):
        if 7 in numbers and self.kind:
            fail(self.kind)
        return [(number, os.getpid()) for number in numbers]


class Stream(IterableDataset):
    """The same one by one, each worker all of them."""

    def __init__(self, kind=None):
        self.kind = kind

    def __iter__(self):
        for number in range(20):
            yield Numbers(self.kind).__getitems__([number, number])


def keep(samples):
    return samples


def loader_of(dataset, workers, collate=keep):
    batching = {"batch_size": None} if isinstance(dataset, IterableDataset) else {"batch_size": 4}
    return PlainLoader(dataset, collate, num_workers=workers, **batching)


def children():
    """The loading processes; programs that tests fork from a server of their own live on beside them."""
    others = multiprocessing.context.ForkServerProcess
    return [process.pid for process in multiprocessing.active_children() if not isinstance(process, others)]


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("dataset", [Numbers, Stream])
def test_samples_come_as_from_any_loader(dataset, workers):
    loader = loader_of(dataset(), workers)
    numbers = [number for batch in loader for number, _ in batch]
    assert sorted(set(numbers)) == list(range(40 if dataset is Numbers else 20))
    assert {pid == os.getpid() for batch in loader for _, pid in batch} == {workers == 0}
    loader.close()
    assert children() == []


@pytest.mark.parametrize(
    ("dataset", "workers", "kind"), [(Numbers, 0, "value"), (Stream, 2, "source"), (Numbers, 2, "file")]
)
def test_an_error_of_a_worker_has_its_own_type_and_words_and_ends_all_workers(dataset, workers, kind):
    iterator = iter(loader_of(dataset(kind), workers))
    next(iterator)
    with pytest.raises(type(ERRORS[kind])) as raised:
        list(iterator)
    assert type(raised.value) is type(ERRORS[kind])
    assert str(raised.value) == str(ERRORS[kind])
    assert children() == []
    assert list(iterator) == []  # it gives nothing any more


def test_an_error_of_the_collator_too():
    def collate(samples):
        if samples[0][0] >= 8:
            raise ValueError("images of unequal size")
        return samples

    for workers in (0, 1):
        with pytest.raises(ValueError, match=r"^images of unequal size$"):
            list(loader_of(Numbers(), workers, collate))
    assert children() == []


def test_an_error_that_cannot_be_sent_comes_as_its_words():
    with pytest.raises(OSError, match=r"^OfItsOwn: this and that$"):
        list(loader_of(Numbers("own"), 1))


def test_memory_that_ran_out_in_a_worker_is_said_with_what_to_do():
    with pytest.raises(DataWorkerError, match=r"memory ran out while images were loaded; fewer --dataloader_num_wor"):
        list(loader_of(Numbers("memory"), 1))
    assert children() == []


def test_a_bug_comes_with_its_traceback():
    with pytest.raises(AttributeError, match=r"(?s)worker process 0.*Traceback.*raise error"):
        list(loader_of(Numbers("bug"), 1))
    assert children() == []


@pytest.mark.parametrize("had_another_loader", [False, True])
def test_a_worker_that_is_killed_is_named_when_the_next_batch_is_asked_for_and_the_others_end(
    had_another_loader, monkeypatch
):
    if had_another_loader:  # of torch's own kind, which leaves its handler of dying children in the process
        monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)  # as if it were the first
        assert len(list(DataLoader(range(4), num_workers=1))) == 4
    iterator = iter(loader_of(Numbers("stuck"), 2))
    pids = children()
    assert len(pids) == 2
    next(iterator)
    os.kill(pids[1], signal.SIGKILL)
    started = time.monotonic()
    while is_running(pids[1]):  # a step that is being taken: Python runs handlers of signals here
        pass
    with pytest.raises(
        DataWorkerError, match=rf"^a loading process \(pid {pids[1]}\) was killed by signal SIGKILL, m"
    ):
        list(iterator)
    assert time.monotonic() - started < 15
    assert children() == []
    assert not any(map(is_running, pids))


def test_a_worker_that_ends_by_itself_is_named_with_its_exit_code():
    with pytest.raises(DataWorkerError, match=r"a loading process \(pid \d+\) ended by itself, with exit code 3\. "):
        list(loader_of(Numbers("exit"), 2))
    assert children() == []


@pytest.mark.parametrize(
    ("code", "what"),
    [
        (-signal.SIGKILL, "was killed by signal SIGKILL, most often because memory ran out"),
        (-signal.SIGTERM, "was killed by signal SIGTERM"),
        (-signal.SIGBUS, "was killed by signal SIGBUS: a file that is mapped into memory could not be read, or shared "
         "memory (/dev/shm) is full"),
        (-signal.SIGSEGV, "was killed by signal SIGSEGV: a library crashed"),
        (-200, "was killed by signal 200"),
        (0, "ended by itself, with exit code 0"),
    ],
)  # fmt: skip
def test_the_death_of_a_worker_is_reported_with_its_likely_cause_and_what_to_do(code, what):
    assert _describe_deaths([SimpleNamespace(pid=12, exitcode=code)]) == (
        f"a loading process (pid 12) {what}. The same command with --resume_from_checkpoint latest goes on; fewer "
        "--dataloader_num_workers, a smaller --shuffle_buffer_size, or --keep_images_in_memory no need less memory."
    )


def test_signals_that_are_meant_for_the_run_do_not_end_workers():
    loader = loader_of(Numbers(), 2)
    iterator = iter(loader)
    next(iterator)
    for pid in children():
        for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
            os.kill(pid, number)
    assert len(list(iterator)) == 9
    loader.close()


def test_closing_does_not_wait_for_a_worker_that_is_stuck():
    loader = loader_of(Numbers("stuck"), 2)
    next(iter(loader))
    pids = children()
    started = time.monotonic()
    loader.close()
    assert time.monotonic() - started < 8
    assert not any(map(is_running, pids))


ORPHANS = """
import os, sys, time
from test_loader import Numbers, loader_of, children
iterator = iter(loader_of(Numbers(sys.argv[1] or None), 2))
next(iterator)
print(*children(), flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("kind", ["", "stuck"])
def test_workers_end_with_a_main_process_that_is_killed_even_in_the_middle_of_a_read(kind, child_environment):
    environment = {**child_environment, "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    command = [*warm_python(), "-W", "ignore", "-c", ORPHANS, kind]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        pids = list(map(int, process.stdout.readline().split()))
        assert len(pids) == 2
        assert all(map(is_running, pids))
        process.kill()
        started = time.monotonic()
        while any(map(is_running, pids)) and time.monotonic() - started < 15:
            time.sleep(0.05)
        assert not any(map(is_running, pids))
