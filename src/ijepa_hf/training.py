"""The pretraining loop, on `accelerate`.

`pretrain` reads from top to bottom: check everything that can be wrong, build, restore, then for each optimiser step
draw a global batch, take the step (`training_step`), log, score and save. Schedules, order, crops and masks are pure
functions of the step, so a resumed run needs weights, optimiser state and the step's number (for a stream also who has
read it so far), and gives the bits of an uninterrupted one.
"""

import contextlib
import dataclasses
import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, gather_object
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ijepa_hf.arguments import DataArguments, ModelArguments, PretrainingArguments
from ijepa_hf.checkpointing import (
    Checkpoint,
    config_fields,
    find_latest,
    read_checkpoint,
    restore,
    save_checkpoint,
)
from ijepa_hf.configuration_ijepa import IJepaConfig
from ijepa_hf.data import (
    Batch,
    BatchMaker,
    CropReader,
    IJepaDataCollator,
    global_batch_size,
    keyed_generator,
)
from ijepa_hf.diagnostics import feature_std, rankme
from ijepa_hf.export import export_model, exported_step
from ijepa_hf.image_transforms import normalize
from ijepa_hf.loading import (
    TooManyUnreadableError,
    TrainingImages,
    UnreadableLog,
    close_loader,
    open_training_images,
)
from ijepa_hf.masking import draw_masks
from ijepa_hf.modeling_ijepa import (
    IJepaForPretraining,
    IJepaForPretrainingOutput,
    enable_gradient_checkpointing,
    new_model,
)
from ijepa_hf.report import EvaluationSets, evaluate_encoder, load_evaluation_sets, render_report, write_report
from ijepa_hf.run_folder import (
    EVALUATIONS_FILE,
    METRICS_FILE,
    UNREADABLE_FILE,
    append_rows,
    check_output_dir,
    differing_arguments,
    is_finished,
    prepare_output_dir,
    read_rows,
)
from ijepa_hf.schedules import ema_momentum_at, learning_rate_at, weight_decay_at
from ijepa_hf.streaming import StreamLayout
from ijepa_hf.visualization import draw_masks_figure

MASK_FIGURE_IMAGES = 6
MASK_TRIALS, MASK_TRIAL_IMAGES = 16, 64  # steps, and images in each, drawn to announce what the masks are like
HIGH_REDRAW_RATE = 0.4
RANKME_ROWS = 1024  # target patches whose spectrum is logged: an SVD of 1024 x D, tens of milliseconds

logger = logging.getLogger(__name__)

_DRAW_DROPOUT = 4  # beside the streams of data.py


class NonFiniteLossError(ArithmeticError):
    """Loss or gradient became NaN or infinite; the run stopped before it could spoil the weights."""


# -- the plan --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """How long a run is and what its schedules span, in optimiser steps.

    Args:
        global_batch_size: Images in an optimiser step.
        steps_per_epoch: The last incomplete global batch of an epoch is dropped.
        num_steps: Of the whole run.
        warmup_steps: Of the learning rate.
        schedule_steps: What learning rate and weight decay span (published `int(ipe_scale * steps)`).
        momentum_steps: What the momentum spans (published `ipe_scale * steps`, not cut to whole steps).
        learning_rate: The highest.
    """

    global_batch_size: int
    steps_per_epoch: int
    num_steps: int
    warmup_steps: int
    schedule_steps: int
    momentum_steps: float
    learning_rate: float


def make_plan(run: PretrainingArguments, num_samples: int, num_ranks: int) -> Plan:
    """Works out the plan of a run.

    Args:
        run: The arguments.
        num_samples: Images in the data set.
        num_ranks: Processes.

    Returns:
        The plan.

    Raises:
        ValueError: If the data set is smaller than a global batch, or the warm-up is as long as the run.
    """
    batch = global_batch_size(num_samples, run.per_device_train_batch_size, run.gradient_accumulation_steps, num_ranks)
    per_epoch = num_samples // batch
    num_steps = run.max_train_steps or max(1, math.ceil(per_epoch * run.num_train_epochs))
    warmup = int(run.warmup_epochs * per_epoch)
    if warmup and warmup >= num_steps:
        raise ValueError(
            f"warmup_epochs={run.warmup_epochs:g} are {warmup} steps, but the run has only {num_steps}; use "
            f"--warmup_epochs {num_steps / per_epoch / 10:.2g} or train for longer."
        )
    if run.learning_rate is not None:
        learning_rate = run.learning_rate
    else:
        assert run.base_learning_rate is not None  # PretrainingArguments.check
        learning_rate = run.base_learning_rate * batch / 256
    momentum_steps = run.schedule_scale * num_steps
    return Plan(batch, per_epoch, num_steps, warmup, int(momentum_steps), momentum_steps, learning_rate)


@dataclass(frozen=True)
class StepValues:
    """What the schedules say for one optimiser step."""

    learning_rate: float
    weight_decay: float
    ema_momentum: float


def values_at(step: int, run: PretrainingArguments, plan: Plan) -> StepValues:
    """The schedules at a step.

    Args:
        step: Optimiser steps already done. The published code counts learning rate and weight decay before use, so the
            first step has position 1 there, and momentum position 0.
        run: The arguments.
        plan: The plan.

    Returns:
        Learning rate, weight decay and momentum of the step.
    """
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
        values: Learning rate, weight decay and momentum of this step.
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
    if max_grad_norm is not None:
        accelerator.clip_grad_norm_(prepared.parameters(), max_grad_norm)
    optimizer.step()
    model.update_target_encoder(values.ema_momentum)
    return StepResult(mean, norms[0], norms[1], output.targets)


def _grad_norm(module: nn.Module) -> Tensor:
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)


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
    """
    config = model_arguments.to_config()
    assert run.output_dir is not None  # parse_arguments
    output_dir = Path(run.output_dir)
    if run.num_cpu_threads is not None:
        torch.set_num_threads(run.num_cpu_threads)
    accelerator = _make_accelerator(run, output_dir)
    images = open_training_images(data, config, accelerator.num_processes)
    evaluation = load_evaluation_sets(data, config)
    plan = make_plan(run, images.num_images, accelerator.num_processes)
    arguments = describe_arguments(model_arguments, data, run, plan, images.num_images)
    check_output_dir(output_dir, arguments, run)
    if is_finished(output_dir, run):
        if accelerator.is_main_process:
            print(f"{output_dir} holds this run, finished. Its report:\n")
            print(render_report(output_dir))
        accelerator.end_training()
        return output_dir

    checkpoint = _find_checkpoint(run, output_dir, arguments, plan)
    start_step = 0 if checkpoint is None else checkpoint.step
    layout = StreamLayout(
        start_step,
        accelerator.num_processes,
        data.dataloader_num_workers,
        run.per_device_train_batch_size,
        run.gradient_accumulation_steps,
    )
    layouts = images.layouts_from(None if checkpoint is None else checkpoint.stream, layout)
    model = _make_model(config, model_arguments, run)
    optimizer = make_optimizer(model, run)
    prepared = accelerator.prepare(model)  # the optimiser stays bare: its steps are driven here, once per global batch
    if checkpoint is not None:
        restore(checkpoint, model, optimizer, config_fields(config))
    crops, make_batch = _make_readers(images, config, data, run, plan)
    _check_ranks_agree(accelerator, start_step)
    # data that cannot be used at all are found before anything is written
    first_batch = images.first_batch(crops, make_batch, size=min(MASK_FIGURE_IMAGES, layout.batch_size), seed=run.seed)
    if accelerator.is_main_process:
        prepare_output_dir(output_dir, arguments, run, checkpoint)
        _draw_first_masks(first_batch, config, output_dir)
        _announce(accelerator, model, images, run, plan, start_step)
    accelerator.wait_for_everyone()
    state = _RunState(
        accelerator, model, prepared, optimizer, config, data, run, plan, output_dir, arguments, evaluation,
        stream=images.stream_state(layouts),
        unreadable=UnreadableLog(output_dir / UNREADABLE_FILE, images.num_images, data.max_broken_share),
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
        with threadpool_limits(run.num_cpu_threads):  # scikit-learn's threads too: on small matrices they only compete
            write_report(model, output_dir, evaluation, arguments, step=plan.num_steps)
        print()
        print(render_report(output_dir))
    accelerator.wait_for_everyone()
    accelerator.trackers.clear()  # finished by the log, which a tracker's failure cannot end
    accelerator.end_training()
    return output_dir


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

    def save(self, step: int) -> None:
        """Writes a checkpoint and the two-part folder."""
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
        _evaluate_untrained(state)
    accelerator.wait_for_everyone()
    state.model.train()
    clock = _Clock()
    batches = iter(loader)
    every = run.checkpointing_steps or plan.steps_per_epoch
    progress = tqdm(
        total=plan.num_steps, initial=start_step, unit="step", disable=not accelerator.is_main_process, mininterval=1.0
    )
    with contextlib.closing(progress), contextlib.closing(_MetricsLog(state)) as metrics:
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
            progress.update()
            clock.steps += 1
            is_last = done == plan.num_steps
            is_logged = done == 1 or done % run.logging_steps == 0 or is_last
            # one rank writes, so one rank takes the spectrum of the targets
            if is_logged and accelerator.is_main_process:
                row = metrics.write(done, result, values, clock)
                progress.write(_log_line(row))
                progress.set_postfix(loss=f"{row['loss']:.4f}", rankme=f"{row['target_rankme']:.1f}", refresh=False)
            with clock.stopped():
                if is_logged:
                    _settle_unreadable(state, done)
                if run.eval_steps and (done % run.eval_steps == 0 or is_last):
                    if accelerator.is_main_process:
                        scores = state.evaluate(state.model, done)
                        progress.write(_evaluation_line(scores))
                        metrics.tell_trackers(scores, done)
                    accelerator.wait_for_everyone()
                if done % every == 0 or is_last:
                    state.save(done)


def _settle_unreadable(state: _RunState, step: int) -> None:
    """Brings together what all ranks could not read; where that is too much, saves the run before it stops."""
    num_seen = step * state.plan.global_batch_size
    try:
        state.unreadable.settle(gather_object, step, num_seen, is_main=state.accelerator.is_main_process)
    except TooManyUnreadableError:
        state.save(step)
        raise


def _evaluate_untrained(state: _RunState) -> None:
    """The first line of the scores: the network that the run started from."""
    if not any(row["step"] == 0 for row in read_rows(state.output_dir / EVALUATIONS_FILE)):
        untrained = new_model(state.config, state.run.seed).to(state.accelerator.device)
        tqdm.write(_evaluation_line(state.evaluate(untrained, 0)))


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


def _make_model(
    config: IJepaConfig, model_arguments: ModelArguments, run: PretrainingArguments
) -> IJepaForPretraining:
    model = new_model(config, run.seed)
    if model_arguments.attn_implementation is not None:
        model.set_attn_implementation(model_arguments.attn_implementation)
    if run.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    return model


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
    named = {name: value for part in (model_arguments, data, run) for name, value in dataclasses.asdict(part).items()}
    return {**named, "global_batch_size": plan.global_batch_size, "num_train_images": num_images}


def _draw_first_masks(batch: Batch, config: IJepaConfig, output_dir: Path) -> None:
    """Draws the first images of the run with their masks: worth a look while it trains."""
    path = output_dir / "figures" / "masks.png"
    path.parent.mkdir(exist_ok=True)
    inputs = batch.inputs
    draw_masks_figure(
        inputs["pixel_values"], inputs["context_indices"], inputs["target_indices"], config.patch_shape, path
    )


def _check_ranks_agree(accelerator: Accelerator, start_step: int) -> None:
    steps = accelerator.gather(torch.tensor([start_step], device=accelerator.device)).tolist()
    if len(set(steps)) > 1:
        raise ValueError(
            f"the processes found checkpoints of different steps ({steps}): output_dir must be on a disk that "
            "all share."
        )


def _find_checkpoint(
    run: PretrainingArguments, output_dir: Path, arguments: dict[str, Any], plan: Plan
) -> Checkpoint | None:
    if run.resume_from_checkpoint is None or (run.overwrite_output_dir and run.resume_from_checkpoint == "latest"):
        return None
    if run.resume_from_checkpoint == "latest":
        checkpoint = find_latest(output_dir)
        if checkpoint is None:
            logger.warning("resume_from_checkpoint=latest: %s holds no checkpoint; starting at step 0.", output_dir)
            return None
    else:
        checkpoint = read_checkpoint(Path(run.resume_from_checkpoint))
    if checkpoint.step > plan.num_steps:
        raise ValueError(
            f"resume_from_checkpoint={str(checkpoint.path)!r} is at step {checkpoint.step}, but this run ends at step "
            f"{plan.num_steps}; train for longer, or resume from an earlier checkpoint."
        )
    differing = differing_arguments(checkpoint.arguments, arguments)
    if differing:
        logger.warning("resuming with other arguments than the checkpoint's: %s.", "; ".join(differing))
    return checkpoint


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


# -- the log ---------------------------------------------------------------------------------------------------------


def _log_line(row: dict[str, Any]) -> str:
    return (
        f"step {row['step']} loss {row['loss']:.4f} lr {row['learning_rate']:.3g} decay {row['weight_decay']:.3g} "
        f"momentum {row['ema_momentum']:.5f} grad {row['grad_norm_encoder']:.3g} {row['grad_norm_predictor']:.3g} "
        f"target std {row['target_std']:.3f} rankme {row['target_rankme']:.1f} "
        f"images/s {row['images_per_second']:.0f} waiting {100 * row['data_wait_share']:.0f} %"
    )


def _evaluation_line(row: dict[str, Any]) -> str:
    network = "untrained" if row["step"] == 0 else "trained"
    return f"step {row['step']} kNN {100 * row['knn']:.1f} ({network}) rankme of pooled features {row['rankme']:.1f}"


class _Clock:
    """Time since the last log line: all of it, and the part spent waiting for data; saving does not count."""

    def __init__(self) -> None:
        self.steps = 0
        self.waited = 0.0
        self.since = time.perf_counter()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.since += time.perf_counter() - start

    def read(self, global_batch_size: int) -> dict[str, float]:
        """Images per second and share of time waiting for data since the last reading; starts again."""
        seconds = max(time.perf_counter() - self.since, 1e-9)
        values = {
            "images_per_second": self.steps * global_batch_size / seconds,
            "data_wait_share": self.waited / seconds,
        }
        self.steps, self.waited, self.since = 0, 0.0, time.perf_counter()
        return values


class _MetricsLog:
    """Writes `metrics.jsonl` and tells the trackers; a tracker that fails is dropped with a warning, not the run."""

    def __init__(self, state: _RunState) -> None:
        self.state = state
        self.trackers: list[Any] = []
        if not state.accelerator.is_main_process:
            return
        if state.run.report_to:
            flat = {
                name: value if isinstance(value, int | float | bool) else str(value)
                for name, value in state.arguments.items()
            }
            try:
                state.accelerator.init_trackers("ijepa-hf", flat)
                self.trackers = list(state.accelerator.trackers)
            except Exception as error:  # as in tell_trackers
                logger.warning("the trackers %s failed to start and are dropped: %s", state.run.report_to, error)
        self.file = (state.output_dir / METRICS_FILE).open("a", encoding="utf-8")

    def write(self, step: int, result: StepResult, values: StepValues, clock: _Clock) -> dict[str, Any]:
        """Writes one line; returns it. On the main process only."""
        rows = result.targets.flatten(0, 2).float()
        rows = rows[:: max(1, len(rows) // RANKME_ROWS)][:RANKME_ROWS]
        line = {
            "step": step,
            "epoch": round(step / self.state.plan.steps_per_epoch, 4),
            "loss": result.loss,
            "learning_rate": values.learning_rate,
            "weight_decay": values.weight_decay,
            "ema_momentum": values.ema_momentum,
            "grad_norm_encoder": result.grad_norm_encoder,
            "grad_norm_predictor": result.grad_norm_predictor,
            "target_std": feature_std(rows),
            "target_rankme": rankme(rows),
            **clock.read(self.state.plan.global_batch_size),
        }
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        self.tell_trackers(line, step)
        return line

    def tell_trackers(self, line: dict[str, Any], step: int) -> None:
        """Passes a line's numbers on; a tracker that fails is dropped."""
        for tracker in list(self.trackers):
            try:
                tracker.log({name: value for name, value in line.items() if name != "step"}, step=step)
            except Exception as error:  # a tracker is somebody else's code and network; the run matters more
                logger.warning("tracker %s failed at step %d and is dropped: %s", tracker.name, step, error)
                self.trackers.remove(tracker)

    def close(self) -> None:
        """Closes the file and finishes the trackers."""
        if not self.state.accelerator.is_main_process:
            return
        self.file.close()
        for tracker in self.trackers:
            try:
                tracker.finish()
            except Exception as error:  # as in tell_trackers
                logger.warning("tracker %s failed to finish: %s", tracker.name, error)
