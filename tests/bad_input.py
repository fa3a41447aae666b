"""What the tests of bad input share: how many examples are tried, and how long and how large one may get."""

import contextlib
import math
import resource
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import hypothesis
import numpy as np
from hypothesis import strategies as st

# Of wall-clock time for one example: none takes a hundredth of it, so only a hang reaches it, on a busy machine too.
DEADLINE = timedelta(seconds=30)
HEALTH = [
    hypothesis.HealthCheck.too_slow,
    hypothesis.HealthCheck.data_too_large,
    hypothesis.HealthCheck.filter_too_much,
]


def examples(everyday: int, thorough: int) -> Any:
    """Tries the same few examples every day, and many others in each run of `make test-slow`."""
    if hypothesis.settings.default.max_examples == hypothesis.settings.get_profile("everyday").max_examples:
        return hypothesis.settings(max_examples=everyday, deadline=DEADLINE)
    return hypothesis.settings(
        max_examples=thorough, derandomize=False, deadline=DEADLINE, suppress_health_check=HEALTH
    )


@contextlib.contextmanager
def bounded(seconds: float, megabytes: float) -> Iterator[None]:
    """Fails where what is inside takes more time of the processor, or lifts the process's peak of memory by more."""
    start, before = time.process_time(), _peak_megabytes()
    yield
    spent, grown = time.process_time() - start, _peak_megabytes() - before
    assert spent <= seconds, f"took {spent:.2f} s of CPU time"
    assert grown <= megabytes, f"took {grown:.0f} MB"


def _peak_megabytes() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def says(message: str, name: str, value: Any) -> bool:
    """Whether a message names a field with its value, as `name=value`, in one of the ways to write it."""
    shown = {repr(value), str(value)}
    if isinstance(value, list | tuple):
        shown |= {repr(list(value)), repr(tuple(value))}
    if isinstance(value, float):
        shown.add(f"{value:g}")
    return any(f"{name}={text}" in message for text in shown)


# Values of kinds and sizes that no field expects.
ODD_VALUES = st.sampled_from(
    [
        None, True, False, "", "12", "wide", -1, 0, 1, 2, 3, 7, 2**31, 10**40, 10**400, math.nan, math.inf, -math.inf,
        -0.0, 0.0, 1e-300, 5e-324, 0.5, 1.0, 1e300, 1.7e308, [], [1], [1, 2], (8, 4), (1, 2, 3), [0.2, 0.1],
        (math.nan, 1.0), (0.1, math.inf), [0.0, 1.0], (0.1, 10**400), [None, 1], ["a", "b"], [True, True], [[1], [2]],
        {}, {"a": 1}, b"x", 1j, np.int64(4), np.float32(0.25), np.float64(0.25), np.ones(2), 0.1 + 0.2,
    ]
)  # fmt: skip
