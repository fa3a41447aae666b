"""Draws what `diagnosis.monitor` measured over the steps of a run, and features and predictions of a batch.

The panels and their lines follow from the lists of signs in `diagnosis.verdict`. Of one run its parts (target encoder,
context encoder, predictor) share a panel; of several runs, each run is a line.
"""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from ijepa_hf.diagnosis.measures import rankme, spectrum
from ijepa_hf.diagnosis.verdict import SIGNS_OF_PARTS, SINGLE_SIGNS, Panel
from ijepa_hf.figures.features import cut_patches, draw_expectation_figure, draw_pca_figure
from ijepa_hf.figures.panels import DPI, FAINT_COLOR, LINE_COLORS, TEXT_COLOR, plain_frame, to_pictures
from ijepa_hf.figures.views import expect_patches, patch_colors
from ijepa_hf.model.features import encode_patches, prediction_errors, target_features
from ijepa_hf.model.modeling_ijepa import IJepaForPretraining

TRAINING_IMAGES = 64  # of a batch, at most: gallery, and spectrum
TRAINING_ROWS = 4
_COLUMNS = 3
_LIMIT_COLOR = "#D55E00"
_PARTS = {"target encoder": "target", "context encoder": "context", "predictions": "prediction"}


def _lines_of_panels() -> dict[Panel, dict[str, str]]:
    """Gives for each panel the names of its lines, and of the numbers that they show."""
    found: dict[Panel, dict[str, str]] = {}
    for sign in (*SIGNS_OF_PARTS, *SINGLE_SIGNS):
        if sign.panel is not None:
            of_parts = {line: f"{part}_{sign.name}" for line, part in _PARTS.items()}
            found.setdefault(sign.panel, {}).update(of_parts if sign in SIGNS_OF_PARTS else {sign.line: sign.name})
    return found


def draw_diagnostics_figure(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], path: str | Path, *, title: str | None = None
) -> Figure:
    """Draws the rows of one run, or of several beside each other.

    Args:
        runs: For each name the rows of its `diagnostics.jsonl`. With several runs, each panel shows only the first of
            its lines: that of the target encoder, where there are three.
        path: PNG to write; its folder must exist.
        title: Written above all panels.

    Returns:
        The figure: six panels, with the thresholds of `diagnosis.verdict` as dashed lines.

    Raises:
        ValueError: No runs, or a run without rows.
        FileNotFoundError: The folder of `path` does not exist.
    """
    if not runs or not all(runs.values()):
        raise ValueError("there are no rows to draw; a run has its first at step 0, in diagnostics.jsonl.")
    panels = _lines_of_panels()
    lines = -(-len(panels) // _COLUMNS)
    figure = Figure(figsize=(3.3 * _COLUMNS, 2.6 * lines + 0.3), layout="constrained", facecolor="white")
    if title is not None:
        figure.suptitle(title, fontsize=11, color=TEXT_COLOR, x=0.01, ha="left", parse_math=False)  # a name
    for axis, (panel, shown) in zip(figure.subplots(lines, _COLUMNS).ravel(), panels.items(), strict=False):
        _draw_panel(axis, panel, shown, runs)
    if len(runs) > 1:
        handles = figure.axes[0].get_lines()[: len(runs)]
        names = [run.replace("$", r"\$") for run in runs]  # no formulas
        figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    figure.savefig(path, dpi=DPI)
    return figure


def _draw_panel(
    axis: Axes, panel: Panel, names: Mapping[str, str], runs: Mapping[str, Sequence[Mapping[str, Any]]]
) -> None:
    """Draws the numbers of one panel, of all runs, over their steps."""
    if len(runs) > 1:
        names = dict([next(iter(names.items()))])
    drawn = [(label if len(runs) == 1 else run.replace("$", r"\$"), name, rows) for run, rows in runs.items()
             for label, name in names.items()]  # fmt: skip
    for (label, name, rows), color in zip(drawn, LINE_COLORS, strict=False):
        steps = [row["step"] for row in rows]
        values = np.array([np.nan if row.get(name) is None else row[name] for row in rows], dtype=float)
        axis.plot(steps, values, color=color, linewidth=1.5, label=label, marker="o" if len(rows) == 1 else None)
    if panel.limit is not None:
        axis.axhline(panel.limit, color=_LIMIT_COLOR, linewidth=1, linestyle="--")
        axis.annotate(
            panel.limit_text, (1.0, panel.limit), (0, 2), xycoords=("axes fraction", "data"), ha="right", va="bottom",
            textcoords="offset points", fontsize=7, color=_LIMIT_COLOR,
        )  # fmt: skip
    axis.margins(y=0.12)
    axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]))
    axis.set_title(panel.title, fontsize=10, loc="left", fontweight="bold", color=TEXT_COLOR)
    axis.set_ylabel(panel.unit, fontsize=8, color=FAINT_COLOR)
    axis.set_xlabel("optimiser step", fontsize=8, color=FAINT_COLOR)
    plain_frame(axis)
    if len(runs) == 1 and len(drawn) > 1:
        axis.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.26), ncols=3,
                    columnspacing=1, handlelength=1.4)  # fmt: skip


def draw_spectrum_figure(features: Mapping[str, Tensor], path: str | Path) -> Figure:
    """Draws the singular values of feature matrices, on logarithmic axes, with their effective ranks.

    Features are not centred, as in RankMe, so the first value is mostly their common offset. Values are divided by the
    largest. A line that falls off a cliff is dimensional collapse; a line of slope 0 uses all directions alike.

    Args:
        features: `[n, D]` for each name in the legend.
        path: PNG to write; its folder must exist.

    Returns:
        The figure.

    Raises:
        ValueError: No features, or values that are not finite.
        FileNotFoundError: The folder of `path` does not exist.
    """
    if not features:
        raise ValueError("features is empty; give at least one matrix, for example pooled features.")
    figure = Figure(figsize=(4.6, 3.6), layout="constrained", facecolor="white")
    axis = figure.subplots()
    for (name, matrix), color, style in zip(features.items(), cycle(LINE_COLORS), cycle(["-", "--", ":"])):
        values = spectrum(matrix, center=False).sqrt().cpu().numpy()
        values = values / values[0] if values[0] > 0 else values
        seen = values > 0  # zero has no place on a logarithmic axis
        label = f"{name}: RankMe {rankme(matrix):.1f} of {len(values)}"
        numbers = np.arange(1, len(values) + 1)
        axis.plot(numbers[seen], values[seen], color=color, linestyle=style, linewidth=1.8, label=label)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_ylim(bottom=max(axis.get_ylim()[0], 1e-6))  # below is rounding
    axis.set_xlabel("number of the singular value", fontsize=10, color=FAINT_COLOR)
    axis.set_ylabel("singular value / largest", fontsize=10, color=FAINT_COLOR)
    axis.set_title("Singular values of the features", fontsize=11, loc="left", fontweight="bold", color=TEXT_COLOR)
    plain_frame(axis)
    axis.tick_params(labelsize=9)
    # below: inside, a spectrum that falls off a cliff would run through it
    figure.legend(fontsize=9, frameon=False, loc="outside lower center")
    figure.savefig(path, dpi=DPI)
    return figure


def draw_training_figures(
    model: IJepaForPretraining, pixel_values: Tensor, context_indices: Tensor, target_indices: Tensor, output_dir: Path
) -> list[Path]:
    """Draws `figures/pca.png`, `predictions.png` and `spectrum.png` of one fixed batch, to be compared over a run.

    Only the first 64 images of the batch are used. The weights, gradients and modes of the model and torch's random
    numbers stay as they were.

    Args:
        model: The model, not wrapped.
        pixel_values: float `[B, C, height, width]`, normalised, B at least 2: the patches of an image are searched in
            the others.
        context_indices: int64 `[B, K]` or `[B, S, K]`.
        target_indices: int64 `[B, M, P]`.
        output_dir: The run's folder; `figures` is made in it.

    Returns:
        The three files.

    Raises:
        ValueError: If there is one image only.
    """
    if len(pixel_values) < 2:
        raise ValueError(
            "pictures of a batch need at least 2 images: the patches of one are looked for in the others."
        )
    folder = output_dir / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name for name in ("pca.png", "predictions.png", "spectrum.png")]
    pixel_values = pixel_values[:TRAINING_IMAGES]
    shown = slice(0, min(TRAINING_ROWS, len(pixel_values)))
    pictures = to_pictures(pixel_values, limits=(float(pixel_values.min()), float(pixel_values.max())))

    features = encode_patches(model.target_encoder, pixel_values)
    draw_pca_figure(pictures[: 2 * TRAINING_ROWS], patch_colors(features[: 2 * TRAINING_ROWS]), paths[0])
    masks = context_indices[shown], target_indices[shown]
    errors = prediction_errors(model, pixel_values[shown], *masks)
    expectation = expect_patches(
        model,
        pixel_values[shown],
        *masks,
        [target_features(model, pixel_values)],
        own_images=torch.arange(len(errors)),
    )
    patch = model.config.patch_shape
    tiles = (
        cut_patches(pictures, expectation.expected, patch),
        cut_patches(pictures, expectation.nearest_to_truth, patch),
    )
    draw_expectation_figure(pictures[shown], *masks, expectation, tiles, patch, paths[1], errors)
    draw_spectrum_figure({"images": features.mean(dim=(1, 2)), "patches": features.flatten(0, 2)}, paths[2])
    return paths
