"""Measures how fast masks are drawn, beside the published collator.

    python benchmarks/mask_speed.py
    IJEPA_OFFICIAL=path/to/ijepa python benchmarks/mask_speed.py --output benchmarks/results/mask_speed.json

`IJEPA_OFFICIAL` names a checkout of github.com/facebookresearch/ijepa (it is not part of this project: its licence is
CC BY-NC). Both samplers then run in this process, on one thread, in alternating rounds, so that whatever else the
machine does falls on both; without it, ours is measured alone. A round of ours is made of many batches, for a single
one is too short to time well. The ratio is the median over rounds of theirs / ours.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ijepa_hf.model.masking import MaskSettings, draw_masks

PATCH_SIZE = 16


def our_sampler(settings: MaskSettings, batch_size: int) -> Callable[[int], object]:
    """A function of the step that draws one batch of masks, the making of its generator included."""

    def sample(step: int) -> object:
        return draw_masks(settings, batch_size, np.random.Generator(np.random.Philox(key=[0, step])))

    return sample


def published_options(settings: MaskSettings) -> dict[str, Any]:
    """Settings under the names that the published collator and lightly's give them."""
    rows, columns = settings.grid_size
    return {
        "input_size": (rows * PATCH_SIZE, columns * PATCH_SIZE),
        "patch_size": PATCH_SIZE,
        "enc_mask_scale": settings.context_scale,
        "pred_mask_scale": settings.target_scale,
        "aspect_ratio": settings.target_aspect_ratio,
        "nenc": settings.num_context_sets,
        "npred": settings.num_target_blocks,
        "min_keep": settings.official_min_keep,
        "allow_overlap": settings.allow_overlap,
    }


def published_sampler(checkout: Path, settings: MaskSettings, batch_size: int) -> Callable[[int], object]:
    """The published collator with the same sizes, on a batch of empty images, so that only masks cost time."""
    if not (checkout / "src" / "masks" / "multiblock.py").is_file():
        raise FileNotFoundError(
            f"IJEPA_OFFICIAL={checkout} has no src/masks/multiblock.py: name a checkout of I-JEPA."
        )
    sys.path.insert(0, str(checkout))
    from src.masks.multiblock import MaskCollator  # type: ignore[import-not-found]

    collator = MaskCollator(**published_options(settings))
    images = [torch.zeros(0)] * batch_size
    return lambda step: collator(images)


def milliseconds(sample: Callable[[int], object], steps: range) -> float:
    """Mean time of one batch, in ms, over these steps."""
    start = time.perf_counter()
    for step in steps:
        sample(step)
    return (time.perf_counter() - start) / len(steps) * 1e3


def summary(values: list[float]) -> dict[str, float]:
    """Median and the middle half of some numbers."""
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": middle, "quarter": low, "three_quarters": high}


def measure(grid_size: tuple[int, int], batch_size: int, rounds: int, checkout: Path | None) -> dict[str, Any]:
    """Time both strategies of ours and, where there is a checkout, the published collator, round by round."""
    official = MaskSettings(grid_size, masking_strategy="multi_block_official")
    samplers = {
        "multi_block": our_sampler(MaskSettings(grid_size), batch_size),
        "multi_block_official": our_sampler(official, batch_size),
    }
    if checkout:
        samplers["published"] = published_sampler(checkout, official, batch_size)
    times: dict[str, list[float]] = {name: [] for name in samplers}
    for turn in range(rounds + 1):
        for name, sample in samplers.items():
            batches = 2 if name == "published" else 50
            elapsed = milliseconds(sample, range(turn * batches, (turn + 1) * batches))
            if turn:  # the first round warms up
                times[name].append(elapsed)
    result: dict[str, Any] = {"grid_size": grid_size, "batch_size": batch_size, "rounds": rounds}
    result["milliseconds_per_batch"] = {name: summary(values) for name, values in times.items()}
    if "published" in times:
        result["times_faster"] = {
            name: summary([theirs / ours for theirs, ours in zip(times["published"], times[name], strict=True)])
            for name in times
            if name != "published"
        }
    return result


def table(results: list[dict[str, Any]]) -> str:
    """The results as a Markdown table: median (middle half)."""
    lines = ["| grid | batch | sampler | ms a batch | times faster |", "| --- | --- | --- | --- | --- |"]
    for result in results:
        faster = result.get("times_faster", {})
        for name, took in result["milliseconds_per_batch"].items():
            ratio = faster.get(name)
            cells = [
                "{}x{}".format(*result["grid_size"]),
                str(result["batch_size"]),
                name,
                f"{took['median']:.3f} ({took['quarter']:.3f} to {took['three_quarters']:.3f})",
                f"{ratio['median']:.0f} ({ratio['quarter']:.0f} to {ratio['three_quarters']:.0f})" if ratio else "",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds, at least 2")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error(f"--rounds {arguments.rounds} must be at least 2, for there is no spread otherwise")
    torch.set_num_threads(1)
    named = os.environ.get("IJEPA_OFFICIAL")
    if not named:
        print("IJEPA_OFFICIAL is not set, so there is nothing to compare with: measuring ours only.\n")
    cases = [((14, 14), 64), ((14, 14), 512), ((16, 16), 64)]
    results = [measure(*case, arguments.rounds, Path(named) if named else None) for case in cases]
    print(table(results))
    if arguments.output:
        where = {"machine": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
        versions = {"numpy": np.__version__, "torch": torch.__version__}
        arguments.output.write_text(json.dumps({**where, **versions, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
