"""Times several ways of doing one thing beside each other, and returns the result as a row of a table.

The sides take turns in one process: in every round each runs once, and the first of a round is another one each time,
so that whatever else the machine does falls on all of them alike. What counts are ratios within a round; an absolute
time is only there for the reader.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

WARM_UP_ROUNDS = 1  # not counted: caches, allocators and lazy initialisation


@dataclass(frozen=True)
class Spread:
    """The median of some numbers and their middle half."""

    median: float
    quarter: float
    three_quarters: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        """The spread of at least two numbers."""
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(middle, low, high)

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.quarter:.3g}-{self.three_quarters:.3g})"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        name: What was done.
        goal: The ratio that is wanted; `None` where there is none.
        stretch: The ratio that would be better still.
        at_most: Whether a smaller ratio is better (memory, shares); else a larger one is (times as fast).
        unit: Of `ours`, `reference` and `limit`.
        ours: This package's figure.
        reference: The other side's figure.
        reference_name: Which side that is.
        ratio: What is held against the goal, taken within each round.
        limit: What the hardware or the unavoidable part of the work allows.
        limit_name: Which limit that is.
        share_of_limit: How much of what is possible is reached, 0 to 1, taken within each round.
        not_measured: Why there are no numbers.
        note: What a reader has to know.
    """

    name: str
    goal: float | None = None
    stretch: float | None = None
    at_most: bool = False
    unit: str = "ms"
    ours: Spread | None = None
    reference: Spread | None = None
    reference_name: str = ""
    ratio: Spread | None = None
    limit: Spread | None = None
    limit_name: str = ""
    share_of_limit: Spread | None = None
    not_measured: str = ""
    note: str = ""

    @property
    def verdict(self) -> str:
        """`stretch`, `goal`, `missed`, or `not measured`; empty where nothing is wanted."""
        if self.ratio is None:
            return "not measured"
        if self.goal is None:
            return ""

        def reached(wanted: float) -> bool:
            assert self.ratio is not None
            return self.ratio.median <= wanted if self.at_most else self.ratio.median >= wanted

        if self.stretch is not None and reached(self.stretch):
            return "stretch"
        return "goal" if reached(self.goal) else "missed"

    def as_json(self) -> dict[str, Any]:
        """All fields and the verdict."""
        return {**asdict(self), "verdict": self.verdict}


def take_turns(
    sides: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Times each side once a round, starting with another one each time.

    Args:
        sides: What to run, by name.
        rounds: Timed rounds; one more goes before them.
        clock: Seconds. `time.process_time` is blind to other processes, and right for what runs on one thread.

    Returns:
        Seconds of each side in each round.
    """
    names = list(sides)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(WARM_UP_ROUNDS + rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            begin = clock()
            sides[name]()
            elapsed = clock() - begin
            if turn >= WARM_UP_ROUNDS:
                times[name].append(elapsed)
    return times


def ratios(above: list[float], below: list[float]) -> Spread:
    """The spread of `above / below`, round by round."""
    return Spread.of([one / other for one, other in zip(above, below, strict=True)])


def scaled(values: list[float], factor: float = 1e3) -> Spread:
    """The spread of some numbers in another unit; milliseconds of seconds if nothing is said."""
    return Spread.of([factor * value for value in values])


def render_table(rows: list[Row]) -> str:
    """The rows as a Markdown table: median (middle half)."""
    lines = [
        "| | ours | reference | ratio | goal, stretch | reached | limit | share of the limit |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        unit = f" {row.unit}" if row.unit else ""
        sign = "at most " if row.at_most else ""
        wanted = ", ".join(f"{sign}{value:g}" for value in (row.goal, row.stretch) if value is not None)
        reference = f"{row.reference}{unit}, {row.reference_name}" if row.reference else ""
        limit = f"{row.limit}{unit}, {row.limit_name}" if row.limit else ""
        cells = [row.name, f"{row.ours}{unit}" if row.ours else "", reference, str(row.ratio or ""), wanted]
        cells += [row.verdict, limit, str(row.share_of_limit or "")]
        lines.append("| " + " | ".join(cells) + " |")
    notes = [f"- {row.name}: {row.not_measured or row.note}" for row in rows if row.not_measured or row.note]
    return "\n".join(lines + (["", *notes] if notes else []))
