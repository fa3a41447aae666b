"""The images of a run: both ways of reading give the loop the same thing, and unreadable ones are counted."""

import json
import multiprocessing

import pytest
from tiny import tiny_config

from ijepa_hf.data.collator import BatchMaker, IJepaDataCollator
from ijepa_hf.data.order import StreamLayout
from ijepa_hf.data.reading import CropReader, UnreadableImage
from ijepa_hf.data.retrying import RetryPolicy
from ijepa_hf.data.sources.builtin import load_digits
from ijepa_hf.recipes.arguments import DataArguments
from ijepa_hf.training.images import TooManyUnreadableError, UnreadableLog, close_loader, open_training_images


def loading_processes():
    """The processes of a loader; programs that tests fork from a server of their own live on beside them."""
    others = multiprocessing.context.ForkServerProcess
    return [process for process in multiprocessing.active_children() if not isinstance(process, others)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """60 digits in four uneven shards."""
    folder = tmp_path_factory.mktemp("shards")
    digits = load_digits("train").select(range(60))
    bounds = (0, 7, 30, 31, 60)
    for number in range(4):
        part = digits.select(range(bounds[number], bounds[number + 1]))
        part.to_parquet(str(folder / f"train-{number:05d}-of-00004.parquet"))
    return folder


def arguments(shards, **changes):
    return DataArguments(dataset_name=str(shards), shuffle_buffer_size=5, **changes)


def readers(images):
    crops = CropReader(images.column, (32, 32), 1.0, 0)
    return crops, BatchMaker(IJepaDataCollator(tiny_config(), normalize=False, global_batch_size=8))


def epoch_of(images, num_steps=7):
    crops, make_batch = readers(images)
    layouts = [StreamLayout(0, 1, 0, 8, 1)]
    loader = images.loader(crops, make_batch, layouts, num_steps=num_steps)
    try:
        return [batch.inputs["pixel_values"] for batch in loader]
    finally:
        close_loader(loader)


@pytest.mark.parametrize("streaming", [False, True])
def test_an_epoch_has_each_image_at_most_once_however_it_is_read(shards, streaming):
    images = open_training_images(arguments(shards, streaming=streaming), tiny_config(), num_ranks=1)
    assert images.num_images == 60
    read = {tuple(image.flatten().tolist()) for batch in epoch_of(images) for image in batch}
    known = {
        tuple(image.flatten().tolist())
        for batch in epoch_of(open_training_images(arguments(shards), tiny_config(), 1), num_steps=7)
        for image in batch
    }
    assert len(read) == len(known) == 56
    assert len(read & known) >= 52  # of 60; each leaves out another four


@pytest.mark.parametrize("streaming", [False, True])
def test_only_the_first_so_many_images_are_used_when_asked(shards, streaming):
    data = arguments(shards, streaming=streaming, max_train_samples=9)
    images = open_training_images(data, tiny_config(), num_ranks=1)
    assert images.num_images == 9
    first = [
        image.resize((32, 32)).convert("RGB").tobytes() for image in load_digits("train").select(range(9))["image"]
    ]
    for batch in epoch_of(images, num_steps=3):
        for image in batch:
            assert image.permute(1, 2, 0).contiguous().numpy().tobytes() in first


def test_a_first_batch_is_there_to_look_at_before_anything_is_trained(shards):
    for streaming in (False, True):
        images = open_training_images(arguments(shards, streaming=streaming), tiny_config(), num_ranks=1)
        batch = images.first_batch(*readers(images), size=3)
        assert batch.inputs["pixel_values"].shape == (3, 3, 32, 32)
        assert batch.unreadable == []


@pytest.mark.parametrize("streaming", [False, True])
def test_the_flags_say_how_patiently_images_are_read(shards, streaming):
    data = arguments(shards, streaming=streaming, data_retry_seconds=7.0, data_timeout_seconds=3.0)
    images = open_training_images(data, tiny_config(), num_ranks=1)
    assert images.column.retries == RetryPolicy(7.0, 3.0)
    if streaming:
        loader = images.loader(*readers(images), [StreamLayout(0, 1, 0, 8, 1)], num_steps=1)
        assert loader.source.retries == RetryPolicy(7.0, 3.0)
    flags = DataArguments()
    assert RetryPolicy() == RetryPolicy(flags.data_retry_seconds, flags.data_timeout_seconds)


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize("streaming", [False, True])
def test_closing_a_loader_ends_its_workers_and_the_thread_that_reads(shards, streaming, threads_since):
    images = open_training_images(arguments(shards, streaming=streaming), tiny_config(), num_ranks=1)
    loader = images.loader(*readers(images), [StreamLayout(0, 1, 2, 8, 1)], num_steps=7)
    iterator = iter(loader)
    next(iterator)
    assert len(loading_processes()) == 2
    close_loader(loader)
    assert loading_processes() == []
    assert not threads_since("time limit")


# -- what a checkpoint keeps of a stream -----------------------------------------------------------------------------


def test_a_checkpoint_of_a_stream_keeps_its_readers_and_a_map_style_one_keeps_nothing(shards):
    streamed = open_training_images(arguments(shards, streaming=True), tiny_config(), num_ranks=1)
    first = StreamLayout(0, 1, 2, 4, 2)
    state = json.loads(json.dumps(streamed.stream_state([first])))
    assert streamed.layouts_from(state, StreamLayout(5, 1, 2, 4, 2)) == [first]
    later = StreamLayout(5, 2, 1, 2, 2)
    assert streamed.layouts_from(state, later) == [first, later]
    at_once = StreamLayout(0, 2, 1, 2, 2)
    assert streamed.layouts_from(state, at_once) == [at_once]
    assert streamed.layouts_from(None, at_once) == [at_once]
    at_random = open_training_images(arguments(shards), tiny_config(), num_ranks=1)
    assert at_random.stream_state([first]) is None


def test_a_stream_whose_shards_were_changed_is_not_gone_on_with(shards):
    streamed = open_training_images(arguments(shards, streaming=True), tiny_config(), num_ranks=1)
    fewer = open_training_images(arguments(shards, streaming=True, max_train_samples=59), tiny_config(), num_ranks=1)
    with pytest.raises(ValueError, match="shards of the stream have other lengths"):
        streamed.layouts_from(fewer.stream_state([StreamLayout(0, 1, 0, 8, 1)]), StreamLayout(3, 1, 0, 8, 1))


def test_too_many_readers_are_refused_with_the_number_that_fits(shards):
    data = arguments(shards, streaming=True, dataloader_num_workers=3)
    with pytest.raises(
        ValueError, match="dataloader_num_workers=3 on 2 processes .* 4 shards.*--dataloader_num_workers 2"
    ):
        open_training_images(data, tiny_config(), num_ranks=2)


# -- unreadable images -----------------------------------------------------------------------------------------------


def settled(log, images, num_seen=10_000, step=1):
    log.add([UnreadableImage(image, f"file {image}") for image in images])
    log.settle(lambda found: found, step, is_main=True)
    log.judge(num_seen)


def test_an_unreadable_image_is_named_once_however_often_it_is_met(tmp_path, caplog):
    log = UnreadableLog(tmp_path / "unreadable.jsonl", num_images=10_000, max_share=0.1)
    settled(log, [4, 9, 4], step=1)
    settled(log, [9, 2], step=2)
    lines = [json.loads(line) for line in (tmp_path / "unreadable.jsonl").read_text().splitlines()]
    assert [(line["step"], line["image"]) for line in lines] == [(1, 4), (1, 9), (2, 2)]
    assert [record.getMessage() for record in caplog.records if "image 9" in record.getMessage()] == [
        "image 9 cannot be read and is skipped: file 9"
    ]
    # the next life of the run knows them
    again = UnreadableLog(tmp_path / "unreadable.jsonl", num_images=10_000, max_share=0.1)
    caplog.clear()
    settled(again, [4, 2])
    assert not caplog.records


def test_images_of_other_ranks_count_and_only_one_rank_writes(tmp_path):
    log = UnreadableLog(tmp_path / "unreadable.jsonl", num_images=10_000, max_share=0.1)
    log.add([UnreadableImage(1, "one")])
    log.settle(lambda found: [*found, (7, "seven")], 1, is_main=False)
    assert log.known == {1: "one", 7: "seven"}
    assert not (tmp_path / "unreadable.jsonl").exists()


@pytest.mark.parametrize(
    ("num_images", "num_seen", "num_broken", "stops"),
    [
        (10_000, 500, 100, False),  # too few were seen to judge
        (10_000, 1000, 100, False),  # the share itself is allowed
        (10_000, 1000, 101, True),
        (10_000, 50_000, 1000, False),  # an image seen five times is one image
        (10_000, 50_000, 1001, True),
        (40, 39, 40, False),  # a small set is judged when it was seen once
        (40, 40, 5, True),
    ],
)
def test_a_run_stops_above_the_share_of_different_images(tmp_path, num_images, num_seen, num_broken, stops):
    log = UnreadableLog(tmp_path / "unreadable.jsonl", num_images, max_share=0.1)
    if not stops:
        settled(log, range(num_broken), num_seen)
        return
    with pytest.raises(TooManyUnreadableError, match="max_broken_share=0.1") as raised:
        settled(log, range(num_broken), num_seen)
    assert "image 0: file 0" in str(raised.value)
    assert len((tmp_path / "unreadable.jsonl").read_text().splitlines()) == num_broken
