"""Loads batches in worker processes; raises a worker's own error, names a dead worker, leaves no worker behind.

`DataLoader` raises a worker's error as the text of its traceback. For a dead worker it raises an error in a signal
handler, which may run in the middle of an optimiser step. Here errors are passed on as values, and a dead worker is
noticed when the next batch is asked for, so that the weights are those after a whole step. Workers end with the main
process, also if it is killed.
"""

import copy
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

_TORCH_HANDLERS = "torch.utils.data._utils.signal_handling"
_DEATH_SECONDS = 1.0  # from a broken connection until the exit code of its process is known
_PATIENCE_SECONDS = 2.0  # workers that are asked to end have this long before they are killed
# These ask the run to stop, and often reach its workers too; SIGTERM is missing because it ends a worker.
_OF_THE_RUN = (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_WHY = {
    "SIGKILL": ", most often because memory ran out",
    "SIGBUS": ": a file that is mapped into memory could not be read, or shared memory (/dev/shm) is full",
    "SIGSEGV": ": a library crashed",
    "SIGABRT": ": a library crashed",
}
_GOES_ON = "the same command with --resume_from_checkpoint latest goes on."
_LESS_MEMORY = (
    "fewer --dataloader_num_workers, a smaller --shuffle_buffer_size, or --keep_images_in_memory no need less memory"
)


class DataWorkerError(RuntimeError):
    """A loading process died."""


class PlainLoader(DataLoader):
    """Loads batches as `DataLoader` does, but raises the `ValueError`s and `OSError`s of its workers unchanged.

    Its iterators raise `DataWorkerError`, which says what to do, if a worker died or ran out of memory; all workers
    then end. Any other exception is a bug, and is raised as torch raises it, with its traceback. Do not pass the
    loader to `accelerator.prepare`: it has the batches of one rank already.

    Args:
        dataset: Samples: map-style with `__getitems__`, or iterable.
        collate_fn: Makes a batch of them.
        **options: The other arguments of `DataLoader`, without `worker_init_fn` and `generator`.
    """

    def __init__(self, dataset: Dataset, collate_fn: Callable[..., Any], **options: Any) -> None:
        iterates = isinstance(dataset, IterableDataset)
        self.source = dataset
        self.running: list[PlainIterator] = []
        super().__init__(
            _PassingIterable(dataset) if iterates else _PassingItems(dataset),
            collate_fn=_PassingCollate(collate_fn),
            worker_init_fn=_begin_worker,
            # its own generator: otherwise making the iterator draws from torch's global one
            generator=torch.Generator().manual_seed(0),
            **options,
        )

    def __iter__(self) -> "PlainIterator":  # type: ignore[override]
        """Returns an iterator over the batches; its workers start at once."""
        self.running.append(PlainIterator(self))
        return self.running[-1]

    def close(self) -> None:
        """Ends all workers; iterators yield nothing more."""
        while self.running:
            self.running.pop().close()


class PlainIterator(Iterator[Any]):
    """Iterates over the batches of a `PlainLoader`; holds the workers that make them.

    Args:
        loader: The loader.
    """

    def __init__(self, loader: PlainLoader) -> None:
        before, handler = multiprocessing.active_children(), signal.getsignal(signal.SIGCHLD)
        if getattr(handler, "__module__", None) == _TORCH_HANDLERS:  # set by another loader of this process
            handler = signal.SIG_DFL
        # workers start with these signals blocked, until `_begin_worker` ignores them
        unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, _OF_THE_RUN)
        try:
            self.batches: Any = DataLoader.__iter__(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
        in_main = threading.current_thread() is threading.main_thread()  # handlers can be set only there
        if in_main and signal.getsignal(signal.SIGCHLD) is not handler and handler is not None:
            # torch's handler raises wherever the process is when a worker dies; `__next__` notices the death as well
            signal.signal(signal.SIGCHLD, handler)
        self.workers = [process for process in multiprocessing.active_children() if process not in before]

    def __next__(self) -> Any:
        if self.batches is None:
            raise StopIteration
        try:
            batch = next(self.batches)
        except StopIteration:
            raise
        except Exception as error:
            dead = self._dead_workers(error)
            self.close()
            if dead:
                raise DataWorkerError(_describe_deaths(dead)) from error
            raise
        if isinstance(batch, _Failed):
            self.close()
            raise batch.error
        return batch

    def _dead_workers(self, error: Exception) -> list[BaseProcess]:
        """Returns the workers that died; one that had no more to read ended with exit code 0."""
        alive = [worker.sentinel for worker in self.workers if worker.exitcode is None]
        if alive and not any(worker.exitcode for worker in self.workers):
            ended = multiprocessing.connection.wait(alive, _DEATH_SECONDS)
            for worker in self.workers:
                if worker.sentinel in ended:  # closed a moment before the process has ended
                    worker.join(_DEATH_SECONDS)
        gone = [worker for worker in self.workers if worker.exitcode is not None]
        return [worker for worker in gone if worker.exitcode or "exited unexpectedly" in str(error)]

    def close(self) -> None:
        """Ends the workers: asks them first, as torch does; one that is stuck in a read is killed."""
        batches, self.batches = self.batches, None
        if not self.workers:
            return
        end = threading.Timer(_PATIENCE_SECONDS, self._terminate)
        end.daemon = True
        end.start()
        try:
            # not left to the iterator's end: the traceback of an exception may keep it alive
            shut_down = getattr(batches, "_shutdown_workers", None)
            if shut_down is not None:
                shut_down()
        finally:
            end.cancel()
        self._terminate()
        for worker in self.workers:
            worker.join(_PATIENCE_SECONDS)
            if worker.exitcode is None:
                worker.kill()
                worker.join(_PATIENCE_SECONDS)

    def _terminate(self) -> None:
        for worker in self.workers:
            if worker.exitcode is None:
                worker.terminate()


def _describe_deaths(dead: Sequence[BaseProcess]) -> str:
    deaths = []
    for worker in dead:
        code = worker.exitcode or 0
        if code < 0:
            name = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
            deaths.append(f"a loading process (pid {worker.pid}) was killed by signal {name}{_WHY.get(name, '')}")
        else:
            deaths.append(f"a loading process (pid {worker.pid}) ended by itself, with exit code {code}")
    return f"{'; '.join(deaths)}. {_GOES_ON[0].upper()}{_GOES_ON[1:-1]}; {_LESS_MEMORY}."


# -- in the worker ---------------------------------------------------------------------------------------------------


def _begin_worker(_: int) -> None:
    """Makes a worker ignore signals that are meant for the run, and end when the main process ends."""
    for number in _OF_THE_RUN:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _OF_THE_RUN)
    threading.Thread(target=_end_with_parent, name="ends with its parent", daemon=True).start()


def _end_with_parent() -> None:
    # torch checks between two batches only, and a read may take long
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


class _Failed:
    """Holds an exception in place of a batch."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __reduce__(self) -> tuple[Any, ...]:
        try:
            copy.copy(self.error)  # constructs it again, as unpickling in the main process does
        except Exception:  # its type has another constructor
            return _Failed, (OSError(f"{type(self.error).__name__}: {self.error}"),)
        return _Failed, (self.error,)


def _passing(work: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return work(*arguments)
    except (ValueError, OSError) as error:
        return _Failed(error)
    except MemoryError:
        text = f"memory ran out while images were loaded; {_LESS_MEMORY}, and {_GOES_ON}"
        return _Failed(DataWorkerError(text))


class _PassingItems(Dataset[Any]):
    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, keys: Sequence[Any]) -> Any:
        return _passing(self.dataset.__getitems__, keys)


class _PassingIterable(IterableDataset[Any]):
    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.dataset)
        while True:
            batch = _passing(next, batches, None)
            if batch is None:
                return
            yield batch


class _PassingCollate:
    def __init__(self, collate: Callable[..., Any]) -> None:
        self.collate = collate

    def __call__(self, samples: Any) -> Any:
        return samples if isinstance(samples, _Failed) else _passing(self.collate, samples)
