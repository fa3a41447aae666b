"""The row about whole runs: this package's `pretrain` beside a loop as the published one, images to weights.

Each run is a process of its own on one thread that reads its images itself, so that no core does anything that is not
counted. The loop holds decoded images as arrays, as torchvision's CIFAR-10 does, makes a batch image by image, draws
masks with the published collator where a checkout is at hand, and takes the published step. So that both sides see as
many patches, that step gets masks of this package's collator, drawn beforehand for nothing.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import datasets
import numpy as np
import torch
from data_rows import published_crop
from mask_speed import published_sampler
from PIL import Image
from published_step import PublishedStep, reference_name
from side_by_side import Row, Spread

from ijepa_hf.data.sources.opening import ImageSource, find_image_column, load_split
from ijepa_hf.data.transforms import CROP_NUMBERS, crop_box
from ijepa_hf.model.masking import MaskSettings, draw_masks
from ijepa_hf.randomness import keyed_generator
from ijepa_hf.recipes.parsing import as_flags, parse_arguments
from ijepa_hf.recipes.recipe_files import load_recipe

RECIPE = "cifar10-vit-micro"
WARM_UP_STEPS = 4
IMAGES = 10_000  # of the set that both sides read
MAIN = "import sys; from ijepa_hf.commands.main import main; sys.exit(main(sys.argv[1:]))"


def end_to_end_row(rounds: int, steps: int, checkout: Path | None, cifar_folder: Path | None) -> Row:
    """Images a second of whole runs, in turns.

    Args:
        rounds: Runs of each side, at least 2.
        steps: Optimiser steps that are timed, after a few that are not.
        checkout: The published code; `None` takes the restatement.
        cifar_folder: CIFAR-10 as parquet shards; noise of the same size if not given.

    Returns:
        The row.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = cifar_folder or _write_noise(Path(scratch) / "noise")
        sides: dict[str, Callable[[], float]] = {
            "ours": lambda: _our_speed(folder, steps),
            "published": lambda: _published_speed(folder, steps, checkout),
        }
        speeds: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(rounds):
            for name in list(sides)[:: 1 if turn % 2 else -1]:
                speeds[name].append(sides[name]())
    what = "CIFAR-10" if cifar_folder else "noise of CIFAR-10's size"
    return Row(
        f"end to end, cpu, one thread, fp32, {RECIPE}, loader included",
        2.0,
        2.5,
        unit="images/s",
        ours=Spread.of(speeds["ours"]),
        reference=Spread.of(speeds["published"]),
        reference_name=f"a loop as the published one, {reference_name(checkout)}",
        ratio=Spread.of([one / other for one, other in zip(speeds["ours"], speeds["published"], strict=True)]),
        note=f"{what}, {rounds} runs of {steps} steps each way; opening the data and imports are not counted",
    )


def _our_speed(folder: Path, steps: int) -> float:
    with tempfile.TemporaryDirectory() as scratch:
        flags = {
            "dataset_name": folder,
            "output_dir": Path(scratch) / "run",
            "max_train_samples": IMAGES,
            "max_train_steps": WARM_UP_STEPS + steps,
            "warmup_epochs": 0,
            "logging_steps": WARM_UP_STEPS + steps,
            "diagnostics_steps": 0,
            "keep_images_in_memory": "yes",  # as by itself in a run of the recipe's length
        }
        # a copy of the recipe without scoring, which is no part of either loop
        recipe = {name: value for name, value in load_recipe(RECIPE).items() if "eval" not in name}
        command = [sys.executable, "-c", MAIN, "pretrain", *as_flags({**recipe, **flags})]
        _run(command)
        rows = [json.loads(line) for line in (Path(scratch) / "run" / "metrics.jsonl").read_text("utf-8").splitlines()]
    return rows[-1]["images_per_second"]  # of all steps but the first


def _published_speed(folder: Path, steps: int, checkout: Path | None) -> float:
    command = [sys.executable, __file__, "--images", folder, "--steps", steps]
    if checkout:
        command += ["--checkout", checkout]
    return float(_run(list(map(str, command))).splitlines()[-1])


def _run(command: Sequence[str]) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"a run ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done.stdout


def _write_noise(folder: Path) -> Path:
    noise = np.random.default_rng(0).integers(0, 256, (IMAGES, 32, 32, 3), dtype=np.uint8)
    features = datasets.Features({"image": datasets.Image()})
    made = datasets.Dataset.from_dict({"image": [Image.fromarray(pixels) for pixels in noise]}, features)
    folder.mkdir()
    made.to_parquet(folder / "train.parquet")
    return folder


# -- the other side's process ----------------------------------------------------------------------------------------


class _Images(torch.utils.data.Dataset[torch.Tensor]):
    """Arrays in memory to normalised crops, one at a time."""

    def __init__(self, folder: Path) -> None:
        loaded = load_split(ImageSource(str(folder)), "train")
        loaded = loaded.select(range(min(IMAGES, len(loaded))))
        column = find_image_column(loaded)
        self.arrays = [np.asarray(picture.convert("RGB")) for picture in loaded[column]]
        self.generator = np.random.default_rng(0)

    def __len__(self) -> int:
        return len(self.arrays)

    def __getitem__(self, index: int) -> torch.Tensor:
        picture = Image.fromarray(self.arrays[index])
        size = (picture.height, picture.width)
        return published_crop(picture, crop_box(*size, size, 0.3, self.generator.random(CROP_NUMBERS)), size)


def published_loop(folder: Path, steps: int, checkout: Path | None) -> float:
    """Runs the other side here; returns its images a second."""
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    model_arguments, _, run = parse_arguments(as_flags({**load_recipe(RECIPE), "output_dir": "unused"}))
    config, size = model_arguments.to_config(), run.per_device_train_batch_size
    settings = config.mask_settings()
    masks = [draw_masks(settings, size, keyed_generator(0, step)) for step in range(WARM_UP_STEPS + steps)]
    # with its own official_min_keep=10 it searches for ever on so small a grid
    theirs = MaskSettings(settings.grid_size, masking_strategy="multi_block_official", official_min_keep=4)
    draw = published_sampler(checkout, theirs, size) if checkout else None

    def collate(images: list[torch.Tensor]) -> torch.Tensor:
        if draw is not None:
            draw(0)
        return torch.stack(images)

    loader = torch.utils.data.DataLoader(
        _Images(folder), size, shuffle=True, drop_last=True, collate_fn=collate, num_workers=0
    )
    step = PublishedStep(config, checkout)

    def batches() -> Iterator[torch.Tensor]:
        while True:
            yield from loader

    begin = 0.0
    for number, (pixels, drawn) in enumerate(zip(batches(), masks, strict=False)):
        if number == WARM_UP_STEPS:
            begin = time.perf_counter()
        step(
            {
                "pixel_values": pixels,
                "context_indices": drawn.context_indices,
                "target_indices": drawn.target_indices,
            }
        )
    return steps * size / (time.perf_counter() - begin)


def main() -> None:
    """See the module: prints the speed of the published side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder of parquet shards")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--checkout", type=Path, help="a checkout of the published code")
    named = parser.parse_args()
    print(published_loop(named.images, named.steps, named.checkout))


if __name__ == "__main__":
    main()
