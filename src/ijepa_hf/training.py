"""The pretraining loop, on `accelerate`.

`pretrain` reads from top to bottom: check everything that can be wrong, build, restore, then for each optimiser step
draw a global batch, take the step (`training_step`), log, score, save and, where asked, upload. Schedules, order,
crops and masks are pure functions of the step, so a resumed run needs weights, optimiser state and the step's number
(for a stream also who has read it so far), and gives the bits of an uninterrupted one.
"""

import contextlib
import dataclasses
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list, gather_object
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ijepa_hf.arguments import DataArguments, ModelArguments, PretrainingArguments, argument_values
from ijepa_hf.checkpointing import config_fields, find_latest, restore, save_checkpoint
from ijepa_hf.collapse_monitor import MONITOR_IMAGES, CollapseMonitor, make_monitor_batch
from ijepa_hf.configuration_ijepa import IJepaConfig
from ijepa_hf.data import (
    Batch,
    BatchMaker,
    CropReader,
    IJepaDataCollator,
    keyed_generator,
)
from ijepa_hf.export import export_model, exported_step
from ijepa_hf.hub import HubUploader, UploadIncompleteError
from ijepa_hf.image_transforms import normalize
from ijepa_hf.loading import (
    TooManyUnreadableError,
    TrainingImages,
    UnreadableLog,
    close_loader,
    open_training_images,
)
from ijepa_hf.masking import draw_masks
from ijepa_hf.metrics_log import Clock, MetricsLog, evaluation_line, log_line
from ijepa_hf.modeling_ijepa import (
    IJepaForPretraining,
    IJepaForPretrainingOutput,
    enable_gradient_checkpointing,
    new_model,
)
from ijepa_hf.plan import Plan, StepValues, make_plan, values_at
from ijepa_hf.report import (
    EvaluationSets,
    describe_machine,
    evaluate_encoder,
    first_readable_pixels,
    load_evaluation_sets,
    render_report,
    write_report,
)
from ijepa_hf.run_diagnostics import CollapseError, RunDiagnostics, is_due, steps_between
from ijepa_hf.run_folder import (
    EVALUATIONS_FILE,
    UNREADABLE_FILE,
    append_rows,
    check_output_dir,
    is_finished,
    prepare_output_dir,
    read_rows,
)
from ijepa_hf.run_start import check_checkpoint, find_start, load_starting_encoder
from ijepa_hf.streaming import StreamLayout
from ijepa_hf.visualization import draw_masks_figure

MASK_FIGURE_IMAGES = 6
MASK_TRIALS, MASK_TRIAL_IMAGES = 16, 64  # steps, and images in each, drawn to announce what the masks are like
HIGH_REDRAW_RATE = 0.4
CHUNK_OF_BATCHES = 4  # in one forward pass of the monitor: without gradients it takes less memory than a step on one
LAST_UPLOAD_SECONDS = 60.0  # that a run which stops by itself waits for the upload of its last good state

logger = logging.getLogger(__name__)

_DRAW_DROPOUT = 4  # beside the streams of data.py


class NonFiniteLossError(ArithmeticError):
    """Loss or gradient became NaN or infinite; the run stopped before it could spoil the weights."""


# -- one step --------------------------------------------------------------------------------------------------------


def make_optimizer(model: IJepaForPretraining, run: PretrainingArguments) -> torch.optim.AdamW:
    """AdamW in the published groups: biases and 1-D parameters do not decay; the (3-D) mask token does.

    Args:
        model: Whose context encoder and predictor are trained; the target encoder is in no group.
        run: Betas and epsilon.

    Returns:
        The optimiser; its groups keep `param_names`, learning rate and decay are set at each step.
    """
    decayed: list[tuple[str, nn.Parameter]] = []
    plain: list[tuple[str, nn.Parameter]] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_plain = parameter.ndim == 1 or name.endswith("bias")
            (plain if is_plain else decayed).append((name, parameter))
    groups = [{"params": decayed, "decays": True}, {"params": plain, "decays": False, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(run.adam_beta1, run.adam_beta2), eps=run.adam_epsilon, fused=True)


@dataclass
class StepResult:
    """What came of one optimiser step.

    Args:
        loss: Mean over the global batch.
        grad_norm_encoder: Of the context encoder, before clipping.
        grad_norm_predictor: Of the predictor, before clipping.
        targets: `[B, M, P, D]` of this rank's last micro-batch.
    """

    loss: float
    grad_norm_encoder: float
    grad_norm_predictor: float
    targets: Tensor


def training_step(
    accelerator: Accelerator,
    prepared: nn.Module,
    model: IJepaForPretraining,
    optimizer: torch.optim.Optimizer,
    micro_batches: list[dict[str, Tensor]],
    values: StepValues,
    *,
    max_grad_norm: float | None = None,
) -> StepResult:
    """One optimiser step: forward and backward of each micro-batch, AdamW, then the moving average.

    Args:
        accelerator: Runs the backward pass and averages over ranks.
        prepared: The model as `accelerator.prepare` returned it.
        model: The model inside.
        optimizer: From `make_optimizer`.
        micro_batches: `pixel_values` float, `context_indices`, `target_indices`, on the device, of equal size.
        values: Learning rate, weight decay and momentum of this step, and whether only the predictor learns.
        max_grad_norm: Clip to this norm; `None` is off.

    Returns:
        Loss, gradient norms and targets.

    Raises:
        NonFiniteLossError: If loss or gradient is NaN or infinite on any rank; the weights are as they were before.
    """
    for group in optimizer.param_groups:
        group["lr"] = values.learning_rate
        if group["decays"]:
            group["weight_decay"] = values.weight_decay
    optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), device=accelerator.device)
    for number, batch in enumerate(micro_batches, start=1):
        last = number == len(micro_batches)
        with contextlib.nullcontext() if last else accelerator.no_sync(prepared):
            output: IJepaForPretrainingOutput = prepared(**batch)
            assert output.loss is not None
            loss = output.loss / len(micro_batches)
            accelerator.backward(loss)
            total += loss.detach()
    mean = float(accelerator.reduce(total, "mean"))
    if not math.isfinite(mean):
        raise NonFiniteLossError(f"the loss is {mean}")
    assert output.targets is not None
    norms = [float(_grad_norm(part)) for part in (model.context_encoder, model.predictor)]
    if not all(map(math.isfinite, norms)):  # the same on every rank: gradients are averaged
        raise NonFiniteLossError(f"the gradient norm is {norms[0]} in the encoder, {norms[1]} in the predictor")
    if values.encoder_is_frozen:
        # Dropped and not left out of the backward pass: DDP expects every gradient in every step, and with one it
        # drops out, AdamW makes no state and no step for a parameter.
        for parameter in model.context_encoder.parameters():
            parameter.grad = None
    if max_grad_norm is not None:
        accelerator.clip_grad_norm_(prepared.parameters(), max_grad_norm)
    optimizer.step()
    if not values.encoder_is_frozen:
        model.update_target_encoder(values.ema_momentum)
    return StepResult(mean, norms[0], norms[1], output.targets)


def _grad_norm(module: nn.Module) -> Tensor:
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)


def eager_is_faster(device_type: str, mixed_precision: str) -> bool:
    """Whether eager attention trains faster than torch's fused one: on a CPU in bf16.

    There the fused backward pass is slow on short sequences; eager trained 1.3 to 1.5 times as fast on a processor
    with bf16 instructions.

    Args:
        device_type: `cpu`, `cuda`, ...
        mixed_precision: `no` or `bf16`.

    Returns:
        The answer.
    """
    return device_type == "cpu" and mixed_precision == "bf16"


def set_attention(model: IJepaForPretraining, attn_implementation: str | None, accelerator: Accelerator) -> None:
    """Chooses how attention is computed.

    Args:
        model: The model.
        attn_implementation: As transformers names it; `None` takes what is fastest: `eager` where
            `eager_is_faster` says so, else `sdpa`.
        accelerator: Says device and precision.
    """
    if attn_implementation is None:
        if not eager_is_faster(accelerator.device.type, accelerator.mixed_precision):
            return  # as the model came: sdpa
        attn_implementation = "eager"
    model.set_attn_implementation(attn_implementation)


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
        ValueError: If an argument is bad, the folder is another run's, or the data do not fit; found before any work.
        FileNotFoundError: If a folder, file or checkpoint that was named does not exist.
        NonFiniteLossError: If the loss becomes NaN or infinite; the last checkpoint is kept.
        CollapseError: If the features were judged to have collapsed and `on_collapse` is `stop`; a checkpoint is kept.
        UploadIncompleteError: If the finished run did not arrive on the Hub; says what finishes it.
    """
    assert run.output_dir is not None  # parse_arguments
    output_dir = Path(run.output_dir)
    if run.num_cpu_threads is not None:
        torch.set_num_threads(run.num_cpu_threads)
    accelerator = _make_accelerator(run, output_dir)
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
        return output_dir
    if checkpoint is not None:
        check_checkpoint(checkpoint, arguments, plan)
    start_step = 0 if checkpoint is None else checkpoint.step
    layout = StreamLayout(
        start_step,
        accelerator.num_processes,
        data.dataloader_num_workers,
        run.per_device_train_batch_size,
        run.gradient_accumulation_steps,
    )
    layouts = images.layouts_from(None if checkpoint is None else checkpoint.stream, layout)
    model, notes = start.build_model()
    _set_up_model(model, model_arguments, run, accelerator)
    optimizer = make_optimizer(model, run)
    prepared = accelerator.prepare(model)  # the optimiser stays bare: its steps are driven here, once per global batch
    if checkpoint is not None:
        restore(checkpoint, model, optimizer, config_fields(config))
    crops, make_batch = _make_readers(images, config, data, run, plan)
    _check_ranks_agree(accelerator, start_step, run.model_revision)
    # data that cannot be used at all are found before anything is written
    first_batch = images.first_batch(crops, make_batch, size=min(MASK_FIGURE_IMAGES, layout.batch_size), seed=run.seed)
    with _uploading(run, output_dir, arguments, start_step) if pushes else contextlib.nullcontext() as uploader:
        if accelerator.is_main_process:
            prepare_output_dir(output_dir, arguments, config_fields(config), run, checkpoint)
            _draw_first_masks(first_batch, config, output_dir)
            _announce(accelerator, model, images, run, plan, start_step)
            for note in notes:
                logger.warning("%s", note)
        accelerator.wait_for_everyone()
        state = _RunState(
            accelerator, model, prepared, optimizer, config, data, run, plan, output_dir, arguments, evaluation,
            stream=images.stream_state(layouts),
            unreadable=UnreadableLog(output_dir / UNREADABLE_FILE, images.num_images, data.max_broken_share),
            uploader=uploader,
            diagnostics=_make_diagnostics(accelerator, images, crops, evaluation, config, data, run, plan),
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
        if accelerator.is_main_process:
            _report(state)
        accelerator.wait_for_everyone()
        accelerator.trackers.clear()  # finished by the log, which a tracker's failure cannot end
        accelerator.end_training()
        if uploader is not None:  # last: other ranks need not wait for it
            print(f"\n{uploader.finish(plan.num_steps)}")
    return output_dir


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


def _report(state: "_RunState") -> None:
    starting_encoder = None
    if state.evaluation is not None:
        starting_encoder = load_starting_encoder(state.run, state.config)
    with threadpool_limits(state.run.num_cpu_threads):  # scikit-learn's too: on small matrices they only compete
        write_report(
            state.model,
            state.output_dir,
            state.evaluation,
            state.arguments,
            step=state.plan.num_steps,
            machine=describe_machine(state.accelerator.device, state.accelerator.num_processes),
            starting_encoder=starting_encoder,
        )
    print()
    print(render_report(state.output_dir))


@dataclass
class _RunState:
    """What the loop, the log and the saving share."""

    accelerator: Accelerator
    model: IJepaForPretraining
    prepared: nn.Module
    optimizer: torch.optim.Optimizer
    config: IJepaConfig
    data: DataArguments
    run: PretrainingArguments
    plan: Plan
    output_dir: Path
    arguments: dict[str, Any]
    evaluation: EvaluationSets | None
    stream: dict[str, Any] | None
    unreadable: UnreadableLog
    uploader: HubUploader | None
    diagnostics: RunDiagnostics | None

    def save(self, step: int) -> None:
        """Writes a checkpoint and the two-part folder, and has them uploaded where that was asked for."""
        if self.accelerator.is_main_process:
            save_checkpoint(
                self.output_dir,
                step,
                self.model,
                self.optimizer,
                config=config_fields(self.config),
                arguments=self.arguments,
                total_limit=self.run.checkpoints_total_limit,
                stream=self.stream,
            )
            self.export(step)
            if self.uploader is not None:
                self.uploader.submit(step)
        self.accelerator.wait_for_everyone()

    def export(self, step: int) -> None:
        """Writes the two-part folder."""
        mean, std = self.data.image_mean, self.data.image_std
        export_model(self.model, self.output_dir, step=step, image_mean=mean, image_std=std)

    def evaluate(self, model: IJepaForPretraining, step: int) -> dict[str, Any]:
        """Scores a target encoder as that of a step, writes it down and returns the line. On the main process only."""
        assert self.evaluation is not None  # parse_arguments
        with threadpool_limits(self.run.num_cpu_threads):
            scores = evaluate_encoder(model.target_encoder, self.evaluation, self.config, self.arguments)
        row = {"step": step, "epoch": round(step / self.plan.steps_per_epoch, 4), **scores}
        append_rows(self.output_dir / EVALUATIONS_FILE, [row])
        return row


def _run_steps(state: _RunState, loader: DataLoader, start_step: int) -> None:
    """The loop over optimiser steps."""
    accelerator, run, plan = state.accelerator, state.run, state.plan
    if accelerator.is_main_process and start_step and exported_step(state.output_dir) != start_step:
        state.export(start_step)  # the last life of this run was cut short between checkpoint and export
    if accelerator.is_main_process and run.eval_steps:
        _evaluate_start(state, start_step)
    accelerator.wait_for_everyone()
    state.model.train()
    clock = Clock()
    batches = iter(loader)
    every = run.checkpointing_steps or plan.steps_per_epoch
    progress = tqdm(
        total=plan.num_steps, initial=start_step, unit="step", disable=not accelerator.is_main_process, mininterval=1.0
    )
    with contextlib.closing(progress), contextlib.closing(_open_metrics_log(state)) as metrics:
        if start_step == 0:
            _diagnose(state, 0, progress, metrics)
        for step in range(start_step, plan.num_steps):
            with clock.waiting():
                micro_batches = [next(batches) for _ in range(run.gradient_accumulation_steps)]
            for batch in micro_batches:
                state.unreadable.add(batch.unreadable)
            values = values_at(step, run, plan)
            _seed_dropout(state, step)
            try:
                result = training_step(
                    accelerator,
                    state.prepared,
                    state.model,
                    state.optimizer,
                    [_to_device(batch.inputs, state) for batch in micro_batches],
                    values,
                    max_grad_norm=run.max_grad_norm,
                )
            except NonFiniteLossError as error:
                raise NonFiniteLossError(_stop_message(step + 1, error, values, state.output_dir)) from None
            done = step + 1
            if state.diagnostics is not None:
                state.diagnostics.note_step(None if values.encoder_is_frozen else values.ema_momentum)
            progress.update()
            clock.steps += 1
            is_last = done == plan.num_steps
            is_logged = done == 1 or done % run.logging_steps == 0 or is_last
            # one rank writes, so one rank takes the spectrum of the targets
            if is_logged and accelerator.is_main_process:
                row = metrics.write(
                    done,
                    loss=result.loss,
                    grad_norms=(result.grad_norm_encoder, result.grad_norm_predictor),
                    targets=result.targets,
                    values=values,
                    clock=clock,
                )
                progress.write(log_line(row))
                progress.set_postfix(loss=f"{row['loss']:.4f}", rankme=f"{row['target_rankme']:.1f}", refresh=False)
            with clock.stopped():
                if is_logged:
                    _settle_unreadable(state, done)
                if run.eval_steps and (done % run.eval_steps == 0 or is_last):
                    if accelerator.is_main_process:
                        scores = state.evaluate(state.model, done)
                        progress.write(evaluation_line(scores))
                        metrics.tell_trackers(scores, done)
                    accelerator.wait_for_everyone()
                _diagnose(state, done, progress, metrics)
                if done % every == 0 or is_last:
                    state.save(done)
                if state.diagnostics is not None and (done % every == 0 or is_last):
                    state.diagnostics.draw(state.model, is_last=is_last)


def _diagnose(state: _RunState, step: int, progress: tqdm, metrics: MetricsLog) -> None:
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
    failure: list[str | None] = [None]
    if state.diagnostics is not None:
        epoch = round(step / plan.steps_per_epoch, 4)
        before = state.diagnostics.verdict
        verdict = state.diagnostics.measure(state.model, step, epoch, metrics.tell_trackers)
        if verdict is not None and (before is None or before.name != verdict.name):
            progress.write(f"step {step} verdict: {verdict}")
        if verdict is not None and verdict.is_failure:
            failure = [f"stopped at step {step}: {verdict}"]
    if run.on_collapse == "stop":
        broadcast_object_list(failure)
        if failure[0] is not None:
            state.save(step)
            raise CollapseError(failure[0])


def _open_metrics_log(state: _RunState) -> MetricsLog:
    return MetricsLog(state.accelerator, state.plan, state.output_dir, state.run.report_to, state.arguments)


def _settle_unreadable(state: _RunState, step: int) -> None:
    """Brings together what all ranks could not read; where that is too much, saves the run before it stops."""
    num_seen = step * state.plan.global_batch_size
    try:
        state.unreadable.settle(gather_object, step, num_seen, is_main=state.accelerator.is_main_process)
    except TooManyUnreadableError:
        state.save(step)
        raise


def _evaluate_start(state: _RunState, start_step: int) -> None:
    """The first line of the scores: the network that the run started from."""
    if any(row["step"] == 0 for row in read_rows(state.output_dir / EVALUATIONS_FILE)):
        return
    if start_step == 0:
        tqdm.write(evaluation_line(state.evaluate(state.model, 0)))
    elif state.run.model_name_or_path is None:  # scores were asked for later; fresh weights can be drawn again
        fresh = new_model(state.config, state.run.seed).to(state.accelerator.device)
        tqdm.write(evaluation_line(state.evaluate(fresh, 0)))


def _to_device(batch: dict[str, Tensor], state: _RunState) -> dict[str, Tensor]:
    device = state.accelerator.device
    moved = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    moved["pixel_values"] = normalize(moved["pixel_values"], state.data.image_mean, state.data.image_std)
    return moved


def _seed_dropout(state: _RunState, step: int) -> None:
    """Dropout draws from torch's global generator: make it a function of (seed, step, rank), as all else is."""
    if state.config.hidden_dropout_prob or state.config.attention_probs_dropout_prob:
        rank = state.accelerator.process_index
        torch.manual_seed(int(keyed_generator(state.run.seed, _DRAW_DROPOUT, step, rank).integers(2**62)))


def _stop_message(step: int, error: NonFiniteLossError, values: StepValues, output_dir: Path) -> str:
    latest = find_latest(output_dir)
    kept = f"the last good checkpoint is {latest.path}" if latest else "no checkpoint had been written yet"
    return (
        f"stopped at step {step}: {error} (learning rate {values.learning_rate:.3g}); {kept}. Try a lower "
        "--learning_rate, a longer --warmup_epochs, or --max_grad_norm 1."
    )


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
        left = uploader.stop(0.0 if isinstance(error, KeyboardInterrupt) else LAST_UPLOAD_SECONDS)
        if left is not None:
            logger.warning("%s", left)
        raise


# -- building --------------------------------------------------------------------------------------------------------


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
    )


def _make_readers(
    images: TrainingImages, config: IJepaConfig, data: DataArguments, run: PretrainingArguments, plan: Plan
) -> tuple[CropReader, BatchMaker]:
    """What turns a row into a crop, and rows into a batch."""
    crops = CropReader(
        images.column,
        config.image_shape,
        data.min_crop_scale,
        run.seed,
        regions_column=images.regions_column,
        grid_size=config.grid_size,
    )
    # pixels travel as bytes where the images are bytes, and are normalised on the device
    collator = IJepaDataCollator(config, normalize=False, seed=run.seed, global_batch_size=plan.global_batch_size)
    return crops, BatchMaker(collator)


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
    masks: dict[str, Tensor] = {}
    if evaluation is not None and config.masking_strategy != "regions":
        pixels = first_readable_pixels(evaluation.test, config, data.image_mean, data.image_std, MONITOR_IMAGES)
    else:
        size = min(MONITOR_IMAGES, images.num_images)
        make_batch = BatchMaker(IJepaDataCollator(config, normalize=False, seed=run.seed, global_batch_size=size))
        inputs = images.first_batch(crops, make_batch, size=size, seed=run.seed).inputs
        pixels = normalize(inputs["pixel_values"], data.image_mean, data.image_std)
        if config.masking_strategy == "regions":  # masks come with the images
            masks = {name: inputs[name].to(accelerator.device) for name in ("context_indices", "target_indices")}
    if len(pixels) < 2:
        logger.warning("there is no monitor for signs of collapse: it needs at least 2 images that can be read.")
        return None
    batch = make_monitor_batch(config, pixels.to(accelerator.device), **masks)
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


def _draw_first_masks(batch: Batch, config: IJepaConfig, output_dir: Path) -> None:
    """Draws the first images of the run with their masks: worth a look while it trains."""
    path = output_dir / "figures" / "masks.png"
    path.parent.mkdir(exist_ok=True)
    inputs = batch.inputs
    draw_masks_figure(
        inputs["pixel_values"], inputs["context_indices"], inputs["target_indices"], config.patch_shape, path
    )


def _check_ranks_agree(accelerator: Accelerator, start_step: int, revision: str | None) -> None:
    found = set(gather_object([(start_step, revision)]))
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


def _announce(
    accelerator: Accelerator,
    model: IJepaForPretraining,
    images: TrainingImages,
    run: PretrainingArguments,
    plan: Plan,
    start_step: int,
) -> None:
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    print("***** Running training *****")
    shards = f", streamed from {len(images.shard_lengths)} shards" if images.stream is not None else ""
    print(f"  images                  {images.num_images}{shards}")
    print(f"  epochs, steps           {plan.num_steps / plan.steps_per_epoch:.4g}, {plan.num_steps}")
    print(
        f"  global batch            {plan.global_batch_size} = {run.per_device_train_batch_size} x "
        f"{run.gradient_accumulation_steps} micro-batches x {accelerator.num_processes} processes"
    )
    print(f"  trained parameters      {trained:,}")
    print(f"  device, precision       {accelerator.device}, {run.mixed_precision}")
    _announce_masks(model.config)
    if run.model_name_or_path is not None:
        print(f"  weights from            {run.model_name_or_path}")
    if plan.predictor_warmup_steps:
        print(f"  predictor warm-up       {plan.predictor_warmup_steps} steps with frozen encoders")
    if start_step:
        print(f"  continuing at step      {start_step}")


def _announce_masks(config: IJepaConfig) -> None:
    """Says what the masks of this run are like, and warns where they are hard to fit."""
    settings = config.mask_settings()
    if settings.masking_strategy == "regions":
        print("  masks                   targets are the regions that come with the images")
        return
    trials = [draw_masks(settings, MASK_TRIAL_IMAGES, keyed_generator(step)) for step in range(MASK_TRIALS)]
    redraw_rate = sum(masks.redraw_rate for masks in trials) / MASK_TRIALS
    context = round(sum(masks.context_indices.shape[-1] for masks in trials) / MASK_TRIALS)
    target = round(sum(masks.target_indices.shape[-1] for masks in trials) / MASK_TRIALS)
    rows, columns = config.grid_size
    print(
        f"  masks                   {context} context patches of {rows}x{columns}, {settings.num_targets} targets "
        f"of about {target}, {100 * redraw_rate:.1f} % of images redrawn"
    )
    if redraw_rate > HIGH_REDRAW_RATE and settings.masking_strategy == "multi_block":
        logger.warning(
            "context_keep_ratio=%g leaves little room: %.0f %% of images redraw their targets, which then "
            "overlap more "
            "than they should; a lower --context_keep_ratio or fewer --num_target_blocks gives them room.",
            config.context_keep_ratio,
            100 * redraw_rate,
        )
