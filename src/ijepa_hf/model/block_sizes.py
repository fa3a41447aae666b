"""Computes the sizes of blocks on a grid of patches, and refuses settings that can never give masks.

`masking.py` draws sizes by these rules, and refuses settings by these checks before anything is drawn. The checks
search all sizes that a rule can give, not only those of one draw.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np

ASPECT_RATIO_LIMITS = (1e-5, 1e5)  # of a block's height / width; longer than the longest grid


class _SizeSettings(Protocol):
    """Declares the fields of `masking.MaskSettings` that decide the sizes of blocks; ranges are lowest and highest."""

    @property
    def grid_size(self) -> tuple[int, int]: ...
    @property
    def num_patches(self) -> int: ...
    @property
    def num_context_patches(self) -> int: ...
    @property
    def context_scale(self) -> tuple[float, float]: ...
    @property
    def target_scale(self) -> tuple[float, float]: ...
    @property
    def target_aspect_ratio(self) -> tuple[float, float]: ...
    @property
    def context_keep_ratio(self) -> float: ...
    @property
    def official_min_keep(self) -> int: ...
    @property
    def allow_overlap(self) -> bool: ...
    @property
    def mask_ratio(self) -> float: ...


# Sizes


def target_block_sizes(grid: tuple[int, int], scale: float, ratios: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Computes the sizes of target blocks of one scale.

    A block too long for the grid takes the whole side and keeps its area.

    Args:
        grid: Rows and columns of patches.
        scale: Area of a block as a share of the grid, above 0 and up to 1.
        ratios: Float `[n]`, height / width of each block.

    Returns:
        Heights and widths in patches, int64 `[n]`, each at least 1.
    """
    rows, columns = grid
    area = scale * rows * columns
    heights, widths = np.floor(np.sqrt(area * ratios) + 0.5), np.floor(np.sqrt(area / ratios) + 0.5)
    is_tall, is_wide = heights > rows, widths > columns  # never both: a block has at most the area of the grid
    heights, widths = (
        np.where(is_tall, rows, np.where(is_wide, round_half_up(area / columns), heights)),
        np.where(is_tall, round_half_up(area / rows), np.where(is_wide, columns, widths)),
    )
    return np.maximum(heights, 1).astype(np.int64), np.maximum(widths, 1).astype(np.int64)


def context_block_size(grid: tuple[int, int], scale: float) -> tuple[int, int]:
    """Computes height and width of a context block of the grid's own shape; scale 1 is the whole grid."""
    side = math.sqrt(scale)
    return max(1, round_half_up(grid[0] * side)), max(1, round_half_up(grid[1] * side))


def official_block_sizes(
    grid: tuple[int, int], uniforms: np.ndarray, scale: tuple[float, float], aspect_ratio: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """Computes the sizes of blocks as the published code does: one number drives both ranges, no block fills a side.

    Args:
        grid: Rows and columns of patches.
        uniforms: Float `[n]`, the drawn numbers, 0 to 1.
        scale: Lowest and highest area as a share of the grid.
        aspect_ratio: Lowest and highest height / width.

    Returns:
        Heights and widths in patches, int64 `[n]`.
    """
    rows, columns = grid
    areas = np.floor(rows * columns * (scale[0] + uniforms * (scale[1] - scale[0])))
    ratios = aspect_ratio[0] + uniforms * (aspect_ratio[1] - aspect_ratio[0])
    # rint sends halves to the even neighbour, as Python's `round` does
    heights, widths = np.rint(np.sqrt(areas * ratios)), np.rint(np.sqrt(areas / ratios))
    return np.minimum(heights, rows - 1).astype(np.int64), np.minimum(widths, columns - 1).astype(np.int64)


def round_half_up(value: float) -> int:
    """Rounds to the nearest whole number, halves upwards (Python's `round` sends them to the even neighbour)."""
    return math.floor(value + 0.5)


# Settings that can never fit


def check_context_fits(settings: _SizeSettings) -> None:
    """Refuses `multi_block` sizes where all targets on one place could leave less context than is to be kept."""
    keep, num_patches = settings.num_context_patches, settings.num_patches
    fewest = _fewest_context_patches(settings, settings.target_scale)
    if fewest >= keep:
        return
    shape = f"{settings.grid_size[0]}x{settings.grid_size[1]}"
    if fewest >= 1:
        raise ValueError(
            f"context_keep_ratio={settings.context_keep_ratio} asks for {keep} of the {num_patches} patches of a "
            f"{shape} grid, but with context_scale={settings.context_scale} and target_scale={settings.target_scale} "
            f"only {fewest} are sure to be left outside a target block; use at most "
            f"context_keep_ratio={fewest / num_patches:.6g}."
        )
    context_height, context_width = context_block_size(settings.grid_size, settings.context_scale[0])
    enough = min(keep, (context_height * context_width + 1) // 2)
    low, high = settings.target_scale
    while high > 1e-6:
        low, high = min(low, high * 0.8), high * 0.8
        fewest = _fewest_context_patches(settings, (low, high))
        if fewest < enough:
            continue
        advice = f"target_scale=({_floor_digits(low)}, {_floor_digits(high)})"
        if fewest < keep:
            advice += f" with context_keep_ratio={fewest / num_patches:.6g}"
        raise ValueError(
            f"target_scale={settings.target_scale} lets one target block cover the whole context block of a {shape} "
            f"grid with context_scale={settings.context_scale}, so that no patch is left to see; use for example "
            f"{advice}."
        )
    raise ValueError(
        f"grid_size={settings.grid_size} with context_scale={settings.context_scale} gives a context block of one "
        "patch, which a target block can cover; use for example grid_size=(4, 4) or larger, with "
        "context_scale=(0.85, 1.0), target_scale=(0.15, 0.2) and context_keep_ratio=0.25."
    )


def check_block_fits(settings: _SizeSettings) -> None:
    """Refuses a block that could cover the grid."""
    if _largest_block(settings, settings.mask_ratio) < settings.num_patches:
        return
    ratio = settings.mask_ratio
    shape = f"{settings.grid_size[0]}x{settings.grid_size[1]}"
    while ratio > 1e-6:
        ratio *= 0.9
        if _largest_block(settings, ratio) < settings.num_patches:
            raise ValueError(
                f"mask_ratio={settings.mask_ratio} lets the target block cover a whole {shape} grid, so that no patch "
                f"is left to see; use for example mask_ratio={_floor_digits(ratio)}."
            )
    raise ValueError(
        f"grid_size={settings.grid_size} has one patch only, which the target block covers; use for example "
        "grid_size=(4, 4) or larger."
    )


def _largest_block(settings: _SizeSettings, mask_ratio: float) -> int:
    low, high = settings.target_aspect_ratio
    ratios = _around(_ratios_that_round(mask_ratio * settings.num_patches, settings.grid_size, low, high), low, high)
    heights, widths = target_block_sizes(settings.grid_size, mask_ratio, ratios)
    return int((heights * widths).max())


def check_quadrants(settings: _SizeSettings) -> None:
    """Refuses a grid that cannot be cut into four equal quadrants."""
    rows, columns = settings.grid_size
    if rows % 2 or columns % 2:
        raise ValueError(
            f"grid_size={settings.grid_size} cannot be cut into four equal quadrants; masking_strategy='rasterized' "
            "needs an even number of rows and of columns (image_size / patch_size), for example "
            f"grid_size=({rows + rows % 2}, {columns + columns % 2})."
        )


def check_scatter(settings: _SizeSettings) -> None:
    """Refuses a share of scattered patches that leaves none as target, or none to see."""
    num_patches = settings.num_patches
    num_targets = round_half_up(settings.mask_ratio * num_patches)
    if 0 < num_targets < num_patches:
        return
    if num_patches == 1:
        raise ValueError(
            f"grid_size={settings.grid_size} has one patch only, which cannot be both context and target; use for "
            "example grid_size=(4, 4) or larger."
        )
    nearest = 1 if num_targets == 0 else num_patches - 1
    raise ValueError(
        f"mask_ratio={settings.mask_ratio} of the {num_patches} patches, rounded, makes {num_targets} of them "
        "targets; at least one must be target and one be left to see; use for example "
        f"mask_ratio={nearest / num_patches:.6g}."
    )


def _fewest_context_patches(settings: _SizeSettings, target_scale: tuple[float, float]) -> int:
    """Computes the fewest patches left of a context block, over all sizes, if all target blocks coincide."""
    grid = settings.grid_size
    # Both blocks grow with their scale, so the worst case is the smallest context with the largest target; only over
    # aspect ratios is there anything to search.
    height, width = context_block_size(grid, settings.context_scale[0])
    if settings.allow_overlap:
        return height * width
    area = target_scale[1] * settings.num_patches
    low, high = settings.target_aspect_ratio
    ratios = _around(_ratios_that_round(area, grid, low, high), low, high)
    tall, wide = target_block_sizes(grid, target_scale[1], ratios)
    return height * width - int((np.minimum(height, tall) * np.minimum(width, wide)).max())


def check_official_ends(settings: _SizeSettings) -> None:
    """Refuses sizes for which the published rule would draw for ever."""
    smallest = {
        "target_scale": _smallest_official_block(settings, settings.target_scale, settings.target_aspect_ratio),
        "context_scale": _smallest_official_block(settings, settings.context_scale, (1.0, 1.0)),
    }
    for name, patches in smallest.items():
        if patches > settings.official_min_keep:
            continue
        advice = f"official_min_keep={min(smallest.values()) - 1} would work"
        if min(smallest.values()) < 1:
            advice = "use a larger grid or scale, or masking_strategy='multi_block', which has no such limit"
        raise ValueError(
            f"official_min_keep={settings.official_min_keep} asks for more than {settings.official_min_keep} patches "
            f"in every block, but {name}={getattr(settings, name)} on grid_size={settings.grid_size} can give a block "
            f"of {patches}, for which the published rule would search for ever; {advice}."
        )


def _smallest_official_block(
    settings: _SizeSettings, scale: tuple[float, float], aspect_ratio: tuple[float, float]
) -> int:
    """Computes the fewest patches of any block that `official_block_sizes` can give."""
    cells = settings.num_patches
    areas = np.arange(int(cells * scale[0]), int(cells * scale[1]) + 1)
    ends = _shares(areas / cells, scale)  # of the numbers that give an area, which is one number to the next
    # While the area stays, the ratio goes on; where it rounds differently lies between the sides at both ends.
    ratios = aspect_ratio[0] + np.append(ends, 1.0).clip(0, 1) * (aspect_ratio[1] - aspect_ratio[0])
    steps = [ends]
    for area, low, high in zip(areas.tolist(), ratios[:-1].tolist(), ratios[1:].tolist(), strict=True):
        if low < high:
            steps.append(_shares(_ratios_that_round(area, settings.grid_size, low, high), aspect_ratio))
    heights, widths = official_block_sizes(
        settings.grid_size, _around(np.concatenate(steps), 0.0, 1.0), scale, aspect_ratio
    )
    return int((heights * widths).min())


def _ratios_that_round(area: float, grid: tuple[int, int], low: float, high: float) -> np.ndarray:
    """Computes the aspect ratios from low to high at which the rounded height or width of a block changes.

    Some values may lie outside of low and high. Blocks longer than the grid's sides are all cut to the same size.
    """
    if area * ASPECT_RATIO_LIMITS[1] < 0.25:
        return np.empty(0)  # always one patch
    longest = max(grid) + 1

    def halves(shortest: float, tallest: float) -> np.ndarray:
        return np.arange(max(0, math.floor(shortest) - 1), min(longest, math.ceil(tallest) + 1)) + 0.5

    tall = halves(min(longest, math.sqrt(area * low)), min(longest, math.sqrt(area * high)))
    wide = halves(min(longest, math.sqrt(area / high)), min(longest, math.sqrt(area / low)))
    return np.concatenate([tall * tall / area, area / (wide * wide)])


def _around(steps: np.ndarray, low: float, high: float) -> np.ndarray:
    """Returns numbers in every part of [low, high] between the steps of a function: the ends and the middles."""
    edges = np.unique(np.concatenate([[low, high], steps[(low < steps) & (steps < high)]]))
    return np.concatenate([[low], (edges[:-1] + edges[1:]) / 2, [high]])


def _shares(values: np.ndarray, interval: tuple[float, float]) -> np.ndarray:
    """Returns the positions of values in an interval, 0 at its start and 1 at its end."""
    return (values - interval[0]) / (interval[1] - interval[0]) if interval[1] > interval[0] else np.zeros(len(values))


def _floor_digits(value: float) -> float:
    """Rounds a value down to three significant digits."""
    digits = 2 - math.floor(math.log10(value))
    return math.floor(value * 10**digits) / 10**digits
