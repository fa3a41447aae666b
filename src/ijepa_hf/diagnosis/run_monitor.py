"""Measures a run while it trains (`diagnostics.jsonl`), judges it (a warning or an early stop) and draws pictures."""

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ijepa_hf.diagnosis.figures import draw_diagnostics_figure, draw_training_figures
from ijepa_hf.diagnosis.monitor import MONITOR_IMAGES, CollapseMonitor
from ijepa_hf.diagnosis.verdict import CollapseVerdict, judge_collapse
from ijepa_hf.model.modeling_ijepa import IJepaForPretraining
from ijepa_hf.runs.folder import DIAGNOSTICS_FILE
from ijepa_hf.runs.rows import RowFile, read_rows

COST_IN_STEPS = 1.3  # the cost of a row, in optimiser steps on as many images; measured, docs/collapse.md
MOST_SHARE = 0.01  # of the time for rows
LEAST_STEPS = 100  # between two rows; also at least the width, as spectra cost more for wider features
MOST_DRAWING_SHARE = 0.02  # of the time for pictures before the end
LEAST_DRAWING_SECONDS = 1.0  # assumed for the first pictures

logger = logging.getLogger(__name__)


class CollapseError(ArithmeticError):
    """Ends a run that was judged to have collapsed, with `on_collapse` set to `stop`."""


def steps_between(global_batch_size: int, hidden_size: int) -> int:
    """Computes the optimiser steps between two rows, so that rows take at most `MOST_SHARE` of the time.

    Args:
        global_batch_size: Images in a step.
        hidden_size: Width D of the encoder.

    Returns:
        At least `LEAST_STEPS` and `hidden_size`.
    """
    by_images = math.ceil(COST_IN_STEPS * MONITOR_IMAGES / global_batch_size / MOST_SHARE)
    return max(LEAST_STEPS, hidden_size, by_images)


def is_due(step: int, every: int, num_steps: int) -> bool:
    """Returns whether a row is due after a step: every `every` steps (0 is never) and after the last."""
    return every > 0 and (step % every == 0 or step == num_steps)


class RunDiagnostics:
    """Takes rows of a run, keeps them in `diagnostics.jsonl` and judges them. On the main process only.

    Args:
        monitor: With the fixed batch.
        output_dir: The run's folder; rows that are there already belong to the run.
        num_steps: Optimiser steps of the run.
    """

    def __init__(self, monitor: CollapseMonitor, output_dir: Path, *, num_steps: int) -> None:
        self.monitor, self.path, self.num_steps = monitor, output_dir / DIAGNOSTICS_FILE, num_steps
        self.file = RowFile(self.path)
        self.rows = read_rows(self.path)
        self.verdict: CollapseVerdict | None = judge_collapse(self.rows) if self.rows else None
        self._kept: float | None = None  # share of the last row's target encoder that is left; None if it did not move
        self._begin, self._drawing = time.monotonic(), 0.0  # seconds

    def note_step(self, ema_momentum: float | None) -> None:
        """Counts an optimiser step.

        Args:
            ema_momentum: Momentum of its moving average; `None` for a step without one.
        """
        if ema_momentum is not None:
            self._kept = ema_momentum * (1.0 if self._kept is None else self._kept)

    def measure(
        self, model: IJepaForPretraining, step: int, epoch: float, tell: Callable[[dict[str, Any], int], None]
    ) -> CollapseVerdict | None:
        """Takes a row and judges all rows. Features that cannot be measured are logged, and the run goes on.

        Args:
            model: The model.
            step: Optimiser steps done.
            epoch: Epochs done.
            tell: Passes the row's numbers on to the trackers.

        Returns:
            The verdict, which is kept in `verdict`; `None` as long as there is no row.
        """
        try:
            numbers = self.monitor.measure(model)
        except (ValueError, RuntimeError) as error:  # features that are no numbers, a decomposition that fails
            logger.warning("step %d could not be measured for signs of collapse: %s", step, error)
            return self.verdict
        row = {
            "step": step,
            "epoch": epoch,
            "progress": step / self.num_steps,
            "ema_expected": None if self._kept is None else 1 - self._kept,
            **numbers,
        }
        self._kept = None
        self.rows.append(row)
        self.verdict = judge_collapse(self.rows)
        tell({name: value for name, value in row.items() if isinstance(value, int | float)}, step)
        self.file.append(row)
        return self.verdict

    def draw(self, model: IJepaForPretraining, *, is_last: bool) -> None:
        """Draws the features, predictions, spectrum and rows of the fixed images into the run's `figures`.

        Before the end it draws only while pictures have taken less than `MOST_DRAWING_SHARE` of the time so far.

        Args:
            model: The model, which is left as it is.
            is_last: Whether the run is at its end.
        """
        begin = time.monotonic()
        spent = max(self._drawing, LEAST_DRAWING_SECONDS)
        if not is_last and spent > MOST_DRAWING_SHARE * (begin - self._begin):
            return
        batch, folder = self.monitor.batch, self.path.parent
        try:
            draw_training_figures(model, batch.pixel_values, batch.views[0], batch.target_indices, folder)
            if self.rows:
                draw_diagnostics_figure({folder.name: self.rows}, folder / "figures" / "diagnostics.png")
        except (ValueError, RuntimeError) as error:  # as in `measure`: a run does not fail over a picture
            logger.warning("no pictures of the features: %s", error)
        self._drawing += time.monotonic() - begin
