"""Draws which patches the context encoder sees and which the predictor must predict.

`draw_masks` draws the masks of a whole optimiser step, all images at once, from the numpy generator that it is given
and from nothing else: the caller keys that generator on (seed, step), so every rank and worker can draw the same step
and take its own slots of it. One target size and one context size are drawn per call, which keeps the tensors
rectangular and the work of all ranks equal; positions are drawn per image.

`multi_block` is the method of the paper (Assran et al., CVPR 2023, arXiv 2301.08243, section 3): every row and column
is reached, and the context keeps the same number of patches K at any batch size. `multi_block_official` has the
distribution of the published code: there the last row and column are never used, scale and aspect ratio of the
targets move together, and the context gets smaller as the batch grows. `block`, `rasterized` and `random` are what the
paper compares itself with (table 6): one large block, three quadrants, or scattered patches are the target, and the
context is all the rest. Own targets (objects, say) need none of this: their patches are passed to the model, as
docs/masks.md shows. `STRATEGIES`, at the end, has a record for each strategy: a new one is a function that draws, its
record, and a field of `MaskSettings` for each number that it alone needs.

Letters in shapes: B images, N patches of an image, K context patches kept, M target blocks, P patches in a target
block, S context sets per image. Patch positions are row-major int64.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np
import torch

from .block_sizes import (  # relative: these files are shipped with models, see runs/export.py
    ASPECT_RATIO_LIMITS,
    check_block_fits,
    check_context_fits,
    check_official_ends,
    check_quadrants,
    check_scatter,
    context_block_size,
    official_block_sizes,
    round_half_up,
    target_block_sizes,
)

# Far above what a transformer attends to. A larger number is a typing mistake, with which checks and draws would take
# many minutes or all memory.
MAX_PATCHES = 2**16  # of an image: 256 x 256 patches, for example 4096 pixels a side in patches of 16
MAX_BLOCKS = 256  # target blocks, and context sets, of an image
MAX_PATCHES_TRIED = 2**22  # patches x context sets x target blocks; a draw that fails often then takes 2 s an image

# `multi_block`: how often an image's targets are drawn before targets are put on top of each other.
MAX_TARGET_DRAWS = 20
# `multi_block_official`: draws of a context position before one more target block may be overlapped.
OFFICIAL_TRIES = 20
# `multi_block`: orders in which a grid is scanned for the context patches to keep (see `_keep_from_a_side`).
NUM_SCANS = 8


class Masks(NamedTuple):
    """Holds the masks of the images of one batch.

    Attributes:
        context_indices: int64 `[B, K]`, or `[B, S, K]` when more than one context set was asked for; ascending.
        target_indices: int64 `[B, M, P]`, ascending; each row is a whole rectangle of patches, except with `random`.
        redraw_rate: share of these images, 0 to 1, that had to be redrawn at least once because too little context was
            left: targets in `multi_block`, context in `multi_block_official`; 0 with any other strategy.
    """

    context_indices: torch.Tensor
    target_indices: torch.Tensor
    redraw_rate: float


def _setting(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class MaskSettings:
    """Holds and checks the settings of `draw_masks`. `IJepaConfig` takes its mask fields from these.

    Args:
        grid_size: rows and columns of patches, each at least 1, together at most `MAX_PATCHES` patches.

    `metadata["help"]` describes the other fields. `STRATEGIES` names those that a strategy uses; the rest must keep
    their defaults. S x M x patches is at most `MAX_PATCHES_TRIED`.

    Raises:
        ValueError: a value is out of range, a field that the strategy does not use is set, or the sizes that can be
            drawn do not fit the grid. The message names the field, its value, the rule and a value that would work.
    """

    grid_size: tuple[int, int]
    masking_strategy: str = _setting(
        "multi_block",
        "How masks are drawn: multi_block, multi_block_official (as the published code), or block, rasterized, random "
        "(table 6 of the paper).",
    )
    num_context_sets: int = _setting(1, "Context sets S drawn per image, 1 to 256 (multi-block strategies).")
    num_target_blocks: int = _setting(4, "Target blocks M drawn per image, 1 to 256 (multi-block strategies).")
    context_scale: tuple[float, float] = _setting(
        (0.85, 1.0), "Lowest and highest share of the grid that the context block covers, above 0 and up to 1."
    )
    target_scale: tuple[float, float] = _setting(
        (0.15, 0.2), "Lowest and highest share of the grid that a target block covers, above 0 and up to 1."
    )
    target_aspect_ratio: tuple[float, float] = _setting(
        (0.75, 1.5), "Lowest and highest height / width of a target block, 1e-5 to 1e5."
    )
    context_keep_ratio: float = _setting(
        0.25, "Share of the patches that the context encoder sees, above 0 and up to 1 (multi_block)."
    )
    official_min_keep: int = _setting(10, "Blocks keep more patches than this, at least 0 (multi_block_official).")
    allow_overlap: bool = _setting(False, "Let context patches lie inside target blocks (multi-block strategies).")
    mask_ratio: float = _setting(0.6, "Share of the patches that is target, above 0 and below 1 (block, random).")

    def __post_init__(self) -> None:
        self._check_pair("grid_size", whole=True)
        if self.num_patches > MAX_PATCHES:
            raise ValueError(
                f"grid_size={self.grid_size!r} has {self.num_patches} patches, but an image may have {MAX_PATCHES} at "
                "most; use a smaller image or larger patches, for example grid_size=(256, 256)."
            )
        for name in ("context_scale", "target_scale"):
            self._check_pair(name, highest=1.0)
        self._check_pair("target_aspect_ratio")
        lowest, highest = ASPECT_RATIO_LIMITS
        if not lowest <= self.target_aspect_ratio[0] <= self.target_aspect_ratio[1] <= highest:
            raise ValueError(
                f"target_aspect_ratio={self.target_aspect_ratio!r} must lie between {lowest:g} and {highest:g}, for "
                f"example target_aspect_ratio={_default('target_aspect_ratio')!r}."
            )
        self._check_count("num_context_sets", 1, MAX_BLOCKS)
        self._check_count("num_target_blocks", 1, MAX_BLOCKS)
        tried = self.num_patches * self.num_context_sets * self.num_target_blocks
        if tried > MAX_PATCHES_TRIED:
            raise ValueError(
                f"num_context_sets={self.num_context_sets} and num_target_blocks={self.num_target_blocks} are too "
                f"many for grid_size={self.grid_size}: their product with the {self.num_patches} patches is {tried}, "
                f"and may be {MAX_PATCHES_TRIED} at most; use for example num_context_sets=1 with num_target_blocks=4."
            )
        self._check_count("official_min_keep", 0)
        if not _is_number(self.context_keep_ratio) or not 0 < self.context_keep_ratio <= 1:
            raise ValueError(
                f"context_keep_ratio={self.context_keep_ratio!r} must be a number above 0 and up to 1, "
                "for example context_keep_ratio=0.25."
            )
        if not isinstance(self.allow_overlap, bool):
            raise ValueError(f"allow_overlap={self.allow_overlap!r} must be a bool; use allow_overlap=False.")
        if not _is_number(self.mask_ratio) or not 0 < self.mask_ratio < 1:
            raise ValueError(
                f"mask_ratio={self.mask_ratio!r} must be a number above 0 and below 1, for example mask_ratio=0.6."
            )
        if self.masking_strategy == "regions":
            raise ValueError(
                "masking_strategy='regions' is gone: write masking_strategy='multi_block', and pass the patches of "
                "your own regions to the model as context_indices and target_indices (docs/masks.md shows how)."
            )
        if not isinstance(self.masking_strategy, str) or self.masking_strategy not in STRATEGIES:
            raise ValueError(
                f"masking_strategy={self.masking_strategy!r} must be one of "
                f"{', '.join(map(repr, STRATEGIES))}; use masking_strategy='multi_block'."
            )
        strategy = STRATEGIES[self.masking_strategy]
        used = {"grid_size", "masking_strategy", *strategy.fields}
        for entry in fields(self):
            if entry.name not in used:
                self._check_unused(entry.name)
        strategy.check_sizes(self)

    @property
    def num_patches(self) -> int:
        """N, the patches of one image."""
        return self.grid_size[0] * self.grid_size[1]

    @property
    def num_targets(self) -> int:
        """M as it comes out: `num_target_blocks`, but 1 with `block` and `random` and 3 with `rasterized`."""
        return STRATEGIES[self.masking_strategy].num_targets or self.num_target_blocks

    @property
    def num_context_patches(self) -> int:
        """K, the context patches of a context set, where it is the same in every batch.

        Raises:
            ValueError: with a strategy where it depends on the draws.
        """
        count = STRATEGIES[self.masking_strategy].num_context_patches
        if count is None:
            fixed = [repr(name) for name, strategy in STRATEGIES.items() if strategy.num_context_patches]
            raise ValueError(
                f"masking_strategy={self.masking_strategy!r} does not have the same number of context patches in "
                f"every batch; only {', '.join(fixed)} have a fixed num_context_patches."
            )
        return count(self)

    def _check_pair(self, name: str, highest: float = math.inf, whole: bool = False) -> None:
        value = getattr(self, name)
        example = f"for example {name}=" + ("(14, 14)" if whole else repr(_default(name)))
        kind = "whole numbers" if whole else "numbers"
        is_kind = is_whole if whole else _is_number
        if not isinstance(value, tuple | list) or len(value) != 2 or not all(is_kind(part) for part in value):
            raise ValueError(f"{name}={value!r} must be two {kind}, {example}.")
        first, second = (int(part) if whole else float(part) for part in value)
        if whole and min(first, second) < 1:
            raise ValueError(f"{name}={value!r} must be at least 1 row and 1 column, {example}.")
        if not whole and not 0 < first <= second <= highest:
            limit = "" if highest == math.inf else f" <= {highest:g}"
            raise ValueError(f"{name}={value!r} must satisfy 0 < lowest <= highest{limit}, {example}.")
        object.__setattr__(self, name, (first, second))

    def _check_count(self, name: str, lowest: int, highest: float = math.inf) -> None:
        value = getattr(self, name)
        if not is_whole(value) or not lowest <= value <= highest:
            limit = "" if highest == math.inf else f" and at most {highest}"
            raise ValueError(
                f"{name}={value!r} must be a whole number of at least {lowest}{limit}, for example "
                f"{name}={_default(name)}."
            )
        object.__setattr__(self, name, int(value))

    def _check_unused(self, name: str) -> None:
        if getattr(self, name) != _default(name):
            raise ValueError(
                f"{name}={getattr(self, name)!r} is not used by masking_strategy={self.masking_strategy!r} and may "
                f"not be set; leave {name}={_default(name)!r}."
            )


def draw_masks(
    settings: MaskSettings, batch_size: int, generator: np.random.Generator, slots: slice | None = None
) -> Masks:
    """Draws the masks of one optimiser step, or of some of its images.

    `multi_block`: an image of which some context set keeps fewer than K patches outside the targets draws all its
    targets again and keeps its context blocks; after `MAX_TARGET_DRAWS` draws its targets are laid on top of the
    first one, last first, until K patches are left. Which K of them are kept favours no side of the image.

    `block`: one size per call, `mask_ratio` of the grid in area; any place is equally likely. `rasterized`: any of the
    four quadrants is equally likely to be the context; the others are the targets, in reading order. `random`: any set
    of `mask_ratio` of the patches, rounded, is equally likely to be the target.

    The positions of all `batch_size` images are drawn whatever `slots` is, so that
    `draw_masks(s, n, g, slots=slice(a, b))` gives rows a to b of `draw_masks(s, n, g)` for equal generators. Only with
    `multi_block_official` is the context then cut to the shortest among the images returned, as each rank of the
    published code does. How far the generator has moved afterwards depends on the redraws: key a new one every step.

    Args:
        settings: grid, strategy and sizes.
        batch_size: images in the global batch of the step, over all ranks and accumulated micro-batches; at least 1.
        generator: the only source of randomness.
        slots: places in the global batch to return, at least one, inside 0 to batch_size; all of them if None.

    Returns:
        The masks of the chosen images, B being their number. No patch is in both context and target of an image unless
        `allow_overlap` is set or, in `multi_block_official`, target blocks had to be given up.

    Raises:
        ValueError: `batch_size` is below 1, or `slots` is empty or reaches outside the batch.

    Source: section 3 and appendix A.1 of arXiv 2301.08243 (sizes and numbers of blocks), table 6 there (`block`,
    `rasterized`, `random`).
    """
    if not is_whole(batch_size) or batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r} must be a whole number of at least 1, for example batch_size=1.")
    slots = slice(0, batch_size) if slots is None else _check_slots(slots, batch_size)
    return STRATEGIES[settings.masking_strategy].draw(settings, batch_size, generator, slots)


def _draw_multi_block(settings: MaskSettings, batch_size: int, generator: np.random.Generator, slots: slice) -> Masks:
    grid, keep = settings.grid_size, settings.num_context_patches
    per_context, per_target = (batch_size, settings.num_context_sets), (batch_size, settings.num_target_blocks)
    target_size = _target_size(settings, generator.uniform(*settings.target_scale), generator)
    context_size = context_block_size(grid, generator.uniform(*settings.context_scale))
    # Everything that is drawn once comes before the targets, whose number of draws depends on the slots.
    scans = generator.integers(NUM_SCANS, size=per_context)[slots]
    inside = _patches_inside(grid, context_size, _draw_corners(generator, grid, context_size, per_context)[slots])

    corners = _draw_corners(generator, grid, target_size, per_target)[slots]
    target_blocks = _block_indices(grid, target_size, corners)
    if settings.allow_overlap:
        visible, num_redrawn = inside, 0
    else:
        visible = _without_targets(inside, target_blocks)
        failed = _images_short_of(visible, keep)
        num_redrawn = failed.size
        for attempt in range(1, MAX_TARGET_DRAWS + settings.num_target_blocks - 1):
            if not failed.size:
                break
            if attempt < MAX_TARGET_DRAWS:
                corners[failed] = _draw_corners(generator, grid, target_size, per_target)[slots][failed]
            else:
                # Last resort: the last two targets move onto the first, then the last three... With all of them there
                # the context has lost one block, and MaskSettings made sure that K patches remain.
                num_moved = attempt - MAX_TARGET_DRAWS + 1
                corners[failed, -num_moved:] = corners[failed, :1]
            target_blocks[failed] = _block_indices(grid, target_size, corners[failed])
            visible[failed] = _without_targets(inside[failed], target_blocks[failed])
            failed = failed[_images_short_of(visible[failed], keep)]
        assert not failed.size, "MaskSettings accepted sizes that do not fit"

    context_indices = _keep_from_a_side(grid, visible.reshape(-1, settings.num_patches), keep, scans.ravel())
    return _as_masks(context_indices, target_blocks, num_redrawn, settings)


def _draw_multi_block_official(
    settings: MaskSettings, batch_size: int, generator: np.random.Generator, slots: slice
) -> Masks:
    grid, num_targets = settings.grid_size, settings.num_target_blocks
    per_context, per_target = (batch_size, settings.num_context_sets), (batch_size, num_targets)
    uniforms = generator.random(), generator.random()
    ranges = (settings.target_scale, settings.target_aspect_ratio), (settings.context_scale, (1.0, 1.0))
    target_size, context_size = (
        _only(official_block_sizes(grid, np.array([uniform]), *own))
        for uniform, own in zip(uniforms, ranges, strict=True)
    )
    corners = _draw_corners(generator, grid, target_size, per_target, use_last=False)[slots]
    target_blocks = _block_indices(grid, target_size, corners)
    first_covering: np.ndarray | None = None

    # One row per image and context set; each is redrawn by itself until it has enough patches.
    image = np.repeat(np.arange(len(target_blocks)), settings.num_context_sets)
    visible = np.zeros((len(image), settings.num_patches), dtype=bool)
    pending = np.arange(len(image))
    redrawn = pending[:0]
    for attempt in range(OFFICIAL_TRIES * num_targets + 1):
        corners = _draw_corners(generator, grid, context_size, per_context, use_last=False)[slots].reshape(-1, 1)
        inside = _patches_inside(grid, context_size, corners[pending])[:, 0]
        # The last target blocks are the first that may be overlapped.
        num_avoided = 0 if settings.allow_overlap else num_targets - attempt // OFFICIAL_TRIES
        if num_avoided == 0:
            visible[pending] = inside
        elif attempt == 0:  # all images, and enough for nearly all
            visible[pending] = _without_targets(inside[:, None], target_blocks[image])[:, 0]
        else:
            if first_covering is None:
                first_covering = _first_covering(target_blocks, settings.num_patches)
            visible[pending] = inside & (first_covering[image[pending]] >= num_avoided)
        pending = pending[visible[pending].sum(axis=1) <= settings.official_min_keep]
        if attempt == 0:
            redrawn = np.unique(image[pending])
        if not pending.size:
            break
    assert not pending.size, "MaskSettings accepted sizes that never succeed"

    shortest = int(visible.sum(axis=1).min())
    return _as_masks(_first_patches(visible, shortest), target_blocks, redrawn.size, settings)


def _draw_block(settings: MaskSettings, batch_size: int, generator: np.random.Generator, slots: slice) -> Masks:
    grid = settings.grid_size
    size = _target_size(settings, settings.mask_ratio, generator)
    corners = _draw_corners(generator, grid, size, (batch_size, 1))[slots]
    inside = _patches_inside(grid, size, corners)[:, 0]
    num_visible = settings.num_patches - size[0] * size[1]
    return _as_masks(_first_patches(~inside, num_visible), _block_indices(grid, size, corners), 0, settings)


def _draw_rasterized(settings: MaskSettings, batch_size: int, generator: np.random.Generator, slots: slice) -> Masks:
    rows, columns = settings.grid_size
    size = rows // 2, columns // 2
    corners = np.array([[0], [size[1]], [size[0] * columns], [size[0] * columns + size[1]]])
    quadrants = _block_indices(settings.grid_size, size, corners)[:, 0]
    others = np.array([[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]])
    visible = generator.integers(4, size=batch_size)[slots]
    return _as_masks(quadrants[visible], quadrants[others[visible]], 0, settings)


def _draw_random(settings: MaskSettings, batch_size: int, generator: np.random.Generator, slots: slice) -> Masks:
    num_visible = settings.num_context_patches
    order = generator.random((batch_size, settings.num_patches))[slots].argsort(axis=1)
    context, target = np.sort(order[:, :num_visible], axis=1), np.sort(order[:, num_visible:], axis=1)
    return _as_masks(context, target[:, None], 0, settings)


def _as_masks(
    context_indices: np.ndarray, target_blocks: np.ndarray, num_redrawn: int, settings: MaskSettings
) -> Masks:
    num_images = len(target_blocks)
    if settings.num_context_sets > 1:
        context_indices = context_indices.reshape(num_images, settings.num_context_sets, -1)
    return Masks(torch.from_numpy(context_indices), torch.from_numpy(target_blocks), num_redrawn / num_images)


# Blocks on the grid


def _target_size(settings: MaskSettings, scale: float, generator: np.random.Generator) -> tuple[int, int]:
    ratio = generator.uniform(*settings.target_aspect_ratio)
    return _only(target_block_sizes(settings.grid_size, scale, np.array([ratio])))


def _only(sizes: tuple[np.ndarray, np.ndarray]) -> tuple[int, int]:
    return int(sizes[0][0]), int(sizes[1][0])


def _draw_corners(
    generator: np.random.Generator,
    grid: tuple[int, int],
    size: tuple[int, int],
    shape: tuple[int, int],
    use_last: bool = True,
) -> np.ndarray:
    """Draws top-left patches, int64 `shape`, uniform over the positions where the block fits.

    Without `use_last`, no block reaches the last row or column, as in the published code.
    """
    places = _block_indices(grid, (grid[0] - size[0] + use_last, grid[1] - size[1] + use_last), np.array(0))
    return places[generator.integers(len(places), size=shape)]


def _block_indices(grid: tuple[int, int], size: tuple[int, int], corners: np.ndarray) -> np.ndarray:
    """Returns the patches of blocks with these corners, int64 `[*corners.shape, height * width]`, ascending."""
    offsets = np.arange(size[0])[:, None] * grid[1] + np.arange(size[1])
    return corners[..., None] + offsets.ravel()


def _patches_inside(grid: tuple[int, int], size: tuple[int, int], corners: np.ndarray) -> np.ndarray:
    """Returns which patches lie in blocks with these corners, bool `[*corners.shape, N]`."""
    tops, lefts = np.divmod(corners[..., None], grid[1])
    rows, columns = np.arange(grid[0]), np.arange(grid[1])
    in_rows = (rows >= tops) & (rows < tops + size[0])
    in_columns = (columns >= lefts) & (columns < lefts + size[1])
    return (in_rows[..., :, None] & in_columns[..., None, :]).reshape(*corners.shape, -1)


def _without_targets(inside: np.ndarray, target_blocks: np.ndarray) -> np.ndarray:
    """Returns `inside`, bool `[B, S, N]`, without the patches of each image's target blocks `[B, M, P]`."""
    num_images, num_sets, num_patches = inside.shape
    first = np.arange(0, inside.size, num_patches).reshape(num_images, num_sets, 1)
    visible = inside.ravel().copy()
    # Flat indices: numpy assigns through them in half the time that it takes with three axes.
    visible[(target_blocks.reshape(num_images, 1, -1) + first).ravel()] = False
    return visible.reshape(inside.shape)


def _first_covering(target_blocks: np.ndarray, num_patches: int) -> np.ndarray:
    """Finds the first of an image's target blocks `[B, M, P]` that holds each patch, M if none: int64 `[B, N]`."""
    num_images, num_blocks = target_blocks.shape[:2]
    first = np.full((num_images, num_patches), num_blocks)
    for block in range(num_blocks - 1, -1, -1):
        np.put_along_axis(first, target_blocks[:, block], block, axis=1)
    return first


def _images_short_of(visible: np.ndarray, keep: int) -> np.ndarray:
    """Finds the images, int64, of `[B, S, N]` in which a context set has fewer than `keep` visible patches."""
    return np.flatnonzero(visible.sum(axis=2).min(axis=1) < keep)


# From visible patches to K of them


def _first_patches(visible: np.ndarray, keep: int) -> np.ndarray:
    """Returns the `keep` lowest positions that are True in each row of `[rows, N]`: int64 `[rows, keep]`."""
    num_patches = visible.shape[1]
    start_of_row = np.arange(0, visible.size, num_patches)
    found = np.flatnonzero(visible)
    first_of_row = np.searchsorted(found, start_of_row)
    return found[first_of_row[:, None] + np.arange(keep)] - start_of_row[:, None]


def _keep_from_a_side(grid: tuple[int, int], visible: np.ndarray, keep: int, scans: np.ndarray) -> np.ndarray:
    """Keeps the first K patches met when the grid is scanned from one side, which leaves the context in one piece.

    `scans` numbers the scan of each row of `visible`. There are eight: along rows or along columns, from either side,
    each line in either direction. All are equally likely, so that no side is favoured; with one direction per side
    only, the last, incomplete line would always begin at the same end. Dropping at random instead trained worse
    (docs/digits.md).
    """
    patches = np.arange(visible.shape[1]).reshape(grid)
    from_top, from_left = patches, patches.T
    orders = np.array([order.ravel() for order in (from_top, from_top[:, ::-1], from_left, from_left[:, ::-1])])
    orders = np.concatenate([orders, orders[:, ::-1]])  # from the bottom and from the right
    order = orders[scans]
    first = np.arange(0, visible.size, visible.shape[1])[:, None]
    kept = _first_patches(visible.take(order + first), keep)
    return np.sort(order.take(kept + first), axis=1)


def _check_slots(slots: slice, batch_size: int) -> slice:
    if isinstance(slots, slice):
        ends = [end for end in (slots.start, slots.stop) if end is not None]
        if all(0 <= end <= batch_size for end in ends) and range(*slots.indices(batch_size)):
            return slots
    raise ValueError(
        f"slots={slots!r} must be a slice of at least one place from 0 to batch_size={batch_size}, which counts the "
        f"images of all ranks; use for example slots=slice(0, {batch_size})."
    )


def _default(name: str) -> object:
    return MaskSettings.__dataclass_fields__[name].default


def is_whole(value: object) -> bool:
    """Returns whether a value is a whole number, also one of numpy, and no bool."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond what a float holds
        return False


class Strategy(NamedTuple):
    """Holds everything that is specific to one strategy.

    Attributes:
        fields: the fields of `MaskSettings` that it uses, besides the grid.
        draw: gives the masks; takes what `draw_masks` takes, `slots` being a slice inside the batch.
        check_sizes: raises a `ValueError` for sizes that can never fit the grid.
        num_targets: target blocks of an image; `None` if `num_target_blocks` gives it.
        num_context_patches: gives the context patches of a set; `None` if they depend on the draws.
    """

    fields: tuple[str, ...]
    draw: Callable[[MaskSettings, int, np.random.Generator, slice], Masks]
    check_sizes: Callable[[MaskSettings], None]
    num_targets: int | None = None
    num_context_patches: Callable[[MaskSettings], int] | None = None


_SHARED_FIELDS = (
    "num_context_sets",
    "num_target_blocks",
    "context_scale",
    "target_scale",
    "target_aspect_ratio",
    "allow_overlap",
)

STRATEGIES = {
    "multi_block": Strategy(
        (*_SHARED_FIELDS, "context_keep_ratio"),
        _draw_multi_block,
        check_context_fits,
        num_context_patches=lambda settings: max(1, round_half_up(settings.context_keep_ratio * settings.num_patches)),
    ),
    "multi_block_official": Strategy(
        (*_SHARED_FIELDS, "official_min_keep"), _draw_multi_block_official, check_official_ends
    ),
    "block": Strategy(("mask_ratio", "target_aspect_ratio"), _draw_block, check_block_fits, num_targets=1),
    "rasterized": Strategy(
        (),
        _draw_rasterized,
        check_quadrants,
        num_targets=3,
        num_context_patches=lambda settings: settings.num_patches // 4,
    ),
    "random": Strategy(
        ("mask_ratio",),
        _draw_random,
        check_scatter,
        num_targets=1,
        num_context_patches=lambda settings: (
            settings.num_patches - round_half_up(settings.mask_ratio * settings.num_patches)
        ),
    ),
}
