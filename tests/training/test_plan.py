"""The plan: how long a run is, and what its schedules say at each step."""

import pytest

from ijepa_hf.recipes.arguments import PretrainingArguments
from ijepa_hf.training.plan import StepValues, make_plan, values_at


def test_plan_counts_steps_warm_up_and_schedules():
    run = PretrainingArguments(
        base_learning_rate=1e-3,
        num_train_epochs=10,
        warmup_epochs=2.5,
        schedule_scale=1.25,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
    )
    plan = make_plan(run, num_samples=1000, num_ranks=4)
    assert (plan.global_batch_size, plan.steps_per_epoch, plan.num_steps) == (64, 15, 150)
    assert (plan.warmup_steps, plan.schedule_steps, plan.momentum_steps) == (37, 187, 187.5)
    assert plan.learning_rate == pytest.approx(1e-3 * 64 / 256)
    run.max_train_steps = 40
    assert make_plan(run, 1000, 4).num_steps == 40
    run.max_train_steps = 37
    with pytest.raises(
        ValueError, match=r"warmup_epochs=2.5 are 37 steps, but the run has only 37; use --warmup_epochs"
    ):
        make_plan(run, 1000, 4)


@pytest.mark.parametrize("name", ["num_train_epochs", "warmup_epochs", "base_learning_rate", "schedule_scale"])
@pytest.mark.parametrize("value", [1.7e308, float("inf"), float("nan")])
def test_a_length_or_rate_beyond_what_a_float_holds_is_refused_by_name(name, value):
    run = PretrainingArguments(**{"base_learning_rate": 1e-3, name: value})
    with pytest.raises(ValueError, match=f"{name}={value} is too large, or no number".replace("+", r"\+")):
        make_plan(run, num_samples=1000, num_ranks=1)


def test_values_rise_through_the_warm_up_and_momentum_starts_at_its_first_value():
    run = PretrainingArguments(
        learning_rate=1.0, start_learning_rate=0.2, warmup_epochs=1, per_device_train_batch_size=10
    )
    plan = make_plan(run, num_samples=100, num_ranks=1)
    assert values_at(0, run, plan).learning_rate == pytest.approx(0.2 + 0.8 / 10)
    assert values_at(9, run, plan).learning_rate == pytest.approx(1.0)
    assert values_at(0, run, plan).ema_momentum == 0.996


def test_the_schedules_begin_after_the_predictor_warm_up_and_are_those_of_a_shorter_run():
    def arguments(**changes):
        return PretrainingArguments(
            learning_rate=1.0, start_learning_rate=0.2, warmup_epochs=2, per_device_train_batch_size=10, **changes
        )

    late = arguments(max_train_steps=100, predictor_warmup_steps=30)
    plan = make_plan(late, num_samples=100, num_ranks=1)
    short = arguments(max_train_steps=70)
    short_plan = make_plan(short, num_samples=100, num_ranks=1)
    assert plan.num_steps == 100
    for step in (0, 1, 19, 20, 45, 69):
        assert values_at(step + 30, late, plan) == values_at(step, short, short_plan)
    # before: the learning rate rises within a tenth of the warm-up, and the target encoder stands still
    assert [values_at(step, late, plan).learning_rate for step in (0, 1, 2, 29)] == pytest.approx([1 / 3, 2 / 3, 1, 1])
    assert values_at(29, late, plan) == StepValues(1.0, 0.04, 1.0, encoder_is_frozen=True)
    assert not values_at(30, late, plan).encoder_is_frozen


def test_a_new_predictor_is_warmed_up_for_a_twentieth_of_the_run_unless_told_otherwise():
    def steps(asked, **new):
        run = PretrainingArguments(learning_rate=1.0, max_train_steps=200, predictor_warmup_steps=asked)
        return make_plan(run, 640, 1, **new).predictor_warmup_steps

    assert steps(None) == 0
    assert steps(None, has_new_predictor=True) == 10
    assert steps(0, has_new_predictor=True) == 0
    short = PretrainingArguments(learning_rate=1.0, max_train_steps=5)
    assert make_plan(short, 640, 1, has_new_predictor=True).predictor_warmup_steps == 1  # never none at all
    assert steps(25, has_new_predictor=True) == steps(25) == 25
    with pytest.raises(ValueError, match="predictor_warmup_steps=200 leave nothing of a run of 200 steps"):
        steps(200)
