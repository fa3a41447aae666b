"""The picture of a run's rows: what is drawn are the rows' numbers, with the thresholds that a verdict uses."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ijepa_hf.diagnosis.figures import draw_diagnostics_figure
from ijepa_hf.diagnosis.verdict import LEAST_RANK, LEAST_STD, MOST_POSITION_SHARE


def rows(scale: float = 1.0) -> list[dict[str, Any]]:
    names = [f"{part}_{name}" for part in ("target", "context", "prediction")
             for name in ("patch_normalized_std", "patch_effective_rank", "position_share")]  # fmt: skip
    names += ["cross_image_gap", "perfect_gap", "prediction_image_ratio", "prediction_place_ratio", "loss"]
    return [{"step": 10 * step, **{name: scale * (step + k) for k, name in enumerate(names)}} for step in range(4)]


def panels(figure: Any) -> dict[str, Any]:
    return {axis.get_title(loc="left"): axis for axis in figure.axes}


def test_a_run_is_drawn_part_by_part_with_the_thresholds(tmp_path: Path):
    figure = draw_diagnostics_figure({"run": rows()}, tmp_path / "a.png", title="run")
    drawn = panels(figure)
    assert len(drawn) == 6
    target, context, prediction, limit = drawn["Normalised deviation of patches"].get_lines()
    assert target.get_xdata().tolist() == [0, 10, 20, 30]
    assert target.get_ydata().tolist() == [row["target_patch_normalized_std"] for row in rows()]
    assert context.get_ydata().tolist() == [row["context_patch_normalized_std"] for row in rows()]
    assert prediction.get_ydata().tolist() == [row["prediction_patch_normalized_std"] for row in rows()]
    for title, value in (("Normalised deviation of patches", LEAST_STD), ("Effective rank of patches", LEAST_RANK),
                         ("Variance explained by position", MOST_POSITION_SHARE)):  # fmt: skip
        assert set(drawn[title].get_lines()[-1].get_ydata()) == {value}
    assert limit.get_linestyle() == "--"
    gap, most = drawn["Cross-image gap"].get_lines()
    assert gap.get_ydata().tolist() == [row["cross_image_gap"] for row in rows()]
    assert most.get_ydata().tolist() == [row["perfect_gap"] for row in rows()]
    assert all(axis.get_xlabel() and axis.get_ylabel() for axis in drawn.values())


def test_several_runs_stand_beside_each_other(tmp_path: Path):
    figure = draw_diagnostics_figure({"healthy": rows(), "collapsing": rows(0.5)}, tmp_path / "a.png")
    lines = panels(figure)["Loss on the fixed images"].get_lines()
    assert [line.get_ydata()[0] for line in lines] == [rows()[0]["loss"], 0.5 * rows()[0]["loss"]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["healthy", "collapsing"]


def test_a_missing_number_is_a_gap(tmp_path: Path):
    given = rows()
    given[1]["loss"] = None
    line = panels(draw_diagnostics_figure({"run": given}, tmp_path / "a.png"))["Loss on the fixed images"].get_lines()
    assert np.isnan(line[0].get_ydata()).tolist() == [False, True, False, False]


@pytest.mark.parametrize("runs", [{}, {"run": []}])
def test_nothing_to_draw_is_refused(tmp_path: Path, runs: Any):
    with pytest.raises(ValueError, match="no rows to draw"):
        draw_diagnostics_figure(runs, tmp_path / "a.png")
