"""Shards on a source that fails at chosen reads, for `prepare` of a run in a process of its own, or for this one."""

import errno
import os
import time

from ijepa_hf.data import retrying, streaming


class FlakyFile:
    """A file of which the chosen reads, counted over all files of the process, fail."""

    closed = False

    def __init__(self, file, source):
        self.file, self.source = file, source

    def read(self, size=-1):
        self.source.step()
        return self.file.read(size)

    def seek(self, *place):
        return self.file.seek(*place)

    def tell(self):
        return self.file.tell()

    def close(self):
        self.closed = True
        self.file.close()


class Source:
    """Opens files; from read `first` on, `count` reads fail with EIO, or wait for ever."""

    def __init__(self, first, count, how="error"):
        self.first, self.left, self.how, self.reads = first, count, how, 0

    def step(self):
        self.reads += 1
        if self.reads >= self.first and self.left > 0:
            self.left -= 1
            if self.how == "stall":
                time.sleep(600)
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def open(self, file, mode):
        return FlakyFile(open(file, mode), self)


def fail(first, count, how="error", first_wait=0.01):
    """Lets reads of shards fail in this process and those forked from it, and shortens the waits between tries."""
    source = Source(first, count, how)
    streaming.xopen = source.open
    retrying.FIRST_WAIT_SECONDS, retrying.LONGEST_WAIT_SECONDS = first_wait, max(first_wait, 0.05)
    return source


def fail_in(first, count, how="error", first_wait=0.01, slow=0.0):
    """The same for `prepare`, and each step takes so many seconds longer."""
    fail(first, count, how, first_wait)
    if slow:
        from forked_runs import slow_steps

        slow_steps(slow)
