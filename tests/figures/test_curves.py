"""Curves of a run, read back from the figure and from the PNG."""

import math

import numpy as np
import pytest
from PIL import Image

from ijepa_hf.figures.curves import draw_curves_figure


def metrics(steps: int = 20) -> list[dict]:
    return [
        {
            "step": 10 * t + 1,
            "epoch": t / 4,
            "loss": math.exp(-t / 9),
            "learning_rate": 1e-3 * t / steps,
            "weight_decay": 0.04 + 0.01 * t,
            "ema_momentum": 0.996 + 2e-4 * t,
            "target_rankme": 10.0 + t,
            "target_std": 0.5,
            "grad_norm": 1.0 + t % 3,
            "images_per_second": 500.0,
        }
        for t in range(steps)
    ]


def test_each_number_is_drawn_in_a_panel_with_title_and_unit(tmp_path):
    rows = metrics()
    figure = draw_curves_figure(rows, tmp_path / "curves.png")
    panels = {axis.get_title(loc="left"): axis for axis in figure.axes}
    names = {
        "Loss": "loss",
        "RankMe of the targets": "target_rankme",
        "Std of the targets": "target_std",
        "Gradient norm": "grad_norm",
        "Learning rate": "learning_rate",
        "Weight decay": "weight_decay",
        "EMA momentum": "ema_momentum",
        "Throughput": "images_per_second",
    }
    assert list(panels) == list(names)
    for title, axis in panels.items():
        (line,) = axis.lines
        assert line.get_xdata().tolist() == [row["step"] for row in rows]
        assert line.get_ydata().tolist() == [row[names[title]] for row in rows]
        assert axis.get_xlabel() == "optimiser step"
        assert axis.get_ylabel()
    assert panels["Throughput"].get_ylabel() == "images per second"


def test_the_curve_is_on_the_paper_where_its_values_are(tmp_path):
    rows = [{"step": t, "loss": value} for t, value in [(0, 0.0), (100, 1.0)]]
    figure = draw_curves_figure(rows, tmp_path / "curves.png")
    pixels = np.asarray(Image.open(tmp_path / "curves.png").convert("RGB")).astype(int)
    rows_drawn, columns_drawn = np.nonzero(np.abs(pixels - np.array([0, 114, 178])).max(axis=-1) <= 2)
    box = figure.axes[0].get_position()
    left, right = pixels.shape[1] * box.x0, pixels.shape[1] * box.x1
    top, bottom = pixels.shape[0] * (1 - box.y1), pixels.shape[0] * (1 - box.y0)
    assert left < columns_drawn.min() < left + 0.1 * (right - left)
    assert right - 0.1 * (right - left) < columns_drawn.max() < right
    first, last = columns_drawn.argmin(), columns_drawn.argmax()
    assert bottom - 0.1 * (bottom - top) < rows_drawn[first] < bottom  # starts low
    assert top < rows_drawn[last] < top + 0.1 * (bottom - top)  # ends high


def test_missing_numbers_leave_gaps_and_missing_names_no_panel(tmp_path):
    rows = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": None, "target_rankme": 7}, {"step": 3, "loss": 0.25}]
    figure = draw_curves_figure(rows, tmp_path / "curves.png")
    panels = {axis.get_title(loc="left"): axis.lines[0].get_ydata() for axis in figure.axes}
    np.testing.assert_array_equal(panels["Loss"], [0.5, np.nan, 0.25])
    np.testing.assert_array_equal(panels["RankMe of the targets"], [np.nan, 7, np.nan])
    assert len(panels) == 2


def test_gradient_norms_of_encoder_and_predictor_share_a_panel_with_a_legend(tmp_path):
    rows = [{"step": t, "grad_norm_encoder": 1.0 + t, "grad_norm_predictor": 2.0} for t in range(3)]
    (axis,) = draw_curves_figure(rows, tmp_path / "curves.png").axes
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["context encoder", "predictor"]
    assert [line.get_ydata().tolist() for line in axis.lines] == [[1, 2, 3], [2, 2, 2]]


def test_a_single_logged_value_is_visible(tmp_path):
    draw_curves_figure([{"step": 1, "loss": 0.5}, {"step": 2}], tmp_path / "curves.png")
    pixels = np.asarray(Image.open(tmp_path / "curves.png").convert("RGB")).astype(int)
    assert (np.abs(pixels - np.array([0, 114, 178])).max(axis=-1) <= 2).sum() > 20


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "non-empty list of dicts"),
        ([{"loss": 1.0}], "each have a 'step'"),
        ([{"step": 1, "accuracy": 1.0}], r"\['accuracy', 'step'\], and none of what can be drawn: \['loss'"),
    ],
)
def test_rows_without_anything_to_draw_are_refused(tmp_path, rows: list[dict], message: str):
    with pytest.raises(ValueError, match=message):
        draw_curves_figure(rows, tmp_path / "curves.png")
