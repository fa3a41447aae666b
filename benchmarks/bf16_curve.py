"""Whether bf16 learns what float32 learns: the losses of two runs of CIFAR-10 that differ in the precision only.

    python benchmarks/bf16_curve.py --cifar cifar10/ --output benchmarks/results/bf16_curve.json

A third run, float32 again with another order of sums (eager attention), shows how far rounding alone takes two
runs apart. The loss is the mean of each ten steps' logged value and its neighbours, so that one batch does not decide.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from ijepa_hf.arguments import as_flags, load_recipe

RECIPE = "cifar10-vit-micro"
BAND = 0.02  # of the loss: how far bf16 may be from float32, smoothed
WINDOW = 5  # logged values in a mean
LOGGING_STEPS = 5
RUNS = {
    "float32": {},
    "float32, eager attention": {"attn_implementation": "eager"},
    "bf16": {"mixed_precision": "bf16"},
}
MAIN = "import sys; from ijepa_hf.cli import main; sys.exit(main(sys.argv[1:]))"


def losses(folder: Path, steps: int, batch: int, changes: dict[str, str]) -> list[float]:
    """The logged losses of one run, a process of its own on one thread."""
    with tempfile.TemporaryDirectory() as scratch:
        flags = {
            **{name: value for name, value in load_recipe(RECIPE).items() if "eval" not in name},
            "dataset_name": folder,
            "output_dir": Path(scratch) / "run",
            "per_device_train_batch_size": batch,
            "max_train_steps": steps,
            "warmup_epochs": 0.1,
            "logging_steps": LOGGING_STEPS,
            "diagnostics_steps": 0,
            **changes,
        }
        command = [sys.executable, "-c", MAIN, "pretrain", *as_flags(flags)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"a run ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
        lines = (Path(scratch) / "run" / "metrics.jsonl").read_text("utf-8").splitlines()
    return [row["loss"] for row in map(json.loads, lines) if row["step"] % LOGGING_STEPS == 0]


def largest_gap(one: list[float], other: list[float]) -> float:
    """The largest difference of the smoothed curves, as a share of the second."""
    kernel = np.ones(WINDOW) / WINDOW
    smooth = [np.convolve(curve, kernel, mode="valid") for curve in (one, other)]
    return float(np.abs(smooth[0] / smooth[1] - 1).max())


def main() -> None:
    """See the module; ends with 1 where bf16 leaves the band."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", type=Path, required=True, help="folder of CIFAR-10's parquet shards")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=64, help="images a step")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--figure", type=Path, help="PNG file to draw")
    named = parser.parse_args()
    with ThreadPoolExecutor(named.workers) as pool:
        longest_first = reversed(RUNS)
        jobs = {name: pool.submit(losses, named.cifar, named.steps, named.batch, RUNS[name]) for name in longest_first}
        curves = {name: jobs[name].result() for name in RUNS}
    gaps = {name: largest_gap(curve, curves["float32"]) for name, curve in curves.items()}
    for name, gap in gaps.items():
        print(f"{name:<26} last loss {curves[name][-1]:.4f}, at most {100 * gap:.2f} % from float32")
    if named.figure:
        for name, curve in curves.items():
            plt.plot(np.arange(1, len(curve) + 1) * LOGGING_STEPS, curve, label=name, linewidth=1)
        plt.xlabel("step")
        plt.ylabel("loss")
        plt.legend()
        plt.savefig(named.figure, dpi=150, bbox_inches="tight")
    if named.output:
        found = {"recipe": RECIPE, "batch": named.batch, "steps": named.steps, "band": BAND, "largest_gap": gaps}
        named.output.write_text(json.dumps({**found, "losses": curves}, indent=1) + "\n", "utf-8")
    if gaps["bf16"] > BAND:
        sys.exit(f"bf16 is more than {100 * BAND:g} % from float32")


if __name__ == "__main__":
    main()
