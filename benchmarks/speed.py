"""The table of speed and memory: this package beside others, in one run.

    make bench
    IJEPA_OFFICIAL=path/to/ijepa python benchmarks/speed.py --images photographs/ --cifar cifar10/

`IJEPA_OFFICIAL` names a checkout of github.com/facebookresearch/ijepa; without it a restatement in plain PyTorch
stands for its networks, and its mask collator is not measured. Without `--images` and `--cifar` pictures are
synthetic. Writes `benchmarks/results/<date>-<machine>.json`. A quarter of an hour, of a machine that does nothing else
(with two threads on two cores a second process makes small models a hundred times slower); `--quick` looks at all of
it once, in two minutes, and writes nothing: its numbers mean little.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from data_rows import image_pipeline_rows, mask_rows, small_images_rows
from device_rows import MODELS, device_rows
from end_to_end import end_to_end_row
from side_by_side import Row, render_table
from step_rows import bf16_speed, half_patches_row, inference_row, memory_rows, step_rows, update_share_row

RESULTS = Path(__file__).parent / "results"
SMALL, LARGE = ("cifar10-vit-tiny", 64), ("in1k-vitb16", 8)  # recipe and images a batch
BF16_PAYS = 1.2  # times as fast as float32, or bf16 rows stay empty


def all_rows(named: argparse.Namespace, checkout: Path | None) -> list[Row]:
    """Every row of the table, one group after the other, each announced."""
    quick = named.quick
    rounds = 2 if quick else 15
    few = 2 if quick else 5  # of what takes long
    large = ("digits", 8) if quick else LARGE
    small = ("digits", 16) if quick else SMALL
    rows: list[Row] = []

    def add(what: str, made: Callable[[], list[Row]]) -> None:
        print(f"{what} ...", file=sys.stderr, flush=True)
        torch.set_num_threads(os.cpu_count() or 1)  # some groups take one
        rows.extend(made())

    add("training steps", lambda: step_rows(*small, rounds, checkout, goals=(1.05, 1.2)))
    add("larger training steps", lambda: step_rows(*large, few, checkout, goals=(1.05, 1.2)))
    add("training steps in bf16", lambda: _bf16_rows(*large, few, checkout))
    for recipe, batch in (small, large):
        add("parts", lambda recipe=recipe, batch=batch: [update_share_row(recipe, batch, few)])
        add("half the patches", lambda recipe=recipe, batch=batch: [half_patches_row(recipe, batch, rounds)])
        add("inference", lambda recipe=recipe, batch=batch: [inference_row(recipe, batch, rounds)])
        add("memory", lambda recipe=recipe, batch=4 * batch: memory_rows(recipe, batch, checkout))
    add("masks", lambda: mask_rows(rounds, checkout))
    add("photographs", lambda: image_pipeline_rows(rounds, named.images))
    count = {"count": 512} if quick else {}
    add("small images", lambda: small_images_rows(rounds, named.cifar, **count))
    add("whole runs", lambda: [end_to_end_row(few, 3 if quick else 60, checkout, named.cifar)])
    add("a GPU", lambda: device_rows(rounds, checkout, MODELS))
    return rows


def _bf16_rows(recipe: str, batch: int, rounds: int, checkout: Path | None) -> list[Row]:
    """A bf16 step beside the published one in fp32, where the processor has instructions for bf16."""
    speed = bf16_speed()
    if speed < BF16_PAYS:
        reason = f"this processor multiplies bf16 matrices at {speed:.2f} times the speed of float32: it emulates them"
        return [
            Row("train step, cpu, bf16 beside fp32", 2.0, 2.5, not_measured=reason),
            Row("train step, cpu, bf16, against its own products", 1.5, 1.3, at_most=True, not_measured=reason),
        ]
    return step_rows(recipe, batch, rounds, checkout, bf16=True, goals=(2.0, 2.5))


def describe_machine() -> dict[str, Any]:
    """What the numbers were taken on."""
    return {
        "machine": _processor(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _processor() -> str:
    """The processor's name, as the system tells it."""
    if sys.platform == "darwin":
        asked = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    known = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text("utf-8"), re.MULTILINE)
    return known[1] if known else platform.machine()


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of photographs (JPEG); synthetic ones if not given")
    parser.add_argument("--cifar", type=Path, help="folder of CIFAR-10's parquet shards; noise if not given")
    parser.add_argument("--output", type=Path, help="JSON file; named after date and machine if not given")
    parser.add_argument("--quick", action="store_true", help="small models, two rounds; prints, writes nothing")
    named = parser.parse_args()
    checkout = os.environ.get("IJEPA_OFFICIAL")
    rows = all_rows(named, Path(checkout) if checkout else None)
    print(render_table(rows))
    if named.quick:
        return
    machine = describe_machine()
    words = re.sub(r"\(\w+\)|processor", "", f"{machine['machine']} {machine['cores']} cores".lower())
    name = re.sub(r"[^a-z0-9]+", "-", words).strip("-")
    output = named.output or RESULTS / f"{date.today().isoformat()}-{name}.json"
    output.write_text(json.dumps({**machine, "rows": [row.as_json() for row in rows]}, indent=1) + "\n", "utf-8")
    print(f"\nwritten to {output}")


if __name__ == "__main__":
    main()
