"""Compares the curves of a run with the band of earlier runs of its recipe with several seeds.

A recipe that was measured ships `recipes/bands/<recipe>.json`, made by `scripts/record_band.py`. For each curve it has
steps, with the lowest and the highest value expected there, and it records the runs. A run with the recipe's arguments
is compared with it row by row. A band never stops a run: it shows where a run differs from others of its recipe.

There are three curves: the loss, averaged over windows of steps because single steps are noisy; RankMe of the target
encoder's patches on the fixed images of `diagnostics.jsonl`; kNN of `evaluations.jsonl`, where the recipe sets
`eval_steps`.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np

from ijepa_hf.recipes.arguments import argument_names, differing_arguments
from ijepa_hf.recipes.recipe_files import load_recipe, recipe_names

POINTS_TO_LEAVE = 2  # points outside in a row for a curve to have left its band
LEAST_ROWS_SHARE = 0.5  # of the rows in a window of the band; a window with fewer is not compared

# Arguments that may differ between a run and the recipe that it is compared with: the seed, and those that change no
# curve.
_SCORED_ON = {"eval_split_name", "label_column_name", "max_eval_samples"}  # they change the curve of kNN
NOT_COMPARED = (argument_names("speed", "place", "reporting") - _SCORED_ON) | {"seed"}

KEYS = {"loss": "loss", "rankme": "target_patch_rankme", "knn": "knn"}  # in a row, by the name of the curve
WORDS = {"loss": "loss", "rankme": "RankMe", "knn": "kNN"}

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class BandCurve:
    """Holds the expected values of a curve.

    Args:
        steps: Optimiser steps, ascending; for the loss, the last of each window.
        lower: The lowest value expected at each step.
        upper: The highest value expected at each step.
    """

    steps: tuple[int, ...]
    lower: tuple[float, ...]
    upper: tuple[float, ...]

    def at(self, step: int) -> tuple[float, float] | None:
        """Returns the bounds at a step, interpolated; `None` before the first and after the last step of the band."""
        if not self.steps[0] <= step <= self.steps[-1]:
            return None
        return float(np.interp(step, self.steps, self.lower)), float(np.interp(step, self.steps, self.upper))


@dataclass(frozen=True)
class ExpectedBand:
    """Holds the expected curves of a recipe, and a record of the runs that they come from.

    Args:
        recipe: Its name.
        seeds: Of the runs.
        machines: The machines of the runs, as in `report.json`, each once.
        loss_window: Optimiser steps in a window of the loss.
        loss_rows: Rows that the runs logged in a window.
        curves: By name: `loss`, `rankme` and `knn`, as far as the runs have them.
        arguments: The compared arguments of the runs.
    """

    recipe: str
    seeds: tuple[int, ...]
    machines: Sequence[Mapping[str, Any]]
    loss_window: int
    loss_rows: int
    curves: Mapping[str, BandCurve]
    arguments: Mapping[str, Any]

    @property
    def in_words(self) -> str:
        """The recipe and the number of runs."""
        return f"{self.recipe} ({len(self.seeds)} seeds)"

    def as_json(self) -> str:
        """Returns the text of the band's file; `read_band` reads it."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"


@dataclass(frozen=True)
class RunRows:
    """Holds the logs of a run.

    Args:
        arguments: All its arguments, as in `run.json`.
        metrics: Lines of `metrics.jsonl`.
        diagnostics: Lines of `diagnostics.jsonl`.
        evaluations: Lines of `evaluations.jsonl`.
    """

    arguments: Mapping[str, Any]
    metrics: Rows
    diagnostics: Rows = ()
    evaluations: Rows = ()

    def of(self, curve: str) -> Rows:
        """Returns the rows that hold a curve."""
        return {"loss": self.metrics, "rankme": self.diagnostics, "knn": self.evaluations}[curve]


# -- comparing a run -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """Holds a value of a run and its expected range.

    Args:
        step: Optimiser step; for the loss, the last of the window.
        value: Of the run.
        lower: The lowest value expected.
        upper: The highest value expected.
    """

    step: int
    value: float
    lower: float
    upper: float

    @property
    def is_inside(self) -> bool:
        """Whether the value is in its range; the bounds belong to it."""
        return self.lower <= self.value <= self.upper

    @property
    def distance(self) -> float:
        """The distance from the range, in widths of the band; 0 inside."""
        return max(self.lower - self.value, self.value - self.upper, 0.0) / max(self.upper - self.lower, 1e-12)


@dataclass(frozen=True)
class Excursion:
    """Describes a part of a curve that is outside its band.

    Args:
        first: The first point outside.
        farthest: The point farthest outside.
        back: The first point inside again; `None` if the curve has stayed outside.
    """

    first: Point
    farthest: Point
    back: Point | None


class BandWatch:
    """Compares a run with the band of its recipe while it goes on.

    The results depend on the rows alone, so a resumed run gives the same as an uninterrupted one.

    Args:
        band: From `find_band`.
        rows: The logs of the run so far.
    """

    def __init__(self, band: ExpectedBand, rows: RunRows) -> None:
        self.band = band
        self.points: dict[str, list[Point]] = {curve: [] for curve in band.curves}
        self._windows = LossWindows(band.loss_window, band.curves["loss"].steps[-1])
        for curve in band.curves:
            for row in rows.of(curve):
                self.add(curve, row)

    def add(self, curve: str, row: Mapping[str, Any]) -> list[str]:
        """Adds a logged row.

        Args:
            curve: `loss`, `rankme` or `knn`; a curve that the band lacks is ignored.
            row: The next line of the log that holds the curve.

        Returns:
            A line of text where the curve has left its band or is back inside; else empty.
        """
        if curve not in self.points or row.get(KEYS[curve]) is None:
            return []
        found = [(row["step"], row[KEYS[curve]])]
        if curve == "loss":
            least = LEAST_ROWS_SHARE * self.band.loss_rows
            found = [(end, mean) for end, mean, rows in self._windows.add(row) if rows >= least]
        lines = []
        for step, value in found:
            bounds = self.band.curves[curve].at(step)
            if bounds is None:  # such as a measurement before the band's first step
                continue
            before = self.excursions(curve)
            self.points[curve].append(Point(step, value, *bounds))
            after = self.excursions(curve)
            if len(after) > len(before):
                lines.append(self._line(curve, "is outside"))
            elif after and after[-1].back != before[-1].back:
                lines.append(self._line(curve, "is back inside"))
        return lines

    def excursions(self, curve: str) -> list[Excursion]:
        """Returns the parts of a curve that are outside, in order.

        A part has at least `POINTS_TO_LEAVE` points, or is the last point of the band.
        """
        points, last_step = self.points[curve], self.band.curves[curve].steps[-1]
        found: list[Excursion] = []
        start = 0
        while start < len(points):
            stop = start
            while stop < len(points) and not points[stop].is_inside:
                stop += 1
            outside = points[start:stop]
            if len(outside) >= POINTS_TO_LEAVE or (outside and outside[-1].step == last_step):
                back = points[stop] if stop < len(points) else None
                found.append(Excursion(outside[0], max(outside, key=lambda point: point.distance), back))
            start = stop + 1
        return found

    def verdict(self) -> str:
        """Returns one line that says which curves are inside and which have left the band, and where."""
        outside = {curve: self.excursions(curve) for curve in self.points}
        left = [f"{WORDS[curve]} {_when(curve, found)}" for curve, found in outside.items() if found]
        inside = [WORDS[curve] for curve, found in outside.items() if self.points[curve] and not found]
        missing = [WORDS[curve] for curve, points in self.points.items() if not points]
        band = f"the expected band of {self.band.in_words}"
        parts = []
        if left:
            parts.append(f"outside {band}: {'; '.join(left)}")
        if inside:
            parts.append(f"inside: {', '.join(inside)}" if left else f"inside {band}: {', '.join(inside)}")
        if missing:
            parts.append(f"too few rows to compare: {', '.join(missing)}")
        return "; ".join(parts)

    def as_dict(self) -> dict[str, Any]:
        """Returns the verdict as `report.json` keeps it."""
        return {
            "recipe": self.band.recipe,
            "seeds": list(self.band.seeds),
            "verdict": self.verdict(),
            "curves": {
                curve: {
                    "points": len(points),
                    "outside": [dataclasses.asdict(excursion) for excursion in self.excursions(curve)],
                }
                for curve, points in self.points.items()
            },
        }

    def _line(self, curve: str, what: str) -> str:
        point = self.points[curve][-1]
        value = _number(curve, point.value)
        if curve == "loss":
            value += f" (mean since step {self._windows.begin(point.step)})"
        return (
            f"step {point.step} {WORDS[curve]} {value} {what} the expected band of {self.band.recipe}: "
            f"{_number(curve, point.lower)} to {_number(curve, point.upper)}"
        )


def _when(curve: str, excursions: Sequence[Excursion]) -> str:
    parts = []
    for excursion in excursions:
        point = excursion.farthest
        until = "on" if excursion.back is None else f"until step {excursion.back.step}"
        parts.append(
            f"from step {excursion.first.step} {until} ({_number(curve, point.value)} at step {point.step}, expected "
            f"{_number(curve, point.lower)} to {_number(curve, point.upper)})"
        )
    return " and ".join(parts)


def _number(curve: str, value: float) -> str:
    return {"loss": f"{value:.3g}", "rankme": f"{value:.1f}", "knn": f"{100 * value:.1f}"}[curve]


class LossWindows:
    """Averages the loss over windows of steps; leaves out step 1, which is logged at any `logging_steps`.

    Args:
        length: Optimiser steps in a window; the last window also takes the rest of the run.
        num_steps: Of the run.
    """

    def __init__(self, length: int, num_steps: int) -> None:
        self.length, self.num_steps = length, num_steps
        self._end = 0
        self._values: list[float] = []

    def begin(self, step: int) -> int:
        """Returns the first step of the window that contains a step."""
        last = max(self.num_steps // self.length - 1, 0)
        return min((step - 1) // self.length, last) * self.length + 1

    def end(self, step: int) -> int:
        """Returns the last step of the window that contains a step."""
        end = self.begin(step) - 1 + self.length
        return self.num_steps if end + self.length > self.num_steps else end

    def add(self, row: Mapping[str, Any]) -> list[tuple[int, float, int]]:
        """Adds a row; returns last step, mean and number of rows of each window that it closes."""
        step = row["step"]
        if not 1 < step <= self.num_steps:
            return []
        closed = [self._close()] if self._values and self._end != self.end(step) else []
        self._end = self.end(step)
        self._values.append(float(row["loss"]))
        return [*closed, self._close()] if step == self._end else closed

    def of(self, rows: Rows) -> list[tuple[int, float, int]]:
        """Adds all rows of a run; returns last step, mean and number of rows of all its windows."""
        return [window for row in rows for window in self.add(row)]

    def _close(self) -> tuple[int, float, int]:
        values, self._values = self._values, []
        return self._end, math.fsum(values) / len(values), len(values)


# -- which band is a run's -------------------------------------------------------------------------------------------


def find_band(arguments: Mapping[str, Any]) -> ExpectedBand | None:
    """Finds the band of the shipped recipe that a run follows.

    Args:
        arguments: All arguments of the run, as in `run.json`.

    Returns:
        The band; `None` if the arguments, apart from `NOT_COMPARED`, are those of no recipe with a band.
    """
    for band in _shipped_bands():
        if not differing_arguments(band.arguments, arguments, NOT_COMPARED):
            return band
    return None


def band_notice(arguments: Mapping[str, Any], given: Iterable[str]) -> str | None:
    """Returns the notice at the start of a run: the band that it is compared with, or why it is not compared.

    Args:
        arguments: All arguments of the run.
        given: Names that its recipe or a flag has set (`ModelArguments.given`).

    Returns:
        Text; `None` if the run's recipe has no band. A recipe counts as the run's if the run sets all arguments of
        the recipe, and has the same data set.
    """
    band = find_band(arguments)
    if band is not None:
        return f"{band.in_words}: {', '.join(WORDS[curve] for curve in band.curves)}"
    for band in _shipped_bands():
        recipe = load_recipe(band.recipe)
        if set(given).issuperset(recipe) and arguments["dataset_name"] == recipe.get("dataset_name"):
            differing = differing_arguments(band.arguments, arguments, NOT_COMPARED)
            return f"not compared with {band.recipe}'s: {'; '.join(differing)}"
    return None


def load_band(recipe: str) -> ExpectedBand | None:
    """Loads the band that is shipped with a recipe.

    Args:
        recipe: Its name.

    Returns:
        The band; `None` if the recipe has none.
    """
    file = resources.files("ijepa_hf.recipes") / "bands" / f"{recipe}.json"
    return read_band(file.read_text(encoding="utf-8")) if file.is_file() else None


def read_band(text: str) -> ExpectedBand:
    """Reads the text that `ExpectedBand.as_json` has returned.

    Args:
        text: JSON.

    Returns:
        The band.
    """
    fields = json.loads(text)
    fields["seeds"] = tuple(fields["seeds"])
    fields["curves"] = {
        name: BandCurve(*(tuple(curve[part]) for part in ("steps", "lower", "upper")))
        for name, curve in fields["curves"].items()
    }
    return ExpectedBand(**fields)


def _shipped_bands() -> list[ExpectedBand]:
    return [band for band in map(load_band, recipe_names()) if band is not None]
