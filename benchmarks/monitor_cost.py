"""Measures what the collapse monitor costs: the time of a row beside that of the steps between two rows.

    python benchmarks/monitor_cost.py --output benchmarks/results/monitor_cost.json

Rows and steps of one model alternate in one process, on one thread, so that whatever else the machine does falls on
both. `share` is row / (steps between two rows x step): the part of the time that goes into rows, to stay under 1 %.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ijepa_hf.diagnosis.measures import rankme
from ijepa_hf.diagnosis.monitor import MONITOR_IMAGES, CollapseMonitor, make_monitor_batch
from ijepa_hf.diagnosis.run_monitor import steps_between
from ijepa_hf.model.masking import draw_masks
from ijepa_hf.model.modeling_ijepa import new_model
from ijepa_hf.randomness import keyed_generator
from ijepa_hf.recipes.parsing import as_flags, parse_arguments
from ijepa_hf.recipes.recipe_files import load_recipe
from ijepa_hf.training.plan import StepValues
from ijepa_hf.training.step import set_up_model
from ijepa_hf.training.watchers import CHUNK_OF_BATCHES

RECIPES = ("digits", "cifar10-vit-micro", "cifar10-vit-tiny")
STEPS_A_ROUND = {"digits": 20, "cifar10-vit-micro": 2, "cifar10-vit-tiny": 1}


def measure(recipe: str, rounds: int) -> dict[str, Any]:
    """Returns the medians over rounds for one recipe."""
    model_arguments, _, run = parse_arguments(as_flags({**load_recipe(recipe), "output_dir": "unused"}))
    config = model_arguments.to_config()
    ready = set_up_model(new_model(config, 0), run, Accelerator(cpu=True))
    batch = run.per_device_train_batch_size
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(batch, config.num_channels, *config.image_shape, generator=generator)
    masks = draw_masks(config.mask_settings(), batch, keyed_generator(0))
    inputs = {
        "pixel_values": pixels,
        "context_indices": masks.context_indices,
        "target_indices": masks.target_indices,
    }
    values = StepValues(learning_rate=1e-4, weight_decay=0.04, ema_momentum=0.996, encoder_is_frozen=False)
    held_out = torch.randn(MONITOR_IMAGES, config.num_channels, *config.image_shape, generator=generator)
    monitor = CollapseMonitor(
        make_monitor_batch(config, held_out), chunk_size=min(MONITOR_IMAGES, CHUNK_OF_BATCHES * batch)
    )
    every, steps = steps_between(batch, config.hidden_size), STEPS_A_ROUND[recipe]
    row_times, step_times = [], []
    for number in range(rounds + 1):
        begin = time.perf_counter()
        for _ in range(steps):
            ready.step([inputs], values)
        between = time.perf_counter()
        monitor.measure(ready.model)
        end = time.perf_counter()
        if number:  # the first warms up
            step_times.append((between - begin) / steps)
            row_times.append(end - between)
    shares = [row / (every * step) for row, step in zip(row_times, step_times, strict=True)]
    return {
        "recipe": recipe,
        "batch": batch,
        "steps_between_rows": every,
        "row_in_steps": statistics.median(row / step for row, step in zip(row_times, step_times, strict=True)),
        "share": statistics.median(shares),
        "share_middle_half": [statistics.quantiles(shares, n=4)[0], statistics.quantiles(shares, n=4)[2]],
        "rounds": rounds,
    }


def compare_spectra(rounds: int) -> list[dict[str, Any]]:
    """RankMe through the smaller Gram matrix beside a singular value decomposition of all features, alternating."""
    found = []
    for shape in ((4096, 384), (4096, 1280), (1024, 768)):
        features = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        ratios = []
        for number in range(rounds + 1):
            begin = time.perf_counter()
            ours = rankme(features)
            between = time.perf_counter()
            values = torch.linalg.svdvals(features)
            end = time.perf_counter()
            if number:  # the first warms up
                ratios.append((end - between) / (between - begin))
        shares = values / values.sum()
        theirs = float(torch.exp(-(shares * shares.log()).sum()))
        found.append({"shape": shape, "times_as_fast": statistics.median(ratios), "rankme": ours, "by_svd": theirs})
    return found


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path)
    named = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(recipe, named.rounds) for recipe in RECIPES]
    for row in rows:
        print(
            f"{row['recipe']:<20} a row is {row['row_in_steps']:.2f} steps, taken every {row['steps_between_rows']}: "
            f"{100 * row['share']:.2f} % of the time"
        )
    spectra = compare_spectra(named.rounds)
    for row in spectra:
        print(
            f"RankMe of {row['shape'][0]} x {row['shape'][1]}: {row['times_as_fast']:.1f} times as fast as a singular "
            f"value decomposition, {row['rankme']:.2f} and {row['by_svd']:.2f}"
        )
    if named.output:
        machine = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__, "threads": 1}
        named.output.write_text(json.dumps({**machine, "rows": rows, "spectra": spectra}, indent=2) + "\n")


if __name__ == "__main__":
    main()
