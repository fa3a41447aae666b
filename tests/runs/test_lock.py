"""The lock on a run's folder: who is kept out, and whose lock no longer counts."""

import errno
import fcntl
import json
import os
import shutil
import signal
import threading
import time

import pytest
from faults import in_fork
from tiny import scrambled_model

from ijepa_hf.hub.contents import StagedFolder
from ijepa_hf.runs import lock as run_lock
from ijepa_hf.runs.export import export_model
from ijepa_hf.runs.lock import OutputDirInUseError, lock_output_dir


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(run_lock, "HEARTBEAT_SECONDS", 0.2)
    monkeypatch.setattr(run_lock, "_SETTLE_SECONDS", 0.05)


@pytest.fixture
def without_flock(monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


def record_of(folder):
    return json.loads((folder / ".lock").read_text())


def write_record(folder, **changes):
    """The lock file of a process that was on another machine."""
    record = {"host": "node7", "machine": "another start", "pid": 4321, "since": "2024-05-01T10:00:00.000+00:00"}
    (folder / ".lock").write_text(json.dumps({**record, "heartbeat": "", "token": "theirs", **changes}))


class Living:
    """Writes a lock file anew, as another machine's process does while it lives."""

    def __init__(self, folder, **changes):
        self.folder, self.changes, self.ended = folder, changes, threading.Event()
        self.thread = threading.Thread(target=self.beat)

    def beat(self):
        number = 0
        while not self.ended.wait(0.05):
            number += 1
            write_record(self.folder, heartbeat=f"{number:08d}", **self.changes)

    def __enter__(self):
        write_record(self.folder, **self.changes)
        self.thread.start()

    def __exit__(self, *_):
        self.ended.set()
        self.thread.join()


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# -- on one machine --------------------------------------------------------------------------------------------------


def test_a_second_run_is_refused_naming_the_first_and_may_begin_after_it(tmp_path):
    with lock_output_dir(tmp_path):
        since = record_of(tmp_path)["since"]
        with pytest.raises(OutputDirInUseError) as caught:
            lock_output_dir(tmp_path)
        for part in (f"output_dir={str(tmp_path)!r} is in use", f"process {os.getpid()}", os.uname().nodename, since):
            assert part in str(caught.value)
        assert "Choose another --output_dir, or stop that process" in str(caught.value)

        def second():
            with pytest.raises(OutputDirInUseError, match=f"process {os.getppid()} on"):
                lock_output_dir(tmp_path)

        assert in_fork(second) == 0
    assert not list(tmp_path.iterdir())
    lock_output_dir(tmp_path).release()


def test_the_lock_of_a_process_that_was_killed_is_taken_over_at_once_and_said(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(run_lock, "HEARTBEAT_SECONDS", 60.0)  # nothing is waited for

    def killed():
        lock_output_dir(tmp_path)
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_fork(killed) == -signal.SIGKILL
    dead = record_of(tmp_path)["pid"]
    with lock_output_dir(tmp_path):
        assert record_of(tmp_path)["pid"] == os.getpid()
        assert f"was left by process {dead} on" in caplog.text
        assert caplog.records[0].levelname == "WARNING"
        with pytest.raises(OutputDirInUseError):
            lock_output_dir(tmp_path)


def test_a_loading_worker_that_outlives_its_killed_run_does_not_hold_the_lock(tmp_path):
    reader, writer = os.pipe()

    def run():
        lock = lock_output_dir(tmp_path)
        worker = os.fork()
        if worker == 0:
            lock.release()  # of a forked process this does nothing: the lock is its parent's
            os.write(writer, f"{os.getpid()}\n".encode())
            time.sleep(60)
            os._exit(0)
        wait_for(lambda: os.stat(f"/proc/{worker}"))
        time.sleep(0.1)
        with pytest.raises(OutputDirInUseError):
            lock_output_dir(tmp_path)
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_fork(run) == -signal.SIGKILL
    worker = int(os.read(reader, 20))
    try:
        os.kill(worker, 0)  # it lives
        lock_output_dir(tmp_path).release()
    finally:
        os.kill(worker, signal.SIGKILL)
        os.close(reader)
        os.close(writer)


def test_a_lock_file_that_its_holder_removes_in_between_is_not_mistaken_for_the_lock(tmp_path, monkeypatch):
    real, calls = fcntl.flock, []

    def flock(descriptor, operation):
        calls.append(descriptor)
        if len(calls) == 1:  # the holder lets go between our opening the file and our locking it
            (tmp_path / ".lock").unlink()
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with lock_output_dir(tmp_path):
        assert len(calls) == 2
        assert record_of(tmp_path)["pid"] == os.getpid()
        with pytest.raises(OutputDirInUseError):
            lock_output_dir(tmp_path)


# -- on a disk that machines share -----------------------------------------------------------------------------------


def test_another_machines_run_that_lives_is_refused_though_its_lock_does_not_reach_here(tmp_path):
    with Living(tmp_path), pytest.raises(OutputDirInUseError, match="in use by process 4321 on node7.* since 2024-05"):
        lock_output_dir(tmp_path)
    assert record_of(tmp_path)["token"] == "theirs"


def test_another_machines_lock_without_a_heartbeat_is_taken_over_after_three_and_said(tmp_path, caplog):
    write_record(tmp_path)
    begin = time.monotonic()
    with lock_output_dir(tmp_path):
        assert time.monotonic() - begin >= 3 * run_lock.HEARTBEAT_SECONDS
        assert record_of(tmp_path)["pid"] == os.getpid()
        assert "was left by process 4321 on node7, which has ended" in caplog.text


def test_the_heartbeat_goes_on_while_the_lock_is_held_and_ends_with_it(tmp_path, threads_since):
    lock = lock_output_dir(tmp_path)
    first = record_of(tmp_path)
    wait_for(lambda: record_of(tmp_path)["heartbeat"] != first["heartbeat"])
    assert {**record_of(tmp_path), "heartbeat": ""} == {**first, "heartbeat": ""}
    lock.release()
    lock.release()
    assert not threads_since("heartbeat")


def test_a_holder_that_was_taken_for_dead_is_told_when_it_saves(tmp_path, caplog):
    lock = lock_output_dir(tmp_path)
    lock.check()
    write_record(tmp_path)
    with pytest.raises(OutputDirInUseError, match="in use by process 4321 on node7"):
        lock.check()
    wait_for(lambda: "in use by process 4321" in caplog.text)
    (tmp_path / ".lock").unlink()
    with pytest.raises(OutputDirInUseError):  # also after that one has ended: what it left is another state
        lock.check()
    write_record(tmp_path)
    lock.release()
    assert record_of(tmp_path)["token"] == "theirs"


def test_where_there_is_no_flock_a_living_run_is_refused_and_a_dead_one_is_not(tmp_path, without_flock, caplog):
    with lock_output_dir(tmp_path), pytest.raises(OutputDirInUseError, match=f"process {os.getpid()}"):
        lock_output_dir(tmp_path)
    assert not list(tmp_path.iterdir())

    def killed():
        lock_output_dir(tmp_path)
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_fork(killed) == -signal.SIGKILL
    begin = time.monotonic()
    with lock_output_dir(tmp_path):
        assert time.monotonic() - begin < 3 * run_lock.HEARTBEAT_SECONDS  # its number is no process's
    assert "which has ended" in caplog.text


def test_of_two_that_begin_at_one_moment_without_flock_the_last_to_write_goes_on(tmp_path, without_flock, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: write_record(tmp_path))
    with pytest.raises(OutputDirInUseError, match="in use by process 4321"):
        lock_output_dir(tmp_path)
    assert record_of(tmp_path)["token"] == "theirs"


# -- folders ---------------------------------------------------------------------------------------------------------


def test_a_folder_that_was_made_for_the_lock_goes_with_it_unless_it_was_used(tmp_path):
    with lock_output_dir(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / ".lock").is_file()
    assert not (tmp_path / "a").exists()
    with lock_output_dir(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "run.json").touch()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["run.json"]


def test_a_folder_that_vanishes_is_neither_made_anew_nor_the_end_of_the_heartbeat(tmp_path):
    folder, aside = tmp_path / "run", tmp_path / "aside"
    lock = lock_output_dir(folder)
    folder.rename(aside)  # as a disk that goes and comes back
    time.sleep(2 * run_lock.HEARTBEAT_SECONDS)
    assert not folder.exists()
    folder.mkdir()  # an empty mount point
    time.sleep(2 * run_lock.HEARTBEAT_SECONDS)
    assert not list(folder.iterdir())
    folder.rmdir()
    lock.check()
    aside.rename(folder)
    before = record_of(folder)["heartbeat"]
    wait_for(lambda: record_of(folder)["heartbeat"] != before)
    shutil.rmtree(folder)
    lock.release()
    assert not folder.exists()


@pytest.mark.parametrize("place", ["file", "file/run"])
def test_a_place_where_no_folder_can_be_is_a_mistake_of_the_user(tmp_path, place):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=f"output_dir='{tmp_path / place}' cannot be written to"):
        lock_output_dir(tmp_path / place)


def test_a_lock_that_cannot_be_written_leaves_nothing_behind(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", refuse)
    with pytest.raises(ValueError, match=r"cannot be written to \(No space left on device\)"):
        lock_output_dir(tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_the_lock_is_not_pushed_to_the_hub(tmp_path):
    with lock_output_dir(tmp_path / "run"):
        export_model(scrambled_model(), tmp_path / "run", step=1, image_mean=[0.5] * 3, image_std=[0.5] * 3)
        staged = StagedFolder.of(tmp_path / "run", "1", None)
        assert (staged.path / "model.safetensors").is_file()
        assert not list(staged.path.rglob(".lock"))
