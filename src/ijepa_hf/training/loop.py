"""Takes the optimiser steps of a run: fetch a global batch, step, log, score, measure, save.

Between two steps all processes agree whether to go on (`RunState.agree`).
"""

import contextlib
import itertools
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ijepa_hf.data.collator import Batch
from ijepa_hf.data.loader import DataWorkerError, PlainLoader
from ijepa_hf.data.transforms import normalize
from ijepa_hf.diagnosis.run_monitor import CollapseError, is_due, steps_between
from ijepa_hf.model.modeling_ijepa import new_model
from ijepa_hf.model.sharding import is_sharded
from ijepa_hf.randomness import DRAW_DROPOUT, keyed_generator
from ijepa_hf.runs.checkpoints import collect_state
from ijepa_hf.runs.export import exported_step
from ijepa_hf.runs.folder import EVALUATIONS_FILE, SKIPPED_FILE
from ijepa_hf.runs.rows import read_rows
from ijepa_hf.training.images import TooManyUnreadableError
from ijepa_hf.training.log import Clock, MetricsLog, evaluation_line
from ijepa_hf.training.memory import DoesNotFitError, does_not_fit_message, is_out_of_memory, largest_micro_batch
from ijepa_hf.training.non_finite import first_non_finite
from ijepa_hf.training.plan import StepValues, values_at
from ijepa_hf.training.signals import StoppedBySignal
from ijepa_hf.training.state import RunState
from ijepa_hf.training.step import NonFiniteLossError, StepResult

_SIGNAL_SECONDS = 0.5  # within which a signal that has ended a loading process reaches this process too

logger = logging.getLogger(__name__)


def run_steps(state: RunState, loader: PlainLoader, start_step: int) -> None:
    """Takes all optimiser steps that are left of a run.

    Args:
        state: The run.
        loader: Gives the micro-batches, from `start_step` on.
        start_step: Optimiser steps already done.

    Raises:
        StoppedBySignal: If any process was told to stop; the state is saved.
        Exception: As `pretrain` says.
    """
    setup = state.setup
    run, plan = setup.run, setup.plan
    _export_again(state, start_step)
    if run.eval_steps:
        _evaluate_start(state, start_step)
    log = MetricsLog(setup.accelerator, plan, setup.output_dir, run.report_to, setup.arguments, start_step)
    with contextlib.closing(log), contextlib.closing(iter(loader)) as batches, setup.signals.deferred():
        if start_step == 0:
            _diagnose(state, 0, log)
        for step in range(start_step, plan.num_steps):
            micro_batches = _fetch(state, batches, log.clock)
            state.agree(step)
            for batch in micro_batches:
                state.unreadable.add(batch.unreadable)
            values = values_at(step, run, plan)
            result = _take_step(state, step, micro_batches, values)
            if state.diagnostics is not None:
                is_unmoved = result is None or values.encoder_is_frozen
                state.diagnostics.note_step(None if is_unmoved else values.ema_momentum)
            log.count_step()
            _after_step(state, step + 1, result, values, log)
        state.save_at_the_end(plan.num_steps, log.file)
        state.agree(plan.num_steps)


def skipped_before(output_dir: Path, step: int) -> int:
    """Counts the skipped steps directly before a step, for a run that is resumed there.

    Args:
        output_dir: The run's folder.
        step: Optimiser steps done.

    Returns:
        How many were skipped in a row; 0 if the last step was good.
    """
    skipped = {row["step"] for row in read_rows(output_dir / SKIPPED_FILE)}
    return next(count for count in itertools.count() if step - count not in skipped)


# -- a step ----------------------------------------------------------------------------------------------------------


def _fetch(state: RunState, batches: Iterator[Batch], clock: Clock) -> list[Batch]:
    """Waits for the micro-batches of a step; returns none if a signal came meanwhile or they cannot be read."""
    if state.failure is not None:
        return []
    signals = state.setup.signals
    try:
        with clock.waiting(), signals.raising():
            return [next(batches) for _ in range(state.setup.run.gradient_accumulation_steps)]
    except StoppedBySignal:
        pass  # noted in `received`
    except (DataWorkerError, ValueError, OSError) as error:
        if isinstance(error, DataWorkerError):
            time.sleep(_SIGNAL_SECONDS)
        if not signals.received:
            state.failure = error
    return []


def _take_step(state: RunState, step: int, micro_batches: list[Batch], values: StepValues) -> StepResult | None:
    """Takes one optimiser step; returns `None` if it was skipped because its numbers were not finite."""
    _seed_dropout(state, step)
    inputs: list[dict[str, Tensor]] = []
    try:
        inputs += [_to_device(batch.inputs, state) for batch in micro_batches]
        result = state.ready.step(inputs, values)
    except NonFiniteLossError as error:
        _skip_step(state, step, error, inputs, values)
        return None
    except Exception as error:
        if is_out_of_memory(error):
            raise DoesNotFitError(_what_fits(state, error)) from error
        raise
    state.skipped_in_a_row = 0
    return result


def _to_device(batch: dict[str, Tensor], state: RunState) -> dict[str, Tensor]:
    device, data = state.setup.accelerator.device, state.setup.data
    moved = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    moved["pixel_values"] = normalize(moved["pixel_values"], data.image_mean, data.image_std)
    return moved


def _seed_dropout(state: RunState, step: int) -> None:
    """Makes dropout, which draws from torch's global generator, a function of (seed, step, rank)."""
    config, rank = state.setup.config, state.setup.accelerator.process_index
    if config.hidden_dropout_prob or config.attention_probs_dropout_prob:
        torch.manual_seed(int(keyed_generator(state.setup.run.seed, DRAW_DROPOUT, step, rank).integers(2**62)))


def _skip_step(
    state: RunState, step: int, error: NonFiniteLossError, inputs: list[dict[str, Tensor]], values: StepValues
) -> None:
    """Skips a step: logs which numbers are not finite, counts it, and changes neither weights nor optimiser.

    Raises:
        NonFiniteLossError: On every process, if more steps in a row were skipped than `max_skipped_steps`; the last
            good state is saved.
    """
    setup = state.setup
    found = setup.ranks.gather(first_non_finite(state.model, inputs, setup.accelerator.autocast))
    place = next(
        (f"{where} (process {rank})" for rank, where in enumerate(found) if where), "nothing when tried again"
    )
    place = place if setup.ranks.number > 1 else place.removesuffix(" (process 0)")
    state.ready.optimizer.zero_grad(set_to_none=True)
    state.skipped_in_a_row += 1
    if state.is_main:
        logger.warning("step %d is skipped: %s; first not finite: %s", step + 1, error, place)
        with state.writing():
            state.skipped.append({"step": step + 1, "reason": str(error), "first_non_finite": place})
    if state.skipped_in_a_row <= setup.run.max_skipped_steps:
        return
    good = step + 1 - state.skipped_in_a_row  # no step since has changed anything
    if good > state.last_save:
        state.save(good)
    times = f" in {state.skipped_in_a_row} steps in a row" if state.skipped_in_a_row > 1 else ""
    message = (
        f"stopped at step {step + 1}: {error}{times}, first in {place} (learning rate {values.learning_rate:.3g}); "
        f"{state.what_is_kept(good)} Try a lower --learning_rate, a longer --warmup_epochs, or --max_grad_norm 1; "
        "--max_skipped_steps says how many steps in a row may be skipped."
    )
    state.stop_after_saving(good, NonFiniteLossError(message))


def _what_fits(state: RunState, error: Exception) -> str:
    """Says what to do about a step that ran out of memory."""
    run, accelerator = state.setup.run, state.setup.accelerator
    state.ready.optimizer.state.clear()  # each trial holds as much memory as this takes
    error.__traceback__ = None  # which holds on to what the step had made
    fitting = None
    if not is_sharded(state.model):
        fitting = largest_micro_batch(
            state.model,
            run.per_device_train_batch_size,
            num_ranks=state.setup.ranks.number,
            autocast=accelerator.autocast,
        )
    return does_not_fit_message(
        run.per_device_train_batch_size, fitting, run.gradient_accumulation_steps, accelerator.device
    )


# -- after a step ----------------------------------------------------------------------------------------------------


def _after_step(state: RunState, done: int, result: StepResult | None, values: StepValues, log: MetricsLog) -> None:
    """Logs, scores, measures and saves, where each is due after `done` steps."""
    run, plan = state.setup.run, state.setup.plan
    is_last = done == plan.num_steps
    is_saved = is_last or done % (run.checkpointing_steps or plan.steps_per_epoch) == 0
    is_logged = is_last or done == 1 or done % run.logging_steps == 0
    if is_logged and state.is_main and result is not None:  # the spectrum of the targets is the main process's alone
        with state.writing():
            _compare(state, "loss", log.write(done, result, values))
    with log.clock.stopped():
        if is_logged or is_saved:
            state.settle_unreadable(done)
            _judge_unreadable(state, done)
        if run.eval_steps and (is_last or done % run.eval_steps == 0):
            _evaluate(state, done, log)
        _diagnose(state, done, log)
        if is_saved:
            state.save(done)
            _draw_diagnostics(state, is_last=is_last)


def _evaluate(state: RunState, step: int, log: MetricsLog) -> None:
    """Scores the target encoder on the main process, while the others wait."""
    model = state.whole_model()
    scores = None if model is None else state.evaluate(model, step)
    if scores is not None:
        log.show(evaluation_line(scores))
        _compare(state, "knn", scores)
        log.tell_trackers(scores, step)
    state.setup.ranks.wait()


def _diagnose(state: RunState, step: int, log: MetricsLog) -> None:
    """Measures and judges the features if a measurement is due; stops a collapsed run if `on_collapse` is `stop`.

    Raises:
        CollapseError: On every rank, after a checkpoint, if a failure was found and `on_collapse` is `stop`.
    """
    run, plan = state.setup.run, state.setup.plan
    every = run.diagnostics_steps
    if every is None:
        every = steps_between(plan.global_batch_size, state.setup.config.hidden_size)
    if not is_due(step, every, plan.num_steps):
        return
    failure: str | None = None
    model = state.whole_model()
    diagnostics = state.diagnostics
    if diagnostics is not None and model is not None:
        before = diagnostics.verdict
        with state.writing():
            diagnostics.measure(model, step, plan.epoch(step), log.tell_trackers)
        verdict = diagnostics.verdict
        if verdict is not None and (before is None or before.name != verdict.name):
            log.show(f"step {step} verdict: {verdict}")
        if diagnostics.rows and diagnostics.rows[-1]["step"] == step:  # else it could not be measured
            _compare(state, "rankme", diagnostics.rows[-1])
        if verdict is not None and verdict.is_failure:
            failure = f"stopped at step {step}: {verdict}"
    if run.on_collapse == "stop":
        found = state.setup.ranks.gather(failure)[0]
        if found is not None:
            state.stop_after_saving(step, CollapseError(found))


def _draw_diagnostics(state: RunState, *, is_last: bool) -> None:
    if state.setup.run.diagnostics_steps == 0:
        return
    model = state.whole_model()
    if state.diagnostics is not None and model is not None:
        with state.writing():
            state.diagnostics.draw(model, is_last=is_last)


def _compare(state: RunState, curve: str, row: dict[str, Any]) -> None:
    """Prints where a curve leaves the band of its recipe, and where it comes back; never stops a run."""
    if state.expected is not None:
        for line in state.expected.add(curve, row):
            MetricsLog.show(line)


def _judge_unreadable(state: RunState, step: int) -> None:
    """Saves the run and stops it where too many images cannot be read."""
    try:
        state.unreadable.judge(step * state.setup.plan.global_batch_size)
    except TooManyUnreadableError as error:
        state.stop_after_saving(step, error)


# -- before the first step -------------------------------------------------------------------------------------------


def _export_again(state: RunState, start_step: int) -> None:
    """Writes the two-part folder if this run was killed earlier between its last checkpoint and its export."""
    if start_step and exported_step(state.setup.output_dir) != start_step:
        tensors = collect_state(state.model, state.ready.optimizer, keep=state.is_main)
        if state.is_main:
            with state.writing():
                state.export(start_step, tensors.model)


def _evaluate_start(state: RunState, start_step: int) -> None:
    """Writes the first line of the scores: those of the network that the run started from."""
    setup = state.setup
    model = state.whole_model()
    if model is None or any(row["step"] == 0 for row in read_rows(setup.output_dir / EVALUATIONS_FILE)):
        return
    if start_step:  # scores were asked for later; fresh weights can be drawn again
        if setup.run.model_name_or_path is not None:
            return
        model = new_model(setup.config, setup.run.seed).to(setup.accelerator.device)
    scores = state.evaluate(model, 0)
    if scores is not None:
        MetricsLog.show(evaluation_line(scores))
        _compare(state, "knn", scores)
