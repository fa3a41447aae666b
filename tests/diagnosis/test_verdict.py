"""What numbers mean, rule by rule; the thresholds themselves are tried on real runs in docs/collapse.md."""

from typing import Any

import pytest

from ijepa_hf.diagnosis.verdict import FAILURES, VERDICTS, judge_collapse

HEALTHY = {
    "loss": 0.2,
    "progress": 0.5,
    "target_patch_normalized_std": 0.7,
    "context_patch_normalized_std": 0.7,
    "target_patch_cosine": 0.2,
    "target_patch_effective_rank": 20.0,
    "context_patch_effective_rank": 20.0,
    "context_lidar": 20.0,
    "target_position_share": 0.5,
    "cross_image_gap": 0.2,
    "perfect_gap": 0.5,
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


# values that runs broken on purpose had (benchmarks/results/collapse.json), not the thresholds
BROKEN = [
    ({"target_patch_normalized_std": 0.101}, "complete collapse"),
    ({"context_patch_normalized_std": 0.053}, "complete collapse"),
    ({"target_patch_effective_rank": 2.2}, "dimensional collapse"),
    ({"context_patch_effective_rank": 1.7}, "dimensional collapse"),
    ({"target_position_share": 0.949}, "positional collapse"),
    ({"prediction_image_ratio": 0.0052}, "predictor dead"),
    ({"prediction_place_ratio": 2e-7}, "predictor dead"),
    ({"target_moved": 0.001}, "EMA stuck"),
    ({"ema_expected": 0.0, "target_moved": 0.0}, "EMA stuck"),
]
# the least, or most, that healthy runs on digits ever had
HEALTHIEST = {
    "target_patch_normalized_std": 0.541, "context_patch_normalized_std": 0.352, "target_patch_effective_rank": 8.2,
    "context_patch_effective_rank": 7.3, "target_position_share": 0.60, "prediction_image_ratio": 0.031,
}  # fmt: skip


def test_the_worst_values_of_healthy_runs_are_no_alarm():
    assert name({}, HEALTHIEST, HEALTHIEST) == "healthy"


@pytest.mark.parametrize(("change", "verdict"), BROKEN)
def test_each_failure_is_named_with_its_numbers_and_advice_when_it_holds_in_two_rows(
    change: dict[str, Any], verdict: str
):
    assert name({}, change, change) == verdict
    assert name({}, {}, change) == "healthy"  # one row is noise
    assert name({}, change, {}) == "healthy"  # and it can pass
    judged = judge_collapse(rows({}, change, change))
    (field, value), *_ = change.items()
    assert judged.is_failure
    assert judged.numbers[field] == value
    assert "--" in judged.advice
    assert str(judged).startswith(f"{verdict}: ")
    assert "{" not in str(judged)
    assert judged.step == 200


def test_two_rows_of_different_failures_are_not_one():
    assert name({}, {"target_patch_normalized_std": 0.0}, {"prediction_image_ratio": 0.0}) == "healthy"


def test_a_run_is_not_judged_by_its_first_row():
    judged = judge_collapse(rows({"target_patch_normalized_std": 0.0}))
    assert (judged.name, judged.is_failure) == ("not judged yet", False)


def test_a_model_without_a_run_is_judged_by_its_only_row():
    row = {key: value for key, value in HEALTHY.items() if key not in ("progress", "target_moved", "ema_expected")}
    assert judge_collapse([row]).name == "healthy"
    assert judge_collapse([{**row, "target_position_share": 0.99}]).name == "positional collapse"
    assert judge_collapse([{**row, "prediction_image_ratio": 0.0}]).name == "predictor dead"


def test_an_encoder_alone_is_judged_by_what_it_has():
    row = {"target_patch_normalized_std": 0.7, "target_patch_effective_rank": 30.0, "target_position_share": 0.1}
    assert judge_collapse([row]).name == "healthy"
    judged = judge_collapse([{**row, "target_patch_effective_rank": 1.5}])
    assert judged.name == "dimensional collapse"
    assert "1.5 in the target encoder, where" in judged.reason
    assert judged.numbers == {"target_patch_effective_rank": 1.5}
    assert "nan" not in str(judge_collapse([{**row, "target_patch_normalized_std": 0.1}])).lower()


@pytest.mark.parametrize(("progress", "steps"), [(0.05, (100, 200, 300)), (0.9, (10, 20, 30))])
def test_a_predictor_has_time_to_learn(progress: float, steps: tuple[int, ...]):
    dead = {"prediction_image_ratio": 0.0, "prediction_place_ratio": 0.0, "progress": progress}
    assert judge_collapse([{**HEALTHY, **dead, "step": step} for step in steps]).name == "healthy"


def test_rows_close_to_each_other_and_momenta_near_one_are_not_stuck():
    close = {"ema_expected": 9e-4, "target_moved": 9e-4}
    assert name({}, close, close, close) == "healthy"
    unseen = {"ema_expected": 5e-4, "target_moved": 0.0}  # less than can be told from rounding
    assert name({}, unseen, unseen, unseen) == "healthy"


def test_steps_that_leave_both_encoders_alone_are_not_stuck():
    frozen = {"ema_expected": None, "target_moved": 0.0, "progress": 0.02}
    assert name({"ema_expected": None, "target_moved": None}, frozen, frozen, frozen) == "healthy"


def test_a_stuck_target_encoder_is_not_forgotten_at_the_end():
    stuck = {"target_moved": 0.0, "ema_expected": 0.1}
    end = {"target_moved": 0.0, "ema_expected": 1e-5}
    judged = judge_collapse(rows({}, stuck, stuck, {**end, "progress": 0.95}, {**end, "progress": 1.0}))
    assert judged.name == "EMA stuck"
    assert judged.step == 400
    assert judged.numbers == {"target_moved": 0.0, "ema_expected": 0.1}


def test_rows_of_other_images_do_not_count():
    loss = [{"loss": 0.1, "batch": "a"}, {"loss": 0.1, "batch": "a"}, {"loss": 0.3, "batch": "b"}]
    assert name(*loss, {"loss": 0.3, "batch": "b"}) == "healthy"
    assert name(*loss) == "not judged yet"


def test_rows_without_numbers_are_not_judged():
    assert judge_collapse([{"step": 0}, {"step": 50}]).name == "not judged yet"
    assert judge_collapse([{}]).name == "not judged yet"


def test_a_target_encoder_may_stand_still_at_the_end_as_its_schedule_says():
    still = {"ema_expected": 0.0, "target_moved": 0.0}
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
    late = [{**HEALTHY, "step": step, "loss": loss} for step, loss in ((500, 0.1), (600, 0.2), (700, 0.3))]
    assert judge_collapse(late).numbers["least_loss"] == 0.1  # measured from a resume on
    assert name({"loss": 0.4}, {"loss": 0.2}, {"loss": 0.21}) == "healthy"
    assert (
        name({}, {"loss": 0.1, "target_patch_normalized_std": 0.0}, {"loss": 0.3, "target_patch_normalized_std": 0.0})
        in FAILURES
    )


def test_what_is_wrong_with_all_patches_comes_before_what_follows_from_it():
    both = {"target_patch_normalized_std": 0.0, "prediction_image_ratio": 0.0}
    assert name({}, both, both) == "complete collapse"


def test_no_rows_are_refused_and_names_are_complete():
    with pytest.raises(ValueError, match="nothing to judge"):
        judge_collapse([])
    assert {verdict for _, verdict in BROKEN} == set(FAILURES)
    assert set(VERDICTS) == {*FAILURES, "healthy", "loss rising, but fine", "not judged yet"}
