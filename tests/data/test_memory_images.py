"""Images kept decoded: crops of the same boxes as image by image, whatever is kept, read, broken or resumed."""

import io

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny import tiny_config
from torch.nn import functional

from ijepa_hf.data import memory_images
from ijepa_hf.data.collator import BatchMaker, IJepaDataCollator
from ijepa_hf.data.loader import PlainLoader
from ijepa_hf.data.memory_images import CannotKeepError, MemoryCrops, decode_all, keep_in_memory, resize_parts
from ijepa_hf.data.order import SampleKey, StepBatchSampler, StreamLayout
from ijepa_hf.data.reading import CropReader, ImageRows, PretrainingImages
from ijepa_hf.recipes.arguments import DataArguments
from ijepa_hf.training.images import open_training_images


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
    """Everything but the pixels is equal, and they are within 2 of 255, seldom more than 1."""
    for mine, theirs in zip(one, other, strict=True):
        assert {**mine, "pixel_values": None} == {**theirs, "pixel_values": None}
        assert mine["pixel_values"].dtype == theirs["pixel_values"].dtype == torch.uint8
        off = (mine["pixel_values"].int() - theirs["pixel_values"].int()).abs()
        assert off.max() <= 2
        assert (off > 1).float().mean() < 0.01


# -- the resizer -----------------------------------------------------------------------------------------------------


@given(data=st.data(), height=st.integers(1, 60), width=st.integers(1, 60), channels=st.sampled_from([1, 3]))
def test_parts_resized_together_are_those_of_torchs_filter(data, height, width, channels):
    size = data.draw(st.tuples(st.integers(2, 48), st.integers(2, 48)))
    boxes = []
    for _ in range(data.draw(st.integers(1, 5))):
        high, wide = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
        top, left = data.draw(st.integers(0, height - high)), data.draw(st.integers(0, width - wide))
        boxes.append((top, left, high, wide))
    generator = np.random.default_rng(data.draw(st.integers(0, 99)))
    pixels = generator.integers(0, 256, (len(boxes), channels, height, width), dtype=np.uint8)
    extreme = data.draw(st.booleans())
    images = torch.from_numpy(np.where(pixels > 127, 255, 0).astype(np.uint8) if extreme else pixels)
    resized = resize_parts(images, boxes, size)
    for image, (top, left, high, wide), result in zip(images, boxes, resized, strict=True):
        part = image[:, top : top + high, left : left + wide].float()
        expected = functional.interpolate(part[None], size=size, mode="bilinear", antialias=True)[0]
        assert (result.float() - expected).abs().max() < 2


def test_a_part_of_the_results_size_keeps_its_pixels():
    for side in (32, 64):
        images = torch.arange(2 * side * side, dtype=torch.int32).to(torch.uint8).view(2, 1, side, side)
        part = resize_parts(images, [(3, 5, 16, 20)] * 2, (16, 20))
        assert torch.equal(part, images[:, :, 3:19, 5:25])


def test_more_images_than_are_resized_together_are_resized_each_by_itself():
    images = torch.randint(0, 256, (150, 3, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    boxes = [(number % 3, number % 5, 5 + number % 4, 7) for number in range(150)]
    alone = [resize_parts(images[n : n + 1], boxes[n : n + 1], (8, 8)) for n in range(150)]
    assert (resize_parts(images, boxes, (8, 8)).int() - torch.cat(alone).int()).abs().max() <= 1


# -- the same crops --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.3, 1.0])
@pytest.mark.parametrize(("shape", "size"), [((32, 32, 3), (32, 32)), ((20, 28), (24, 16)), ((70, 66, 3), (64, 64))])
@pytest.mark.parametrize("num_channels", [1, 3])
def test_crops_from_memory_are_those_read_one_by_one(shape, size, scale, num_channels):
    rows = image_rows(noise(9, *shape), num_channels)
    crops = reader(rows, size, scale)
    from_memory, one_by_one = kept(rows, crops), PretrainingImages(rows, crops)
    for epoch in (0, 3):
        keys = [SampleKey(epoch, epoch * 2, slot, image) for slot, image in enumerate((4, 8, 0, 4, 1))]
        assert_same(from_memory.__getitems__(keys), one_by_one.__getitems__(keys))
        assert_same([from_memory[keys[1]]], [one_by_one[keys[1]]])


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


def loaded(dataset, *, workers=0, start=0, batch=6, rank=0, ranks=1):
    sampler = StepBatchSampler(40, batch, 9, 0, start_step=start, rank=rank, num_ranks=ranks)
    collator = IJepaDataCollator(tiny_config(), seed=0, global_batch_size=sampler.global_batch_size)
    batches = PlainLoader(dataset, BatchMaker(collator), batch_sampler=sampler, num_workers=workers)
    return [batch.inputs for batch in batches]


@pytest.mark.parametrize("changes", [{"workers": 2}, {"start": 4}, {"batch": 3, "rank": 1, "ranks": 2}])
def test_workers_restarts_and_ranks_get_the_same_batches_from_memory(changes):
    pictures = noise(40, 32, 32, 3)
    pictures[4] = pictures[31] = b"no picture"
    rows = image_rows(pictures)
    images = kept(rows, reader(rows))
    whole = loaded(images)[changes.get("start", 0) :]
    batches = loaded(images, **changes)
    assert len(batches) == len(whole) > 0
    for mine, theirs in zip(batches, whole, strict=True):
        slots = slice(3, None) if "rank" in changes else slice(None)
        assert all(torch.equal(mine[name], theirs[name][slots]) for name in theirs)


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
    assert keep_in_memory(rows, reader(rows, (1, 8)), "auto", num_reads=5) is None
    monkeypatch.setattr(memory_images, "AUTOMATIC_BYTES", 5 * 8 * 8 * 3 - 1)
    decoded = []
    original = rows.images.decode
    monkeypatch.setattr(rows.images, "decode", lambda row: decoded.append(row) or original(row))
    assert keep_in_memory(rows, crops, "auto", num_reads=5) is None
    assert len(decoded) == 1  # the first image says how large all are
    assert keep_in_memory(rows, crops, "yes", num_reads=5) is not None


# -- a run's images --------------------------------------------------------------------------------------------------


def run_loader(keep: str, rank: int = 0, start_step: int = 0, num_steps: int = 6):
    data = DataArguments(dataset_name="digits", max_train_samples=48, keep_images_in_memory=keep)
    images = open_training_images(data, tiny_config(), num_ranks=1)
    crops = CropReader(images.column, (32, 32), 0.5, 0)
    make_batch = BatchMaker(IJepaDataCollator(tiny_config(), normalize=False, global_batch_size=8))
    return images.loader(
        crops, make_batch, [StreamLayout(0, 1, 0, 8, 1)], num_steps=num_steps, start_step=start_step, rank=rank,
    ), images, crops, make_batch  # fmt: skip


def test_a_run_keeps_its_images_where_it_reads_all_and_says_so_once(capsys):
    loader = run_loader("auto")[0]
    assert isinstance(loader.source, MemoryCrops)
    said = capsys.readouterr().out
    assert said.count("images in memory") == 1
    assert "48, decoded" in said
    assert isinstance(run_loader("auto", rank=1)[0].source, MemoryCrops)
    # a run that goes on decides as it did at its start
    assert isinstance(run_loader("auto", start_step=5)[0].source, MemoryCrops)
    for other in (run_loader("no")[0], run_loader("auto", num_steps=5)[0]):
        assert isinstance(other.source, PretrainingImages)
    capsys.readouterr()
    _, images, crops, make_batch = run_loader("yes")
    assert "images in memory" in capsys.readouterr().out
    images.first_batch(crops, make_batch, size=4)  # a few are read faster than all are decoded
    assert not capsys.readouterr().out
