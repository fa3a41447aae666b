"""Reads the images of a run, at random or as a stream, deals them out to the ranks, and counts the unreadable ones.

The loop sees no difference between the two ways of reading: `TrainingImages.loader` gives a rank's micro-batches from
any step on. For a stream, a checkpoint also keeps `TrainingImages.stream_state`: how many readers the run has had, and
since which step.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ijepa_hf.data.collator import Batch
from ijepa_hf.data.loader import PlainLoader
from ijepa_hf.data.memory_images import keep_in_memory
from ijepa_hf.data.order import StepBatchSampler, StreamLayout, StreamOrder
from ijepa_hf.data.reading import (
    CropReader,
    ImageColumn,
    ImageRows,
    PretrainingImages,
    UnreadableImage,
    too_many_unreadable,
)
from ijepa_hf.data.retrying import RetryPolicy, end_reading_thread
from ijepa_hf.data.sources.opening import ImageStream, find_image_column, load_split, open_stream
from ijepa_hf.data.streaming import (
    StreamedBatches,
    check_readers,
    cut_lengths,
    shard_lengths,
    warn_of_one_shard,
)
from ijepa_hf.model.configuration_ijepa import IJepaConfig
from ijepa_hf.recipes.arguments import DataArguments
from ijepa_hf.runs.rows import RowFile, read_rows

logger = logging.getLogger(__name__)


class TooManyUnreadableError(ValueError):
    """The share of images that cannot be read is larger than `max_broken_share`."""


@dataclass(frozen=True)
class TrainingImages:
    """Holds the images that a run trains on, undecoded, and makes their loaders.

    Args:
        num_images: How many there are.
        column: Says how to decode one.
        rows: For a map-style set: its rows.
        stream: For a streamed set: the stream.
        shard_lengths: For a streamed set: rows of each shard.
        shuffle_buffer_size: For a streamed set: rows that a reader shuffles together.
        keep_in_memory: For a map-style set: whether its images are kept decoded: `auto`, `yes` or `no`.
    """

    num_images: int
    column: ImageColumn
    rows: ImageRows | None = None
    stream: ImageStream | None = None
    shard_lengths: tuple[int, ...] = ()
    shuffle_buffer_size: int = 1
    keep_in_memory: str = "no"

    def stream_state(self, layouts: Sequence[StreamLayout]) -> dict[str, Any] | None:
        """Returns what a checkpoint keeps of a stream.

        Args:
            layouts: Those that the run has had.

        Returns:
            A dictionary of plain values; `None` for a map-style set.
        """
        if self.stream is None:
            return None
        return {"layouts": [asdict(layout) for layout in layouts], "shards": self._fingerprint()}

    def layouts_from(self, state: Mapping[str, Any] | None, layout: StreamLayout) -> list[StreamLayout]:
        """Returns the layouts of a run that goes on.

        Args:
            state: What a checkpoint kept; `None` at the start of a run.
            layout: Today's; its `start_step` is the checkpoint's.

        Returns:
            The earlier layouts, and today's unless the readers are still the same.

        Raises:
            ValueError: If the shards are not those that the checkpoint was reading.
        """
        if state is None:
            return [layout]
        if state["shards"] != self._fingerprint():
            raise ValueError(
                "the shards of the stream have other lengths than when the checkpoint was written: files were added, "
                "removed or rewritten, and the run cannot tell which images it has seen. Give it the old files, or "
                "start a new run with another --output_dir."
            )
        layouts = [StreamLayout(**stored) for stored in state["layouts"]]
        if layouts[-1].same_readers(layout):
            return layouts
        return [*(earlier for earlier in layouts if earlier.start_step < layout.start_step), layout]

    def _fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.shard_lengths).encode()).hexdigest()

    def loader(
        self,
        crops: CropReader,
        make_batch: Callable[..., Batch],
        layouts: Sequence[StreamLayout],
        *,
        num_steps: int,
        start_step: int = 0,
        rank: int = 0,
        pin_memory: bool = False,
    ) -> PlainLoader:
        """Makes the loader of one rank's micro-batches; first decodes the images that are kept in memory.

        Args:
            crops: Decodes and crops a row; has the run's seed.
            make_batch: Makes a batch of the rows of a micro-batch.
            layouts: Those that the run has had, today's last.
            num_steps: Optimiser steps of the whole run.
            start_step: Optimiser steps already done.
            rank: This process.
            pin_memory: Whether batches go to a GPU.

        Returns:
            A loader of `Batch`es; close it with `close_loader`. Its iterators raise `DataSourceError` where the source
            failed for longer than `data_retry_seconds`, `DataWorkerError` where a loading process died, and
            `ValueError` where the data are bad; the batches given until then make whole micro-batches.

        Raises:
            ValueError: If `keep_in_memory` is `yes` and the images are not of one size and 8 bits.
            DataSourceError: If they are decoded first, and the source fails.
        """
        layout = layouts[-1]
        if self.stream is not None:
            order = StreamOrder(self.shard_lengths, layouts, crops.seed, self.shuffle_buffer_size)
            batches = StreamedBatches(
                self.stream, order, crops, num_steps=num_steps, start_step=start_step, rank=rank,
                retries=self.column.retries,
            )  # fmt: skip
            return PlainLoader(
                batches, make_batch, batch_size=None, num_workers=layout.num_workers, pin_memory=pin_memory
            )
        assert self.rows is not None
        sampler = StepBatchSampler(
            self.num_images, layout.batch_size, num_steps, crops.seed, start_step=start_step,
            accumulation_steps=layout.accumulation_steps, rank=rank, num_ranks=layout.num_ranks,
        )  # fmt: skip
        num_reads = num_steps * layout.global_batch_size  # of the whole run, so that a resumed one decides alike
        kept = keep_in_memory(self.rows, crops, self.keep_in_memory, num_reads=num_reads)
        if kept is not None and rank == 0:
            megabytes = kept.images.pixels.numel() / 1e6
            print(f"  images in memory        {len(kept)}, decoded: {megabytes:,.0f} MB", flush=True)
        source = PretrainingImages(self.rows, crops) if kept is None else kept
        return PlainLoader(
            source, make_batch, batch_sampler=sampler, num_workers=layout.num_workers, pin_memory=pin_memory
        )

    def first_batch(self, crops: CropReader, make_batch: Callable[..., Batch], size: int) -> Batch:
        """Loads some of the first images of a run with their masks, in this process.

        Args:
            crops: Decodes and crops a row.
            make_batch: Makes a batch.
            size: Images of the batch, at most `num_images`.

        Returns:
            The batch.

        Raises:
            ValueError: If no images can be read.
        """
        # a few images are read faster than all are decoded, and than the whole buffer of a stream is filled
        images = replace(self, keep_in_memory="no", shuffle_buffer_size=size)
        loader = images.loader(crops, make_batch, [StreamLayout(0, 1, 0, size, 1)], num_steps=1)
        try:
            return next(iter(loader))
        finally:
            close_loader(loader)


def close_loader(loader: PlainLoader) -> None:
    """Ends what a loader has running: its workers, and in this process a stream's files.

    A file of a stream that is still being read when the process ends could kill it.

    Args:
        loader: From `TrainingImages.loader`.
    """
    loader.close()
    if isinstance(loader.source, StreamedBatches):
        loader.source.close()
    end_reading_thread()


def open_training_images(data: DataArguments, config: IJepaConfig, num_ranks: int) -> TrainingImages:
    """Opens the images of a run; no picture is decoded.

    Args:
        data: Where they are.
        config: The model's channels.
        num_ranks: Processes.

    Returns:
        The images.

    Raises:
        FileNotFoundError: If there is no such data set.
        ValueError: If the data cannot be used as asked: a column is missing, a stream has fewer shards than readers.
        DataSourceError: If shards are counted, and the source fails for longer than `data_retry_seconds`.
    """
    retries = RetryPolicy(data.data_retry_seconds, data.data_timeout_seconds)
    stream = open_stream(data.source, data.train_split_name) if data.streaming else None
    dataset = load_split(data.source, data.train_split_name) if stream is None else stream.rows
    column = find_image_column(dataset, data.image_column_name)
    if stream is None:
        if data.max_train_samples is not None:
            dataset = dataset.select(range(min(data.max_train_samples, len(dataset))))
        rows = ImageRows(dataset, column, config.num_channels, retries)
        return TrainingImages(len(rows), rows.images, rows=rows, keep_in_memory=data.keep_images_in_memory)
    image_column = ImageColumn(stream.rows, column, config.num_channels, retries)
    lengths = shard_lengths(stream, column, retries)
    if data.max_train_samples is not None:
        lengths = cut_lengths(lengths, data.max_train_samples)
    warn_of_one_shard(stream)
    check_readers(sum(length > 0 for length in lengths), num_ranks, data.dataloader_num_workers)
    stream = stream._replace(rows=image_column.undecoded(stream.rows))
    return TrainingImages(
        sum(lengths), image_column, stream=stream, shard_lengths=tuple(lengths),
        shuffle_buffer_size=data.shuffle_buffer_size,
    )  # fmt: skip


class UnreadableLog:
    """Names and counts the images of a run that could not be read and were skipped, each once.

    Every rank adds those that it meets; `settle`, which all ranks call at the same steps, joins them.

    Args:
        path: The file that lists them, a line each.
        num_images: Images in the data set.
        max_share: Above this share of the images seen so far the run stops.
    """

    def __init__(self, path: Path, num_images: int, max_share: float) -> None:
        self.path, self.num_images, self.max_share = path, num_images, max_share
        self.file = RowFile(path)
        self.known = {row["image"]: row["reason"] for row in read_rows(path)}
        self.pending: list[UnreadableImage] = []

    def add(self, images: Iterable[UnreadableImage]) -> None:
        """Notes images that this rank could not read.

        Args:
            images: Of one batch.
        """
        self.pending += images

    def settle(self, gather: Callable[[list[Any]], list[Any]], step: int, *, is_main: bool) -> None:
        """Joins the images that the ranks have met; names the new ones in the log and in the file.

        Args:
            gather: Joins a list over all ranks.
            step: Optimiser steps done.
            is_main: Whether this rank writes.

        Raises:
            SaveError: On the rank that writes, if the file cannot be written; its lines are kept for the next time.
        """
        found = gather([tuple(image) for image in self.pending])
        self.pending = []
        new = {image: reason for image, reason in sorted(found) if image not in self.known}
        self.known |= new
        if is_main and new:
            for image, reason in new.items():
                logger.warning("image %d cannot be read and is skipped: %s", image, reason)
            self.file.append(*({"step": step, "image": image, "reason": new[image]} for image in new))

    def judge(self, num_seen: int) -> None:
        """Compares their number, which all ranks know alike, with the limit.

        Args:
            num_seen: Images that the run has asked for so far.

        Raises:
            TooManyUnreadableError: On every rank, if there are too many.
        """
        lines = (f"image {image}: {reason}" for image, reason in self.known.items())
        num_different = min(self.num_images, num_seen)
        words = too_many_unreadable(len(self.known), lines, num_different, self.num_images, self.max_share)
        if words is not None:
            raise TooManyUnreadableError(
                f"{words}\nAll are listed in {self.path}. Mend or remove them, or allow more with --max_broken_share; "
                "the same command with --resume_from_checkpoint latest then goes on."
            )
