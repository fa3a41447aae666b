"""Plans a run: its length and the values of its schedules, as pure functions of its arguments and of the step.

A run that starts from weights without a predictor begins with a predictor warm-up: the encoders stay as they are, the
new predictor learns to predict their features, and only then do the schedules begin. A random predictor would
otherwise send large, meaningless gradients into an encoder that is worth keeping.
"""

import math
from dataclasses import dataclass

from ijepa_hf.data.order import global_batch_size
from ijepa_hf.recipes.arguments import PretrainingArguments
from ijepa_hf.training.schedules import ema_momentum_at, learning_rate_at, weight_decay_at

PREDICTOR_WARMUP_SHARE = 0.05  # of the run, where the predictor is new and `predictor_warmup_steps` is not given
PREDICTOR_RAMP_SHARE = 0.1  # of the predictor's warm-up, in which the learning rate rises to its highest


@dataclass(frozen=True)
class Plan:
    """Holds the length of a run and of its schedules, in optimiser steps.

    Args:
        global_batch_size: Images in an optimiser step.
        steps_per_epoch: Whole global batches in an epoch; what is left over is dropped.
        num_steps: Steps of the whole run.
        predictor_warmup_steps: First steps, with the encoders frozen; the schedules begin after them.
        warmup_steps: Steps in which the learning rate rises.
        schedule_steps: Length of the schedules of learning rate and weight decay (published `int(ipe_scale * steps)`).
        momentum_steps: Length of the momentum's schedule (published `ipe_scale * steps`, not cut to whole steps).
        learning_rate: The highest learning rate.
    """

    global_batch_size: int
    steps_per_epoch: int
    num_steps: int
    predictor_warmup_steps: int
    warmup_steps: int
    schedule_steps: int
    momentum_steps: float
    learning_rate: float

    def epoch(self, step: int) -> float:
        """Returns the epochs done after a step, to four digits, as the logs have them."""
        return round(step / self.steps_per_epoch, 4)


def make_plan(run: PretrainingArguments, num_samples: int, num_ranks: int, *, has_new_predictor: bool = False) -> Plan:
    """Works out the plan of a run.

    Args:
        run: The arguments.
        num_samples: Images in the data set.
        num_ranks: Processes.
        has_new_predictor: Whether the encoders are trained and the predictor is not.

    Returns:
        The plan.

    Raises:
        ValueError: If the data set is smaller than a global batch, the warm-ups are as long as the run, or a length or
            rate is beyond what a float holds.
    """
    batch = global_batch_size(num_samples, run.per_device_train_batch_size, run.gradient_accumulation_steps, num_ranks)
    per_epoch = num_samples // batch
    epochs = _finite("num_train_epochs", run.num_train_epochs, per_epoch)
    num_steps = run.max_train_steps or max(1, math.ceil(epochs))
    predictor_warmup = run.predictor_warmup_steps
    if predictor_warmup is None:
        share = max(1, int(PREDICTOR_WARMUP_SHARE * num_steps))
        predictor_warmup = min(share, num_steps - 1) if has_new_predictor else 0
    if predictor_warmup >= num_steps:
        raise ValueError(
            f"predictor_warmup_steps={predictor_warmup} leave nothing of a run of {num_steps} steps; use "
            f"--predictor_warmup_steps {num_steps // 20} or train for longer."
        )
    scheduled = num_steps - predictor_warmup
    warmup = int(_finite("warmup_epochs", run.warmup_epochs, per_epoch))
    if warmup and warmup >= scheduled:
        raise ValueError(
            f"warmup_epochs={run.warmup_epochs:g} are {warmup} steps, but the run has only {scheduled}; use "
            f"--warmup_epochs {scheduled / per_epoch / 10:.2g} or train for longer."
        )
    if run.learning_rate is not None:
        learning_rate = run.learning_rate
    else:
        assert run.base_learning_rate is not None  # PretrainingArguments.check
        learning_rate = _finite("base_learning_rate", run.base_learning_rate, batch) / 256
    momentum_steps = _finite("schedule_scale", run.schedule_scale, scheduled)
    return Plan(
        batch, per_epoch, num_steps, predictor_warmup, warmup, int(momentum_steps), momentum_steps, learning_rate
    )


def _finite(name: str, value: float, times: int) -> float:
    """Multiplies an argument by a whole number; refuses a product that no float can hold."""
    try:
        product = value * times
    except OverflowError:
        product = math.inf
    if not math.isfinite(product):
        raise ValueError(f"{name}={value} is too large, or no number: times {times:.3g} it is {product}.")
    return product


@dataclass(frozen=True)
class StepValues:
    """Holds the values of the schedules for one optimiser step.

    Args:
        learning_rate: AdamW's learning rate.
        weight_decay: AdamW's decay of matrices and the mask token.
        ema_momentum: Momentum of the target encoder's moving average, in [0, 1].
        encoder_is_frozen: Whether only the predictor learns in this step.
    """

    learning_rate: float
    weight_decay: float
    ema_momentum: float
    encoder_is_frozen: bool = False


def values_at(step: int, run: PretrainingArguments, plan: Plan) -> StepValues:
    """Works out the values of the schedules at a step.

    Args:
        step: Optimiser steps already done. The published code counts learning rate and weight decay before use, so the
            first step has position 1 there, and momentum position 0.
        run: The arguments.
        plan: The plan.

    Returns:
        Learning rate, weight decay and momentum of the step.
    """
    if step < plan.predictor_warmup_steps:
        ramp = max(1, int(PREDICTOR_RAMP_SHARE * plan.predictor_warmup_steps))
        return StepValues(plan.learning_rate * min(1.0, (step + 1) / ramp), run.weight_decay, 1.0, True)
    step -= plan.predictor_warmup_steps
    return StepValues(
        learning_rate_at(
            step + 1,
            learning_rate=plan.learning_rate,
            start_learning_rate=run.start_learning_rate,
            final_learning_rate=run.final_learning_rate,
            warmup_steps=plan.warmup_steps,
            total_steps=plan.schedule_steps,
        ),
        weight_decay_at(
            step + 1,
            weight_decay=run.weight_decay,
            final_weight_decay=run.final_weight_decay,
            total_steps=plan.schedule_steps,
        ),
        ema_momentum_at(
            step,
            ema_momentum=run.ema_momentum,
            final_ema_momentum=run.final_ema_momentum,
            total_steps=plan.momentum_steps,
        ),
    )
