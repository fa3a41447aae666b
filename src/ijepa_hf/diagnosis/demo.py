"""Runs `ijepa-hf diagnose --demo`: trains a healthy and a collapsing model on drawn scenes, and judges both.

It works offline and takes about two minutes on two cores. The twins differ by three flags only: the second has no
moving average (momentum 0), and its targets are not normalised. Each is `ijepa-hf pretrain` in its own process.
"""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ijepa_hf.diagnosis.figures import draw_diagnostics_figure
from ijepa_hf.diagnosis.verdict import judge_collapse
from ijepa_hf.recipes.parsing import as_flags
from ijepa_hf.runs.folder import DIAGNOSTICS_FILE
from ijepa_hf.runs.rows import read_rows

_RUN: dict[str, Any] = {
    "dataset_name": "shapes",
    "max_train_samples": 2000,
    "image_size": 48,
    "patch_size": 6,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "predictor_hidden_size": 32,
    "predictor_num_hidden_layers": 2,
    "context_keep_ratio": 0.4,
    "min_crop_scale": 0.5,
    "per_device_train_batch_size": 16,
    "max_train_steps": 900,
    "warmup_epochs": 0.4,
    "start_learning_rate": 1e-4,
    "learning_rate": 1e-3,
    "num_cpu_threads": 1,
    "diagnostics_steps": 50,
    "logging_steps": 50,
    "checkpointing_steps": 900,
}
TWINS: dict[str, dict[str, Any]] = {
    "healthy": {},
    "collapsing": {"ema_momentum": 0.0, "final_ema_momentum": 0.0, "normalize_targets": False},
}
_ENTRIES = {"collapse.png", *TWINS, *(f"{name}.log" for name in TWINS)}


def run_demo(output_dir: Path) -> tuple[str, int]:
    """Trains both twins and judges them.

    Args:
        output_dir: Folder to write; files of an earlier demo in it are replaced.

    Returns:
        The text to print, and 0, or 1 if a verdict is wrong.

    Raises:
        RuntimeError: A training fails; the end of its output is in the message.
        ValueError: The folder holds something else.
    """
    if output_dir.exists() and {path.name for path in output_dir.iterdir()} - _ENTRIES:
        raise ValueError(f"output_dir={str(output_dir)!r} holds files that no demo wrote; choose another folder.")
    folders = {name: output_dir / name for name in TWINS}
    print("training two models on drawn scenes, beside each other; they differ by these flags:\n")
    print(f"    collapsing: {' '.join(as_flags(TWINS['collapsing']))}\n", flush=True)
    processes = {name: _start(folders[name], {**_RUN, **changes}) for name, changes in TWINS.items()}
    try:
        _wait(processes, folders)
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    rows = {name: read_rows(folder / DIAGNOSTICS_FILE) for name, folder in folders.items()}
    figure = output_dir / "collapse.png"
    draw_diagnostics_figure(rows, figure, title="the same training, healthy and collapsing")
    lines, wrong = [], 0
    for name in TWINS:
        verdicts = [judge_collapse(rows[name][: count + 1]) for count in range(len(rows[name]))]
        wrong |= verdicts[-1].is_failure != (name == "collapsing")
        first = next((verdict.step for verdict in verdicts if verdict.is_failure), None)
        named = "" if first is None else f" (first named at step {first} of {_RUN['max_train_steps']})"
        lines += [f"{name}{named}", f"    {verdicts[-1]}", ""]
    lines += [f"picture: {figure}", f"more: ijepa-hf diagnose {folders['healthy']}", "what it means: docs/collapse.md"]
    return "\n".join(lines), int(wrong)


def _start(folder: Path, values: dict[str, Any]) -> subprocess.Popen[bytes]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DIAGNOSTICS_FILE).unlink(missing_ok=True)  # rows of an earlier demo are no progress
    command = [sys.executable, "-m", "ijepa_hf.commands.main", "pretrain"]
    command += ["--output_dir", str(folder), "--overwrite_output_dir", *as_flags(values)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with folder.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def _wait(processes: dict[str, subprocess.Popen[bytes]], folders: dict[str, Path]) -> None:
    steps = _RUN["max_train_steps"]
    with tqdm(total=steps * len(processes), unit="step", desc="training") as progress:
        while True:
            running = [process for process in processes.values() if process.poll() is None]
            done = [read_rows(folder / DIAGNOSTICS_FILE) for folder in folders.values()]
            moved = sum(rows[-1]["step"] for rows in done if rows) - progress.n
            if moved:
                progress.update(moved)
            for name, process in processes.items():
                if process.poll() not in (None, 0):
                    log = folders[name].with_suffix(".log").read_text("utf-8", errors="replace")
                    code = process.returncode
                    raise RuntimeError(f"the training {name!r} failed with exit code {code}:\n{log[-2000:]}")
            if not running:
                return
            time.sleep(0.5)
