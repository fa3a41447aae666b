"""Streams: what each reader reads follows from numbers alone, no image comes twice, and nothing is left running."""

import errno
import io
import itertools
import logging
import math
import pickle
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny import tiny_config

from ijepa_hf.data import retrying, streaming
from ijepa_hf.data.collator import IJepaDataCollator
from ijepa_hf.data.loader import PlainLoader
from ijepa_hf.data.order import SampleKey, StreamLayout, StreamOrder
from ijepa_hf.data.reading import CropReader, ImageColumn
from ijepa_hf.data.sources.opening import ImageSource, ImageStream, load_split, open_stream
from ijepa_hf.data.streaming import (
    StreamedBatches,
    check_readers,
    cut_lengths,
    shard_lengths,
    warn_of_one_shard,
)

# torch says that two workers on one core are many
on_one_core = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


def loader_of(batches, make_batch):
    return PlainLoader(batches, make_batch, batch_size=None, num_workers=batches.order.layouts[-1].num_workers)


# -- streams to read -------------------------------------------------------------------------------------------------


class Shards:
    """A stream in memory, which notes what is opened; row r of shard s holds the number of its image."""

    def __init__(self, lengths):
        self.lengths, self.num_shards, self.opened = lengths, len(lengths), []

    def shard(self, num_shards, index):
        assert num_shards == self.num_shards
        first = sum(self.lengths[:index])
        return Part(self, index, list(range(first, first + self.lengths[index])))


class Part(NamedTuple):
    shards: Shards
    index: int
    numbers: list

    def skip(self, count):
        return self._replace(numbers=self.numbers[count:])

    def iter(self, batch_size):
        self.shards.opened.append(self.index)
        for first in range(0, len(self.numbers), batch_size):
            yield {"number": self.numbers[first : first + batch_size]}


class Keys:
    """Stands for a `CropReader`: gives the key back, having checked that it is that of the row."""

    DRAWS = 40

    def read_all(self, keys, rows, others):
        return [self.read(*sample) for sample in zip(keys, rows, others, strict=True)]

    def read(self, key, row, another):
        assert row["number"] == key.image
        for draw in (0, 1, 2**32 - 1):
            image, substitute = another(draw)
            assert substitute["number"] == image
        return {"sample_key": key, "substitutes": {another(draw)[0] for draw in range(self.DRAWS)}}


def in_memory(lengths):
    return ImageStream(Shards(lengths), [])


def in_turn(batches):
    """What a `DataLoader` gives: asks the workers one after the other, and passes over those that have ended."""
    workers = [batches.read(worker) for worker in range(batches.order.layouts[-1].readers_per_rank)]
    while workers:
        for worker in list(workers):
            try:
                yield next(worker)
            except StopIteration:
                workers.remove(worker)


def keys_of_run(lengths, layouts, seed, size, num_steps, stream=None):
    """The keys of each step of a run that changes its layout, rank by rank: {(step, rank): micro-batches}."""
    stream = stream or in_memory(lengths)
    keys = {}
    ends = [layout.start_step for layout in layouts[1:]] + [num_steps]
    for number, (layout, end) in enumerate(zip(layouts, ends, strict=True)):
        order = StreamOrder(lengths, layouts[: number + 1], seed, size)
        for rank in range(layout.num_ranks):
            batches = StreamedBatches(
                stream, order, Keys(), num_steps=num_steps, start_step=layout.start_step, rank=rank
            )
            loader = in_turn(batches)
            for step in range(layout.start_step, end):
                micro = [next(loader) for _ in range(layout.accumulation_steps)]
                keys[step, rank] = [[row["sample_key"] for row in batch] for batch in micro]
    return keys


def simulated_run(lengths, layouts, seed, size, num_steps):
    """The images of each (step, rank), worked out row by row in plain lists, as the module's first paragraph says."""
    order = StreamOrder(lengths, layouts, seed, size)
    images = [list(range(sum(lengths[:shard]), sum(lengths[: shard + 1]))) for shard in range(len(lengths))]
    per_epoch = sum(lengths) // layouts[0].global_batch_size
    result = {}
    for step in range(num_steps):
        layout = max((layout for layout in layouts if layout.start_step <= step), key=lambda one: one.start_step)
        epoch, step_in_epoch = divmod(step, per_epoch)
        if step_in_epoch == 0:
            queues = {}
            rest = [image for shard in order.epoch_shards(epoch) for image in images[shard]]
            line = {image: place for place, image in enumerate(rest)}
        if step_in_epoch == 0 or layout.start_step == step:
            # what readers before a change have not used stays on the line
            rest = sorted([image for queue in queues.values() for image in queue] + rest, key=line.get)
            micro_batches = range(
                step * layout.accumulation_steps, (epoch + 1) * per_epoch * layout.accumulation_steps
            )
            queues = {}
            for rank in range(layout.num_ranks):
                for reader in range(layout.readers_per_rank):
                    count = layout.batch_size * sum(n % layout.readers_per_rank == reader for n in micro_batches)
                    stretch, rest = rest[:count], rest[count:]
                    queues[rank, reader] = []
                    for block in range(math.ceil(count / size)):
                        part = stretch[block * size : (block + 1) * size]
                        permutation = order.block_order(epoch, layout, rank, reader, block, len(part))
                        queues[rank, reader] += [part[place] for place in permutation]
        for rank in range(layout.num_ranks):
            result[step, rank] = []
            for micro in range(layout.accumulation_steps):
                queue = queues[rank, (step * layout.accumulation_steps + micro) % layout.readers_per_rank]
                result[step, rank].append([queue.pop(0) for _ in range(layout.batch_size)])
    return result


@st.composite
def runs(draw, max_layouts=4):
    """Uneven shards, some without rows or with one, and layouts of one global batch, which change in mid-epoch."""
    lengths = draw(st.lists(st.sampled_from([0, 1, 1, 2, 3, 5, 8, 13, 70]), min_size=1, max_size=8))
    size = draw(st.sampled_from([1, 2, 4, 6, 8, 12]).filter(lambda one: one <= sum(lengths) or one == 1))
    if sum(lengths) < size:
        lengths.append(size)
    per_epoch = sum(lengths) // size
    num_steps = draw(st.integers(1, min(3 * per_epoch, 40)))
    starts = draw(st.lists(st.integers(1, max(1, num_steps - 1)), max_size=max_layouts - 1, unique=True))
    layouts = []
    for start in [0, *sorted(start for start in starts if start < num_steps)]:
        ranks = draw(st.sampled_from([n for n in (1, 2, 3, 4) if size % n == 0]))
        accumulation = draw(st.sampled_from([n for n in (1, 2, 3) if (size // ranks) % n == 0]))
        workers = draw(st.integers(0, 3))
        layouts.append(StreamLayout(start, ranks, workers, size // ranks // accumulation, accumulation))
    return lengths, layouts, draw(st.integers(0, 3)), draw(st.sampled_from([1, 2, 3, 7, 1000])), num_steps


# -- the order -------------------------------------------------------------------------------------------------------


@given(runs())
def test_each_rank_reads_what_a_simulation_row_by_row_says(run):
    lengths, layouts, seed, size, num_steps = run
    found = keys_of_run(lengths, layouts, seed, size, num_steps)
    images = {place: [[key.image for key in batch] for batch in micro] for place, micro in found.items()}
    assert images == simulated_run(lengths, layouts, seed, size, num_steps)


@given(runs())
def test_ranks_have_equally_many_micro_batches_of_consecutive_slots_that_fill_each_step(run):
    lengths, layouts, seed, size, num_steps = run
    found = keys_of_run(lengths, layouts, seed, size, num_steps)
    per_epoch = sum(lengths) // layouts[0].global_batch_size
    for step in range(num_steps):
        layout = [layout for layout in layouts if layout.start_step <= step][-1]
        ranks = [found[step, rank] for rank in range(layout.num_ranks)]
        assert [len(micro) for micro in ranks] == [layout.accumulation_steps] * layout.num_ranks
        slots = []
        # a global batch is laid out micro-batch by micro-batch, and in each of those rank by rank
        for batches in zip(*ranks, strict=True):
            for batch in batches:
                assert len(batch) == layout.batch_size
                assert {(key.epoch, key.step) for key in batch} == {(step // per_epoch, step)}
                slots += [key.slot for key in batch]
        assert slots == list(range(layout.global_batch_size))


class FailingShards(Shards):
    """Of which the chosen reads, counted over all shards, fail."""

    def __init__(self, lengths, failures):
        super().__init__(lengths)
        self.failures, self.count = failures, 0

    def shard(self, num_shards, index):
        return FailingPart(*super().shard(num_shards, index))


class FailingPart(Part):
    def iter(self, batch_size):
        for batch in super().iter(batch_size):
            self.shards.count += 1
            if self.shards.count in self.shards.failures:
                raise OSError(errno.EIO, "Input/output error")
            yield batch


@st.composite
def faulty_runs(draw):
    """Shards of any lengths, many without rows or with one; any readers, changed up to twice; and failing reads."""
    lengths = draw(st.lists(st.one_of(st.sampled_from([0, 1]), st.integers(2, 150)), min_size=1, max_size=9))
    ranks, workers = st.integers(1, 4), st.integers(0, 3)
    first = [draw(ranks), draw(workers), draw(st.integers(1, 5)), draw(st.integers(1, 3))]
    size = first[0] * first[2] * first[3]
    if sum(lengths) < size:
        lengths.append(size)
    num_steps = draw(st.integers(1, 2 * (sum(lengths) // size) + 1))
    layouts = [StreamLayout(0, *first)]
    for start in sorted(draw(st.sets(st.integers(1, max(1, num_steps - 1)), max_size=2))):
        splits = [(n, a) for n in range(1, 5) for a in range(1, 4) if size % (n * a) == 0]
        number, accumulation = draw(st.sampled_from(splits))
        layouts.append(StreamLayout(start, number, draw(workers), size // number // accumulation, accumulation))
    failures = draw(st.sets(st.integers(1, 30), max_size=10))
    return lengths, layouts, draw(st.integers(0, 3)), draw(st.integers(1, 40)), num_steps, failures


@given(faulty_runs())
def test_no_image_comes_twice_and_ranks_are_even_whatever_shards_readers_and_failures_there_are(run):
    lengths, layouts, seed, size, num_steps, failures = run
    stream = ImageStream(FailingShards(lengths, failures), [])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrying, "FIRST_WAIT_SECONDS", 0.0)
        patch.setattr(streaming, "ROWS_AT_ONCE", 16)
        found = keys_of_run(lengths, layouts, seed, size, num_steps, stream)
        assert found == keys_of_run(lengths, layouts, seed, size, num_steps)
    global_size, images = layouts[0].global_batch_size, {}
    for step in range(num_steps):
        layout = [layout for layout in layouts if layout.start_step <= step][-1]
        for rank in range(layout.num_ranks):
            assert [len(batch) for batch in found[step, rank]] == [layout.batch_size] * layout.accumulation_steps
            for key in itertools.chain(*found[step, rank]):
                assert key.image not in images.setdefault(key.epoch, set())
                images[key.epoch].add(key.image)
    whole = [epoch for epoch in images if (epoch + 1) * (sum(lengths) // global_size) <= num_steps]
    assert all(sum(lengths) - global_size < len(images[epoch]) <= sum(lengths) for epoch in whole)


@given(runs(max_layouts=3), st.data())
def test_a_run_resumed_by_the_same_readers_goes_on_with_the_very_micro_batches(run, data):
    lengths, layouts, seed, size, num_steps = run
    whole = keys_of_run(lengths, layouts, seed, size, num_steps)
    start = data.draw(st.integers(layouts[-1].start_step, num_steps))
    order = StreamOrder(lengths, layouts, seed, size)
    for rank in range(layouts[-1].num_ranks):
        batches = StreamedBatches(in_memory(lengths), order, Keys(), num_steps=num_steps, start_step=start, rank=rank)
        resumed = [[row["sample_key"] for row in batch] for batch in in_turn(batches)]
        assert resumed == [batch for step in range(start, num_steps) for batch in whole[step, rank]]


@given(runs(max_layouts=1), st.data())
def test_a_resumed_reader_opens_no_shard_that_lies_behind_it_and_none_of_another(run, data):
    lengths, (layout,), seed, size, _ = run
    order = StreamOrder(lengths, [layout], seed, size)
    start = data.draw(st.integers(0, order.steps_per_epoch - 1))
    shard_of = np.repeat(np.arange(len(lengths)), lengths)
    whole = simulated_run(lengths, [layout], seed, size, order.steps_per_epoch)
    opened_by = []
    for rank, reader in itertools.product(range(layout.num_ranks), range(layout.readers_per_rank)):
        mine = [
            image
            for step in range(order.steps_per_epoch)
            for micro, batch in enumerate(whole[step, rank])
            if (step * layout.accumulation_steps + micro) % layout.readers_per_rank == reader
            for image in batch
        ]
        done = layout.batch_size * sum(
            number % layout.readers_per_rank == reader for number in range(start * layout.accumulation_steps)
        )
        stream = in_memory(lengths)
        batches = StreamedBatches(stream, order, Keys(), num_steps=order.steps_per_epoch, start_step=start, rank=rank)
        worker = (reader - start * layout.accumulation_steps) % layout.readers_per_rank
        rows = [row["sample_key"].image for batch in batches.read(worker) for row in batch]
        assert rows == mine[done:]
        # the block in which it stands is read as a whole, because it was shuffled as a whole
        ahead = mine[done // size * size :] if done < len(mine) else []
        assert set(stream.rows.opened) == {int(shard_of[image]) for image in ahead}
        assert len(stream.rows.opened) == len(set(stream.rows.opened))
        opened_by.append(stream.rows.opened)
    for number, opened in enumerate(opened_by):
        others = set(itertools.chain(*opened_by[:number], *opened_by[number + 1 :]))
        assert not others & set(opened[1:-1])


@given(runs(max_layouts=1))
def test_a_substitute_is_of_the_block_of_the_image_that_it_stands_in_for(run):
    lengths, (layout,), seed, size, _ = run
    order = StreamOrder(lengths, [layout], seed, size)
    for rank in range(layout.num_ranks):
        batches = StreamedBatches(in_memory(lengths), order, Keys(), num_steps=order.steps_per_epoch, rank=rank)
        for reader in range(layout.readers_per_rank):
            rows = [row for batch in batches.read(reader) for row in batch]
            for first in range(0, len(rows), size):
                block = rows[first : first + size]
                images = {row["sample_key"].image for row in block}
                for row in block:
                    assert row["substitutes"] <= images
                    assert row["substitutes"] == images or len(images) > Keys.DRAWS


def test_epochs_and_seeds_differ_in_shards_and_in_the_order_inside_them():
    lengths = [40, 40, 40, 40]
    runs_of_seeds = [keys_of_run(lengths, [StreamLayout(0, 1, 0, 8, 1)], seed, 16, 40) for seed in (0, 1)]
    orders = [
        [[key.image for step in range(20 * epoch, 20 * (epoch + 1)) for key in run[step, 0][0]] for epoch in range(2)]
        for run in runs_of_seeds
    ]
    epochs = [tuple(order) for of_seed in orders for order in of_seed]
    assert len(set(epochs)) == 4
    assert all(sorted(order) == list(range(160)) for order in epochs)
    for order in epochs:
        first_block = [image % 40 for image in order[:16]]
        assert sorted(first_block) == list(range(16)) != first_block
    # of 24 permutations of the shards; these four epochs happen to have four
    assert len({tuple(image // 40 for image in order[::40]) for order in epochs}) == 4
    assert len({tuple(image % 40 for image in order[:16]) for order in epochs}) == 4


def test_without_a_buffer_the_order_inside_a_shard_is_the_files_own():
    order = StreamOrder([5, 4, 6], [StreamLayout(0, 1, 0, 5, 1)], seed=0, shuffle_buffer_size=1)
    batches = StreamedBatches(in_memory([5, 4, 6]), order, Keys(), num_steps=3)
    images = [row["sample_key"].image for batch in batches for row in batch]
    shards = {0: list(range(5)), 1: list(range(5, 9)), 2: list(range(9, 15))}
    assert images == [image for shard in order.epoch_shards(0) for image in shards[int(shard)]]


def test_the_order_of_a_billion_images_costs_nothing_that_one_would_notice():
    lengths = np.random.default_rng(0).integers(1, 200_000, 10_000)
    layouts = [StreamLayout(0, 64, 8, 16, 1), StreamLayout(1001, 32, 16, 32, 1), StreamLayout(2013, 64, 8, 16, 1)]
    order = StreamOrder(lengths, layouts, 0, 1000)
    stretch = order.stretch(0, 63, 7)
    used = 2013 * 1024
    assert len(stretch.rows) == lengths.sum() - used
    # one segment for each row of the blocks that were begun, no more: 512 readers twice, 1,000 rows at most each
    assert len(stretch.rows.starts) < 2 * 512 * 1000 + 2 * 512
    shards, inside, _ = order.locate(order.epoch_shards(0), stretch.block(0, 1000))
    assert np.all((inside >= 0) & (inside < lengths[shards]))


def test_layouts_that_do_not_follow_each_other_are_refused():
    layout = StreamLayout(0, 2, 0, 4, 1)
    assert layout.same_readers(replace(layout, start_step=5))
    for change in ({"num_ranks": 4}, {"num_workers": 1}, {"batch_size": 2}, {"accumulation_steps": 2}):
        assert not layout.same_readers(replace(layout, **change))
    for starts in ([1], [0, 0], [0, 5, 3]):
        with pytest.raises(ValueError, match="must start at 0 and increase"):
            StreamOrder([99], [replace(layout, start_step=start) for start in starts], 0, 1)
    with pytest.raises(ValueError, match="different global batch sizes"):
        StreamOrder([99], [layout, replace(layout, start_step=3, batch_size=5)], 0, 1)
    with pytest.raises(ValueError, match=r"7 images, fewer than one global batch of 8.*train_batch_size 3 or less"):
        StreamOrder([3, 4], [layout], 0, 1)
    order = StreamOrder([50, 50], [layout, StreamLayout(3, 1, 0, 8, 1)], 0, 1)
    with pytest.raises(ValueError, match=r"start_step=2 lies before the last layout, which begins at step 3"):
        StreamedBatches(in_memory([50, 50]), order, Keys(), num_steps=9, start_step=2)
    with pytest.raises(ValueError, match="lengths of 2 shards, but the stream has 3"):
        StreamedBatches(in_memory([50, 50, 1]), order, Keys(), num_steps=9, start_step=3)


# -- files -----------------------------------------------------------------------------------------------------------


def encoded(number):
    """A picture of one colour that says its number."""
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (number, 2 * number, 3 * number)).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(path, numbers, rows_of_group=3, broken=()):
    images = [b"broken" if number in broken else encoded(number) for number in numbers]
    rows = {"image": [{"bytes": image, "path": None} for image in images], "number": list(numbers)}
    features = datasets.Features({"image": datasets.Image(), "number": datasets.Value("int64")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(path), batch_size=rows_of_group)


BOUNDS = (0, 11, 11, 12, 33, 60)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """60 pictures in five uneven .parquet files, one of them without rows and one with a single row."""
    folder = tmp_path_factory.mktemp("shards")
    for index, (first, last) in enumerate(itertools.pairwise(BOUNDS)):
        write_parquet(folder / f"{index}.parquet", range(first, last))
    return folder


def opened(path, *others):
    stream = open_stream(ImageSource(str(path)), "train")
    column = streaming_column(stream)
    return stream._replace(rows=ImageColumn(stream.rows, column, 3).undecoded(stream.rows, *others)), column


def streaming_column(stream):
    return next(name for name, feature in stream.rows.features.items() if isinstance(feature, datasets.Image))


def crop_reader(stream, column):
    return CropReader(ImageColumn(stream.rows, column, 3), (32, 32), 1.0, 0)


def number_of(row):
    """The number that a picture's colour says."""
    pixels = row["pixel_values"]
    assert pixels.dtype == torch.uint8
    assert torch.all(pixels == pixels[:, :1, :1])
    assert pixels[1, 0, 0] == 2 * pixels[0, 0, 0]
    return int(pixels[0, 0, 0])


def key_and_number(rows):
    return [(row["sample_key"], number_of(row)) for row in rows]


def test_lengths_of_parquet_shards_are_taken_from_their_footers(shards, monkeypatch):
    stream, column = opened(shards)
    monkeypatch.setattr(datasets.IterableDataset, "iter", None)
    monkeypatch.setattr(datasets.IterableDataset, "__iter__", None)
    assert shard_lengths(stream, column) == [11, 0, 1, 21, 27]
    monkeypatch.setattr(streaming, "_FOOTERS_WITHOUT_A_BAR", 1)
    assert shard_lengths(stream, column) == [11, 0, 1, 21, 27]


class Measured(io.BytesIO):
    """A remote file that counts what is read of it."""

    def __init__(self, content):
        super().__init__(content)
        self.count = 0

    def read(self, size=-1):
        content = super().read(size)
        self.count += len(content)
        return content


def test_a_footer_costs_kilobytes_and_a_stretch_that_begins_late_reads_no_row_group_before(tmp_path, monkeypatch):
    generator = np.random.default_rng(0)
    table = pa.table({"image": [generator.bytes(20_000) for _ in range(100)], "number": range(100)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=10, use_dictionary=False)
    files = []

    def xopen(file, mode):
        assert (file, mode) == ("hf://datasets/someone/birds/a.parquet", "rb")
        files.append(Measured((tmp_path / "a.parquet").read_bytes()))
        return files[-1]

    monkeypatch.setattr(streaming, "xopen", xopen)
    stream, _ = opened(tmp_path, "number")
    stream = stream._replace(files=["hf://datasets/someone/birds/a.parquet"])
    assert shard_lengths(stream, "image") == [100]
    assert files[0].count < 100_000 < 2_000_000
    late = [row["number"] for rows in streaming._read_shard(stream, 0, 75) for row in rows]
    assert late == list(range(75, 100))
    assert 600_000 < files[1].count < 700_000  # three groups of 200,000, and the footer


def test_files_of_any_file_system_are_read(shards):
    memory = fsspec.filesystem("memory")
    stream, column = opened(shards)
    addresses = []
    for file in stream.files:
        addresses.append(f"memory://{file}")
        memory.pipe(addresses[-1], Path(file).read_bytes())
    stream = stream._replace(files=addresses)
    assert shard_lengths(stream, column) == [11, 0, 1, 21, 27]
    order = StreamOrder([11, 0, 1, 21, 27], [StreamLayout(0, 1, 0, 5, 1)], 0, 7)
    for batch in StreamedBatches(stream, order, crop_reader(stream, column), num_steps=3):
        assert all(key.image == number for key, number in key_and_number(batch))


@pytest.mark.parametrize("kind", ["pictures", "bytes", "arrays"])
def test_parquet_is_read_as_the_library_reads_it_from_any_row_on(tmp_path, kind):
    path = tmp_path / "a.parquet"
    if kind == "pictures":
        write_parquet(path, range(10))
    elif kind == "bytes":
        pq.write_table(pa.table({"number": range(10), "image": [encoded(n) for n in range(10)]}), path)
    else:
        features = datasets.Features({"image": datasets.Array3D((2, 3, 4), "uint16")})
        values = np.random.default_rng(0).integers(0, 65536, (10, 2, 3, 4), dtype=np.uint16)
        datasets.Dataset.from_dict({"image": values}, features=features).to_parquet(str(path), batch_size=4)
    stream = open_stream(ImageSource(str(path)), "train")
    image_column = ImageColumn(stream.rows, "image", 2 if kind == "arrays" else 3)
    others = () if kind == "arrays" else ("number",)
    stream = stream._replace(rows=image_column.undecoded(stream.rows, *others))
    expected = list(stream.rows)
    for first in range(11):
        ours = [row for rows in streaming._read_shard(stream, 0, first) for row in rows]
        assert len(ours) == 10 - first
        for mine, theirs in zip(ours, expected[first:], strict=True):
            assert mine.keys() == theirs.keys()
            np.testing.assert_array_equal(mine["image"], theirs["image"])
            np.testing.assert_array_equal(image_column.decode(mine), image_column.decode(theirs))
    if kind == "arrays":
        np.testing.assert_array_equal(image_column.decode(ours_at(stream, 7)), values[7] / np.float32(65535))


def ours_at(stream, row):
    return next(streaming._read_shard(stream, 0, row))[0]


@on_one_core
@pytest.mark.parametrize(("num_workers", "start_step"), [(0, 0), (2, 0), (2, 5)])
def test_a_loader_gives_exactly_what_the_arithmetic_says(shards, num_workers, start_step):
    stream, column = opened(shards)
    lengths, layout = [11, 0, 1, 21, 27], StreamLayout(0, 2, num_workers, 2, 2)
    expected = simulated_run(lengths, [layout], 3, 7, 9)
    collator = IJepaDataCollator(tiny_config(), normalize=False, global_batch_size=8)

    def make_batch(rows):
        return collator(rows), key_and_number(rows)

    for rank in range(2):
        batches = StreamedBatches(
            stream, StreamOrder(lengths, [layout], 3, 7), crop_reader(stream, column), num_steps=9,
            start_step=start_step, rank=rank,
        )  # fmt: skip
        state = torch.random.get_rng_state()
        found = list(loader_of(batches, make_batch))
        batches.close()
        assert torch.equal(torch.random.get_rng_state(), state)
        keys = [
            [
                (SampleKey(step // 7, step, (2 * micro + rank) * 2 + place, image), image)
                for place, image in enumerate(batch)
            ]
            for step in range(start_step, 9)
            for micro, batch in enumerate(expected[step, rank])
        ]
        assert [keys_and_numbers for _, keys_and_numbers in found] == keys
        assert all(inputs["pixel_values"].shape == (2, 3, 32, 32) for inputs, _ in found)


def test_what_a_resumed_run_skips_is_not_decoded(shards, monkeypatch):
    stream, column = opened(shards, "number")
    decoded = []
    original = ImageColumn.decode
    monkeypatch.setattr(ImageColumn, "decode", lambda self, row: decoded.append(row["number"]) or original(self, row))
    order = StreamOrder([11, 0, 1, 21, 27], [StreamLayout(0, 1, 0, 6, 1)], 0, 16)
    batches = StreamedBatches(stream, order, crop_reader(stream, column), num_steps=10, start_step=7)
    keys = [row["sample_key"].image for batch in batches for row in batch]
    assert decoded == keys
    assert len(keys) == 18


def test_a_broken_image_is_replaced_by_another_of_its_block(tmp_path):
    write_parquet(tmp_path / "0.parquet", range(20), broken=(4, 13))
    write_parquet(tmp_path / "1.parquet", range(20, 40))
    stream, column = opened(tmp_path)
    order = StreamOrder([20, 20], [StreamLayout(0, 1, 0, 5, 1)], 0, 10)
    both = []
    for _ in range(2):
        rows = list(itertools.chain(*StreamedBatches(stream, order, crop_reader(stream, column), num_steps=8)))
        both.append([number_of(row) for row in rows])
    assert both[0] == both[1]
    replaced = {row["sample_key"].image: row for row in rows if row["unreadable"]}
    assert sorted(replaced) == [4, 13]
    for image, row in replaced.items():
        assert row["unreadable"][0].image == image
        assert number_of(row) // 10 == image // 10  # shards begin blocks here
        assert number_of(row) != image


def test_a_shard_that_has_become_shorter_is_named(tmp_path):
    for index in range(2):
        write_parquet(tmp_path / f"{index}.parquet", range(8 * index, 8 * index + 8))
    stream, column = opened(tmp_path)
    order = StreamOrder(shard_lengths(stream, column), [StreamLayout(0, 1, 0, 4, 1)], 0, 4)
    write_parquet(tmp_path / "1.parquet", range(8, 13))
    batches = StreamedBatches(stream, order, crop_reader(stream, column), num_steps=4)
    with pytest.raises(ValueError, match=r"shard 1 of the stream \(.*1\.parquet\) ends after 5 rows, but had 8 when"):
        list(batches)
    short = in_memory([8, 5])
    order = StreamOrder([8, 8], [StreamLayout(0, 1, 0, 4, 1)], 0, 4)
    with pytest.raises(ValueError, match=r"shard 1 of the stream ends after 5 rows, but had 8 when"):
        list(StreamedBatches(short, order, Keys(), num_steps=4))


def test_a_parquet_shard_that_cannot_be_read_is_named(shards, tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"no parquet" * 9)
    stream, column = opened(shards)
    with pytest.raises(ValueError, match=r"shard '.*a\.parquet' cannot be read: "):
        shard_lengths(stream._replace(files=[*stream.files[:4], str(tmp_path / "a.parquet")]), column)


def write_tar(path, numbers):
    with tarfile.open(path, "w") as archive:
        for number in numbers:
            for suffix, content in (("png", encoded(number)), ("cls", str(number % 3).encode())):
                entry = tarfile.TarInfo(f"{number:04d}.{suffix}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))


def write_pictures(folder, numbers):
    folder.mkdir()
    for number in numbers:
        (folder / f"{number:04d}.png").write_bytes(encoded(number))


@pytest.mark.parametrize("kind", ["tars", "pictures"])
def test_tars_and_a_folder_of_pictures_are_counted_which_is_said_and_stream_like_parquet(tmp_path, kind, caplog):
    if kind == "tars":
        (tmp_path / "tars").mkdir()
        lengths = [11, 1, 21, 7]
        for index, length in enumerate(lengths):
            write_tar(tmp_path / "tars" / f"{index}.tar", range(sum(lengths[:index]), sum(lengths[:index]) + length))
    else:
        lengths = [40]
        write_pictures(tmp_path / "pictures", range(40))
    stream, column = opened(tmp_path / kind)
    with caplog.at_level(logging.WARNING):
        assert shard_lengths(stream, column) == lengths
    said = "its 4 shards" if kind == "tars" else "its one shard"
    assert f"counted first, by reading {said} once" in caplog.text
    assert "only .parquet files say so" in caplog.text
    assert "`ijepa-hf prepare`" in caplog.text
    layout = StreamLayout(0, 2, 0, 3, 1)
    expected = simulated_run(lengths, [layout], 0, 4, 8)
    order = StreamOrder(lengths, [layout], 0, 4)
    for rank, start in ((0, 0), (1, 5)):
        batches = StreamedBatches(stream, order, crop_reader(stream, column), num_steps=8, start_step=start, rank=rank)
        found = [[number for _, number in key_and_number(batch)] for batch in batches]
        assert found == [batch for step in range(start, 8) for batch in expected[step, rank]]


@on_one_core
def test_tars_are_read_by_two_workers(tmp_path):
    for index in range(2):
        write_tar(tmp_path / f"{index}.tar", range(8 * index, 8 * index + 8))
    stream, column = opened(tmp_path)
    layout = StreamLayout(0, 1, 2, 4, 1)
    batches = StreamedBatches(stream, StreamOrder([8, 8], [layout], 0, 3), crop_reader(stream, column), num_steps=4)
    found = list(loader_of(batches, key_and_number))
    expected = simulated_run([8, 8], [layout], 0, 3, 4)
    assert [[number for _, number in batch] for batch in found] == [expected[step, 0][0] for step in range(4)]


def test_a_stream_without_images_is_refused(tmp_path):
    write_parquet(tmp_path / "a.parquet", [])
    stream, column = opened(tmp_path)
    with pytest.raises(ValueError, match="the stream holds no images"):
        shard_lengths(stream, column)


def test_only_the_first_images_are_left_when_lengths_are_cut(shards):
    lengths = [11, 0, 1, 21, 27]
    assert cut_lengths(lengths, 60) == cut_lengths(lengths, 1000) == lengths
    assert cut_lengths(lengths, 59) == [11, 0, 1, 21, 26]
    assert cut_lengths(lengths, 12) == [11, 0, 1, 0, 0]
    assert cut_lengths(lengths, 1) == [1, 0, 0, 0, 0]
    stream, column = opened(shards)
    order = StreamOrder(cut_lengths(lengths, 14), [StreamLayout(0, 1, 0, 7, 1)], 0, 4)
    batches = StreamedBatches(stream, order, crop_reader(stream, column), num_steps=2)
    assert sorted(number_of(row) for batch in batches for row in batch) == list(range(14))


@pytest.mark.parametrize(
    ("num_shards", "num_ranks", "num_workers", "advice"),
    [
        (4, 1, 5, "5 on 1 process makes 5 readers, but the stream has 4 shards.*use --dataloader_num_workers 4,"),
        (7, 2, 4, "4 on 2 processes makes 8 readers.*7 shards.*use --dataloader_num_workers 3,"),
        (1, 1, 2, "2 on 1 process makes 2 readers.*has 1 shard, .*use --dataloader_num_workers 1,"),
        (3, 4, 0, "0 on 4 processes makes 4 readers.*use 3 processes at most,"),
        (1, 2, 1, "1 on 2 processes makes 2 readers.*use 1 process at most,"),
    ],
)
def test_more_readers_than_shards_are_refused_with_the_number_that_fits(num_shards, num_ranks, num_workers, advice):
    with pytest.raises(ValueError, match=f"dataloader_num_workers={advice} or write more shards with `ijepa-hf prep"):
        check_readers(num_shards, num_ranks, num_workers)


def test_as_many_readers_as_shards_are_accepted():
    for num_shards, num_ranks, num_workers in ((1, 1, 0), (1, 1, 1), (4, 2, 2), (4, 4, 0), (9, 2, 4)):
        check_readers(num_shards, num_ranks, num_workers)


def test_a_stream_of_one_shard_says_so_and_names_the_way_out(tmp_path, shards, caplog):
    write_pictures(tmp_path / "pictures", range(3))
    for path, what in ((tmp_path / "pictures", "is a folder of pictures"), (shards / "0.parquet", "is one file")):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            warn_of_one_shard(opened(path)[0])
        assert f"the stream {what}, and so one shard" in caplog.text
        assert "`ijepa-hf prepare`" in caplog.text
    caplog.clear()
    warn_of_one_shard(opened(shards)[0])
    assert not caplog.records


# -- leaving early ---------------------------------------------------------------------------------------------------


def test_closing_ends_all_reading_even_while_an_error_holds_on_to_the_loop(shards, monkeypatch):
    stream, column = opened(shards)
    files = []
    original = streaming.xopen
    monkeypatch.setattr(streaming, "xopen", lambda *args: files.append(original(*args)) or files[-1])
    order = StreamOrder([11, 0, 1, 21, 27], [StreamLayout(0, 1, 0, 4, 1)], 0, 4)
    batches = StreamedBatches(stream, order, crop_reader(stream, column), num_steps=15)

    def train():
        iterators = [iter(loader_of(batches, key_and_number)) for _ in range(2)]
        for iterator in iterators:
            next(iterator)
        raise KeyError("loss")

    with pytest.raises(KeyError) as error:
        train()
    assert error.traceback  # holds the frames, and with them the iterators
    assert [file.closed for file in files] == [False, False]
    batches.close()
    assert [file.closed for file in files] == [True, True]
    batches.close()
    assert next(iter(batches))  # another iterator begins anew
    batches.close()


def test_batches_can_be_sent_to_a_worker_that_is_started_afresh(shards):
    stream, column = opened(shards)
    order = StreamOrder([11, 0, 1, 21, 27], [StreamLayout(0, 1, 2, 4, 1)], 0, 4)
    batches = StreamedBatches(stream, order, crop_reader(stream, column), num_steps=15)
    sent = pickle.loads(pickle.dumps(batches))
    assert key_and_number(next(sent.read(1))) == key_and_number(next(batches.read(1)))


LEAVES_EARLY = """
import sys
from ijepa_hf.data.loader import PlainLoader
from ijepa_hf.data.order import StreamLayout, StreamOrder
from ijepa_hf.data.reading import CropReader, ImageColumn
from ijepa_hf.data.sources.opening import ImageSource, open_stream
from ijepa_hf.data.streaming import *

stream = open_stream(ImageSource(sys.argv[1]), "train")
column = ImageColumn(stream.rows, "image", 3)
stream = stream._replace(rows=column.undecoded(stream.rows))
layout = StreamLayout(0, 1, int(sys.argv[2]), 4, 1)
order = StreamOrder(shard_lengths(stream, "image"), [layout], 0, 4)
batches = StreamedBatches(stream, order, CropReader(column, (32, 32), 1.0, 0), num_steps=1000)
loader = PlainLoader(batches, len, batch_size=None, num_workers=layout.num_workers)

def train():
    iterator = iter(loader)
    print(next(iterator) + next(iterator))
    raise KeyError("loss")

try:
    train()
except KeyError as error:
    kept = error  # its traceback keeps the iterator until the end of the process
finally:
    batches.close()
"""


@pytest.mark.parametrize("num_workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_process_that_leaves_early_ends_with_its_own_exit_code(shards, num_workers, child_environment):
    command = [sys.executable, "-W", "ignore", "-c", LEAVES_EARLY, str(shards), str(num_workers)]
    done = subprocess.run(command, env=child_environment, capture_output=True, text=True, timeout=120, check=False)
    # a thread that is left over would say "terminate called", a generator "Exception ignored"
    assert (done.returncode, done.stdout, done.stderr) == (0, "8\n", "")


# -- CIFAR-10 --------------------------------------------------------------------------------------------------------


def test_an_epoch_of_cifar10_has_each_image_at_most_once_with_the_label_of_its_row(cifar10_folder):
    stream = open_stream(ImageSource(str(cifar10_folder)), "train")
    lengths = shard_lengths(stream, "image")
    assert (sum(lengths), len(lengths)) == (50_000, 8)
    labels = np.concatenate([pq.read_table(file, columns=["label"])["label"].to_numpy() for file in stream.files])
    stream = stream._replace(rows=stream.rows.select_columns(["label"]))
    layouts = [StreamLayout(0, 2, 2, 128, 1), StreamLayout(77, 1, 3, 128, 2)]

    class Labels:
        def read_all(self, keys, rows, others):
            del others
            assert [row["label"] for row in rows] == [labels[key.image] for key in keys]
            return [key.image for key in keys]

    images = []
    for number, (layout, end) in enumerate(zip(layouts, (77, 195), strict=True)):
        order = StreamOrder(lengths, layouts[: number + 1], 0, 1000)
        for rank in range(layout.num_ranks):
            batches = StreamedBatches(stream, order, Labels(), num_steps=end, start_step=layout.start_step, rank=rank)
            images += itertools.chain(*in_turn(batches))
    assert len(images) == len(set(images)) == 50_000 // 256 * 256
    assert load_split(ImageSource(str(cifar10_folder)), "train")[images[0]]["label"] == labels[images[0]]
