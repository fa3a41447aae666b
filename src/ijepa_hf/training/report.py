"""Writes the report of a finished run: scores, figures, `report.json`, the card's files, and the text on the screen.

There are scores if the data have labels and a held-out split (`eval_split_name`); see `evaluation/scorecard`.
"""

import json
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from huggingface_hub.constants import REPOCARD_NAME
from threadpoolctl import threadpool_limits
from torch import nn

from ijepa_hf import __version__
from ijepa_hf.diagnosis.verdict import judge_collapse
from ijepa_hf.escaping import on_one_line, text_table
from ijepa_hf.evaluation.scorecard import score_encoder
from ijepa_hf.figures.curves import draw_curves_figure
from ijepa_hf.files import FIGURE_BYTES, saving, write_json_atomically, write_text_atomically
from ijepa_hf.model.modeling_ijepa import IJepaForPretraining
from ijepa_hf.recipes.expected_band import BandWatch, RunRows, find_band
from ijepa_hf.runs.cards import loading_lines, render_eval_results, render_run_card, score_rows, verdict
from ijepa_hf.runs.folder import (
    DIAGNOSTICS_FILE,
    EVAL_RESULTS_FOLDER,
    EVALUATIONS_FILE,
    METRICS_FILE,
    REPORT_FILE,
    SKIPPED_FILE,
    UNREADABLE_FILE,
)
from ijepa_hf.runs.rows import read_rows
from ijepa_hf.training.setup import RunSetup


def write_report(setup: RunSetup, model: IJepaForPretraining, starting_encoder: nn.Module | None) -> None:
    """Scores the target encoder, draws the curves, writes `report.json`, the model card and `.eval_results`.

    Args:
        setup: The run, whose last step is done.
        model: The trained model.
        starting_encoder: The encoder before the first step, where it was a trained one.

    Raises:
        SaveError: If something cannot be written.
        DataSourceError: If the labelled images cannot be read any more.
    """
    output_dir, arguments, evaluation, step = setup.output_dir, setup.arguments, setup.evaluation, setup.plan.num_steps
    rows, evaluations = read_rows(output_dir / METRICS_FILE), read_rows(output_dir / EVALUATIONS_FILE)
    diagnostics = read_rows(output_dir / DIAGNOSTICS_FILE)
    scores = []
    if evaluation is not None:
        mean, std = setup.data.image_mean, setup.data.image_std
        with threadpool_limits(setup.run.num_cpu_threads):  # scikit-learn's too: on small matrices they only compete
            scores = score_encoder(model, evaluation, mean, std, setup.run.seed, starting_encoder=starting_encoder)
    band = find_band(arguments)
    watch = None if band is None else BandWatch(band, RunRows(arguments, rows, diagnostics, evaluations))
    report = {
        "step": step,
        "epochs": step * arguments["global_batch_size"] / arguments["num_train_images"],
        "parameters_encoder": sum(parameter.numel() for parameter in model.target_encoder.parameters()),
        "log": _summarise(rows) if rows else None,
        "evaluations": evaluations,
        "collapse_verdict": judge_collapse(diagnostics).as_dict() if diagnostics else None,
        "expected_band": None if watch is None else watch.as_dict(),
        "num_unreadable_images": len(read_rows(output_dir / UNREADABLE_FILE)),
        "num_skipped_steps": len(read_rows(output_dir / SKIPPED_FILE)),
        "scores": scores,
        "num_eval_images": 0 if evaluation is None else len(evaluation.test),
        "machine": describe_machine(setup.accelerator.device, setup.ranks.number),
        "hub_dataset": _on_the_hub(arguments["dataset_name"]),
        "hub_base_model": _on_the_hub(arguments["model_name_or_path"]),
        "arguments": arguments,
    }
    card = render_run_card(report, model.config)
    with saving(output_dir, FIGURE_BYTES):
        (output_dir / "figures").mkdir(exist_ok=True)
        if rows:  # a log can be lost (a checkpoint that was moved); that must not keep the run from ending
            draw_curves_figure(rows, output_dir / "figures" / "curves.png", evaluations, expected=watch)
        for name, entries in render_eval_results(report).items():
            path = output_dir / EVAL_RESULTS_FOLDER / name
            path.parent.mkdir(exist_ok=True)
            write_text_atomically(path, entries)
        write_text_atomically(output_dir / REPOCARD_NAME, card)
        write_json_atomically(output_dir / REPORT_FILE, report)  # last: it says "finished"


def describe_machine(device: torch.device, num_processes: int) -> dict[str, Any]:
    """Describes the machine and the versions of a run, for its report and card.

    Args:
        device: Of this process.
        num_processes: Of the run.

    Returns:
        `device` in words, `processes`, and the versions of torch, transformers and this package.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        threads = torch.get_num_threads()
        name = f"a CPU ({_cpu_name()}), {threads} thread{'s' if threads > 1 else ''}"
    return {
        "device": name,
        "processes": num_processes,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "ijepa_hf": __version__,
    }


def _cpu_name() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text("utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    return platform.machine()


def _on_the_hub(name: str | None) -> str | None:
    """Returns the name if it is a repository on the Hub; `None` for a built-in set or a path on this machine."""
    return name if name is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists() else None


def _summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "first_step": rows[0]["step"],
        "loss_first": rows[0]["loss"],
        "loss_last": rows[-1]["loss"],
        "target_rankme_first": rows[0]["target_rankme"],
        "target_rankme_last": rows[-1]["target_rankme"],
        "target_std_first": rows[0]["target_std"],
        "target_std_last": rows[-1]["target_std"],
        "seconds": sum(row["seconds"] for row in rows) if all("seconds" in row for row in rows) else None,
        "images_per_second": float(np.median([row["images_per_second"] for row in rows])),
        "data_wait_share": float(np.median([row["data_wait_share"] for row in rows])),
    }


# -- text ------------------------------------------------------------------------------------------------------------


def render_report(output_dir: Path) -> str:
    """Renders the report of a finished run, as it is printed at the end.

    Args:
        output_dir: The run's folder.

    Returns:
        Several lines of plain text.

    Raises:
        FileNotFoundError: If the run is not finished.
    """
    report = json.loads((output_dir / REPORT_FILE).read_text("utf-8"))
    lines = [f"steps {report['step']} ({report['epochs']:.4g} epochs)"]
    log = report["log"]
    if log is None:
        lines.append("the log of this run was lost")
    else:
        lines[0] += f", {log['images_per_second']:.0f} images/s"
        lines.append(
            f"loss {log['loss_first']:.4f} at step {log['first_step']}, {log['loss_last']:.4f} at the last; "
            f"RankMe of the targets {log['target_rankme_last']:.1f}; "
            f"{100 * log['data_wait_share']:.0f} % of the time went into waiting for images"
        )
    if report.get("collapse_verdict"):  # runs of earlier versions have none
        found = report["collapse_verdict"]
        lines.append(" ".join([f"verdict: {found['name']}:", found["reason"], found["advice"]]).strip())
    if report.get("expected_band"):  # runs of earlier versions have none
        lines.append(report["expected_band"]["verdict"])
    if report["num_unreadable_images"]:
        lines.append(
            f"{report['num_unreadable_images']} images could not be read and were skipped; "
            f"{output_dir / UNREADABLE_FILE} lists them"
        )
    if report.get("num_skipped_steps"):  # reports of earlier versions have none
        lines.append(
            f"{report['num_skipped_steps']} steps were skipped because loss or gradient was not finite; "
            f"{output_dir / SKIPPED_FILE} lists them"
        )
    if report["scores"]:
        lines += ["", f"top-1 on {report['num_eval_images']} held-out images, mean-pooled features", ""]
        lines += text_table(score_rows(report["scores"]))
        lines += ["", *verdict(report["scores"])]
    figures = ", ".join(on_one_line(path) for path in sorted((output_dir / "figures").glob("*.png")))
    lines += [
        "",
        f"pictures: {figures}",
        "",
        "load it with:",
        "",
        *(f"    {line}" for line in loading_lines(str(output_dir))),
    ]
    return "\n".join(lines)
