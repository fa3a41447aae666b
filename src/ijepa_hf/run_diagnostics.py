"""Measures, judges and draws a run while it goes on: `diagnostics.jsonl`, a warning or an early end, pictures."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ijepa_hf.collapse_monitor import MONITOR_IMAGES, CollapseMonitor
from ijepa_hf.collapse_verdict import CollapseVerdict, judge_collapse
from ijepa_hf.diagnostics_figure import draw_diagnostics_figure
from ijepa_hf.feature_figures import draw_training_figures
from ijepa_hf.modeling_ijepa import IJepaForPretraining
from ijepa_hf.run_folder import DIAGNOSTICS_FILE, append_rows, read_rows

COST_IN_STEPS = 1.2  # what a row costs, in optimiser steps on as many images; measured, docs/collapse.md
MOST_SHARE = 0.01  # of the time, that goes into rows
LEAST_STEPS = 100  # between two rows; their spectra cost the same whatever the batch
MOST_DRAWING_SHARE = 0.02  # of the time, that goes into pictures before the end
LEAST_DRAWING_SECONDS = 1.0  # that the first pictures are taken to need


class CollapseError(ArithmeticError):
    """The run was judged to have collapsed, and `on_collapse` is `stop`."""


def steps_between(global_batch_size: int) -> int:
    """Optimiser steps between two rows, so that rows take at most `MOST_SHARE` of the time.

    Args:
        global_batch_size: Images in a step.

    Returns:
        At least `LEAST_STEPS`.
    """
    return max(LEAST_STEPS, math.ceil(COST_IN_STEPS * MONITOR_IMAGES / global_batch_size / MOST_SHARE))


def is_due(step: int, diagnostics_steps: int | None, global_batch_size: int, num_steps: int) -> bool:
    """Whether a row is to be taken.

    Args:
        step: Optimiser steps done.
        diagnostics_steps: As the run's argument: 0 is off, `None` leaves it to `steps_between`.
        global_batch_size: Images in a step.
        num_steps: Of the run.

    Returns:
        The answer; yes for the first and the last step, unless rows are off.
    """
    if diagnostics_steps == 0:
        return False
    return step % (diagnostics_steps or steps_between(global_batch_size)) == 0 or step == num_steps


class RunDiagnostics:
    """Takes rows of a run, keeps them in `diagnostics.jsonl` and judges them. On the main process only.

    Args:
        monitor: With the fixed batch.
        output_dir: The run's folder; rows that are there already belong to the run.
        num_steps: Of the run.
    """

    def __init__(self, monitor: CollapseMonitor, output_dir: Path, *, num_steps: int) -> None:
        self.monitor, self.path, self.num_steps = monitor, output_dir / DIAGNOSTICS_FILE, num_steps
        self.rows = read_rows(self.path)
        self.verdict: CollapseVerdict | None = judge_collapse(self.rows) if self.rows else None
        self._kept = 1.0  # of the target encoder as it was at the last row
        self._begin, self._drawing = time.monotonic(), 0.0  # seconds

    def note_step(self, ema_momentum: float | None) -> None:
        """Counts an optimiser step.

        Args:
            ema_momentum: Of its moving average; `None` where there was none.
        """
        if ema_momentum is not None:
            self._kept *= ema_momentum

    def measure(
        self, model: IJepaForPretraining, step: int, epoch: float, tell: Callable[[dict[str, Any], int], None]
    ) -> CollapseVerdict:
        """Takes a row and judges all there are.

        Args:
            model: The model.
            step: Optimiser steps done.
            epoch: Epochs done.
            tell: Passes the row's numbers on to the trackers.

        Returns:
            The verdict, which is kept in `verdict`.
        """
        row = {
            "step": step,
            "epoch": epoch,
            "progress": step / self.num_steps,
            "ema_expected": 1 - self._kept,
            **self.monitor.measure(model),
        }
        self._kept = 1.0
        self.rows.append(row)
        append_rows(self.path, [row])
        tell({name: value for name, value in row.items() if value is not None}, step)
        self.verdict = judge_collapse(self.rows)
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
        draw_training_figures(model, batch.pixel_values, batch.views[0], batch.target_indices, folder)
        if self.rows:
            draw_diagnostics_figure({folder.name: self.rows}, folder / "figures" / "diagnostics.png")
        self._drawing += time.monotonic() - begin
