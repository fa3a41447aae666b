"""Draws the parts of all pictures: rows of panels, images and patches in them, outlines, frames, one set of colours.

Figures are `Figure` objects, without pyplot: they need no display and leave nothing open.
"""

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's colours, which also colour-blind people can distinguish, in the order that stands out on photographs.
BLOCK_COLORS = ("#E69F00", "#56B4E9", "#CC79A7", "#009E73", "#F0E442", "#D55E00", "#0072B2")
LINE_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")
TEXT_COLOR, FAINT_COLOR = "#333333", "#555555"
HIDDEN = 0.80  # gray level of a patch that is not seen
DPI = 150
PANEL_INCHES = 1.7


def panel_grid(
    rows: int,
    columns: int,
    aspect: float,
    *,
    foot: float = 0.0,
    edge: float = 0.08,
    right: float = 0.0,
) -> tuple[Figure, np.ndarray]:
    """Makes a figure of panels without ticks or frames, each of the image's shape, with thin gaps and room for titles.

    Args:
        rows: Rows of panels.
        columns: Columns of panels.
        aspect: Height of a panel over its width.
        foot: Inches below each row, for text.
        edge: Inches on the left, on the right, and below all rows.
        right: More inches on the right, for a colour bar.

    Returns:
        The figure, and its axes `[rows, columns]`.
    """
    gap, head = 0.06, 0.28  # inches between panels, and above the first row, for titles
    row_gap = gap + foot
    panel_height = PANEL_INCHES * aspect
    width = 2 * edge + right + columns * PANEL_INCHES + (columns - 1) * gap
    height = head + foot + edge + rows * panel_height + (rows - 1) * row_gap
    figure = Figure(figsize=(width, height), facecolor="white")
    axes = figure.subplots(rows, columns, squeeze=False)
    figure.subplots_adjust(
        left=edge / width,
        right=1 - (edge + right) / width,
        top=1 - head / height,
        bottom=(edge + foot) / height,
        wspace=gap / PANEL_INCHES,
        hspace=row_gap / panel_height,
    )
    for axis in axes.ravel():
        axis.set_axis_off()
    return figure, axes


def to_pictures(images: torch.Tensor, *, limits: tuple[float, float] | None = None) -> np.ndarray:
    """Turns images of any kind into RGB.

    Args:
        images: `[B, C, height, width]`. uint8 is taken as it is; floating point is stretched, so normalised pixels
            will do. Three channels are colours, of more the first three count; of one or two the first, in gray.
        limits: For floating point: the values that become black and white, so that parts of one image can stand beside
            parts of another; the smallest and largest of each image itself if not given.

    Returns:
        float64 `[B, height, width, 3]`, from 0 to 1.
    """
    shown = images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)
    pixels = shown.permute(0, 2, 3, 1).cpu().double().numpy()
    if not images.is_floating_point():
        return pixels / 255
    axes = (1, 2, 3)
    low, high = limits or (pixels.min(axes, keepdims=True), pixels.max(axes, keepdims=True))
    spread = np.subtract(high, low)
    stretched = (pixels - low) / np.where(spread > 0, spread, 1.0)
    return np.where(spread > 0, stretched, 0.5).clip(0, 1)


def show_picture(axis: Axes, picture: np.ndarray) -> None:
    """Shows a picture; one unit of the axes is a pixel.

    Args:
        axis: The panel.
        picture: `[height, width, 3]`, from 0 to 1.
    """
    height, width = picture.shape[:2]
    axis.imshow(picture, extent=(0, width, height, 0), vmin=0, vmax=1)


def mark_patches(indices: torch.Tensor, picture: np.ndarray, patch_size: tuple[int, int]) -> np.ndarray:
    """Marks patch positions in a grid.

    Args:
        indices: int64, row-major patch positions.
        picture: `[height, width, 3]`.
        patch_size: Height and width of a patch, in pixels.

    Returns:
        bool `[rows, columns]`.
    """
    grid = np.zeros((picture.shape[0] // patch_size[0], picture.shape[1] // patch_size[1]), dtype=bool)
    grid.ravel()[indices.cpu().numpy()] = True
    return grid


def per_pixel(grid: np.ndarray, patch_size: tuple[int, int]) -> np.ndarray:
    """Repeats the value of each patch for each of its pixels.

    Args:
        grid: `[rows, columns]`.
        patch_size: Height and width of a patch, in pixels.

    Returns:
        `[height, width, 1]`.
    """
    return grid.repeat(patch_size[0], axis=0).repeat(patch_size[1], axis=1)[:, :, None]


def keep_patches(picture: np.ndarray, visible: np.ndarray, patch_size: tuple[int, int]) -> np.ndarray:
    """Hides all patches of a picture but some in gray.

    Args:
        picture: `[height, width, 3]`, from 0 to 1.
        visible: bool `[rows, columns]`.
        patch_size: Height and width of a patch, in pixels.

    Returns:
        `[height, width, 3]`.
    """
    return np.where(per_pixel(visible, patch_size), picture, HIDDEN)


def outline(block: np.ndarray, patch_size: tuple[int, int]) -> list[list[tuple[float, float]]]:
    """Finds the edges between the patches of a block and all others: a rectangle, or several for scattered patches.

    Args:
        block: bool `[rows, columns]`.
        patch_size: Height and width of a patch, in pixels.

    Returns:
        Two ends (x, y) of each edge, in pixels.
    """
    height, width = patch_size
    padded = np.pad(block, 1)
    across = np.argwhere(padded[1:, 1:-1] != padded[:-1, 1:-1])  # horizontal edges, above patch (row, column)
    along = np.argwhere(padded[1:-1, 1:] != padded[1:-1, :-1])  # vertical edges, left of patch (row, column)
    lines = [[(c * width, r * height), ((c + 1) * width, r * height)] for r, c in across]
    return lines + [[(c * width, r * height), (c * width, (r + 1) * height)] for r, c in along]


def plain_frame(axis: Axes) -> None:
    """Gives axes of numbers a faint grid, no box and small gray labels."""
    axis.grid(color="#DDDDDD", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color("#999999")
    axis.tick_params(labelsize=8, colors=FAINT_COLOR)
