"""Images kept decoded: every bit as image by image, whatever is kept, read, broken or resumed."""

import io

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import tiny_config
from torch.nn import functional

from ijepa_hf import memory_images
from ijepa_hf.arguments import DataArguments
from ijepa_hf.data import (
    BatchMaker,
    CropReader,
    IJepaDataCollator,
    ImageRows,
    PretrainingImages,
    SampleKey,
    StepBatchSampler,
    build_loader,
)
from ijepa_hf.loading import open_training_images
from ijepa_hf.memory_images import (
    BatchResizer,
    CannotKeepError,
    MemoryCrops,
    PlacedWeights,
    decode_all,
    keep_in_memory,
    resizing_weights,
)
from ijepa_hf.streaming import StreamLayout


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def image_rows(pictures: list[bytes], num_channels: int = 3) -> ImageRows:
    features = datasets.Features({"image": datasets.Image()})
    values = [{"bytes": data, "path": f"{number}.png"} for number, data in enumerate(pictures)]
    return ImageRows(datasets.Dataset.from_dict({"image": values}, features), "image", num_channels)


def noise(count: int, height: int, width: int, *bands: int) -> list[bytes]:
    generator = np.random.default_rng(0)
    return [encoded(generator.integers(0, 256, (height, width, *bands), dtype=np.uint8)) for _ in range(count)]


def reader(rows: ImageRows, size=(32, 32), scale=0.3, seed=7) -> CropReader:
    return CropReader(rows.images, size, scale, seed)


def kept(rows: ImageRows, crops: CropReader) -> MemoryCrops:
    crop_size = crops.size if crops.min_crop_scale == 1.0 else None
    return MemoryCrops(decode_all(rows, crop_size, limit=None), crops)


def assert_same(one: list, other: list) -> None:
    for mine, theirs in zip(one, other, strict=True):
        assert mine.keys() == theirs.keys()
        assert mine["sample_key"] == theirs["sample_key"]
        assert mine["unreadable"] == theirs["unreadable"]
        assert mine["pixel_values"].dtype == theirs["pixel_values"].dtype
        assert torch.equal(mine["pixel_values"], theirs["pixel_values"])


# -- the resizer -----------------------------------------------------------------------------------------------------


@settings(max_examples=80)
@given(data=st.data(), height=st.integers(1, 48), width=st.integers(1, 48), channels=st.sampled_from([1, 3]))
def test_parts_resized_together_have_the_bits_of_torchs_filter(data, height, width, channels):
    size = data.draw(st.tuples(st.integers(2, 48), st.integers(2, 48)))
    boxes = []
    for _ in range(data.draw(st.integers(1, 5))):
        high, wide = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
        top, left = data.draw(st.integers(0, height - high)), data.draw(st.integers(0, width - wide))
        boxes.append((top, left, high, wide))
    generator = np.random.default_rng(data.draw(st.integers(0, 99)))
    pixels = generator.integers(0, 256, (len(boxes), height, channels, width), dtype=np.uint8)
    extreme = data.draw(st.booleans())  # black beside white makes the largest sums
    images = torch.from_numpy(np.where(pixels > 127, 255, 0).astype(np.uint8) if extreme else pixels)
    resized = BatchResizer((height, width), size)(images, torch.tensor(boxes))
    for image, (top, left, high, wide), result in zip(images, boxes, resized, strict=True):
        part = image.transpose(0, 1)[:, top : top + high, left : left + wide].contiguous()
        expected = functional.interpolate(part[None], size=size, mode="bilinear", antialias=True)[0]
        assert torch.equal(result, expected)


def test_small_images_are_resized_by_products_and_large_ones_one_by_one():
    assert BatchResizer((32, 32), (32, 32)).tables
    assert BatchResizer((28, 28), (32, 32)).tables
    assert not BatchResizer((96, 96), (96, 96)).tables  # 171 MB of weights
    images = torch.randint(0, 256, (3, 96, 3, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[0, 0, 96, 96], [5, 9, 60, 70], [36, 26, 60, 70]])
    resized = BatchResizer((96, 96), (96, 96))(images, boxes)
    assert torch.equal(resized[0], images[0].transpose(0, 1))
    part = images[1, 5:65, :, 9:79].transpose(0, 1).contiguous()[None]
    assert torch.equal(resized[1], functional.interpolate(part, size=(96, 96), mode="bilinear", antialias=True)[0])


def test_sums_that_float32_cannot_hold_are_not_left_to_it():
    assert PlacedWeights(32, 32).is_exact
    assert not PlacedWeights(64, 4).is_exact
    assert not BatchResizer((64, 64), (4, 4)).tables


def test_weights_are_a_triangle_that_sums_to_one():
    for length, out in ((7, 7), (5, 12), (31, 8)):
        weights, bits = resizing_weights(length, out)
        assert weights.min() >= 0
        assert np.abs(weights.sum(1) / 2**bits - 1).max() < 1e-3
        assert weights.max() < 2**15
    assert resizing_weights(7, 7)[0].tolist() == (2**14 * np.eye(7, dtype=int)).tolist()


# -- the same crops --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.3, 1.0])
@pytest.mark.parametrize(("shape", "size"), [((32, 32, 3), (32, 32)), ((20, 28), (24, 16)), ((70, 66, 3), (64, 64))])
@pytest.mark.parametrize("num_channels", [1, 3])
def test_crops_from_memory_have_the_bits_of_crops_read_one_by_one(shape, size, scale, num_channels):
    rows = image_rows(noise(9, *shape), num_channels)
    crops = reader(rows, size, scale)
    from_memory, one_by_one = kept(rows, crops), PretrainingImages(rows, crops)
    for epoch in (0, 3):
        keys = [SampleKey(epoch, epoch * 2, slot, image) for slot, image in enumerate((4, 8, 0, 4, 1))]
        assert_same(from_memory.__getitems__(keys), one_by_one.__getitems__(keys))
        assert_same([from_memory[keys[1]]], [one_by_one[keys[1]]])


def test_a_batch_of_several_epochs_has_the_boxes_of_each():
    rows = image_rows(noise(4, 32, 32, 3))
    from_memory, one_by_one = kept(rows, reader(rows)), PretrainingImages(rows, reader(rows))
    keys = [SampleKey(epoch, 0, slot, slot % 4) for slot, epoch in enumerate((0, 1, 0, 5))]
    assert_same(from_memory.__getitems__(keys), one_by_one.__getitems__(keys))


def test_jpegs_and_uint8_arrays_are_kept_as_well():
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (5, 3, 16, 24), dtype=np.uint8)
    features = datasets.Features({"image": datasets.Array3D((3, 16, 24), "uint8")})
    arrays = ImageRows(datasets.Dataset.from_dict({"image": list(pixels)}, features), "image", 3)
    jpegs = image_rows([encoded(image.transpose(1, 2, 0), "JPEG") for image in pixels])
    keys = [SampleKey(0, 0, slot, slot) for slot in range(5)]
    for rows in (arrays, jpegs):
        assert_same(
            kept(rows, reader(rows)).__getitems__(keys), PretrainingImages(rows, reader(rows)).__getitems__(keys)
        )


def test_an_image_that_cannot_be_read_has_the_same_substitute_and_the_same_report():
    pictures = noise(8, 24, 24, 3)
    for broken in (0, 3, 5):  # the first, and others
        pictures[broken] = b"no picture"
    rows = image_rows(pictures)
    for scale in (0.3, 1.0):
        crops = reader(rows, (16, 16), scale)
        one_by_one = PretrainingImages(rows, crops)
        for epoch in range(3):
            keys = [SampleKey(epoch, 0, slot, slot % 8) for slot in range(16)]
            samples = kept(rows, crops).__getitems__(keys)
            assert_same(samples, one_by_one.__getitems__(keys))
            assert_same(samples, [one_by_one[key] for key in keys])
            assert {image.image for sample in samples for image in sample["unreadable"]} == {0, 3, 5}
            assert "image '0.png' cannot be decoded" in samples[0]["unreadable"][0].reason


def test_too_many_unreadable_images_in_a_row_are_listed():
    rows = image_rows([*noise(1, 8, 8, 3), *[b"no picture"] * 400])
    images = kept(rows, reader(rows))
    with pytest.raises(ValueError, match="11 images one after the other cannot be read"):
        images[SampleKey(0, 0, 0, 7)]


def loaded(dataset, crops, *, workers=0, start=0, batch=6, rank=0, ranks=1):
    sampler = StepBatchSampler(40, batch, 9, 0, start_step=start, rank=rank, num_ranks=ranks)
    collator = IJepaDataCollator(tiny_config(), seed=0, global_batch_size=sampler.global_batch_size)
    batches = build_loader(dataset, sampler, BatchMaker(collator), num_workers=workers, pin_memory=False)
    return [batch.inputs for batch in batches]


@pytest.mark.parametrize("changes", [{"workers": 2}, {"start": 4}, {"batch": 3, "rank": 1, "ranks": 2}])
def test_workers_restarts_and_ranks_get_the_same_batches_from_memory(changes):
    rows = image_rows(noise(40, 32, 32, 3))
    crops = reader(rows)
    from_memory = loaded(kept(rows, crops), crops, **changes)
    one_by_one = loaded(PretrainingImages(rows, crops), crops, **{**changes, "workers": 0})
    assert len(from_memory) == len(one_by_one) > 0
    for mine, theirs in zip(from_memory, one_by_one, strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


# -- what is kept ----------------------------------------------------------------------------------------------------


def sixteen_bits() -> bytes:
    return encoded(np.full((8, 8), 9, dtype=np.uint16))


@pytest.mark.parametrize(
    ("pictures", "reason"),
    [
        ([*noise(2, 8, 8, 3), *noise(1, 8, 9, 3)], "image 2 has 8x9 pixels, but image 0 has 8x8"),
        ([*noise(1, 8, 8, 3), sixteen_bits()], "image 1 has more than 8 bits"),
        ([b"", b"no picture"], "no image can be read"),
    ],
)
def test_images_that_are_not_alike_are_read_one_by_one_unless_asked_otherwise(pictures, reason):
    rows = image_rows(pictures)
    crops = reader(rows)
    with pytest.raises(CannotKeepError, match=reason):
        decode_all(rows, None, limit=None)
    assert keep_in_memory(rows, crops, "auto", num_reads=100) is None
    with pytest.raises(ValueError, match=f"keep_images_in_memory='yes', but {reason}.* --keep_images_in_memory no"):
        keep_in_memory(rows, crops, "yes", num_reads=100)


def test_images_of_different_sizes_are_kept_where_they_are_resized_whole():
    rows = image_rows([*noise(2, 8, 8, 3), *noise(1, 8, 9, 3)])
    crops = reader(rows, scale=1.0)
    keys = [SampleKey(0, 0, slot, slot) for slot in range(3)]
    images = keep_in_memory(rows, crops, "auto", num_reads=100)
    assert images is not None
    assert_same(images.__getitems__(keys), PretrainingImages(rows, crops).__getitems__(keys))


def test_auto_keeps_what_fits_and_is_read_at_least_once(monkeypatch):
    rows = image_rows(noise(5, 8, 8, 3))
    crops = reader(rows)
    assert keep_in_memory(rows, crops, "auto", num_reads=5) is not None
    assert keep_in_memory(rows, crops, "auto", num_reads=4) is None
    assert keep_in_memory(rows, crops, "yes", num_reads=4) is not None
    assert keep_in_memory(rows, crops, "no", num_reads=5) is None
    monkeypatch.setattr(memory_images, "AUTOMATIC_BYTES", 5 * 8 * 8 * 3 - 1)
    decoded = []
    original = rows.images.decode
    monkeypatch.setattr(rows.images, "decode", lambda row: decoded.append(row) or original(row))
    assert keep_in_memory(rows, crops, "auto", num_reads=5) is None
    assert len(decoded) == 1  # the first image says how large all are
    assert keep_in_memory(rows, crops, "yes", num_reads=5) is not None


def test_crops_of_one_pixel_are_read_one_by_one():
    rows = image_rows(noise(2, 8, 8, 3))
    crops = reader(rows, (1, 8))
    assert keep_in_memory(rows, crops, "auto", num_reads=9) is None
    with pytest.raises(ValueError, match="keep_images_in_memory='yes', but crops of one pixel"):
        keep_in_memory(rows, crops, "yes", num_reads=9)


# -- a run's images --------------------------------------------------------------------------------------------------


def run_loader(keep: str, rank: int = 0, start_step: int = 0):
    data = DataArguments(dataset_name="digits", max_train_samples=48, keep_images_in_memory=keep)
    images = open_training_images(data, tiny_config(), num_ranks=1)
    crops = CropReader(images.column, (32, 32), 0.5, 0)
    make_batch = BatchMaker(IJepaDataCollator(tiny_config(), normalize=False, global_batch_size=8))
    return images.loader(
        crops, make_batch, [StreamLayout(0, 1, 0, 8, 1)], seed=0, shuffle_buffer_size=1, num_steps=6,
        start_step=start_step, rank=rank, pin_memory=False,
    ), images, crops, make_batch  # fmt: skip


def test_a_run_keeps_its_images_where_it_reads_all_and_says_so_once(capsys):
    loader = run_loader("auto")[0]
    assert isinstance(loader.source, MemoryCrops)
    said = capsys.readouterr().out
    assert said.count("images in memory") == 1
    assert "48, decoded" in said
    assert isinstance(run_loader("auto", rank=1)[0].source, MemoryCrops)
    for other in (run_loader("no")[0], run_loader("auto", start_step=1)[0]):
        assert isinstance(other.source, PretrainingImages)
    capsys.readouterr()
    _, images, crops, make_batch = run_loader("yes")
    assert "images in memory" in capsys.readouterr().out
    images.first_batch(crops, make_batch, size=4, seed=0)  # a few are read faster than all are decoded
    assert not capsys.readouterr().out


def test_a_run_has_the_same_batches_whether_or_not_its_images_are_kept():
    for mine, theirs in zip(run_loader("yes", start_step=2)[0], run_loader("no", start_step=2)[0], strict=True):
        assert all(torch.equal(mine.inputs[name], theirs.inputs[name]) for name in theirs.inputs)
