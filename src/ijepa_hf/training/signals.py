"""Takes the signals that ask a run to stop, so that it stops between two steps with its state saved.

Schedulers warn before they take a machine away (SIGTERM, often SIGUSR1 some minutes before), people press Ctrl-C. The
first signal lets the step under way end. A second one of the same kind, some seconds later, ends the process at once,
as it would without this module.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
GOES_ON = "the same command with --resume_from_checkpoint latest goes on"
# A scheduler signals every process of a job, and a launcher among them passes it on to the others: one request.
SAME_REQUEST_SECONDS = 3.0
# Set by `torchrun` and by `accelerate launch`: such a parent does not leave a run behind on purpose, as a shell may.
_LAUNCHER_VARIABLES = ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")


class StoppedBySignal(KeyboardInterrupt):
    """A signal asked the run to stop. No `Exception`, so that nothing takes it for a failure.

    Args:
        signal_number: The signal's number.
        text: Says what was saved and how to go on.
    """

    def __init__(self, signal_number: int, text: str = "") -> None:
        super().__init__(text or f"stopped by {signal.Signals(signal_number).name}; {GOES_ON}.")
        self.signal_number = signal_number

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells count: 130 for Ctrl-C, 138 for SIGUSR1 (on Linux), 143 for SIGTERM."""
        return 128 + self.signal_number


class StopSignals:
    """Takes the signals that ask a run to stop, while its `with` block runs.

    A signal raises `StoppedBySignal` at once, except inside `deferred`, where it is only noted in `received`.
    Outside of the main thread, where Python lets nobody handle signals, it does nothing.
    """

    def __init__(self) -> None:
        self.received = 0  # the first signal's number; 0 means none
        self._since: dict[int, float] = {}  # when each kind came first
        self._defers = False
        self._previous: dict[signal.Signals, Any] = {}
        self._parent = os.getppid() if any(name in os.environ for name in _LAUNCHER_VARIABLES) else None
        self._process = os.getpid()

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # which is what nohup does
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Lets the block run to its end: a signal during it is only noted in `received`."""
        before, self._defers = self._defers, True
        try:
            yield
        finally:
            self._defers = before

    @contextlib.contextmanager
    def raising(self) -> Iterator[None]:
        """Lets a signal raise at once, inside `deferred`: for waits that can be cut short, such as for data."""
        self.raise_if_received()
        before, self._defers = self._defers, False
        try:
            yield
        finally:
            self._defers = before

    def raise_if_received(self) -> None:
        """Raises `StoppedBySignal` if a signal has come, or the launcher of this process has gone."""
        if not self.received and self._parent is not None and os.getppid() != self._parent:
            self.received = int(signal.SIGTERM)
            print("the process that launched this one has ended; stopping as at SIGTERM.", file=sys.stderr, flush=True)
        if self.received:
            raise StoppedBySignal(self.received)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # in a process forked from this one, such as a loading worker
            return
        now = time.monotonic()
        if now - self._since.setdefault(number, now) >= SAME_REQUEST_SECONDS:  # asked twice: no more waiting
            signal.signal(number, self._previous[signal.Signals(number)] or signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if self._since[number] < now:
            return
        self.received = self.received or number
        if not self._defers:
            raise StoppedBySignal(self.received)
        name = signal.Signals(number).name
        message = f"\n{name}: this step ends, the state is saved, then the run stops. Again later stops it at once.\n"
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, message.encode())  # print is not safe in a handler
