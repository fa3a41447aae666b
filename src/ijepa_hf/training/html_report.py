"""Writes a run as one HTML file that needs nothing else: no scripts, no style sheets or pictures from elsewhere.

The template `run_report.html` escapes all that comes from the run's files. Pictures are PNG in `data:` addresses, and
the page asks browsers to load nothing else. A run that is not finished has fewer sections.
"""

import base64
import json
import tempfile
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from ijepa_hf.diagnosis.verdict import judge_collapse
from ijepa_hf.figures.curves import draw_curves_figure
from ijepa_hf.files import read_json, write_text_atomically
from ijepa_hf.runs.cards import score_rows, verdict
from ijepa_hf.runs.folder import DIAGNOSTICS_FILE, EVALUATIONS_FILE, METRICS_FILE, REPORT_FILE, read_run
from ijepa_hf.runs.rows import read_rows

_PNG = b"\x89PNG\r\n\x1a\n"
_FIGURES = ("masks", "diagnostics", "predictions", "pca", "spectrum")  # files of the run's `figures`
_FITS_A_PHONE = 1200  # pixels; wider pictures are scrolled there


def write_html_report(run: Path, output: Path) -> None:
    """Writes a run as one HTML file.

    Args:
        run: Folder of a run, finished or not.
        output: The file; its folder must exist.

    Raises:
        FileNotFoundError: If the folder holds no run.
        ValueError: If a file of the run is damaged.
    """
    record = read_run(run)
    if record is None:
        raise FileNotFoundError(
            f"html={str(run)!r}: there is no run (no run.json) in it; give the --output_dir of a pretraining."
        )
    report = read_json(run / REPORT_FILE)
    scores = (report or {}).get("scores", [])
    measured, rows = read_rows(run / DIAGNOSTICS_FILE), read_rows(run / METRICS_FILE)
    arguments = record["arguments"]
    pictures = {name: _picture(run / "figures" / f"{name}.png") for name in _FIGURES}
    if rows:  # drawn from the log, so that a run that is under way has them too
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "curves.png"
            draw_curves_figure(rows, path, read_rows(run / EVALUATIONS_FILE), columns=2)  # as wide as a phone can show
            pictures["curves"] = _picture(path)
    template = (resources.files("ijepa_hf.training") / "run_report.html").read_text("utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    page = environment.from_string(template).render(
        name=run.resolve().name,
        state=_state(report, rows, arguments),
        collapse=judge_collapse(measured) if measured else None,
        scores=score_rows(scores) if scores else [],
        num_eval_images=(report or {}).get("num_eval_images"),
        comparison=verdict(scores) if scores else [],
        pictures={"curves": None, **pictures},
        arguments={str(name): json.dumps(value) for name, value in arguments.items() if value is not None},
    )
    write_text_atomically(output, page)


def _state(
    report: Mapping[str, Any] | None, rows: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any]
) -> list[str]:
    """Says in a few words what was trained on what, how far, and how fast."""
    parts = [f"I-JEPA on {arguments.get('dataset_name')}"]
    if report is not None:
        parts.append(f"finished: {report['step']} steps, {report['epochs']:.4g} epochs")
    else:
        logged = f"last logged step {rows[-1]['step']}" if rows else "nothing logged yet"
        parts.append(f"not finished: {logged}")
    if rows:
        parts.append(f"loss {rows[-1]['loss']:.4f}")
    if report is not None:
        parts.append(f"on {report['machine']['device']}")
    return parts


def _picture(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    content = path.read_bytes()
    if not content.startswith(_PNG):
        raise ValueError(f"{path} is no PNG; delete it, or let the run draw it again.")
    width = int.from_bytes(content[16:20], "big")
    return {"data": base64.b64encode(content).decode("ascii"), "is_wide": width > _FITS_A_PHONE}
