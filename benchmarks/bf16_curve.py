"""Compares the losses of runs on CIFAR-10 that differ only in the precision, bf16 or float32.

    python benchmarks/bf16_curve.py --cifar cifar10/ --output benchmarks/results/bf16_curve.json

Two more comparisons give the scale: float32 with another order of sums (eager attention), which is rounding alone,
and the published networks (of the checkout that `IJEPA_OFFICIAL` names, or their restatement), in float32 and under
bf16 autocast, on this package's batches. Losses are means over 25 steps, so that one batch does not decide. On a
processor that emulates bf16 it takes 20 minutes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from published_step import PublishedStep, reference_name

from ijepa_hf.data.collator import BatchMaker, IJepaDataCollator
from ijepa_hf.data.order import StreamLayout
from ijepa_hf.data.reading import CropReader
from ijepa_hf.data.transforms import normalize
from ijepa_hf.model.configuration_ijepa import IJepaConfig
from ijepa_hf.model.modeling_ijepa import new_model
from ijepa_hf.recipes.parsing import as_flags, parse_arguments
from ijepa_hf.recipes.recipe_files import load_recipe
from ijepa_hf.training.images import open_training_images

RECIPE = "cifar10-vit-micro"
BAND = 0.06  # of the loss: how far bf16 may be from float32, smoothed
WINDOW = 25  # steps in a mean
WARM_UP = 80  # steps until the published side's learning rate is the recipe's
MAIN = "import sys; from ijepa_hf.commands.main import main; sys.exit(main(sys.argv[1:]))"
OURS = {
    "float32": {},
    "float32, eager attention": {"attn_implementation": "eager"},
    "bf16": {"mixed_precision": "bf16"},
}
PUBLISHED = {"float32": None, "bf16": torch.bfloat16}


def our_losses(folder: Path, steps: int, batch: int, changes: dict[str, str]) -> list[float]:
    """The loss of each step of a run, a process of its own on one thread."""
    with tempfile.TemporaryDirectory() as scratch:
        flags = {
            **{name: value for name, value in load_recipe(RECIPE).items() if "eval" not in name},
            "dataset_name": folder,
            "output_dir": Path(scratch) / "run",
            "per_device_train_batch_size": batch,
            "max_train_steps": steps,
            "warmup_epochs": 0.1,
            "logging_steps": 1,
            "diagnostics_steps": 0,
            **changes,
        }
        _run([sys.executable, "-c", MAIN, "pretrain", *as_flags(flags)])
        lines = (Path(scratch) / "run" / "metrics.jsonl").read_text("utf-8").splitlines()
    return [row["loss"] for row in map(json.loads, lines)]


def published_losses(folder: Path, steps: int, batch: int, precision: str) -> list[float]:
    """The same of the published networks, which start from the patch projection that ours start from."""
    return json.loads(
        _run(
            [sys.executable, __file__, "--cifar", folder, "--steps", steps, "--batch", batch, "--published", precision]
        )
    )


def train_published(folder: Path, steps: int, batch: int, precision: str, checkout: Path | None) -> list[float]:
    """Trains the published networks here, on the batches of a run of the recipe."""
    torch.set_num_threads(1)
    flags = {**load_recipe(RECIPE), "dataset_name": folder, "output_dir": "unused"}
    model_arguments, data, run = parse_arguments(as_flags(flags))
    config = model_arguments.to_config()
    torch.manual_seed(run.seed)
    step = PublishedStep(config, checkout, autocast_dtype=PUBLISHED[precision])
    _start_from(step, config, run.seed)
    images = open_training_images(data, config, 1)
    crops = CropReader(images.column, config.image_shape, data.min_crop_scale, run.seed)
    make_batch = BatchMaker(IJepaDataCollator(config, normalize=False, seed=run.seed, global_batch_size=batch))
    loader = images.loader(crops, make_batch, [StreamLayout(0, 1, 0, batch, 1)], num_steps=steps)
    losses = []
    for number, made in enumerate(loader):
        pixels = normalize(made.inputs["pixel_values"], data.image_mean, data.image_std)
        rate = float(run.learning_rate or 0) * min(1.0, (number + 1) / WARM_UP)
        losses.append(step({**made.inputs, "pixel_values": pixels}, learning_rate=rate))
    return losses


def _start_from(step: PublishedStep, config: IJepaConfig, seed: int) -> None:
    ours = new_model(config, seed).context_encoder.embeddings.patch_embeddings.projection.weight
    context, _, target = step.networks
    for network in (context, target):
        weight = dict(network.named_parameters())["patch_embed.proj.weight"]
        weight.data.copy_(ours.data)


def largest_gap(one: list[float], other: list[float]) -> float:
    """The largest difference of the smoothed curves, as a share of the second."""
    return float(np.abs(smoothed(one) / smoothed(other) - 1).max())


def smoothed(losses: list[float]) -> np.ndarray:
    """Means over `WINDOW` steps."""
    return np.convolve(losses, np.ones(WINDOW) / WINDOW, mode="valid")


def _run(command: list[object]) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"a run ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done.stdout.splitlines()[-1]


def _draw(curves: dict[str, list[float]], path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True, layout="constrained")
    for name, curve in curves.items():
        axis = axes[int("published" in name)]
        axis.plot(
            np.arange(WINDOW, len(curve) + 1), smoothed(curve), label=name.removeprefix("published, "), linewidth=1.2
        )
    for axis, title in zip(axes, ("this package", "published networks"), strict=True):
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.legend()
    axes[0].set_ylabel(f"loss, mean over {WINDOW} steps")
    figure.savefig(path, dpi=150)


def main() -> None:
    """See the module; ends with 1 where bf16 leaves the band."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", type=Path, required=True, help="folder of CIFAR-10's parquet shards")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=64, help="images a step")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument("--published", choices=PUBLISHED, help=argparse.SUPPRESS)  # a process of the script's own
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--figure", type=Path, help="PNG file to draw")
    named = parser.parse_args()
    checkout = os.environ.get("IJEPA_OFFICIAL")
    about = (named.cifar, named.steps, named.batch)
    if named.published:
        print(json.dumps(train_published(*about, named.published, Path(checkout) if checkout else None)))
        return
    runs: dict[str, Callable[[], list[float]]] = {
        name: partial(our_losses, *about, changes) for name, changes in OURS.items()
    }
    runs |= {f"published, {name}": partial(published_losses, *about, name) for name in PUBLISHED}
    with ThreadPoolExecutor(named.workers) as pool:
        longest_first = sorted(runs, key=lambda name: "bf16" not in name)
        jobs = {name: pool.submit(runs[name]) for name in longest_first}
        curves = {name: jobs[name].result() for name in runs}
    gaps = {}
    for name, curve in curves.items():
        beside = "published, float32" if name.startswith("published") else "float32"
        gaps[name] = largest_gap(curve, curves[beside])
        print(f"{name:<26} last loss {smoothed(curve)[-1]:.4f}, at most {100 * gaps[name]:.2f} % from {beside}")
    if named.output:
        found = {"recipe": RECIPE, "batch": named.batch, "steps": named.steps, "band": BAND, "largest_gap": gaps}
        found["published"] = reference_name(Path(checkout) if checkout else None)
        rounded = {name: [round(loss, 5) for loss in curve] for name, curve in curves.items()}
        named.output.write_text(json.dumps({**found, "losses": rounded}) + "\n", "utf-8")
    if named.figure:
        _draw(curves, named.figure)
    if gaps["bf16"] > BAND:
        sys.exit(f"bf16 is more than {100 * BAND:g} % from float32")


if __name__ == "__main__":
    main()
