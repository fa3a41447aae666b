"""Panels: the pixels of an image and of its patches are where they belong, in the colours they should have."""

import numpy as np
import pytest
import torch

from ijepa_hf.figures.panels import keep_patches, mark_patches, outline, panel_grid, per_pixel, to_pictures


def test_bytes_are_shown_as_they_are_and_floats_are_stretched_each_by_itself():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).expand(2, 3, 1, 3)
    np.testing.assert_allclose(to_pictures(images)[1, 0, :, 0], [0, 0.2, 1])
    floats = torch.stack([torch.tensor([[-1.0, 0.0, 1.0]]), torch.tensor([[0.0, 5.0, 10.0]])])[:, None]
    np.testing.assert_allclose(to_pictures(floats)[:, 0, :, 2], [[0, 0.5, 1], [0, 0.5, 1]])


def test_with_limits_all_images_share_a_scale_and_what_is_outside_is_cut():
    floats = torch.stack([torch.tensor([[-1.0, 0.0, 1.0]]), torch.tensor([[0.0, 5.0, 10.0]])])[:, None]
    shown = to_pictures(floats, limits=(0.0, 5.0))
    np.testing.assert_allclose(shown[:, 0, :, 0], [[0, 0, 0.2], [0, 1, 1]])


def test_an_even_image_is_gray_and_further_channels_are_left_out():
    assert (to_pictures(torch.full((1, 1, 2, 2), 7.0)) == 0.5).all()
    images = torch.rand(1, 5, 2, 2)
    assert to_pictures(images).shape == (1, 2, 2, 3)
    two = torch.stack([torch.zeros(2, 2), torch.ones(2, 2)])[None]
    assert (to_pictures(two, limits=(0, 1)) == 0).all()


def test_only_the_marked_patches_keep_their_pixels():
    picture = np.random.default_rng(0).random((4, 6, 3))
    visible = mark_patches(torch.tensor([1, 3]), picture, (2, 3))
    np.testing.assert_array_equal(visible, [[False, True], [False, True]])
    shown = keep_patches(picture, visible, (2, 3))
    np.testing.assert_array_equal(shown[:, 3:], picture[:, 3:])
    assert (shown[:, :3] == 0.8).all()
    assert per_pixel(visible, (2, 3)).shape == (4, 6, 1)


def test_the_outline_of_a_block_has_the_length_of_its_edge():
    block = np.zeros((3, 4), dtype=bool)
    block[1:, 1:3] = True  # 2 x 2 patches of 5 x 7 pixels
    lines = outline(block, (5, 7))
    length = sum(abs(x1 - x0) + abs(y1 - y0) for (x0, y0), (x1, y1) in lines)
    assert length == 2 * (2 * 5 + 2 * 7)
    points = {point for line in lines for point in line}
    assert (min(x for x, _ in points), max(x for x, _ in points)) == (7, 21)
    assert (min(y for _, y in points), max(y for _, y in points)) == (5, 15)


@pytest.mark.parametrize("changes", [{}, {"foot": 0.4, "right": 0.8, "edge": 0.2}])
def test_panels_have_the_shape_of_the_image_whatever_is_around_them(changes: dict):
    figure, axes = panel_grid(2, 3, 0.75, **changes)
    width, height = figure.get_size_inches()
    for axis in axes.ravel():
        box = axis.get_position()
        assert box.width * width == pytest.approx(1.7)
        assert box.height * height == pytest.approx(0.75 * 1.7)
        assert 0 < box.x0 < box.x1 < 1
        assert 0 < box.y0 < box.y1 < 1
    if "foot" in changes:
        last, first = axes[1, 0].get_position(), axes[0, 0].get_position()
        assert last.y0 * height == pytest.approx(0.2 + 0.4)
        assert (first.y0 - last.y1) * height == pytest.approx(0.06 + 0.4)
        assert (1 - axes[0, 2].get_position().x1) * width == pytest.approx(1.0)
