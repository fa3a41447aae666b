"""Pretrains a model: check, build, restore, loop, report.

Wrong arguments and data are found before any work. Schedules, the order of images, crops and masks are pure functions
of the step. So a resumed run needs weights, optimiser state and the step's number (for a stream also the readers it
has had), and gives bit for bit the results of an uninterrupted one.
"""

import dataclasses
import logging
from pathlib import Path

import torch
from accelerate import Accelerator

from ijepa_hf.data.order import StreamLayout
from ijepa_hf.evaluation.scorecard import load_evaluation_sets
from ijepa_hf.recipes.arguments import DataArguments, ModelArguments, PretrainingArguments
from ijepa_hf.runs.checkpoints import config_fields, restore
from ijepa_hf.runs.folder import bytes_to_come, check_output_dir, check_space, is_finished, prepare_output_dir
from ijepa_hf.runs.lock import RunLock
from ijepa_hf.training.announcement import announce, draw_first_masks
from ijepa_hf.training.images import close_loader, open_training_images
from ijepa_hf.training.loop import run_steps, skipped_before
from ijepa_hf.training.memory import fit_batch
from ijepa_hf.training.plan import make_plan
from ijepa_hf.training.ranks import Ranks
from ijepa_hf.training.report import render_report, write_report
from ijepa_hf.training.setup import RunSetup, locked, make_accelerator
from ijepa_hf.training.signals import GOES_ON, StopSignals
from ijepa_hf.training.start import Start, check_checkpoint, check_same_start, find_start, load_starting_encoder
from ijepa_hf.training.state import RunState
from ijepa_hf.training.step import set_up_model
from ijepa_hf.training.watchers import finish_upload, make_diagnostics, uploading, watch_band

MASK_FIGURE_IMAGES = 6

logger = logging.getLogger(__name__)


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
        accelerator = make_accelerator(run, output_dir)
        ranks = Ranks(accelerator.num_processes, accelerator.process_index)
        advice = f"Of {output_dir} the last checkpoint is whole; {GOES_ON}."
        with ranks.naming_the_lost(advice), locked(output_dir, ranks) as lock:
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
    return setup


def _train(setup: RunSetup, start: Start) -> None:
    """Builds the model, goes on from a checkpoint if there is one, takes the steps, reports and uploads."""
    output_dir, images, checkpoint = setup.output_dir, setup.images, start.checkpoint
    if checkpoint is not None:
        check_checkpoint(checkpoint, setup.arguments, setup.plan)
    model, notes = start.build_model()
    if setup.is_main:
        check_space(output_dir, bytes_to_come(model, output_dir, setup.run.checkpoints_total_limit))
    # data that cannot be used at all are found before anything is written
    size = min(MASK_FIGURE_IMAGES, setup.run.per_device_train_batch_size)
    first_batch = images.first_batch(setup.crops, setup.batch_maker(), size)
    if setup.run.fit_batch_to_memory:
        setup = fit_batch(setup, model)
    layouts = _layouts(setup, start)
    ready = set_up_model(model, setup.run, setup.accelerator, setup.model_arguments.attn_implementation)
    if checkpoint is not None:
        restore(checkpoint, model, ready.optimizer, config_fields(setup.config))
    check_same_start(start, setup.ranks)
    with uploading(setup, start.step) as uploader:
        if setup.is_main:
            prepare_output_dir(output_dir, setup.arguments, config_fields(setup.config), setup.run, checkpoint)
            draw_first_masks(first_batch, setup.config, output_dir)
            announce(setup, model, start.step)
            for note in notes:
                logger.warning("%s", note)
        state = RunState(
            setup,
            ready,
            last_save=start.step,
            skipped_in_a_row=setup.ranks.gather(skipped_before(output_dir, start.step))[0],
            stream=images.stream_state(layouts),
            uploader=uploader,
            diagnostics=make_diagnostics(setup),
            expected=watch_band(setup),
        )
        loader = images.loader(
            setup.crops, setup.batch_maker(), layouts, num_steps=setup.plan.num_steps, start_step=start.step,
            rank=setup.ranks.rank, pin_memory=setup.accelerator.device.type == "cuda",
        )  # fmt: skip
        try:
            run_steps(state, loader, start.step)
        finally:
            close_loader(loader)
        _report(state)
        ready.release()
        finish_upload(uploader, setup)  # last: other ranks need not wait for it


def _layouts(setup: RunSetup, start: Start) -> list[StreamLayout]:
    """Lists the readers that the stream has had so far, and those that it has from now on."""
    run, workers = setup.run, setup.data.dataloader_num_workers
    today = StreamLayout(
        start.step, setup.ranks.number, workers, run.per_device_train_batch_size, run.gradient_accumulation_steps
    )
    return setup.images.layouts_from(None if start.checkpoint is None else start.checkpoint.stream, today)


def _report(state: RunState) -> None:
    """Scores the model and writes the report, on the main process, while the others wait."""
    model, setup = state.whole_model(), state.setup
    if model is not None:
        encoder = None if setup.evaluation is None else load_starting_encoder(setup.run, setup.config)
        write_report(setup, model, encoder)
        print(f"\n{render_report(setup.output_dir)}")
    setup.ranks.wait()


def _show_finished(setup: RunSetup) -> None:
    """Prints the report again, and uploads the states that are not on the Hub yet."""
    if setup.is_main:
        print(f"{setup.output_dir} holds this run, finished. Its report:\n")
        print(render_report(setup.output_dir))
    setup.accelerator.end_training()
    with uploading(setup, setup.plan.num_steps) as uploader:
        finish_upload(uploader, setup)
