"""Pictures of masks and audits, read back from the PNG: the right patches gray, the right blocks coloured."""

import matplotlib
import matplotlib.pyplot
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from pictures import patch_centres, patches_of_one_colour
from PIL import Image

from ijepa_hf.figures.masks import draw_audit_figure, draw_masks_figure
from ijepa_hf.model.mask_audit import MaskAudit, Spread, audit_masks
from ijepa_hf.model.masking import MaskSettings

GRAY = 204  # a hidden patch
BLOCK_COLORS = [(230, 159, 0), (86, 180, 233)]  # of the first two target blocks


def at(indices: list[int], grid: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(grid[0] * grid[1], dtype=bool)
    mask[indices] = True
    return mask.reshape(grid)


def test_the_picture_shows_image_context_and_each_target_block(tmp_path):
    grid, patch = (3, 5), (3, 8)
    images, colors = patches_of_one_colour(2, 3, grid, patch)
    contexts = torch.tensor([[0, 1, 5], [4, 9, 14]])
    targets = torch.tensor([[[6, 7, 11, 12], [2, 3, 7, 8]], [[0, 1, 5, 6], [1, 2, 6, 7]]])
    figure = draw_masks_figure(images, contexts, targets, patch, tmp_path / "masks.png")
    assert [axis.get_title() for axis in figure.axes[:4]] == ["image", "context", "target 1", "target 2"]
    for row in range(2):
        shown = [patch_centres(figure, tmp_path / "masks.png", 4 * row + panel, grid) for panel in range(4)]
        np.testing.assert_array_equal(shown[0], colors[row])
        visible = at(contexts[row].tolist(), grid)
        np.testing.assert_array_equal(shown[1][visible], colors[row][visible])
        assert (shown[1][~visible] == GRAY).all()
        for number, color in enumerate(BLOCK_COLORS):
            block = at(targets[row, number].tolist(), grid)
            tinted = 0.75 * colors[row] + 0.25 * np.array(color)
            assert np.abs(shown[2 + number][block] - tinted[block]).max() <= 1
            faded = 0.2 * colors[row].mean(axis=-1, keepdims=True) + 0.8 * GRAY
            assert np.abs(shown[2 + number][~block] - faded[~block]).max() <= 1


def test_a_block_is_outlined_in_its_colour_and_nothing_else_is(tmp_path):
    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    figure = draw_masks_figure(
        images, torch.tensor([[0]]), torch.tensor([[[5, 6], [9, 13]]]), (8, 8), tmp_path / "m.png"
    )
    edges = {tuple(map(tuple, segment.tolist())) for segment in figure.axes[2].collections[0].get_segments()}
    assert edges == {
        *(((x, y), (x + 8, y)) for x in (8, 16) for y in (8, 16)),
        *(((x, 8), (x, 16)) for x in (8, 24)),
    }
    pixels = np.asarray(Image.open(tmp_path / "m.png").convert("RGB")).astype(int)
    height, width = pixels.shape[:2]
    for panel, color in zip((2, 3), BLOCK_COLORS, strict=True):
        box = figure.axes[panel].get_position()
        part = pixels[:, round(width * box.x0) : round(width * box.x1)]
        drawn = np.abs(part - np.array(color)).max(axis=-1) <= 2
        assert drawn.sum() > 200
        rows, columns = np.nonzero(drawn)
        seen = [(rows.min() - height * (1 - box.y1)) / (height * box.height), columns.min() / part.shape[1]]
        seen += [(rows.max() - height * (1 - box.y1)) / (height * box.height), columns.max() / part.shape[1]]
        expected = [1 / 4, 1 / 4, 2 / 4, 3 / 4] if panel == 2 else [2 / 4, 1 / 4, 4 / 4, 2 / 4]
        np.testing.assert_allclose(seen, expected, atol=0.02)


def test_several_context_sets_get_a_panel_each(tmp_path):
    grid = (2, 2)
    images, colors = patches_of_one_colour(1, 3, grid, (8, 8))
    figure = draw_masks_figure(
        images, torch.tensor([[[0, 1], [2, 3]]]), torch.tensor([[[0]]]), (8, 8), tmp_path / "masks.png"
    )
    assert [axis.get_title() for axis in figure.axes] == ["image", "context 1", "context 2", "target 1"]
    for panel, visible in ((1, [0, 1]), (2, [2, 3])):
        shown = patch_centres(figure, tmp_path / "masks.png", panel, grid)
        np.testing.assert_array_equal(shown[at(visible, grid)], colors[0][at(visible, grid)])
        assert (shown[~at(visible, grid)] == GRAY).all()


@pytest.mark.parametrize(("channels", "shown_channels"), [(2, [0, 0, 0]), (7, [0, 1, 2])])
def test_any_number_of_channels_can_be_shown(tmp_path, channels: int, shown_channels: list[int]):
    grid = (2, 3)
    images, colors = patches_of_one_colour(1, channels, grid, (6, 6))
    figure = draw_masks_figure(images, torch.tensor([[0]]), torch.tensor([[[1]]]), (6, 6), tmp_path / "masks.png")
    shown = patch_centres(figure, tmp_path / "masks.png", 0, grid)
    np.testing.assert_array_equal(shown, colors[0][..., shown_channels])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(3, 8, 8)}, r"images of shape \(3, 8, 8\)"),
        ({"images": torch.zeros(0, 3, 8, 8)}, "B at least 1"),
        ({"target_indices": torch.zeros(1, 2, dtype=torch.int64)}, r"target_indices of shape \(1, 2\)"),
        ({"context_indices": torch.zeros(2, 1, dtype=torch.int64)}, "1 images, 2 rows of context_indices and 1 rows"),
        ({"patch_size": (3, 4)}, r"patch_size=\(3, 4\) must divide the images, which are 8 x 8"),
        ({"context_indices": torch.tensor([[4]])}, "context_indices run from 4 to 4, but .* positions 0 to 3"),
        ({"target_indices": torch.tensor([[[-1]]])}, "target_indices run from -1 to -1"),
    ],
)
def test_masks_that_do_not_belong_to_the_images_are_refused(tmp_path, change: dict, message: str):
    arguments = {
        "images": torch.zeros(1, 3, 8, 8),
        "context_indices": torch.tensor([[0]]),
        "target_indices": torch.tensor([[[1]]]),
        "patch_size": (4, 4),
        "path": tmp_path / "masks.png",
    }
    with pytest.raises(ValueError, match=message):
        draw_masks_figure(**{**arguments, **change})
    assert not (tmp_path / "masks.png").exists()


def texts_of(axis: Axes) -> list[Text]:
    shown = [*axis.texts, *axis.findobj(lambda part: isinstance(part, Text) and part.get_text() == axis.get_title())]
    shown += axis.findobj(lambda part: isinstance(part, Text) and part.get_text() == axis.get_title(loc="left"))
    if axis.axison:
        shown += [axis.xaxis.label, axis.yaxis.label]
        for side, limits in ((axis.xaxis, axis.get_xlim()), (axis.yaxis, axis.get_ylim())):
            ticks = [tick for tick in side.get_major_ticks() if min(limits) <= tick.get_loc() <= max(limits)]
            shown += [tick.label1 for tick in ticks]
    return [text for text in dict.fromkeys(shown) if text.get_text()]


def check_texts(figure: Figure) -> list[str]:
    """The texts of a figure; none of them reaches into another or out of the picture."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    texts = [text for axis in figure.axes for text in texts_of(axis)]
    boxes = [text.get_window_extent(canvas.get_renderer()) for text in texts]
    for number, (text, box) in enumerate(zip(texts, boxes, strict=True)):
        assert 0 <= box.x0 <= box.x1 <= figure.bbox.x1, text
        assert 0 <= box.y0 <= box.y1 <= figure.bbox.y1, text
        for other, its_box in zip(texts[:number], boxes, strict=False):
            assert not box.overlaps(its_box), (text, other)
    return [text.get_text() for text in texts]


def audit_of(strategy: str = "multi_block", **changes) -> MaskAudit:
    """An audit of a grid of 2x4 patches of which the last column is never used."""
    probabilities = np.array([[0.1, 0.2, 0.3, 0.0], [0.4, 0.5, 0.6, 0.0]])
    own = {"official_min_keep": 0} if strategy == "multi_block_official" else {}
    fixed = {
        "settings": MaskSettings((2, 4), strategy, **own),
        "batch_size": 2,
        "num_steps": 9,
        "seed": 0,
        "context_map": probabilities,
        "target_map": probabilities / 2,
        "context_share": {1: Spread(0.4, 0.2, 0.5), 32: Spread(0.3, 0.1, 0.35)},
        "redraw_rate": 0.0,
        "target_overlap": 0.0,
        "context_overlap": 0.0,
        "block_sizes": {(1, 2): 0.75, (2, 1): 0.25},
        "block_patches": Spread(2.0, 2.0, 2.0),
        "context_pieces": 1.0,
    }
    return MaskAudit(**{**fixed, **changes})


def test_an_audit_is_drawn_as_two_maps_the_context_shares_and_the_sizes(tmp_path):
    figure = draw_audit_figure([audit_of()], tmp_path / "audit.png")
    context, target, shares, sizes, *bars = figure.axes
    assert len(bars) == 2
    for axis, expected, name in (
        (context, audit_of().context_map, "context"),
        (target, audit_of().target_map, "target"),
    ):
        (image,) = axis.images
        np.testing.assert_array_equal(image.get_array().mask, expected == 0)
        np.testing.assert_array_equal(image.get_array().filled(0), expected)
        assert image.get_clim() == (0, expected.max())
        assert image.get_extent() == [0.5, 4.5, 2.5, 0.5]  # rows and columns are counted from 1, the first row on top
        assert axis.get_title() == f"How often a patch is {name}"
        assert axis.get_xlabel() == "gray: never (2 patches)"
    assert [bar.get_xlabel() for bar in bars] == ["probability of being context", "probability of being target"]
    assert context.get_ylabel() == "multi_block\n2x4"
    (line,) = shares.lines
    assert line.get_ydata().tolist() == [0.4, 0.3]
    assert [label.get_text() for label in shares.get_xticklabels()] == ["1", "32"]
    spans = [segment[:, 1].tolist() for segment in shares.collections[0].get_segments()]
    assert spans == [[0.2, 0.5], [0.1, 0.35]]
    assert [text.get_text() for text in shares.texts] == ["40.0 %", "30.0 %"]
    assert shares.get_ylim()[0] == 0
    assert [bar.get_width() for bar in sizes.patches] == [0.75, 0.25]
    assert sizes.get_xlim() == (0, pytest.approx(0.81))  # as long as the longest bar, and a little room
    assert [label.get_text() for label in sizes.get_yticklabels()] == ["1x2", "2x1"]
    check_texts(figure)


def test_the_maps_on_the_paper_have_the_colour_of_each_probability_and_gray_for_never(tmp_path):
    audits = [audit_of(), audit_of(context_map=np.array([[0.8, 0.0, 0.1, 0.2], [0.4, 0.3, 0.2, 0.1]]))]
    figure = draw_audit_figure(audits, tmp_path / "audit.png")
    viridis = matplotlib.colormaps["viridis"]
    for audit, panel in zip(audits, (0, 4), strict=True):
        shown = patch_centres(figure, tmp_path / "audit.png", panel, (2, 4))
        expected = viridis(audit.context_map / 0.8, bytes=True)[..., :3]  # one scale for both rows
        expected[audit.context_map == 0] = 217
        assert np.abs(shown.astype(int) - expected).max() <= 1


def test_rows_share_their_scales_so_that_they_can_be_compared(tmp_path):
    other = audit_of(
        "multi_block_official",
        target_map=np.full((2, 4), 0.9),
        context_share={1: Spread(0.8, 0.7, 0.9)},
        block_sizes={(2, 2): 1.0},
    )
    figure = draw_audit_figure([audit_of(), other], tmp_path / "audit.png")
    first, second = figure.axes[:4], figure.axes[4:8]
    assert [row[0].get_ylabel() for row in (first, second)] == ["multi_block\n2x4", "multi_block_official\n2x4"]
    assert first[1].images[0].get_clim() == second[1].images[0].get_clim() == (0, 0.9)
    assert second[1].get_xlabel() == ""  # every patch is used
    assert first[2].get_ylim() == second[2].get_ylim()
    assert first[2].get_ylim()[1] > 0.9
    assert first[3].get_xlim() == second[3].get_xlim()
    assert first[3].get_xlim()[1] > 1
    assert [axis.get_title() for axis in second] == [""] * 4
    check_texts(figure)


def test_rare_sizes_share_a_bar_and_scattered_patches_are_said_to_be_so(tmp_path):
    sizes = {
        (height, 2): share for height, share in enumerate([0.3, 0.2, 0.1, 0.1, 0.1, 0.05, 0.05, 0.04, 0.04, 0.02], 1)
    }
    figure = draw_audit_figure([audit_of(block_sizes=sizes)], tmp_path / "audit.png")
    names = [label.get_text() for label in figure.axes[3].get_yticklabels()]
    assert names == [*(f"{height}x2" for height in range(1, 9)), "2 more"]
    assert figure.axes[3].patches[-1].get_width() == pytest.approx(0.06)
    assert sum(bar.get_width() for bar in figure.axes[3].patches) == pytest.approx(1)
    check_texts(figure)
    figure = draw_audit_figure([audit_of("random", block_sizes={})], tmp_path / "audit.png")
    assert [text.get_text() for text in figure.axes[3].texts] == ["2 scattered patches"]
    assert not figure.axes[3].axison
    check_texts(figure)


@pytest.mark.parametrize("grid", [(14, 14), (24, 6)])
def test_texts_of_an_audit_do_not_touch_whatever_the_grid(tmp_path, grid: tuple[int, int]):
    official = MaskSettings(grid, "multi_block_official", official_min_keep=0)
    settings = [MaskSettings(grid, "block"), official, MaskSettings(grid, "random")]
    audits = [audit_masks(one, batch_size=8, num_steps=8, batch_sizes=(1, 8, 64, 256)) for one in settings]
    assert "multi_block_official\n{}x{}".format(*grid) in check_texts(draw_audit_figure(audits, tmp_path / "a.png"))


def test_no_audits_are_refused(tmp_path):
    with pytest.raises(ValueError, match="audits is empty"):
        draw_audit_figure([], tmp_path / "audit.png")


def test_pyplot_is_not_touched_and_a_missing_folder_is_named(tmp_path):
    draw_audit_figure([audit_of()], str(tmp_path / "audit.png"))
    assert matplotlib.pyplot.get_fignums() == []
    with pytest.raises(FileNotFoundError, match="figures"):
        draw_audit_figure([audit_of()], tmp_path / "figures" / "any.png")
