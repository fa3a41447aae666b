"""Sources: whatever images are kept in, the very pixels come back, at random and as a stream."""

import io
import json
import tarfile
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from ijepa_hf.data.reading import ImageRows
from ijepa_hf.data.sources import arrays, builtin
from ijepa_hf.data.sources.builtin import load_digits, load_shapes
from ijepa_hf.data.sources.opening import (
    ImageSource,
    at_most,
    find_image_column,
    find_label_column,
    load_split,
    open_stream,
)
from ijepa_hf.data.sources.shapes import SHAPE_KINDS, draw_shape_scene


@pytest.fixture(scope="module")
def digits():
    return load_digits("train")


def noise(number, size=(12, 10)):
    """A picture of its own for every number."""
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def save(path, number):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise(number).save(path)


def load(path, split="train", **options):
    return load_split(ImageSource(str(path), **options), split)


def stream(path, split="train", **options):
    return open_stream(ImageSource(str(path), **options), split).rows


def numbers_of(dataset, among=range(12)):
    """Which noise pictures a data set holds, in its order, found by their pixels."""
    known = {noise(number).tobytes(): number for number in among}
    images = ImageRows(dataset, find_image_column(dataset), 3)
    return [known[images[index].tobytes()] for index in range(len(images))]


def numbers_of_stream(rows, column=None):
    known = {noise(number).tobytes(): number for number in range(12)}
    column = column or find_image_column(rows)
    found = []
    for row in rows:
        encoded = row[column]["bytes"]
        picture = Image.open(io.BytesIO(encoded) if encoded is not None else row[column]["path"])
        found.append(known[picture.convert("RGB").tobytes()])
    return found


def write_tar(path, rows):
    """A WebDataset tar of rows: for each a dict from the file name's end to bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for key, row in rows.items():
            for suffix, content in row.items():
                entry = tarfile.TarInfo(f"{key}.{suffix}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))


def encoded(number, kind="PNG"):
    buffer = io.BytesIO()
    noise(number).save(buffer, kind)
    return buffer.getvalue()


def write_parquet(path, numbers, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {"image": [noise(number) for number in numbers], **columns}
    datasets.Dataset.from_dict(rows).to_parquet(str(path))


# -- built in --------------------------------------------------------------------------------------------------------


def test_digits_are_all_of_scikit_learns_split_without_overlap_and_stratified():
    from sklearn.datasets import load_digits as load_scans

    scans = load_scans()
    parts = {split: load_digits(split) for split in ("train", "test")}
    assert [len(part) for part in parts.values()] == [1437, 360]
    counts = np.bincount(scans.target)
    for part, share in ((parts["train"], 0.8), (parts["test"], 0.2)):
        assert np.abs(np.bincount(part["label"]) - counts * share).max() <= 1
    first = parts["train"][0]
    index = next(i for i in range(len(scans.target)) if scans.target[i] == first["label"])
    shrunk = np.asarray(first["image"].resize((8, 8), Image.Resampling.BOX), dtype=float) / 255 * 16
    assert first["image"].size == (32, 32)
    # blurred by the enlargement, but the same scan
    assert np.corrcoef(shrunk.ravel(), scans.images[index].ravel())[0, 1] > 0.95
    with pytest.raises(ValueError, match="'train' and 'test'"):
        load_digits("validation")


def test_shapes_are_the_drawn_scenes_with_all_their_labels(monkeypatch):
    monkeypatch.setitem(builtin.SHAPES_SPLITS, "train", (0, 5))
    loaded = load("shapes")
    assert len(loaded) == 5
    assert loaded.features["label"].names == list(SHAPE_KINDS)
    assert find_image_column(loaded) == "image"  # not the segmentation
    assert find_label_column(loaded) == "label"
    for index, row in enumerate(loaded):
        scene = draw_shape_scene(0, index)
        assert row["image"].mode == "RGB"
        assert row["image"].tobytes() == scene.image.tobytes()
        assert row["segmentation"].mode == "L"
        assert np.array_equal(np.asarray(row["segmentation"]), scene.segmentation)
        assert (row["label"], row["count"]) == (scene.label, scene.count)
        assert row["nearest_distance"] == pytest.approx(scene.nearest_distance)
        assert row["boxes"] == scene.boxes.tolist()
        assert row["box_classes"] == scene.box_classes.tolist()


def test_shapes_have_two_splits_without_a_common_scene_of_which_the_larger_is_for_training(monkeypatch):
    assert {split: count for split, (_, count) in builtin.SHAPES_SPLITS.items()} == {"train": 5000, "test": 1000}
    monkeypatch.setattr(builtin, "SHAPES_SPLITS", {s: (seed, 60) for s, (seed, _) in builtin.SHAPES_SPLITS.items()})
    train, test = ({row["image"].tobytes() for row in load_shapes(split)} for split in ("train", "test"))
    assert len(train) == len(test) == 60
    assert not train & test
    with pytest.raises(ValueError, match="shapes has no split 'validation'; it has 'train' and 'test'"):
        load_shapes("validation")


# -- folders of pictures ---------------------------------------------------------------------------------------------


def test_a_flat_folder_has_all_its_pictures_whatever_they_are_called_and_no_labels(tmp_path):
    names = ("a.png", "eval_1.png", "test 2.png", "TRAIN.PNG", "z.bmp")
    for number, name in enumerate(names):
        save(tmp_path / name, number)
    loaded = load(tmp_path)
    assert loaded.column_names == ["image"]
    assert sorted(numbers_of(loaded)) == [0, 1, 2, 3, 4]
    assert find_label_column(loaded) is None


def test_folders_one_level_deep_are_classes(tmp_path):
    for number, name in enumerate(("cat/0.png", "cat/1.png", "dog/2.png", "test/3.png")):
        save(tmp_path / name, number)
    loaded = load(tmp_path)
    assert loaded.features["label"].names == ["cat", "dog", "test"]  # a class, as the others are no splits
    assert dict(zip(numbers_of(loaded), loaded["label"], strict=True)) == {0: 0, 1: 0, 2: 1, 3: 2}


@pytest.mark.parametrize(
    "names",
    [
        ("a/b/0.png", "a/c/1.png", "d/e/2.png"),  # deeper than classes
        ("0.png", "a/1.png", "a/b/2.png"),  # of any depth
        ("a/0.png", "a/1.png", "a/2.png"),  # only one
    ],
)
def test_other_folders_give_their_pictures_and_no_labels(tmp_path, names):
    for number, name in enumerate(names):
        save(tmp_path / name, number)
    loaded = load(tmp_path)
    assert loaded.column_names == ["image"]
    assert sorted(numbers_of(loaded)) == [0, 1, 2]


@pytest.mark.parametrize("under", ["", "data/"])
def test_folders_named_after_splits_are_splits_with_the_same_classes(tmp_path, under):
    names = ("train/cat/0.png", "train/dog/1.png", "val/dog/2.png", "test/cat/3.png")
    for number, name in enumerate(names):
        save(tmp_path / (under + name), number)
    for split, numbers, labels in (("train", [0, 1], [0, 1]), ("validation", [2], [1]), ("test", [3], [0])):
        loaded = load(tmp_path, split)
        assert numbers_of(loaded) == numbers
        assert list(loaded["label"]) == labels
        assert loaded.features["label"].names == ["cat", "dog"]
    with pytest.raises(ValueError, match="has no split 'val'; it has 'test', 'train', 'validation'"):
        load(tmp_path, "val")


def test_splits_need_no_classes(tmp_path):
    for number, name in enumerate(("train/0.png", "train/1.png", "test/2.png")):
        save(tmp_path / name, number)
    assert load(tmp_path).column_names == ["image"]
    assert numbers_of(load(tmp_path, "test")) == [2]


def test_files_beside_split_folders_are_not_mixed_in(tmp_path):
    for number, name in enumerate(("train/0.png", "test/1.png", "more/2.png")):
        save(tmp_path / name, number)
    with pytest.raises(ValueError, match=r"test and train look like splits, .* outside of them \(more\)"):
        load(tmp_path)


def test_hidden_files_and_what_archives_leave_behind_are_passed_over(tmp_path):
    save(tmp_path / "cat/0.png", 0)
    save(tmp_path / "dog/1.png", 1)
    for name in ("__MACOSX/cat/0.png", "cat/._0.png", ".thumbnails/0.png", ".DS_Store", "cat/.hidden.npy"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"no picture")
    loaded = load(tmp_path)
    assert numbers_of(loaded) == [0, 1]
    assert loaded.features["label"].names == ["cat", "dog"]


def test_a_path_may_hold_characters_of_patterns_and_lie_in_a_hidden_folder(tmp_path):
    folder = tmp_path / ".cache" / "birds [2]*?"
    for number in range(3):
        save(folder / f"[{number}].png", number)
    write_parquet(folder.with_name("shards [1]") / "*a.parquet", [4])
    assert numbers_of(load(folder)) == numbers_of_stream(stream(folder)) == [0, 1, 2]
    assert numbers_of(load(folder.with_name("shards [1]"))) == [4]


def test_a_metadata_file_adds_columns(tmp_path):
    for number in range(2):
        save(tmp_path / f"{number}.png", number)
    rows = [{"file_name": f"{number}.png", "label": 4 + number, "age": 30 + number} for number in range(2)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    loaded = load(tmp_path)
    assert numbers_of(loaded) == [0, 1]
    assert list(loaded["label"]) == [4, 5]
    assert list(loaded["age"]) == [30, 31]


# -- parquet and tar -------------------------------------------------------------------------------------------------


def test_a_folder_of_pictures_and_its_parquet_give_the_same_images(tmp_path):
    for number in range(3):
        save(tmp_path / "pictures" / f"{number}.png", number)
    folder = load(tmp_path / "pictures")
    shard = tmp_path / "shards" / "train-00000-of-00001.parquet"
    shard.parent.mkdir()
    folder.to_parquet(str(shard))
    for source in (shard, shard.parent):
        assert numbers_of(load(source)) == numbers_of(folder) == [0, 1, 2]


def test_parquet_shards_say_their_split_and_are_read_in_order(tmp_path):
    for index, numbers in enumerate(([0, 1], [2])):
        write_parquet(tmp_path / "data" / f"train-0000{index}-of-00002.parquet", numbers, label=numbers)
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", [3], label=[3])
    write_parquet(tmp_path / "data" / "unsupervised-00000-of-00001.parquet", [4], label=[4])
    for split, numbers in (("train", [0, 1, 2]), ("test", [3]), ("unsupervised", [4])):
        loaded, rows = load(tmp_path, split), stream(tmp_path, split)
        assert numbers_of(loaded) == numbers_of_stream(rows) == list(loaded["label"]) == numbers
    assert stream(tmp_path).num_shards == 2


def test_a_parquet_file_among_splits_that_says_none_is_refused(tmp_path):
    write_parquet(tmp_path / "train.parquet", [0])
    write_parquet(tmp_path / "test.parquet", [1])
    assert numbers_of(load(tmp_path, "test")) == [1]
    write_parquet(tmp_path / "more.parquet", [2])
    with pytest.raises(ValueError, match=r"say their split \(test, train\), 'more.parquet' does not"):
        load(tmp_path)


def test_pictures_in_parquet_that_no_feature_names_are_found(tmp_path):
    pairs = [{"bytes": encoded(number), "path": None} for number in range(2)]
    pyarrow.parquet.write_table(pa.table({"photo": pairs, "embedding": [b"0", b"1"]}), tmp_path / "pairs.parquet")
    assert numbers_of(load(tmp_path / "pairs.parquet")) == [0, 1]
    assert numbers_of_stream(stream(tmp_path / "pairs.parquet")) == [0, 1]
    raw = [encoded(number) for number in range(2)]
    pyarrow.parquet.write_table(pa.table({"image": raw, "thumbnail": raw}), tmp_path / "raw.parquet")
    assert numbers_of(load(tmp_path / "raw.parquet")) == [0, 1]
    named = load(tmp_path / "raw.parquet", image_column="thumbnail")
    assert isinstance(named.features["thumbnail"], datasets.Image)


def test_tars_of_a_web_dataset_keep_pictures_and_labels(tmp_path):
    for shard in range(2):
        rows = {str(n): {"png": encoded(n), "cls": str(9 - n).encode()} for n in range(2 * shard, 2 * shard + 2)}
        write_tar(tmp_path / f"{shard:05}.tar", rows)
    loaded, rows = load(tmp_path), stream(tmp_path)
    assert find_image_column(loaded) == find_image_column(rows) == "png"
    assert find_label_column(loaded) == find_label_column(rows) == "cls"
    assert numbers_of(loaded) == numbers_of_stream(rows) == [0, 1, 2, 3]
    assert list(loaded["cls"]) == [row["cls"] for row in rows] == [9, 8, 7, 6]
    assert rows.num_shards == 2
    assert numbers_of(load(tmp_path / "00001.tar")) == [2, 3]


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "webp"])
def test_a_tars_picture_column_is_found_under_any_suffix(tmp_path, suffix):
    kind = "WEBP" if suffix == "webp" else "JPEG"
    write_tar(tmp_path / "train-0000.tar", {"a": {suffix: encoded(0, kind), "txt": b"a caption"}})
    loaded = load(tmp_path)
    assert find_image_column(loaded) == suffix
    decoded = Image.open(io.BytesIO(encoded(0, kind))).convert("RGB")
    assert ImageRows(loaded, suffix, 3)[0].tobytes() == decoded.tobytes()


def test_the_label_in_a_tars_json_becomes_a_column(tmp_path):
    rows = {str(n): {"png": encoded(n), "json": json.dumps({"label": n + 3, "url": "x"}).encode()} for n in range(2)}
    write_tar(tmp_path / "birds-train-0.tar", rows)
    write_tar(tmp_path / "birds-test-0.tar", {"0": {"png": encoded(5), "json": b'{"caption": "a"}'}})
    loaded = load(tmp_path)
    assert numbers_of(loaded) == [0, 1]
    assert list(loaded["label"]) == [3, 4]
    assert find_label_column(load(tmp_path, "test")) is None


# -- tables of paths -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["csv", "tsv", "parquet"])
def test_a_table_of_paths_relative_or_absolute_gives_the_pictures_and_its_other_columns(tmp_path, form):
    for number in range(3):
        save(tmp_path / "pictures" / f"{number}.png", number)
    paths = ["pictures/0.png", str(tmp_path / "pictures/1.png"), "pictures/../pictures/2.png"]
    columns = {"file": paths, "label": [2, 1, 0], "photographer": ["x", "y", "z"]}
    table = tmp_path / f"list.{form}"
    if form == "parquet":
        pyarrow.parquet.write_table(pa.table(columns), table)
    else:
        separator = "," if form == "csv" else "\t"
        rows = [list(columns), *(map(str, row) for row in zip(*columns.values(), strict=True))]
        table.write_text("".join(separator.join(row) + "\n" for row in rows))
    loaded = load(table)
    assert loaded.column_names == ["file", "label", "photographer"]
    assert loaded.features["file"] == datasets.Image(decode=False)
    assert numbers_of(loaded) == [0, 1, 2]
    assert list(loaded["label"]) == [2, 1, 0]


def test_paths_without_a_known_suffix_or_in_several_columns_are_chosen_by_name(tmp_path):
    save(tmp_path / "0.png", 0)
    save(tmp_path / "1.png", 1)
    (tmp_path / "0.png").rename(tmp_path / "picture0")
    (tmp_path / "a.csv").write_text("odd,one,two\npicture0,1.png,1.png\n")
    assert numbers_of(load(tmp_path / "a.csv", image_column="odd").select_columns(["odd"])) == [0]
    with pytest.raises(ValueError, match=r"several columns of paths: \['one', 'two'\].*--image_column_name"):
        load(tmp_path / "a.csv")
    with pytest.raises(ValueError, match="image_column_name='three' is no column of paths .*'odd', 'one', 'two'"):
        load(tmp_path / "a.csv", image_column="three")


def test_only_the_first_path_of_a_table_has_to_lead_somewhere(tmp_path):
    save(tmp_path / "0.png", 0)
    (tmp_path / "a.csv").write_text("path\n0.png\nmissing.png\n")
    rows = ImageRows(load(tmp_path / "a.csv"), "path", 3)
    assert rows[0].tobytes() == noise(0).tobytes()
    with pytest.raises(ValueError, match=r"missing\.png"):
        rows[1]
    (tmp_path / "b.csv").write_text("path\nmissing.png\n0.png\n")
    with pytest.raises(FileNotFoundError, match=r"'missing\.png'.*absolute or relative to the folder of the table"):
        load(tmp_path / "b.csv")
    (tmp_path / "c.csv").write_text("name,label\nx,1\n")
    with pytest.raises(ValueError, match="no column of pictures or of paths of pictures.*'name', 'label'"):
        load(tmp_path / "c.csv")


def test_tables_of_one_folder_are_splits_by_name(tmp_path):
    save(tmp_path / "0.bmp", 0)
    save(tmp_path / "1.bmp", 1)
    (tmp_path / "lists").mkdir()
    for split, number in (("train", 0), ("test", 1)):
        (tmp_path / "lists" / f"{split}.csv").write_text(f"path\n../{number}.bmp\n")
    assert numbers_of(load(tmp_path / "lists", "test")) == [1]


def test_a_table_beside_pictures_is_passed_over(tmp_path):
    save(tmp_path / "0.png", 0)
    (tmp_path / "labels.csv").write_text("path,label\n0.png,1\n")
    assert load(tmp_path).column_names == ["image"]
    assert load(tmp_path / "labels.csv").column_names == ["path", "label"]


# -- arrays ----------------------------------------------------------------------------------------------------------


def bands(dtype, shape):
    scale = {"uint8": 255, "uint16": 65535}.get(dtype, 1.0)
    return (np.random.default_rng(0).random(shape) * scale).astype(dtype)


def arrays_of(dataset):
    """The stored numbers, as the library's own numpy format gives them."""
    dtype = np.dtype(dataset.features["image"].dtype)
    return [row["image"] for row in dataset.with_format("numpy", columns=["image"], dtype=dtype)]


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float16", "float32", "float64"])
@pytest.mark.parametrize("shape", [(4, 8, 6), (4, 12, 8, 6), (4, 8, 6, 12)])
def test_an_array_file_gives_its_numbers_in_their_own_type(tmp_path, dtype, shape):
    values = bands(dtype, shape)
    np.save(tmp_path / "all.npy", values)
    loaded = load(tmp_path / "all.npy")
    assert find_image_column(loaded) == "image"
    assert len(loaded) == 4
    for stored, value in zip(arrays_of(loaded), values, strict=True):
        assert stored.dtype == dtype
        assert np.array_equal(stored, value)
    rows = ImageRows(loaded, "image", 1 if len(shape) == 3 else 12)
    scale = {"uint8": 255, "uint16": 65535}.get(dtype, 1)
    decoded = np.asarray(rows[3], dtype=float) / (255 if dtype == "uint8" and len(shape) == 3 else 1)
    expected = values[3] if shape[1] != 8 or len(shape) == 3 else np.moveaxis(values[3], -1, 0)
    np.testing.assert_allclose(decoded.reshape(expected.shape), expected.astype(float) / scale, rtol=1e-6)


def test_an_array_file_is_neither_copied_nor_cached_and_is_read_in_chunks(tmp_path, monkeypatch):
    values = bands("float32", (10, 2, 32, 32))
    np.save(tmp_path / "all.npy", values)
    monkeypatch.setattr(arrays, "_VALUES_PER_CHUNK", 3 * values[0].size + 1)
    loaded = load(tmp_path / "all.npy")
    assert loaded.data.column("image").num_chunks == 4
    assert loaded.cache_files == []
    assert np.array_equal(arrays_of(loaded), values)
    assert np.array_equal(arrays_of(loaded.select([9, 3, 4])), values[[9, 3, 4]])
    # what is written into the file is seen in the data set: they are the same memory
    mapped = np.lib.format.open_memmap(tmp_path / "all.npy", mode="r+")
    mapped[7] = 0.5
    mapped.flush()
    assert np.all(arrays_of(loaded)[7] == 0.5)


def test_a_folder_of_array_files_is_an_image_each_with_splits_and_classes(tmp_path):
    values = bands("float32", (4, 12, 8, 6))
    names = ("train/crop/a.npy", "train/forest/b.npy", "train/forest/c.npy", "test/crop/d.npy")
    for name, value in zip(names, values, strict=True):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / name, value)
    train, test = load(tmp_path), load(tmp_path, "test")
    assert np.array_equal(arrays_of(train), values[:3])
    assert np.array_equal(arrays_of(test), values[3:])
    assert arrays_of(train)[0].dtype == np.float32
    assert train.features["label"].names == test.features["label"].names == ["crop", "forest"]
    assert list(train["label"]) == [0, 1, 1]
    np.testing.assert_array_equal(ImageRows(train, "image", 12)[2], values[2])
    # a file that has changed is read again
    np.save(tmp_path / names[0], values[0] + 1)
    assert np.array_equal(arrays_of(load(tmp_path))[0], values[0] + 1)


def test_a_folder_of_flat_16_bit_array_files_keeps_their_type(tmp_path):
    values = bands("uint16", (3, 8, 6))
    for number, value in enumerate(values):
        np.save(tmp_path / f"{number}.npy", value)
    loaded = load(tmp_path)
    assert loaded.column_names == ["image"]
    assert arrays_of(loaded)[0].dtype == np.uint16
    assert np.array_equal(arrays_of(loaded), values)


def test_arrays_that_are_no_images_are_refused(tmp_path):
    def refused(values, message, name="all.npy"):
        np.save(tmp_path / name, values)
        with pytest.raises(ValueError, match=message):
            load(tmp_path / name)

    refused(np.zeros((3, 4), np.float32), r"shape \(3, 4\); write \[n, height, width\]")
    refused(np.zeros((0, 4, 4), np.float32), r"shape \(0, 4, 4\)")
    refused(np.zeros((2, 4, 4), np.int64), r"dtype '<i8', .*write it again as uint8")
    refused(np.zeros((2, 4, 4), ">f4"), "this machine's byte order")
    refused(np.asfortranarray(np.ones((2, 3, 4), np.float32)), "Fortran order.*ascontiguousarray")
    refused(np.array([{"a": 1}]), r"all\.npy' cannot be read: ")
    np.save(tmp_path / "all.npy", np.zeros((9, 9, 9), np.float32))
    whole = (tmp_path / "all.npy").read_bytes()
    for broken in (whole[:1000], whole[:20], b"no array", b""):
        (tmp_path / "all.npy").write_bytes(broken)
        with pytest.raises(ValueError, match=r"all\.npy' cannot be read: "):
            load(tmp_path / "all.npy")


def test_array_files_of_a_folder_are_all_alike(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((3, 4, 4), np.float32))
    np.save(tmp_path / "b.npy", np.zeros((3, 4, 5), np.float32))
    with pytest.raises(ValueError, match=r"b\.npy' holds float32 of shape \(3, 4, 5\), but .*a\.npy' holds"):
        load(tmp_path)
    np.save(tmp_path / "b.npy", np.zeros((3, 4, 4), np.uint8))
    with pytest.raises(ValueError, match=r"b\.npy' holds uint8 of shape"):
        load(tmp_path)
    np.save(tmp_path / "a.npy", np.zeros((9, 3, 4, 4), np.float32))
    with pytest.raises(ValueError, match="each is one image.*the file itself if it holds many"):
        load(tmp_path)


# -- other data sets on disk -----------------------------------------------------------------------------------------


def test_a_data_set_saved_by_the_library_is_loaded(tmp_path):
    saved = datasets.Dataset.from_dict({"image": [noise(0), noise(1)]})
    saved.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"test": saved.select([1])}).save_to_disk(str(tmp_path / "several"))
    assert numbers_of(load(tmp_path / "one")) == [0, 1]
    assert numbers_of(load(tmp_path / "several", "test")) == [1]
    with pytest.raises(ValueError, match="has no split 'train'; it has 'test'"):
        load(tmp_path / "several")


def test_a_copy_of_a_repository_has_the_configurations_of_its_card(tmp_path):
    write_parquet(tmp_path / "large" / "part.parquet", [0, 1])
    write_parquet(tmp_path / "small" / "part.parquet", [2])
    files = "".join(f"- config_name: {name}\n  data_files: {name}/*.parquet\n" for name in ("large", "small"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{files}---\n# Birds\n")
    assert numbers_of(load(tmp_path, config="small")) == [2]
    assert numbers_of_stream(stream(tmp_path, config="large")) == [0, 1]
    with pytest.raises(ValueError, match="large.*small"):
        load(tmp_path)


def test_any_other_name_is_a_hub_id_with_its_configuration_and_only_what_streams_ask_for_streams(monkeypatch):
    asked = []

    rows = datasets.Dataset.from_dict({"image": [{"bytes": encoded(3), "path": None}], "label": [1]})
    address = "hf://datasets/someone/birds@main/train.parquet"

    def load_dataset(name, config):
        asked.append((name, config, "at random"))
        return {"train": rows}

    class Builder:
        config = SimpleNamespace(data_files={"train": [address], "test": ["another"]})

        def __init__(self, name, config):
            asked.append((name, config, "streamed"))

        def as_streaming_dataset(self):
            return {"train": rows.to_iterable_dataset()}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "load_dataset_builder", Builder)
    assert numbers_of(load("someone/birds")) == [3]
    opened = open_stream(ImageSource("someone/birds", "large"), "train")
    assert numbers_of_stream(opened.rows) == [3]
    assert opened.files == [address]
    assert asked == [("someone/birds", None, "at random"), ("someone/birds", "large", "streamed")]
    with pytest.raises(ValueError, match="dataset_name='someone/birds' has no split 'test'; it has 'train'"):
        stream("someone/birds", "test")
    with pytest.raises(ValueError, match="dataset_name='birds' has no split 'test'; it has 'train'"):
        load("birds", "test")


# -- streams ---------------------------------------------------------------------------------------------------------


def test_streams_do_not_decode_know_their_features_and_have_a_shard_a_file(tmp_path):
    for index in range(3):
        columns = {"label": [index] * 2, "mask": [noise(9)] * 2}
        write_parquet(tmp_path / "shards" / f"{index}.parquet", [2 * index, 2 * index + 1], **columns)
    for number in range(4):
        save(tmp_path / "pictures" / "train" / "ab"[number % 2] / f"{number}.png", number)
    for source, shards, numbers in (("shards", 3, range(6)), ("pictures", 1, [0, 2, 1, 3])):
        rows, loaded = stream(tmp_path / source), load(tmp_path / source)
        assert rows.num_shards == shards
        assert rows.features["image"] == datasets.Image(decode=False)
        assert rows.column_names == loaded.column_names
        assert numbers_of_stream(rows) == numbers_of(loaded) == list(numbers)
        assert [row["label"] for row in rows] == list(loaded["label"])
        chosen = rows.select_columns(["image"])
        assert set(next(iter(chosen))) == set(chosen.features) == {"image"}


def test_a_stream_names_the_file_of_each_shard_in_the_order_of_the_shards(tmp_path):
    numbers = {
        "train/b[1].parquet": [0, 1],
        "train/a c.parquet": [2],
        "train/deep/a.parquet": [3],
        "test/x.parquet": [4],
    }
    for name, part in numbers.items():
        write_parquet(tmp_path / "parquet" / name, part)
        write_tar(tmp_path / "tar" / name.replace("parquet", "tar"), {str(n): {"png": encoded(n)} for n in part})
    for kind in ("parquet", "tar"):
        rows, files = open_stream(ImageSource(str(tmp_path / kind)), "train")
        known = {str(tmp_path / kind / name.replace("parquet", kind)): part for name, part in numbers.items()}
        assert len(files) == rows.num_shards == 3
        for index, file in enumerate(files):
            shard = rows.shard(num_shards=3, index=index)
            assert numbers_of_stream(shard) == known[file]
    # pictures are all in one shard, however many they are
    for count in (1, 3):
        for number in range(count):
            save(tmp_path / f"pictures{count}" / f"{number}.png", number)
        rows, files = open_stream(ImageSource(str(tmp_path / f"pictures{count}")), "train")
        assert (rows.num_shards, files) == (1, [])


def test_streams_read_pictures_that_cannot_be_decoded(tmp_path):
    save(tmp_path / "0.png", 0)
    (tmp_path / "1.png").write_bytes(b"no picture")
    images = [row["image"] for row in stream(tmp_path)]
    assert [image["bytes"] or Path(image["path"]).read_bytes() for image in images] == [encoded(0), b"no picture"]


def test_what_is_read_at_random_is_not_streamed(tmp_path):
    save(tmp_path / "0.png", 0)
    (tmp_path / "a.csv").write_text("path\n0.png\n")
    pyarrow.parquet.write_table(pa.table({"path": ["0.png"]}), tmp_path / "b.parquet")
    np.save(tmp_path / "c.npy", np.zeros((2, 4, 4), np.uint8))
    load(tmp_path / "a.csv").save_to_disk(str(tmp_path / "saved"))
    for name in ("digits", "shapes", *(tmp_path / name for name in ("a.csv", "b.parquet", "c.npy", "saved"))):
        with pytest.raises(ValueError, match="cannot be streamed: leave --streaming out, or .*`ijepa-hf prepare`"):
            stream(name)


# -- mistakes --------------------------------------------------------------------------------------------------------


def test_mistakes_about_the_source_are_named(tmp_path):
    for name in (tmp_path / "nowhere", "nowhere.csv", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="no such file or folder"):
            load(name)
    (tmp_path / "empty" / ".hidden").mkdir(parents=True)
    for read in (load, stream):
        with pytest.raises(FileNotFoundError, match=r"holds no image \(\.bmp, .*\) and no \.parquet, \.tar"):
            read(tmp_path / "empty")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"a file of no kind that is read: give a \.parquet, \.tar"):
        load(tmp_path / "notes.txt")
    save(tmp_path / "a.png", 0)
    with pytest.raises(ValueError, match="is one picture; give the folder"):
        load(tmp_path / "a.png")
    with pytest.raises(ValueError, match="has no split 'test'; it has 'train'"):
        load(tmp_path, "test")
    write_parquet(tmp_path / "a.parquet", [0])
    with pytest.raises(ValueError, match=r"holds 1 pictures, 1 \.parquet files; give a folder of one kind"):
        load(tmp_path)


@pytest.mark.parametrize("suffix", ["parquet", "tar", "csv"])
@pytest.mark.parametrize("content", [b"", b"this is no archive" * 40])
def test_a_broken_file_is_named(tmp_path, suffix, content):
    (tmp_path / f"broken.{suffix}").write_bytes(content)
    with pytest.raises(ValueError, match=rf"broken\.{suffix}' (cannot be read|has no column)"):
        load(tmp_path / f"broken.{suffix}")
    if suffix != "csv":
        with pytest.raises(ValueError, match=rf"broken\.{suffix}' cannot be read"):
            stream(tmp_path / f"broken.{suffix}")


def test_mistakes_about_the_columns_are_named(digits):
    with pytest.raises(ValueError, match="'label' .*choose with --image_column_name"):
        find_image_column(digits.remove_columns("image"))
    with pytest.raises(ValueError, match="image_column_name='pictures' is no column .*'image'"):
        find_image_column(digits, "pictures")
    pictures = [Image.new("L", (8, 8))]
    two = datasets.Dataset.from_dict(
        {"a": pictures, "b": pictures}, features=datasets.Features({"a": datasets.Image(), "b": datasets.Image()})
    )
    with pytest.raises(ValueError, match="several image columns"):
        find_image_column(two)
    assert find_image_column(two.rename_column("b", "image")) == "image"
    with pytest.raises(ValueError, match="image_column_name='label' holds no images"):
        find_image_column(digits, "label")
    named = digits.add_column("name", ["x"] * len(digits))
    with pytest.raises(ValueError, match="label_column_name='name' is no column of classes"):
        find_label_column(named, "name")
    assert find_label_column(digits.cast_column("label", datasets.Value("int32"))) == "label"
    with pytest.raises(ValueError, match="label_column_name='kind'"):
        find_label_column(digits, "kind")


def test_columns_are_found_by_themselves(digits):
    assert find_image_column(digits) == "image"
    assert find_image_column(digits.rename_column("image", "scan")) == "scan"
    assert find_label_column(digits) == "label"
    assert find_label_column(digits.rename_column("label", "digit")) == "digit"
    assert find_label_column(digits.remove_columns("label")) is None


def test_a_part_of_a_set_is_spread_evenly_from_its_first_row_to_its_last():
    sorted_set = datasets.Dataset.from_dict({"row": range(101)})
    assert at_most(sorted_set, 5)["row"][:] == [0, 25, 50, 75, 100]
    assert at_most(sorted_set, 100)["row"][:] == [*range(50), *range(51, 101)]
    assert at_most(sorted_set, 1)["row"][:] == [0]
    for limit in (None, 101, 500):
        assert at_most(sorted_set, limit) is sorted_set
