"""Computes learning rate, weight decay and EMA momentum, each as a pure function of the optimiser step.

There is no scheduler state: the training loop asks for the values of a step and writes them into the optimiser, so a
resumed run gets the same values as an uninterrupted one. The formulas are those of the published runs. As there,
learning rate and weight decay count steps from 1 (the first optimiser step is 1), and the momentum counts from 0.

Past the end of a schedule (a run longer than its `total_steps`, for example with `schedule_scale` below 1) the final
value is held. In the published code the cosine turns round there: the learning rate rises again, and the weight decay
falls again.
"""

import math


def learning_rate_at(
    step: int,
    *,
    learning_rate: float,
    start_learning_rate: float,
    final_learning_rate: float,
    warmup_steps: int,
    total_steps: int,
) -> float:
    """Computes the learning rate of an optimiser step: a linear warm-up, then half a cosine down to the final value.

    Args:
        step: optimiser step, 1 for the first one.
        learning_rate: value reached at `step == warmup_steps`.
        start_learning_rate: where the warm-up starts (the value of a step 0, which is never taken).
        final_learning_rate: value at `step == total_steps`, and held after it.
        warmup_steps: length of the warm-up, `int(warmup_epochs * steps_per_epoch)`; 0 for none. It may exceed
            `total_steps`: the run then ends inside its warm-up.
        total_steps: length of the whole schedule, `int(schedule_scale * num_train_epochs * steps_per_epoch)`.

    Returns:
        The learning rate; after the warm-up never below `final_learning_rate`.

    Raises:
        ValueError: `step` below 1, `warmup_steps` below 0, `total_steps` below 1 or not whole.

    Source: I-JEPA (arXiv 2301.08243), appendix A.1, in the form of the published runs.
    """
    _check_step(step)
    _check_whole_total(total_steps)
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps={warmup_steps} must be 0 (no warm-up) or more.")
    if step > total_steps:
        return final_learning_rate
    if step < warmup_steps:
        return start_learning_rate + step / warmup_steps * (learning_rate - start_learning_rate)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return max(final_learning_rate, _half_cosine(progress, learning_rate, final_learning_rate))


def weight_decay_at(step: int, *, weight_decay: float, final_weight_decay: float, total_steps: int) -> float:
    """Computes the weight decay of an optimiser step: half a cosine from first to final value, without warm-up.

    Args:
        step: optimiser step, 1 for the first one.
        weight_decay: where the schedule starts (the value of a step 0, which is never taken).
        final_weight_decay: value at `step == total_steps`, and held after it; above or below `weight_decay`.
        total_steps: length of the whole schedule, `int(schedule_scale * num_train_epochs * steps_per_epoch)`.

    Returns:
        The weight decay, never past `final_weight_decay`.

    Raises:
        ValueError: `step` below 1, `total_steps` below 1 or not whole.

    Source: I-JEPA (arXiv 2301.08243), appendix A.1 (0.04 to 0.4); the cosine is that of the published runs.
    """
    _check_step(step)
    _check_whole_total(total_steps)
    if step > total_steps:
        return final_weight_decay
    value = _half_cosine(step / total_steps, weight_decay, final_weight_decay)
    return max(final_weight_decay, value) if final_weight_decay <= weight_decay else min(final_weight_decay, value)


def ema_momentum_at(step0: int, *, ema_momentum: float, final_ema_momentum: float, total_steps: float) -> float:
    """Computes the momentum of the target encoder's moving average at an update: linear from first to final value.

    Args:
        step0: number of updates already made, so 0 for the first; one less than the optimiser step.
        ema_momentum: momentum of the first update, in [0, 1].
        final_ema_momentum: value at `step0 == total_steps` (the last update of a run of `total_steps` stays one short
            of it, as published), held after it; in [0, 1].
        total_steps: `schedule_scale * num_train_epochs * steps_per_epoch`, not rounded: a fraction counts.

    Returns:
        The momentum, always between the two values, both included.

    Raises:
        ValueError: `step0` below 0, `total_steps` not above 0, a momentum outside [0, 1].

    Source: I-JEPA (arXiv 2301.08243), appendix A.1 (0.996 to 1.0, linearly).
    """
    if not 0 <= step0 < math.inf:
        raise ValueError(f"step0={step0} must be 0 or more: the first update of the target encoder is number 0.")
    if not 0 < total_steps < math.inf:
        raise ValueError(f"total_steps={total_steps} must be a finite number above 0.")
    for name, value in (("ema_momentum", ema_momentum), ("final_ema_momentum", final_ema_momentum)):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name}={value} must be in [0, 1], for example 0.996.")
    value = ema_momentum + step0 * (final_ema_momentum - ema_momentum) / total_steps
    # Past the end, and by rounding perhaps before it; a momentum above 1 would push the target away.
    return min(max(value, min(ema_momentum, final_ema_momentum)), max(ema_momentum, final_ema_momentum))


def _half_cosine(progress: float, start: float, final: float) -> float:
    return final + (start - final) * 0.5 * (1.0 + math.cos(math.pi * progress))


def _check_step(step: int) -> None:
    if not 1 <= step < math.inf:
        raise ValueError(f"step={step} must be 1 or more: the first optimiser step is number 1.")


def _check_whole_total(total_steps: int) -> None:
    if not 1 <= total_steps < math.inf or total_steps != int(total_steps):
        raise ValueError(
            f"total_steps={total_steps} must be a whole number of at least 1; "
            "write int(schedule_scale * num_train_epochs * steps_per_epoch)."
        )
