"""Preparation: shards hold what Pillow makes of the pictures, and the same bytes after any interruption."""

import errno
import io
import json
import os
import re
import signal
import subprocess
import tarfile
import time
from dataclasses import asdict
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from image_zoo import write_zoo
from PIL import Image
from warm_python import warm_python

from ijepa_hf.commands.prepare import build_parser
from ijepa_hf.data import reading
from ijepa_hf.data.decoding import decode_image
from ijepa_hf.data.prepare import prepare as preparation
from ijepa_hf.data.prepare import shards
from ijepa_hf.data.prepare.prepare import PrepareSettings, parse_size
from ijepa_hf.data.sources import builtin, opening
from ijepa_hf.data.sources.opening import ImageSource, load_split

# the tests compare two workers with none, also where there is one core
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def noise(number, size=(12, 10)):
    """A picture of its own for every number."""
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def encode(picture, kind="PNG", **options):
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def write_pictures(folder, count, size=(12, 10), broken=()):
    """A folder of noise pictures, of which some are no pictures; returns it."""
    folder.mkdir(parents=True)
    for number in range(count):
        content = b"no picture" if number in broken else encode(noise(number, size))
        (folder / f"{number:04d}.png").write_bytes(content)
    return folder


def prepare(source, out, **options):
    return preparation.prepare(source, out, PrepareSettings(**options))


def prepared(source, out, split="train", **options):
    """Prepares, and returns the rows of the shards with images as bytes."""
    prepare(source, out, split_name=split, **options)
    rows = load_split(ImageSource(str(out)), split)
    column = opening.find_image_column(rows)
    if isinstance(rows.features[column], datasets.Image):
        rows = rows.cast_column(column, datasets.Image(decode=False))
    return rows


def opened(row, column="image"):
    """The picture of a row, as Pillow reads it."""
    assert row[column]["bytes"] is not None
    picture = Image.open(io.BytesIO(row[column]["bytes"]))
    picture.load()
    return picture


def manifest_of(out, split="train"):
    return json.loads((out / "manifest.json").read_text())["splits"][split]


def files_of(folder):
    """Every file below a folder, hidden ones as well, with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def prepare_one(tmp_path, name, content, **options):
    """The row that a folder with one picture becomes."""
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / name).write_bytes(content)
    (row,) = prepared(tmp_path / "one", tmp_path / "out", **options)
    return row


def shrunk_by_pillow(picture, size):
    return np.asarray(picture.resize(size, Image.Resampling.BILINEAR))


# -- pictures --------------------------------------------------------------------------------------------------------


def test_larger_pictures_are_shrunk_to_the_shortest_side_and_smaller_ones_stay_the_very_file(tmp_path):
    tall, wide, small = noise(0, (20, 50)), noise(1, (31, 20)), noise(2, (10, 90))
    for name, picture in zip("abc", (tall, wide, small), strict=True):
        (tmp_path / "in").mkdir(exist_ok=True)
        picture.save(tmp_path / "in" / f"{name}.png", compress_level=0)  # as this package would not write it
    rows = prepared(tmp_path / "in", tmp_path / "out", shortest_side=10)
    # 31 / 2 is rounded to the even 16
    for row, picture, size in zip(rows, (tall, wide), ((10, 25), (16, 10)), strict=False):
        assert opened(row).format == "PNG"
        assert np.array_equal(np.asarray(opened(row)), shrunk_by_pillow(picture, size))
    assert rows[2]["image"]["bytes"] == (tmp_path / "in" / "c.png").read_bytes()
    assert [row["image"]["path"] for row in rows] == ["a.png", "b.png", "c.png"]
    assert manifest_of(tmp_path / "out")["num_shrunk"] == 2


def test_a_line_one_pixel_wide_stays_as_it_is(tmp_path):
    line = noise(0, (1, 40))
    row = prepare_one(tmp_path, "a.png", encode(line), shortest_side=8, image_format="png")
    assert np.array_equal(np.asarray(opened(row)), np.asarray(line))
    assert opened(row).size == (1, 40)


@pytest.mark.parametrize(("kind", "suffix"), [("jpeg", ".jpg"), ("png", ".png"), ("webp", ".webp"), ("bmp", ".bmp")])
def test_every_picture_is_written_in_the_format_that_is_asked_for(tmp_path, kind, suffix):
    picture = noise(0)
    quality = {} if kind in ("png", "bmp") else {"quality": 40}
    row = prepare_one(tmp_path, "a.bmp", encode(picture, "BMP"), image_format=kind, **quality)
    assert row["image"]["bytes"] == encode(picture, kind.upper(), **quality)
    assert row["image"]["path"] == f"a{suffix}"


@pytest.mark.parametrize(("kind", "compression"), [("bmp", "UNCOMPRESSED"), ("png", "ZSTD")])
def test_uncompressed_pictures_are_in_uncompressed_shards(tmp_path, kind, compression):
    prepare_one(tmp_path, "a.png", encode(noise(0)), image_format=kind)
    (shard,) = (tmp_path / "out" / "data").iterdir()
    assert pq.read_metadata(shard).row_group(0).column(0).compression == compression


@pytest.mark.parametrize("image_format", ["png", "bmp"])
def test_pictures_of_all_kinds_are_written_as_training_reads_them_and_lose_metadata(tmp_path, image_format):
    names = write_zoo(tmp_path / "in")
    rows = prepared(tmp_path / "in", tmp_path / "out", image_format=image_format, max_broken_share=1.0)
    for row, name in zip(rows, names, strict=True):
        for channels in (1, 3):
            before = decode_image((tmp_path / "in" / name).read_bytes(), channels)
            assert np.array_equal(decode_image(row["image"], channels), before), name
        picture = opened(row)
        wide = {"grayscale-16-bit.png": "PNG", "float.tif": "TIFF"}
        assert picture.format == wide.get(name, image_format.upper())
        assert (getattr(picture, "n_frames", 1), "transparency" in picture.info) == (1, False)
        assert name == "float.tif" or not picture.getexif()
    gray = {"grayscale.png", "bilevel.png"}
    assert {name for row, name in zip(rows, names, strict=True) if opened(row).mode == "L"} == gray


def test_keep_shrinks_lossy_files_to_their_own_format_at_quality_95_and_all_others_to_png(tmp_path):
    picture, kinds = noise(0, (40, 20)), ("BMP", "JPEG", "PNG", "TIFF", "WEBP")
    (tmp_path / "in").mkdir()
    for kind in kinds:
        (tmp_path / "in" / f"{kind}.{kind.lower()}").write_bytes(encode(picture, kind))
    rows = prepared(tmp_path / "in", tmp_path / "out", shortest_side=10)
    for row, kind in zip(rows, kinds, strict=True):
        seen = Image.open(tmp_path / "in" / f"{kind}.{kind.lower()}")
        pixels = Image.fromarray(shrunk_by_pillow(seen, (20, 10)))
        lossy = kind in ("JPEG", "WEBP")
        expected = encode(pixels, kind, quality=95) if lossy else encode(pixels)
        assert row["image"]["bytes"] == expected, kind


def test_16_bit_pictures_are_shrunk_in_16_bits_whatever_the_format(tmp_path):
    ramp = np.arange(20 * 30, dtype=np.uint16).reshape(20, 30) * 109
    assert ramp.max() > 65000
    row = prepare_one(tmp_path, "a.png", encode(Image.fromarray(ramp)), image_format="webp", shortest_side=10)
    # Pillow shrinks floats with the same filter; 16-bit whole numbers it truncates
    floats = Image.fromarray(ramp.astype(np.float32)).resize((15, 10), Image.Resampling.BILINEAR)
    assert (opened(row).format, row["image"]["path"]) == ("PNG", "a.png")
    assert np.abs(np.asarray(opened(row)).astype(float) - np.asarray(floats)).max() <= 0.51


def test_pictures_are_turned_upright_before_they_are_shrunk(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    data = encode(noise(0, (40, 20)), "JPEG", exif=exif)
    row = prepare_one(tmp_path, "a.jpg", data, shortest_side=10, image_format="png")
    upright = Image.open(io.BytesIO(data)).transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(np.asarray(opened(row)), shrunk_by_pillow(upright, (10, 20)))


# -- arrays ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["channels first", "channels last", "flat"])
def test_arrays_are_shrunk_band_by_band_and_stay_of_their_type(tmp_path, layout):
    values = np.random.default_rng(0).integers(0, 65536, (3, 5, 20, 30), dtype=np.uint16)
    given = {"channels first": values, "channels last": np.moveaxis(values, 1, -1), "flat": values[:, 0]}[layout]
    np.save(tmp_path / "a.npy", np.ascontiguousarray(given))
    rows = prepared(tmp_path / "a.npy", tmp_path / "out", shortest_side=10)
    shape = {"channels first": (5, 10, 15), "channels last": (10, 15, 5), "flat": (10, 15)}[layout]
    assert rows.features["image"] == (datasets.Array2D if layout == "flat" else datasets.Array3D)(shape, "uint16")
    for number, row in enumerate(rows.with_format("numpy", dtype=np.uint16)):
        got = {"channels last": np.moveaxis(row["image"], -1, 0), "flat": row["image"][None]}.get(layout, row["image"])
        for band, plane in zip(values[number], got, strict=False):
            floats = Image.fromarray(band.astype(np.float32)).resize((15, 10), Image.Resampling.BILINEAR)
            assert np.abs(plane.astype(float) - np.asarray(floats)).max() <= 0.51


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float16", "float32", "float64"])
def test_arrays_that_are_small_enough_stay_bit_for_bit(tmp_path, dtype):
    values = (np.random.default_rng(0).random((3, 4, 6, 5)) * 200).astype(dtype)
    np.save(tmp_path / "a.npy", values)
    rows = prepared(tmp_path / "a.npy", tmp_path / "out", shortest_side=5)
    assert rows.features["image"] == datasets.Array3D((4, 6, 5), dtype)
    assert np.array_equal(np.stack(list(rows.with_format("numpy", dtype=np.dtype(dtype))["image"])), values)


def test_float_arrays_are_not_rounded_and_those_that_are_not_finite_are_skipped(tmp_path):
    values = np.random.default_rng(0).random((30, 2, 8, 8)).astype(np.float32)
    values[7, 1, 2, 3] = np.nan
    np.save(tmp_path / "a.npy", values)
    rows = prepared(tmp_path / "a.npy", tmp_path / "out", shortest_side=4)
    got = np.stack(list(rows.with_format("numpy", dtype=np.float32)["image"]))
    by_pillow = [
        [np.asarray(Image.fromarray(band).resize((4, 4), Image.Resampling.BILINEAR)) for band in image]
        for image in np.delete(values, 7, axis=0)
    ]
    assert np.abs(got - np.array(by_pillow)).max() < 1e-6
    assert manifest_of(tmp_path / "out")["skipped"] == [
        {"row": 7, "path": None, "reason": "1 of 128 values are NaN or infinite."}
    ]


def test_an_axis_of_channels_that_cannot_be_told_has_to_be_named(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (2, 9, 6, 6), dtype=np.uint8)
    np.save(tmp_path / "a.npy", values)
    with pytest.raises(ValueError, match=r"shape \(9, 6, 6\).* write --channel_axis 0"):
        prepare(tmp_path / "a.npy", tmp_path / "out", shortest_side=3)
    rows = prepared(tmp_path / "a.npy", tmp_path / "first", shortest_side=3, channel_axis=0)
    assert rows.features["image"].shape == (9, 3, 3)
    rows = prepared(tmp_path / "a.npy", tmp_path / "last", shortest_side=3, channel_axis=-1)
    assert rows.features["image"].shape == (4, 3, 6)  # 9 x 6 pixels of 6 channels; 4.5 is rounded to the even 4
    assert not (tmp_path / "out").exists()


# -- sources ---------------------------------------------------------------------------------------------------------


def test_folders_keep_their_labels(tmp_path):
    for number, name in enumerate(("dog/0.png", "cat/1.png", "dog/2.png")):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        noise(number).save(tmp_path / "in" / name)
    rows = prepared(tmp_path / "in", tmp_path / "out")
    assert rows.features == datasets.Features(
        {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    assert list(rows["label"]) == [0, 1, 1]
    assert [row["image"]["bytes"] for row in rows] == [encode(noise(number)) for number in (1, 0, 2)]


def test_tables_of_paths_keep_their_columns_and_tell_which_path_leads_nowhere(tmp_path):
    write_pictures(tmp_path / "pictures", 3)
    names = ["0002.png", "gone.png", "0000.png"]
    lines = "".join(f"pictures/{name},{number},{name[:1]}\n" for number, name in enumerate(names))
    (tmp_path / "a.csv").write_text(f"path,age,text\n{lines}")
    rows = prepared(tmp_path / "a.csv", tmp_path / "out", max_broken_share=0.5)
    assert [opened(row, "path").tobytes() for row in rows] == [noise(2).tobytes(), noise(0).tobytes()]
    assert list(rows["age"]) == [0, 2]
    # decoded when read, though the table's paths were not
    assert datasets.load_dataset(str(tmp_path / "out"), split="train").features["path"] == datasets.Image()
    assert list(rows["text"]) == ["0", "0"]
    (skipped,) = manifest_of(tmp_path / "out")["skipped"]
    assert (skipped["row"], skipped["path"]) == (1, str(tmp_path / "pictures" / "gone.png"))
    assert "No such file" in skipped["reason"]


def test_tars_and_parquet_files_are_prepared_with_all_their_columns(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for number in range(3):
            for suffix, content in (("png", encode(noise(number))), ("cls", str(number).encode())):
                entry = tarfile.TarInfo(f"{number}.{suffix}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    rows = prepared(tmp_path / "a.tar", tmp_path / "tar out")
    assert list(rows["cls"]) == [0, 1, 2]
    assert [row["png"]["bytes"] for row in rows] == [encode(noise(number)) for number in range(3)]

    columns = {
        "image": [noise(number, (20, 30)) for number in range(3)],
        "boxes": [[[0, 0, number, 9]] for number in range(3)],
        "mask": [noise(10 + number, (20, 30)).convert("L") for number in range(3)],
        "name": ["a", None, "c"],
    }
    datasets.Dataset.from_dict(columns).to_parquet(str(tmp_path / "b.parquet"))
    rows = prepared(tmp_path / "b.parquet", tmp_path / "parquet out", shortest_side=10)
    assert list(rows["boxes"]) == columns["boxes"]
    assert list(rows["name"]) == columns["name"]
    for row, image, mask in zip(rows, columns["image"], columns["mask"], strict=True):
        assert np.array_equal(np.asarray(opened(row)), shrunk_by_pillow(image, (10, 15)))
        assert np.array_equal(np.asarray(row["mask"]), np.asarray(mask))
    summary = prepare(tmp_path / "b.parquet", tmp_path / "parquet out", shortest_side=10)
    assert "also where they hold positions in pixels: boxes, mask" in summary


def test_pictures_of_other_columns_are_taken_along_from_where_they_lie(tmp_path):
    noise(1, (30, 20)).save(tmp_path / "mask.png")
    kept = (tmp_path / "mask.png").read_bytes()
    image = {"bytes": encode(noise(0)), "path": None}
    mask = {"bytes": None, "path": str(tmp_path / "mask.png")}
    pq.write_table(pa.table({"image": [image], "mask": [mask]}), tmp_path / "a.parquet")
    (row,) = prepared(tmp_path / "a.parquet", tmp_path / "out", shortest_side=5).cast_column(
        "mask", datasets.Image(decode=False)
    )
    assert row["mask"] == {"bytes": kept, "path": "mask.png"}
    (tmp_path / "mask.png").unlink()
    with pytest.raises(ValueError, match=r"rows 0 to 0: a picture of another column than 'image'.*mask\.png"):
        prepare(tmp_path / "a.parquet", tmp_path / "again")


def test_shards_are_read_by_datasets_with_features_and_by_streams_a_shard_a_file(tmp_path, monkeypatch):
    monkeypatch.setitem(builtin.SHAPES_SPLITS, "train", (0, 40))
    source, out = load_split(ImageSource("shapes"), "train"), tmp_path / "out"
    prepare("shapes", out, shard_size="100KB")
    files = sorted((out / "data").iterdir())
    assert len(files) > 2
    loaded = datasets.load_dataset(str(out))
    assert list(loaded) == ["train"]
    assert loaded["train"].features == source.features
    for row, original in zip(loaded["train"], source, strict=True):
        assert row["image"].tobytes() == original["image"].tobytes()
        assert row["segmentation"].tobytes() == original["segmentation"].tobytes()
        assert [row[name] for name in ("label", "boxes", "box_classes", "nearest_distance")] == [
            original[name] for name in ("label", "boxes", "box_classes", "nearest_distance")
        ]
    stream = datasets.load_dataset(str(out), split="train", streaming=True)
    assert stream.num_shards == len(files)
    assert [row["count"] for row in stream] == list(source["count"])
    ours = opening.open_stream(ImageSource(str(out)), "train").rows
    assert ours.num_shards == len(files)
    assert [row["image"]["bytes"] for row in ours] == [
        row["image"]["bytes"] for row in source.cast_column("image", datasets.Image(decode=False))
    ]


def test_another_split_may_be_added_and_any_name_of_one_is_found_again(tmp_path):
    pictures = [noise(number) for number in range(4)]
    saved = {"train": datasets.Dataset.from_dict({"image": pictures[:3]})}
    saved["unlabeled"] = datasets.Dataset.from_dict({"image": pictures[3:]})
    datasets.DatasetDict(saved).save_to_disk(str(tmp_path / "in"))
    prepare(tmp_path / "in", tmp_path / "out")
    before = files_of(tmp_path / "out" / "data")
    summary = prepare(tmp_path / "in", tmp_path / "out", split_name="unlabeled")
    assert f"--dataset_name {tmp_path / 'out'} --streaming --train_split_name unlabeled" in summary
    after = files_of(tmp_path / "out" / "data")
    assert set(after) == {"train-00000-of-00001.parquet", "unlabeled-00000-of-00001.parquet"}
    assert after["train-00000-of-00001.parquet"] == before["train-00000-of-00001.parquet"]
    loaded = datasets.load_dataset(str(tmp_path / "out"))
    assert {name: len(split) for name, split in loaded.items()} == {"train": 3, "unlabeled": 1}
    found = load_split(ImageSource(str(tmp_path / "out")), "unlabeled")
    assert found[0]["image"].tobytes() == pictures[3].tobytes()
    # a split of other columns would make the folder unreadable
    np.save(tmp_path / "a.npy", np.zeros((2, 4, 4), np.uint8))
    datasets.DatasetDict(validation=load_split(ImageSource(str(tmp_path / "a.npy")), "train")).save_to_disk(
        str(tmp_path / "arrays")
    )
    with pytest.raises(
        ValueError, match=r"'train' with other columns or shapes: image \(Image\) instead of image \(Ar"
    ):
        prepare(tmp_path / "arrays", tmp_path / "out", split_name="validation")
    assert files_of(tmp_path / "out" / "data") == after


# -- shards ----------------------------------------------------------------------------------------------------------


def test_shards_keep_to_their_size_and_row_groups_are_small(tmp_path):
    source = write_pictures(tmp_path / "in", 230, size=(4, 4))
    size = len(encode(noise(0, (4, 4))))
    prepare(source, tmp_path / "one")
    (file,) = (tmp_path / "one" / "data").iterdir()
    metadata = pq.ParquetFile(file).metadata
    assert [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)] == [100, 100, 30]
    prepare(source, tmp_path / "many", shard_size=size * 50)
    files = sorted((tmp_path / "many" / "data").iterdir())
    counts = [pq.ParquetFile(file).metadata.num_rows for file in files]
    assert sum(counts) == 230
    row = 0
    for count, shard in zip(counts, manifest_of(tmp_path / "many")["shards"], strict=True):
        contents = [len((source / f"{number:04d}.png").read_bytes()) for number in range(row, row + count)]
        following = source / f"{row + count:04d}.png"
        assert sum(contents) <= size * 50
        assert not following.exists() or sum(contents) + len(following.read_bytes()) > size * 50
        assert (shard["rows"], shard["first_row"], shard["last_row"]) == (count, row, row + count - 1)
        assert shard["bytes"] == (tmp_path / "many" / shard["name"]).stat().st_size
        row += count
    prepare(source, tmp_path / "least", shard_size=1, max_samples=3)
    assert len(list((tmp_path / "least" / "data").iterdir())) == 3


def test_row_groups_of_large_rows_hold_16_mb_at_most(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((5, 2, 1000, 1000), np.float32))
    prepare(tmp_path / "a.npy", tmp_path / "out")
    (file,) = (tmp_path / "out" / "data").iterdir()
    metadata = pq.ParquetFile(file).metadata
    assert [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)] == [2, 2, 1]


def test_sizes_are_read_with_their_units():
    values = {"100MB": 100_000_000, "1.5 kb": 1500, "2GB": 2_000_000_000, "77": 77, 88: 88, "5B": 5}
    assert {size: parse_size(size) for size in values} == values
    for size in ("", "MB", "-1MB", "0MB", "1TB", "1e6", "0.5"):
        with pytest.raises(ValueError, match=re.escape(f"shard_size={size!r} must be a number of bytes")):
            parse_size(size)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A source with broken pictures, and what it becomes without any interruption."""
    folder = tmp_path_factory.mktemp("whole")
    source = write_pictures(folder / "in", 60, size=(14, 12), broken=(0, 17, 18, 40, 59))
    prepare(source, folder / "out", **OPTIONS)
    assert len(list((folder / "out" / "data").iterdir())) > 5
    return source, files_of(folder / "out")


OPTIONS = {"shortest_side": 8, "shard_size": "2KB", "max_broken_share": 0.2}


def test_two_workers_write_the_bytes_of_none(whole, tmp_path):
    source, expected = whole
    prepare(source, tmp_path / "out", **OPTIONS, num_workers=2)
    assert files_of(tmp_path / "out") == expected


@pytest.mark.parametrize("call", range(1, 27, 5))
def test_a_command_that_dies_anywhere_goes_on_to_the_same_bytes(whole, tmp_path, monkeypatch, call):
    source, expected = whole
    calls = 0

    class Death(BaseException):
        pass

    def die_at(function):
        def dying(*args, **options):
            nonlocal calls
            calls += 1
            if calls == call:
                raise Death
            return function(*args, **options)

        return dying

    with monkeypatch.context() as patch:
        # each a place between two states of the disk; the writer's tidying up is what a killed process lacks
        patch.setattr(shards, "write_json_atomically", die_at(shards.write_json_atomically))
        patch.setattr(shards.os, "replace", die_at(os.replace))
        patch.setattr(shards.ShardWriter, "close", lambda self: None)
        with pytest.raises(Death):
            prepare(source, tmp_path / "out", **OPTIONS)
    prepare(source, tmp_path / "out", **OPTIONS)
    assert files_of(tmp_path / "out") == expected


def test_a_killed_process_goes_on_where_it_was_and_half_a_data_set_is_not_read(tmp_path, child_environment):
    source = write_pictures(tmp_path / "in", 250, size=(120, 110), broken=(3,))
    options = {"shortest_side": 60, "shard_size": "100KB"}
    prepare(source, tmp_path / "whole", **options)
    # slowed down, so that it is still at work when it is killed
    code = f"""
import time
from ijepa_hf.data.prepare import rows
from ijepa_hf.data.prepare.prepare import PrepareSettings, prepare
rewrite = rows.rewrite_picture
rows.rewrite_picture = lambda *arguments: time.sleep(0.02) or rewrite(*arguments)
prepare({str(source)!r}, {str(tmp_path / "out")!r}, PrepareSettings(**{options!r}))
"""
    child = subprocess.Popen([*warm_python(), "-c", code], env=child_environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and child.poll() is None:
        manifest = tmp_path / "out" / "manifest.json"
        if manifest.is_file() and len(manifest_of(tmp_path / "out")["shards"]) >= 3:
            break
        time.sleep(0.005)
    child.kill()
    assert child.wait() == -signal.SIGKILL  # in mid-run, not after it
    begun = manifest_of(tmp_path / "out")
    assert 3 <= len(begun["shards"]) < len(manifest_of(tmp_path / "whole")["shards"])
    with pytest.raises(FileNotFoundError, match="holds no image"):
        load_split(ImageSource(str(tmp_path / "out")), "train")
    first = tmp_path / "out" / begun["shards"][0]["name"]
    written = first.stat().st_ino
    prepare(source, tmp_path / "out", **options)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    finished = tmp_path / "out" / manifest_of(tmp_path / "out")["shards"][0]["name"]
    assert finished.stat().st_ino == written  # moved, not written again


def test_half_a_manifest_of_a_command_that_was_killed_at_its_start_is_no_hindrance(whole, tmp_path):
    source, expected = whole
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".manifest.json.partial").write_text("{")
    prepare(source, tmp_path / "out", **OPTIONS)
    assert files_of(tmp_path / "out") == expected


def test_a_finished_data_set_is_left_alone_and_says_so(whole, tmp_path):
    source, _ = whole
    first = prepare(source, tmp_path / "out", **OPTIONS)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert prepare(source, tmp_path / "out", **OPTIONS) == f"already finished; {first}"
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == times


def test_overwrite_starts_again_and_leaves_nothing_of_the_old_split(whole, tmp_path):
    source, expected = whole
    prepare(source, tmp_path / "out", shard_size="1KB", max_broken_share=0.2)
    assert len(list((tmp_path / "out" / "data").iterdir())) != len(expected) - 1
    prepare(source, tmp_path / "out", **OPTIONS, overwrite=True)
    assert files_of(tmp_path / "out") == expected


# -- what is refused, and what is skipped ----------------------------------------------------------------------------


def test_other_settings_or_another_source_are_refused_with_what_differs(tmp_path):
    source = write_pictures(tmp_path / "in", 3)
    prepare(source, tmp_path / "out")
    before = files_of(tmp_path / "out")
    with pytest.raises(
        ValueError, match="shortest_side was None and is now 8; shard_size was 100000000 and is now 9000"
    ):
        prepare(source, tmp_path / "out", shortest_side=8, shard_size="9KB")
    (source / "0001.png").write_bytes(encode(noise(9)))
    os.utime(source / "0001.png", (1, 1))
    with pytest.raises(ValueError, match="fingerprint was .* or its files have changed.*--overwrite to replace it"):
        prepare(source, tmp_path / "out")
    with pytest.raises(ValueError, match="source was .*in' and is now 'digits'"):
        prepare("digits", tmp_path / "out")
    assert files_of(tmp_path / "out") == before
    rows = prepared(source, tmp_path / "out", overwrite=True)
    assert rows[1]["image"]["bytes"] == encode(noise(9))


def test_a_shard_that_is_gone_or_damaged_is_noticed(tmp_path):
    source = write_pictures(tmp_path / "in", 9)
    prepare(source, tmp_path / "out", shard_size="1KB")
    shard = tmp_path / "out" / manifest_of(tmp_path / "out")["shards"][1]["name"]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match="shard 1 of split 'train' is missing or not of the size.*--overwrite"):
        prepare(source, tmp_path / "out", shard_size="1KB")
    shard.unlink()
    with pytest.raises(ValueError, match="shard 1 of split 'train' is missing"):
        prepare(source, tmp_path / "out", shard_size="1KB")


def test_folders_of_other_things_and_places_in_the_source_are_refused(tmp_path):
    source = write_pictures(tmp_path / "in", 2)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="holds other files"):
            prepare(source, tmp_path / "other", overwrite=overwrite)
    assert files_of(tmp_path / "other") == {"thesis.tex": b"precious"}
    with pytest.raises(ValueError, match="is a file"):
        prepare(source, tmp_path / "other" / "thesis.tex")
    for place in (source / "out", source / "deep" / "out"):
        with pytest.raises(ValueError, match="lies inside the other"):
            prepare(source, place)
    prepare(source, tmp_path / "out")
    for again in (tmp_path / "out", tmp_path / "out" / "data"):
        with pytest.raises(ValueError, match="lies inside the other"):
            prepare(again, tmp_path / "out", overwrite=True)
    (tmp_path / "out" / "manifest.json").write_text('{"name": "an app"}')
    with pytest.raises(ValueError, match=r"manifest\.json is not one that this version of ijepa-hf prepare wrote"):
        prepare(source, tmp_path / "out", overwrite=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shortest_side": 0}, "shortest_side=0 must be at least 1"),
        ({"image_format": "gif"}, "image_format='gif' must be one of keep, jpeg, png, webp, bmp"),
        ({"quality": 101}, "quality=101 must be from 1 to 100"),
        ({"quality": 90, "image_format": "png"}, "quality=90 is of no use"),
        ({"quality": 90, "image_format": "bmp"}, "quality=90 is of no use with image_format='bmp'"),
        ({"channel_axis": 1}, "channel_axis=1 must be 0"),
        ({"num_workers": -1}, "num_workers=-1 must be at least 0"),
        ({"max_samples": 0}, "max_samples=0 must be at least 1"),
        ({"max_broken_share": 5}, "max_broken_share=5 must be from 0 to 1"),
        ({"split_name": "train[:10%]"}, "must be a split's whole name"),
        ({"split_name": "test"}, "has no split 'test'; it has 'train'"),
        ({"image_column_name": "img"}, "image_column_name='img' is no column"),
    ],
)
def test_bad_values_are_refused_before_anything_is_written(tmp_path, options, message):
    source = write_pictures(tmp_path / "in", 1)
    with pytest.raises(ValueError, match=re.escape(message)):
        prepare(source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_integers_without_a_range_are_refused(tmp_path):
    features = datasets.Features({"image": datasets.Array2D((2, 2), "int64")})
    datasets.Dataset.from_dict({"image": [[[1, 2], [3, 4]]]}, features=features).to_parquet(
        str(tmp_path / "a.parquet")
    )
    with pytest.raises(ValueError, match="arrays of int64, which have no stated range"):
        prepare(tmp_path / "a.parquet", tmp_path / "out")


def test_broken_images_are_skipped_and_named_with_the_reason(whole):
    source, expected = whole
    manifest = json.loads(expected["manifest.json"])["splits"]["train"]
    assert [row["row"] for row in manifest["skipped"]] == [0, 17, 18, 40, 59]
    assert [row["path"] for row in manifest["skipped"]] == [
        str(source / f"{row['row']:04d}.png") for row in manifest["skipped"]
    ]
    assert all("UnidentifiedImageError" in row["reason"] for row in manifest["skipped"])
    assert (manifest["num_images"], manifest["num_shrunk"], manifest["finished"]) == (55, 55, True)
    readable = [path for path in source.iterdir() if path.read_bytes() != b"no picture"]
    assert manifest["bytes_in"] == sum(path.stat().st_size for path in readable)


def test_a_picture_that_ends_too_early_and_a_row_without_one_are_skipped(tmp_path):
    good, cut = encode(noise(0, (60, 60))), encode(noise(1, (60, 60)))[:3000]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"image": [{"bytes": cut}, None, {"bytes": good}], "label": [0, 1, 2]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "a.parquet"))
    (row,) = prepared(tmp_path / "a.parquet", tmp_path / "out", max_broken_share=1)
    assert (row["image"]["bytes"], row["label"]) == (good, 2)
    skipped = manifest_of(tmp_path / "out")["skipped"]
    assert [row["row"] for row in skipped] == [0, 1]
    assert "truncated" in skipped[0]["reason"]
    assert skipped[1]["reason"] == "the row has no image."


def test_too_many_broken_images_stop_the_command_which_goes_on_when_more_are_allowed(tmp_path):
    source = write_pictures(tmp_path / "in", 10, broken=(2, 3, 9))
    with pytest.raises(
        ValueError, match=r"(?s)3 of the 10 images.*max_broken_share=0.2:.*row 2: .*0002\.png.*row 9: "
    ):
        prepare(source, tmp_path / "out", max_broken_share=0.2, shard_size="1KB")
    stopped = manifest_of(tmp_path / "out")
    assert [row["row"] for row in stopped["skipped"]] == [2, 3, 9]
    assert stopped["shards"]
    prepare(source, tmp_path / "out", max_broken_share=0.3, shard_size="1KB")
    prepare(source, tmp_path / "at once", max_broken_share=1.0, shard_size="1KB")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "at once")


def test_of_a_large_source_broken_images_are_judged_early(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "IMAGES_BEFORE_JUDGING", 10)
    source = write_pictures(tmp_path / "in", 100, broken=range(5, 100))
    with pytest.raises(ValueError, match="5 of the 10 images seen so far"):
        prepare(source, tmp_path / "out")


def test_a_source_without_any_readable_image_is_an_error(tmp_path):
    source = write_pictures(tmp_path / "in", 3, broken=range(3))
    with pytest.raises(ValueError, match="none of the 3 images can be read, so that there is nothing"):
        prepare(source, tmp_path / "out", max_broken_share=1)


def test_a_full_disk_is_one_clear_error_and_the_command_goes_on_later(whole, tmp_path, monkeypatch):
    source, expected = whole
    calls, write_table = 0, pq.ParquetWriter.write_table

    def full(self, table, **options):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_table(self, table, **options)

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(OSError, match=r"out='.*out' cannot be written: No space left on device\. Make room"):
        prepare(source, tmp_path / "out", **OPTIONS)
    assert not list((tmp_path / "out").rglob("*.partial"))
    prepare(source, tmp_path / "out", **OPTIONS)
    assert files_of(tmp_path / "out") == expected


def test_a_folder_that_cannot_be_made_is_one_clear_error(tmp_path):
    source = write_pictures(tmp_path / "in", 1)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be written: Not a directory"):
        prepare(source, tmp_path / "file" / "out")


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_parser_gives_the_arguments_of_prepare_and_its_defaults(tmp_path):
    values = vars(build_parser().parse_args(["in", "out"]))
    assert list(values)[:2] == ["source", "out"]
    assert {name: values[name] for name in list(values)[2:]} == asdict(PrepareSettings())
    given = "in out --shortest_side 256 --image_format jpeg --quality 90 --channel_axis -1 --num_workers 4 --overwrite"
    values = vars(build_parser().parse_args(given.split()))
    assert (values["shortest_side"], values["quality"], values["channel_axis"], values["num_workers"]) == (
        256,
        90,
        -1,
        4,
    )
    assert values["overwrite"] is True


def test_the_summary_counts_names_the_first_reasons_and_says_what_to_type_next(tmp_path):
    source = write_pictures(tmp_path / "in", 20, broken=(1, 2, 3, 4))
    summary = prepare(source, tmp_path / "my out", shortest_side=5, max_broken_share=0.5, image_column_name="image")
    size = sum(path.stat().st_size for path in source.iterdir() if path.read_bytes() != b"no picture")
    lines = summary.splitlines()
    assert lines[0].startswith(f"{tmp_path / 'my out'}: 16 images of split 'train' in 1 shard, ")
    assert lines[0].endswith(f"(the images were {size / 1000:.1f} KB); 16 shrunk")
    assert lines[1] == f"skipped: 4 of 20 that cannot be read, all in {tmp_path / 'my out' / 'manifest.json'}"
    assert [line.split(":")[0] for line in lines[2:5]] == ["  row 1", "  row 2", "  row 3"]
    assert str(source / "0001.png") in lines[2]
    assert lines[2].endswith("UnidentifiedImageError: cannot identify image file")
    assert lines[5] == "  and 1 more"
    assert lines[6] == (
        f"next: ijepa-hf pretrain RECIPE --dataset_name '{tmp_path / 'my out'}' --streaming --image_column_name image"
    )


def test_torch_draws_the_same_numbers_after_preparing(tmp_path):
    source = write_pictures(tmp_path / "in", 1)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    prepare(source, Path(tmp_path / "out"))
    assert torch.equal(torch.rand(2), expected)
