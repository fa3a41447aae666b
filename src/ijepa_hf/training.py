"""The pretraining loop, on `accelerate`.

`pretrain` reads from top to bottom: check everything that can be wrong, build, restore, then for each optimiser step
draw a global batch, take the step (`training_step`), log, score, save and, where asked, upload. Schedules, order,
crops and masks are pure functions of the step, so a resumed run needs weights, optimiser state and the step's number
(for a stream also who has read it so far), and gives the bits of an uninterrupted one.

Between two steps all processes agree whether to go on (`RunState.agree`).
"""

import contextlib
import dataclasses
import itertools
import logging
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from tqdm.auto import tqdm

from ijepa_hf.activation_checkpointing import enable_gradient_checkpointing
from ijepa_hf.announcement import announce, draw_first_masks
from ijepa_hf.arguments import DataArguments, ModelArguments, PretrainingArguments, argument_values
from ijepa_hf.batch_fitting import (
    DoesNotFitError,
    does_not_fit_message,
    fit_batch,
    is_out_of_memory,
    largest_micro_batch,
)
from ijepa_hf.checkpointing import collect_state, config_fields, restore
from ijepa_hf.collapse_monitor import MONITOR_IMAGES, CollapseMonitor, make_monitor_batch
from ijepa_hf.configuration_ijepa import IJepaConfig
from ijepa_hf.data import Batch, BatchMaker, CropReader, IJepaDataCollator
from ijepa_hf.expected_band import BandWatch, RunRows, band_notice, find_band
from ijepa_hf.export import exported_step
from ijepa_hf.hub import HubUploader, UploadIncompleteError
from ijepa_hf.image_transforms import normalize
from ijepa_hf.interruption import StoppedBySignal, StopSignals
from ijepa_hf.loading import (
    TooManyUnreadableError,
    TrainingImages,
    UnreadableLog,
    close_loader,
    open_training_images,
)
from ijepa_hf.metrics_log import Clock, MetricsLog, evaluation_line, log_line
from ijepa_hf.modeling_ijepa import IJepaForPretraining, new_model
from ijepa_hf.non_finite import first_non_finite
from ijepa_hf.optimization import NonFiniteLossError, StepResult, make_optimizer, set_attention, training_step
from ijepa_hf.plan import Plan, StepValues, make_plan, values_at
from ijepa_hf.randomness import DRAW_DROPOUT, keyed_generator
from ijepa_hf.ranks import Ranks
from ijepa_hf.report import (
    EvaluationSets,
    describe_machine,
    first_readable_pixels,
    load_evaluation_sets,
    render_report,
    write_report,
)
from ijepa_hf.run_diagnostics import CollapseError, RunDiagnostics, is_due, steps_between
from ijepa_hf.run_folder import (
    DIAGNOSTICS_FILE,
    EVALUATIONS_FILE,
    METRICS_FILE,
    SKIPPED_FILE,
    UNREADABLE_FILE,
    bytes_to_come,
    check_output_dir,
    check_space,
    is_finished,
    prepare_output_dir,
)
from ijepa_hf.run_lock import OutputDirInUseError, RunLock, lock_output_dir
from ijepa_hf.run_rows import read_rows
from ijepa_hf.run_start import check_checkpoint, find_start, load_starting_encoder
from ijepa_hf.run_state import GOES_ON, RunState
from ijepa_hf.sharding import is_sharded, make_fsdp_plugin
from ijepa_hf.streaming import StreamLayout
from ijepa_hf.workers import DataWorkerError, PlainLoader

MASK_FIGURE_IMAGES = 6
CHUNK_OF_BATCHES = 4  # in one forward pass of the monitor: without gradients it takes less memory than a step on one
LAST_UPLOAD_SECONDS = 60.0  # that a run which stops by itself waits for the upload of its last good state
SIGNALLED_UPLOAD_SECONDS = 15.0  # and one that was told to stop, with half a minute until it is killed
_SIGNAL_SECONDS = 0.5  # in which a signal that has ended a loading process too reaches this one

logger = logging.getLogger(__name__)


# -- the run ---------------------------------------------------------------------------------------------------------


def pretrain(model_arguments: ModelArguments, data: DataArguments, run: PretrainingArguments) -> Path:
    """Runs a pretraining to its end, or continues one, and prints its report.

    Args:
        model_arguments: The model.
        data: The images.
        run: Everything else; `output_dir` is set.

    Returns:
        The run's folder, see "What a run leaves behind" in docs/architecture.md.

    Raises:
        ValueError: If an argument is bad, the folder is another run's or in use, or the data do not fit; found before
            any work.
        FileNotFoundError: If a folder, file or checkpoint that was named does not exist.
        StoppedBySignal: If SIGTERM, SIGUSR1 or Ctrl-C asked for it; the state is saved.
        DataSourceError: If the images cannot be read any more; the state is saved.
        DataWorkerError: If a loading process died; the state is saved.
        SaveError: If the state could not be written and `on_save_error` is `stop`.
        DoesNotFitError: If a micro-batch does not fit into memory; says what does.
        LostRankError: If another process of the run has died.
        NonFiniteLossError: If the loss was NaN or infinite in more steps in a row than `max_skipped_steps`; the last
            good state is saved.
        CollapseError: If the features were judged to have collapsed and `on_collapse` is `stop`; a checkpoint is kept.
        UploadIncompleteError: If the finished run did not arrive on the Hub; says what finishes it.
    """
    assert run.output_dir is not None  # parse_arguments
    output_dir = Path(run.output_dir)
    if run.num_cpu_threads is not None:
        torch.set_num_threads(run.num_cpu_threads)
    with StopSignals() as signals:
        accelerator = _make_accelerator(run, output_dir)
        _warn_of_unsharded(accelerator)
        ranks = Ranks(accelerator.num_processes, accelerator.process_index)
        with ranks.naming_the_lost(_going_on(output_dir)), _locked(output_dir, ranks) as lock:
            _pretrain(model_arguments, data, run, output_dir, accelerator, ranks, signals, lock)
    return output_dir


def _pretrain(
    model_arguments: ModelArguments,
    data: DataArguments,
    run: PretrainingArguments,
    output_dir: Path,
    accelerator: Accelerator,
    ranks: Ranks,
    signals: StopSignals,
    lock: RunLock | None,
) -> None:
    start = find_start(model_arguments, data, run, output_dir)
    config, checkpoint, data = start.config, start.checkpoint, start.data
    data.check(start.model_arguments)
    images = open_training_images(data, config, accelerator.num_processes)
    evaluation = load_evaluation_sets(data, config)
    plan = make_plan(
        start.run, images.num_images, accelerator.num_processes, has_new_predictor=start.has_new_predictor
    )
    run = start.run
    if run.model_name_or_path is not None:  # the record says what was done
        run = dataclasses.replace(run, predictor_warmup_steps=plan.predictor_warmup_steps)
    arguments = describe_arguments(start.model_arguments, data, run, plan, images.num_images)
    check_output_dir(output_dir, arguments, run)
    pushes = run.push_to_hub and accelerator.is_main_process
    if is_finished(output_dir, run):
        _show_finished(accelerator, run, output_dir, arguments, plan)
        return
    if checkpoint is not None:
        check_checkpoint(checkpoint, arguments, plan)
    start_step = 0 if checkpoint is None else checkpoint.step
    model, notes = start.build_model()
    _set_up_model(model, model_arguments, run, accelerator)
    if accelerator.is_main_process:
        check_space(output_dir, bytes_to_come(model, output_dir, run.checkpoints_total_limit))
    crops, make_batch = _make_readers(images, config, data, run, plan)
    # data that cannot be used at all are found before anything is written
    size = min(MASK_FIGURE_IMAGES, run.per_device_train_batch_size)
    first_batch = images.first_batch(crops, make_batch, size=size, seed=run.seed)
    if run.fit_batch_to_memory:
        run = fit_batch(model.to(accelerator.device), run, accelerator, ranks)
        arguments = describe_arguments(start.model_arguments, data, run, plan, images.num_images)
    layout = StreamLayout(
        start_step,
        accelerator.num_processes,
        data.dataloader_num_workers,
        run.per_device_train_batch_size,
        run.gradient_accumulation_steps,
    )
    layouts = images.layouts_from(None if checkpoint is None else checkpoint.stream, layout)
    prepared, optimizer = _prepare(accelerator, model, make_optimizer(model, run))
    if checkpoint is not None:
        restore(checkpoint, model, optimizer, config_fields(config))
    _check_ranks_agree(ranks, start_step, run.model_revision)
    with _uploading(run, output_dir, arguments, start_step) if pushes else contextlib.nullcontext() as uploader:
        if accelerator.is_main_process:
            prepare_output_dir(output_dir, arguments, config_fields(config), run, checkpoint)
            draw_first_masks(first_batch, config, output_dir)
            notice = band_notice(arguments, model_arguments.given)
            announce(accelerator, model, images, run, plan, start_step, notice)
            for note in notes:
                logger.warning("%s", note)
        skipped = ranks.gather(_skipped_before(output_dir, start_step))[0]
        state = RunState(
            accelerator, ranks, signals, lock, model, prepared, optimizer, config, data, run, plan, output_dir,
            arguments, evaluation,
            stream=images.stream_state(layouts),
            unreadable=UnreadableLog(output_dir / UNREADABLE_FILE, images.num_images, data.max_broken_share),
            uploader=uploader,
            diagnostics=_make_diagnostics(accelerator, images, crops, evaluation, config, data, run, plan),
            last_save=start_step,
            skipped_in_a_row=skipped,
            expected=_expected(arguments, output_dir) if accelerator.is_main_process else None,
        )  # fmt: skip
        loader = images.loader(
            crops,
            make_batch,
            layouts,
            seed=run.seed,
            shuffle_buffer_size=data.shuffle_buffer_size,
            num_steps=plan.num_steps,
            start_step=start_step,
            rank=accelerator.process_index,
            pin_memory=accelerator.device.type == "cuda",
        )
        try:
            _run_steps(state, loader, start_step)
        finally:
            close_loader(loader)
        _report(state)
        accelerator.trackers.clear()  # finished by the log, which a tracker's failure cannot end
        # DDP must not be the last that holds gloo's group: it would free it with Python's lock held, which gloo's own
        # thread may be waiting for, and the process would never end
        state.prepared = state.model
        del prepared
        accelerator.free_memory()
        accelerator.end_training()
        if uploader is not None:  # last: other ranks need not wait for it
            print(f"\n{uploader.finish(plan.num_steps)}")


def _show_finished(
    accelerator: Accelerator, run: PretrainingArguments, output_dir: Path, arguments: dict[str, Any], plan: Plan
) -> None:
    """Prints the report again, and uploads what has not been."""
    if accelerator.is_main_process:
        print(f"{output_dir} holds this run, finished. Its report:\n")
        print(render_report(output_dir))
    accelerator.end_training()
    if run.push_to_hub and accelerator.is_main_process:
        with _uploading(run, output_dir, arguments, plan.num_steps) as uploader:
            print(f"\n{uploader.finish(plan.num_steps)}")


def _report(state: RunState) -> None:
    model = state.whole_model()
    if model is not None:
        starting_encoder = None
        if state.evaluation is not None:
            starting_encoder = load_starting_encoder(state.run, state.config)
        with threadpool_limits(state.run.num_cpu_threads):  # scikit-learn's too: on small matrices they only compete
            write_report(
                model,
                state.output_dir,
                state.evaluation,
                state.arguments,
                step=state.plan.num_steps,
                machine=describe_machine(state.accelerator.device, state.accelerator.num_processes),
                starting_encoder=starting_encoder,
            )
        print()
        print(render_report(state.output_dir))
    state.ranks.wait()


def _run_steps(state: RunState, loader: PlainLoader, start_step: int) -> None:
    """The loop over optimiser steps."""
    run, plan = state.run, state.plan
    if start_step and exported_step(state.output_dir) != start_step:
        # the last life of this run was cut short between checkpoint and export
        tensors = collect_state(state.model, state.optimizer, keep=state.is_main)
        if state.is_main:
            with state.writing():
                state.export(start_step, tensors.model)
    if run.eval_steps:
        _evaluate_start(state, start_step)
    state.model.train()
    clock = Clock()
    every = run.checkpointing_steps or plan.steps_per_epoch
    progress = tqdm(total=plan.num_steps, initial=start_step, unit="step", disable=not state.is_main, mininterval=1.0)
    with (
        contextlib.closing(progress),
        contextlib.closing(_open_metrics_log(state)) as metrics,
        contextlib.closing(iter(loader)) as batches,
        state.signals.deferred(),
    ):
        if start_step == 0:
            _diagnose(state, 0, progress, metrics)
        for step in range(start_step, plan.num_steps):
            micro_batches = _fetch(state, batches, clock)
            state.agree(step)
            for batch in micro_batches:
                state.unreadable.add(batch.unreadable)
            values = values_at(step, run, plan)
            result = _take_step(state, step, micro_batches, values)
            done = step + 1
            if state.diagnostics is not None:
                skipped = result is None or values.encoder_is_frozen
                state.diagnostics.note_step(None if skipped else values.ema_momentum)
            progress.update()
            clock.steps += 1
            is_last = done == plan.num_steps
            is_saved = done % every == 0 or is_last
            is_logged = done == 1 or done % run.logging_steps == 0 or is_last
            # one rank writes, so one rank takes the spectrum of the targets
            if is_logged and state.is_main and result is not None:
                with state.writing():
                    row = metrics.write(
                        done,
                        loss=result.loss,
                        grad_norms=(result.grad_norm_encoder, result.grad_norm_predictor),
                        targets=result.targets,
                        values=values,
                        clock=clock,
                    )
                    progress.write(log_line(row))
                    _compare(state, "loss", row)
                    progress.set_postfix(
                        loss=f"{row['loss']:.4f}", rankme=f"{row['target_rankme']:.1f}", refresh=False
                    )
            with clock.stopped():
                if is_logged or is_saved:
                    state.settle_unreadable(done)
                    _judge_unreadable(state, done)
                if run.eval_steps and (done % run.eval_steps == 0 or is_last):
                    model = state.whole_model()
                    if model is not None:
                        scores = state.evaluate(model, done)
                        if scores is not None:
                            progress.write(evaluation_line(scores))
                            _compare(state, "knn", scores)
                            metrics.tell_trackers(scores, done)
                    state.ranks.wait()
                _diagnose(state, done, progress, metrics)
                if is_saved:
                    state.save(done)
                    _draw_diagnostics(state, is_last=is_last)
        state.save_at_the_end(plan.num_steps, metrics)
        state.agree(plan.num_steps)


def _fetch(state: RunState, batches: Iterator[Batch], clock: Clock) -> list[Batch]:
    """The micro-batches of a step; none where a signal came meanwhile, or they cannot be read."""
    if state.failure is not None:
        return []
    try:
        with clock.waiting(), state.signals.raising():
            return [next(batches) for _ in range(state.run.gradient_accumulation_steps)]
    except StoppedBySignal:
        pass  # noted in `received`
    except (DataWorkerError, ValueError, OSError) as error:
        if isinstance(error, DataWorkerError):
            time.sleep(_SIGNAL_SECONDS)
        if not state.signals.received:
            state.failure = error
    return []


def _take_step(state: RunState, step: int, micro_batches: list[Batch], values: StepValues) -> StepResult | None:
    """Takes one optimiser step; `None` where it had to be skipped because its numbers were not finite."""
    _seed_dropout(state, step)
    inputs: list[dict[str, Tensor]] = []
    try:
        inputs += [_to_device(batch.inputs, state) for batch in micro_batches]
        result = training_step(
            state.accelerator,
            state.prepared,
            state.model,
            state.optimizer,
            inputs,
            values,
            max_grad_norm=state.run.max_grad_norm,
        )
    except NonFiniteLossError as error:
        _skip_step(state, step, error, inputs, values)
        return None
    except Exception as error:
        if is_out_of_memory(error):
            raise DoesNotFitError(_what_fits(state, error)) from error
        raise
    state.skipped_in_a_row = 0
    return result


def _skip_step(
    state: RunState, step: int, error: NonFiniteLossError, inputs: list[dict[str, Tensor]], values: StepValues
) -> None:
    """Leaves weights, optimiser and moving average as they are, says where the numbers broke, and counts.

    Raises:
        NonFiniteLossError: On every process, if more steps in a row were skipped than may be; the last good state is
            saved.
    """
    found = state.ranks.gather(first_non_finite(state.model, inputs, state.accelerator.autocast))
    place = next(
        (f"{where} (process {rank})" for rank, where in enumerate(found) if where), "nothing when tried again"
    )
    place = place if state.ranks.number > 1 else place.removesuffix(" (process 0)")
    state.optimizer.zero_grad(set_to_none=True)
    state.skipped_in_a_row += 1
    if state.is_main:
        logger.warning("step %d is skipped: %s; first not finite: %s", step + 1, error, place)
        with state.writing():
            state.skipped.append({"step": step + 1, "reason": str(error), "first_non_finite": place})
    if state.skipped_in_a_row <= state.run.max_skipped_steps:
        return
    good = step + 1 - state.skipped_in_a_row  # no step since has changed anything
    if good > state.last_save:
        state.save(good)
    state.stop_after_saving(good, NonFiniteLossError(_stop_message(step + 1, error, place, values, state)))


def _skipped_before(output_dir: Path, step: int) -> int:
    """How many of the steps right before one were skipped, in an earlier life of the run."""
    skipped = {row["step"] for row in read_rows(output_dir / SKIPPED_FILE)}
    return next(count for count in itertools.count() if step - count not in skipped)


def _diagnose(state: RunState, step: int, progress: tqdm, metrics: MetricsLog) -> None:
    """Measures and judges the features where that is due; ends the run where it was asked to.

    Raises:
        CollapseError: On every rank, after a checkpoint, if a failure was found and `on_collapse` is `stop`.
    """
    run, plan = state.run, state.plan
    every = run.diagnostics_steps
    if every is None:
        every = steps_between(plan.global_batch_size, state.config.hidden_size)
    if not is_due(step, every, plan.num_steps):
        return
    failure: str | None = None
    model = state.whole_model()
    if state.diagnostics is not None and model is not None:
        epoch = round(step / plan.steps_per_epoch, 4)
        before = state.diagnostics.verdict
        with state.writing():
            state.diagnostics.measure(model, step, epoch, metrics.tell_trackers)
        verdict = state.diagnostics.verdict
        if verdict is not None and (before is None or before.name != verdict.name):
            progress.write(f"step {step} verdict: {verdict}")
        rows = state.diagnostics.rows
        if rows and rows[-1]["step"] == step:  # else it could not be measured
            _compare(state, "rankme", rows[-1])
        if verdict is not None and verdict.is_failure:
            failure = f"stopped at step {step}: {verdict}"
    if run.on_collapse == "stop":
        told = state.ranks.gather(failure)[0]
        if told is not None:
            state.stop_after_saving(step, CollapseError(told))


def _draw_diagnostics(state: RunState, *, is_last: bool) -> None:
    if state.run.diagnostics_steps == 0:
        return
    model = state.whole_model()
    if state.diagnostics is not None and model is not None:
        with state.writing():
            state.diagnostics.draw(model, is_last=is_last)


def _open_metrics_log(state: RunState) -> MetricsLog:
    return MetricsLog(state.accelerator, state.plan, state.output_dir, state.run.report_to, state.arguments)


def _compare(state: RunState, curve: str, row: dict[str, Any]) -> None:
    """Says where a curve leaves the band of its recipe, and where it comes back; that never stops a run."""
    if state.expected is not None:
        for line in state.expected.add(curve, row):
            tqdm.write(line)


def _judge_unreadable(state: RunState, step: int) -> None:
    """Saves the run and stops it where too many images cannot be read."""
    try:
        state.unreadable.judge(step * state.plan.global_batch_size)
    except TooManyUnreadableError as error:
        state.stop_after_saving(step, error)


def _evaluate_start(state: RunState, start_step: int) -> None:
    """The first line of the scores: the network that the run started from."""
    model = state.whole_model()
    if model is None or any(row["step"] == 0 for row in read_rows(state.output_dir / EVALUATIONS_FILE)):
        return
    if start_step:  # scores were asked for later; fresh weights can be drawn again
        if state.run.model_name_or_path is not None:
            return
        model = new_model(state.config, state.run.seed).to(state.accelerator.device)
    scores = state.evaluate(model, 0)
    if scores is not None:
        tqdm.write(evaluation_line(scores))
        _compare(state, "knn", scores)


def _to_device(batch: dict[str, Tensor], state: RunState) -> dict[str, Tensor]:
    device = state.accelerator.device
    moved = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    moved["pixel_values"] = normalize(moved["pixel_values"], state.data.image_mean, state.data.image_std)
    return moved


def _seed_dropout(state: RunState, step: int) -> None:
    """Dropout draws from torch's global generator: make it a function of (seed, step, rank), as all else is."""
    if state.config.hidden_dropout_prob or state.config.attention_probs_dropout_prob:
        rank = state.accelerator.process_index
        torch.manual_seed(int(keyed_generator(state.run.seed, DRAW_DROPOUT, step, rank).integers(2**62)))


def _stop_message(step: int, error: NonFiniteLossError, place: str, values: StepValues, state: RunState) -> str:
    times = f" in {state.skipped_in_a_row} steps in a row" if state.skipped_in_a_row > 1 else ""
    return (
        f"stopped at step {step}: {error}{times}, first in {place} (learning rate {values.learning_rate:.3g}); "
        f"{state.what_is_kept(step - state.skipped_in_a_row)} Try a lower --learning_rate, a longer --warmup_epochs, "
        "or --max_grad_norm 1; --max_skipped_steps says how many steps in a row may be skipped."
    )


def _going_on(output_dir: Path) -> str:
    return f"Of {output_dir} the last checkpoint is whole; {GOES_ON}."


def _what_fits(state: RunState, error: Exception) -> str:
    """What to do about a step that ran out of memory."""
    run, device = state.run, state.accelerator.device
    state.optimizer.state.clear()  # tried beside as much memory as it would take
    error.__traceback__ = None  # which holds on to what the step had made
    fitting = None
    if not is_sharded(state.model):
        fitting = largest_micro_batch(
            state.model,
            run.per_device_train_batch_size,
            num_ranks=state.ranks.number,
            autocast=state.accelerator.autocast,
        )
    return does_not_fit_message(run.per_device_train_batch_size, fitting, run.gradient_accumulation_steps, device)


# -- the Hub ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _uploading(
    run: PretrainingArguments, output_dir: Path, arguments: dict[str, Any], start_step: int
) -> Iterator[HubUploader]:
    """Uploads beside what happens inside, after a look at the repository; says what an end before the end leaves."""
    assert run.hub_model_id is not None  # PretrainingArguments.check
    uploader = HubUploader(
        output_dir,
        run.hub_model_id,
        private=run.hub_private_repo,
        revision=run.hub_revision,
        strategy=run.hub_strategy,
    )
    uploader.start(arguments, start_step, replace=run.overwrite_output_dir)
    try:
        yield uploader
    except UploadIncompleteError:
        raise
    except BaseException as error:
        is_interrupt = isinstance(error, KeyboardInterrupt) and getattr(error, "signal_number", None) in (
            None, signal.SIGINT,
        )  # fmt: skip
        wait = SIGNALLED_UPLOAD_SECONDS if isinstance(error, StoppedBySignal) else LAST_UPLOAD_SECONDS
        left = uploader.stop(0.0 if is_interrupt else wait)
        if left is not None:
            logger.warning("%s", left)
        raise


# -- building --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _locked(output_dir: Path, ranks: Ranks) -> Iterator[RunLock | None]:
    """Keeps other runs out of the folder; the main process does so for all."""
    lock, refusal = None, None
    if ranks.rank == 0:
        try:
            lock = lock_output_dir(output_dir)
        except (ValueError, OSError) as error:
            refusal = error
    told = ranks.gather(None if refusal is None else str(refusal))[0]
    if told is not None:
        raise refusal if refusal is not None else OutputDirInUseError(told)
    try:
        yield lock
    finally:
        if lock is not None:
            lock.release()


def _warn_of_unsharded(accelerator: Accelerator) -> None:
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1")
    if asked and accelerator.distributed_type != DistributedType.FSDP and accelerator.is_main_process:
        logger.warning(
            "accelerate's configuration asks for FSDP, which it does on GPUs only: on %s each process has the whole "
            "model.",
            accelerator.device,
        )


def _prepare(
    accelerator: Accelerator, model: IJepaForPretraining, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model as accelerate runs it, and the optimiser, which stays bare: its steps are driven here."""
    if accelerator.distributed_type != DistributedType.FSDP:
        return accelerator.prepare(model), optimizer
    prepared, wrapped = accelerator.prepare(model, optimizer)  # shards in place, and gives the optimiser the shards
    return prepared, wrapped.optimizer


def _make_accelerator(run: PretrainingArguments, output_dir: Path) -> Accelerator:
    available = {tracker.value for tracker in get_available_trackers()}
    for name in run.report_to:
        if name not in available:
            raise ValueError(
                f"report_to={name!r} is no tracker that is installed here "
                f"({', '.join(sorted(available)) or 'none is'}); pip install 'ijepa-hf[trackers]', or leave out "
                "--report_to."
            )
    # the only buffers are the position tables, which never change
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False)
    return Accelerator(
        mixed_precision=run.mixed_precision,
        log_with=run.report_to or None,
        project_dir=str(output_dir / "trackers"),
        kwargs_handlers=[ddp],
        fsdp_plugin=make_fsdp_plugin(),
    )


def _make_readers(
    images: TrainingImages, config: IJepaConfig, data: DataArguments, run: PretrainingArguments, plan: Plan
) -> tuple[CropReader, BatchMaker]:
    """What turns a row into a crop, and rows into a batch."""
    crops = CropReader(images.column, config.image_shape, data.min_crop_scale, run.seed)
    # pixels travel as bytes where the images are bytes, and are normalised on the device
    collator = IJepaDataCollator(config, normalize=False, seed=run.seed, global_batch_size=plan.global_batch_size)
    return crops, BatchMaker(collator)


def _expected(arguments: dict[str, Any], output_dir: Path) -> BandWatch | None:
    """The run beside the band of its recipe, with what it has logged in an earlier life."""
    band = find_band(arguments)
    if band is None:
        return None
    files = (METRICS_FILE, DIAGNOSTICS_FILE, EVALUATIONS_FILE)
    return BandWatch(band, RunRows(arguments, *(read_rows(output_dir / name) for name in files)))


def _make_diagnostics(
    accelerator: Accelerator,
    images: TrainingImages,
    crops: CropReader,
    evaluation: EvaluationSets | None,
    config: IJepaConfig,
    data: DataArguments,
    run: PretrainingArguments,
    plan: Plan,
) -> RunDiagnostics | None:
    """The images that are measured: held-out ones where a split was named, else some that are trained on."""
    if run.diagnostics_steps == 0 or not accelerator.is_main_process:
        return None
    if evaluation is not None:
        pixels = first_readable_pixels(evaluation.test, config, data.image_mean, data.image_std, MONITOR_IMAGES)
    else:
        size = min(MONITOR_IMAGES, images.num_images)
        make_batch = BatchMaker(IJepaDataCollator(config, normalize=False, seed=run.seed, global_batch_size=size))
        inputs = images.first_batch(crops, make_batch, size=size, seed=run.seed).inputs
        pixels = normalize(inputs["pixel_values"], data.image_mean, data.image_std)
    if len(pixels) < 2:
        logger.warning("there is no monitor for signs of collapse: it needs at least 2 images that can be read.")
        return None
    batch = make_monitor_batch(config, pixels.to(accelerator.device))
    return RunDiagnostics(
        CollapseMonitor(batch, chunk_size=min(MONITOR_IMAGES, CHUNK_OF_BATCHES * run.per_device_train_batch_size)),
        Path(str(run.output_dir)),
        num_steps=plan.num_steps,
    )


def _set_up_model(
    model: IJepaForPretraining, model_arguments: ModelArguments, run: PretrainingArguments, accelerator: Accelerator
) -> None:
    set_attention(model, model_arguments.attn_implementation, accelerator)
    if run.gradient_checkpointing or run.selective_checkpointing:
        enable_gradient_checkpointing(model, selective=run.selective_checkpointing)


# -- the folder ------------------------------------------------------------------------------------------------------


def describe_arguments(
    model_arguments: ModelArguments, data: DataArguments, run: PretrainingArguments, plan: Plan, num_images: int
) -> dict[str, Any]:
    """All arguments of a run as one flat dictionary, as `run.json` and checkpoints keep them.

    Args:
        model_arguments: The model.
        data: The images.
        run: Everything else.
        plan: Its global batch goes in as `global_batch_size`.
        num_images: Goes in as `num_train_images`; like the global batch it decides the order of images.

    Returns:
        Names and values.
    """
    named = argument_values(model_arguments, data, run)
    return {**named, "global_batch_size": plan.global_batch_size, "num_train_images": num_images}


def _check_ranks_agree(ranks: Ranks, start_step: int, revision: str | None) -> None:
    found = set(ranks.gather((start_step, revision)))
    if len({step for step, _ in found}) > 1:
        raise ValueError(
            f"the processes found checkpoints of different steps ({sorted(step for step, _ in found)}): output_dir "
            "must be on a disk that all share."
        )
    if len(found) > 1:
        raise ValueError(
            "the processes found different commits of model_name_or_path "
            f"({', '.join(str(commit) for _, commit in found)}); name one with --model_revision."
        )
