"""Targets that are no classes: numbers, boxes and maps, each beside its own image."""

import dataclasses
import io

import datasets
import numpy as np
import pytest
from PIL import Image

from ijepa_hf.data.labelled import LabelledSource
from ijepa_hf.data.sources import builtin
from ijepa_hf.data.sources.shapes import draw_shape_scene
from ijepa_hf.data.targets import load_target_splits
from ijepa_hf.model.vision_models import ImageSettings

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
SETTINGS = ImageSettings((32, 32), MEAN, STD)

ROWS = {"train": (9, [0, 2, 4, 6, 8]), "test": (7, [0, 3, 6])}  # scenes that there are, and those that are used


@pytest.fixture
def shapes(monkeypatch):
    """Flags that ask for some of few shapes, and their scenes drawn by themselves, training ones first."""
    seeds = {split: seed for split, (seed, _) in builtin.SHAPES_SPLITS.items()}
    monkeypatch.setattr(builtin, "SHAPES_SPLITS", {split: (seeds[split], ROWS[split][0]) for split in seeds})
    flags = LabelledSource(dataset_name="shapes", max_train_samples=5, max_eval_samples=3)
    return flags, [[draw_shape_scene(seeds[split], row) for row in ROWS[split][1]] for split in ("train", "test")]


def test_numbers_are_those_of_the_images_that_they_stand_beside(shapes):
    flags, scenes = shapes
    found = load_target_splits(flags, 3, ["nearest_distance", "count"], "number")
    parts = ((found.train, found.train_targets), (found.test, found.test_targets))
    for (images, targets), drawn in zip(parts, scenes, strict=True):
        assert targets.dtype == np.float64
        np.testing.assert_allclose(targets[:, 0], [scene.nearest_distance for scene in drawn], rtol=1e-6)
        assert targets[:, 1].tolist() == [scene.count for scene in drawn]
        assert [np.asarray(images[index]).tobytes() for index in range(len(images))] == [
            np.asarray(scene.image).tobytes() for scene in drawn
        ]


def test_masks_are_the_classes_of_the_pixels_of_their_images(shapes):
    flags, scenes = shapes
    found = load_target_splits(flags, 3, ["segmentation"], "mask")
    for targets, drawn in zip((found.train_targets, found.test_targets), scenes, strict=True):
        assert len(targets) == len(drawn)
        for map_, scene in zip(targets, drawn, strict=True):
            assert map_.dtype == np.int64
            assert np.array_equal(map_, scene.segmentation)


def test_the_box_is_the_largest_as_shares_of_the_sides(shapes):
    flags, scenes = shapes
    found = load_target_splits(flags, 3, ["boxes"], "boxes")
    for targets, drawn in zip((found.train_targets, found.test_targets), scenes, strict=True):
        assert targets.dtype == np.float64
        for box, scene in zip(targets, drawn, strict=True):
            left, top, right, bottom = scene.boxes.T
            largest = scene.boxes[((right - left) * (bottom - top)).argmax()]
            np.testing.assert_allclose(box * 96, largest)


def save(folder, columns, features, size=(40, 20), images=None):
    """Writes a data set of both splits alike; each image is `size` wide and high."""
    count = len(next(iter(columns.values())))
    columns = {"image": images or [Image.new("RGB", size)] * count, **columns}
    dataset = datasets.Dataset.from_dict(columns, features=datasets.Features({"image": datasets.Image(), **features}))
    for split in ("train", "test"):
        dataset.to_parquet(folder / f"{split}.parquet")
    return LabelledSource(dataset_name=str(folder))


INT, FLOAT, TEXT = datasets.Value("int16"), datasets.Value("float32"), datasets.Value("string")
BOXES = datasets.List(datasets.List(FLOAT))


def test_width_and_height_are_not_mixed_up_and_of_equal_boxes_the_first_counts(tmp_path):
    boxes = [[[0, 0, 4, 5], [10, 5, 30, 10], [0, 0, 10, 10]], [[0, 0, 40, 20]]]
    flags = save(tmp_path, {"box": boxes}, {"box": BOXES})
    found = load_target_splits(flags, 3, ["box"], "boxes")
    assert found.train_targets.tolist() == [[0.25, 0.25, 0.75, 0.5], [0, 0, 1, 1]]


def test_boxes_are_in_the_image_as_it_is_seen_upright(tmp_path):
    stream, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # a camera held on its side: 20 wide and 40 high when seen
    Image.new("RGB", (40, 20)).save(stream, "JPEG", exif=exif)
    flags = save(tmp_path, {"box": [[[5, 10, 10, 40]]]}, {"box": BOXES}, images=[{"bytes": stream.getvalue()}])
    assert load_target_splits(flags, 3, ["box"], "boxes").test_targets.tolist() == [[0.25, 0.25, 0.5, 1.0]]


def test_boxes_of_arrays_are_shares_of_their_height_and_width(tmp_path):
    features = datasets.Features({"image": datasets.Array3D((5, 20, 40), "float32"), "box": BOXES})
    columns = {"image": np.zeros((2, 5, 20, 40), np.float32), "box": [[[10, 5, 20, 10]]] * 2}
    for split in ("train", "test"):
        datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / f"{split}.parquet")
    found = load_target_splits(LabelledSource(dataset_name=str(tmp_path)), 5, ["box"], "boxes")
    assert found.test_targets.tolist() == [[0.25, 0.25, 0.5, 0.5]] * 2


def test_masks_of_every_mode_of_whole_numbers_give_their_numbers(tmp_path):
    classes = np.arange(12).reshape(3, 4)
    palette = Image.fromarray(classes.astype(np.uint8))
    palette.putpalette([0, 0, 0] * 256)  # all of one colour: only the indices tell
    wide = Image.fromarray((classes * 1000).astype(np.int32))  # as 16-bit PNG
    masks = [Image.fromarray(classes.astype(np.uint8)), palette, wide, Image.fromarray(classes > 5)]
    assert [mask.mode for mask in masks] == ["L", "P", "I", "1"]
    found = load_target_splits(save(tmp_path, {"map": masks}, {"map": datasets.Image()}), 3, ["map"], "mask")
    assert [found.train_targets[index].tolist() for index in range(4)] == [
        classes.tolist(), classes.tolist(), (classes * 1000).tolist(), (classes > 5).astype(int).tolist(),
    ]  # fmt: skip


def test_masks_are_turned_upright_as_images_are(tmp_path):
    stream, exif, classes = io.BytesIO(), Image.Exif(), np.arange(6, dtype=np.uint8).reshape(2, 3)
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    Image.fromarray(classes).save(stream, "PNG", exif=exif)
    flags = save(tmp_path, {"map": [{"bytes": stream.getvalue()}]}, {"map": datasets.Image()})
    assert load_target_splits(flags, 3, ["map"], "mask").test_targets[0].tolist() == [[3, 0], [4, 1], [5, 2]]


@pytest.mark.parametrize(
    ("column", "kind", "message"),
    [
        ("word", "number", r"'word' of the split 'train' is no column of numbers; .* there are: 'size', 'age'\.$"),
        ("kind", "number", "'kind' of the split 'train' is no column of numbers"),
        (
            "absent",
            "number",
            "'absent' of the split 'train' is no column; columns of numbers there are: 'size', 'age'",
        ),
        ("size", "mask", "'size' of the split 'train' is no column of pictures; .* there are: 'map'"),
        ("image", "mask", "'image' of the split 'train' holds the images themselves; .* there are: 'map'"),
        ("size", "boxes", "'size' .* is no column of lists of .left, top, right, bottom.; .* there are: 'box', 'old'"),
        ("pairs", "boxes", "'pairs' .* is no column of lists of .left, top, right, bottom.; .* are: 'box', 'old'"),
    ],
)
def test_a_column_of_another_kind_is_refused_with_those_that_would_do(column, kind, message, tmp_path):
    columns = {
        "size": [1, 2], "age": [0.5, 1.5], "word": ["a", "b"], "kind": [0, 1], "map": [Image.new("L", (4, 4))] * 2,
        "box": [[[0, 0, 1, 1]]] * 2, "old": [[[0, 0, 1, 1]]] * 2, "pairs": [[[0, 1]]] * 2,
    }  # fmt: skip
    features = {
        "size": INT, "age": FLOAT, "word": TEXT, "kind": datasets.ClassLabel(names=["x", "y"]),
        "map": datasets.Image(), "box": BOXES, "old": datasets.List(datasets.List(INT, length=4)),
        "pairs": datasets.List(datasets.List(INT, length=2)),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        load_target_splits(save(tmp_path, columns, features), 3, [column], kind)


@pytest.mark.parametrize(
    ("kind", "feature", "good", "bad", "message"),
    [
        ("number", FLOAT, 1.5, None, "row 4 of the split 'train': 'target' is None, which is no number"),
        ("number", FLOAT, 1.5, float("nan"), "row 4 of the split 'train': 'target' is nan"),
        ("number", FLOAT, 1.5, float("inf"), "row 4 of the split 'train': 'target' is inf"),
        ("boxes", BOXES, [[0, 0, 9, 9]], [], "row 4 of the split 'train' has no box in 'target'"),
        ("boxes", BOXES, [[0, 0, 9, 9]], None, "row 4 of the split 'train' has no box in 'target'"),
        ("boxes", BOXES, [[0, 0, 9, 9]], [[0, 0, 9, 9], [20, 10, 9, 9]], r"row 4 .*box \[20.0, 10.0, 9.0, 9.0\]"),
        ("boxes", BOXES, [[0, 0, 9, 9]], [[0, 0, 20, 40]], r"row 4 .* in an image of 40x20 a box is \[left, top, ri"),
        ("boxes", BOXES, [[0, 0, 9, 9]], [[0, 0, 9]], r"row 4 .* has the box \[0.0, 0.0, 9.0\]"),
        ("boxes", BOXES, [[0, 0, 9, 9]], [[0, 0, 9, None]], "row 4 .* has the box"),
        ("boxes", BOXES, [[0, 0, 9, 9]], [[0, 0, 9, float("nan")]], "row 4 .* has the box"),
        ("mask", datasets.Image(), Image.new("L", (4, 4)), None, "row 4 of the split 'train' has no picture in 'targ"),
    ],
)
def test_a_row_without_a_target_that_can_be_is_named_as_it_is_counted_in_the_whole_split(
    kind, feature, good, bad, message, tmp_path
):
    flags = save(tmp_path, {"target": [good] * 4 + [bad] + [good] * 4}, {"target": feature})
    five = dataclasses.replace(flags, max_train_samples=5)
    with pytest.raises(ValueError, match=message):
        load_target_splits(five, 3, ["target"], kind)
    two = dataclasses.replace(flags, max_train_samples=2, max_eval_samples=2)  # without that row
    assert len(load_target_splits(two, 3, ["target"], kind).train_targets) == 2


def test_masks_that_hold_colours_or_cannot_be_read_are_refused(tmp_path):
    flags = save(tmp_path, {"map": [Image.new("RGB", (4, 4))] * 2}, {"map": datasets.Image()})
    with pytest.raises(ValueError, match="row 0 of the split 'train': 'map' is a picture of mode RGB"):
        load_target_splits(flags, 3, ["map"], "mask")
    pictures = [Image.new("L", (4, 4)), {"bytes": b"no picture", "path": None}]
    flags = save(tmp_path, {"map": pictures}, {"map": datasets.Image()})
    maps = load_target_splits(flags, 3, ["map"], "mask").test_targets
    with pytest.raises(ValueError, match="row 1 of the split 'test': 'map' cannot be read: cannot identify"):
        maps[1]


def test_both_splits_must_hold_the_column_and_may_be_one(tmp_path):
    flags = save(tmp_path, {"size": [1, 2, 3]}, {"size": INT})
    datasets.Dataset.from_parquet(str(tmp_path / "train.parquet")).rename_column("size", "other").to_parquet(
        tmp_path / "test.parquet"
    )
    two = dataclasses.replace(flags, eval_split_name="train", max_eval_samples=2)
    found = load_target_splits(two, 3, ["size"], "number")
    assert (found.train_targets.tolist(), found.test_targets.tolist()) == ([[1], [2], [3]], [[1], [3]])
    with pytest.raises(ValueError, match="'size' of the split 'test' is no column; .* there are: 'other'"):
        load_target_splits(flags, 3, ["size"], "number")


def test_a_number_of_columns_that_the_kind_does_not_have_is_refused(shapes):
    flags, _ = shapes
    for columns, kind, message in (
        ([], "number", "must be at least one column of numbers"),
        (["boxes", "boxes"], "boxes", "must be one column of lists"),
        (["count"], "class", "kind='class' must be one of 'number', 'mask', 'boxes'"),
    ):
        with pytest.raises(ValueError, match=message):
            load_target_splits(flags, 3, columns, kind)
