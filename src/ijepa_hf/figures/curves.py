"""Draws the logged numbers of a run over its steps."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from ijepa_hf.figures.panels import DPI, FAINT_COLOR, LINE_COLORS, plain_frame
from ijepa_hf.recipes.expected_band import BandWatch

_CURVES: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("Loss", "mean over target values", {"loss": ""}),
    ("RankMe of the targets", "effective rank, 1 to width D", {"target_rankme": ""}),
    ("Std of the targets", "mean over the D dimensions", {"target_std": ""}),
    (
        "Gradient norm",
        "L2 norm",
        {"grad_norm": "all", "grad_norm_encoder": "context encoder", "grad_norm_predictor": "predictor"},
    ),
    ("Learning rate", "step size of AdamW", {"learning_rate": ""}),
    ("Weight decay", "decay coefficient", {"weight_decay": ""}),
    ("EMA momentum", "share of the old target kept", {"ema_momentum": ""}),
    ("Throughput", "images per second", {"images_per_second": ""}),
    ("Waiting for images", "share of the time", {"data_wait_share": ""}),
)
_KNN_TITLE = "kNN of the target encoder"
# The panel of a curve that a recipe's band is about; what is compared there and is not the line itself.
_OF_BANDS = {
    "Loss": ("loss", "mean of a window"),
    "RankMe of the targets": ("rankme", "on the fixed images"),
    _KNN_TITLE: ("knn", ""),
}


def draw_curves_figure(
    rows: Sequence[Mapping[str, Any]],
    path: str | Path,
    evaluations: Sequence[Mapping[str, Any]] = (),
    *,
    expected: BandWatch | None = None,
    columns: int = 4,
) -> Figure:
    """Draws the logged numbers of a run over its optimiser steps, a small panel each.

    Args:
        rows: lines of `metrics.jsonl`, each with `step` and any of `loss`, `target_rankme`, `target_std`, `grad_norm`,
            `grad_norm_encoder`, `grad_norm_predictor`, `learning_rate`, `weight_decay`, `ema_momentum`,
            `images_per_second` and `data_wait_share`. A row may lack some; a panel that no row has a value for is left
            out; a missing or null value is a gap in its line.
        path: PNG to write; its folder must exist.
        evaluations: lines of `evaluations.jsonl`, each with `step` and `knn`: drawn in one more panel, with the value
            of step 0, the untrained network's, as a dashed line.
        expected: the run compared with the band of its recipe: bands are shaded, the compared values dotted.
        columns: most panels in a row, at least 1.

    Returns:
        The figure.

    Raises:
        ValueError: no rows, a row without `step`, or rows with none of the names above.
        FileNotFoundError: the folder of `path` does not exist.
    """
    if not rows or any("step" not in row for row in rows):
        raise ValueError("rows must be a non-empty list of dicts that each have a 'step', as in metrics.jsonl.")
    panels = []
    for title, unit, names in _CURVES:
        lines = {label: _column(rows, name) for name, label in names.items()}
        lines = {label: values for label, values in lines.items() if not np.isnan(values).all()}
        if lines:
            panels.append((title, unit, lines))
    if not panels:
        known = [name for _, _, names in _CURVES for name in names]
        raise ValueError(f"rows have {sorted(rows[0])}, and none of what can be drawn: {known}.")
    num_panels = len(panels) + bool(evaluations)
    columns = min(columns, num_panels)
    lines_of_panels = -(-num_panels // columns)
    figure = Figure(figsize=(3.1 * columns, 2.5 * lines_of_panels), layout="constrained", facecolor="white")
    axes = figure.subplots(lines_of_panels, columns, squeeze=False).ravel()
    for axis, (title, unit, lines) in zip(axes, panels, strict=False):
        _draw_lines(axis, _column(rows, "step"), lines)
        _name_curve(axis, title, unit)
        _draw_band(axis, title, expected)
    if evaluations:
        _draw_evaluations(axes[len(panels)], evaluations)
        _draw_band(axes[len(panels)], _KNN_TITLE, expected, scale=100)
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    for axis in axes[num_panels:]:
        axis.remove()
    figure.savefig(path, dpi=DPI)
    return figure


def _name_curve(axis: Axes, title: str, unit: str) -> None:
    axis.set_title(title, fontsize=10, loc="left", fontweight="bold", color="#222222")
    axis.set_ylabel(unit, fontsize=8, color=FAINT_COLOR)
    axis.set_xlabel("optimiser step", fontsize=8, color=FAINT_COLOR)


def _draw_evaluations(axis: Axes, evaluations: Sequence[Mapping[str, Any]]) -> None:
    steps, scores = _column(evaluations, "step"), 100 * _column(evaluations, "knn")
    _draw_lines(axis, steps, {"trained": scores})
    untrained = scores[steps == 0]
    if untrained.size:
        axis.axhline(untrained[0], color=FAINT_COLOR, linewidth=1, linestyle="--", label="untrained")
        axis.legend(fontsize=7, frameon=False)
    _name_curve(axis, _KNN_TITLE, "top-1 in percent")


def _draw_band(axis: Axes, title: str, expected: BandWatch | None, scale: float = 1.0) -> None:
    """Shades where a curve is expected, and dots what is compared there."""
    name, compared = _OF_BANDS.get(title, ("", ""))
    if expected is None or name not in expected.band.curves:
        return
    band, points = expected.band.curves[name], expected.points[name]
    middle = expected.band.loss_window / 2 if name == "loss" else 0.0  # of a window, whose step is its last
    lower, upper = scale * np.array(band.lower), scale * np.array(band.upper)
    label = f"expected, {len(expected.band.seeds)} seeds"
    axis.fill_between(
        np.array(band.steps) - middle, lower, upper, color="#999999", alpha=0.3, linewidth=0, label=label
    )
    if compared and points:
        steps, values = np.array([(point.step - middle, scale * point.value) for point in points]).T
        axis.plot(steps, values, ".", color="#333333", markersize=3.5, label=compared)
    axis.legend(fontsize=7, frameon=False)


def _column(rows: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    values = [row.get(name) for row in rows]
    return np.array([np.nan if value is None else float(value) for value in values])


def _draw_lines(axis: Axes, steps: np.ndarray, lines: Mapping[str, np.ndarray]) -> None:
    for (label, values), color in zip(lines.items(), LINE_COLORS, strict=False):
        # One logged value would be an invisible line.
        marker = "o" if np.isfinite(values).sum() == 1 else None
        axis.plot(steps, values, color=color, linewidth=1.4, label=label, marker=marker)
    if len(lines) > 1:
        axis.legend(fontsize=7, frameon=False)
    plain_frame(axis)
    axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axis.yaxis.set_major_locator(MaxNLocator(5))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:.6g}"))  # no common factor above the axis
