"""Holds what does not change during a run: arguments, plan, images, processes; starts accelerate, locks the folder."""

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, DistributedType

from ijepa_hf.data.collator import BatchMaker, IJepaDataCollator
from ijepa_hf.data.labelled import LabelledSplits
from ijepa_hf.data.reading import CropReader
from ijepa_hf.model.configuration_ijepa import IJepaConfig
from ijepa_hf.model.sharding import make_fsdp_plugin
from ijepa_hf.recipes.arguments import DataArguments, ModelArguments, PretrainingArguments, argument_values
from ijepa_hf.runs.lock import OutputDirInUseError, RunLock, lock_output_dir
from ijepa_hf.training.images import TrainingImages
from ijepa_hf.training.plan import Plan
from ijepa_hf.training.ranks import Ranks
from ijepa_hf.training.signals import StopSignals

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunSetup:
    """Holds what does not change during a run.

    Args:
        output_dir: The run's folder.
        config: The model's configuration.
        model_arguments: With the configuration's values.
        data: The images' arguments.
        run: The training's arguments.
        plan: Length and schedules.
        images: The images that are trained on.
        evaluation: The labelled images that are scored, if any.
        accelerator: Says device, precision and ranks.
        ranks: The processes.
        signals: Takes the signals that ask the run to stop.
        lock: The folder's, on the main process.
    """

    output_dir: Path
    config: IJepaConfig
    model_arguments: ModelArguments
    data: DataArguments
    run: PretrainingArguments
    plan: Plan
    images: TrainingImages
    evaluation: LabelledSplits | None
    accelerator: Accelerator
    ranks: Ranks
    signals: StopSignals
    lock: RunLock | None = None

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """All arguments as one flat dictionary, as `run.json` and checkpoints keep them.

        Global batch and number of images are among them, because they decide the order of images.
        """
        return {
            **argument_values(self.model_arguments, self.data, self.run),
            "global_batch_size": self.plan.global_batch_size,
            "num_train_images": self.images.num_images,
        }

    @property
    def is_main(self) -> bool:
        """Whether this process writes."""
        return self.accelerator.is_main_process

    @cached_property
    def crops(self) -> CropReader:
        """Decodes rows of the data set and crops them."""
        return CropReader(self.images.column, self.config.image_shape, self.data.min_crop_scale, self.run.seed)

    def batch_maker(self, global_batch_size: int | None = None) -> BatchMaker:
        """Returns the function that makes batches of cropped rows; pixels stay bytes and are normalised on the device.

        Args:
            global_batch_size: Images in an optimiser step; `None` takes the run's.

        Returns:
            A function of rows.
        """
        size = self.plan.global_batch_size if global_batch_size is None else global_batch_size
        return BatchMaker(IJepaDataCollator(self.config, normalize=False, seed=self.run.seed, global_batch_size=size))


def make_accelerator(run: PretrainingArguments, output_dir: Path) -> Accelerator:
    """Starts accelerate: device, precision, processes and trackers of a run.

    Args:
        run: Says precision and trackers.
        output_dir: The run's folder, for trackers that write files.

    Returns:
        The accelerator. Warns where FSDP was configured and there is no GPU.

    Raises:
        ValueError: If a tracker is not installed.
    """
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
def locked(output_dir: Path, ranks: Ranks) -> Iterator[RunLock | None]:
    """Keeps other runs out of a folder; the main process does so for all.

    Args:
        output_dir: The run's folder.
        ranks: The processes, which all call this.

    Yields:
        The lock on the main process, `None` on others.

    Raises:
        ValueError: If another run is in the folder.
        OSError: If the folder cannot be locked.
    """
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
