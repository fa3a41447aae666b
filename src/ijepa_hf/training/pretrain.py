"""Pretrains a model: check, build, restore, loop, report.

Everything that can be wrong is found before any work. Schedules, the order of images, crops and masks are pure
functions of the step. So a resumed run needs weights, optimiser state and the step's number (for a stream also who has
read it so far), and gives the bits of an uninterrupted one.
"""

import contextlib
import dataclasses
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from threadpoolctl import threadpool_limits

from ijepa_hf.data.collator import BatchMaker, IJepaDataCollator
from ijepa_hf.data.order import StreamLayout
from ijepa_hf.data.reading import CropReader
from ijepa_hf.data.transforms import normalize
from ijepa_hf.diagnosis.monitor import MONITOR_IMAGES, CollapseMonitor, make_monitor_batch
from ijepa_hf.diagnosis.run_monitor import RunDiagnostics
from ijepa_hf.evaluation.scorecard import first_readable_pixels, load_evaluation_sets
from ijepa_hf.hub.uploader import HubUploader, UploadIncompleteError
from ijepa_hf.model.modeling_ijepa import IJepaForPretraining
from ijepa_hf.model.sharding import make_fsdp_plugin
from ijepa_hf.recipes.arguments import DataArguments, ModelArguments, PretrainingArguments
from ijepa_hf.recipes.expected_band import BandWatch, RunRows, find_band
from ijepa_hf.runs.checkpoints import Checkpoint, config_fields, restore
from ijepa_hf.runs.folder import (
    DIAGNOSTICS_FILE,
    EVALUATIONS_FILE,
    METRICS_FILE,
    bytes_to_come,
    check_output_dir,
    check_space,
    is_finished,
    prepare_output_dir,
)
from ijepa_hf.runs.lock import OutputDirInUseError, RunLock, lock_output_dir
from ijepa_hf.runs.rows import read_rows
from ijepa_hf.training.announcement import announce, draw_first_masks
from ijepa_hf.training.images import close_loader, open_training_images
from ijepa_hf.training.loop import run_steps, skipped_before
from ijepa_hf.training.memory import fit_batch
from ijepa_hf.training.plan import make_plan
from ijepa_hf.training.ranks import Ranks
from ijepa_hf.training.report import describe_machine, render_report, write_report
from ijepa_hf.training.signals import GOES_ON, StoppedBySignal, StopSignals
from ijepa_hf.training.start import Start, check_checkpoint, find_start, load_starting_encoder
from ijepa_hf.training.state import RunSetup, RunState
from ijepa_hf.training.step import choose_kernels, set_up_model

MASK_FIGURE_IMAGES = 6
CHUNK_OF_BATCHES = 4  # in one forward pass of the monitor: without gradients it takes less memory than a step on one
LAST_UPLOAD_SECONDS = 60.0  # for which a run that stops by itself waits for the upload of its last good state
SIGNALLED_UPLOAD_SECONDS = 15.0  # the same for a run that a signal stops, with half a minute until it is killed

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
        ranks = Ranks(accelerator.num_processes, accelerator.process_index)
        advice = f"Of {output_dir} the last checkpoint is whole; {GOES_ON}."
        with ranks.naming_the_lost(advice), _locked(output_dir, ranks) as lock:
            start = find_start(model_arguments, data, run, output_dir)
            setup = _check(start, output_dir, accelerator, ranks, signals, lock)
            if is_finished(output_dir, setup.run):
                _show_finished(setup)
            else:
                _train(setup, start)
    return output_dir


def _check(
    start: Start, output_dir: Path, accelerator: Accelerator, ranks: Ranks, signals: StopSignals, lock: RunLock | None
) -> RunSetup:
    """Opens the images, makes the plan, and finds what does not fit together."""
    config, data, run = start.config, start.data, start.run
    data.check(start.model_arguments)
    images = open_training_images(data, config, ranks.number)
    evaluation = load_evaluation_sets(data, config)
    plan = make_plan(run, images.num_images, ranks.number, has_new_predictor=start.has_new_predictor)
    if run.model_name_or_path is not None:  # the record says what was done
        run = dataclasses.replace(run, predictor_warmup_steps=plan.predictor_warmup_steps)
    setup = RunSetup(
        output_dir, config, start.model_arguments, data, run, plan, images, evaluation, accelerator, ranks, signals,
        lock,
    )  # fmt: skip
    check_output_dir(output_dir, setup.arguments, run)
    if start.checkpoint is not None:
        check_checkpoint(start.checkpoint, setup.arguments, plan)
    return setup


def _train(setup: RunSetup, start: Start) -> None:
    """Builds the model, goes on from a checkpoint if there is one, takes the steps, reports and uploads."""
    output_dir, images, checkpoint = setup.output_dir, setup.images, start.checkpoint
    start_step = 0 if checkpoint is None else checkpoint.step
    model, notes = start.build_model()
    if setup.is_main:
        check_space(output_dir, bytes_to_come(model, output_dir, setup.run.checkpoints_total_limit))
    crops, make_batch = _make_readers(setup)
    # data that cannot be used at all are found before anything is written
    size = min(MASK_FIGURE_IMAGES, setup.run.per_device_train_batch_size)
    first_batch = images.first_batch(crops, make_batch, size=size, seed=setup.run.seed)
    if setup.run.fit_batch_to_memory:
        setup = _fit_batch(setup, model)
    layouts = _layouts(setup, checkpoint)
    ready = set_up_model(model, setup.run, setup.accelerator, setup.model_arguments.attn_implementation)
    if checkpoint is not None:
        restore(checkpoint, model, ready.optimizer, config_fields(setup.config))
    _check_ranks_agree(setup.ranks, start_step, setup.run.model_revision)
    with _uploading(setup, start_step) as uploader:
        if setup.is_main:
            prepare_output_dir(output_dir, setup.arguments, config_fields(setup.config), setup.run, checkpoint)
            draw_first_masks(first_batch, setup.config, output_dir)
            announce(setup, model, start_step)
            for note in notes:
                logger.warning("%s", note)
        state = RunState(
            setup,
            ready,
            last_save=start_step,
            skipped_in_a_row=setup.ranks.gather(skipped_before(output_dir, start_step))[0],
            stream=images.stream_state(layouts),
            uploader=uploader,
            diagnostics=_make_diagnostics(setup, crops),
            expected=_expected(setup),
        )
        loader = images.loader(
            crops,
            make_batch,
            layouts,
            seed=setup.run.seed,
            shuffle_buffer_size=setup.data.shuffle_buffer_size,
            num_steps=setup.plan.num_steps,
            start_step=start_step,
            rank=setup.ranks.rank,
            pin_memory=setup.accelerator.device.type == "cuda",
        )
        try:
            run_steps(state, loader, start_step)
        finally:
            close_loader(loader)
        _report(state)
        setup.accelerator.trackers.clear()  # finished by the log, whose end no failing tracker can prevent
        ready.release()
        setup.accelerator.free_memory()
        setup.accelerator.end_training()
        _finish_upload(uploader, setup)  # last: other ranks need not wait for it


def _report(state: RunState) -> None:
    """Scores the model and writes the report, on the main process, while the others wait."""
    model, setup = state.whole_model(), state.setup
    if model is not None:
        starting_encoder = None
        if setup.evaluation is not None:
            starting_encoder = load_starting_encoder(setup.run, setup.config)
        with threadpool_limits(setup.run.num_cpu_threads):  # scikit-learn's too: on small matrices they only compete
            write_report(
                model,
                setup.output_dir,
                setup.evaluation,
                setup.arguments,
                step=setup.plan.num_steps,
                machine=describe_machine(setup.accelerator.device, setup.ranks.number),
                starting_encoder=starting_encoder,
            )
        print()
        print(render_report(setup.output_dir))
    setup.ranks.wait()


def _show_finished(setup: RunSetup) -> None:
    """Prints the report again, and uploads what has not been."""
    if setup.is_main:
        print(f"{setup.output_dir} holds this run, finished. Its report:\n")
        print(render_report(setup.output_dir))
    setup.accelerator.end_training()
    with _uploading(setup, setup.plan.num_steps) as uploader:
        _finish_upload(uploader, setup)


# -- the Hub ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _uploading(setup: RunSetup, start_step: int) -> Iterator[HubUploader | None]:
    """Uploads beside what happens inside, if the run is pushed; logs what an early end leaves to be uploaded."""
    run = setup.run
    if not (run.push_to_hub and setup.is_main):
        yield None
        return
    assert run.hub_model_id is not None  # PretrainingArguments.check
    uploader = HubUploader(
        setup.output_dir,
        run.hub_model_id,
        private=run.hub_private_repo,
        revision=run.hub_revision,
        strategy=run.hub_strategy,
    )
    uploader.start(setup.arguments, start_step, replace=run.overwrite_output_dir)
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


def _finish_upload(uploader: HubUploader | None, setup: RunSetup) -> None:
    if uploader is not None:
        print(f"\n{uploader.finish(setup.plan.num_steps)}")


# -- processes and devices -------------------------------------------------------------------------------------------


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
    accelerator = Accelerator(
        mixed_precision=run.mixed_precision,
        log_with=run.report_to or None,
        project_dir=str(output_dir / "trackers"),
        kwargs_handlers=[ddp],
        fsdp_plugin=make_fsdp_plugin(),
    )
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1")
    if asked and accelerator.distributed_type != DistributedType.FSDP and accelerator.is_main_process:
        logger.warning(
            "accelerate's configuration asks for FSDP, which it does on GPUs only: on %s each process has the whole "
            "model.",
            accelerator.device,
        )
    return accelerator


@contextlib.contextmanager
def _locked(output_dir: Path, ranks: Ranks) -> Iterator[RunLock | None]:
    """Keeps other runs out of the folder; the main process does so for all."""
    lock, refusal = None, None
    if ranks.rank == 0:
        try:
            lock = lock_output_dir(output_dir)
        except (ValueError, OSError) as error:
            refusal = error
    refused = ranks.gather(None if refusal is None else str(refusal))[0]
    if refused is not None:
        raise refusal if refusal is not None else OutputDirInUseError(refused)
    try:
        yield lock
    finally:
        if lock is not None:
            lock.release()


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


# -- readers and watchers --------------------------------------------------------------------------------------------


def _make_readers(setup: RunSetup) -> tuple[CropReader, BatchMaker]:
    """Makes what turns a row into a crop, and rows into a batch."""
    config = setup.config
    crops = CropReader(setup.images.column, config.image_shape, setup.data.min_crop_scale, setup.run.seed)
    # pixels travel as bytes where the images are bytes, and are normalised on the device
    collator = IJepaDataCollator(
        config, normalize=False, seed=setup.run.seed, global_batch_size=setup.plan.global_batch_size
    )
    return crops, BatchMaker(collator)


def _layouts(setup: RunSetup, checkpoint: Checkpoint | None) -> list[StreamLayout]:
    """Lists who has read the stream so far, and who reads it from now on."""
    today = StreamLayout(
        0 if checkpoint is None else checkpoint.step,
        setup.ranks.number,
        setup.data.dataloader_num_workers,
        setup.run.per_device_train_batch_size,
        setup.run.gradient_accumulation_steps,
    )
    return setup.images.layouts_from(None if checkpoint is None else checkpoint.stream, today)


def _fit_batch(setup: RunSetup, model: IJepaForPretraining) -> RunSetup:
    """Chooses micro-batches that fit into the memory of all processes, at the same global batch."""
    run, accelerator = setup.run, setup.accelerator
    model = model.to(accelerator.device)
    choose_kernels(model, run, accelerator, setup.model_arguments.attn_implementation)
    return dataclasses.replace(setup, run=fit_batch(model, run, accelerator, setup.ranks))


def _expected(setup: RunSetup) -> BandWatch | None:
    """Finds the band of the run's recipe and compares with it what an earlier life of the run has logged."""
    band = find_band(setup.arguments) if setup.is_main else None
    if band is None:
        return None
    files = (METRICS_FILE, DIAGNOSTICS_FILE, EVALUATIONS_FILE)
    return BandWatch(band, RunRows(setup.arguments, *(read_rows(setup.output_dir / name) for name in files)))


def _make_diagnostics(setup: RunSetup, crops: CropReader) -> RunDiagnostics | None:
    """Chooses the images that are measured: held-out ones where a split was named, else some that are trained on."""
    config, data, run, device = setup.config, setup.data, setup.run, setup.accelerator.device
    if run.diagnostics_steps == 0 or not setup.is_main:
        return None
    if setup.evaluation is not None:
        pixels = first_readable_pixels(setup.evaluation.test, config, data.image_mean, data.image_std, MONITOR_IMAGES)
    else:
        size = min(MONITOR_IMAGES, setup.images.num_images)
        make_batch = BatchMaker(IJepaDataCollator(config, normalize=False, seed=run.seed, global_batch_size=size))
        inputs = setup.images.first_batch(crops, make_batch, size=size, seed=run.seed).inputs
        pixels = normalize(inputs["pixel_values"], data.image_mean, data.image_std)
    if len(pixels) < 2:
        logger.warning("there is no monitor for signs of collapse: it needs at least 2 images that can be read.")
        return None
    batch = make_monitor_batch(config, pixels.to(device))
    chunk_size = min(MONITOR_IMAGES, CHUNK_OF_BATCHES * run.per_device_train_batch_size)
    return RunDiagnostics(
        CollapseMonitor(batch, chunk_size=chunk_size), setup.output_dir, num_steps=setup.plan.num_steps
    )
