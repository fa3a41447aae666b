"""The band in which the curves of a recipe are expected: made of runs of several seeds, compared with other runs.

A recipe that was measured ships `recipes/bands/<recipe>.json`, made by `scripts/record_band.py`: for each curve, steps
with the least and the largest value expected there, and what the runs were. A run with the recipe's arguments is held
against it, row by row. A band never stops a run: it says where a run is unlike others of its recipe.

Three curves: the loss, as means over windows of steps, since the loss of one step is noise for the most part; RankMe
of the target encoder's patches on the fixed images of `diagnostics.jsonl`; kNN of `evaluations.jsonl`, where the
recipe sets `eval_steps`.
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

POINTS_TO_LEAVE = 2  # outside, one after the other
LEAST_ROWS_SHARE = 0.5  # of the rows in a window of the band; with fewer, the run has no loss to compare there

# What may differ between a run and the recipe that it is compared with: the seed, and what changes no curve.
_SCORED_ON = {"eval_split_name", "label_column_name", "max_eval_samples"}  # they change the curve of kNN
NOT_COMPARED = (argument_names("speed", "place", "reporting") - _SCORED_ON) | {"seed"}

KEYS = {"loss": "loss", "rankme": "target_patch_rankme", "knn": "knn"}  # in a row, by the name of the curve
WORDS = {"loss": "loss", "rankme": "RankMe", "knn": "kNN"}

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class BandCurve:
    """Where a curve is expected.

    Args:
        steps: Optimiser steps, rising; of the loss the last of each window.
        lower: The least value expected at each.
        upper: The largest.
    """

    steps: tuple[int, ...]
    lower: tuple[float, ...]
    upper: tuple[float, ...]

    def at(self, step: int) -> tuple[float, float] | None:
        """The bounds at a step, interpolated; `None` before the first and after the last step of the band."""
        if not self.steps[0] <= step <= self.steps[-1]:
            return None
        return float(np.interp(step, self.steps, self.lower)), float(np.interp(step, self.steps, self.upper))


@dataclass(frozen=True)
class ExpectedBand:
    """The expected curves of a recipe, and what they were made of.

    Args:
        recipe: Its name.
        seeds: Of the runs.
        machines: What they ran on, as their `report.json` says it, each once.
        loss_window: Optimiser steps in a window of the loss.
        loss_rows: Rows in a window of the runs.
        curves: By name, `loss`, `rankme` and `knn`; those that the runs have.
        arguments: Of the runs, those that are compared.
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
        """Its recipe, and of how many runs it was made."""
        return f"{self.recipe} ({len(self.seeds)} seeds)"

    def as_json(self) -> str:
        """What its file holds; `read_band` reads it."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"


@dataclass(frozen=True)
class RunRows:
    """What a run has logged.

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
        """The rows that a curve is in."""
        return {"loss": self.metrics, "rankme": self.diagnostics, "knn": self.evaluations}[curve]


# -- comparing a run -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """A value of a run beside what is expected there.

    Args:
        step: Optimiser step; of a window of the loss the last.
        value: Of the run.
        lower: The least value expected.
        upper: The largest.
    """

    step: int
    value: float
    lower: float
    upper: float

    @property
    def is_inside(self) -> bool:
        """Whether the value is expected; the bounds are."""
        return self.lower <= self.value <= self.upper

    @property
    def distance(self) -> float:
        """How far it is outside, in widths of the band."""
        return max(self.lower - self.value, self.value - self.upper, 0.0) / max(self.upper - self.lower, 1e-12)


@dataclass(frozen=True)
class Excursion:
    """A part of a curve that is outside its band.

    Args:
        first: The first point outside.
        farthest: The one that is farthest outside.
        back: The first inside again; `None` where the curve has stayed outside.
    """

    first: Point
    farthest: Point
    back: Point | None


class BandWatch:
    """A run beside the band of its recipe.

    What it says follows from the rows alone, so that a run which goes on after a stop says what an uninterrupted one
    says.

    Args:
        band: From `find_band`.
        rows: What the run has logged so far.
    """

    def __init__(self, band: ExpectedBand, rows: RunRows) -> None:
        self.band = band
        self.points: dict[str, list[Point]] = {curve: [] for curve in band.curves}
        self._windows = LossWindows(band.loss_window, band.curves["loss"].steps[-1])
        for curve in band.curves:
            for row in rows.of(curve):
                self.add(curve, row)

    def add(self, curve: str, row: Mapping[str, Any]) -> list[str]:
        """Takes a row that was logged.

        Args:
            curve: `loss`, `rankme` or `knn`; one that the band lacks is passed over.
            row: The next line of the file that the curve is in.

        Returns:
            A line of text where the curve has left its band, or is back; else none.
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
            if bounds is None:  # a run of the recipe has no steps beyond the band's, but may be measured before them
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
        """The parts of a curve that are outside, in their order.

        `POINTS_TO_LEAVE` have to be outside one after the other; the last of the band counts alone.
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
        """Where the run is inside, and where it left, on one line."""
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
        """The verdict as `report.json` keeps it."""
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
    """Means of the loss over windows of steps. The row of step 1 is left out: it is there at any `logging_steps`.

    Args:
        length: Optimiser steps in a window; what is left over of the run goes to the last.
        num_steps: Of the run.
    """

    def __init__(self, length: int, num_steps: int) -> None:
        self.length, self.num_steps = length, num_steps
        self._end = 0
        self._values: list[float] = []

    def begin(self, step: int) -> int:
        """The first step of the window that a step is in."""
        last = max(self.num_steps // self.length - 1, 0)
        return min((step - 1) // self.length, last) * self.length + 1

    def end(self, step: int) -> int:
        """The last step of the window that a step is in."""
        end = self.begin(step) - 1 + self.length
        return self.num_steps if end + self.length > self.num_steps else end

    def add(self, row: Mapping[str, Any]) -> list[tuple[int, float, int]]:
        """Takes a row, and returns last step, mean and number of rows of each window that it closes."""
        step = row["step"]
        if not 1 < step <= self.num_steps:
            return []
        closed = [self._close()] if self._values and self._end != self.end(step) else []
        self._end = self.end(step)
        self._values.append(float(row["loss"]))
        return [*closed, self._close()] if step == self._end else closed

    def of(self, rows: Rows) -> list[tuple[int, float, int]]:
        """Takes all rows of a run, and returns the same of all its windows."""
        return [window for row in rows for window in self.add(row)]

    def _close(self) -> tuple[int, float, int]:
        values, self._values = self._values, []
        return self._end, math.fsum(values) / len(values), len(values)


# -- which band is a run's -------------------------------------------------------------------------------------------


def find_band(arguments: Mapping[str, Any]) -> ExpectedBand | None:
    """The band of the shipped recipe that a run is a run of.

    Args:
        arguments: All arguments of the run, as in `run.json`.

    Returns:
        The band; `None` where no recipe with a band has these arguments, apart from `NOT_COMPARED`.
    """
    for band in _shipped_bands():
        if not differing_arguments(band.arguments, arguments, NOT_COMPARED):
            return band
    return None


def band_notice(arguments: Mapping[str, Any], given: Iterable[str]) -> str | None:
    """What a run says at its start: with what it is compared or, where it was to be the recipe but is not, why not.

    Args:
        arguments: All arguments of the run.
        given: Names that its recipe or a flag has set, `ModelArguments.given`.

    Returns:
        Text; `None` where there is no band of the run's recipe. A recipe counts as the run's where all that it sets
        was set, on the same data set.
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
    """The band that is shipped with a recipe.

    Args:
        recipe: Its name.

    Returns:
        The band; `None` where the recipe was not measured.
    """
    file = resources.files("ijepa_hf.recipes") / "bands" / f"{recipe}.json"
    return read_band(file.read_text(encoding="utf-8")) if file.is_file() else None


def read_band(text: str) -> ExpectedBand:
    """Reads what `ExpectedBand.as_json` wrote.

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
