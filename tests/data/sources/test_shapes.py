"""Drawn scenes: whether the labels say what the pixels show, worked out again from the pixels."""

import itertools
import math

import numpy as np
import pytest
from PIL import ImageChops

from ijepa_hf.data.sources.shapes import MAX_OBJECTS, MIN_OBJECTS, SHAPE_KINDS, draw_shape_scene

SCENES = 150


@pytest.fixture(scope="module")
def scenes():
    return [draw_shape_scene(7, index) for index in range(SCENES)]


def bounding_box(pixels):
    rows, columns = np.nonzero(pixels)
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def union(boxes):
    return [*boxes[:, :2].min(axis=0), *boxes[:, 2:].max(axis=0)]


def test_a_scene_is_a_function_of_seed_and_index_and_each_has_its_own():
    first, again = draw_shape_scene(3, 14), draw_shape_scene(3, 14)
    assert first.image.tobytes() == again.image.tobytes()
    for name in ("boxes", "box_classes", "centers", "segmentation", "instances"):
        assert np.array_equal(getattr(first, name), getattr(again, name)), name
    pictures = {draw_shape_scene(*key).image.tobytes() for key in itertools.product((0, 1, 3), range(20))}
    assert len(pictures) == 60


def test_labels_have_the_stated_shapes_and_types(scenes):
    for scene in scenes:
        assert scene.image.mode == "RGB"
        assert scene.image.size == (96, 96)
        assert scene.segmentation.shape == scene.instances.shape == (96, 96)
        assert scene.segmentation.dtype == scene.instances.dtype == np.uint8
        assert scene.boxes.shape == (scene.count, 4)
        assert scene.box_classes.shape == (scene.count,)
        assert scene.centers.shape == (scene.count, 2)
        assert MIN_OBJECTS <= scene.count <= MAX_OBJECTS
    assert {scene.count for scene in scenes} == set(range(MIN_OBJECTS, MAX_OBJECTS + 1))
    assert {scene.label for scene in scenes} == set(range(len(SHAPE_KINDS)))


def test_count_is_the_number_of_boxes_and_of_objects_seen(scenes):
    for scene in scenes:
        assert scene.count == len(scene.boxes) == len(np.unique(scene.instances)) - 1


def test_boxes_are_those_of_the_visible_pixels_of_each_object_and_kind(scenes):
    for scene in scenes:
        for number, box in enumerate(scene.boxes, 1):
            assert bounding_box(scene.instances == number) == box.tolist()
        for kind in np.unique(scene.box_classes):
            assert bounding_box(scene.segmentation == 1 + kind) == union(scene.boxes[scene.box_classes == kind])
        assert set(np.unique(scene.segmentation)) - {0} == set(1 + scene.box_classes)


def test_the_label_is_the_kind_of_the_object_of_which_most_is_seen(scenes):
    for scene in scenes:
        visible = [(scene.instances == number).sum() for number in range(1, scene.count + 1)]
        assert scene.label == scene.box_classes[int(np.argmax(visible))]


def test_nearest_distance_is_that_of_the_two_nearest_centres(scenes):
    for scene in scenes:
        distances = [math.dist(one, other) for one, other in itertools.combinations(scene.centers, 2)]
        assert scene.nearest_distance == pytest.approx(min(distances))
        assert scene.nearest_distance > 5


def whole_circles(scenes):
    """Number and scene of the circles that nothing covers: their box is as wide as high and as full as a disc's."""
    for scene in scenes:
        for number in range(scene.count):
            left, top, right, bottom = scene.boxes[number]
            area = (scene.instances == number + 1).sum()
            is_disc = abs(area - math.pi / 4 * (right - left) * (bottom - top)) < 0.04 * area
            if (
                SHAPE_KINDS[scene.box_classes[number]] == "circle"
                and abs(right - left - bottom + top) <= 1
                and is_disc
            ):
                yield number, scene


def test_centres_are_where_the_objects_are(scenes):
    found = list(whole_circles(scenes))
    assert len(found) > 50
    errors = []
    for number, scene in found:
        rows, columns = np.nonzero(scene.instances == number + 1)
        # the middle of a pixel is half a pixel from its edge
        errors.append(math.dist(scene.centers[number], (columns.mean() + 0.5, rows.mean() + 0.5)))
    assert np.median(errors) < 0.15
    assert max(errors) < 1  # a few have lost a sliver that the search for whole ones does not notice


def test_at_least_half_of_every_object_stays_visible(scenes):
    # what a circle covers is known from its radius, seen or not
    shares = []
    for scene in scenes:
        for number in range(scene.count):
            if SHAPE_KINDS[scene.box_classes[number]] == "circle":
                left, top, right, bottom = scene.boxes[number]
                radius = np.abs(np.array([left, right]) - scene.centers[number][0]).max()
                radius = max(radius, np.abs(np.array([top, bottom]) - scene.centers[number][1]).max())
                shares.append((scene.instances == number + 1).sum() / (math.pi * radius**2))
    assert min(shares) > 0.44  # a box of whole pixels is a little wider than the circle
    assert sum(share < 0.85 for share in shares) > 5  # some are covered in part


def test_objects_lie_inside_the_picture_and_look_unlike_what_is_behind_them(scenes):
    for scene in scenes:
        assert np.all(scene.boxes[:, :2] >= 0)
        assert np.all(scene.boxes[:, 2:] <= 96)
        pixels = np.asarray(scene.image, dtype=int)
        background = np.median(pixels[scene.instances == 0], axis=0)
        colors = [np.median(pixels[scene.instances == number], axis=0) for number in range(1, scene.count + 1)]
        assert min(np.abs(color - background).max() for color in colors) > 25
        assert min(np.abs(one - other).max() for one, other in itertools.combinations(colors, 2)) > 25


def test_every_kind_has_its_own_form(scenes):
    # of the circle around an object: pi/4 of the box of a disc is its own, a star leaves most of it empty
    fullness = {kind: [] for kind in SHAPE_KINDS}
    for scene in scenes:
        for number, kind in enumerate(scene.box_classes):
            x, y = scene.centers[number]
            rows, columns = np.nonzero(scene.instances == number + 1)
            radius = np.hypot(columns + 0.5 - x, rows + 0.5 - y).max() + 0.5
            fullness[SHAPE_KINDS[kind]].append(len(rows) / (math.pi * radius**2))
    typical = {kind: float(np.median(values)) for kind, values in fullness.items()}
    assert sorted(typical, key=typical.__getitem__, reverse=True)[:2] == ["circle", "square"]
    assert typical["circle"] > 0.85
    assert max(typical["star"], typical["triangle"]) < typical["square"] - 0.1


def test_another_size_shows_scenes_of_that_size():
    scene = draw_shape_scene(0, 0, size=40)
    assert scene.image.size == (40, 40)
    assert scene.boxes.max() <= 40
    assert ImageChops.difference(scene.image, draw_shape_scene(0, 1, size=40).image).getbbox() is not None


@pytest.mark.parametrize(("name", "value"), [("seed", -1), ("index", -1), ("size", 31)])
def test_numbers_that_are_too_small_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"{name}={value} must be (0|32) or more"):
        draw_shape_scene(**{"seed": 0, "index": 0, name: value})
