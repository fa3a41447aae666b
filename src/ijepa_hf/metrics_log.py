"""What a run says while it goes on: the lines of `metrics.jsonl`, the same on the screen and to the trackers."""

import contextlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from ijepa_hf.diagnostics import feature_std, rankme
from ijepa_hf.plan import Plan, StepValues
from ijepa_hf.run_folder import METRICS_FILE
from ijepa_hf.run_rows import RowFile

RANKME_ROWS = 1024  # target patches whose spectrum is logged: an SVD of 1024 x D, tens of milliseconds

logger = logging.getLogger(__name__)


def log_line(row: dict[str, Any]) -> str:
    """A line of `metrics.jsonl` as it stands on the screen."""
    return (
        f"step {row['step']} loss {row['loss']:.4f} lr {row['learning_rate']:.3g} decay {row['weight_decay']:.3g} "
        f"momentum {row['ema_momentum']:.5f} grad {row['grad_norm_encoder']:.3g} {row['grad_norm_predictor']:.3g} "
        f"target std {row['target_std']:.3f} rankme {row['target_rankme']:.1f} "
        f"images/s {row['images_per_second']:.0f} waiting {100 * row['data_wait_share']:.0f} %"
    )


def evaluation_line(row: dict[str, Any]) -> str:
    """A line of `evaluations.jsonl` as it stands on the screen."""
    when = " (before training)" if row["step"] == 0 else ""
    return f"step {row['step']} kNN {100 * row['knn']:.1f}{when} rankme of pooled features {row['rankme']:.1f}"


class Clock:
    """Time since the last log line: all of it, and the part spent waiting for data; saving does not count."""

    def __init__(self) -> None:
        self.steps = 0
        self.waited = 0.0
        self.since = time.perf_counter()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what waits for data."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Around what is no training: saving, scoring."""
        start = time.perf_counter()
        yield
        self.since += time.perf_counter() - start

    def read(self, global_batch_size: int) -> dict[str, float]:
        """Seconds of training, images per second and share of waiting for data since the last reading; starts again.

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
    """Writes `metrics.jsonl` and tells the trackers; a tracker that fails is dropped with a warning, not the run."""

    def __init__(
        self, accelerator: Accelerator, plan: Plan, output_dir: Path, report_to: list[str], arguments: dict[str, Any]
    ) -> None:
        self.is_main = accelerator.is_main_process
        self.plan = plan
        self.file = RowFile(output_dir / METRICS_FILE)
        self.trackers: list[Any] = []
        if not self.is_main:
            return
        if report_to:
            flat = {
                name: value if isinstance(value, int | float | bool) else str(value)
                for name, value in arguments.items()
            }
            try:
                accelerator.init_trackers("ijepa-hf", flat)
                self.trackers = list(accelerator.trackers)
            except Exception as error:  # as in tell_trackers
                logger.warning("the trackers %s failed to start and are dropped: %s", report_to, error)

    def write(
        self, step: int, *, loss: float, grad_norms: tuple[float, float], targets: Tensor, values: StepValues,
        clock: Clock,
    ) -> dict[str, Any]:  # fmt: skip
        """Writes one line, and those that could not be written before. On the main process only.

        Args:
            step: Optimiser steps done.
            loss: Mean over the global batch.
            grad_norms: Of the context encoder and of the predictor, before clipping.
            targets: `[B, M, P, D]` of this process.
            values: What the schedules said.
            clock: Read and started again.

        Returns:
            The line.

        Raises:
            OSError: If the file cannot be written; the line is kept for the next time.
        """
        rows = targets.flatten(0, 2).float()
        rows = rows[:: max(1, len(rows) // RANKME_ROWS)][:RANKME_ROWS]
        line = {
            "step": step,
            "epoch": round(step / self.plan.steps_per_epoch, 4),
            "loss": loss,
            "learning_rate": values.learning_rate,
            "weight_decay": values.weight_decay,
            "ema_momentum": values.ema_momentum,
            "grad_norm_encoder": grad_norms[0],
            "grad_norm_predictor": grad_norms[1],
            "target_std": feature_std(rows),
            "target_rankme": rankme(rows),
            **clock.read(self.plan.global_batch_size),
        }
        self.tell_trackers(line, step)
        self.file.append(line)
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
        """Finishes the trackers."""
        for tracker in self.trackers:
            try:
                tracker.finish()
            except Exception as error:  # as in tell_trackers
                logger.warning("tracker %s failed to finish: %s", tracker.name, error)
