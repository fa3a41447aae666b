"""What numbers mean, rule by rule; the thresholds themselves are tried on real runs in docs/collapse.md."""

from typing import Any

import pytest

from ijepa_hf.collapse_verdict import (
    FAILURES,
    LEAST_RANK,
    LEAST_STD,
    MOST_POSITION_SHARE,
    VERDICTS,
    judge_collapse,
)

HEALTHY = {
    "loss": 0.2,
    "progress": 0.5,
    "target_patch_std": 0.7,
    "context_patch_std": 0.7,
    "target_patch_cosine": 0.2,
    "target_patch_effective_rank": 20.0,
    "context_patch_effective_rank": 20.0,
    "context_lidar": 20.0,
    "target_position_share": 0.5,
    "cross_image_gap": 0.2,
    "possible_gap": 0.5,
    "prediction_skill": 0.5,
    "prediction_image_ratio": 0.5,
    "prediction_place_ratio": 0.8,
    "target_moved": 0.1,
    "ema_expected": 0.1,
}


def rows(*changes: dict[str, Any]) -> list[dict[str, Any]]:
    return [{**HEALTHY, "step": 100 * number, **change} for number, change in enumerate(changes)]


def name(*changes: dict[str, Any]) -> str:
    return judge_collapse(rows(*changes)).name


BROKEN = [
    ({"target_patch_std": LEAST_STD - 0.01}, "complete collapse"),
    ({"context_patch_std": LEAST_STD - 0.01}, "complete collapse"),
    ({"target_patch_effective_rank": LEAST_RANK - 0.1}, "dimensional collapse"),
    ({"context_patch_effective_rank": LEAST_RANK - 0.1}, "dimensional collapse"),
    ({"target_position_share": MOST_POSITION_SHARE + 0.01}, "positional collapse"),
    ({"prediction_image_ratio": 0.0}, "predictor dead"),
    ({"prediction_place_ratio": 0.0}, "predictor dead"),
    ({"target_moved": 0.001}, "EMA stuck"),
    ({"ema_expected": 0.0, "target_moved": 0.0}, "EMA stuck"),
]


@pytest.mark.parametrize(("change", "verdict"), BROKEN)
def test_each_failure_is_named_when_it_holds_in_two_rows(change: dict[str, Any], verdict: str):
    assert name({}, change, change) == verdict
    assert name({}, {}, change) == "healthy"  # one row is noise
    assert name({}, change, {}) == "healthy"  # and it can pass
    assert judge_collapse(rows({}, change, change)).is_failure


@pytest.mark.parametrize(("change", "verdict"), BROKEN)
def test_a_failure_says_its_numbers_and_what_to_try(change: dict[str, Any], verdict: str):
    judged = judge_collapse(rows({}, change, change))
    (field, value), *_ = change.items()
    assert judged.numbers[field] == value
    assert "--" in judged.advice
    assert str(judged).startswith(f"{verdict}: ")
    assert "{" not in str(judged)
    assert judged.step == 200


def test_two_rows_of_different_failures_are_not_one():
    assert name({}, {"target_patch_std": 0.0}, {"prediction_image_ratio": 0.0}) == "healthy"


def test_a_run_is_not_judged_by_its_first_row():
    judged = judge_collapse(rows({"target_patch_std": 0.0}))
    assert (judged.name, judged.is_failure) == ("not judged yet", False)


def test_a_model_without_a_run_is_judged_by_its_only_row():
    row = {key: value for key, value in HEALTHY.items() if key not in ("progress", "target_moved", "ema_expected")}
    assert judge_collapse([row]).name == "healthy"
    assert judge_collapse([{**row, "target_position_share": 0.99}]).name == "positional collapse"
    assert judge_collapse([{**row, "prediction_image_ratio": 0.0}]).name == "predictor dead"


def test_an_encoder_alone_is_judged_by_what_it_has():
    row = {"target_patch_std": 0.7, "target_patch_effective_rank": 30.0, "target_position_share": 0.1}
    assert judge_collapse([row]).name == "healthy"
    assert judge_collapse([{**row, "target_patch_effective_rank": 1.5}]).name == "dimensional collapse"


def test_a_predictor_has_time_to_learn():
    dead = {"prediction_image_ratio": 0.0, "prediction_place_ratio": 0.0, "progress": 0.05}
    assert name(dead, dead, dead) == "healthy"


def test_a_target_encoder_may_stand_still_at_the_end_as_its_schedule_says():
    still = {"ema_expected": 1e-5, "target_moved": 0.0}
    assert name({}, {**still, "progress": 0.95}, {**still, "progress": 1.0}) == "healthy"
    assert name({}, {**still, "progress": 0.4}, {**still, "progress": 0.5}) == "EMA stuck"
    slow = {"ema_expected": 0.01, "target_moved": 0.008}
    assert name({}, slow, slow) == "healthy"


def test_a_missing_number_is_no_alarm():
    assert name({}, {"target_moved": None}, {"target_moved": None}) == "healthy"
    assert name({}, {"context_lidar": None}, {"context_lidar": None}) == "healthy"


def test_a_rising_loss_without_a_sign_of_collapse_is_fine():
    judged = judge_collapse(rows({"loss": 0.1}, {"loss": 0.2}, {"loss": 0.3}))
    assert (judged.name, judged.is_failure) == ("loss rising, but fine", False)
    assert judged.numbers["least_loss"] == 0.2  # that before training is of no interest
    assert name({"loss": 0.4}, {"loss": 0.2}, {"loss": 0.21}) == "healthy"
    assert name({}, {"loss": 0.1, "target_patch_std": 0.0}, {"loss": 0.3, "target_patch_std": 0.0}) in FAILURES


def test_what_is_wrong_with_all_patches_comes_before_what_follows_from_it():
    both = {"target_patch_std": 0.0, "prediction_image_ratio": 0.0}
    assert name({}, both, both) == "complete collapse"


def test_no_rows_are_refused_and_names_are_complete():
    with pytest.raises(ValueError, match="nothing to judge"):
        judge_collapse([])
    assert {verdict for _, verdict in BROKEN} == set(FAILURES)
    assert set(VERDICTS) == {*FAILURES, "healthy", "loss rising, but fine", "not judged yet"}
