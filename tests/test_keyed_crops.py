"""Crop boxes drawn together: the numbers that NumPy's own generators give one by one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ijepa_hf import keyed_crops
from ijepa_hf.image_transforms import draw_crop_box
from ijepa_hf.keyed_crops import keyed_crop_boxes, keyed_draws


def one_by_one(key, images, image_size, size, scale):
    """What NumPy draws, a generator an image."""
    boxes = []
    for image in images:
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([*key, int(image)])))
        boxes.append(draw_crop_box(*image_size, size, scale, generator))
    return boxes


SIDE = st.integers(1, 120)


@settings(max_examples=150)
@given(
    key=st.lists(st.integers(0, 2**70), min_size=1, max_size=5),
    images=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=12),
    image_size=st.tuples(SIDE, SIDE),
    size=st.tuples(SIDE, SIDE),
    scale=st.floats(0.01, 1.0),
)
def test_boxes_drawn_together_are_those_of_a_generator_an_image(key, images, image_size, size, scale):
    boxes = keyed_crop_boxes(key, np.array(images), image_size, size, scale)
    assert boxes.dtype == np.int64
    assert [tuple(box) for box in boxes.tolist()] == one_by_one(key, images, image_size, size, scale)


@pytest.mark.parametrize("image_size", [(32, 32), (24, 64), (200, 11)])
def test_many_boxes_of_one_epoch_are_those_of_a_generator_an_image(image_size):
    images = np.arange(3000)
    boxes = keyed_crop_boxes((5, 3, 2), images, image_size, (32, 32), 0.3)
    assert [tuple(box) for box in boxes.tolist()] == one_by_one((5, 3, 2), images, image_size, (32, 32), 0.3)


@settings(max_examples=100)
@given(
    key=st.lists(st.integers(0, 2**70), min_size=1, max_size=4),
    images=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=4),
    asked=st.lists(st.one_of(st.none(), st.integers(1, 50), st.integers(2**31, 2**32 - 1)), max_size=30),
)
def test_keyed_draws_are_those_of_numpys_generator_in_any_order_and_number(key, images, asked):
    # of ranges above 2**31 up to half of the words are drawn again; 30 numbers are more than are made beforehand
    for image, draws in zip(images, keyed_draws(key, images), strict=True):
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([*key, image])))
        for count in asked:
            if count is None:
                assert draws.uniform(-0.25, 1.5) == generator.uniform(-0.25, 1.5)
            else:
                assert draws.integers(7, 7 + count) == generator.integers(7, 7 + count)


def test_most_images_are_not_drawn_by_themselves(monkeypatch):
    alone = []
    monkeypatch.setattr(keyed_crops, "draw_crop_box", lambda *given: alone.append(given) or (0, 0, 1, 1))
    keyed_crop_boxes((0, 3, 0), np.arange(5000), (32, 32), (32, 32), 0.3)
    assert len(alone) < 5


def test_what_rounding_could_change_is_drawn_by_itself(monkeypatch):
    monkeypatch.setattr(keyed_crops, "_DOUBTFUL", 0.5)  # all of it
    drawn = []
    monkeypatch.setattr(keyed_crops, "draw_crop_box", lambda *given: drawn.append(draw_crop_box(*given)) or drawn[-1])
    images = np.arange(40)
    boxes = keyed_crop_boxes((1, 3, 0), images, (40, 30), (16, 16), 0.3)
    assert len(drawn) == 40
    assert [tuple(box) for box in boxes.tolist()] == one_by_one((1, 3, 0), images, (40, 30), (16, 16), 0.3)


def test_where_a_whole_number_may_be_drawn_again_the_image_is_drawn_by_itself(monkeypatch):
    original = keyed_crops._scaled
    monkeypatch.setattr(keyed_crops, "_scaled", lambda *given: (original(*given)[0], np.ones(len(given[0]), bool)))
    drawn = []
    monkeypatch.setattr(keyed_crops, "draw_crop_box", lambda *given: drawn.append(draw_crop_box(*given)) or drawn[-1])
    keyed_crop_boxes((1, 3, 0), np.arange(40), (40, 30), (16, 16), 0.3)
    assert len(drawn) == 40


def test_a_whole_number_that_numpy_may_draw_again_is_not_taken():
    # Lemire's method draws again where the lower half of the product is small: 2**32 mod limit at most
    limit = 3 * 2**30
    words = np.array([0, 1, 2, 4, 2**31, 2**32 - 1], dtype=np.uint64)
    places, rejected = keyed_crops._scaled(words, np.full(len(words), limit))
    product = [int(word) * limit for word in words]
    assert places.tolist() == [value >> 32 for value in product]
    for value, doubted in zip(product, rejected.tolist(), strict=True):
        assert doubted or value % 2**32 >= 2**32 % limit
