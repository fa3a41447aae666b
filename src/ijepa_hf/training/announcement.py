"""Announces a run before its first step: what is trained, on what images, with what masks."""

import logging
from pathlib import Path

from ijepa_hf.data.collator import Batch
from ijepa_hf.figures.masks import draw_masks_figure
from ijepa_hf.files import FIGURE_BYTES, saving
from ijepa_hf.model.configuration_ijepa import IJepaConfig
from ijepa_hf.model.mask_audit import trial_masks
from ijepa_hf.model.modeling_ijepa import IJepaForPretraining
from ijepa_hf.recipes.expected_band import band_notice
from ijepa_hf.training.setup import RunSetup

TRIAL_IMAGES = 64  # in each step whose masks are drawn for the announcement
HIGH_REDRAW_RATE = 0.4

logger = logging.getLogger(__name__)


def announce(setup: RunSetup, model: IJepaForPretraining, start_step: int) -> None:
    """Prints the settings of a run before its first step: model, images, masks, and the band that it is compared with.

    Args:
        setup: The run.
        model: The model.
        start_step: Optimiser steps already done.
    """
    run, plan, images = setup.run, setup.plan, setup.images
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    print("***** Running training *****")
    shards = f", streamed from {len(images.shard_lengths)} shards" if images.stream is not None else ""
    print(f"  images                  {images.num_images}{shards}")
    print(f"  epochs, steps           {plan.num_steps / plan.steps_per_epoch:.4g}, {plan.num_steps}")
    print(
        f"  global batch            {plan.global_batch_size} = {run.per_device_train_batch_size} x "
        f"{run.gradient_accumulation_steps} micro-batches x {setup.ranks.number} processes"
    )
    print(f"  trained parameters      {trained:,}")
    print(f"  device, precision       {setup.accelerator.device}, {run.mixed_precision}")
    _announce_masks(model.config)
    if run.model_name_or_path is not None:
        print(f"  weights from            {run.model_name_or_path}")
    if plan.predictor_warmup_steps:
        print(f"  predictor warm-up       {plan.predictor_warmup_steps} steps with frozen encoders")
    notice = band_notice(setup.arguments, setup.model_arguments.given)
    if notice is not None:
        print(f"  expected band           {notice}")
    if start_step:
        print(f"  continuing at step      {start_step}")


def _announce_masks(config: IJepaConfig) -> None:
    """Prints the sizes of this run's masks, and warns if they are hard to fit."""
    settings = config.mask_settings()
    trials = trial_masks(settings, TRIAL_IMAGES)
    redraw_rate = sum(masks.redraw_rate for masks in trials) / len(trials)
    context = round(sum(masks.context_indices.shape[-1] for masks in trials) / len(trials))
    target = round(sum(masks.target_indices.shape[-1] for masks in trials) / len(trials))
    rows, columns = config.grid_size
    print(
        f"  masks                   {context} context patches of {rows}x{columns}, {settings.num_targets} targets "
        f"of about {target}, {100 * redraw_rate:.1f} % of images redrawn"
    )
    if redraw_rate > HIGH_REDRAW_RATE and settings.masking_strategy == "multi_block":
        logger.warning(
            "context_keep_ratio=%g leaves little room: %.0f %% of images redraw their targets, which then overlap "
            "more than they should; a lower --context_keep_ratio or fewer --num_target_blocks gives them room.",
            config.context_keep_ratio,
            100 * redraw_rate,
        )


def draw_first_masks(batch: Batch, config: IJepaConfig, output_dir: Path) -> None:
    """Draws the first images of the run with their masks, into `figures/masks.png`.

    Args:
        batch: Some of the run's first images.
        config: The model's; says the grid.
        output_dir: The run's folder.

    Raises:
        SaveError: If the picture cannot be written.
    """
    path = output_dir / "figures" / "masks.png"
    inputs = batch.inputs
    with saving(path, FIGURE_BYTES):
        path.parent.mkdir(exist_ok=True)
        draw_masks_figure(
            inputs["pixel_values"], inputs["context_indices"], inputs["target_indices"], config.patch_shape, path
        )
