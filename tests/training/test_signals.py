"""Signals that ask a run to stop: when they raise, when they wait, and what is put back."""

import contextlib
import os
import signal
import time

import pytest

from ijepa_hf.training.signals import SAME_REQUEST_SECONDS, StoppedBySignal, StopSignals


def test_outside_of_what_must_not_be_torn_a_signal_raises_at_once_and_inside_it_waits():
    with StopSignals() as signals:
        with pytest.raises(StoppedBySignal) as raised:
            os.kill(os.getpid(), signal.SIGUSR1)
        assert raised.value.exit_code == 128 + signal.SIGUSR1
    with StopSignals() as signals:
        with signals.deferred():
            os.kill(os.getpid(), signal.SIGUSR1)
            assert signals.received == signal.SIGUSR1
            with pytest.raises(StoppedBySignal), signals.raising():
                raise AssertionError("it must not begin what may take for ever")
        with pytest.raises(StoppedBySignal):
            signals.raise_if_received()


@contextlib.contextmanager
def handled_as_in_a_terminal():
    """Python's own handler of Ctrl-C, which a job in the background does not get."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    with StopSignals():
        assert signal.getsignal(signal.SIGTERM) is not before[0]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before


def test_a_second_ctrl_c_stops_at_once_but_one_that_a_launcher_repeats_is_the_same_request(monkeypatch):
    with handled_as_in_a_terminal(), StopSignals() as signals, signals.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + SAME_REQUEST_SECONDS)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_process_forked_inside_goes_on_when_it_gets_the_signal_of_its_parent():
    with StopSignals() as signals:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os.write(writing, b"alive")
            os._exit(0)
        assert os.read(reading, 10) == b"alive"
        assert os.waitpid(child, 0)[1] == 0
    assert signals.received == 0


def test_the_death_of_a_launcher_counts_as_sigterm_and_that_of_a_shell_does_not(monkeypatch):
    for variable in ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(variable, raising=False)
    parents = iter([1000, 1, 1])
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    with StopSignals() as signals:
        signals.raise_if_received()  # asks nobody: it was not launched
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with StopSignals() as signals, pytest.raises(StoppedBySignal) as raised:
        signals.raise_if_received()
    assert raised.value.signal_number == signal.SIGTERM
