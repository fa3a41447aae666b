"""Writes the results of a finished fine-tuning: numbers, curves, model card and the text on the screen."""

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import binomtest

from ijepa_hf.data.labelled import LabelledSplits
from ijepa_hf.runs.cards import classifier_summary, license_note, loading_lines
from ijepa_hf.runs.folder import FINETUNING_FILE


def finetuning_result(
    state: Any,
    splits: LabelledSplits,
    values: Mapping[str, Any],
    wrong_images: np.ndarray,
    *,
    seconds: float,
    resumed_from: Path | None,
) -> dict[str, Any]:
    """Gathers the numbers of a fine-tuning out of what `Trainer` has logged.

    Args:
        state: `Trainer.state` after the last step, with at least one evaluation.
        splits: The images.
        values: The arguments, as they were asked for.
        wrong_images: Numbers of the held-out images that the last epoch's model gets wrong, ascending.
        seconds: Time of the training.
        resumed_from: The checkpoint, if any.

    Returns:
        The contents of `finetune.json`, without the model's licence and commit.
    """
    history = state.log_history
    evaluations = [
        {"epoch": row["epoch"], "step": row["step"], "accuracy": row["eval_accuracy"], "loss": row["eval_loss"]}
        for row in history
        if "eval_accuracy" in row
    ]
    num_correct = round(evaluations[-1]["accuracy"] * len(splits.test))
    # of the images alone, not of other seeds or other draws of labels
    interval = binomtest(num_correct, len(splits.test)).proportion_ci(0.95, method="wilson")
    return {
        "accuracy": num_correct / len(splits.test),
        "accuracy_interval": [float(interval.low), float(interval.high)],
        "num_correct": num_correct,
        "num_eval_images": len(splits.test),
        "wrong_images": wrong_images.tolist(),
        "num_train_images": len(splits.train),
        "classes": splits.names,
        "steps": state.global_step,
        "seconds": seconds,
        "resumed_from": None if resumed_from is None else resumed_from.name,
        "evaluations": evaluations,
        "losses": [{"step": row["step"], "loss": row["loss"]} for row in history if "loss" in row],
        "transformers": version("transformers"),
        "arguments": dict(values),
    }


def draw_finetuning_curves(result: Mapping[str, Any], path: Path) -> None:
    """Draws the training loss and the held-out accuracy over the optimiser steps.

    Args:
        result: As in `finetune.json`.
        path: PNG to write; its folder must exist.
    """
    figure = Figure(figsize=(7, 2.8), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2)
    scores = [(row["step"], 100 * row["accuracy"]) for row in result["evaluations"]]
    losses = [(row["step"], row["loss"]) for row in result["losses"]]
    for axis, points, title, unit in (
        (left, losses, "Training loss", "cross-entropy"),
        (right, scores, "Held-out accuracy", "top-1 in percent"),
    ):
        axis.plot(*zip(*points, strict=True), color="#0072B2", linewidth=1.4, marker="o" if len(points) < 2 else None)
        axis.set_title(title, fontsize=10, loc="left", fontweight="bold", color="#222222")
        axis.set_ylabel(unit, fontsize=8, color="#555555")
        axis.set_xlabel("optimiser step", fontsize=8, color="#555555")
        axis.grid(color="#DDDDDD", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8, colors="#555555")
    figure.savefig(path, dpi=150)


def render_finetuning(output_dir: Path) -> str:
    """Renders the text that is printed at the end of a fine-tuning.

    Args:
        output_dir: The folder.

    Returns:
        Several lines of plain text.
    """
    result = json.loads((output_dir / FINETUNING_FILE).read_text("utf-8"))
    return "\n".join(
        [
            classifier_summary(result),
            f"the last epoch's, after {result['steps']} steps; nothing was chosen on these images",
            *([f"licence: {license_note(result)}"] if license_note(result) else []),
            "",
            f"pictures: {output_dir / 'figures' / 'curves.png'}",
            "",
            "load it with:",
            "",
            *(f"    {line}" for line in loading_lines(str(output_dir), classifier=True)),
        ]
    )
