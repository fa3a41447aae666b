"""Exchanges messages between the processes of a run: whether to go on or to stop, and why.

Messages go through gloo and the CPU's memory, also where gradients go through NCCL. So they do not wait for the GPU,
and a process that has died closes its connections, which the others notice at once.
"""

import contextlib
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# The main process alone scores and draws, while the others wait for its message.
WAIT_AT_MOST = timedelta(hours=4)
# Parts of the messages of gloo and NCCL about a lost process; both raise plain RuntimeErrors.
_LOST = (
    "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed", "Connection refused",
    "remote process exited", "Timed out waiting", "TCPStore",
)  # fmt: skip


class LostRankError(RuntimeError):
    """Another process of the run has ended or cannot be reached."""


class Ranks:
    """Exchanges numbers and messages between the processes of a run.

    Args:
        number: How many.
        rank: This one's number, from 0.
    """

    def __init__(self, number: int = 1, rank: int = 0) -> None:
        self.number, self.rank = number, rank
        self.group = dist.new_group(backend="gloo", timeout=WAIT_AT_MOST) if number > 1 else None

    def highest(self, code: int) -> int:
        """Returns the highest of the numbers that the processes give; all have to call it.

        Args:
            code: This process's number, at least 0.

        Returns:
            The highest number.
        """
        if self.group is None:
            return code
        codes = torch.tensor([code])
        dist.all_reduce(codes, dist.ReduceOp.MAX, group=self.group)
        return int(codes)

    def gather(self, message: Any) -> list[Any]:
        """Returns the messages of all processes; all have to call it.

        Args:
            message: This process's message, a small picklable object.

        Returns:
            The messages, by rank.
        """
        if self.group is None:
            return [message]
        messages: list[Any] = [None] * self.number
        dist.all_gather_object(messages, message, group=self.group)
        return messages

    def wait(self) -> None:
        """Waits until all processes have come here."""
        self.highest(0)

    @contextlib.contextmanager
    def naming_the_lost(self, advice: str) -> Iterator[None]:
        """Raises `LostRankError` in place of the errors that the loss of another process causes inside the block.

        Args:
            advice: The end of the message: how to go on.

        Raises:
            LostRankError: Instead of such an error.
        """
        try:
            yield
        except RuntimeError as error:
            if self.number == 1 or not (isinstance(error, dist.DistError) or any(w in str(error) for w in _LOST)):
                raise
            reason = str(error).strip().splitlines()[0].split(". This is typically")[0]
            raise LostRankError(
                f"process {self.rank} of {self.number} cannot go on: another process of this run has ended, or cannot "
                f"be reached ({reason}). The reason stands in that process's output. {advice}"
            ) from error
