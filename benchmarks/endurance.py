"""Checks that memory, open files and the log do not grow over thousands of steps, in the loading processes too.

    python benchmarks/endurance.py --json benchmarks/results/endurance.json

Trains a small model for 5,000 steps with two loading processes, of a map-style set and of a stream, and reads from
/proc what the process and its loading processes hold, several times a second. Reported are the means of the third and
of the last fifth of the steps (before that, allocators and caches are still filling), and the bytes that a line of the
log takes in each.
"""

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from forked_runs import children_of, steps_logged  # noqa: E402
from tiny import tiny_flags  # noqa: E402

from ijepa_hf.data.prepare.prepare import PrepareSettings, prepare  # noqa: E402


def held_by(pid: int) -> dict[str, float]:
    """What a process holds: megabytes of memory that are its own, open files, threads."""
    status = Path(f"/proc/{pid}/status").read_text()
    lines = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    own = int(lines["RssAnon"].split()[0])  # without files that the system may drop, such as libraries and tables
    return {
        "megabytes": own / 1024,
        "open_files": len(list(Path(f"/proc/{pid}/fd").iterdir())),
        "threads": int(lines["Threads"]),
    }


def watch(output_dir: Path, steps: int, flags: list[str]) -> dict[str, Any]:
    """Trains, and gives means over the third and the last fifth of the steps."""
    samples: list[tuple[int, dict[str, float], list[dict[str, float]]]] = []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "scripts" / "run_ijepa_pretraining.py"), *flags]
    begin = time.monotonic()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        time.sleep(0.25)
        with contextlib.suppress(OSError, KeyError):  # it may end while we look
            workers = [held_by(pid) for pid in sorted(children_of(process.pid))]
            samples.append((steps_logged(output_dir), held_by(process.pid), workers))
    if process.returncode != 0:
        raise RuntimeError(f"training ended with {process.returncode}")
    lines = (output_dir / "metrics.jsonl").read_text().splitlines()
    result: dict[str, Any] = {"steps": steps, "seconds": round(time.monotonic() - begin), "log_lines": len(lines)}
    for name, first, last in (("third_fifth", 0.4, 0.6), ("last_fifth", 0.8, 0.99)):
        part = [sample for sample in samples if first * steps <= sample[0] < last * steps and len(sample[2]) == 2]
        rows = lines[int(first * len(lines)) : int(last * len(lines))]
        result[name] = {
            "samples": len(part),
            "process": _means([process for _, process, _ in part]),
            "loading_process": _means([worker for _, _, workers in part for worker in workers]),
            "bytes_of_a_log_line": round(sum(map(len, rows)) / len(rows), 1),
        }
    return result


def _means(samples: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(sum(sample[name] for sample in samples) / len(samples), 2) for name in samples[0]}


def main() -> None:
    """Trains both ways and prints what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=5000, help="Of each training (default 5000).")
    parser.add_argument("--json", type=Path, help="Where to write the result.")
    named = parser.parse_args()
    found: dict[str, Any] = {"machine": f"{os.cpu_count()} cores, {platform.system()}"}
    with tempfile.TemporaryDirectory() as folder:
        shards = Path(folder) / "shards"
        prepare("digits", str(shards), PrepareSettings(shard_size="100KB"))
        stream = {"dataset_name": shards, "streaming": True, "shuffle_buffer_size": 100}
        for name, changes in (("map-style", {"keep_images_in_memory": "no"}), ("stream", stream)):
            run = {
                "max_train_steps": named.steps, "dataloader_num_workers": 2, "checkpointing_steps": named.steps // 10,
                "logging_steps": 10, "diagnostics_steps": named.steps // 10, "max_train_samples": 1000,
                **changes,
            }  # fmt: skip
            found[name] = watch(Path(folder) / name, named.steps, tiny_flags(Path(folder) / name, **run))
            print(name, json.dumps(found[name], indent=2), flush=True)
    if named.json:
        named.json.write_text(json.dumps(found, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
