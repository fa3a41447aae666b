"""Starts what runs beside the steps: uploads, measurements of features, the comparison with a recipe's band."""

import contextlib
import logging
import signal
from collections.abc import Iterator

from ijepa_hf.data.transforms import normalize
from ijepa_hf.diagnosis.monitor import MONITOR_IMAGES, CollapseMonitor, make_monitor_batch
from ijepa_hf.diagnosis.run_monitor import RunDiagnostics
from ijepa_hf.evaluation.scorecard import first_readable_pixels
from ijepa_hf.hub.uploader import HubUploader, UploadIncompleteError
from ijepa_hf.recipes.expected_band import BandWatch, RunRows, find_band
from ijepa_hf.runs.folder import DIAGNOSTICS_FILE, EVALUATIONS_FILE, METRICS_FILE
from ijepa_hf.runs.rows import read_rows
from ijepa_hf.training.setup import RunSetup
from ijepa_hf.training.signals import StoppedBySignal

CHUNK_OF_BATCHES = 4  # in one forward pass of the monitor: without gradients it takes less memory than a step on one
LAST_UPLOAD_SECONDS = 60.0  # for which a run that stops by itself waits for the upload of its last good state
SIGNALLED_UPLOAD_SECONDS = 15.0  # the same for a run that a signal stops, with half a minute until it is killed

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def uploading(setup: RunSetup, start_step: int) -> Iterator[HubUploader | None]:
    """Uploads beside the block, if the run is pushed; logs which states an early end leaves to be uploaded.

    Args:
        setup: The run.
        start_step: Optimiser steps already done.

    Yields:
        The uploader on the main process of a run that is pushed, else `None`.
    """
    run = setup.run
    if not (run.push_to_hub and setup.is_main):
        yield None
        return
    assert run.hub_model_id is not None  # PretrainingArguments.check
    uploader = HubUploader(
        setup.output_dir, run.hub_model_id, private=run.hub_private_repo, revision=run.hub_revision,
        strategy=run.hub_strategy,
    )  # fmt: skip
    uploader.start(setup.arguments, start_step, replace=run.overwrite_output_dir)
    try:
        yield uploader
    except UploadIncompleteError:
        raise
    except BaseException as error:
        wait = LAST_UPLOAD_SECONDS
        if isinstance(error, StoppedBySignal):
            wait = 0.0 if error.signal_number == signal.SIGINT else SIGNALLED_UPLOAD_SECONDS
        elif isinstance(error, KeyboardInterrupt):
            wait = 0.0
        left = uploader.stop(wait)
        if left is not None:
            logger.warning("%s", left)
        raise


def finish_upload(uploader: HubUploader | None, setup: RunSetup) -> None:
    """Waits until the finished run is on the Hub, if it is pushed, and prints where.

    Args:
        uploader: From `uploading`.
        setup: The run.

    Raises:
        UploadIncompleteError: If the run did not arrive.
    """
    if uploader is not None:
        print(f"\n{uploader.finish(setup.plan.num_steps)}")


def watch_band(setup: RunSetup) -> BandWatch | None:
    """Compares a run with the band of its recipe; begins with the lines that the run logged before it was resumed.

    Args:
        setup: The run.

    Returns:
        The comparison; `None` if the recipe has no band, and on all processes but the main one.
    """
    band = find_band(setup.arguments) if setup.is_main else None
    if band is None:
        return None
    files = (METRICS_FILE, DIAGNOSTICS_FILE, EVALUATIONS_FILE)
    return BandWatch(band, RunRows(setup.arguments, *(read_rows(setup.output_dir / name) for name in files)))


def make_diagnostics(setup: RunSetup) -> RunDiagnostics | None:
    """Chooses the images whose features are measured: held-out ones if a split was named, else training images.

    Args:
        setup: The run.

    Returns:
        The object that measures them. `None` if `diagnostics_steps` is 0; if fewer than 2 images can be read, with a
        warning; and on all processes except the main one.
    """
    config, data, run = setup.config, setup.data, setup.run
    if run.diagnostics_steps == 0 or not setup.is_main:
        return None
    if setup.evaluation is not None:
        pixels = first_readable_pixels(setup.evaluation.test, config, data.image_mean, data.image_std, MONITOR_IMAGES)
    else:
        size = min(MONITOR_IMAGES, setup.images.num_images)
        inputs = setup.images.first_batch(setup.crops, setup.batch_maker(size), size).inputs
        pixels = normalize(inputs["pixel_values"], data.image_mean, data.image_std)
    if len(pixels) < 2:
        logger.warning("there is no monitor for signs of collapse: it needs at least 2 images that can be read.")
        return None
    monitor = CollapseMonitor(
        make_monitor_batch(config, pixels.to(setup.accelerator.device)),
        chunk_size=min(MONITOR_IMAGES, CHUNK_OF_BATCHES * run.per_device_train_batch_size),
    )
    return RunDiagnostics(monitor, setup.output_dir, num_steps=setup.plan.num_steps)
