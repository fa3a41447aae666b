"""Measures, fits and draws how time and memory of a step grow with batch, image size, depth and width.

    python benchmarks/scaling.py --output benchmarks/results/scaling.json --figure docs/figures/scaling.png

One of the four changes, the others stay: batch 16, 64x64 images in 4x4 patches, 6 layers of width 192. Steps of all
sizes of a group take turns on one thread, by the process's own clock. Time and memory (live tensors at the
peak, which a run repeats exactly) are fitted by terms that are not negative: a constant, one that grows with x and one
that grows with x squared.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.optimize import nnls
from side_by_side import take_turns
from step_rows import held_by, make_training, peak_mib

BASE = {"image_size": 64, "num_hidden_layers": 6, "hidden_size": 192, "num_attention_heads": 3}
BATCH = 16
# what changes: its values, and what of it the fit grows with
GROUPS: dict[str, list[int]] = {
    "batch": [4, 8, 16, 32, 64],
    "image_size": [32, 48, 64, 96, 128],
    "num_hidden_layers": [2, 4, 8, 16, 24],
    "hidden_size": [96, 192, 384, 576, 768],
}
LABELS = {
    "batch": "images in the batch",
    "image_size": "patches in an image",
    "num_hidden_layers": "layers of the encoders",
    "hidden_size": "width of the encoders",
}


def measure(group: str, rounds: int) -> dict[str, Any]:
    """Seconds and MiB of a step at each value of a group."""
    trainings = {}
    for value in GROUPS[group]:
        changes = dict(BASE)
        if group != "batch":
            changes[group] = value
        if group == "hidden_size":
            changes["num_attention_heads"] = value // 48
        made = make_training("cifar10-vit-tiny", value if group == "batch" else BATCH, **changes)
        trainings[made.config.num_patches if group == "image_size" else value] = made
    peaks = [
        peak_mib(made.step, lambda made=made: held_by([made.ready.model], made.ready.optimizer))
        for made in trainings.values()
    ]
    sides = {str(value): made.step for value, made in trainings.items()}
    times = take_turns(sides, rounds, clock=time.process_time)
    seconds = [statistics.median(values) for values in times.values()]
    values = list(trainings)
    return {
        "group": group,
        "values": values,
        "seconds": seconds,
        "mib": peaks,
        "seconds_fit": fit(values, seconds),
        "mib_fit": fit(values, peaks),
    }


def fit(values: list[int], measured: list[float]) -> dict[str, float]:
    """Non-negative constant, linear and square terms, least squares of the relative error."""
    x, y = np.array(values, dtype=float), np.array(measured)
    terms = np.stack([np.ones_like(x), x, x * x], axis=1)
    solution, _ = nnls(terms / y[:, None], np.ones_like(y))
    worst = float(np.abs(terms @ solution / y - 1).max())
    constant, linear, square = map(float, solution)
    return {"constant": constant, "linear": linear, "square": square, "largest_relative_error": worst}


def draw(found: list[dict[str, Any]], path: Path) -> None:
    """Points and fits, time above memory."""
    figure, axes = plt.subplots(2, len(found), figsize=(3.4 * len(found), 5.6), layout="constrained")
    for column, one in enumerate(found):
        for axis, name, scale, unit in (
            (axes[0], "seconds", 1e3, "ms a step"),
            (axes[1], "mib", 1, "MiB at the peak"),
        ):
            terms = one[f"{name}_fit"]
            x = np.linspace(0, max(one["values"]), 200)
            curve = terms["constant"] + terms["linear"] * x + terms["square"] * x * x
            axis[column].plot(x, scale * curve, linewidth=1, color="tab:blue")
            axis[column].plot(one["values"], scale * np.array(one[name]), "o", color="tab:orange", markersize=5)
            axis[column].set_xlim(left=0)
            axis[column].set_ylim(bottom=0)
            axis[column].set_title(f"fit within {100 * terms['largest_relative_error']:.0f} %", fontsize=9)
            if column == 0:
                axis[column].set_ylabel(unit)
        axes[1][column].set_xlabel(LABELS[one["group"]])
    figure.savefig(path, dpi=150)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--figure", type=Path, help="PNG file to draw")
    named = parser.parse_args()
    torch.set_num_threads(1)
    found = [measure(group, named.rounds) for group in GROUPS]
    for one in found:
        for name, unit in (("seconds", "s"), ("mib", "MiB")):
            terms = one[f"{name}_fit"]
            print(
                f"{one['group']:<18} {unit:<4} {terms['constant']:.4g} + {terms['linear']:.4g} x + "
                f"{terms['square']:.4g} x^2, within {100 * terms['largest_relative_error']:.1f} %"
            )
    if named.figure:
        draw(found, named.figure)
    if named.output:
        base = {"torch": torch.__version__, "threads": 1, "batch": BATCH, **BASE}
        named.output.write_text(json.dumps({**base, "groups": found}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
