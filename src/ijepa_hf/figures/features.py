"""Draws features and predictions: which patches are similar, where predictions fail, what the predictor expects.

`figures.views` computes what is drawn here. Functions named `draw_...` write a PNG and return the matplotlib figure.
"""

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from torch import Tensor

from ijepa_hf.figures.panels import (
    BLOCK_COLORS,
    DPI,
    FAINT_COLOR,
    HIDDEN,
    PANEL_INCHES,
    TEXT_COLOR,
    keep_patches,
    mark_patches,
    outline,
    panel_grid,
    show_picture,
)
from ijepa_hf.figures.views import (
    Expectation,
    PatchColors,
    PatchMatches,
    cosine_map,
    error_map,
)

_LONGEST_NAME = 24  # characters below a panel
_LINE = 0.17  # inches of a line of text below a panel
_BAR_ROOM = 0.85  # inches for a colour bar and its labels


def draw_pca_figure(pictures: np.ndarray, colors: PatchColors, path: str | Path) -> Figure:
    """Draws images beside the principal components of their patches.

    Args:
        pictures: `[n, height, width, 3]`, from 0 to 1.
        colors: Of the same n images, from `patch_colors`.
        path: PNG to write; its folder must exist.

    Returns:
        The figure: pairs of panels, two pairs a row.

    Raises:
        ValueError: The arguments are of different numbers of images.
        FileNotFoundError: The folder of `path` does not exist.
    """
    _check_same_length(pictures=pictures, colors=colors.colors)
    pairs = min(2, len(pictures))
    rows = -(-len(pictures) // pairs)
    figure, axes = panel_grid(rows, 2 * pairs, _aspect(pictures), foot=0.0, edge=0.1)
    _title(axes[0], ["image", "components"] * pairs)
    for number, (picture, patches) in enumerate(zip(pictures, colors.colors, strict=True)):
        row, pair = divmod(number, pairs)
        show_picture(axes[row, 2 * pair], picture)
        height, width = picture.shape[:2]
        axes[row, 2 * pair + 1].imshow(patches, extent=(0, width, height, 0), vmin=0, vmax=1, interpolation="nearest")
    shares = ", ".join(f"{100 * share:.0f} %" for share in colors.explained)
    _foot_of_figure(figure, f"red, green, blue: {shares} of the variance")
    figure.savefig(path, dpi=DPI)
    return figure


def draw_cosine_figure(
    pictures: np.ndarray, features: Tensor, patches: Sequence[Sequence[tuple[int, int]]], path: str | Path
) -> Figure:
    """Draws the cosine of some patches to all others of their image.

    Args:
        pictures: `[n, height, width, 3]`, from 0 to 1.
        features: `[n, rows, columns, D]`.
        patches: Row and column of each patch to compare with; the same number for each image.
        path: PNG to write; its folder must exist.

    Returns:
        The figure: a row for each image, with a map for each patch, all of one colour scale.

    Raises:
        ValueError: The arguments are of different numbers of images.
        FileNotFoundError: The folder of `path` does not exist.
    """
    _check_same_length(pictures=pictures, features=features, patches=patches)
    maps = [
        [cosine_map(own, row, column) for row, column in places] for own, places in zip(features, patches, strict=True)
    ]
    lowest = min(float(one.min()) for row in maps for one in row)
    count = len(patches[0])
    figure, axes = panel_grid(len(pictures), 1 + count, _aspect(pictures), right=_BAR_ROOM)
    _title(axes[0], ["image", *(f"patch {number + 1}" for number in range(count))])
    shown: Any = None
    for row, picture, own, places in zip(axes, pictures, maps, patches, strict=True):
        show_picture(row[0], picture)
        grid = own[0].shape
        patch_size = picture.shape[0] // grid[0], picture.shape[1] // grid[1]
        blocks = [np.zeros(grid, dtype=bool) for _ in places]
        for block, place in zip(blocks, places, strict=True):
            block[place] = True
        _draw_outlines(row[0], blocks, patch_size)
        for number, (axis, cosines) in enumerate(zip(row[1:], own, strict=True)):
            shown = _heat(axis, cosines, picture, lowest, 1.0)
            _draw_outlines(axis, [blocks[number]], patch_size, first_color=number)
    _color_bar(figure, axes, shown, "cosine to the marked patch")
    figure.savefig(path, dpi=DPI)
    return figure


def draw_errors_figure(
    pictures: np.ndarray,
    context_indices: Tensor,
    target_indices: Tensor,
    errors: Tensor,
    patch_size: tuple[int, int],
    path: str | Path,
) -> Figure:
    """Draws where predictions fail: the loss of each target patch, and below it the mean of each block.

    Args:
        pictures: `[B, height, width, 3]`, from 0 to 1.
        context_indices: int64 `[B, K]` or `[B, S, K]`, of which the first set is drawn.
        target_indices: int64 `[B, M, P]`.
        errors: `[B, M, P]`, from `prediction_errors`; a patch of several blocks is drawn with their mean.
        patch_size: Height and width of a patch, in pixels.
        path: PNG to write; its folder must exist.

    Returns:
        The figure: a row for each image, with image, context and error.

    Raises:
        ValueError: The arguments are of different numbers of images.
        FileNotFoundError: The folder of `path` does not exist.
    """
    _check_same_length(pictures=pictures, context=context_indices, targets=target_indices, errors=errors)
    foot = _lines_of_blocks(target_indices) * _LINE + 0.06
    figure, axes = panel_grid(len(pictures), 3, _aspect(pictures), foot=foot, right=_BAR_ROOM)
    _title(axes[0], ["image", "context", "error"])
    for b, row in enumerate(axes):
        _draw_image_and_context(row, pictures[b], context_indices[b], target_indices[b], patch_size)
    _draw_errors(figure, axes, pictures, target_indices, errors, patch_size)
    figure.savefig(path, dpi=DPI)
    return figure


def draw_expectation_figure(
    pictures: np.ndarray,
    context_indices: Tensor,
    target_indices: Tensor,
    expectation: Expectation,
    tiles: tuple[np.ndarray, np.ndarray],
    patch_size: tuple[int, int],
    path: str | Path,
    errors: Tensor | None = None,
) -> Figure:
    """Draws what the predictor expects: shows at each target patch the real patch that is most like the prediction.

    The last panel shows the same for the true targets, which is the best that this gallery could show. Where blocks
    share a patch, the first counts.

    Args:
        pictures: `[B, height, width, 3]`, from 0 to 1.
        context_indices: int64 `[B, K]` or `[B, S, K]`, of which the first set is drawn.
        target_indices: int64 `[B, M, P]`.
        expectation: Of the same images and blocks.
        tiles: The pixels of `expectation.expected` and of `expectation.nearest_to_truth`, each
            `[B, M, P, patch height, patch width, 3]`.
        patch_size: Height and width of a patch, in pixels.
        path: PNG to write; its folder must exist.
        errors: `[B, M, P]`, from `prediction_errors`: drawn in one more panel, as by `draw_errors_figure`.

    Returns:
        The figure: a row for each image, with image, context, errors if given, expectation and nearest to the truth.

    Raises:
        ValueError: The arguments are of different numbers of images.
        FileNotFoundError: The folder of `path` does not exist.
    """
    _check_same_length(
        pictures=pictures, context=context_indices, targets=target_indices, expected=tiles[0], nearest=tiles[1],
        **({} if errors is None else {"errors": errors}),
    )  # fmt: skip
    titles = ["image", "context", *([] if errors is None else ["error"]), "expected", "nearest to truth"]
    lines, right = (2, 0.0) if errors is None else (max(2, _lines_of_blocks(target_indices)), _BAR_ROOM)
    figure, axes = panel_grid(len(pictures), len(titles), _aspect(pictures), foot=lines * _LINE + 0.06, right=right)
    _title(axes[0], titles)
    for b, row in enumerate(axes):
        _draw_image_and_context(row, pictures[b], context_indices[b], target_indices[b], patch_size)
        found = [(expectation.expected, tiles[0]), (expectation.nearest_to_truth, tiles[1])]
        cosines = [float(matches.similarity[b].mean()) for matches, _ in found]
        for axis, (_, shown) in zip(row[-2:], found, strict=True):
            _draw_tiles(axis, pictures[b], target_indices[b], shown[b], patch_size)
        truth = float(expectation.truth_similarity[b].mean())
        _below(row[-2], [f"cosine {cosines[0]:.2f}", f"to the truth {truth:.2f}"])
        _below(row[-1], [f"cosine {cosines[1]:.2f}"])
    if errors is not None:
        _draw_errors(figure, axes, pictures, target_indices, errors, patch_size)
    figure.savefig(path, dpi=DPI)
    return figure


def draw_retrieval_figure(
    queries: np.ndarray,
    query_names: Sequence[str],
    neighbours: np.ndarray,
    neighbour_names: Sequence[Sequence[str]],
    similarity: np.ndarray,
    path: str | Path,
) -> Figure:
    """Draws images and their nearest neighbours, a row each.

    Args:
        queries: `[q, height, width, 3]`, from 0 to 1.
        query_names: A name for each, such as its label, written below it; may be empty. Longer ones are cut to 24
            characters.
        neighbours: `[q, k, height, width, 3]`, the most similar first.
        neighbour_names: k names for each query, as `query_names`.
        similarity: `[q, k]`, cosines.
        path: PNG to write; its folder must exist.

    Returns:
        The figure.

    Raises:
        ValueError: The arguments are of different numbers of images.
        FileNotFoundError: The folder of `path` does not exist.
    """
    _check_same_length(
        queries=queries, names=query_names, neighbours=neighbours, others=neighbour_names, similarity=similarity
    )
    named = any(query_names) or any(any(names) for names in neighbour_names)
    foot = (1 + named) * _LINE + 0.06
    figure, axes = panel_grid(len(queries), 1 + neighbours.shape[1], _aspect(queries), foot=foot)
    _title(axes[0], ["query", *(f"nearest {number + 1}" for number in range(neighbours.shape[1]))])
    for row, query, name, images, names, cosines in zip(
        axes, queries, query_names, neighbours, neighbour_names, similarity, strict=True
    ):
        show_picture(row[0], query)
        _below(row[0], [_cut(name)] if named else [])
        for axis, image, its_name, cosine in zip(row[1:], images, names, cosines, strict=True):
            show_picture(axis, image)
            _below(axis, [*([_cut(its_name)] if named else []), f"cosine {cosine:.2f}"])
    figure.savefig(path, dpi=DPI)
    return figure


def cut_patches(pictures: np.ndarray, matches: PatchMatches, patch_size: tuple[int, int]) -> np.ndarray:
    """Cuts matched patches out of the pictures of a gallery.

    Args:
        pictures: `[n, height, width, channels]`, any dtype: the gallery.
        matches: Each `[...]`.
        patch_size: Height and width of a patch, in pixels.

    Returns:
        `[..., patch height, patch width, channels]`.
    """
    height, width = patch_size
    columns = pictures.shape[2] // width
    patches = [
        pictures[image, row * height : (row + 1) * height, column * width : (column + 1) * width]
        for image, (row, column) in zip(
            matches.images.flatten().tolist(),
            (divmod(position, columns) for position in matches.positions.flatten().tolist()),
            strict=True,
        )
    ]
    return np.stack(patches).reshape(*matches.images.shape, height, width, pictures.shape[-1])


# -- parts of rows ---------------------------------------------------------------------------------------------------


def _draw_image_and_context(
    row: np.ndarray, picture: np.ndarray, context: Tensor, targets: Tensor, patch_size: tuple[int, int]
) -> None:
    show_picture(row[0], picture)
    _outline_blocks(row[0], targets, picture, patch_size)
    first_set = context if context.ndim == 1 else context[0]
    show_picture(row[1], keep_patches(picture, mark_patches(first_set, picture, patch_size), patch_size))


def _draw_errors(
    figure: Figure,
    axes: np.ndarray,
    pictures: np.ndarray,
    target_indices: Tensor,
    errors: Tensor,
    patch_size: tuple[int, int],
) -> None:
    """Fills the third panels with maps on one scale; below them a coloured square and the mean error of each block."""
    grid = pictures.shape[1] // patch_size[0], pictures.shape[2] // patch_size[1]
    maps = [error_map(own, targets, grid) for own, targets in zip(errors, target_indices, strict=True)]
    highest = max(float(np.nanmax(one)) for one in maps)
    shown: Any = None
    for b, axis in enumerate(axes[:, 2]):
        shown = _heat(axis, maps[b], pictures[b], 0.0, highest)
        _outline_blocks(axis, target_indices[b], pictures[b], patch_size)
        for block, (mean, color) in enumerate(zip(errors[b].mean(dim=-1).tolist(), cycle(BLOCK_COLORS), strict=False)):
            line, place = divmod(block, 2)
            y = -0.04 - line * _LINE / (PANEL_INCHES * _aspect(pictures))
            x = 0.02 + 0.5 * place
            axis.text(x, y, "\u25a0", transform=axis.transAxes, fontsize=9, va="top", color=color)
            axis.text(x + 0.1, y, f"{mean:.3f}", transform=axis.transAxes, fontsize=9, va="top", color=TEXT_COLOR)
    _color_bar(figure, axes, shown, "loss at the patch")


def _draw_tiles(
    axis: Axes, picture: np.ndarray, targets: Tensor, tiles: np.ndarray, patch_size: tuple[int, int]
) -> None:
    """Shows the picture, faded, with tiles `[M, P, height, width, 3]` in the place of its target patches."""
    height, width = patch_size
    columns = picture.shape[1] // width
    canvas = 0.35 * picture + 0.65 * HIDDEN
    for block, patches in reversed(list(zip(targets.tolist(), tiles, strict=True))):  # the first block lies on top
        for position, tile in zip(block, patches, strict=True):
            row, column = divmod(position, columns)
            canvas[row * height : (row + 1) * height, column * width : (column + 1) * width] = tile
    show_picture(axis, canvas)
    edges = outline(mark_patches(targets.flatten(), picture, patch_size), patch_size)
    axis.add_collection(LineCollection(edges, colors="#222222", linewidths=1.2, clip_on=False), autolim=False)


def _heat(axis: Axes, values: np.ndarray, picture: np.ndarray, low: float, high: float) -> Any:
    height, width = picture.shape[:2]
    colors = colormaps["viridis"].with_extremes(bad=str(HIDDEN))
    masked = np.ma.masked_invalid(values)
    return axis.imshow(masked, cmap=colors, vmin=low, vmax=high, extent=(0, width, height, 0), interpolation="nearest")


def _outline_blocks(axis: Axes, targets: Tensor, picture: np.ndarray, patch_size: tuple[int, int]) -> None:
    _draw_outlines(axis, [mark_patches(indices, picture, patch_size) for indices in targets], patch_size)


def _draw_outlines(
    axis: Axes, blocks: Sequence[np.ndarray], patch_size: tuple[int, int], first_color: int = 0
) -> None:
    """Draws the outlines of blocks, each in its colour."""
    edges, colors = [], []
    for number, block in enumerate(blocks, first_color):
        own = outline(block, patch_size)
        edges += own
        colors += [BLOCK_COLORS[number % len(BLOCK_COLORS)]] * len(own)
    # dark below, so that the colour is seen on any ground
    for width, shade in ((2.8, "#222222"), (1.6, colors)):
        lines = LineCollection(edges, colors=shade, linewidths=width, clip_on=False, capstyle="round")
        axis.add_collection(lines, autolim=False)


def _color_bar(figure: Figure, axes: np.ndarray, shown: Any, label: str) -> None:
    top, bottom = axes[0, -1].get_position(), axes[-1, -1].get_position()
    width, height = figure.get_size_inches()
    longest = min(top.y1 - bottom.y0, 3 * PANEL_INCHES / height)
    place = figure.add_axes((top.x1 + 0.12 / width, top.y1 - longest, 0.12 / width, longest))
    bar = figure.colorbar(shown, cax=place)
    bar.set_label(label, fontsize=9, color=FAINT_COLOR)
    bar.ax.tick_params(labelsize=8, colors=FAINT_COLOR)


def _title(axes: np.ndarray, titles: Sequence[str]) -> None:
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=11, color=TEXT_COLOR, pad=4)


def _below(axis: Axes, lines: Sequence[str]) -> None:
    axis.text(
        0.5, -0.03, "\n".join(lines), transform=axis.transAxes, ha="center", va="top", fontsize=9, color=TEXT_COLOR
    )  # fmt: skip


def _cut(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "\u2026"


def _foot_of_figure(figure: Figure, text: str) -> None:
    """Writes a line of text below all panels, and makes the figure higher for it."""
    width, height = figure.get_size_inches()
    grown = height + 0.24
    figure.set_size_inches(width, grown)
    pars = figure.subplotpars
    figure.subplots_adjust(top=1 - (1 - pars.top) * height / grown, bottom=(pars.bottom * height + 0.24) / grown)
    figure.text(0.5, 0.08 / grown, text, ha="center", va="bottom", fontsize=9, color=TEXT_COLOR, parse_math=False)


def _lines_of_blocks(target_indices: Tensor) -> int:
    return -(-target_indices.shape[1] // 2)


def _aspect(pictures: np.ndarray) -> float:
    return float(pictures.shape[1] / pictures.shape[2])


def _check_same_length(**values: Any) -> None:
    lengths = {name: len(value) for name, value in values.items()}
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        raise ValueError(f"{lengths}: these must be of the same images, at least one.")
