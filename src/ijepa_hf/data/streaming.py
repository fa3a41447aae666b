"""Reads images shard by shard, in an order that a restart can compute again without reading.

A stream is a sequence of shards whose lengths are known. An epoch permutes the shards and puts their rows on a line.
The line is cut into one stretch for each *reader*; a reader is one worker of one rank. Stretches are cut by rows, not
by shards, so that all readers have equal work even if the shards are uneven. A reader shares at most the two shards at
the ends of its stretch with other readers. It reads its stretch in blocks of `shuffle_buffer_size` rows and permutes
each block.

All of this is a function of (seed, epoch) and of the *layouts*: the numbers of ranks and workers that the run has had,
each with its first step. So the position of each reader follows from the number of the step: earlier blocks are not
decoded, and earlier shards are not opened. A run that is resumed with other readers deals the remaining rows out to
them, none twice.
"""

import contextlib
import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple, TypeAlias

import datasets
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from datasets.table import table_cast
from datasets.utils.file_utils import xopen
from torch.utils.data import IterableDataset as TorchIterableDataset
from torch.utils.data import get_worker_info
from tqdm.auto import tqdm

from ijepa_hf.data.order import SampleKey, StreamOrder, micro_batches_of
from ijepa_hf.data.reading import CropReader
from ijepa_hf.data.retrying import DEFAULT_RETRIES, DataSourceError, RetryPolicy, describe, is_shard_failure
from ijepa_hf.data.sources.opening import ImageStream

ROWS_AT_ONCE = 64  # rows fetched from a shard together: bytes, not pixels
_FOOTERS_AT_ONCE = 16  # over a network their time is waiting
_FOOTERS_WITHOUT_A_BAR = 100

_Batches: TypeAlias = Generator[list[dict[str, Any]], None, None]

logger = logging.getLogger(__name__)


# -- shards ----------------------------------------------------------------------------------------------------------


def shard_lengths(stream: ImageStream, column: str, retries: RetryPolicy = DEFAULT_RETRIES) -> list[int]:
    """Counts the images of each shard of a stream.

    The footers of .parquet files have the numbers, a few kilobytes each. Other shards have to be read from end to end,
    undecoded; a warning says so.

    Args:
        stream: The stream.
        column: Its image column.
        retries: How long failing reads are repeated.

    Returns:
        Rows of each shard, in the order of the shards.

    Raises:
        ValueError: If the stream is empty, or a file is broken.
        DataSourceError: If the source fails for longer than `retries` allows.
    """
    if _are_parquet(stream.files):
        with ThreadPoolExecutor(_FOOTERS_AT_ONCE) as threads:
            footers = threads.map(partial(_footer_rows, retries=retries), stream.files)
            few = len(stream.files) < _FOOTERS_WITHOUT_A_BAR
            lengths = list(tqdm(footers, "footers", len(stream.files), unit="shard", mininterval=1.0, disable=few))
    else:
        lengths = _count(stream, column, retries)
    if not any(lengths):
        raise ValueError("the stream holds no images: its shards have no rows.")
    return lengths


def _are_parquet(files: Sequence[str]) -> bool:
    return bool(files) and all(file.lower().endswith(".parquet") for file in files)


def _footer_rows(file: str, retries: RetryPolicy) -> int:
    def read() -> int:
        with retries.open(partial(xopen, file, "rb")) as opened:
            return pq.read_metadata(opened).num_rows

    try:
        return retries.call(f"shard {file!r}", read)
    except pa.ArrowException as error:
        raise ValueError(f"shard {file!r} cannot be read: {error}") from error


def _count(stream: ImageStream, column: str, retries: RetryPolicy) -> list[int]:
    num_shards = stream.rows.num_shards
    logger.warning(
        "the images of the stream are counted first, by reading %s once from end to end: its order depends on how "
        "many each shard has, and only .parquet files say so. Shards made by `ijepa-hf prepare` need no counting.",
        "its one shard" if num_shards == 1 else f"its {num_shards} shards",
    )
    images, lengths = stream._replace(rows=stream.rows.select_columns([column])), []
    with tqdm(desc="count", unit="image", mininterval=1.0) as progress:
        for shard in range(num_shards):
            lengths.append(0)
            with contextlib.closing(_read_patiently(images, shard, 0, retries)) as batches:
                for rows in batches:
                    lengths[-1] += len(rows)
                    progress.update(len(rows))
    return lengths


def cut_lengths(lengths: Sequence[int], limit: int) -> list[int]:
    """Cuts the lengths of shards so that only the first images of a stream are left.

    Args:
        lengths: Rows of each shard.
        limit: Images wanted, at least 1.

    Returns:
        Rows to be read of each shard, at most `limit` together; 0 for those behind.
    """
    before = [0, *accumulate(lengths)]
    return [max(0, min(length, limit - first)) for length, first in zip(lengths, before, strict=False)]


def check_readers(num_shards: int, num_ranks: int, num_workers: int) -> None:
    """Refuses more readers than shards.

    Args:
        num_shards: Shards of the stream that have rows.
        num_ranks: Processes.
        num_workers: Loading processes of each.

    Raises:
        ValueError: If there are more; names the number of workers that fits.
    """
    readers = num_ranks * max(1, num_workers)
    if readers <= num_shards:
        return
    fits = num_shards // num_ranks
    advice = f"use --dataloader_num_workers {fits}" if fits else f"use {_counted(num_shards, 'process')} at most"
    raise ValueError(
        f"dataloader_num_workers={num_workers} on {_counted(num_ranks, 'process')} makes {_counted(readers, 'reader')}"
        f", but the stream has {_counted(num_shards, 'shard')}, and each reader needs one (a folder of pictures is "
        f"one); {advice}, or write more shards with `ijepa-hf prepare`."
    )


def _counted(number: int, noun: str) -> str:
    if number == 1:
        return f"1 {noun}"
    return f"{number} {noun}{'es' if noun.endswith('s') else 's'}"


def warn_of_one_shard(stream: ImageStream) -> None:
    """Warns if a stream has one shard only, and so cannot be read in parallel.

    Args:
        stream: The stream.
    """
    if stream.rows.num_shards > 1:
        return
    what = "is one file" if stream.files else "is a folder of pictures"
    logger.warning(
        "the stream %s, and so one shard, which one process reads alone. `ijepa-hf prepare` writes shards of it that "
        "are read in parallel.",
        what,
    )


# -- reading ---------------------------------------------------------------------------------------------------------


class _Row(NamedTuple):
    image: int
    values: dict[str, Any]
    another: Callable[[int], tuple[int, dict[str, Any]]]  # substitutes, of the same block


def _pick(images: list[int], rows: list[dict[str, Any]], draw: int) -> tuple[int, dict[str, Any]]:
    return images[draw % len(images)], rows[draw % len(rows)]


class StreamedBatches(TorchIterableDataset[list[dict[str, Any]]]):
    """Reads the micro-batches of one rank, from a step on; each worker of a `DataLoader` reads its own stretch.

    Load it with `batch_size=None` and as many workers as the last layout of `order` has. Without workers, call `close`
    when the loader is left, early or not.

    Args:
        stream: The images, undecoded; its shards have the lengths that `order` knows.
        order: Which rows are read when.
        crops: Decodes and crops one row.
        num_steps: Optimiser steps of the whole run.
        start_step: Optimiser steps already done; not before the last layout's.
        rank: This process.
        retries: How long failing reads are repeated.

    Raises:
        ValueError: If `order` knows other shards than the stream has, or `start_step` lies before the last layout.
    """

    def __init__(
        self,
        stream: ImageStream,
        order: StreamOrder,
        crops: CropReader,
        *,
        num_steps: int,
        start_step: int = 0,
        rank: int = 0,
        retries: RetryPolicy = DEFAULT_RETRIES,
    ) -> None:
        if len(order.lengths) != stream.rows.num_shards:
            raise ValueError(
                f"order has the lengths of {len(order.lengths)} shards, but the stream has {stream.rows.num_shards}; "
                "give the lengths of all, 0 for those that are not to be read."
            )
        if start_step < order.layouts[-1].start_step:
            raise ValueError(
                f"start_step={start_step} lies before the last layout, which begins at step "
                f"{order.layouts[-1].start_step}; give the layouts up to the step."
            )
        self.stream, self.order, self.crops = stream, order, crops
        self.num_steps, self.start_step, self.rank = num_steps, start_step, rank
        self.retries = retries
        self._open: list[_Batches] = []

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        """Yields the micro-batches of this worker: rows as `PretrainingImages` gives them, with their `SampleKey`."""
        worker = get_worker_info()
        self._open.append(self.read(0 if worker is None else worker.id))
        return self._open[-1]

    def close(self) -> None:
        """Closes the files of all iterators over this set in this process; the iterators yield nothing more.

        A file that is still being read when the process ends can kill it, and a generator that is left is closed only
        when nothing refers to it: after an error its traceback does.
        """
        while self._open:
            self._open.pop().close()

    def read(self, worker: int) -> _Batches:
        """Yields the micro-batches of one worker.

        A `DataLoader` asks its workers in turn, beginning with worker 0. Reader q has the micro-batches whose number
        in the run leaves q when divided by the readers, so a restart gives worker 0 the reader whose turn it is.

        Args:
            worker: From 0 on.

        Raises:
            DataSourceError: If a shard could not be read for as long as that was tried, or is broken.
            ValueError: If a shard has become shorter.
        """
        order, layout = self.order, self.order.layouts[-1]
        readers, accumulation = layout.readers_per_rank, layout.accumulation_steps
        reader = (self.start_step * accumulation + worker) % readers
        step = self.start_step
        with contextlib.closing(_ShardCursor(self.stream, order.lengths, self.retries)) as cursor:
            while step < self.num_steps:
                epoch = step // order.steps_per_epoch
                dealt_from = max(epoch * order.steps_per_epoch, layout.start_step)
                done = layout.batch_size * micro_batches_of(reader, layout, dealt_from, step)
                rows = self._rows(cursor, epoch, reader, done)
                until = min((epoch + 1) * order.steps_per_epoch, self.num_steps)
                for number in range(step * accumulation, until * accumulation):
                    if number % readers == reader:
                        yield self._micro_batch(rows, epoch, number)
                step = until

    def _micro_batch(self, rows: Iterator[_Row], epoch: int, number: int) -> list[dict[str, Any]]:
        layout = self.order.layouts[-1]
        step, micro = divmod(number, layout.accumulation_steps)
        first = (micro * layout.num_ranks + self.rank) * layout.batch_size
        batch = [next(rows) for _ in range(layout.batch_size)]
        keys = [SampleKey(epoch, step, first + place, row.image) for place, row in enumerate(batch)]
        return self.crops.read_all(keys, [row.values for row in batch], [row.another for row in batch])

    def _rows(self, cursor: "_ShardCursor", epoch: int, reader: int, done: int) -> Iterator[_Row]:
        """Yields a reader's rows of an epoch from the `done`-th on; `_micro_batch` asks for no more than there are."""
        order, layout, size = self.order, self.order.layouts[-1], self.order.shuffle_buffer_size
        epoch_shards, stretch = order.epoch_shards(epoch), order.stretch(epoch, self.rank, reader)
        block, into_block = divmod(done, size)
        while len(places := stretch.block(block, size)):
            shards, inside, images = (part.tolist() for part in order.locate(epoch_shards, places))
            rows = [cursor.row(shard, row) for shard, row in zip(shards, inside, strict=True)]
            another = partial(_pick, images, rows)
            for place in order.block_order(epoch, layout, self.rank, reader, block, len(rows))[into_block:].tolist():
                yield _Row(images[place], rows[place], another)
            block, into_block = block + 1, 0


class _ShardCursor:
    """Reads rows of shards in ascending order; keeps the shard open in which it is."""

    def __init__(self, stream: ImageStream, lengths: Sequence[int] | np.ndarray, retries: RetryPolicy) -> None:
        self.stream, self.lengths, self.retries = stream, lengths, retries
        self.shard = -1
        self.next_row = 0  # of the open shard
        self.fetched: list[dict[str, Any]] = []
        self.first_fetched = 0  # the row of the open shard that fetched[0] is
        self.batches: _Batches | None = None

    def row(self, shard: int, row: int) -> dict[str, Any]:
        """Returns row `row` of a shard; cheapest where the rows of one shard are asked for in ascending order."""
        if shard != self.shard or row < self.next_row:
            self.close()
            self.batches = _read_patiently(self.stream, shard, row, self.retries)
            self.shard, self.first_fetched = shard, row
        while row >= self.first_fetched + len(self.fetched):
            self._fetch()
        self.next_row = row + 1
        return self.fetched[row - self.first_fetched]

    def _fetch(self) -> None:
        assert self.batches is not None
        self.first_fetched += len(self.fetched)
        self.fetched = next(self.batches, [])
        if not self.fetched:
            raise ValueError(
                f"{_name_of(self.stream, self.shard)} ends after {self.first_fetched} rows, but had "
                f"{self.lengths[self.shard]} when the run began: it was changed. Put the old file back, or start anew."
            )

    def close(self) -> None:
        """Closes the open shard."""
        if self.batches is not None:
            self.batches.close()
        self.batches, self.fetched, self.shard = None, [], -1


def _name_of(stream: ImageStream, shard: int) -> str:
    return f"shard {shard} of the stream" + (f" ({stream.files[shard]})" if stream.files else "")


def _read_patiently(stream: ImageStream, shard: int, first: int, retries: RetryPolicy) -> _Batches:
    """Yields the rows of a shard from row `first` on, several at once.

    If its source fails, the shard is opened again at the same row, so that the rows are the same as without a failure.
    """
    name = _name_of(stream, shard)
    batches: _Batches | None = None

    def fetch() -> list[dict[str, Any]]:
        nonlocal batches
        if batches is None:
            batches = _read_shard(stream, shard, first, retries)
        reading, batches = batches, None  # it has ended where this fails
        rows = next(reading, [])
        batches = reading
        return rows

    try:
        while rows := retries.call(name, fetch, is_shard_failure):
            first += len(rows)
            yield rows
    except pa.ArrowException as error:
        raise DataSourceError(
            f"{name} is broken from row {first} on, or a row shortly after: {describe(error)}. Put a sound file of as "
            "many rows in its place; the same command with --resume_from_checkpoint latest then goes on."
        ) from error
    finally:
        if batches is not None:
            batches.close()


def _read_shard(stream: ImageStream, shard: int, first: int, retries: RetryPolicy = DEFAULT_RETRIES) -> _Batches:
    """Yields the rows of a shard from row `first` on, several at once; each read has the time limit."""
    if _are_parquet(stream.files):
        yield from _read_parquet(stream.files[shard], stream.rows.features, first, retries)
        return
    # .iter, not __iter__: the latter would share this one shard out among the workers once more
    batches = stream.rows.shard(num_shards=stream.rows.num_shards, index=shard).iter(batch_size=ROWS_AT_ONCE)
    while batch := retries.within(partial(next, batches, None)):
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        # rows before the first are read like others, and not skipped at once, so that the limit is on 64 rows
        if first < len(rows):
            yield rows[first:]
        first = max(0, first - len(rows))


def _read_parquet(file: str, features: datasets.Features, first: int, retries: RetryPolicy) -> _Batches:
    """Reads the rows of `datasets`, but in its own way, for two reasons.

    Row groups before row `first` are not read at all; stretches begin anywhere in a file. And no thread reads ahead:
    one that does can kill a process that leaves early (https://github.com/apache/arrow/issues/45214).
    """
    with retries.open(partial(xopen, file, "rb")) as opened, pq.ParquetFile(opened, pre_buffer=False) as parquet:
        ends = np.cumsum([parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)])
        group = int(np.searchsorted(ends, first, side="right"))
        first -= int(ends[group - 1]) if group else 0
        groups = range(group, parquet.num_row_groups)
        for batch in parquet.iter_batches(ROWS_AT_ONCE, groups, list(features), use_threads=False) if groups else ():
            if first < len(batch):
                table = pa.Table.from_batches([batch.slice(first)])
                yield table_cast(table, features.arrow_schema).to_pylist()
            first = max(0, first - len(batch))
