"""Measures the masks of a configuration before a training uses them.

`audit_masks` draws the masks of many steps and counts how often each patch is seen and predicted, how much context is
left at each batch size, how much overlaps, and which patches are never used. `render_audit` renders the results as a
table with notes on biases; `ijepa_hf.figures.masks.draw_audit_figure` draws them.

Letters in shapes as in `masking`: B images, N patches, K context patches, M target blocks, P patches in a block,
S context sets.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from ijepa_hf.escaping import text_table
from ijepa_hf.model.masking import Masks, MaskSettings, draw_masks, is_whole
from ijepa_hf.randomness import keyed_generator

TRIALS = 16  # steps of `trial_masks`

# What is worth a note; sampling noise of the preset number of images stays well below.
_NOTABLE_SHARE_CHANGE = 0.01  # of the grid, between batch sizes
_NOTABLE_LEAN = 0.03  # of the context, above one half
_NOTABLE_REDRAWS = 0.1  # of the images
_NOTABLE_PIECES = 4.0  # of the context; multi_block has 1.6 at 14x14
_IMAGES_PER_PATCH = 4  # with this many images for each patch of the grid, a patch is hardly missed by chance


class Spread(NamedTuple):
    """Holds mean, least and most of a number over the steps of an audit."""

    mean: float
    least: float
    most: float


@dataclass(frozen=True, eq=False)
class MaskAudit:
    """Holds what `audit_masks` found. Shares and probabilities run from 0 to 1.

    Attributes:
        settings: the settings that were audited.
        batch_size: images of a step, for all but `context_share`.
        num_steps: steps that were drawn.
        seed: the seed of the draws.
        context_map: float64 [rows, columns], probability of a patch to be in a context set.
        target_map: float64 [rows, columns], probability of a patch to be in at least one target.
        context_share: for each batch size K / N over the steps.
        redraw_rate: share of the images that had to be redrawn, see `masking.Masks`.
        target_overlap: share of the target patches of an image that more than one of its targets covers.
        context_overlap: share of the context patches that lie inside targets.
        block_sizes: (height, width) in patches of the targets and the share of steps that had this size, most frequent
            first; empty where targets are no rectangles.
        block_patches: P over the steps.
        context_pieces: mean number of pieces that the context is in; patches that share a side are of one piece.
    """

    settings: MaskSettings
    batch_size: int
    num_steps: int
    seed: int
    context_map: np.ndarray
    target_map: np.ndarray
    context_share: dict[int, Spread]
    redraw_rate: float
    target_overlap: float
    context_overlap: float
    block_sizes: dict[tuple[int, int], float]
    block_patches: Spread
    context_pieces: float

    @property
    def num_images(self) -> int:
        """Images whose masks were counted."""
        return self.batch_size * self.num_steps

    @property
    def num_never_seen(self) -> int:
        """Patches that were in no context."""
        return int((self.context_map == 0).sum())

    @property
    def num_never_targeted(self) -> int:
        """Patches that were in no target."""
        return int((self.target_map == 0).sum())


def trial_masks(settings: MaskSettings, batch_size: int) -> list[Masks]:
    """Draws the masks of some steps, always the same ones, from which a run is planned before it begins.

    Args:
        settings: of any strategy.
        batch_size: images in a step, at least 1. With `multi_block_official` the context depends on it.

    Returns:
        The masks of `TRIALS` steps.
    """
    return [draw_masks(settings, batch_size, keyed_generator(step)) for step in range(TRIALS)]


def audit_masks(
    settings: MaskSettings,
    *,
    batch_size: int = 64,
    num_steps: int = 64,
    seed: int = 0,
    batch_sizes: Sequence[int] = (1, 8, 64, 256),
) -> MaskAudit:
    """Measures the masks that `draw_masks` gives with these settings.

    Args:
        settings: of any strategy.
        batch_size: images in a step, at least 1. With `multi_block_official` this is the batch of one device.
        num_steps: steps to draw, at least 1; block sizes are drawn once a step.
        seed: the draws are a function of (seed, step); at least 0.
        batch_sizes: the sizes for which the share of context patches is measured, each at least 1.

    Returns:
        The audit.

    Raises:
        ValueError: a number is no whole number or below its least, or `batch_sizes` is empty.
    """
    _check_arguments(batch_size, num_steps, seed, batch_sizes)
    context_counts, target_counts = np.zeros((2, settings.num_patches))
    redraw_rates, pieces, block_patches = [], [], []
    num_twice = num_inside = 0
    sizes: Counter[tuple[int, int]] = Counter()
    for step in range(num_steps):
        masks = draw_masks(settings, batch_size, keyed_generator(seed, step))
        context, covered_by = _context_sets(masks, settings.num_patches), _times_targeted(masks, settings.num_patches)
        context_counts += context.mean(axis=1).sum(axis=0)
        target_counts += (covered_by > 0).sum(axis=0)
        num_twice += int((covered_by > 1).sum())
        num_inside += int((context & (covered_by > 0)[:, None]).sum())
        pieces.append(_count_pieces(context.reshape(-1, *settings.grid_size)) / (batch_size * context.shape[1]))
        redraw_rates.append(masks.redraw_rate)
        block_patches.append(masks.target_indices.shape[2])
        size = _block_size(masks, settings)
        if size is not None:
            sizes[size] += 1
    num_images, num_sets = batch_size * num_steps, settings.num_context_sets
    return MaskAudit(
        settings=settings,
        batch_size=batch_size,
        num_steps=num_steps,
        seed=seed,
        context_map=(context_counts / num_images).reshape(settings.grid_size),
        target_map=(target_counts / num_images).reshape(settings.grid_size),
        context_share={size: _context_share(settings, size, num_steps, seed) for size in batch_sizes},
        redraw_rate=float(np.mean(redraw_rates)),
        target_overlap=num_twice / float(target_counts.sum()),
        context_overlap=num_inside / float(context_counts.sum() * num_sets),
        block_sizes={size: count / num_steps for size, count in sizes.most_common()},
        block_patches=_spread(block_patches),
        context_pieces=float(np.mean(pieces)),
    )


def _check_arguments(batch_size: int, num_steps: int, seed: int, batch_sizes: Sequence[int]) -> None:
    for name, value, least in (("batch_size", batch_size, 1), ("num_steps", num_steps, 1), ("seed", seed, 0)):
        if not is_whole(value) or value < least:
            raise ValueError(
                f"{name}={value!r} must be a whole number of at least {least}, for example {name}={least}."
            )
    if (
        not isinstance(batch_sizes, Sequence)
        or not batch_sizes
        or not all(is_whole(size) and size >= 1 for size in batch_sizes)
    ):
        raise ValueError(
            f"batch_sizes={batch_sizes!r} must be one or more whole numbers of at least 1, "
            "for example batch_sizes=(64,)."
        )


def render_audit(audit: MaskAudit) -> str:
    """Writes an audit as a table of two columns, followed by notes on what is biased or unusual.

    Args:
        audit: what `audit_masks` gave.

    Returns:
        Lines of text, without a line break at the end.
    """
    settings = audit.settings
    rows, columns = settings.grid_size
    lines = [
        f"{settings.masking_strategy} on a grid of {rows}x{columns} patches: {audit.num_images} images, "
        f"{audit.num_steps} steps of {audit.batch_size}, seed {audit.seed}",
        "",
    ]
    table = [(f"context at batch {size}", _of_grid(share)) for size, share in audit.context_share.items()]
    table += [
        ("a patch is context", _from_to(audit.context_map)),
        ("a patch is target", _from_to(audit.target_map)),
        ("context in upper, left half", " and ".join(_percent(share) for share in _leaning(audit.context_map))),
        ("pieces of the context", f"{audit.context_pieces:.1f}"),
        ("context inside targets", f"{_percent(audit.context_overlap)} of the context"),
        ("targets", f"{settings.num_targets} of {_whole(audit.block_patches)} patches"),
        ("target sizes, height x width", _sizes(audit.block_sizes)),
        ("in more than one target", f"{_percent(audit.target_overlap)} of the target patches"),
        (
            "patches never context, target",
            f"{audit.num_never_seen} and {audit.num_never_targeted} of {rows * columns}",
        ),
        ("images redrawn", _percent(audit.redraw_rate)),
    ]
    lines += text_table(table, align="<", indent="  ")
    notes = audit_notes(audit)
    lines += ["", "Notes" if notes else "Notes: none; every patch is reached and no side is favoured."]
    return "\n".join(lines + [f"  - {note}" for note in notes])


def audit_notes(audit: MaskAudit) -> list[str]:
    """Names what is biased or unusual in an audit, a sentence each.

    Args:
        audit: what `audit_masks` gave.

    Returns:
        The sentences; none if there is nothing to say.
    """
    notes = []
    # A corner is the rarest target of a sampler that uses every place: one of less than N places covers it. That none
    # of 4 N images has it there is less likely than exp(-4), and with blocks of 0.15 of the grid than exp(-10).
    num_enough = _IMAGES_PER_PATCH * audit.settings.num_patches
    for name, probabilities in (("context", audit.context_map), ("target", audit.target_map)):
        missing = _lines_and_patches(probabilities == 0)
        if missing and audit.num_images >= num_enough:
            notes.append(f"Never {name} in {audit.num_images} images: {missing}.")
        elif missing:
            notes.append(
                f"Not once {name}: {missing}; of {audit.num_images} images that may be chance: draw {num_enough} or "
                "more, with a larger batch or more steps."
            )
    small, large = min(audit.context_share), max(audit.context_share)
    first, last = audit.context_share[small], audit.context_share[large]
    if abs(first.mean - last.mean) > _NOTABLE_SHARE_CHANGE:
        way = "falls" if last.mean < first.mean else "rises"
        notes.append(
            f"The context's share of the grid {way} from {_percent(first.mean)} at batch {small} to "
            f"{_percent(last.mean)} at batch {large}: another batch size is another task."
        )
    # No image leans by more than half, so three standard errors of few images are at most this.
    lean = max(_NOTABLE_LEAN, 3 * 0.5 / audit.num_images**0.5)
    for half, other, share in zip(("upper", "left"), ("lower", "right"), _leaning(audit.context_map), strict=True):
        if abs(share - 0.5) > lean:
            favoured = half if share > 0.5 else other
            notes.append(
                f"{_percent(max(share, 1 - share))} of the context lies in the {favoured} half of the image "
                f"(batch {audit.batch_size})."
            )
    if audit.context_overlap > 0:
        notes.append(
            f"{_percent(audit.context_overlap)} of the context patches lie inside targets, whose content is then seen."
        )
    if audit.context_pieces > _NOTABLE_PIECES:
        notes.append(f"The context is scattered: {audit.context_pieces:.1f} pieces an image on average.")
    if audit.redraw_rate > _NOTABLE_REDRAWS:
        # What is drawn again, and the field that asks for context, depend on the strategy.
        official = audit.settings.masking_strategy == "multi_block_official"
        keep, change = (
            ("official_min_keep", "moves their context to where there are fewer targets")
            if official
            else ("context_keep_ratio", "makes their targets overlap more")
        )
        notes.append(
            f"{_percent(audit.redraw_rate)} of the images are redrawn for want of context, which {change}; a smaller "
            f"{keep}, target_scale or num_target_blocks gives room."
        )
    return notes


def _context_share(settings: MaskSettings, batch_size: int, num_steps: int, seed: int) -> Spread:
    draws = (draw_masks(settings, batch_size, keyed_generator(seed, step)) for step in range(num_steps))
    return _spread([masks.context_indices.shape[-1] / settings.num_patches for masks in draws])


def _spread(values: Sequence[float]) -> Spread:
    return Spread(float(np.mean(values)), float(min(values)), float(max(values)))


def _context_sets(masks: Masks, num_patches: int) -> np.ndarray:
    """Returns which patches are visible, bool `[B, S, N]`."""
    indices = masks.context_indices.numpy()
    indices = indices.reshape(len(indices), -1, indices.shape[-1])
    visible = np.zeros((*indices.shape[:2], num_patches), dtype=bool)
    np.put_along_axis(visible, indices, True, axis=2)
    return visible


def _times_targeted(masks: Masks, num_patches: int) -> np.ndarray:
    """Counts how many targets of its image each patch is in, int64 `[B, N]`."""
    indices = masks.target_indices.numpy().reshape(len(masks.target_indices), -1)
    flat = indices + np.arange(len(indices))[:, None] * num_patches
    return np.bincount(flat.ravel(), minlength=len(indices) * num_patches).reshape(-1, num_patches)


def _block_size(masks: Masks, settings: MaskSettings) -> tuple[int, int] | None:
    """Returns height and width of the step's targets, or None if they are no rectangles."""
    if settings.masking_strategy == "random":
        return None
    block = masks.target_indices[0, 0]
    (top, left), (bottom, right) = (divmod(int(block[end]), settings.grid_size[1]) for end in (0, -1))
    return bottom - top + 1, right - left + 1


def _count_pieces(visible: np.ndarray) -> int:
    """Counts the pieces of patches that share sides in bool `[images, rows, columns]`, over all images."""
    within_an_image = ndimage.generate_binary_structure(3, 1)
    within_an_image[[0, 2]] = False
    return int(ndimage.label(visible, within_an_image)[1])


def _leaning(probabilities: np.ndarray) -> tuple[float, float]:
    """Computes the shares of the sum in the upper and the left half; a middle row or column counts half to each."""
    return _first_half(probabilities.sum(axis=1)), _first_half(probabilities.sum(axis=0))


def _first_half(values: np.ndarray) -> float:
    middle = len(values) // 2
    half = values[:middle].sum() + (values[middle] / 2 if len(values) % 2 else 0.0)
    return float(half / values.sum())


def _lines_and_patches(missing: np.ndarray) -> str:
    """Names the rows and columns that are all True and counts the other patches; "" if there are none.

    For example "the last row and column", "rows 1, 2 and 5 other patches" or "16 patches".
    """
    lines = {"row": np.flatnonzero(missing.all(axis=1)), "column": np.flatnonzero(missing.all(axis=0))}
    last = {"row": missing.shape[0] - 1, "column": missing.shape[1] - 1}
    others = missing.copy()
    others[lines["row"]] = False
    others[:, lines["column"]] = False
    parts = []
    if all(found.tolist() == [last[kind]] for kind, found in lines.items()):
        parts.append("the last row and column")
    else:
        for kind, found in lines.items():
            if found.tolist() == [last[kind]]:
                parts.append(f"the last {kind}")
            elif found.size:
                parts.append(f"{kind}{'s' if found.size > 1 else ''} {', '.join(str(line + 1) for line in found)}")
    num_others = int(others.sum())
    if num_others:
        parts.append(f"{num_others} {'other ' if parts else ''}patch{'es' if num_others > 1 else ''}")
    return " and ".join(parts)


def _percent(share: float) -> str:
    # A small share must not read as none.
    return "under 0.1 %" if 0 < share < 0.0005 else f"{100 * share:.1f} %"


def _of_grid(share: Spread) -> str:
    return f"{_percent(share.mean)} of the grid ({100 * share.least:.1f} to {100 * share.most:.1f})"


def _from_to(probabilities: np.ndarray) -> str:
    return f"{_percent(float(probabilities.min()))} to {_percent(float(probabilities.max()))} of the time"


def _whole(spread: Spread) -> str:
    if spread.least == spread.most:
        return f"{spread.mean:.0f}"
    return f"{spread.least:.0f} to {spread.most:.0f} (mean {spread.mean:.1f})"


def _sizes(sizes: dict[tuple[int, int], float], shown: int = 5) -> str:
    if not sizes:
        return "no rectangles"
    parts = [f"{height}x{width} {100 * share:.0f} %" for (height, width), share in list(sizes.items())[:shown]]
    return ", ".join(parts) + (f", {len(sizes) - shown} more" if len(sizes) > shown else "")
