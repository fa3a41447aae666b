"""Logs a run while it goes on: writes lines of `metrics.jsonl`, and sends them to the screen and the trackers."""

import contextlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm.auto import tqdm

from ijepa_hf.diagnosis.measures import feature_std, rankme
from ijepa_hf.runs.folder import METRICS_FILE
from ijepa_hf.runs.rows import RowFile
from ijepa_hf.training.plan import Plan, StepValues
from ijepa_hf.training.step import StepResult

RANKME_ROWS = 1024  # target patches whose spectrum is logged: an SVD of 1024 x D, tens of milliseconds

logger = logging.getLogger(__name__)


def log_line(row: dict[str, Any]) -> str:
    """Formats a line of `metrics.jsonl` for the screen."""
    return (
        f"step {row['step']} loss {row['loss']:.4f} lr {row['learning_rate']:.3g} decay {row['weight_decay']:.3g} "
        f"momentum {row['ema_momentum']:.5f} grad {row['grad_norm_encoder']:.3g} {row['grad_norm_predictor']:.3g} "
        f"target std {row['target_std']:.3f} rankme {row['target_rankme']:.1f} "
        f"images/s {row['images_per_second']:.0f} waiting {100 * row['data_wait_share']:.0f} %"
    )


def evaluation_line(row: dict[str, Any]) -> str:
    """Formats a line of `evaluations.jsonl` for the screen."""
    when = " (before training)" if row["step"] == 0 else ""
    return f"step {row['step']} kNN {100 * row['knn']:.1f}{when} rankme of pooled features {row['rankme']:.1f}"


class Clock:
    """Measures the time since the last log line, and the part spent waiting for data; saving does not count."""

    def __init__(self) -> None:
        self.steps = 0
        self.waited = 0.0
        self.since = time.perf_counter()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside the block as waiting for data."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Leaves out the time inside the block, which is not training time: saving, scoring."""
        start = time.perf_counter()
        yield
        self.since += time.perf_counter() - start

    def read(self, global_batch_size: int) -> dict[str, float]:
        """Returns seconds of training, images per second and share of waiting since the last reading; starts again.

        Args:
            global_batch_size: Images in a step.

        Returns:
            `seconds`, `images_per_second`, `data_wait_share`.
        """
        seconds = max(time.perf_counter() - self.since, 1e-9)
        values = {
            "seconds": seconds,
            "images_per_second": self.steps * global_batch_size / seconds,
            "data_wait_share": self.waited / seconds,
        }
        self.steps, self.waited, self.since = 0, 0.0, time.perf_counter()
        return values


class MetricsLog:
    """Writes `metrics.jsonl`, shows a progress bar and sends the numbers to the trackers.

    A tracker that fails is dropped with a warning; the run goes on.

    Args:
        accelerator: Starts the trackers, on the main process.
        plan: Length of the run.
        output_dir: The run's folder.
        report_to: Names of the trackers.
        arguments: The run's, for the trackers.
        start_step: Optimiser steps already done.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        plan: Plan,
        output_dir: Path,
        report_to: list[str],
        arguments: dict[str, Any],
        start_step: int = 0,
    ) -> None:
        is_main = accelerator.is_main_process
        self.plan = plan
        self.clock = Clock()
        self.file = RowFile(output_dir / METRICS_FILE)
        self.bar = tqdm(total=plan.num_steps, initial=start_step, unit="step", disable=not is_main, mininterval=1.0)
        self.trackers: list[Any] = []
        if is_main and report_to:
            flat = {
                name: value if isinstance(value, int | float | bool) else str(value)
                for name, value in arguments.items()
            }
            try:
                accelerator.init_trackers("ijepa-hf", flat)
                self.trackers = list(accelerator.trackers)
            except Exception as error:  # as in tell_trackers
                logger.warning("the trackers %s failed to start and are dropped: %s", report_to, error)

    def count_step(self) -> None:
        """Counts a step, for the bar and for images per second."""
        self.bar.update()
        self.clock.steps += 1

    @staticmethod
    def show(text: str) -> None:
        """Prints a line, above the bar if there is one."""
        tqdm.write(text)

    def write(self, step: int, result: StepResult, values: StepValues) -> dict[str, Any]:
        """Writes one line, and those that could not be written before. On the main process only.

        Args:
            step: Optimiser steps done.
            result: Of the last of them.
            values: Values of the schedules at that step.

        Returns:
            The line.

        Raises:
            OSError: If the file cannot be written; the line is kept for the next time.
        """
        rows = result.targets.flatten(0, 2).float()
        rows = rows[:: max(1, len(rows) // RANKME_ROWS)][:RANKME_ROWS]
        line = {
            "step": step,
            "epoch": self.plan.epoch(step),
            "loss": result.loss,
            "learning_rate": values.learning_rate,
            "weight_decay": values.weight_decay,
            "ema_momentum": values.ema_momentum,
            "grad_norm_encoder": result.grad_norm_encoder,
            "grad_norm_predictor": result.grad_norm_predictor,
            "target_std": feature_std(rows),
            "target_rankme": rankme(rows),
            **self.clock.read(self.plan.global_batch_size),
        }
        self.tell_trackers(line, step)
        self.file.append(line)
        self.show(log_line(line))
        self.bar.set_postfix(loss=f"{line['loss']:.4f}", rankme=f"{line['target_rankme']:.1f}", refresh=False)
        return line

    def tell_trackers(self, line: dict[str, Any], step: int) -> None:
        """Sends a line's numbers to the trackers; a tracker that fails is dropped."""
        for tracker in list(self.trackers):
            try:
                tracker.log({name: value for name, value in line.items() if name != "step"}, step=step)
            except Exception as error:  # a tracker is somebody else's code and network; the run matters more
                logger.warning("tracker %s failed at step %d and is dropped: %s", tracker.name, step, error)
                self.trackers.remove(tracker)

    def close(self) -> None:
        """Finishes the trackers and the bar."""
        for tracker in self.trackers:
            try:
                tracker.finish()
            except Exception as error:  # as in tell_trackers
                logger.warning("tracker %s failed to finish: %s", tracker.name, error)
        self.bar.close()
