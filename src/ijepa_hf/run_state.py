"""A run between two steps: all its processes agree whether to go on, and what there is is written down.

`agree` is the only place where a run is stopped by a signal, by data that fail or by a disk that is full, so that what
is saved is the state of a step. What cannot be written is dealt with in one place too, `writing`.
"""

import contextlib
import logging
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from ijepa_hf.arguments import DataArguments, PretrainingArguments
from ijepa_hf.checkpointing import collect_state, config_fields, find_latest, save_checkpoint
from ijepa_hf.configuration_ijepa import IJepaConfig
from ijepa_hf.expected_band import BandWatch
from ijepa_hf.export import export_model, exported_step
from ijepa_hf.files import SaveError
from ijepa_hf.hub import HubUploader
from ijepa_hf.interruption import StoppedBySignal, StopSignals
from ijepa_hf.loading import UnreadableLog
from ijepa_hf.metrics_log import MetricsLog
from ijepa_hf.modeling_ijepa import IJepaForPretraining
from ijepa_hf.optimization import NonFiniteLossError
from ijepa_hf.plan import Plan
from ijepa_hf.ranks import Ranks
from ijepa_hf.report import EvaluationSets, evaluate_encoder
from ijepa_hf.retrying import DataSourceError
from ijepa_hf.run_diagnostics import RunDiagnostics
from ijepa_hf.run_folder import EVALUATIONS_FILE, SKIPPED_FILE, check_still_there
from ijepa_hf.run_lock import OutputDirInUseError, RunLock
from ijepa_hf.run_rows import RowFile
from ijepa_hf.sharding import is_sharded, whole_model
from ijepa_hf.workers import DataWorkerError

LAST_SAVE_SECONDS = 3600.0  # that a finished run with on_save_error=continue goes on trying to write its end
SAVE_AGAIN_SECONDS = 30.0
GOES_ON = "the same command with --resume_from_checkpoint latest goes on"
_FAILED = 1000  # beside the numbers of signals, what a process says that cannot go on

logger = logging.getLogger(__name__)


@dataclass
class RunState:
    """What the loop, the log and the saving share.

    Args:
        lock: Of the folder, on the main process.
        last_save: The step whose state was written last, or tried to be.
        saved: The step and folder of the checkpoint that this life of the run has written last, on the main process.
        failure: Why this process cannot go on; all hear of it in `agree`.
        skipped_in_a_row: Steps that were skipped since the last good one.
        expected: The run beside the band of its recipe, on the main process, if there is one.
    """

    accelerator: Accelerator
    ranks: Ranks
    signals: StopSignals
    lock: RunLock | None
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
    last_save: int
    saved: tuple[int, Path] | None = None
    failure: Exception | None = None
    skipped_in_a_row: int = 0
    expected: BandWatch | None = None

    def __post_init__(self) -> None:
        self.evaluations = RowFile(self.output_dir / EVALUATIONS_FILE)
        self.skipped = RowFile(self.output_dir / SKIPPED_FILE)

    @property
    def is_main(self) -> bool:
        """Whether this process writes."""
        return self.accelerator.is_main_process

    def agree(self, step: int) -> None:
        """Between two steps: all processes go on together, or save and stop together.

        Args:
            step: Optimiser steps done.

        Raises:
            StoppedBySignal: If any process was told to stop.
            Exception: Any process's `failure`, on all.
        """
        code = self.ranks.highest(self.signals.received if self.failure is None else _FAILED)
        if code == 0:
            return
        failures: list[Exception] = []
        if code == _FAILED:
            told = self.ranks.gather(None if self.failure is None else (_plain_type(self.failure), str(self.failure)))
            for rank, failure in enumerate(told):
                if failure is not None:
                    here = "" if rank == self.ranks.rank else f"process {rank}: "
                    failures.append(failure[0](f"{here}{failure[1]}"))
        saving_failed = any(
            isinstance(failure, SaveError | OutputDirInUseError | NonFiniteLossError) for failure in failures
        )
        if step != self.last_save and not saving_failed:
            self.failure = None
            self.settle_unreadable(step)
            self.save(step)
            # waits too: whoever ends first has a launcher end the others, also one that still writes
            told = self.ranks.gather(None if self.failure is None else (_plain_type(self.failure), str(self.failure)))
            failures = [told[0][0](told[0][1]), *failures] if told[0] is not None else failures
        kept = self.what_is_kept(step)
        if not failures:
            name = signal.Signals(code).name
            raise StoppedBySignal(code, f"stopped by {name} at step {step} of {self.plan.num_steps}; {kept}")
        error = failures[0]
        kept = kept[0].upper() + kept[1:]
        raise _plain_type(error)(f"stopped at step {step} of {self.plan.num_steps}: {error} {kept}")

    def what_is_kept(self, step: int) -> str:
        """What a message ends with; reads checkpoints only where this life of the run has not written the step's."""
        if not self.is_main:
            return f"{GOES_ON}."
        if self.saved is not None and self.saved[0] == step:
            return f"the state is in {self.saved[1]}; {GOES_ON}."
        try:
            latest = find_latest(self.output_dir)
        except OSError as error:
            return f"the checkpoints cannot be read now ({error})."
        if latest is None:
            return "no checkpoint has been written."
        where = "the state is" if latest.step == step else "the last state that was written is"
        return f"{where} in {latest.path}; {GOES_ON}."

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Around what writes into the run's folder: a failure ends the run at the next `agree`, or is only said."""
        try:
            yield
        except FloatingPointError as error:  # a weight: what was saved before is all there is
            self.failure = NonFiniteLossError(str(error))
        except OSError as error:
            if self.run.on_save_error == "stop":
                self.failure = error if isinstance(error, SaveError) else SaveError(str(error))
            else:
                logger.warning("%s The run goes on (on_save_error=continue) and tries again at the next save.", error)

    def save(self, step: int) -> None:
        """Writes a checkpoint and the two-part folder, and has them uploaded where that was asked for.

        All processes call it. What cannot be written is dealt with by `writing`.
        """
        tensors = collect_state(self.model, self.optimizer, keep=self.is_main)
        self.last_save = step
        if not self.is_main:
            return
        try:
            if self.lock is not None:
                self.lock.check()
        except OutputDirInUseError as error:  # another run's states are not to be written over, whatever was asked
            self.failure = error
            return
        with self.writing():
            check_still_there(self.output_dir)
            path = save_checkpoint(
                self.output_dir,
                step,
                tensors,
                config=config_fields(self.config),
                arguments=self.arguments,
                total_limit=self.run.checkpoints_total_limit,
                stream=self.stream,
            )
            self.saved = step, path
            self.export(step, tensors.model)
            if self.uploader is not None:
                self.uploader.submit(step)

    def save_at_the_end(self, step: int, metrics: MetricsLog) -> None:
        """Where the last state could not be written, goes on trying for an hour; a signal ends that, see `agree`."""
        if self.run.on_save_error != "continue":
            return
        diagnostics = [] if self.diagnostics is None else [self.diagnostics.file]
        until = time.monotonic() + LAST_SAVE_SECONDS
        while self.ranks.highest(int(self.is_main and exported_step(self.output_dir) != step)):
            if time.monotonic() > until:
                self.failure = SaveError(f"the end of the run could not be written to {self.output_dir}.")
            with contextlib.suppress(StoppedBySignal), self.signals.raising():
                time.sleep(SAVE_AGAIN_SECONDS)
            self.agree(step)
            self.save(step)
        for file in (metrics.file, self.unreadable.file, self.evaluations, self.skipped, *diagnostics):
            with self.writing():
                file.append()

    def export(self, step: int, tensors: dict[str, Tensor]) -> None:
        """Writes the two-part folder, on the main process."""
        mean, std = self.data.image_mean, self.data.image_std
        export_model(
            self.model, self.output_dir, step=step, image_mean=mean, image_std=std, state=tensors, must_exist=True
        )

    def whole_model(self) -> IJepaForPretraining | None:
        """The model with all its weights on the main process, `None` on others; all have to call it."""
        if not is_sharded(self.model):
            return self.model if self.is_main else None
        return whole_model(self.model, keep=self.is_main)

    def evaluate(self, model: IJepaForPretraining, step: int) -> dict[str, Any] | None:
        """Scores a target encoder as that of a step, writes it down and returns the line. On the main process only.

        `None` where the images cannot be read any more, which ends the run at the next `agree`.
        """
        assert self.evaluation is not None  # parse_arguments
        try:
            with threadpool_limits(self.run.num_cpu_threads):
                scores = evaluate_encoder(model.target_encoder, self.evaluation, self.config, self.arguments)
        except OSError as error:
            self.failure = error
            return None
        row = {"step": step, "epoch": round(step / self.plan.steps_per_epoch, 4), **scores}
        with self.writing():
            self.evaluations.append(row)
        return row

    def settle_unreadable(self, step: int) -> None:
        """Brings together what all processes could not read, and writes it down; all have to call it."""
        with self.writing():
            self.unreadable.settle(
                lambda found: [image for part in self.ranks.gather(found) for image in part],
                step,
                is_main=self.is_main,
            )

    def stop_after_saving(self, step: int, error: Exception) -> NoReturn:
        """Saves and raises; what cannot be saved is said beside the error. All processes call it.

        Args:
            step: Whose state the weights are.
            error: Raised.
        """
        if step > self.last_save:
            self.save(step)
        self.ranks.wait()
        if self.failure is not None:
            logger.error("%s", self.failure)
        raise error


def _plain_type(error: Exception) -> type[Exception]:
    """The type of an error, or the nearest above it that is made of a message alone."""
    plain = (DataSourceError, DataWorkerError, SaveError, OutputDirInUseError, NonFiniteLossError, OSError, ValueError)
    return next(kind for kind in plain if isinstance(error, kind))
