"""Holds the state of a run between two steps: its processes agree whether to go on, and its state is saved.

Only `RunState.agree` stops a run, for a signal, failing data or a full disk. So the saved state is always that after a
whole step. Only `RunState.writing` handles failed writes.
"""

import contextlib
import logging
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from threadpoolctl import threadpool_limits
from torch import Tensor

from ijepa_hf.data.loader import DataWorkerError
from ijepa_hf.data.retrying import DataSourceError
from ijepa_hf.diagnosis.run_monitor import RunDiagnostics
from ijepa_hf.evaluation.scorecard import evaluate_encoder
from ijepa_hf.files import SaveError
from ijepa_hf.hub.uploader import HubUploader
from ijepa_hf.model.modeling_ijepa import IJepaForPretraining
from ijepa_hf.model.sharding import whole_model
from ijepa_hf.recipes.expected_band import BandWatch
from ijepa_hf.runs.checkpoints import collect_state, config_fields, find_latest, save_checkpoint
from ijepa_hf.runs.export import export_model, exported_step
from ijepa_hf.runs.folder import EVALUATIONS_FILE, SKIPPED_FILE, UNREADABLE_FILE, check_still_there
from ijepa_hf.runs.lock import OutputDirInUseError
from ijepa_hf.runs.rows import RowFile
from ijepa_hf.training.images import UnreadableLog
from ijepa_hf.training.setup import RunSetup
from ijepa_hf.training.signals import GOES_ON, StoppedBySignal
from ijepa_hf.training.step import NonFiniteLossError, ReadyModel

LAST_SAVE_SECONDS = 3600.0  # for which a finished run with on_save_error=continue goes on trying to write its end
SAVE_AGAIN_SECONDS = 30.0
_FAILED = 1000  # the code of a process that cannot go on; the other codes are numbers of signals

logger = logging.getLogger(__name__)


@dataclass
class RunState:
    """Holds what changes during a run, saves it, and stops the run.

    Args:
        setup: What does not change.
        ready: Model and optimiser.
        last_save: The step at which a save was last tried.
        skipped_in_a_row: Steps skipped since the last good one.
        stream: The readers that the stream has had, as a checkpoint keeps them; `None` for a map-style set.
        uploader: Uploads beside the training, on the main process, if the run is pushed.
        diagnostics: Measures the features, on the main process, if they are measured.
        expected: Compares the run with the band of its recipe, on the main process, if there is one.
        saved: Step and folder of the last checkpoint written since the start or resume, on the main process.
        failure: Why this process cannot go on; `agree` passes it on to all processes.
    """

    setup: RunSetup
    ready: ReadyModel
    last_save: int = 0
    skipped_in_a_row: int = 0
    stream: dict[str, Any] | None = None
    uploader: HubUploader | None = None
    diagnostics: RunDiagnostics | None = None
    expected: BandWatch | None = None
    saved: tuple[int, Path] | None = None
    failure: Exception | None = None

    def __post_init__(self) -> None:
        folder, images = self.setup.output_dir, self.setup.images
        self.evaluations = RowFile(folder / EVALUATIONS_FILE)
        self.skipped = RowFile(folder / SKIPPED_FILE)
        self.unreadable = UnreadableLog(folder / UNREADABLE_FILE, images.num_images, self.setup.data.max_broken_share)

    @property
    def is_main(self) -> bool:
        """Whether this process writes."""
        return self.setup.is_main

    @property
    def model(self) -> IJepaForPretraining:
        """The model that is trained; under FSDP2 this process's part of it."""
        return self.ready.model

    def agree(self, step: int) -> None:
        """Lets all processes go on together, or save and stop together; all call it between two steps.

        Args:
            step: Optimiser steps done.

        Raises:
            StoppedBySignal: If any process was told to stop.
            Exception: The `failure` of any process, on all.
        """
        signals, ranks = self.setup.signals, self.setup.ranks
        code = ranks.highest(signals.received if self.failure is None else _FAILED)
        if code == 0:
            return
        failures: list[Exception] = []
        if code == _FAILED:
            for rank, failure in enumerate(self._gather_failures()):
                if failure is not None:
                    here = "" if rank == ranks.rank else f"process {rank}: "
                    failures.append(failure[0](f"{here}{failure[1]}"))
        saving_failed = any(
            isinstance(failure, SaveError | OutputDirInUseError | NonFiniteLossError) for failure in failures
        )
        if step != self.last_save and not saving_failed:
            self.failure = None
            self.settle_unreadable(step)
            self.save(step)
            # waits too: a launcher ends all processes with the first that ends, also one that still writes
            unsaved = self._gather_failures()[0]
            if unsaved is not None:
                failures.insert(0, unsaved[0](unsaved[1]))
        kept = self.what_is_kept(step)
        where = f"at step {step} of {self.setup.plan.num_steps}"
        if not failures:
            raise StoppedBySignal(code, f"stopped by {signal.Signals(code).name} {where}; {kept}")
        error = failures[0]
        raise _plain_type(error)(f"stopped {where}: {error} {kept[0].upper()}{kept[1:]}")

    def _gather_failures(self) -> list[tuple[type[Exception], str] | None]:
        """Gathers type and message of each process's failure, by rank."""
        return self.setup.ranks.gather(
            None if self.failure is None else (_plain_type(self.failure), str(self.failure))
        )

    def what_is_kept(self, step: int) -> str:
        """Returns the end of a message: which state is saved, and how to continue the run.

        Reads checkpoints only if this step's was not written since the start or resume.
        """
        if not self.is_main:
            return f"{GOES_ON}."
        if self.saved is not None and self.saved[0] == step:
            return f"the state is in {self.saved[1]}; {GOES_ON}."
        try:
            latest = find_latest(self.setup.output_dir)
        except OSError as error:
            return f"the checkpoints cannot be read now ({error})."
        if latest is None:
            return "no checkpoint has been written."
        where = "the state is" if latest.step == step else "the last state that was written is"
        return f"{where} in {latest.path}; {GOES_ON}."

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Catches errors of the block that writes: they end the run at the next `agree`, or are only logged."""
        try:
            yield
        except FloatingPointError as error:  # a weight is not finite: what was saved before is the last good state
            self.failure = NonFiniteLossError(str(error))
        except OSError as error:
            if self.setup.run.on_save_error == "stop":
                self.failure = error if isinstance(error, SaveError) else SaveError(str(error))
            else:
                logger.warning("%s The run goes on (on_save_error=continue) and tries again at the next save.", error)

    def save(self, step: int) -> None:
        """Writes a checkpoint and the two-part folder, and has them uploaded where that was asked for.

        All processes call it. `writing` deals with what cannot be written.
        """
        setup = self.setup
        tensors = collect_state(self.model, self.ready.optimizer, keep=self.is_main)
        self.last_save = step
        if not self.is_main:
            return
        try:
            if setup.lock is not None:
                setup.lock.check()
        except OutputDirInUseError as error:  # never write over another run's states, whatever was asked
            self.failure = error
            return
        with self.writing():
            check_still_there(setup.output_dir)
            path = save_checkpoint(
                setup.output_dir,
                step,
                tensors,
                config=config_fields(setup.config),
                arguments=setup.arguments,
                total_limit=setup.run.checkpoints_total_limit,
                stream=self.stream,
            )
            self.saved = step, path
            self.export(step, tensors.model)
            if self.uploader is not None:
                self.uploader.submit(step)

    def save_at_the_end(self, step: int, metrics: RowFile) -> None:
        """Retries for an hour to write the last state if that has failed; a signal ends the retries, see `agree`.

        Args:
            step: The run's last.
            metrics: The file of the logged lines, some of which may wait to be written.
        """
        if self.setup.run.on_save_error != "continue":
            return
        folder, ranks = self.setup.output_dir, self.setup.ranks
        diagnostics = [] if self.diagnostics is None else [self.diagnostics.file]
        until = time.monotonic() + LAST_SAVE_SECONDS
        while ranks.highest(int(self.is_main and exported_step(folder) != step)):
            if time.monotonic() > until:
                self.failure = SaveError(f"the end of the run could not be written to {folder}.")
            with contextlib.suppress(StoppedBySignal), self.setup.signals.raising():
                time.sleep(SAVE_AGAIN_SECONDS)
            self.agree(step)
            self.save(step)
        for file in (metrics, self.unreadable.file, self.evaluations, self.skipped, *diagnostics):
            with self.writing():
                file.append()

    def export(self, step: int, tensors: dict[str, Tensor]) -> None:
        """Writes the two-part folder, on the main process."""
        data = self.setup.data
        export_model(
            self.model, self.setup.output_dir, step=step, image_mean=data.image_mean, image_std=data.image_std,
            state=tensors, must_exist=True,
        )  # fmt: skip

    def whole_model(self) -> IJepaForPretraining | None:
        """Returns the model with all its weights on the main process, `None` on others; all have to call it."""
        whole = whole_model(self.model, keep=self.is_main)
        return whole if self.is_main else None

    def evaluate(self, model: IJepaForPretraining, step: int) -> dict[str, Any] | None:
        """Scores the target encoder of a step, logs the scores and returns them. On the main process only.

        Returns `None` if the images cannot be read any more, which ends the run at the next `agree`.
        """
        setup = self.setup
        assert setup.evaluation is not None  # parse_arguments
        try:
            with threadpool_limits(setup.run.num_cpu_threads):
                scores = evaluate_encoder(model.target_encoder, setup.evaluation, setup.config, setup.arguments)
        except OSError as error:
            self.failure = error
            return None
        row = {"step": step, "epoch": setup.plan.epoch(step), **scores}
        with self.writing():
            self.evaluations.append(row)
        return row

    def settle_unreadable(self, step: int) -> None:
        """Joins the images that single processes could not read, and writes them down; all have to call it."""
        ranks = self.setup.ranks
        with self.writing():
            self.unreadable.settle(
                lambda found: [image for part in ranks.gather(found) for image in part], step, is_main=self.is_main
            )

    def stop_after_saving(self, step: int, error: Exception) -> NoReturn:
        """Saves and raises; if that save fails, logs why. All processes call it.

        Args:
            step: The step that the weights are of.
            error: The error to raise.
        """
        if step > self.last_save:
            self.save(step)
        self.setup.ranks.wait()
        if self.failure is not None:
            logger.error("%s", self.failure)
        raise error


def _plain_type(error: Exception) -> type[Exception]:
    """Returns the type of an error, or its nearest base class whose constructor takes only a message."""
    plain = (DataSourceError, DataWorkerError, SaveError, OutputDirInUseError, NonFiniteLossError, OSError, ValueError)
    return next(kind for kind in plain if isinstance(error, kind))
