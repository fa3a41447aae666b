"""The rows that need a GPU: time, MFU, memory and the largest batch of the published models, bf16 on both sides.

    python benchmarks/device_rows.py                                  # on a machine with a GPU
    python benchmarks/device_rows.py --device cpu --models digits     # the same code where there is none

On a CPU it says whether the script works, nothing about speed. `largest batch` is searched for on a GPU only.
"""

import argparse
import gc
import os
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from published_step import PublishedStep, reference_name
from side_by_side import Row, Spread, ratios, render_table, scaled, take_turns
from step_rows import Training, finished, make_batch, make_training, memory_rows, products_alone

from ijepa_hf.estimation.cost import draw_sizes, model_work
from ijepa_hf.estimation.timing import HARDWARE

# model and images a batch: as many as fit beside each other on 80 GB, both sides at once
MODELS = {"in1k-vitb16": 128, "in1k-vitl16": 64, "in1k-vith14": 32}
LARGEST_TRIED = 4096


def device_rows(rounds: int, checkout: Path | None, models: dict[str, int], device: str = "cuda") -> list[Row]:
    """All rows for each model.

    Args:
        rounds: Timed rounds.
        checkout: The published code; `None` takes the restatement.
        models: Recipes and images a batch.
        device: `cuda`, or `cpu` to try the script.

    Returns:
        Step with MFU, memory three ways, and on a GPU the largest batch.
    """
    if device == "cuda" and not torch.cuda.is_available():
        wanted = [("train step, one GPU, bf16 both", 1.5, 2.0, False), ("largest batch on one GPU", 1.5, 2.0, False)]
        wanted += [("peak memory of a step on a GPU", 0.7, 0.6, True)]
        reason = f"no GPU here; `python benchmarks/device_rows.py` measures it for {', '.join(MODELS)}"
        return [Row(name, goal, stretch, at_most, not_measured=reason) for name, goal, stretch, at_most in wanted]
    found: list[Row] = []
    for recipe, batch_size in models.items():
        found.append(_time_row(recipe, batch_size, rounds, checkout, device))
        _release()
        found += memory_rows(recipe, batch_size, checkout, device=device, bf16=True)
        _release()
        if device == "cuda":
            found.append(_largest_batch_row(recipe, checkout))
    return found


def _time_row(recipe: str, batch_size: int, rounds: int, checkout: Path | None, device: str) -> Row:
    ours = make_training(recipe, batch_size, device=device, mixed_precision="bf16")
    reference = PublishedStep(ours.config, checkout, device=device, autocast_dtype=torch.bfloat16)
    times = take_turns(
        {
            "ours": lambda: finished(ours.step(), device),
            "reference": lambda: finished(reference(ours.batch), device),
            "floor": products_alone(ours.step, device),
        },
        rounds,
    )
    return Row(
        f"train step, {device}, bf16 both, {recipe}, batch {batch_size}",
        1.5,
        2.0,
        ours=scaled(times["ours"]),
        reference=scaled(times["reference"]),
        reference_name=f"{reference_name(checkout)} bf16",
        ratio=ratios(times["reference"], times["ours"]),
        limit=scaled(times["floor"]),
        limit_name="its matrix products alone",
        share_of_limit=ratios(times["floor"], times["ours"]),
        note=_utilisation(ours, times["ours"]),
    )


def _utilisation(training: Training, seconds: list[float]) -> str:
    """FLOP/s of the model's own products, and which share of the GPU's bf16 peak that is (MFU) where it is known."""
    pixels = training.batch["pixel_values"]
    work = model_work(training.config, draw_sizes(training.config, len(pixels)))
    rate = len(pixels) * sum(part.total for part in work.values()) / statistics.median(seconds)
    if pixels.device.type == "cpu":
        return f"{rate / 1e9:.3g} GFLOP/s"
    name = torch.cuda.get_device_name()
    known = (card for key, card in HARDWARE.items() if key.split("-")[0] in name.lower().replace(" ", ""))
    peak = next((card.bf16 for card in known), None)
    return f"{rate / 1e12:.3g} TFLOP/s on {name}" + (f", MFU {rate / peak:.3f}" if peak else "")


def _largest_batch_row(recipe: str, checkout: Path | None) -> Row:
    config = make_training(recipe, 1).config

    def ours(**flags: bool) -> Callable[[int], object]:
        return lambda size: make_training(recipe, size, device="cuda", mixed_precision="bf16", **flags).step()

    def published(size: int) -> object:
        step = PublishedStep(config, checkout, device="cuda", autocast_dtype=torch.bfloat16)
        return step(make_batch(config, size, "cuda"))

    largest = {
        "without": _largest(ours()),
        "selective": _largest(ours(selective_checkpointing=True)),
        "full": _largest(ours(gradient_checkpointing=True)),
        "published": _largest(published),
    }
    ratio = largest["without"] / largest["published"]
    return Row(
        f"largest batch on one GPU, bf16, {recipe}",
        1.5,
        2.0,
        unit="images",
        ours=Spread(*[largest["without"]] * 3),
        reference=Spread(*[largest["published"]] * 3),
        reference_name=reference_name(checkout),
        ratio=Spread(ratio, ratio, ratio),
        note=f"selective checkpointing {largest['selective']}, full {largest['full']}; found to within an eighth, "
        f"at most {LARGEST_TRIED} tried",
    )


def _largest(step: Callable[[int], object]) -> int:
    """The largest batch that a step does in memory: doubled while it does, then halved between, to an eighth."""

    def fits(size: int) -> bool:
        _release()
        try:
            step(size)
        except torch.cuda.OutOfMemoryError:
            return False
        return True

    good = 8
    while good < LARGEST_TRIED and fits(2 * good):
        good *= 2
    bad = 2 * good
    while good < LARGEST_TRIED and bad - good > max(1, good // 8):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="recipes")
    parser.add_argument("--batch", type=int, help="images a batch; the table's own numbers if not given")
    parser.add_argument("--rounds", type=int, default=10)
    named = parser.parse_args()
    checkout = os.environ.get("IJEPA_OFFICIAL")
    models = {name: named.batch or MODELS.get(name, 8) for name in named.models}
    print(render_table(device_rows(named.rounds, Path(checkout) if checkout else None, models, named.device)))


if __name__ == "__main__":
    main()
