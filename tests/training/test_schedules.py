"""Schedules against the values that the published code printed, and what happens at and past their ends."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ijepa_hf.training.schedules import ema_momentum_at, learning_rate_at, weight_decay_at

GOLDEN = json.loads((Path(__file__).parents[1] / "fixtures" / "golden" / "schedules.json").read_text())
SETTINGS = GOLDEN["settings"]
RATES = {"learning_rate": 1e-3, "start_learning_rate": 2e-4, "final_learning_rate": 1e-6}


@pytest.mark.parametrize("schedule_scale", [1.0, 1.25])
def test_every_published_row_is_reproduced(schedule_scale: float):
    run = GOLDEN["runs"][f"ipe_scale={schedule_scale}"]
    total = schedule_scale * SETTINGS["epochs"] * SETTINGS["ipe"]
    warmup_steps = int(SETTINGS["warmup"] * SETTINGS["ipe"])
    assert (int(total), warmup_steps) == (run["lr_T_max"], run["warmup_steps"])
    assert len(run["rows"]) == 322
    for step, lr, wd, momentum in run["rows"]:
        assert learning_rate_at(
            step,
            learning_rate=SETTINGS["lr"],
            start_learning_rate=SETTINGS["start_lr"],
            final_learning_rate=SETTINGS["final_lr"],
            warmup_steps=warmup_steps,
            total_steps=int(total),
        ) == pytest.approx(lr, rel=1e-12, abs=0)
        assert weight_decay_at(
            step,
            weight_decay=SETTINGS["weight_decay"],
            final_weight_decay=SETTINGS["final_weight_decay"],
            total_steps=int(total),
        ) == pytest.approx(wd, rel=1e-12, abs=0)
        assert ema_momentum_at(
            step - 1, ema_momentum=SETTINGS["ema"][0], final_ema_momentum=SETTINGS["ema"][1], total_steps=total
        ) == pytest.approx(momentum, rel=1e-12, abs=0)


def test_learning_rate_peaks_exactly_at_the_end_of_the_warmup():
    values = [learning_rate_at(t, **RATES, warmup_steps=10, total_steps=50) for t in range(1, 51)]
    assert values[9] == 1e-3
    assert values.index(max(values)) == 9
    assert values[0] == pytest.approx(2e-4 + 8e-4 / 10, rel=1e-15)
    assert values[29] == pytest.approx((1e-3 + 1e-6) / 2, rel=1e-12)  # half way down the cosine
    assert values[-1] == 1e-6


def test_without_warmup_the_cosine_starts_at_once():
    first = learning_rate_at(1, **RATES, warmup_steps=0, total_steps=4)
    assert first == pytest.approx(1e-6 + (1e-3 - 1e-6) * (1 + math.sqrt(0.5)) / 2, rel=1e-12)


def test_a_run_shorter_than_its_warmup_ends_inside_it():
    values = [learning_rate_at(t, **RATES, warmup_steps=100, total_steps=20) for t in range(1, 21)]
    assert values == pytest.approx([2e-4 + 8e-6 * t for t in range(1, 21)], rel=1e-12)


def test_past_the_end_the_final_values_are_held():
    for extra in (1, 7, 1000):
        assert learning_rate_at(50 + extra, **RATES, warmup_steps=10, total_steps=50) == 1e-6
        assert weight_decay_at(50 + extra, weight_decay=0.04, final_weight_decay=0.4, total_steps=50) == 0.4
        assert ema_momentum_at(50 + extra, ema_momentum=0.996, final_ema_momentum=1.0, total_steps=50.5) == 1.0


def test_a_final_learning_rate_above_the_peak_is_a_floor_after_the_warmup():
    rates = {"learning_rate": 1e-4, "start_learning_rate": 0.0, "final_learning_rate": 1e-3}
    assert learning_rate_at(5, **rates, warmup_steps=10, total_steps=50) == pytest.approx(5e-5, rel=1e-12)
    assert learning_rate_at(10, **rates, warmup_steps=10, total_steps=50) == 1e-3


def test_weight_decay_may_also_fall():
    values = [weight_decay_at(t, weight_decay=0.4, final_weight_decay=0.1, total_steps=8) for t in (4, 8, 9)]
    assert values == pytest.approx([0.25, 0.1, 0.1], rel=1e-12)


def test_momentum_denominator_keeps_its_fraction():
    value = ema_momentum_at(5, ema_momentum=0.9, final_ema_momentum=1.0, total_steps=10.4)
    assert value == pytest.approx(0.9 + 0.5 / 10.4, rel=1e-15)


@given(
    step0=st.integers(0, 10**7),
    first=st.floats(0, 1),
    final=st.floats(0, 1),
    total=st.floats(0.5, 1e7),
)
def test_momentum_never_leaves_its_two_ends(step0: int, first: float, final: float, total: float):
    value = ema_momentum_at(step0, ema_momentum=first, final_ema_momentum=final, total_steps=total)
    assert min(first, final) <= value <= max(first, final)


@given(step=st.integers(1, 3000), warmup=st.integers(0, 1500), total=st.integers(1, 2000))
def test_learning_rate_and_weight_decay_never_leave_their_ranges(step: int, warmup: int, total: int):
    lr = learning_rate_at(step, **RATES, warmup_steps=warmup, total_steps=total)
    assert 1e-6 <= lr <= 1e-3
    assert 0.04 <= weight_decay_at(step, weight_decay=0.04, final_weight_decay=0.4, total_steps=total) <= 0.4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: learning_rate_at(0, **RATES, warmup_steps=1, total_steps=9), "step=0 must be 1 or more"),
        (lambda: learning_rate_at(1, **RATES, warmup_steps=-1, total_steps=9), "warmup_steps=-1 must be 0"),
        (lambda: learning_rate_at(1, **RATES, warmup_steps=1, total_steps=0), "total_steps=0 must be a whole"),
        (lambda: learning_rate_at(1, **RATES, warmup_steps=1, total_steps=9.5), "write int"),  # type: ignore[arg-type]
        (
            lambda: learning_rate_at(1, **RATES, warmup_steps=1, total_steps=math.inf),
            "total_steps=inf must be a whole",
        ),
        (lambda: learning_rate_at(math.nan, **RATES, warmup_steps=1, total_steps=9), "step=nan must be 1 or more"),
        (lambda: ema_momentum_at(math.nan, ema_momentum=0.9, final_ema_momentum=1, total_steps=9), "step0=nan must"),
        (lambda: ema_momentum_at(0, ema_momentum=0.9, final_ema_momentum=1, total_steps=math.inf), "total_steps=inf"),
        (lambda: weight_decay_at(0, weight_decay=0, final_weight_decay=1, total_steps=9), "step=0 must be 1 or more"),
        (lambda: ema_momentum_at(-1, ema_momentum=0.9, final_ema_momentum=1, total_steps=9), "step0=-1 must be 0"),
        (lambda: ema_momentum_at(0, ema_momentum=0.9, final_ema_momentum=1, total_steps=0), "total_steps=0 must"),
        (lambda: ema_momentum_at(0, ema_momentum=1.1, final_ema_momentum=1, total_steps=9), r"ema_momentum=1.1 must"),
    ],
)
def test_impossible_arguments_are_named(call, message: str):
    with pytest.raises(ValueError, match=message):
        call()
