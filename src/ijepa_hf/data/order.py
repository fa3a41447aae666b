"""Decides the order of images: which image is at which position of which step.

Map-style sets are permuted as a whole (`StepBatchSampler`), streams by shards and blocks of rows (`StreamOrder`); the
module `streaming` explains the latter. Both are arithmetic on numbers: nothing is opened here.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from ijepa_hf.randomness import DRAW_BLOCK, DRAW_ORDER, keyed_generator


class SampleKey(NamedTuple):
    """Names a sample: its epoch and optimiser step, its slot in the global batch, and its image."""

    epoch: int
    step: int
    slot: int
    image: int


def global_batch_size(num_samples: int, batch_size: int, accumulation_steps: int = 1, num_ranks: int = 1) -> int:
    """Computes the number of images in one optimiser step.

    Args:
        num_samples: Images in the data set.
        batch_size: Images per device and micro-batch.
        accumulation_steps: Micro-batches per optimiser step.
        num_ranks: Processes.

    Returns:
        The product of the last three.

    Raises:
        ValueError: If the data set is smaller than that.
    """
    size = batch_size * accumulation_steps * num_ranks
    if num_samples < size:
        raise ValueError(
            f"the data set has {num_samples} images, fewer than one global batch of {size} "
            f"(per_device_train_batch_size {batch_size} x gradient_accumulation_steps {accumulation_steps} x "
            f"{num_ranks} processes); use --per_device_train_batch_size "
            f"{max(1, num_samples // (accumulation_steps * num_ranks))} or less."
        )
    return size


class StepBatchSampler(Sampler[list[SampleKey]]):
    """Yields the micro-batches of one rank, from a given optimiser step on.

    An epoch is a permutation of all images, a function of (seed, epoch); the last incomplete global batch is dropped.
    Slots of a global batch are laid out micro-batch by micro-batch, and in each of those rank by rank.

    Args:
        num_samples: Images in the data set.
        batch_size: Images per device and micro-batch.
        num_steps: Optimiser steps of the whole run.
        seed: The run's seed.
        start_step: Optimiser steps already done.
        accumulation_steps: Micro-batches per optimiser step.
        rank: This process.
        num_ranks: Processes.

    Raises:
        ValueError: If the data set is smaller than one global batch.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        num_steps: int,
        seed: int,
        *,
        start_step: int = 0,
        accumulation_steps: int = 1,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        self.global_batch_size = global_batch_size(num_samples, batch_size, accumulation_steps, num_ranks)
        self.steps_per_epoch = num_samples // self.global_batch_size
        self.num_samples, self.batch_size, self.num_steps, self.seed = num_samples, batch_size, num_steps, seed
        self.start_step, self.accumulation_steps = start_step, accumulation_steps
        self.rank, self.num_ranks = rank, num_ranks

    def __len__(self) -> int:
        return (self.num_steps - self.start_step) * self.accumulation_steps

    def __iter__(self) -> Iterator[list[SampleKey]]:
        order, order_epoch = np.empty(0, dtype=np.int64), -1
        for step in range(self.start_step, self.num_steps):
            epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
            if epoch != order_epoch:
                order = keyed_generator(self.seed, DRAW_ORDER, epoch).permutation(self.num_samples)
                order_epoch = epoch
            first = step_in_epoch * self.global_batch_size
            for micro in range(self.accumulation_steps):
                slot = (micro * self.num_ranks + self.rank) * self.batch_size
                yield [
                    SampleKey(epoch, step, place, int(order[first + place]))
                    for place in range(slot, slot + self.batch_size)
                ]


@dataclass(frozen=True)
class StreamLayout:
    """Describes the readers of a stream, and the step since which they read it.

    Args:
        start_step: The optimiser step, counted from 0, from which on it holds.
        num_ranks: Processes.
        num_workers: Loading processes of each rank; 0 counts as the one reader that the rank itself then is.
        batch_size: Images per rank and micro-batch.
        accumulation_steps: Micro-batches per optimiser step.
    """

    start_step: int
    num_ranks: int
    num_workers: int
    batch_size: int
    accumulation_steps: int

    @property
    def readers_per_rank(self) -> int:
        """Readers of one rank."""
        return max(1, self.num_workers)

    @property
    def global_batch_size(self) -> int:
        """Images in an optimiser step."""
        return self.num_ranks * self.batch_size * self.accumulation_steps

    def same_readers(self, other: "StreamLayout") -> bool:
        """Returns whether both layouts give each reader the same rows, so that one can continue the other."""
        mine, theirs = asdict(self), asdict(other)
        return {**mine, "start_step": 0} == {**theirs, "start_step": 0}


class Rows:
    """Holds ascending rows of an epoch's line, as segments; the index of a row among them is its *position*.

    Args:
        segments: int64 `[n, 2]`, rows from .. up to, not including; ascending and disjoint.
    """

    def __init__(self, segments: np.ndarray) -> None:
        self.starts = segments[:, 0]
        lengths = segments[:, 1] - self.starts
        self.ends = np.cumsum(lengths)  # position behind each segment
        self.begins = self.ends - lengths

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def at(self, first: int, last: int) -> np.ndarray:
        """Returns the rows at the positions first .. last (not including): int64 `[last - first]`."""
        positions = np.arange(first, last)
        segment = np.searchsorted(self.ends, positions, side="right")
        return self.starts[segment] + positions - self.begins[segment]

    def segments(self, first: int, last: int) -> np.ndarray:
        """Returns the same rows as segments."""
        within = slice(np.searchsorted(self.ends, first, side="right"), np.searchsorted(self.begins, last))
        begins, ends = np.maximum(self.begins[within], first), np.minimum(self.ends[within], last)
        starts = self.starts[within] + begins - self.begins[within]
        return np.stack([starts, starts + ends - begins], axis=1)


class Stretch(NamedTuple):
    """Holds the rows that a reader reads in an epoch: the positions first .. last (not including) of some rows."""

    rows: Rows
    first: int
    last: int

    def block(self, number: int, size: int) -> np.ndarray:
        """Returns the rows of one block of the stretch, ascending: int64, `size` of them or fewer at the end."""
        first = self.first + number * size
        return self.rows.at(first, max(first, min(first + size, self.last)))


class StreamOrder:
    """Computes which rows each reader of a stream reads, and when.

    Args:
        lengths: Rows of each shard, in the stream's own order.
        layouts: Those of the run so far, by `start_step`, the first from step 0; all of one global batch size.
        seed: The run's seed.
        shuffle_buffer_size: Rows that a reader permutes together; 1 leaves the order inside a shard as it is.

    Raises:
        ValueError: If the shards hold less than one global batch, or the layouts do not follow each other.
    """

    def __init__(
        self, lengths: Sequence[int], layouts: Sequence[StreamLayout], seed: int, shuffle_buffer_size: int
    ) -> None:
        self.lengths, self.layouts = np.asarray(lengths, dtype=np.int64), list(layouts)
        self.seed, self.shuffle_buffer_size = seed, shuffle_buffer_size
        self.num_rows = int(self.lengths.sum())
        starts = [layout.start_step for layout in layouts]
        if starts != sorted(set(starts)) or starts[0] != 0:
            raise ValueError(f"layouts start at the steps {starts}; they must start at 0 and increase.")
        if len({layout.global_batch_size for layout in layouts}) > 1:
            raise ValueError("layouts have different global batch sizes; a run has one.")
        now = self.layouts[-1]
        self.global_batch_size = global_batch_size(
            self.num_rows, now.batch_size, now.accumulation_steps, now.num_ranks
        )
        self.steps_per_epoch = self.num_rows // self.global_batch_size
        self._first_image = np.cumsum(self.lengths) - self.lengths  # of each shard, in the stream's own order

    def epoch_shards(self, epoch: int) -> np.ndarray:
        """Returns the shards of an epoch in the order of its line: int64, a permutation."""
        return keyed_generator(self.seed, DRAW_ORDER, epoch).permutation(len(self.lengths))

    def locate(self, epoch_shards: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Finds the shards that rows of an epoch's line are in.

        Args:
            epoch_shards: Shards of the epoch, from `epoch_shards`.
            rows: Rows of its line, int64 `[n]`.

        Returns:
            The shard of each, the row inside it, and the image's number in the stream's own order, which is the same
            in each epoch and what its crop is keyed on; int64 `[n]` each.
        """
        ends = np.cumsum(self.lengths[epoch_shards])
        place = np.searchsorted(ends, rows, side="right")
        shards = epoch_shards[place]
        inside = rows - (ends - self.lengths[epoch_shards])[place]
        return shards, inside, self._first_image[shards] + inside

    def stretch(self, epoch: int, rank: int, reader: int) -> Stretch:
        """Returns what a reader of the last layout reads in an epoch, from that layout's first step in the epoch on.

        Args:
            epoch: Counted from 0; the last layout holds at its end.
            rank: The process.
            reader: The reader among those of the process.

        Returns:
            As many rows as its micro-batches of the rest of the epoch need.
        """
        rest = Rows(np.array([[0, self.num_rows]]))
        start, end = epoch * self.steps_per_epoch, (epoch + 1) * self.steps_per_epoch
        for layout, following in zip(self.layouts[:-1], self.layouts[1:], strict=True):
            first, last = max(layout.start_step, start), min(following.start_step, end)
            if first < last:
                rest = self._left_over(rest, layout, epoch, first, last, end)
        now = self.layouts[-1]
        bounds = _bounds(now, max(now.start_step, start), end)
        number = rank * now.readers_per_rank + reader
        return Stretch(rest, int(bounds[number]), int(bounds[number + 1]))

    def _left_over(self, rest: Rows, layout: StreamLayout, epoch: int, first: int, last: int, end: int) -> Rows:
        """Returns the rows of the steps first .. end that the steps first .. last under a layout do not use."""
        bounds = _bounds(layout, first, end)
        left = [rest.segments(int(bounds[-1]), len(rest))]
        for number, (begin, stop) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
            rank, reader = divmod(number, layout.readers_per_rank)
            used = layout.batch_size * micro_batches_of(reader, layout, first, last)
            blocks, into_block = divmod(used, self.shuffle_buffer_size)
            if into_block:
                block = Stretch(rest, begin, stop).block(blocks, self.shuffle_buffer_size)
                unused = np.sort(block[self.block_order(epoch, layout, rank, reader, blocks, len(block))[into_block:]])
                left.append(np.stack([unused, unused + 1], axis=1))
                blocks += 1
            begin += blocks * self.shuffle_buffer_size
            if begin < stop:
                left.append(rest.segments(begin, stop))
        segments = np.concatenate(left)
        return Rows(segments[np.argsort(segments[:, 0])])

    def block_order(
        self, epoch: int, layout: StreamLayout, rank: int, reader: int, block: int, length: int
    ) -> np.ndarray:
        """Returns the order in which a reader yields the rows of one block: int64 `[length]`."""
        key = (epoch, layout.start_step, rank, reader, block)
        return keyed_generator(self.seed, DRAW_BLOCK, *key).permutation(length)


def micro_batches_of(reader: int, layout: StreamLayout, first_step: int, last_step: int) -> int:
    """Counts the micro-batches of the steps first .. last (not including) that one reader of a rank makes."""

    def before(step: int) -> int:
        return (step * layout.accumulation_steps - reader + layout.readers_per_rank - 1) // layout.readers_per_rank

    return before(last_step) - before(first_step)


def _bounds(layout: StreamLayout, first_step: int, last_step: int) -> np.ndarray:
    """Returns the positions between which each reader, rank by rank, has its rows for the steps first .. last."""
    readers = range(layout.readers_per_rank)
    wanted = [layout.batch_size * micro_batches_of(reader, layout, first_step, last_step) for reader in readers]
    return np.concatenate([[0], np.cumsum(np.tile(wanted, layout.num_ranks))])
