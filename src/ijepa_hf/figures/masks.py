"""Draws masks on images, and the audit of masks. Each function writes a PNG and returns the matplotlib figure."""

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ijepa_hf.figures.panels import (
    BLOCK_COLORS,
    DPI,
    FAINT_COLOR,
    HIDDEN,
    TEXT_COLOR,
    keep_patches,
    mark_patches,
    outline,
    panel_grid,
    per_pixel,
    plain_frame,
    show_picture,
    to_pictures,
)
from ijepa_hf.model.mask_audit import MaskAudit

_FADE = 0.80  # how far a panel of a target block fades what is not in the block
_TINT = 0.25  # how much of the block's colour is laid over it
_AUDIT_SIZES_SHOWN = 8  # block sizes with a bar of their own


def draw_masks_figure(
    images: torch.Tensor,
    context_indices: torch.Tensor,
    target_indices: torch.Tensor,
    patch_size: tuple[int, int],
    path: str | Path,
) -> Figure:
    """Draws images beside what the context encoder sees of them and what the predictor must predict.

    A row for each image: the image; each context set, every other patch gray; each target block in its own colour, the
    rest faded.

    Args:
        images: [B, C, height, width]. uint8 is shown as it is; floating point is stretched between the image's own
            smallest and largest value, so normalised pixels will do. Three channels are colours, of more the first
            three are shown; of one or two the first, in gray.
        context_indices: int64 [B, K] or [B, S, K], row-major patch positions.
        target_indices: int64 [B, M, P], row-major patch positions.
        patch_size: (height, width) of a patch in pixels; divides the image.
        path: PNG to write; its folder must exist.

    Returns:
        The figure, B rows by 1 + S + M panels.

    Raises:
        ValueError: shapes that do not belong together, a patch size that does not divide the image, or an index
            outside the grid.
        FileNotFoundError: the folder of `path` does not exist.
    """
    context_indices = context_indices[:, None] if context_indices.ndim == 2 else context_indices
    _check_masks(images, context_indices, target_indices, patch_size)
    sets, blocks = context_indices.shape[1], target_indices.shape[1]
    contexts = ["context" if sets == 1 else f"context {s + 1}" for s in range(sets)]
    titles = ["image", *contexts, *(f"target {m + 1}" for m in range(blocks))]
    figure, axes = panel_grid(len(images), len(titles), images.shape[-2] / images.shape[-1])
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=9, color=TEXT_COLOR, pad=4)
    for row, image, contexts, targets in zip(axes, images, context_indices, target_indices, strict=True):
        _draw_masks_of_image(row, to_pictures(image[None])[0], contexts, targets, patch_size)
    figure.savefig(path, dpi=DPI)
    return figure


def draw_audit_figure(audits: Sequence[MaskAudit], path: str | Path) -> Figure:
    """Draws audits, a row each: how often a patch is context and target, context share, block sizes.

    The heat maps of a column share one colour scale and every column its axes, so that rows can be compared.

    Args:
        audits: at least one, from `ijepa_hf.model.mask_audit.audit_masks`.
        path: PNG to write; its folder must exist.

    Returns:
        The figure, 4 panels a row, and two colour bars.

    Raises:
        ValueError: no audits.
        FileNotFoundError: the folder of `path` does not exist.
    """
    if not audits:
        raise ValueError("audits is empty; give at least one, from audit_masks.")
    figure = Figure(figsize=(12.6, 2.75 * len(audits) + 0.75), layout="constrained", facecolor="white")
    axes = figure.subplots(len(audits), 4, squeeze=False, width_ratios=[1, 1, 1.15, 1.15])
    for column, (maps, name) in enumerate(
        [([audit.context_map for audit in audits], "context"), ([audit.target_map for audit in audits], "target")]
    ):
        highest = max(float(probabilities.max()) for probabilities in maps)
        for axis, probabilities in zip(axes[:, column], maps, strict=True):
            shown = _draw_probabilities(axis, probabilities, highest)
        # The gap is a share of the height of all rows.
        bar = figure.colorbar(
            shown, ax=list(axes[:, column]), location="bottom", aspect=25, shrink=0.9, pad=0.04 / len(audits)
        )
        bar.set_label(f"probability of being {name}", fontsize=8, color=FAINT_COLOR)
        bar.ax.tick_params(labelsize=8, colors=FAINT_COLOR)
        axes[0, column].set_title(f"How often a patch is {name}", fontsize=9, color=TEXT_COLOR)
    for axis, audit in zip(axes[:, 2], audits, strict=True):
        _draw_context_shares(axis, audit)
    for axis, audit in zip(axes[:, 3], audits, strict=True):
        _draw_block_sizes(axis, audit)
    highest = max(share.most for audit in audits for share in audit.context_share.values())
    for axis in axes[:, 2]:
        axis.set_ylim(0, 1.15 * highest)
    highest = max((max(_bars_of_sizes(audit).values(), default=0.0) for audit in audits), default=0.0)
    for axis in axes[:, 3]:
        axis.set_xlim(0, 1.08 * (highest or 1.0))
    axes[0, 2].set_title("Context left, by batch size", fontsize=9, color=TEXT_COLOR)
    axes[0, 3].set_title("Target size, height x width", fontsize=9, color=TEXT_COLOR)
    for row, audit in zip(axes, audits, strict=True):
        grid = "{}x{}".format(*audit.settings.grid_size)
        title = f"{audit.settings.masking_strategy}\n{grid}"
        row[0].set_ylabel(title, fontsize=10, fontweight="bold", color="#222222")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06)
    figure.savefig(path, dpi=DPI)
    return figure


def _check_masks(
    images: torch.Tensor, context_indices: torch.Tensor, target_indices: torch.Tensor, patch_size: tuple[int, int]
) -> None:
    if images.ndim != 4 or context_indices.ndim != 3 or target_indices.ndim != 3 or len(images) == 0:
        raise ValueError(
            f"images of shape {tuple(images.shape)}, context_indices of shape {tuple(context_indices.shape)} and "
            f"target_indices of shape {tuple(target_indices.shape)} must be [B, C, H, W], [B, K] or [B, S, K], and "
            "[B, M, P], with B at least 1."
        )
    if not len(images) == len(context_indices) == len(target_indices):
        raise ValueError(
            f"{len(images)} images, {len(context_indices)} rows of context_indices and {len(target_indices)} rows of "
            "target_indices: these must be of one batch."
        )
    height, width = images.shape[-2:]
    if height % patch_size[0] or width % patch_size[1]:
        raise ValueError(f"patch_size={patch_size} must divide the images, which are {height} x {width} pixels.")
    patches = (height // patch_size[0]) * (width // patch_size[1])
    for name, indices in (("context_indices", context_indices), ("target_indices", target_indices)):
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < patches:
            raise ValueError(
                f"{name} run from {int(indices.min())} to {int(indices.max())}, but {height} x {width} pixels in "
                f"patches of {patch_size[0]} x {patch_size[1]} give the positions 0 to {patches - 1}."
            )


def _draw_masks_of_image(
    row: np.ndarray, picture: np.ndarray, contexts: torch.Tensor, targets: torch.Tensor, patch_size: tuple[int, int]
) -> None:
    """Draws the image, its context sets [S, K] and its target blocks [M, P] in the first panels of a row."""
    show_picture(row[0], picture)
    for axis, indices in zip(row[1:], contexts, strict=False):
        show_picture(axis, keep_patches(picture, mark_patches(indices, picture, patch_size), patch_size))
    for axis, indices, color in zip(row[1 + len(contexts) :], targets, cycle(BLOCK_COLORS), strict=False):
        block = mark_patches(indices, picture, patch_size)
        tinted = (1 - _TINT) * picture + _TINT * np.array(to_rgb(color))
        faded = (1 - _FADE) * picture.mean(axis=2, keepdims=True) + _FADE * HIDDEN
        show_picture(axis, np.where(per_pixel(block, patch_size), tinted, faded))
        axis.add_collection(LineCollection(outline(block, patch_size), colors=color, linewidths=1.6, clip_on=False))


def _draw_probabilities(axis: Axes, probabilities: np.ndarray, highest: float) -> Any:
    rows, columns = probabilities.shape
    # Zero is a colour of its own: a patch that is never used must not pass for one that is rarely used.
    colors = colormaps["viridis"].with_extremes(bad="#D9D9D9")
    extent = (0.5, columns + 0.5, rows + 0.5, 0.5)
    shown = axis.imshow(np.ma.masked_equal(probabilities, 0.0), cmap=colors, vmin=0, vmax=highest, extent=extent)
    axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axis.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axis.tick_params(labelsize=8, colors=FAINT_COLOR, length=2)
    if (probabilities == 0).any():
        axis.set_xlabel(f"gray: never ({(probabilities == 0).sum()} patches)", fontsize=8, color=FAINT_COLOR)
    return shown


def _draw_context_shares(axis: Axes, audit: MaskAudit) -> None:
    """Draws the mean share, with a bar from least to most, at each batch size."""
    places = np.arange(len(audit.context_share))
    shares = list(audit.context_share.values())
    means = np.array([share.mean for share in shares])
    axis.vlines(places, [share.least for share in shares], [share.most for share in shares], "#9CC7E0", linewidth=7)
    axis.plot(places, means, color="#0072B2", marker="o", linewidth=1.4)
    for place, mean in zip(places, means, strict=True):
        label = f"{100 * mean:.1f} %"
        axis.annotate(label, (place, mean), (7, 7), textcoords="offset points", fontsize=8, color=TEXT_COLOR)
    axis.set_xticks(places, [str(size) for size in audit.context_share])
    axis.set_xlim(-0.4, len(places) - 0.1)
    axis.set_xlabel("images in a batch (bars: least to most)", fontsize=8, color=FAINT_COLOR)
    axis.set_ylabel("share of the grid", fontsize=8, color=FAINT_COLOR)
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    plain_frame(axis)


def _bars_of_sizes(audit: MaskAudit) -> dict[str, float]:
    """Returns the share of the steps of each of the most frequent block sizes, and of all others together."""
    sizes = list(audit.block_sizes.items())
    bars = {f"{height}x{width}": share for (height, width), share in sizes[:_AUDIT_SIZES_SHOWN]}
    others = sizes[_AUDIT_SIZES_SHOWN:]
    return {**bars, f"{len(others)} more": sum(share for _, share in others)} if others else bars


def _draw_block_sizes(axis: Axes, audit: MaskAudit) -> None:
    """Draws a bar for each of the most frequent block sizes, and one for all others."""
    if not audit.block_sizes:
        axis.set_axis_off()
        patches = f"{audit.block_patches.mean:.0f}"
        axis.text(0.5, 0.5, f"{patches} scattered patches", ha="center", va="center", fontsize=9, color=TEXT_COLOR)
        return
    bars = _bars_of_sizes(audit)
    axis.barh(np.arange(len(bars)), list(bars.values()), color="#E69F00", height=0.7)
    axis.set_yticks(np.arange(len(bars)), list(bars))
    axis.set_ylim(max(len(bars), 4) - 0.4, -0.6)
    axis.set_xlabel("share of the steps", fontsize=8, color=FAINT_COLOR)
    axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    plain_frame(axis)
