"""Measures, judges and draws a run while it goes on: `diagnostics.jsonl`, a warning or an early end, pictures."""

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

COST_IN_STEPS = 1.3  # what a row costs, in optimiser steps on as many images; measured, docs/collapse.md
MOST_SHARE = 0.01  # of the time, that goes into rows
LEAST_STEPS = 100  # between two rows, and as many as the width: spectra cost the more, the wider the features are
MOST_DRAWING_SHARE = 0.02  # of the time, that goes into pictures before the end
LEAST_DRAWING_SECONDS = 1.0  # that the first pictures are taken to need

logger = logging.getLogger(__name__)


class CollapseError(ArithmeticError):
    """The run was judged to have collapsed, and `on_collapse` is `stop`."""


def steps_between(global_batch_size: int, hidden_size: int) -> int:
    """Optimiser steps between two rows, so that rows take at most `MOST_SHARE` of the time.

    Args:
        global_batch_size: Images in a step.
        hidden_size: Width D of the encoder.

    Returns:
        At least `LEAST_STEPS` and `hidden_size`.
    """
    by_images = math.ceil(COST_IN_STEPS * MONITOR_IMAGES / global_batch_size / MOST_SHARE)
    return max(LEAST_STEPS, hidden_size, by_images)


def is_due(step: int, every: int, num_steps: int) -> bool:
    """Whether a row is to be taken.

    Args:
        step: Optimiser steps done.
        every: Steps between two rows; 0 is off.
        num_steps: Of the run.

    Returns:
        The answer; yes for the first and the last step, unless rows are off.
    """
    return every > 0 and (step % every == 0 or step == num_steps)


class RunDiagnostics:
    """Takes rows of a run, keeps them in `diagnostics.jsonl` and judges them. On the main process only.

    Args:
        monitor: With the fixed batch.
        output_dir: The run's folder; rows that are there already belong to the run.
        num_steps: Of the run.
    """

    def __init__(self, monitor: CollapseMonitor, output_dir: Path, *, num_steps: int) -> None:
        self.monitor, self.path, self.num_steps = monitor, output_dir / DIAGNOSTICS_FILE, num_steps
        self.file = RowFile(self.path)
        self.rows = read_rows(self.path)
        self.verdict: CollapseVerdict | None = judge_collapse(self.rows) if self.rows else None
        self._kept: float | None = None  # of the target encoder as it was at the last row, once it was moved
        self._begin, self._drawing = time.monotonic(), 0.0  # seconds

    def note_step(self, ema_momentum: float | None) -> None:
        """Counts an optimiser step.

        Args:
            ema_momentum: Of its moving average; `None` where there was none.
        """
        if ema_momentum is not None:
            self._kept = ema_momentum * (1.0 if self._kept is None else self._kept)

    def measure(
        self, model: IJepaForPretraining, step: int, epoch: float, tell: Callable[[dict[str, Any], int], None]
    ) -> CollapseVerdict | None:
        """Takes a row and judges all there are. Features that cannot be measured are logged, and the run goes on.

        Args:
            model: The model.
            step: Optimiser steps done.
            epoch: Epochs done.
            tell: Passes the row's numbers on to the trackers.

        Returns:
            The verdict, which is kept in `verdict`; `None` where there is no row to judge.
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

        Before the end only where pictures have taken less than `MOST_DRAWING_SHARE` of the time so far, which a long
        run can afford at each checkpoint and a short one cannot.

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
        except (ValueError, RuntimeError) as error:  # as in `measure`: a picture is not worth a run
            logger.warning("no pictures of the features: %s", error)
        self._drawing += time.monotonic() - begin
