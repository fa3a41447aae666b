"""One picture of the rows that `collapse_monitor` takes: what each kind of collapse would show, over the steps.

With one run, its parts (target encoder, context encoder, predictor) stand beside each other; with several, the runs.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ijepa_hf.collapse_verdict import SIGNS_OF_PARTS, SINGLE_SIGNS, Panel
from ijepa_hf.figures.panels import DPI, FAINT_COLOR, LINE_COLORS, TEXT_COLOR, plain_frame

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
        runs: For each name the rows of its `diagnostics.jsonl`. Of several runs, each panel shows the first of its
            lines only: that of the target encoder, where there are three.
        path: PNG to write; its folder must exist.
        title: Above all panels.

    Returns:
        The figure: six panels, with the thresholds of `collapse_verdict` as dashed lines.

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
